"""Soft Prompting for Unlearning (Bhaila, Van and Wu, arXiv 2406.12038v2): prompt, losses, folder.

A frozen model h, and prompt vectors phi before every text x. On a forget row the answer becomes a
generic one, on a retain row it stays as it was. Only phi learns:

    L      = L_f + alpha L_r + beta L_kl + gamma L_keep
    L_f    = mean over forget rows of  -log P(generic answer | phi, x)
    L_r    = mean over retain rows of  -log P(true answer    | phi, x)
    L_kl   = mean over retain rows of  KL( h(. | x) || h(. | phi, x) )
    L_keep = mean over the tokens of general text x of  KL( h(. | x_<t) || h(. | phi, x_<t) )

Log-probabilities and divergences of a row are summed over its answer's tokens. Each mean is over
the rows of its own side in the batch, so a side without rows counts 0. Rows that are drawn more
often than others count less in it (support/batches.py).

L_keep is our addition; gamma 0 is the paper. The other terms see only queries like the rows. L_keep
sees text of any kind. It is the context distillation of Cartridges (Eyuboglu et al., arXiv
2506.06266), with the model without a prompt as teacher.

Letters: p prompt tokens, d width, V vocabulary, n answer tokens of a row, N of a batch, N_r of
them in retain rows.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from data import by_length, collate, common_prefix
from support.files import read_json, write_json, write_tensors
from support.identity import check_fingerprint
from support.processes import ranks, sum_over_processes
from support.state import STATE, run_folder


# -------------------------------------------------------------------------------------- the prompt


class SoftPrompt(nn.Module):
    """phi (p, d), by the released code's p-tuning encoder: from each row e of E (p, d)

        W3 relu(W2 relu(W1 e + b1) + b2) + b3,   W1 (hidden, d), W2 (hidden, hidden), W3 (d, hidden)

    Its parameter counts are the ones the paper reports (1.19M for p 30, d 4096). hidden=0 is E
    itself, free vectors, as the paper's text says.

    earlier (q, d): the vectors of earlier prompts, which come first and do not learn. phi is then
    (q + p, d).
    """

    def __init__(self, p, d, hidden=128, earlier=None):
        super().__init__()
        if earlier is None:
            earlier = torch.zeros(0, d)
        self.register_buffer("earlier", earlier.clone())  # (q, d)
        self.E = nn.Parameter(torch.randn(p, d))  # N(0, 1), as nn.Embedding
        self.mlp = nn.Identity()
        if hidden:
            self.mlp = nn.Sequential(
                nn.Linear(d, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, d),
            )

    def forward(self):
        return torch.cat([self.earlier, self.mlp(self.E)])  # phi (q + p, d), float32


# -------------------------------------------------------------------------------------- the losses


def token_losses(logits, targets):
    """The cross-entropy of each token of the answers, (N,): logits (N, V) predict targets (N,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def answer_loss(losses, rows, weights=1.0):
    """L_f on generic answers, L_r on true ones, from the `token_losses` (N,) of `rows` rows.

    The sum over a row's answer, the mean over rows; 0 without rows. weights (N,): what each
    token's row counts in the mean.
    """
    return (losses * weights).sum() / max(rows, 1)


def kl_loss(logits, teacher_logits, count, weights=1.0):
    """The sum over tokens of KL(teacher || prompted), divided by count -> scalar.

    L_kl on the answers of `count` retain rows, L_keep on general text of `count` tokens. logits
    (N, V) with the prompt, teacher_logits (N, V) without. weights (N,): as in `answer_loss`.
    """
    log_q = F.log_softmax(logits.float(), dim=-1)  # (N, V)
    log_p = F.log_softmax(teacher_logits.float(), dim=-1)  # (N, V)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True)  # p (log p - log q)
    return (kl.sum(-1) * weights).sum() / max(count, 1)


@dataclass(frozen=True)
class Objective:
    """The weights of the loss's terms, and where L_kl compares distributions.

    kl_position: "aligned", where the answer is predicted; or "after-label", one position later.
    The released code shifts the cross-entropies but not L_kl, so there it compares what follows
    the answer.
    """

    alpha: float = 3.0  # paper 1
    beta: float = 0.5  # paper
    kl_position: str = "aligned"
    gamma: float = 8.0  # paper 0

    def total(self, loss_f, loss_r, loss_kl, loss_keep=0.0):
        """L = L_f + alpha L_r + beta L_kl + gamma L_keep."""
        return loss_f + self.alpha * loss_r + self.beta * loss_kl + self.gamma * loss_keep

    @property
    def kl_shift(self):
        """How many positions after the predicting one L_kl compares: 0 or 1."""
        return int(self.kl_position == "after-label")


# ------------------------------------------------------------------------------------- the teacher


@torch.no_grad()
def answer_hidden(model, examples, phi=None, shift=0, batch_size=32):
    """The final-norm outputs that predict each example's answer: a list of (n, d), in their order.

    Without phi it is L_kl's teacher, kept as these and not as logits: d numbers a token and not V.
    phi (p, d): the prompt before every text. shift 1: one position later, for "after-label".
    Several processes each compute a share of the batches, and all get the whole list.
    """
    shared_ids = common_prefix(examples)
    prefix = model.prefix(phi, shared_ids)
    batches = by_length(examples, batch_size)
    outputs = [None] * len(examples)
    rank, processes = ranks()
    rounds = math.ceil(len(batches) / processes)
    # Every process does as many rounds, as sharded weights require. A surplus one is dropped.
    turns = range(rank, rounds * processes, processes)
    for turn in tqdm(turns, "reading rows", unit="batch", leave=False, delay=5, disable=rank > 0):
        indices = batches[turn % len(batches)]
        batch = collate([examples[i] for i in indices], model.device, shared_ids, keep_last=shift)
        h = model.hidden(batch.tokens, prefix)  # (B, T, d)
        h = h[batch.rows, batch.columns + shift]  # (N, d)
        if turn < len(batches):
            for i, part in zip(indices, h.split([examples[i].n for i in indices])):
                outputs[i] = part.clone()  # not a view, which would keep all of h
    if processes > 1:
        zeros = model.norm.weight.new_zeros
        outputs = [zeros(e.n, h.shape[1]) if o is None else o for e, o in zip(examples, outputs)]
        sum_over_processes(outputs)
    return outputs


class Teacher:
    """The model without the prompt: its `answer_hidden` at the retain rows' answers, kept.

    A row is read when it is first needed.
    """

    def __init__(self, model, examples, shift=0, batch_size=32, earlier=None):
        """shift, batch_size: of `answer_hidden`. earlier (q, d): prompts before all rows."""
        self.model = model
        self.examples = examples
        self.settings = {"phi": earlier, "shift": shift, "batch_size": batch_size}
        self.outputs = {}  # {index: (n, d)}

    def learn(self, indices):
        """Read the retain rows among the indices that were not read yet."""
        unread = [i for i in dict.fromkeys(indices) if i not in self.outputs]
        unread = [i for i in unread if not self.examples[i].forget]
        if unread:
            examples = [self.examples[i] for i in unread]
            hidden = answer_hidden(self.model, examples, **self.settings)
            self.outputs |= zip(unread, hidden)

    def of(self, indices):
        """The outputs for the retain rows among the indices, (N_r, d)."""
        weight = self.model.norm.weight
        none = torch.zeros(0, len(weight), dtype=self.model.dtype, device=weight.device)
        return torch.cat([none, *(self.outputs[i] for i in indices if not self.examples[i].forget)])


# ------------------------------------------------------------------------------ the prompt on disk


def save_prompt(folder, phi, config, info):
    """Write phi (p, d) as a folder that `peft.PeftModel.from_pretrained` loads.

    info goes into spul.json, which is written last: its presence marks the folder complete.
    """
    folder = Path(folder)
    p, d = phi.shape
    phi = phi.detach().float().cpu().contiguous()
    write_tensors(folder / "adapter_model.safetensors", {"prompt_embeddings": phi})
    peft_config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": p,
        "token_dim": d,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "inference_mode": True,
        "revision": None,
        "auto_mapping": None,
        "base_model_name_or_path": info["model"],
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
    }  # no other keys: older versions of peft refuse those they do not know
    write_json(folder / "adapter_config.json", peft_config)
    write_json(folder / "spul.json", {"format": "spul 1", "p": p, "d": d, **info})


def load_prompt(folder, model_folder=None):
    """A prompt folder -> phi (p, d) float32, and the contents of spul.json.

    Raises ValueError or OSError if it is not a finished prompt, or if it was trained on another
    model than the one in model_folder (None: not checked).
    """
    folder = Path(folder)
    if not (folder / "spul.json").is_file():
        reason = "not a prompt folder"
        if (run_folder(folder) / STATE).exists():
            reason = "its training has not finished: train.py --resume"
        raise FileNotFoundError(f"{folder}: no spul.json: {reason}")
    info = read_json(folder / "spul.json")
    check_prompt_info(info, folder / "spul.json")
    file = folder / "adapter_model.safetensors"
    try:
        phi = load_file(file)["prompt_embeddings"].float()
    except (safetensors.SafetensorError, KeyError) as e:
        raise ValueError(f"{file}: not a complete file with prompt_embeddings: {e}") from None
    if list(phi.shape) != [info.get("p"), info.get("d")] or not phi.isfinite().all():
        shape = tuple(phi.shape)
        raise ValueError(f"{file}: prompt_embeddings {shape}: not as spul.json says, or not finite")
    if model_folder:
        check_fingerprint(info.get("base_sha256"), model_folder, folder)
    return phi, info


def check_prompt_info(info, file):
    """Raises ValueError if the contents of spul.json are not as train.py writes them."""
    template = info.get("template", 0)  # None where the rows were prompts themselves
    is_whole = info.get("format") == "spul 1" and isinstance(template, str | dict | None)
    for words in (info.get("generic"), info.get("labels") or []):
        is_list = isinstance(words, list)
        is_whole = is_whole and is_list and all(isinstance(word, str) for word in words)
    if not is_whole:
        raise ValueError(f"{file}: format, template, labels or generic are not as train.py writes")
