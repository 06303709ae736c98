"""What train.py says before it starts: sizes, memory, steps, time."""

import math
import time

import torch

from data import are_sentences, common_prefix, make_examples
from spul import answer_hidden
from support.asking import TRIED, spread
from support.batches import epochs_of
from support.general import ANSWER, LONGEST, QUERY, WRITTEN_TEXTS, texts_of_step
from support.hardware import row_limit, step_memory, window_warning
from support.neighbours import COPIES, EXAMPLES
from support.processes import gather_full, ranks, say
from support.self_written import rows_to_write
from support.state import GENERAL, TEXTS, run_folder
from support.writing import read_written


READ = 32  # rows of middle length, out of
LOOKED_AT = 256
ASKED_OTHERWISE = 600  # rows of both sides, in ways that nobody trained in
STEP = 4  # tokens read in the time that a step takes for one: forward and backward, fewer rows
USABLE = 0.5  # of the texts that are written to be kept, from a tenth to nearly all
WRITE = 3  # tokens read in the time that it takes to write one, with some dozens of texts at once

DEMO_PLAN = (
    "No --model: this is the bundled demo, a tiny model that knows film reviews, science and some "
    "made-up authors.\nIt is asked to forget the authors."
)


def print_plan(job):
    """Say what is going to be done. job: a train.Job. Every process has to call it."""
    for name, what in list(plan_lines(job)):  # weights in shards are gathered for it
        say(f"{name:8} {what}")


def plan_lines(job):
    args = job.args
    model = job.model
    frozen = count(model)
    family = model.config.model_type
    yield "model", f"{args.model}: {family}, {frozen:,} parameters, all frozen"

    trainable = count(job.prompt)
    share = 100 * trainable / frozen
    encoder = f"encoder of width {args.encoder_hidden}" if args.encoder_hidden else "free vectors"
    phi = job.prompt().detach()
    spread = gather_full(model.embed_tokens.weight)[:65536].float().std()
    yield "prompt", (
        f"{phi.shape[0]} x {phi.shape[1]}, {encoder}: {trainable:,} trainable "
        f"({share:.3g} %); std {phi.std():.2g}, token embeddings {spread:.2g}"
    )

    if earlier := args.earlier.q:
        yield "after", f"{earlier} vectors of earlier prompts stand before it and do not learn"

    lengths = [len(e.ids) for e in job.examples]
    rows = len(lengths) // job.ways
    forget = sum(e.forget for e in job.examples[:rows])
    in_ways = f", asked in {job.ways} ways" if job.ways > 1 else ""
    yield "rows", (
        f"{forget} to forget, {rows - forget} to keep{in_ways}; longest {max(lengths)} tokens, "
        f"{job.cut} texts cut"
    )

    if job.general:
        general = job.general
        source = args.general or "written by the model"
        yield "general", (
            f"{len(general.own)} texts, {source}, and {len(general.plain)} of the rows' and "
            f"others' words alone; {general.per_batch} a step"
        )

    if warning := window_warning(model.config, phi.shape[0], max(lengths)):
        yield "window", warning

    processes = ranks()[1]
    where = f"{str(model.dtype)[6:]} on {model.device}"
    each = ""
    if processes > 1:
        where += f", {processes} processes"
        each = " in each process"
    weights = sum(t.numel() * t.dtype.itemsize for t in model.parameters()) / 1e9
    if args.shard:
        weights /= processes
    step = longest_step_memory(job) / 1e9
    # Measured on SmolLM2: 2.5 GB in 900 steps whose rows differ in length; in steps of equal rows
    # none, and half as much with a small cache of oneDNN's kernels.
    is_cpu_bf16 = model.device.type == "cpu" and model.dtype == torch.bfloat16
    kernels = "; up to 3 more if rows differ in length" if is_cpu_bf16 else ""
    yield "memory", (
        f"about {weights + step:.2g} GB{each}: weights {weights:.2g}, "
        f"a step on the longest rows {step:.2g}{kernels}"
    )

    steps = len(job.batches)
    loss = ", ".join(f"{name} {value}" for name, value in vars(job.objective).items())
    yield "run", (
        f"{where}, {steps} steps in {args.epochs} epochs, lr {args.lr:g}, {loss}, "
        f"seed {args.seed} -> {args.out}"
    )


def print_estimate(args, model, tokenizer, splits):
    """Say how long the whole run takes, before anything is written: what one reading tells.

    `print_time` says it again, once rows and texts are there.
    """
    forget = splits["train forget"]
    limit = row_limit(args, args.num_tokens + args.earlier.q)
    examples, _ = make_examples(spread(forget, LOOKED_AT), tokenizer, args.template, limit)
    length = mean_length(examples)  # tokens
    first = max(0, len(examples) - READ) // 2
    middle = sorted(examples, key=lambda e: len(e.ids))[first : first + READ]
    for _ in range(2):  # the first time takes longer
        began = time.perf_counter()
        sum(h.sum() for h in answer_hidden(model, middle)).item()  # waits for a GPU
    a_token = (time.perf_counter() - began) / (mean_length(middle) * len(middle))  # seconds
    sentences = are_sentences(examples)
    steps, training = expected_training(args, splits, length, sentences)
    writing = WRITE * expected_texts(args, splits, length)
    most = args.measure_rows or math.inf
    measured = sum(min(len(rows), most) for rows in splits.values()) + ASKED_OTHERWISE
    written = sum(e.n for e in examples) / len(examples) if sentences else 0  # words are read off
    measuring = 2 * measured * (length + WRITE * written) + TRIED * args.rewordings * length
    processes = ranks()[1]  # these share steps and reading
    parts = [training / processes, writing, measuring / processes]
    whole, *parts = (shown_time(a_token * tokens) for tokens in (sum(parts), *parts))
    say(
        f"{'time':8} about {whole} to go: {parts[1]} to write texts, {parts[0]} for about {steps} "
        f"steps, {parts[2]} to measure"
    )


def expected_training(args, splits, length, sentences):
    """How many steps there will be, and as how many tokens read they count."""
    forget = splits["train forget"]
    retain = len(splits.get("train retain", ())) or rows_to_write(args, forget)[0]
    retain += len(args.earlier.rows)
    per_epoch = math.ceil((len(forget) + retain) / args.batch_size)
    if isinstance(k := args.forget_per_batch, int):
        per_epoch = math.ceil(retain / (args.batch_size - k))
    steps = per_epoch * (args.epochs or epochs_of(per_epoch, sentences))
    of_step = args.batch_size * length
    if args.gamma:
        of_step += texts_of_step(args.batch_size) * LONGEST
    return steps, STEP * steps * of_step


def expected_texts(args, splits, length):
    """How many tokens the model still has to write: general text, and rows to retain.

    Of these not all are usable, and it reads examples for them.
    """
    run = run_folder(args.out)
    tokens = 0
    if args.gamma and not args.general:
        missing = max(0, WRITTEN_TEXTS - len(read_written(run / GENERAL)))
        tokens += missing * (QUERY + ANSWER)
    if "train retain" not in splits:
        usable = USABLE * len(read_written(run / TEXTS))
        missing = max(0, sum(rows_to_write(args, splits["train forget"])) - usable)
        tokens += missing / USABLE * length * (1 + EXAMPLES / COPIES / WRITE)
    return tokens


def print_time(job, steps, measuring, spent):
    """Say how long the run will take: so many steps, and measuring after them, in seconds.

    spent: seconds since the command began.
    """
    tokens = job.args.batch_size * mean_length(job.examples)
    if job.general:
        tokens += job.general.per_batch * mean_length(job.general.own + job.general.plain)
    training = steps * tokens * STEP * job.reading
    say(
        f"{'time':8} about {shown_time(training + measuring)} more: {shown_time(training)} for "
        f"{steps} steps, {shown_time(measuring)} to measure after them; {shown_time(spent)} so far"
    )


def mean_length(examples):
    return sum(len(e.ids) for e in examples) / len(examples)


def shown_time(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def count(module):
    return sum(t.numel() for t in module.parameters())


def longest_step_memory(job):
    """The bytes of a step on the longest rows, in each process."""
    rows = math.ceil(job.args.batch_size / ranks()[1])
    shared = len(common_prefix(job.examples))
    longest = max(len(e.ids) for e in job.examples) - shared
    p = job.args.num_tokens + job.args.earlier.q + shared
    scored = rows * max(e.n for e in job.examples)
    if job.general:  # its rows are as long as these in the estimate, or longer
        texts = math.ceil(job.general.per_batch / ranks()[1])
        rows += texts
        longest = max(longest, *(len(e.ids) for e in job.general.own + job.general.plain))
        scored += 2 * texts * LONGEST  # with the teacher's
    return step_memory(job.model, rows, longest, p, scored, job.args.recompute)
