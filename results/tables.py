"""The tables of study.py: what a study's runs measured as rows, for JSON, and as markdown."""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plans  # noqa: E402
import store  # noqa: E402
from extras import assess  # noqa: E402

COLUMNS = ("train retain", "train forget", "test retain", "test forget")  # the paper's order

# The paper's accuracy of LLaMA-2-7B, in the columns' order.
SPUL_OF_PAPER = (99.15, 12.98, 94.93, 16.07)
SST2_OF_PAPER = {
    "title": "paper's accuracy",
    "vanilla": (37.50, 31.79, 37.51, 29.67),
    "memorised": (99.89, 99.72, 95.57, 96.07),
    "GA": (55.66, 53.93, 55.96, 56.89),
    "RL": (33.31, 13.82, 31.00, 14.26),
    "GA+KL": (55.64, 53.96, 55.94, 56.89),
    "GA+GD": (97.17, 13.75, 94.43, 11.31),
    "SPUL": SPUL_OF_PAPER,
}
SCIQ_OF_PAPER = {
    "title": "paper's accuracy: WMDP's biology to forget, SciQ to retain",
    "memorised": (99.74, 98.11, 91.80, 62.73),
    "GA+GD": (99.42, 27.22, 90.00, 22.25),
    "SPUL": (99.38, 5.44, 89.70, 3.22),
}
ABLATIONS_OF_PAPER = {
    "title": "paper's accuracy",
    "alpha 1, beta 0.5, p 30": SPUL_OF_PAPER,
    "alpha 0.1, beta 0": (90.84, 9.12, 89.50, 10.33),
    "alpha 0.1, beta 1": (85.19, 8.49, 84.64, 10.66),
    "alpha 0.5, beta 0.5": (97.74, 13.82, 93.97, 17.21),
    "alpha 1, beta 0": (97.52, 12.14, 94.22, 15.57),
    "alpha 1, beta 1": (95.70, 14.88, 93.05, 17.38),
    # With alpha 1 and beta 1. The paper says only how many forget rows stay right.
    "25 % of the forget rows": (math.nan, 26.69, math.nan, math.nan),
    "50 % of the forget rows": (math.nan, 18.96, math.nan, math.nan),
}
PAPER = {
    "sst2": SST2_OF_PAPER,
    "full": SST2_OF_PAPER,
    "sciq": SCIQ_OF_PAPER,
    "ablations": ABLATIONS_OF_PAPER,
}


def first_of(run):
    """What a row of any table begins with."""
    return {"method": run.method, "name": run.name, "commands": run.shown()}


def why_not(run):
    """Why a run has no figures."""
    entry = store.find(run)
    return entry["failed"] if entry else "not run"


def percent(value):
    return f"{100 * value:.1f}"


def grid(head, rows, texts=1):
    """A table in markdown. Its first columns are texts, the others figures."""
    lines = [head, *rows]
    lines = ["| " + " | ".join(line) + " |" for line in lines]
    rule = "|---" * texts + "|---:" * (len(head) - texts) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


# ------------------------------------------------------------------------------ the paper's tables


def collect(runs):
    """The table's rows. Of a baseline's runs the one with the largest gain is chosen."""
    rows = []
    for run in runs:
        row = {**first_of(run), "chosen": False}
        if found := store.measured(run):
            row["splits"] = found["with"] or found["without"]
            row["cost"] = found["cost"]
            row["dtype"] = found["dtype"]
        elif store.find(run):
            row["failed"] = why_not(run)
        rows.append(row)
    for method in methods_of(rows):
        tries = [row for row in rows if row["method"] == method and "splits" in row]
        chosen = tries if method == "SPUL" else sorted(tries, key=gain, reverse=True)[:1]
        for row in chosen:
            row["chosen"] = True
    return rows


def methods_of(rows):
    """The methods, each once, in their order."""
    return list(dict.fromkeys(row["method"] for row in rows))


def gain(row):
    """Retain minus forget accuracy on the train rows."""
    splits = row["splits"]
    return splits["train retain"]["accuracy"] - splits["train forget"]["accuracy"]


def mean_and_spread(values):
    """Fractions as their mean in per cent, with the spread of several."""
    values = [100 * value for value in values]
    text = f"{sum(values) / len(values):.1f}"
    if len(values) > 1:
        text += f" ({min(values):.1f} to {max(values):.1f})"
    return text


def metric_of(rows, split, metric):
    """A metric of one split, over the rows of a method. It is empty where none has it."""
    found = [row["splits"][split] for row in rows]
    found = [one[metric] for one in found if metric in one]
    return mean_and_spread(found) if found else ""


def cost_of(rows, name, form, scale=1):
    """A cost, averaged over the rows of a method."""
    found = [row["cost"][name] for row in rows if name in row["cost"]]
    return format(sum(found) / len(found) / scale, form) if found else ""


def run_names(tries, chosen, several_dtypes):
    """The last cell of a line: which runs its figures come from."""
    done = sum("splits" in row or "failed" in row for row in tries)
    text = ", ".join(row["name"] for row in chosen)
    if done > len(chosen):
        text += f", best of {done}"
    if done < len(tries):
        text += f", {len(tries) - done} not run"
    if several_dtypes:
        text += ", " + chosen[0]["dtype"].removeprefix("torch.")
    return text


def accuracy_line(method, tries, chosen, paper, several_dtypes):
    """Accuracy and F1, the paper's accuracy, and the runs."""
    cells = [method]
    for split in COLUMNS:
        accuracy = metric_of(chosen, split, "accuracy")
        cells.append(f"{accuracy} / {metric_of(chosen, split, 'f1')}")
    values = paper.get(method, ())
    cells.append(" / ".join("–" if math.isnan(value) else f"{value:.1f}" for value in values))
    return [*cells, run_names(tries, chosen, several_dtypes)]


def further_line(method, chosen):
    """What else was measured, and the cost."""
    flagged = [metric_of(chosen, split, "flagged") for split in ("train forget", "train retain")]
    return [
        method,
        metric_of(chosen, "train forget", "outside"),
        metric_of(chosen, "train forget", "commonest"),
        metric_of(chosen, "train retain", "outside"),
        " / ".join(filter(None, flagged)),
        cost_of(chosen, "trainable", ",.0f"),
        cost_of(chosen, "steps", ".0f"),
        cost_of(chosen, "seconds", ".0f"),
        cost_of(chosen, "peak_bytes", ".1f", scale=1e9),
    ]


def markdown(rows, paper):
    """Two tables: accuracy and F1 beside the paper's accuracy, and what else was measured."""
    first = []
    second = []
    dtypes = {row["dtype"] for row in rows if "dtype" in row}
    for method in methods_of(rows):
        tries = [row for row in rows if row["method"] == method]
        chosen = [row for row in tries if row["chosen"]]
        if chosen:
            first.append(accuracy_line(method, tries, chosen, paper, len(dtypes) > 1))
            second.append(further_line(method, chosen))
        else:
            reasons = sorted({row.get("failed", "not run") for row in tries})
            empty = [""] * (len(COLUMNS) + 1)
            first.append([method, *empty, "; ".join(reasons)])
    head = ["method", *COLUMNS, paper.get("title", ""), "run"]
    lines = ["| " + " | ".join(line) + " |" for line in (head, *first)]
    rule = "|---" + "|---:" * 4 + "|---|---|"
    further = [
        "method",
        "outside, train forget",
        "commonest, train forget",
        "outside, train retain",
        "flagged, of train forget / retain",
        "trainable",
        "steps",
        "s in them",
        "peak GB",
    ]
    computed = ", ".join(sorted(dtype.removeprefix("torch.") for dtype in dtypes))
    title = f"Accuracy / weighted F1, %. Computed in {computed}.\n"
    return "\n".join([title, lines[0], rule, *lines[1:], "", grid(further, second)])


# ------------------------------------------------------------------------- robust, TOFU, requests


def others(study, runs):
    """Rows and table of a study that is not the paper's.

    Where the runs are all prompts for one model, its first line is the model without a prompt.
    """
    head, cells_of = OTHERS[study]
    rows = []
    lines = []
    for run in runs:
        row = first_of(run)
        rows.append(row)
        found = store.measured(run)
        if not found:
            lines.append([run.method, why_not(run)])
            continue
        more = found.pop("more", None)
        row["found"] = found
        if more:
            row["more"] = more
        if more and not any(line[0] in ("no prompt", "memorised") for line in lines):
            lines.insert(0, ["no prompt", *cells_of(found, more, "without")])
        side = "with" if found.get("with", True) else "without"
        lines.append([run.method, *cells_of(found, more, side)])
    return rows, grid(head, lines)


def kind_of_change(line):
    """Of a line of the assessment's robustness: the kind of change of the query."""
    for kind in ("template", "other side"):
        if kind in line:
            return kind
    return "words"


def robust_cells(found, more, side):
    """Three kinds of changes: of the words, of the template, and a row of the other side."""
    values = [more[side][name]["accuracy"] for name in ("train forget", "train retain")]
    values.append(more[side]["test retain"]["accuracy"])
    lines = found["found"]["before" if side == "without" else side]["robustness"]
    for kind in ("words", "template", "other side"):
        for end, worst in (("forget", max), ("retain", min)):
            own = [
                value
                for line, value in lines.items()
                if line.endswith(f", {end}") and kind_of_change(line) == kind
            ]
            values.append(sum(own) / len(own))
            if kind == "words":
                values.append(worst(own))
    return [percent(value) for value in values]


def tofu_cells(found, more, side):
    splits = found[side]
    forget = splits["train forget"]
    retain = splits["train retain"]
    names = ("per_token", "rouge_l", "truth_ratio", "generic")
    values = [forget.get(name) for name in names]
    values.append(splits["test forget"]["rouge_l"])
    values += [retain.get(name) for name in (*names, "utility")]
    values.append(splits["test retain"]["rouge_l"])
    cells = ["" if value is None else percent(value) for value in values]
    p = (found["forget_quality"] or {}).get(side, math.nan)
    return [*cells, f"{p:.2g}"]


def sentence_cells(found, more, side):
    """TOFU's measures, then how often it refuses rephrased questions, and what else changes."""
    cells = tofu_cells(found, more, side)[:-1]
    generic = found[side]["test forget"].get("generic")
    cells.append("" if generic is None else percent(generic))
    if not more:
        return cells + [""] * (len(SENTENCES) - 1 - len(cells))
    result = more["elsewhere"].get("general text", {})
    cells += [f"{result['kl']:.3f}", percent(result["same"])] if "kl" in result else ["", ""]
    cost = more["cost"]
    return [*cells, f"{cost['steps']:.0f}", f"{cost['seconds']:.0f}"]


def request_cells(found, more, side):
    """More is what was asked of genetics and of what both retain, found of chemistry."""
    genetics = more[side]
    chemistry = found[side]
    splits = [
        genetics["train forget"],
        chemistry["train forget"],
        genetics["train retain"],
        genetics["test forget"],
        genetics["test retain"],
    ]
    return [percent(split["accuracy"]) for split in splits]


def elsewhere_cells(found, more, side):
    """Accuracy of the splits and asked otherwise, then what other text becomes.

    Of a memorised model: what it has become of its base.
    """
    splits = found[side]
    names = ["train forget", "train retain", "test forget", "test retain"]
    for what in ("another template", "a third template"):
        names += [f"train {end}, {what}" for end in ("forget", "retain")]
    names += ["train forget, after a retain row", "train retain, after a forget row"]
    cells = [percent(splits[name]["accuracy"]) if name in splits else "" for name in names]
    texts = found["elsewhere"] if found.get("with") else found.get("memorised") or {}
    for what in ("general text", "text by people", "the same, no chat"):
        result = texts.get(what, {})
        if "kl" in result:
            beside = f" ({result['sentence_kl']:.3f})" if "sentence_kl" in result else ""
            cells.append(f"{result['kl']:.3f}{beside}")
            cells.append(percent(result["same"]))
            cells.append(f"{result['perplexity']:.1f} -> {result['perplexity_with']:.1f}")
        else:
            cells += [""] * 3
    cost = found["cost"]
    return [*cells, f"{cost['steps']:.0f}", f"{cost['seconds']:.0f}"]


ROBUST = [
    "prompt",
    "train forget",
    "train retain",
    "test retain",
    "changed words: forget",
    "worst",
    "retain",
    "worst",
    "other templates: forget",
    "retain",
    "a row of the other side beside it: forget",
    "retain",
]
TOFU = [
    "method",
    "forget: P(a)^(1/n)",
    "ROUGE-L",
    "truth ratio",
    "generic",
    "rephrased: ROUGE-L",
    "retain: P(a)^(1/n)",
    "ROUGE-L",
    "truth ratio",
    "generic",
    "utility",
    "rephrased: ROUGE-L",
    "forget quality, p",
]
REQUESTS = [
    "prompts, in their order",
    "genetics",
    "chemistry",
    "the rest",
    "unseen genetics",
    "unseen others",
]
ELSEWHERE = [
    "run",
    "train forget",
    "train retain",
    "test forget",
    "test retain",
    "another template: forget",
    "retain",
    "a third: forget",
    "retain",
    "after a row of the other side: forget",
    "retain",
    "general text: KL (a sentence's)",
    "same token",
    "perplexity",
    "text by people: KL (a sentence's)",
    "same token",
    "perplexity",
    "without chat: KL (a sentence's)",
    "same token",
    "perplexity",
    "steps",
    "s in them",
]
SENTENCES = [
    *TOFU[:-1],
    "rephrased questions to forget: generic",
    "general text: KL",
    "same token",
    "steps",
    "s in them",
]
OTHERS = {
    **dict.fromkeys(plans.TALKS, (ELSEWHERE, elsewhere_cells)),
    "elsewhere_tofu": (SENTENCES, sentence_cells),
    "robust": (ROBUST, robust_cells),
    "tofu": (TOFU, tofu_cells),
    **dict.fromkeys(plans.REQUESTS, (REQUESTS, request_cells)),
}


def answers(rows):
    """What the models say to every tenth of TOFU's questions to forget."""
    file = Path(__file__).parent / "tofu/forget.jsonl"
    questions = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    told = {}
    for row in rows:
        if "found" in row:
            splits = row["found"]["with"] or row["found"]["without"]
            told[row["method"]] = splits["train forget"]["said"]
    lines = []
    for i in range(0, len(questions), 10):
        prompt = questions[i]["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        lines.append(["**question**", prompt])
        lines.append(["true answer", questions[i]["completion"].strip()])
        lines += [[method, said[i]] for method, said in told.items()]
    # A bar would end the cell, and a line break the table.
    lines = [[who, " ".join(said.replace("|", "/").split())] for who, said in lines]
    return grid(["who", "says"], lines, texts=2)


# -------------------------------------------------------------------------------- the assessment


def assessments(runs):
    """One table of two assessments: the model before, with SPUL's prompt, GA+GD's, retrained."""
    found = [(store.measured(run) or {"found": {}})["found"] for run in runs]
    retrained = found[0].get("retrained", {})
    rows = []
    for run, own in zip(runs, found):
        lines = assess.rows_of({**own, "retrained": retrained}) if own else []
        rows.append({**first_of(run), "lines": lines})
    first, second = (row["lines"] for row in rows)
    beside = {(row["part"], row["line"]): row for row in second}
    cells = []
    for row in first:
        other = beside.get((row["part"], row["line"]), {**row, "with": None})
        cells.append(
            [
                *(row[name] for name in ("part", "line", "what", "better")),
                assess.shown(row, "before"),
                assess.shown(row, "with"),
                assess.shown(other, "with"),
                assess.shown(row, "retrained"),
            ]
        )
    methods = [run.method for run in runs]
    head = ["part", "line", "what it is", "better", "before", *methods, "retrained"]
    return rows, grid(head, cells, texts=4)


# --------------------------------------------------------------------------------- of any study


def table(study, runs):
    """A study's rows, and its text."""
    if study in OTHERS:
        rows, text = others(study, runs)
    elif study == "assessment":
        rows, text = assessments(runs)
    else:
        rows = collect(runs)
        text = markdown(rows, PAPER.get(study, {}))
    text += "\nEach line's commands are in the .json beside this file; what it shows is in "
    text += "README.md of results.\n"
    if study == "tofu":
        text += f"\n{answers(rows)}"
    return rows, text
