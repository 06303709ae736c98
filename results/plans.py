"""The runs of each study: the rows they take, and their commands as a user would type them."""

import dataclasses
import json
import os
import re
import shlex
import sys
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from starts import STARTS  # noqa: E402
from support.files import read_json, write_whole  # noqa: E402
from support.identity import digest_of_files  # noqa: E402

SPLITS = ("forget", "retain", "test_forget", "test_retain")


def four_files(folder):
    return {split: {f"{folder}/{split}": None} for split in SPLITS}


# The rows of each split: of which files in results/, and how many of each (None: all).
SST2 = four_files("sst2") | {
    "forget": {"sst2/forget": None, "sst2/forget_more": None},
    "retain": {"sst2/retain": None, "sst2/retain_more": 700},
}
ALL_OF_SST2 = SST2 | {
    "forget": {"sst2/full_forget": None},
    "retain": {"sst2/full_retain": None},
}
ROWS = {
    "sst2": SST2,
    "sciq": four_files("sciq"),
    "full": ALL_OF_SST2,
    "ablations": four_files("sst2"),
    "assessment": SST2,
    "robust": four_files("sst2"),
    "tofu": four_files("tofu"),
    "requests": four_files("sciq"),
    "sizes": SST2,
    "elsewhere": four_files("sst2"),
    "elsewhere_sst2": SST2,
    "elsewhere_sciq": four_files("sciq"),
    "elsewhere_tofu": four_files("tofu"),
    "elsewhere_requests": four_files("sciq"),
}

# Studies that take another one's memorised model.
SOURCE = {
    "ablations": "sst2",
    "robust": "sst2",
    "requests": "sciq",
    "sizes": "sst2",
    "elsewhere_requests": "elsewhere_sciq",
}
REQUESTS = ("requests", "elsewhere_requests")
QUESTIONS = ("sciq", "elsewhere_sciq", "elsewhere_tofu", *REQUESTS)
TEMPLATE = dict.fromkeys(ROWS, "sentiment") | dict.fromkeys(QUESTIONS, "question")
FLOAT32 = ("sst2", "assessment")
DTYPE = dict.fromkeys(ROWS, "bf16") | dict.fromkeys(FLOAT32, "fp32")

# Memorising. The LoRA is small enough to be kept, and has the usual size of steps.
MEMORISE = dict.fromkeys(ROWS, 4) | {"sciq": 8, "tofu": 20, "sizes": 10, "full": 5}  # epochs
MEMORISE |= {"elsewhere_sciq": 8, "elsewhere_tofu": 12}
TALKS = ("elsewhere", "elsewhere_sst2", "elsewhere_sciq", "elsewhere_tofu")  # rehearse general text
RANK = dict.fromkeys(ROWS, 4) | {"full": 8} | dict.fromkeys(TALKS, 8)

# Rows a step, in memorising and in unlearning. Few rows have small batches, to make more steps.
BATCH = dict.fromkeys(ROWS, (16, 8)) | {"full": (128, 128)}

# Each baseline has three tries at rates half a power of ten apart, on all of SST-2 one.
TRIES = {
    "sst2": {"full": (1e-4, 3e-4, 1e-3), "lora": (3e-4, 1e-3, 3e-3)},
    "sciq": {"full": (3e-5, 1e-4, 3e-4), "lora": (3e-4, 1e-3, 3e-3)},
    "full": {"full": (1e-4,), "lora": (1e-3,)},
}
BASELINES = {  # the table's name: the command's name, and what is trained
    "GA": ("ga", "full"),
    "RL": ("rl", "full"),
    "GA+KL": ("ga-kl", "full"),
    "GA+GD": ("ga-gd", "full"),
    "NPO": ("npo", "full"),
    "LoRA+GA": ("llmu", "lora"),
    "SKU": ("sku", "lora"),
}
SEEDS = dict.fromkeys(TRIES, (0, 1, 2)) | {"full": (0, 1)}  # of SPUL

SPUL_EPOCHS = 10
SPUL_RATE = "3e-3"
TOFU_EPOCHS = 30
CORRUPT = {"noise": (0.3, 1), "adversarial": (0.3,), "semantic": (0.2, 0.5)}
MORE_KEEP = ["--gamma", 16]  # once the default
SHORT = 4  # epochs of the runs that leave out a part; gamma was 16 then
LEFT_OUT = (  # or changed, one at a time: what the study's line says, its name and its options
    ("gamma 16", "short"),
    ("no L_keep", "gamma-0", "--gamma", 0),
    ("start from a sentence", "sentence"),
    ("start from rows of the vocabulary", "vocabulary"),
    ("one way to ask", "one-way", "--rewordings", 0, "--single"),
    ("p 4", "p-4", "--num-tokens", 4),
    ("p 10", "p-10", "--num-tokens", 10),
)
LAYERS = (10, 20, 60)  # besides SmolLM2-135M's 30
CHEMISTRY = (
    r"(?i)\b(atoms?|atomic|electrons?|ions?|ionic|chemical\w*|bonds?|molecul\w*|acids?|bases?|"
    r"reaction\w*|elements?|compounds?|protons?|neutrons?)\b"
)


def extra(name):
    """A command of extras/, as python's arguments."""
    return ["-m", f"extras.{name}"]


def train_command(*options, program=("train.py",)):
    """A command that learns a prompt with the paper's setting, but for the rate."""
    rate = [] if "--lr" in options else ["--lr", SPUL_RATE]
    return [*program, "--paper", *rate, *options]


# -------------------------------------------------------------------------------------------- a run


@dataclasses.dataclass
class Run:
    """One line of a table, or one of several that a line is chosen from or is the mean of."""

    method: str
    name: str  # in its study's file, and of its folders
    commands: list  # lists of python's arguments; the last of each is what the command makes
    store: Path  # the study's file of what is measured
    base_sha256: str  # the digest of the files of the model with which all begins
    log: Path  # what its commands print
    found: Path  # what it measured: a JSON file in work, or the kept prompt's spul.json
    more: Path = None  # a second such file
    learned: Path = None  # the folder of what it learns
    is_needed: bool = False  # whether other runs need what it learns

    @property
    def kept(self):
        """The folder for what is small of what it learned."""
        return self.store.with_suffix("") / self.name

    def shown(self):
        """Its commands as one types them."""
        return ["python " + shlex.join(map(str, command)) for command in self.commands]

    def origin(self):
        """What its figures come from. It is kept with them."""
        return {"base_sha256": self.base_sha256, "commands": self.shown()}


# ----------------------------------------------------------------------------------- the studies


class Plan:
    """The runs of one study. Its rows are copied into the folder of work."""

    def __init__(self, study, base, work, out=HERE):
        self.study = study
        self.base = os.path.relpath(base)  # what is kept names no folder of a machine
        self.work = Path(os.path.relpath(work)) / study
        self.out = os.path.relpath(out)
        self.runs = Path(self.out) / "runs" / study  # for prompts and adapters
        self.store = self.runs.with_suffix(".json")
        self.base_sha256 = digest_of_files(base)
        self.template = ["--template", TEMPLATE[study]]
        self.dtype = ["--dtype", DTYPE[study]]
        self.source = Plan(SOURCE[study], base, work, out) if study in SOURCE else self
        self.known = self.source.work / "memorised"
        self.measuring = ["eval.py"]
        self.beside = []
        if study in ("tofu", "elsewhere_tofu"):
            self.measuring = extra("tofu")
        if study == "tofu":
            self.beside = ["--retrained", self.work / "retrained"]
        self.work.mkdir(parents=True, exist_ok=True)
        files = [HERE / f"{name}.jsonl" for split in ROWS[study].values() for name in split]
        self.missing = [file for file in files if not file.exists()]
        if not self.missing:
            self.copy_rows()

    def groups(self):
        """Lists of runs. Each list needs what the one before has made."""
        runs = self.main if self.study in TRIES else getattr(self, self.study)
        return list(runs())

    # ------------------------------------------------------------------------------------- rows

    def copy_rows(self):
        """Write each split's rows into the folder of work, where the commands find them."""
        lines = {split: read_lines(parts) for split, parts in ROWS[self.study].items()}
        if self.study == "ablations":  # every fourth row, and every second
            lines["forget_25"] = lines["forget"][::4]
            lines["forget_50"] = lines["forget"][::2]
        if self.study in REQUESTS:
            lines["chemistry"], lines["rest"] = part_by_topic(lines["retain"])
            lines["both"] = lines["forget"] + lines["chemistry"]
        for split, rows in lines.items():
            write_if_changed(self.file(split), b"".join(rows))

    def file(self, split):
        return self.work / f"{split}.jsonl"

    # --------------------------------------------------------------------------------- commands

    def json(self, name):
        """Where a command writes what it measured."""
        return self.work / f"{name}.json"

    def data(self, *splits):
        """The options that name files of rows, and the template."""
        options = []
        for split in splits:
            options += [f"--{split.replace('_', '-')}", self.file(split)]
        return options + self.template

    def memorising(self):
        """The options of memorising."""
        options = ["--rank", RANK[self.study], "--lora-alpha", 32]
        options += ["--rehearse"] if self.study in TALKS else []
        options += ["--batch-size", BATCH[self.study][0]]
        return [*options, "--epochs", MEMORISE[self.study]]

    def batch(self):
        return ["--batch-size", BATCH[self.study][1]]

    def measure(self, name, model, *options, program=None):
        """The command that measures a model, or a prompt for it."""
        command = [*(program or self.measuring), "--model", model, *options]
        command += self.data(*SPLITS) + self.dtype
        if self.study == "full":
            command += ["--batch-size", 256]
        return [*command, *self.beside, "--json", self.json(name)]

    def baseline(self, method, rate, *options):
        """A try of a baseline: its name, and its command, but for where to."""
        command, trained = BASELINES[method]
        arguments = [*extra("baselines"), command, "--model", self.known]
        arguments += self.data("forget", "retain") + self.dtype + self.batch()
        arguments += ["--train", trained, "--lr", f"{rate:g}", *options]
        if trained == "lora":
            arguments += ["--randoms", 1]
        return f"{command}-{rate:g}", arguments

    # ------------------------------------------------------------------------------ kinds of runs

    def run(self, method, name, *commands, **more):
        return Run(
            method,
            name,
            list(commands),
            self.store,
            self.base_sha256,
            log=self.work / f"{name}.log",
            **({"found": self.json(name)} | more),
        )

    def model(self, method, name, *command, is_needed=False):
        """A run whose command makes a model."""
        made = self.work / name
        command = [*command, "--resume", "--out", made]
        measure = self.measure(name, made)
        return self.run(method, name, command, measure, learned=made, is_needed=is_needed)

    def guard(self, method, name, *command):
        """A run whose command makes a guard for the memorised model."""
        made = self.work / name
        command = [*extra("baselines"), *command, *self.dtype, "--model", self.known, "--out", made]
        measure = self.measure(name, self.known, "--prompt", made, program=extra("guards"))
        return self.run(method, name, command, measure, learned=made)

    def spul(self, method, name, *options, forget="forget", model=None, program=("train.py",)):
        """A prompt for the memorised model, or for another. The command measures it."""
        made = self.work / name
        train = train_command(
            "--forget",
            self.file(forget),
            *self.data(*SPLITS[1:]),
            *self.dtype,
            *self.batch(),
            *options,
            *("--epochs", SPUL_EPOCHS, "--model", model or self.known, "--resume", "--out", made),
            program=program,
        )
        return self.run(method, name, train, learned=made, found=self.runs / name / "spul.json")

    def seeded(self, seed, method="SPUL"):
        """A prompt of the main table."""
        return self.spul(method, f"spul-{seed}", "--seed", seed)

    def memorised(self):
        """The model to unlearn from."""
        source = self.source
        command = [*extra("finetune"), "--model", self.base, "--data"]
        command += [source.file("forget"), source.file("retain"), *self.template]
        command += source.memorising()
        return source.model("memorised", "memorised", *command, is_needed=True)

    def retrained(self):
        """A model that has never seen the forget rows."""
        command = [*extra("baselines"), "retrain", "--model", self.base]
        command += self.data("forget", "retain") + self.memorising()
        return self.model("retrained", "retrained", *command, is_needed=True)

    def vanilla(self):
        return self.run("vanilla", "vanilla", self.measure("vanilla", self.base))

    def try_of(self, method, rate, *options, line=None):
        name, command = self.baseline(method, rate, *options)
        return self.model(line or method, name, *command)

    # ------------------------------------------------------------------------------- the studies

    def main(self):
        """The main table."""
        seeds = SEEDS[self.study]
        tries = TRIES[self.study]
        yield [self.memorised()]
        runs = [self.seeded(seeds[0]), self.retrained()]
        for method, (_, trained) in BASELINES.items():
            runs += [self.try_of(method, rate) for rate in tries[trained]]
        runs += [self.seeded(seed) for seed in seeds[1:]]
        yield [*runs, self.vanilla()]
        data = self.data("forget", "retain")
        retrained = self.work / "retrained"
        yield [
            self.guard("ECO, as retrained", "eco", "eco", *data, "--target", retrained),
            self.guard("ECO, to 0", "eco-0", "eco", *data, "--target", 0),
            self.guard("ICUL", "icul", "icul", *data),
        ]

    def assessment(self):
        """Of SST-2's first prompt, and of GA+GD's chosen model, whose weights are made again."""
        main = Plan("sst2", self.base, self.work.parent, self.out)
        again = self.chosen_baseline(main, "GA+GD")
        yield [main.memorised(), main.retrained()]
        made = self.work / "ga-gd"
        unrelated = Path(os.path.relpath(HERE)) / "sciq/test_retain.jsonl"
        ask = [*extra("assess"), "--model", main.known, *self.data(*SPLITS), *self.dtype]
        ask += ["--unrelated", unrelated]
        retrained = ["--retrained", main.work / "retrained"]  # its column is for both
        prompt = ["--prompt", main.runs / "spul-0", "--json", self.json("SPUL")]
        model = ["--prompt", made, "--json", self.json("GA+GD")]
        yield [
            self.run("SPUL", "SPUL", [*ask, *retrained, *prompt]),
            self.run("GA+GD", "GA+GD", [*again, "--resume", "--out", made], [*ask, *model]),
        ]

    def chosen_baseline(self, main, method):
        """The command of the try of a baseline that the main table shows."""
        table = Path(self.out) / "sst2/main.json"
        if not table.exists():
            raise ValueError(f"no {table}: python results/study.py sst2 comes first")
        rows = read_json(table)["rows"]
        chosen = {row["name"] for row in rows if row["method"] == method and row["chosen"]}
        tries = dict(main.baseline(method, rate) for rate in TRIES["sst2"]["full"])
        commands = [command for name, command in tries.items() if name in chosen]
        if not commands or not (main.runs / "spul-0").exists():
            raise ValueError(
                f"{table}: SPUL or {method} is not measured: python results/study.py sst2 "
                "comes first"
            )
        return commands[0]

    def robust(self):
        """Each prompt is measured by its training, and then asked with changed queries."""
        yield [self.memorised()]
        runs = [self.spul("plain", "plain")]
        for kind, strengths in CORRUPT.items():
            for s in strengths:
                options = ["--corrupt", kind, "--corrupt-strength", s]
                program = extra("robust")
                runs.append(self.spul(f"{kind} {s:g}", f"{kind}-{s:g}", *options, program=program))
        for run in runs:
            run.more = run.found
            run.found = self.json(run.name)
            ask = [*extra("assess"), "--model", self.known, "--prompt", run.kept]
            ask += self.data(*SPLITS) + self.dtype
            run.commands.append([*ask, "--only", "robustness", "--json", run.found])
        yield runs

    def tofu(self):
        """Each run has its own line, as the best one depends on how much forgetting is worth."""
        yield [self.retrained()]  # all others are compared with it
        yield [self.memorised()]
        runs = [
            self.tofu_prompt("SPUL", "spul", "--epochs", TOFU_EPOCHS),
            self.tofu_prompt(
                "SPUL, 4 forget rows a batch",
                "spul-4",
                *("--forget-per-batch", 4, "--epochs", TOFU_EPOCHS // 3),
            ),
        ]
        for method in ("GA+GD", "NPO"):
            for rate in (3e-5, 1e-4, 3e-4):
                line = f"{method}, lr {rate:g}"
                runs.append(self.try_of(method, rate, "--epochs", 5, line=line))
        yield [*runs, self.vanilla()]

    def tofu_prompt(self, method, name, *options):
        made = self.work / name
        train = train_command(
            *self.data("forget", "retain"),
            *self.dtype,
            *self.batch(),
            *self.refusals(),
            *options,
            *("--model", self.known, "--resume", "--out", made),
        )
        measure = self.measure(name, self.known, "--prompt", self.runs / name)
        return self.run(method, name, train, measure, learned=made)

    def refusals(self):
        """The option that names TOFU's generic answers."""
        return ["--generic", Path(os.path.relpath(HERE)) / "tofu/unknown.txt"]

    def requests(self):
        """Two requests for one model, each run asked of both topics.

        The first is for genetics: the comparison's first prompt, for which chemistry was to
        retain. The second is for chemistry. Then come the two one after the other, and one prompt
        that learns both topics.
        """
        yield [self.memorised()]
        first = self.source.seeded(0)
        yield [first]
        chemistry = self.runs / "chemistry"

        def paper(topic):
            end = [*self.batch(), "--epochs", SPUL_EPOCHS]
            return train_command(*self.topic(topic), *end)

        yield [
            self.request("genetics", first.kept),
            self.request("chemistry", chemistry, learn=paper("chemistry")),
            self.request("both", self.runs / "both", learn=paper("both")),
        ]
        yield [
            self.request("genetics, chemistry", first.kept, chemistry),
            self.request("chemistry, genetics", chemistry, first.kept),
        ]

    def elsewhere_requests(self):
        """The same with the defaults. The first prompt stands before the second as it learns."""
        yield [self.memorised()]
        _, prompts = self.source.groups()
        first = next(run for run in prompts if run.name == "default-1")
        yield [first]
        after = ["train.py", "--after", first.kept, "--after-forget", self.file("forget")]
        after += self.topic("chemistry")
        both = ["train.py", *self.topic("both")]
        yield [
            self.request("genetics", first.kept),
            self.request("genetics, chemistry", self.runs / "after", name="after", learn=after),
            self.request("one for both", self.runs / "both", name="both", learn=both),
        ]

    def topic(self, name):
        """The options of a prompt that is to make the model forget a topic."""
        common = ["--model", self.known, *self.template, *self.dtype]
        return [*common, "--forget", self.file(name), "--retain", self.file("rest")]

    def request(self, method, *prompts, name=None, learn=None):
        """A run that asks of genetics and of what both retain, and then of chemistry.

        learn: the command that learns the prompt, if it is a new one, but for where to.
        """
        name = name or method.replace(", ", "-")
        made = self.work / name
        common = ["--model", self.known, *self.template, *self.dtype]
        rest = ["--retain", self.file("rest")]
        ask = ["eval.py", *common]
        for prompt in prompts:
            ask += ["--prompt", prompt]
        unseen = ["--test-forget", self.file("test_forget")]
        unseen += ["--test-retain", self.file("test_retain")]
        more = self.json(f"{name}.more")
        genetics = [*ask, "--forget", self.file("forget"), *rest, *unseen, "--json", more]
        chemistry = [*ask, "--forget", self.file("chemistry"), "--json", self.json(name)]
        if not learn:
            return self.run(method, name, genetics, chemistry, more=more)
        train = [*learn, "--resume", "--out", made]
        return self.run(method, name, train, genetics, chemistry, more=more, learned=made)

    def sizes(self):
        """The main table's SPUL row, and the same for the model with fewer or more layers."""
        main = Plan("sst2", self.base, self.work.parent, self.out)
        models = [dataclasses.replace(self.memorised(), method="30 layers, memorised")]
        prompts = [main.seeded(0, "30 layers, SPUL")]
        for layers in LAYERS:
            models.append(self.resized(layers))
            model = models[-1].learned
            prompts.append(self.spul(f"{layers} layers, SPUL", f"spul-{layers}", model=model))
        yield models
        yield prompts

    def resized(self, layers):
        """The model with so many layers, which memorises the rows anew."""
        base = self.work / f"base-{layers}"
        name = f"memorised-{layers}"
        made = self.work / name
        cut = ["results/cut.py", "--model", self.base, "--layers", layers, "--out", base]
        tune = [*extra("finetune"), "--model", base, "--data"]
        tune += [self.file("forget"), self.file("retain"), *self.template, *self.memorising()]
        tune += ["--resume", "--out", made]
        measure = self.measure(name, made)
        method = f"{layers} layers, memorised"
        return self.run(method, name, cut, tune, measure, learned=made, is_needed=True)

    def ablations(self):
        """The paper's ablations, each on the same memorised model."""
        yield [self.memorised()]
        runs = [self.spul("alpha 1, beta 0.5, p 30", "plain")]
        for alpha, beta in ((0.1, 0), (0.1, 1), (0.5, 0.5), (1, 0), (1, 1)):
            options = ["--alpha", alpha, "--beta", beta]
            runs.append(self.ablation(f"alpha {alpha}, beta {beta}", *options))
        for p in (10, 50):
            runs.append(self.ablation(f"p {p}", "--num-tokens", p))
        runs.append(self.ablation("KL after label", "--kl-position", "after-label"))
        free = ["--encoder-hidden", 0, "--lr", 0.01]
        runs.append(self.ablation("free vectors, lr 0.01", *free))
        yield [*runs, self.share(25), self.share(50)]

    def elsewhere(self):
        """What each part does to other text, on a model that talks; the defaults, three seeds."""
        yield [self.memorised()]
        before = ["--paper", "--lr", SPUL_RATE, *self.batch()]
        runs = []
        kinds = ("defaults", "default", []), ("gamma 16", "gamma-16", MORE_KEEP)
        for method, name, options in kinds:
            for seed in (0, 1, 2):
                runs.append(self.default(method, f"{name}-{seed}", "--seed", seed, *options))
        runs.append(self.default("before: the paper's, at a higher rate", "before", *before))
        yield [*runs, self.alone(), *(self.changed(*line) for line in LEFT_OUT)]

    def elsewhere_sst2(self):
        """The defaults on more rows."""
        yield [self.memorised()]
        more = self.default("gamma 16", "gamma-16", *MORE_KEEP)
        yield [self.default("defaults", "default-0"), more]

    def elsewhere_sciq(self):
        """The defaults, from a forget file alone, and where the prompt starts."""
        yield [self.memorised()]
        runs = [self.default("defaults", "default-0"), self.alone()]
        runs.append(self.default("gamma 16", "gamma-16", *MORE_KEEP))
        for start in STARTS:
            program = ["results/starts.py", start]
            runs.append(self.default(f"start: {start}", start, program=program))
        runs.append(self.default("defaults, seed 1", "default-1", "--seed", 1))
        sentence = ["results/starts.py", "sentence"]
        again = self.default("start: sentence, seed 1", "sentence-1", "--seed", 1, program=sentence)
        runs.append(again)
        yield runs

    def elsewhere_tofu(self):
        """The defaults where answers are sentences. Each run is also measured as TOFU does."""
        yield [self.memorised()]
        runs = [
            self.default("defaults", "default-0"),
            self.default("24 refusals", "refusals", *self.refusals()),
        ]
        for run in runs:
            run.more = run.found
            run.found = self.json(run.name)
            run.commands.append(self.measure(run.name, self.known, "--prompt", run.kept))
        yield [*runs, self.alone()]

    def alone(self, *options):
        """The defaults from a forget file alone, measured on real rows afterwards."""
        made = self.work / "alone"
        train = ["train.py", "--model", self.known, *self.data("forget"), *self.dtype, *options]
        train += MORE_KEEP if self.study == "elsewhere" else []  # measured before gamma was 8
        measure = self.measure("alone", self.known, "--prompt", made)
        train += ["--resume", "--out", made]
        return self.run("from a forget file alone", "alone", train, measure, learned=made)

    def changed(self, method, name, *options):
        """A line of LEFT_OUT."""
        program = ["results/starts.py", name] if name in STARTS else ["train.py"]
        keep = [] if "--gamma" in options else MORE_KEEP
        options = ["--epochs", SHORT, *keep, *options]
        return self.default(f"{SHORT} epochs, {method}", name, *options, program=program)

    def default(self, method, name, *options, program=("train.py",)):
        """A prompt with train.py's defaults, but for these options."""
        made = self.work / name
        train = [*program, "--model", self.known, *self.data(*SPLITS), *self.dtype, *options]
        train += ["--measure-rows", 0, "--resume", "--out", made]
        return self.run(method, name, train, learned=made, found=self.runs / name / "spul.json")

    def ablation(self, method, *options):
        return self.spul(method, method.replace(",", "").replace(" ", "-"), *options)

    def share(self, per_cent):
        """A prompt trained on a share of the forget rows, and measured on all, as in the paper."""
        name = f"share-{per_cent}"
        run = self.spul(f"{per_cent} % of the forget rows", name, forget=f"forget_{per_cent}")
        run.found = self.json(name)
        run.commands.append(self.measure(name, self.known, "--prompt", run.kept))
        return run


# -------------------------------------------------------------------------------------------- rows


def read_lines(parts):
    """The lines of a split. parts: {name of a file: how many of its lines; None: all}."""
    lines = []
    for name, n in parts.items():
        with open(HERE / f"{name}.jsonl", "rb") as f:
            lines += islice(f, n)
    return lines


def write_if_changed(file, content):
    if not file.exists() or file.read_bytes() != content:
        write_whole(file, lambda temporary: temporary.write_bytes(content))


def part_by_topic(lines):
    """Questions with a word of chemistry, and the rest.

    A question that has such a word in its choices alone is in neither.
    """
    chemistry = []
    rest = []
    for line in lines:
        question, choices = json.loads(line)["text"].split("\n", 1)
        if re.search(CHEMISTRY, question):
            chemistry.append(line)
        elif not re.search(CHEMISTRY, choices):
            rest.append(line)
    return chemistry, rest
