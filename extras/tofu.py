"""Measure answers of several words as the benchmark TOFU does (Maini et al., arXiv 2401.06121).

    python -m extras.tofu --model DIR [--prompt DIR] --forget FILE --retain FILE [--retrained DIR]

Each row needs a "paraphrase" of its answer and a list of "wrong" answers of the same form. For a
question q with answer a, paraphrase b and wrong answers w, where |.| counts tokens:

    per_token     P(a|q)^(1/|a|)
    rouge_l       of the first line of the greedy answer
    R             mean over w of P(w|q)^(1/|w|), divided by P(b|q)^(1/|b|)
    truth_ratio   min(R, 1/R) for rows to forget, max(0, 1 - R) for others
    utility       harmonic mean of the three, not for rows to forget

The table shows means over rows, with eval.py's accuracy and probability, and for small label sets
its other columns. --retrained DIR, a model that has never seen the forget rows, adds the forget
quality: the p-value of a Kolmogorov-Smirnov test that its R on the forget rows and the measured
model's come from one distribution.

Letters: n and m numbers of values.
"""

import argparse
import math
from dataclasses import replace

from data import make_examples
from eval import generate_answers, generator, label_set, load_prompts, measure
from eval import rouge_l, score, template_of
from extras.guards import is_guard
from spul import answer_hidden
from support.cli import Parser, add_options, check_required, non_empty, read_splits, run, use_demo
from support.files import check_json_path
from support.hardware import check_same_shape, load_model, read_config, row_limit
from support.tables import report

METRICS = (
    "accuracy",
    "probability",
    "f1",
    "generic",
    "outside",
    "commonest",
    "per_token",
    "rouge_l",
    "truth_ratio",
    "utility",
)
TINY = 1e-30  # in place of a 0 that would be divided by
LARGEST_EXPONENT = 700  # e^710 is too large for a float


# --------------------------------------------------------------------------------------- measuring


def per_token(model, examples, phi=None, batch_size=32):
    """log P(answer) / |answer| of each example. phi (p, d): the prompt before every text."""
    hidden = answer_hidden(model, examples, phi, batch_size=batch_size)
    scores = score(model, hidden, examples, batch_size)
    return [log_p / e.n for e, (_, log_p, _) in zip(examples, scores)]


def truth_ratios(rows, paraphrases, wrongs):
    """R of each row. paraphrases, wrongs: `per_token` of each row's paraphrase and wrong answers.

    wrongs are in one list, in the order of the rows.
    """
    wrongs = iter(wrongs)
    ratios = []
    for row, paraphrase in zip(rows, paraphrases):
        quotients = []
        for _ in row.wrong:
            quotients.append(math.exp(min(next(wrongs) - paraphrase, LARGEST_EXPONENT)))
        ratios.append(sum(quotients) / len(quotients))
    return ratios


def truth_ratio(ratios, is_forget):
    """The mean over rows of what their R says, from 0 to 1."""
    if is_forget:
        values = [min(ratio, 1 / max(ratio, TINY)) for ratio in ratios]
    else:
        values = [max(0, 1 - ratio) for ratio in ratios]
    return sum(values) / len(values)


def measure_answers(
    model,
    tokenizer,
    rows,
    template,
    max_length,
    is_forget,
    generic=(),
    phi=None,
    batch_size=32,
):
    """TOFU's measures of rows with a paraphrase and wrong answers, a dict like eval.measure's.

    Besides fractions of 1 it holds, of each row, "ratios", its R, and "said", its greedy answer.
    is_forget: whether the rows are to be forgotten. generic: the generic answers.
    """

    def of_answers(pairs):
        changed = [replace(row, label=answer) for row, answer in pairs]
        examples, _ = make_examples(changed, tokenizer, template, max_length)
        return per_token(model, examples, phi, batch_size)

    paraphrases = of_answers([(row, row.paraphrase) for row in rows])
    wrongs = of_answers([(row, wrong) for row in rows for wrong in row.wrong])
    ratios = truth_ratios(rows, paraphrases, wrongs)

    examples, _ = make_examples(rows, tokenizer, template, max_length)
    hidden = answer_hidden(model, examples, phi, batch_size=batch_size)
    scores = score(model, hidden, examples, batch_size)
    answers = generate_answers(tokenizer, examples, generator(model, phi), batch_size)
    n = len(rows)
    result = {
        "rows": n,
        "accuracy": sum(is_right for is_right, _, _ in scores) / n,
        "probability": math.fsum(math.exp(log_p) for _, log_p, _ in scores) / n,
        "per_token": sum(math.exp(s[1] / e.n) for e, s in zip(examples, scores)) / n,
        "rouge_l": sum(rouge_l(answer, row.label) for answer, row in zip(answers, rows)) / n,
        "truth_ratio": truth_ratio(ratios, is_forget),
    }
    if not is_forget:
        parts = (result["per_token"], result["rouge_l"], result["truth_ratio"])
        result["utility"] = 3 / sum(1 / max(part, TINY) for part in parts)
    if generic:
        result["generic"] = sum(answer.startswith(tuple(generic)) for answer in answers) / n
    return {**result, "ratios": ratios, "said": answers}


def forget_quality(ratios, others):
    """The exact p-value of the two-sample Kolmogorov-Smirnov test; 1: the samples do not differ.

    Its statistic is the largest distance between the cumulative shares i / n and j / m, of the
    values so far in both samples. If they come from one distribution, the n + m values come in any
    order with the same chance. The p-value is the share of the orders whose distance is at least
    the one observed. We count the other orders, which stay closer. All numbers are whole, because
    the result may be as small as 1e-20.
    """
    n = len(ratios)
    m = len(others)
    observed = 0  # times n m
    for value in {*ratios, *others}:
        i = sum(ratio <= value for ratio in ratios)
        j = sum(ratio <= value for ratio in others)
        observed = max(observed, abs(i * m - j * n))
    closer = [0] * (m + 1)  # closer[j]: orders of i and j values that stay closer, for i in turn
    for i in range(n + 1):
        for j in range(m + 1):
            if i == j == 0:
                orders = 1
            else:
                orders = closer[j] + (closer[j - 1] if j else 0)
            closer[j] = orders if abs(i * m - j * n) < observed else 0
    total = math.comb(n + m, n)
    return (total - closer[m]) / total


# ------------------------------------------------------------------------------------- the command


def parse(argv):
    """The options -> args, and the rows of each split, checked."""
    parser = Parser(__doc__)
    add_options(parser)
    add = parser.add_argument_group("what to measure").add_argument
    add("--prompt", type=non_empty, action="append", metavar="DIR",
        help="the folder that train.py wrote; several times for prompts one after the other")
    add("--retrained", type=non_empty, metavar="DIR",
        help="a model that has never seen the forget rows, for the forget quality")
    add("--json", type=non_empty, metavar="FILE",
        help="also write the table to this file, with the answers and each row's R")
    args = parser.parse_args(argv)
    use_demo(args)
    splits = read_splits(args)
    if not splits:
        raise ValueError(
            "nothing to measure: give --forget, --retain, --test-forget or --test-retain"
        )
    check_required(args, "model")
    for rows in splits.values():
        check_answers(rows)
    if args.retrained and not args.forget:
        raise ValueError("--retrained: the forget quality needs --forget FILE")
    check_json_path(args.json)
    for folder in args.prompt or []:
        if is_guard(folder):
            raise ValueError(f"--prompt {folder}: eco and icul are not measured with this command")
    return args, splits


def check_answers(rows):
    for row in rows:
        if not row.paraphrase or not row.wrong:
            raise ValueError(
                f'{row.where}: no "paraphrase" or no "wrong" answers, which TOFU compares with'
            )


def measure_side(args, model, tokenizer, splits, template, limit, generic, phi=None):
    """{split: what is measured}, with the prompt phi (p, d), if given."""
    all_rows = [row for rows in splits.values() for row in rows]
    labels = label_set(all_rows, tokenizer, generic, template)
    batch_size = args.batch_size
    results = {}
    for name, rows in splits.items():
        is_forget = name.endswith("forget")
        results[name] = measure_answers(
            model, tokenizer, rows, template, limit, is_forget, generic, phi, batch_size
        )
        if labels:
            examples, _ = make_examples(rows, tokenizer, template, limit)
            of_labels = measure(
                model, tokenizer, examples, labels, generic, phi, batch_size=batch_size
            )
            results[name] = {**of_labels, **results[name]}
    return results


def retrained_ratios(args, rows, template, limit):
    """R of the forget rows for the model of --retrained."""
    retrained_args = argparse.Namespace(**{**vars(args), "model": args.retrained})
    model, tokenizer = load_model(retrained_args)
    return measure_answers(model, tokenizer, rows, template, limit, True)["ratios"]


def main(argv=None):
    args, splits = parse(argv)
    config = read_config(args.model)
    if args.retrained:
        check_same_shape(args.retrained, config)
    phi = None
    info = {}
    if args.prompt:
        phi, info = load_prompts(args.prompt, config, args.model)
    template = template_of(args, info, [row for rows in splits.values() for row in rows])
    limit = row_limit(args, 0 if phi is None else len(phi))
    generic = info.get("generic", [])
    model, tokenizer = load_model(args)
    for name, rows in splits.items():
        _, cut = make_examples(rows, tokenizer, template, limit)
        if cut:
            print(f"{name}: {cut} texts cut to {limit} tokens")

    sides = {"without": measure_side(args, model, tokenizer, splits, template, limit, generic)}
    if phi is not None:
        phi = phi.to(model.device)
        sides["with"] = measure_side(
            args, model, tokenizer, splits, template, limit, generic, phi
        )
    quality = {}
    if args.retrained:
        ratios = retrained_ratios(args, splits["train forget"], template, limit)
        for side, results in sides.items():
            quality[side] = forget_quality(results["train forget"]["ratios"], ratios)
    before = sides["without"]
    after = sides.get("with")
    report(args, model, info, before, after, METRICS, forget_quality=quality or None)
    if quality:
        print("forget quality: " + " -> ".join(f"{p:.3g}" for p in quality.values()))


if __name__ == "__main__":
    run(main)
