"""Unlearn with the methods that SPUL is compared to, on the same files.

    python -m extras.baselines METHOD --model DIR --forget FILE --retain FILE --out DIR [--lr LR]

ga, rl, ga-kl, ga-gd, npo, simnpo, llmu and sku change the weights and write a model folder.
retrain is finetune.py's recipe on the retain rows alone, from a base model that has seen neither
file: what the others are measured by. icul and eco leave the weights as they are and write a small
folder, which acts on each query (guards.py).

A loss is a function of `Terms`, what one batch gives. All losses go through one loop,
`finetune.fit`. KL and NPO compare with the model before the first step, whose outputs we keep as
numbers. In published code the reference sometimes shares its weights with the model that learns;
then the KL is that of a model to itself, 0.

    CE       cross-entropy of one answer token
    seqCE    its sum over the answer tokens of a row
    meanCE   its mean over the answer tokens of a row
    batchCE  its mean over all answer tokens of a batch

Letters: B rows, B_f of them forget rows, V vocabulary, d width, n answer tokens of a row, N of a
batch, N_r of them in retain rows.
"""

import dataclasses
import math
import random
from functools import cached_property

import torch
import torch.nn.functional as F

from data import collate, common_prefix, make_examples, read_sets
from extras.finetune import Lora, accuracy, add_lora_options, add_rehearsal_options
from extras.finetune import check_model_out, describe, fit
from extras.finetune import make_trainable, memorise, run_dtype, save_model, swap
from extras.guards import KINDS, add_guard_options, make_guard, read_target
from spul import answer_hidden
from support.batches import epoch_batches
from support.checks import check_generic, read_generic
from support.cli import Parser, add_options, check_required, non_empty, number, run
from support.hardware import load_llama, load_model, peak_memory, row_limit
from support.rows import check_disjoint
from support.templates import choose_template, template_to_json
from train import CLIP

# What a row of a batch is. RANDOM: a forget row's text with another row's answer.
FORGET = 0
RETAIN = 1
RANDOM = 2

SKU_LIMIT = 10.0  # nats: so far, and no further, SKU pushes a token's distribution away
RUN_OPTIONS = [
    *("method", "model", "forget", "retain", "train", "rank", "lora_alpha", "dropout", "targets"),
    *("lr", "epochs", "batch_size", "stop_ce", "beta", "randoms", "seed", "max_length"),
    *("template", "generic", "plain"),
]

# -------------------------------------------------------------------------------------- the losses


@dataclasses.dataclass
class Terms:
    """What a batch gives to a loss."""

    logits: torch.Tensor  # (N, V)
    targets: torch.Tensor  # (N,)
    rows: torch.Tensor  # (N,), the row of each answer token
    kind: torch.Tensor  # (B,), FORGET, RETAIN or RANDOM
    reference_logits: torch.Tensor = None  # (N_r, V), if the loss compares retain rows
    reference_ce: torch.Tensor = None  # (B_f,), seqCE, if the loss compares forget rows

    @cached_property
    def ce(self):
        """The cross-entropy of each answer token, (N,)."""
        return F.cross_entropy(self.logits.float(), self.targets, reduction="none")

    def sums(self, kind):
        """seqCE and the number of answer tokens of each row of a kind, (B_kind,) each."""
        zeros = torch.zeros(len(self.kind), device=self.ce.device)  # (B,)
        ce = zeros.index_add(0, self.rows, self.ce)  # (B,)
        n = zeros.index_add(0, self.rows, torch.ones_like(self.ce))  # (B,)
        return ce[self.kind == kind], n[self.kind == kind]

    def per_token(self, kind):
        """batchCE of the rows of a kind; 0 if there are none."""
        ce, n = self.sums(kind)
        return ce.sum() / n.sum().clamp(min=1)

    def per_row(self, kind):
        """The mean of meanCE over the rows of a kind; 0 if there are none."""
        ce, n = self.sums(kind)
        return (ce / n).sum() / max(len(n), 1)

    def kl(self, limit=math.inf):
        """KL(reference || model): the sum over a retain row's answer tokens, the mean over rows.

        limit: the nats up to which a token counts.
        """
        is_retain = self.kind[self.rows] == RETAIN  # (N,)
        log_q = F.log_softmax(self.logits[is_retain].float(), dim=-1)  # (N_r, V)
        log_p = F.log_softmax(self.reference_logits.float(), dim=-1)  # (N_r, V)
        of_token = (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(max=limit)  # (N_r,)
        return of_token.sum() / (self.kind == RETAIN).sum().clamp(min=1)


def ga(t):
    """Gradient ascent: L = -batchCE(forget). It has no lower bound, so it stops at --stop-ce."""
    return -t.per_token(FORGET)


def rl(t):
    """Random labels: L = batchCE(forget), each row with a generic answer in place of its own."""
    return t.per_token(FORGET)


def ga_kl(t):
    """L = -batchCE(forget) + KL(reference || model) on retain rows."""
    return -t.per_token(FORGET) + t.kl()


def ga_gd(t):
    """Gradient difference: L = -batchCE(forget) + batchCE(retain)."""
    return -t.per_token(FORGET) + t.per_token(RETAIN)


def npo(t, beta=0.1):
    """Negative preference optimisation (Zhang et al., arXiv 2404.05868).

    L = -(2 / beta) mean_forget log sigmoid(beta (seqCE - seqCE_reference)) + batchCE(retain)

    With beta near 0 it is gradient ascent.
    """
    ce, _ = t.sums(FORGET)
    log_ratio = ce - t.reference_ce  # (B_f,)
    forget = -2 / beta * F.logsigmoid(beta * log_ratio).sum() / max(len(ce), 1)
    return forget + t.per_token(RETAIN)


def simnpo(t, beta=2.5, gamma=0.0, weight=0.1375):
    """SimNPO (Fan et al., arXiv 2410.07163), without a reference. Its values for TOFU forget05.

    L = -weight (2 / beta) mean_forget log sigmoid(beta (meanCE - gamma)) + batchCE(retain)
    """
    ce, n = t.sums(FORGET)
    margin = beta * (ce / n - gamma)  # (B_f,)
    forget = -weight * 2 / beta * F.logsigmoid(margin).sum() / max(len(n), 1)
    return forget + t.per_token(RETAIN)


def llmu(t):
    """LLMU (Yao et al., arXiv 2310.10683).

    L = -0.5 meanCE(forget) + meanCE(random) + KL(reference || model) on retain rows

    random: forget texts with the answers of random retain rows. With a LoRA it is LoRA + gradient
    ascent (Gundavarapu et al., arXiv 2405.15152).
    """
    return -0.5 * t.per_row(FORGET) + t.per_row(RANDOM) + t.kl()


def sku(t):
    """The first stage of SKU (Liu et al., arXiv 2402.10058): learn what is to go, theta_bad.

    L = 2.5 meanCE(forget) + 2.5 meanCE(random) - KL(reference || model) on retain rows

    random: forget texts with the answers of random forget rows; with two labels these are nearly
    those of a coin. A token's KL counts up to SKU_LIMIT, which is ours. The second stage, after
    training, is `negate`.
    """
    return 2.5 * t.per_row(FORGET) + 2.5 * t.per_row(RANDOM) - t.kl(SKU_LIMIT)


LOSSES = {
    "ga": ga,
    "rl": rl,
    "ga-kl": ga_kl,
    "ga-gd": ga_gd,
    "npo": npo,
    "simnpo": simnpo,
    "llmu": llmu,
    "sku": sku,
}
FORGET_ONLY = ("ga", "rl")
ANSWERS_FROM = {"llmu": RETAIN, "sku": FORGET}  # the rows whose answers RANDOM rows get
COMPARED = {"ga-kl": RETAIN, "npo": FORGET, "llmu": RETAIN, "sku": RETAIN}  # with the reference
HAS_BETA = ("npo", "simnpo")


# ---------------------------------------------------------------------------------------- training


def kind_of(example):
    return FORGET if example.forget else RETAIN


def with_random_answers(examples, answers, k, rng):
    """For each example k more of the same text, with answers drawn from a list of (ids, label)."""
    drawn = []
    for e in examples:
        for _ in range(k):
            ids, label = rng.choice(answers)
            drawn.append(dataclasses.replace(e, ids=e.prompt + ids, n=len(ids), label=label))
    return drawn


def compute_terms(
    model, examples, kind, shared_ids=(), reference_logits=None, reference_ce=None
):
    """Terms of examples that all begin with shared_ids. kind: of each example, a list of B."""
    batch = collate(examples, model.device, shared_ids)
    h = model.prompted(batch.tokens, None, shared_ids)  # (B, T, d)
    logits = model.head(h[batch.rows, batch.columns])  # (N, V)
    kind = torch.tensor(kind, device=model.device)  # (B,)
    return Terms(logits, batch.targets, batch.rows, kind, reference_logits, reference_ce)


class Reference:
    """What the model said before the first step, as numbers; make it before anything learns.

    kind: FORGET or RETAIN, the examples that a loss compares with it, or None. is_copied: keep a
    copy of the head, because the model's own will learn.
    """

    @torch.no_grad()
    def __init__(self, model, examples, kind, batch_size, is_copied):
        indices = [i for i, e in enumerate(examples) if kind_of(e) == kind]
        compared = [examples[i] for i in indices]
        outputs = answer_hidden(model, compared, batch_size=batch_size) if compared else []
        table = model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
        self.head = table.weight.detach()  # (V, d)
        if is_copied:
            self.head = self.head.clone()
        self.scaling = model.config.logits_scaling
        self.hidden = {}  # {index of a retain example: (n, d)}
        self.ce = {}  # {index of a forget example: seqCE}
        if kind == RETAIN:
            self.hidden = dict(zip(indices, outputs))
        if kind == FORGET:
            for i, e, h in zip(indices, compared, outputs):
                targets = torch.tensor(e.answer, device=h.device)  # (n,)
                self.ce[i] = F.cross_entropy(model.head(h), targets, reduction="sum").item()

    def logits(self, indices):
        """Its logits at the answers of the retain examples among the indices, (N_r, V)."""
        hidden = [self.hidden[i] for i in indices if i in self.hidden]
        if not hidden:
            return self.head.new_zeros(0, len(self.head))
        return F.linear(torch.cat(hidden) / self.scaling, self.head).float()

    def sequence_ce(self, indices):
        """Its seqCE of the forget examples among the indices, (B_f,)."""
        values = [self.ce[i] for i in indices if i in self.ce]
        return torch.tensor(values, device=self.head.device)


def unlearn(model, examples, args, dtype, description, is_resumed):
    """Train the model on examples by args.method -> a report.

    The report holds the number of trained parameters, the steps made and the seconds in them, and
    "stopped", the step at which --stop-ce ended the training, or None.
    """
    reference = Reference(model, examples, COMPARED.get(args.method), args.batch_size, args.full)
    parameters = make_trainable(model, args)
    shared_ids = common_prefix(examples)
    source = ANSWERS_FROM.get(args.method)
    answers = [(e.answer, e.label) for e in examples if kind_of(e) == source]
    loss_options = {"beta": args.beta} if args.beta else {}
    stopped = []  # the step, once it has stopped

    def loss(indices, step):
        rows = [examples[i] for i in indices]
        kind = [kind_of(e) for e in rows]
        if answers:
            rng = random.Random(f"answers {args.seed} {step}")
            forget = [e for e in rows if e.forget]
            more = with_random_answers(forget, answers, args.randoms, rng)
            rows += more
            kind += [RANDOM] * len(more)
        t = compute_terms(
            model,
            rows,
            kind,
            shared_ids,
            reference.logits(indices),
            reference.sequence_ce(indices),
        )
        if args.stop_ce and t.per_token(FORGET) > args.stop_ce:
            stopped.append(step)
            return None
        return LOSSES[args.method](t, **loss_options)

    epochs = range(args.epochs)
    steps, seconds = fit(
        model,
        [epoch_batches(examples, args.batch_size, args.seed, epoch) for epoch in epochs],
        loss,
        lr=args.lr,
        seed=args.seed,
        clip=CLIP,
        out=args.out,
        description=description,
        resume=is_resumed,
        dtype=dtype,
    )
    return {
        "trainable": sum(p.numel() for p in parameters),
        "steps": steps,
        "stopped": stopped[0] if stopped else None,
        "seconds": seconds,
    }


@torch.no_grad()
def negate(model, strength, first=None):
    """SKU's second stage: theta <- theta_0 - strength (theta - theta_0), in float32.

    first: the model with theta_0. Without it only a LoRA has learned, and theta - theta_0 is B A.
    """
    if first is None:
        swap(model, Lora, lambda lora: lora.merged(-strength))
        return
    start = dict(first.named_parameters())
    for name, weight in model.named_parameters():
        weight.copy_(start[name] - strength * (weight - start[name]))


# ------------------------------------------------------------------------------------- the command


def make_parser():
    parser = Parser(__doc__)
    parser.add_argument("method", choices=[*LOSSES, "retrain", "icul", "eco"])
    add_options(parser)
    add = parser.add_argument
    add("--out", type=non_empty, required=True, metavar="DIR",
        help="the folder of the new model or guard")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all draws (default 0)")

    add = parser.add_argument_group("methods that change weights").add_argument
    add("--train", choices=["full", "lora"],
        help="what learns (default full; llmu and retrain: lora)")
    add_lora_options(add)
    add("--lr", type=number(float, 0, above=True),
        help="highest learning rate (default 1e-5, with a LoRA 1e-4: search it; retrain: as "
        "finetune.py)")
    add("--epochs", type=number(int, 1), help="passes (default 1, paper; retrain 5)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--generic", default="neutral,unknown", metavar="A,B|FILE",
        help="rl: answers for the forget rows (default neutral,unknown)")
    add("--stop-ce", type=number(float, 0), metavar="NATS",
        help="stop once the forget rows' cross-entropy is above this; 0: never (default for ga: "
        "that of a guess over the whole vocabulary; for others: never)")
    add("--beta", type=number(float, 0, above=True), help="npo (default 0.1), simnpo (2.5)")
    add("--randoms", type=number(int, 1), default=5, metavar="K",
        help="llmu, sku: random answers for each forget row (default 5)")
    add("--negate", type=number(float, 0), default=1.0, metavar="L",
        help="sku: strength of the negation (default 1)")
    add_rehearsal_options(parser.add_argument_group("retrain").add_argument)

    add_guard_options(parser.add_argument_group("icul and eco").add_argument)
    return parser


def parse(argv):
    """The options -> args, checked. No rows and no weights are read."""
    args = make_parser().parse_args(argv)
    check_required(args, "model", "forget")
    if args.test_forget or args.test_retain:
        raise ValueError("--test-forget, --test-retain: eval.py measures, not this command")
    if args.quantize:
        raise ValueError("--quantize: these methods need weights of 16 or 32 bits")
    if args.beta and args.method not in HAS_BETA:
        raise ValueError(f"--beta: {args.method} has none")
    if (args.rehearse or args.general) and args.method != "retrain":
        raise ValueError(f"--rehearse, --general: {args.method} learns no general text")
    args.target = read_target(args.target)
    args.generic = read_generic(args.generic)
    if args.train is None:
        args.train = "lora" if args.method in ("llmu", "retrain") else "full"
    args.full = args.train == "full"
    return args


def training_examples(args, tokenizer, forget, retain):
    """The examples that a method trains on: forget rows, then retain rows if it takes them."""
    limit = row_limit(args, 0)
    generic = None
    if args.method == "rl":
        generic = args.generic
    rng = random.Random(f"generic {args.seed}")
    examples, _ = make_examples(forget, tokenizer, args.template, limit, True, generic, rng)
    if args.method not in FORGET_ONLY:
        examples += make_examples(retain, tokenizer, args.template, limit)[0]
    return examples


def unlearn_command(args, forget, retain, is_resumed):
    """Run a method that changes weights, and save the model."""
    dtype = run_dtype(args, is_resumed)
    args.lr = args.lr or (1e-5 if args.full else 1e-4)
    args.epochs = args.epochs or 1
    model, tokenizer = load_model(args)
    if args.stop_ce is None:
        args.stop_ce = math.log(model.config.vocab_size) if args.method == "ga" else 0
    examples = training_examples(args, tokenizer, forget, retain)
    n_f = sum(e.forget for e in examples)
    print(
        f"{args.method}: {n_f} forget and {len(examples) - n_f} retain rows, lr {args.lr:g}, "
        f"{args.epochs} epochs, {args.train}",
        flush=True,
    )
    options = {name: getattr(args, name) for name in RUN_OPTIONS}
    options |= {"dtype": str(dtype), "template": template_to_json(args.template)}
    description = describe(options, args.model, examples)
    report = unlearn(model, examples, args, dtype, description, is_resumed)
    if report["stopped"]:
        print(
            f"stopped at step {report['stopped']}: the forget rows' cross-entropy is above "
            f"{args.stop_ce:.3g}"
        )
    if args.method == "sku":
        first = None
        if args.full:
            first = load_llama(args.model, model.dtype, model.device, args.plain)
        negate(model, args.negate, first)
        options["negate"] = args.negate
    swap(model, Lora, Lora.merged)
    model.to(dtype)
    measured, _ = make_examples(forget, tokenizer, args.template, row_limit(args, 0))
    share = accuracy(model, measured, batch_size=args.batch_size)
    print(
        f"{report['steps']} steps, {report['seconds']:.0f} s; accuracy on the forget rows "
        f"{100 * share:.1f} %"
    )
    report = {"method": args.method, "options": options, **report}
    save_model(model, args, {**report, "peak_bytes": peak_memory(model.device)})


def main(argv=None):
    args = parse(argv)
    forget, retain = read_sets(args.forget, args.retain)
    if not retain:
        raise ValueError("--retain FILE is missing")
    check_disjoint(forget, retain)
    args.template = choose_template(args, forget + retain)
    if args.method == "rl":
        check_generic(forget, args.generic)
    is_resumed = check_model_out(args)
    if args.method in KINDS:
        make_guard(args, forget, retain)
    elif args.method == "retrain":
        args.data = [args.retain or args.forget]
        args.epochs = args.epochs or 5
        memorise(args, retain, is_resumed, forget)
    else:
        unlearn_command(args, forget, retain, is_resumed)


if __name__ == "__main__":
    run(main)
