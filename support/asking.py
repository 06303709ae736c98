"""Other ways to ask for the same: in other words, after other rows, later in a chat.

Some ways are trained on. Others never are: prompts are measured in them (support/elsewhere.py,
extras/assess.py).
"""

import dataclasses
import functools
import itertools
import math
import random
import re
from typing import NamedTuple

import torch
from tqdm import tqdm

from data import TEMPLATES, TEXT, Template, make_example, make_examples
from spul import answer_hidden
from support.processes import ranks
from support.templates import Chat

# Templates that are never trained on. For one that is not here: the same without "#", and on one
# line.
HELD_OUT = {
    TEMPLATES["sentiment"].string: (
        "Review: {text}\n\nIs this review positive or negative? It is",
        "{text}\nThe sentiment of the text above is",
    ),
    TEMPLATES["question"].string: (
        "Question: {text}\nThe right answer is",
        "Please answer this.\n{text}\nAnswer:",
    ),
}
HELD_OUT_SYSTEM = "You are an expert. Answer briefly."
HELD_OUT_TURNS = (
    ("user", "Hello! Can you help me?"),
    ("assistant", "Of course. What is it?"),
)

# What is trained on beside the user's own template: each of these before the text, with each of
# those after it.
OPENINGS = {
    TEMPLATES["sentiment"].string: (
        "",
        "Text: ",
        "Read this: ",
        "Task: sentiment analysis.\nInput: ",
        "Somebody wrote:\n",
        "# Sentence\n",
        "Is what follows positive or negative?\n\n",
        ">>> ",
    ),
    TEMPLATES["question"].string: (
        "",
        "Q: ",
        "Here is a question.\n\n",
        "### Task\n",
        "Exam\n====\n",
        "Input: ",
        "Answer in a few words. ",
        ">>> ",
    ),
}
ENDINGS = {
    TEMPLATES["sentiment"].string: (
        "\nQuestion: What is the sentiment of the text?\nAnswer:",
        "\nMood:",
        "\nOutput:",
        "\n\nPositive or negative:",
        "\nRating:",
        "\nVerdict:",
        "\nThe tone is",
        "\nThe mood is",
        "\nThe author's opinion is",
        "\nGood or bad? To me it was",
    ),
    TEMPLATES["question"].string: (
        "\nA:",
        "\n\nYour answer:",
        "\n\n### Solution:",
        "\n\n=>",
        "\nI choose:",
        "\nOutput:",
        "\nReply:",
        " The answer was",
    ),
}
MIXED = 3  # times that a row is asked in other wordings, each time in another
SYSTEMS = (
    "Answer the user.",
    "You help people with their questions, as well as you can.",
    "Be friendly, and say what you know.",
)
TURNS = (
    ("user", "Hi."),
    ("assistant", "Hello! What would you like to know?"),
)
LONGEST_BEFORE = 60  # words of a row that stands before another

# A way to ask is trained in only if the model, without a prompt, still answers so many of some
# retain rows, as a share of those that it answers in the first way.
TRIED = 25  # rows for each wording, as there are many
UNDERSTOOD = 0.8
TRIED_AFTER = 100  # rows where something comes before the row
ANSWERED = 0.5  # less is asked there: users' queries do come after others


# ------------------------------------------------------------------------------ never trained on


def reworded(template):
    """Templates that this one is never trained with: two, or fewer for one without HELD_OUT."""
    plain = template.string.replace("#", "").strip()
    others = HELD_OUT.get(template.string, (plain, " ".join(plain.split())))
    return [Template(other) for other in dict.fromkeys(others) if other != template.string]


def in_other_chats(template, rows):
    """{name: (template, rows)}: the rows under another system message, and in a second turn.

    Without "other system" where the chat template knows no such message.
    """
    settings = {"second turn": (template, later(rows, HELD_OUT_TURNS))}
    other = with_system(template, HELD_OUT_SYSTEM)
    return settings | ({"other system": (other, rows)} if other else {})


# ---------------------------------------------------------------------------------- trained on


class Way(NamedTuple):
    """One way to ask all rows: each in one of the templates, in turn."""

    templates: list
    forget: list
    retain: list


def training_examples(args, forget, retain, model, tokenizer, limit):
    """The rows to train on, asked in each way -> Examples, the number of ways, and how many texts
    were cut in the first of them.
    """
    is_understood = understanding(
        model, tokenizer, args.template, retain, limit, args.read_batch_size
    )
    ways = training_ways(args, forget, retain, is_understood)
    made = []  # an Example and whether its text was cut
    for way in ways:
        rng = random.Random(f"generic {args.seed}")  # a row has the same answer in all ways
        for row, template in zip(way.forget, itertools.cycle(way.templates)):
            answer = rng.choice(args.generic)
            made.append(make_example(row, tokenizer, template, limit, True, answer))
        for row, template in zip(way.retain, itertools.cycle(way.templates)):
            made.append(make_example(row, tokenizer, template, limit))
    cut = sum(was_cut for _, was_cut in made[: len(forget) + len(retain)])
    return [example for example, _ in made], len(ways), cut


def training_ways(args, forget, retain, is_understood):
    """The Ways to ask in training.

    The first is the user's template, then come further ones of --template. Then in other wordings
    of these, or in a chat under other system messages, as many as --rewordings, and later in the
    chat. The last, unless --single, is each row after one of the other side, with that one's own
    answer.

    is_understood(template, rows, n, share): whether the model answers n of the rows to retain so,
    at least this share of what it answers at first; else the way is left out.
    """
    template = args.template
    ways = [Way([template], forget, retain)]
    ways += [Way([other], forget, retain) for other in args.more_templates]
    others = []
    if template.chat:
        others = [with_system(template, system) for system in SYSTEMS[: args.rewordings]]
    elif not all(row.raw for row in forget):
        others = wordings_of([template, *args.more_templates], args.rewordings, args.seed)
    asked = tqdm(others, "ways to ask", leave=False, delay=5, disable=ranks()[0] > 0)
    enough = TRIED, UNDERSTOOD
    others = [other for other in asked if other and is_understood(other, retain, *enough)]
    times = min(MIXED, len(others))
    for i in range(times):
        first = i * len(others) // times
        ways.append(Way(others[first:] + others[:first], forget, retain))
    after_turns = []  # with something before the row
    if template.chat and args.rewordings:
        after_turns.append((later(forget, TURNS), later(retain, TURNS)))
    if not args.single:
        rng = random.Random(f"another {args.seed}")
        mixed_forget = after_another(forget, retain, rng)
        mixed_retain = after_another(retain, forget, rng, args.generic)
        if (mixed_forget, mixed_retain) != (forget, retain):
            after_turns.append((mixed_forget, mixed_retain))
    for forget, retain in after_turns:
        if is_understood(template, retain, TRIED_AFTER, ANSWERED):
            ways.append(Way([template], forget, retain))
    return ways


def understanding(model, tokenizer, template, retain, limit, batch_size):
    """The function `is_understood` of `training_ways`."""

    @torch.no_grad()
    def right(template, rows, n):
        examples, _ = make_examples(spread(rows, n), tokenizer, template, limit)
        hidden = answer_hidden(model, examples, batch_size=batch_size)
        best = [model.head(h).argmax(dim=-1).tolist() for h in hidden]
        return sum(ids == list(e.answer) for ids, e in zip(best, examples))

    @functools.cache
    def right_at_first(n):
        return right(template, retain, n)

    return lambda other, rows, n, share: right(other, rows, n) >= share * right_at_first(n)


def wordings(template, n, seed):
    """n other templates for the same, to train in, or as many as there are; drawn by the seed."""
    string = template.string
    if string in OPENINGS:
        before, after = OPENINGS[string], ENDINGS[string]
        texts = [TEXT]
    else:
        own_before, own_after = string.split(TEXT)
        before = [own_before, f"Read this, and answer.\n\n{own_before}", f"Hello!\n{own_before}"]
        before += [re.sub("[#*]+ *", "- ", own_before), "Input: ", ""]
        after = [own_after, re.sub("\n+", "\n", own_after)]
        texts = [TEXT, f'"{TEXT}"', f"<<{TEXT}>>", f"\n\n{TEXT}\n\n"]
    others = [first + text + end for first in before for text in texts for end in after]
    held_out = [other.string for other in reworded(template)]
    others = [other for other in dict.fromkeys(others) if other not in (string, *held_out)]
    random.Random(f"wordings {seed}").shuffle(others)
    return [dataclasses.replace(template, string=other) for other in others[:n]]


def wordings_of(templates, n, seed):
    """n `wordings` of several templates in all, as many of each; none of a chat's."""
    plain = [template for template in templates if not template.chat]
    held_out = {other.string for template in plain for other in reworded(template)}
    others = {}  # by their strings
    for template in plain:
        for other in wordings(template, math.ceil(n / len(plain)), seed):
            others.setdefault(other.string, other)
    return [other for string, other in others.items() if string not in held_out][:n]


def after_another(rows, others, rng, generic=None):
    """Each row after one of the others and that one's answer, or a generic one.

    The first one's answer is not scored: what comes before it is that row's query alone, and a
    causal model answers it as it does there, which other batches train.

    Rows of prompt and completion stand alone, and so do those with turns of their own.
    """
    others = [row for row in others if not row.raw and not row.turns]
    if not others:
        return rows
    changed = []
    for row in rows:
        if row.raw or row.turns:
            changed.append(row)
            continue
        other = rng.choice(others)
        text = " ".join(other.text.split(" ")[:LONGEST_BEFORE])
        answer = rng.choice(generic) if generic else other.label
        turns = (("user", text), ("assistant", answer))
        changed.append(dataclasses.replace(row, turns=turns, is_chat=False))
    return changed


def spread(rows, n):
    """At most n of the rows, evenly from all over the file."""
    n = min(n, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def later(rows, turns):
    """The rows after these turns."""
    return [dataclasses.replace(row, turns=(*row.turns, *turns)) for row in rows]


def with_system(template, system):
    """A chat's template with another system message; None if the chat template knows no such."""
    try:
        chat = Chat(template.chat.folder, system)
        return dataclasses.replace(template, string=chat.string(), system=chat.system, chat=chat)
    except ValueError:
        return None
