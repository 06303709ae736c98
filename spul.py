"""Soft Prompting for Unlearning (Bhaila, Van and Wu, arXiv 2406.12038v2): the prompt, the losses, the prompt's folder.

A frozen model h, prompt vectors phi in front of every text x. On a forget row the answer becomes a generic one, on a
retain row it stays:

    L = L_f + alpha L_r + beta L_kl
    L_f  = mean over forget rows of -log P(generic answer | phi, x)
    L_r  = mean over retain rows of -log P(true answer    | phi, x)
    L_kl = mean over retain rows of KL( h(. | x) || h(. | phi, x) )

Log-probabilities and divergences are summed over a row's answer tokens; each mean is over the term's own rows of the
batch, so a term without rows is 0. By default L_kl stands where the answer is predicted ("aligned"). The released code
shifts the cross-entropies but not L_kl, which there compares what comes *after* the answer ("after-label").

Letters: p prompt tokens, d width, N answer tokens of a batch, V vocabulary.
"""

import hashlib
import json
import math
import random
from pathlib import Path

import safetensors
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from files import read_json, weight_files, write_json, write_whole

PROMPT_FILES = ("adapter_model.safetensors", "adapter_config.json", "spul.json")
STATE = "state.safetensors"


# --------------------------------------------------------------------------------------------------- the prompt


class SoftPrompt(nn.Module):
    """phi = W3 relu(W2 relu(W1 E + b1) + b2) + b3, E (p, d), W1: d -> hidden, the released code's p-tuning encoder.

    Its parameter counts are the paper's (1.19M at p 30, d 4096), though the paper's text describes free vectors. Those
    are hidden = 0: phi = E, at first p rows of `table` (V, d); they want a much larger learning rate.
    """

    def __init__(self, p, d, hidden=128, table=None):
        super().__init__()
        self.E = nn.Parameter(torch.randn(p, d))  # N(0, 1), as torch's nn.Embedding
        self.mlp = nn.Identity()
        if hidden:
            self.mlp = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                     nn.Linear(hidden, d))
        elif table is not None:
            with torch.no_grad():
                self.E.copy_(table[torch.randint(len(table), (p,), device="cpu").to(table.device)])

    def forward(self):
        return self.mlp(self.E)  # phi (p, d), float32


# --------------------------------------------------------------------------------------------------- the losses


def forget_loss(logits, generic, n):
    """L_f. logits (N, V) that predict the generic answers' tokens generic (N,), of n forget rows -> scalar."""
    return F.cross_entropy(logits.float(), generic, reduction="sum") / max(n, 1)


def retain_loss(logits, targets, n):
    """L_r. logits (N, V) that predict the true answers' tokens targets (N,), of n retain rows -> scalar."""
    return F.cross_entropy(logits.float(), targets, reduction="sum") / max(n, 1)


def kl_loss(logits, teacher, n):
    """L_kl = KL(teacher || prompted). Logits (N, V) with and teacher (N, V) without the prompt, of n retain rows."""
    log_q, log_p = F.log_softmax(logits.float(), dim=-1), F.log_softmax(teacher.float(), dim=-1)  # (N, V)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / max(n, 1)  # sum of p (log p - log q)


def spul_loss(loss_f, loss_r, loss_kl, alpha, beta):
    """L = L_f + alpha L_r + beta L_kl."""
    return loss_f + alpha * loss_r + beta * loss_kl


# ------------------------------------------------------------------------------------- corruption while training
# Not the paper's: a prompt that has seen its queries changed should forget when they come changed. Forget and retain
# rows alike, so that neither side can be told by it; text (B, T) is True at what may be changed, a row's own text.

CORRUPTIONS = {"none": 0.0, "noise": 0.3, "adversarial": 0.3, "semantic": 0.2}  # and the strength, if none is given


def noise(e, text, strength, unit, draws):
    """e + s u z: embeddings e (B, T, d), z ~ N(0, I) from each row's own generator in draws, u = unit the root mean
    square of the embedding table's entries."""
    e = e.clone()
    for row, draw in enumerate(draws):
        here = e[row, text[row]]  # (t, d)
        e[row, text[row]] = here + strength * unit * torch.randn(
            here.shape, generator=draw, device=e.device).to(e.dtype)
    return e


def adversarial(e, text, strength, g):
    """e + s mean|e| g / |g|, g (B, T, d) the gradient of each row's own loss: every token's step has the same length,
    s of the mean length of the batch's embeddings. A token without a gradient stays."""
    if not text.any():
        return e
    length = e.float().norm(dim=-1)[text].mean()
    step = strength * length * F.normalize(g.float(), dim=-1) * text[..., None]  # (B, T, d)
    return e + step.to(e.dtype)


def neighbours(table, ids, special, k=5):
    """The embedding table (V, d) and ids of interest -> (V, k), each one's nearest by cosine, special tokens and itself
    left out; the rows of other ids, and of special ones, hold the id itself."""
    near = torch.arange(len(table), device=table.device)[:, None].repeat(1, k)  # (V, k)
    unit, out = F.normalize(table.float(), dim=-1), torch.tensor(sorted(special), dtype=torch.long, device=table.device)
    for part in torch.tensor(sorted(set(ids) - set(special)), dtype=torch.long, device=table.device).split(512):
        cosine = unit[part] @ unit.T  # (512, V)
        cosine[:, out] = cosine[torch.arange(len(part)), part] = -math.inf
        near[part] = cosine.topk(k, dim=-1).indices
    return near


def semantic(tokens, text, strength, near, draws):
    """Tokens (B, T), each of which becomes, with probability s, one of its k neighbours in near (V, k)."""
    tokens = tokens.clone()
    for row, draw in enumerate(draws):
        here = tokens[row, text[row]]  # (t,)
        hit = torch.rand(len(here), generator=draw, device=tokens.device) < strength
        which = torch.randint(near.shape[1], (len(here),), generator=draw, device=tokens.device)
        tokens[row, text[row]] = torch.where(hit, near[here, which], here)
    return tokens


def corruption(model, kind, strength, seed, table, examples, special):
    """-> a function of a batch, the prompt's front, the step and the rows' numbers, which changes the rows' own texts:
    what it gives stands in for their tokens, new at each step. table: the token embeddings (V, d). None for "none".

    Only the prompted model reads it. L_kl's teacher has read the query as it was: it is to be answered like that.
    """
    if kind == "none":
        return None
    unit = table.float().square().mean().sqrt()
    if kind == "semantic":
        near = neighbours(table, {i for e in examples for i in e.ids[slice(*e.text)]}, special)

    def corrupt(batch, front, step, rows):
        seeds = [random.Random(f"corrupt {seed} {step} {row}").getrandbits(62) for row in rows]
        draws = [torch.Generator(model.device).manual_seed(s) for s in seeds]
        if kind == "semantic":
            return semantic(batch.tokens, batch.text, strength, near, draws)
        e = model.front(ids=batch.tokens.flatten().tolist()).unflatten(0, batch.tokens.shape).detach()  # (B, T, d)
        if kind == "noise":
            return noise(e, batch.text, strength, unit, draws)
        logits = model.head(model.hidden(e.requires_grad_(), front, batch.at))  # (N, V)
        own = F.cross_entropy(logits, batch.targets, reduction="sum")  # each row's L_f or L_r, whichever is its
        return adversarial(e.detach(), batch.text, strength, torch.autograd.grad(own, e)[0])

    return corrupt


# ---------------------------------------------------------------------------------------------- the prompt on disk


def fingerprint(folder):
    """A hex digest that tells one model from another: config.json, and of every weight file name, size, header and a
    piece of each tensor. Reads a few megabytes of a 13 GB model; two models that differ only between the pieces agree.
    """
    files = weight_files(folder)
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for file in files:
        with open(file, "rb") as f:
            size = f.seek(0, 2)
            f.seek(0)
            length = int.from_bytes(f.read(8), "little")
            header = f.read(min(length, size))
            digest.update(f"{file.name} {size}".encode() + header)
            try:
                tensors = [tuple(map(int, t["data_offsets"])) for name, t in json.loads(header).items()
                           if name != "__metadata__"]
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f"{file}: no whole safetensors file") from None
            for begin, end in tensors:
                f.seek(8 + len(header) + (begin + end) // 2)
                digest.update(f.read(min(4096, (end - begin + 1) // 2)))
    return digest.hexdigest()


def save_prompt(folder, phi, config, info):
    """Write phi (p, d) as a folder that `peft.PeftModel.from_pretrained` loads; spul.json, which completes it, last."""
    folder, (p, d) = Path(folder), phi.shape
    tensors = {"prompt_embeddings": phi.detach().float().cpu().contiguous()}
    write_whole(folder / "adapter_model.safetensors", lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
    write_json(folder / "adapter_config.json", {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": p, "token_dim": d,
        "num_transformer_submodules": 1, "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers, "inference_mode": True, "revision": None, "auto_mapping": None,
        "base_model_name_or_path": info["model"], "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None})  # no other keys: older peft refuses what it does not know
    write_json(folder / "spul.json", {"format": "spul 1", "p": p, "d": d, **info})


def load_prompt(folder, base_sha256=None):
    """A prompt folder -> phi (p, d) float32 and the contents of spul.json.

    Raises ValueError if it is no finished prompt, or if its model's fingerprint is not base_sha256 (None: not asked).
    """
    folder = Path(folder)
    if not (folder / "spul.json").is_file():
        hint = "its training has not finished: train.py --resume" if (folder / STATE).exists() else "no prompt folder"
        raise FileNotFoundError(f"{folder}: no spul.json: {hint}")
    info, file = read_json(folder / "spul.json"), folder / "adapter_model.safetensors"
    template = info.get("template", 0)  # None where the rows were prompts themselves
    lists = [info.get("labels") or [], info.get("generic"), [] if template is None else [template]]
    if info.get("format") != "spul 1" or not all(
            isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
        raise ValueError(f"{folder / 'spul.json'}: format, template, labels or generic are not as train.py writes them")
    try:
        phi = load_file(file)["prompt_embeddings"].float()
    except (safetensors.SafetensorError, KeyError) as e:
        raise ValueError(f"{file}: no whole file with prompt_embeddings: {e}") from None
    if phi.dim() != 2 or list(phi.shape) != [info.get("p"), info.get("d")] or not phi.isfinite().all():
        raise ValueError(f"{file}: prompt_embeddings {tuple(phi.shape)} is not what spul.json says, or not finite")
    if base_sha256 and info.get("base_sha256") != base_sha256:
        raise ValueError(f"{folder}: trained on another model ({info.get('model')}), and means nothing to this one")
    return phi, info


# ------------------------------------------------------------------------------------------------ training's state


def save_state(folder, module, optimizer, step, run):
    """What a run needs to go on after `step` steps: what learns in the module (the prompt's encoder), the optimizer's
    moments, and `run`, which describes the run.

    No random states: every draw comes from the seed and the number of its epoch or step.
    """
    learned = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in learned.items()}
    for name, parameter in learned.items():
        for key, t in optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = t.detach().cpu().contiguous()
    metadata = {"step": str(step), "run": json.dumps(run)}
    write_whole(Path(folder) / STATE, lambda temporary: save_file(tensors, temporary, metadata))


def read_run(folder):
    """The step and the description of the run in a state file. Raises ValueError if the file is not whole."""
    file = Path(folder) / STATE
    try:
        with safetensors.safe_open(file, framework="pt") as f:
            metadata = f.metadata()
        return int(metadata["step"]), json.loads(metadata["run"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{file}: not a whole state file ({e}): start again with --overwrite") from None


def load_state(folder, module, optimizer):
    """Put a state file's tensors back into module and optimizer."""
    tensors = load_file(Path(folder) / STATE)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            parameter.copy_(tensors[name])
            state = {key.rpartition("/")[2]: t for key, t in tensors.items() if key.rpartition("/")[0] == name}
            optimizer.state[parameter] = {key: t if key == "step" else t.to(parameter.device)
                                          for key, t in state.items()}
