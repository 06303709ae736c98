"""Other ways to ask for the same: in other words, after other rows, later in a chat.

Some ways are trained on. Others never are: prompts are measured in them (support/elsewhere.py,
extras/assess.py).
"""

import dataclasses
import random
import re

import torch

from data import TEMPLATES, TEXT, Template, make_examples
from spul import answer_hidden
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

# Those that are trained on beside the user's own.
WORDINGS = {
    TEMPLATES["sentiment"].string: (
        "Text: {text}\nQuestion: What is the sentiment of the text?\nAnswer:",
        "Is what follows positive or negative?\n\n{text}\n\nIt sounds",
        "Read this: {text}\nMood:",
        "Task: sentiment analysis.\nInput: {text}\nOutput:",
        "{text}\n\nPositive or negative:",
        'Somebody wrote: "{text}" What they felt was',
        "# Sentence\n{text}\n# Label\n=>",
        "{text} All in all, that is",
    ),
    TEMPLATES["question"].string: (
        "Q: {text}\nA:",
        "Here is a question.\n\n{text}\n\nYour answer:",
        "### Task\n{text}\n\n### Solution:",
        "{text}\n\n=>",
        "Exam\n====\n{text}\nI choose:",
        '"{text}" they asked, and the answer was',
        "Input: {text}\nOutput:",
        "Answer in a few words. {text}\nReply:",
    ),
}
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
TRIED = 100  # rows by which we see whether the model understands a way to ask
UNDERSTOOD = 0.8  # of what it answers when asked in the first way


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


def training_ways(args, forget, retain):
    """The ways to ask in training: (template, forget rows, retain rows) each, the user's own first.

    Then come --rewordings other wordings, or in a chat other system messages and a later turn. The
    last, unless --single, is each row after one of the other side, with that one's own answer.
    """
    template = args.template
    ways = [(template, forget, retain)]
    ways += [(other, forget, retain) for other in args.more_templates]
    if template.chat:
        others = [with_system(template, system) for system in SYSTEMS[: args.rewordings]]
        ways += [(other, forget, retain) for other in others if other]
        if args.rewordings:
            ways.append((template, later(forget, TURNS), later(retain, TURNS)))
    elif not all(row.raw for row in forget):
        others = wordings(template)[: args.rewordings]
        ways += [(other, forget, retain) for other in others]
    if not args.single:
        rng = random.Random(f"another {args.seed}")
        mixed_forget = after_another(forget, retain, rng)
        mixed_retain = after_another(retain, forget, rng, args.generic)
        if (mixed_forget, mixed_retain) != (forget, retain):
            ways.append((template, mixed_forget, mixed_retain))
    return ways


@torch.no_grad()
def understood(ways, model, tokenizer, limit, batch_size):
    """The ways in which the model answers about as many rows to retain as in the first."""
    if len(ways) == 1:
        return ways
    kept = []
    for way in ways:
        template, _, retain = way
        examples, _ = make_examples(spread(retain, TRIED), tokenizer, template, limit)
        hidden = answer_hidden(model, examples, batch_size=batch_size)
        right = 0
        for e, h in zip(examples, hidden):
            right += model.head(h).argmax(dim=-1).tolist() == list(e.answer)
        if not kept:
            right_at_first = right
        if right >= UNDERSTOOD * right_at_first:
            kept.append(way)
    return kept


def wordings(template):
    """Other templates for the same, to train in."""
    if template.string in WORDINGS:
        return [Template(string) for string in WORDINGS[template.string]]
    string = template.string
    before, after = string.split(TEXT)
    held_out = [other.string for other in reworded(template)]
    others = (
        "Read this, and answer.\n\n" + string,
        re.sub("\n+", "\n", string).replace(TEXT, f'"{TEXT}"'),
        "Here is one more.\n" + re.sub("[#*]+ *", "- ", string),
        f"Input: {TEXT}{after}",
        f"{before}<<{TEXT}>>{after}",
        f"{before}\n\n{TEXT}\n\n{after}",
    )
    return [
        dataclasses.replace(template, string=other)
        for other in dict.fromkeys(others)
        if other not in (string, *held_out)
    ]


def after_another(rows, others, rng, generic=None):
    """Each row after one of the others and that one's answer, or a generic one.

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
    """At most n of the rows, from all over the file."""
    return rows[:: max(1, len(rows) // n)][:n]


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
