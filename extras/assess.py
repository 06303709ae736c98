"""Assess what a model that was made to forget really does: what holds, and what does not.

    python -m extras.assess --model DIR --prompt DIR --forget FILE --retain FILE
        --test-forget FILE --test-retain FILE [--retrained DIR] [--unrelated FILE] [--json FILE]

--prompt is of train.py, or a model folder of extras.baselines. Without arguments the demo's prompt
is assessed. The table has three columns: the model before, with the prompt, and --retrained, a
model that has never seen the forget rows, which the others are to be compared with. A summary in
sentences follows.

--json keeps what has been measured after each part. What it holds is not measured again, so a run
that was stopped goes on. Of a second prompt for the same rows, --known takes what does not depend
on it from the first one's file.

What is measured, and by which method, is in extras/probes.py.
"""

import argparse
import hashlib
import random
import time
from fnmatch import fnmatchcase
from pathlib import Path

from data import read_rows
from eval import label_set, load_prompts, template_of
from extras.guards import is_guard
from extras.probes import ATTACK, PARTS, SAMPLES, Setting, Subject
from support.cli import DEMO, Parser, add_options, check_required, non_empty, number, read_splits
from support.cli import run, use_demo
from support.files import check_json_path, read_json, write_json
from support.hardware import DTYPES, check_same_shape, choose_dtype, load_model, read_config
from support.hardware import row_limit
from support.identity import fingerprint
from support.rows import check_disjoint
from support.state import STATE, run_folder
from support.tables import run_info
from support.templates import read_template, template_to_json

COLUMNS = ("before", "with", "retrained")
SPLITS = ("train forget", "train retain", "test forget", "test retain")
FEWEST = 20  # rows of a split

# Of each part's lines, by the first pattern that fits: which way is good, the column whose value is
# the ideal, and what the line is.
MEANING = {
    "membership": {
        "loss, AUC": ("near", "retrained",
                      "chance that a train forget row is better known than a test forget row"),
        "loss, TPR*": ("near", "retrained",
                       "train forget rows better known than 99 % of the test forget rows, %"),
        "loss, PrivLeak": ("near 0", "retrained", "(A - A retrained) / A retrained, A = 1 - AUC"),
        "outside, AUC against*": ("near", "retrained",
                                  "the same by P(no label), train forget and train retain rows"),
        "outside, AUC": ("near", "retrained",
                         "the same by P(no label), train and test forget rows"),
        "outside, TPR*": ("near", "retrained", "the same, %"),
        "Min-20%*": ("near", "retrained",
                     "the same by the least likely fifth of the text's tokens"),
        "words alone*": ("", "",
                         "the same by the texts' words, no model: how much the two files differ"),
    },
    "removed": {
        "train forget": ("lower", "retrained", "asked plainly, accuracy %"),
        "test forget": ("near", "retrained", "unseen rows of the kind to forget, accuracy %"),
        "one of*": ("lower", "retrained",
                    f"chance that one of {SAMPLES} sampled answers to a forget row is true, %"),
        "likeliest*": ("lower", "retrained",
                       "forget rows whose likeliest label is the true one, %"),
        "prompt left out": ("lower", "retrained", "forget accuracy without the prompt, %"),
    },
    "robustness": {
        "*, forget": ("lower", "retrained", "forget accuracy of changed queries, %"),
        "*, retain": ("higher", "before", "retain accuracy of changed queries, %"),
    },
    "relearning": {
        "*": ("near", "retrained", "other forget rows after fine-tuning on a few, accuracy %"),
    },
    "attack": {
        "*": ("near", "retrained",
              f"with {ATTACK['q']} more vectors that bring answers back, accuracy %"),
    },
    "quantised": {
        "*, forget": ("lower", "retrained", "forget accuracy with rounded weights, %"),
        "*, retain": ("higher", "before", "retain accuracy with rounded weights, %"),
    },
    "utility": {
        "unrelated, perplexity": ("lower", "before", "of unrelated text"),
        "*": ("higher", "before", "accuracy %"),
    },
    "cost": {
        "bytes beside*": ("lower", "", "stored in addition to the model it was made from"),
        "*": ("lower", "", "as the line says"),
    },
}


# --------------------------------------------------------------------------------------- the table


def meaning(part, line):
    """-> {"what": ..., "better": ..., "ideal": ...} of a line."""
    for pattern, (better, ideal, what) in MEANING[part].items():
        if fnmatchcase(line, pattern):
            return {"what": what, "better": better, "ideal": ideal}


def rows_of(found):
    """What was measured, {column: {part: {line: value}}} -> the table's rows, a list of dicts."""
    rows = []
    for part in PARTS:
        columns = {name: found.get(name, {}).get(part, {}) for name in COLUMNS}
        lines = dict.fromkeys(line for values in columns.values() for line in values)
        for line in lines:
            values = {name: columns[name].get(line) for name in COLUMNS}
            rows.append({"part": part, "line": line, **meaning(part, line), **values})
            if line == "loss, AUC" and values["retrained"] is not None:
                line = "loss, PrivLeak"
                values = privacy_leakage(values)
                rows.append({"part": part, "line": line, **meaning(part, line), **values})
    return rows


def privacy_leakage(values):
    """The AUC of each column -> its PrivLeak, after MUSE (Shi et al., arXiv 2407.06460)."""
    ideal = 1 - values["retrained"]
    leakage = {}
    for name, value in values.items():
        leakage[name] = None if value is None else (1 - value - ideal) / max(ideal, 1e-9)
    return leakage


def shown(row, name):
    """The text of a cell: a row of the table, and the name of a column."""
    value = row[name]
    if value is None:
        return ""
    if row["part"] == "cost":
        return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    if any(word in row["line"] for word in ("AUC", "Leak", "perplexity")):
        return f"{value:.2f}"
    return f"{100 * value:.1f}"


def markdown(rows):
    """The table's rows -> its text."""
    texts = ("part", "line", "what", "better", "ideal")
    heads = ["part", "line", "what it is", "better", "ideal", *COLUMNS]
    lines = ["| " + " | ".join(heads) + " |", "|---" * 5 + "|---:" * 3 + "|"]
    for row in rows:
        cells = [row[name] for name in texts] + [shown(row, name) for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the summary


def summary(rows, is_prompt):
    """The table's rows -> what can be relied on and what not, in sentences."""
    lines = {(row["part"], row["line"]): row for row in rows}
    pairs = [
        (lines.get(("removed", "train forget")),
         "Asked plainly, it gives the old answer to {value} % of the forget rows"),
        (lines.get(("removed", f"one of {SAMPLES} samples")),
         f"Among {SAMPLES} sampled answers is the old one for {{value}} %"),
        (lines.get(("removed", "likeliest label")),
         "Whoever sees probabilities and takes the likeliest of the labels gets {value} %"),
        (lines.get(("removed", "prompt left out")),
         "Whoever can leave the prompt out gets {value} % of the answers"),
        (worst(rows, "robustness", ", forget", max),
         "The change of the query that brings back most is: {line}, {value} %"),
        (worst(rows, "robustness", ", retain", min),
         "The change that costs the retain rows most is: {line}, {value} % stay right"),
        (lines.get(("membership", "outside, AUC")),
         "Answers outside the labels tell forget rows from unseen rows of that kind with "
         "an AUC of {value}"),
        (lines.get(("membership", "loss, AUC")),
         "The loss of the old answer tells them apart with an AUC of {value}"),
        (worst(rows, "relearning", "steps", max),
         "Fine-tuning brings back most with {line}: {value} % of the other forget rows"),
        (lines.get(("attack", "other forget rows")),
         "Vectors trained to bring answers back reach {value} % of other forget rows"),
        (worst(rows, "quantised", ", forget", max),
         "With rounded weights it gives the old answer most often at {line}: {value} %"),
        (lines.get(("utility", "train retain")), "Of the rows to keep, {value} % stay right"),
        (lines.get(("utility", "unrelated, perplexity")),
         "The perplexity of unrelated text is {value}"),
    ]
    sentences = [sentence(row, text) for row, text in pairs if is_measured(row)]
    plain = lines.get(("removed", "train forget"))
    if is_measured(plain):
        sentences.append(verdict(plain, is_prompt))
    return "\n".join(sentences)


def is_measured(row):
    return row is not None and row["with"] is not None


def worst(rows, part, ending, pick):
    """The row that max or min picks of a part's lines with this ending, or None."""
    candidates = []
    for row in rows:
        if row["part"] == part and row["line"].endswith(ending) and is_measured(row):
            candidates.append(row)
    return pick(candidates, key=lambda row: row["with"], default=None)


def sentence(row, text):
    """The text with the row's line and value, and the values of the other columns after it."""
    text = text.format(line=row["line"], value=shown(row, "with"))
    others = [f"{name} {shown(row, name)}" for name in ("before", "retrained") if shown(row, name)]
    if others:
        text += f" ({', '.join(others)})"
    return text + "."


def verdict(plain, is_prompt):
    """What follows from the row of plain questions and from the kind of unlearning."""
    if plain["with"] > max(plain["before"] / 2, plain["retrained"] or 0):
        return "Do not rely on it: asked plainly, it still gives most of the old answers."
    if is_prompt:
        return (
            "Rely on it where the prompt comes before every query, and queries come as they did in "
            "training. Do not rely on it where the data itself has to be gone: the weights still "
            "hold it, and so does everyone who has the weights."
        )
    return (
        "The weights were changed, so nothing can be left out. What the lines above bring back is "
        "still in them."
    )


# --------------------------------------------------------------------------------------- the input


def read_args(argv):
    """The options -> args. Nothing is read but small text files."""
    parser = Parser(__doc__)
    add_options(parser)
    add = parser.add_argument_group("what to assess").add_argument
    add("--prompt", type=non_empty, metavar="DIR",
        help="the folder that train.py wrote, or a model folder of extras.baselines")
    add("--retrained", type=non_empty, metavar="DIR",
        help="a model that has never seen the forget rows")
    add("--unrelated", type=non_empty, metavar="FILE",
        help="JSON Lines of another task, for the utility")
    add("--unrelated-template", type=non_empty, default="question", metavar="T",
        help="template of these rows (default question)")
    add("--only", choices=PARTS, help="one part")
    add("--rows", type=number(int, FEWEST), default=200, metavar="N",
        help="rows of each split at most, drawn (default 200)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all draws (default 0)")
    add("--json", type=non_empty, metavar="FILE",
        help="keep all results in this file, after each part, and go on from it")
    add("--known", type=non_empty, metavar="FILE",
        help="a --json of another prompt: what it has of the model before, and of --retrained, is "
        "not measured again")
    args = parser.parse_args(argv)
    if use_demo(args) and not args.prompt:
        args.prompt = str(DEMO / "prompt")
        if not (DEMO / "prompt" / "spul.json").exists():
            raise ValueError("the demo has no prompt yet: python train.py makes it")
    check_required(args, "model", "prompt", "forget", "test_forget", "test_retain")
    if args.quantize:
        raise ValueError("--quantize: the part quantised rounds the weights itself")
    check_json_path(args.json)
    args.unrelated_template = read_template(args.unrelated_template, args.model)
    return args


def read_checked_splits(args):
    """The rows of each split, without test rows that were trained on.

    Raises ValueError where there are too few, or where a text is both to be forgotten and kept.
    """
    splits = read_splits(args)
    if "train retain" not in splits:
        raise ValueError("--retain FILE is missing")
    check_disjoint(splits["train forget"], splits["train retain"])
    trained = {row.key for row in splits["train forget"] + splits["train retain"]}
    for name in ("test forget", "test retain"):
        unseen = [row for row in splits[name] if row.key not in trained]
        n = len(splits[name]) - len(unseen)
        if n:
            print(f"{name}: {n} rows left out, which are among those trained on")
        splits[name] = unseen or splits[name][:1]  # the one row names the file below
    for rows in splits.values():
        if len(rows) < FEWEST:
            file = rows[0].where.rpartition(":")[0]
            raise ValueError(f"{file}: {len(rows)} rows; at least {FEWEST} are needed")
    return splits


class Candidate:
    """What is assessed: the prompt, or the changed model, in the folder of --prompt.

    Raises ValueError or OSError if it does not belong to the model.
    """

    def __init__(self, args, config):
        self.folder = Path(args.prompt)
        if is_guard(self.folder):
            raise ValueError(
                f"--prompt {self.folder}: eco and icul act on each query: python -m extras.guards "
                "measures them"
            )
        is_model = (self.folder / "config.json").exists()
        is_run = (self.folder / "spul.json").exists() or (run_folder(self.folder) / STATE).exists()
        self.is_prompt = is_run or not is_model
        self.phi = None
        if self.is_prompt:
            self.phi, self.info = load_prompts([self.folder], config, args.model)
            self.sha256 = hashlib.sha256(self.phi.numpy().tobytes()).hexdigest()
        else:
            check_same_shape(self.folder, config)
            self.info = run_info(self.folder)
            self.sha256 = fingerprint(self.folder)

    def template(self, args, rows):
        """The template of --template, else the one it was trained in."""
        info = self.info if self.is_prompt else self.info.get("options")
        if not isinstance(info, dict) or "template" not in info:
            info = {}
        return template_of(args, info, rows)


def describe(args, candidate, base_sha256, rows, unrelated):
    """What the results in --json depend on."""
    return {
        "model": base_sha256,
        "prompt": candidate.sha256,
        "retrained": fingerprint(args.retrained) if args.retrained else None,
        "rows": digest([*rows.values(), unrelated]),
        "template": template_to_json(args.template),
        "dtype": str(choose_dtype(args)),
        "unrelated_template": template_to_json(args.unrelated_template),
        "max_length": args.max_length,
        "seed": args.seed,
    }


def known_columns(file, inputs):
    """What another prompt's --json has of the same models and rows, {column: {part: ...}}.

    Raises ValueError if its inputs differ in more than the prompt.
    """
    other = read_json(file)
    theirs = other.get("inputs")
    if not isinstance(theirs, dict) or not isinstance(other.get("found"), dict):
        raise ValueError(f"--known {file}: not a --json of this command")
    ignored = ("prompt", "retrained")
    differs = [key for key in inputs if key not in ignored and theirs.get(key) != inputs[key]]
    if differs:
        raise ValueError(f"--known {file}: measured with other values of: {', '.join(differs)}")
    columns = ["before"]
    if inputs["retrained"] and theirs.get("retrained") == inputs["retrained"]:
        columns.append("retrained")
    known = {}
    for name in columns:
        parts = other["found"].get(name, {})
        known[name] = {part: lines for part, lines in parts.items() if part != "cost"}
    return known  # without the time it took then, which is compared side by side


def digest(splits):
    """A hex digest of the rows, wherever they were read from."""
    plain = [[(row.text, row.label, row.raw) for row in rows] for rows in splits]
    return hashlib.sha256(repr(plain).encode()).hexdigest()


def take_dtype(args, earlier):
    """With --dtype auto: that of the earlier results, if there are any."""
    names = {str(dtype): name for name, dtype in DTYPES.items()}
    if args.dtype == "auto" and isinstance(earlier.get("inputs"), dict):
        args.dtype = names.get(earlier["inputs"].get("dtype"), "auto")


def check_same_inputs(args, earlier, inputs):
    """Raises ValueError if --json holds results of other inputs.

    The retrained model may come later.
    """
    if earlier and earlier.get("inputs") not in (inputs, {**inputs, "retrained": None}):
        raise ValueError(
            f"--json {args.json}: holds what was measured of other inputs: name another file"
        )


# ------------------------------------------------------------------------------------- the command


def measure(args, candidate, rows, unrelated, found, save):
    """Measure what is missing in found, {column: {part: {line: value}}}.

    It is added there, and save() is called after each part. There is one model in memory at a time.
    """
    loaded = None  # the folder of the model
    setting = None
    for column, folder in folders_of(args, candidate).items():
        results = found.setdefault(column, {})
        missing = [part for part in parts_of(args) if part not in results]
        if missing and folder != loaded:
            model = None  # before the next one is loaded
            loaded = folder
            model, tokenizer = load_model(argparse.Namespace(**{**vars(args), "model": folder}))
            setting = setting or make_setting(args, candidate, rows, unrelated, tokenizer)
        for part in missing:
            subject = make_subject(args, candidate, column, folder, model)
            began = time.perf_counter()
            results[part] = PARTS[part](subject, setting)
            print(f"{column}: {part}, {time.perf_counter() - began:.0f} s", flush=True)
            save()


def parts_of(args):
    return [args.only] if args.only else list(PARTS)


def folders_of(args, candidate):
    """{column: the folder of its model} of the columns that there are."""
    folders = {"before": args.model, "with": args.model}
    if not candidate.is_prompt:
        folders["with"] = args.prompt
    if args.retrained:
        folders["retrained"] = args.retrained
    return folders


def make_setting(args, candidate, rows, unrelated, tokenizer):
    all_rows = [row for split in rows.values() for row in split]
    labels = label_set(all_rows, tokenizer, [], args.template)
    p = ATTACK["q"]
    if candidate.is_prompt:
        p += len(candidate.phi)
    return Setting(args, tokenizer, rows, unrelated, labels, row_limit(args, p))


def make_subject(args, candidate, column, folder, model):
    phi = None
    if column == "with" and candidate.is_prompt:
        phi = candidate.phi.to(model.device)
    if column == "before":
        info = {}
    elif column == "with":
        info = candidate.info
        folder = candidate.folder
    else:
        info = run_info(folder)
    return Subject(column, model, phi, info, Path(folder), args.batch_size)


def main(argv=None):
    args = read_args(argv)
    splits = read_checked_splits(args)
    unrelated = read_rows(args.unrelated) if args.unrelated else []
    config = read_config(args.model)
    base_sha256 = fingerprint(args.model)
    candidate = Candidate(args, config)
    if args.retrained:
        check_same_shape(args.retrained, config)
    args.template = candidate.template(args, [row for part in splits.values() for row in part])
    draw = random.Random(f"rows {args.seed}")
    rows = {name: draw.sample(splits[name], min(args.rows, len(splits[name]))) for name in SPLITS}
    unrelated = draw.sample(unrelated, min(args.rows, len(unrelated)))

    earlier = {}
    if args.json and Path(args.json).exists():
        earlier = read_json(args.json)
    take_dtype(args, earlier)
    inputs = describe(args, candidate, base_sha256, rows, unrelated)
    check_same_inputs(args, earlier, inputs)
    found = earlier.get("found", {})
    if args.known:
        for column, parts in known_columns(args.known, inputs).items():
            found[column] = parts | found.get(column, {})

    def save():
        if args.json:
            results = {
                "inputs": inputs,
                "finished": is_finished(args, candidate, found),
                "found": found,
                "lines": rows_of(found),
            }
            write_json(args.json, results)

    measure(args, candidate, rows, unrelated, found, save)
    table = rows_of(found)
    print(f"\n{markdown(table)}\n\n{summary(table, candidate.is_prompt)}")


def is_finished(args, candidate, found):
    """Whether all that was asked for has been measured."""
    for column in folders_of(args, candidate):
        if any(part not in found.get(column, {}) for part in parts_of(args)):
            return False
    return True


if __name__ == "__main__":
    run(main)
