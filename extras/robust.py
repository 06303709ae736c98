"""Train a prompt on changed queries, so that it may withstand them later. Not in the paper.

    python -m extras.robust --corrupt KIND [--corrupt-strength S] --model DIR --forget FILE ...

The other options are those of train.py. At each step the rows' own texts are changed anew, those of
forget and retain rows alike, so that the change does not tell the two sides apart. Template and
answer stay as they are. Only the model with the prompt reads the changed texts: L_kl's teacher has
read the original, because a changed query is to be answered like the original one.

In our measurements such prompts forgot less and withstood no more (results/robust.md).

Letters: B rows, T tokens, d width, V vocabulary, t text tokens of a row, k neighbours of a token.
"""

import math
import random

import torch
import torch.nn.functional as F

import train
from support.cli import Parser, number, run
from support.options import make_parser
from support.processes import gather_full, ranks

STRENGTHS = {"noise": 0.3, "adversarial": 0.3, "semantic": 0.2}  # defaults


# ------------------------------------------------------------------------------------- the changes


def noise(e, is_text, strength, scale, generators):
    """e + strength scale z on the texts' embeddings, with z ~ N(0, I) -> (B, T, d).

    e (B, T, d) are embeddings; is_text (B, T) is True at what may change. scale: the root mean
    square of the embedding table's entries. generators: one for each row, which draws its z.
    """
    e = e.clone()
    for row, generator in enumerate(generators):
        old = e[row, is_text[row]]  # (t, d)
        z = torch.randn(old.shape, generator=generator, device=e.device)  # (t, d)
        e[row, is_text[row]] = old + strength * scale * z.to(e.dtype)
    return e


def adversarial(e, is_text, strength, gradient):
    """e + strength mean|e| g / |g| on the texts' embeddings, a step up the loss -> (B, T, d).

    e (B, T, d) are embeddings; is_text (B, T) is True at what may change. gradient (B, T, d): of
    each row's own loss. mean|e|: the mean length of the text embeddings in e, so all tokens move
    equally far; several processes each take that of their own rows. A token without a gradient does
    not move.
    """
    if not is_text.any():
        return e
    length = e.float().norm(dim=-1)[is_text].mean()
    direction = F.normalize(gradient.float(), dim=-1)  # (B, T, d)
    step = strength * length * direction * is_text[..., None]  # (B, T, d)
    return e + step.to(e.dtype)


def neighbours(table, ids, special, k=5):
    """For each token of `ids` the k tokens with the most similar embeddings, by cosine -> (V, k).

    table (V, d): the token embeddings. A token is not its own neighbour, and special ones are
    nobody's. In the rows of special tokens and of those not in `ids` there is the token itself.
    """
    device = table.device
    near = torch.arange(len(table), device=device)[:, None].repeat(1, k)  # (V, k)
    unit = F.normalize(table.float(), dim=-1)  # (V, d)
    excluded = torch.tensor(sorted(special), dtype=torch.long, device=device)
    wanted = torch.tensor(sorted(set(ids) - set(special)), dtype=torch.long, device=device)
    for part in wanted.split(512):
        rows = torch.arange(len(part), device=device)
        cosine = unit[part] @ unit.T  # (512, V)
        cosine[:, excluded] = -math.inf
        cosine[rows, part] = -math.inf
        near[part] = cosine.topk(k, dim=-1).indices
    return near


def semantic(tokens, is_text, strength, near, generators):
    """Replace text tokens, each with probability `strength`, by one of their neighbours -> (B, T).

    tokens (B, T); is_text (B, T) is True at what may change. near (V, k): of `neighbours`.
    generators: one for each row, which draws its changes.
    """
    tokens = tokens.clone()
    device = tokens.device
    for row, generator in enumerate(generators):
        old = tokens[row, is_text[row]]  # (t,)
        is_replaced = torch.rand(len(old), generator=generator, device=device) < strength
        choice = torch.randint(near.shape[1], (len(old),), generator=generator, device=device)
        tokens[row, is_text[row]] = torch.where(is_replaced, near[old, choice], old)
    return tokens


def text_ids(examples):
    """The ids that occur in the examples' own texts, as a set."""
    ids = set()
    for e in examples:
        first, end = e.text
        ids.update(e.ids[first:end])
    return ids


def non_text_ids(tokenizer, size):
    """The ids that do not stand for text, of a model with an embedding table of `size` rows."""
    return tokenizer.special | set(range(tokenizer.size, size))


# --------------------------------------------------------------------------- in the training loop


def corruption(model, kind, strength, seed, table, examples, special):
    """-> read(batch, phi, step, rows), what the model reads in place of the batch's tokens.

    kind: a key of STRENGTHS. table (V, d): the token embeddings, whole in every process. special:
    ids that no token is replaced by. What is drawn depends only on the seed, the step and the row.
    """
    scale = table.float().square().mean().sqrt()
    near = None
    if kind == "semantic":
        near = neighbours(table, text_ids(examples), special)

    def read(batch, phi, step, rows):
        """phi (p, d), rows: their indices -> tokens (B, T), or embeddings (B, T, d)."""
        generators = []
        for row in rows:
            draw_seed = random.Random(f"corrupt {seed} {step} {row}").getrandbits(62)
            generators.append(torch.Generator(model.device).manual_seed(draw_seed))
        if kind == "semantic":
            return semantic(batch.tokens, batch.is_text, strength, near, generators)
        e = F.embedding(batch.tokens, table)  # (B, T, d)
        if kind == "noise":
            return noise(e, batch.is_text, strength, scale, generators)
        gradient = loss_gradient(model, e, phi, batch)  # (B, T, d)
        return adversarial(e, batch.is_text, strength, gradient)

    return read


def loss_gradient(model, e, phi, batch):
    """The gradient of each row's own L_f or L_r at its embeddings e (B, T, d) -> (B, T, d)."""
    e = e.detach().requires_grad_()
    h = model.prompted(e, phi, batch.shared_ids)[batch.rows, batch.columns]  # (N, d)
    loss = F.cross_entropy(model.head(h), batch.targets, reduction="sum")
    return torch.autograd.grad(loss, e)[0]


class Change:
    """A kind of change and its strength, as the hook of train.main.

    options: what the description of a run says of the change.
    """

    def __init__(self, kind, strength):
        self.kind = kind
        self.strength = strength
        self.options = {"corrupt": kind, "corrupt_strength": strength}

    def reader(self, model, tokenizer, examples, seed):
        """-> read(batch, phi, step, rows): see `corruption`."""
        if ranks()[0] == 0:
            print(f"corrupt  {self.kind}, strength {self.strength:g}", flush=True)
        table = gather_full(model.embed_tokens.weight)  # (V, d)
        special = non_text_ids(tokenizer, len(table))
        return corruption(model, self.kind, self.strength, seed, table, examples, special)


# ------------------------------------------------------------------------------------- the command


def add_corruption_options(parser):
    defaults = ", ".join(f"{kind} {strength:g}" for kind, strength in STRENGTHS.items())
    add = parser.add_argument_group("changed queries").add_argument
    add("--corrupt", choices=["none", *STRENGTHS], default="none",
        help="what happens to the texts (default none: as train.py)")
    add("--corrupt-strength", type=number(float, 0), metavar="S",
        help="noise: standard deviation, relative to the embeddings' entries; adversarial: length "
        "of a step, relative to an embedding's; semantic: share of the tokens that is replaced "
        f"(default {defaults})")


def parse(argv):
    """The two options of this command -> kind and strength, and the options for train.py.

    Raises ValueError for any option that is wrong; --help ends the command.
    """
    parser = make_parser(__doc__)
    add_corruption_options(parser)
    parser.parse_args(argv)  # --help shows all options

    parser = Parser(__doc__)
    add_corruption_options(parser)
    args, rest = parser.parse_known_args(argv)
    kind = args.corrupt
    strength = args.corrupt_strength
    if strength is None:
        strength = STRENGTHS.get(kind, 0.0)
    elif kind == "none":
        raise ValueError("--corrupt-strength: needs --corrupt noise, adversarial or semantic")
    elif kind == "semantic" and strength > 1:
        raise ValueError(
            f"--corrupt-strength {strength:g}: with --corrupt semantic it is at most 1, the share "
            "of tokens that are replaced"
        )
    return kind, strength, rest


def main(argv=None):
    kind, strength, rest = parse(argv)
    change = None if kind == "none" else Change(kind, strength)
    train.main(rest, change=change)


if __name__ == "__main__":
    run(main)
