"""Measure a model without and with a prompt or a guard (of baselines.py), or ask it a question.

    python eval.py --model DIR [--prompt DIR] --forget FILE --retain FILE [--test-forget FILE] [--test-retain FILE]
    python eval.py --model DIR --prompt DIR --ask "a film by the director in question"

Accuracy is the share of rows whose greedy answer is the true one token for token; a single teacher-forced pass decides
it, because greedy decoding leaves the true answer at the first token where the two differ. Predictions range over the
whole vocabulary, as in the paper's code: an answer outside the label set is a miss for accuracy and F1.

Exit status of every command here: 0 done, 2 wrong input (one line on stderr), 3 the run failed, 130 Ctrl-C.
"""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import guards
from data import (Example, Tokenizer, answer_ids, by_length, check_text, collate, common_front, continuations,
                  make_examples, read_rows, read_sets, read_template)
from files import read_json, weight_files, write_json
from model import Config, Llama
from scale import Int8Linear, add_up, leave, ranks
from spul import fingerprint, load_prompt

DEMO = Path(__file__).resolve().parent / "demo"
MAX_LABELS = 50  # more different answers than this are no label set
METRICS = ["accuracy", "probability", "f1", "generic", "outside", "commonest", "flagged"]
COSTS = {"trainable": "parameters trained", "seconds": "s of training", "peak_bytes": "bytes of memory at most"}


# --------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def answer_hidden(model, examples, phi=None, shift=0, batch_size=32, embed=None):
    """Final-norm outputs that predict each example's answer tokens: a list of (n, d), in the examples' order.

    phi (p, d): the prompt in front, if any. shift 1: one token on, what the model predicts after each answer token.
    embed: what makes embeddings of prompts and their tokens, if not the model (`guards.Eco`).
    """
    batches, front, (rank, n) = by_length(examples, batch_size), () if embed else common_front(examples), ranks()
    found, prefix = [None] * len(examples), model.prefix(phi, front)
    for turn in range(rank, math.ceil(len(batches) / n) * n, n):  # as many turns in every process, some for nothing
        indices = batches[turn % len(batches)]
        batch = collate([examples[i] for i in indices], model.device, front, last=shift)
        tokens = embed([examples[i].prompt for i in indices], batch.tokens) if embed else batch.tokens
        h = model.hidden(tokens, prefix, (batch.rows, batch.columns + shift))  # (N, d)
        for i, part in zip(indices, h.split([examples[i].n for i in indices])):
            found[i] = part.clone() if turn < len(batches) else None
    if n > 1:  # every row was computed in one process: the others add zeros
        found = [model.norm.weight.new_zeros(e.n, h.shape[1]) if part is None else part
                 for e, part in zip(examples, found)]
        add_up(found)
    return found


@torch.no_grad()
def score(model, hidden, examples, batch_size=32):
    """Per example: whether the greedy answer is the true one, P(true answer), and the first token of the greedy one."""
    scores = []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        log_p = F.log_softmax(model.head(torch.cat(hidden[start : start + batch_size])), dim=-1)  # (N, V)
        targets = torch.tensor([t for e in part for t in e.ids[-e.n :]], device=log_p.device)  # (N,)
        best = log_p.argmax(dim=-1).tolist()
        log_p = log_p.gather(1, targets[:, None])[:, 0].tolist()
        if any(map(math.isnan, log_p)):
            raise FloatingPointError("the model's output is not a number: its weights are broken")
        targets, at = targets.tolist(), 0
        for e in part:
            here = slice(at, at + e.n)
            scores.append((best[here] == targets[here], math.exp(math.fsum(log_p[here])), best[at]))
            at += e.n
    return scores


def named(ids, answers):
    """The longest of the answers, {answer: its ids}, that ids begin with, or None."""
    fits = [name for name in answers if ids[: len(answers[name])] == answers[name]]
    return max(fits, key=lambda name: len(answers[name]), default=None)


def predict(model, tokenizer, examples, scores, answers, phi=None, batch_size=32, embed=None):
    """The greedy answer of each example: one of answers, {answer: its ids}, or what it begins with instead.

    The scores decide nearly all; only where a longer answer may have begun does the model have to go on writing.
    """
    said = [e.label if right else named([first], answers) or f"<{tokenizer.decode([first])}>"
            for e, (right, _, first) in zip(examples, scores)]
    longer = {ids[0] for ids in answers.values() if len(ids) > 1}
    begins = {name for name, ids in answers.items() for other in answers.values() if ids == other[: len(ids)] != other}
    unsure = [i for i, (right, _, first) in enumerate(scores)
              if (examples[i].label in begins if right else first in longer)]
    prefix = model.prefix(phi) if unsure and phi is not None else None
    for start in range(0, len(unsure), batch_size):
        part = unsure[start : start + batch_size]
        prompts = [examples[i].prompt for i in part]
        for i, ids in zip(part, continuations(model, prompts, max(map(len, answers.values())), prefix, embed)):
            said[i] = named(ids, answers) or f"<{tokenizer.decode(ids)}>"
    return said


def weighted_f1(truth, said):
    """F1 of each true class, weighted by its rows. A prediction outside the classes is a miss for its row's class."""
    support, guesses, hits = Counter(truth), Counter(said), Counter(t for t, s in zip(truth, said) if t == s)
    return sum(n * 2 * hits[c] / (n + guesses[c]) for c, n in support.items()) / len(truth)


def measure(model, tokenizer, examples, labels=None, generic=(), phi=None, hidden=None, batch_size=32, guard=None):
    """A dict of what is measured on one split, all as fractions of 1.

    labels: `label_set` of the rows; without one, only accuracy and probability. generic: the generic answers in it.
    hidden: `answer_hidden` of these examples, where the caller has it already. guard: what acts on them first.
    """
    examples, embed, more = guard.apply(model, tokenizer, examples) if guard else (examples, None, {})
    hidden = hidden or answer_hidden(model, examples, phi, batch_size=batch_size, embed=embed)
    scores, n = score(model, hidden, examples, batch_size), len(examples)
    result = {"rows": n, "accuracy": sum(right for right, _, _ in scores) / n,
              "probability": math.fsum(p for _, p, _ in scores) / n}
    if labels:
        said = predict(model, tokenizer, examples, scores, labels, phi, batch_size, embed)
        result |= {"f1": weighted_f1([e.label for e in examples], said),
                   "generic": sum(s in generic for s in said) / n,
                   "outside": sum(s in generic or s not in labels for s in said) / n,
                   "commonest": Counter(said).most_common(1)[0][1] / n}
    return result | more


def label_set(rows, tokenizer, generic):
    """{answer: its ids} of all rows' answers and the generic ones; None if there are too many to be a label set."""
    raw = {row.label: row.raw for row in rows}
    if len(raw) > MAX_LABELS:
        return None
    return {label: answer_ids(tokenizer, label, raw.get(label, False)) for label in [*sorted(raw), *generic]}


def table(before, after=None):
    """The results as text: a line per split, each metric in per cent, without -> with the prompt."""
    sides = [before, after] if after else [before]
    names = [m for m in METRICS if any(m in r for r in sides[-1].values())]

    def line(head, rows, cells):
        return f"{head:13}{rows:>7}" + "".join(f"{c:>{17 if after else 13}}" for c in cells)

    lines = [line("%", "rows", names)]
    for split, b in before.items():
        cells = [[f"{100 * side[split][m]:5.1f}" for side in sides if m in side[split]] for m in names]
        lines.append(line(split, b["rows"], [" -> ".join(cell).strip() for cell in cells]))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error here."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise ValueError(message)


def filled(text):
    """An argparse type: a string that is not empty, as an unset shell variable leaves it."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float from low (or above it) to high, never NaN or too large for float32."""
    high = min(high, 1e9) if kind is float else high

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            what = f"{'a whole' if kind is int else 'a'} number {'above' if above else 'of at least'} {low}"
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}{most}")
        return value

    return parse


def add_options(parser, data=True):
    """The options that several commands share; data: the four files, too."""
    group = parser.add_argument_group("model and data" + " (default: the bundled demo)" * data)
    group.add_argument("--model", type=filled, metavar="DIR",
                       help="Hugging Face model folder: config.json, safetensors, tokenizer")
    for name, what in [("forget", 'JSON Lines to forget, or with "forget": true|false in every row'),
                       ("retain", "JSON Lines to keep"),
                       ("test-forget", "unseen rows like those to forget, measured only"),
                       ("test-retain", "unseen rows like those to keep, measured only")] * data:
        group.add_argument(f"--{name}", type=filled, metavar="FILE", help=what)
    group.add_argument("--template", type=filled, metavar="T",
                       help="sentiment (default), question, a string with {text}, or a file")
    group.add_argument("--max-length", type=number(int, 2), default=1024, metavar="N",
                       help="tokens of a row, the prompt apart; longer texts lose their end (default 1024, paper)")
    group = parser.add_argument_group("hardware")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
                       help="auto: bf16 where the hardware multiplies it")
    group.add_argument("--quantize", choices=["int8"], help="keep the layers' weights in int8, half of bf16's memory")
    group.add_argument("--batch-size", type=number(int, 1), default=32, metavar="N", help="rows (default 32, paper)")


def use_demo(args):
    """Without --model and --forget: the bundled demo's files, where no other is named. -> whether it is the demo."""
    if args.model or args.forget:
        return False
    args.model = str(DEMO / "model")
    for name in ("forget", "retain", "test_forget", "test_retain"):
        setattr(args, name, getattr(args, name) or str(DEMO / f"{name}.jsonl"))
    args.template = args.template or "question"
    args.dtype = "fp32" if args.dtype == "auto" else args.dtype  # the same on machines with and without bf16
    return True


def auto_dtype(device):
    """bfloat16 on CUDA and on CPUs that multiply it in hardware, as torch reports them; float32 elsewhere."""
    kind = torch.device(device).type
    features = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}  # older torch does not say
    able = torch.cuda.is_bf16_supported(including_emulation=False) if kind == "cuda" else any(
        features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is Arm's
    return torch.bfloat16 if able else torch.float32


def hardware(args):
    """-> the device and the dtype that args ask for."""
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device).numpy(force=True)  # "meta" stops here, too
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"--device {device}: {str(e).splitlines()[0]}") from None
    return device, {"auto": auto_dtype(device), "bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]


def load_model(args, shard=None):
    """-> the frozen model and its tokenizer, on args.device in args.dtype. shard: see `Llama.from_pretrained`."""
    weight_files(args.model)  # the first to say that this is no model folder
    device, dtype = hardware(args)
    tokenizer = Tokenizer(args.model)
    model = Llama.from_pretrained(args.model, dtype, device, Int8Linear if args.quantize else torch.nn.Linear, shard)
    if tokenizer.size > model.config.vocab_size:
        raise ValueError(f"{args.model}: a tokenizer of {tokenizer.size} ids and a model of {model.config.vocab_size} "
                         "do not belong together")
    return model, tokenizer


def row_limit(args, p):
    """Tokens a row may have: --max-length, or what p prompt tokens leave of the model's own length."""
    longest = Config.from_file(Path(args.model) / "config.json").max_position_embeddings
    if longest - p < 2:
        raise ValueError(f"{p} prompt tokens leave no room: the model takes {longest} positions in all")
    return min(args.max_length, longest - p)


def load_prompts(folders, config, base_sha256):
    """Prompts for one model, which go in front one behind the other -> phi (p, d) of all and what spul.json says of
    them together. Raises ValueError if one is not for this model, or if they cannot stand together."""
    loaded = [load_prompt(folder, base_sha256) for folder in folders]
    (_, info), name = loaded[0], folders[0]
    for folder, (phi, other) in zip(folders, loaded):
        if phi.shape[1] != config.hidden_size:
            raise ValueError(f"{folder}: vectors of width {phi.shape[1]}, the model's is {config.hidden_size}")
        if other["template"] != info["template"]:
            raise ValueError(f"{folder}: another template than {name}'s: they cannot stand in front of one query")
    infos = [info for _, info in loaded]
    words = {key: list(dict.fromkeys(word for info in infos for word in info.get(key) or []))
             for key in ("generic", "labels")}
    cost = {key: combine(info[key] for info in infos) for key, combine in zip(COSTS, (sum, sum, max))
            if all(key in info for info in infos)}
    return torch.cat([phi for phi, _ in loaded]), {**info, **words, **cost}


def read_splits(args):
    """-> {name: rows} of the files given, checked against nothing yet."""
    splits = {}
    if args.forget:
        splits["train forget"], retain = read_sets(args.forget, args.retain)
        splits |= {"train retain": retain} if retain else {}
    elif args.retain:
        splits["train retain"] = read_rows(args.retain)
    for name in ("forget", "retain"):
        if file := getattr(args, f"test_{name}"):
            splits[f"test {name}"] = read_rows(file)
    return splits


def run(main):
    """Call main(); what a user can cause becomes one line on stderr and an exit status, a bug keeps its traceback."""
    try:
        status, message = main() or 0, None
    except KeyboardInterrupt as e:
        status, message = 130, str(e) or "stopped"
    except FloatingPointError as e:
        status, message = 3, str(e)
    except (ValueError, OSError) as e:
        status, message = 2, f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e)
    except (RuntimeError, MemoryError) as e:
        if not isinstance(e, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(e):
            raise  # the CPU's allocator has no exception of its own
        status, message = 3, ("out of memory: lower --batch-size or --max-length, or take --recompute (train.py), "
                              "--quantize int8 or --dtype bf16")
    if message and ranks()[0] == 0:
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    leave()
    sys.exit(status)


# -------------------------------------------------------------------------------------------------- the command


def ask(model, tokenizer, text, template, labels, room, prefix=None, guard=None):
    """The model's greedy answer to one text: a label where labels are known and it is one, else one line of text."""
    ids, embed = tokenizer.bos + tokenizer.encode(template.replace("{text}", text)), None
    n = max(map(len, labels.values()), default=64)
    if not ids or len(ids) + n > room:
        raise ValueError(f"--ask: {len(ids)} tokens, and there is room for 1 to {room - n}")
    if guard:
        (example,), embed, _ = guard.apply(model, tokenizer, [Example((*ids, 0), 1, "", False)])
        ids = example.prompt
    new = continuations(model, [ids], n, prefix, embed)[0]
    return named(new, labels) or tokenizer.decode(new).strip().split("\n")[0]


def main(argv=None):
    parser = Parser(__doc__)
    add_options(parser)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--prompt", type=filled, action="append", metavar="DIR",
                       help="of train.py, several times for several one behind the other; or of baselines.py eco, icul")
    group.add_argument("--ask", metavar="TEXT", help="show the answers to one text instead")
    group.add_argument("--json", type=filled, metavar="FILE", help="write the table there, too")
    args = parser.parse_args(argv)
    if use_demo(args) and not args.prompt and (DEMO / "prompt" / "spul.json").exists():
        args.prompt = [str(DEMO / "prompt")]
    splits = {} if args.ask is not None else read_splits(args)
    if not splits and args.ask is None:
        raise ValueError("nothing to measure: give --forget, --retain, --test-forget, --test-retain or --ask")
    if not args.model:
        raise ValueError("--model DIR is missing")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).absolute().parent.is_dir()):
        raise ValueError(f"--json {args.json}: a folder, or in none")

    phi, guard, info, cost = None, None, {}, Path(args.model) / "run.json"
    if args.prompt and any(map(guards.is_guard, args.prompt)):
        if len(args.prompt) > 1:
            raise ValueError(f"--prompt {args.prompt[1]}: eco and icul do not go with another prompt")
        guard, info = guards.load(args.prompt[0], fingerprint(args.model))
    elif args.prompt:
        config = Config.from_file(Path(args.model) / "config.json")
        phi, info = load_prompts(args.prompt, config, fingerprint(args.model))
    cost = info or (read_json(cost) if cost.is_file() else {})
    cost = {name: cost.get(name) for name in COSTS if cost.get(name) is not None}
    template = args.template and read_template(args.template)
    if not template:  # that of the prompt, which has none if its rows were prompts themselves
        template = info["template"] or "{text}" if info else read_template("sentiment")
    generic = info.get("generic", [])
    model, tokenizer = load_model(args)
    phi = None if phi is None else phi.to(model.device)

    if args.ask is not None:
        labels = {name: answer_ids(tokenizer, name, info["template"] is None and name not in generic)
                  for name in [*(info.get("labels") or []), *generic]} if info.get("labels") else {}
        text = args.ask.replace("\\n", "\n")
        room = model.config.max_position_embeddings - (0 if phi is None else len(phi))
        check_text(text, "--ask")
        print(f"without the prompt: {ask(model, tokenizer, text, template, labels, room)}")
        if args.prompt:
            with torch.no_grad():
                prefix = None if phi is None else model.prefix(phi)
            print(f"with the prompt:    {ask(model, tokenizer, text, template, labels, room, prefix, guard)}")
        return
    limit = row_limit(args, 0 if phi is None else len(phi))
    labels = label_set([row for rows in splits.values() for row in rows], tokenizer, generic)
    before, after = {}, {}
    for name, rows in splits.items():
        examples, cut = make_examples(rows, tokenizer, template, limit)
        if cut:
            print(f"{name}: {cut} texts cut to {limit} tokens")
        how = dict(labels=labels, generic=generic, batch_size=args.batch_size)
        before[name] = measure(model, tokenizer, examples, **how)
        if args.prompt:
            after[name] = measure(model, tokenizer, examples, phi=phi, guard=guard, **how)
    print(table(before, after))
    if cost:
        print("cost: " + ", ".join(f"{value:,.0f} {COSTS[name]}" for name, value in cost.items()))
    if args.json:
        write_json(args.json, {"model": args.model, "prompt": args.prompt, "dtype": str(model.dtype), "cost": cost,
                               "without": before, "with": after or None})


if __name__ == "__main__":
    run(main)
