"""train.py and eval.py as a user runs them."""

import argparse
import json
import math
import re
import resource
import shutil
import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluate
import spul
import train
from data import TEMPLATES, Example, Row, answer_ids, read_rows
from eval import label_set
from model import Llama
from spul import SoftPrompt
from support import hardware, plan
from support.files import read_text, write_whole
from support.identity import fingerprint
from support.options import PAPER, parse
from support.state import PROMPT_FILES, STATE, read_run, run_folder
from support.tokenizer import Tokenizer
from tests.helpers import call, command, kill_when, logged, phi_of, start, stop_at
from tests.helpers import tiny, train_args, without, write_rows

DONE = set(PROMPT_FILES)  # the files of a finished prompt


def names_in(folder):
    return {file.name for file in folder.iterdir()}


def results_of(out):
    return json.loads((out / "spul.json").read_text())["results"]


# ------------------------------------------------------------------------------------- what it says


def test_the_run_says_its_numbers_first_and_shows_the_table_last(folder, files, tmp_path):
    done = command("train.py", *train_args(folder, files, tmp_path / "p", tests=True))
    assert done.returncode == 0, done.stderr
    in_order = [
        "time     about",  # as soon as one reading says how fast the machine is
        "s for about 14 steps,",
        "4 x 32",
        "trainable",
        "12 to forget, 40 to keep",
        "float32 on cpu, 14 steps",
        "alpha 3.0, beta 0.5, kl_position aligned",
        "to measure after them; ",
        "train forget",
        "test retain",
        "without the prompt all of it is back",
    ]
    places = [done.stdout.find(words) for words in in_order]
    assert -1 not in places
    assert places == sorted(places)
    assert re.search(r"^test retain .* -> ", done.stdout, re.M)
    for term in ("loss", "loss_f", "loss_r", "loss_kl"):
        assert term in done.stderr


def test_the_time_is_that_of_the_steps_left_and_of_measuring(capsys):
    rows = [Example(tuple(range(n)), 1, "", False) for n in (10, 20, 30, 40)]
    texts = [Example(tuple(range(n)), 1, "", False) for n in (50, 70)]
    args = argparse.Namespace(batch_size=8)
    general = argparse.Namespace(own=texts[:1], plain=texts[1:], per_batch=2)
    job = argparse.Namespace(args=args, examples=rows, general=general, reading=0.0007)
    plan.print_time(job, 200, 30, 45)
    seconds = 200 * (8 * 25 + 2 * 60) * plan.STEP * 0.0007  # 179
    assert capsys.readouterr().out == (
        f"time     about {(seconds + 30) / 60:.0f} minutes more: {seconds / 60:.0f} minutes for "
        "200 steps, 30 s to measure after them; 45 s so far\n"
    )
    job.general = None
    plan.print_time(job, 10, 2, 1)
    assert "about 8 s more: 6 s for 10 steps, 2 s to" in capsys.readouterr().out


def test_the_estimate_counts_steps_texts_and_what_is_measured(monkeypatch, capsys, tmp_path):
    answer = 1
    monkeypatch.setattr(plan, "answer_hidden", lambda *_: [torch.zeros(1, 4)])
    monkeypatch.setattr(plan, "row_limit", lambda *_: 99)

    def said(splits, **changed):
        lengths = [30] * 20 + [10] * 20 + [20] * 32
        examples = [Example(tuple(range(n)), answer, "", False) for n in lengths]
        monkeypatch.setattr(plan, "make_examples", lambda *_: (examples, 0))
        clock = iter([0.0, 5.0, 5.64])  # the second time 32 rows, of 20 tokens, take 1 ms each
        monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock))
        options = {"gamma": 8, "general": None, "epochs": None, "batch_size": 8, "rewordings": 4}
        options |= {"measure_rows": 30, "num_tokens": 4, "template": None, "write_retain": None}
        options |= {"out": tmp_path / "p", "retain": "file", "forget_per_batch": "loss"}
        args = argparse.Namespace(**options | changed)
        args.earlier = argparse.Namespace(q=0, rows=[0] * changed.get("earlier_rows", 0))
        plan.print_estimate(args, None, None, splits)
        return capsys.readouterr().out

    both = {"train forget": [0] * 40, "train retain": [0] * 120}
    training = 300 * (8 * 20 + 96) * plan.STEP  # ms; 20 steps an epoch, so there are 15 of them
    writing = 256 * (32 + 48) * plan.WRITE
    reading = (2 * (30 + 30 + 600) + 4 * 25) * 20
    assert said(both) == (
        f"time     about {(training + writing + reading) / 60000:.0f} minutes to go: "
        f"{writing / 1000:.0f} s to write texts, {training / 60000:.0f} minutes for about 300 "
        f"steps, {reading / 1000:.0f} s to measure\n"
    )
    assert "300 steps" in said(both, forget_per_batch=2)  # 20 an epoch
    assert "360 steps" in said(both, forget_per_batch=4, epochs=12)
    assert "44 steps" in said(both, epochs=2, earlier_rows=16)
    alone = said({"train forget": [0] * 40}, gamma=0, retain=None)
    # 256 texts of 20 tokens and twice 51, as many again that are of no use; 6 / 4 examples for each
    assert f" {358 * 2 * 20 * (plan.WRITE + 6 / 4) / 1000:.0f} s to write texts" in alone
    run_folder(tmp_path / "p").mkdir()
    lines = ['{"head": 1}', *['{"text": "a"}'] * 56]
    (run_folder(tmp_path / "p") / "general.jsonl").write_text("\n".join(lines))
    assert f" {200 * 80 * plan.WRITE / 1000:.0f} s to write texts" in said(both)
    answer = 10
    reading += 2 * 660 * 10 * plan.WRITE
    said_of_sentences = said(both)
    assert f" {reading / 1000:.0f} s to measure" in said_of_sentences
    assert "600 steps" in said_of_sentences


def test_at_most_so_many_rows_of_each_split_are_measured(folder, files, trained, tmp_path):
    out = tmp_path / "p"
    more = ["--measure-rows", 10]
    assert call(train, *train_args(folder, files, out, *more, tests=True)) == 0
    assert torch.equal(phi_of(out), phi_of(trained))
    rows = {name: found["rows"] for name, found in results_of(out)["with"].items()}
    splits = ["train forget", "train retain", "test forget", "test retain"]
    assert [rows[name] for name in splits] == [10, 10, 6, 9]
    lines = read_text(files["retain"]).splitlines()
    part = tmp_path / "part.jsonl"
    part.write_text("".join(lines[i] + "\n" for i in range(0, 40, 4)))
    args = ["--model", folder, "--prompt", out, "--retain", part, "--dtype", "fp32"]
    assert call(evaluate, *args, "--json", tmp_path / "r.json") == 0
    got = json.loads((tmp_path / "r.json").read_text())
    for side in ("without", "with"):
        found = results_of(out)[side]["train retain"]
        assert found == pytest.approx(got[side]["train retain"], rel=1e-4)


def test_the_prompt_folder_says_what_it_is(folder, trained, files):
    info = json.loads((trained / "spul.json").read_text())
    assert info["base_sha256"] == fingerprint(folder)
    assert info["labels"] == ["negative", "positive"]
    assert info["generic"] == ["unknown"]
    assert info["options"]["num_tokens"] == info["p"] == 4
    splits = {"train forget", "train retain", "test forget", "test retain"}
    asked_otherwise = set()
    for what in ("another template", "a third template"):
        asked_otherwise |= {f"train {side}, {what}" for side in ("forget", "retain")}
    asked_otherwise |= {"train forget, after a retain row", "train retain, after a forget row"}
    for results in (info["results"]["with"], info["results"]["without"]):
        assert set(results) == splits | asked_otherwise
    prompt = SoftPrompt(info["p"], info["d"], info["options"]["encoder_hidden"])
    assert info["trainable"] == sum(t.numel() for t in prompt.parameters())
    assert info["steps"] == 14
    assert info["seconds"] > 0
    assert info["peak_bytes"] > 1e7
    assert names_in(trained) == DONE


def test_the_demo_forgets_people_and_keeps_the_rest(tmp_path):
    done = command("train.py", "--out", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path / "p")

    def accuracy(side, split):
        return results[side][split]["accuracy"]

    def gain(split):
        return accuracy("with", split) - accuracy("without", split)

    assert accuracy("without", "train forget") > 0.95
    assert accuracy("without", "train retain") > 0.95
    assert accuracy("with", "train forget") <= 0.10
    assert gain("train retain") >= -0.05
    assert {"test forget", "test retain"} <= set(results["with"])
    for what in ("general text", "text by people"):
        change = results["elsewhere"][what]
        assert change["kl"] < change["sentence_kl"]
    assert "Elsewhere this prompt changes little" in done.stdout


# -------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    "options",
    [
        ["--encoder-hidden", 0, "--lr", "0.1"],
        ["--kl-position", "after-label"],
        ["--forget-per-batch", 3],
        ["--forget-per-batch", "natural"],
        ["--dtype", "bf16"],
        ["--alpha", 0, "--beta", 0],
        ["--generic", "None"],
        ["--template", "question"],
        ["--max-length", 32],
        ["--recompute"],
        ["--quantize", "int8"],
        ["--plain"],
        ["--plain", "--recompute", "--quantize", "int8"],
    ],
    ids=str,
)
def test_every_option_trains(options, folder, files, tmp_path):
    assert call(train, *train_args(folder, files, tmp_path / "p", *options)) == 0
    assert phi_of(tmp_path / "p").isfinite().all()


def test_the_plain_forward_trains_the_same_prompt(folder, files, trained, tmp_path):
    assert call(train, *train_args(folder, files, tmp_path / "p", "--plain", tests=True)) == 0
    torch.testing.assert_close(phi_of(tmp_path / "p"), phi_of(trained), atol=1e-5, rtol=1e-4)
    for side, splits in results_of(tmp_path / "p").items():
        for name, found in splits.items():
            assert found == pytest.approx(results_of(trained)[side][name], rel=1e-3)


def test_the_same_seed_gives_the_same_prompt_and_another_another(folder, files, trained, tmp_path):
    assert call(train, *train_args(folder, files, tmp_path / "same")) == 0
    assert call(train, *train_args(folder, files, tmp_path / "other", "--seed", 1)) == 0
    assert torch.equal(phi_of(tmp_path / "same"), phi_of(trained))
    assert not torch.allclose(phi_of(tmp_path / "other"), phi_of(trained))


def test_generic_answers_may_come_from_a_file_with_one_on_each_line(folder, files, tmp_path):
    text = "I do not know.\n\nThat, I cannot say.\nI do not know.\n"
    (tmp_path / "answers.txt").write_text(text)
    args = train_args(folder, files, tmp_path / "p", "--generic", tmp_path / "answers.txt")
    assert call(train, *args) == 0
    info = spul.load_prompt(tmp_path / "p")[1]
    assert info["generic"] == ["I do not know.", "That, I cannot say."]


def test_paper_is_the_papers_setting_as_a_whole():
    args, _ = parse(["--paper", "--model", "m", "--forget", "f"])
    values = vars(args)
    written_out = {
        "num_tokens": 30,
        "encoder_hidden": 128,
        "alpha": 1.0,
        "beta": 0.5,
        "gamma": 0.0,
        "kl_position": "aligned",
        "lr": 1e-4,
        "epochs": 10,
        "batch_size": 32,
        "forget_per_batch": None,  # rows as they come
        "rewordings": 0,
        "single": True,
        "max_length": 1024,
        "measure_rows": 0,  # all
        "generic": ["neutral", "unknown"],
    }
    assert {name: values[name] for name in written_out} == written_out
    given = {**PAPER, "generic": PAPER["generic"].split(",")}
    assert given == written_out


def test_an_option_beside_paper_still_counts():
    common = ["--model", "m", "--forget", "f"]
    for argv in (["--paper", "--lr", "0.02", *common], ["--lr", "0.02", *common, "--paper"]):
        args, _ = parse(argv)
        assert args.lr == 0.02
        assert args.epochs == 10
    args, _ = parse(["--paper", "--generic", "nobody", "--num-tokens", "5", *common])
    assert args.generic == ["nobody"]
    assert args.num_tokens == 5


def test_without_paper_weights_rate_and_batches_are_not_the_papers():
    common = ["--model", "m", "--forget", "f"]
    one = vars(parse(common)[0])
    other = vars(parse(["--paper", *common])[0])
    different = {name for name in one if one[name] != other[name]}
    different -= {"paper", "rewordings", "single", "forget_per_batch"}
    of_training = {"alpha", "gamma", "generic", "lr", "epochs", "batch_size"}
    assert different == of_training | {"measure_rows"}


def test_rows_are_read_in_larger_batches_than_they_are_trained_in():
    common = ["--model", "m", "--forget", "f", "--batch-size"]
    sizes = {n: parse([*common, str(n)])[0].read_batch_size for n in (1, 8, 16, 128)}
    assert sizes == {1: 4, 8: 32, 16: 32, 128: 128}


def test_prompt_and_completion_rows_train_and_measure(folder, tmp_path):
    paths = []
    for name in ("f", "r"):
        rows = [{"prompt": f"{name} {i}:", "completion": f" it is {i}"} for i in range(60)]
        paths.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    args = ["--model", folder, "--forget", paths[0], "--retain", paths[1], "--dtype", "fp32"]
    out = tmp_path / "p"
    assert call(train, *args, "--out", out, "--epochs", 1, "--num-tokens", 3) == 0
    assert call(evaluate, *args, "--prompt", out) == 0


def test_without_a_retain_file_the_model_writes_one(folder, files, tmp_path, capsys):
    args = train_args(folder, files, tmp_path / "p", "--write-retain", 10)
    assert call(train, *without(args, "--retain")) == 0
    printed = capsys.readouterr().out
    assert "writes 10 texts" in printed
    assert "written retain, kept back" in printed
    rows = read_rows(tmp_path / "p.run" / "retain.jsonl")
    keys = {row.key for row in rows}
    assert len(rows) == len(keys) >= 10
    assert not keys & {row.key for row in read_rows(files["forget"])}
    llama = Llama.from_pretrained(folder)
    tok = Tokenizer(folder)
    sentiment = TEMPLATES["sentiment"]
    longest = max(len(answer_ids(tok, label, sentiment)) for label in ("positive", "negative"))
    for row in rows:
        ids = tok.bos + tok.encode(sentiment.string.replace("{text}", row.text))
        answer = tok.decode(llama.generate([ids], None, longest)[0])
        assert answer.strip().split("\n")[0].strip() == row.label


def test_a_resumed_run_takes_the_retain_rows_that_the_model_wrote(
    folder, files, tmp_path, monkeypatch
):
    def args(name):
        given = train_args(folder, files, tmp_path / name, "--write-retain", 10)
        return without(given, "--retain")

    assert call(train, *args("whole")) == 0
    stop_at(3, monkeypatch)
    assert call(train, *args("part")) == 130
    written = (tmp_path / "part.run" / "retain.jsonl").read_bytes()
    assert call(train, *args("part"), "--resume") == 0
    assert (tmp_path / "part.run" / "retain.jsonl").read_bytes() == written
    assert torch.equal(phi_of(tmp_path / "whole"), phi_of(tmp_path / "part"))


# ---------------------------------------------------------------------------------------- the dtype


def measured_times(monkeypatch, fp32, bf16):
    """From now on a product takes so long in each dtype. -> the list of measurements."""
    calls = []

    def time_products(*args):
        calls.append(args)
        return {"fp32": fp32, "bf16": bf16}

    hardware.compare_dtypes.cache_clear()
    monkeypatch.setattr(hardware, "time_products", time_products)
    return calls


@pytest.fixture
def no_cached_times():
    yield
    hardware.compare_dtypes.cache_clear()


@pytest.mark.parametrize(
    "fp32, bf16, dtype",
    [(3.0, 1.0, "bf16"), (1.0, 3.0, "fp32"), (1.1, 1.0, "fp32")],
    ids=["bf16 clearly", "fp32", "bf16 by less than the margin"],
)
def test_dtype_auto_takes_the_faster_by_a_margin_and_says_so_once(
    fp32, bf16, dtype, folder, files, tmp_path, monkeypatch, capsys, no_cached_times
):
    calls = measured_times(monkeypatch, fp32, bf16)
    assert call(train, *train_args(folder, files, tmp_path / "p", "--dtype", "auto")) == 0
    out = capsys.readouterr().out
    assert len(re.findall(rf"^dtype +{dtype}: .*{fp32 / bf16:.1f} times", out, re.M)) == 1
    assert out.count("(--dtype chooses)") == 1
    assert len(calls) == 1
    options = json.loads((tmp_path / "p" / "spul.json").read_text())["options"]
    assert options["dtype"] == str(hardware.DTYPES[dtype])


def test_a_dtype_that_is_given_is_not_measured(
    folder, files, tmp_path, monkeypatch, capsys, no_cached_times
):
    calls = measured_times(monkeypatch, 3.0, 1.0)
    assert call(train, *train_args(folder, files, tmp_path / "p")) == 0
    assert not calls
    assert "--dtype chooses" not in capsys.readouterr().out


def test_a_resumed_run_keeps_its_dtype_though_a_measurement_now_differs(
    folder, files, tmp_path, monkeypatch, no_cached_times
):
    def args(name, *more):
        return train_args(folder, files, tmp_path / name, "--dtype", "auto", *more)

    measured_times(monkeypatch, 3.0, 1.0)
    assert call(train, *args("whole")) == 0
    stop_at(8, monkeypatch)
    assert call(train, *args("part")) == 130
    measured_times(monkeypatch, 1.0, 3.0)
    assert call(train, *args("part", "--resume")) == 0
    options = json.loads((tmp_path / "part" / "spul.json").read_text())["options"]
    assert options["dtype"] == "torch.bfloat16"
    assert torch.equal(phi_of(tmp_path / "whole"), phi_of(tmp_path / "part"))


def test_a_measurement_times_both_dtypes():
    seconds = hardware.time_products(size=64, rounds=4)
    assert set(seconds) == {"fp32", "bf16"}
    assert min(seconds.values()) > 0


# ------------------------------------------------------------------------------ stopped and resumed


def test_a_killed_run_resumed_ends_with_the_same_bits(folder, files, tmp_path):
    """In several ways, and with more steps in an epoch than are drawn at a time."""
    options = ["--epochs", 7, "--batch-size", 2]  # 182 steps
    options += ["--template", "sentiment", "--template", "question"]
    args, broken = (
        train_args(folder, files, tmp_path / name, *options) for name in ("whole", "broken")
    )
    for some in (args, broken):
        some.remove("--single")
    assert command("train.py", *args).returncode == 0
    broken += ["--resume"]
    log = tmp_path / "broken.run" / "log.jsonl"
    kills = 0
    for steps in (0, 7, 52, 101, 166):  # before and after states, which come every 50 steps
        process = start("train.py", *broken)
        kills += kill_when(process, log, steps, signal.SIGKILL) == -signal.SIGKILL
    assert kills >= 4
    done = command("train.py", *broken)
    assert done.returncode == 0, done.stderr
    assert torch.equal(phi_of(tmp_path / "whole"), phi_of(tmp_path / "broken"))
    one, other = (logged(tmp_path / name) for name in ("whole", "broken"))
    for line in one + other:
        del line["seconds"]
    assert one == other


@pytest.mark.parametrize("left", [".log.jsonl.tmp", ".tmpLB7amO"], ids=["ours", "safetensors"])
def test_a_kill_before_the_first_file_is_whole_can_be_resumed(left, folder, files, tmp_path):
    (tmp_path / "p.run").mkdir()
    (tmp_path / "p.run" / left).write_text("")
    assert call(train, *train_args(folder, files, tmp_path / "p", "--resume")) == 0
    assert names_in(tmp_path / "p") == DONE


def test_ctrl_c_saves_and_says_how_to_go_on(folder, files, tmp_path):
    args = train_args(folder, files, tmp_path / "p", "--epochs", 300)
    process = start("train.py", *args, stderr=subprocess.PIPE)
    assert kill_when(process, tmp_path / "p.run" / "log.jsonl", 9, signal.SIGINT) == 130
    assert "--resume" in process.stderr.read().splitlines()[-1]
    step, _ = read_run(tmp_path / "p.run")
    assert step == len(logged(tmp_path / "p")) >= 9


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(
    folder, files, tmp_path, capsys
):
    assert call(train, *train_args(folder, files, tmp_path / "p", "--lr", "1e9")) == 3
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"step \d+ of 14: .*not finite.*--lr", message)
    state = load_file(tmp_path / "p.run" / STATE)
    assert all(t.isfinite().all() for t in state.values())
    assert not (tmp_path / "p" / "spul.json").exists()


def test_resume_refuses_another_run(folder, files, tmp_path, monkeypatch, capsys):
    stop_at(3, monkeypatch)
    out = tmp_path / "p"
    assert call(train, *train_args(folder, files, out, "--epochs", 300)) == 130
    capsys.readouterr()
    assert call(train, *train_args(folder, files, out)) == 2
    assert "--resume" in capsys.readouterr().err
    assert call(train, *train_args(folder, files, out, "--resume", "--seed", 4, "--plain")) == 2
    changed = capsys.readouterr().err.split(": ")[-1]
    assert changed == "epochs, seed, plain changed\n"
    other = write_rows(tmp_path / "other.jsonl", [{"text": "new", "label": "positive"}])
    args = train_args(folder, {**files, "retain": other}, out, "--resume", "--epochs", 300)
    assert call(train, *args) == 2
    assert "the data changed" in capsys.readouterr().err


@pytest.mark.parametrize("is_in_out", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "auto"])
def test_an_unfinished_run_of_the_old_code_is_refused_in_one_line(
    dtype, is_in_out, folder, files, tmp_path, monkeypatch, capsys
):
    """Its state file had a run without a "format"; then it lay in the prompt's folder."""
    out = tmp_path / "p"
    state = tmp_path / "p.run" / STATE
    stop_at(3, monkeypatch)
    assert call(train, *train_args(folder, files, out)) == 130
    _, run = read_run(state.parent)
    assert "format" not in run
    run["options"] |= {"corrupt": None, "corrupt_strength": None}
    del run["options"]["plain"]
    save_file(load_file(state), state, {"step": "3", "run": json.dumps(run)})
    if is_in_out:
        shutil.move(state, out / STATE)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    capsys.readouterr()
    args = train_args(folder, files, out, "--resume", "--dtype", dtype)
    assert call(train, *args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(r"state\.safetensors: an unfinished run of another version.*--overwrite", err)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


# ------------------------------------------------------------------------------ what is overwritten


def test_overwrite_replaces_a_finished_prompt_and_resume_leaves_it(
    folder, files, trained, tmp_path, capsys
):
    out = tmp_path / "p"
    shutil.copytree(trained, out)
    (out / "notes.txt").write_text("mine")
    args = train_args(folder, files, out, "--seed", 3)
    assert call(train, *args, "--resume") == 0
    assert torch.equal(phi_of(out), phi_of(trained))
    assert "nothing to do" in capsys.readouterr().out
    assert call(train, *args, "--overwrite") == 0
    assert not torch.equal(phi_of(out), phi_of(trained))
    assert (out / "notes.txt").exists()


def test_a_failed_overwrite_leaves_the_old_prompt(folder, files, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "p")
    args = train_args(folder, files, tmp_path / "p", "--overwrite")
    assert call(train, *args, "--max-length", 20) == 2  # found out after the model is loaded
    old, new = (
        {file.name: file.read_bytes() for file in path.iterdir()}
        for path in (trained, tmp_path / "p")
    )
    assert old == new


def test_a_full_disk_ends_with_one_line_and_leaves_no_half_file(folder, files, tmp_path):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    args = train_args(folder, files, tmp_path / "p")
    done = command("train.py", *args, preexec_fn=small_disk)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert names_in(tmp_path / "p") == set()
    assert names_in(tmp_path / "p.run") <= {"log.jsonl"}


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    def half(temporary):
        temporary.write_text("half")
        raise OSError("full")

    file = tmp_path / "f"
    file.write_text("old")
    with pytest.raises(OSError):
        write_whole(file, half)
    assert file.read_text() == "old"
    assert names_in(tmp_path) == {"f"}


def test_a_file_is_moved_to_its_place_and_not_copied(tmp_path):
    inodes = []

    def whole(temporary):
        temporary.write_text("new")
        inodes.append(temporary.stat().st_ino)

    write_whole(tmp_path / "f", whole)
    assert (tmp_path / "f").read_text() == "new"
    assert (tmp_path / "f").stat().st_ino == inodes[0]


# ---------------------------------------------------------------------------------- what goes wrong


def test_running_out_of_memory_ends_with_status_3_and_says_what_to_change(
    monkeypatch, folder, files, tmp_path, capsys
):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train_step", full)
    assert call(train, *train_args(folder, files, tmp_path / "p")) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    for words in ("out of memory", "--recompute", "--quantize int8", "--batch-size"):
        assert words in line


@pytest.mark.parametrize("plain", [[], ["--plain"]], ids=["fast", "plain"])
def test_weights_that_are_not_numbers_end_the_run(plain, folder, files, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    for what in (["--forget", files["forget"]], ["--ask", "a"]):
        args = ["--model", tmp_path / "m", *what, "--dtype", "fp32", *plain]
        assert call(evaluate, *args) == 3
        assert "weights are broken" in capsys.readouterr().err
    args = train_args(tmp_path / "m", files, tmp_path / "p", *plain)
    assert call(train, *without(args, "--retain")) == 3


# --------------------------------------------------------------------------------------------- eval


@pytest.mark.parametrize("plain", [[], ["--plain"]], ids=["fast", "plain"])
def test_eval_finds_the_figures_that_training_printed(plain, folder, files, trained, tmp_path):
    args = ["--model", folder, "--prompt", trained, "--dtype", "fp32", *plain]
    args += ["--forget", files["forget"], "--test-retain", files["test_retain"]]
    assert call(evaluate, *args, "--json", tmp_path / "r.json") == 0
    got = json.loads((tmp_path / "r.json").read_text())
    for side in ("without", "with"):
        for split, metrics in got[side].items():
            assert metrics == pytest.approx(results_of(trained)[side][split], rel=1e-4)
    asked_otherwise = {f"train forget, {what} template" for what in ("another", "a third")}
    assert set(got["with"]) == {"train forget", *asked_otherwise, "test retain"}


@pytest.mark.parametrize("plain", [[], ["--plain"]], ids=["fast", "plain"])
def test_ask_shows_both_answers(plain, folder, trained, capsys):
    args = ["--model", folder, "--prompt", trained, "--ask", "a film", "--dtype", "fp32"]
    assert call(evaluate, *args, *plain) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r"without the prompt: .*\nwith the prompt:    .*\n", out)


def test_a_finished_prompt_of_the_old_code_gives_the_same_answers(
    folder, files, trained, tmp_path, capsys
):
    """The same bytes, with the options that the old train.py had."""
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    info = json.loads((old / "spul.json").read_text())
    assert info["format"] == "spul 1"
    del info["options"]["plain"]
    info["options"] |= {"corrupt": "noise", "corrupt_strength": 0.3}
    (old / "spul.json").write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n")
    found = []
    for prompt in (old, trained):
        args = ["--model", folder, "--prompt", prompt, "--dtype", "fp32"]
        result = tmp_path / f"{prompt.name}.json"
        assert call(evaluate, *args, "--forget", files["forget"], "--json", result) == 0
        capsys.readouterr()
        assert call(evaluate, *args, "--ask", "a film") == 0
        found.append((json.loads(result.read_text())["with"], capsys.readouterr().out))
    assert found[0] == found[1]


def test_many_different_answers_are_not_a_label_set(tokenizer):
    rows = [Row("a", str(i), "") for i in range(51)]
    assert label_set(rows, tokenizer, ["unknown"], TEMPLATES["question"]) is None
    assert len(label_set(rows[:50], tokenizer, ["unknown"], TEMPLATES["question"])) == 51


def test_sentences_are_measured_with_rouge_l_and_by_generic_beginnings(folder, tmp_path, capsys):
    """The 51 true answers and a generic one; each generated answer is compared as words."""
    llama = Llama.from_pretrained(folder)
    tok = Tokenizer(folder)
    rows = [{"text": f"number {i}", "label": f"it is the {i} of them"} for i in range(51)]
    path = write_rows(tmp_path / "f.jsonl", rows)
    template = "{text} ->"
    longest = max(len(answer_ids(tok, row["label"], TEMPLATES["sentiment"])) for row in rows)
    prompts = [tok.bos + tok.encode(template.replace("{text}", row["text"])) for row in rows]
    answers = []
    for ids in llama.generate(prompts, None, longest):
        answers.append(tok.decode(ids).strip().split("\n")[0])
    beginning = next(answer[:4] for answer in answers if len(answer) >= 4)
    phi = torch.zeros(0, 32)
    info = {"base_sha256": fingerprint(folder), "model": "m", "template": template}
    info |= {"generic": [beginning], "labels": None}
    spul.save_prompt(tmp_path, phi, llama.config, info)
    args = ["--model", folder, "--prompt", tmp_path, "--forget", path, "--dtype", "fp32"]
    assert call(evaluate, *args, "--json", tmp_path / "r.json") == 0
    expected = {
        "rouge_l": sum(evaluate.rouge_l(a, r["label"]) for a, r in zip(answers, rows)) / 51,
        "generic": sum(answer.startswith(beginning) for answer in answers) / 51,
    }
    assert expected["generic"] > 0
    found = json.loads((tmp_path / "r.json").read_text())
    for side in ("without", "with"):  # a prompt of no vectors
        result = found[side]["train forget"]
        assert set(result) == {"rows", "accuracy", "probability", "rouge_l", "generic"}
        assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert re.search(r"accuracy +probability +generic +rouge_l", capsys.readouterr().out)


# ---------------------------------------------------------------------------------- several prompts


@pytest.fixture(scope="module")
def second(folder, files, tmp_path_factory):
    """Another prompt for the same model, with another generic answer."""
    out = tmp_path_factory.mktemp("second") / "b"
    args = train_args(folder, files, out, "--seed", 1, "--generic", "unknown,nobody")
    assert call(train, *args) == 0
    return out


def test_two_prompts_come_one_after_the_other_as_if_they_were_one(
    folder, files, trained, second, tmp_path
):
    """What either may answer counts as a generic answer, and their costs add up."""
    phis = [spul.load_prompt(prompt)[0] for prompt in (trained, second)]
    info, more = (spul.load_prompt(prompt)[1] for prompt in (trained, second))
    config = Llama.from_pretrained(folder).config
    both = tmp_path / "both"
    both.mkdir()
    spul.save_prompt(both, torch.cat(phis), config, {**info, "p": 8})
    found = []
    for name, prompts in {"two": [trained, second], "one": [both]}.items():
        args = ["--model", folder, "--forget", files["forget"], "--dtype", "fp32"]
        for prompt in prompts:
            args += ["--prompt", prompt]
        assert call(evaluate, *args, "--json", tmp_path / name) == 0
        found.append(json.loads((tmp_path / name).read_text()))
    two, one = found
    probability = one["with"]["train forget"]["probability"]
    assert two["with"]["train forget"]["probability"] == probability
    assert two["cost"]["trainable"] == info["trainable"] + more["trainable"]
    assert two["cost"]["peak_bytes"] == max(info["peak_bytes"], more["peak_bytes"])
    merged = evaluate.load_prompts([trained, second], config, None)[1]
    assert merged["generic"] == ["unknown", "nobody"]


@pytest.mark.parametrize(
    "width, template, pattern",
    [
        (16, None, r"p: vectors of width 16, the model's is 32"),
        (32, "{text}?", r"p: another template than .*one query cannot be in both"),
    ],
    ids=["another width", "another template"],
)
def test_prompts_that_do_not_fit_together_are_refused(
    width, template, pattern, folder, files, trained, tmp_path, capsys
):
    phi, info = spul.load_prompt(trained)
    info |= {"d": width, "template": template or info["template"]}
    (tmp_path / "p").mkdir()
    spul.save_prompt(tmp_path / "p", phi[:, :width], tiny().config, info)
    args = ["--model", folder, "--forget", files["forget"], "--prompt", trained]
    assert call(evaluate, *args, "--prompt", tmp_path / "p") == 2
    assert re.search(pattern, capsys.readouterr().err)
