"""What a prompt does to text that nobody trained on, and what to say of it.

Letters: p prompt tokens, d width, V vocabulary, n scored tokens of a text.
"""

import math
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from data import TEXT, Template, are_sentences, make_examples, read_rows
from spul import answer_hidden
from support.asking import ANSWERED, after_another, in_other_chats, reworded, spread
from support.general import own_form, sentence_vectors, text_examples
from support.processes import say

BY_PEOPLE = Path(__file__).parent / "elsewhere.jsonl"  # written for this project by its authors
EARLIER = "earlier forget"  # rows that earlier prompts make the model forget
OTHER_ROWS = 100  # of a split, asked otherwise than in training
# When a verdict is bad.
CLEARLY = 1.5  # KL above so many times a harmless sentence's
FORGOTTEN = 0.5  # more than this share of the true answers still comes
KEPT = 0.8  # in another template less than this share of the rows right before is right
BETTER = 0.1  # without a prompt accuracy is not this much above that of the commonest answer,
KNOWN = 0.9  # and not above this
REMEDY = (
    "What helps: real rows to keep (--retain), text like your users' (--general FILE), "
    "a larger --gamma"
)


# --------------------------------------------------------------------------------------- measuring


def ways_to_ask(splits, template, generic):
    """{name: (template, rows)}: each split, and where nobody trained: some rows asked otherwise.

    These are train rows, if there are any: in another template, or in other chats, and after a row
    of the other side with its answer, a generic one where that is to be forgotten.
    """
    ways = {}
    for name, rows in splits.items():
        ways[name] = (template, rows)
        part = spread([row for row in rows if not row.raw], OTHER_ROWS)
        if not part or not is_asked_otherwise(name, splits):
            continue
        if template.chat:
            for what, way in in_other_chats(template, part).items():
                ways[f"{name}, {what}"] = way
        for what, other in zip(("another template", "a third template"), reworded(template)):
            if not template.chat and other.space == template.space:  # the same ids of answers
                ways[f"{name}, {what}"] = (other, part)
        own, side = ("forget", "retain") if "forget" in name else ("retain", "forget")
        others = splits.get(name.replace(own, side))
        if others:
            rng = random.Random(name)
            answers = generic if side == "forget" else None
            ways[f"{name}, after a {side} row"] = (
                template,
                after_another(part, others, rng, answers),
            )
    return ways


def is_asked_otherwise(name, splits):
    """Whether a split's rows are asked in other ways, too: train rows, or all where none are."""
    return name.startswith("train") or not any("train" in split for split in splits)


def leaves_out(name, before):
    """Whether a way to ask tells nothing: without a prompt the model hardly answers in it."""
    first = before.get(name.split(",")[0])
    if ", " not in name or first is None or right(before[name]) >= ANSWERED * right(first):
        return False
    say(f"{name}: left out: without a prompt {100 * right(before[name]):.0f} % right")
    return True


def examples_to_ask(splits, template, generic, tokenizer, limit):
    """Yield (name, Examples, how many texts were cut) of `ways_to_ask`; of sentences half, too.

    A way that nobody asked for is left out where the rows have no room in it, or where the chat
    template refuses it.
    """
    for name, (asked_in, rows) in ways_to_ask(splits, template, generic).items():
        try:
            examples, cut = make_examples(rows, tokenizer, asked_in, limit)
        except ValueError as e:
            if name in splits:
                raise
            say(f"{name}: not measured: {e}")
            continue
        yield name, examples, cut
        if name in splits and are_sentences(examples) and is_asked_otherwise(name, splits):
            yield f"{name}, half the answer given", second_halves(examples, tokenizer), 0


def second_halves(examples, tokenizer):
    """Some of the examples, which ask only for the second half of the answer's tokens.

    A model may refuse at an answer's first token and not further on (Qi et al., arXiv 2406.05946,
    of models trained to refuse).
    """
    halves = []
    for e in spread(examples, OTHER_ROWS):
        n = math.ceil(e.n / 2)
        halves.append(replace(e, n=n, label=tokenizer.decode(e.ids[-n:])))
    return halves


def texts_elsewhere(folder, tokenizer, limit, held_out=None):
    """{what: Examples}: held_out, the same kind of text as L_keep's, and texts by people.

    These are in the model's own form, and alone where that is a chat's. limit: the most tokens.
    """
    form = own_form(folder, tokenizer)
    rows = read_rows(BY_PEOPLE)
    texts = dict(held_out or {})
    texts["text by people"] = text_examples(rows, tokenizer, form, limit)
    if not form.add_bos:
        texts["the same, no chat"] = text_examples(rows, tokenizer, Template(TEXT), limit)
    return {what: examples for what, examples in texts.items() if examples}


@torch.no_grad()
def measure_elsewhere(model, tokenizer, texts, phi, folder, batch_size=32, earlier=None):
    """{what: a dict} for texts, {what: Examples}, with the prompt phi (p, d), or None without one.

    Those of `compare`, and sentence_kl, sentence_same: its kl and same for the vectors of a
    harmless sentence in the prompt's place. earlier (q, d): prompts that phi begins with, and that
    stood before the texts already.
    """
    if phi is not None:
        sentence = sentence_vectors(model, tokenizer, folder)  # (p, d)
        if earlier is not None:
            sentence = torch.cat([earlier, sentence])
    results = {}
    for what, examples in texts.items():
        before = answer_hidden(model, examples, earlier, batch_size=batch_size)
        if phi is None:
            results[what] = compare(examples, model, before)
            continue
        after = answer_hidden(model, examples, phi, batch_size=batch_size)
        results[what] = compare(examples, model, before, model, after)
        after = answer_hidden(model, examples, sentence, batch_size=batch_size)
        beside = compare(examples, model, before, model, after)
        results[what] |= {f"sentence_{name}": beside[name] for name in ("kl", "same")}
    return results


@torch.no_grad()
def compare_models(base, model, texts, batch_size=32):
    """`compare` for texts, {what: Examples}: what a model has become of its base."""
    results = {}
    for what, examples in texts.items():
        before = answer_hidden(base, examples, batch_size=batch_size)
        after = answer_hidden(model, examples, batch_size=batch_size)
        results[what] = compare(examples, base, before, model, after)
    return results


def compare(examples, base, before, model=None, after=None):
    """What changes from outputs of `base` to others: a dict.

    tokens: that were scored. perplexity, perplexity_with: before and after. kl: nats a token from
    before to after. same: share of tokens where the likeliest is the same.
    before: of each example the outputs (n, d) of `base`; after: those of `model`, or None.
    """
    nll = nll_with = kl = 0.0
    same = 0
    for i, e in enumerate(examples):
        targets = torch.tensor(e.answer, device=before[i].device)[:, None]  # (n, 1)
        log_p = F.log_softmax(base.head(before[i]), dim=-1)  # (n, V)
        nll -= log_p.gather(1, targets).sum().item()
        if after:
            log_q = F.log_softmax(model.head(after[i]), dim=-1)  # (n, V)
            nll_with -= log_q.gather(1, targets).sum().item()
            kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
            same += (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum().item()
    tokens = sum(e.n for e in examples)
    result = {"tokens": tokens, "perplexity": perplexity(nll / tokens)}
    if after:
        result["perplexity_with"] = perplexity(nll_with / tokens)
        result |= {"kl": kl / tokens, "same": same / tokens}
    return result


def perplexity(nll):
    """exp of the nats a token, within what a float can hold."""
    return math.exp(min(nll, 700))


# ------------------------------------------------------------------------------------ on the screen


def elsewhere_table(results):
    """The results of `measure_elsewhere` as text; in brackets those of a harmless sentence."""
    longest = max(12, *map(len, results)) + 1
    is_compared = any("kl" in result for result in results.values())
    beside = any("sentence_kl" in result for result in results.values())
    head = f"{'elsewhere':{longest}}{'tokens':>7}{'perplexity':>20}"
    lines = [head + (f"{'KL a token':>18}{'same token, %':>18}" if is_compared else "")]
    for what, result in results.items():
        values = f"{result['perplexity']:.1f}"
        kl = same = ""
        if "kl" in result:
            values += f" -> {result['perplexity_with']:.1f}"
            kl = f"{result['kl']:.3f}"
            same = f"{100 * result['same']:.1f}"
        if "sentence_kl" in result:
            kl += f" ({result['sentence_kl']:.3f})"
            same += f" ({100 * result['sentence_same']:.1f})"
        line = f"{what:{longest}}{result['tokens']:>7}{values:>20}{kl:>18}{same:>18}"
        lines.append(line.rstrip())
    if beside:
        lines.append("in brackets: what a harmless sentence in front changes")
    return "\n".join(lines)


def verdicts(before, after, elsewhere, labels):
    """What to say of a prompt, in lines: did the model know the rows, did it forget, what else?

    before, after: {split: what `eval.measure` measured}. labels: the true answers of the rows, or
    None where they are sentences.
    """
    lines = []
    name = next((split for split in ("train forget", "test forget") if split in after), None)
    if name:
        lines += forgetting_verdict(before[name], after[name], labels)
        lines += otherwise_verdict(before, after)
    lines += earlier_verdict(before, after)
    reasons = []
    for what, result in elsewhere.items():
        if result["kl"] > CLEARLY * result["sentence_kl"]:
            reasons.append(
                f"{what}: KL {result['kl']:.2f} a token, a harmless sentence's is "
                f"{result['sentence_kl']:.2f}"
            )
    written = []
    for split in after:
        if "retain, " in split:
            own = written if split.startswith("written") else reasons
            own += template_reason(split, before[split], after[split])
    if written:
        lines.append(
            "WITHOUT REAL ROWS TO KEEP this prompt does not hold, so it should not be used "
            f"({'; '.join(written)}). What helps: rows to keep (--retain FILE)."
        )
    if reasons:
        lines.append(
            "ELSEWHERE this prompt changes what it was not trained on, so it should not be used "
            f"before arbitrary queries ({'; '.join(reasons)}). {REMEDY}."
        )
    elif elsewhere:
        lines.append(
            "Elsewhere this prompt changes little: about what a harmless sentence in front does, "
            "or less."
        )
    return lines


def true_labels(splits, labels):
    """The true answers of all rows, for `verdicts`; None where they are sentences."""
    return [row.label for rows in splits.values() for row in rows] if labels else None


def forgetting_verdict(before, after, labels):
    known = right(before)
    left = right(after)
    commonest = 0.0
    if labels:
        commonest = max(map(labels.count, labels)) / len(labels)
    lines = []
    if known < min(commonest + BETTER, KNOWN):
        lines.append(
            f"THE MODEL DID NOT KNOW the rows to forget: {100 * known:.0f} % right without a "
            "prompt. There was little to forget."
        )
    elif left > FORGOTTEN * (1.0 if labels else known):
        lines.append(
            f"NOT FORGOTTEN: {100 * left:.0f} % of the true answers still come. What helps: more "
            "--epochs, a higher --lr."
        )
    return lines


def otherwise_verdict(before, after):
    """Whether rows to forget come back where they are asked otherwise than in training."""
    back = []
    for split in after:
        known = right(before[split])
        left = right(after[split])
        if "forget, " in split and left > FORGOTTEN * known:
            back.append(f"{split}: {100 * known:.0f} -> {100 * left:.0f} % right")
    if not back:
        return []
    return [f"ASKED OTHERWISE, rows to forget come back ({'; '.join(back)})."]


def earlier_verdict(before, after):
    """Whether rows come back that earlier prompts made the model forget."""
    if EARLIER not in after:
        return []
    was, now = right(before[EARLIER]), right(after[EARLIER])
    if now <= was + BETTER:
        return []
    return [
        "EARLIER ROWS COME BACK: of those that earlier prompts made the model forget "
        f"{100 * was:.0f} -> {100 * now:.0f} % are right. What helps: --after-forget FILE with all "
        "of them, more --epochs."
    ]


def right(measured):
    return measured.get("rouge_l", measured["accuracy"])


def template_reason(split, before, after):
    if right(after) >= KEPT * right(before):
        return []
    refused = after.get("generic", 0.0) - before.get("generic", 0.0)
    what = f"{split}: {100 * right(before):.0f} -> {100 * right(after):.0f} % right"
    return [what + (f", {100 * refused:.0f} % refused" if refused > 0.01 else "")]
