"""Make a model memorise data: the model to unlearn from. Or merge an adapter of the peft package into its model.

    python finetune.py --model BASE --data FILE [FILE ...] --out DIR [--full] [--resume]
    python finetune.py --model BASE --adapter DIR --out DIR

LoRA (Hu et al., arXiv 2106.09685) on the decoder's linear layers, cross-entropy on the answer only, saved as peft does
in the folder `adapter` of a plain model folder, into whose weights it is merged. The merge is the same to the last bit
on every machine: who has the base and the adapter, a few megabytes, has the very model. `fit` is the loop of all that
changes weights here: baselines.py unlearns with it, demo/make.py trains the demo's model from nothing.
"""

import argparse
import hashlib
import math
import platform
import re
import shutil
import time
from pathlib import Path

import safetensors
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import spul
from cli import Parser, add_options, filled, hardware, load_model, number, row_limit, run
from data import collate, common_front, epoch_batches, make_examples, read_rows, read_template
from eval import answer_hidden, score
from files import read_json, weight_files, write_json, write_whole
from model import Llama
from scale import peak_memory
from train import WEIGHT_DECAY, interrupt, learning_rate

# ------------------------------------------------------------------------------------------ what is trained


class Lora(nn.Module):
    """A frozen linear layer plus scale * B A, A (r, in) and B (out, r) in float32; B = 0 at first: nothing changes."""

    def __init__(self, base, r, scale, dropout=0.0):
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        self.A = nn.Parameter(torch.empty(r, base.in_features, dtype=torch.float32, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, dtype=torch.float32, device=base.weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        x_ = F.dropout(x, self.dropout, torch.is_grad_enabled())  # not while measuring
        thin = F.linear(x_, self.A.to(x.dtype))  # (n, r)
        return torch.addmm(self.base(x), thin, (self.scale * self.B).to(x.dtype).T)  # (n, out), x (n, in)

    def merged(self, factor=1.0):
        """The linear layer with W + factor * scale * B A, computed in float32."""
        weight = self.base.weight.float() + factor * self.scale * self.B @ self.A
        self.base.weight = nn.Parameter(weight.to(self.base.weight.dtype), requires_grad=False)
        return self.base


def swap(model, kind, make, names=None):
    """Replace every module of a kind inside the decoder's layers, or those with one of the names, by make(module)."""
    for parent in list(model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind) and not isinstance(parent, Lora) and (not names or name in names):
                setattr(parent, name, make(child))


def add_lora_options(group):
    """The options of a LoRA, which baselines.py has, too."""
    group.add_argument("--rank", type=number(int, 1), default=16, metavar="R", help="of LoRA (default 16, paper)")
    group.add_argument("--lora-alpha", type=number(float, 0, above=True), metavar="A",
                       help="scale times rank (default 2 x rank; paper 64)")
    group.add_argument("--dropout", type=number(float, 0, 0.99), default=0.0, help="of LoRA's input (paper 0.1)")
    group.add_argument("--targets", type=filled, metavar="A,B",
                       help="layers with LoRA (default all linear ones; paper q_proj,v_proj)")


def make_trainable(model, args):
    """All weights, in float32, or a LoRA on the linear layers -> the parameters that learn.

    bfloat16 keeps 8 bits of a weight: steps as small as fine-tuning's would be rounded away. So all weights learn in
    float32, and `casting` has their products computed in the dtype that was asked for.
    """
    torch.manual_seed(args.seed)
    if args.full:
        model.float().requires_grad_(True)
    else:
        targets = args.targets and args.targets.split(",")
        known = {name for parent in model.layers[0].modules() for name, child in parent.named_children()
                 if isinstance(child, nn.Linear)}
        if targets and set(targets) - known:
            raise ValueError(f"--targets {args.targets}: the linear layers are {', '.join(sorted(known))}")
        scale = (args.lora_alpha or 2 * args.rank) / args.rank
        swap(model, nn.Linear, lambda linear: Lora(linear, args.rank, scale, args.dropout), targets)
    return [p for p in model.parameters() if p.requires_grad]


def casting(model, dtype):
    """Where float32 weights are multiplied in bfloat16; elsewhere it does nothing."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16 != model.dtype)


# -------------------------------------------------------------------------------------------------- the loop


def fit(model, plan, loss, *, lr, seed, weight_decay=WEIGHT_DECAY, clip=1.0, out=None, description=None, resume=False,
        dtype=None, after_epoch=None):
    """Minimise loss(indices, step) over the plan, epochs of batches of indices -> how many steps, in how many seconds.

    A loss of None ends it. out: a folder for the state, written after each epoch and at Ctrl-C, from which `resume`
    goes on; description: what the state's run has to agree with. after_epoch(epoch) is called between epochs. Raises
    KeyboardInterrupt once the state is saved, FloatingPointError if the loss is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)
    steps, step, first, seconds = sum(map(len, plan)), 0, 0, 0.0

    def save():
        spul.save_state(out, model, optimizer, step, {**description, "seconds": seconds})

    if resume:
        first, earlier = spul.read_run(out)
        seconds = earlier.pop("seconds", 0.0)
        if earlier != description:
            changed = [name for name in description if earlier.get(name) != description[name]]
            raise ValueError(f"--resume: not the run that was started in {out}: {', '.join(changed)} changed")
        spul.load_state(out, model, optimizer)
    with interrupt() as stopping:
        for epoch, batches in enumerate(plan):
            for indices in tqdm(batches, desc=f"epoch {epoch + 1} of {len(plan)}", unit="step", leave=False):
                step, began = step + 1, time.perf_counter()
                if step <= first:
                    continue
                optimizer.param_groups[0]["lr"] = learning_rate(step - 1, steps, lr)
                torch.manual_seed((seed * 1_000_003 + step) % 2**63)  # dropout: the same again after --resume
                with casting(model, dtype or model.dtype):
                    value = loss(indices, step)
                if value is None:
                    return step - 1, seconds
                if not value.isfinite():
                    raise FloatingPointError(f"step {step} of {steps}: the loss is not finite; lower --lr {lr:g}")
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                nn.utils.clip_grad_norm_(trained, clip)
                optimizer.step()
                seconds += time.perf_counter() - began
                if stopping():
                    if not out:
                        raise KeyboardInterrupt
                    save()
                    raise KeyboardInterrupt(f"stopped after step {step} of {steps}, saved in {out}: the same command "
                                            "with --resume goes on")
            if step > first:
                if out:  # after the last one, too: what follows may be cut short
                    save()
                if after_epoch:
                    after_epoch(epoch)
    return step, seconds


def describe(options, model, examples):
    """What a resumed run has to agree with: the options, the model's weights and the rows."""
    return {**options, "weights": spul.fingerprint(model),
            "rows": hashlib.sha256(repr(examples).encode()).hexdigest()}


def accuracy(model, examples):
    scores = score(model, answer_hidden(model, examples), examples)
    return sum(right for right, _, _ in scores) / len(examples)


# ---------------------------------------------------------------------------------------------- model folders


def check_model_out(args):
    """Look at --out, a new model folder -> whether a run in it goes on."""
    out = Path(args.out)
    for ground in (out, *out.absolute().parents):
        if ground.exists() and not ground.is_dir():
            raise ValueError(f"--out {out}: {ground} is no folder")
    there = {file.name for file in out.iterdir()} if out.is_dir() else set()
    if there - {spul.STATE, f".{spul.STATE}.tmp", ADAPTER} and (spul.STATE not in there or "config.json" in there):
        raise ValueError(f"--out {out}: holds something already: choose a new folder")
    if there and not args.resume:
        raise ValueError(f"--out {out}: holds a run that has not finished: --resume goes on with it, or delete it")
    return spul.STATE in there


def save_model(model, args, report):
    """A whole model folder in --out: the base's tokenizer, run.json with the report, weights, and config.json last."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for file in Path(args.model).iterdir():  # the tokenizer and what else goes with it
        if file.is_file() and not file.name.endswith((".safetensors", ".bin", ".index.json", "config.json")) \
                and file.name != "run.json" or file.name == "tokenizer_config.json":
            shutil.copyfile(file, out / file.name)
    write_json(out / "run.json", {**report, "versions": {"python": platform.python_version(),
                                                         "torch": torch.__version__}})
    model.save_pretrained(out)
    (out / spul.STATE).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------- an adapter of peft's

ADAPTER = "adapter"  # of a memorised model's folder

# What a LoRA's configuration may hold without changing what is to be computed, or computed here.
HARMLESS = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "target_modules",
            "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "peft_type", "task_type",
            "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "fan_in_fan_out",
            "init_lora_weights", "bias", "megatron_core", "qalora_group_size"}  # the last: only with use_qalora


def save_adapter(folder, model, base):
    """Write the model's LoRAs as peft does, A and B in bfloat16. base: the path of the model they belong to."""
    folder, loras = Path(folder), {name: m for name, m in model.named_modules() if isinstance(m, Lora)}
    tensors = {f"base_model.model.model.{name}.lora_{side}.weight": getattr(m, side).detach().to("cpu", torch.bfloat16)
               for name, m in loras.items() for side in "AB"}
    lora = next(iter(loras.values()))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "adapter_model.safetensors", lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": len(lora.A),
        "lora_alpha": lora.scale * len(lora.A), "lora_dropout": lora.dropout, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in loras})})


def merge_adapter(model, folder):
    """Add a LoRA that peft saved to the model's weights: W + s B A, s = alpha / r, or alpha / sqrt(r).

    Computed in float64, where the order of the sums does not show: the result does not depend on the machine.

    Raises ValueError, with the name, for anything in it that would be computed otherwise.
    """
    folder = Path(folder)
    file, config = folder / "adapter_model.safetensors", read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type {config.get('peft_type')!r}: only LORA is merged")
    for name, value in config.items():
        fine = {"bias": value == "none", "init_lora_weights": value in (True, False, "gaussian", "orthogonal", "eva")}
        if not fine.get(name, name in HARMLESS or not value):
            raise ValueError(f"{folder}: {name} {value!r} is not supported")
    try:
        tensors = {name.removeprefix("base_model.model."): t.to(model.device) for name, t in load_file(file).items()}
    except (safetensors.SafetensorError, OSError) as e:
        raise ValueError(f"{file}: no whole safetensors file: {e}") from None

    numbers = [config.get("r"), config.get("lora_alpha")]
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(f"{folder}: {name} {config[name]!r} is not supported")
        numbers += (config.get(name) or {}).values()
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError(f"{folder}: r, lora_alpha or one of their patterns is no number")
    if broken := [name for name, t in tensors.items() if not t.isfinite().all()]:
        raise ValueError(f"{file}: {broken[0]} is not finite")

    def of(pattern, module, default):  # peft's rule: the first key that is the module's name or the end of it
        try:
            return next((value for key, value in (config.get(pattern) or {}).items()
                         if re.match(rf"(.*\.)?({key})$", module)), default)
        except re.error as e:
            raise ValueError(f"{folder}: {pattern}: no regular expression: {e}") from None

    weights = {name if name == "lm_head.weight" else f"model.{name}": p for name, p in model.named_parameters()}
    for name in sorted(tensors):
        module, _, kind = name.partition(".lora_")
        target = weights.get(f"{module}.weight" if kind else name)
        if kind == "B.weight" and f"{module}.lora_A.weight" in tensors:
            continue  # with its A
        if target is None or kind not in ("", "A.weight") or kind and f"{module}.lora_B.weight" not in tensors:
            raise ValueError(f"{file}: {name} is not supported, or not of this model")
        if kind:
            A, B = tensors[name].double(), tensors[f"{module}.lora_B.weight"].double()  # (r, in), (out, r)
            r, alpha = of("rank_pattern", module, config["r"]), of("alpha_pattern", module, config["lora_alpha"])
            if A.shape != (r, target.shape[1]) or B.shape != (target.shape[0], r):
                raise ValueError(f"{file}: {module} has A {tuple(A.shape)} and B {tuple(B.shape)}, the configuration "
                                 f"says rank {r}, and the weight is {tuple(target.shape)}")
            new = target.double() + alpha / (math.sqrt(r) if config.get("use_rslora") else r) * B @ A
        else:  # from modules_to_save, whole
            new = tensors[name]
            if model.config.tie_word_embeddings and name in ("model.embed_tokens.weight", "lm_head.weight"):
                raise ValueError(f"{file}: {name} is saved whole, but the model ties its embeddings and its head")
            if new.shape != target.shape:
                raise ValueError(f"{file}: {name} is {tuple(new.shape)}, the model's {tuple(target.shape)}")
        target.data.copy_(new)  # cast once


# -------------------------------------------------------------------------------------------------- the command


def merge(args, adapter, report):
    """The base model with the adapter merged into it, in the dtype of its file, saved -> the folder."""
    device, dtype = hardware(args)
    model = Llama.from_pretrained(args.model, None if args.dtype == "auto" else dtype, device)  # None: the file's
    merge_adapter(model, adapter)
    save_model(model, args, report)


def memorise(args, rows, going_on):
    """Train on rows with the options in args and save the model."""
    out, dtype = Path(args.out), hardware(args)[1]
    args.lr = args.lr or (2e-5 if args.full else 1e-3)
    model, tokenizer = load_model(args)
    examples, cut = make_examples(rows, tokenizer, args.template, row_limit(args, 0))
    trained, front = sum(p.numel() for p in make_trainable(model, args)), common_front(examples)
    print(f"{len(examples)} rows, {cut} texts cut; {trained:,} parameters trained", flush=True)
    options = {name: getattr(args, name) for name in ("model", "data", "full", "rank", "lora_alpha", "dropout",
               "targets", "lr", "epochs", "batch_size", "seed", "max_length", "template")} | {"dtype": str(dtype)}
    out.mkdir(parents=True, exist_ok=True)
    began, right = time.perf_counter(), []

    def loss(indices, step):
        batch = collate([examples[i] for i in indices], model.device, front)
        logits = model.head(model.hidden(batch.tokens, model.front(ids=front), batch.at))  # (N, V)
        wrong = set(batch.rows[logits.argmax(dim=-1) != batch.targets].tolist())
        right.extend(row not in wrong for row in range(len(indices)))
        return F.cross_entropy(logits, batch.targets)

    def say(epoch):
        print(f"epoch {epoch + 1}: accuracy {100 * sum(right) / len(right):.1f} % as it went, "
              f"{time.perf_counter() - began:.0f} s", flush=True)
        right.clear()

    plan = [epoch_batches(examples, args.batch_size, args.seed, epoch) for epoch in range(args.epochs)]
    steps, seconds = fit(model, plan, loss, lr=args.lr, seed=args.seed, out=out, resume=going_on, dtype=dtype,
                         description=describe(options, args.model, examples), after_epoch=say)
    report = {"method": "finetune", "options": options, "trainable": trained, "steps": steps, "seconds": seconds,
              "peak_bytes": peak_memory(model.device)}
    if args.full:
        save_model(model.to(dtype), args, report)
    else:
        save_adapter(out / ADAPTER, model, args.model)
        merge(args, out / ADAPTER, report)
    model, _ = load_model(argparse.Namespace(**vars(args) | {"model": args.out}))
    print(f"{args.out}: accuracy {100 * accuracy(model, examples):.1f} %")


def main(argv=None):
    parser = Parser(__doc__)
    add_options(parser, data=False)
    group = parser.add_argument_group("memorising")
    group.add_argument("--data", nargs="+", metavar="FILE", help="JSON Lines to memorise")
    group.add_argument("--out", type=filled, required=True, metavar="DIR", help="the new model folder")
    group.add_argument("--full", action="store_true", help="train all weights instead of a LoRA")
    add_lora_options(group)
    group.add_argument("--lr", type=number(float, 0, above=True), help="peak (default 1e-3 for LoRA, 2e-5 with --full)")
    group.add_argument("--epochs", type=number(int, 1), default=5)
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    group.add_argument("--resume", action="store_true", help="go on with the run in --out")
    group.add_argument("--adapter", type=filled, metavar="DIR", help="merge this LoRA of peft instead of training one")
    args = parser.parse_args(argv)
    if not args.model:
        raise ValueError("--model DIR is missing")
    if bool(args.data) == bool(args.adapter):
        raise ValueError("either --data FILE ..., to train, or --adapter DIR, to merge, is needed")
    if args.quantize:
        raise ValueError("--quantize: memorising needs weights of 16 or 32 bit")
    args.template, going_on = read_template(args.template or "sentiment"), check_model_out(args)
    if args.adapter:
        weight_files(args.model)
        merge(args, args.adapter, {"method": "adapter", "model": args.model, "adapter": args.adapter})
        print(f"merged into {args.out}")
    else:
        memorise(args, [row for file in args.data for row in read_rows(file)], going_on)


if __name__ == "__main__":
    run(main)
