"""Make a model memorise data: the model to unlearn from.

    python finetune.py --model BASE --data FILE [FILE ...] --out DIR [--rank 16 | --full]

LoRA (Hu et al., arXiv 2106.09685) on every linear layer of the decoder, cross-entropy on the answer only, merged into
the weights in float32 at the end and saved as a plain model folder. `fit` trains whatever parameters ask for gradients;
demo/make.py trains the demo model from nothing with it.
"""

import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import collate, epoch_batches, make_examples, read_rows, read_template
from eval import Parser, add_options, answer_hidden, filled, load_model, number, row_limit, run, score
from train import learning_rate


class Lora(nn.Module):
    """A frozen linear layer plus scale * B A, A (r, in) and B (out, r) in float32; B = 0 at first: nothing changes."""

    def __init__(self, base, r, scale):
        super().__init__()
        self.base, self.scale = base, scale
        self.A = nn.Parameter(torch.empty(r, base.in_features, dtype=torch.float32, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, dtype=torch.float32, device=base.weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        return self.base(x) + self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    def merged(self):
        weight = self.base.weight.float() + self.scale * self.B @ self.A
        self.base.weight = nn.Parameter(weight.to(self.base.weight.dtype), requires_grad=False)
        return self.base


def swap(model, kind, make):
    """Replace every module of a kind inside the decoder's layers by make(module)."""
    for parent in list(model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind) and not isinstance(parent, Lora):
                setattr(parent, name, make(child))


def accuracy(model, examples):
    scores = score(model, answer_hidden(model, examples), examples)
    return sum(right for right, _, _ in scores) / len(examples)


def fit(model, examples, *, lr, epochs, batch_size, seed, weight_decay=1e-3, text_weight=0.0):
    """Train the parameters that ask for gradients; prints the accuracy after each epoch.

    The loss is the mean cross-entropy of the answers' tokens, plus text_weight times that of all tokens before them.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    plan = [epoch_batches(examples, batch_size, seed, epoch) for epoch in range(epochs)]
    steps, step, began = sum(map(len, plan)), 0, time.perf_counter()
    for epoch, batches in enumerate(plan):
        for indices in tqdm(batches, desc=f"epoch {epoch + 1} of {epochs}", unit="step", leave=False):
            batch = collate([examples[i] for i in indices], model.device)
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr)
            if text_weight:
                h = model.hidden(batch.tokens)  # (B, T, d)
                columns = torch.arange(batch.tokens.shape[1] - 1, device=model.device)
                first = torch.full((len(indices),), len(columns), device=model.device)
                first = first.scatter_reduce(0, batch.rows, batch.columns, "amin")  # (B,), where the answer begins
                text = columns < first[:, None]  # (B, T - 1), positions that predict the text
                loss = F.cross_entropy(model.head(h[batch.at]), batch.targets) + text_weight * F.cross_entropy(
                    model.head(h[:, :-1][text]), batch.tokens[:, 1:][text])
            else:
                loss = F.cross_entropy(model.head(model.hidden(batch.tokens, at=batch.at)), batch.targets)
            if not loss.isfinite():
                raise FloatingPointError(f"step {step + 1} of {steps}: the loss is not finite; lower --lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            step += 1
        print(f"epoch {epoch + 1}: accuracy {100 * accuracy(model, examples):.1f} %, "
              f"{time.perf_counter() - began:.0f} s", flush=True)


def main(argv=None):
    parser = Parser(__doc__)
    add_options(parser, data=False)
    group = parser.add_argument_group("memorising")
    group.add_argument("--data", nargs="+", required=True, metavar="FILE", help="JSON Lines to memorise")
    group.add_argument("--out", type=filled, required=True, metavar="DIR", help="the new model folder")
    group.add_argument("--rank", type=number(int, 1), default=16, metavar="R",
                       help="of LoRA on all linear layers, scale 2 (default 16; the paper: 16, scale 4, on q and v)")
    group.add_argument("--full", action="store_true", help="train all weights instead")
    group.add_argument("--lr", type=number(float, 0, above=True), help="peak (default 1e-3 for LoRA, 2e-5 with --full)")
    group.add_argument("--epochs", type=number(int, 1), default=5)
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    args = parser.parse_args(argv)
    if not args.model:
        raise ValueError("--model DIR is missing")
    if args.quantize:
        raise ValueError("--quantize: memorising needs weights of 16 or 32 bit")
    template, out = read_template(args.template or "sentiment"), Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is no empty folder")
    rows = [row for file in args.data for row in read_rows(file)]
    model, tokenizer = load_model(args)
    examples, cut = make_examples(rows, tokenizer, template, row_limit(args, 0))
    torch.manual_seed(args.seed)
    if args.full:
        model.requires_grad_(True)
    else:
        swap(model, nn.Linear, lambda linear: Lora(linear, args.rank, 2.0))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{len(examples)} rows, {cut} texts cut; {trained:,} parameters trained; "
          f"accuracy {100 * accuracy(model, examples):.1f} %")
    fit(model, examples, lr=args.lr or (2e-5 if args.full else 1e-3), epochs=args.epochs, batch_size=args.batch_size,
        seed=args.seed)
    swap(model, Lora, Lora.merged)
    print(f"merged: accuracy {100 * accuracy(model, examples):.1f} %")
    out.mkdir(parents=True, exist_ok=True)
    for file in Path(args.model).iterdir():  # the tokenizer and what else goes with it
        if file.is_file() and not file.name.endswith((".safetensors", ".bin", ".index.json", "config.json")) \
                or file.name == "tokenizer_config.json":
            shutil.copyfile(file, out / file.name)
    model.save_pretrained(out)


if __name__ == "__main__":
    run(main)
