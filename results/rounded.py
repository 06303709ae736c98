"""train.py with half of the steps on weights rounded to 4 bits: python results/rounded.py OPTIONS

Weights that are rounded after training bring back some of what a prompt hides. Here it meets such
weights while it learns: those of a copy of the model, rounded anew every 25 steps, in groups of 32,
96 and 192 values in turn (`extras.assess --only quantised` has groups of 64).
"""

import copy
import itertools
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from extras.probes import rounded  # noqa: E402
from support.cli import run  # noqa: E402

BITS = 4
GROUPS = (32, 96, 192)
EVERY = 25  # steps on rounded weights


class Change:
    """What train.main is told, so that no other run is resumed with it."""

    options = {"rounded": BITS}

    def reader(self, *_):
        """The texts are read as they are."""


class RoundedHalf:
    """train.train_step, on the model and on its rounded copy two steps each, in turn.

    Two: of two steps one asks as the user does, and one otherwise.
    """

    def __init__(self, train_step):
        self.train_step = train_step
        self.steps = itertools.count()
        self.groups = itertools.cycle(GROUPS)
        self.copy = None

    def __call__(self, model, *rest):
        step = next(self.steps)
        if step // 2 % 2 == 0:
            return self.train_step(model, *rest)
        if self.copy is None:
            self.copy = copy.deepcopy(model)
        if (step // 4 * 2 + step % 2) % EVERY == 0:
            round_layers(model, self.copy, next(self.groups))
        return self.train_step(self.copy, *rest)


@torch.no_grad()
def round_layers(model, other, group):
    """Give the linear layers of `other` the weights of the model's, rounded."""
    linear = (module for module in model.layers.modules() if isinstance(module, nn.Linear))
    others = (module for module in other.layers.modules() if isinstance(module, nn.Linear))
    for module, own in zip(linear, others):
        own.weight.copy_(rounded(module.weight, BITS, group))


def main(argv):
    if "--resume" in argv:
        raise ValueError("--resume: which steps were rounded is not kept; begin anew")
    train.train_step = RoundedHalf(train.train_step)
    train.main(argv, Change())


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
