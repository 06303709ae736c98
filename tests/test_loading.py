"""Model folders, tokenizers, rows and templates as users have them."""

import argparse
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
from support.configs import check_config
from support.files import write_text
from support.hardware import load_llama, load_model, read_config, row_limit, window_warning
from support.rows import parse_row
from support.templates import read_template
from support.tokenizer import Tokenizer
from tests.helpers import BOTH, CONFIG, DEMO, LLAMA3_ROPE, ROOT, SHAPES, call, in_two_files
from tests.helpers import python, reference, save_weights, tiny, tokens_of, vectors, write_rows

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


def test_a_snapshot_of_the_hubs_cache_loads(folder, tmp_path):
    """Its files are links to blobs, as relative paths."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "f00"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for i, file in enumerate(folder.iterdir()):
        shutil.copy(file, tmp_path / "models--a--b" / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    load_model(generation_args(snapshot))


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "fast"])
def test_a_tied_model_may_store_its_table_as_the_head_only(plain, tmp_path):
    llama = tiny(tie_word_embeddings=True)
    save_weights(llama, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    again = load_llama(tmp_path, torch.float32, "cpu", plain)
    tensors = dict(again.named_parameters())
    assert tensors.keys() == dict(llama.named_parameters()).keys()  # the table once
    assert torch.equal(tensors["embed_tokens.weight"], llama.embed_tokens.weight)
    Llama.from_pretrained(tmp_path)


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



def rope(kind, **numbers):
    return {"rope_scaling": {"rope_type": kind, **numbers}}


UNSUPPORTED = {
    "another activation": (dict(hidden_act="gelu"), "hidden_act"),
    "another family": (dict(model_type="gemma"), "gemma"),
    "an unknown rope type": (dict(rope_scaling={"rope_type": "mrope", "factor": 2}), "mrope"),
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
    "a rope factor of 0": (rope("linear", factor=0), "factor 0 is not a positive"),
    "a rope factor below 0": (rope("dynamic", factor=-2.0), "factor -2.0 is not a positive"),
    "a llama3 rope that divides by 0": (
        dict(rope_scaling={**LLAMA3_ROPE, "high_freq_factor": 1.0}),
        "high_freq_factor must be above low_freq_factor",
    ),
    "two rope settings that disagree": (
        {**rope("linear", factor=2.0), "rope_parameters": {"rope_type": "default"}},
        "rope_parameters and rope_scaling disagree",
    ),
    "yarn of another kind": (rope("yarn", factor=4.0, mscale_all_dim=1.0), "mscale_all_dim"),
    "a yarn rope in words": (rope("yarn", factor="four"), "factor 'four'"),
    "a longrope with too few factors": (
        rope("longrope", short_factor=[1.0], long_factor=[1.0]),
        "4 numbers for short_factor",
    ),
    "a multiplier of another family": (dict(residual_multiplier=0.2), "residual_multiplier 0.2"),
    "an odd part that turns": (
        dict(model_type="phi3", partial_rotary_factor=0.7, rms_norm_eps=1e-5),
        "partial_rotary_factor 0.7",
    ),
    "flags for too few layers": (
        dict(model_type="smollm3", rope_theta=1e4, no_rope_layers=[1, 0]),
        "no_rope_layers",
    ),
    "an end in words": (dict(eos_token_id="</s>"), "eos_token_id '</s>' must be null, an id"),
    "an end that is a flag": (dict(eos_token_id=True), "eos_token_id True"),
    "an end beyond the table": (dict(eos_token_id=[2, 2048]), "below vocab_size 2048"),
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


@pytest.mark.parametrize("ends", [None, [], [2], [2, 7], 0])
def test_a_config_may_name_no_end_one_or_several(ends, folder, tmp_path):
    path = changed_config(folder, tmp_path / "model", {"eos_token_id": ends})
    assert read_config(path).eos_token_id == ends
    llama = Llama.from_pretrained(path)
    assert len(llama.generate([[5, 6]], None, 3)[0]) <= 3


def test_two_rope_settings_that_agree_are_taken(folder, tmp_path):
    both = {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_theta": 500.0,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    }
    config = read_config(changed_config(folder, tmp_path / "model", both))
    assert config.rope_theta == 500.0


def test_the_demos_config_is_written_as_it_is():
    """Byte for byte: a prompt knows its model by the file."""
    file = DEMO / "model" / "config.json"
    contents = Config.from_file(file).to_json(torch.bfloat16)
    assert json.dumps(contents, indent=2, ensure_ascii=False) + "\n" == file.read_text()


# --------------------------------------------------------------------------- where a text ends


def generation_args(path):
    return argparse.Namespace(model=path, device="cpu", dtype="fp32", plain=False, quantize=None)


def with_generation_config(folder, out, contents):
    shutil.copytree(folder, out)
    (out / "generation_config.json").write_text(contents)
    return out


@pytest.mark.parametrize(
    "ends, expected", [([2, 7, 9], [2, 7, 9]), (7, [2, 7]), (2, 2), ([2], 2), (None, 2)]
)
def test_generation_ends_also_where_generation_config_says(ends, expected, folder, tmp_path):
    contents = json.dumps({"eos_token_id": ends})
    path = with_generation_config(folder, tmp_path / "m", contents)
    llama, _ = load_model(generation_args(path))
    assert llama.config.eos_token_id == expected
    assert llama.end_ids().tolist() == (expected if isinstance(expected, list) else [expected])


@pytest.mark.parametrize(
    "contents, message",
    [
        ("{", r"generation_config\.json:1: not JSON"),
        ('{"eos_token_id": "</s>"}', r"generation_config\.json: eos_token_id '</s>'"),
        ('{"eos_token_id": [2, 5000]}', r"generation_config\.json: eos_token_id .* 2048"),
    ],
)
def test_a_broken_generation_config_is_refused(contents, message, folder, tmp_path):
    path = with_generation_config(folder, tmp_path / "m", contents)
    with pytest.raises(ValueError, match=message):
        load_model(generation_args(path))


# ---------------------------------------------------------------------------- positions and windows


@pytest.mark.parametrize(
    "changes, longest",
    [
        (rope("dynamic", factor=4.0), 512),
        (
            rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)
            | {"original_max_position_embeddings": 64},
            64,
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_rows_end_where_frequencies_begin_to_depend_on_the_length(
    changes, longest, folder, tmp_path, capsys
):
    args = generation_args(changed_config(folder, tmp_path / "model", changes))
    args.max_length = 1024
    assert row_limit(args, 10) == longest - 10
    with pytest.raises(ValueError, match=f"the model takes {longest} positions"):
        row_limit(args, longest - 1)
    llama, _ = load_model(args)
    assert llama.config.to_json(torch.float32)["max_position_embeddings"] == 512
    assert f"rows of at most {longest} positions, as beyond" in capsys.readouterr().out


def test_a_window_that_hides_the_prompt_is_told_with_its_numbers():
    config = tiny(model_type="mistral", sliding_window=30).config
    assert window_warning(config, 10, 20) is None
    assert window_warning(tiny().config, 10, 2000) is None
    assert window_warning(config, 10, 21) == (
        "the window of 3 layers is 30 positions: in rows of more than 20 tokens the end does not "
        "see the whole prompt; longest row here: 21"
    )


def test_a_row_in_the_window_depends_on_the_prompts_first_vector_and_a_longer_one_does_not():
    """What window_warning counts, measured: one layer, as each layer adds a window's reach."""
    llama = tiny(model_type="mistral", sliding_window=12, num_hidden_layers=1)
    for longest in (8, 9):
        phi = vectors(4)
        end = llama.hidden(tokens_of(1, longest), llama.prefix(phi))[0, -1]
        (gradient,) = torch.autograd.grad(end.square().sum(), phi)
        is_hidden = not gradient[0].any()
        assert is_hidden == (window_warning(llama.config, 4, longest) is not None)


# ------------------------------------------------------------------------------------------ writing


def test_a_file_is_flushed_through_a_handle_that_may_write(tmp_path, monkeypatch):
    """As on Windows, where flushing a handle that only reads fails."""
    fcntl = pytest.importorskip("fcntl")

    def fsync(fd):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a", "b")
    assert (tmp_path / "a").read_text() == "b"


def test_model_py_alone_refuses_a_rope_type_that_it_does_not_know():
    with pytest.raises(ValueError, match="mrope"):
        tiny(rope_scaling={"rope_type": "mrope", "factor": 2})(tokens_of(1, 3))


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
    assert read_template(str(tmp_path / "t"), None).string == wanted
    assert read_template("Review: {text}\\nVerdict:", None).string == wanted
    assert read_template("question", None) == TEMPLATES["question"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, "rope type 'mrope'"),
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
