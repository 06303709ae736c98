"""A LLaMA-style decoder in plain PyTorch whose text may stand behind a differentiable prefix.

p prompt vectors go through the layers once, and every row of a batch attends to their keys and values. Attention is
causal and the prompt stands in front, so these cannot depend on the text: the result is exactly that of repeating phi
in every row, gradients included, at 1/B of the work; tokens with which every text begins can go the same way.
`Llama.prefix(phi)` keeps them for many calls; in training, where each step has another phi, `hidden(tokens,
front(phi))` computes them in the same matrix products as the text. With `at`, only scored positions go through the last
layer's queries and the head. Left out: dropout, and whatever is no decoder with RoPE, RMSNorm and SwiGLU.

Letters: B rows, T text tokens, p prompt tokens, S keys in sight (p + T), n tokens computed together (B T or p + B T),
d width, H query heads, G key/value heads, c width of a head, V vocabulary, N scored positions, A those of one row.
Conventions: RoPE pairs element i with i + c/2, as Hugging Face files do (Meta's own pair 2i with 2i+1). Text is padded
on the right. Norms, RoPE tables and softmax run in float32; weights and activations in the dtype that was loaded.
Errors a user can cause are ValueError or OSError, with the file in the message.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from files import read_json, read_tensors, weight_files, write_json, write_whole

FAR = 2**30  # the position of a padding key: behind every query, so never in sight
FEW = 256  # keys, up to which a CPU is faster with plain matrix products than with PyTorch's fused attention

# --------------------------------------------------------------------------------------------------- config

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # as transformers names them


@dataclass
class Config:
    """The architecture, under the names of `config.json`. The families differ in these values alone."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # fewer than heads: grouped-query attention
    head_dim: int = None
    model_type: str = "llama"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = None
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int = None
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: tuple = None
    bos_token_id: int = None
    eos_token_id: object = None  # one id or a list of them

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if getattr(self, name) is None and name in ("num_key_value_heads", "head_dim"):
                heads = self.num_attention_heads
                setattr(self, name, heads if name == "num_key_value_heads" else self.hidden_size // heads)
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)!r} is no positive integer")
        for name in ("rms_norm_eps", "rope_theta"):
            if type(getattr(self, name)) not in (int, float) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)!r} is no positive number")
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type {self.model_type!r} is not supported ({', '.join(FAMILIES)} are)")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads, and head_dim even")
        if any(w is not None and (type(w) is not int or w < 1) for w in self.windows):
            raise ValueError(f"sliding_window {self.sliding_window!r} is no positive integer")
        self.inv_freq("cpu")  # refuses rope settings it does not know

    @classmethod
    def from_file(cls, path):
        """Read a `config.json`. Raises ValueError, with the reason, for an architecture this file cannot compute."""
        raw = read_json(path)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5 keeps both in the former
        needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING] + ["model_type"]
        if raw.get("model_type") in ("mistral", "qwen2", "qwen3"):  # their defaults are not those above
            needed += ["num_key_value_heads", "max_position_embeddings", "sliding_window"]
            needed += ["head_dim"] if raw["model_type"] == "qwen3" else []
        missing = [name for name in needed if name not in raw]
        plain = isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values())
        for wrong, reason in [
            (missing, f"no {', '.join(missing)}"),
            (raw.get("hidden_act", "silu") not in ("silu", "swish"), f"hidden_act {raw.get('hidden_act')!r}"),
            (not plain, "the rope settings are no object of numbers"),
            (any(part.get("partial_rotary_factor") not in (None, 1) for part in (raw, rope if plain else {})),
             "partial rotary embedding"),
            (raw.get("rope_interleaved"), "interleaved rotary embedding"),
            (raw.get("num_experts") or raw.get("num_local_experts"), "a mixture of experts"),
            (raw.get("quantization_config"), "quantised weights, not saved in 16 or 32 bit"),
        ]:
            if wrong:
                raise ValueError(f"{path}: {reason}: not supported")
        fields = {f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw}
        theta = rope.get("rope_theta", raw.get("rope_theta", cls.rope_theta))
        try:
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"} or None
            return cls(**{**fields, "rope_theta": theta, "rope_scaling": scaling})
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path}: {e}") from None

    def inv_freq(self, device):
        """Angle per position of each RoPE pair, (c/2,) float32; Llama 3.1's scaling after Meta's reference code."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        freq = 1.0 / self.rope_theta ** (pairs / self.head_dim)  # (c/2,)
        rope = self.rope_scaling or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return freq
        names = ["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"]
        if kind not in ("linear", "llama3"):
            raise ValueError(f"rope type {kind!r} is not supported (default, linear and llama3 are)")
        numbers = [rope.get(name) for name in names[: 1 if kind == "linear" else 4]]
        if any(type(number) not in (int, float) for number in numbers):
            raise ValueError(f"rope type {kind!r} needs numbers for {', '.join(names[: len(numbers)])}")
        if kind == "linear":
            return freq / numbers[0]
        factor, length, low, high = numbers
        turns = length * freq / (2 * math.pi)  # of each pair over the length the model was first trained on
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast pairs stay; 0: slow pairs are stretched
        return freq * keep + freq / factor * (1 - keep)

    @property
    def windows(self):
        """Per layer, how many positions back a query sees (itself included), or None for all."""
        n = self.num_hidden_layers
        if self.model_type == "mistral":
            return [self.sliding_window] * n
        if self.model_type == "llama" or not self.use_sliding_window or self.sliding_window is None:
            return [None] * n
        kinds = self.layer_types or [
            "full_attention" if i < self.max_window_layers else "sliding_attention" for i in range(n)]
        if len(kinds) != n or set(kinds) - {"sliding_attention", "full_attention"}:
            raise ValueError("layer_types must name full_attention or sliding_attention for each layer")
        return [self.sliding_window if kind == "sliding_attention" else None for kind in kinds]


# ---------------------------------------------------------------------------------------------------- layers

def rope_table(inv_freq, positions, dtype):
    """cos and sin of every position's angles, computed in float32: positions (n,) -> two of (n, 1, c/2)."""
    angles = positions[:, None, None].float() * inv_freq  # (n, 1, c/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """RoPE on x (n, heads, c) with cos and sin of `rope_table`."""
    left, right = x.chunk(2, dim=-1)  # (n, heads, c/2) each
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)  # (n, heads, c)


def visible(queries, keys, window, dtype):
    """What is added to the scores, 0 for a key in sight, else -inf: positions (B, T) and (B, S) -> (B, 1, T, S)."""
    back = queries[:, None, :, None] - keys[:, None, None, :]  # (B, 1, T, S), how far back the key stands
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)


def attend(q, k, v, mask):
    """softmax(q k' / sqrt(c) + mask) v: q (B, H, T, c), k and v (B, G, S, c), mask (B, 1, T, S) -> (B, H, T, c)."""
    (B, H, T, c), (G, S) = q.shape, k.shape[1:3]
    if q.device.type == "cpu" and S <= FEW:
        n = H // G * T  # the heads that share keys stand side by side, as if they were more queries
        scores = (q.reshape(B, G, n, c) @ k.transpose(2, 3)).view(B, H, T, S)
        weights = F.softmax(torch.add(mask, scores, alpha=c**-0.5), dim=-1)  # (B, H, T, S), summed in float32
        return (weights.view(B, G, n, S) @ v).view(B, H, T, c)
    k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))  # no CUDA kernel takes both a mask and fewer heads
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class FrozenNorm(torch.autograd.Function):
    """RMSNorm without a gradient of its weight: on a CPU, PyTorch's own backward pass takes twice as long and keeps x
    in float32. With r = 1 / rms(x) and h = g w:  dL/dx = r (h - x r^2 mean(h x))."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        x, h, n = x.float(), g.float().mul_(weight.float()), x.shape[-1]  # (..., d), in float32 from here
        r = torch.rsqrt(torch.linalg.vecdot(x, x)[..., None] / n + ctx.eps)  # (..., 1)
        pull = torch.linalg.vecdot(h, x)[..., None] / n * r * r  # (..., 1)
        return h.addcmul_(x, pull, value=-1).mul_(r).to(g.dtype), None, None


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        if x.device.type == "cpu" and not self.weight.requires_grad:
            return FrozenNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping its two inputs for the backward pass and not silu(gate), which is computed again."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * up, gate), F.silu(gate) * g


class Attention(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        d, c = config.hidden_size, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        o_bias = config.attention_bias and config.model_type in ("llama", "qwen3")
        bias = o_bias or config.model_type == "qwen2"
        self.c = c
        self.q_proj = linear(d, heads * c, bias=bias)
        self.k_proj = linear(d, groups * c, bias=bias)
        self.v_proj = linear(d, groups * c, bias=bias)
        self.o_proj = linear(heads * c, d, bias=o_bias)
        norm = RMSNorm if config.model_type == "qwen3" else nn.Identity
        self.q_norm, self.k_norm = norm(c, config.rms_norm_eps), norm(c, config.rms_norm_eps)

    def forward(self, x, rope, masks, shape, past=None, pick=None):
        """As Layer: x (n, d) -> (n, d) or (B A, d), and all keys and values in sight of the rows, (B, G, S, c) each."""
        (B, T), c = shape, self.c
        p, (asking, turn) = len(x) - B * T, (x, rope) if pick is None else (x[pick], [t[pick] for t in rope])
        q = rotate(self.q_norm(self.q_proj(asking).unflatten(-1, (-1, c))), *turn)  # (n, H, c) or (B A, H, c)
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, (-1, c))), *rope)  # (n, G, c)
        v = self.v_proj(x).unflatten(-1, (-1, c))  # (n, G, c)
        shared, own = zip(*(t.split([p, B * T]) for t in (k, v)))  # (p, G, c) and (B T, G, c) each
        past = [t.transpose(0, 1) for t in shared] if p else past  # (G, p, c)
        k, v = (t.unflatten(0, (B, T)).transpose(1, 2) for t in own)  # (B, G, T, c)
        if past is not None:  # every row sees the same prefix; its gradient is the sum over the rows
            k, v = (torch.cat([front.expand(B, -1, -1, -1), t], dim=2) for front, t in zip(past, (k, v)))
        p = p if pick is None else 0  # what goes on behind the last layer is picked from the rows
        first, q = q.split([p, len(q) - p])  # (p, H, c), and the rows'
        y = attend(q.unflatten(0, (B, -1)).transpose(1, 2), k, v, masks[0]).transpose(1, 2).flatten(0, 1)
        if p:  # the shared tokens see one another
            front = attend(first.transpose(0, 1)[None], past[0][None], past[1][None], masks[1])  # (1, H, p, c)
            y = torch.cat([front[0].transpose(0, 1), y])  # (n, H, c)
        return self.o_proj(y.flatten(1)), (k, v)


class MLP(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        d, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias and config.model_type == "llama"
        self.gate_proj = linear(d, inner, bias=bias)
        self.up_proj = linear(d, inner, bias=bias)
        self.down_proj = linear(inner, d, bias=bias)

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, linear)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, linear)

    def forward(self, x, rope, masks, shape, past=None, pick=None):
        """x (n, d), first p tokens that all rows share (often none), then the rows, shape = (B, T), one below the other
        -> the layer's output (n, d), and all keys and values in sight of the rows, (B, G, S, c) each.

        masks: of the rows (B, 1, T, S), and of the shared tokens (1, 1, p, p).
        past: keys and values that stand in front, (G, p, c) or (1, G, p, c), the same for every row, or (B, G, p, c).
        pick: (B A,), only these tokens go on, A of each row; the output is (B A, d).
        """
        y, kv = self.self_attn(self.input_layernorm(x), rope, masks, shape, past, pick)
        x = (x if pick is None else x[pick]) + y
        return x + self.mlp(self.post_attention_layernorm(x)), kv


# ----------------------------------------------------------------------------------------------------- model
class Llama(nn.Module):
    """The frozen language model. It keeps no state between calls.

    linear: the class of the layers' projections, nn.Linear or what takes its place (`scale.Int8Linear`).
    recompute: whether `hidden` keeps only each layer's input and computes the rest again in the backward pass.
    """

    def __init__(self, config, linear=nn.Linear):
        super().__init__()
        self.config, self.recompute = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, linear) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self):
        return self.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.embed_tokens.weight.dtype

    def forward(self, tokens, prefix=None):
        """tokens (B, T) -> logits (B, T, V), float32; row t predicts token t + 1."""
        return self.head(self.hidden(tokens, prefix))

    def front(self, phi=None, ids=()):
        """What stands in front of every text, (p, d): prompt vectors phi, if any, and the embeddings of ids with which
        all texts begin, which count into p and are then left out of the texts that `hidden` is given."""
        x = self.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))
        return x if phi is None else torch.cat([phi.to(self.dtype), x.expand(*phi.shape[:-2], -1, -1)], dim=-2)

    def prefix(self, phi=None, ids=()):
        """Each layer's keys and values of `front(phi, ids)`, (1, G, p, c); of phi (B, p, d), one a row, (B, ...)."""
        x = self.front(phi, ids)
        positions = torch.arange(x.shape[-2], device=self.device)[None]  # (1, p)
        return self._run(x if x.dim() == 3 else x[None], positions, positions)[1]

    def hidden(self, tokens, prefix=None, at=None):
        """tokens (B, T), padded on the right, or their embeddings (B, T, d) -> final-norm outputs (B, T, d).

        prefix: what `prefix` gave, or, to be computed with the text, what `front` gave, (p, d).
        at: (rows, columns), two (N,) of int64, the positions that *predict*, the prefix not counted: only these are
        computed to the end, and the result is (N, d) in their order.
        """
        front, past = (prefix, None) if torch.is_tensor(prefix) else (None, prefix)
        p = past[0][0].shape[-2] if past else 0 if front is None else len(front)
        keys = torch.arange(p + tokens.shape[1], device=self.device)[None]  # (1, S), positions of prefix and text
        text = keys[:, p:]  # (1, T)
        if front is not None:  # filled up out of sight: CPUs multiply matrices faster whose rows are a multiple of 8
            front = F.pad(front, (0, 0, 0, -(p + len(tokens) * tokens.shape[1]) % 8))
            keys = torch.cat([keys[:, :p], keys.new_full((1, len(front) - p), FAR), text], dim=1)
        if at is None:
            return self._run(tokens, text, keys, past, front=front, keep=False)[0]
        rows, columns = at
        ordered, order = rows.sort(stable=True)
        slots = torch.empty_like(rows)  # (N,), how many of the same row come before it
        slots[order] = torch.arange(len(rows), device=rows.device) - torch.searchsorted(ordered, ordered)
        grid = columns.new_zeros(len(tokens), int(slots.max()) + 1)  # (B, A), each row's columns, filled up with 0
        grid[rows, slots] = columns
        return self._run(tokens, text, keys, past, grid, front, keep=False)[0][rows, slots]

    def head(self, h):
        """Final-norm outputs (..., d) -> logits (..., V), float32."""
        table = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(h, table.weight).float()

    def _run(self, x, queries, keys, past=None, grid=None, front=None, keep=True):
        """All layers. x (B, T, d), or tokens (B, T), at positions queries; past or front, and x, together at positions
        keys: (1, T) and (1, S), or (B, T) and (B, S) where rows differ.

        -> final-norm outputs (B, T, d), or (B, A, d) at the columns grid (B, A), and, if to be kept, each layer's k, v.
        """
        x = x if x.is_floating_point() else self.embed_tokens(x)  # (B, T, d)
        (B, T), p, pick, kv = x.shape[:2], 0 if front is None else len(front), None, []
        x, ahead = torch.cat([x[0, :0] if front is None else front, x.flatten(0, 1)]), keys[0, :p]  # (n, d); (p,)
        positions = torch.cat([ahead, queries.expand(B, -1).flatten()])  # (n,)
        rope, windows = rope_table(self.config.inv_freq(x.device), positions, x.dtype), self.config.windows
        masks = {w: [visible(*at, w, x.dtype) for at in ((queries, keys), (ahead[None],) * 2)] for w in set(windows)}
        for i, (layer, window) in enumerate(zip(self.layers, windows)):
            if grid is not None and i == len(self.layers) - 1:
                pick = (p + T * torch.arange(B, device=x.device)[:, None] + grid).flatten()  # (B A,)
                masks = {window: [visible(queries.expand(B, -1).gather(1, grid), keys, window, x.dtype)]}
            args = (x, rope, masks[window], (B, T), past and past[i], pick)
            x, in_sight = checkpoint(layer, *args, use_reentrant=False) if self.recompute and not keep else layer(*args)
            kv += [in_sight] * keep
        return self.norm(x if pick is not None else x[p:]).unflatten(0, (B, -1)), kv

    @torch.no_grad()
    def generate(self, tokens, lengths, prefix=None, max_new_tokens=32, temperature=0.0, generator=None):
        """Continue each row of tokens (B, T), or embeddings, whose first lengths (B,) count -> B lists of new ids.

        A row ends before the first end-of-sequence id of the config. temperature 0 takes the likeliest token.
        """
        (B, T), p = tokens.shape[:2], prefix[0][0].shape[-2] if prefix else 0
        keys = torch.arange(p + T, device=self.device)[None]  # (1, S)
        x, kv = self._run(tokens, keys[:, p:], keys, prefix, (lengths - 1)[:, None])  # (B, 1, d)
        keys = torch.where(keys < p + lengths[:, None], keys, FAR)  # (B, S), padding out of sight
        new, done, ends = [], torch.zeros(B, dtype=torch.bool, device=self.device), self.config.eos_token_id
        ends = torch.tensor([ends] if isinstance(ends, int) else ends or [], dtype=torch.long, device=self.device)
        for step in range(max_new_tokens):
            logits = self.head(x[:, -1])  # (B, V)
            if logits.isnan().any():
                raise FloatingPointError("the model's output is not a number: its weights are broken")
            if temperature > 0:
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)  # (B, 1)
            else:
                token = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            new.append(token)
            done |= torch.isin(token[:, 0], ends)
            if step == max_new_tokens - 1 or done.all():
                break
            position = p + lengths[:, None] + step  # (B, 1)
            keys = torch.cat([keys, position], dim=1)
            x, kv = self._run(token, position, keys, kv)
        new = torch.cat([lengths[:, None][:, :0], *new], dim=1)  # (B, steps)
        lasts = (torch.isin(new, ends).cumsum(dim=1) == 0).sum(dim=1)  # (B,), tokens before the first end
        return [row[:n] for row, n in zip(new.tolist(), lasts.tolist())]

    # -------------------------------------------------------------------------------------------- load and save

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", linear=nn.Linear, shard=None):
        """Load a Hugging Face folder: config.json and one or many safetensors files, every weight frozen.

        Tensors are mapped and moved one by one: memory holds the weights once, or, if neither dtype nor device changes,
        only as the mapped file. linear: see the class. shard: `scale.shard`, for a part of the weights in each process.
        """
        path, files = Path(path), weight_files(path)
        config = Config.from_file(path / "config.json")
        with torch.device("meta"):
            model = cls(config, linear).requires_grad_(False)
        place, pack = shard(model, dtype, device) if shard else None, getattr(linear, "pack", None)
        loaded = {}
        for file in files:
            for name, tensor in read_tensors(file):
                name, tensor = name.removeprefix("model."), place(tensor) if place else tensor.to(device, dtype)
                loaded |= pack(name, tensor) if pack and name.endswith("_proj.weight") else {name: tensor}
        if config.tie_word_embeddings and "lm_head.weight" in loaded:
            if not torch.equal(loaded.pop("lm_head.weight"), loaded.get("embed_tokens.weight", torch.empty(0))):
                raise ValueError(f"{path}: lm_head.weight differs from the embedding though config.json ties them")
        try:
            model.load_state_dict(loaded, assign=True)
        except RuntimeError as e:  # names every tensor that is missing, surplus or of another shape
            raise ValueError(f"{path}: {' '.join(str(e).split())[:400]}") from None
        return model

    def save_pretrained(self, path):
        """Write config.json and model.safetensors, as transformers reads them; the config, which completes it, last."""
        (path := Path(path)).mkdir(parents=True, exist_ok=True)
        tensors = {name if name == "lm_head.weight" else f"model.{name}": t.detach().contiguous()
                   for name, t in self.named_parameters()}
        write_whole(path / "model.safetensors", lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
        write_json(path / "config.json", {"architectures": [f"{FAMILIES[self.config.model_type]}ForCausalLM"],
                                          "hidden_act": "silu", "torch_dtype": str(self.dtype).removeprefix("torch."),
                                          **dataclasses.asdict(self.config)})
