"""Two rivals that leave the weights alone and act on each query, ECO and ICUL: baselines.py makes, eval.py applies.

ECO (Liu et al., arXiv 2406.07933): a classifier says whether a query is one to forget; the embeddings of such a query
are corrupted before the model reads them. Theirs is a fine-tuned RoBERTa; ours is a logistic regression on the model's
own final-norm outputs, averaged over the query's tokens, which needs no other model. Answers are never corrupted.

ICUL (Pawelczyk et al., arXiv 2310.07579): the context shows forget rows with a wrong label and other rows with the
right one. Theirs is for one forget row at a time; ours, for many, takes the k nearest to the query by these averages.

A guard is a folder: guard.safetensors, and guard.json with all else, which is written last.

Letters: B rows, T tokens, d width, n rows that the guard knows.
"""

import zlib
from dataclasses import replace
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data import answer_ids, by_length
from files import read_json, write_json, write_whole

ACTIONS = {  # of ECO on some entries x of an embedding; z ~ N(0, 1), s the strength
    "noise": lambda x, s, z: x + s * z,
    "zero": lambda x, s, z: 0 * x,
    "flip": lambda x, s, z: -x,
    "shift": lambda x, s, z: x + s * z.sign(),
    "sub": lambda x, s, z: x - s,
    "add": lambda x, s, z: x + s,
}
PLACES = ("first", "rand", "top", "least")  # which entries: the first, random, largest, smallest
CORRUPTIONS = [f"{action}_{place}" for action in ACTIONS for place in PLACES] + ["reverse", "shuffle"]


def corrupt(e, kind, dims, strength, seed):
    """ECO's corruption of embeddings e (T, d) -> (T, d), computed in float32, the same for the same seed.

    kind: one of CORRUPTIONS. "top" and "least" go by size: by value for sub and add, by absolute value for the others.
    """
    draw, (T, d) = torch.Generator().manual_seed(seed), e.shape
    if kind in ("reverse", "shuffle"):
        return e.flip(0) if kind == "reverse" else e[torch.randperm(T, generator=draw).to(e.device)]
    (action, place), x = kind.split("_"), e.float()
    size = x if action in ("sub", "add") else x.abs()
    order = {"first": -torch.arange(d).float().expand(T, d), "rand": torch.rand(d, generator=draw).expand(T, d),
             "top": size, "least": -size}[place]
    chosen = order.to(e.device).topk(min(dims, d), dim=-1).indices  # (T, dims)
    z = torch.randn(chosen.shape, generator=draw).to(e.device)
    limit = torch.finfo(e.dtype).max
    return x.scatter(1, chosen, ACTIONS[action](x.gather(1, chosen), strength, z)).clamp(-limit, limit).to(e.dtype)


@torch.no_grad()
def averages(model, examples, batch_size=32):
    """The final-norm outputs of each example's prompt, averaged over its tokens -> (n, d) float32."""
    found = torch.empty(len(examples), model.config.hidden_size)
    for indices in by_length(examples, batch_size):
        prompts = [examples[i].prompt for i in indices]
        lengths = torch.tensor([[len(ids)] for ids in prompts])  # (B, 1)
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)  # (B, T)
        h = model.hidden(tokens.to(model.device)).float().cpu()  # (B, T, d)
        inside = (torch.arange(tokens.shape[1]) < lengths)[..., None]  # (B, T, 1)
        found[indices] = (h * inside).sum(dim=1) / lengths
    return found


class Eco:
    """Corrupts the embeddings of queries whose forget probability, sigmoid(x w + b) of averages x, is above tau."""

    def __init__(self, info, tensors):
        self.info, self.w, self.b = info, tensors["w"], tensors["b"]  # (d,), (1,)

    def probability(self, x):
        """Averages (n, d) -> the probability that each is a query to forget, (n,)."""
        return torch.sigmoid(x @ self.w + self.b)

    def apply(self, model, tokenizer, examples):
        """-> the examples, a function that embeds their prompts, and what is to be reported."""
        p = self.probability(averages(model, examples)).tolist() if examples else []
        flagged = {e.prompt for e, value in zip(examples, p) if value > self.info["tau"]}
        how = [self.info[name] for name in ("corruption", "dims", "strength")]

        def embed(prompts, tokens):
            """Prompts and the tokens (B, T) they begin -> embeddings (B, T, d); a prompt's last token stays, as in
            their code, and so do answers."""
            e = model.embed_tokens(tokens)
            for row, prompt in enumerate(prompts):
                if prompt in flagged:
                    last, seed = len(prompt) - 1, zlib.crc32(repr((self.info["seed"], prompt)).encode())
                    e[row, :last] = corrupt(e[row, :last], *how, seed)
            return e

        return examples, embed, {"flagged": sum(e.prompt in flagged for e in examples) / max(len(examples), 1)}


class Icul:
    """Puts rows with answers in front of each query: the nearest forget rows, whose labels are wrong, then others."""

    def __init__(self, info, tensors):
        self.info, self.x = info, tensors["x"]  # (n, d), the forget rows' averages

    def apply(self, model, tokenizer, examples):
        """-> the examples with their context in front, no function that embeds, and nothing to be reported."""
        before, after = self.info["template"].split("{text}")

        def line(text, label):
            return [*tokenizer.encode_inside(before + text + after), *answer_ids(tokenizer, label),
                    *tokenizer.encode_inside("\n\n")]

        wrong, right = ([line(*row) for row in self.info[side]] for side in ("wrong", "right"))
        near = F.normalize(averages(model, examples), dim=1) @ F.normalize(self.x, dim=1).T  # (B, n)
        front, n = sum(right, []), len(tokenizer.bos)
        found = []
        for e, nearest in zip(examples, near.topk(min(self.info["k"], len(wrong)), dim=1).indices.tolist()):
            ids = (*e.ids[:n], *sum((wrong[i] for i in nearest), []), *front, *e.ids[n:])
            if len(ids) > model.config.max_position_embeddings:
                raise ValueError(f"icul: a query and its context are {len(ids)} tokens, the model takes "
                                 f"{model.config.max_position_embeddings}: make it with fewer --context rows")
            found.append(replace(e, ids=ids))
        return found, None, {}


KINDS = {"eco": Eco, "icul": Icul}


def is_guard(folder):
    return (Path(folder) / "guard.json").is_file()


def save(folder, info, tensors):
    folder, shapes = Path(folder), {name: list(t.shape) for name, t in tensors.items()}
    write_whole(folder / "guard.safetensors", lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
    write_json(folder / "guard.json", {"format": "spul guard 1", **info, "shapes": shapes})


def load(folder, base_sha256):
    """A guard's folder -> Eco or Icul, and guard.json. Raises ValueError if it is not whole, or for another model."""
    folder = Path(folder)
    info = read_json(folder / "guard.json")
    if info.get("format") != "spul guard 1" or info.get("method") not in KINDS:
        raise ValueError(f"{folder / 'guard.json'}: not as baselines.py writes it")
    needed = {"eco": ("tau", "corruption", "dims", "strength", "seed"), "icul": ("k", "wrong", "right", "template")}
    if missing := [name for name in needed[info["method"]] if name not in info]:
        raise ValueError(f"{folder / 'guard.json'}: no {', '.join(missing)} in it")
    if info.get("base_sha256") != base_sha256:
        raise ValueError(f"{folder}: made for another model ({info.get('model')}), and means nothing to this one")
    try:
        tensors = load_file(folder / "guard.safetensors")
    except (safetensors.SafetensorError, OSError) as e:
        raise ValueError(f"{folder / 'guard.safetensors'}: no whole file: {e}") from None
    if {name: list(t.shape) for name, t in tensors.items()} != info.get("shapes"):
        raise ValueError(f"{folder / 'guard.safetensors'}: not the tensors that guard.json speaks of")
    return KINDS[info["method"]](info, tensors), info
