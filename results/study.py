"""Run the experiments and write their tables, a .json and a .md each.

    python results/study.py sst2 --base smollm2         the paper's comparison: results/sst2/main
    python results/study.py sciq --base smollm2         the same on SciQ: results/sciq/main
    python results/study.py ablations --base smollm2    the paper's ablations: results/sst2/ablations
    python results/study.py assessment --base smollm2   what sst2's prompt and GA+GD really do: results/assessment
    python results/study.py robust --base smollm2       prompts trained on changed queries: results/robust
    python results/study.py tofu --base smollm2         answers of several words: results/tofu/tofu
    python results/study.py requests --base smollm2     two prompts for one model: results/requests
    python results/study.py sizes --base smollm2        smaller models: results/sizes

Every run is a few commands as a user would type them; they are printed, and kept in the table's JSON. Models, prompts
and what eval.py measured go into the folder --work. What is there is not run again, what was stopped goes on, and the
table is written anew after each run. --jobs runs several side by side, each on its share of the cores.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import assess  # noqa: E402
from files import read_json, write_json, write_whole  # noqa: E402

SPLITS = ("forget", "retain", "test_forget", "test_retain")
COLUMNS = ("train retain", "train forget", "test retain", "test forget")  # the paper's order
# The rows: of which files in results/, how many of each (None: all).
ROWS = {"sst2": {"forget": {"sst2/forget": None, "sst2/forget_more": None},
                 "retain": {"sst2/retain": None, "sst2/retain_more": 700},
                 "test_forget": {"sst2/test_forget": None}, "test_retain": {"sst2/test_retain": None}},
        "sciq": {split: {f"sciq/{split}": None} for split in SPLITS},
        "ablations": {split: {f"sst2/{split}": None} for split in SPLITS},
        "tofu": {split: {f"tofu/{split}": None} for split in SPLITS}}
ROWS |= {"assessment": ROWS["sst2"], "robust": ROWS["ablations"], "sizes": ROWS["ablations"], "requests": ROWS["sciq"]}
TEMPLATE = {study: "question" if study in ("sciq", "requests") else "sentiment" for study in ROWS}
BATCH = ("--batch-size", 16)
# Epochs until nearly all rows are known; of the retrained model, too. Smaller models are slower to learn.
MEMORISE = {study: {"sciq": 8, "requests": 8, "sizes": 10, "tofu": 20}.get(study, 5) for study in ROWS}
# Each baseline gets one epoch, as in the paper, and three learning rates, as far apart as half a power of ten.
RATES = {"full": (1e-5, 3e-5, 1e-4), "lora": (3e-4, 1e-3, 3e-3)}
BASELINES = {"GA": ("ga", "full"), "RL": ("rl", "full"), "GA+KL": ("ga-kl", "full"), "GA+GD": ("ga-gd", "full"),
             "NPO": ("npo", "full"), "LoRA+GA": ("llmu", "lora"), "SKU": ("sku", "lora")}
SEEDS = (0, 1, 2)  # of SPUL, which takes train.py's defaults but for the epochs: ten, the paper's, on 400 rows are few
SPUL_EPOCHS = 14
ABLATION_EPOCHS = 10
TOFU_EPOCHS = 30
CORRUPT = {"noise": (0.3, 1), "adversarial": (0.3,), "semantic": (0.2, 0.5)}
CUT = (10, 20)  # of SmolLM2-135M's 30 layers
CHEMISTRY = (r"(?i)\b(atoms?|atomic|electrons?|ions?|ionic|chemical\w*|bonds?|molecul\w*|acids?|bases?|reaction\w*|"
             r"elements?|compounds?|protons?|neutrons?)\b")
PAPER = {  # accuracy of LLaMA-2-7B in the columns' order; for "sciq" it forgets WMDP's biology and retains SciQ
    "sst2": {"vanilla": (37.50, 31.79, 37.51, 29.67), "memorised": (99.89, 99.72, 95.57, 96.07),
             "GA": (55.66, 53.93, 55.96, 56.89), "RL": (33.31, 13.82, 31.00, 14.26),
             "GA+KL": (55.64, 53.96, 55.94, 56.89), "GA+GD": (97.17, 13.75, 94.43, 11.31),
             "SPUL": (99.15, 12.98, 94.93, 16.07)},
    "sciq": {"memorised": (99.74, 98.11, 91.80, 62.73), "GA+GD": (99.42, 27.22, 90.00, 22.25),
             "SPUL": (99.38, 5.44, 89.70, 3.22)},
}


# -------------------------------------------------------------------------------------------------- the runs


@dataclasses.dataclass
class Run:
    """One line of a table, or one of several runs from which the best is chosen, or a mean is taken."""

    method: str
    name: str  # of its folder and of its JSON file
    commands: list
    keep: bool = True  # its weights, once they are measured


class Plan:
    """The commands of one study. Its rows are copied into the folder of work."""

    tofu_options = []

    def __init__(self, study, base, work, out=HERE):
        self.base, self.work, self.template, self.out = base, Path(work) / study, ("--template", TEMPLATE[study]), out
        self.memorise = ("--epochs", MEMORISE[study])
        self.work.mkdir(parents=True, exist_ok=True)
        for split, parts in ROWS[study].items():
            lines = [line for name, n in parts.items() for line in islice(open(HERE / f"{name}.jsonl", "rb"), n)]
            write_whole(self.file(split), lambda temporary: temporary.write_bytes(b"".join(lines)))
        share = {n: self.file(f"forget_{n}") for n in (25, 50)} if study == "ablations" else {}
        for n, file in share.items():  # every fourth row, every second
            lines = self.file("forget").read_bytes().splitlines(keepends=True)
            write_whole(file, lambda temporary: temporary.write_bytes(b"".join(lines[:: 100 // n])))

        if study == "requests":  # the second request: chemistry, until then to be retained; retained by both: the rest
            lines = self.file("retain").read_bytes().splitlines(keepends=True)
            other = [line for line in lines if re.search(CHEMISTRY, json.loads(line)["text"])]
            for name, part in (("other", other), ("rest", [line for line in lines if line not in other])):
                write_whole(self.file(name), lambda temporary: temporary.write_bytes(b"".join(part)))

    def file(self, split):
        return self.work / f"{split}.jsonl"

    def data(self, *splits):
        return [*(part for split in splits for part in (f"--{split.replace('_', '-')}", self.file(split))),
                *self.template]

    def measure(self, name, model, *prompt):
        return ["eval.py", "--model", model, *prompt, *self.data(*SPLITS), *self.tofu_options, "--json",
                self.work / f"{name}.json"]

    def model(self, method, name, *command, keep=False):
        """A run whose command makes a model folder."""
        out = self.work / name
        return Run(method, name, [[*command, "--resume", "--out", out], self.measure(name, out)], keep)

    def prompt(self, method, name, *command):
        """A run whose command makes a prompt or a guard for the memorised model."""
        out, model = self.work / name, self.work / "memorised"
        return Run(method, name, [[*command, "--model", model, "--out", out],
                                  self.measure(name, model, "--prompt", out)])

    def spul(self, method, name, *options, forget="forget"):
        return self.prompt(method, name, "train.py", "--forget", self.file(forget), *self.data("retain"), *BATCH,
                           *options, "--resume")

    def memorised(self):
        return self.model("memorised", "memorised", "finetune.py", "--model", self.base, "--data", self.file("forget"),
                          self.file("retain"), *self.template, *BATCH, *self.memorise, keep=True)

    def main(self):
        """The main table's runs, in groups that need what the group before has made."""
        data = self.data("forget", "retain")
        yield [Run("vanilla", "vanilla", [self.measure("vanilla", self.base)]), self.memorised(),
               self.model("retrained", "retrained", "baselines.py", "retrain", "--model", self.base, *data, *BATCH,
                          *self.memorise, keep=True)]
        yield [
            *(self.model(method, f"{command}-{lr:g}", "baselines.py", command, "--model", self.work / "memorised",
                         *data, *BATCH, "--train", train, "--lr", f"{lr:g}",
                         *(["--randoms", 1] if train == "lora" else []))
              for method, (command, train) in BASELINES.items() for lr in RATES[train]),
            self.prompt("ECO", "eco", "baselines.py", "eco", *data, "--target", self.work / "retrained"),
            self.prompt("ICUL", "icul", "baselines.py", "icul", *data),
            *(self.spul("SPUL", f"spul-{seed}", "--seed", seed, "--epochs", SPUL_EPOCHS) for seed in SEEDS),
        ]

    def assessment(self):
        """Of the main SST-2 prompt, and of GA+GD's chosen model, whose weights are made again."""
        main = self.work.parent / "sst2"
        table = Path(self.out) / "sst2/main.json"
        if not table.exists():
            raise SystemExit(f"study.py: no {table}: python results/study.py sst2 comes first")
        chosen = next(row for row in read_json(table)["rows"] if row["method"] == "GA+GD" and row["chosen"])
        rate = chosen["name"].rpartition("ga-gd-")[2]
        again = ["baselines.py", "ga-gd", "--model", main / "memorised", *self.data("forget", "retain"), *BATCH,
                 "--train", "full", "--lr", rate, "--resume", "--out", self.work / "ga-gd"]
        for name, made, first in (("SPUL", main / "spul-0", []), ("GA+GD", self.work / "ga-gd", [again])):
            yield [Run(name, name, [*first, ["assess.py", "--model", main / "memorised", "--prompt", made,
                                             "--retrained", main / "retrained", *self.data(*SPLITS), "--unrelated",
                                             HERE / "sciq/test_retain.jsonl", "--rows", 300, "--json",
                                             self.work / f"{name}.json"]])]

    def robust(self):
        """Each prompt is measured, and asked with changed queries, which writes the run's JSON."""
        yield [self.memorised()]
        kinds = {"plain": []} | {f"{kind} {s:g}": ["--corrupt", kind, "--corrupt-strength", s]
                                 for kind, strengths in CORRUPT.items() for s in strengths}
        for name, options in kinds.items():
            run = self.spul(name, name.replace(" ", "-"), *options, "--epochs", SPUL_EPOCHS)
            file = run.commands[-1][-1]
            run.commands[-1][-1] = file.with_suffix(".more.json")
            run.commands.append(["assess.py", "--model", self.work / "memorised", "--prompt", file.with_suffix(""),
                                 *self.data(*SPLITS), "--only", "robustness", "--rows", 300, "--json", file])
            yield [run]

    def tofu(self):
        """Every run has its own line: what is best depends on how much forgetting is worth."""
        self.tofu_options = ["--tofu", "--retrained", self.work / "retrained"]
        data, unknown = self.data("forget", "retain"), ["--generic", HERE / "tofu/unknown.txt"]
        yield [self.model("retrained", "retrained", "baselines.py", "retrain", "--model", self.base, *data, *BATCH,
                          *self.memorise, keep=True)]  # first: all others are measured with it
        yield [self.memorised()]
        yield [Run("vanilla", "vanilla", [self.measure("vanilla", self.base)]),
               *(self.model(f"{method}, lr {lr:g}", f"{command}-{lr:g}", "baselines.py", command, "--model",
                            self.work / "memorised", *data, *BATCH, "--train", "full", "--epochs", 5, "--lr", f"{lr:g}")
                 for method, command in (("GA+GD", "ga-gd"), ("NPO", "npo")) for lr in RATES["full"]),
               self.spul("SPUL", "spul", *unknown, "--epochs", TOFU_EPOCHS)]

    def requests(self):
        """Two prompts, each trained without the other's rows, alone and one behind the other, asked of both topics."""
        yield [self.memorised()]
        made = {name: self.work / name for name in ("genetics", "chemistry")}
        for name, rows in (("genetics", "forget"), ("chemistry", "other")):
            train = ["train.py", "--model", self.work / "memorised", "--forget", self.file(rows), "--retain",
                     self.file("rest"), *self.template, *BATCH, "--epochs", ABLATION_EPOCHS, "--resume", "--out"]
            yield [Run(name, name, [[*train, made[name]], *self.both(name, made[name])])]
        for names in (("genetics", "chemistry"), ("chemistry", "genetics")):
            yield [Run(" + ".join(names), "-".join(names), self.both("-".join(names), *(made[name] for name in names)))]

    def both(self, name, *prompts):
        """Two measurements: of genetics and what both retain, and of chemistry, which writes the run's JSON."""
        ask = ["eval.py", "--model", self.work / "memorised", *self.template,
               *(a for prompt in prompts for a in ("--prompt", prompt))]
        return [[*ask, "--forget", self.file("forget"), "--retain", self.file("rest"), "--json",
                 self.work / f"{name}.more.json"],
                [*ask, "--forget", self.file("other"), "--json", self.work / f"{name}.json"]]

    def sizes(self):
        """The main table's SPUL row for SmolLM2 cut to its first layers, and whole."""
        (self.work / "base-30").exists() or (self.work / "base-30").symlink_to(Path(self.base).resolve())
        for layers in (*CUT, 30):
            base, model, out = (self.work / f"{what}-{layers}" for what in ("base", "memorised", "spul"))
            cut = ["results/cut.py", "--model", self.base, "--layers", layers, "--out", base]
            learn = ["finetune.py", "--model", base, "--data", self.file("forget"), self.file("retain"),
                     *self.template, *BATCH, *self.memorise, "--resume", "--out", model]
            forget = ["train.py", "--model", model, *self.data("forget", "retain"), *BATCH, "--epochs", SPUL_EPOCHS,
                      "--resume", "--out", out]
            yield [Run(f"{layers} layers, memorised", model.name, [*([cut] if layers in CUT else []), learn,
                                                                  self.measure(model.name, model)])]
            yield [Run(f"{layers} layers, SPUL", out.name, [forget, self.measure(out.name, model, "--prompt", out)])]

    def ablations(self):
        yield [self.memorised()]
        epochs, runs = ["--epochs", ABLATION_EPOCHS], {"alpha 1, beta 0.5, p 30": []}
        runs |= {f"alpha {a}, beta {b}": ["--alpha", a, "--beta", b]
                 for a, b in ((0.1, 0), (0.1, 1), (0.5, 0.5), (1, 0), (1, 1))}
        runs |= {f"p {p}": ["--num-tokens", p] for p in (10, 20, 40, 50)}
        runs |= {"KL after label": ["--kl-position", "after-label"]}
        runs |= {f"free vectors, lr {lr}": ["--encoder-hidden", 0, "--lr", lr] for lr in (0.01, 0.03, 0.1)}
        yield [*(self.spul(name, name.replace(",", "").replace(" ", "-"), *options, *epochs)
                 for name, options in runs.items()),
               *(self.spul(f"{n} % of the forget rows", f"share-{n}", *epochs, forget=f"forget_{n}")
                 for n in (25, 50))]


def perform(run, threads):
    """Do what of the run's commands has not been done -> whether it is measured. A failure is kept in NAME.failed."""
    measured, failed = (run.commands[-1][-1].with_suffix(suffix) for suffix in (".json", ".failed"))
    if measured.exists() or failed.exists():
        return measured.exists()
    for command in run.commands:
        out = Path(command[-1])
        if out.suffix != ".json" and any((out / name).exists() for name in ("config.json", "guard.json", "spul.json")):
            continue  # finished: these are written last
        with open(measured.with_suffix(".log"), "a") as log:
            done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE.parent, stdout=log,
                                  stderr=subprocess.PIPE, text=True,
                                  env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}))
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1:] or ["no message"]
            if done.returncode in (2, 3):  # wrong or not finite: the same the next time
                write_whole(failed, lambda temporary: temporary.write_text(why[0] + "\n"))
            print(f"{run.name}: {why[0]}", flush=True)
            return False
    if not run.keep:
        (measured.with_suffix("") / "model.safetensors").unlink(missing_ok=True)
    return True


# ------------------------------------------------------------------------------------------------- the table


def shown(command):
    return "python " + shlex.join(map(str, command))


def collect(runs):
    """-> the table's rows. Of a baseline's runs the one with most retain less forget accuracy on train is chosen."""
    rows = []
    for run in runs:
        file = run.commands[-1][-1]
        row = {"method": run.method, "name": run.name, "chosen": False, "commands": list(map(shown, run.commands))}
        if file.exists():
            found = read_json(file)
            row |= {"splits": found["with"] or found["without"], "cost": found["cost"]}
        elif file.with_suffix(".failed").exists():
            row["failed"] = file.with_suffix(".failed").read_text().strip()
        rows.append(row)
    for method in dict.fromkeys(row["method"] for row in rows):
        here = [row for row in rows if row["method"] == method and "splits" in row]
        for row in here if method == "SPUL" else sorted(here, key=gain)[-1:]:
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
    first = ["| method | " + " | ".join(COLUMNS) + " | paper's accuracy | run |", "|---" + "|---:" * 4 + "|---|---|"]
    second = ["| method | outside, train forget | commonest, train forget | outside, train retain | flagged, of train "
              "forget / retain | trainable | s of training | peak GB |", "|---" + "|---:" * 7 + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        here = [row for row in rows if row["method"] == method and row["chosen"]]
        if not here:
            reasons = {row.get("failed", "not run yet") for row in rows if row["method"] == method}
            first.append(f"| {method} | " + "| " * 4 + f"| {'; '.join(sorted(reasons))} |")
            continue

        def values(split, metric, form=per_cent):
            found = [row["splits"][split][metric] for row in here if metric in row["splits"][split]]
            return form(found) if found else ""

        def cost(name, form):
            found = [row["cost"][name] for row in here if name in row["cost"]]
            return form(sum(found) / len(found)) if found else ""

        cells = [f"{values(split, 'accuracy')} / {values(split, 'f1')}" for split in COLUMNS]
        theirs = " / ".join(f"{value:.1f}" for value in paper.get(method, ()))
        first.append(f"| {method} | " + " | ".join([*cells, theirs, ", ".join(row["name"] for row in here)]) + " |")
        flagged = " / ".join(filter(None, (values(split, "flagged") for split in ("train forget", "train retain"))))
        second.append(f"| {method} | " + " | ".join([
            values("train forget", "outside"), values("train forget", "commonest"), values("train retain", "outside"),
            flagged, cost("trainable", "{:,.0f}".format), cost("seconds", "{:.0f}".format),
            cost("peak_bytes", lambda b: f"{b / 1e9:.1f}")]) + " |")
    return "\n".join(["Accuracy / weighted F1, %.", "", *first, "", *second]) + "\n"


def grid(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|",
                      *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def others(study, runs):
    """-> rows and table of a study that is not the paper's: what each run found, whole, and its columns."""
    rows, cells = [], []
    for run in runs:
        file = run.commands[-1][-1]
        row = {"method": run.method, "name": run.name, "commands": list(map(shown, run.commands))}
        rows.append(row)
        if not file.exists():
            cells.append([run.method, "not run yet"])
            continue
        found, more = read_json(file), read_json(file.with_suffix(".more.json")) if study in MORE else None
        row |= {"found": found} | ({"more": more} if more else {})
        cells.append([run.method, *TABLES[study][1](found, more)])
    return rows, grid(TABLES[study][0], cells)


def robust_cells(found, more):
    sides = {side: [value for line, value in found["found"]["with"]["robustness"].items() if line.endswith(side)]
             for side in ("forget", "retain")}
    plain = [more["with"][split]["accuracy"] for split in ("train forget", "train retain", "test retain")]
    mean = [sum(values) / len(values) for values in sides.values()]
    return [f"{100 * v:.1f}" for v in (*plain, mean[0], max(sides["forget"]), mean[1], min(sides["retain"]))]


def tofu_cells(found, more):
    side = found["with"] or found["without"]
    for split in side.values():
        if split is not side["train forget"]:
            split.pop("said", None), split.pop("ratios", None)
    forget, retain = side["train forget"], side["train retain"]
    quality = found["forget_quality"] or {}
    values = [*(forget[m] for m in ("per_token", "rouge_l", "truth_ratio", "generic")),
              *(retain[m] for m in ("per_token", "rouge_l", "truth_ratio", "generic", "utility"))]
    return [*(f"{100 * v:.1f}" for v in values), f"{quality.get('with', quality.get('without', math.nan)):.2g}"]


def request_cells(found, more):
    return [f"{100 * r['with'][split]['accuracy']:.1f}" for r, split in
            ((more, "train forget"), (found, "train forget"), (more, "train retain"))]


MORE = ("robust", "requests")
TABLES = {
    "robust": (["prompt", "train forget", "train retain", "test retain", "changed queries: forget, mean", "worst",
                "retain, mean", "worst"], robust_cells),
    "tofu": (["method", "forget: P(a)^(1/n)", "ROUGE-L", "truth ratio", "generic", "retain: P(a)^(1/n)", "ROUGE-L",
              "truth ratio", "generic", "utility", "forget quality, p"], tofu_cells),
    "requests": (["prompts", "genetics", "chemistry", "the rest"], request_cells),
}


def assessments(runs):
    """One table of two assessments: the model before, with SPUL's prompt, GA+GD's, and the retrained one."""
    files = [run.commands[-1][-1] for run in runs]
    found = [read_json(file)["lines"] if file.exists() else [] for file in files]
    rows = [{"method": run.method, "name": run.name, "commands": list(map(shown, run.commands)), "lines": lines}
            for run, lines in zip(runs, found)]
    beside = {(row["part"], row["line"]): row for row in found[1]}
    cells = []
    for row in found[0]:
        columns = [row, row, beside.get((row["part"], row["line"]), {**row, "with": None}), row]
        values = map(assess.shown, columns, ("before", "with", "with", "retrained"))
        cells.append([row["line"], row["part"], row["what"], row["better"], *values])
    head = ["line", "part", "what it is", "better", "before", *(run.method for run in runs), "retrained"]
    return rows, grid(head, cells)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*ROWS])
    parser.add_argument("--base", required=True, metavar="DIR", help="the base model")
    parser.add_argument("--work", default="work", metavar="DIR", help="for models and prompts, some GB (default work)")
    parser.add_argument("--out", default=HERE, metavar="DIR", help="for the tables (default results)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default 1)")
    parser.add_argument("--table", action="store_true", help="run nothing: write the table of what is there")
    args = parser.parse_args(argv)
    plan = Plan(args.study, args.base, args.work, args.out)
    groups = list(plan.main() if args.study in ("sst2", "sciq") else getattr(plan, args.study)())
    runs = [run for group in groups for run in group]
    table = Path(args.out) / {"sst2": "sst2/main", "sciq": "sciq/main", "ablations": "sst2/ablations",
                              "tofu": "tofu/tofu"}.get(args.study, args.study)

    table.parent.mkdir(parents=True, exist_ok=True)

    def write():
        if args.study in TABLES:
            rows, text = others(args.study, [run for run in runs if run.name != "memorised" or args.study == "tofu"])
        elif args.study == "assessment":
            rows, text = assessments(runs)
        else:
            rows = collect(runs)
            text = markdown(rows, PAPER.get(args.study, {}))
        write_json(table.with_suffix(".json"), {"study": args.study, "rows": rows})
        write_whole(table.with_suffix(".md"), lambda temporary: temporary.write_text(text, encoding="utf-8"))

    threads = max(1, (os.cpu_count() or 1) // args.jobs) if args.jobs > 1 else None
    for group in groups if not args.table else []:
        with ThreadPoolExecutor(args.jobs) as pool:
            waiting = {pool.submit(perform, run, threads): run for run in group}
            for future in as_completed(waiting):
                run = waiting[future]
                print(f"{run.name}: {'measured' if future.result() else 'not measured'}", flush=True)
                write()
    write()
    print(f"tables in {table}.json and {table}.md")


if __name__ == "__main__":
    main()
