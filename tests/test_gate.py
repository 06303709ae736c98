"""extras.gate: flagged queries get the prompt, the others are answered as without one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import make_examples, read_rows
from extras import gate
from model import Llama
from spul import answer_hidden, load_prompt
from support.templates import template_from_json
from tests.helpers import BOTH, DEMO, call, make_rows, phi_of, save_weights, tiny, vectors
from tests.helpers import write_rows

PROMPTS = [[1, 5, 9, 7], [1, 80, 81], [1, 40, 41, 42, 43, 44]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """More rows than `files` has; a word of its own begins each side's texts."""
    path = tmp_path_factory.mktemp("gate")
    sizes = {"forget": 30, "retain": 60, "test_forget": 6, "test_retain": 9}
    files = {}
    for name, n in sizes.items():
        lines = make_rows(n, ["positive", "negative"], name)
        lines = [line | {"text": line["text"].removeprefix("test_")} for line in lines]
        files[name] = write_rows(path / f"{name}.jsonl", lines)
    return files


@pytest.fixture
def prompt(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "prompt")


def options(folder, prompt, rows, *more):
    args = ["--model", folder, "--prompt", prompt, "--dtype", "fp32"]
    return [*args, "--forget", rows["forget"], "--retain", rows["retain"], *more]


@BOTH
@torch.no_grad()
def test_averages_are_those_of_a_model_that_ends_at_the_layer(kind):
    llama = tiny(kind=kind)
    for layer in (1, 2, 3):
        short = tiny(kind=kind, num_hidden_layers=layer)
        names = short.state_dict()
        short.load_state_dict({n: w for n, w in llama.state_dict().items() if n in names})
        found = gate.averages(llama, PROMPTS, [layer], batch_size=2)[0]
        for ids, mean in zip(PROMPTS, found):
            alone = short.hidden(torch.tensor([ids]))[0].mean(dim=0)
            torch.testing.assert_close(mean, alone, atol=1e-5, rtol=1e-5)
    both = gate.averages(llama, PROMPTS, [1, 3])
    torch.testing.assert_close(both[1], found, atol=1e-5, rtol=1e-5)
    assert not llama.layers[0]._forward_hooks and len(llama.layers) == 3


def test_each_item_is_answered_on_its_side_and_stays_in_its_place():
    def say(word):
        return lambda items: [f"{word} {item}" for item in items]

    flags = [True, False, False, True]
    found = gate.gated(flags, list("abcd"), say("with"), say("without"))
    assert found == ["with a", "without b", "without c", "with d"]
    assert gate.gated([False], ["a"], None, say("without")) == ["without a"]


@torch.no_grad()
def test_what_is_not_flagged_is_as_without_the_prompt(folder, files, tokenizer, trained):
    llama = Llama.from_pretrained(folder)
    phi, info = load_prompt(trained)
    template = template_from_json(info["template"])
    examples, _ = make_examples(read_rows(files["retain"])[:6], tokenizer, template, 500)
    flags = [True, False, True, False, False, True]
    found = gate.gated_hidden(llama, examples, flags, phi)
    for e, flag, h in zip(examples, flags, found):
        alone = answer_hidden(llama, [e], phi if flag else None)[0]
        torch.testing.assert_close(h, alone, atol=1e-5, rtol=1e-5)
    # b alone decides: +-100 flags all or none
    prompts = [e.prompt for e in examples]
    for b, prefix in ((100.0, llama.prefix(phi)), (-100.0, None)):
        own = gate.Gate({"layer": 1, "tau": 0.5}, {"w": torch.zeros(32), "b": torch.tensor([b])})
        assert own.flags(llama, prompts) == [b > 0] * 6
        generate = gate.gated_generator(llama, own, phi)
        assert generate(prompts, 4) == llama.generate(prompts, prefix, 4)


def test_a_gate_is_made_kept_and_measured(folder, prompt, rows, tmp_path, capsys):
    tests = ["--test-forget", rows["test_forget"], "--test-retain", rows["test_retain"]]
    args = options(folder, prompt, rows, *tests, "--json", tmp_path / "t.json")
    assert call(gate, *args) == 0
    text = capsys.readouterr().out
    assert "tells 270 queries apart best" in text  # 90 rows, three times
    table = json.loads((tmp_path / "t.json").read_text())
    without, through = table["without"], table["with"]
    assert through["train forget"]["flagged"] >= 0.9
    assert through["train retain"]["flagged"] <= 0.1
    assert through["train forget"]["probability"] != without["train forget"]["probability"]
    assert through["test forget"]["flagged"] > 0.5 > through["test retain"]["flagged"]
    changes = table["changes"]
    assert len(changes) == 10
    assert changes["words left out"]["forget"] > 0.5 > changes["words left out"]["retain"]
    assert table["texts"]["text by people"]["texts"] > 10
    for name in [*changes, "text by people"]:
        assert f"\n{name} " in text
    # it is there now, and is not made again, but with --overwrite
    kept = (prompt / "gate.json").stat().st_mtime_ns
    assert call(gate, *args) == 0 and (prompt / "gate.json").stat().st_mtime_ns == kept
    assert "apart best" not in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())["with"] == through
    assert call(gate, *args, "--overwrite", "--miss", 0.3) == 0
    assert json.loads((prompt / "gate.json").read_text())["miss"] == 0.3
    capsys.readouterr()
    assert call(gate, *options(folder, prompt, rows)[:6], "--ask", "red green") == 0
    assert "without the prompt:" in capsys.readouterr().out


def test_the_threshold_misses_no_more_than_it_may(folder, prompt, rows, capsys):
    assert call(gate, *options(folder, prompt, rows, "--miss", 0)) == 0
    assert " 0.0 % of those with a row to forget missed" in capsys.readouterr().out


def test_general_text_is_among_what_is_not_to_be_flagged(folder, prompt, rows, tmp_path, capsys):
    texts = [{"text": f"a letter about the weather of day {i}"} for i in range(40)]
    file = write_rows(tmp_path / "general.jsonl", texts)
    assert call(gate, *options(folder, prompt, rows, "--general", file)) == 0
    text = capsys.readouterr().out
    assert "tells 302 queries apart best" in text  # 32 of 40 texts; the others are measured
    assert "general text " in text


def made(folder, prompt, rows):
    assert call(gate, *options(folder, prompt, rows)) == 0


def test_a_gate_of_another_prompt_or_model_is_refused(folder, prompt, rows, tmp_path, capsys):
    made(folder, prompt, rows)
    other = tmp_path / "other"
    save_weights(tiny(5), other)
    shutil.copy(DEMO / "model" / "tokenizer.model", other)
    assert call(gate, *options(other, prompt, rows)) == 2
    assert "trained on another model" in capsys.readouterr().err
    file = prompt / "adapter_model.safetensors"
    save_file({"prompt_embeddings": phi_of(prompt) + 1}, file)
    assert call(gate, *options(folder, prompt, rows)) == 2
    error = capsys.readouterr().err
    assert "gate.json: it is of another prompt: --overwrite makes it anew" in error
    assert call(gate, *options(folder, prompt, rows, "--overwrite")) == 0


def test_a_broken_gate_is_refused(folder, prompt, rows, capsys):
    made(folder, prompt, rows)
    weights = prompt / "gate.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3])
    assert call(gate, *options(folder, prompt, rows)) == 2
    assert "gate.safetensors: not a complete file" in capsys.readouterr().err
    save_file({"w": vectors(1)[0].detach()}, weights)
    assert call(gate, *options(folder, prompt, rows)) == 2
    assert "not the tensors of a gate" in capsys.readouterr().err
    weights.write_bytes(whole)
    assert load_file(weights)["w"].shape == (32,)
    (prompt / "gate.json").write_text('{"format": "spul gate 1"}')
    assert call(gate, *options(folder, prompt, rows)) == 2
    assert "gate.json: not as extras.gate writes it" in capsys.readouterr().err


def test_what_is_missing_is_said(folder, prompt, rows, files, capsys):
    start = options(folder, prompt, rows)
    for args, error in (
        (start[:6], "--forget FILE is missing"),
        (start[:-2], "--retain FILE is missing"),
        ([*start[:6], "--ask", "red"], "no gate yet: give --forget FILE and --retain FILE"),
        ([*start, "--prompt", prompt], "a gate is of one prompt"),
        ([*start[:6], "--forget", files["test_forget"], "--retain", files["retain"]], "6 rows; at"),
        ([*start[:6], "--forget", rows["forget"], "--retain", rows["forget"]], "forget.jsonl"),
    ):
        assert call(gate, *args) == 2
        assert error in capsys.readouterr().err
        assert not (prompt / "gate.json").exists()


def test_where_the_gate_is_the_weak_point_is_said():
    after = {"train forget": {"flagged": 0.97}, "train retain": {"flagged": 0.04}}
    changes = {"upper case": {"forget": 0.6, "retain": 0.02}}
    after["train retain, after a forget row"] = {"flagged": 1.0}  # as it is to be
    after["train forget, after a retain row"] = {"flagged": 1.0}
    changes["a row of the other side behind"] = {"forget": 0.95, "retain": 0.9}
    texts = {"text by people": {"flagged": 0.5}}
    missed, wrong = gate.gate_verdicts(after, changes, texts)
    assert "MISSES rows to forget (upper case: 40 %)" in missed
    assert "FLAGS what is not to be forgotten (text by people: 50 %)" in wrong
    assert "at most 10 %" in gate.gate_verdicts(after, {}, {})[0]
    del after["train forget"], changes["upper case"]
    assert "at most 10 %" in gate.gate_verdicts(after, changes, {})[0]


