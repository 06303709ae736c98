"""What the commands share: options, the files they name, and errors in one line.

Exit status of every command: 0 done, 2 wrong input (one line on stderr), 3 the run failed, 130
Ctrl-C.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from data import read_rows, read_sets
from support.processes import leave_group, ranks

DEMO = Path(__file__).resolve().parent.parent / "demo"
OUT_OF_MEMORY = (
    "out of memory: lower --batch-size or --max-length, or take --recompute (train.py), "
    "--quantize int8 or --dtype bf16"
)


# ----------------------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error here."""

    def __init__(self, doc):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        raise ValueError(message)


def non_empty(text):
    """An argparse type: a string that is not empty, as an unset shell variable leaves it."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float from low (or above it) to high, never NaN."""
    if kind is float:
        high = min(high, 1e9)
    what = f"{'a whole' if kind is int else 'a'} number {'above' if above else 'of at least'} {low}"
    if high < math.inf:
        what += f" and at most {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        is_large_enough = value > low if above else value >= low
        if not (is_large_enough and value <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


def add_options(parser, data=True, batch_size=32, several=False):
    """The options that several commands share; with data also the four files of rows.

    several: --template may come several times.
    """
    title = "model and data (default: the bundled demo)" if data else "model and data"
    group = parser.add_argument_group(title)
    folder = "Hugging Face model folder: config.json, safetensors, tokenizer"
    group.add_argument("--model", type=non_empty, metavar="DIR", help=folder)
    if data:
        both = 'JSON Lines to forget, or with "forget": true or false in every row'
        unseen = "unseen rows like those to {}, measured only"
        file = {"type": non_empty, "metavar": "FILE"}
        group.add_argument("--forget", help=both, **file)
        group.add_argument("--retain", help="JSON Lines to keep", **file)
        group.add_argument("--test-forget", help=unseen.format("forget"), **file)
        group.add_argument("--test-retain", help=unseen.format("keep"), **file)
    templates = (
        "sentiment (default), question, chat (the model's own; the default for messages), a string "
        "with {text}, or a file"
    )
    if several:
        templates += "; again for further ones to train in"
    action = "append" if several else "store"
    group.add_argument("--template", type=non_empty, metavar="T", action=action, help=templates)
    system = "system message of a chat (default: the chat template's own)"
    group.add_argument("--system", metavar="TEXT", help=system)
    longest = "most tokens in a row, prompt vectors not counted; longer texts are cut (1024, paper)"
    length = {"type": number(int, 2), "default": 1024, "metavar": "N"}
    group.add_argument("--max-length", help=longest, **length)
    group = parser.add_argument_group("hardware")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    dtype = "auto: the faster one, by a short measurement"
    group.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help=dtype)
    int8 = "keep the layers' weights in int8, half of bf16's memory"
    group.add_argument("--quantize", choices=["int8"], help=int8)
    plain = "the forward pass of model.py, not the faster one of fast.py"
    group.add_argument("--plain", action="store_true", help=plain)
    rows = {"type": number(int, 1), "default": batch_size, "metavar": "N"}
    what = f"rows in a batch (default {batch_size}, paper 32)"
    group.add_argument("--batch-size", help=what, **rows)


def add_layer_options(parser):
    """The options for large models and for speed. They change results by rounding at most."""
    group = parser.add_argument_group("large models")
    recompute = "keep the layers' inputs only: far less memory, a third more time"
    group.add_argument("--recompute", action="store_true", help=recompute)
    compiled = "torch.compile the layers: a minute first, then faster"
    group.add_argument("--compile", action="store_true", help=compiled)
    return group


def use_demo(args):
    """Without --model and --forget, fill in the bundled demo. Returns whether it is the demo."""
    if args.model or args.forget:
        return False
    args.model = str(DEMO / "model")
    for name in ("forget", "retain", "test_forget", "test_retain"):
        if not getattr(args, name):
            setattr(args, name, str(DEMO / f"{name}.jsonl"))
    args.template = args.template or "question"
    if args.dtype == "auto":
        args.dtype = "fp32"  # the same figures on machines with fast bf16 and without
    return True


def check_required(args, *names):
    """Raises ValueError for the first of the options that is not given."""
    for name in names:
        if not getattr(args, name):
            what = "DIR" if name in ("model", "prompt", "out") else "FILE"
            raise ValueError(f"--{name.replace('_', '-')} {what} is missing")


def read_splits(args, unlabelled=False):
    """{name: rows} of the files that are given, of "train forget" to "test retain".

    unlabelled: rows to retain may be without a label.
    """
    splits = {}
    if args.forget:
        splits["train forget"], retain = read_sets(args.forget, args.retain, unlabelled)
        if retain:
            splits["train retain"] = retain
    elif args.retain:
        splits["train retain"] = read_rows(args.retain)
    if args.test_forget:
        splits["test forget"] = read_rows(args.test_forget)
    if args.test_retain:
        splits["test retain"] = read_rows(args.test_retain)
    return splits


# --------------------------------------------------------------------------------------- execution


def run(main):
    """Call main(). What a user can cause becomes one line on stderr and an exit status."""
    status, message = outcome(main)
    if message and ranks()[0] == 0:
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    leave_group()
    sys.exit(status)


def outcome(main):
    """Call main() -> the exit status and a message. Other exceptions are bugs, and pass."""
    try:
        main()
    except KeyboardInterrupt as e:
        return 130, str(e) or "stopped"
    except FloatingPointError as e:
        return 3, str(e)
    except OSError as e:
        return 2, f"{e.filename}: {e.strerror}" if e.filename else str(e)
    except ValueError as e:
        return 2, str(e)
    except (RuntimeError, MemoryError) as e:
        is_memory = isinstance(e, (torch.OutOfMemoryError, MemoryError))
        if not is_memory and "allocate memory" not in str(e):  # the CPU's allocator's words
            raise
        return 3, OUT_OF_MEMORY
    return 0, None
