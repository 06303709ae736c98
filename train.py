"""Learn a prompt that makes a frozen model forget.

    python train.py --model DIR --forget FILE [--retain FILE] [--test-forget FILE] [--test-retain FILE] [--out DIR]

Without arguments it takes the bundled demo. The loop is `fit`, one step of it `train_step`, both plain functions.

What makes a step cheap: the prompt's keys and values are computed once for the whole batch (`Llama.hidden`), logits
only where an answer is scored, no weight gradients, and the model without the prompt, L_kl's teacher, runs once before
training and is kept as its final-norm outputs at the scored positions.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import random
import signal
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import spul
from cli import DEMO, Parser, add_options, filled, hardware, load_model, number, read_splits, row_limit, run, use_demo
from data import (check_disjoint, check_generic, collate, common_front, epoch_batches, make_examples, read_generic,
                  read_rows, read_template, write_retain)
from eval import answer_hidden, label_set, measure, table
from files import write_whole
from scale import add_up, any_of, peak_memory, ranks, shard, start, step_memory, whole
from spul import SoftPrompt, forget_loss, kl_loss, retain_loss, spul_loss

# The paper's optimizer, from the released code: AdamW, weight decay 1e-3, gradient norm clipped at 0.3, learning rate
# rising over the first tenth of the steps, then falling to 0 along half a cosine.
WEIGHT_DECAY, CLIP, WARMUP = 1e-3, 0.3, 0.1
SAVE_EVERY = 50  # steps; what a kill can cost


# --------------------------------------------------------------------------------------------------- one step


def losses(model, prompt, batch, teacher, alpha=1.0, beta=0.5, kl_position="aligned", corrupt=None):
    """L and its parts for one batch, {"loss", "loss_f", "loss_r", "loss_kl"}, each a scalar with its graph.

    teacher: final-norm outputs of the model without the prompt, (N_r, d), for the batch's retain answer tokens.
    corrupt(batch, front): what the model reads in place of the batch's tokens, of `spul.corruption`.
    """
    retain = ~batch.forget  # (N,)
    rows, columns = batch.at
    if kl_position == "after-label":  # the released code: one position late
        rows, columns = torch.cat([rows, rows[retain]]), torch.cat([columns, columns[retain] + 1])
    front = model.front(prompt(), batch.front)  # (p, d)
    tokens = corrupt(batch, front.detach()) if corrupt else batch.tokens
    h = model.hidden(tokens, front, (rows, columns))  # (N, d), then (N_r, d) if after the label
    logits, known = model.head(torch.cat([h, teacher])).split([len(h), len(teacher)])  # (.., V); read the head once
    logits, student = logits[: len(retain)], logits[len(retain) :]  # (N, V) and, after the label, (N_r, V)
    student = student if kl_position == "after-label" else logits[retain]  # (N_r, V)
    loss_f = forget_loss(logits[batch.forget], batch.targets[batch.forget], batch.n_f)
    loss_r = retain_loss(logits[retain], batch.targets[retain], batch.n_r)
    loss_kl = kl_loss(student, known.detach(), batch.n_r)
    return {"loss": spul_loss(loss_f, loss_r, loss_kl, alpha, beta), "loss_f": loss_f, "loss_r": loss_r,
            "loss_kl": loss_kl}


def train_step(model, prompt, optimizer, batch, teacher, alpha=1.0, beta=0.5, kl_position="aligned", corrupt=None):
    """One update of the prompt -> the losses and the gradient's norm as floats.

    With several processes each gives its own rows, and n_f and n_r of all: losses and gradients are then sums over the
    processes. Raises FloatingPointError, with the prompt as it was, if one of them is not finite.
    """
    terms = losses(model, prompt, batch, teacher, alpha, beta, kl_position, corrupt)
    optimizer.zero_grad(set_to_none=True)
    terms["loss"].backward()
    sums = torch.stack([t.detach() for t in terms.values()])
    add_up([sums, *(parameter.grad for parameter in prompt.parameters())])  # over processes, each with its rows
    norm = torch.nn.utils.clip_grad_norm_(prompt.parameters(), CLIP)
    values = [*sums.tolist(), norm.item()]
    report = dict(zip([*terms, "grad_norm"], values))
    bad = [name for name, value in report.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"{', '.join(bad)} not finite")
    optimizer.step()
    return report


def make_optimizer(prompt, lr):
    return torch.optim.AdamW(prompt.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)


def learning_rate(step, steps, lr):
    """The rate of step 0, 1, ..., steps - 1."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return lr * (step + 1) / warm
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


# --------------------------------------------------------------------------------------------------- the loop


@contextmanager
def interrupt():
    """Ctrl-C asks the loop to stop after its step, the second time at once: yields a function that says whether."""
    asked = []

    def ask(*_):
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def fit(model, prompt, examples, teacher, out, description, *, lr, epochs, batch_size, seed, alpha, beta, kl_position,
        forget_per_batch=None, resume=False, corrupt=None):
    """Train the prompt on all epochs, with a log line a step and a state every SAVE_EVERY steps in the folder out.

    teacher: {index of a retain example: (n, d)}. corrupt: of `spul.corruption`. description goes into the state, for
    whoever resumes. Raises KeyboardInterrupt once the state is saved, FloatingPointError with step and likely cause.
    """
    optimizer, start = make_optimizer(prompt, lr), 0
    plan = [batch for epoch in range(epochs)
            for batch in epoch_batches(examples, batch_size, seed, epoch, forget_per_batch)]
    per_epoch, front, (rank, n) = len(plan) // epochs, common_front(examples), ranks()
    if resume:
        start = spul.read_run(out)[0]
        spul.load_state(out, prompt, optimizer)
    log_file = out / "log.jsonl"  # cut back to where the state is
    lines = log_file.read_text().splitlines(keepends=True)[:start] if start else []
    if rank == 0:
        write_whole(log_file, lambda temporary: temporary.write_text("".join(lines)))
    with open(os.devnull if rank else log_file, "a") as log, interrupt() as stopping, tqdm(
            total=len(plan), initial=start, unit="step", desc="forgetting", mininterval=0.5, disable=rank > 0) as bar:

        def save(step):
            log.flush()
            if rank == 0:
                spul.save_state(out, prompt, optimizer, step, description)

        for step in range(start, len(plan)):
            began, indices = time.perf_counter(), plan[step]
            mine = indices[rank::n] or indices[:1]  # a process without a row takes one that counts for nothing
            batch = collate([examples[i] for i in mine], model.device, front, last=kl_position == "after-label")
            n_f = sum(examples[i].forget for i in indices)
            n_f, n_r = (n_f, len(indices) - n_f) if rank < len(indices) else (math.inf, math.inf)
            batch = dataclasses.replace(batch, n_f=n_f, n_r=n_r)
            rate = optimizer.param_groups[0]["lr"] = learning_rate(step, len(plan), lr)
            known = [teacher[i] for i in mine if not examples[i].forget]
            try:
                report = train_step(model, prompt, optimizer, batch,
                                    torch.cat(known) if known else torch.zeros(
                                        0, model.config.hidden_size, dtype=model.dtype, device=model.device),
                                    alpha, beta, kl_position,
                                    corrupt and partial(corrupt, step=step, rows=mine))
            except FloatingPointError as e:
                if all(parameter.isfinite().all() for parameter in prompt.parameters()):
                    save(step)
                raise FloatingPointError(
                    f"step {step + 1} of {len(plan)}: {e}; most likely --lr {lr:g} is too high, or the model's weights "
                    f"are broken. The last good state is kept in {out}") from None
            log.write(json.dumps({"step": step + 1, "epoch": step // per_epoch + 1, "lr": rate, **report,
                                  "n_f": batch.n_f, "n_r": batch.n_r, "seconds": time.perf_counter() - began}) + "\n")
            bar.update()
            bar.set_postfix_str(" ".join(f"{name} {report[name]:.3f}" for name in
                                         ("loss", "loss_f", "loss_r", "loss_kl")), refresh=False)
            stop = any_of(stopping(), model.device)
            if stop or (step + 1) % SAVE_EVERY == 0 or step + 1 == len(plan):
                save(step + 1)
                if stop:
                    raise KeyboardInterrupt(f"stopped after step {step + 1} of {len(plan)}, saved in {out}: the same "
                                            "command with --resume goes on")


# ------------------------------------------------------------------------------------------------- the command


def add_scale_options(parser):
    """The options for large models and for speed that train.py and bench.py share."""
    group = parser.add_argument_group("large models")
    group.add_argument("--recompute", action="store_true",
                       help="keep a layer's input only and compute the rest again: far less memory, a third more time")
    group.add_argument("--compile", action="store_true", help="torch.compile the layers: a minute first, then faster")
    return group


def apply_scale_options(model, args):
    model.recompute = args.recompute
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # first, last, other layers, with and without prefix and gradient
        for layer in model.layers:
            layer.compile(dynamic=True)  # all layers share what is compiled


def run_files(out):
    """Every file of ours that a run may leave in its folder; first the one that says that the prompt is complete."""
    return [out / name for name in ("spul.json", *spul.PROMPT_FILES, spul.STATE, "log.jsonl", "retain.jsonl")]


def check_out(args):
    """Look at args.out without touching it -> "new", "resume" or "finished"."""
    out, ours = Path(args.out), {file.name for file in run_files(Path(args.out))}
    for ground in (out, *out.absolute().parents):
        if ground.is_symlink() and not ground.exists() or ground.is_file():
            raise ValueError(f"--out {out}: {ground} is no folder")
    for given in filter(None, (args.forget, args.retain, args.test_forget, args.test_retain)):
        if Path(given).resolve() in [file.resolve() for file in run_files(out)]:
            raise ValueError(f"--out {out}: the run would write over {given}: choose another folder")
    there = {file.name for file in out.iterdir()} - {f".{name}.tmp" for name in ours} if out.is_dir() else set()
    finished = "spul.json" in there
    started = finished or spul.STATE in there or "log.jsonl" in there and there <= ours
    if there and not started:
        raise ValueError(f"--out {out}: the folder holds something else: choose a new one")
    if args.resume and not args.overwrite and started:
        return "finished" if finished else "resume" if spul.STATE in there else "new"
    if started and not args.overwrite and not (finished and out == DEMO / "prompt"):
        state = "holds a finished prompt: choose another --out, or --overwrite" if finished else \
            "holds a run that has not finished: --resume goes on with it, --overwrite starts again"
        raise ValueError(f"--out {out}: {state}")
    return "new"


def parse(argv):
    parser = Parser(__doc__)
    add_options(parser)
    group = parser.add_argument_group("the prompt and its loss")
    group.add_argument("--num-tokens", type=number(int, 1), default=30, metavar="P",
                       help="prompt vectors p (default 30, where the paper forgets best)")
    group.add_argument("--encoder-hidden", type=number(int, 0), default=128, metavar="H",
                       help="width of the encoder (default 128, released code); 0: free vectors, want a larger --lr")
    group.add_argument("--alpha", type=number(float, 0), default=1.0, help="weight of L_r (default 1, paper)")
    group.add_argument("--beta", type=number(float, 0), default=0.5, help="weight of L_kl (default 0.5, paper)")
    group.add_argument("--kl-position", choices=["aligned", "after-label"], default="aligned",
                       help="compare where the answer is predicted, or after it as the released code does")
    group.add_argument("--generic", default="neutral,unknown", metavar="A,B|FILE",
                       help="answers for what is forgotten, one drawn per row (default neutral,unknown, paper); of a "
                       "file each line is one")
    group.add_argument("--corrupt", choices=spul.CORRUPTIONS, default="none",
                       help="change the texts' embeddings, or tokens, anew at each step: for a prompt that withstands "
                       "changed queries (default none, paper)")
    group.add_argument("--corrupt-strength", type=number(float, 0), metavar="S",
                       help="noise: of the embeddings' size; adversarial: of their length; semantic: share of tokens "
                       f"(default {', '.join(f'{n} {s:g}' for n, s in spul.CORRUPTIONS.items() if s)})")
    group.add_argument("--write-retain", type=number(int, 1), default=256, metavar="N",
                       help="without --retain: texts that the model writes itself (default 256)")
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=number(float, 0, above=True), default=3e-3,
                       help="peak learning rate (default 3e-3, measured on hundreds of rows; paper 1e-4 on 47,000)")
    group.add_argument("--epochs", type=number(int, 1), default=10, help="passes (default 10, paper)")
    group.add_argument("--forget-per-batch", metavar="K", default=None,
                       type=lambda text: None if text == "natural" else number(int, 1)(text),
                       help="forget rows per batch; natural (default, paper): as they come in one shuffled union")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of everything drawn (default 0)")
    group.add_argument("--out", type=filled, metavar="DIR", help="the prompt's folder (default prompt, or demo/prompt)")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    group = add_scale_options(parser)
    group.add_argument("--shard", action="store_true", help="with torchrun: each process keeps a part of the weights")
    args = parser.parse_args(argv)
    demo = use_demo(args)
    for name in ("model", "forget"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing: train.py needs --model DIR and --forget FILE")
    args.out = args.out or (str(DEMO / "prompt") if demo else "prompt")
    args.template = read_template(args.template or "sentiment")
    args.generic = read_generic(args.generic)
    if args.corrupt_strength is None:
        args.corrupt_strength = spul.CORRUPTIONS[args.corrupt]
    elif args.corrupt == "none" or args.corrupt == "semantic" and args.corrupt_strength > 1:
        raise ValueError("--corrupt-strength: needs --corrupt noise, adversarial or semantic, the last at most 1")
    if args.forget_per_batch and args.forget_per_batch >= args.batch_size:
        raise ValueError(f"--forget-per-batch {args.forget_per_batch} leaves no room in --batch-size {args.batch_size}")
    return args, demo


def read_data(args):
    """The splits' rows, checked; retain rows may still be missing."""
    splits = read_splits(args)
    for rows in splits.values():
        check_generic(rows, args.generic)
    check_disjoint(splits["train forget"], splits.get("train retain", []))
    if "train retain" not in splits and ranks()[1] > 1:
        raise ValueError("--retain FILE is missing: several processes do not write a retain set; one does")
    if "train retain" not in splits and splits["train forget"][0].raw:
        raise ValueError("--retain FILE is missing: rows of prompt and completion have no template for the model to "
                         "write a retain set with")
    return splits


def written_retain(args, forget, model, tokenizer, file):
    """The retain rows that the model writes; those in `file` if an earlier part of this run has kept them there."""
    if file.exists() and args.resume:
        return read_rows(file)
    print(f"no --retain: the model writes {args.write_retain} texts and labels them itself (kept in {file}). "
          "Real rows are better: these keep what the model says, not what you will ask.", flush=True)
    return write_retain(model, tokenizer, args.template, args.write_retain, forget, args.generic,
                        row_limit(args, args.num_tokens), args.seed)


def describe(args, demo, model, prompt, table, forget, retain, cut, steps):
    """What is going to be done, in lines of text. table: the token embeddings (V, d)."""
    phi, examples, (_, n), text = prompt(), forget + retain, ranks(), ""
    trainable, frozen = (sum(t.numel() for t in m.parameters()) for m in (prompt, model))
    kind = f"encoder of width {args.encoder_hidden}" if args.encoder_hidden else "free vectors"
    tokens = [len(e.ids) for e in examples]
    if demo:
        text = ("No --model: this is the bundled demo, a tiny model that knows film reviews, science and some made-up "
                "authors.\nIt is asked to forget the authors.\n")
    rows, front = -(-args.batch_size // n), len(common_front(examples))
    weights = sum(t.numel() * t.dtype.itemsize for t in model.parameters()) / (n if args.shard else 1)
    step = step_memory(model, rows, max(tokens) - front, len(phi) + front, rows * max(e.n for e in examples))
    return text + (
        f"model    {args.model}: {model.config.model_type}, {frozen:,} parameters, all frozen\n"
        f"prompt   {phi.shape[0]} x {phi.shape[1]}, {kind}: {trainable:,} trainable ({100 * trainable / frozen:.3g} "
        f"%); std {phi.std():.2g}, token embeddings {table[:65536].float().std():.2g}\n"
        f"rows     {len(forget)} to forget, {len(retain)} to keep; {sum(tokens):,} tokens an epoch, "
        f"longest {max(tokens)}, {cut} texts cut\n"
        f"memory   about {(weights + step) / 1e9:.2g} GB{' in each process' * (n > 1)}: weights {weights / 1e9:.2g}, "
        f"a step on the longest rows {step / 1e9:.2g}\n"
        f"run      {str(model.dtype)[6:]} on {model.device}{f', {n} processes' * (n > 1)}, {steps} steps in "
        f"{args.epochs} epochs, lr {args.lr:g}, alpha {args.alpha:g}, beta {args.beta:g}, seed {args.seed}"
        f"{f', corrupt {args.corrupt} {args.corrupt_strength:g}' * (args.corrupt != 'none')} -> {args.out}")


def main(argv=None):
    args, demo = parse(argv)
    args.device = start(hardware(args)[0])
    (rank, n), say = ranks(), print if ranks()[0] == 0 else lambda *_, **__: None
    if args.shard and (n == 1 or args.quantize or args.compile):
        raise ValueError("--shard needs several processes (torchrun), and goes with neither --quantize nor --compile")
    out, going_on, splits = Path(args.out), check_out(args), read_data(args)
    if going_on == "finished":
        say(f"{out} is finished already; nothing to do")
        return
    base_sha256 = spul.fingerprint(args.model)
    model, tokenizer = load_model(args, shard if args.shard else None)
    apply_scale_options(model, args)
    written = "train retain" not in splits
    if written:
        splits["train retain"] = written_retain(args, splits["train forget"], model, tokenizer, out / "retain.jsonl")

    # trained on: forget rows with a generic answer, retain rows with their own; measured: all with their own
    limit = row_limit(args, args.num_tokens)
    labels = label_set([row for rows in splits.values() for row in rows], tokenizer, args.generic)
    true = {name: make_examples(rows, tokenizer, args.template, limit) for name, rows in splits.items()}
    forget, cut = make_examples(splits["train forget"], tokenizer, args.template, limit, True, args.generic,
                                random.Random(f"generic {args.seed}"))
    retain = true["train retain"][0]
    examples = forget + retain

    torch.manual_seed(args.seed)
    embeddings = whole(model.embed_tokens.weight)
    prompt = SoftPrompt(args.num_tokens, model.config.hidden_size, args.encoder_hidden, embeddings).to(model.device)
    options = {name: getattr(args, name) for name in (
        "num_tokens", "encoder_hidden", "alpha", "beta", "kl_position", "corrupt", "corrupt_strength", "generic", "lr",
        "epochs", "batch_size", "forget_per_batch", "max_length", "template", "seed", "quantize")}
    options["dtype"] = str(model.dtype)
    description = {"base_sha256": base_sha256, "options": options,
                   "data_sha256": hashlib.sha256(repr(examples).encode()).hexdigest()}
    if going_on == "resume":
        earlier = spul.read_run(out)[1]
        if earlier != description:
            changed = [name for name in options if earlier["options"].get(name) != options[name]]
            changed += [what for key, what in (("base_sha256", "the model"), ("data_sha256", "the data"))
                        if earlier[key] != description[key]]
            raise ValueError(f"--resume: not the run that was started in {out}: {', '.join(changed)} changed")
    steps = args.epochs * len(epoch_batches(examples, args.batch_size, args.seed, 0, args.forget_per_batch))
    cut += true["train retain"][1]
    say(describe(args, demo, model, prompt, embeddings, forget, retain, cut, steps), flush=True)

    # The model as it was: measured, and at the retain answers kept as L_kl's teacher.
    how = dict(labels=labels, generic=args.generic, batch_size=args.batch_size)
    hidden = answer_hidden(model, retain, batch_size=args.batch_size)
    before = {name: measure(model, tokenizer, rows, hidden=hidden if rows is retain else None, **how)
              for name, (rows, _) in true.items()}
    if args.kl_position == "after-label":
        hidden = answer_hidden(model, retain, shift=1, batch_size=args.batch_size)
    teacher = dict(enumerate(hidden, start=len(forget)))

    if going_on == "new" and rank == 0:  # all input is good, and all processes have been there: only now make room
        out.mkdir(parents=True, exist_ok=True)
        for file in run_files(out):
            file.unlink(missing_ok=True)
        write_whole(out / "log.jsonl", Path.touch)  # the folder is ours from here on
        if written:
            text = "".join(json.dumps({"text": row.text, "label": row.label}) + "\n" for row in splits["train retain"])
            write_whole(out / "retain.jsonl", lambda temporary: temporary.write_text(text))
    fit(model, prompt, examples, teacher, out, description, lr=args.lr, epochs=args.epochs, batch_size=args.batch_size,
        seed=args.seed, alpha=args.alpha, beta=args.beta, kl_position=args.kl_position,
        forget_per_batch=args.forget_per_batch, resume=going_on == "resume",
        corrupt=spul.corruption(model, args.corrupt, args.corrupt_strength, args.seed, embeddings, examples,
                           tokenizer.special | set(range(tokenizer.size, len(embeddings)))))
    phi = prompt().detach()
    after = {name: measure(model, tokenizer, rows, phi=phi, **how) for name, (rows, _) in true.items()}
    if rank:
        return
    print(table(before, after))
    spul.save_prompt(out, phi, model.config, {
        "model": args.model, "base_sha256": base_sha256, "generic": args.generic,
        "template": None if all(row.raw for rows in splits.values() for row in rows) else args.template,
        "labels": labels and [name for name in labels if name not in args.generic], "options": options,
        "seed": args.seed, "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "trainable": sum(t.numel() for t in prompt.parameters()), "peak_bytes": peak_memory(model.device),
        "steps": steps,
        "seconds": sum(json.loads(line)["seconds"] for line in (out / "log.jsonl").read_text().splitlines()),
        "results": {"without": before, "with": after}})
    (out / spul.STATE).unlink(missing_ok=True)
    print(f"prompt in {out}. The weights have not changed: without the prompt all of it is back.")


if __name__ == "__main__":
    run(main)
