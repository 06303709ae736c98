"""Measure a model without and with a prompt or a guard (of baselines.py), or ask it a question.

    python eval.py --model DIR [--prompt DIR] --forget FILE --retain FILE [--test-forget FILE] [--test-retain FILE]
    python eval.py --model DIR --prompt DIR --ask "a film by the director in question"

Accuracy is the share of rows whose greedy answer is the true one token for token; a single teacher-forced pass decides
it, because greedy decoding leaves the true answer at the first token where the two differ. Predictions range over the
whole vocabulary, as in the paper's code: an answer outside the label set is a miss for accuracy and F1.
"""

import argparse
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import guards
from cli import DEMO, Parser, add_options, check_same_shape, filled, load_model, read_splits, row_limit, run, use_demo
from data import (Example, Row, answer_ids, by_length, check_text, collate, common_front, continuations, generic_ids,
                  make_examples, read_template)
from files import read_json, write_json
from model import Config
from scale import add_up, ranks
from spul import fingerprint, load_prompt

MAX_LABELS = 50  # more different answers than this are no label set
METRICS = ["accuracy", "probability", "f1", "generic", "outside", "commonest", "flagged", "per_token", "rouge_l",
           "truth_ratio", "utility"]
COSTS = {"trainable": "parameters trained", "steps": "steps", "seconds": "s in them",
         "peak_bytes": "bytes of memory at most"}


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
    """Per example: is the greedy answer the true one, log P(true answer), and the first token of the greedy one."""
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
            scores.append((best[here] == targets[here], math.fsum(log_p[here]), best[at]))
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
              "probability": math.fsum(math.exp(log_p) for _, log_p, _ in scores) / n}
    if labels:
        said = predict(model, tokenizer, examples, scores, labels, phi, batch_size, embed)
        result |= {"f1": weighted_f1([e.label for e in examples], said),
                   "generic": sum(s in generic for s in said) / n,
                   "outside": sum(s in generic or s not in labels for s in said) / n,
                   "commonest": Counter(said).most_common(1)[0][1] / n}
    return result | more


# ------------------------------------------------------------------- generated answers: TOFU, arXiv 2401.06121


def rouge_l(said, truth):
    """Recall of the longest common subsequence of words, in lower case. (The package rouge-score also cuts endings.)"""
    said, truth = (re.findall(r"\w+", text.lower()) for text in (said, truth))
    longest = [0] * (len(said) + 1)
    for word in truth:
        before = longest
        longest = [0]
        for i, other in enumerate(said):
            longest.append(before[i] + 1 if word == other else max(before[i + 1], longest[i]))
    return longest[-1] / max(len(truth), 1)


def forget_quality(one, other):
    """The exact p-value of the two-sample Kolmogorov-Smirnov test; 1: no difference to be seen.

    It is the share of the orders in which n and m values can come where the two staircases, of height i / n and j / m
    after i and j values, come as far apart as here: those where they do not are counted, value by value.
    """
    n, m = len(one), len(other)
    farthest = max(abs(sum(x <= t for x in one) * m - sum(x <= t for x in other) * n) for t in {*one, *other})
    orders = [0] * (m + 1)  # by j, for the i that is reached
    for i in range(n + 1):
        for j in range(m + 1):
            so_far = (orders[j] if i else j == 0) + (orders[j - 1] if j else 0)
            orders[j] = so_far if abs(i * m - j * n) < farthest else 0
    return (math.comb(n + m, n) - orders[m]) / math.comb(n + m, n)  # of whole numbers, as it may be 1e-20


def per_token(model, examples, phi=None, batch_size=32):
    """log P(answer) / |answer| of each example, |.| in tokens."""
    scores = score(model, answer_hidden(model, examples, phi, batch_size=batch_size), examples, batch_size)
    return [log_p / e.n for e, (_, log_p, _) in zip(examples, scores)]


def measure_answers(model, tokenizer, rows, template, max_length, forget, generic=(), phi=None, batch_size=32):
    """TOFU's measures of rows with a paraphrase and wrong answers, -> a dict like `measure`'s.

    per_token: P(a|q)^(1/|a|). rouge_l: of the first line of the greedy answer. With the mean over wrong answers w

        R = mean P(w|q)^(1/|w|) / P(paraphrase|q)^(1/|paraphrase|)

    truth_ratio is the mean of min(R, 1/R) on rows to forget and of max(0, 1 - R) on others, and utility, there, the
    harmonic mean of all three. ratios: each row's R.
    """
    def examples(answers):
        rows = [replace(row, label=answer) for row, answer in answers]
        return make_examples(rows, tokenizer, template, max_length)[0]

    true = examples((row, row.label) for row in rows)
    right = per_token(model, examples((row, row.paraphrase) for row in rows), phi, batch_size)
    wrong = iter(per_token(model, examples((row, w) for row in rows for w in row.wrong), phi, batch_size))
    ratios = [sum(math.exp(min(next(wrong) - log_p, 700)) for _ in row.wrong) / len(row.wrong)  # short of infinity
              for row, log_p in zip(rows, right)]
    with torch.no_grad():
        prefix = None if phi is None else model.prefix(phi)
    said, longest = [], max(e.n for e in true)  # in tokens; the same for all, so that no row's answer hangs on others'
    for start in range(0, len(true), batch_size):
        part = true[start : start + batch_size]
        said += [tokenizer.decode(ids).strip().split("\n")[0] for ids in
                 continuations(model, [e.prompt for e in part], longest, prefix)]
    n = len(rows)
    found = {"per_token": sum(map(math.exp, per_token(model, true, phi, batch_size))) / n,
             "rouge_l": sum(rouge_l(text, row.label) for text, row in zip(said, rows)) / n,
             "truth_ratio": sum(min(r, 1 / max(r, 1e-30)) if forget else max(0, 1 - r) for r in ratios) / n}
    if not forget:
        found["utility"] = 3 / sum(1 / max(value, 1e-30) for value in found.values())
    known = {"generic": sum(text.startswith(tuple(generic)) for text in said) / n} if generic else {}
    return found | known | {"ratios": ratios, "said": said}


# ------------------------------------------------------------------------------------------------------ tables


def label_set(rows, tokenizer, generic):
    """{answer: its ids} of all rows' answers and the generic ones; None if there are too many to be a label set."""
    raw = {row.label: row.raw for row in rows}
    if len(raw) > MAX_LABELS:
        return None
    like = rows[0].label if all(raw.values()) else None
    return ({label: answer_ids(tokenizer, label, raw[label]) for label in sorted(raw)} |
            {word: generic_ids(tokenizer, word, like) for word in generic})


def costs(info):
    """What spul.json or run.json says of the cost."""
    return {name: info[name] for name in COSTS if type(info.get(name)) in (int, float)}


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


# -------------------------------------------------------------------------------------------------- the command


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
    cost = {key: combine(info[key] for info in infos) for key, combine in zip(COSTS, (sum, sum, sum, max))
            if all(key in costs(info) for info in infos)}
    return torch.cat([phi for phi, _ in loaded]), {**info, **words, **cost}


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
    group.add_argument("--tofu", action="store_true",
                       help='measure generated answers, too; needs rows with a "paraphrase" and "wrong" answers')
    group.add_argument("--retrained", type=filled, metavar="DIR", help="with --tofu: the model for forget quality")
    group.add_argument("--json", type=filled, metavar="FILE", help="write the table there, too")
    args = parser.parse_args(argv)
    if use_demo(args) and not args.prompt and (DEMO / "prompt" / "spul.json").exists():
        args.prompt = [str(DEMO / "prompt")]
    splits = {} if args.ask is not None else read_splits(args)
    if not splits and args.ask is None:
        raise ValueError("nothing to measure: give --forget, --retain, --test-forget, --test-retain or --ask")
    if not args.model:
        raise ValueError("--model DIR is missing")
    for row in [row for rows in splits.values() for row in rows] if args.tofu else []:
        if not row.paraphrase or not row.wrong:
            raise ValueError(f'{row.where}: no "paraphrase" or no "wrong" answers: --tofu compares with these')
    if args.retrained and not (args.tofu and args.forget):
        raise ValueError("--retrained: only for --tofu with --forget")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).absolute().parent.is_dir()):
        raise ValueError(f"--json {args.json}: a folder, or in none")

    if args.retrained:
        check_same_shape(args.retrained, Config.from_file(Path(args.model) / "config.json"))
    phi, guard, info, cost = None, None, {}, Path(args.model) / "run.json"
    if args.prompt and any(map(guards.is_guard, args.prompt)):
        if len(args.prompt) > 1:
            raise ValueError(f"--prompt {args.prompt[1]}: eco and icul do not go with another prompt")
        if args.tofu:
            raise ValueError("--tofu: eco and icul are not measured so")
        guard, info = guards.load(args.prompt[0], fingerprint(args.model))
    elif args.prompt:
        config = Config.from_file(Path(args.model) / "config.json")
        phi, info = load_prompts(args.prompt, config, fingerprint(args.model))
    cost = costs(info or (read_json(cost) if cost.is_file() else {}))
    template = args.template and read_template(args.template)
    if not template:  # that of the prompt, which has none if its rows were prompts themselves
        template = info["template"] or "{text}" if info else read_template("sentiment")
    generic = info.get("generic", [])
    model, tokenizer = load_model(args)
    phi = None if phi is None else phi.to(model.device)

    if args.ask is not None:
        raw = info and info["template"] is None
        labels = label_set([Row("", name, "", raw) for name in info["labels"]], tokenizer, generic) if info.get(
            "labels") else {}
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
    before, after, quality = {}, {}, {}
    for name, rows in splits.items():
        examples, cut = make_examples(rows, tokenizer, template, limit)
        if cut:
            print(f"{name}: {cut} texts cut to {limit} tokens")
        how = dict(labels=labels, generic=generic, batch_size=args.batch_size)
        before[name] = measure(model, tokenizer, examples, **how)
        if args.prompt:
            after[name] = measure(model, tokenizer, examples, phi=phi, guard=guard, **how)
        for side, found in ((None, before), (phi, after)) if args.tofu else ():
            if name in found:
                found[name] |= measure_answers(model, tokenizer, rows, template, limit, name.endswith("forget"),
                                               generic, side, args.batch_size)
    print(table(before, after))
    if args.retrained:
        other = load_model(argparse.Namespace(**{**vars(args), "model": args.retrained}))
        ratios = measure_answers(*other, splits["train forget"], template, limit, True)["ratios"]
        quality = {name: forget_quality(side["train forget"]["ratios"], ratios)
                   for name, side in (("without", before), ("with", after)) if side}
        print("forget quality: " + " -> ".join(f"{p:.3g}" for p in quality.values()))
    if cost:
        print("cost: " + ", ".join(f"{value:,.0f} {COSTS[name]}" for name, value in cost.items()))
    if args.json:
        write_json(args.json, {"model": args.model, "prompt": args.prompt, "dtype": str(model.dtype), "cost": cost,
                               "without": before, "with": after or None, "forget_quality": quality or None})


if __name__ == "__main__":
    run(main)
