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
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import tables  # noqa: E402
from cli import run as run_command  # noqa: E402
from files import read_json, weight_files, write_json, write_whole  # noqa: E402

SPLITS = ("forget", "retain", "test_forget", "test_retain")
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
# Of each baseline four tries, rate and epochs: one epoch, as in the paper, at three rates half a power of ten apart,
# and, because so few rows make few steps, three epochs at the middle one.
TRIES = {"full": ((1e-5, 1), (3e-5, 1), (1e-4, 1), (3e-5, 3)), "lora": ((3e-4, 1), (1e-3, 1), (3e-3, 1), (1e-3, 3))}
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

    def baseline(self, method, what):
        """One of the TRIES -> its name and its command, but for the model and where to."""
        (command, train), (lr, epochs) = BASELINES[method], what
        return f"{command}-{lr:g}" + (f"-{epochs}-epochs" if epochs > 1 else ""), [
            "baselines.py", command, *self.data("forget", "retain"), *BATCH, "--train", train, "--lr", f"{lr:g}",
            "--epochs", epochs, *(["--randoms", 1] if train == "lora" else [])]

    def main(self):
        """The main table's runs, in groups that need what the group before has made."""
        data = self.data("forget", "retain")
        yield [Run("vanilla", "vanilla", [self.measure("vanilla", self.base)]), self.memorised(),
               self.model("retrained", "retrained", "baselines.py", "retrain", "--model", self.base, *data, *BATCH,
                          *self.memorise, keep=True)]
        yield [
            *(self.model(method, name, *command, "--model", self.work / "memorised")
              for method, (_, train) in BASELINES.items()
              for name, command in (self.baseline(method, what) for what in TRIES[train])),
            self.prompt("ECO, as retrained", "eco", "baselines.py", "eco", *data, "--target", self.work / "retrained"),
            self.prompt("ECO, to 0", "eco-0", "baselines.py", "eco", *data, "--target", 0),
            self.prompt("ICUL", "icul", "baselines.py", "icul", *data),
            *(self.spul("SPUL", f"spul-{seed}", "--seed", seed, "--epochs", SPUL_EPOCHS) for seed in SEEDS),
        ]

    def assessment(self):
        """Of the main SST-2 prompt, and of GA+GD's chosen model, whose weights are made again."""
        main = self.work.parent / "sst2"
        table = Path(self.out) / "sst2/main.json"
        if not table.exists():
            raise ValueError(f"no {table}: python results/study.py sst2 comes first")
        chosen = {row["name"] for row in read_json(table)["rows"] if row["method"] == "GA+GD" and row["chosen"]}
        tries = [baseline for baseline in map(self.baseline, ["GA+GD"] * 4, TRIES["full"]) if baseline[0] in chosen]
        if not tries:
            raise ValueError(f"{table}: no run of GA+GD is measured: python results/study.py sst2 comes first")
        again = [*tries[0][1], "--model", main / "memorised", "--resume", "--out", self.work / "ga-gd"]
        unrelated = Path(os.path.relpath(HERE)) / "sciq/test_retain.jsonl"
        yield [Run(name, name, [*first, ["assess.py", "--model", main / "memorised", "--prompt", made, "--retrained",
                                         main / "retrained", *self.data(*SPLITS), "--unrelated", unrelated, "--rows",
                                         300, "--json", self.work / f"{name}.json"]])
               for name, made, first in (("SPUL", main / "spul-0", []), ("GA+GD", self.work / "ga-gd", [again]))]

    def robust(self):
        """Each prompt is measured, and asked with changed queries, which writes the run's JSON."""
        yield [self.memorised()]
        kinds = {"plain": []} | {f"{kind} {s:g}": ["--corrupt", kind, "--corrupt-strength", s]
                                 for kind, strengths in CORRUPT.items() for s in strengths}
        runs = []
        for name, options in kinds.items():
            run = self.spul(name, name.replace(" ", "-"), *options, "--epochs", SPUL_EPOCHS)
            file = run.commands[-1][-1]
            run.commands[-1][-1] = file.with_suffix(".more.json")
            run.commands.append(["assess.py", "--model", self.work / "memorised", "--prompt", file.with_suffix(""),
                                 *self.data(*SPLITS), "--only", "robustness", "--rows", 300, "--json", file])
            runs.append(run)
        yield runs

    def tofu(self):
        """Every run has its own line: what is best depends on how much forgetting is worth."""
        self.tofu_options = ["--tofu", "--retrained", self.work / "retrained"]
        data, unknown = self.data("forget", "retain"), ["--generic", Path(os.path.relpath(HERE)) / "tofu/unknown.txt"]
        yield [self.model("retrained", "retrained", "baselines.py", "retrain", "--model", self.base, *data, *BATCH,
                          *self.memorise, keep=True)]  # first: all others are measured with it
        yield [self.memorised()]
        yield [Run("vanilla", "vanilla", [self.measure("vanilla", self.base)]),
               *(self.model(f"{method}, lr {lr:g}", f"{command}-{lr:g}", "baselines.py", command, "--model",
                            self.work / "memorised", *data, *BATCH, "--train", "full", "--epochs", 5, "--lr", f"{lr:g}")
                 for method, command in (("GA+GD", "ga-gd"), ("NPO", "npo")) for lr in (1e-5, 3e-5, 1e-4)),
               self.spul("SPUL", "spul", *unknown, "--epochs", TOFU_EPOCHS)]

    def requests(self):
        """Two prompts, each trained without the other's rows, alone and one behind the other, asked of both topics."""
        yield [self.memorised()]
        made = {name: self.work / name for name in ("genetics", "chemistry")}
        yield [Run(name, name, [["train.py", "--model", self.work / "memorised", "--forget", self.file(rows),
                                 "--retain", self.file("rest"), *self.template, *BATCH, "--epochs", ABLATION_EPOCHS,
                                 "--resume", "--out", made[name]], *self.both(name, made[name])])
               for name, rows in (("genetics", "forget"), ("chemistry", "other"))]
        yield [Run(" + ".join(names), "-".join(names), self.both("-".join(names), *(made[name] for name in names)))
               for names in (("genetics", "chemistry"), ("chemistry", "genetics"))]

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
        models, prompts = [], []
        for layers in (*CUT, 30):
            base, model, out = (self.work / f"{what}-{layers}" for what in ("base", "memorised", "spul"))
            cut = ["results/cut.py", "--model", self.base, "--layers", layers, "--out", base]
            learn = ["finetune.py", "--model", base, "--data", self.file("forget"), self.file("retain"),
                     *self.template, *BATCH, *self.memorise, "--resume", "--out", model]
            forget = ["train.py", "--model", model, *self.data("forget", "retain"), *BATCH, "--epochs", SPUL_EPOCHS,
                      "--resume", "--out", out]
            models.append(Run(f"{layers} layers, memorised", model.name, [
                *([cut] if layers in CUT else []), learn, self.measure(model.name, model)]))
            prompts.append(Run(f"{layers} layers, SPUL", out.name, [
                forget, self.measure(out.name, model, "--prompt", out)]))
        yield models
        yield prompts

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
    """Do what of the run's commands has not been done -> whether it is measured, or has diverged, which NAME.failed
    keeps: it would diverge again."""
    measured, failed = (run.commands[-1][-1].with_suffix(suffix) for suffix in (".json", ".failed"))
    if tables.measured(measured) or failed.exists():
        return True
    for command in run.commands:
        out = Path(command[-1])
        if out.suffix != ".json" and any((out / name).exists() for name in ("config.json", "guard.json", "spul.json")):
            continue  # finished: these are written last
        with open(measured.with_suffix(".log"), "a") as log:
            done = subprocess.run([sys.executable, HERE.parent / command[0], *map(str, command[1:])], stdout=log,
                                  stderr=subprocess.PIPE, text=True,
                                  env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}))
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1:] or ["no message"]
            print(f"{run.name}: {why[0]}", flush=True)
            if diverged := done.returncode == 3 and "not finite" in why[0]:
                write_whole(failed, lambda temporary: temporary.write_text(why[0] + "\n"))
            return diverged
    if not run.keep:
        (measured.with_suffix("") / "model.safetensors").unlink(missing_ok=True)
    return True


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*ROWS])
    parser.add_argument("--base", required=True, metavar="DIR", help="the base model")
    parser.add_argument("--work", default="work", metavar="DIR", help="for models and prompts, some GB (default work)")
    parser.add_argument("--out", default=HERE, metavar="DIR", help="for the tables (default results)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default 1)")
    parser.add_argument("--table", action="store_true", help="run nothing: write the table of what is there")
    args = parser.parse_args(argv)
    weight_files(args.base)
    plan = Plan(args.study, args.base, args.work, args.out)
    groups = list(plan.main() if args.study in ("sst2", "sciq") else getattr(plan, args.study)())
    runs = [run for group in groups for run in group]
    table = Path(args.out) / {"sst2": "sst2/main", "sciq": "sciq/main", "ablations": "sst2/ablations",
                              "tofu": "tofu/tofu"}.get(args.study, args.study)

    table.parent.mkdir(parents=True, exist_ok=True)

    def write():
        kept = [run for run in runs if run.name != "memorised" or args.study not in ("robust", "requests")]
        rows, text = tables.table(args.study, kept)
        write_json(table.with_suffix(".json"), {"study": args.study, "rows": rows})
        write_whole(table.with_suffix(".md"), lambda temporary: temporary.write_text(text, encoding="utf-8"))

    threads = max(1, (os.cpu_count() or 1) // args.jobs) if args.jobs > 1 else None
    for group in groups if not args.table else []:
        pool = ThreadPoolExecutor(args.jobs)
        try:
            waiting = {pool.submit(perform, run, threads): run for run in group}
            for future in as_completed(waiting):
                print(f"{waiting[future].name}: {'done' if future.result() else 'not done'}", flush=True)
                write()
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C: those that have not begun
        if not all(future.result() for future in waiting):
            raise ValueError("stopped: what follows needs what is not done; the same command tries again")
    write()
    print(f"tables in {table}.json and {table}.md")


if __name__ == "__main__":
    run_command(main)
