"""Measure a model without and with a prompt, or ask it a question.

    python eval.py --model DIR [--prompt DIR] --forget FILE --retain FILE [--test-forget FILE]
    python eval.py --model DIR --prompt DIR --ask "a film by the director in question"
    python eval.py --model DIR --prompt DIR --ask QUERIES.jsonl --out ANSWERS.jsonl

Accuracy is the share of rows whose greedy answer is the true one, token for token. One
teacher-forced pass decides it, because greedy decoding leaves the true answer at the first token
where the two differ. Predictions range over the whole vocabulary, as in the paper's code: an
answer outside the label set is a miss for accuracy and F1. Where answers are sentences, the
generated ones are compared by ROUGE-L.

Letters: B rows, n answer tokens of a row, N of a batch, p prompt tokens, d width, V vocabulary.
"""

import functools
import math
import re
from collections import Counter

import torch
import torch.nn.functional as F

from data import Row, answer_ids, generic_ids
from spul import answer_hidden, load_prompt
from support.answers import Asking, ask, match_answer, rows_to_ask
from support.cli import DEMO, Parser, add_options, check_required, non_empty, read_splits, run
from support.cli import use_demo
from support.elsewhere import elsewhere_table, examples_to_ask, leaves_out, measure_elsewhere
from support.elsewhere import texts_elsewhere, true_labels, verdicts
from support.files import check_json_path
from support.general import held_out_texts
from support.hardware import load_model, read_config, row_limit, window_warning
from support.rows import check_rows
from support.tables import COSTS, costs, report
from support.templates import choose_template, template_from_json

MAX_LABELS = 50  # more different answers than this are not a label set


# --------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def score(model, hidden, examples, batch_size=32):
    """For each example: is the greedy answer the true one, log P(true answer), first greedy token.

    hidden: the final-norm outputs of `answer_hidden`. Raises FloatingPointError for broken weights.
    """
    scores = []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        logits = model.head(torch.cat(hidden[start : start + batch_size]))  # (N, V)
        log_p = F.log_softmax(logits, dim=-1)  # (N, V)
        targets = torch.tensor([t for e in part for t in e.answer], device=log_p.device)  # (N,)
        target_log_p = log_p.gather(1, targets[:, None])[:, 0]  # (N,)
        if target_log_p.isnan().any():
            raise FloatingPointError("the model's output is not a number: its weights are broken")
        lengths = [e.n for e in part]
        greedy = log_p.argmax(dim=-1).split(lengths)
        for e, best, of_answer in zip(part, greedy, target_log_p.split(lengths)):
            best = best.tolist()
            scores.append((best == list(e.answer), math.fsum(of_answer.tolist()), best[0]))
    return scores


def predict(tokenizer, examples, scores, answers, generate, batch_size=32):
    """The greedy answer of each example: one of answers, {answer: its ids}, or "<...>" for another.

    The teacher-forced pass usually settles it. We generate only where the first token could begin a
    longer answer. generate(prompts, max_new_tokens) -> lists of ids.
    """
    longest = max(map(len, answers.values()))
    longer_starts = {ids[0] for ids in answers.values() if len(ids) > 1}
    has_longer = set()  # answers with which another one begins
    for name, ids in answers.items():
        if any(ids == other[: len(ids)] != other for other in answers.values()):
            has_longer.add(name)

    predictions = []
    unsure = []
    for i, (e, (is_right, _, first)) in enumerate(zip(examples, scores)):
        name = e.label if is_right else match_answer([first], answers)
        predictions.append(name or f"<{tokenizer.decode([first])}>")
        may_be_longer = e.label in has_longer if is_right else first in longer_starts
        if may_be_longer:
            unsure.append(i)
    for start in range(0, len(unsure), batch_size):
        part = unsure[start : start + batch_size]
        for i, ids in zip(part, generate([examples[i].prompt for i in part], longest)):
            predictions[i] = match_answer(ids, answers) or f"<{tokenizer.decode(ids)}>"
    return predictions


def weighted_f1(truth, predictions):
    """F1 of each true class, weighted by its rows. A prediction outside the classes is a miss."""
    support = Counter(truth)
    guesses = Counter(predictions)
    hits = Counter(t for t, guess in zip(truth, predictions) if t == guess)
    total = sum(n * 2 * hits[c] / (n + guesses[c]) for c, n in support.items())
    return total / len(truth)


def rouge_l(answer, truth):
    """Recall of the longest common subsequence of words, in lower case.

    The package rouge-score also cuts the endings of words.
    """
    answer_words = re.findall(r"\w+", answer.lower())
    truth_words = re.findall(r"\w+", truth.lower())
    longest = [0] * (len(answer_words) + 1)  # of the truth so far and each beginning of the answer
    for word in truth_words:
        previous = longest
        longest = [0]
        for i, other in enumerate(answer_words):
            best = previous[i] + 1 if word == other else max(previous[i + 1], longest[i])
            longest.append(best)
    return longest[-1] / max(len(truth_words), 1)


def generate_answers(tokenizer, examples, generate, batch_size=32):
    """The greedy answer to each example's prompt: its first line, if the true answer is one line.

    Every row may have as many tokens as the longest true answer of all, so its answer does not
    depend on its batch.
    """
    longest = max(e.n for e in examples)
    answers = []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        for e, ids in zip(part, generate([e.prompt for e in part], longest)):
            answer = tokenizer.decode(ids).strip()
            answers.append(answer if "\n" in e.label.strip() else answer.split("\n")[0])
    return answers


def generator(model, phi=None):
    """-> generate(prompts, max_new_tokens), which continues prompts after phi, if it is given.

    phi's keys and values are computed once, when they are first needed.
    """

    @functools.cache
    @torch.no_grad()
    def prefix():
        return model.prefix(phi)

    return lambda prompts, n: model.generate(prompts, prefix(), n)


def measure(
    model,
    tokenizer,
    examples,
    labels=None,
    generic=(),
    phi=None,
    hidden=None,
    batch_size=32,
    generate=None,
):
    """What is measured on one split, a dict of fractions of 1 (METRICS of
    support/tables.py), and its number of rows.

    labels: `label_set` of the rows, or None where answers are sentences. generic: generic answers.
    hidden, generate: the results of `answer_hidden` and `generator`, if the caller has them, or if
    the model is to read something else. By default both are made with phi.
    """
    if hidden is None:
        hidden = answer_hidden(model, examples, phi, batch_size=batch_size)
    generate = generate or generator(model, phi)
    scores = score(model, hidden, examples, batch_size)
    n = len(examples)
    result = {
        "rows": n,
        "accuracy": sum(is_right for is_right, _, _ in scores) / n,
        "probability": math.fsum(math.exp(log_p) for _, log_p, _ in scores) / n,
    }
    if labels:
        answers = predict(tokenizer, examples, scores, labels, generate, batch_size)
        outside = [a for a in answers if a in generic or a not in labels]
        result["f1"] = weighted_f1([e.label for e in examples], answers)
        result["generic"] = sum(a in generic for a in answers) / n
        result["outside"] = len(outside) / n
        result["commonest"] = Counter(answers).most_common(1)[0][1] / n
    else:
        answers = generate_answers(tokenizer, examples, generate, batch_size)
        result["rouge_l"] = sum(rouge_l(a, e.label) for a, e in zip(answers, examples)) / n
        if generic:
            result["generic"] = sum(a.startswith(tuple(generic)) for a in answers) / n
    return result


def label_set(rows, tokenizer, generic, template):
    """{answer: its ids} of all rows' answers and the generic ones; None if they are sentences.

    Sentences: there are more than MAX_LABELS different ones.
    """
    is_raw = {row.label: row.raw for row in rows}
    if len(is_raw) > MAX_LABELS:
        return None
    labels = {}
    for name in sorted(is_raw):
        around = None if is_raw[name] else template
        labels[name] = answer_ids(tokenizer, name, around, end=False)
    completion = rows[0].label if rows and all(is_raw.values()) else None
    for name in generic:
        labels[name] = generic_ids(tokenizer, name, template, completion, end=False)
    return labels


# ------------------------------------------------------------------------------------- the command


def load_prompts(folders, config, model_folder):
    """Prompts for one model, one after the other -> phi (p, d), and their spul.json as one.

    model_folder None: they are not checked against it. Raises ValueError if one is not for this
    model, or if they were trained in different templates.
    """
    phis = []
    infos = []
    for folder in folders:
        phi, info = load_prompt(folder, model_folder)
        if phi.shape[1] != config.hidden_size:
            raise ValueError(
                f"{folder}: vectors of width {phi.shape[1]}, the model's is {config.hidden_size}"
            )
        if infos and info["template"] != infos[0]["template"]:
            raise ValueError(
                f"{folder}: another template than {folders[0]}'s: one query cannot be in both"
            )
        phis.append(phi)
        infos.append(info)
    merged = dict(infos[0])
    for key in ("generic", "labels"):
        merged[key] = list(dict.fromkeys(word for info in infos for word in info.get(key) or []))
    for key in COSTS:
        if all(key in costs(info) for info in infos):
            merged[key] = (max if key == "peak_bytes" else sum)(info[key] for info in infos)
    return torch.cat(phis), merged


def template_of(args, info, rows=()):
    """The template of --template, else the prompt's (the bare text where its rows were prompts
    themselves), else the default for the rows.
    """
    trained = None
    if info:
        trained = template_from_json(info["template"] or "{text}")
    return choose_template(args, rows, trained)


def asking_of(args, model, tokenizer, info, rows=(), p=0):
    """How --ask asks, after p prompt tokens: in which template, and for which labels."""
    template = template_of(args, info, rows)
    is_raw = bool(info) and info["template"] is None and not args.template
    labels = {}
    if info.get("labels") and not template.end:
        named = [Row(name, name, "", is_raw) for name in info["labels"]]
        labels = label_set(named, tokenizer, info["generic"], template)
    room = model.config.max_position_embeddings - p
    return Asking(tokenizer, template, labels, room, is_raw)


def table_command(args, model, tokenizer, phi, info, splits):
    """Measure every split and elsewhere, print tables and verdict, and write them to --json."""
    generic = info.get("generic", [])
    limit = row_limit(args, 0 if phi is None else len(phi))
    all_rows = [row for rows in splits.values() for row in rows]
    template = template_of(args, info, all_rows)
    labels = label_set(all_rows, tokenizer, generic, template)
    before = {}
    after = {}
    answers = generic or ["unknown"]
    generate = generator(model)
    generate_with = generator(model, phi)
    for name, examples, cut in examples_to_ask(splits, template, answers, tokenizer, limit):
        if cut:
            print(f"{name}: {cut} texts cut to {limit} tokens")
        longest = max(len(e.ids) for e in examples)
        if phi is not None and (warning := window_warning(model.config, len(phi), longest)):
            print(f"{name}: {warning}")
        common = (model, tokenizer, examples, labels, generic)
        before[name] = measure(*common, batch_size=args.batch_size, generate=generate)
        if leaves_out(name, before):
            del before[name]
        elif phi is not None:
            after[name] = measure(
                *common, phi, batch_size=args.batch_size, generate=generate_with
            )
    texts = held_out_texts(args, tokenizer, args.prompt or [], limit)
    texts = texts_elsewhere(args.model, tokenizer, limit, texts)
    elsewhere = measure_elsewhere(model, tokenizer, texts, phi, args.model, args.batch_size)
    verdict = []
    if phi is not None:
        verdict = verdicts(before, after, elsewhere, true_labels(splits, labels))
    report(args, model, info, before, after, elsewhere=elsewhere, verdict=verdict)
    print("\n".join([elsewhere_table(elsewhere), *verdict]))


def main(argv=None):
    parser = Parser(__doc__)
    add_options(parser)
    add = parser.add_argument_group("what to measure").add_argument
    add("--prompt", type=non_empty, action="append", metavar="DIR",
        help="the folder that train.py wrote; several times for prompts one after the other")
    add("--ask", nargs="?", const=True, metavar="TEXT",
        help="show the answers to one text instead; without a text, to each line that is typed; "
        "with --out, to each row of a FILE")
    add("--out", type=non_empty, metavar="FILE",
        help="with --ask FILE: write the answers here, JSON Lines")
    add("--general", type=non_empty, metavar="FILE",
        help="general text: a fifth of it, held out of training, is measured (default: of what "
        "the model wrote for the prompt)")
    add("--json", type=non_empty, metavar="FILE", help="also write the table to this file")
    args = parser.parse_args(argv)
    is_demo = use_demo(args)
    if is_demo and not args.prompt and (DEMO / "prompt" / "spul.json").exists():
        args.prompt = [str(DEMO / "prompt")]
    rows = rows_to_ask(args)
    splits = {} if args.ask is not None else read_splits(args)
    if not splits and args.ask is None:
        raise ValueError(
            "nothing to measure: give --forget, --retain, --test-forget, --test-retain or --ask"
        )
    if args.ask is not None and (args.general or args.json):
        raise ValueError("--ask shows the answers to one text: leave out --general and --json")
    check_required(args, "model")
    check_json_path(args.json)
    config = read_config(args.model)
    phi = None
    info = {}
    if args.prompt:
        phi, info = load_prompts(args.prompt, config, args.model)
    check_rows(splits)
    template_of(args, info, rows)  # a bad one is found before the model is loaded
    model, tokenizer = load_model(args)
    if phi is not None:
        phi = phi.to(model.device)
    if args.ask is not None:
        generators = {"without": generator(model)}
        generators |= {} if phi is None else {"with": generator(model, phi)}
        asking = asking_of(args, model, tokenizer, info, rows, 0 if phi is None else len(phi))
        ask(args, asking, generators, rows)
    else:
        table_command(args, model, tokenizer, phi, info, splits)


if __name__ == "__main__":
    run(main)
