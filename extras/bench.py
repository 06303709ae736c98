"""Measure speed and memory on this machine, beside transformers and peft where they are installed.

    python -m extras.bench [--model DIR | --random 7b|13b|1b|135m] [--data FILE] [--json FILE]

Without arguments it takes the bundled demo model and its rows. All that is compared takes turns in
one run, and each figure is the median of the rounds. The step of fast.py is measured, and as one
more line that of model.py, on the same weights; with --plain only the latter. "and L_keep" are
steps that also read general text, one of 96 tokens for every 8 rows, as train.py's do. On a CPU,
where both sides are measured without --compile, they also take the step in the other dtype, on a
copy of the weights: one dtype may be faster for one side alone.

The columns of a training step:

    tokens/s   tokens of the rows, from BOS to answer, without prompt and padding
    TFLOP/s    model FLOPs: for each token 4 per weight of the layers (2 forward, 2 backward; the
               weights get no gradient), and for each scored position 4 d V for the head
    of peak    that rate over the one of a large matrix product in the same dtype; it and memory
               are not said of the other one
    loss       of the first step, from the same prompt on every line with the same p
    ratio      examples/s over those of "spul, p = 30"

Tokens that a step shares or leaves out count, because any way of computing the same step has to
account for them. "computed" says how many a row have really passed through the layers. With L_keep
tokens/s counts those of general text, too.

Letters: B rows, T tokens, p prompt tokens, d width, V vocabulary, n answer tokens of a row, N of a
batch, N_r of them in retain rows.
"""

import copy
import dataclasses
import datetime
import functools
import math
import platform
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn

from data import Example, collate, common_prefix, make_examples
from data import read_rows
from extras.finetune import file_weights
from fast import FastLlama
from model import Config, Llama
from spul import Objective, SoftPrompt, Teacher, answer_loss, kl_loss, token_losses
from support.batches import epoch_batches
from support.general import LONGEST, General, texts_of_step
from support.templates import read_template
from support.cli import DEMO, Parser, add_layer_options, add_options, non_empty, number, run
from support.files import check_json_path, write_json
from support.hardware import DTYPES, choose_device, choose_dtype, load_model, prepare_layers
from support.hardware import replace_linear, row_limit
from train import CLIP, make_optimizer, train_step

# Shapes of models on the Hugging Face hub, from their config.json.
SHAPES = {
    "135m": Config(  # SmolLM2
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    "1b": Config(  # Llama 3.2
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    ),
    "7b": Config(  # Llama 2
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "13b": Config(  # Llama 2
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
    ),
}

PROMPT_SIZES = (10, 30, 50)
MAIN = "spul, p = 30"  # the line that `ratio` refers to
PLAIN = "spul, p = 30, plain forward"
PEER = "transformers + peft, p = 30"
KEEP = ", and L_keep"
OTHER = ", in "  # the other dtype
LR = 3e-3
NEW_TOKENS = 32  # of a generated text
QUERIES = 8  # asked one at a time
SHARED = 5  # tokens that all random rows begin with, as a template's

# How the columns are written; all others with three digits.
FORMATS = {"of peak": "{:.1%}", "loss": "{:.4f}", "peak GB": "{:.2f}", "ratio": "{:.2f}"}


# --------------------------------------------------------------------------------- model and rows


def random_model(config, dtype, device, plain=False, quantize=None):
    """A frozen model of this shape with random weights, made on the device where it is to run.

    plain: model.py's and not fast.py's. quantize "int8": the layers' weights are int8.
    """
    model = (Llama if plain else FastLlama).on_meta(config)
    if quantize:
        replace_linear(model)
    model.to(dtype).to_empty(device=device)
    for name, weight in model.named_parameters():
        if weight.dtype == torch.int8:
            weight.random_(-127, 128)
        elif weight.dim() == 2:
            weight.normal_(std=0.02)
        elif name.endswith("scale"):
            weight.fill_(0.02 / 73)  # 73: the standard deviation of the int8 weights
        elif name.endswith("bias"):
            weight.fill_(0)
        else:  # of a norm
            weight.fill_(1)
    return model


def plain_model(model, args):
    """model.py's model with the weights of fast.py's, the same tensors in memory."""
    plain = Llama.on_meta(model.config)
    if args.quantize:
        replace_linear(plain)
    plain.load_weights(dict(model.named_parameters()))
    prepare_layers(plain, args)
    return plain


def random_rows(n, tokens, vocabulary):
    """n Examples of equally many tokens each. The last one is scored."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(vocabulary, (SHARED,), generator=generator).tolist()
    rows = torch.randint(vocabulary, (n, tokens - SHARED), generator=generator).tolist()
    return [Example((*shared, *row), n=1, label="", forget=False) for row in rows]


def rows_of(args, model, tokenizer):
    """The Examples, and for a round some of an epoch's batches of their indices.

    One row in 32 is to be forgotten, as in the paper's SST-2. Raises ValueError if there are too
    few rows for a batch.
    """
    if args.data:
        limit = row_limit(args, max(PROMPT_SIZES))
        rows = read_rows(args.data)
        examples, _ = make_examples(rows, tokenizer, args.template, limit)
    else:
        n = args.batch_size * args.batches
        examples = random_rows(n, args.tokens, model.config.vocab_size)
    examples = [dataclasses.replace(e, forget=i % 32 == 0) for i, e in enumerate(examples)]
    batches = epoch_batches(examples, args.batch_size, seed=0, epoch=0)
    full = [indices for indices in batches if len(indices) == args.batch_size]
    if not full:
        raise ValueError(
            f"{args.data}: {len(examples)} rows do not fill a batch of {args.batch_size}: lower "
            "--batch-size"
        )
    return examples, full[: args.batches]


# -------------------------------------------------------------------------------------- measuring


def seconds(work, device):
    """The wall time of work()."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def median(values):
    return sorted(values)[len(values) // 2]


def process_memory(name):
    """Bytes of this process's memory, by a name of /proc/self/status; NaN if it is not Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    for line in lines:
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return math.nan


def peak_growth(work, device):
    """By how many bytes work() raises the memory in use at its highest, and what it returns."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        return torch.cuda.max_memory_allocated(device) - before, result
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest value so far
    except OSError:
        return math.nan, work()
    before = process_memory("VmRSS")
    result = work()
    return process_memory("VmHWM") - before, result


def take_turns(works, rounds, device):
    """{name: work} -> {name: median seconds}. In each round every work runs once."""
    times = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return {name: median(values) for name, values in times.items()}


# -------------------------------------------------------------------------------- a training step


def general_texts(model, examples, batch_size):
    """A General of texts as long as train.py cuts them to, made of the rows' tokens."""
    ids = [i for e in examples for i in e.ids]
    n = texts_of_step(batch_size)
    ids = ids * (1 + n * LONGEST // len(ids))
    cuts = [tuple(ids[i * LONGEST : (i + 1) * LONGEST]) for i in range(n)]
    texts = [Example(cut, LONGEST - 1, "", False) for cut in cuts]
    general = General(own=texts, plain=[], held_out={}, seed=0, per_batch=n)
    general.compute_teacher(model, batch_size, steps=[0])
    return general


def our_step(model, examples, p, teacher, general=None):
    """-> step(indices), which trains a prompt of p vectors on a batch and returns its loss.

    teacher: a Teacher that has read the examples. general: a General, for L_keep.
    """
    torch.manual_seed(0)
    prompt = SoftPrompt(p, model.config.hidden_size).to(model.device)
    optimizer = make_optimizer(prompt, LR)
    shared_ids = common_prefix(examples)

    def step(indices):
        batch = collate([examples[i] for i in indices], model.device, shared_ids)
        known = teacher.of(indices)  # (N_r, d)
        keep = general.draw(0, model.device) if general else None
        return train_step(model, prompt, optimizer, batch, known, keep=keep)["loss"]

    return step


def transformers_model(model):
    """The same model of the package transformers, on the same tensors in memory."""
    import transformers

    contents = model.config.to_json(model.dtype)
    config = transformers.AutoConfig.for_model(**contents)
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    base.requires_grad_(False)
    base.load_state_dict(file_weights(model), assign=True, strict=False)  # a tied head is missing
    base.tie_weights()
    rotary = type(base.model.rotary_emb)(config=base.config)  # its tensors are not weights
    base.model.rotary_emb = rotary.to(model.device)
    return base


def peft_prompt(base, p, device):
    """The model `base` with a prompt of the package peft before every row, and its encoder.

    The encoder starts from the same values as the SoftPrompt of `our_step`.
    """
    import peft

    torch.manual_seed(0)
    prompt = SoftPrompt(p, base.config.hidden_size)
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=p, encoder_hidden_size=128
    )
    wrapped = peft.get_peft_model(base, config).to(device).train()
    encoder = wrapped.prompt_encoder["default"]
    start = {"embedding.weight": prompt.E.detach()}
    for name, weight in prompt.mlp.named_parameters():
        start[f"mlp_head.{name}"] = weight.detach()
    encoder.load_state_dict(start)
    return wrapped, encoder


def their_step(model, examples, p, teacher, checkpointing, general=None):
    """As our_step, on transformers and peft: the prompt is in every row, and logits everywhere.

    General text goes through on its own, as it is longer than most rows.
    """
    base = transformers_model(model)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped, encoder = peft_prompt(base, p, model.device)
    optimizer = make_optimizer(encoder, LR)

    def logits_of(batch):
        places = torch.arange(batch.tokens.shape[1])  # (T,)
        mask = (places < torch.tensor(batch.lengths)[:, None]).long().to(model.device)  # (B, T)
        output = wrapped(input_ids=batch.tokens, attention_mask=mask, use_cache=False)
        return output.logits[batch.rows, p + batch.columns]  # (N, V), of (B, p + T, V)

    def loss_keep():
        keep = general.draw(0, model.device)
        return kl_loss(logits_of(keep.batch), base.lm_head(keep.teacher), keep.tokens)

    def step(indices):
        batch = collate([examples[i] for i in indices], model.device, keep_last=True)
        logits = logits_of(batch)
        teacher_logits = base.lm_head(teacher.of(indices))  # (N_r, V)
        retain = ~batch.forget  # (N,)
        of_tokens = token_losses(logits, batch.targets)  # (N,)
        loss_f = answer_loss(of_tokens[batch.forget], batch.n_f)
        loss_r = answer_loss(of_tokens[retain], batch.n_r)
        loss_kl = kl_loss(logits[retain], teacher_logits, batch.n_r)
        kept = loss_keep() if general else 0.0
        loss = Objective().total(loss_f, loss_r, loss_kl, kept)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    return step


def training_steps(model, examples, args, peers):
    """{name: step(indices)} of all that is compared. peers: with transformers and peft."""
    general = general_texts(model, examples, args.batch_size)
    teacher = Teacher(model, examples, batch_size=args.batch_size)
    teacher.learn(range(len(examples)))
    steps = {}
    for p in PROMPT_SIZES:
        steps[f"spul, p = {p}"] = our_step(model, examples, p, teacher)
    steps[MAIN + KEEP] = our_step(model, examples, 30, teacher, general)
    if isinstance(model, FastLlama):
        steps[PLAIN] = our_step(plain_model(model, args), examples, 30, teacher)
    if peers:
        steps[PEER] = their_step(model, examples, 30, teacher, checkpointing=False)
        checkpointed = their_step(model, examples, 30, teacher, checkpointing=True)
        steps["   with checkpointing (the paper's)"] = checkpointed
        steps[PEER + KEEP] = their_step(model, examples, 30, teacher, False, general)
        if model.device.type == "cpu" and not args.compile:
            steps |= steps_in_other_dtype(model, examples, args.batch_size)
    return steps


def steps_in_other_dtype(model, examples, batch_size):
    """{name: step(indices)} of both sides on a copy of the model: float32 if it is in bf16."""
    name = "fp32" if model.dtype == torch.bfloat16 else "bf16"
    other = copy.deepcopy(model).to(DTYPES[name])
    teacher = Teacher(other, examples, batch_size=batch_size)
    teacher.learn(range(len(examples)))
    return {
        MAIN + OTHER + name: our_step(other, examples, 30, teacher),
        PEER + OTHER + name: their_step(other, examples, 30, teacher, checkpointing=False),
    }


def train_round(step, batches):
    """A step on each batch -> the loss of the first one."""
    losses = [step(indices) for indices in batches]
    return float(losses[0])


def measure_training(model, examples, batches, args, peers):
    """{name: {column: figure}} of a training step, and the peak rate in FLOP/s."""
    device = model.device
    works = {}
    for name, step in training_steps(model, examples, args, peers).items():
        works[name] = functools.partial(train_round, step, batches)
    growths = {name: peak_growth(work, device) for name, work in works.items()}  # also warms up

    size = 8192 if device.type == "cuda" else 2048
    x = torch.randn(size, size, device=device).to(model.dtype)
    works["peak"] = lambda: [x @ x for _ in range(5)]
    times = take_turns(works, args.rounds, device)
    peak = 5 * 2 * size**3 / times.pop("peak")

    rows = [examples[i] for indices in batches for i in indices]
    texts = texts_of_step(args.batch_size) * len(batches)
    base = times[MAIN]
    table = {}
    for name, t in times.items():
        growth, loss = growths[name]
        of_texts = texts if KEEP in name else 0
        tokens = sum(len(e.ids) for e in rows) + of_texts * LONGEST
        flops = step_flops(model, tokens, sum(e.n for e in rows) + of_texts * (LONGEST - 1))
        table[name] = {
            "examples/s": len(rows) / t,
            "tokens/s": tokens / t,
            "TFLOP/s": flops / t / 1e12,
            "of peak": None if OTHER in name else flops / t / peak,
            "peak GB": None if OTHER in name else (weight_bytes(model) + growth) / 1e9,
            "loss": loss,
            "ratio": base / t,
        }
    return table, peak


def step_flops(model, tokens, scored):
    """The model FLOPs of steps on so many tokens and scored positions: see the top of this file."""
    weights = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    head = model.config.hidden_size * model.config.vocab_size
    return 4 * weights * tokens + 4 * head * scored


def weight_bytes(model):
    return sum(p.numel() * p.dtype.itemsize for p in model.parameters())


# -------------------------------------------------------------------------------------- inference


@contextmanager
def without_end(model):
    """Inside, the config has no end-of-sequence id, so every generated text has its full length."""
    config = model.config
    model.config = dataclasses.replace(config, eos_token_id=None)
    try:
        yield
    finally:
        model.config = config


def query_works(model, queries, phi, prefix):
    """{name: a function that computes the first token's logits of each query}.

    queries: token ids (1, T) each. phi (p, d). prefix: that of phi.
    """

    def ask(prefix_of):
        for tokens in queries:
            h = model.hidden(tokens, prefix_of())  # (1, T, d)
            model.head(h[:, -1])  # (1, V)

    def ask_concatenated():
        for tokens in queries:
            x = torch.cat([phi.to(model.dtype)[None], model.embed(tokens)], dim=1)  # (1, p + T, d)
            h, _ = model.run(x)  # (1, p + T, d)
            model.head(h[:, -1])  # (1, V)

    return {
        "without a prompt": lambda: ask(lambda: None),
        "prefix computed once": lambda: ask(lambda: prefix),
        "prefix computed for each": lambda: ask(lambda: model.prefix(phi)),
        "prompt concatenated": ask_concatenated,
    }


@torch.no_grad()
def measure_inference(model, examples, args, p=30):
    """{name: {column: figure}}: milliseconds of a query up to its answer, and generated tokens/s.

    A query is a row alone. All rows of a batch are generated together.
    """
    phi = 0.1 * torch.randn(p, model.config.hidden_size, device=model.device)
    prefix = model.prefix(phi)
    queries = [torch.tensor([e.prompt], device=model.device) for e in examples[:QUERIES]]
    prompts = [e.prompt for e in examples[: args.batch_size]]
    asked = query_works(model, queries, phi, prefix)
    generated = {
        "generation": lambda: model.generate(prompts, None, NEW_TOKENS),
        "generation, prefix computed once": lambda: model.generate(prompts, prefix, NEW_TOKENS),
    }
    works = {**asked, **generated}
    with without_end(model):
        for work in works.values():  # to warm up
            work()
        times = take_turns(works, 3 * args.rounds, model.device)
    table = {name: {"ms a query": 1000 * times[name] / len(queries)} for name in asked}
    for name in generated:
        table[name] = {"new tokens/s": NEW_TOKENS * len(prompts) / times[name]}
    return table


# ------------------------------------------------------------------------------------- the report


def lines(title, table):
    """A table {name: {column: figure}} as text."""
    columns = list(dict.fromkeys(column for figures in table.values() for column in figures))
    text = f"{title:38}" + "".join(f"{column:>14}" for column in columns) + "\n"
    for name, figures in table.items():
        cells = [cell(column, figures.get(column)) for column in columns]
        text += f"{name:38}" + "".join(f"{part:>14}" for part in cells) + "\n"
    return text


def cell(column, figure):
    if figure is None:
        return ""
    if column in FORMATS:
        return FORMATS[column].format(figure)
    if figure < 100:
        return f"{figure:,.3g}"
    return f"{figure:,.0f}"


def peer_versions(args):
    """{package: version} of transformers and peft; {} where they are left out or not installed."""
    if args.no_peers or args.quantize:  # they do not have such int8 weights
        return {}
    try:
        import peft
        import transformers
    except ImportError:
        print(
            "transformers and peft are not installed: ours alone (pip install transformers peft)"
        )
        return {}
    return {"transformers": transformers.__version__, "peft": peft.__version__}


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {instructions}"


def describe(args, model, examples, batches, versions):
    """What the figures depend on, for the file of --json."""
    rows = sum(map(len, batches))
    left_out = len(common_prefix(examples)) + 1  # what all rows begin with, and the last token
    tokens = 0
    computed = 0  # with padding
    for indices in batches:
        lengths = [len(examples[i].ids) for i in indices]
        tokens += sum(lengths)
        computed += len(lengths) * (max(lengths) - left_out)
    options = ("recompute", "compile", "quantize", "plain")
    return {
        "model": args.random or Path(args.model).name,
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": args.batch_size,
        "date": datetime.date.today().isoformat(),
        "tokens a row": tokens / rows,
        "computed a row": computed / rows,
        "versions": versions,
        "options": [name for name in options if getattr(args, name)],
    }


# ------------------------------------------------------------------------------------ the command


def make_parser():
    parser = Parser(__doc__)
    add_options(parser, data=False)
    add_layer_options(parser)
    add = parser.add_argument_group("what to measure").add_argument
    add("--random", choices=SHAPES, help="random weights of this shape, in place of --model")
    add("--data", type=non_empty, metavar="FILE",
        help="JSON Lines (default: the demo's rows; for another model random tokens)")
    add("--tokens", type=number(int, 8), default=64, metavar="T",
        help="tokens of a random row (default 64)")
    add("--batches", type=number(int, 1), default=4, metavar="N",
        help="batches of a round (default 4)")
    add("--rounds", type=number(int, 1), default=5, metavar="N",
        help="rounds that a figure is the median of (default 5)")
    add("--no-peers", action="store_true", help="leave transformers and peft out")
    add("--json", type=non_empty, metavar="FILE", help="also write all figures to this file")
    return parser


def parse(argv):
    args = make_parser().parse_args(argv)
    if args.random and (args.model or args.data):
        raise ValueError("--random goes with neither --model nor --data")
    is_demo = not args.random and not args.model
    if is_demo:
        args.model = str(DEMO / "model")
        args.data = args.data or str(DEMO / "forget.jsonl")
        args.template = args.template or "question"
    args.template = read_template(args.template or "sentiment", args.model)
    check_json_path(args.json)
    return args


def load(args):
    """The model, its tokenizer (None with --random), and what loading took."""
    device = choose_device(args)
    dtype = choose_dtype(args)  # may measure for a moment, which is not a part of loading
    memory_before = process_memory("RssAnon")
    began = time.perf_counter()
    tokenizer = None
    if args.random:
        shape = SHAPES[args.random]
        model = random_model(shape, dtype, torch.device(device), args.plain, args.quantize)
    else:
        model, tokenizer = load_model(args)
    figures = {
        "seconds": time.perf_counter() - began,
        "weights GB": weight_bytes(model) / 1e9,
        "host GB": (process_memory("RssAnon") - memory_before) / 1e9,
    }
    prepare_layers(model, args)
    return model, tokenizer, figures


def main(argv=None):
    args = parse(argv)
    model, tokenizer, loading = load(args)
    examples, batches = rows_of(args, model, tokenizer)
    peers = peer_versions(args)
    versions = {"python": platform.python_version(), "torch": torch.__version__, **peers}
    facts = describe(args, model, examples, batches, versions)
    rows = sum(map(len, batches))
    print(
        f"{facts['model']}, {facts['dtype']}, {facts['device']}; {rows} rows in batches of "
        f"{args.batch_size}, {facts['tokens a row']:.1f} tokens a row, "
        f"{facts['computed a row']:.1f} computed (with padding)"
    )
    print(" ".join(f"{name} {version}" for name, version in versions.items()) + "\n", flush=True)
    training, peak = measure_training(model, examples, batches, args, bool(peers))
    print(lines(f"training step (peak {peak / 1e12:.3g} TFLOP/s)", training), flush=True)
    inference = measure_inference(model, [examples[i] for i in batches[0]], args)
    print(lines("inference", inference))
    print(lines("loading", {"loading": loading}), flush=True)
    if args.json:
        report = {
            **facts,
            "peak TFLOP/s": peak / 1e12,
            "training": training,
            "inference": inference,
            "loading": loading,
        }
        write_json(args.json, report)


if __name__ == "__main__":
    run(main)
