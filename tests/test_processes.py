"""Several processes on one machine, and a GPU."""

import json
import re
import signal

import pytest
import torch

import spul
import train
from data import read_rows
from support import general
from tests import GPU
from tests.helpers import ROOT, call, kill_when, lines_of, logged, phi_of, python, start, torchrun
from tests.helpers import train_args, without, write_rows


@pytest.mark.parametrize("how", [[], ["--shard"], ["--shard", "--plain"]], ids=" ".join)
def test_two_processes_give_the_losses_of_one(how, folder, files, tmp_path):
    """52 rows in batches of 17, so the last batch has one row: there one process has none.

    Nor has one of them a third of the teacher's three batches of 40 retain rows. The start is
    random: from a start of zeros Adam's first steps are as large where a gradient is rounding.
    """
    rows = [{"text": f"text {i} of the {i * 7} red and blue cats by the sea"} for i in range(20)]
    texts = write_rows(tmp_path / "general.jsonl", rows)
    options = ["--batch-size", 17, "--epochs", 4, "--lr", 3e-3]
    options += ["--forget-per-batch", "natural"]
    options += ["--gamma", 1, "--general", texts]
    assert call(train, *train_args(folder, files, tmp_path / "one", *options)) == 0
    done = torchrun(2, *train_args(folder, files, tmp_path / "two", *options), *how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train retain  ") == 1
    assert done.stdout.count("general text  ") == 1
    assert "2 processes" in done.stdout
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert any(line["n_f"] + line["n_r"] == 1 for line in one)
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "loss_f", "loss_r", "loss_kl", "loss_keep", "grad_norm", "n_f", "n_r"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4)
    phis = [phi_of(tmp_path / name) for name in ("one", "two")]
    torch.testing.assert_close(phis[0], phis[1], atol=1e-3, rtol=1e-2)
    found = [spul.load_prompt(tmp_path / name)[1]["results"] for name in ("one", "two")]
    for split in ("train forget", "train retain"):
        expected = found[0]["without"][split]
        assert found[1]["without"][split] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("how", [[], ["--shard"]], ids=" ".join)
def test_two_processes_draw_the_rows_that_one_does_and_know_all_their_losses(
    how, folder, files, tmp_path
):
    """Batches of 3, in several ways: one process has two rows, and at times the other has none."""
    options = ["--batch-size", 3, "--epochs", 2, "--lr", 3e-3]
    options += ["--template", "sentiment", "--template", "question"]
    args = {name: train_args(folder, files, tmp_path / name, *options) for name in ("one", "two")}
    for some in args.values():
        some.remove("--single")
    assert call(train, *args["one"]) == 0
    done = torchrun(2, *args["two"], *how)
    assert done.returncode == 0, done.stderr
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == 2 * 18
    for a, b in zip(one, two, strict=True):
        assert a["rows"] == pytest.approx(b["rows"], rel=1e-3, abs=1e-4)
        assert len(a["rows"]) == a["n_f"] + a["n_r"]


@pytest.mark.parametrize("how", [[], ["--shard"]], ids=" ".join)
def test_of_two_processes_one_writes_general_text_and_both_read_it(
    how, folder, files, tmp_path, monkeypatch
):
    """A step has one text, so one process has none."""
    options = ["--gamma", 1, "--epochs", 1]
    done = torchrun(2, *train_args(folder, files, tmp_path / "two", *options), *how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the model writes") == 1
    written = (tmp_path / "two.run" / "general.jsonl").read_text()
    (tmp_path / "one.run").mkdir()
    (tmp_path / "one.run" / "general.jsonl").write_text(written)
    monkeypatch.setattr(general, "write_some", None)
    assert call(train, *train_args(folder, files, tmp_path / "one", *options)) == 0
    for a, b in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert a["loss_keep"] == pytest.approx(b["loss_keep"], rel=1e-3, abs=1e-4)


def test_a_run_of_one_process_is_resumed_by_two(folder, files, tmp_path):
    options = ["--batch-size", 4, "--epochs", 60, "--forget-per-batch", "share"]
    assert call(train, *train_args(folder, files, tmp_path / "whole", *options)) == 0
    args = train_args(folder, files, tmp_path / "p", *options)
    process = start("train.py", *args)
    kill_when(process, tmp_path / "p.run" / "log.jsonl", 60, signal.SIGKILL)
    done = torchrun(2, *args, "--resume")
    assert done.returncode == 0, done.stderr
    whole, resumed = logged(tmp_path / "whole"), logged(tmp_path / "p")
    assert [line["step"] for line in whole] == [line["step"] for line in resumed]
    assert whole[-1]["loss"] == pytest.approx(resumed[-1]["loss"], rel=0.05)


def test_all_processes_take_the_same_dtype_and_one_says_so(folder, files, tmp_path):
    args = train_args(folder, files, tmp_path / "p", "--epochs", 1, "--dtype", "auto")
    done = torchrun(2, *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(--dtype chooses)") == 1


THREADS = f"""
import atexit
import pathlib
import sys

sys.path.insert(0, {str(ROOT)!r})
import train
from support import cli

def say():
    files = pathlib.Path("/proc/self/task").glob("*/comm")
    print("threads", *(file.read_text() for file in files))

atexit.register(say)
cli.run(train.main)
"""


def test_several_processes_leave_no_thread_of_theirs_behind(folder, files, tmp_path):
    """One that still works when Python ends can take the process down with it."""
    script = tmp_path / "run.py"
    script.write_text(THREADS)
    args = train_args(folder, files, tmp_path / "p", "--epochs", 1)
    done = torchrun(2, *args, script=script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("threads") == 2
    assert "gloo" not in done.stdout


def test_shards_need_several_processes(folder, files, tmp_path, capsys):
    assert call(train, *train_args(folder, files, tmp_path / "p", "--shard")) == 2
    assert re.search(r"--shard needs several processes \(torchrun\)", capsys.readouterr().err)


def test_of_two_processes_one_writes_retain_rows_and_both_read_them(folder, files, tmp_path):
    options = ["--write-retain", 10, "--epochs", 1]
    done = torchrun(2, *without(train_args(folder, files, tmp_path / "two", *options), "--retain"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the model writes 10 texts like those to forget") == 1
    rows = read_rows(tmp_path / "two.run" / "retain.jsonl")
    assert len(rows) == len({row.key for row in rows}) >= 10
    seen = [line["n_f"] + line["n_r"] for line in logged(tmp_path / "two")]
    lines = lines_of(tmp_path / "two.run" / "retain.jsonl")
    trained = sum(line["split"] == "train retain" for line in lines)
    assert sum(seen) == 12 + trained < 12 + len(rows)


STEP = """
import json
import random
import sys

import torch

import fast
import model
from data import TEMPLATES, collate, common_prefix, make_examples, read_rows
from spul import SoftPrompt, answer_hidden
from support.tokenizer import Tokenizer
from train import losses

kind, device, dtype = sys.argv[1:]
llama = {"plain": model.Llama, "fast": fast.FastLlama}[kind].from_pretrained(
    "demo/model", getattr(torch, dtype), torch.device(device)
)
common = (Tokenizer("demo/model"), TEMPLATES["question"], 256)
rows = [read_rows(f"demo/{name}.jsonl")[:16] for name in ("forget", "retain")]
forget, _ = make_examples(rows[0], *common, True, ["unknown"], random.Random(0))
retain, _ = make_examples(rows[1], *common)
examples = forget + retain
torch.manual_seed(0)
prompt = SoftPrompt(10, llama.config.hidden_size, 16).to(llama.device)
batch = collate(examples, llama.device, common_prefix(examples))
terms = losses(llama, prompt, batch, torch.cat(answer_hidden(llama, retain)))
terms["loss"].backward()
found = {
    "losses": [terms[name].item() for name in ("loss", "loss_f", "loss_r", "loss_kl")],
    "gradient": torch.cat([p.grad.flatten() for p in prompt.parameters()]).tolist(),
    "answers": llama.generate([e.prompt for e in retain], None, 4),
}
print(json.dumps(found))
"""


def step_on(*where):
    return json.loads(python("-c", STEP, *where, env=GPU, check=True).stdout)


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_a_gpu_computes_what_a_cpu_does(kind):
    code = "import torch; print(torch.cuda.is_available())"
    if python("-c", code, env=GPU).stdout != "True\n":
        pytest.skip("no GPU")
    cpu = step_on(kind, "cpu", "float32")
    gpu = step_on(kind, "cuda", "float32")
    half = step_on(kind, "cuda", "bfloat16")
    assert gpu["losses"] == pytest.approx(cpu["losses"], rel=1e-3)
    assert gpu["answers"] == cpu["answers"]
    one, other = (torch.tensor(found["gradient"]) for found in (cpu, gpu))
    assert (one - other).norm() < 1e-4 * one.norm()
    assert half["losses"][0] == pytest.approx(cpu["losses"][0], rel=0.01)


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_the_step_that_a_gpu_is_compared_with_runs_on_a_cpu(kind):
    found = step_on(kind, "cpu", "float32")
    assert len(found["losses"]) == 4
    assert len(found["answers"]) == 16
