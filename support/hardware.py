"""Device and dtype, loading a model for a command, int8 weights, and memory in advance.

Letters as in model.py: B rows, T text tokens, p prompt tokens, d width; a linear layer is (out,
in).
"""

import functools
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fast import FastLlama, unknown_fields
from model import SHAPE, Config, Llama, read_weights, rope_kind
from support.configs import as_list, check_config, end_ids
from support.files import check_complete, weight_files
from support.processes import any_process, ranks
from support.templates import turn_end
from support.tokenizer import Tokenizer

BF16_MARGIN = 1.2  # so many times faster than float32 has bf16 to be, to be taken
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# -------------------------------------------------------------------------------- device and dtype


def choose_device(args):
    """The device that --device asks for. Raises ValueError if there is no such device."""
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device).numpy(force=True)  # the device "meta" fails here, too
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"--device {device}: {str(e).splitlines()[0]}") from None
    return device


def choose_dtype(args):
    """The dtype that --dtype asks for; auto takes the faster one, and says so on the screen."""
    if args.dtype != "auto":
        return DTYPES[args.dtype]
    is_bf16, reason = compare_dtypes(choose_device(args))
    if ranks()[1] > 1:  # all processes have to agree
        is_bf16 = any_process(is_bf16 and ranks()[0] == 0, choose_device(args))
    args.dtype = "bf16" if is_bf16 else "fp32"
    if ranks()[0] == 0:
        print(f"dtype    {args.dtype}: {reason} (--dtype chooses)", flush=True)
    return DTYPES[args.dtype]


@functools.lru_cache
def compare_dtypes(device):
    """Whether to compute in bf16 on this device, and the reason in words.

    A processor may have instructions for bf16 and still multiply float32 faster. So on a CPU a
    matrix product in each is timed, for some milliseconds; bf16 has to win clearly.
    """
    if torch.device(device).type == "cuda":
        is_supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return is_supported, f"the GPU {'has' if is_supported else 'does not have'} bf16"
    seconds = time_products()
    ratio = seconds["fp32"] / seconds["bf16"]
    return ratio > BF16_MARGIN, f"here a product in bf16 is {ratio:.1f} times as fast as in fp32"


def time_products(size=1024, rounds=12):
    """{dtype: seconds} of a product of the size of a linear layer's on a batch.

    The dtypes take turns, and the shortest time counts: other programs disturb it the least.
    """
    tensors = {name: torch.ones(size, size, dtype=dtype) for name, dtype in DTYPES.items()}
    times = {name: [] for name in tensors}
    for _ in range(rounds):
        for name, x in tensors.items():
            began = time.perf_counter()
            F.linear(x, x)
            times[name].append(time.perf_counter() - began)
    return {name: min(values[2:]) for name, values in times.items()}  # the first ones warm up


# ----------------------------------------------------------------------------------------- loading


def read_config(folder):
    """The Config of a model folder. Raises ValueError or OSError if this project cannot run it."""
    weight_files(folder)  # the first to say that this is not a model folder
    path = Path(folder) / "config.json"
    check_config(path)
    return Config.from_file(path)


def load_model(args, place=None):
    """The frozen model of --model and its tokenizer, on --device in --dtype.

    Its config ends texts also where the folder's generation_config.json says so, and where the
    model's chat template ends a turn.
    """
    config = read_config(args.model)
    ends = end_ids(args.model, config)
    kind = rope_kind(config.rope_scaling or {})
    if kind in ("dynamic", "longrope") and ranks()[0] == 0:
        print(
            f"rope type {kind}: rows of at most {config.max_position_embeddings} positions, as "
            "beyond its frequencies depend on the length",
            flush=True,
        )
    device = choose_device(args)
    dtype = choose_dtype(args)
    tokenizer = Tokenizer(args.model)
    tokenizer.table = config.vocab_size
    model = load_llama(args.model, dtype, device, args.plain, args.quantize, place)
    known = as_list(ends)
    new = [i for i in turn_end(args.model, tokenizer) if i not in known]
    model.config.eos_token_id = known + new if new else ends
    if tokenizer.size > config.vocab_size:
        raise ValueError(
            f"{args.model}: a tokenizer of {tokenizer.size} ids and a model of {config.vocab_size} "
            "do not belong together"
        )
    return model, tokenizer


def load_llama(folder, dtype, device, plain=False, quantize=None, shard=None):
    """A frozen model from a folder: fast.py's, or model.py's where that is asked for or needed.

    dtype None keeps that of the files. quantize "int8" keeps the layers' weights so. shard: see
    support.processes, for a part of the weights in each process.
    """
    config = read_config(folder)
    if unknown := unknown_fields(config):
        plain = True
        print(f"{folder}: fast.py does not know {', '.join(unknown)}: the plain forward pass runs")
    model = (Llama if plain else FastLlama).on_meta(config)
    if quantize:
        replace_linear(model)
    place = shard(model, dtype, device) if shard else None
    for file in weight_files(folder):
        check_complete(file)
    weights = {}
    for name, tensor in read_weights(folder, config):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{folder}: {name} is {tensor.dtype}: not supported")
        tensor = place(tensor) if place else tensor.to(device, dtype)
        if quantize and name.endswith("_proj.weight"):
            weights |= Int8Linear.pack(name, tensor)
        else:
            weights[name] = tensor
    if not config.tie_word_embeddings and "lm_head.weight" not in weights:
        raise ValueError(
            f"{folder}: no tensor lm_head.weight: if the model's head is its embedding, "
            "config.json needs tie_word_embeddings true"
        )
    try:
        model.load_weights(weights)
    except (RuntimeError, KeyError, ValueError) as e:  # names what is missing, surplus or misshapen
        raise ValueError(f"{folder}: {' '.join(str(e).split())[:400]}") from None
    return model


def check_same_shape(folder, config):
    """Raises ValueError unless the folder holds a model of the config's shape, and a tokenizer."""
    other = read_config(folder)
    for name in SHAPE:
        theirs = getattr(other, name)
        ours = getattr(config, name)
        if theirs != ours:
            raise ValueError(
                f"{folder}: {name} {theirs}, but that of the model is {ours}: not the same model "
                "trained on other rows"
            )
    Tokenizer(folder)


def row_limit(args, p):
    """Tokens that a row may have: --max-length, or what p prompt tokens leave of the model."""
    longest = read_config(args.model).max_position_embeddings
    if longest - p < 2:
        raise ValueError(f"{p} prompt tokens leave no room: the model takes {longest} positions")
    return min(args.max_length, longest - p)


def window_warning(config, p, longest):
    """What to say where the model's window hides p prompt tokens from the end of the longest row.

    longest: its tokens, without the prompt's. None: the end of every row sees the whole prompt.
    """
    windows = [window for window in config.windows if window is not None]
    if not windows or p + longest <= min(windows):
        return None
    window = min(windows)
    return (
        f"the window of {len(windows)} layers is {window} positions: in rows of more than "
        f"{max(0, window - p)} tokens the end does not see the whole prompt; longest row here: "
        f"{longest}"
    )


# ------------------------------------------------------------------------------------ large models


def prepare_layers(model, args):
    """Apply --recompute and --compile to the layers of a model."""
    for layer in model.layers:
        if args.recompute:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if args.compile:
        # Layers differ: with and without a prompt, cache and gradient.
        torch._dynamo.config.recompile_limit = 64
        for layer in model.layers:
            layer.compile(dynamic=True)  # all layers share what is compiled


class Int8Product(torch.autograd.Function):
    """x W' for W = diag(scale) Q, with Q cast where it is used, again in the backward pass.

    Plain F.linear(x, Q.to(x.dtype)) would keep every cast weight until the backward pass is over.
    """

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype)) * scale  # (..., out)

    @staticmethod
    def backward(ctx, g):
        weight, scale = ctx.saved_tensors
        return (g * scale) @ weight.to(g.dtype), None, None  # (..., in)


class Int8Linear(nn.Module):
    """A frozen linear layer in int8, with a scale for each output channel, rounded to nearest."""

    def __init__(self, d_in, d_out, bias=True):
        super().__init__()
        weight = torch.empty(d_out, d_in, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(d_out), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(d_out), requires_grad=False) if bias else None

    def forward(self, x):
        y = Int8Product.apply(x, self.weight, self.scale)  # (..., out)
        return y if self.bias is None else y + self.bias

    @staticmethod
    def pack(name, weight):
        """The tensors that stand for `NAME.weight` (out, in): int8 weight, and scale (out,)."""
        scale = weight.float().abs().amax(dim=1) / 127  # (out,)
        scale = scale.clamp_min(1e-12).to(weight.dtype)  # rounded before it is used
        packed = (weight.float() / scale.float()[:, None]).round_()
        packed = packed.clamp_(-127, 127).to(torch.int8)
        return {name: packed, name.removesuffix("weight") + "scale": scale}


def replace_linear(model):
    """Put an Int8Linear in the place of every linear layer of a model on the meta device."""
    for module in list(model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                has_bias = child.bias is not None
                with torch.device("meta"):
                    packed = Int8Linear(child.in_features, child.out_features, has_bias)
                setattr(module, name, packed)


# ------------------------------------------------------------------------------- memory in advance


def step_memory(model, B, T, p, scored, recompute=False):
    """Bytes that fast.py's training step keeps besides the weights, for B rows of T tokens.

    Per token and layer: the inputs of both norms, the queries, all keys and values, gate and up,
    and on CUDA the attention's output, on a CPU its weights. Frozen linear layers keep nothing of
    their input. With recompute only a layer's input stays, and for one layer at a time the rest.
    Then the logits of `scored` tokens in float32, about five times.
    """
    config = model.config
    d = config.hidden_size
    H = config.num_attention_heads
    G = config.num_key_value_heads
    c = config.head_dim
    S = p + T
    if model.device.type == "cpu":
        attention = H * c + 2 * G * c * S / T + H * S
    else:
        attention = 2 * H * c + 2 * H * c * S / T
    tokens = B * T + p  # the prompt's once
    numbers = tokens * (2 * d + attention + 2 * config.intermediate_size)
    layer = numbers * model.dtype.itemsize
    kept = config.num_hidden_layers * layer
    if recompute:
        kept = config.num_hidden_layers * tokens * d * model.dtype.itemsize + layer
    return round(kept + 5 * 4 * scored * config.vocab_size)


def peak_memory(device):
    """The most bytes that this process has held: on a GPU there, else as the system counts.

    None where the system does not count.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has no such module
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
