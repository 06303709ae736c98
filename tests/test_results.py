"""The studies, and that the README states what they measured."""

import concurrent.futures
import dataclasses
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import eval as evaluate
import train
from extras import assess, baselines, finetune, guards, robust, tofu
from model import Llama
from spul import load_prompt
from support.general import sentence_vectors
from support.options import parse
from support.tokenizer import Tokenizer
from tests.helpers import ROOT, call, command, lines_of, python, script_of_results, tokens_of
from tests.helpers import train_args
from tests.test_finetune import write_lora


def test_a_study_runs_goes_on_and_writes_its_table(folder, tmp_path, monkeypatch, capsys):
    study = script_of_results("study", monkeypatch)
    few = {split: {f"sst2/{split}": 12} for split in study.plans.SPLITS}
    monkeypatch.setitem(study.plans.ROWS, "sst2", few)
    monkeypatch.setitem(study.plans.TRIES, "sst2", {"full": (1e-3, 1e9), "lora": (1e-3,)})
    methods = {"GA+GD": ("ga-gd", "full"), "SKU": ("sku", "lora")}
    monkeypatch.setattr(study.plans, "BASELINES", methods)
    monkeypatch.setitem(study.plans.SEEDS, "sst2", (0, 1))
    work = tmp_path / "work"
    args = ["sst2", "--base", str(folder), "--work", str(work), "--out", str(tmp_path)]
    study.main([*args, "--jobs", "2"])
    table = (tmp_path / "sst2" / "main.md").read_text()
    rows = json.loads((tmp_path / "sst2" / "main.json").read_text())["rows"]
    rows = {row["name"]: row for row in rows}
    assert set(rows) == set(
        "vanilla memorised retrained spul-0 spul-1 ga-gd-0.001 ga-gd-1e+09 sku-0.001 "
        "eco eco-0 icul".split()
    )
    diverged = rows.pop("ga-gd-1e+09")
    assert "not finite" in diverged["failed"] and not diverged["chosen"]
    assert all("splits" in row and row["chosen"] for row in rows.values())
    assert table.count("| GA+GD |") == 2 and "97.2 / 13.8 / 94.4 / 11.3" in table
    retain = rows["spul-0"]["splits"]["train retain"]
    assert f"{100 * retain['accuracy']:.1f}" in table and "spul-0, spul-1" in table
    assert rows["icul"]["cost"]["trainable"] == 0
    known = work / "sst2" / "memorised"
    runs = tmp_path / "runs" / "sst2"
    assert not (work / "sst2" / "ga-gd-0.001" / "model.safetensors").exists()
    kept = {file.name for file in runs.iterdir()}
    assert kept == {"memorised", "retrained", "spul-0", "spul-1"}
    weights = (known / "model.safetensors").read_bytes()

    # Another machine has what is in results: what is measured is not run again.
    shutil.rmtree(work)
    commands = []
    really = subprocess.run

    def note(command, **options):
        commands.append(command)
        return really(command, **options)

    monkeypatch.setattr(study.subprocess, "run", note)
    study.main(args)
    assert commands == []
    # What is missing is, with the memorised models made from their adapters.
    measured = tmp_path / "runs" / "sst2.json"
    entries = json.loads(measured.read_text())
    del entries["ga-gd-0.001"]
    measured.write_text(json.dumps(entries))
    study.main(args)
    assert [command[2] for command in commands] == [
        "extras.finetune",
        "extras.finetune",
        "extras.baselines",
        "--model",  # eval.py's
    ]
    assert "--adapter" in commands[0] and "--adapter" in commands[1]
    assert (known / "model.safetensors").read_bytes() == weights
    assert call(evaluate, "--model", known, "--prompt", runs / "spul-1", "--ask", "a film") == 0

    # Figures are not shown with commands that they do not come from.
    table = (tmp_path / "sst2" / "main.md").read_text()
    monkeypatch.setattr(study.plans, "SPUL_EPOCHS", 1)
    for more in ([], ["--table"]):
        with pytest.raises(ValueError, match=r"sst2.json: spul-\d: measured with other commands"):
            study.main([*args, *more])
    assert (tmp_path / "sst2" / "main.md").read_text() == table


class Here:
    """In place of a pool of threads, where Ctrl-C cannot be caught: runs each call at once."""

    def __init__(self, _):
        pass

    def shutdown(self, **_):
        pass

    def submit(self, function, *args):
        (future := concurrent.futures.Future()).set_result(function(*args))
        return future


@pytest.fixture
def small_study(folder, tmp_path, monkeypatch):
    """-> prepare(kind): study.py and its arguments, for a random model and few rows.

    Every command runs in this process, as it would run in its own.
    """
    study = script_of_results("study", monkeypatch)
    cut = importlib.import_module("cut")
    modules = {"train.py": train, "eval.py": evaluate, "results/cut.py": cut}
    for module in (assess, baselines, finetune, guards, robust, tofu):
        modules[module.__name__] = module

    def in_this_process(command, **_):
        _, first, *options = command
        if first == "-m":
            name, *options = options
        else:
            name = first.relative_to(ROOT).as_posix()
        status = call(modules[name], *options)
        return subprocess.CompletedProcess(command, status, stderr="see above")

    plans = study.plans
    # These files are not in a clone: results/rows.py draws them.
    drawn = {
        "sst2/full_forget": "sst2/forget",
        "sst2/full_retain": "sst2/retain",
        "tofu/retain": "tofu/test_forget",
        "tofu/test_retain": "tofu/test_forget",
    }
    few = {"sst2/forget_more": 0, "sst2/retain_more": 0, "tofu/retain": 24}

    def prepare(kind):
        for name in {kind, plans.SOURCE.get(kind, "sst2"), "ablations"}:
            rows = {}
            for split, parts in plans.ROWS[name].items():
                rows[split] = {drawn.get(part, part): few.get(part, 40) for part in parts}
            monkeypatch.setitem(plans.ROWS, name, rows)
            monkeypatch.setitem(plans.MEMORISE, name, 1)
            monkeypatch.setitem(plans.DTYPE, name, "fp32")  # bf16 is slow without hardware for it
        monkeypatch.setattr(study, "ThreadPoolExecutor", Here)
        monkeypatch.setattr(plans, "CORRUPT", {"semantic": (0.5,)})
        monkeypatch.setattr(plans, "LAYERS", (1,))
        monkeypatch.setattr(plans, "SPUL_EPOCHS", 1)
        monkeypatch.setattr(plans, "TOFU_EPOCHS", 3)
        monkeypatch.setattr(plans, "SEEDS", {"full": (0,)})
        monkeypatch.setattr(study.subprocess, "run", in_this_process)
        work = tmp_path / "work"
        return study, [kind, "--base", str(folder), "--work", str(work), "--out", str(tmp_path)]

    return prepare


def table_and_rows(kind, file):
    """What a whole study wrote: no run is missing or failed, and every line has the same cells."""
    table = file.with_suffix(".md").read_text()
    rows = json.loads(file.with_suffix(".json").read_text())["rows"]
    assert "not run" not in table
    assert len({line.count("|") for line in table.splitlines() if line[:1] == "|"}) < 3
    assert all(row["commands"] for row in rows)
    assert all("failed" not in row for row in rows)
    return table, rows


def first_cells(table):
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:-2]]


def test_the_ablations_run_each_with_its_own_options(small_study, tmp_path):
    study, args = small_study("ablations")
    study.main(args)
    _, rows = table_and_rows("ablations", tmp_path / "sst2" / "ablations")
    share = rows[-2]
    info = json.loads((tmp_path / "work" / "ablations" / "share-25" / "spul.json").read_text())
    assert share["splits"]["train forget"]["rows"] == 40
    assert "forget_25.jsonl" in share["commands"][0]
    assert info["results"]["with"]["train forget"]["rows"] == 10
    assert len({json.dumps(row["splits"]) for row in rows}) > len(rows) / 2


def test_the_study_of_other_text_shows_what_a_prompt_changes_elsewhere(small_study, tmp_path):
    """Its model rehearses general text; its runs differ in one thing each."""
    study, args = small_study("elsewhere_sst2")
    study.main(args)
    table, rows = table_and_rows("elsewhere_sst2", tmp_path / "elsewhere_sst2")
    memorised, defaults, more_keep = rows
    assert "--rehearse" in memorised["commands"][0]
    changed = memorised["found"]["memorised"]["general text"]
    assert changed["kl"] > 0
    assert f"| {changed['kl']:.3f} | {100 * changed['same']:.1f} |" in table.splitlines()[2]
    result = defaults["found"]["elsewhere"]["general text"]
    assert f"{result['kl']:.3f} ({result['sentence_kl']:.3f})" in table
    assert "--gamma 16" in more_keep["commands"][0]
    plan = study.plans.Plan("elsewhere", folder_of(args), tmp_path / "work", tmp_path)
    commands = [" ".join(map(str, run.commands[0])) for run in plan.groups()[1]]
    assert len(set(commands)) == len(commands) == 15
    for run in plan.groups()[1]:
        words = [str(word) for word in run.commands[0]]
        parse(words[words.index("--model") :])


def test_the_study_of_sentences_shows_both_commands_measures(small_study, tmp_path, monkeypatch):
    study, args = small_study("elsewhere_tofu")
    # a random model writes no texts like the rows
    monkeypatch.setattr(study.plans.Plan, "alone", lambda plan, *_: plan.vanilla())
    study.main(args)
    table, (memorised, defaults, refusals, vanilla) = table_and_rows(
        "elsewhere_tofu", tmp_path / "elsewhere_tofu"
    )
    assert "--rehearse" in memorised["commands"][0] and "extras.tofu" in vanilla["commands"][0]
    assert "--generic" in refusals["commands"][0] and "extras.tofu" in defaults["commands"][1]
    result = defaults["more"]["elsewhere"]["general text"]
    with_prompt = table.splitlines()[3].split(" | ")
    retain = defaults["found"]["with"]["train retain"]
    assert with_prompt[7] == f"{100 * retain['rouge_l']:.1f}"
    assert with_prompt[13] == f"{result['kl']:.3f}"


def folder_of(args):
    return args[args.index("--base") + 1]


def test_the_study_of_all_of_sst2_runs_and_writes_its_table(small_study, tmp_path, monkeypatch):
    study, args = small_study("full")
    monkeypatch.setattr(study.plans, "BASELINES", {"NPO": ("npo", "full")})
    study.main(args)
    table_and_rows("full", tmp_path / "sst2" / "full")


def test_the_study_of_tofu_shows_its_measures_and_answers(small_study, tmp_path):
    study, args = small_study("tofu")
    study.main(args)
    table, rows = table_and_rows("tofu", tmp_path / "tofu")
    assert [row["method"] for row in rows][:3] == ["retrained", "memorised", "SPUL"]
    assert len(rows) == 11
    # the retrained model's forget quality beside itself
    assert table.splitlines()[2].endswith("| 1 |")
    said = [rows[2]["found"][side]["train forget"]["said"] for side in ("without", "with")]
    assert [len(all_) for all_ in said] == [40, 40]
    assert said[1] != said[0]
    assert table.count("**question**") == 4
    assert f"| SPUL | {' '.join(said[1][10].replace('|', '/').split())} |" in table


def test_the_study_of_two_requests_keeps_their_rows_apart(small_study, tmp_path):
    study, args = small_study("requests")
    study.main(args)
    table, rows = table_and_rows("requests", tmp_path / "requests")
    assert first_cells(table) == [
        "no prompt",
        "genetics",
        "chemistry",
        "both",
        "genetics, chemistry",
        "chemistry, genetics",
    ]
    work = tmp_path / "work" / "requests"
    asked = [row["text"] for row in lines_of(work / "chemistry.jsonl")]
    assert asked
    assert all(re.search(study.plans.CHEMISTRY, text.split("\n")[0]) for text in asked)
    assert not any(re.search(study.plans.CHEMISTRY, line) for line in open(work / "rest.jsonl"))
    stacked = rows[3]["commands"][0]
    assert stacked.index("runs/sciq/spul-0") < stacked.index("runs/requests/chemistry")


def test_the_study_of_a_second_request_learns_it_after_the_first(small_study, tmp_path):
    study, args = small_study("elsewhere_requests")
    study.main(args)
    table, rows = table_and_rows("elsewhere_requests", tmp_path / "elsewhere_requests")
    assert first_cells(table) == [
        "no prompt",
        "genetics",
        "genetics, chemistry",
        "one for both",
    ]
    genetics, after, both = rows
    first = "runs/elsewhere_sciq/default-1"
    assert first in genetics["commands"][0] and first in after["commands"][0]
    assert "--after " in after["commands"][0] and "--after" not in both["commands"][0]
    assert "chemistry.jsonl" in after["commands"][0] and "both.jsonl" in both["commands"][0]
    p = json.loads((tmp_path / "runs/elsewhere_requests/after/spul.json").read_text())["p"]
    assert p == 60


def test_the_study_of_changed_queries_shows_their_mean_and_the_worst(small_study, tmp_path):
    study, args = small_study("robust")
    study.main(args)
    table, rows = table_and_rows("robust", tmp_path / "robust")
    lines = table.splitlines()[2:-2]
    first, *_, last = ([float(cell) for cell in line.split("|")[2:-1]] for line in lines)
    found = rows[-1]["found"]["found"]
    for side, cells in (("before", first), ("with", last)):
        robustness = found[side]["robustness"].items()
        words = [value for line, value in robustness if line.endswith("forget")][:6]
        assert cells[3:5] == pytest.approx([100 * sum(words) / 6, 100 * max(words)], abs=0.06)


def test_the_study_of_sizes_runs_and_writes_its_table(small_study, tmp_path):
    study, args = small_study("sizes")
    study.main(args)
    table_and_rows("sizes", tmp_path / "sizes")


def test_the_study_that_assesses_goes_on_where_it_was_stopped(small_study, folder, tmp_path):
    study, args = small_study("assessment")
    # It needs of the paper's study two models, a prompt and a table.
    main = study.plans.Plan("sst2", folder, tmp_path / "work", tmp_path)
    assert study.perform(main.memorised(), None)
    data_args = main.data("forget", "retain")
    out = main.runs / "spul-0"
    assert call(train, "--model", main.known, *data_args, "--epochs", 1, "--out", out) == 0
    (tmp_path / "sst2").mkdir()
    chosen = {"rows": [{"method": "GA+GD", "name": "ga-gd-0.0003", "chosen": True}]}
    (tmp_path / "sst2" / "main.json").write_text(json.dumps(chosen))
    study.main(args)

    def rows():
        return json.loads((tmp_path / "assessment.json").read_text())["rows"]

    of_ga_gd = rows()[1]["commands"][0]
    assert "--lr 0.0003" in of_ga_gd
    assert "ga-gd" in of_ga_gd
    lines = (tmp_path / "assessment.md").read_text().splitlines()
    leak = next(line for line in lines if "PrivLeak" in line)
    # GA+GD's beside SPUL's retrained column, too
    assert all(cell.strip() for cell in leak.split("|")[5:9])
    # As if it had been stopped: its file is in the folder of work, and not finished.
    entries = json.loads((tmp_path / "runs" / "assessment.json").read_text())
    entry = entries.pop("SPUL")
    (tmp_path / "runs" / "assessment.json").write_text(json.dumps(entries))
    partial = tmp_path / "work" / "assessment" / "SPUL.json"
    partial.write_text(json.dumps(entry | {"finished": False}))
    study.main([*args, "--table"])
    assert not rows()[0]["lines"]
    study.main(args)
    table_and_rows("assessment", tmp_path / "assessment")


def test_a_model_is_cut_to_its_first_layers_or_has_each_several_times(folder, tmp_path):
    for name, order in {"two": [0, 1], "six": [0, 0, 1, 1, 2, 2]}.items():
        made = command(
            "results/cut.py", "--model", folder, "--layers", len(order), "--out", tmp_path / name
        )
        assert made.returncode == 0, made.stderr
        whole, tokens = Llama.from_pretrained(folder), tokens_of(2, 9)
        whole.layers = torch.nn.ModuleList(whole.layers[i] for i in order)
        whole.config = dataclasses.replace(
            whole.config, num_hidden_layers=len(order), windows=None, uses_rope=None
        )
        torch.testing.assert_close(Llama.from_pretrained(tmp_path / name)(tokens), whole(tokens))
    for args, pattern in [
        ((3, "three"), "the model has 3"),
        ((4, "four"), "take fewer or a multiple"),
        ((1, "two"), "is there already"),
    ]:
        failed = command(
            "results/cut.py", "--model", folder, "--layers", args[0], "--out", tmp_path / args[1]
        )
        assert failed.returncode == 2 and re.search(pattern, failed.stderr)


@pytest.mark.parametrize("hidden", [0, 7])
def test_a_prompt_with_a_start_begins_there_and_its_first_vector_stays(hidden, monkeypatch):
    start = torch.randn(5, 12)
    prompt = script_of_results("starts", monkeypatch).Started(start, hidden)
    assert torch.equal(prompt(), start)
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.1)
    prompt().square().sum().backward()
    optimizer.step()
    assert torch.equal(prompt()[0], start[0])
    assert (prompt()[1:] != start[1:]).all(dim=1).all()


def test_the_starts_are_a_sentence_repeated_and_rows_of_the_vocabulary(folder, monkeypatch):
    starts = script_of_results("starts", monkeypatch)
    model, tokenizer = Llama.from_pretrained(folder), Tokenizer(folder)
    sentence = sentence_vectors(model, tokenizer, folder)
    n = len(sentence)
    start = starts.vectors("sentence", model, tokenizer, folder, n + 3)
    assert torch.equal(start, torch.cat([sentence, sentence[1:4]]))
    start = starts.vectors("vocabulary", model, tokenizer, folder, 9)
    assert torch.equal(start[0], sentence[0])
    is_equal = (start[1:, None] == model.embed_tokens.weight.float()).all(dim=-1)  # (8, V)
    assert is_equal.any(dim=1).all()
    assert len(set(is_equal.int().argmax(dim=1).tolist())) > 4


def test_train_starts_elsewhere_with_this_script(folder, files, tmp_path):
    out = tmp_path / "p"
    options = train_args(folder, files, out, "--epochs", 1, "--lr", 1e-9)
    done = command("results/starts.py", "sentence", *options)
    assert done.returncode == 0, done.stderr
    model, tokenizer = Llama.from_pretrained(folder), Tokenizer(folder)
    phi, _ = load_prompt(out)
    sentence = sentence_vectors(model, tokenizer, folder)
    torch.testing.assert_close(phi, sentence[: len(phi)], atol=1e-5, rtol=0)
    assert json.loads((out / "spul.json").read_text())["options"]["start"] == "sentence"
    failed = command("results/starts.py", *options)
    assert failed.returncode == 2 and "sentence or vocabulary" in failed.stderr
    failed = command("results/starts.py", "sentence", *options, "--num-tokens", 1, "--overwrite")
    assert failed.returncode == 2 and "--num-tokens 2 or more" in failed.stderr


def test_half_of_the_steps_are_on_rounded_weights(folder, monkeypatch):
    script = script_of_results("rounded", monkeypatch)
    monkeypatch.setattr(script, "GROUPS", (4, 8, 16))
    model = Llama.from_pretrained(folder)
    weight = model.layers[0].mlp.up_proj.weight
    seen = []  # of each step: its number, and the group of the rounded weights, or None

    def step(used, number):
        own = used.layers[0].mlp.up_proj.weight
        groups = [g for g in script.GROUPS if torch.equal(own, script.rounded(weight, 4, g))]
        seen.append((number, None if torch.equal(own, weight) else groups[0]))

    changed = script.RoundedHalf(step)
    for number in range(160):
        changed(model, number)
    assert [number for number, group in seen if group] == [n for n in range(160) if n // 2 % 2]
    groups = [group for _, group in seen if group]
    assert groups == [script.GROUPS[i // script.EVERY % 3] for i in range(80)]


def test_train_with_rounded_weights_is_another_run(folder, files, tmp_path):
    options = train_args(folder, files, tmp_path / "p", "--epochs", 1)
    done = command("results/rounded.py", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "p/spul.json").read_text())["options"]["rounded"] == 4
    failed = command("results/rounded.py", *options, "--resume")
    assert failed.returncode == 2 and "begin anew" in failed.stderr


def test_the_curve_of_a_run_ends_where_its_table_does(tmp_path):
    """In the demo, whose prompt forgets in a few steps."""
    out = tmp_path / "p"
    options = ["--gamma", 0, "--batch-size", 16, "--epochs", 1, "--out", out]
    done = command("results/curve.py", *options)
    assert done.returncode == 0, done.stderr
    info = json.loads((out / "spul.json").read_text())
    lines = json.loads((out / "curve.json").read_text())
    assert all(0 <= share <= 100 for line in lines for share in line["averaged"])
    assert [line["step"] for line in lines] == [50, info["steps"]]
    assert lines[-1]["seconds"] == round(info["seconds"])
    before, after = info["results"]["without"], info["results"]["with"]
    for side in ("forget", "retain"):
        assert lines[-1][side] == round(100 * after[f"train {side}"]["accuracy"], 1)
    assert lines[-1]["forget"] < 100 * before["train forget"]["accuracy"] - 10
    failed = command("results/curve.py", *options, "--resume")
    assert failed.returncode == 2 and "begin anew" in failed.stderr


SCRIPTS = [
    *(file.stem for file in sorted(ROOT.glob("*.py")) if file.stem != "conftest"),
    *(f"extras.{file.stem}" for file in sorted((ROOT / "extras").glob("[a-z]*.py"))),
    *(f"support.{file.stem}" for file in sorted((ROOT / "support").glob("[a-z]*.py"))),
    *(f"results.{file.stem}" for file in sorted((ROOT / "results").glob("*.py"))),
    "demo.make",
]


def test_importing_a_script_does_nothing():
    scripts = [name for name in SCRIPTS if name != "test_spul"]
    assert len(scripts) > 30
    code = (
        "import importlib, sys; sys.argv = ['x', '--nonsense']; sys.path.insert(0, 'results'); "
        f"[importlib.import_module(name) for name in {scripts!r}]"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def text_of(name):
    """A text without line breaks, so that words can be found across them."""
    return " ".join((ROOT / name).read_text().split())


def readme_commands():
    """Every command of ours that the README shows, as lists of words."""
    text = (ROOT / "README.md").read_text()
    lines = [
        line for block in re.findall(r"```\n(.*?)```", text, re.S) for line in block.splitlines()
    ]
    lines += re.findall(r"`(python [^`\n]+)`", text)
    ours = re.compile(r"python ((train|eval)\.py|-m extras\.)")
    return [shlex.split(line) for line in lines if ours.match(line)]


def test_every_command_of_the_readme_runs(folder, files, tmp_path):
    """As printed, one after the other, with a tiny model, few rows and one epoch."""
    commands = readme_commands()
    assert len(commands) >= 6
    (tmp_path / "data.jsonl").write_text(Path(files["forget"]).read_text())
    (tmp_path / "names.txt").write_text("red\n")
    write_lora(tmp_path / "peft" / "lora")
    (tmp_path / "results" / "sst2").mkdir(parents=True)
    table = Path("results/sst2/main.json")
    shutil.copyfile(ROOT / table, tmp_path / table)
    shorter = {
        "train.py": ["--epochs", 1, "--write-retain", 8],
        "extras.finetune": ["--epochs", 1],
        "extras.bench": ["--rounds", 1, "--batches", 1, "--batch-size", 4],
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for _, *args in commands:
        program = args[1] if args[0] == "-m" else args[0]
        for i, arg in enumerate(args):
            if arg.endswith(".jsonl") and arg != "data.jsonl":
                args[i] = files.get(Path(arg).stem, files["forget"])
            if args[i - 1] == "--model":
                args[i] = folder
        if program in ("train.py", "extras.finetune"):
            for out in ("prompt", "memorised"):
                shutil.rmtree(tmp_path / out, ignore_errors=True)
        if args[0] != "-m":
            args[0] = ROOT / args[0]
        done = python(*args, *shorter.get(program, []), cwd=tmp_path, env=environment)
        if program == "extras.export":  # of this model; test_export.py has those that take tokens
            assert "no tokenizer.json" in done.stderr
            continue
        assert done.returncode == 0, (args, done.stderr)


def test_the_readmes_python_runs(tmp_path):
    """As printed, after the quick start's first command has made the demo's prompt."""
    prompt = tmp_path / "prompt"
    made = command("train.py", "--epochs", 1, "--out", prompt)
    assert made.returncode == 0, made.stderr
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    done = python("-c", code.replace("demo/prompt", str(prompt)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("true", "false", "unknown", "neutral")


def test_the_readmes_comparison_is_what_the_study_measured():
    lines = (ROOT / "README.md").read_text().split("| accuracy, % | SST-2: ")[1].splitlines()[2:]
    table = []
    for line in itertools.takewhile(str.strip, lines):
        table.append(line.strip("| ").replace("*", "").split(" | "))
    names = {
        "memorised, before": "memorised",
        "retrained without the forget rows": "retrained",
        "ECO, aimed at 0": "ECO, to 0",
    }
    assert len(table) == 7
    wanted = [
        (study, split)
        for study in ("sst2", "sciq")
        for split in ("train forget", "train retain", "test forget", "test retain")
    ]
    measured = {study: chosen_splits(study, "main") for study in ("sst2", "sciq")}
    for method, *cells in table:
        for cell, (study, split) in zip(cells, wanted, strict=True):
            runs = measured[study][names.get(method, method)]
            assert cell == mean_accuracy(runs, split), (method, study, split)


def chosen_splits(folder, name):
    """{method: the splits of its runs that the table shows}."""
    chosen = {}
    for row in json.loads((ROOT / "results" / folder / f"{name}.json").read_text())["rows"]:
        if row["chosen"]:
            chosen.setdefault(row["method"], []).append(row["splits"])
    return chosen


def mean_accuracy(runs, split):
    values = [100 * splits[split]["accuracy"] for splits in runs]
    return f"{sum(values) / len(values):.1f}"


def test_the_results_on_all_of_sst2_are_what_was_measured():
    text = (ROOT / "results" / "README.md").read_text().replace("*", "")
    measured = chosen_splits("sst2", "full")
    for method in ("memorised", "retrained", "SPUL", "GA+KL", "GA+GD", "NPO"):
        splits = ("train forget", "train retain", "test forget", "test retain")
        cells = [mean_accuracy(measured[method], split) for split in splits]
        assert f"| {method} | {' | '.join(cells)} |" in text, method


def test_the_results_on_a_gpu_are_what_was_measured():
    text = text_of("results/speed.md")
    training = {}
    for name in ("7b", "135m"):
        file = ROOT / "results" / f"{name}.bench.json"
        training[name] = json.loads(file.read_text())["training"]
    large = training["7b"]
    ours = large["spul, p = 30"]["examples/s"]
    peft = large["transformers + peft, p = 30"]["examples/s"]
    checkpointing = large["   with checkpointing (the paper's)"]["examples/s"]
    assert f"{ours / peft:.2f} times" in text and f"{ours / checkpointing:.2f} times" in text
    assert f"{ours:.0f}" in text


def test_the_readmes_limits_are_what_the_assessment_measured():
    limits = " ".join((ROOT / "README.md").read_text().split("## What it does not do")[1].split())
    entries = json.loads((ROOT / "results" / "runs" / "assessment.json").read_text())
    spul = entries["SPUL"]["found"]
    ga_gd = entries["GA+GD"]["found"]
    prompt = spul["with"]
    relearned = "1 rows, 5 steps"
    for words, value in {
        "Without the prompt {} %": prompt["removed"]["prompt left out"],
        "bring back {} % of others": prompt["relearning"][relearned],
        "GA+GD's model, {} %": ga_gd["with"]["relearning"][relearned],
        "never saw them gives {} %": spul["retrained"]["relearning"][relearned],
        "trained on 100 of them, bring back {} %": prompt["attack"]["other forget rows"],
        "rounded to 4 bits {} %": prompt["quantised"]["4 bit, forget"],
        "In another template {} % of the retain": prompt["robustness"]["another template, retain"],
        "({} % without the prompt": spul["before"]["robustness"]["another template, retain"],
        "With a retain row before it, {} % of the forget": prompt["robustness"][
            "a row of the other side in front, forget"
        ],
    }.items():
        assert words.format(f"{100 * value:.1f}") in limits, words
    membership = prompt["membership"]
    assert f"(AUC {membership['outside, AUC against retain']:.2f})" in limits
    assert f"(AUC {membership['outside, AUC']:.2f})" in limits


def test_the_readmes_name_only_options_that_exist():
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    known = "".join(file.read_text() for file in files if "test" not in file.name)
    others = {"no-deps", "nproc", "local-dir", "enable-prompt-embeds"}  # of other programs
    others |= {"outtype", "outfile", "runner", "model-path", "disable-radix-cache"}
    others |= {"enable-prompt-adapter"}
    for name in ("README.md", "results/README.md", "results/speed.md", "results/serving.md"):
        text = (ROOT / name).read_text()
        options = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text)) - others
        assert len(options) > 5
        unknown = [o for o in options if f'"--{o}"' not in known and f'"{o}"' not in known]
        assert unknown == [], name
