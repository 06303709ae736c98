"""A LLaMA-style decoder in plain PyTorch, with room for a soft prompt before the text.

The parts, in order of reading:

    Config      the sizes, and what the model families differ in, as plain fields
    Attention   grouped queries, rotary embedding; earlier keys and values may come first
    MLP, Layer  SwiGLU, and one block
    Llama       embed, run (the loop over the layers), prefix, hidden, head, generate, load

The prompt comes first and attention is causal, so the prompt's keys and values do not depend on the
text. `Llama.prefix` computes them once, and every row of a batch attends to them: outputs and
gradients are the same as with the prompt's vectors concatenated to every row.

This file works alone, with torch and safetensors: copy it into another project. fast.py computes
the same faster. A new family needs an entry in FAMILIES, fields in Config, from_json and to_json,
what the modules make of them, and the fields' names in fast.py.

Letters, used in every shape note:

    B rows        T tokens of x        p tokens before it   S = p + T keys
    d width       H query heads        G key/value heads    c width of a head      V vocabulary
    r elements of a head that RoPE turns, c but for Phi-4-mini

past: keys and values of all earlier tokens. prefix: those of the prompt, and of the tokens with
which all texts begin. cache: past and this call's.

Conventions: RoPE pairs element i with i + c/2, as Hugging Face files do (Meta's: 2i with 2i + 1).
Text is padded on the right. Norms and rotary angles are computed in float32, all else in the dtype
of the weights. There is no dropout.
"""

import json
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
FAMILIES |= {"phi3": "Phi3", "smollm3": "SmolLM3", "granite": "Granite", "olmo2": "Olmo2"}

# Keys of config.json that change the computation. A family has those of OWN_KEYS; in all other
# cases this file does not implement them.
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier")
MULTIPLIERS += ("logits_scaling",)
OWN_KEYS = {"phi3": ("partial_rotary_factor",), "granite": MULTIPLIERS}
UNSUPPORTED = ("rope_interleaved", "num_experts", "num_local_experts", "quantization_config")
UNSUPPORTED += ("partial_rotary_factor", *MULTIPLIERS)

# The sizes: what two models of the same shape agree in.
SHAPE = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
SHAPE += ["num_attention_heads", "num_key_value_heads", "head_dim"]

# Weights that Phi-3's files hold as one matrix, and the layers here that share its rows.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

# Padding keys get this position. It is later than any query, so the causal mask hides them.
PADDING_POSITION = 2**30


# ------------------------------------------------------------------------------------------ config


@dataclass
class Config:
    """What the forward pass needs to know, under the names of `config.json` where it has them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # fewer than query heads: grouped-query attention
    head_dim: int = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = None
    max_position_embeddings: int = 2048  # the longest row, with its prompt
    tie_word_embeddings: bool = False
    bos_token_id: int = None
    eos_token_id: object = None  # one id, or a list of ids

    # What the families differ in. The modules below read these fields and never a family's name.
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = None  # RMSNorm on queries and keys: "head", of each head; "all", of all as one
    norm_after: bool = False  # RMSNorm after attention and MLP, not before them
    windows: list = None  # of each layer: how many positions a query sees; None: all
    uses_rope: list = None  # of each layer
    partial_rotary_factor: float = 1.0  # the part of each head that RoPE turns
    embedding_multiplier: float = 1.0  # of token embeddings and of phi
    attention_multiplier: float = None  # of the scores; None: 1 / sqrt(head_dim)
    residual_multiplier: float = 1.0  # of what a layer adds
    logits_scaling: float = 1.0  # the divisor of the logits

    model_type: str = "llama"  # only to read and write config.json
    stretched_positions: int = None  # longrope: max_position_embeddings of config.json

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.windows is None:
            self.windows = [None] * self.num_hidden_layers
        if self.uses_rope is None:
            self.uses_rope = [True] * self.num_hidden_layers

    @classmethod
    def from_file(cls, path):
        """Read a `config.json`. Raises ValueError for a model that this file cannot compute."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None

    @classmethod
    def from_json(cls, raw):
        """The contents of a `config.json` -> Config. All that is special to a family is here.

        Keys that are missing get the defaults of this class, not those of transformers.
        """
        family = raw.get("model_type")
        if family not in FAMILIES:
            names = ", ".join(FAMILIES)
            raise ValueError(f"model_type {family!r} is not supported ({names} are)")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        for key in UNSUPPORTED:
            value = raw.get(key, rope.get(key))
            if value not in (None, False, 0, 1.0) and key not in OWN_KEYS.get(family, ()):
                raise ValueError(f"{key} {value!r} is not supported")
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported (silu is)")

        values = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"no {', '.join(missing)}")
        has_bias = bool(raw.get("attention_bias"))
        has_mlp_bias = bool(raw.get("mlp_bias"))
        values["o_bias"] = has_bias and family not in ("mistral", "qwen2", "phi3")
        values["qkv_bias"] = values["o_bias"] or family == "qwen2"
        values["mlp_bias"] = has_mlp_bias and family in ("llama", "smollm3", "granite")
        values["qk_norm"] = {"qwen3": "head", "olmo2": "all"}.get(family)
        values["norm_after"] = family == "olmo2"
        if family == "smollm3":
            values["uses_rope"] = rope_layers_from_json(raw)
            values.setdefault("tie_word_embeddings", True)
        values["windows"] = windows_from_json(raw, values.get("uses_rope"))
        values |= rope_from_json(raw)
        config = cls(**values)
        inverse_frequencies(config)  # raises ValueError for a kind of scaling it does not know
        return config

    def to_json(self, dtype):
        """The contents of a `config.json` that `from_json` and transformers read."""
        window = max((w for w in self.windows if w is not None), default=None)
        layer_types = None
        if window is not None and self.model_type not in ("mistral", "phi3"):
            names = {None: "full_attention", window: "sliding_attention"}
            layer_types = [names[w] for w in self.windows]
        raw = {
            "architectures": [f"{FAMILIES[self.model_type]}ForCausalLM"],
            "hidden_act": "silu",
            "torch_dtype": str(dtype).removeprefix("torch."),
            **{name: getattr(self, name) for name in SHAPE},
            "model_type": self.model_type,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "max_position_embeddings": self.stretched_positions or self.max_position_embeddings,
            "attention_bias": self.o_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "sliding_window": window,
            "use_sliding_window": layer_types is not None,
            "max_window_layers": 28,  # transformers' default; layer_types decides
            "layer_types": layer_types,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
        }
        if self.model_type == "mistral":
            del raw["layer_types"]  # transformers takes a Mistral that has it for another family
        if self.model_type in ("phi3", "smollm3"):
            raw["pad_token_id"] = None  # transformers' default may be beyond the vocabulary
        if self.model_type == "smollm3":
            raw["no_rope_layers"] = [int(flag) for flag in self.uses_rope]
        for name in OWN_KEYS.get(self.model_type, ()):
            raw[name] = getattr(self, name)
        if self.model_type == "phi3" and self.stretched_positions:  # it has a default there
            raw[ORIGINAL] = self.rope_scaling[ORIGINAL]
        return raw


def rope_layers_from_json(raw):
    """A SmolLM3's `config.json` -> of each layer, whether it has RoPE."""
    n = raw["num_hidden_layers"]
    flags = raw.get("no_rope_layers")  # in spite of its name, 1 stands for a layer with RoPE
    if flags is None:
        flags = [(i + 1) % raw.get("no_rope_layer_interval", 4) for i in range(n)]
    return [bool(flag) for flag in flags[:n]]


def windows_from_json(raw, uses_rope):
    """A `config.json` -> of each layer, how many positions a query sees, itself included."""
    n = raw["num_hidden_layers"]
    window = raw.get("sliding_window")
    family = raw["model_type"]
    if family in ("mistral", "phi3"):
        return [window] * n
    if family in ("llama", "granite", "olmo2") or not raw.get("use_sliding_window"):
        return [None] * n
    layer_types = raw.get("layer_types")
    if layer_types is None:
        is_full = uses_rope or [i < raw.get("max_window_layers", 28) for i in range(n)]
        layer_types = ["full_attention" if full else "sliding_attention" for full in is_full]
    return [window if kind == "sliding_attention" else None for kind in layer_types]


def rope_from_json(raw):
    """A `config.json` -> the fields of Config about RoPE."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    # transformers 5 keeps theta and all else together in rope_parameters
    rope = {"rope_theta": raw.get("rope_theta", Config.rope_theta), **rope}
    values = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope or None}
    part = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor")
    values["partial_rotary_factor"] = part or 1.0
    if raw["model_type"] == "phi3" and rope_kind(rope) in ("su", "yarn"):  # its earlier names
        rope["rope_type"] = "longrope"
    if rope_kind(rope) in ("llama3", "yarn", "longrope"):
        longest = raw.get("max_position_embeddings", Config.max_position_embeddings)
        rope[ORIGINAL] = raw.get(ORIGINAL) or rope.get(ORIGINAL) or longest
        if rope_kind(rope) == "longrope":
            values["stretched_positions"] = longest
            values["max_position_embeddings"] = min(longest, rope[ORIGINAL])
    return values


# ------------------------------------------------------------------------------------------ rotary

ORIGINAL = "original_max_position_embeddings"
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope_kind(scaling):
    return scaling.get("rope_type", scaling.get("type", "default"))


def inverse_frequencies(config, device="cpu"):
    """The angle per position of each RoPE pair, (r/2,) float32, and a factor for cos and sin.

    llama3 is Llama 3.1's scaling, as in Meta's reference code; yarn that of Peng et al., arXiv
    2309.00071; longrope that of Ding et al., arXiv 2402.13753. With longrope and dynamic, rows
    longer than the model was first trained on have other frequencies. But here the prompt's keys,
    computed once, serve rows of every length. So only shorter rows are computed as they should be,
    and max_position_embeddings ends there.

    Raises ValueError for any other kind of scaling.
    """
    r = int(config.head_dim * config.partial_rotary_factor)
    pairs = torch.arange(0, r, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / config.rope_theta ** (pairs / r)  # (r/2,)
    scaling = config.rope_scaling or {}
    kind = rope_kind(scaling)
    scale = scaling.get("attention_factor")
    if kind in ("default", "dynamic"):
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / scaling["factor"], 1.0
    if kind == "longrope":
        if scale is None:
            factor = scaling.get("factor") or config.stretched_positions / scaling[ORIGINAL]
            scale = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(scaling[ORIGINAL]))
        return frequencies / torch.tensor(scaling["short_factor"], device=device), scale
    if kind == "llama3":
        # Turns that each pair makes within the length the model was first trained on.
        turns = scaling[ORIGINAL] * frequencies / (2 * math.pi)
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        keep = (turns - low) / (high - low)
        scale = 1.0
    elif kind == "yarn":
        if scaling.get("mscale_all_dim"):
            raise ValueError("rope type 'yarn' with mscale_all_dim is not supported")
        low, high = yarn_bounds(config, r)
        keep = 1 - (pairs / 2 - low) / (high - low or 0.001)
        scale = scale or 0.1 * math.log(max(scaling["factor"], 1.0)) + 1
    else:
        raise ValueError(f"rope type {kind!r} is not supported ({', '.join(ROPE_TYPES)} are)")
    keep = keep.clamp(0, 1)  # 1: fast pairs stay; 0: slow pairs stretch
    return frequencies * keep + frequencies / scaling["factor"] * (1 - keep), scale


def yarn_bounds(config, r):
    """The last pair that stays as it is, and the first that stretches fully; both may be between.

    They are those that make beta_fast and beta_slow turns within the original length.
    """
    scaling = config.rope_scaling
    length = scaling[ORIGINAL] / (2 * math.pi)
    pairs = r / (2 * math.log(config.rope_theta))
    low = pairs * math.log(length / (scaling.get("beta_fast") or 32))
    high = pairs * math.log(length / (scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    return max(low, 0), min(high, r - 1)


def rotate(x, cos, sin):
    """RoPE on the first r elements of x (..., c), with cos and sin (..., r/2); no RoPE for None."""
    if cos is None:
        return x
    half = cos.shape[-1]
    left, right, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)  # rest: (..., c - r)
    return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], dim=-1)  # (..., c)


# ------------------------------------------------------------------------------------------ layers


class NormOfAll(nn.RMSNorm):
    """RMSNorm of all heads as one: x (..., heads, c) -> the same shape."""

    def forward(self, x):
        return super().forward(x.flatten(-2)).view(x.shape)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        c = config.head_dim
        H = config.num_attention_heads
        G = config.num_key_value_heads
        self.head_dim = c
        self.scale = config.attention_multiplier
        self.q_proj = nn.Linear(d, H * c, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, G * c, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, G * c, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * c, d, bias=config.o_bias)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm == "head":
            self.q_norm = nn.RMSNorm(c, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(c, config.rms_norm_eps)
        if config.qk_norm == "all":
            self.q_norm = NormOfAll(H * c, config.rms_norm_eps)
            self.k_norm = NormOfAll(G * c, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, past=None):
        """x (B, T, d) -> (B, T, d), and keys and values of all tokens so far, (B, G, S, c) each.

        cos, sin: (1 or B, 1, T, r/2), or None: no RoPE. mask: (1 or B, 1, T, S), True where a query
        sees a key.
        past: keys and values of the tokens before x, (1 or B, G, p, c) each. The prompt's serve all
        rows; its gradient is then the sum over the rows.
        """
        B, T, d = x.shape
        c = self.head_dim
        q = self.q_norm(self.q_proj(x).view(B, T, -1, c)).transpose(1, 2)  # (B, H, T, c)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, c)).transpose(1, 2)  # (B, G, T, c)
        v = self.v_proj(x).view(B, T, -1, c).transpose(1, 2)  # (B, G, T, c)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if past is not None:
            past_k, past_v = past
            k = torch.cat([past_k.expand(B, -1, -1, -1), k], dim=2)  # (B, G, S, c)
            v = torch.cat([past_v.expand(B, -1, -1, -1), v], dim=2)  # (B, G, S, c)
        y = self.attend(q, k, v, mask)  # (B, H, T, c)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H c)
        return self.o_proj(y), (k, v)

    def attend(self, q, k, v, mask):
        """softmax(scale q k') v, each key head serving H/G query heads -> (B, H, T, c).

        scale None: 1 / sqrt(c).
        """
        return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, enable_gqa=True)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.gate_proj = nn.Linear(d, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(d, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, d, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, d)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_after = config.norm_after
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        if config.norm_after:
            self.input_layernorm = nn.Identity()
            self.post_feedforward_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, past=None):
        """x (B, T, d) -> (B, T, d), and keys and values. The arguments are those of Attention."""
        y, kv = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        return self.add(x, y), kv

    def add(self, x, y):
        """The layer's input x and its attention's output y (..., d) -> its output (..., d)."""
        if self.norm_after:
            x = x + self.post_attention_layernorm(y)
            return x + self.post_feedforward_layernorm(self.mlp(x))
        x = torch.add(x, y, alpha=self.residual_multiplier)
        y = self.mlp(self.post_attention_layernorm(x))
        return torch.add(x, y, alpha=self.residual_multiplier)


# ------------------------------------------------------------------------------------------- model


class Llama(nn.Module):
    """The language model. It keeps no state between calls: keys and values are passed by hand."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self):
        return self.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.embed_tokens.weight.dtype

    def forward(self, tokens, prefix=None):
        """tokens (B, T) -> logits (B, T, V), float32. Position t predicts token t + 1."""
        return self.head(self.hidden(tokens, prefix))

    def embed(self, tokens):
        """tokens (B, T) -> their embeddings (B, T, d). phi is in their place."""
        return self.embed_tokens(tokens)

    def run(self, x, past=None, positions=None, key_positions=None):
        """All layers, for embeddings x (B, T, d) of tokens that come after `past`.

        past: for each layer the keys and values of what comes before, (1 or B, G, p, c) each.
        positions, key_positions: of each token of x, (1 or B, T), and of each key, past first,
        (1 or B, S). By default 0, 1, 2, ... in the order of the keys.

        Returns final-norm outputs (B, T, d), and for each layer all keys and values (B, G, S, c).
        """
        if positions is None:
            p = past[0][0].shape[2] if past else 0
            key_positions = torch.arange(p + x.shape[1], device=x.device)[None]  # (1, S)
            positions = key_positions[:, p:]  # (1, T)
        x = x * self.config.embedding_multiplier
        angles = {True: self.rotary(positions), False: (None, None)}
        masks = {w: self.mask(positions, key_positions, w) for w in set(self.config.windows)}
        cache = []
        for i, layer in enumerate(self.layers):
            cos, sin = angles[self.config.uses_rope[i]]
            mask = masks[self.config.windows[i]]
            x, kv = layer(x, cos, sin, mask, past[i] if past else None)
            cache.append(kv)
        return self.norm(x), cache

    def rotary(self, positions):
        """positions (B, T) -> cos and sin of each token's angles, (B, 1, T, r/2) each."""
        inv_freq, factor = inverse_frequencies(self.config, positions.device)
        angles = positions[:, None, :, None] * inv_freq  # (B, 1, T, r/2), float32
        cos = angles.cos() * factor
        sin = angles.sin() * factor
        return cos.to(self.dtype), sin.to(self.dtype)

    def mask(self, positions, key_positions, window):
        """(B, T) and (B, S) -> (B, 1, T, S), True where a query may look.

        It sees itself and what comes before, no further back than the window, if there is one.
        """
        distance = positions[:, None, :, None] - key_positions[:, None, None, :]  # (B, 1, T, S)
        if window is None:
            return distance >= 0
        return (distance >= 0) & (distance < window)

    # ---------------------------------------------------------------------------------- the prompt

    def prompt_embeddings(self, phi=None, shared_ids=()):
        """What comes before every text, (1 or B, p, d): the prompt phi, then ids all texts share.

        phi: (p, d), or (B, p, d) for a prompt of each row's own. shared_ids count into p: leave
        them out of the tokens that come after.
        """
        ids = torch.tensor([shared_ids], dtype=torch.long, device=self.device)
        x = self.embed(ids)  # (1, len(shared_ids), d)
        if phi is None:
            return x
        if phi.dim() == 2:
            phi = phi[None]  # (1, p, d)
        return torch.cat([phi.to(x.dtype), x.expand(len(phi), -1, -1)], dim=1)

    def prefix(self, phi=None, shared_ids=()):
        """Each layer's keys and values of the prompt, (1 or B, G, p, c) each; None if p is 0.

        The arguments are those of `prompt_embeddings`. Nothing here depends on the texts, so one
        computation serves every row, and after training every query.
        """
        x = self.prompt_embeddings(phi, shared_ids)  # (1 or B, p, d)
        if x.shape[1] == 0:
            return None
        return self.run(x)[1]

    def hidden(self, tokens, prefix=None):
        """tokens (B, T) -> final-norm outputs (B, T, d), after the prompt if `prefix` is given."""
        return self.run(self.embed(tokens), prefix)[0]

    def prompted(self, tokens, phi=None, shared_ids=(), general=None, lengths=None):
        """tokens (B, T), or their embeddings (B, T, d) -> final-norm outputs (B, T, d), after phi.

        general: tokens (B', T') of other texts, which come after phi without shared_ids. If they
        are given, their outputs (B', T', d) are returned, too. All rows share phi's keys and
        values. For training, where phi is another at each step. lengths: how many tokens of each
        row of tokens, and of general, are no padding; fast.py leaves the rest out.
        """
        x = tokens if tokens.is_floating_point() else self.embed(tokens)  # (B, T, d)
        past = self.prefix(phi, shared_ids)
        h = self.run(x, past)[0]
        if general is None:
            return h
        p = phi.shape[-2]
        of_phi = [(k[:, :, :p], v[:, :, :p]) for k, v in past]
        return h, self.run(self.embed(general), of_phi)[0]

    def head(self, h):
        """Final-norm outputs (..., d) -> logits (..., V), float32."""
        table = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(h / self.config.logits_scaling, table.weight).float()

    # ---------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(
        self,
        prompts,
        prefix=None,
        max_new_tokens=32,
        temperature=0.0,
        generator=None,
        embeddings=None,
        copies=1,
        edit=None,
    ):
        """Continue each of the prompts, lists of ids, `copies` times -> lists of new ids.

        These are B = copies x prompts, those of the first prompt first; a prompt is read once. A
        row ends before its first end-of-sequence id. temperature 0 takes the likeliest token;
        otherwise tokens are drawn with `generator`. embeddings (prompts, T, d): in place of the
        prompts'. edit(tokens (B, 1)) -> the tokens to take in place of those.
        Raises ValueError for an empty prompt, FloatingPointError if the output is not a number.
        """
        if not prompts or not all(prompts) or max_new_tokens < 1:
            raise ValueError("generate needs a token in every prompt, and max_new_tokens above 0")
        tokens, lengths = self.pad(prompts)  # (prompts, T), (prompts,)
        p = prefix[0][0].shape[2] if prefix else 0
        x = self.embed(tokens) if embeddings is None else embeddings  # (prompts, T, d)
        h, cache = self.run(x, prefix)
        rows = torch.arange(len(prompts), device=self.device).repeat_interleave(copies)  # (B,)
        lengths = lengths[rows]
        h = h[rows, lengths - 1]  # (B, d), each row's last token
        if copies > 1:
            cache = [(k[rows], v[rows]) for k, v in cache]
        key_positions = torch.arange(p + tokens.shape[1], device=self.device)[None]  # (1, S)
        is_padding = key_positions >= p + lengths[:, None]  # (B, S)
        key_positions = torch.where(is_padding, PADDING_POSITION, key_positions)  # (B, S)
        ends = self.end_ids()
        is_done = torch.zeros_like(lengths, dtype=torch.bool)  # (B,)
        new = []
        for step in range(max_new_tokens):
            token = self.sample(self.head(h), temperature, generator)  # (B, 1)
            token = edit(token) if edit else token
            new.append(token)
            is_done |= torch.isin(token[:, 0], ends)
            if step + 1 == max_new_tokens or is_done.all():
                break
            position = p + lengths[:, None] + step  # (B, 1)
            key_positions = torch.cat([key_positions, position], dim=1)
            h, cache = self.run(self.embed(token), cache, position, key_positions)
            h = h[:, 0]
        new = torch.cat(new, dim=1)  # (B, steps)
        before_end = torch.isin(new, ends).cumsum(dim=1) == 0  # (B, steps)
        return [row[: before_end[i].sum()].tolist() for i, row in enumerate(new)]

    def pad(self, prompts):
        """Lists of ids -> tokens (B, T), padded on the right with 0, and their lengths (B,)."""
        rows = [torch.tensor(ids, dtype=torch.long) for ids in prompts]
        lengths = torch.tensor([len(ids) for ids in prompts])
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return tokens.to(self.device), lengths.to(self.device)

    def end_ids(self):
        """The end-of-sequence ids of the config, as a tensor; it may be empty."""
        ends = self.config.eos_token_id
        if ends is None:
            ends = []
        if isinstance(ends, int):
            ends = [ends]
        return torch.tensor(ends, dtype=torch.long, device=self.device)

    def sample(self, logits, temperature, generator):
        """logits (B, V) -> one token for each row, (B, 1)."""
        if not logits.amax(dim=-1).isfinite().all():
            raise FloatingPointError("the model's output is not a number: its weights are broken")
        if temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        up_to = F.softmax(logits / temperature, dim=-1).cumsum(dim=-1)  # (B, V)
        # torch.multinomial draws V numbers a row, which is slow on a CPU.
        drawn = torch.rand(len(logits), 1, generator=generator, device=logits.device)  # (B, 1)
        token = torch.searchsorted(up_to, drawn * up_to[:, -1:], right=True)
        return token.clamp(max=logits.shape[1] - 1)  # as rounding can lead beyond the last one

    # ------------------------------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Load a Hugging Face folder, config.json and safetensors; every weight is frozen.

        dtype None keeps that of the files. Tensors are mapped and moved one by one: memory holds
        the weights once. Raises ValueError or RuntimeError that names the tensors that are missing,
        surplus or of the wrong shape.
        """
        model = cls.on_meta(Config.from_file(Path(folder) / "config.json"))
        weights = {name: t.to(device, dtype) for name, t in read_weights(folder, model.config)}
        model.load_weights(weights)
        return model

    @classmethod
    def on_meta(cls, config):
        """A frozen model without memory, to be filled by `load_weights`."""
        with torch.device("meta"):
            return cls(config).requires_grad_(False)

    def load_weights(self, weights):
        """Take the tensors of {name: tensor} as they are. All have to be there, and no others.

        One table is enough where config.json ties embedding and head.
        """
        if self.config.tie_word_embeddings and "lm_head.weight" in weights:
            head = weights.pop("lm_head.weight")
            if not torch.equal(head, weights.setdefault("embed_tokens.weight", head)):
                raise ValueError("lm_head.weight is not the embedding, but config.json ties them")
        self.load_state_dict(weights, assign=True)


def read_weights(folder, config):
    """Yield the name and the tensor, mapped, of each weight in a folder's safetensors files.

    The commands check the folder first (support/files.py), and say in words what is wrong with it.
    """
    folder = Path(folder)
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not files[0].exists() and index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    for file in files:
        with safe_open(file, framework="pt") as f:
            for name in f.keys():
                if not name.endswith("rotary_emb.inv_freq"):  # constants that old files carry
                    yield from split_fused(name.removeprefix("model."), f.get_tensor(name), config)


def split_fused(name, tensor, config):
    """Yield a weight's name and tensor; of a fused one those of its parts, views of it."""
    q = config.num_attention_heads * config.head_dim  # rows
    k = config.num_key_value_heads * config.head_dim
    cuts = {"qkv_proj": [q, q + k], "gate_up_proj": [config.intermediate_size]}
    fused = name.split(".")[-2:][0]
    if fused not in FUSED:
        yield name, tensor
        return
    for part, rows in zip(FUSED[fused], tensor.tensor_split(cuts[fused])):
        yield name.replace(fused, part), rows
