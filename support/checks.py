"""What users can get wrong in rows, templates, answers and configurations: one clear line each.

Everything here raises ValueError, with the place and, where there is one, the remedy.
"""

import json
import math
import os.path
from pathlib import Path

from support.files import read_json, read_text

# ---------------------------------------------------------------------------------------- the rows


def parse_line(line, where):
    """A line of a JSON Lines file, as bytes -> the fields of a row; None for a blank line."""
    try:
        text = line.decode("utf-8-sig" if where.endswith(":1") else "utf-8").strip()
    except UnicodeDecodeError as e:
        raise ValueError(f"{where}: not UTF-8 (byte {e.start} of the line)") from None
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: not JSON: {e}") from None
    return parse_row(value, where)


def parse_row(value, where):
    """A JSON value -> the fields of a row: text and label, or prompt and completion (raw)."""
    if not isinstance(value, dict):
        example = '{"text": "...", "label": "..."}'
        raise ValueError(f"{where}: a JSON object is expected, such as {example}")
    raw = "text" not in value and ("prompt" in value or "completion" in value)
    text_name, label_name = ("prompt", "completion") if raw else ("text", "label")
    for name in (text_name, label_name):
        check_field(value, name, where)
    if not isinstance(value.get("forget", False), bool):
        raise ValueError(f'{where}: "forget" is neither true nor false')
    label = value[label_name]
    return {
        "text": value[text_name],
        "label": label if raw else label.strip(),
        "raw": raw,
        "forget": value.get("forget"),
        **other_answers(value, where),
    }


def check_field(value, name, where):
    if name not in value:
        raise ValueError(
            f'{where}: no "{name}": a row needs "text" and "label", or "prompt" and "completion"'
        )
    if not isinstance(value[name], str):
        raise ValueError(f'{where}: "{name}" is not a string')
    if not value[name].strip() and name != "prompt":
        raise ValueError(f'{where}: "{name}" is empty')
    check_text(value[name], f'{where}: "{name}"')


def other_answers(value, where):
    """The optional paraphrase and wrong answers of a row."""
    paraphrase = value.get("paraphrase")
    wrong = value.get("wrong", [])
    if paraphrase is not None and not is_filled(paraphrase):
        raise ValueError(f'{where}: "paraphrase" is not a string, or is empty')
    if not isinstance(wrong, list) or not all(map(is_filled, wrong)):
        raise ValueError(f'{where}: "wrong" is not a list of strings, or one of them is empty')
    for answer in (paraphrase or "", *wrong):
        check_text(answer, f'{where}: "paraphrase" or "wrong"')
    return {"paraphrase": paraphrase, "wrong": tuple(wrong)}


def is_filled(value):
    return isinstance(value, str) and value.strip() != ""


def check_text(text, where):
    """Refuses what JSON and a shell can hand over, but no tokenizer can read."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where} holds bytes or half a surrogate pair, which are not text")


def check_disjoint(forget, retain):
    """Refuses a text that is to be both forgotten and kept."""
    seen = {row.key: row.where for row in forget}
    for row in retain:
        if row.key in seen:
            raise ValueError(
                f"{row.where}: the same text as {seen[row.key]}, which is to be forgotten: drop one"
            )


# --------------------------------------------------------------------------- answers and templates


def read_generic(value):
    """--generic -> the generic answers, of "A,B,..." or of a file with one on each line."""
    if os.path.isfile(value):
        words = read_text(value).splitlines()
    elif value.endswith(".txt"):
        raise ValueError(f"--generic {value}: this file does not exist")
    else:
        words = value.split(",")
    words = [word.strip() for word in words if word.strip()]
    if not words:
        raise ValueError(f"--generic {value}: at least one answer is needed")
    return list(dict.fromkeys(words))


def check_generic(rows, generic):
    """Refuses a row whose own answer is among the generic ones."""
    for row in rows:
        label = row.label.strip()
        if label in generic:
            raise ValueError(
                f"{row.where}: the label {label!r} is also a generic answer: "
                "choose others with --generic"
            )


def read_template(value, known):
    """--template -> the template, of a name in `known`, of a string with {text}, or of a file.

    It ends where the answer starts. White space at its end is dropped, because the space between
    belongs to the answer.
    """
    where = f"--template {value!r}"
    if value in known:
        template = known[value]
    elif "{text}" not in value and Path(value).is_file():
        where = value
        template = read_text(value)
    else:
        template = value.replace("\\n", "\n")  # a shell passes \n on as two characters
    check_text(template, "--template")
    if template.count("{text}") != 1:
        names = ", ".join(known)
        raise ValueError(
            f"{where}: expected {names}, a file, or a string that holds {{text}} exactly once"
        )
    if "{label}" in template:
        raise ValueError(f"{where}: a template ends where the answer starts: take {{label}} out")
    return template.rstrip()


# ------------------------------------------------------------------------------------- config.json

# What two models of the same shape agree in.
SHAPE = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"]
SHAPE += ["num_attention_heads", "num_key_value_heads"]
POSITIVE_INTEGERS = [*SHAPE, "max_position_embeddings", "sliding_window", "max_window_layers"]
REQUIRED = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
REQUIRED += ["num_attention_heads"]
MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")
LLAMA3_NUMBERS = ["factor", "original_max_position_embeddings"]
LLAMA3_NUMBERS += ["low_freq_factor", "high_freq_factor"]


def check_config(path):
    """Refuse a config.json with values that cannot be, before Config reads it."""
    raw = read_json(path)
    required = list(REQUIRED)
    if raw.get("model_type") in ("mistral", "qwen2", "qwen3"):  # their defaults differ from llama's
        required += ["num_key_value_heads", "max_position_embeddings", "sliding_window"]
    if raw.get("model_type") == "qwen3":
        required += ["head_dim"]
    missing = [name for name in required if name not in raw]
    if missing:
        raise ValueError(f"{path}: no {', '.join(missing)}")
    for name in POSITIVE_INTEGERS:
        is_null = raw.get(name) is None and (name not in raw or name in MAY_BE_NULL)
        if not is_null and (type(raw[name]) is not int or raw[name] < 1):
            if not (name == "max_window_layers" and raw[name] == 0):
                raise ValueError(f"{path}: {name} {raw[name]!r} is not a positive integer")
    for name in ("rms_norm_eps", "rope_theta"):
        if name in raw and not is_positive(raw[name]):
            raise ValueError(f"{path}: {name} {raw[name]!r} is not a positive number")
    check_heads(raw, path)
    check_rope(raw.get("rope_parameters") or raw.get("rope_scaling") or {}, path)
    layer_types = raw.get("layer_types")
    if layer_types is not None and not is_layer_types(layer_types, raw["num_hidden_layers"]):
        raise ValueError(
            f"{path}: layer_types must name full_attention or sliding_attention for each layer"
        )


def check_heads(raw, path):
    heads = raw["num_attention_heads"]
    groups = raw.get("num_key_value_heads") or heads
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    if heads % groups:
        raise ValueError(f"{path}: num_attention_heads is not a multiple of num_key_value_heads")
    if head_dim % 2 or head_dim == 0:
        raise ValueError(f"{path}: head_dim {head_dim} is not even")


def check_rope(rope, path):
    is_plain = isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values())
    if not is_plain:
        raise ValueError(f"{path}: the rope settings are not an object of numbers: not supported")
    if "rope_theta" in rope and not is_positive(rope["rope_theta"]):
        raise ValueError(f"{path}: rope_theta {rope['rope_theta']!r} is not a positive number")
    kind = rope.get("rope_type", rope.get("type", "default"))
    needed = {"default": (), "linear": ("factor",), "llama3": LLAMA3_NUMBERS}
    if kind not in needed:
        raise ValueError(
            f"{path}: rope type {kind!r} is not supported (default, linear and llama3 are)"
        )
    if any(type(rope.get(name)) not in (int, float) for name in needed[kind]):
        names = ", ".join(needed[kind])
        raise ValueError(f"{path}: rope type {kind!r} needs numbers for {names}")


def is_positive(value):
    return type(value) in (int, float) and 0 < value < math.inf


def is_layer_types(value, n):
    kinds = {"full_attention", "sliding_attention"}
    return isinstance(value, list) and len(value) == n and set(map(str, value)) <= kinds
