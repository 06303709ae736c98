"""Speed and memory on this machine, beside transformers + peft where they are installed.

    python bench.py [--model DIR | --random 7b|13b|1b|135m] [--data FILE] [--json FILE]

Without arguments: the bundled demo model on its own rows. Everything that is compared takes turns in one run, and each
figure is the median of the rounds. Tokens are those of the rows, BOS to answer, without prompt and padding. A step's
model FLOPs are 4 per weight of the layers and token (2 forward, 2 backward; the weights get no gradient) and 4 d V per
scored position for the head; "of peak" is their rate over that of a large matrix product in the same dtype. Tokens
that a step shares or leaves out count, because any way of computing the same step has to account for them; "computed"
says how many really went through the layers.
"""

import datetime
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn as nn

from cli import DEMO, Parser, add_options, filled, hardware, load_model, number, row_limit, run
from data import Example, collate, common_front, epoch_batches, make_examples, read_rows, read_template
from eval import answer_hidden
from files import write_json
from model import Config, Llama
from scale import Int8Linear
from spul import SoftPrompt, forget_loss, kl_loss, retain_loss, spul_loss
from train import CLIP, add_scale_options, apply_scale_options, make_optimizer, train_step

SHAPES = {  # of models on the hub, by their config.json
    "135m": Config(49152, 576, 1536, 30, 9, 3, rms_norm_eps=1e-5, tie_word_embeddings=True),  # SmolLM2
    "1b": Config(128256, 2048, 8192, 16, 32, 8, rope_theta=500000.0, tie_word_embeddings=True),  # Llama 3.2
    "7b": Config(32000, 4096, 11008, 32, 32),  # Llama 2
    "13b": Config(32000, 5120, 13824, 40, 40),
}


# ------------------------------------------------------------------------------------------------- model and rows


def random_model(config, dtype, device, linear):
    """A model of this shape with random weights, made where it is to run."""
    with torch.device("meta"):
        model = Llama(config, linear).requires_grad_(False)
    model.to(dtype).to_empty(device=device)
    for name, p in model.named_parameters():
        if p.dtype == torch.int8:
            p.random_(-127, 128)
        elif p.dim() == 1:
            p.fill_(0.02 / 73 if name.endswith("scale") else 0 if name.endswith("bias") else 1)
        else:
            p.normal_(std=0.02)
    return model


def random_rows(n, tokens, vocabulary):
    """n Examples of as many tokens each: the first five the same in all, as a template's, and the last one scored."""
    draw = torch.Generator().manual_seed(0)
    front = torch.randint(vocabulary, (5,), generator=draw).tolist()
    rows = torch.randint(vocabulary, (n, tokens - 5), generator=draw).tolist()
    return [Example((*front, *row), 1, "", False) for row in rows]


def rows_of(args, model, tokenizer):
    """-> Examples, one in 32 to be forgotten as in the paper's SST-2, and some of an epoch's batches of them."""
    if args.data:
        rows = read_rows(args.data)
        examples, _ = make_examples(rows, tokenizer, read_template(args.template or "sentiment"), row_limit(args, 50))
    else:
        examples = random_rows(args.batch_size * args.batches, args.tokens, model.config.vocab_size)
    examples = [Example(e.ids, e.n, e.label, i % 32 == 0) for i, e in enumerate(examples)]
    batches = [b for b in epoch_batches(examples, args.batch_size, 0, 0) if len(b) == args.batch_size]
    if not batches:
        raise ValueError(f"{args.data}: {len(examples)} rows are no batch of {args.batch_size}: lower --batch-size")
    return examples, batches[: args.batches]


# ------------------------------------------------------------------------------------------------------ measuring


def seconds(work, device):
    """The wall time of work()."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def median(values):
    return sorted(values)[len(values) // 2]


def proc_status(name):
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return math.nan
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), math.nan)


def peak_growth(work, device):
    """By how many bytes work() raises the memory in use at its highest."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts the record of the highest value anew
    except OSError:
        return math.nan
    before = proc_status("VmRSS")
    work()
    return proc_status("VmHWM") - before


def take_turns(works, rounds, device):
    """{name: seconds}, the medians of as many rounds; in each round every work runs once."""
    times = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return {name: median(values) for name, values in times.items()}


# -------------------------------------------------------------------------------------------------- the two sides


def ours(model, examples, batches, p, teacher):
    """-> a function that trains a prompt of p vectors one step on each batch."""
    torch.manual_seed(0)
    prompt = SoftPrompt(p, model.config.hidden_size).to(model.device)
    optimizer, front = make_optimizer(prompt, 3e-3), common_front(examples)

    def steps():
        for indices in batches:
            batch = collate([examples[i] for i in indices], model.device, front)
            known = torch.cat([teacher[i] for i in indices if not examples[i].forget])
            loss = train_step(model, prompt, optimizer, batch, known)["loss"]
            steps.first = steps.first or loss

    steps.first = None
    return steps


def theirs(model, examples, batches, p, teacher, checkpointing):
    """The same on transformers and peft, on the same weights in memory: the prompt in every row, logits everywhere."""
    import peft
    import transformers

    config = {**vars(model.config), "rope_scaling": None, "layer_types": None}
    config = {name: value for name, value in config.items() if value is not None}
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config),
                                                             dtype=model.dtype)
    weights = {name if name == "lm_head.weight" else f"model.{name}": t for name, t in model.named_parameters()}
    base.load_state_dict(weights, assign=True, strict=False)
    base.tie_weights()
    base.model.rotary_emb = type(base.model.rotary_emb)(config=base.config).to(model.device)
    base.requires_grad_(False)
    if checkpointing:
        base.gradient_checkpointing_enable(dict(use_reentrant=False))
    torch.manual_seed(0)
    prompt = SoftPrompt(p, model.config.hidden_size).to(model.device)
    wrapped = peft.get_peft_model(base, peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=p, encoder_hidden_size=128)).to(model.device).train()
    encoder = wrapped.prompt_encoder["default"]
    state = {"embedding.weight": prompt.E, **{f"mlp_head.{name}": t for name, t in prompt.mlp.named_parameters()}}
    encoder.load_state_dict({name: t.detach() for name, t in state.items()})  # the same start as ours
    optimizer = make_optimizer(encoder, 3e-3)

    def steps():
        for indices in batches:
            part = [examples[i] for i in indices]
            batch = collate(part, model.device, last=True)
            mask = torch.zeros_like(batch.tokens)
            for row, e in enumerate(part):
                mask[row, : len(e.ids)] = 1
            logits = wrapped(input_ids=batch.tokens, attention_mask=mask, use_cache=False).logits  # (B, p + T, V)
            logits = logits[batch.rows, p + batch.columns]
            known = base.lm_head(torch.cat([teacher[i] for i in indices if not examples[i].forget]))
            keep = ~batch.forget
            loss = spul_loss(forget_loss(logits[batch.forget], batch.targets[batch.forget], batch.n_f),
                             retain_loss(logits[keep], batch.targets[keep], batch.n_r),
                             kl_loss(logits[keep], known, batch.n_r), 1.0, 0.5)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(encoder.parameters(), CLIP)
            optimizer.step()
            steps.first = steps.first or loss.item()

    steps.first = None
    return steps


# -------------------------------------------------------------------------------------------------- the parts


def training(model, examples, batches, args, peers):
    """Part 1 and 2 -> {name: figures} of a step on these rows, by ours and by theirs, and the peak in FLOP/s."""
    device, config = model.device, model.config
    rows = [examples[i] for b in batches for i in b]
    teacher = answer_hidden(model, examples, batch_size=args.batch_size)
    works = {f"spul, p = {p}": ours(model, examples, batches, p, teacher) for p in (10, 30, 50)}
    if peers:
        works["transformers + peft, p = 30"] = theirs(model, examples, batches, 30, teacher, False)
        works["   with checkpointing (the paper's)"] = theirs(model, examples, batches, 30, teacher, True)
    growth = {name: peak_growth(work, device) for name, work in works.items()}  # warms up, too
    losses = {name: work.first for name, work in works.items()}
    size = 8192 if device.type == "cuda" else 2048
    x = torch.randn(size, size, device=device).to(model.dtype)
    times = take_turns({**works, "peak": lambda: [x @ x for _ in range(5)]}, args.rounds, device)
    peak = 5 * 2 * size**3 / times.pop("peak")
    tokens, scored = sum(len(e.ids) for e in rows), sum(e.n for e in rows)
    weights = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    flops = 4 * weights * tokens + 4 * config.hidden_size * config.vocab_size * scored
    bytes_ = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    return {name: {"examples/s": len(rows) / t, "tokens/s": tokens / t, "TFLOP/s": flops / t / 1e12,
                   "of peak": flops / t / peak, "peak GB": (bytes_ + growth[name]) / 1e9, "loss": losses[name]}
            for name, t in times.items()}, peak


def inference(model, examples, args, p=30):
    """Part 3 -> milliseconds per query, one row at a time up to its answer, and tokens per second of generation."""
    phi = torch.randn(p, model.config.hidden_size, device=model.device) * 0.1
    rows = [(torch.tensor([e.ids[: -e.n]], device=model.device), len(e.ids) - e.n - 1) for e in examples[:8]]
    spot = [torch.tensor([c], device=model.device) for _, c in rows]
    row = torch.zeros(1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        prefix = model.prefix(phi)

        def alone():
            for (tokens, _), column in zip(rows, spot):
                model.head(model.hidden(tokens, at=(row, column)))

        def behind():
            for (tokens, _), column in zip(rows, spot):
                model.head(model.hidden(tokens, prefix, (row, column)))

        def again():
            for (tokens, _), column in zip(rows, spot):
                model.head(model.hidden(tokens, model.prefix(phi), (row, column)))

        def concatenated():
            for (tokens, column) in rows:
                x = torch.cat([phi.to(model.dtype)[None], model.embed_tokens(tokens)], dim=1)  # (1, p + T, d)
                positions = torch.arange(x.shape[1], device=model.device)[None]
                last = torch.full((1, 1), p + column, device=model.device)
                model.head(model._run(x, positions, positions, grid=last)[0])

        works = {"without a prompt": alone, "prefix computed once": behind, "prefix computed for each": again,
                 "prompt concatenated": concatenated}
        new = 32
        batch = collate(examples[: args.batch_size], model.device)
        lengths = torch.tensor([len(e.ids) - e.n for e in examples[: args.batch_size]], device=model.device)
        ends, model.config.eos_token_id = model.config.eos_token_id, None
        generations = {f"generation{name}": lambda prefix=prefix: model.generate(batch.tokens, lengths, prefix, new)
                       for name, prefix in (("", None), (", prefix computed once", prefix))}
        for work in (*works.values(), *generations.values()):
            work()
        times = take_turns({**works, **generations}, 3 * args.rounds, model.device)
        model.config.eos_token_id = ends
    return {**{name: {"ms a query": 1000 * times[name] / len(rows)} for name in works},
            **{name: {"new tokens/s": new * len(lengths) / times[name]} for name in generations}}


def lines(title, table):
    """A table {name: {column: value}} as text."""
    columns = list(dict.fromkeys(column for figures in table.values() for column in figures))
    show = {"of peak": "{:.1%}".format, "loss": "{:.4f}".format, "peak GB": "{:.2f}".format, "ratio": "{:.2f}".format}
    out = [f"{title:38}" + "".join(f"{column:>14}" for column in columns)]
    for name, figures in table.items():
        cells = [show.get(c, "{:,.3g}".format if figures.get(c, 0) < 100 else "{:,.0f}".format)(figures[c])
                 if c in figures else "" for c in columns]
        out.append(f"{name:38}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(out) + "\n"


def parse(argv):
    parser = Parser(__doc__)
    add_options(parser, data=False)
    add_scale_options(parser)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--random", choices=SHAPES, help="random weights of a known shape instead of --model")
    group.add_argument("--data", type=filled, metavar="FILE",
                       help="JSON Lines for the rows (default: the demo's, or random tokens for another model)")
    group.add_argument("--tokens", type=number(int, 8), default=64, metavar="T", help="of a random row (default 64)")
    group.add_argument("--batches", type=number(int, 1), default=4, metavar="N", help="a round (default 4)")
    group.add_argument("--rounds", type=number(int, 1), default=5, metavar="N", help="medians are of these (default 5)")
    group.add_argument("--no-peers", action="store_true", help="leave transformers + peft out, though installed")
    group.add_argument("--json", type=filled, metavar="FILE", help="write everything there, too")
    args = parser.parse_args(argv)
    if args.random and (args.model or args.data):
        raise ValueError("--random has neither --model nor --data")
    if not args.random and not args.model:
        args.model, args.data = str(DEMO / "model"), args.data or str(DEMO / "forget.jsonl")
        args.template = args.template or "question"
    if args.json and (Path(args.json).is_dir() or not Path(args.json).absolute().parent.is_dir()):
        raise ValueError(f"--json {args.json}: a folder, or in none")
    return args


def main(argv=None):
    args = parse(argv)
    device, dtype = hardware(args)
    before, began, tokenizer = proc_status("RssAnon"), time.perf_counter(), None
    if args.random:
        linear = Int8Linear if args.quantize else nn.Linear
        model = random_model(SHAPES[args.random], dtype, torch.device(device), linear)
    else:
        model, tokenizer = load_model(args)
    weights = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    loading = {"loading": {"seconds": time.perf_counter() - began, "weights GB": weights / 1e9,
                           "host GB": (proc_status("RssAnon") - before) / 1e9}}
    apply_scale_options(model, args)
    examples, batches = rows_of(args, model, tokenizer)
    peers, versions = False, {"python": platform.python_version(), "torch": torch.__version__}
    if not (args.no_peers or args.quantize):  # transformers has no weights of this kind
        try:
            import peft
            import transformers
            peers, versions = True, versions | {"transformers": transformers.__version__, "peft": peft.__version__}
        except ImportError:
            print("transformers and peft are not installed: ours alone (pip install transformers peft)")
    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else \
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    lengths = [[len(examples[i].ids) for i in b] for b in batches]
    rows, left_out = sum(map(len, lengths)), len(common_front(examples)) + 1  # what all begin with, and the last token
    tokens, computed = (sum(map(f, lengths)) / rows for f in (sum, lambda b: len(b) * (max(b) - left_out)))
    facts = {"model": args.random or Path(args.model).name, "device": name, "dtype": str(dtype)[6:],
             "batch": args.batch_size, "date": datetime.date.today().isoformat(), "tokens a row": tokens,
             "computed a row": computed, "versions": versions,
             "options": [name for name in ("recompute", "compile", "quantize") if getattr(args, name)]}
    print(f"{facts['model']}, {facts['dtype']}, {name}; {rows} rows in batches of {args.batch_size}, "
          f"{tokens:.1f} tokens a row, {computed:.1f} computed (padding, too)\n"
          + " ".join(f"{key} {value}" for key, value in versions.items()) + "\n", flush=True)
    steps, peak = training(model, examples, batches, args, peers)
    base = steps["spul, p = 30"]["examples/s"]
    for figures in steps.values():
        figures["ratio"] = figures["examples/s"] / base
    print(lines(f"training step (peak {peak / 1e12:.3g} TFLOP/s)", steps), flush=True)
    queries = inference(model, [examples[i] for i in batches[0]], args)
    print(lines("inference", queries) + "\n" + lines("loading", loading), flush=True)
    if args.json:
        write_json(args.json, {**facts, "peak TFLOP/s": peak / 1e12, "training": steps, "inference": queries,
                               **loading})


if __name__ == "__main__":
    run(main)
