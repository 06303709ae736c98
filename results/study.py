"""Run the experiments and write their tables, a .json and a .md each.

    python results/study.py sst2 --base smollm2         the paper's comparison: results/sst2/main
    python results/study.py sciq --base smollm2         the same on SciQ: results/sciq/main
    python results/study.py full --base smollm2         the same on all of SST-2, on a GPU: results/sst2/full
    python results/study.py ablations --base smollm2    the paper's ablations: results/sst2/ablations
    python results/study.py assessment --base smollm2   what sst2's prompt and GA+GD really do: results/assessment
    python results/study.py robust --base smollm2       prompts trained on changed queries: results/robust
    python results/study.py tofu --base smollm2         answers of several words: results/tofu
    python results/study.py requests --base smollm2     two requests, one model: results/requests
    python results/study.py sizes --base smollm2        smaller and larger models: results/sizes

Every run is a few commands as a user would type them. What they measured, and the commands, go into runs/ beside the
tables, with the small folders of prompts and of memorised models' adapters; models go into the folder --work. What is
measured is not run again, on this machine or another: a memorised model is made from its adapter where it is missing.
What was stopped goes on, and the table is written anew after each run. --jobs runs several side by side, each on its
share of the cores.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import tables  # noqa: E402
from cli import run as run_command  # noqa: E402
from eval import costs  # noqa: E402
from finetune import ADAPTER  # noqa: E402
from files import read_json, weight_files, write_json, write_whole  # noqa: E402
from spul import PROMPT_FILES, fingerprint  # noqa: E402

SPLITS = ("forget", "retain", "test_forget", "test_retain")
# The rows: of which files in results/, how many of each (None: all).
ROWS = {"sst2": {"forget": {"sst2/forget": None, "sst2/forget_more": None},
                 "retain": {"sst2/retain": None, "sst2/retain_more": 700},
                 "test_forget": {"sst2/test_forget": None}, "test_retain": {"sst2/test_retain": None}},
        "sciq": {split: {f"sciq/{split}": None} for split in SPLITS},
        "ablations": {split: {f"sst2/{split}": None} for split in SPLITS},
        "tofu": {split: {f"tofu/{split}": None} for split in SPLITS}}
ROWS["full"] = ROWS["sst2"] | {"forget": {"sst2/full_forget": None}, "retain": {"sst2/full_retain": None}}
ROWS |= {"assessment": ROWS["sst2"], "robust": ROWS["ablations"], "sizes": ROWS["sst2"], "requests": ROWS["sciq"]}
SOURCE = {"ablations": "sst2", "robust": "sst2", "requests": "sciq", "sizes": "sst2"}  # whose memorised model they take
TEMPLATE = {study: "question" if study in ("sciq", "requests") else "sentiment" for study in ROWS}
DTYPE = {study: "fp32" if study in ("sst2", "assessment") else "bf16" for study in ROWS}
# The model to unlearn from. Its LoRA is small enough to be kept, in results/runs, and has the usual size of steps.
MEMORISE = {study: {"sciq": 8, "tofu": 20, "sizes": 10, "full": 5}.get(study, 4) for study in ROWS}  # epochs
RANK = {study: 8 if study == "full" else 4 for study in ROWS}
# Rows a step, in memorising and in unlearning: few where there are few rows, so that they make more steps.
BATCH = {study: (128, 128) if study == "full" else (16, 8) for study in ROWS}
# Of each baseline three tries, one epoch, as in the paper, at rates half a power of ten apart; of all of SST-2 one.
TRIES = {"sst2": {"full": (1e-4, 3e-4, 1e-3), "lora": (3e-4, 1e-3, 3e-3)},
         "sciq": {"full": (3e-5, 1e-4, 3e-4), "lora": (3e-4, 1e-3, 3e-3)},
         "full": {"full": (1e-4,), "lora": (1e-3,)}}
BASELINES = {"GA": ("ga", "full"), "RL": ("rl", "full"), "GA+KL": ("ga-kl", "full"), "GA+GD": ("ga-gd", "full"),
             "NPO": ("npo", "full"), "LoRA+GA": ("llmu", "lora"), "SKU": ("sku", "lora")}
SEEDS = {study: (0, 1) if study == "full" else (0, 1, 2) for study in TRIES}  # of SPUL
SPUL_EPOCHS = 10
TOFU_EPOCHS = 30
CORRUPT = {"noise": (0.3, 1), "adversarial": (0.3,), "semantic": (0.2, 0.5)}
LAYERS = (10, 20, 60)  # beside SmolLM2-135M's 30
CHEMISTRY = (r"(?i)\b(atoms?|atomic|electrons?|ions?|ionic|chemical\w*|bonds?|molecul\w*|acids?|bases?|reaction\w*|"
             r"elements?|compounds?|protons?|neutrons?)\b")


# -------------------------------------------------------------------------------------------------- the runs


@dataclasses.dataclass
class Run:
    """One line of a table, or one of several runs from which the best is chosen, or a mean is taken."""

    method: str
    name: str  # of its folders and of its JSON file
    commands: list
    results: Path  # its JSON file, written last
    log: Path  # what its commands print
    base: str  # the fingerprint of the model with which all begins
    learned: Path = None  # the folder of what it learns, made by one of its commands
    needed: bool = False  # by other runs, in work
    prompt: Path = None  # where train.py's own measurement goes, if that is wanted

    @property
    def origin(self):
        """What its figures come from, which is kept with them."""
        return {"base_sha256": self.base, "commands": tables.shown(self)}


class Plan:
    """The commands of one study. Its rows are copied into the folder of work."""

    tofu_options = []

    def __init__(self, study, base, work, out=HERE):
        base, work, self.out = map(os.path.relpath, (base, work, out))  # no paths of a machine in what is kept
        self.base, self.work = base, Path(work) / study
        self.template, self.dtype = ("--template", TEMPLATE[study]), ("--dtype", DTYPE[study])
        self.runs, self.base_sha256 = Path(self.out) / "runs" / study, fingerprint(base)
        self.learn = ("--rank", RANK[study], "--lora-alpha", 32, "--batch-size", BATCH[study][0], "--epochs",
                      MEMORISE[study])
        self.batch = ("--batch-size", BATCH[study][1])
        self.source = Plan(SOURCE[study], base, work, out) if study in SOURCE else self
        self.known = self.source.work / "memorised"
        for folder in (self.work, self.runs):
            folder.mkdir(parents=True, exist_ok=True)
        lines = {split: [line for name, n in parts.items() for line in islice(open(HERE / f"{name}.jsonl", "rb"), n)]
                 for split, parts in ROWS[study].items()}
        if study == "ablations":  # every fourth row, every second
            lines |= {f"forget_{n}": lines["forget"][:: 100 // n] for n in (25, 50)}
        if study == "requests":  # the second: questions with words of chemistry; where only choices have some: neither
            parts = {line: json.loads(line)["text"].split("\n", 1) for line in lines["retain"]}
            found = {line: [bool(re.search(CHEMISTRY, part)) for part in parts[line]] for line in parts}
            lines["chemistry"] = [line for line in parts if found[line][0]]
            lines["rest"] = [line for line in parts if not any(found[line])]
            lines["both"] = lines["forget"] + lines["chemistry"]
        for split, rows in lines.items():
            if not (file := self.file(split)).exists() or file.read_bytes() != b"".join(rows):
                write_whole(file, lambda temporary: temporary.write_bytes(b"".join(rows)))

    def file(self, split):
        return self.work / f"{split}.jsonl"

    def json(self, name):
        return self.runs / f"{name}.json"

    def data(self, *splits):
        return [*(part for split in splits for part in (f"--{split.replace('_', '-')}", self.file(split))),
                *self.template]

    def measure(self, name, model, *prompt):
        many = ("--batch-size", 256) if self.work.name == "full" else ()
        return ["eval.py", "--model", model, *prompt, *self.data(*SPLITS), *self.dtype, *many, *self.tofu_options,
                "--json", self.json(name)]

    def run(self, method, name, *commands, **more):
        return Run(method, name, list(commands), self.json(name), self.work / f"{name}.log", self.base_sha256, **more)

    def model(self, method, name, *command, needed=False):
        """A run whose command makes a model folder."""
        out = self.work / name
        return self.run(method, name, [*command, "--resume", "--out", out], self.measure(name, out), learned=out,
                        needed=needed)

    def guard(self, method, name, *command):
        """A run whose command makes a guard for the memorised model."""
        out = self.work / name
        return self.run(method, name, [*command, *self.dtype, "--model", self.known, "--out", out],
                        self.measure(name, self.known, "--prompt", out), learned=out)

    def spul(self, method, name, *options, forget="forget", model=None):
        """A prompt for the memorised model, or another, which train.py measures."""
        out = self.work / name
        return self.run(method, name, [
            "train.py", "--forget", self.file(forget), *self.data(*SPLITS[1:]), *self.dtype, *self.batch, *options,
            "--epochs", SPUL_EPOCHS, "--model", model or self.known, "--resume", "--out", out],
            learned=out, prompt=self.json(name))

    def seeded(self, seed, method="SPUL"):
        """The main table's prompts."""
        return self.spul(method, f"spul-{seed}", "--seed", seed)

    def memorised(self):
        return self.source.model("memorised", "memorised", "finetune.py", "--model", self.base, "--data",
                                 self.source.file("forget"), self.source.file("retain"), *self.template,
                                 *self.source.learn, needed=True)

    def retrained(self):
        return self.model("retrained", "retrained", "baselines.py", "retrain", "--model", self.base,
                          *self.data("forget", "retain"), *self.learn, needed=True)

    def baseline(self, method, lr, *options):
        """One of the TRIES -> its name and its command, but for where to."""
        command, train = BASELINES[method]
        return f"{command}-{lr:g}", ["baselines.py", command, "--model", self.known, *self.data("forget", "retain"),
                                     *self.dtype, *self.batch, "--train", train, "--lr", f"{lr:g}", *options,
                                     *(["--randoms", 1] if train == "lora" else [])]

    def try_of(self, method, lr, *options, line=None):
        name, command = self.baseline(method, lr, *options)
        return self.model(line or method, name, *command)

    def main(self):
        """The main table's runs, in groups that need what the group before has made."""
        data, tries, seeds = self.data("forget", "retain"), TRIES[self.work.name], SEEDS[self.work.name]
        yield [self.memorised()]
        yield [
            self.seeded(seeds[0]), self.retrained(),
            *(self.try_of(method, lr) for method, (_, train) in BASELINES.items() for lr in tries[train]),
            *map(self.seeded, seeds[1:]),
            self.run("vanilla", "vanilla", self.measure("vanilla", self.base)),
        ]
        yield [
            self.guard("ECO, as retrained", "eco", "baselines.py", "eco", *data, "--target",
                       self.work / "retrained"),
            self.guard("ECO, to 0", "eco-0", "baselines.py", "eco", *data, "--target", 0),
            self.guard("ICUL", "icul", "baselines.py", "icul", *data),
        ]

    def assessment(self):
        """Of the main SST-2 prompt, and of GA+GD's chosen model, whose weights are made again."""
        main = Plan("sst2", self.base, self.work.parent, self.out)
        table = Path(self.out) / "sst2/main.json"
        if not table.exists():
            raise ValueError(f"no {table}: python results/study.py sst2 comes first")
        chosen = {row["name"] for row in read_json(table)["rows"] if row["method"] == "GA+GD" and row["chosen"]}
        tries = (main.baseline("GA+GD", lr) for lr in TRIES["sst2"]["full"])
        again = [command for name, command in tries if name in chosen]
        if not again or not (main.runs / "spul-0").exists():
            raise ValueError(f"{table}: SPUL or GA+GD is not measured: python results/study.py sst2 comes first")
        yield [main.memorised(), main.retrained()]
        made, unrelated = self.work / "ga-gd", Path(os.path.relpath(HERE)) / "sciq/test_retain.jsonl"
        ask = ["assess.py", "--model", main.known, *self.data(*SPLITS), *self.dtype, "--unrelated", unrelated]
        yield [self.run("SPUL", "SPUL", [*ask, "--retrained", main.work / "retrained", "--prompt", main.runs / "spul-0",
                                         "--json", self.json("SPUL")]),  # the retrained model's column is for both
               self.run("GA+GD", "GA+GD", [*again[0], "--resume", "--out", made],
                        [*ask, "--prompt", made, "--json", self.json("GA+GD")])]

    def robust(self):
        """Each prompt is measured by train.py, and asked with changed queries, which writes the run's JSON."""
        yield [self.memorised()]
        runs = [self.spul("plain", "plain")]
        runs += [self.spul(f"{kind} {s:g}", f"{kind}-{s:g}", "--corrupt", kind, "--corrupt-strength", s)
                 for kind, strengths in CORRUPT.items() for s in strengths]
        for run in runs:
            run.prompt = run.results.with_suffix(".more.json")
            run.commands.append(["assess.py", "--model", self.known, "--prompt", run.results.with_suffix(""),
                                 *self.data(*SPLITS), *self.dtype, "--only", "robustness", "--json", run.results])
        yield runs

    def tofu(self):
        """Every run has its own line: what is best depends on how much forgetting is worth."""
        self.tofu_options = ["--tofu", "--retrained", self.work / "retrained"]
        data, unknown = self.data("forget", "retain"), Path(os.path.relpath(HERE)) / "tofu/unknown.txt"

        def spul(method, name, *options):
            out = self.work / name
            return self.run(method, name, ["train.py", *data, *self.dtype, *self.batch, "--generic", unknown, *options,
                                           "--model", self.known, "--resume", "--out", out],
                            self.measure(name, self.known, "--prompt", self.runs / name), learned=out)

        yield [self.retrained()]  # first: all others are measured with it
        yield [self.memorised()]
        yield [spul("SPUL", "spul", "--epochs", TOFU_EPOCHS),
               spul("SPUL, 4 forget rows a batch", "spul-4", "--forget-per-batch", 4, "--epochs", TOFU_EPOCHS // 3),
               *(self.try_of(method, lr, "--epochs", 5, line=f"{method}, lr {lr:g}")
                 for method in ("GA+GD", "NPO") for lr in (3e-5, 1e-4, 3e-4)),
               self.run("vanilla", "vanilla", self.measure("vanilla", self.base))]

    def requests(self):
        """The comparison's first prompt, for genetics, that was to retain chemistry; a later one for chemistry;
        one behind the other; and one that learns both requests at once. All are asked of both topics."""
        yield [self.memorised()]
        yield [first := self.source.seeded(0)]
        genetics, chemistry = first.results.with_suffix(""), self.runs / "chemistry"
        yield [self.request("genetics", genetics),
               *(self.request(name, self.runs / name, learned=self.work / name) for name in ("chemistry", "both"))]
        yield [self.request("genetics, chemistry", genetics, chemistry),
               self.request("chemistry, genetics", chemistry, genetics)]

    def request(self, method, *prompts, learned=None):
        """Two measurements: of genetics and what both retain, and of chemistry, which writes the run's JSON. Before
        them a prompt is trained, if one is to be learned."""
        name, common = method.replace(", ", "-"), ["--model", self.known, *self.template, *self.dtype]
        rest = ["--retain", self.file("rest")]
        learn = ["train.py", *common, "--forget", self.file(name), *rest, *self.batch, "--epochs", SPUL_EPOCHS,
                 "--resume", "--out", learned]
        ask = ["eval.py", *common, *(part for prompt in prompts for part in ("--prompt", prompt)), "--forget"]
        return self.run(method, name, *[learn] * bool(learned),
                        [*ask, self.file("forget"), *rest, "--test-forget", self.file("test_forget"), "--test-retain",
                         self.file("test_retain"), "--json", self.json(f"{name}.more")],
                        [*ask, self.file("chemistry"), "--json", self.json(name)], learned=learned)

    def sizes(self):
        """The main table's SPUL row, and the same for the model with fewer or more layers, which memorise anew."""
        main = Plan("sst2", self.base, self.work.parent, self.out)
        models = [dataclasses.replace(self.memorised(), method="30 layers, memorised")]
        prompts = [main.seeded(0, "30 layers, SPUL")]
        for layers in LAYERS:
            base, model = (self.work / f"{what}-{layers}" for what in ("base", "memorised"))
            models.append(self.run(f"{layers} layers, memorised", model.name, [
                "results/cut.py", "--model", self.base, "--layers", layers, "--out", base], [
                "finetune.py", "--model", base, "--data", self.file("forget"), self.file("retain"), *self.template,
                *self.learn, "--resume", "--out", model], self.measure(model.name, model), learned=model, needed=True))
            prompts.append(self.spul(f"{layers} layers, SPUL", f"spul-{layers}", model=model))
        yield models
        yield prompts

    def ablations(self):
        yield [self.memorised()]
        runs = {f"alpha {a}, beta {b}": ["--alpha", a, "--beta", b]
                for a, b in ((0.1, 0), (0.1, 1), (0.5, 0.5), (1, 0), (1, 1))}
        runs |= {f"p {p}": ["--num-tokens", p] for p in (10, 50)}
        runs |= {"KL after label": ["--kl-position", "after-label"]}
        runs |= {"free vectors, lr 0.01": ["--encoder-hidden", 0, "--lr", 0.01]}
        shares = [self.spul(f"{n} % of the forget rows", f"share-{n}", forget=f"forget_{n}") for n in (25, 50)]
        for run in shares:  # measured on all of them, as in the paper
            run.prompt = None
            run.commands.append(self.measure(run.name, self.known, "--prompt", self.runs / run.name))
        yield [self.spul("alpha 1, beta 0.5, p 30", "plain"),
               *(self.spul(name, name.replace(",", "").replace(" ", "-"), *options) for name, options in runs.items()),
               *shares]


def there(out):
    """Whether what a command makes, a JSON file or a folder, is there and whole: these files are written last."""
    if out.suffix == ".json":
        return out.exists() and read_json(out).get("finished", True)  # assess.py's says whether it is
    return any((out / name).exists() for name in ("config.json", "guard.json", "spul.json"))


def keep(run, kept):
    """Copy what is small of what a run has learned, a prompt or a memorised model's adapter, and what train.py
    measured, to results."""
    small = run.learned / ADAPTER if (run.learned / ADAPTER).exists() else run.learned
    for name in PROMPT_FILES:  # an adapter's have the same names
        if (small / name).exists():
            kept.mkdir(exist_ok=True)
            write_whole(kept / name, lambda temporary: shutil.copyfile(small / name, temporary))
    if run.prompt:
        info = read_json(kept / "spul.json")
        write_json(run.prompt, {"model": info["model"], "prompt": str(kept), "dtype": info["options"]["dtype"],
                                "cost": costs(info), **info["results"]})


def is_measured(run):
    """Whether the run is measured. Raises ValueError if what is there comes from other commands."""
    found = tables.measured(run.results)
    if found and any(found[key] != value for key, value in run.origin.items()):
        raise ValueError(f"{run.results}: measured with other commands, or another --base or --work: it says which; "
                         "take those, or delete it to measure anew")
    return found is not None


def perform(run, threads):
    """Do what of the run's commands has not been done -> whether it is measured, or has diverged, which NAME.failed
    keeps: it would diverge again."""
    kept, failed = run.results.with_suffix(""), run.results.with_suffix(".failed")
    if failed.exists():
        return not run.needed
    if (measured := is_measured(run)) and (not run.needed or there(run.learned)):
        return True
    for command in run.commands:
        out = Path(command[-1])
        learning = out == run.learned
        if not there(out) and not (learning and there(kept)):
            if learning and (kept / "adapter_config.json").exists():
                shutil.rmtree(out, ignore_errors=True)  # what a merge or training left that was stopped
                base = command[command.index("--model") + 1]
                command = ["finetune.py", "--model", base, "--adapter", kept, "--out", out]
            with open(run.log, "a") as log:
                done = subprocess.run([sys.executable, HERE.parent / command[0], *map(str, command[1:])], stdout=log,
                                      stderr=subprocess.PIPE, text=True,
                                      env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}))
                log.write(done.stderr[-4000:] if done.returncode else "")
            if done.returncode:
                why = done.stderr.strip().splitlines()[-1:] or ["no message"]
                print(f"{run.name}: {why[0]}", flush=True)
                if diverged := done.returncode == 3 and "not finite" in why[0]:
                    write_whole(failed, lambda temporary: temporary.write_text(why[0] + "\n"))
                return diverged and not run.needed
        if learning:
            keep(run, kept)
    if not measured:
        write_json(run.results, {**read_json(run.results), **run.origin})
    if run.learned and not run.needed and (run.learned / "model.safetensors").exists():
        shutil.rmtree(run.learned)
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
    groups = list(plan.main() if args.study in TRIES else getattr(plan, args.study)())
    runs = [run for group in groups for run in group]
    names = {"sst2": "sst2/main", "full": "sst2/full", "sciq": "sciq/main", "ablations": "sst2/ablations"}
    table = Path(args.out) / names.get(args.study, args.study)
    table.parent.mkdir(parents=True, exist_ok=True)

    def write():
        own = [run for run in runs if run.results.parent == plan.runs or args.study == "sizes"]
        list(map(is_measured, own))  # no figure is shown with commands that it does not come from
        rows, text = tables.table(args.study, own)
        write_json(table.with_suffix(".json"), {"study": args.study, "rows": rows})
        write_whole(table.with_suffix(".md"), lambda temporary: temporary.write_text(text, encoding="utf-8"))

    for group in groups if not args.table else []:
        jobs = min(args.jobs, len(group))
        threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
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
