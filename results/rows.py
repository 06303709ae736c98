"""Draw the rows of the experiments from the public data sets, and check that they are the same.

    python results/rows.py [sst2] [sciq] [tofu] --source DIR [--out DIR]

Without a name it draws all three. --source has a folder for each, with these files:

    sst2   v3_train_forget.csv, v3_train_retain.csv, v3_test_forget.csv and v3_test_retain.csv, the
           authors' files, with columns text, label and label_text; or train_forget.jsonl and so
           on, JSON Lines with "text" and "label", which is "positive" or "negative"
    sciq   train_forget.jsonl and so on, JSON Lines with "text", a question and its choices, and
           "label", the right one's letter; NOTICE says how to make them from sciq.json
    tofu   TOFU's forget10_perturbed.json and retain_perturbed.json; or perturbed_forget.jsonl and
           perturbed_retain.jsonl with "text", "label", "paraphrase" and "wrong", and
           test_forget.jsonl and test_retain.jsonl, whose "text" is the same question reworded;
           for the chats also forget10.json and retain90.json, or train_forget.jsonl and
           train_retain.jsonl with "text" and "label"

NOTICE says where these files come from, and which rows are taken. A file is only written if it is
the one that the experiments had, byte for byte.
"""

import csv
import hashlib
import json
import random
import sys
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from support.cli import Parser, non_empty, run  # noqa: E402
from support.files import read_text, write_whole  # noqa: E402

SHA256 = {
    "sst2/forget": "907e3bf41a538a38b9c2e3e11b3d5afeea39f13709b2157da4d09d5741071f80",
    "sst2/forget_more": "5c39a926af26cf89f73a6703d385202628b1ba9c86e7759b03e6308ce8c01589",
    "sst2/full_forget": "ae85949b823680c9f2921d54e44e0591bbea2cfb9be280deddf85469d6819c75",
    "sst2/full_retain": "31fdc34dca14e756eea7b56f1048c6b2f1e8ac878861ed6774ce0fb7d4b6c57f",
    "sst2/retain": "4ff363cb087cf48404cf358b5e5e34d2a66287af64ae6026cbf25eaf24fd844d",
    "sst2/retain_more": "e57dce967a38d93c03a9bf01098f09e99922d5f551489d32fe10cf7a4c0806de",
    "sst2/test_forget": "671e5a1b3b425a2591a0bc826c3fa0d380c342b9ebe7185d4b7f31f2825339d4",
    "sst2/test_retain": "0616f47f4452e3e0d7d7b5373e186d1ab00a6a87221c4a72496c14c6493e6026",
    "sciq/forget": "7aa59c29d613c4fc03e7eab14f028cadee4dd1a0e72dbedafb481c6c771f0020",
    "sciq/retain": "94892b85a59f9073f1c2672b747673452bf9c56fa442bbd9dfb76e6c256a4f45",
    "sciq/test_forget": "776d8279157792a44af26c4eb713e12cb16aa5710a2f088320be2f909bc09ded",
    "sciq/test_retain": "6188a3e89f56c8d9075520a639291855e13123f7e1bf0b91d19e6c6b0d73a428",
    "tofu/chat_forget": "e58da2cc092b04874c50c63c0d8c2a5464c3e84f6d85a53f96315006c71353b8",
    "tofu/chat_retain": "1bc436fc7c5e503c914a74cb49c830f899e3b727bb562f9ad60d4bfe69b52853",
    "tofu/chat_test_forget": "7e10ce48bda16c4af07063d6cbbdf06b91b13a3139718e46098a3677626c61cb",
    "tofu/chat_test_retain": "e851c21d3837efffba0909802fdbc4199e9db76c00fe0a48f9e78b85c7f22e5f",
    "tofu/forget": "0476b8199b8daae603f57f5e0eafe24ec722872c01b024121ff602df3c04a47a",
    "tofu/retain": "8dfa0b38fdd06eb22f1e815ac05b8103b4a17c9f73e740384b70468c2f08b6d6",
    "tofu/test_forget": "d7ba6f7f44699ff24da35c9cd6c96090eb0229779becb950cc9e2805dd2991c5",
    "tofu/test_retain": "3d9501baa369cb86a096c5bcf51074cf06e8a5a29ea4b917b66163eaea2efa39",
}
# Of each source, in the order of a draw: the files here and how many rows they take.
SST2 = {
    "train_forget": {"forget": 300, "forget_more": 100},
    "train_retain": {"retain": 900, "retain_more": 2300},
    "test_forget": {"test_forget": 300},
    "test_retain": {"test_retain": 600},
}
SCIQ = {
    "train_forget": {"forget": 300},
    "train_retain": {"retain": 1000},
    "test_forget": {"test_forget": 100},
    "test_retain": {"test_retain": 300},
}
TOFU = {"forget": 40, "retain": 360}  # questions, 20 of each author
CHAT = {"forget": 200, "retain": 600, "test": 200}  # questions of 10 and 30 authors
EVERY = {"forget": 1, "retain": 4}  # in other words: all, and every fourth


# ------------------------------------------------------------------------------------- reading


def read_lines(file, keys):
    """The rows of a JSON Lines file. Raises ValueError for one without one of the keys."""
    rows = []
    lines = read_text(file).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in keys})
        except (ValueError, TypeError, KeyError):
            names = ", ".join(keys)
            raise ValueError(f"{file}:{number}: not JSON with {names}") from None
    return rows


def read_table(file):
    """The rows of one of the authors' CSV files."""
    with open(file, encoding="utf-8-sig", newline="") as f:
        rows = list(csv.DictReader(f))
    if not rows or not {"text", "label_text"} <= set(rows[0]):
        raise ValueError(f"{file}: not CSV with columns text and label_text")
    return [{"text": row["text"].strip(), "label": row["label_text"]} for row in rows]


def read_source(folder, name):
    """The rows of one of a source's four files."""
    table = folder / f"v3_{name}.csv"
    if table.exists():
        return read_table(table)
    return read_lines(folder / f"{name}.jsonl", ("text", "label"))


def read_tofu(folder, side):
    """TOFU's questions with their right and wrong answers, and the questions in other words."""
    file = folder / {"forget": "forget10_perturbed.json", "retain": "retain_perturbed.json"}[side]
    if not file.exists():
        keys = ("text", "label", "paraphrase", "wrong")
        rows = read_lines(folder / f"perturbed_{side}.jsonl", keys)
        reworded = read_lines(folder / f"test_{side}.jsonl", ("text", "label"))
        if [row["label"] for row in rows] != [row["label"] for row in reworded]:
            raise ValueError(f"{folder}: perturbed_{side} and test_{side} do not belong together")
        return rows, [row["text"] for row in reworded]
    names = {
        "text": "question",
        "label": "answer",
        "paraphrase": "paraphrased_answer",
        "wrong": "perturbed_answer",
    }
    found = read_lines(file, (*names.values(), "paraphrased_question"))
    rows = [{key: row[name] for key, name in names.items()} for row in found]
    return rows, [row["paraphrased_question"] for row in found]


def read_questions(folder, side):
    """TOFU's questions and answers, all of a side."""
    file = folder / {"forget": "forget10.json", "retain": "retain90.json"}[side]
    if not file.exists():
        rows = read_lines(folder / f"train_{side}.jsonl", ("text", "label"))
        return [(row["text"], row["label"]) for row in rows]
    rows = read_lines(file, ("question", "answer"))
    return [(row["question"], row["answer"]) for row in rows]


# ------------------------------------------------------------------------------------- drawing


def draw(rows, name):
    """The rows in an order that depends on the name alone, without repeated texts."""
    drawn = {}
    for row in random.Random(f"{name} 0").sample(rows, len(rows)):
        drawn.setdefault(row["text"], row)
    return list(drawn.values())


def draw_all(study, sources, plan):
    """{name of a file here: its rows}, from the front of each source's draw."""
    files = {}
    for source, parts in plan.items():
        rows = iter(draw(sources[source], f"{study} {source}"))
        for name, n in parts.items():
            files[name] = list(islice(rows, n))
    return files


def sst2(folder):
    sources = {name: read_source(folder, name) for name in SST2}
    known = {plain(row["text"]) for row in sources["train_retain"]}
    unseen = [row for row in sources["test_retain"] if plain(row["text"]) not in known]
    sources["test_retain"] = unseen
    files = draw_all("sst2", sources, SST2)
    files["full_forget"] = sources["train_forget"]
    files["full_retain"] = sources["train_retain"]
    return files


def plain(text):
    """A text as it is compared: in lower case, with single spaces."""
    return " ".join(text.lower().split())


def sciq(folder):
    sources = {name: read_source(folder, name) for name in SCIQ}
    return draw_all("sciq", sources, SCIQ)


def tofu(folder):
    files = {}
    for side, n in TOFU.items():
        rows, reworded = read_tofu(folder, side)
        files[side] = [tofu_row(row, row["text"]) for row in rows[:n]]
        pairs = list(zip(rows, reworded))[: n : EVERY[side]]
        files[f"test_{side}"] = [tofu_row(row, question) for row, question in pairs]
        files[f"chat_{side}"] = [chat(*pair) for pair in read_questions(folder, side)[: CHAT[side]]]
        pairs = list(zip(reworded, rows))[: CHAT["test"]]
        files[f"chat_test_{side}"] = [chat(question, row["label"]) for question, row in pairs]
    return files


def chat(question, answer):
    """A question and its answer as a conversation."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def tofu_row(row, question):
    """A question in our form: the prompt and its answers, each a line."""
    return {
        "prompt": f"Question: {question}\nAnswer:",
        "completion": f" {row['label']}\n",
        "paraphrase": f" {row['paraphrase']}\n",
        "wrong": [f" {wrong}\n" for wrong in row["wrong"]],
    }


# ------------------------------------------------------------------------------------- the command


def write_checked(folder, study, files):
    """Write a study's files as JSON Lines. Raises ValueError, and writes none, if one differs."""
    contents = {}
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        content = "".join(lines).encode()
        if hashlib.sha256(content).hexdigest() != SHA256[f"{study}/{name}"]:
            raise ValueError(f"{study}/{name}: not the rows of the experiments: another source?")
        contents[name] = content
    (folder / study).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        file = folder / study / f"{name}.jsonl"
        write_whole(file, lambda temporary, content=content: temporary.write_bytes(content))
        print(f"{len(files[name]):6} rows in {file}")


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    studies = {"sst2": sst2, "sciq": sciq, "tofu": tofu}
    add("studies", nargs="*", metavar="NAME", help="sst2, sciq or tofu (default all)")
    add("--source", type=non_empty, required=True, metavar="DIR", help="the public files")
    add("--out", type=non_empty, default=HERE, metavar="DIR", help="default results")
    args = parser.parse_args(argv)
    for study in args.studies:
        if study not in studies:
            raise ValueError(f"{study}: not one of {', '.join(studies)}")
    for study in args.studies or studies:
        files = studies[study](Path(args.source) / study)
        write_checked(Path(args.out), study, files)


if __name__ == "__main__":
    run(main)
