"""A model with fewer or more layers: its first ones alone, or each of them several times in a row, a simpler way than
that of SOLAR (Kim et al., arXiv 2312.15166), which stacks overlapping copies. It has to be trained to be of use.

    python results/cut.py --model smollm2 --layers 10 --out smollm2-10
"""

import copy
import dataclasses
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.nn as nn  # noqa: E402

from cli import Parser, filled, number, run  # noqa: E402
from model import Llama  # noqa: E402


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", type=filled, required=True, metavar="DIR")
    parser.add_argument("--layers", type=number(int, 1), required=True, metavar="N")
    parser.add_argument("--out", type=filled, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    model = Llama.from_pretrained(args.model, dtype=None)
    n = len(model.layers)
    if args.layers == n or args.layers > n and args.layers % n:
        raise ValueError(f"--layers {args.layers}: the model has {n}: take fewer or a multiple")
    out = Path(args.out)
    if out.is_file() or (out / "config.json").exists():  # what was stopped before that is made again
        raise ValueError(f"--out {args.out}: is there already: choose a new folder")
    times = max(args.layers // n, 1)
    model.layers = nn.ModuleList(copy.deepcopy(layer) for layer in model.layers[: args.layers] for _ in range(times))
    model.config = dataclasses.replace(model.config, num_hidden_layers=args.layers)
    out.mkdir(parents=True, exist_ok=True)
    for file in Path(args.model).glob("tokenizer*"):
        shutil.copyfile(file, out / file.name)
    model.save_pretrained(out)  # the config comes last, and completes it
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.out}")


if __name__ == "__main__":
    run(main)
