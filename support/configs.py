"""What can be wrong in a model's config.json and generation_config.json: one clear line each.

Everything here raises ValueError, with the file, the key and, where there is one, the remedy.
"""

import math
from pathlib import Path

from model import ORIGINAL, OWN_KEYS, ROPE_TYPES, SHAPE, rope_kind
from support.files import read_json

POSITIVE_INTEGERS = [*SHAPE, "max_position_embeddings", "sliding_window", "max_window_layers"]
POSITIVE_INTEGERS += ["no_rope_layer_interval", ORIGINAL]
POSITIVE_NUMBERS = ["rms_norm_eps", "rope_theta", *OWN_KEYS["phi3"], *OWN_KEYS["granite"]]
REQUIRED = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
REQUIRED += ["num_attention_heads"]
WINDOWED = ["num_key_value_heads", "max_position_embeddings", "sliding_window"]
# Their defaults in transformers differ from those of Config.
ALSO_REQUIRED = {
    "mistral": WINDOWED,
    "qwen2": WINDOWED,
    "qwen3": [*WINDOWED, "head_dim"],
    "phi3": ["max_position_embeddings", "rms_norm_eps"],
    "smollm3": ["num_key_value_heads", "max_position_embeddings", "rope_theta"],
    "granite": ["attention_multiplier"],
    "olmo2": ["rms_norm_eps"],
}
MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window", "no_rope_layer_interval")
MAY_BE_NULL += (ORIGINAL, *OWN_KEYS["phi3"])
# What each kind of scaling needs; llama3, yarn and longrope know the original length otherwise.
ROPE_NUMBERS = {kind: ["factor"] for kind in ROPE_TYPES}
ROPE_NUMBERS |= {"default": [], "longrope": []}
ROPE_NUMBERS["llama3"] = ["factor", ORIGINAL, "low_freq_factor", "high_freq_factor"]
OPTIONAL_ROPE_NUMBERS = ["rope_theta", "factor", ORIGINAL, "attention_factor"]
OPTIONAL_ROPE_NUMBERS += ["beta_fast", "beta_slow", "partial_rotary_factor"]


def check_config(path):
    """Refuse a config.json with values that cannot be, before Config reads it."""
    raw = read_json(path)
    required = REQUIRED + ALSO_REQUIRED.get(str(raw.get("model_type")), [])
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    missing = [name for name in required if name not in raw and name not in rope]
    if missing:
        raise ValueError(f"{path}: no {', '.join(missing)}")
    for name in POSITIVE_INTEGERS:
        is_null = raw.get(name) is None and (name not in raw or name in MAY_BE_NULL)
        if not is_null and (type(raw[name]) is not int or raw[name] < 1):
            if not (name == "max_window_layers" and raw[name] == 0):
                raise ValueError(f"{path}: {name} {raw[name]!r} is not a positive integer")
    for name in POSITIVE_NUMBERS:
        is_null = raw.get(name) is None and (name not in raw or name in MAY_BE_NULL)
        if not is_null and not is_positive(raw[name]):
            raise ValueError(f"{path}: {name} {raw[name]!r} is not a positive number")
    check_ends(raw.get("eos_token_id"), raw["vocab_size"], path)
    check_heads(raw, path)
    check_both_ropes(raw, path)
    check_rope(raw, path)
    check_layers(raw, path)


def check_heads(raw, path):
    heads = raw["num_attention_heads"]
    groups = raw.get("num_key_value_heads") or heads
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    if heads % groups:
        raise ValueError(f"{path}: num_attention_heads is not a multiple of num_key_value_heads")
    if head_dim % 2 or head_dim == 0:
        raise ValueError(f"{path}: head_dim {head_dim} is not even")


def check_layers(raw, path):
    """The lists with an entry for each layer."""
    n = raw["num_hidden_layers"]
    layer_types = raw.get("layer_types")
    if layer_types is not None and not is_layer_types(layer_types, n):
        raise ValueError(
            f"{path}: layer_types must name full_attention or sliding_attention for each layer"
        )
    is_smollm3 = raw["model_type"] == "smollm3"
    if is_smollm3 and "sliding_attention" in (layer_types or []):
        if not raw.get("use_sliding_window"):
            raise ValueError(
                f"{path}: layer_types has sliding_attention, but use_sliding_window is not true"
            )
    flags = raw.get("no_rope_layers")
    if is_smollm3 and flags is not None:
        is_list = isinstance(flags, list) and len(flags) >= n
        if not is_list or not all(type(flag) in (int, bool) for flag in flags):
            raise ValueError(f"{path}: no_rope_layers must hold 1 or 0 for each layer")


# ------------------------------------------------------------------------------------------ rotary


def check_both_ropes(raw, path):
    """Refuse two spellings of the rope settings that differ: nobody knows which is meant."""
    meanings = []
    for name in ("rope_parameters", "rope_scaling"):
        rope = raw.get(name)
        if rope and isinstance(rope, dict):
            meaning = {"rope_theta": raw.get("rope_theta", 10000.0), **rope}
            meaning["rope_type"] = rope_kind(rope)
            meaning.pop("type", None)
            meanings.append(meaning)
    if len(meanings) == 2 and meanings[0] != meanings[1]:
        raise ValueError(
            f"{path}: rope_parameters and rope_scaling disagree: delete the one that is wrong"
        )


def check_rope(raw, path):
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    is_plain = isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values())
    if not is_plain:
        raise ValueError(f"{path}: the rope settings are not an object of numbers: not supported")
    kind = rope_kind(rope)
    if raw["model_type"] == "phi3" and kind in ("su", "yarn"):  # earlier names
        kind = "longrope"
    if kind not in ROPE_TYPES:
        names = ", ".join(ROPE_TYPES)
        raise ValueError(f"{path}: rope type {kind!r} is not supported ({names} are)")
    missing = [name for name in ROPE_NUMBERS[kind] if rope.get(name) is None]
    if missing:
        raise ValueError(f"{path}: rope type {kind!r} needs numbers for {', '.join(missing)}")
    for name in [*ROPE_NUMBERS[kind], *OPTIONAL_ROPE_NUMBERS]:
        if rope.get(name) is not None and not is_positive(rope[name]):
            raise ValueError(f"{path}: {name} {rope[name]!r} is not a positive number")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError(f"{path}: high_freq_factor must be above low_freq_factor")
    check_turned(raw, rope, kind, path)


def check_turned(raw, rope, kind, path):
    """The part of a head that RoPE turns, and longrope's number for each pair of it."""
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    part = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    r = int(head_dim * part)
    if part > 1 or r < 2 or r % 2:
        raise ValueError(f"{path}: partial_rotary_factor {part} gives no even part of {head_dim}")
    factors = rope.get("short_factor")
    is_list = isinstance(factors, list) and all(map(is_positive, factors))
    if kind == "longrope" and not (is_list and len(factors) == r // 2):
        raise ValueError(f"{path}: rope type 'longrope' needs {r // 2} numbers for short_factor")


def is_positive(value):
    return type(value) in (int, float) and 0 < value < math.inf


def is_layer_types(value, n):
    kinds = {"full_attention", "sliding_attention"}
    return isinstance(value, list) and len(value) == n and set(map(str, value)) <= kinds


# -------------------------------------------------------------------------------- where a text ends


def check_ends(ends, vocab_size, path):
    """Refuse an eos_token_id that is neither null nor an id of the vocabulary, or a list of ids."""
    for end in as_list(ends):
        if type(end) is not int or not 0 <= end < vocab_size:
            raise ValueError(
                f"{path}: eos_token_id {ends!r} must be null, an id below vocab_size {vocab_size}, "
                "or a list of such ids"
            )


def as_list(ends):
    if ends is None:
        return []
    return ends if isinstance(ends, list) else [ends]


def end_ids(folder, config):
    """The ids at which generation ends: the config's, and those of generation_config.json as well.

    Chat models name the end of a turn only there. Raises ValueError if that file is broken.
    """
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return config.eos_token_id
    ends = read_json(path).get("eos_token_id")
    check_ends(ends, config.vocab_size, path)
    known = as_list(config.eos_token_id)
    new = [end for end in as_list(ends) if end not in known]
    return known + new if new else config.eos_token_id
