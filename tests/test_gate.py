"""extras.gate: flagged queries get the prompt, the others are answered as without one."""

import argparse
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from data import TEMPLATES, Row, make_examples, read_rows
from extras import gate
from extras.guards import layer_averages
from model import Llama
from spul import answer_hidden, load_prompt
from support.templates import template_from_json
from tests.helpers import BOTH, DEMO, call, make_rows, phi_of, save_weights, stop_at, tiny
from tests.helpers import train_args, vectors, write_rows

PROMPTS = [[1, 5, 9, 7], [1, 80, 81], [1, 40, 41, 42, 43, 44]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """More rows than `files` has; each side's texts begin with a word of its own, four times."""
    path = tmp_path_factory.mktemp("gate")
    sizes = {"forget": 30, "retain": 60, "test_forget": 6, "test_retain": 9}
    files = {}
    for name, n in sizes.items():
        lines = make_rows(n, ["positive", "negative"], name)
        side = name.removeprefix("test_")
        lines = [line | {"text": f"{side} {side} {side} {line['text']}"} for line in lines]
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
        found = layer_averages(llama, PROMPTS, [layer], batch_size=2)[0]
        for ids, mean in zip(PROMPTS, found):
            alone = short.hidden(torch.tensor([ids]))[0].mean(dim=0)
            torch.testing.assert_close(mean, alone, atol=1e-5, rtol=1e-5)
    both = layer_averages(llama, PROMPTS, [1, 3])
    torch.testing.assert_close(both[1], found, atol=1e-5, rtol=1e-5)
    assert not llama.layers[0]._forward_hooks and len(llama.layers) == 3


class Flags(gate.Gate):
    """A gate that flags these of three queries."""

    def __init__(self, *flags):
        self.own = flags

    def flags(self, model, prompts, batch_size=32):
        return list(self.own)


def test_each_query_is_answered_on_its_side_and_stays_in_its_place(folder, trained):
    llama = Llama.from_pretrained(folder)
    phi, _ = load_prompt(trained)
    without, prompted = (llama.generate(PROMPTS, llama.prefix(p), 4) for p in (None, phi * 50))
    assert all(a != b for a, b in zip(without, prompted))
    for flags in ((True, False, True), (False, True, False), (False, False, False)):
        found = gate.gated_generator(llama, Flags(*flags), phi * 50)(PROMPTS, 4)
        assert found == [(prompted if flag else without)[i] for i, flag in enumerate(flags)]


@torch.no_grad()
def test_what_is_not_flagged_is_as_without_the_prompt(folder, files, tokenizer, trained):
    llama = Llama.from_pretrained(folder)
    phi, info = load_prompt(trained)
    template = template_from_json(info["template"])
    examples, _ = make_examples(read_rows(files["retain"])[:6], tokenizer, template, 500)
    flags = [True, False, True, False, False, True]
    without = answer_hidden(llama, examples)
    found = gate.gated_hidden(llama, examples, flags, phi, without)
    for e, flag, h, plain in zip(examples, flags, found, without):
        assert flag or h is plain
        alone = answer_hidden(llama, [e], phi if flag else None)[0]
        torch.testing.assert_close(h, alone, atol=1e-5, rtol=1e-5)
    # b alone decides: +-100 flags all or none
    prompts = [e.prompt for e in examples]
    for b, prefix in ((100.0, llama.prefix(phi)), (-100.0, None)):
        own = gate.Gate({"layer": 1}, {"w": torch.zeros(32), "b": torch.tensor([b])})
        assert own.flags(llama, prompts) == [b > 0] * 6
        generate = gate.gated_generator(llama, own, phi)
        assert generate(prompts, 4) == llama.generate(prompts, prefix, 4)


def test_a_gate_is_made_kept_and_measured(folder, prompt, rows, tmp_path, capsys):
    tests = ["--test-forget", rows["test_forget"], "--test-retain", rows["test_retain"]]
    args = options(folder, prompt, rows, *tests, "--json", tmp_path / "t.json")
    assert call(gate, *args) == 0
    text = capsys.readouterr().out
    assert " of 3, of 240 queries" in text  # 90 rows twice, and 30 of each side after the other
    assert "no general text beside the prompt: give --general FILE" in text
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
    assert "of 240 queries" not in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())["with"] == through
    assert call(gate, *args, "--overwrite", "--miss", 0.3) == 0
    assert json.loads((prompt / "gate.json").read_text())["miss"] == 0.3
    capsys.readouterr()
    assert call(gate, *options(folder, prompt, rows)[:6], "--ask", "red green") == 0
    assert "without the prompt:" in capsys.readouterr().out


def test_the_threshold_misses_no_more_than_it_may(folder, prompt, rows, capsys):
    assert call(gate, *options(folder, prompt, rows, "--miss", 0)) == 0
    assert " 0.0 % of those to forget are missed" in capsys.readouterr().out


def test_general_text_is_among_what_is_not_to_be_flagged(folder, prompt, rows, tmp_path, capsys):
    texts = [{"text": f"a letter about the weather of day {i}"} for i in range(40)]
    file = write_rows(tmp_path / "general.jsonl", texts)
    assert call(gate, *options(folder, prompt, rows, "--general", file)) == 0
    text = capsys.readouterr().out
    # 32 of 40 texts, alone and in the template; the others are measured
    assert " of 3, of 304 queries" in text and "no general text" not in text
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
    save_file({"w": torch.full((32,), torch.nan), "b": torch.zeros(1)}, weights)
    assert call(gate, *options(folder, prompt, rows)) == 2
    assert "not the tensors of a gate" in capsys.readouterr().err
    weights.write_bytes(whole)
    info = json.loads((prompt / "gate.json").read_text())
    for changed in ({"layer": 0}, {"layer": 4}, {"layer": True}, {"format": "spul gate 0"}):
        (prompt / "gate.json").write_text(json.dumps(info | changed))
        assert call(gate, *options(folder, prompt, rows)) == 2
        assert "gate.json: not as extras.gate writes it" in capsys.readouterr().err


def test_what_is_missing_is_said(folder, prompt, rows, files, capsys):
    start = options(folder, prompt, rows)
    for args, error in (
        (start[:6], "--forget FILE is missing"),
        (start[:-2], "--retain FILE is missing"),
        ([*start[:6], "--ask", "red"], "no gate yet: the command makes it with --forget FILE"),
        ([*start[:6], "--ask", "red", "--overwrite"], "leave out --overwrite, --general"),
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
    assert "at most 10 % of each line" in gate.gate_verdicts(after, {}, {})[0]
    del after["train forget"], changes["upper case"]
    assert "at most 10 % of each line" in gate.gate_verdicts(after, changes, {})[0]




def asker_of(tokenizer, folder, **more):
    args = argparse.Namespace(seed=0, model=folder)
    template = TEMPLATES["sentiment"]
    return gate.Asker(args, tokenizer, template, ["unknown"], more.get("limit", 200))


def rows_of(side, n):
    return [Row(f"{side}{i} text", "positive", f"{side}:{i}") for i in range(n)]


def test_parts_share_no_row_and_queries_hold_rows_of_their_own_part_alone(tokenizer, folder):
    forget, retain = rows_of("f", 30), rows_of("r", 600)
    asker = asker_of(tokenizer, folder)
    fitted, held_out = zip(gate.parts(forget, 0), gate.parts(retain, 0))
    for own, others in ((fitted, held_out), (held_out, fitted)):
        to_forget, mixed, rest = asker.queries(*own, [])
        said = [tokenizer.decode(list(ids)) for ids in to_forget + mixed + rest]
        assert not [row for row in (*others[0], *others[1]) if f" {row.text}" in " ".join(said)]
        assert len(mixed) == len(own[0]) and len(to_forget) == 3 * len(own[0])
        # what stands before a row to retain has a generic answer
        assert all("unknown" in tokenizer.decode(list(ids)) for ids in mixed)
    assert len(held_out[0]) == 6 and len(held_out[1]) == 120
    many = gate.parts(rows_of("r", 3000), 0)
    assert sum(map(len, many)) == gate.MOST_ROWS and any("r2999" in r.text for r in sum(many, []))


def test_rows_that_cannot_stand_after_others_do_not(tokenizer, folder):
    turns = (("user", "hello"), ("assistant", "hi"))
    retain = [Row(f"text {i}", "positive", "", turns=turns, is_chat=False) for i in range(4)]
    to_forget, mixed, rest = asker_of(tokenizer, folder).queries(rows_of("f", 2), retain, [])
    assert mixed == [] and len(to_forget) == 4  # no other row may stand before them, either
    assert len(rest) == 8


def test_a_long_row_is_cut_and_asked(tokenizer, folder):
    long = [Row("word " * 500, "positive", "")]
    (ids,) = asker_of(tokenizer, folder, limit=60).ids(long)
    assert 50 < len(ids) <= 60


def test_general_text_that_repeats_rows_to_forget_is_left_out(folder, tokenizer, rows, tmp_path):
    forget = [Row("a letter about the weather of day 3", "positive", "")]
    texts = [f"number {i}" for i in range(20)]
    texts += [f"a letter about the weather of day {i}" for i in (3, 4)]
    file = write_rows(tmp_path / "g.jsonl", [{"text": text} for text in texts])
    args = argparse.Namespace(general=file, model=folder, prompt=[tmp_path / "prompt"])
    kept = [row.text for row in gate.general_texts(args, tokenizer, forget)]
    assert len(kept) == 16 and not [text for text in kept if "weather" in text]


def test_a_gate_does_not_stand_in_the_way_of_a_new_run(folder, files, prompt, rows, monkeypatch):
    """A kill of train.py --overwrite leaves a folder that --resume takes; the gate is gone."""
    made(folder, prompt, rows)
    args = train_args(folder, files, prompt)
    stop_at(1, monkeypatch)
    assert call(train, *args, "--overwrite") == 130
    assert not (prompt / "gate.json").exists() and not (prompt / "gate.safetensors").exists()
    monkeypatch.undo()
    assert call(train, *args, "--resume") == 0
