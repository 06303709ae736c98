"""A model with fewer or more layers: its first ones alone, or each of them several times in a row.

    python results/cut.py --model smollm2 --layers 10 --out smollm2-10

It has to be trained to be of use. SOLAR (Kim et al., arXiv 2312.15166) stacks overlapping copies
of the layers instead, which is less simple.
"""

import copy
import dataclasses
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.nn as nn  # noqa: E402

from extras.finetune import save_weights  # noqa: E402
from model import Llama  # noqa: E402
from support.cli import Parser, non_empty, number, run  # noqa: E402


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", type=non_empty, required=True, metavar="DIR")
    add("--layers", type=number(int, 1), required=True, metavar="N")
    add("--out", type=non_empty, required=True, metavar="DIR")
    return parser.parse_args(argv)


def resize(model, n):
    """Give the model n layers. Raises ValueError if that is not fewer, and not a multiple."""
    own = len(model.layers)
    if n == own or (n > own and n % own):
        raise ValueError(f"--layers {n}: the model has {own}: take fewer or a multiple")
    times = max(n // own, 1)
    layers = nn.ModuleList()
    windows = []
    uses_rope = []
    of_layers = zip(model.layers[:n], model.config.windows, model.config.uses_rope)
    for layer, window, has_rope in of_layers:
        layers.extend(copy.deepcopy(layer) for _ in range(times))
        windows += [window] * times
        uses_rope += [has_rope] * times
    model.layers = layers
    model.config = dataclasses.replace(
        model.config, num_hidden_layers=n, windows=windows, uses_rope=uses_rope
    )


def main(argv=None):
    args = parse(argv)
    model = Llama.from_pretrained(args.model, dtype=None)
    resize(model, args.layers)
    out = Path(args.out)
    if out.is_file() or (out / "config.json").exists():  # what was stopped before is made again
        raise ValueError(f"--out {args.out}: is there already: choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    for file in Path(args.model).glob("tokenizer*"):
        shutil.copyfile(file, out / file.name)
    save_weights(model, out)  # config.json comes last
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.out}")


if __name__ == "__main__":
    run(main)
