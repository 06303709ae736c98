"""Learn a prompt that makes a frozen model forget.

    python train.py --model DIR --forget FILE [--retain FILE] [--test-forget FILE] [--out DIR]

Without arguments it takes the bundled demo. The method is in `losses`, one update in `train_step`,
the loop in `fit`; all are plain functions to copy. The rest is the command.

The model without the prompt, the teacher of L_kl and L_keep, reads each text once. We keep its
final-norm outputs at the scored positions and apply the head to them again at each step.

Letters: B rows, T tokens, p prompt tokens, d width, V vocabulary, N answer tokens of a batch, N_r
of them in retain rows.
"""

import dataclasses
import functools
import json
import math
import os
import platform
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from data import collate, common_prefix, read_rows
from eval import generator, label_set, measure
from spul import Objective, SoftPrompt, Teacher, answer_loss, kl_loss, save_prompt, token_losses
from support.after import check_template, read_earlier
from support.asking import spread, training_examples
from support.batches import Batches
from support.checks import check_generic
from support.cli import DEMO, read_splits, run
from support.elsewhere import EARLIER, elsewhere_table, examples_to_ask, leaves_out
from support.elsewhere import measure_elsewhere, texts_elsewhere, true_labels, verdicts
from support.general import general_rows, make_general
from support.hardware import choose_device, load_model, peak_memory, prepare_layers, row_limit
from support.identity import fingerprint, kept_labels
from support.options import parse
from support.plan import DEMO_PLAN, print_estimate, print_plan, print_time
from support.processes import any_process, join_group, of_all_processes, own_share, ranks, say
from support.processes import shard, sum_over_processes
from support.rows import check_rows
from support.self_written import asked_of_model, keep_rows, own_retain
from support.state import LOG, STATE, check_out, check_same_run, clear_run, cut_log, describe
from support.state import flat, likely_cause, load_state, read_log, read_run, run_folder
from support.state import save_state, stopped_message
from support.tables import table
from support.templates import choose_template, read_template, template_to_json

# The optimizer of the released code: AdamW, weight decay 1e-3, the gradient's norm clipped at 0.3,
# a learning rate that rises over the first tenth of the steps, then falls to 0 along half a cosine.
WEIGHT_DECAY = 1e-3
CLIP = 0.3
WARMUP = 0.1
SAVE_EVERY = 50  # steps: what a kill can cost

# Options that make a run the same run: those of the loss, and these.
OBJECTIVE = [field.name for field in dataclasses.fields(Objective)]
RUN_OPTIONS = """
    num_tokens encoder_hidden generic lr epochs batch_size forget_per_batch max_length
    template more_templates rewordings single after seed quantize plain
""".split()


# ---------------------------------------------------------------------------------------- one step


# To add a term: compute it in `losses`, and give its weight a field of Objective, and an option of
# the same name in support/options.py. The log and --resume follow. A term is a sum over the batch's
# own rows, each times its weight in batch.weights, divided by batch.n_f or batch.n_r, which count
# those of all processes.


def losses(model, prompt, batch, teacher, objective=Objective(), read=None, keep=None):
    """L and its terms for one batch: {"loss", "loss_f", ...}, scalar tensors; and "rows", (B,).

    "rows" has the loss of each row's answer, without a gradient.
    teacher (N_r, d): the model's final-norm outputs without the prompt, at the retain answers.
    read(batch, phi), if given: returns what the model reads in place of batch.tokens, ids (B, T)
    or embeddings (B, T, d).
    keep: a `support.general.Keep`, the texts of L_keep; without it there is no such term.
    """
    phi = prompt()  # (p, d)
    inputs = read(batch, phi.detach()) if read else batch.tokens  # (B, T), or (B, T, d)
    if keep:
        texts = keep.batch
        lengths = batch.lengths, texts.lengths
        h, h_texts = model.prompted(inputs, phi, batch.shared_ids, texts.tokens, lengths)
    else:
        h = model.prompted(inputs, phi, batch.shared_ids, lengths=[batch.lengths])  # (B, T, d)
    logits = model.head(h[batch.rows, batch.columns])  # (N, V), row i predicts batch.targets[i]
    of_tokens = token_losses(logits, batch.targets)  # (N,)

    forget, retain = batch.forget, ~batch.forget  # (N,), the side of each token's row
    weights = batch.weights
    if objective.kl_shift == 0:
        student = logits[retain]  # (N_r, V)
    else:  # one position later: collate kept the last token for it
        columns = batch.columns[retain] + objective.kl_shift
        student = model.head(h[batch.rows[retain], columns])  # (N_r, V)
    teacher_logits = model.head(teacher).detach()  # (N_r, V)

    terms = {
        "loss_f": answer_loss(of_tokens[forget], batch.n_f, weights[forget]),
        "loss_r": answer_loss(of_tokens[retain], batch.n_r, weights[retain]),
        "loss_kl": kl_loss(student, teacher_logits, batch.n_r, weights[retain]),
    }
    if keep:
        student = model.head(h_texts[texts.rows, texts.columns])  # (N, V), of the texts' tokens
        teacher_logits = model.head(keep.teacher).detach()  # (N, V)
        terms["loss_keep"] = kl_loss(student, teacher_logits, keep.tokens)
    rows = torch.arange(len(batch.tokens), device=model.device)  # (B,)
    of_rows = torch.where(batch.rows == rows[:, None], of_tokens.detach(), 0.0).sum(dim=1)  # (B,)
    return {"loss": objective.total(**terms), **terms, "rows": of_rows}


def train_step(
    model, prompt, optimizer, batch, teacher, objective=Objective(), read=None, keep=None
):
    """One update of the prompt -> the losses and the gradient's norm, as floats; "rows", as a list.

    With several processes each holds some of the batch's rows, but batch.n_f and n_r count all of
    them, so the sum over the processes is the loss of the whole batch. Raises FloatingPointError,
    with the prompt unchanged, if a value is not finite.
    """
    terms = losses(model, prompt, batch, teacher, objective, read, keep)
    rows = terms.pop("rows")  # of this process
    optimizer.zero_grad(set_to_none=True)
    terms["loss"].backward()
    values = torch.stack([term.detach() for term in terms.values()])
    sum_over_processes([values, *(parameter.grad for parameter in prompt.parameters())])
    norm = torch.nn.utils.clip_grad_norm_(prompt.parameters(), CLIP)
    report = dict(zip(terms, values.tolist()))
    report["grad_norm"] = norm.item()
    bad = [name for name, value in report.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"{', '.join(bad)} not finite")
    optimizer.step()
    return report | {"rows": rows.tolist()}


def make_optimizer(prompt, lr):
    return torch.optim.AdamW(prompt.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)


def learning_rate(step, steps, lr):
    """The learning rate of step 0, 1, ..., steps - 1, with lr at its highest."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return lr * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------- the loop


@contextmanager
def interrupt():
    """Yield a function that says whether Ctrl-C was pressed; the second time it stops at once."""
    pressed = []

    def handle(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)


def fit(model, prompt, examples, teacher, batches, lr, objective, out, description,
        resume=False, read=None, general=None):
    """Train the prompt, with a log line for each step and a state every SAVE_EVERY steps in out.

    teacher: a Teacher. batches: a `support.batches.Batches`. description: what a resumed run has
    to agree with. read(batch, phi, step, rows): as in `losses`, with the step and the indices of
    the batch's examples. general: a `support.general.General`, for L_keep. Raises
    KeyboardInterrupt once the state is saved, and FloatingPointError with the step and the likely
    cause.
    """
    optimizer = make_optimizer(prompt, lr)
    start = 0
    if resume:
        start, _ = read_run(out)
        load_state(out, prompt, optimizer)
    done = read_log(out / LOG, start)
    rank, _ = ranks()
    if rank == 0:
        cut_log(out / LOG, start)
    steps = len(batches)
    bar = tqdm(total=steps, initial=start, unit="step", desc="forgetting", disable=rank > 0)
    log = open(os.devnull if rank else out / LOG, "a")

    def save(step):
        log.flush()
        if rank == 0:
            save_state(out, prompt, optimizer, step, description)

    with log, bar, interrupt() as is_interrupted:
        for step in range(steps):
            began = time.perf_counter()
            epoch, indices, weights = batches.batch(step)
            teacher.learn(batches.ahead(step))
            if step < start:  # done before --resume: only what later batches depend on
                batches.tell(indices, done[step]["rows"])
                continue
            is_last_kept = objective.kl_shift > 0
            batch, mine = own_batch(examples, indices, weights, model.device, is_last_kept)
            own_read = functools.partial(read, step=step, rows=mine) if read else None
            own_keep = general.draw(step, model.device) if general else None
            rate = learning_rate(step, steps, lr)
            optimizer.param_groups[0]["lr"] = rate
            known = teacher.of(mine)
            try:
                report = train_step(
                    model, prompt, optimizer, batch, known, objective, own_read, own_keep
                )
            except FloatingPointError as e:
                if all(parameter.isfinite().all() for parameter in prompt.parameters()):
                    save(step)
                raise FloatingPointError(
                    f"step {step + 1} of {steps}: {e}; {likely_cause(lr, out)}"
                ) from None
            rows = of_all_processes(report.pop("rows"), len(indices), model.device)
            batches.tell(indices, rows)
            line = {"step": step + 1, "epoch": epoch, "lr": rate, **report, "rows": rows}
            line |= {"n_f": batch.n_f, "n_r": batch.n_r, "seconds": time.perf_counter() - began}
            log.write(json.dumps(line) + "\n")
            bar.update()
            shown = [f"{name} {value:.3f}" for name, value in report.items() if name != "grad_norm"]
            bar.set_postfix_str(" ".join(shown), refresh=False)
            stop = any_process(is_interrupted(), model.device)
            if stop or (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                save(step + 1)
            if stop:
                raise KeyboardInterrupt(stopped_message(step + 1, steps, out))


def own_batch(examples, indices, weights, device, keep_last):
    """This process's share of a step's rows -> Batch, and their indices."""
    places, is_surplus = own_share(range(len(indices)))
    mine = [indices[i] for i in places]
    shared_ids = common_prefix([examples[i] for i in indices])
    own_weights = [weights[i] for i in places]
    own_rows = [examples[i] for i in mine]
    batch = collate(own_rows, device, shared_ids, keep_last, own_weights)
    n_f = sum(examples[i].forget for i in indices)
    n_r = len(indices) - n_f
    if is_surplus:  # infinite counts make all losses 0
        n_f = n_r = math.inf
    return dataclasses.replace(batch, n_f=n_f, n_r=n_r), mine


# ------------------------------------------------------------------------------------- the command


@dataclasses.dataclass
class Job:
    """All that a run is made of, ready before the first step."""

    args: object
    model: object
    tokenizer: object
    rows: dict  # of each split
    measured: dict  # of each split, Examples with the true answers
    examples: list  # trained on: forget rows with a generic answer, then retain rows; in each way
    ways: int  # in which they are asked
    generic: list  # answers of forgotten rows, those of earlier prompts, too
    labels: dict  # {answer: ids} of the label set, or None
    prompt: SoftPrompt
    batches: Batches
    objective: Objective
    description: dict
    cut: int  # texts that were cut
    written: dict  # rows of the splits that the model wrote or labelled, kept beside the prompt
    general: object = None  # a support.general.General, unless gamma is 0
    read: object = None  # see `fit`
    reading: float = 0.0  # seconds that the model takes to read a token


def read_data(args):
    """The rows of each split, checked; retain rows may still be missing."""
    splits = read_splits(args, unlabelled=True)
    for rows in splits.values():
        check_generic(rows, args.generic)
    check_rows(splits)
    if args.general:
        read_rows(args.general, unlabelled=True)  # what is wrong with it is found before all else
    args.earlier = read_earlier(args, splits)
    all_rows = [row for rows in splits.values() for row in rows]
    args.template = choose_template(args, all_rows, args.earlier.template)
    check_template(args.earlier, args.template)
    args.more_templates = [read_template(value, args.model) for value in args.more_templates]
    return splits | ({EARLIER: args.earlier.rows} if args.earlier.rows else {})


def prepare(args, splits, mode, change=None):
    """Load the model, make examples and the prompt, and check a resumed run -> Job."""
    if mode == "resume" and args.dtype == "auto":
        dtype = read_run(run_folder(args.out))[1]["options"]["dtype"]
        args.dtype = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}[dtype]
    model, tokenizer = load_model(args, shard if args.shard else None)
    prepare_layers(model, args)
    base_sha256 = fingerprint(args.model)
    args.earlier = args.earlier.to(model.device)
    if mode == "new":
        print_estimate(args, model, tokenizer, splits)
    asked = asked_of_model(args, splits)
    forget = splits["train forget"]
    texts = general_rows(args, model, tokenizer, forget, base_sha256) if args.gamma else ([], [])
    written = own_retain(args, splits, model, tokenizer, base_sha256, texts[0])
    splits |= written
    limit = row_limit(args, args.num_tokens + args.earlier.q)
    most = args.measure_rows or math.inf
    some = {name: spread(rows, most) for name, rows in splits.items()}
    to_ask = examples_to_ask(some, args.template, args.generic, tokenizer, limit)
    measured = {name: found for name, found, _ in to_ask}
    retain = splits["train retain"] + args.earlier.kept(args.seed)
    examples, ways, cut = training_examples(args, forget, retain, model, tokenizer, limit)

    data = [examples, asked if written else None]
    data += [args.earlier.phi.tolist()] if args.after else []
    general = None
    if args.gamma:
        general = make_general(args, tokenizer, splits, *texts)
        data += [general.own, general.plain]

    batches = Batches(
        examples, ways, args.epochs, args.batch_size, args.seed, args.forget_per_batch
    )
    args.epochs = batches.epochs  # with few rows more than usual, if none are given
    all_rows = [row for rows in splits.values() for row in rows]
    generic = list(dict.fromkeys(args.earlier.generic + args.generic))
    job = Job(
        args=args,
        model=model,
        tokenizer=tokenizer,
        rows=splits,
        measured=measured,
        examples=examples,
        ways=ways,
        generic=generic,
        labels=label_set(all_rows, tokenizer, generic, args.template),
        prompt=make_prompt(args, model),
        batches=batches,
        objective=Objective(**{name: getattr(args, name) for name in OBJECTIVE}),
        description=describe(args, [*OBJECTIVE, *RUN_OPTIONS], model, data, base_sha256),
        cut=cut,
        written=written,
        general=general,
    )
    if change:
        job.description["options"] |= change.options
        job.read = change.reader(model, tokenizer, examples, args.seed)
    if mode == "resume":
        begun = read_run(run_folder(args.out))[1]
        check_same_run(args.out, flat(begun), flat(job.description))
    return job


def make_prompt(args, model):
    """The prompt as it begins, drawn by the seed."""
    torch.manual_seed(args.seed)
    d = model.config.hidden_size
    prompt = SoftPrompt(args.num_tokens, d, args.encoder_hidden, args.earlier.phi)
    return prompt.to(model.device)


def measure_splits(job, phi=None, known=None):
    """{split: what is measured}, with the prompt phi, if given. known: {split: answer_hidden}."""
    results = {}
    generate = generator(job.model, phi)
    for name, examples in job.measured.items():
        results[name] = measure(
            job.model,
            job.tokenizer,
            examples,
            job.labels,
            job.generic,
            phi,
            hidden=(known or {}).get(name),
            batch_size=job.args.read_batch_size,
            generate=generate,
        )
    return results


def measure_before(job, done=0):
    """Without the prompt: {split: what is measured}, and the Teacher, which has read some rows.

    Earlier prompts stand before all rows already. done: the steps done before --resume.
    """
    args = job.args
    earlier = args.earlier.phi
    shift = job.objective.kl_shift
    teacher = Teacher(job.model, job.examples, shift, args.read_batch_size, earlier)
    start = len(job.rows["train forget"])
    retain = range(start, start + len(job.rows["train retain"]))
    also_measured = spread(retain, len(job.measured["train retain"]))
    began = time.perf_counter()
    teacher.learn(also_measured)
    teacher.of(also_measured).sum().item()  # waits for a GPU
    tokens = sum(len(job.examples[i].ids) for i in also_measured)
    job.reading = (time.perf_counter() - began) / tokens
    known = {}
    if shift == 0:
        known["train retain"] = [teacher.outputs[i] for i in also_measured]
    before = measure_splits(job, earlier, known)
    for name in [name for name in before if leaves_out(name, before)]:
        del before[name], job.measured[name]
    if job.general:
        steps = range(done, len(job.batches))
        job.general.compute_teacher(job.model, args.read_batch_size, steps, earlier)
    return before, teacher


def finish(job, before):
    """Measure with the prompt, print the table and save the prompt's folder."""
    args = job.args
    out = Path(args.out)
    phi = job.prompt().detach()
    after = measure_splits(job, phi)
    held_out = job.general.held_out if job.general else None
    texts = texts_elsewhere(args.model, job.tokenizer, row_limit(args, len(phi)), held_out)
    elsewhere = measure_elsewhere(
        job.model,
        job.tokenizer,
        texts,
        phi,
        args.model,
        args.read_batch_size,
        args.earlier.phi,
    )
    if ranks()[0] > 0:
        return
    print(table(before, after))
    print(elsewhere_table(elsewhere))
    all_rows = [row for rows in job.rows.values() for row in rows]
    run = run_folder(out)
    log = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    info = {
        "model": args.model,
        "base_sha256": job.description["base_sha256"],
        "generic": job.generic,
        "template": None if all(row.raw for row in all_rows) else template_to_json(args.template),
        "labels": kept_labels(job.labels, job.rows["train retain"], job.written),
        "options": job.description["options"],
        "seed": args.seed,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "trainable": sum(t.numel() for t in job.prompt.parameters()),
        "peak_bytes": peak_memory(job.model.device),
        "steps": len(log),
        "seconds": sum(line["seconds"] for line in log),
        "results": {"without": before, "with": after, "elsewhere": elsewhere},
    }
    save_prompt(out, phi, job.model.config, info)
    (run / STATE).unlink(missing_ok=True)
    print("\n".join(verdicts(before, after, elsewhere, true_labels(job.rows, job.labels))))
    print(
        f"prompt in {out}. The weights have not changed: without the prompt all of it is back."
    )


def main(argv=None, change=None):
    """The command.

    change (extras/robust.py): an object with `options`, added to the run's description, and
    `reader(model, tokenizer, examples, seed)`, which returns the `read` of `fit`.
    """
    start = time.perf_counter()
    args, is_demo = parse(argv, __doc__)
    args.device = join_group(choose_device(args))
    if is_demo:
        say(DEMO_PLAN)
    if args.shard and ranks()[1] == 1:
        raise ValueError("--shard needs several processes (torchrun)")
    is_first = ranks()[0] == 0
    mode = check_out(args, may_replace=Path(args.out) == DEMO / "prompt")
    splits = read_data(args)
    if mode == "finished":
        if is_first:
            print(f"{args.out} is finished already; nothing to do")
        return
    job = prepare(args, splits, mode, change)
    print_plan(job)
    began = time.perf_counter()
    done = read_run(run_folder(args.out))[0] if mode == "resume" else 0
    before, teacher = measure_before(job, done)
    now = time.perf_counter()
    print_time(job, len(job.batches) - done, now - began, now - start)
    if is_first and mode == "new":
        clear_run(args)  # after all input is checked, and all processes have seen it
        keep_rows(args.out, job.written)
    fit(
        job.model,
        job.prompt,
        job.examples,
        teacher,
        job.batches,
        args.lr,
        job.objective,
        run_folder(args.out),
        job.description,
        resume=mode == "resume",
        read=job.read,
        general=job.general,
    )
    finish(job, before)


if __name__ == "__main__":
    run(main)
