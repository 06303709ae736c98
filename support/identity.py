"""Which model a prompt belongs to: a digest of all that decides what the model computes."""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

from model import Config
from support.files import weight_files
from support.tokenizer import Tokenizer

# Fields of Config that do not change what the model computes for a text.
NOT_COMPUTED = ("bos_token_id", "eos_token_id", "max_position_embeddings", "model_type")


def fingerprint(folder):
    """What tells one model from another: a digest of the weights, "-", one of the tokenizer.

    The first covers the Config, and of each tensor the name, dtype, shape and a piece. So it reads
    a few megabytes of a 13 GB model; models that differ only between the pieces agree. How
    config.json is written, and in how many files the weights are, makes no difference.
    """
    folder = Path(folder)
    files = weight_files(folder)
    config = Config.from_file(folder / "config.json")
    content = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in NOT_COMPUTED and value != field.default:  # so that fields can be added
            content[field.name] = value
    pieces = {}
    for file in files:
        pieces |= tensor_pieces(file)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in pieces:
        pieces.pop("lm_head.weight", None)  # files may hold the same table twice
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(pieces):
        what, piece = pieces[name]
        digest.update(f"{name} {what}".encode() + piece)
    return f"{digest.hexdigest()}-{Tokenizer(folder).digest()}"


def check_fingerprint(recorded, folder, what):
    """Raises ValueError unless `recorded`, of a prompt's spul.json, is that of the model folder.

    what: whose it is, for the message.
    """
    if isinstance(recorded, str) and "-" not in recorded:  # as earlier versions wrote it
        is_same_model = recorded == digest_of_files(folder)
        is_same_tokenizer = True
    else:
        now = fingerprint(folder).split("-")
        then = str(recorded).split("-")
        is_same_model = now[0] == then[0]
        is_same_tokenizer = now[1:] == then[1:]
    if not is_same_model:
        raise ValueError(f"{what}: trained on another model, and does not fit {folder}")
    if not is_same_tokenizer:
        raise ValueError(f"{what}: trained with another tokenizer than that in {folder}")


def tensor_pieces(file):
    """{name: (dtype and shape, bytes from the middle)} of a safetensors file."""
    pieces = {}
    with open(file, "rb") as f:
        header, tensors = read_header(f, file)
        for name, tensor in tensors.items():
            if not name.endswith("rotary_emb.inv_freq"):  # constants that old files carry
                what = f"{tensor['dtype']} {tensor['shape']}"
                pieces[name] = (what, piece_of(f, header, tensor))
    return pieces


def read_header(f, file):
    """The header of an open safetensors file, as bytes and as {name: tensor}."""
    size = f.seek(0, 2)
    f.seek(0)
    length = int.from_bytes(f.read(8), "little")
    header = f.read(min(length, size))
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for tensor in tensors.values():
            tensor["dtype"], tensor["shape"]
            tensor["data_offsets"] = tuple(map(int, tensor["data_offsets"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{file}: not a complete safetensors file (truncated?)") from None
    return header, tensors


def piece_of(f, header, tensor):
    """Bytes from the middle of a tensor, at most 4,096."""
    begin, end = tensor["data_offsets"]
    f.seek(8 + len(header) + (begin + end) // 2)
    return f.read(min(4096, (end - begin + 1) // 2))


def digest_of_files(folder):
    """The fingerprint of earlier versions: of config.json's bytes and each weight file's.

    It covers the names of the files, too, so a copy of a model in other files has another one.
    """
    digest = hashlib.sha256()
    files = weight_files(folder)
    digest.update((Path(folder) / "config.json").read_bytes())
    for file in files:
        with open(file, "rb") as f:
            header, tensors = read_header(f, file)
            digest.update(f"{file.name} {f.seek(0, 2)}".encode() + header)
            for tensor in tensors.values():
                digest.update(piece_of(f, header, tensor))
    return digest.hexdigest()


def kept_labels(labels, retain, written):
    """The label set, for spul.json: only answers that several given rows to retain share.

    Others may be sentences, or what the model says of the rows to forget. labels: the label set,
    or None. written: the rows that the model wrote or labelled itself, if it did.
    """
    if labels is None or written:
        return None
    kept = Counter(row.label for row in retain)
    return [name for name in labels if kept[name] > 1]
