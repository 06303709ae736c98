"""Learn a prompt that makes a frozen model forget.

    python train.py --model DIR --forget FILE [--retain FILE] [--test-forget FILE] [--test-retain FILE] [--out DIR]

Without arguments it takes the bundled demo. The loop is `fit`, one step of it `train_step`, both plain functions.

What makes a step cheap: the prompt's keys and values are computed once for the whole batch (`Llama.prefix`), logits
only where an answer is scored, no weight gradients, and the model without the prompt, L_kl's teacher, runs once before
training and is kept as its final-norm outputs at the scored positions.
"""

import hashlib
import json
import math
import platform
import random
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import spul
from data import (check_disjoint, check_generic, collate, common_front, epoch_batches, make_examples, read_rows,
                  read_template, write_retain)
from eval import (DEMO, Parser, add_options, answer_hidden, filled, label_set, load_model, measure, number, read_splits,
                   row_limit, run, table, use_demo)
from files import write_whole
from spul import SoftPrompt, forget_loss, kl_loss, retain_loss, spul_loss

# The paper's optimizer, from the released code: AdamW, weight decay 1e-3, gradient norm clipped at 0.3, learning rate
# rising over the first tenth of the steps, then falling to 0 along half a cosine.
WEIGHT_DECAY, CLIP, WARMUP = 1e-3, 0.3, 0.1
SAVE_EVERY = 50  # steps; what a kill can cost


# --------------------------------------------------------------------------------------------------- one step


def losses(model, prompt, batch, teacher, alpha=1.0, beta=0.5, kl_position="aligned"):
    """L and its parts for one batch, {"loss", "loss_f", "loss_r", "loss_kl"}, each a scalar with its graph.

    teacher: final-norm outputs of the model without the prompt, (N_r, d), for the batch's retain answer tokens.
    """
    retain = ~batch.forget  # (N,)
    rows, columns = batch.at
    if kl_position == "after-label":  # the released code: one position late
        rows, columns = torch.cat([rows, rows[retain]]), torch.cat([columns, columns[retain] + 1])
    prefix = model.prefix(prompt(), batch.front)
    h = model.hidden(batch.tokens, prefix, (rows, columns))  # (N, d), then (N_r, d) if after the label
    logits = model.head(h[: len(retain)])  # (N, V)
    student = model.head(h[len(retain) :]) if kl_position == "after-label" else logits[retain]  # (N_r, V)
    loss_f = forget_loss(logits[batch.forget], batch.targets[batch.forget], batch.n_f)
    loss_r = retain_loss(logits[retain], batch.targets[retain], batch.n_r)
    loss_kl = kl_loss(student, model.head(teacher), batch.n_r)
    return {"loss": spul_loss(loss_f, loss_r, loss_kl, alpha, beta), "loss_f": loss_f, "loss_r": loss_r,
            "loss_kl": loss_kl}


def train_step(model, prompt, optimizer, batch, teacher, alpha=1.0, beta=0.5, kl_position="aligned"):
    """One update of the prompt -> the losses and the gradient's norm as floats.

    Raises FloatingPointError, with the prompt as it was, if one of them is not finite.
    """
    terms = losses(model, prompt, batch, teacher, alpha, beta, kl_position)
    optimizer.zero_grad(set_to_none=True)
    terms["loss"].backward()
    norm = torch.nn.utils.clip_grad_norm_(prompt.parameters(), CLIP)
    values = torch.stack([*(t.detach() for t in terms.values()), norm]).tolist()
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
        forget_per_batch=None, resume=False):
    """Train the prompt on all epochs, with a log line a step and a state every SAVE_EVERY steps in the folder out.

    teacher: {index of a retain example: (n, d)}. description goes into the state, for whoever resumes. Raises
    KeyboardInterrupt once the state is saved, FloatingPointError with step and likely cause.
    """
    optimizer, start = make_optimizer(prompt, lr), 0
    plan = [batch for epoch in range(epochs)
            for batch in epoch_batches(examples, batch_size, seed, epoch, forget_per_batch)]
    per_epoch, front = len(plan) // epochs, common_front(examples)
    if resume:
        start = spul.read_run(out)[0]
        spul.load_state(out, prompt, optimizer)
    log_file = out / "log.jsonl"  # cut back to where the state is
    lines = log_file.read_text().splitlines(keepends=True)[:start] if start else []
    write_whole(log_file, lambda temporary: temporary.write_text("".join(lines)))
    with open(log_file, "a") as log, interrupt() as stopping, tqdm(
            total=len(plan), initial=start, unit="step", desc="forgetting", mininterval=0.5) as bar:

        def save(step):
            log.flush()
            spul.save_state(out, prompt, optimizer, step, description)

        for step in range(start, len(plan)):
            began, indices = time.perf_counter(), plan[step]
            batch = collate([examples[i] for i in indices], model.device, front, last=kl_position == "after-label")
            rate = optimizer.param_groups[0]["lr"] = learning_rate(step, len(plan), lr)
            known = [teacher[i] for i in indices if not examples[i].forget]
            try:
                report = train_step(model, prompt, optimizer, batch,
                                    torch.cat(known) if known else model.embed_tokens.weight[:0],
                                    alpha, beta, kl_position)
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
            if stopping() or (step + 1) % SAVE_EVERY == 0 or step + 1 == len(plan):
                save(step + 1)
                if stopping():
                    raise KeyboardInterrupt(f"stopped after step {step + 1} of {len(plan)}, saved in {out}: the same "
                                            "command with --resume goes on")


# ------------------------------------------------------------------------------------------------- the command


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
    group.add_argument("--generic", default="neutral,unknown", metavar="A,B",
                       help="answers for what is forgotten, one drawn per row (default neutral,unknown, paper)")
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
    args = parser.parse_args(argv)
    demo = use_demo(args)
    for name in ("model", "forget"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing: train.py needs --model DIR and --forget FILE")
    args.out = args.out or (str(DEMO / "prompt") if demo else "prompt")
    args.template = read_template(args.template or "sentiment")
    args.generic = list(dict.fromkeys(word.strip() for word in args.generic.split(",") if word.strip()))
    if not args.generic:
        raise ValueError("--generic: at least one answer is needed")
    if args.forget_per_batch and args.forget_per_batch >= args.batch_size:
        raise ValueError(f"--forget-per-batch {args.forget_per_batch} leaves no room in --batch-size {args.batch_size}")
    return args, demo


def read_data(args):
    """The splits' rows, checked; retain rows may still be missing."""
    splits = read_splits(args)
    for rows in splits.values():
        check_generic(rows, args.generic)
    check_disjoint(splits["train forget"], splits.get("train retain", []))
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


def describe(args, demo, model, prompt, forget, retain, cut, steps):
    phi, table_ = prompt(), model.embed_tokens.weight
    trainable, frozen = (sum(t.numel() for t in m.parameters()) for m in (prompt, model))
    kind = f"encoder of width {args.encoder_hidden}" if args.encoder_hidden else "free vectors"
    tokens = [len(e.ids) for e in forget + retain]
    if demo:
        print("No --model: this is the bundled demo, a tiny model that knows film reviews, science and some made-up "
              "authors.\nIt is asked to forget the authors.")
    print(f"model    {args.model}: {model.config.model_type}, {frozen:,} parameters, all frozen\n"
          f"prompt   {phi.shape[0]} x {phi.shape[1]}, {kind}: {trainable:,} trainable ({100 * trainable / frozen:.3g} "
          f"%); std {phi.std():.2g}, token embeddings {table_[:65536].float().std():.2g}\n"
          f"rows     {len(forget)} to forget, {len(retain)} to keep; {sum(tokens):,} tokens an epoch, "
          f"longest {max(tokens)}, {cut} texts cut\n"
          f"run      {str(model.dtype)[6:]} on {model.device}, {steps} steps in {args.epochs} epochs, lr {args.lr:g}, "
          f"alpha {args.alpha:g}, beta {args.beta:g}, seed {args.seed} -> {args.out}", flush=True)


def main(argv=None):
    args, demo = parse(argv)
    out, going_on, splits = Path(args.out), check_out(args), read_data(args)
    if going_on == "finished":
        print(f"{out} is finished already; nothing to do")
        return
    base_sha256 = spul.fingerprint(args.model)
    model, tokenizer = load_model(args)
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
    prompt = SoftPrompt(args.num_tokens, model.config.hidden_size, args.encoder_hidden,
                        model.embed_tokens.weight).to(model.device)
    options = {name: getattr(args, name) for name in (
        "num_tokens", "encoder_hidden", "alpha", "beta", "kl_position", "generic", "lr", "epochs", "batch_size",
        "forget_per_batch", "max_length", "template", "seed")} | {"dtype": str(model.dtype)}
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
    describe(args, demo, model, prompt, forget, retain, cut + true["train retain"][1], steps)

    # The model as it was: measured, and at the retain answers kept as L_kl's teacher.
    how = dict(labels=labels, generic=args.generic, batch_size=args.batch_size)
    hidden = answer_hidden(model, retain, batch_size=args.batch_size)
    before = {name: measure(model, tokenizer, rows, hidden=hidden if rows is retain else None, **how)
              for name, (rows, _) in true.items()}
    if args.kl_position == "after-label":
        hidden = answer_hidden(model, retain, shift=1, batch_size=args.batch_size)
    teacher = dict(enumerate(hidden, start=len(forget)))

    if going_on == "new":  # all input is good: only now make room
        out.mkdir(parents=True, exist_ok=True)
        for file in run_files(out):
            file.unlink(missing_ok=True)
        write_whole(out / "log.jsonl", Path.touch)  # the folder is ours from here on
        if written:
            text = "".join(json.dumps({"text": row.text, "label": row.label}) + "\n" for row in splits["train retain"])
            write_whole(out / "retain.jsonl", lambda temporary: temporary.write_text(text))
    began = time.perf_counter()
    fit(model, prompt, examples, teacher, out, description, lr=args.lr, epochs=args.epochs, batch_size=args.batch_size,
        seed=args.seed, alpha=args.alpha, beta=args.beta, kl_position=args.kl_position,
        forget_per_batch=args.forget_per_batch, resume=going_on == "resume")
    phi = prompt().detach()
    after = {name: measure(model, tokenizer, rows, phi=phi, **how) for name, (rows, _) in true.items()}
    print(table(before, after))
    spul.save_prompt(out, phi, model.config, {
        "model": args.model, "base_sha256": base_sha256, "generic": args.generic,
        "template": None if all(row.raw for rows in splits.values() for row in rows) else args.template,
        "labels": labels and [name for name in labels if name not in args.generic], "options": options,
        "seed": args.seed, "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "results": {"without": before, "with": after, "seconds": time.perf_counter() - began}})
    (out / spul.STATE).unlink(missing_ok=True)
    print(f"prompt in {out}. The weights have not changed: without the prompt all of it is back.")


if __name__ == "__main__":
    run(main)
