"""extras.export: the exported model gives our logits, in our code, transformers and peft."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from extras import export
from model import Llama
from spul import load_prompt, save_prompt
from support.identity import fingerprint
from support.templates import Chat
from support.tokenizer import Tokenizer
from tests.helpers import call, in_two_files, save_weights, tiny, vectors
from tests.test_chat import TEMPLATES, make_folder

P = 5
TEXTS = ["Who wrote the book?", "a film, positive or negative?", "She did. " * 9]


def base(path, style="llama3", is_full=False, **changes):
    """A model folder whose outputs have a part in common, as those of trained models do.

    is_full: its table has no row that no token has.
    """
    make_folder(path, style)
    if is_full:
        changes["vocab_size"] = Tokenizer(path).count
    llama = tiny(**changes)
    llama.embed_tokens.weight[:, 0] += 20
    save_weights(llama, path)
    return path


def prompt_for(folder, out):
    phi = vectors(P).detach()
    info = {
        "model": str(folder),
        "base_sha256": fingerprint(folder),
        "generic": ["unknown"],
        "template": "{text}",
        "labels": None,
    }
    save_prompt(out, phi, Llama.from_pretrained(folder).config, info)
    return phi


def exported(tmp_path, folder, form="vocabulary"):
    phi = prompt_for(folder, tmp_path / "prompt")
    options = ["--prompt", tmp_path / "prompt", "--as", form, "--out", tmp_path / "out"]
    assert call(export, "--model", folder, *options) == 0
    return phi, tmp_path / "out"


def refused(capsys, tmp_path, *options):
    assert call(export, *options, "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".out")]
    return capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("is_full", [False, True], ids=["spare rows", "full table"])
def test_texts_and_chats_give_our_logits_in_transformers(style, is_full, tmp_path):
    import transformers

    folder = base(tmp_path / "base", style, is_full, tie_word_embeddings=is_full)
    phi, out = exported(tmp_path, folder)
    llama = Llama.from_pretrained(folder)
    hf = transformers.AutoModelForCausalLM.from_pretrained(out)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    before = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer(folder)
    first = ours.count
    for text in TEXTS:
        messages = [{"role": "user", "content": text}]
        chat = {"tokenize": False, "add_generation_prompt": True}
        as_chat = theirs.apply_chat_template(messages, **chat)
        old_chat = before.apply_chat_template(messages, **chat)
        pairs = [
            (theirs(text).input_ids, ours.bos + ours.encode(text)),
            (
                theirs(as_chat, add_special_tokens=False).input_ids,
                before(old_chat, add_special_tokens=False).input_ids,
            ),
        ]
        for ids, old in pairs:
            assert ids == [*range(first, first + P), *old]
            logits = hf(torch.tensor([ids])).logits[0, P:]
            want = llama(torch.tensor([old]), llama.prefix(phi))[0]
            torch.testing.assert_close(logits[:, :first], want[:, :first], atol=1e-3, rtol=0)
            new = logits.softmax(dim=-1)[:, first : first + P]
            assert new.max() < 1e-6


@torch.no_grad()
def test_in_bf16_the_vectors_are_rounded_and_no_more(tmp_path):
    import transformers

    folder = base(tmp_path / "base")
    save_weights(Llama.from_pretrained(folder).bfloat16(), folder)
    phi, out = exported(tmp_path, folder)
    hf = transformers.AutoModelForCausalLM.from_pretrained(out).float()
    llama = Llama.from_pretrained(folder).float()
    first = Tokenizer(folder).count
    ids = Tokenizer(folder).encode(TEXTS[0])
    logits = hf(torch.tensor([[*range(first, first + P), *ids]])).logits[0, P:, :first]
    for read, is_equal in ((phi.bfloat16().float(), True), (phi, False)):
        want = llama(torch.tensor([ids]), llama.prefix(read))[0, :, :first]
        assert torch.allclose(logits, want, atol=1e-3, rtol=0) == is_equal


def test_our_own_code_reads_the_folder_as_a_model(tmp_path):
    folder = base(tmp_path / "base")
    phi, out = exported(tmp_path, folder)
    ids = list(range(Tokenizer(folder).count, Tokenizer(folder).count + P))
    assert Tokenizer(out).bos == ids + Tokenizer(folder).bos
    names = [export.NAME.format(i) for i in range(P)]
    assert Chat(out).string() == "".join(names) + Chat(folder).string()
    told = json.loads((out / export.EXPORT).read_text())
    assert told["prefix"] == "".join(names) + "<s>" and told["ids"] == [ids[0], ids[-1]]


@pytest.mark.parametrize("style", TEMPLATES)
def test_for_gguf_texts_have_the_ids_that_converters_know(style, tmp_path):
    import transformers

    folder = base(tmp_path / "base", style)
    _, out = exported(tmp_path, folder, "gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    before = transformers.AutoTokenizer.from_pretrained(folder)
    assert [theirs(text).input_ids for text in TEXTS] == [before(t).input_ids for t in TEXTS]
    first = Tokenizer(folder).count
    prefix = list(range(first, first + P))
    told = json.loads((out / export.EXPORT).read_text())
    for text in TEXTS:
        plain = theirs(told["prefix"] + text, add_special_tokens=False).input_ids
        ours = Tokenizer(folder)
        assert plain == prefix + ours.bos + after_special(ours, text)
        chat = theirs.apply_chat_template([{"role": "user", "content": text}])
        assert list(chat["input_ids"][:P]) == prefix


def after_special(tokenizer, text):
    """A text's ids where the string before it is a special token."""
    first = next(iter(tokenizer.names))
    return tokenizer.encode_parts([(first, True), (text, False)])[1:]


@pytest.mark.parametrize("tied", [True, False])
def test_all_other_weights_are_the_same_and_stay_in_their_files(tied, tmp_path):
    whole = base(tmp_path / "base", is_full=True, tie_word_embeddings=tied)
    folder = in_two_files(whole, tmp_path / "two")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(whole / name, folder)
    (folder / "LICENSE").write_text("free")
    (folder / "old.bin").write_text("pickled")
    phi, out = exported(tmp_path, folder)
    first = Tokenizer(folder).count
    index = json.loads((out / export.INDEX).read_text())["weight_map"]
    old_index = json.loads((folder / export.INDEX).read_text())["weight_map"]
    assert {name: file for name, file in index.items() if name != "lm_head.weight"} == {
        name: file for name, file in old_index.items() if name != "lm_head.weight"
    }
    old = load_file(whole / "model.safetensors")
    for name, file in index.items():
        tensor = load_file(out / file)[name]
        was = old.get(name, old["model.embed_tokens.weight"])
        assert torch.equal(tensor[: len(was)], was)
        assert len(tensor) == len(was) + (P if name in TABLES else 0)
    embedding = load_file(out / index["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    assert torch.equal(embedding[first:], phi)
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == first + P and config["tie_word_embeddings"] is False
    assert (out / "LICENSE").exists() and not (out / "old.bin").exists()


TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}], ids=["GQA", "MHA"])
def test_peft_gives_our_logits_from_the_keys_and_values(changes, tmp_path):
    import peft
    import transformers

    folder = base(tmp_path / "base", **changes)
    phi, out = exported(tmp_path, folder, "kv")
    llama = Llama.from_pretrained(folder)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([Tokenizer(folder).encode(TEXTS[0])])
    logits = peft.PeftModel.from_pretrained(hf, out)(tokens).logits
    want = llama(tokens, llama.prefix(phi))
    torch.testing.assert_close(logits, want, atol=1e-3, rtol=0)
    assert (want - llama(tokens)).abs().max() > 0.1  # the prompt matters


def test_an_exported_folder_is_not_exported_again(tmp_path, capsys):
    folder = base(tmp_path / "base")
    _, out = exported(tmp_path, folder)
    shutil.copytree(out, tmp_path / "model")
    shutil.rmtree(out)
    error = refused(
        capsys, tmp_path, "--model", tmp_path / "model", "--prompt", tmp_path / "prompt"
    )
    assert "its vocabulary holds a prompt already" in error
    (tmp_path / "model/spul_export.json").unlink()  # its tokens alone tell
    again = ["--model", tmp_path / "model", "--prompt", tmp_path / "prompt"]
    assert "its vocabulary holds a prompt already" in refused(capsys, tmp_path, *again)


def test_a_prompt_of_another_model_is_refused(tmp_path, capsys):
    folder = base(tmp_path / "base")
    prompt_for(folder, tmp_path / "prompt")
    other = base(tmp_path / "other", "qwen3")
    for form in ("vocabulary", "kv"):
        error = refused(
            capsys, tmp_path, "--model", other, "--prompt", tmp_path / "prompt", "--as", form
        )
        assert "trained with another tokenizer" in error


def test_a_sentencepiece_model_alone_is_refused_with_the_remedy(
    folder, trained, tmp_path, capsys
):
    error = refused(capsys, tmp_path, "--model", folder, "--prompt", trained)
    assert "no tokenizer.json" in error and "save_pretrained" in error


def test_outputs_without_a_common_part_are_refused(tmp_path, capsys):
    folder = base(tmp_path / "base")
    save_weights(tiny(), folder)
    prompt_for(folder, tmp_path / "prompt")
    error = refused(capsys, tmp_path, "--model", folder, "--prompt", tmp_path / "prompt")
    assert "too little in common" in error


def test_a_post_processor_of_another_kind_is_refused(tmp_path, capsys):
    folder = base(tmp_path / "base")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"] = {
        "type": "BertProcessing",
        "sep": ["</s>", 1],
        "cls": ["<s>", 0],
    }
    file.write_text(json.dumps(content))
    prompt_for(folder, tmp_path / "prompt")
    error = refused(capsys, tmp_path, "--model", folder, "--prompt", tmp_path / "prompt")
    assert "BertProcessing is not supported" in error


@pytest.mark.parametrize("when", ["before", "while it is written"])
def test_a_full_disk_leaves_nothing(when, tmp_path, capsys, monkeypatch):
    folder = base(tmp_path / "base")
    prompt_for(folder, tmp_path / "prompt")
    if when == "before":
        usage = type("usage", (), {"free": 1000})
        monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage)
    else:

        def full(path, *rest):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(export, "write_tensors", full)
    error = refused(capsys, tmp_path, "--model", folder, "--prompt", tmp_path / "prompt")
    assert "are free" in error or "No space left" in error


def test_what_is_there_already_stays(tmp_path, capsys):
    folder = base(tmp_path / "base")
    prompt_for(folder, tmp_path / "prompt")
    (tmp_path / "out").mkdir()
    options = ["--prompt", tmp_path / "prompt", "--out", tmp_path / "out"]
    assert call(export, "--model", folder, *options) == 2
    assert "is there already" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_two_prompts_one_after_the_other(tmp_path):
    folder = base(tmp_path / "base")
    prompt_for(folder, tmp_path / "prompt")
    options = ["--prompt", tmp_path / "prompt"] * 2 + ["--out", tmp_path / "out"]
    assert call(export, "--model", folder, *options) == 0
    phi, _ = load_prompt(tmp_path / "prompt", folder)
    first = Tokenizer(folder).count
    table = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(table[first : first + 2 * P], torch.cat([phi, phi]))
