"""What the commands share: options, files and hardware they name, and errors in one line.

Exit status of every command: 0 done, 2 wrong input (one line on stderr), 3 the run failed, 130 Ctrl-C.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from data import Tokenizer, read_rows, read_sets
from files import weight_files
from model import Config, Llama
from scale import Int8Linear, leave, ranks

DEMO = Path(__file__).resolve().parent / "demo"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error here."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise ValueError(message)


def filled(text):
    """An argparse type: a string that is not empty, as an unset shell variable leaves it."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float from low (or above it) to high, never NaN or too large for float32."""
    high = min(high, 1e9) if kind is float else high

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            what = f"{'a whole' if kind is int else 'a'} number {'above' if above else 'of at least'} {low}"
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}{most}")
        return value

    return parse


def add_options(parser, data=True):
    """The options that several commands share; data: the four files, too."""
    group = parser.add_argument_group("model and data" + " (default: the bundled demo)" * data)
    group.add_argument("--model", type=filled, metavar="DIR",
                       help="Hugging Face model folder: config.json, safetensors, tokenizer")
    for name, what in [("forget", 'JSON Lines to forget, or with "forget": true|false in every row'),
                       ("retain", "JSON Lines to keep"),
                       ("test-forget", "unseen rows like those to forget, measured only"),
                       ("test-retain", "unseen rows like those to keep, measured only")] * data:
        group.add_argument(f"--{name}", type=filled, metavar="FILE", help=what)
    group.add_argument("--template", type=filled, metavar="T",
                       help="sentiment (default), question, a string with {text}, or a file")
    group.add_argument("--max-length", type=number(int, 2), default=1024, metavar="N",
                       help="tokens of a row, the prompt apart; longer texts lose their end (default 1024, paper)")
    group = parser.add_argument_group("hardware")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
                       help="auto: bf16 where the hardware multiplies it")
    group.add_argument("--quantize", choices=["int8"], help="keep the layers' weights in int8, half of bf16's memory")
    group.add_argument("--batch-size", type=number(int, 1), default=32, metavar="N", help="rows (default 32, paper)")


def use_demo(args):
    """Without --model and --forget: the bundled demo's files, where no other is named. -> whether it is the demo."""
    if args.model or args.forget:
        return False
    args.model = str(DEMO / "model")
    for name in ("forget", "retain", "test_forget", "test_retain"):
        setattr(args, name, getattr(args, name) or str(DEMO / f"{name}.jsonl"))
    args.template = args.template or "question"
    args.dtype = "fp32" if args.dtype == "auto" else args.dtype  # the same on machines with and without bf16
    return True


def auto_dtype(device):
    """bfloat16 on CUDA and on CPUs that multiply it in hardware, as torch reports them; float32 elsewhere."""
    kind = torch.device(device).type
    features = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}  # older torch does not say
    able = torch.cuda.is_bf16_supported(including_emulation=False) if kind == "cuda" else any(
        features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is Arm's
    return torch.bfloat16 if able else torch.float32


def hardware(args):
    """-> the device and the dtype that args ask for."""
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device).numpy(force=True)  # "meta" stops here, too
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"--device {device}: {str(e).splitlines()[0]}") from None
    return device, {"auto": auto_dtype(device), "bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]


def load_model(args, shard=None):
    """-> the frozen model and its tokenizer, on args.device in args.dtype. shard: see `Llama.from_pretrained`."""
    weight_files(args.model)  # the first to say that this is no model folder
    device, dtype = hardware(args)
    tokenizer = Tokenizer(args.model)
    model = Llama.from_pretrained(args.model, dtype, device, Int8Linear if args.quantize else torch.nn.Linear, shard)
    if tokenizer.size > model.config.vocab_size:
        raise ValueError(f"{args.model}: a tokenizer of {tokenizer.size} ids and a model of {model.config.vocab_size} "
                         "do not belong together")
    return model, tokenizer


def check_same_shape(folder, config):
    """Raises ValueError unless a model is in the folder, and of the config's shape."""
    weight_files(folder)
    other = Config.from_file(Path(folder) / "config.json")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim"):
        if getattr(other, name) != getattr(config, name):
            raise ValueError(f"{folder}: {name} {getattr(other, name)}, that of the model is {getattr(config, name)}: "
                             "not the same model, trained on other rows")
    Tokenizer(folder)


def row_limit(args, p):
    """Tokens a row may have: --max-length, or what p prompt tokens leave of the model's own length."""
    longest = Config.from_file(Path(args.model) / "config.json").max_position_embeddings
    if longest - p < 2:
        raise ValueError(f"{p} prompt tokens leave no room: the model takes {longest} positions in all")
    return min(args.max_length, longest - p)


def read_splits(args):
    """-> {name: rows} of the files given, checked against nothing yet."""
    splits = {}
    if args.forget:
        splits["train forget"], retain = read_sets(args.forget, args.retain)
        splits |= {"train retain": retain} if retain else {}
    elif args.retain:
        splits["train retain"] = read_rows(args.retain)
    for name in ("forget", "retain"):
        if file := getattr(args, f"test_{name}"):
            splits[f"test {name}"] = read_rows(file)
    return splits


def run(main):
    """Call main(); what a user can cause becomes one line on stderr and an exit status, a bug keeps its traceback."""
    try:
        status, message = main() or 0, None
    except KeyboardInterrupt as e:
        status, message = 130, str(e) or "stopped"
    except FloatingPointError as e:
        status, message = 3, str(e)
    except (ValueError, OSError) as e:
        status, message = 2, f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e)
    except (RuntimeError, MemoryError) as e:
        if not isinstance(e, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(e):
            raise  # the CPU's allocator has no exception of its own
        status, message = 3, ("out of memory: lower --batch-size or --max-length, or take --recompute (train.py), "
                              "--quantize int8 or --dtype bf16")
    if message and ranks()[0] == 0:
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    leave()
    sys.exit(status)
