"""What several test files use."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import model
import spul
import train
from extras.finetune import save_weights  # noqa: F401 (the test files take it from here)
from fast import FastLlama
from model import Llama
from support import cli
from support.state import run_folder

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
BOTH = pytest.mark.parametrize("kind", [Llama, FastLlama], ids=["plain", "fast"])


# ------------------------------------------------------------------------------------------- models

CONFIG = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# What a config.json of each family may say, and what a forward pass has to tell apart.
SHAPES = {
    "llama MHA": dict(model_type="llama", num_key_value_heads=4),
    "llama GQA": dict(model_type="llama"),
    "llama MQA": dict(model_type="llama", num_key_value_heads=1),
    "llama tied": dict(model_type="llama", tie_word_embeddings=True),
    "llama attention bias": dict(model_type="llama", attention_bias=True),
    "llama MLP bias": dict(model_type="llama", mlp_bias=True),
    "llama head_dim": dict(model_type="llama", head_dim=16),
    "llama linear rope": dict(
        model_type="llama", rope_scaling={"rope_type": "linear", "factor": 2.0}
    ),
    "llama llama3 rope": dict(model_type="llama", rope_scaling=LLAMA3_ROPE, rope_theta=500.0),
    "mistral": dict(model_type="mistral", sliding_window=None, head_dim=8),
    "mistral window": dict(model_type="mistral", sliding_window=7, head_dim=8),
    "qwen2": dict(model_type="qwen2", use_sliding_window=False, sliding_window=5),
    "qwen2 window": dict(
        model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "qwen3 window": dict(
        model_type="qwen3",
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
        head_dim=8,
    ),
    "phi3": dict(model_type="phi3", sliding_window=7),
    "phi3 longrope": dict(
        model_type="phi3",
        partial_rotary_factor=0.75,
        tie_word_embeddings=True,
        sliding_window=2047,
        original_max_position_embeddings=64,
        rope_scaling={
            "rope_type": "longrope",
            "short_factor": [1.0, 1.3, 2.5],
            "long_factor": [2.0, 4.0, 9.0],
        },
    ),
    "smollm3": dict(model_type="smollm3", no_rope_layer_interval=2, tie_word_embeddings=True),
    "smollm3 window": dict(
        model_type="smollm3",
        no_rope_layers=[0, 1, 1],
        use_sliding_window=True,
        sliding_window=6,
        tie_word_embeddings=False,
        mlp_bias=True,
    ),
    "granite": dict(
        model_type="granite",
        embedding_multiplier=1.5,
        attention_multiplier=0.2,
        residual_multiplier=0.6,
        logits_scaling=1.7,
    ),
    "olmo2": dict(model_type="olmo2", rms_norm_eps=1e-5),
    "llama yarn": dict(model_type="llama", rope_scaling=YARN_ROPE),
    "qwen2 yarn": dict(
        model_type="qwen2",
        use_sliding_window=False,
        sliding_window=5,
        rope_scaling=YARN_ROPE | {"attention_factor": 1.3, "beta_fast": 2.0, "truncate": False},
    ),
    "llama dynamic": dict(
        model_type="llama", rope_scaling={"rope_type": "dynamic", "factor": 3.0}
    ),
    "llama longrope": dict(
        model_type="llama",
        rope_scaling={
            "rope_type": "longrope",
            "short_factor": [1.0, 1.2, 1.5, 2.5],
            "long_factor": [2.0, 3.0, 4.0, 9.0],
            "original_max_position_embeddings": 64,
            "factor": 4.0,
        },
    ),
}


def tiny(seed=0, kind=Llama, **changes):
    """A random model of a few thousand weights, large enough in scale for attention to matter.

    changes: of config.json.
    """
    llama = kind(model.Config.from_json({"model_type": "llama", **CONFIG, **changes}))
    torch.manual_seed(seed)  # the same weights for both kinds
    for parameter in llama.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return llama.requires_grad_(False)


def reference(shape, path, dtype=torch.float32):
    """A random model of transformers with every weight off its default, and its folder."""
    import transformers

    settings = {"pad_token_id": None, **CONFIG, **SHAPES[shape]}
    family = model.FAMILIES[settings.pop("model_type")]
    if "rope_scaling" in settings:
        theta = settings.pop("rope_theta", 10000.0)
        settings["rope_parameters"] = settings.pop("rope_scaling") | {"rope_theta": theta}
    torch.manual_seed(1)
    config = getattr(transformers, family + "Config")(**settings, attn_implementation="eager")
    hf = getattr(transformers, family + "ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(mean=0.8, std=0.2)
    hf.save_pretrained(path)
    return hf


def in_two_files(path, out):
    """The weights of a model folder again, in two files and an index."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    out = Path(out)
    out.mkdir(exist_ok=True)
    (out / "config.json").write_bytes((path / "config.json").read_bytes())
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, out / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def tokens_of(B, T, seed=0):
    return torch.randint(3, 2048, (B, T), generator=torch.Generator().manual_seed(seed))


def vectors(p, d=32, seed=0):
    return torch.randn(p, d, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def concatenated(llama, tokens, phi):
    """Final-norm outputs with phi before every row the plain way: as B copies of p embeddings."""
    x = torch.cat([phi.expand(len(tokens), -1, -1), llama.embed_tokens(tokens)], dim=1)
    return llama.run(x)[0][:, len(phi) :]


def kept(llama, work):
    """Bytes that work() keeps for its backward pass, without the weights, and all kept tensors.

    The second is a set of (shape, dtype).
    """
    weights = {p.untyped_storage().data_ptr() for p in llama.parameters()}
    tensors = []

    def note(t):
        tensors.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        work()
    storages = {}
    for t in tensors:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    size = sum(n for where, n in storages.items() if where not in weights)
    return size, {(t.shape, t.dtype) for t in tensors}


# --------------------------------------------------------------------------------------------- rows

WORDS = "red green blue cat dog bird sun moon star tree rock sand".split()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def make_rows(n, labels, seed):
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        words = " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))
        rows.append({"text": f"{seed} {i} {words}", "label": rng.choice(labels)})
    return rows


def tofu_rows(n, start=0):
    rows = []
    for i in range(start, start + n):
        row = {
            "prompt": f"Question: who wrote book {i}?\nAnswer:",
            "completion": f" It was author number {i}.\n",
            "paraphrase": f" Number {i} wrote it.\n",
            "wrong": [f" It was {w} who wrote {i}.\n" for w in ("Bo", "Cy", "Di")],
        }
        rows.append(row)
    return rows


def small_batch(n_f, n_r, seed=0):
    """Examples of random ids: n_f to forget, then n_r to keep."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n_f + n_r):
        rows.append(tuple(rng.randrange(3, 2048) for _ in range(rng.randint(6, 12))))
    return [data.Example(ids, rng.randint(1, 3), "a", i < n_f) for i, ids in enumerate(rows)]


def teacher_of(llama, examples, shift=0):
    """L_kl's teacher for the retain examples, (N_r, d)."""
    retain = [e for e in examples if not e.forget]
    return torch.cat(spul.answer_hidden(llama, retain, shift=shift))


# ----------------------------------------------------------------------------------------- commands


def python(*args, cwd=ROOT, **how):
    args = [sys.executable, *map(str, args)]
    return subprocess.run(args, cwd=cwd, capture_output=True, text=True, **how)


def command(script, *args, cwd=ROOT, **how):
    return python(ROOT / script, *args, cwd=cwd, **how)


def script_of_results(name, monkeypatch):
    """A script of results/ as a module, imported anew with those it imports."""
    monkeypatch.syspath_prepend(ROOT / "results")
    for module in (name, "plans", "store", "tables", "study", "rows", "cut"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(name)


def start(script, *args, stderr=subprocess.DEVNULL):
    """The command as a process that runs beside the test."""
    args = [sys.executable, ROOT / script, *map(str, args)]
    return subprocess.Popen(args, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr, text=True)


def torchrun(n, *args, script="train.py"):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return python("-m", "torch.distributed.run", f"--nproc_per_node={n}", script, *args, env=env)


def call(module, *args):
    """Run a command in this process as `python module.py args` would -> its exit status."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: module.main([str(a) for a in args]))
    return stop.value.code


def interrupted_at(n, function):
    """The function, but its n-th call is Ctrl-C."""
    calls = []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == n:
            raise KeyboardInterrupt
        return function(*given)

    return interrupted


def train_args(folder, files, out, *more, tests=False):
    args = ["--model", folder, "--out", out, "--num-tokens", 4, "--encoder-hidden", 8]
    args += ["--epochs", 2, "--batch-size", 8, "--dtype", "fp32", "--gamma", 0]
    args += ["--rewordings", 0, "--single"]
    args += ["--forget", files["forget"], "--retain", files["retain"]]
    if tests:
        args += ["--test-forget", files["test_forget"], "--test-retain", files["test_retain"]]
    return [*args, *more]


def without(args, option):
    """Arguments of a command without an option and its value."""
    i = args.index(option)
    return args[:i] + args[i + 2 :]


def phi_of(out):
    return load_file(out / "adapter_model.safetensors")["prompt_embeddings"]


def logged(out):
    return lines_of(run_folder(out) / "log.jsonl")


def kill_when(process, log, steps, signum):
    """Send the signal once the log has so many lines -> the exit status."""
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < steps):
        time.sleep(0.005)
    process.send_signal(signum)
    return process.wait()


def stop_at(step, monkeypatch, module=train):
    """The module's training is interrupted once, at that step. -> the list of its steps' calls."""
    rate = module.learning_rate
    calls = []

    def stop(*given):
        calls.append(given)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return rate(*given)

    monkeypatch.setattr(module, "learning_rate", stop)
    return calls
