"""Model folders, tokenizers, rows and templates as users have them."""

import ast
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluate
import fast
from data import Row, TEMPLATES, make_example, read_rows, read_sets
from fast import FastLlama
from model import Config, Llama
from support.checks import check_config, parse_row, read_template
from support.hardware import load_llama, read_config
from support.tokenizer import Tokenizer
from tests.helpers import BOTH, CONFIG, ROOT, SHAPES, call, in_two_files, python, reference
from tests.helpers import save_weights, tiny, tokens_of, write_rows

# ------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_the_config_that_is_written(shape, tmp_path):
    import transformers

    reference(shape, tmp_path / "a")
    llama = Llama.from_pretrained(tmp_path / "a")
    save_weights(llama, tmp_path / "b")
    tokens = tokens_of(2, 20)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(hf(tokens).logits, llama(tokens), atol=1e-4, rtol=0)
        again = Llama.from_pretrained(tmp_path / "b")
        assert torch.equal(again(tokens), llama(tokens))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_config_written_and_read_again_is_the_same(shape):
    config = tiny(**SHAPES[shape]).config
    assert Config.from_json(config.to_json(torch.float32)) == config


def test_both_spellings_of_the_rope_settings_mean_the_same(tmp_path):
    reference("llama llama3 rope", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    tokens = tokens_of(1, 30)
    new = Llama.from_pretrained(tmp_path)(tokens)
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")  # as the oldest files have it
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_scaling": rope}))
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), new)


@BOTH
def test_a_model_in_several_files_is_the_single_one(kind, folder, tmp_path):
    a = kind.from_pretrained(folder)
    b = kind.from_pretrained(in_two_files(folder, tmp_path))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "fast"])
def test_a_command_loads_the_weights_that_from_pretrained_loads(plain, folder):
    a = Llama.from_pretrained(folder, torch.bfloat16)
    b = load_llama(folder, torch.bfloat16, "cpu", plain)
    assert isinstance(b, FastLlama) != plain
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in b.parameters())


def test_weight_files_may_be_symbolic_links(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    Llama.from_pretrained(tmp_path)


MEMORY = """
import sys
import torch
{imports}

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

before = resident()
m = {load}
size = sum(p.numel() * p.element_size() for p in m.parameters())
print((resident() - before) * 1024 / size)
"""
LOADERS = {
    "model": ("import model", "model.Llama.from_pretrained({path!r}, torch.{dtype})"),
    "command": (
        "from support.hardware import load_llama",
        "load_llama({path!r}, torch.{dtype}, 'cpu')",
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("is_split", [False, True], ids=["one file", "two files"])
def test_loading_smollm2_takes_the_memory_of_its_weights_once(
    loader, dtype, is_split, smollm2, tmp_path
):
    path = str(in_two_files(smollm2, tmp_path) if is_split else smollm2)
    imports, load = LOADERS[loader]
    code = MEMORY.format(imports=imports, load=load.format(path=path, dtype=dtype))
    assert float(python("-c", code, check=True).stdout) <= 1.2


def test_old_files_with_rope_constants_and_a_tied_head_load(tmp_path):
    save_weights(tiny(tie_word_embeddings=True), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    Llama.from_pretrained(tmp_path)


def test_a_head_that_is_not_the_embedding_is_not_taken_for_it(tmp_path):
    save_weights(tiny(tie_word_embeddings=True), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):
        Llama.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------- config.json

UNSUPPORTED = {
    "another activation": (dict(hidden_act="gelu"), "hidden_act"),
    "another family": (dict(model_type="gemma"), "gemma"),
    "an unknown rope type": (dict(rope_scaling={"rope_type": "yarn", "factor": 2}), "yarn"),
    "a llama3 rope without its numbers": (
        dict(rope_scaling={"rope_type": "llama3", "factor": 2}),
        "low_freq_factor",
    ),
    "partial rotation": (dict(partial_rotary_factor=0.5), "partial"),
    "experts": (dict(num_local_experts=8), "experts"),
    "quantized weights": (dict(quantization_config={"bits": 4}), "quantization_config"),
    "heads that do not divide": (dict(num_key_value_heads=3), "multiple"),
    "no vocabulary": (dict(vocab_size=None), "vocab_size"),
    "layers in words": (dict(num_hidden_layers="three"), "num_hidden_layers"),
    "an epsilon below zero": (dict(rms_norm_eps=-1e-5), "rms_norm_eps"),
}


def changed_config(folder, out, changes):
    """A copy of the model folder, with changes to its config.json."""
    shutil.copytree(folder, out)
    raw = json.loads((folder / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(raw))
    return out


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_config_it_cannot_compute_is_refused_with_the_reason(case, folder, tmp_path):
    changes, word = UNSUPPORTED[case]
    path = changed_config(folder, tmp_path / "model", changes)
    with pytest.raises(ValueError, match=word) as error:
        read_config(path)
    assert str(path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    "case", ["another activation", "another family", "partial rotation", "experts"]
)
def test_model_py_alone_refuses_a_config_that_it_cannot_compute(case, folder, tmp_path):
    changes, word = UNSUPPORTED[case]
    path = changed_config(folder, tmp_path / "model", changes)
    with pytest.raises(ValueError, match=word) as error:
        Llama.from_pretrained(path)
    assert str(path / "config.json") in str(error.value)


def test_model_py_alone_refuses_a_rope_type_that_it_does_not_know():
    with pytest.raises(ValueError, match="yarn"):
        tiny(rope_scaling={"rope_type": "yarn", "factor": 2})(tokens_of(1, 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_config_of_transformers_passes_the_check(shape, tmp_path):
    reference(shape, tmp_path)
    check_config(tmp_path / "config.json")


# --------------------------------------------------------------------------------- who imports whom


def imported_by(file):
    """The first names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    return names


CORE = [ROOT / f"{name}.py" for name in "model fast spul data train eval".split()]
CORE += sorted((ROOT / "support").glob("*.py"))


@pytest.mark.parametrize("file", CORE, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_core_does_not_import_extras_tests_or_results(file):
    assert not imported_by(file) & {"extras", "tests", "results", "conftest"}


def test_model_py_imports_nothing_but_torch_safetensors_and_the_standard_library():
    assert imported_by(ROOT / "model.py") - set(sys.stdlib_module_names) == {"torch", "safetensors"}


def test_fast_py_imports_nothing_of_the_project_but_model():
    others = imported_by(ROOT / "fast.py") - set(sys.stdlib_module_names)
    assert others == {"torch", "model"}


def test_model_py_works_alone_in_an_empty_folder(folder, tmp_path):
    shutil.copy(ROOT / "model.py", tmp_path)
    code = (
        "import json, sys, torch\n"
        "from model import Llama\n"
        "assert not {'fast', 'spul', 'data', 'support'} & set(sys.modules)\n"
        f"llama = Llama.from_pretrained({str(folder)!r})\n"
        "phi = llama.embed(torch.tensor([3, 4])).detach()\n"
        "ids = llama.generate([[5, 6, 7]], llama.prefix(phi), 5)\n"
        "llama.prompted(torch.tensor([[5, 6]]), phi.requires_grad_()).sum().backward()\n"
        "print(json.dumps(ids))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = python("-c", code, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    llama = Llama.from_pretrained(folder)
    phi = llama.embed(torch.tensor([3, 4]))
    expected = llama.generate([[5, 6, 7]], llama.prefix(phi), 5)
    assert json.loads(done.stdout) == expected


def test_fast_py_names_every_field_of_the_config():
    assert set(fast.KNOWN_FIELDS) == set(vars(tiny().config))


# --------------------------------------------------------------------------------------- tokenizers


def test_text_that_looks_like_a_special_token_is_plain_text(tokenizer, bpe_folder):
    special_ids = {tokenizer: {0, 1, 2}, Tokenizer(bpe_folder): {0, 1}}
    for tok, special in special_ids.items():
        for text in ("</s>", "<s>", "<|endoftext|>", "a <unk> b"):
            ids = tok.encode(text)
            assert tok.decode(ids) == text
            assert len(ids) > 1
            assert not set(ids) & special


def test_sentencepiece_puts_no_bos_where_the_settings_say_so(folder, tmp_path):
    shutil.copy(folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    tok = Tokenizer(tmp_path)
    assert tok.bos == []
    row = Row(where="x:1", **parse_row({"prompt": "", "completion": "a"}, "x:1"))
    with pytest.raises(ValueError, match="x:1.*empty prompt"):
        make_example(row, tok, "", 50)


def test_a_model_may_have_more_ids_than_its_tokenizer(folder, files, tmp_path):
    save_weights(tiny(vocab_size=3000), tmp_path)
    shutil.copy(folder / "tokenizer.model", tmp_path)
    args = ["--model", tmp_path, "--dtype", "fp32"]
    assert call(evaluate, *args, "--forget", files["forget"]) == 0
    assert call(evaluate, *args, "--ask", "a") == 0


# ------------------------------------------------------------------------------- rows and templates


def test_one_file_can_hold_both_sets(tmp_path):
    rows = [{"text": str(i), "label": "a", "forget": i < 2} for i in range(5)]
    forget, retain = read_sets(write_rows(tmp_path / "both.jsonl", rows))
    assert [row.text for row in forget] == ["0", "1"]
    assert [row.text for row in retain] == ["2", "3", "4"]


def test_other_keys_blank_lines_and_a_byte_order_mark_are_no_trouble(tmp_path):
    text = '\ufeff{"text": "é", "label": "a", "id": 7}\n\n  \n{"text": "b", "label": "b"}'
    (tmp_path / "f").write_bytes(text.encode())
    rows = read_rows(tmp_path / "f")
    assert [(row.text, row.where[-2:]) for row in rows] == [("é", ":1"), ("b", ":4")]


def test_a_template_comes_from_a_name_a_string_or_a_file(tmp_path):
    (tmp_path / "t").write_text("Review: {text}\nVerdict: \n")
    wanted = "Review: {text}\nVerdict:"
    assert read_template(str(tmp_path / "t"), TEMPLATES) == wanted
    assert read_template("Review: {text}\\nVerdict:", TEMPLATES) == wanted
    assert read_template("question", TEMPLATES) == TEMPLATES["question"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    ],
)
def test_the_config_alone_refuses_what_it_cannot_compute(change, message):
    """Also where model.py was copied without the commands' checks."""
    raw = {"model_type": "llama", **CONFIG, **change}
    raw = {name: value for name, value in raw.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        Config.from_json(raw)
