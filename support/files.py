"""Files: JSON read with care, files that appear whole or not at all, and a model's folder.

Errors a user can cause are ValueError or OSError, with the file in the message.
"""

import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def read_text(path):
    """The text of a UTF-8 file, without a byte order mark. Raises ValueError if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 (byte {e.start})") from None


def read_json(path):
    """The JSON object in a file. Raises ValueError, with the place, for anything else."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{e.lineno}: not JSON: {e.msg}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    return value


# ------------------------------------------------------------------------------------------ writing


def default_mode():
    """The permissions of a new file. The umask cannot be read without setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def write_whole(path, write):
    """Let `write(temporary_path)` make a file, then move it: it appears whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # one that a kill left is replaced
    try:
        write(temporary)
        with open(temporary, "r+b") as f:  # Windows flushes only what is open for writing
            os.fsync(f.fileno())
        os.chmod(temporary, default_mode())  # safetensors' files are readable by their owner only
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:  # safetensors raises its own error on a full disk
        reason = getattr(e, "strerror", None) or e
        raise OSError(f"{path}: could not be written: {reason}") from None
    finally:
        temporary.unlink(missing_ok=True)


def is_half_written(name):
    """Whether a file is what a kill left: of `write_whole`, or of safetensors, which does alike."""
    return bool(re.fullmatch(r"\..+\.tmp|\.tmp\w{6}", name))


def write_text(path, text):
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as a safetensors file."""
    metadata = metadata or {"format": "pt"}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


# ----------------------------------------------------------------------------------- model folders


def check_not_inside_file(option, path):
    """Raises ValueError if no folder can be made at path, as a file or a dead link is there."""
    path = Path(path)
    for place in (path, *path.absolute().parents):
        is_dead_link = place.is_symlink() and not place.exists()
        if is_dead_link or place.is_file():
            raise ValueError(f"{option} {path}: {place} is not a folder")


def check_json_path(path, option="--json"):
    """Raises ValueError if the option's file cannot be written to path."""
    if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise ValueError(f"{option} {path}: it is a folder, or its folder does not exist")


GGUF = "GGUF files are not read: give the folder of safetensors that they were made from"


def weight_files(folder):
    """The safetensors files of a model folder. Raises ValueError or OSError if it is not one.

    Pickled weights are refused: reading them can run code.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: {what_it_is(folder)}")
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in indexed_files(index)]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ValueError(
            f"{folder}: only pickled weights, which can run code when read. Convert them with "
            "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
        )
    if any(folder.glob("*.gguf")):
        raise FileNotFoundError(f"{folder}: {GGUF}")
    raise FileNotFoundError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def what_it_is(folder):
    """In words, what is at a path without config.json, and what to give in its place."""
    adapter = folder / "adapter_config.json"
    if (folder / "spul.json").is_file():
        return "a prompt, not a model: give it as --prompt, and the model it is for as --model"
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        return (
            f"an adapter of peft, not a model. Merge it into its base, {base}: "
            f"python -m extras.finetune --model BASE --adapter {folder} --out DIR"
        )
    if folder.suffix == ".gguf" or any(folder.glob("*.gguf")):
        return GGUF
    snapshots = sorted(folder.glob("snapshots/*/config.json"))
    if snapshots:
        newest = max(snapshots, key=lambda file: file.lstat().st_mtime).parent
        return f"the cache of a model of the hub, not its folder: give {newest}"
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        return (
            "no such folder. Is it a name on the hub? Download it first: "
            f"hf download {folder} --local-dir {folder.name}, and give {folder.name}"
        )
    return "no config.json: not a Hugging Face model folder"


def indexed_files(index):
    """The names of the files that an index of a model in several files lists."""
    weight_map = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and len(weight_map) > 0
    if not is_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: no weight_map from tensor to file")
    for name in weight_map.values():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{index}: {name!r} points outside the folder")
    return sorted(set(weight_map.values()))


def check_complete(file):
    """Raises ValueError for a safetensors file that is truncated, not one, or of a wrapper."""
    try:
        with safe_open(file, framework="pt") as f:
            names = list(f.keys())
    except (SafetensorError, OSError) as e:
        reason = "not a complete safetensors file (truncated?)"
        raise ValueError(f"{file}: {reason}: {e}") from None
    for prefix, remedy in WRAPPERS.items():
        if any(name.startswith(prefix) for name in names):
            raise ValueError(f"{file}: its tensors are called {prefix}...: {remedy}")


def unwrap(prefix):
    """In words, how the names of a file's tensors lose a prefix."""
    return (
        "saved from a wrapped model. Strip that with python: from safetensors.torch import "
        "load_file, save_file; t = load_file(FILE); "
        f"save_file({{n.removeprefix({prefix!r}): t[n] for n in t}}, FILE, {{'format': 'pt'}})"
    )


# How the names of tensors begin where not the model itself was saved, and what to do then.
WRAPPERS = {
    "_orig_mod.": unwrap("_orig_mod."),  # torch.compile
    "module.": unwrap("module."),  # DataParallel and others
    "base_model.model.": (
        "saved with an adapter of peft around it. Load it with peft as it was saved, and save "
        "model.merge_and_unload()"
    ),
}
