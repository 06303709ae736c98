"""train.py with a loss on true answers to forget: python results/erase.py KIND WEIGHT OPTIONS

The generic answer decides what is said first. Once the true answer's first token is there, the rest
is as likely as before. Here each step also reads two rows to forget with their true answers. With
h(y_t) the probability of token t without the prompt, g(y_t) with it, t from the second token on,
the loss has WEIGHT times one of these terms more:

    delete   mean over tokens of KL( h without y_t || g )
    npo      mean over rows of  -2/b log sigmoid( -b sum over t of log(g(y_t) / h(y_t)) ),  b = 0.1

delete is the limit of UNDIAL's target (Dong et al., arXiv 2402.10052), npo is of Zhang et al.
(arXiv 2404.05868).
"""

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from data import collate, common_prefix  # noqa: E402
from spul import answer_hidden, kl_loss, token_losses  # noqa: E402
from support.cli import run  # noqa: E402

KINDS = ("delete", "npo")
ROWS = 2  # in a step
BETA = 0.1  # of npo


class Change:
    """What train.main is told, so that no other run is resumed with it."""

    def __init__(self, kind, weight):
        self.options = {"erase": f"{kind} {weight:g}"}

    def reader(self, *_):
        """The texts are read as they are."""


class Erase:
    """The term, for the rows to forget of one run."""

    def __init__(self, kind, model, examples, seed):
        """examples: the rows to forget, with their true answers."""
        self.kind = kind
        self.examples = [e for e in examples if e.n > 1]
        if len(self.examples) < ROWS:
            raise ValueError("--forget: the loss needs rows whose answers have several tokens")
        self.shared_ids = common_prefix(self.examples)
        self.hidden = answer_hidden(model, self.examples)  # a list of (n, d)
        self.rng = random.Random(f"erase {seed}")

    def __call__(self, model, phi):
        """phi (p, d) -> the term, a scalar."""
        chosen = self.rng.sample(range(len(self.examples)), ROWS)
        batch = collate([self.examples[i] for i in chosen], model.device, self.shared_ids)
        h = model.prompted(batch.tokens, phi, self.shared_ids, lengths=[batch.lengths])
        is_later = torch.cat([torch.arange(self.examples[i].n) > 0 for i in chosen])  # (N,)
        student = model.head(h[batch.rows, batch.columns])[is_later]  # (N, V)
        with torch.no_grad():
            teacher = model.head(torch.cat([self.hidden[i] for i in chosen]))[is_later]  # (N, V)
        targets = batch.targets[is_later]
        if self.kind == "delete":
            teacher = teacher.scatter(1, targets[:, None], -1e4)
            return kl_loss(student, teacher, len(targets))
        ratios = token_losses(teacher, targets) - token_losses(student, targets)  # log(g / h)
        of_rows = ratios.new_zeros(ROWS).index_add(0, batch.rows[is_later], ratios)
        return -2 / BETA * F.logsigmoid(-BETA * of_rows).mean()


def main(argv):
    try:
        kind, weight = argv[0], float(argv[1])
    except (IndexError, ValueError):
        kind = None
    if kind not in KINDS:
        raise ValueError(f"usage: python results/erase.py {'|'.join(KINDS)} WEIGHT OPTIONS")
    if "--resume" in argv:
        raise ValueError("--resume: which rows were drawn is not kept; begin anew")
    if "--after" in argv:
        raise ValueError("--after: the loss knows nothing of earlier prompts")
    prepare, losses = train.prepare, train.losses
    term = None

    def prepare_and_read(args, *rest):
        nonlocal term
        job = prepare(args, *rest)
        term = Erase(kind, job.model, job.measured["train forget"], args.seed)
        return job

    def losses_and_term(model, prompt, *rest):
        terms = losses(model, prompt, *rest)
        terms["loss_erase"] = term(model, prompt())
        terms["loss"] = terms["loss"] + weight * terms["loss_erase"]
        return terms

    train.prepare, train.losses = prepare_and_read, losses_and_term
    train.main(argv[2:], Change(kind, weight))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
