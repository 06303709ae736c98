"""What a prompt belongs to, and what its folder tells those to whom it is handed on."""

import json
import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file

import eval as evaluate
import train
from spul import load_prompt, save_prompt
from support.hardware import peak_memory
from support.identity import check_fingerprint, digest_of_files, fingerprint
from tests.helpers import ROOT, call, in_two_files, save_weights, tiny, train_args
from tests.helpers import vectors, write_rows


def rewritten_config(path):
    """The same config with other white space, order, version and names of the dtype."""
    file = path / "config.json"
    raw = json.loads(file.read_text())
    raw["dtype"] = raw.pop("torch_dtype", "float32")
    raw["transformers_version"] = "9.9"
    file.write_text(json.dumps(dict(reversed(raw.items()))))


def in_other_files(path):
    parts = path.parent / "parts"
    in_two_files(path, parts)
    (path / "model.safetensors").unlink()
    for file in parts.glob("model*"):
        shutil.copy(file, path)


def other_metadata(path):
    tensors = load_file(path / "model.safetensors")
    save_file(tensors, path / "model.safetensors", {"format": "pt", "made": "again"})


def settings_for_bos_written_out(path):
    (path / "tokenizer_config.json").write_text('{"add_bos_token": true, "padding_side": "left"}')


SAME = [rewritten_config, in_other_files, other_metadata, settings_for_bos_written_out]


def another_weight(path):
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def another_theta(path):
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, "rope_theta": 12345.0}))


def no_bos(path):
    (path / "tokenizer_config.json").write_text('{"add_bos_token": false}')


OTHER = [another_weight, another_theta, no_bos]


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("change", SAME, ids=lambda change: change.__name__)
def test_how_a_model_is_written_does_not_change_its_fingerprint(change, folder, copy):
    change(copy)
    assert fingerprint(copy) == fingerprint(folder)


@pytest.mark.parametrize("change", OTHER, ids=lambda change: change.__name__)
def test_what_changes_the_computation_changes_the_fingerprint(change, folder, copy):
    change(copy)
    assert fingerprint(copy) != fingerprint(folder)


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    save_weights(tiny(tie_word_embeddings=True), tmp_path / "a")
    shutil.copy(ROOT / "demo" / "model" / "tokenizer.model", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_another_tokenizer_is_named_as_such(folder, copy):
    recorded = fingerprint(folder)
    check_fingerprint(recorded, copy, "p")
    no_bos(copy)
    with pytest.raises(ValueError, match="p: trained with another tokenizer than that in"):
        check_fingerprint(recorded, copy, "p")
    another_theta(copy)
    with pytest.raises(ValueError, match="p: trained on another model, and does not fit"):
        check_fingerprint(recorded, copy, "p")


def test_a_prompt_of_an_earlier_version_is_checked_by_its_own_digest(folder, copy, tmp_path):
    info = {"model": "m", "template": None, "generic": [], "base_sha256": digest_of_files(folder)}
    (tmp_path / "p").mkdir()
    save_prompt(tmp_path / "p", vectors(4).detach(), tiny().config, info)
    load_prompt(tmp_path / "p", folder)
    another_weight(copy)
    with pytest.raises(ValueError, match="trained on another model"):
        load_prompt(tmp_path / "p", copy)


def test_the_demos_model_keeps_the_digest_of_earlier_versions():
    """Prompts that were finished before are recognised by it."""
    found = digest_of_files(ROOT / "demo" / "model")
    assert found == DEMO_DIGEST


DEMO_DIGEST = "059a7b7357ef52f3262287675d4ce0a2fa6ee58b5ae0984cd0f2413d2bf1a2fe"


# ----------------------------------------------------------------------------- a folder handed on


def secret_rows(n, side):
    """Rows whose texts and answers occur nowhere else."""
    rows = []
    for i in range(n):
        text = f"a {side} secret {i}" + " and more" * (i % 6)
        rows.append({"text": text, "label": f"{side}-answer-{i % 3}"})
    return rows


@pytest.mark.parametrize("writes_retain", [False, True])
def test_a_prompts_folder_holds_nothing_of_the_rows_to_forget(
    writes_retain, folder, files, tmp_path
):
    forget = write_rows(tmp_path / "f.jsonl", secret_rows(12, "forget"))
    retain = write_rows(tmp_path / "r.jsonl", secret_rows(12, "retain"))
    out = tmp_path / "p"
    args = train_args(folder, {**files, "forget": forget, "retain": retain}, out)
    if writes_retain:
        i = args.index("--retain")
        args = [*args[:i], *args[i + 2 :], "--write-retain", 8]
    assert call(train, *args) == 0
    written = b"".join(file.read_bytes() for file in out.rglob("*") if file.is_file())
    for word in (b"secret", b"forget-answer"):
        assert word not in written
    labels = json.loads((out / "spul.json").read_text())["labels"]
    shared = ["retain-answer-0", "retain-answer-1", "retain-answer-2"]
    assert labels == (None if writes_retain else shared)  # of the four rows that have each
    beside = {file.name for file in (tmp_path / "p.run").iterdir()}
    assert beside == {"log.jsonl"} | ({"retain.jsonl", "texts.jsonl"} if writes_retain else set())


def test_rows_in_the_run_folder_are_not_overwritten(folder, files, tmp_path, capsys):
    run = tmp_path / "p.run"
    run.mkdir()
    shutil.copy(files["retain"], run / "retain.jsonl")
    args = train_args(folder, {**files, "retain": run / "retain.jsonl"}, tmp_path / "p")
    assert call(train, *args, "--overwrite") == 2
    assert "would overwrite" in capsys.readouterr().err
    (run / "retain.jsonl").rename(run / "mine.jsonl")
    assert call(train, *train_args(folder, files, tmp_path / "p", "--overwrite")) == 2
    assert "holds other files" in capsys.readouterr().err


# ------------------------------------------------------------------------------- other systems, ids


def test_a_system_that_does_not_count_memory_is_no_error(monkeypatch):
    """Windows has no module `resource`."""
    assert peak_memory("cpu") > 0
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory("cpu") is None


def test_a_window_that_hides_the_prompt_is_said_with_its_numbers(folder, files, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"model_type": "mistral", "sliding_window": 9}
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    args = train_args(tmp_path / "m", files, tmp_path / "p")
    assert call(train, *args) == 0
    out = capsys.readouterr().out
    assert "window   the window of 3 layers is 9 positions: in rows of more than 5 tokens" in out
    wanted = ["--model", tmp_path / "m", "--prompt", tmp_path / "p", "--forget", files["forget"]]
    assert call(evaluate, *wanted) == 0
    assert "train forget: the window of 3 layers is 9 positions" in capsys.readouterr().out
