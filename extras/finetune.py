"""Make a model memorise rows, so that there is something to unlearn. Or merge an adapter of peft.

    python -m extras.finetune --model BASE --data FILE [FILE ...] --out DIR [--rehearse] [--full]
    python -m extras.finetune --model BASE --adapter DIR --out DIR

It trains a LoRA (Hu et al., arXiv 2106.09685) on the layers' linear maps, with the cross-entropy of
the answers as loss. --out is a plain model folder with the LoRA merged into its weights. The LoRA
itself is in the folder `adapter` inside, as the package peft saves it. The merge gives the same
bits on every machine, so the base and an adapter of a few megabytes are enough to have the model
again.

A model that learns rows by heart forgets how to talk. With --rehearse the loss has another term,
L_keep of spul.py with the base as teacher, over general text. What the model still says of other
text, beside its base, is measured.

`fit` is the training loop for everything that changes weights: baselines.py unlearns with it,
probes.py attacks with it, and demo/make.py trains the demo's model from nothing.

Letters: B rows, T tokens, d width, V vocabulary, N answer tokens of a batch, r rank of a LoRA. A
linear layer's weight is (out, in).
"""

import argparse
import hashlib
import math
import platform
import random
import re
import shutil
import time
from pathlib import Path

import safetensors
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from data import collate, common_prefix, make_examples, read_rows
from eval import score
from model import FUSED
from spul import answer_hidden, kl_loss
from support.batches import epoch_batches
from support.cli import Parser, add_options, check_required, non_empty, number, run
from support.elsewhere import compare_models, elsewhere_table, texts_elsewhere
from support.files import check_not_inside_file, read_json, write_json, write_tensors
from support.general import HELD_OUT_NAME, general_rows, own_form, text_examples
from support.hardware import DTYPES, choose_device, choose_dtype, load_llama, load_model
from support.hardware import peak_memory, row_limit
from support.identity import fingerprint
from support.state import STATE, check_same_run, load_state, names_in, read_run, save_state
from support.state import stopped_message
from support.tables import run_info
from support.templates import choose_template, template_to_json
from train import WEIGHT_DECAY, interrupt, learning_rate

ADAPTER = "adapter"  # the LoRA's folder inside that of the model
RUN_OPTIONS = [
    *("model", "data", "full", "rank", "lora_alpha", "dropout", "targets", "lr", "epochs"),
    *("batch_size", "seed", "max_length", "template", "plain", "rehearse", "general"),
]
REHEARSED = 4  # general texts of a step

# --------------------------------------------------------------------------------- what is trained


class Lora(nn.Module):
    """A frozen linear layer plus scale * B A, with A (r, in) and B (out, r) in float32.

    B is 0 at first, so the layer starts as it was. dropout: of the LoRA's input, while learning.
    """

    def __init__(self, base, r, scale, dropout=0.0):
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = dropout
        like = {"dtype": torch.float32, "device": base.weight.device}
        self.A = nn.Parameter(torch.empty(r, base.in_features, **like))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, **like))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        is_learning = torch.is_grad_enabled()
        dropped = F.dropout(x, self.dropout, is_learning)  # (..., in)
        thin = F.linear(dropped, self.A.to(x.dtype))  # (..., r)
        return self.base(x) + F.linear(thin, (self.scale * self.B).to(x.dtype))  # (..., out)

    def merged(self, factor=1.0):
        """The linear layer with W + factor * scale * B A, computed in float32."""
        weight = self.base.weight.float() + factor * self.scale * self.B @ self.A  # (out, in)
        self.base.weight = nn.Parameter(weight.to(self.base.weight.dtype), requires_grad=False)
        return self.base


def swap(model, kind, make, names=None):
    """Replace each module of a kind inside the model's layers by make(module).

    names: only those modules, such as "q_proj". A linear layer inside a Lora stays.
    """
    for parent in list(model.layers.modules()):
        if isinstance(parent, Lora):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, kind) and (not names or name in names):
                setattr(parent, name, make(child))


def add_lora_options(add):
    """The options of a LoRA, which extras.baselines has, too. add: a group's add_argument."""
    add("--rank", type=number(int, 1), default=16, metavar="R",
        help="of the LoRA (default 16, paper)")
    add("--lora-alpha", type=number(float, 0, above=True), metavar="A",
        help="scale times rank (default 2 x rank; paper 64)")
    add("--dropout", type=number(float, 0, 0.99), default=0.0,
        help="share of the LoRA's input dropped in training (default 0; paper 0.1)")
    add("--targets", type=non_empty, metavar="A,B",
        help="layers with a LoRA (default all linear ones; paper q_proj,v_proj)")


def add_rehearsal_options(add):
    """The options of general text, which extras.baselines has, too."""
    add("--rehearse", action="store_true",
        help="also keep what the model says of general text, by default its own, so that it still "
        "talks")
    add("--general", type=non_empty, metavar="FILE", help="general text to rehearse")


def make_trainable(model, args):
    """Let all weights learn (args.full), or put a LoRA on the linear layers -> what learns.

    bfloat16 keeps 8 bits of a weight, so it would round away steps as small as fine-tuning's. All
    weights therefore learn in float32, and `casting` has them multiplied in the dtype asked for.

    Raises ValueError if --targets names no linear layer.
    """
    torch.manual_seed(args.seed)
    if args.full:
        model.float().requires_grad_(True)
    else:
        targets = args.targets and args.targets.split(",")
        check_targets(model, targets)
        scale = (args.lora_alpha or 2 * args.rank) / args.rank
        swap(model, nn.Linear, lambda base: Lora(base, args.rank, scale, args.dropout), targets)
    return [p for p in model.parameters() if p.requires_grad]


def check_targets(model, targets):
    names = set()
    for parent in model.layers[0].modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                names.add(name)
    if set(targets or []) - names:
        raise ValueError(
            f"--targets {','.join(targets)}: the linear layers are {', '.join(sorted(names))}"
        )


def casting(model, dtype):
    """A context in which float32 weights are multiplied in bfloat16, if that is the dtype."""
    is_cast = dtype == torch.bfloat16 and model.dtype != torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=is_cast)


# ---------------------------------------------------------------------------------------- the loop


def fit(model, plan, loss, *, lr, seed, weight_decay=WEIGHT_DECAY, clip=1.0, out=None,
        description=None, resume=False, dtype=None, after_epoch=None):
    """Minimise loss(indices, step) over the plan -> the number of steps, and the seconds in them.

    loss: gives a scalar, or None to end the training. plan: of each epoch, its batches of indices.
    clip: the largest norm of the gradient. out: a folder for the state, which is written after each
    epoch and at Ctrl-C; `resume` goes on from it. description: what a resumed run has to agree
    with. dtype: of the products, see `casting`. after_epoch(epoch) is called after each epoch.

    Raises KeyboardInterrupt once the state is saved, FloatingPointError if the loss is not finite,
    and ValueError if the state is that of another run.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    steps = sum(map(len, plan))
    start = 0
    seconds = 0.0
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    if resume:
        start, seconds = go_on(out, model, optimizer, description)
    step = 0

    def save():
        save_state(out, model, optimizer, step, {**description, "seconds": seconds})

    with interrupt() as is_interrupted:
        for epoch, batches in enumerate(plan):
            title = f"epoch {epoch + 1} of {len(plan)}"
            for indices in tqdm(batches, desc=title, unit="step", leave=False):
                step += 1
                if step <= start:
                    continue
                began = time.perf_counter()
                optimizer.param_groups[0]["lr"] = learning_rate(step - 1, steps, lr)
                # For dropout: a resumed run draws the same.
                torch.manual_seed((seed * 1_000_003 + step) % 2**63)
                with casting(model, dtype or model.dtype):
                    value = loss(indices, step)
                if value is None:
                    return step - 1, seconds
                if not value.isfinite():
                    raise FloatingPointError(
                        f"step {step} of {steps}: the loss is not finite: lower --lr {lr:g}"
                    )
                update(optimizer, parameters, value, clip)
                seconds += time.perf_counter() - began
                if is_interrupted():
                    if out:
                        save()
                    raise KeyboardInterrupt(stopped_message(step, steps, out))
            if step > start:
                if out:  # after the last epoch, too: what comes next may be stopped
                    save()
                if after_epoch:
                    after_epoch(epoch)
    return step, seconds


def go_on(out, model, optimizer, description):
    """Load the state of a run that was stopped -> its steps so far, and the seconds in them."""
    step, earlier = read_run(out)
    seconds = earlier.pop("seconds")
    check_same_run(out, earlier, description)
    load_state(out, model, optimizer)
    for parameter, state in optimizer.state.items():  # the fused AdamW counts steps on the device
        state["step"] = state["step"].to(parameter.device)
    return step, seconds


def update(optimizer, parameters, loss, clip):
    """One step of the optimizer down the loss, with the gradient's norm clipped."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()


def describe(options, folder, examples):
    """What a resumed run has to agree with: the options, the model's weights and the rows."""
    rows = hashlib.sha256(repr(examples).encode()).hexdigest()
    return {**options, "weights": fingerprint(folder), "rows": rows}


def run_dtype(args, is_resumed):
    """The dtype to compute in: that of --dtype; with auto that of the run that goes on."""
    if is_resumed and args.dtype == "auto":
        earlier = read_run(args.out)[1].get("dtype")
        names = {str(dtype): name for name, dtype in DTYPES.items()}
        args.dtype = names.get(earlier, "auto")
    return choose_dtype(args)


def accuracy(model, examples, phi=None, batch_size=32):
    """The share of examples whose greedy answer is the true one. phi (p, d): a prompt, if any."""
    hidden = answer_hidden(model, examples, phi, batch_size=batch_size)
    scores = score(model, hidden, examples, batch_size)
    return sum(is_right for is_right, _, _ in scores) / len(scores)


# ----------------------------------------------------------------------------------- model folders


def check_model_out(args):
    """Look at --out, the folder of a new model, without touching it -> whether a run in it goes on.

    Raises ValueError where a model cannot be written.
    """
    out = Path(args.out)
    check_not_inside_file("--out", out)
    names = names_in(out)
    others = names - {STATE, ADAPTER}
    is_unfinished = STATE in names and "config.json" not in names
    if others and not is_unfinished:
        raise ValueError(f"--out {out}: the folder holds other files: choose a new one")
    if names and not args.resume:
        raise ValueError(
            f"--out {out}: holds a run that has not finished: --resume it, or delete the folder"
        )
    return STATE in names


def save_model(model, args, report):
    """Write a model folder to --out: the base's tokenizer, run.json with the report, the weights.

    What generation needs comes along: generation_config.json, and the form of a chat.
    config.json is written last: its presence marks the folder complete.
    """
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for file in Path(args.model).iterdir():
        if file.is_file() and belongs_to_tokenizer(file.name):
            shutil.copyfile(file, out / file.name)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    write_json(out / "run.json", {**report, "versions": versions})
    save_weights(model, out)
    (out / STATE).unlink(missing_ok=True)


def belongs_to_tokenizer(name):
    """Whether a model folder's file is copied: all but weights and what describes the model."""
    if name in ("tokenizer_config.json", "generation_config.json"):
        return True
    of_weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", "config.json")
    return name != "run.json" and not name.endswith(of_weights)


def file_weights(model):
    """{name in a Hugging Face file: parameter} of all weights."""
    weights = {}
    for name, parameter in model.named_parameters():
        if name != "lm_head.weight":
            name = f"model.{name}"
        weights[name] = parameter
    return weights


def save_weights(model, folder):
    """Write model.safetensors, then config.json, as transformers reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().contiguous() for name, p in file_weights(model).items()}
    if model.config.model_type == "phi3":
        tensors = fused(tensors)
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", model.config.to_json(model.dtype))


def fused(tensors):
    """{name: tensor} with Phi-3's fused matrices in place of their parts, which loading split."""
    tensors = dict(tensors)
    for name in list(tensors):
        for whole, parts in FUSED.items():
            if f".{parts[0]}." in name:
                rows = [tensors.pop(name.replace(parts[0], part)) for part in parts]
                tensors[name.replace(parts[0], whole)] = torch.cat(rows)
    return tensors


# ------------------------------------------------------------------------------ the adapter of peft

# A LoRA's configuration may hold these, with any value: they change nothing, or are computed here.
ANY_VALUE = """
    r lora_alpha use_rslora rank_pattern alpha_pattern modules_to_save target_modules
    exclude_modules layers_to_transform layers_pattern lora_dropout peft_type task_type
    base_model_name_or_path revision inference_mode auto_mapping peft_version fan_in_fan_out
    megatron_core qalora_group_size
""".split()  # the last one matters only with use_qalora
SOME_VALUES = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


def save_adapter(folder, model, base):
    """Write the model's LoRAs as peft does, A and B in bfloat16. base: the path of their model."""
    folder = Path(folder)
    loras = {name: m for name, m in model.named_modules() if isinstance(m, Lora)}
    tensors = {}
    for name, lora in loras.items():
        for side, matrix in (("A", lora.A), ("B", lora.B)):
            key = f"base_model.model.model.{name}.lora_{side}.weight"
            tensors[key] = matrix.detach().to("cpu", torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    lora = next(iter(loras.values()))  # all have the same rank, scale and dropout
    r = len(lora.A)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": r,
        "lora_alpha": lora.scale * r,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in loras}),
    }
    write_json(folder / "adapter_config.json", config)


def read_adapter(folder):
    """A LoRA that peft saved -> its configuration, and {name: tensor} under names of the model.

    Raises ValueError, with the name, for anything in it that would be computed otherwise.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise ValueError(f"{folder}: peft_type {kind!r} is not supported (only LORA is)")
    for name, value in config.items():
        is_neutral = not value or name in ANY_VALUE
        if name in SOME_VALUES:
            is_neutral = value in SOME_VALUES[name]
        if not is_neutral:
            raise ValueError(f"{folder}: {name} {value!r} is not supported")
    check_numbers(config, folder)

    file = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except (safetensors.SafetensorError, OSError) as e:
        raise ValueError(f"{file}: not a complete safetensors file: {e}") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {name} is not finite")
    return config, {name.removeprefix("base_model.model."): t for name, t in tensors.items()}


def check_numbers(config, folder):
    """Raises ValueError unless rank and alpha, and those of the patterns, are finite numbers."""
    values = [config.get("r"), config.get("lora_alpha")]
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"{folder}: {name} {pattern!r} is not supported")
        values += pattern.values()
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise ValueError(f"{folder}: r, lora_alpha or one of their patterns is not a number")


def by_pattern(config, name, module, default):
    """A module's value in a pattern of peft's: that of the first key that matches, else default.

    A key matches if it is the module's name or the end of it.
    """
    for key, value in (config.get(name) or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as e:
            raise ValueError(f"{name}: {key!r} is not a regular expression: {e}") from None
    return default


def merge_adapter(model, folder):
    """Add a LoRA that peft saved to the model's weights.

    Raises ValueError, with the name, for anything in it that is not supported or does not fit.
    """
    config, tensors = read_adapter(folder)
    file = Path(folder) / "adapter_model.safetensors"
    weights = file_weights(model)
    for name in sorted(tensors):
        module, _, side = name.partition(".lora_")
        if side == "B.weight" and f"{module}.lora_A.weight" in tensors:
            continue  # merged together with its A
        is_pair = side == "A.weight" and f"{module}.lora_B.weight" in tensors
        is_whole = side == ""  # from modules_to_save: a weight in place of the model's
        weight = weights.get(f"{module}.weight" if is_pair else name)
        if weight is None or not (is_pair or is_whole):
            raise ValueError(f"{file}: {name} is not supported, or not of this model")
        try:
            if is_pair:
                A = tensors[name].to(model.device)
                B = tensors[f"{module}.lora_B.weight"].to(model.device)
                new = with_lora(weight, A, B, config, module)
            else:
                new = tensors[name].to(model.device)
                check_whole(name, new, weight, model.config)
        except ValueError as e:
            raise ValueError(f"{folder}: {e}") from None
        weight.data.copy_(new)  # cast once


def with_lora(weight, A, B, config, module):
    """W + s B A, for W (out, in), A (r, in) and B (out, r), with s = alpha / r, or alpha / sqrt(r).

    It is computed in float64, where the order of the sums is not visible after the cast back. So
    the result does not depend on the machine.
    """
    r = by_pattern(config, "rank_pattern", module, config["r"])
    alpha = by_pattern(config, "alpha_pattern", module, config["lora_alpha"])
    if A.shape != (r, weight.shape[1]) or B.shape != (weight.shape[0], r):
        raise ValueError(
            f"{module} has A {tuple(A.shape)} and B {tuple(B.shape)}, but the configuration says "
            f"rank {r}, and the weight is {tuple(weight.shape)}"
        )
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return weight.double() + scale * B.double() @ A.double()  # (out, in)


def check_whole(name, new, weight, config):
    is_tied = name in ("model.embed_tokens.weight", "lm_head.weight") and config.tie_word_embeddings
    if is_tied:
        raise ValueError(f"{name} is saved whole, but the model ties its embeddings and its head")
    if new.shape != weight.shape:
        raise ValueError(f"{name} is {tuple(new.shape)}, but the model's is {tuple(weight.shape)}")


# ------------------------------------------------------------------------------------- the command


def merge(args, adapter, dtype, report):
    """Save the base model with an adapter merged into it. dtype None: that of the base's file."""
    model = load_llama(args.model, dtype, choose_device(args), args.plain)
    merge_adapter(model, adapter)
    save_model(model, args, report)


def memorise(args, rows, is_resumed, forget=()):
    """Train on rows with the options in args, save the model, and say how many rows it knows.

    forget: rows that may not come in as general text either.
    """
    asked = DTYPES.get(args.dtype)  # None for auto: then the merged model keeps its file's dtype
    dtype = run_dtype(args, is_resumed)
    args.lr = args.lr or (2e-5 if args.full else 1e-3)
    model, tokenizer = load_model(args)
    examples, cut = make_examples(rows, tokenizer, args.template, row_limit(args, 0))
    base_sha256 = fingerprint(args.model)
    texts, held_out = rehearsed(args, model, tokenizer, base_sha256, forget)
    teacher = Teacher(model, texts, args.batch_size) if texts else None
    trainable = sum(p.numel() for p in make_trainable(model, args))
    print(
        f"{len(examples)} rows, {cut} texts cut; {len(texts)} general texts; {trainable:,} "
        "parameters trained",
        flush=True,
    )
    options = {name: getattr(args, name) for name in RUN_OPTIONS}
    options |= {"dtype": str(dtype), "template": template_to_json(args.template)}
    description = describe(options, args.model, examples + texts)
    steps, seconds = memorise_rows(
        model, examples, teacher, args, dtype, description, is_resumed
    )
    report = {
        "method": "finetune",
        "options": options,
        "trainable": trainable,
        "steps": steps,
        "seconds": seconds,
        "peak_bytes": peak_memory(model.device),
    }
    if args.full:
        save_model(model.to(dtype), args, report)
    else:
        adapter = Path(args.out) / ADAPTER
        save_adapter(adapter, model, args.model)
        merge(args, adapter, asked, report)
    model, _ = load_model(argparse.Namespace(**{**vars(args), "model": args.out}))
    share = accuracy(model, examples, batch_size=args.batch_size)
    print(f"{args.out}: accuracy {100 * share:.1f} %")
    base, _ = load_model(args)
    texts = texts_elsewhere(args.model, tokenizer, row_limit(args, 0), held_out)
    elsewhere = compare_models(base, model, texts, args.batch_size)
    print(elsewhere_table(elsewhere))
    write_json(Path(args.out) / "run.json", {**run_info(args.out), "elsewhere": elsewhere})


def rehearsed(args, model, tokenizer, base_sha256, forget):
    """The general text to rehearse, and what is held out, Examples; none without --rehearse."""
    if not (args.rehearse or args.general):
        return [], {}
    rows, held_out = general_rows(args, model, tokenizer, forget, base_sha256)
    form = own_form(args.model, tokenizer)
    limit = row_limit(args, 0)
    held_out = {HELD_OUT_NAME: text_examples(held_out, tokenizer, form, limit)}
    return text_examples(rows, tokenizer, form, limit), held_out


class Teacher:
    """What the base says of general texts, Examples, for L_keep."""

    @torch.no_grad()
    def __init__(self, model, texts, batch_size):
        self.texts = texts
        self.hidden = answer_hidden(model, texts, batch_size=batch_size)  # (n, d) of each
        self.scaling = model.config.logits_scaling
        is_tied = model.config.tie_word_embeddings
        table = model.embed_tokens if is_tied else model.lm_head
        self.table = table.weight.detach().clone()  # (V, d), as --full trains it, too

    def loss(self, model, rng):
        """L_keep of a few of the texts."""
        chosen = rng.sample(range(len(self.texts)), min(REHEARSED, len(self.texts)))
        batch = collate([self.texts[i] for i in chosen], model.device)
        h = model.hidden(batch.tokens)  # (B, T, d)
        logits = model.head(h[batch.rows, batch.columns])  # (N, V)
        hidden = torch.cat([self.hidden[i] for i in chosen])  # (N, d)
        teacher_logits = F.linear(hidden / self.scaling, self.table)  # (N, V)
        return kl_loss(logits, teacher_logits, len(logits))


def memorise_rows(model, examples, teacher, args, dtype, description, is_resumed):
    """Train on examples, with L_keep if there is a teacher, and print each epoch's accuracy."""
    shared_ids = common_prefix(examples)
    began = time.perf_counter()
    is_right = []  # of each row of the epoch

    def loss(indices, step):
        batch = collate([examples[i] for i in indices], model.device, shared_ids)
        h = model.prompted(batch.tokens, None, shared_ids)  # (B, T, d)
        logits = model.head(h[batch.rows, batch.columns])  # (N, V)
        is_wrong = logits.argmax(dim=-1) != batch.targets  # (N,)
        wrong_rows = set(batch.rows[is_wrong].tolist())
        is_right.extend(row not in wrong_rows for row in range(len(indices)))
        total = F.cross_entropy(logits, batch.targets)
        if teacher:
            total = total + teacher.loss(model, random.Random(f"rehearse {args.seed} {step}"))
        return total

    def report(epoch):
        share = sum(is_right) / len(is_right)
        is_right.clear()
        print(
            f"epoch {epoch + 1}: accuracy {100 * share:.1f} % as it went, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )

    epochs = range(args.epochs)
    return fit(
        model,
        [epoch_batches(examples, args.batch_size, args.seed, epoch) for epoch in epochs],
        loss,
        lr=args.lr,
        seed=args.seed,
        out=args.out,
        description=description,
        resume=is_resumed,
        dtype=dtype,
        after_epoch=report,
    )


def make_parser():
    parser = Parser(__doc__)
    add_options(parser, data=False)
    add = parser.add_argument_group("memorising").add_argument
    add("--data", type=non_empty, nargs="+", metavar="FILE", help="JSON Lines to memorise")
    add("--out", type=non_empty, required=True, metavar="DIR", help="the new model's folder")
    add("--full", action="store_true", help="train all weights instead of a LoRA")
    add_lora_options(add)
    add("--lr", type=number(float, 0, above=True),
        help="highest learning rate (default 1e-3 for a LoRA, 2e-5 with --full)")
    add("--epochs", type=number(int, 1), default=5, help="passes (default 5)")
    add_rehearsal_options(add)
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all draws (default 0)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--adapter", type=non_empty, metavar="DIR",
        help="merge this LoRA of peft instead of training one")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    check_required(args, "model")
    if bool(args.data) == bool(args.adapter):
        raise ValueError("give either --data FILE ... to train, or --adapter DIR to merge")
    if args.quantize:
        raise ValueError("--quantize: memorising needs weights of 16 or 32 bits")
    is_resumed = check_model_out(args)
    if args.adapter:
        report = {"method": "adapter", "model": args.model, "adapter": args.adapter}
        merge(args, args.adapter, DTYPES.get(args.dtype), report)
        print(f"merged into {args.out}")
        return
    rows = [row for file in args.data for row in read_rows(file)]
    args.template = choose_template(args, rows)
    memorise(args, rows, is_resumed)


if __name__ == "__main__":
    run(main)
