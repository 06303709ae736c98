"""Unlearn with the methods that SPUL is compared to, on the same files.

    python baselines.py METHOD --model DIR --forget FILE --retain FILE --out DIR [--train full|lora] [--lr LR]

ga, rl, ga-kl, ga-gd, npo, simnpo, llmu and sku change the weights and write a model folder. retrain is finetune.py's
recipe on the retain rows alone, from a base model that has seen neither file: what the others are to be measured by.
icul and eco leave the weights as they are and write a small folder that eval.py applies at each query (guards.py).

A loss is a function of `Terms`, what one batch gives; all of them go through one loop, `finetune.fit`. The reference
model, which KL and NPO compare with, is what the model said before the first step, kept as numbers: it cannot be the
model that learns, as happens in published code where both share their weights and the KL is that to itself, 0.
"""

import dataclasses
import math
import random
import time
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

import guards
from cli import Parser, add_options, filled, hardware, load_model, number, row_limit, run
from data import (check_disjoint, check_generic, collate, common_front, epoch_batches, make_examples, read_generic,
                  read_sets, read_template)
from eval import answer_hidden, measure
from files import weight_files
from finetune import (Lora, accuracy, add_lora_options, check_model_out, describe, fit, make_trainable, memorise,
                      save_model, swap)
from model import Llama
from scale import peak_memory
from spul import fingerprint
from train import CLIP

FORGET, RETAIN, RANDOM = range(3)  # what a row of a batch is; RANDOM: a forget row's text with another row's answer
MOST = 10.0  # nats: as far as SKU pushes a token's distribution away


# ---------------------------------------------------------------------------------------------------- the losses


@dataclasses.dataclass
class Terms:
    """What a batch of B rows gives: N answer tokens, N_r of them in retain rows, B_f forget rows."""

    logits: torch.Tensor  # (N, V)
    targets: torch.Tensor  # (N,)
    rows: torch.Tensor  # (N,), in which row each stands
    kind: torch.Tensor  # (B,), FORGET, RETAIN or RANDOM
    known: torch.Tensor = None  # (N_r, V), the reference's logits, where the loss takes them
    reference: torch.Tensor = None  # (B_f,), the reference's cross-entropy of each forget row's answer

    @cached_property
    def ce(self):
        return F.cross_entropy(self.logits.float(), self.targets, reduction="none")  # (N,)

    def sums(self, kind):
        """Of each row of a kind: its answer's cross-entropy and number of tokens, two of (B_kind,)."""
        zero = torch.zeros(len(self.kind), device=self.ce.device)
        ce, n = zero.index_add(0, self.rows, self.ce), zero.index_add(0, self.rows, torch.ones_like(self.ce))
        return ce[self.kind == kind], n[self.kind == kind]

    def per_token(self, kind):
        """batchCE: the mean over all answer tokens of a kind, 0 if there are none."""
        ce, n = self.sums(kind)
        return ce.sum() / n.sum().clamp(min=1)

    def per_row(self, kind):
        """The mean over the rows of a kind of meanCE, each row's mean over its answer tokens; 0 if there are none."""
        ce, n = self.sums(kind)
        return (ce / n).sum() / max(len(n), 1)

    def kl(self, most=math.inf):
        """KL(reference || model): the sum over a retain row's answer tokens, the mean over the rows.

        most: the nats up to which a token counts.
        """
        log_q = F.log_softmax(self.logits[self.kind[self.rows] == RETAIN].float(), dim=-1)  # (N_r, V)
        log_p = F.log_softmax(self.known.float(), dim=-1)
        each = (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(max=most)  # (N_r,)
        return each.sum() / (self.kind == RETAIN).sum().clamp(min=1)


def ga(t):
    """Gradient ascent: L = -batchCE(forget). Unbounded below, so it stops at --stop-ce."""
    return -t.per_token(FORGET)


def rl(t):
    """Random labels: L = batchCE(forget), each row with a generic answer in place of its own."""
    return t.per_token(FORGET)


def ga_kl(t):
    """L = -batchCE(forget) + KL(reference || model) on retain."""
    return -t.per_token(FORGET) + t.kl()


def ga_gd(t):
    """L = -batchCE(forget) + batchCE(retain), also called gradient difference."""
    return -t.per_token(FORGET) + t.per_token(RETAIN)


def npo(t, beta=0.1):
    """Negative preference optimisation (Zhang et al., arXiv 2404.05868), seqCE the sum over a row's answer tokens:

    L = -(2/beta) mean_forget log sigmoid(beta (seqCE - seqCE_reference)) + batchCE(retain); beta -> 0 is GA.
    """
    ce, _ = t.sums(FORGET)
    return -2 / beta * F.logsigmoid(beta * (ce - t.reference)).sum() / max(len(ce), 1) + t.per_token(RETAIN)


def simnpo(t, beta=2.5, gamma=0.0, weight=0.1375):
    """SimNPO (Fan et al., arXiv 2410.07163), no reference, meanCE over a row's answer tokens; values of TOFU forget05:

    L = -weight (2/beta) mean_forget log sigmoid(beta (meanCE - gamma)) + batchCE(retain).
    """
    ce, n = t.sums(FORGET)
    return (-weight * 2 / beta * F.logsigmoid(beta * (ce / n - gamma)).sum() / max(len(n), 1) + t.per_token(RETAIN))


def llmu(t):
    """Yao et al., arXiv 2310.10683; with LoRA it is LoRA + gradient ascent, Gundavarapu et al., arXiv 2405.15152:

    L = -0.5 meanCE(forget) + meanCE(forget texts with answers of random retain rows) + KL(reference || model) on
    retain.
    """
    return -0.5 * t.per_row(FORGET) + t.per_row(RANDOM) + t.kl()


def sku(t):
    """SKU (Liu et al., arXiv 2402.10058), first stage: learn what is to go, theta_bad, and be far off elsewhere:

    L = 2.5 meanCE(forget) + 2.5 meanCE(forget texts with answers of random forget rows) - KL(reference || model) on
    retain, a token's KL up to 10 nats (the limit is ours). The second, after training, is `negate`. With two labels the
    random answers are nearly a coin's.
    """
    return 2.5 * t.per_row(FORGET) + 2.5 * t.per_row(RANDOM) - t.kl(MOST)


LOSSES = {"ga": ga, "rl": rl, "ga-kl": ga_kl, "ga-gd": ga_gd, "npo": npo, "simnpo": simnpo, "llmu": llmu, "sku": sku}
FORGET_ONLY = ("ga", "rl")
SOURCES = {"llmu": RETAIN, "sku": FORGET}  # the rows whose answers RANDOM rows take
REFERENCE = {"ga-kl": RETAIN, "npo": FORGET, "llmu": RETAIN, "sku": RETAIN}  # the rows that are compared with it


# ---------------------------------------------------------------------------------------------------- training


def with_random_answers(examples, answers, k, rng):
    """For each example k more of the same text, with answers drawn from the list answers, of (ids, label)."""
    drawn = [(e, rng.choice(answers)) for e in examples for _ in range(k)]
    return [dataclasses.replace(e, ids=e.ids[: -e.n] + ids, n=len(ids), label=label) for e, (ids, label) in drawn]


def terms(model, examples, kind, front=(), known=None, reference=None):
    """Terms of these examples, of the kinds (B,); known and reference as there."""
    batch = collate(examples, model.device, front)
    logits = model.head(model.hidden(batch.tokens, model.front(ids=front), batch.at))  # (N, V)
    return Terms(logits, batch.targets, batch.rows, torch.tensor(kind, device=model.device), known, reference)


@torch.no_grad()
def sequence_ce(model, hidden, examples):
    """The cross-entropy of each example's answer from its final-norm outputs, a list of floats."""
    return [F.cross_entropy(model.head(h), torch.tensor(e.ids[-e.n :], device=h.device), reduction="sum").item()
            for h, e in zip(hidden, examples)]


def unlearn(model, examples, args, dtype, description, resume):
    """Train model on examples by args.method -> steps made, seconds they took, the step at which its rule stopped it,
    or None, and the number of parameters."""
    side = REFERENCE.get(args.method)
    compared = [i for i, e in enumerate(examples) if side == (FORGET if e.forget else RETAIN)]
    own = [examples[i] for i in compared]
    first = answer_hidden(model, own, batch_size=args.batch_size) if own else []  # before anything learns
    hidden = dict(zip(compared, first)) if side == RETAIN else {}
    reference = dict(zip(compared, sequence_ce(model, first, own))) if side == FORGET else {}
    table = model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    head = table.weight.detach().clone() if args.full else table.weight
    source = SOURCES.get(args.method)
    answers = [(e.ids[-e.n :], e.label) for e in examples if source is not None and e.forget == (source == FORGET)]
    front, stopped = common_front(examples), []
    trained = make_trainable(model, args)
    kwargs = {"beta": args.beta} if args.beta else {}

    def loss(indices, step):
        rows = [examples[i] for i in indices]
        kind = [FORGET if e.forget else RETAIN for e in rows]
        if answers:
            more = with_random_answers([e for e in rows if e.forget], answers, args.randoms,
                                       random.Random(f"answers {args.seed} {step}"))
            rows, kind = rows + more, kind + [RANDOM] * len(more)
        kept = [hidden[i] for i in indices if i in hidden]
        known = F.linear(torch.cat(kept), head.to(kept[0].dtype)).float() if kept else head.new_zeros(0, len(head))
        t = terms(model, rows, kind, front, known,
                  torch.tensor([reference[i] for i in indices if i in reference], device=model.device))
        if args.stop_ce and t.per_token(FORGET) > args.stop_ce:
            stopped.append(step)
            return None
        return LOSSES[args.method](t, **kwargs)

    plan = [epoch_batches(examples, args.batch_size, args.seed, epoch) for epoch in range(args.epochs)]
    steps, seconds = fit(model, plan, loss, lr=args.lr, seed=args.seed, clip=CLIP, out=args.out,
                         description=description, resume=resume, dtype=dtype)
    return steps, seconds, stopped[0] if stopped else None, sum(p.numel() for p in trained)


@torch.no_grad()
def negate(model, args, strength):
    """SKU's second stage: theta <- theta_0 - strength (theta - theta_0), in float32."""
    swap(model, Lora, lambda lora: lora.merged(-strength))
    if args.full:
        first = dict(Llama.from_pretrained(args.model, model.dtype, model.device).named_parameters())
        for name, weight in model.named_parameters():
            weight.copy_(first[name] - strength * (weight - first[name]))


# ------------------------------------------------------------------------------------- guards, see guards.py


def fit_classifier(x, y, decay=1e-3, rounds=200):
    """Logistic regression on x (n, d), y (n,) of 0 and 1, both classes weighing the same -> w (d,), b (1,).

    The columns are scaled to mean 0 and spread 1 for the fit, and that scale is put into w and b.
    """
    mean, spread = x.mean(dim=0), x.std(dim=0) + 1e-6
    z, weight = (x - mean) / spread, torch.where(y > 0, len(y) / y.sum(), len(y) / (1 - y).sum())
    w, b = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=rounds, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(z @ w + b, y, weight) + decay * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    w = w.detach() / spread
    return w, b.detach() - (w * mean).sum(dim=0, keepdim=True)


def threshold(p, y, rate, conformal):
    """tau, above which a query is flagged, from held-out probabilities p (n,) of being one to forget.

    The largest with which at most the share `rate` of the forget rows is missed; or, conformal, from the quantile q of
    1 - p(true class) that at most that share of all rows exceeds: flagged where "forget" alone has 1 - p <= q.
    """
    if conformal:
        scores = torch.where(y > 0, 1 - p, p).sort().values
        q = scores[min(math.ceil((len(p) + 1) * (1 - rate)), len(p)) - 1].item()
        return max(q, 1 - q - 1e-6)
    own = p[y > 0].sort().values
    return own[int(rate * len(own))].item() * (1 - 1e-6)  # just below it, and never below 0


def make_eco(args, model, tokenizer, forget, retain):
    """ECO: classifier and threshold from these rows -> what guards.save takes. The strength is found by bisection:
    their zeroth-order search is for the least accuracy, and stays at its start where another is aimed at."""
    limit = row_limit(args, 0)
    forget = make_examples(forget, tokenizer, args.template, limit, True)[0]
    examples = forget + make_examples(retain, tokenizer, args.template, limit)[0]
    x, y = guards.averages(model, examples, args.batch_size), torch.tensor([float(e.forget) for e in examples])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(args.seed))
    held, rest = order[: len(y) // 5], order[len(y) // 5 :]
    if len(set(y[held].tolist())) < 2 or len(set(y[rest].tolist())) < 2:
        raise ValueError("eco: too few rows: a fifth of them, held out, has to hold both kinds")
    w, b = fit_classifier(x[rest], y[rest])
    p = torch.sigmoid(x @ w + b)
    tau = threshold(p[held], y[held], args.miss, args.conformal)
    missed, wrong = ((p[held] <= tau) & (y[held] > 0)), ((p[held] > tau) & (y[held] == 0))
    print(f"classifier: held out, {100 * missed.sum() / y[held].sum():.1f} % of the forget rows missed and "
          f"{100 * wrong.sum() / (1 - y[held]).sum():.1f} % of the others flagged; tau {tau:.3g}", flush=True)
    info = {"tau": tau, "corruption": args.corruption, "dims": args.dims, "strength": args.strength, "seed": args.seed}

    def reached(strength):
        guard = guards.Eco({**info, "strength": strength}, {"w": w, "b": b})
        return measure(model, tokenizer, forget, guard=guard)["accuracy"]

    if args.strength is None:
        target, what = args.target, "as given"
        if isinstance(target, str):
            what = f"that of {target}"
            target = accuracy(Llama.from_pretrained(target, model.dtype, model.device), forget)
        low, high, tried = -4.0, 3.0, []  # powers of ten: more strength, fewer right answers
        for _ in range(12):
            middle = (low + high) / 2
            right = reached(10**middle)
            tried.append((abs(right - target), 10**middle))
            if tried[-1][0] < 0.005:
                break
            low, high = (middle, high) if right > target else (low, middle)
        info["strength"] = min(tried)[1]
        print(f"strength {info['strength']:.3g}: {100 * min(tried)[0]:.1f} points from the forget accuracy aimed at, "
              f"{100 * target:.1f} %, {what}", flush=True)
    return info, {"w": w, "b": b}


def make_icul(args, model, tokenizer, forget, retain):
    """ICUL: forget rows with another label, and --context retain rows with theirs -> what guards.save takes."""
    rng = random.Random(f"icul {args.seed}")
    if any(row.raw for row in forget + retain):
        raise ValueError("icul: rows of text and label are needed")
    labels = sorted({row.label for row in forget + retain})
    if len(labels) < 2:
        raise ValueError("icul: a wrong label is needed, and there is only one")
    wrong = [(row.text, rng.choice([label for label in labels if label != row.label])) for row in forget]
    right = [(row.text, row.label) for row in rng.sample(retain, min(args.context, len(retain)))]
    examples = make_examples(forget, tokenizer, args.template, row_limit(args, 0))[0]
    return ({"k": args.k, "wrong": wrong, "right": right, "seed": args.seed},
            {"x": guards.averages(model, examples, args.batch_size)})


def make_guard(args, forget, retain):
    """Make ECO or ICUL and save its folder."""
    model, tokenizer = load_model(args)
    began = time.perf_counter()
    info, tensors = (make_eco if args.method == "eco" else make_icul)(args, model, tokenizer, forget, retain)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    guards.save(args.out, {"method": args.method, "model": args.model, "base_sha256": fingerprint(args.model),
                           "template": args.template, "generic": [],
                           "labels": sorted({row.label for row in forget + retain}), **info,
                           "trainable": sum(t.numel() for t in tensors.values()) if args.method == "eco" else 0,
                           "seconds": time.perf_counter() - began, "peak_bytes": peak_memory(model.device)}, tensors)
    print(f"guard in {args.out}: eval.py --prompt {args.out}")


# -------------------------------------------------------------------------------------------------- the command


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("method", choices=[*LOSSES, "retrain", "icul", "eco"])
    add_options(parser)
    parser.add_argument("--out", type=filled, required=True, metavar="DIR", help="the new model or guard folder")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    group = parser.add_argument_group("methods that change weights")
    group.add_argument("--train", choices=["full", "lora"], help="what learns (default full; llmu and retrain: lora)")
    add_lora_options(group)
    group.add_argument("--lr", type=number(float, 0, above=True),
                       help="peak (default 1e-5, with LoRA 1e-4: search it; retrain: as finetune.py)")
    group.add_argument("--epochs", type=number(int, 1), help="default 1, as the paper; retrain 5")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out")
    group.add_argument("--generic", default="neutral,unknown", metavar="A,B|FILE",
                       help="rl: answers for the forget rows")
    group.add_argument("--stop-ce", type=number(float, 0), metavar="NATS",
                       help="stop once the forget rows' cross-entropy is above; 0: never (default ga: that of a guess "
                       "over the whole vocabulary; others: never)")
    group.add_argument("--beta", type=number(float, 0, above=True), help="npo (default 0.1), simnpo (2.5)")
    group.add_argument("--randoms", type=number(int, 1), default=5, metavar="K", help="llmu, sku: random answers a row")
    group.add_argument("--negate", type=number(float, 0), default=1.0, metavar="L", help="sku: lambda (default 1)")
    group = parser.add_argument_group("icul and eco")
    group.add_argument("--k", type=number(int, 1), default=1, help="icul: nearest forget rows (default 1)")
    group.add_argument("--context", type=number(int, 0), default=5, metavar="S", help="icul: other rows (default 5)")
    group.add_argument("--corruption", choices=guards.CORRUPTIONS, default="noise_first", metavar="C",
                       help=f"eco: {', '.join(guards.CORRUPTIONS)} (default noise_first)")
    group.add_argument("--dims", type=number(int, 1), default=2**31, metavar="N", help="eco: entries (default all)")
    group.add_argument("--strength", type=number(float, 0), help="eco: default searched")
    group.add_argument("--target", type=filled, default="0.5", metavar="A|DIR",
                       help="eco: forget accuracy to aim at, or a retrained model that has it (default 0.5)")
    group.add_argument("--miss", type=number(float, 0, 0.5), default=0.01, help="eco: share missed (default 0.01)")
    group.add_argument("--conformal", action="store_true", help="eco: a split conformal threshold")
    args = parser.parse_args(argv)
    for name in ("model", "forget"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing: baselines.py needs --model DIR, --forget FILE and --retain FILE")
    if args.test_forget or args.test_retain:
        raise ValueError("--test-forget, --test-retain: eval.py measures")
    if args.quantize:
        raise ValueError("--quantize: these methods need weights of 16 or 32 bit")
    if args.beta and args.method not in ("npo", "simnpo"):
        raise ValueError(f"--beta: {args.method} has none")
    try:
        args.target = float(args.target)
    except ValueError:
        weight_files(args.target)  # a model folder then, or said to be none
    if isinstance(args.target, float) and not 0 <= args.target <= 1:
        raise ValueError(f"--target {args.target:g}: an accuracy is from 0 to 1")
    args.generic = read_generic(args.generic)
    args.template = read_template(args.template or "sentiment")
    return args


def main(argv=None):
    args = parse(argv)
    forget, retain = read_sets(args.forget, args.retain)
    if not retain:
        raise ValueError("--retain FILE is missing")
    check_disjoint(forget, retain)
    going_on, dtype, out = check_model_out(args), hardware(args)[1], Path(args.out)
    if args.method in guards.KINDS:
        return make_guard(args, forget, retain)
    args.train = args.train or ("lora" if args.method in ("llmu", "retrain") else "full")
    args.full = args.train == "full"
    if args.method == "retrain":
        args.data, args.epochs = [args.retain or args.forget], args.epochs or 5
        return memorise(args, retain, going_on)
    if args.method == "rl":
        check_generic(forget, args.generic)
    args.lr, args.epochs = args.lr or (1e-4 if args.train == "lora" else 1e-5), args.epochs or 1
    model, tokenizer = load_model(args)
    if args.stop_ce is None:
        args.stop_ce = math.log(model.config.vocab_size) if args.method == "ga" else 0
    limit = row_limit(args, 0)
    generic, rng = (args.generic, random.Random(f"generic {args.seed}")) if args.method == "rl" else (None, None)
    examples = make_examples(forget, tokenizer, args.template, limit, True, generic, rng)[0]
    if args.method not in FORGET_ONLY:
        examples += make_examples(retain, tokenizer, args.template, limit)[0]
    options = {name: getattr(args, name) for name in (
        "method", "model", "forget", "retain", "train", "rank", "lora_alpha", "dropout", "targets", "lr", "epochs",
        "batch_size", "stop_ce", "beta", "randoms", "seed", "max_length", "template", "generic")}
    options["dtype"], kept = str(dtype), sum(not e.forget for e in examples)
    print(f"{args.method}: {len(examples) - kept} forget and {kept} retain rows, lr {args.lr:g}, {args.epochs} epochs, "
          f"{args.train}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    description = describe(options, args.model, examples)
    steps, seconds, stopped, trained = unlearn(model, examples, args, dtype, description, going_on)
    if stopped:
        print(f"stopped at step {stopped}: the forget rows' cross-entropy is above {args.stop_ce:.3g}")
    if args.method == "sku":
        negate(model, args, args.negate)
        options["negate"] = args.negate
    swap(model, Lora, Lora.merged)
    model.to(dtype)
    print(f"{steps} steps, {seconds:.0f} s; accuracy on the forget rows "
          f"{100 * accuracy(model, make_examples(forget, tokenizer, args.template, limit)[0]):.1f} %")
    save_model(model, args, {"method": args.method, "options": options, "trainable": trained, "steps": steps,
                             "stopped": stopped, "seconds": seconds, "peak_bytes": peak_memory(model.device)})


if __name__ == "__main__":
    run(main)
