"""From JSON Lines to batches: rows, templates, and where in the tokens the answer is.

    read_rows        a file -> rows, with the file and line in the message of every error
    make_example     a row -> token ids, of which the last n are the answer
    collate          examples -> a padded batch; it knows which position predicts which answer token
    epoch_batches    the order of an epoch, the same for the same seed

We know the answer's place by construction: prompt and answer are tokenised apart and joined.
Published code searches the joined tokens for a marker, and finds the wrong ones with other
tokenizers. The space between a template and its answer belongs to the answer, because that is how
both kinds of tokenizer write a word inside a line: " positive".

Letters: B rows, T tokens of the longest, n answer tokens of a row, N answer tokens of a batch.
"""

import os.path
import random
from dataclasses import dataclass

import torch

from support.checks import parse_line

TEMPLATES = {
    # the released code's, up to where the answer starts
    "sentiment": (
        "### Text: {text}\n\n"
        "### Question: What is the sentiment of the given text?\n\n"
        "### Sentiment:"
    ),
    "question": "### Question: {text}\n\n### Answer:",
}


# -------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """A line of a file: a text for the template and its label, or (raw) a prompt and completion."""

    text: str
    label: str
    where: str  # file:line
    raw: bool = False  # used as it is: no template, and no space added before the answer
    forget: bool = None  # the row's own flag, if it has one
    paraphrase: str = None  # the answer in other words, if the row has it
    wrong: tuple = ()  # wrong answers of the same form

    @property
    def key(self):
        """What makes two rows the same: the text without regard to case and white space."""
        return " ".join(self.text.casefold().split())


def read_rows(path):
    """The rows of a JSON Lines file. Raises ValueError, with file:line, for the first bad line."""
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}:{number}"
            fields = parse_line(line, where)
            if fields is not None:  # not a blank line
                rows.append(Row(where=where, **fields))
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def read_sets(forget, retain=None):
    """The forget rows and the retain rows, of two files, or of one with "forget": true or false.

    Without a retain file and without flags there are no retain rows. Raises ValueError where only
    some rows have the flag, where both a file and flags are given, or where no row is to be
    forgotten.
    """
    rows = read_rows(forget)
    unflagged = [row for row in rows if row.forget is None]
    if len(unflagged) == len(rows):
        return rows, read_rows(retain) if retain else []
    if unflagged:
        where = unflagged[0].where
        raise ValueError(f'{where}: no "forget" here, though other rows of the file have it')
    if retain:
        raise ValueError(f"{forget}: its rows say which to forget: leave --retain out")
    forget_rows = [row for row in rows if row.forget]
    if not forget_rows:
        raise ValueError(f'{forget}: no row has "forget": true')
    return forget_rows, [row for row in rows if not row.forget]


# ---------------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """A tokenised row: ids = BOS, prompt, answer. The last n ids are the answer."""

    ids: tuple
    n: int
    label: str
    forget: bool  # scored by L_f; else by L_r and L_kl
    text: tuple = (0, 0)  # from where to where ids are the row's own text, not template or answer

    @property
    def prompt(self):
        return self.ids[: -self.n]

    @property
    def answer(self):
        return self.ids[-self.n :]


def answer_ids(tokenizer, label, raw=False):
    """The ids of an answer, with the space before it unless the row is raw."""
    return tokenizer.encode_inside(label if raw else " " + label)


def generic_ids(tokenizer, answer, completion=None):
    """The ids of a generic answer; in place of a completion with that one's outer white space."""
    if completion is None:
        return answer_ids(tokenizer, answer)
    before = completion[: len(completion) - len(completion.lstrip())]
    after = completion[len(completion.rstrip()) :]
    return answer_ids(tokenizer, before + answer + after, raw=True)


def make_example(row, tokenizer, template, max_length, forget=False, generic=None):
    """A row -> its Example, and whether its text was cut. generic: an answer in place of its own.

    A text that is too long for max_length tokens loses its end; template and answer stay whole.
    Raises ValueError where these alone are too long, or where no token comes before the answer.
    """
    before, after = ("", "") if row.raw else template.split("{text}")
    if generic is None:
        answer = answer_ids(tokenizer, row.label, row.raw)
    else:
        answer = generic_ids(tokenizer, generic, row.label if row.raw else None)

    def prompt_ids(length):
        return tokenizer.bos + tokenizer.encode(before + row.text[:length] + after)

    length = longest_fit(prompt_ids, len(row.text), max_length - len(answer))
    ids = prompt_ids(length)
    if len(ids) + len(answer) > max_length:
        raise ValueError(
            f"{row.where}: template and answer alone are {len(ids) + len(answer)} tokens, over the "
            f"limit of {max_length}: raise --max-length or shorten the answer"
        )
    if not ids:
        raise ValueError(f"{row.where}: an empty prompt, and the tokenizer has no BOS either")
    if not answer:
        raise ValueError(f"{row.where}: the answer has no tokens")
    span = text_span(ids, tokenizer, before, after)
    example = Example(tuple(ids + answer), len(answer), generic or row.label, forget, span)
    return example, length < len(row.text)


def longest_fit(prompt_ids, length, room):
    """The most characters, up to length, whose prompt has at most `room` tokens, by bisection."""
    if len(prompt_ids(length)) <= room:
        return length
    fits = 0
    too_long = length
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if len(prompt_ids(middle)) <= room:
            fits = middle
        else:
            too_long = middle
    return fits


def text_span(ids, tokenizer, before, after):
    """From where to where ids are the row's text: not BOS, nor the template before and after."""
    start = tokenizer.bos + tokenizer.encode(before)
    end = tokenizer.encode_inside(after)
    first = len(os.path.commonprefix([ids, start]))
    rest = ids[first:]
    common_end = os.path.commonprefix([rest[::-1], end[::-1]])
    return first, len(ids) - len(common_end)


def make_examples(rows, tokenizer, template, max_length, forget=False, generic=None, rng=None):
    """Rows -> (Examples, how many texts were cut). Each row keeps the generic answer it draws."""
    examples = []
    cut = 0
    for row in rows:
        answer = rng.choice(generic) if generic else None
        example, is_cut = make_example(row, tokenizer, template, max_length, forget, answer)
        examples.append(example)
        cut += is_cut
    return examples, cut


# ----------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """B rows padded on the right, and the N answer tokens in them."""

    shared_ids: tuple  # ids that every row begins with, left out of tokens: computed once for all
    tokens: torch.Tensor  # (B, T), the rest of each row
    is_text: torch.Tensor  # (B, T), True where they are the row's own text
    rows: torch.Tensor  # (N,), the row of each answer token
    columns: torch.Tensor  # (N,), the column of tokens whose output predicts it: one before its own
    targets: torch.Tensor  # (N,), its id
    forget: torch.Tensor  # (N,), True in forget rows
    n_f: int  # forget rows
    n_r: int  # retain rows


def common_prefix(examples):
    """The ids that all examples begin with, up to the last token before an answer."""
    return os.path.commonprefix([e.ids[: -e.n - 1] for e in examples])


def collate(examples, device="cpu", shared_ids=(), keep_last=False):
    """Examples that all begin with shared_ids -> Batch. Padding is token 0, unseen and unscored.

    keep_last: keep each row's last token, too. Its output predicts nothing that is scored; only
    an L_kl "after-label" reads it.
    """
    start = len(shared_ids)
    texts = [e.ids[start:] if keep_last else e.ids[start:-1] for e in examples]
    tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)  # (B, T)
    is_text = torch.zeros_like(tokens, dtype=torch.bool)  # (B, T)
    scored = []
    for row, (example, ids) in enumerate(zip(examples, texts)):
        tokens[row, : len(ids)] = torch.tensor(ids)
        first, last = example.text
        is_text[row, max(0, first - start) : max(0, last - start)] = True
        answer_starts = len(example.ids) - example.n - start
        for i, target in enumerate(example.answer):
            predicted_at = answer_starts + i - 1  # output t predicts token t + 1
            scored.append((row, predicted_at, target, example.forget))
    rows, columns, targets, forget = torch.tensor(scored).T.to(device)  # (N,) each
    n_f = sum(e.forget for e in examples)
    return Batch(
        shared_ids=shared_ids,
        tokens=tokens.to(device),
        is_text=is_text.to(device),
        rows=rows,
        columns=columns,
        targets=targets,
        forget=forget.bool(),
        n_f=n_f,
        n_r=len(examples) - n_f,
    )


def by_length(examples, batch_size):
    """Batches of indices, longest rows first, so that memory runs out at once or never."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def epoch_batches(examples, batch_size, seed, epoch, forget_per_batch=None):
    """One epoch's batches of indices: shuffled, rows of similar length together.

    forget_per_batch None: every row once, forget and retain mixed (the released code). K: every
    retain row once, and in each batch K forget rows, which come round as often as needed.
    """
    rng = random.Random(f"order {seed} {epoch}")
    forget = [i for i, e in enumerate(examples) if e.forget]
    retain = [i for i, e in enumerate(examples) if not e.forget]
    k = forget_per_batch or 0
    pool = retain if k else forget + retain
    rng.shuffle(pool)
    size = batch_size - k
    batches = []
    for start in range(0, len(pool), 50 * size):  # sort within 50 batches, as group_by_length does
        window = pool[start : start + 50 * size]
        window.sort(key=lambda i: len(examples[i].ids))
        batches += [window[i : i + size] for i in range(0, len(window), size)]
    rng.shuffle(batches)
    if k:
        add_forget_rows(batches, forget, k, rng)
    return batches


def add_forget_rows(batches, forget, k, rng):
    """Append k forget rows to every batch, each in turn before any comes again."""
    queue = []
    for batch in batches:
        while len(queue) < k:
            queue += rng.sample(forget, len(forget))
        batch += queue[:k]
        del queue[:k]
