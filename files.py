"""Files that are read with care and written whole: JSON, and the safetensors files of a model folder.

Errors a user can cause are ValueError or OSError, with the file in the message.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

os.umask(UMASK := os.umask(0))  # there is no other way to read it


def read_json(path):
    """The JSON object in a file. Raises ValueError, with the place, for anything else."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 (byte {e.start})") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{e.lineno}: not JSON: {e.msg}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    return value


def write_whole(path, write):
    """Let `write(temporary_path)` make a file, then move it to `path`: it appears whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # what a kill leaves, the next write replaces
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # safetensors writes files that only their owner may read
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:  # the latter is safetensors' own word for a full disk
        raise OSError(f"{path}: could not be written: {getattr(e, 'strerror', None) or e}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def weight_files(path):
    """The safetensors files of a model folder. Pickled weights are refused: reading them can run code."""
    path, index = Path(path), Path(path) / "model.safetensors.index.json"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json there: a Hugging Face model folder is expected")
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{index}: no weight_map from tensor to file")
        for name in names.values():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{index}: {name!r} points outside the folder")
        return [path / name for name in sorted(set(names.values()))]  # one that is not there says so when read
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ValueError(f"{path}: only pickled weights, which can run code when read; convert them with transformers: "
                         "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)")
    raise FileNotFoundError(f"{path}: no model.safetensors and no model.safetensors.index.json")


def read_tensors(file):
    """Names and tensors of a safetensors file, mapped, without the RoPE constants that old files carry."""
    try:
        with safe_open(file, framework="pt") as f:
            for name in f.keys():
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                tensor = f.get_tensor(name)
                if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                    raise ValueError(f"{file}: {name} is {tensor.dtype}: quantised weights are not supported")
                yield name, tensor
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file}: no whole safetensors file: {e}") from None
