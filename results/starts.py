"""train.py with another start of the prompt: python results/starts.py sentence|vocabulary OPTIONS

The prompt is then vectors of the vocabulary plus what the encoder adds, which is 0 at first. They
are those of a harmless sentence, or the same random ones for every seed. Before them is what the
model always sees first, which does not learn: models attend to their first token when no other
matters (attention sinks, Xiao et al., arXiv 2309.17453). Cartridges (arXiv 2506.06266) begin with
text and freeze their first token, too.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from spul import SoftPrompt  # noqa: E402
from support.cli import run  # noqa: E402
from support.general import sentence_vectors  # noqa: E402
from support.processes import gather_full  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402

STARTS = ("sentence", "vocabulary")


class Started(SoftPrompt):
    """phi (p, d) is start (p, d) plus the encoder's output, but for the first vector."""

    def __init__(self, start, hidden):
        super().__init__(len(start) - 1, start.shape[1], hidden, earlier=start[:1])
        self.register_buffer("start", start[1:].clone())  # (p - 1, d)
        last = self.mlp[-1] if hidden else self
        for parameter in last.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def forward(self):
        return torch.cat([self.earlier, self.start + self.mlp(self.E)])


def vectors(kind, model, tokenizer, folder, p):
    """Where the prompt starts, (p, d)."""
    first, *sentence = sentence_vectors(model, tokenizer, folder)
    if kind == "sentence":
        return torch.stack([first, *(sentence * p)[: p - 1]])
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(0, tokenizer.count, (p - 1,), generator=draws)
    return torch.cat([first[None], gather_full(model.embed_tokens.weight)[ids].float()])


class Change:
    """What train.main is told of the start, so that no other run is resumed with it."""

    def __init__(self, kind):
        self.options = {"start": kind}

    def reader(self, *_):
        """The texts are read as they are."""


def main(argv):
    if argv[:1] not in ([name] for name in STARTS):
        raise ValueError(f"the first word is where the prompt starts: {' or '.join(STARTS)}")
    kind = argv[0]

    def make_prompt(args, model):
        if args.after or args.num_tokens == 1:
            raise ValueError("another start is not for --after, and wants --num-tokens 2 or more")
        torch.manual_seed(args.seed)
        start = vectors(kind, model, Tokenizer(args.model), args.model, args.num_tokens)
        return Started(start, args.encoder_hidden).to(model.device)

    train.make_prompt = make_prompt
    train.main(argv[1:], Change(kind))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
