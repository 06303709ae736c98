"""Run the paper's comparison and write its tables.

    python results/study.py sst2 --base smollm2         the main table: results/sst2/main.json and main.md
    python results/study.py sciq --base smollm2         the same on SciQ
    python results/study.py ablations --base smollm2    the paper's ablations: results/sst2/ablations.json and .md

Every run is a few commands as a user would type them; they are printed, and kept in the table's JSON. Models, prompts
and what eval.py measured go into the folder --work. What is there is not run again, what was stopped goes on, and the
table is written anew after each run. --jobs runs several side by side, each on its share of the cores.
"""

import argparse
import dataclasses
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from files import read_json, write_json, write_whole  # noqa: E402

SPLITS = ("forget", "retain", "test_forget", "test_retain")
COLUMNS = ("train retain", "train forget", "test retain", "test forget")  # the paper's order
# The rows: of which files in results/, how many of each (None: all).
ROWS = {"sst2": {"forget": {"sst2/forget": None, "sst2/forget_more": None},
                 "retain": {"sst2/retain": None, "sst2/retain_more": 700},
                 "test_forget": {"sst2/test_forget": None}, "test_retain": {"sst2/test_retain": None}},
        "sciq": {split: {f"sciq/{split}": None} for split in SPLITS},
        "ablations": {split: {f"sst2/{split}": None} for split in SPLITS}}
TEMPLATE = {"sst2": "sentiment", "sciq": "question", "ablations": "sentiment"}
BATCH = ("--batch-size", 16)
MEMORISE = {"sst2": 5, "sciq": 8, "ablations": 5}  # epochs until nearly all rows are known; of the retrained model, too
# Each baseline gets one epoch, as in the paper, and three learning rates, as far apart as half a power of ten.
RATES = {"full": (1e-5, 3e-5, 1e-4), "lora": (3e-4, 1e-3, 3e-3)}
BASELINES = {"GA": ("ga", "full"), "RL": ("rl", "full"), "GA+KL": ("ga-kl", "full"), "GA+GD": ("ga-gd", "full"),
             "NPO": ("npo", "full"), "LoRA+GA": ("llmu", "lora"), "SKU": ("sku", "lora")}
SEEDS = (0, 1, 2)  # of SPUL, which takes train.py's defaults but for the epochs: ten, the paper's, on 400 rows are few
SPUL_EPOCHS = 14
ABLATION_EPOCHS = 6
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

    def __init__(self, study, base, work):
        self.base, self.work, self.template = base, Path(work) / study, ("--template", TEMPLATE[study])
        self.memorise = ("--epochs", MEMORISE[study])
        self.work.mkdir(parents=True, exist_ok=True)
        for split, parts in ROWS[study].items():
            lines = [line for name, n in parts.items() for line in islice(open(HERE / f"{name}.jsonl", "rb"), n)]
            write_whole(self.file(split), lambda temporary: temporary.write_bytes(b"".join(lines)))
        share = {n: self.file(f"forget_{n}") for n in (25, 50)} if study == "ablations" else {}
        for n, file in share.items():  # every fourth row, every second
            lines = self.file("forget").read_bytes().splitlines(keepends=True)
            write_whole(file, lambda temporary: temporary.write_bytes(b"".join(lines[:: 100 // n])))

    def file(self, split):
        return self.work / f"{split}.jsonl"

    def data(self, *splits):
        return [*(part for split in splits for part in (f"--{split.replace('_', '-')}", self.file(split))),
                *self.template]

    def measure(self, name, model, *prompt):
        return ["eval.py", "--model", model, *prompt, *self.data(*SPLITS), "--json", self.work / f"{name}.json"]

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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*ROWS])
    parser.add_argument("--base", required=True, metavar="DIR", help="the base model")
    parser.add_argument("--work", default="work", metavar="DIR", help="for models and prompts, some GB (default work)")
    parser.add_argument("--out", default=HERE, metavar="DIR", help="for the tables (default results)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default 1)")
    parser.add_argument("--table", action="store_true", help="run nothing: write the table of what is there")
    args = parser.parse_args(argv)
    plan = Plan(args.study, args.base, args.work)
    groups = list(plan.ablations() if args.study == "ablations" else plan.main())
    runs = [run for group in groups for run in group]
    table = Path(args.out) / ("sst2/ablations" if args.study == "ablations" else f"{args.study}/main")

    def write():
        rows = collect(runs)
        write_json(table.with_suffix(".json"), {"study": args.study, "rows": rows})
        text = markdown(rows, PAPER.get(args.study, {}))
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
