"""What the families other than Llama's nearest have of their own: names, files, positions.

Their logits and gradients are compared in test_spul.py, over all of SHAPES.
"""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fast
from extras import finetune
from fast import FastLlama
from model import Config, Llama, inverse_frequencies, read_weights
from support.configs import check_config
from support.hardware import load_llama
from tests.helpers import BOTH, CONFIG, DEMO, ROOT, SHAPES, call, in_two_files, python, reference
from tests.helpers import save_weights, tiny, tokens_of, vectors, write_rows

NEW = [name for name in SHAPES if name.split()[0] in ("phi3", "smollm3", "granite", "olmo2")]

# config.json of models on the hub, without what no one here reads.
HUB = {
    "Phi-3-mini-4k": dict(
        model_type="phi3", hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32064, rms_norm_eps=1e-5,
        max_position_embeddings=4096, original_max_position_embeddings=4096, rope_theta=10000.0,
        rope_scaling=None, sliding_window=2047, hidden_act="silu", attention_bias=False,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=32000,
    ),
    "Phi-3.5-mini": dict(
        model_type="phi3", hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32064, rms_norm_eps=1e-5,
        max_position_embeddings=131072, original_max_position_embeddings=4096, rope_theta=10000.0,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48},
        sliding_window=262144, tie_word_embeddings=False, bos_token_id=1, eos_token_id=32000,
    ),
    "Phi-4": dict(
        model_type="phi3", hidden_size=5120, intermediate_size=17920, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=10, vocab_size=100352, rms_norm_eps=1e-5,
        max_position_embeddings=16384, original_max_position_embeddings=16384, rope_theta=250000,
        rope_scaling=None, sliding_window=None, bos_token_id=100257, eos_token_id=100265,
    ),
    "Phi-4-mini": dict(
        model_type="phi3", hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
        num_attention_heads=24, num_key_value_heads=8, vocab_size=200064, rms_norm_eps=1e-5,
        max_position_embeddings=131072, original_max_position_embeddings=4096, rope_theta=10000.0,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48},
        partial_rotary_factor=0.75, sliding_window=262144, tie_word_embeddings=True,
        bos_token_id=199999, eos_token_id=199999,
    ),
    "SmolLM3-3B": dict(
        model_type="smollm3", hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=4, vocab_size=128256, rms_norm_eps=1e-6,
        max_position_embeddings=65536, rope_theta=5000000.0, rope_scaling=None,
        no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, sliding_window=None,
        use_sliding_window=False, layer_types=["full_attention"] * 36, eos_token_id=128012,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_the_configs_of_known_models_are_taken_and_run_fast(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB[name]))
    check_config(tmp_path / "config.json")
    config = Config.from_file(tmp_path / "config.json")
    assert fast.unknown_fields(config) == []
    assert config.tie_word_embeddings == (name in ("Phi-4-mini", "SmolLM3-3B"))
    longest = HUB[name].get("original_max_position_embeddings", 65536)
    assert config.max_position_embeddings == longest
    contents = config.to_json(torch.bfloat16)
    assert contents["max_position_embeddings"] == HUB[name]["max_position_embeddings"]
    angles, _ = inverse_frequencies(config)
    assert len(angles) == {"Phi-4": 64, "SmolLM3-3B": 64}.get(name, 48)


def test_smollm3_has_no_rope_in_every_fourth_layer_unless_the_config_says_otherwise():
    raw = {**CONFIG, "model_type": "smollm3", "num_hidden_layers": 5}
    assert Config.from_json(raw).uses_rope == [True, True, True, False, True]
    raw["no_rope_layers"] = [0, 1, 1, 1, 0, 1]
    assert Config.from_json(raw).uses_rope == [False, True, True, True, False]
    assert Config.from_json({**raw, "model_type": "llama"}).uses_rope == [True] * 5
    raw |= {"use_sliding_window": True, "sliding_window": 6}  # there where no RoPE is
    assert Config.from_json(raw).windows == [6, None, None, None, 6]


@BOTH
@pytest.mark.parametrize("shape", NEW)
def test_generation_with_a_prompt_is_that_of_transformers(kind, shape, tmp_path):
    hf = reference(shape, tmp_path)
    llama = kind.from_pretrained(tmp_path)
    llama.config.eos_token_id = None
    tokens = tokens_of(2, 9)
    phi = vectors(4).detach()
    ours = llama.generate(tokens.tolist(), llama.prefix(phi), 8)
    prompt = phi.expand(2, -1, -1)
    for _ in range(8):
        x = torch.cat([prompt, hf.get_input_embeddings()(tokens)], dim=1)
        with torch.no_grad():
            new = hf(inputs_embeds=x).logits[:, -1:].argmax(dim=-1)
        tokens = torch.cat([tokens, new], dim=1)
    assert ours == tokens[:, 9:].tolist()


@BOTH
@pytest.mark.parametrize("shape", NEW)
def test_embeddings_of_the_text_may_take_the_place_of_its_tokens(kind, shape):
    llama = tiny(kind=kind, **SHAPES[shape])
    tokens = tokens_of(2, 9)
    phi = vectors(4)
    expected = llama.prompted(tokens, phi)
    torch.testing.assert_close(llama.prompted(llama.embed(tokens), phi), expected)
    torch.testing.assert_close(llama.hidden(tokens, llama.prefix(phi)), expected)


def test_peft_computes_the_same_with_a_prompt_of_granite(tmp_path):
    peft = pytest.importorskip("peft")
    hf = reference("granite", tmp_path)
    llama = FastLlama.from_pretrained(tmp_path)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(hf, settings)
    phi = model.get_prompt(1)[0].detach()
    tokens = tokens_of(2, 9)
    with torch.no_grad():
        theirs = model(tokens).logits[:, 4:]
    torch.testing.assert_close(llama(tokens, llama.prefix(phi)), theirs, atol=1e-4, rtol=0)


def test_the_older_names_of_phi3s_rope_mean_the_same(tmp_path):
    raw = {**CONFIG, **SHAPES["phi3 longrope"]}
    new = Config.from_json(raw)
    for kind in ("su", "yarn"):
        scaling = {**raw["rope_scaling"], "type": kind}
        del scaling["rope_type"]
        old = Config.from_json({**raw, "rope_scaling": scaling})
        assert inverse_frequencies(old)[1] == inverse_frequencies(new)[1]
        assert torch.equal(inverse_frequencies(old)[0], inverse_frequencies(new)[0])


# ------------------------------------------------------------------------------------ fused weights


@pytest.fixture
def phi3(tmp_path):
    """A folder of transformers, with the demo's tokenizer."""
    reference("phi3", tmp_path / "phi3")
    shutil.copy(DEMO / "model" / "tokenizer.model", tmp_path / "phi3")
    return tmp_path / "phi3"


def test_the_parts_of_a_fused_matrix_are_views_of_the_mapped_file(phi3):
    config = Config.from_file(phi3 / "config.json")
    tensors = dict(read_weights(phi3, config))
    parts = [tensors[f"layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
    whole = load_file(phi3 / "model.safetensors")["model.layers.0.self_attn.qkv_proj.weight"]
    assert torch.equal(torch.cat(parts), whole)
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


def test_a_phi3_in_several_files_and_with_int8_weights_loads(phi3, tmp_path):
    tokens = tokens_of(2, 9)
    whole = load_llama(phi3, torch.float32, "cpu")
    assert type(whole) is FastLlama
    parts = load_llama(in_two_files(phi3, tmp_path / "two"), torch.float32, "cpu")
    assert torch.equal(parts(tokens), whole(tokens))
    rounded = load_llama(phi3, torch.float32, "cpu", quantize="int8")
    assert rounded.layers[0].self_attn.q_proj.weight.dtype == torch.int8
    assert rounded.layers[0].mlp.gate_proj.weight.dtype == torch.int8
    error = (rounded(tokens) - whole(tokens)).norm() / whole(tokens).norm()
    assert 0 < error < 0.1


SHARDED = """
import sys

import torch

from support.hardware import load_llama
from support.processes import join_group, leave_group, ranks, shard

join_group("cpu")
llama = load_llama(sys.argv[1], torch.float32, "cpu", shard=shard)
logits = llama.head(llama.prompted(torch.arange(3, 15)[None], torch.ones(4, 32)))
if ranks()[0] == 0:
    torch.save(logits, sys.argv[2])
leave_group()
"""


@pytest.mark.parametrize("shape", ["phi3", "phi3 longrope", "smollm3"])
def test_a_model_in_shards_computes_what_a_whole_one_does(shape, tmp_path):
    """The second and the third tie head and embedding; the first two have fused weights."""
    reference(shape, tmp_path / "m")
    (tmp_path / "run.py").write_text(SHARDED)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = [tmp_path / "run.py", tmp_path / "m", tmp_path / "logits"]
    python("-m", "torch.distributed.run", "--nproc_per_node=2", *script, env=env, check=True)
    llama = FastLlama.from_pretrained(tmp_path / "m")
    expected = llama.head(llama.prompted(torch.arange(3, 15)[None], torch.ones(4, 32)))
    logits = torch.load(tmp_path / "logits", weights_only=True)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_a_fused_matrix_of_another_height_is_named(phi3):
    tensors = load_file(phi3 / "model.safetensors")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    tensors[name] = torch.cat([tensors[name], torch.zeros(3, 32)])
    save_file(tensors, phi3 / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"size mismatch for layers\.0\.self_attn\.v_proj"):
        load_llama(phi3, torch.float32, "cpu")


def test_a_saved_phi3_has_the_files_of_the_one_it_was_loaded_from(phi3, tmp_path):
    save_weights(Llama.from_pretrained(phi3), tmp_path / "again")
    theirs = load_file(phi3 / "model.safetensors")
    ours = load_file(tmp_path / "again" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_transformers_loads_the_phi3_that_finetune_makes(phi3, tmp_path, capsys):
    import transformers

    (phi3 / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (phi3 / "chat_template.jinja").write_text("{{ messages }}")
    (phi3 / "added_tokens.json").write_text("{}")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "b"}] * 4)
    out = tmp_path / "out"
    args = ["--model", phi3, "--data", rows, "--out", out, "--epochs", 1, "--rank", 2]
    assert call(finetune, *args, "--dtype", "fp32") == 0, capsys.readouterr().err
    for name in ("generation_config.json", "chat_template.jinja", "added_tokens.json"):
        assert (out / name).read_bytes() == (phi3 / name).read_bytes()
    assert (out / "tokenizer.model").exists()
    hf = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = tokens_of(2, 9)
    with torch.no_grad():
        ours = Llama.from_pretrained(out)(tokens)
        torch.testing.assert_close(hf(tokens).logits, ours, atol=1e-4, rtol=0)
        base = Llama.from_pretrained(phi3)(tokens)
    assert not torch.allclose(ours, base, atol=1e-3)
