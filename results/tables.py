"""The tables of study.py: from a study's runs and what they measured to rows, for JSON, and to markdown."""

import json
import math
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import assess  # noqa: E402
from files import read_json  # noqa: E402

COLUMNS = ("train retain", "train forget", "test retain", "test forget")  # the paper's order
PAPER = {  # accuracy of LLaMA-2-7B in the columns' order
    "sst2": {"title": "paper's accuracy",
             "vanilla": (37.50, 31.79, 37.51, 29.67), "memorised": (99.89, 99.72, 95.57, 96.07),
             "GA": (55.66, 53.93, 55.96, 56.89), "RL": (33.31, 13.82, 31.00, 14.26),
             "GA+KL": (55.64, 53.96, 55.94, 56.89), "GA+GD": (97.17, 13.75, 94.43, 11.31),
             "SPUL": (99.15, 12.98, 94.93, 16.07)},
    "sciq": {"title": "paper's accuracy: WMDP's biology to forget, SciQ to retain",
             "memorised": (99.74, 98.11, 91.80, 62.73), "GA+GD": (99.42, 27.22, 90.00, 22.25),
             "SPUL": (99.38, 5.44, 89.70, 3.22)},
    "ablations": {"title": "paper's accuracy", "alpha 1, beta 0.5, p 30": (99.15, 12.98, 94.93, 16.07),
                  "alpha 0.1, beta 0": (90.84, 9.12, 89.50, 10.33), "alpha 0.1, beta 1": (85.19, 8.49, 84.64, 10.66),
                  "alpha 0.5, beta 0.5": (97.74, 13.82, 93.97, 17.21), "alpha 1, beta 0": (97.52, 12.14, 94.22, 15.57),
                  "alpha 1, beta 1": (95.70, 14.88, 93.05, 17.38),
                  **{f"{share} % of the forget rows": (math.nan, forget, math.nan, math.nan)  # with alpha 1, beta 1
                     for share, forget in ((25, 26.69), (50, 18.96))}},
}
PAPER["full"] = PAPER["sst2"]


def measured(file):
    """A run's JSON file -> its contents, or None if the run has not come to its end: its commands are added last."""
    found = read_json(file) if file.exists() else {}
    return found if "commands" in found and found.get("finished", True) else None


def shown(run):
    """Its commands, as one types them."""
    return ["python " + shlex.join(map(str, command)) for command in run.commands]


def first_of(run):
    """What a row of any table begins with."""
    return {"method": run.method, "name": run.name, "commands": shown(run)}


def collect(runs):
    """-> the table's rows. Of a baseline's runs the one with most retain less forget accuracy on train is chosen."""
    rows = []
    for run in runs:
        file = run.results
        row = {**first_of(run), "chosen": False}
        if found := measured(file):
            row |= {"splits": found["with"] or found["without"], "cost": found["cost"], "dtype": found["dtype"]}
        elif file.with_suffix(".failed").exists():
            row["failed"] = file.with_suffix(".failed").read_text().strip()
        rows.append(row)
    for method in dict.fromkeys(row["method"] for row in rows):
        here = [row for row in rows if row["method"] == method and "splits" in row]
        for row in here if method == "SPUL" else [max(here, key=gain)] if here else []:
            row["chosen"] = True
    return rows


def gain(row):
    return row["splits"]["train retain"]["accuracy"] - row["splits"]["train forget"]["accuracy"]


def per_cent(values):
    """Fractions -> their mean in per cent, and the spread of several."""
    values = [100 * v for v in values]
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.1f}{spread}"


def markdown(rows, paper):
    """Two tables: accuracy and F1 beside the paper's accuracy; and what else was measured, with the cost."""
    first = ["| " + " | ".join(["method", *COLUMNS, paper.get("title", ""), "run"]) + " |",
             "|---" + "|---:" * 4 + "|---|---|"]
    second = ["| method | outside, train forget | commonest, train forget | outside, train retain | flagged, of train "
              "forget / retain | trainable | steps | s in them | peak GB |", "|---" + "|---:" * 8 + "|"]
    dtypes = {row["dtype"] for row in rows if "dtype" in row}
    for method in dict.fromkeys(row["method"] for row in rows):
        here = [row for row in rows if row["method"] == method and row["chosen"]]
        if not here:
            reasons = {row.get("failed", "not run") for row in rows if row["method"] == method}
            first.append(f"| {method} | " + "| " * 4 + f"| {'; '.join(sorted(reasons))} |")
            continue

        def values(split, metric):
            found = [row["splits"][split][metric] for row in here if metric in row["splits"][split]]
            return per_cent(found) if found else ""

        def cost(name, form):
            found = [row["cost"][name] for row in here if name in row["cost"]]
            return form(sum(found) / len(found)) if found else ""

        cells = [f"{values(split, 'accuracy')} / {values(split, 'f1')}" for split in COLUMNS]
        theirs = " / ".join("–" if math.isnan(value) else f"{value:.1f}" for value in paper.get(method, ()))
        tries = [row for row in rows if row["method"] == method]
        done = sum("splits" in row or "failed" in row for row in tries)
        names = ", ".join(row["name"] for row in here)
        names += f", best of {done}" * (done > len(here)) + f", {len(tries) - done} not run" * (done < len(tries))
        names += f", {here[0]['dtype'].removeprefix('torch.')}" * (len(dtypes) > 1)
        first.append(f"| {method} | " + " | ".join([*cells, theirs, names]) + " |")
        flagged = " / ".join(filter(None, (values(split, "flagged") for split in ("train forget", "train retain"))))
        second.append(f"| {method} | " + " | ".join([
            values("train forget", "outside"), values("train forget", "commonest"), values("train retain", "outside"),
            flagged, cost("trainable", "{:,.0f}".format), cost("steps", "{:.0f}".format),
            cost("seconds", "{:.0f}".format), cost("peak_bytes", lambda b: f"{b / 1e9:.1f}")]) + " |")
    computed = ", ".join(sorted(dtype.removeprefix("torch.") for dtype in dtypes))
    return "\n".join([f"Accuracy / weighted F1, %. Computed in {computed}.", "", *first, "", *second]) + "\n"


def grid(head, rows, texts=1):
    """A table whose first columns are texts, and the others figures."""
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * texts + "|---:" * (len(head) - texts) + "|",
                      *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def others(study, runs):
    """-> rows and table of a study that is not the paper's: what each run found, and its columns, and first the model
    without a prompt, where all have the same."""
    rows, cells = [], []
    for run in runs:
        file = run.results
        rows.append(row := first_of(run))
        found, failed = measured(file), file.with_suffix(".failed")
        if not found:
            cells.append([run.method, failed.read_text().strip() if failed.exists() else "not run"])
            continue
        more = read_json(run.prompt or file.with_suffix(".more.json")) if study in MORE else None
        row |= {"found": found} | ({"more": more} if more else {})
        if more and not any("no prompt" in line for line in cells):
            cells.insert(0, ["no prompt", *TABLES[study][1](found, more, "without")])
        cells.append([run.method, *TABLES[study][1](found, more, "with" if found.get("with", True) else "without")])
    return rows, grid(TABLES[study][0], cells)


def robust_cells(found, more, side):
    """Three kinds of changes: of the words around and in the text, of the template, and a row of the other side."""
    lines = found["found"]["before" if side == "without" else side]["robustness"]
    values = [more[side][split]["accuracy"] for split in ("train forget", "train retain", "test retain")]
    for kind in ("words", "template", "other side"):
        for of, worst in (("forget", max), ("retain", min)):
            own = [value for line, value in lines.items() if line.endswith(f", {of}") and
                   kind == next((name for name in ("template", "other side") if name in line), "words")]
            values += [sum(own) / len(own), *([worst(own)] if kind == "words" else [])]
    return [f"{100 * v:.1f}" for v in values]


def tofu_cells(found, more, side):
    for own in filter(None, (found["without"], found["with"])):  # what is long stays in runs/, but for `answers`
        for name, split in own.items():
            split.pop("ratios", None)
            if name != "train forget":
                split.pop("said", None)
    forget, retain, again, others = (found[side][split] for split in (
        "train forget", "train retain", "test forget", "test retain"))
    four = ("per_token", "rouge_l", "truth_ratio", "generic")
    values = [*map(forget.get, four), again["rouge_l"], *map(retain.get, (*four, "utility")), others["rouge_l"]]
    p = (found["forget_quality"] or {}).get(side, math.nan)
    return [*("" if v is None else f"{100 * v:.1f}" for v in values), f"{p:.2g}"]


def request_cells(found, more, side):
    return [f"{100 * r[side][split]['accuracy']:.1f}" for r, split in (
        (more, "train forget"), (found, "train forget"), (more, "train retain"), (more, "test forget"),
        (more, "test retain"))]


MORE = ("robust", "requests")  # whose runs have a second file, and are all prompts for one model
TABLES = {
    "robust": (["prompt", "train forget", "train retain", "test retain", "changed words: forget", "worst", "retain",
                "worst", "other templates: forget", "retain", "a row of the other side beside it: forget", "retain"],
               robust_cells),
    "tofu": (["method", "forget: P(a)^(1/n)", "ROUGE-L", "truth ratio", "generic", "rephrased: ROUGE-L",
              "retain: P(a)^(1/n)", "ROUGE-L", "truth ratio", "generic", "utility", "rephrased: ROUGE-L",
              "forget quality, p"], tofu_cells),
    "requests": (["prompts, in their order", "genetics", "chemistry", "the rest", "unseen genetics", "unseen others"],
                 request_cells),
}


def answers(rows):
    """What the models say to every tenth of the questions to forget, as eval.py --tofu kept it."""
    questions = [json.loads(line) for line in open(Path(__file__).parent / "tofu/forget.jsonl", encoding="utf-8")]
    told = {row["method"]: (row["found"]["with"] or row["found"]["without"])["train forget"]["said"]
            for row in rows if "found" in row}
    lines = [[who, said] for i in range(0, len(questions), 10) for who, said in (
        ("**question**", questions[i]["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")),
        ("true answer", questions[i]["completion"].strip()), *((who, said[i]) for who, said in told.items()))]
    return grid(["who", "says"], [[who, " ".join(said.replace("|", "/").split())] for who, said in lines], texts=2)


def assessments(runs):
    """One table of two assessments: the model before, with SPUL's prompt, GA+GD's, and the retrained one."""
    found = [(measured(run.results) or {"found": {}})["found"] for run in runs]
    retrained = found[0].get("retrained", {})
    lines = [assess.rows_of({**own, "retrained": retrained} if own else {}) for own in found]
    rows = [{**first_of(run), "lines": own} for run, own in zip(runs, lines)]
    beside = {(row["part"], row["line"]): row for row in lines[1]}
    cells = []
    for row in lines[0]:
        columns = [row, row, beside.get((row["part"], row["line"]), {**row, "with": None}), row]
        values = map(assess.shown, columns, ("before", "with", "with", "retrained"))
        cells.append([row["part"], row["line"], row["what"], row["better"], *values])
    head = ["part", "line", "what it is", "better", "before", *(run.method for run in runs), "retrained"]
    return rows, grid(head, cells, texts=4)


def table(study, runs):
    """-> a study's rows and its text."""
    if study in TABLES:
        rows, text = others(study, runs)
    elif study == "assessment":
        rows, text = assessments(runs)
    else:
        rows = collect(runs)
        text = markdown(rows, PAPER.get(study, {}))
    text += "\nEach line's commands are in the .json beside this file; what it shows is in README.md of results.\n"
    return rows, text + (f"\n{answers(rows)}" if study == "tofu" else "")
