"""Measure ECO and ICUL, two methods that leave the weights alone and act on each query.

    python -m extras.guards --model DIR --prompt GUARD --forget FILE --retain FILE [--json FILE]
    python -m extras.guards --model DIR --prompt GUARD --ask "a question"

`python -m extras.baselines eco` and `icul` make a guard, with `make_guard` of this file. A guard is
a folder: guard.safetensors, and guard.json with everything else, which is written last.

ECO (Liu et al., arXiv 2406.07933): a classifier says whether a query is one to forget, and the
embeddings of such a query are corrupted before the model reads them. Their classifier is a
fine-tuned RoBERTa. Ours is a logistic regression on the model's own final-norm outputs, averaged
over the query's tokens, so it needs no other model. Answers are never corrupted.

ICUL (Pawelczyk et al., arXiv 2310.07579): the context shows forget rows with a wrong label and
other rows with the right one. Theirs is for one forget row at a time. Ours is for many: it takes
the k rows that are nearest to the query by the same averages.

Letters: B rows, T tokens, d width, n rows that a guard is made from.
"""

import copy
import math
import random
import time
import zlib
from dataclasses import replace
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from data import Example, Row, answer_ids, by_length, collate, make_examples
from eval import asking_of, generator, label_set, measure, score, template_of
from extras.finetune import accuracy
from spul import answer_hidden
from support.answers import ask
from support.cli import Parser, add_options, check_required, non_empty, number, read_splits, run
from support.cli import use_demo
from support.files import check_json_path, read_json, weight_files, write_json, write_tensors
from support.hardware import load_llama, load_model, peak_memory, row_limit
from support.identity import check_fingerprint, fingerprint
from support.tables import METRICS, report
from support.templates import template_from_json, template_to_json

# What ECO does to some entries x of an embedding; z ~ N(0, 1), and s is the strength.
ACTIONS = {
    "noise": lambda x, s, z: x + s * z,
    "zero": lambda x, s, z: 0 * x,
    "flip": lambda x, s, z: -x,
    "shift": lambda x, s, z: x + s * z.sign(),
    "sub": lambda x, s, z: x - s,
    "add": lambda x, s, z: x + s,
}
PLACES = ("first", "rand", "top", "least")  # which entries: first, random, largest, smallest
ECO_CORRUPTIONS = [f"{action}_{place}" for action in ACTIONS for place in PLACES]
ECO_CORRUPTIONS += ["reverse", "shuffle"]  # of the order of the tokens

SEARCHED = (-4.0, 3.0)  # powers of ten, between which a strength is searched
SEARCHES = 12
CLOSE_ENOUGH = 0.005  # to the accuracy aimed at

GUARD_METRICS = [*METRICS, "flagged"]  # flagged: share of queries that ECO corrupts


# -------------------------------------------------------------------------------------- the guards


def corrupt(e, kind, dims, strength, seed):
    """ECO's corruption of embeddings e (T, d) -> (T, d), the same for the same seed.

    kind: one of ECO_CORRUPTIONS. It changes `dims` entries of each token's embedding. "top" and
    "least" go by the entry's value for sub and add, by its absolute value for the others. It is
    computed in float32, and stays within what the dtype of e can hold.
    """
    generator = torch.Generator().manual_seed(seed)
    T, d = e.shape
    if kind == "reverse":
        return e.flip(0)
    if kind == "shuffle":
        return e[torch.randperm(T, generator=generator).to(e.device)]
    action, place = kind.split("_")
    x = e.float()  # (T, d)
    size = x if action in ("sub", "add") else x.abs()
    priorities = {
        "first": -torch.arange(d).float().expand(T, d),
        "rand": torch.rand(d, generator=generator).expand(T, d),  # the same entries of all tokens
        "top": size,
        "least": -size,
    }
    priority = priorities[place].to(e.device)  # (T, d)
    chosen = priority.topk(min(dims, d), dim=-1).indices  # (T, dims)
    z = torch.randn(chosen.shape, generator=generator).to(e.device)  # (T, dims)
    changed = ACTIONS[action](x.gather(1, chosen), strength, z)  # (T, dims)
    limit = torch.finfo(e.dtype).max
    return x.scatter(1, chosen, changed).clamp(-limit, limit).to(e.dtype)


@torch.no_grad()
def layer_averages(model, prompts, layers, batch_size=32):
    """Each layer's outputs, normalised as the last one's are, averaged over a prompt's tokens.

    prompts: n lists of ids. layers: numbers from 1 up. Returns (len(layers), n, d), float32, on the
    CPU. Layers after these do not run.
    """
    cut = copy.copy(model)
    cut._modules = {**model._modules, "layers": model.layers[: max(layers)]}
    means = torch.empty(len(layers), len(prompts), model.config.hidden_size)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # as data.by_length

    def keep(place, indices, is_token, lengths):
        def hook(module, inputs, output):
            h = model.norm(output[0]).float()  # (B, T, d)
            means[place, indices] = ((h * is_token).sum(dim=1) / lengths).cpu()  # (B, d)

        return model.layers[layers[place] - 1].register_forward_hook(hook)

    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, "reading queries", unit="batch", leave=False, delay=5):
        indices = order[start : start + batch_size]
        tokens, lengths = model.pad([prompts[i] for i in indices])  # (B, T), (B,)
        lengths = lengths[:, None]  # (B, 1)
        places = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        is_token = (places < lengths)[..., None]  # (B, T, 1), False at padding
        hooks = [keep(i, indices, is_token, lengths) for i in range(len(layers))]
        try:
            cut.hidden(tokens)
        finally:
            for hook in hooks:
                hook.remove()
    return means


def averages(model, examples, batch_size=32):
    """The final-norm outputs of each example's prompt, averaged over its tokens -> (n, d) float32.

    They are on the CPU.
    """
    last = len(model.layers)
    return layer_averages(model, [e.prompt for e in examples], [last], batch_size)[0]


class Eco:
    """Corrupts the embeddings of queries that the classifier flags.

    Flagged: sigmoid(x w + b) is above tau, for the query's average x (d,). info: what guard.json
    holds. tensors: w (d,) and b (1,).
    """

    def __init__(self, info, tensors):
        self.info = info
        self.w = tensors["w"]
        self.b = tensors["b"]

    def probability(self, x):
        """Averages (n, d) -> the probability that each is a query to forget, (n,)."""
        return torch.sigmoid(x @ self.w + self.b)

    def apply(self, model, tokenizer, examples, batch_size=32):
        """-> the examples, a function that embeds their prompts, and metrics to be reported.

        embed(prompts, tokens): prompts, and tokens (B, T) that begin with them -> (B, T, d).
        """
        probabilities = self.probability(averages(model, examples, batch_size)).tolist()
        flagged = set()
        for e, p in zip(examples, probabilities):
            if p > self.info["tau"]:
                flagged.add(e.prompt)

        def embed(prompts, tokens):
            e = model.embed(tokens)  # (B, T, d)
            for row, prompt in enumerate(prompts):
                if prompt in flagged:
                    # The prompt's last token stays, as in their code, and so does the answer.
                    last = len(prompt) - 1
                    e[row, :last] = self.corrupt(e[row, :last], prompt)
            return e

        share = sum(e.prompt in flagged for e in examples) / len(examples)
        return examples, embed, {"flagged": share}

    def corrupt(self, e, prompt):
        """Embeddings e (T, d) of a prompt -> (T, d), the same for the same prompt."""
        seed = zlib.crc32(repr((self.info["seed"], prompt)).encode())
        return corrupt(e, self.info["corruption"], self.info["dims"], self.info["strength"], seed)


class Icul:
    """Puts rows with answers before each query: the nearest forget rows, then other rows.

    info: what guard.json holds. tensors: x (n, d), the averages of the forget rows.
    """

    def __init__(self, info, tensors):
        self.info = info
        self.x = tensors["x"]

    def apply(self, model, tokenizer, examples, batch_size=32):
        """-> the examples with their context, no function that embeds, and no metrics.

        Raises ValueError where a query and its context are too long for the model.
        """
        wrong = [self.line(tokenizer, *row) for row in self.info["wrong"]]
        right = []
        for row in self.info["right"]:
            right += self.line(tokenizer, *row)
        x = averages(model, examples, batch_size)  # (B, d)
        cosine = F.normalize(x, dim=1) @ F.normalize(self.x, dim=1).T  # (B, n)
        nearest = cosine.topk(min(self.info["k"], len(wrong)), dim=1).indices.tolist()
        start = len(tokenizer.bos)
        room = model.config.max_position_embeddings
        changed = []
        for e, indices in zip(examples, nearest):
            context = []
            for i in indices:
                context += wrong[i]
            ids = (*e.ids[:start], *context, *right, *e.ids[start:])
            if len(ids) > room:
                raise ValueError(
                    f"icul: a query and its context are {len(ids)} tokens, and the model takes "
                    f"{room}: make the guard with fewer --context rows"
                )
            changed.append(replace(e, ids=ids))
        return changed, None, {}

    def line(self, tokenizer, text, label):
        """The ids of a row of the context."""
        template = template_from_json(self.info["template"])
        before, after = template.around(Row(text, label, ""))
        ids = tokenizer.encode_parts([*before, (text, False), *after], inside=True)
        ids += answer_ids(tokenizer, label, template)
        ids += tokenizer.encode_inside("\n\n")
        return ids


# ------------------------------------------------------------------------------ the guard's folder

KINDS = {"eco": Eco, "icul": Icul}
FIELDS = {  # of guard.json
    "eco": ("tau", "corruption", "dims", "strength", "seed"),
    "icul": ("k", "wrong", "right", "template"),
}


def is_guard(folder):
    return (Path(folder) / "guard.json").is_file()


def save(folder, info, tensors):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    write_tensors(folder / "guard.safetensors", tensors)
    write_json(folder / "guard.json", {"format": "spul guard 1", **info, "shapes": shapes})


def load(folder, model_folder):
    """A guard's folder -> Eco or Icul, and the contents of guard.json.

    Raises ValueError or OSError if it is not a complete guard, or if it was made for another model
    than the one in model_folder.
    """
    folder = Path(folder)
    if not is_guard(folder):
        raise FileNotFoundError(f"{folder}: no guard.json: not a guard (eval.py measures prompts)")
    file = folder / "guard.json"
    info = read_json(file)
    if info.get("format") != "spul guard 1" or info.get("method") not in KINDS:
        raise ValueError(f"{file}: not as extras.baselines writes it")
    missing = [name for name in FIELDS[info["method"]] if name not in info]
    if missing:
        raise ValueError(f"{file}: no {', '.join(missing)}")
    check_fingerprint(info.get("base_sha256"), model_folder, folder)
    file = folder / "guard.safetensors"
    try:
        tensors = load_file(file)
    except (safetensors.SafetensorError, OSError) as e:
        raise ValueError(f"{file}: not a complete file: {e}") from None
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != info.get("shapes"):
        raise ValueError(f"{file}: not the tensors that guard.json describes")
    return KINDS[info["method"]](info, tensors), info


# ------------------------------------------------------------------------------------- making them


def fit_classifier(x, y, decay=1e-3, rounds=200):
    """Logistic regression on x (n, d), with y (n,) of 0 and 1 -> w (d,), b (1,).

    Both classes have the same weight in total. For the fit, the columns are scaled to mean 0 and
    standard deviation 1; w and b are for x as it is.
    """
    mean = x.mean(dim=0)  # (d,)
    spread = x.std(dim=0) + 1e-6  # (d,)
    z = (x - mean) / spread  # (n, d)
    weight = torch.where(y > 0, len(y) / y.sum(), len(y) / (1 - y).sum())  # (n,)
    w = torch.zeros(x.shape[1], requires_grad=True)
    b = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=rounds, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        error = F.binary_cross_entropy_with_logits(z @ w + b, y, weight)
        loss = error + decay * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    w = w.detach() / spread
    b = b.detach() - (w * mean).sum(dim=0, keepdim=True)
    return w, b


def threshold(p, y, rate, conformal):
    """tau, above which a query is flagged, from held-out rows.

    p (n,): the probability that a row is one to forget. y (n,): 1 for rows to forget, 0 for others.
    It is the largest tau that misses at most the share `rate` of the rows to forget.

    conformal: a split conformal threshold instead. With q the quantile of 1 - p(true class) that at
    most the share `rate` of all rows exceeds, a query is flagged where "forget" is the only class
    with 1 - p(class) <= q.
    """
    if conformal:
        scores = torch.where(y > 0, 1 - p, p).sort().values
        rank = math.ceil((len(p) + 1) * (1 - rate))
        q = scores[min(rank, len(p)) - 1].item()
        return max(q, 1 - q - 1e-6)
    of_forget = p[y > 0].sort().values
    return of_forget[int(rate * len(of_forget))].item() * (1 - 1e-6)  # just below it, never below 0


def train_classifier(x, y, seed, rate, conformal):
    """ECO's classifier on averages x (n, d) and y (n,), with a fifth held out -> w, b, tau.

    Prints how often it is wrong on the held-out rows. Raises ValueError for too few rows.
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held_out = order[: len(y) // 5]
    rest = order[len(y) // 5 :]
    for part in (held_out, rest):
        if len(set(y[part].tolist())) < 2:
            raise ValueError(
                "eco: too few rows: a fifth of them, held out, has to hold rows of both kinds"
            )
    w, b = fit_classifier(x[rest], y[rest])
    p = torch.sigmoid(x @ w + b)[held_out]
    is_forget = y[held_out] > 0
    tau = threshold(p, y[held_out], rate, conformal)
    missed = (p[is_forget] <= tau).float().mean()
    wrong = (p[~is_forget] > tau).float().mean()
    print(
        f"classifier: held out, {100 * missed:.1f} % of the forget rows missed and "
        f"{100 * wrong:.1f} % of the others flagged; tau {tau:.3g}",
        flush=True,
    )
    return w, b, tau


def search_strength(reached, target):
    """The strength whose accuracy is nearest to target -> it, and how far off the accuracy is.

    reached(strength): the accuracy. We bisect, because more strength leaves fewer right answers.
    ECO's own search is for the lowest accuracy, and stays at its start where another is aimed at.
    """
    low, high = SEARCHED
    tried = []
    for _ in range(SEARCHES):
        middle = (low + high) / 2
        right = reached(10**middle)
        distance = abs(right - target)
        tried.append((distance, 10**middle))
        if distance < CLOSE_ENOUGH:
            break
        if right > target:
            low = middle
        else:
            high = middle
    distance, strength = min(tried)
    return strength, distance


def make_eco(args, model, tokenizer, forget, retain):
    """ECO's classifier, threshold and strength from rows -> what `save` takes."""
    limit = row_limit(args, 0)
    forget, _ = make_examples(forget, tokenizer, args.template, limit, True)
    retain, _ = make_examples(retain, tokenizer, args.template, limit)
    x = averages(model, forget + retain, args.batch_size)  # (n, d)
    y = torch.tensor([1.0] * len(forget) + [0.0] * len(retain))  # (n,)
    w, b, tau = train_classifier(x, y, args.seed, args.miss, args.conformal)
    tensors = {"w": w, "b": b}
    info = {
        "tau": tau,
        "corruption": args.corruption,
        "dims": args.dims,
        "strength": args.strength,
        "seed": args.seed,
    }
    if args.strength is None:
        target = args.target
        origin = "as given"
        if isinstance(target, str):
            origin = f"that of {target}"
            retrained = load_llama(target, model.dtype, model.device, args.plain)
            target = accuracy(retrained, forget, batch_size=args.batch_size)

        def reached(strength):
            guard = Eco({**info, "strength": strength}, tensors)
            _, embed, _ = guard.apply(model, tokenizer, forget, args.batch_size)
            hidden = guarded_hidden(model, forget, embed, args.batch_size)
            scores = score(model, hidden, forget, args.batch_size)
            return sum(is_right for is_right, _, _ in scores) / len(scores)

        info["strength"], distance = search_strength(reached, target)
        print(
            f"strength {info['strength']:.3g}: {100 * distance:.1f} points from the forget "
            f"accuracy aimed at, {100 * target:.1f} %, {origin}",
            flush=True,
        )
    return info, tensors


def make_icul(args, model, tokenizer, forget, retain):
    """ICUL's forget rows with another label, and retain rows with theirs -> what `save` takes."""
    rows = forget + retain
    if any(row.raw for row in rows):
        raise ValueError("icul: rows of text and label are needed")
    labels = sorted({row.label for row in rows})
    if len(labels) < 2:
        raise ValueError("icul: a wrong label is needed, and there is only one")
    rng = random.Random(f"icul {args.seed}")
    wrong = []
    for row in forget:
        others = [label for label in labels if label != row.label]
        wrong.append((row.text, rng.choice(others)))
    context = rng.sample(retain, min(args.context, len(retain)))
    right = [(row.text, row.label) for row in context]
    examples, _ = make_examples(forget, tokenizer, args.template, row_limit(args, 0))
    info = {"k": args.k, "wrong": wrong, "right": right, "seed": args.seed}
    return info, {"x": averages(model, examples, args.batch_size)}


def make_guard(args, forget, retain):
    """Make the guard of args.method and save its folder."""
    model, tokenizer = load_model(args)
    began = time.perf_counter()
    make = make_eco if args.method == "eco" else make_icul
    info, tensors = make(args, model, tokenizer, forget, retain)
    trainable = 0
    if args.method == "eco":
        trainable = sum(tensor.numel() for tensor in tensors.values())
    info = {
        "method": args.method,
        "model": args.model,
        "base_sha256": fingerprint(args.model),
        "template": template_to_json(args.template),
        "generic": [],
        "labels": sorted({row.label for row in forget + retain}),
        **info,
        "trainable": trainable,
        "seconds": time.perf_counter() - began,
        "peak_bytes": peak_memory(model.device),
    }
    save(args.out, info, tensors)
    print(f"guard in {args.out}: python -m extras.guards --prompt {args.out}")


def add_guard_options(add):
    """The options of `make_guard`. add: a group's add_argument."""
    add("--k", type=number(int, 1), default=1, help="icul: nearest forget rows (default 1)")
    add("--context", type=number(int, 0), default=5, metavar="S",
        help="icul: other rows (default 5)")
    add("--corruption", choices=ECO_CORRUPTIONS, default="noise_first", metavar="C",
        help=f"eco: {', '.join(ECO_CORRUPTIONS)} (default noise_first)")
    add("--dims", type=number(int, 1), default=2**31, metavar="N",
        help="eco: entries of an embedding that are corrupted (default all)")
    add("--strength", type=number(float, 0), metavar="S", help="eco: default searched")
    add("--target", type=non_empty, default="0.5", metavar="A|DIR",
        help="eco: forget accuracy to aim at, or a retrained model that has it (default 0.5)")
    add("--miss", type=number(float, 0, 0.5), default=0.01, metavar="R",
        help="eco: share of the forget rows that may be missed (default 0.01)")
    add("--conformal", action="store_true", help="eco: a split conformal threshold")


def read_target(value):
    """--target -> an accuracy, or the path of a model folder that has it."""
    try:
        target = float(value)
    except ValueError:
        weight_files(value)  # raises an error if it is not a model folder
        return value
    if not 0 <= target <= 1:
        raise ValueError(f"--target {value}: an accuracy is from 0 to 1")
    return target


# --------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def guarded_hidden(model, examples, embed=None, batch_size=32):
    """As `spul.answer_hidden`: a list of (n, d). embed: what a guard's `apply` gave."""
    if embed is None:
        return answer_hidden(model, examples, batch_size=batch_size)
    outputs = [None] * len(examples)
    for indices in by_length(examples, batch_size):
        part = [examples[i] for i in indices]
        batch = collate(part, model.device)
        x = embed([e.prompt for e in part], batch.tokens)  # (B, T, d)
        h = model.prompted(x)[batch.rows, batch.columns]  # (N, d)
        for i, of_answer in zip(indices, h.split([e.n for e in part])):
            outputs[i] = of_answer.clone()
    return outputs


def guarded_generator(model, embed=None):
    """As `eval.generator`. embed: what a guard's `apply` gave for the examples of the prompts."""
    if embed is None:
        return generator(model)

    @torch.no_grad()
    def generate(prompts, n):
        tokens, _ = model.pad(prompts)  # (B, T)
        return model.generate(prompts, None, n, embeddings=embed(prompts, tokens))

    return generate


def measure_guarded(
    model,
    tokenizer,
    examples,
    guard,
    labels=None,
    generic=(),
    batch_size=32,
):
    """As `eval.measure`, for a model with a guard, and with the guard's own metrics."""
    examples, embed, metrics = guard.apply(model, tokenizer, examples, batch_size)
    result = measure(
        model,
        tokenizer,
        examples,
        labels,
        generic,
        hidden=guarded_hidden(model, examples, embed, batch_size),
        batch_size=batch_size,
        generate=guarded_generator(model, embed),
    )
    return {**result, **metrics}


# ------------------------------------------------------------------------------------- the command


def ask_guarded(args, model, tokenizer, guard, info):
    """--ask: print the answers without and with the guard."""

    def generate(prompts, n):
        # An example needs an answer; it is not read.
        examples = [Example((*ids, 0), 1, "", False) for ids in prompts]
        examples, embed, _ = guard.apply(model, tokenizer, examples)
        return guarded_generator(model, embed)([e.prompt for e in examples], n)

    generators = {"without": generator(model), "with": generate}
    ask(args, asking_of(args, model, tokenizer, info), generators)


def table_command(args, model, tokenizer, guard, info, splits):
    """Measure every split without and with the guard, print the table, and write it to --json."""
    generic = info.get("generic", [])
    limit = row_limit(args, 0)
    all_rows = [row for rows in splits.values() for row in rows]
    template = template_of(args, info, all_rows)
    labels = label_set(all_rows, tokenizer, generic, template)
    before = {}
    after = {}
    for name, rows in splits.items():
        examples, cut = make_examples(rows, tokenizer, template, limit)
        if cut:
            print(f"{name}: {cut} texts cut to {limit} tokens")
        before[name] = measure(
            model, tokenizer, examples, labels, generic, batch_size=args.batch_size
        )
        after[name] = measure_guarded(
            model, tokenizer, examples, guard, labels, generic, args.batch_size
        )
    report(args, model, info, before, after, GUARD_METRICS)


def main(argv=None):
    parser = Parser(__doc__)
    add_options(parser)
    add = parser.add_argument_group("what to measure").add_argument
    add("--prompt", type=non_empty, action="append", metavar="DIR",
        help="the guard, of python -m extras.baselines eco or icul")
    add("--ask", metavar="TEXT", help="show the answers to one text instead")
    add("--json", type=non_empty, metavar="FILE", help="also write the table to this file")
    args = parser.parse_args(argv)
    use_demo(args)
    splits = {} if args.ask is not None else read_splits(args)
    if not splits and args.ask is None:
        raise ValueError(
            "nothing to measure: give --forget, --retain, --test-forget, --test-retain or --ask"
        )
    check_required(args, "model", "prompt")
    if len(args.prompt) > 1:
        raise ValueError(f"--prompt {args.prompt[1]}: eco and icul do not go with another prompt")
    check_json_path(args.json)
    guard, info = load(args.prompt[0], args.model)
    template_of(args, info)  # a bad one is found before the model is loaded
    model, tokenizer = load_model(args)
    if args.ask is not None:
        ask_guarded(args, model, tokenizer, guard, info)
    else:
        table_command(args, model, tokenizer, guard, info, splits)


if __name__ == "__main__":
    run(main)
