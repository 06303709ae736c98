"""What a model that was made to forget really does: what holds, and what does not.

    python assess.py --model DIR --prompt DIR --forget FILE --retain FILE --test-forget FILE --test-retain FILE
                     [--retrained DIR] [--unrelated FILE] [--json FILE] [--only PART]

--prompt is of train.py, or a model folder of baselines.py. Without arguments it assesses the demo's prompt. There are
three columns: the model before, with the prompt, and --retrained, one that has never seen the forget rows, which is
what the others are to be measured by. What --json holds is not measured again, so a stopped run goes on.

What is measured, and after whom, is in probes.py.
"""

import hashlib
import random
import time
from pathlib import Path

from cli import (DEMO, Parser, add_options, check_same_shape, filled, hardware, load_model, number, read_splits,
                 row_limit, run, use_demo)
from data import check_disjoint, read_rows, read_template
from eval import label_set, load_prompts
from files import read_json, write_json
from guards import is_guard
from model import Config
from probes import ATTACK, PARTS, Setting, Subject
from spul import STATE, fingerprint

COLUMNS = ("before", "with", "retrained")
SPLITS = ("train forget", "train retain", "test forget", "test retain")
FEWEST = 20  # rows of a split

# Of a part's lines, by how they begin or end: which way is good, the column whose value is the ideal, what it is.
MEANING = {
    "membership": {
        "loss, AUC": ("near", "retrained", "chance that a train forget row is better known than a test forget row"),
        "loss, TPR": ("near", "retrained", "train forget rows better known than 99 % of the test forget rows, %"),
        "loss, PrivLeak": ("near 0", "retrained", "(A - A retrained) / A retrained, A = 1 - AUC"),
        "outside, AUC against": ("near", "retrained", "the same by P(no label), train forget and train retain rows"),
        "outside, AUC": ("near", "retrained", "the same by P(no label), train and test forget rows"),
        "outside, TPR": ("near", "retrained", "the same, %"),
        "Min-20%": ("near", "retrained", "the same by the least likely fifth of the text's tokens"),
        "words alone": ("", "", "the same by the texts' words, no model: what the two files differ by"),
    },
    "removed": {
        "train forget": ("lower", "retrained", "asked plainly, accuracy %"),
        "test forget": ("near", "retrained", "unseen rows of the kind to forget, accuracy %"),
        "one of 8": ("lower", "retrained", "chance that one of 8 sampled answers to a forget row is the true one, %"),
        "likeliest": ("lower", "retrained", "forget accuracy for whoever sees probabilities: of labels alone, %"),
        "prompt left": ("lower", "retrained", "forget accuracy for whoever can leave the prompt out, %"),
    },
    "robustness": {", forget": ("lower", "retrained", "forget accuracy of changed queries, %"),
                   ", retain": ("higher", "before", "retain accuracy of changed queries, %")},
    "relearning": {"": ("near", "retrained", "other forget rows after fine-tuning on a few, accuracy %")},
    "attack": {"": ("near", "retrained", f"with {ATTACK['q']} more vectors that bring answers back, accuracy %")},
    "quantised": {", forget": ("lower", "retrained", "forget accuracy with rounded weights, %"),
                  ", retain": ("higher", "before", "retain accuracy with rounded weights, %")},
    "utility": {"unrelated, perplexity": ("lower", "before", "of unrelated text"),
                "": ("higher", "before", "accuracy %")},
    "cost": {"bytes beside": ("lower", "", "to be stored besides the model it was made from"),
             "": ("lower", "", "as the line says")},
}


def meaning(part, line):
    return next(words for key, words in MEANING[part].items() if line.startswith(key) or key and line.endswith(key))


def rows_of(found):
    """{column: {part: {line: value}}} -> the table's rows, dicts, in the order of the parts."""
    rows = []
    for part in PARTS:
        columns = {name: found.get(name, {}).get(part, {}) for name in COLUMNS}
        for line in dict.fromkeys(line for values in columns.values() for line in values):
            better, ideal, what = meaning(part, line)
            rows.append({"part": part, "line": line, "what": what, "better": better, "ideal": ideal,
                         **{name: values.get(line) for name, values in columns.items()}})
            if line == "loss, AUC" and columns["retrained"]:
                own = 1 - columns["retrained"][line]
                leak = {name: (1 - values[line] - own) / max(own, 1e-9) for name, values in columns.items() if values}
                rows.append({"part": part, "line": "loss, PrivLeak", **dict(zip(("better", "ideal", "what"), meaning(
                    part, "loss, PrivLeak"))), **{name: leak.get(name) for name in COLUMNS}})
    return rows


def shown(row, name):
    value = row[name]
    if value is None:
        return ""
    if row["part"] == "cost":
        return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    plain = any(word in row["line"] for word in ("AUC", "Leak", "perplexity"))
    return f"{value:.2f}" if plain else f"{100 * value:.1f}"


def markdown(rows):
    lines = ["| " + " | ".join(["part", "line", "what it is", "better", "ideal", *COLUMNS]) + " |",
             "|---" * 5 + "|---:" * 3 + "|"]
    return "\n".join(lines + ["| " + " | ".join([row["part"], row["line"], row["what"], row["better"], row["ideal"],
                                                 *(shown(row, name) for name in COLUMNS)]) + " |" for row in rows])


def summary(rows, is_prompt):
    """What can be relied on and what not, in sentences."""
    values = {(row["part"], row["line"]): row for row in rows}

    def say(part, line, text):
        row = values.get((part, line))
        if not row or row["with"] is None:
            return None
        beside = [f"{label} {shown(row, name)}" for name, label in (("before", "before"), ("retrained", "retrained"))
                  if row[name] is not None]
        return text.format(shown(row, "with")) + (f" ({', '.join(beside)})" if beside else "") + "."

    def worst(part, end, pick):
        lines = [row for row in rows if row["part"] == part and row["line"].endswith(end) and row["with"] is not None]
        return pick(lines, key=lambda row: row["with"], default={"line": None})["line"]

    changed, hurt = worst("robustness", ", forget", max), worst("robustness", ", retain", min)
    taught, bits = worst("relearning", "steps", max), worst("quantised", ", forget", max)
    sentences = [
        say("removed", "train forget", "Asked plainly, it gives the old answer to {} % of the forget rows"),
        say("removed", "one of 8 samples", "Among 8 sampled answers is the old one for {} %"),
        say("removed", "likeliest label", "Whoever sees probabilities and takes the likeliest of the labels gets {} %"),
        say("removed", "prompt left out", "Whoever can leave the prompt out gets {} % of the answers"),
        say("robustness", changed, f"The change of the query that brings back most is: {changed}, {{}} %"),
        say("robustness", hurt, f"The change that costs the retain rows most is: {hurt}, {{}} % stay right"),
        say("membership", "outside, AUC", "That a row of this kind was in the forget set shows in answers outside the "
            "labels, with an AUC of {}"),
        say("membership", "loss, AUC", "It shows in the loss of the old answer with an AUC of {}"),
        say("relearning", taught, f"Fine-tuning brings back most with {taught}: {{}} % of the other forget rows"),
        say("attack", "other forget rows", "Vectors trained to bring answers back reach {} % of other forget rows"),
        say("quantised", bits, f"With rounded weights it gives the old answer most at {bits}: {{}} %"),
        say("utility", "train retain", "Of the rows to keep, {} % stay right"),
        say("utility", "unrelated, perplexity", "The perplexity of unrelated text is {}"),
    ]
    plain = values.get(("removed", "train forget"))
    if not plain or plain["with"] is None:
        verdict = None
    elif plain["with"] > max(plain["before"] / 2, plain["retrained"] or 0):
        verdict = "Do not rely on it: asked plainly, it still gives most of the old answers."
    elif is_prompt:
        verdict = ("Rely on it where every query has the prompt in front and comes as it did in training. Do not rely "
                   "on it where the data itself has to be gone: the weights still hold it, and so does whoever holds "
                   "them.")
    else:
        verdict = "The weights were changed, so nothing can be left out. What those lines bring back is still in them."
    return "\n".join(filter(None, [*sentences, verdict]))


# -------------------------------------------------------------------------------------------------- the command


def digest(splits):
    """Of the rows as they are, wherever they were read from."""
    plain = [[(row.text, row.label, row.raw) for row in rows] for rows in splits]
    return hashlib.sha256(repr(plain).encode()).hexdigest()


def read_args(argv):
    parser = Parser(__doc__)
    add_options(parser)
    group = parser.add_argument_group("what to assess")
    group.add_argument("--prompt", type=filled, metavar="DIR", help="of train.py, or a model folder of baselines.py")
    group.add_argument("--retrained", type=filled, metavar="DIR", help="a model that has not seen the forget rows")
    group.add_argument("--unrelated", type=filled, metavar="FILE", help="JSON Lines of another task, for its utility")
    group.add_argument("--unrelated-template", type=filled, default="question", metavar="T", help="default question")
    group.add_argument("--only", choices=PARTS, help="one part")
    group.add_argument("--rows", type=number(int, FEWEST), default=200, metavar="N",
                       help="at most so many of each split, drawn (default 200)")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    group.add_argument("--json", type=filled, metavar="FILE", help="write all there after each part; go on from there")
    args = parser.parse_args(argv)
    if use_demo(args) and not args.prompt:
        args.prompt = str(DEMO / "prompt")
        if not (DEMO / "prompt" / "spul.json").exists():
            raise ValueError("the demo has no prompt yet: python train.py makes it")
    for name in ("model", "prompt", "forget", "test_forget", "test_retain"):
        if not getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is missing: assess.py needs --model, --prompt and the four "
                             "files of rows")
    if args.quantize:
        raise ValueError("--quantize: the part quantised rounds the weights itself")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: in no folder")
    args.unrelated_template = read_template(args.unrelated_template)
    return args


def main(argv=None):
    args = read_args(argv)
    splits, config = read_splits(args), Config.from_file(Path(args.model) / "config.json")
    if "train retain" not in splits:
        raise ValueError("--retain FILE is missing")
    check_disjoint(splits["train forget"], splits["train retain"])
    trained = {row.key for name in SPLITS[:2] for row in splits[name]}
    for name in SPLITS[2:]:
        unseen = [row for row in splits[name] if row.key not in trained]
        if len(unseen) < len(splits[name]):
            print(f"{name}: {len(splits[name]) - len(unseen)} rows left out, which are among those trained on")
        splits[name] = unseen or splits[name][:1]
    for name, rows in splits.items():
        if len(rows) < FEWEST:
            raise ValueError(f"{rows[0].where.rpartition(':')[0]}: {len(rows)} rows; at least {FEWEST} are needed")
    unrelated = read_rows(args.unrelated) if args.unrelated else []
    base_sha256, prompt = fingerprint(args.model), Path(args.prompt)
    is_prompt = (prompt / "spul.json").exists() or (prompt / STATE).exists() or not (prompt / "config.json").exists()
    if is_guard(prompt):
        raise ValueError(f"--prompt {prompt}: eco and icul act on each query: eval.py measures them")
    if is_prompt:
        phi, info = load_prompts([prompt], config, base_sha256)
    else:
        check_same_shape(prompt, config)
        phi, info = None, read_json(prompt / "run.json") if (prompt / "run.json").is_file() else {}
    if args.retrained:
        check_same_shape(args.retrained, config)
    options = info if is_prompt else info.get("options")
    template = options.get("template", 0) if isinstance(options, dict) else 0
    args.template = read_template(args.template or template or "sentiment") if template is not None else "{text}"

    draw = random.Random(f"rows {args.seed}")
    rows = {name: draw.sample(splits[name], min(args.rows, len(splits[name]))) for name in SPLITS}
    unrelated = draw.sample(unrelated, min(args.rows, len(unrelated)))
    inputs = {"model": base_sha256, "prompt": hashlib.sha256(phi.numpy().tobytes()).hexdigest() if is_prompt else
              fingerprint(prompt), "retrained": fingerprint(args.retrained) if args.retrained else None,
              "rows": digest([*rows.values(), unrelated]), "template": args.template, "dtype": str(hardware(args)[1]),
              "unrelated_template": args.unrelated_template, "max_length": args.max_length, "seed": args.seed}
    found = {}
    if args.json and Path(args.json).exists():
        known = read_json(args.json)
        if known.get("inputs") not in (inputs, inputs | {"retrained": None}):  # that column may come later
            raise ValueError(f"--json {args.json}: holds what was measured of other inputs: name another file")
        found = known["found"]

    folders = {"before": args.model, "with": args.model if is_prompt else args.prompt, "retrained": args.retrained}
    loaded, setting, parts = {}, None, [args.only] if args.only else [*PARTS]
    wanted = [(column, part) for column, folder in folders.items() if folder for part in parts]
    for column, folder in folders.items():
        for part in parts:
            if not folder or part in found.setdefault(column, {}):
                continue
            if folder not in loaded:
                loaded.clear()
                model = tokenizer = None  # one model at a time
                args.model = folder
                loaded[folder] = load_model(args)
            model, tokenizer = loaded[folder]
            setting = setting or Setting(args, tokenizer, rows, unrelated, label_set(
                [row for split in rows.values() for row in split], tokenizer, []),
                row_limit(args, ATTACK["q"] + (len(phi) if is_prompt else 0)))
            run_file = Path(folder) / "run.json"
            own = {} if column == "before" else info if column == "with" else (
                read_json(run_file) if run_file.is_file() else {})
            began = time.perf_counter()
            found[column][part] = PARTS[part](Subject(
                column, model, phi.to(model.device) if is_prompt and column == "with" else None, own,
                prompt if column == "with" else Path(folder), args.batch_size), setting)
            print(f"{column}: {part}, {time.perf_counter() - began:.0f} s", flush=True)
            if args.json:
                finished = all(part in found.get(column, {}) for column, part in wanted)
                write_json(args.json, {"inputs": inputs, "finished": finished, "found": found, "lines": rows_of(found)})
    table = rows_of(found)
    print(f"\n{markdown(table)}\n\n{summary(table, is_prompt)}")


if __name__ == "__main__":
    run(main)
