"""What users get wrong: one line on stderr, status 2, and nothing written."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluate
import train
from tests.helpers import CONFIG, ROOT, call, save_weights, tiny, write_rows


def bad_rows(line):
    def make(tmp_path, folder, files):
        good = b'{"text": "fine", "label": "positive"}\n'
        (tmp_path / "bad.jsonl").write_bytes(good + line + b"\n")
        return {"--forget": tmp_path / "bad.jsonl"}

    return make


def bad_model(change):
    """A copy of the model folder, changed."""

    def make(tmp_path, folder, files):
        shutil.copytree(folder, tmp_path / "model")
        change(tmp_path / "model")
        return {"--model": tmp_path / "model"}

    return make


def bad_tensors(change):
    def apply(path):
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    return bad_model(apply)


def bad_index(weight_map):
    def apply(path):
        (path / "model.safetensors").rename(path.parent / "outside.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return bad_model(apply)


def option(**options):
    return lambda tmp_path, folder, files: {
        f"--{k.replace('_', '-')}": v for k, v in options.items()
    }


def empty_generic(tmp_path, folder, files):
    (tmp_path / "answers.txt").write_text(" \n\n")
    return {"--generic": tmp_path / "answers.txt"}


def finished_out(tmp_path, folder, files):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "spul.json").write_text("{}")
    return {"--out": tmp_path / "done"}


def out_below_a_file(tmp_path, folder, files):
    (tmp_path / "file").write_text("")
    return {"--out": tmp_path / "file" / "p"}


def input_in_out(tmp_path, folder, files):
    shutil.copy(files["retain"], tmp_path / "retain.jsonl")
    (tmp_path / "log.jsonl").write_text("")
    return {"--retain": tmp_path / "retain.jsonl", "--out": f"{tmp_path}/", "--overwrite": True}


def a_lora_in_out(tmp_path, folder, files):
    (tmp_path / "adapter_config.json").write_text("{}")
    return {"--out": tmp_path}


def out_with_other_things(tmp_path, folder, files):
    (tmp_path / "thesis.tex").write_text("")
    return {"--out": tmp_path}


def shared_text(tmp_path, folder, files):
    rows = [{"text": "A  fine film", "label": "positive"}]
    write_rows(tmp_path / "f.jsonl", rows)
    write_rows(
        tmp_path / "r.jsonl",
        [{"text": text, "label": "positive"} for text in ("other", "a fine FILM ")],
    )
    return {"--forget": tmp_path / "f.jsonl", "--retain": tmp_path / "r.jsonl"}


def some_flags(tmp_path, folder, files):
    rows = [{"text": "a", "label": "positive", "forget": True}, {"text": "b", "label": "positive"}]
    return {"--forget": write_rows(tmp_path / "f.jsonl", rows), "--retain": None}


def flags_and_retain(tmp_path, folder, files):
    rows = [
        {"text": "a", "label": "positive", "forget": True},
        {"text": "b", "label": "positive", "forget": False},
    ]
    return {"--forget": write_rows(tmp_path / "f.jsonl", rows)}


def long_answer(tmp_path, folder, files):
    rows = [{"text": "a", "label": "positive"}, {"text": "b", "label": "no " * 400}]
    return {"--forget": write_rows(tmp_path / "f.jsonl", rows), "--max-length": 64}


def empty_file(tmp_path, folder, files):
    (tmp_path / "empty.jsonl").write_text("\n")
    return {"--forget": tmp_path / "empty.jsonl"}


def pickles_only(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def cut(path):
    size = (path / "model.safetensors").stat().st_size
    os.truncate(path / "model.safetensors", size // 2)


def an_adapter(tmp_path, folder, files):
    (tmp_path / "lora").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    return {"--model": tmp_path / "lora"}


def a_prompt(tmp_path, folder, files):
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / "spul.json").write_text("{}")
    (tmp_path / "prompt" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    return {"--model": tmp_path / "prompt"}


def a_gguf_file(tmp_path, folder, files):
    (tmp_path / "model.Q4.gguf").write_bytes(b"GGUF")
    return {"--model": tmp_path / "model.Q4.gguf"}


def a_folder_of_gguf(tmp_path, folder, files):
    (tmp_path / "m").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "m")
    (tmp_path / "m" / "model.Q4.gguf").write_bytes(b"GGUF")
    return {"--model": tmp_path / "m"}


def the_root_of_the_hubs_cache(tmp_path, folder, files):
    shutil.copytree(folder, tmp_path / "models--org--name" / "snapshots" / "f00d")
    return {"--model": tmp_path / "models--org--name"}


def renamed(prefix):
    """The tensors under the names that a wrapper of the model gives them."""

    def change(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return bad_tensors(change)


EMBED, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
BAD = {
    "a missing file": (option(forget="nowhere.jsonl"), r"nowhere\.jsonl: No such file"),
    "an empty file": (empty_file, r"empty\.jsonl: no rows"),
    "a folder for a file": (option(forget=str(ROOT)), r"a folder, and a file of rows is expected"),
    "broken JSON": (bad_rows(b'{"text": "a", '), r"bad\.jsonl:2: not JSON"),
    "deep JSON": (bad_rows(b"[" * 100_000), r"bad\.jsonl:2: not JSON"),
    "a row that is not an object": (bad_rows(b"[1, 2]"), r"bad\.jsonl:2: a JSON object"),
    "no text": (bad_rows(b'{"label": "a"}'), r'bad\.jsonl:2: no "text"'),
    "no label": (bad_rows(b'{"text": "a"}'), r"bad\.jsonl:2: no answer: a row to forget"),
    "no completion": (bad_rows(b'{"prompt": "a"}'), r"bad\.jsonl:2: no answer"),
    "an empty text": (bad_rows(b'{"text": " ", "label": "a"}'), r'bad\.jsonl:2: "text" is empty'),
    "an empty label": (bad_rows(b'{"text": "a", "label": ""}'), r'bad\.jsonl:2: "label" is empty'),
    "a text that is not a string": (
        bad_rows(b'{"text": 7, "label": "a"}'),
        r'bad\.jsonl:2: "text" is not a string',
    ),
    "a label that is not a string": (
        bad_rows(b'{"text": "a", "label": 1.5}'),
        r'bad\.jsonl:2: "label" is a number with a fraction',
    ),
    "half a surrogate pair": (
        bad_rows(b'{"text": "\\ud800", "label": "a"}'),
        r"bad\.jsonl:2: .*surrogate",
    ),
    "wrong answers that are not a list": (
        bad_rows(b'{"text": "a", "label": "b", "wrong": "c"}'),
        r":2: .*is not a list of strings",
    ),
    "an empty wrong answer": (
        bad_rows(b'{"text": "a", "label": "b", "wrong": [" "]}'),
        r":2: .*is empty",
    ),
    "a paraphrase that is a number": (
        bad_rows(b'{"text": "a", "label": "b", "paraphrase": 1}'),
        r"2: .*is not a string",
    ),
    "a flag that is neither true nor false": (
        bad_rows(b'{"text": "a", "label": "b", "forget": 1}'),
        r"bad\.jsonl:2: .*nor false",
    ),
    "bytes that are not UTF-8": (
        bad_rows(b'{"text": "\xff", "label": "a"}'),
        r"bad\.jsonl:2: not UTF-8",
    ),
    "a generic label": (
        bad_rows(b'{"text": "a", "label": "unknown"}'),
        r"bad\.jsonl:2: .*'unknown'.*--generic",
    ),
    "a text to forget and to keep": (shared_text, r"r\.jsonl:2: the same text as .*f\.jsonl:1"),
    "flags on some rows": (some_flags, r'f\.jsonl:2: no "forget"'),
    "flags and a retain file": (flags_and_retain, r"leave --retain out"),
    "an answer over the limit": (long_answer, r"f\.jsonl:2: .*--max-length"),
    "no model folder": (option(model="nowhere"), r"nowhere: no config\.json"),
    "a model without config": (
        bad_model(lambda p: (p / "config.json").unlink()),
        r"model: no config\.json",
    ),
    "a broken config": (
        bad_model(lambda p: (p / "config.json").write_text("{")),
        r"config\.json:1: not JSON",
    ),
    "a model without weights": (
        bad_model(lambda p: (p / "model.safetensors").unlink()),
        r"no model\.safetensors",
    ),
    "a model without tokenizer": (
        bad_model(lambda p: (p / "tokenizer.model").unlink()),
        r"no tokenizer\.model",
    ),
    "a broken tokenizer": (
        bad_model(lambda p: (p / "tokenizer.model").write_text("x")),
        r"tokenizer\.model: not",
    ),
    "pickled weights": (bad_model(pickles_only), r"only pickled weights.*save_pretrained"),
    "truncated weights": (bad_model(cut), r"model\.safetensors: not a complete"),
    "empty weights": (
        bad_model(lambda p: (p / "model.safetensors").write_text("")),
        r"safetensors: not a complete",
    ),
    "a missing tensor": (
        bad_tensors(lambda t: t.pop(UP)),
        r"Missing key.*layers\.1\.mlp\.up_proj\.weight",
    ),
    "a surplus tensor": (
        bad_tensors(lambda t: t.update({"model.extra": torch.ones(2)})),
        r"Unexpected key.*extra",
    ),
    "a tensor of another shape": (
        bad_tensors(lambda t: t.update({UP: t[UP].T.contiguous()})),
        r"layers\.1\.mlp\.up_proj\.weight.*\[32, 48\].*\[48, 32\]",
    ),
    "a tensor of whole numbers": (
        bad_tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})),
        r"torch\.int8",
    ),
    "an untied model without head": (
        bad_tensors(lambda t: t.pop("lm_head.weight")),
        r"no tensor lm_head\.weight: .*tie_word_embeddings true",
    ),
    "weights of a compiled model": (renamed("_orig_mod."), r"_orig_mod\..*removeprefix"),
    "weights of a parallel model": (renamed("module."), r"called module\..*removeprefix"),
    "weights of peft's wrapper": (renamed("base_model.model."), r"merge_and_unload"),
    "an adapter": (an_adapter, r"lora: an adapter .*org/base.*finetune --model BASE"),
    "a prompt": (a_prompt, r"prompt, not a model: give it as --prompt"),
    "a GGUF file": (a_gguf_file, r"Q4\.gguf: GGUF files are not read: give the folder"),
    "a folder of GGUF files": (a_folder_of_gguf, r"m: GGUF files are not read"),
    "a name on the hub": (option(model="org/name-1.5B"), r"hf download org/name-1\.5B --local-dir"),
    "the root of the hub's cache": (
        the_root_of_the_hubs_cache,
        r"give .*models--org--name/snapshots/f00d",
    ),
    "an end in words": (
        bad_model(
            lambda p: (p / "config.json").write_text(
                (p / "config.json").read_text().replace('"eos_token_id": 2', '"eos_token_id": "2"')
            )
        ),
        r"config\.json: eos_token_id '2' must be null, an id",
    ),
    "a vocabulary too small": (
        bad_model(lambda p: save_weights(tiny(vocab_size=100), p)),
        r"do not belong together",
    ),
    "another architecture": (
        bad_model(
            lambda p: (p / "config.json").write_text(json.dumps({**CONFIG, "model_type": "gpt2"}))
        ),
        r"config\.json: model_type 'gpt2' is not supported",
    ),
    "a pointer for weights": (
        bad_model(lambda p: (p / "model.safetensors").write_text("version https://git-lfs")),
        r"model\.safetensors: not a complete",
    ),
    "a Mistral without its window": (
        bad_model(
            lambda p: (p / "config.json").write_text(
                json.dumps({**CONFIG, "model_type": "mistral"})
            )
        ),
        r"config\.json: no sliding_window",
    ),
    "an index that leaves its folder": (
        bad_index({EMBED: "../outside.safetensors"}),
        r"points outside the folder",
    ),
    "an index of files that are not there": (
        bad_index({EMBED: "gone.safetensors"}),
        r"gone\.safetensors",
    ),
    "an index that is not one": (bad_index([]), r"no weight_map"),
    "shards of int8 weights": (option(shard=True, quantize="int8"), r"--shard goes with neither"),
    "p = 0": (option(num_tokens=0), r"--num-tokens: '0'"),
    "p as long as the model": (option(num_tokens=511), r"leave no room"),
    "a negative weight": (option(alpha=-1), r"--alpha: '-1'"),
    "a weight that is not a number": (option(beta="nan"), r"--beta: 'nan'"),
    "an infinite rate": (option(lr="inf"), r"--lr: 'inf'"),
    "a rate beyond float32": (option(lr="1e300"), r"--lr: '1e300'"),
    "a file name left empty": (option(retain=""), r"--retain: is empty"),
    "a template of broken bytes": (option(template="\udcff{text}"), r"--template.*not text"),
    "a device without memory": (option(device="meta"), r"--device meta"),
    "a rate of 0": (option(lr=0), r"--lr: '0'"),
    "no epochs": (option(epochs=0), r"--epochs: '0'"),
    "a batch of nothing": (option(batch_size=0), r"--batch-size: '0'"),
    "more forget rows than a batch": (option(forget_per_batch=32), r"leaves no room"),
    "an unknown option": (option(frobnicate=1), r"--frobnicate"),
    "an unknown KL position": (option(kl_position="left"), r"--kl-position"),
    "no generic answer": (option(generic=","), r"--generic"),
    "a misspelt file of generic answers": (
        option(generic="unknwon.txt"),
        r"--generic unknwon\.txt: this file does not exist",
    ),
    "an empty file of generic answers": (empty_generic, r"--generic .*at least one"),
    "a template without its text": (
        option(template="Review: "),
        r"--template.*\{text\} exactly once",
    ),
    "a template with a label": (option(template="{text} {label}"), r"\{label\}"),
    "an unknown device": (option(device="abacus"), r"--device abacus"),
    "a finished --out": (finished_out, r"finished prompt.*--overwrite"),
    "an --out below a file": (out_below_a_file, r"file"),
    "an input among the run's own files": (input_in_out, r"would overwrite .*retain\.jsonl"),
    "another's adapter in --out": (a_lora_in_out, r"holds other files"),
    "an --out full of other things": (out_with_other_things, r"holds other files"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_and_status_2_and_writes_nothing(
    case, folder, files, tmp_path, capsys
):
    make, pattern = BAD[case]
    options = {
        "--model": folder,
        "--forget": files["forget"],
        "--retain": files["retain"],
        "--out": tmp_path / "out",
        **make(tmp_path, folder, files),
    }
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    args = []
    for name, value in options.items():  # None: not given; True: a flag
        if value is not None:
            args += [name] if value is True else [name, value]
    status = call(train, *args)
    out, err = capsys.readouterr()
    assert status == 2, err
    assert err.count("\n") == 1, err
    assert re.search(pattern, err), err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_prompt_of_another_model_is_refused(folder, trained, tmp_path, capsys):
    save_weights(tiny(seed=5), tmp_path)
    shutil.copy(folder / "tokenizer.model", tmp_path)
    assert call(evaluate, "--model", tmp_path, "--prompt", trained, "--ask", "a") == 2
    assert "trained on another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("spul.json", None, "no spul.json"),
        ("spul.json", "{", "not JSON"),
        ("spul.json", "{}", "format"),
        ("spul.json", '{"format": "spul 1", "labels": 5}', "labels"),
        ("adapter_model.safetensors", "", "not a complete file"),
        ("adapter_model.safetensors", None, "adapter_model.safetensors"),
    ],
)
def test_a_broken_prompt_folder_is_refused(name, content, words, folder, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "p")
    (tmp_path / "p" / name).unlink()
    if content is not None:
        (tmp_path / "p" / name).write_text(content)
    assert call(evaluate, "--model", folder, "--prompt", tmp_path / "p", "--ask", "a") == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "args, words",
    [
        (["--model", "demo/model"], "nothing to measure"),
        (["--json", "nowhere/r.json"], "its folder does not exist"),
        (["--forget", "demo/forget.jsonl"], "--model DIR is missing"),
        (["--ask", "x", "--prompt", "demo/model"], "no spul.json"),
    ],
)
def test_eval_says_what_is_missing(args, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert call(evaluate, *args) == 2
    assert words in capsys.readouterr().err
