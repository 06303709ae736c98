"""From JSON Lines to batches: rows, templates, and where in the tokens the answer is.

    read_rows        a file -> rows, with the file and line in the message of every error
    make_example     a row -> token ids, of which the last n are the answer
    collate          examples -> a padded batch; it knows which position predicts which answer token

We know the answer's place by construction: prompt and answer are tokenised apart and joined.
Published code searches the joined tokens for a marker, and finds the wrong ones with other
tokenizers. The space between a template and its answer belongs to the answer, because that is how
both kinds of tokenizer write a word inside a line: " positive".

Letters: B rows, T tokens of the longest, n answer tokens of a row, N answer tokens of a batch.
"""

import os.path
import statistics
from dataclasses import dataclass, field

import torch

from support.rows import check_labelled, normalised, read_fields

TEXT = "{text}"
SENTENCE = 8  # tokens of an answer
BETWEEN = "\n\n"  # one row's answer and the next row, where two are asked in one query


# --------------------------------------------------------------------------------------- templates


@dataclass(frozen=True)
class Template:
    """What stands around a row's text and its answer.

    string: with {text} once; it ends where the answer starts
    space: between the two; it belongs to the answer
    end: after the answer and a part of it, as the token that ends a turn of a chat
    add_bos: whether the tokenizer's BOS comes first; a chat template writes its own
    strips: whether white space around the text is dropped
    system, date: what a chat template was given, if anything
    chat: the support.templates.Chat that made this, needed for rows of several turns only
    """

    string: str
    space: str = " "
    end: str = ""
    add_bos: bool = True
    strips: bool = False
    system: str = None
    date: str = None
    chat: object = field(default=None, compare=False, repr=False)

    def around(self, row):
        """The parts before and after a row's text, for Tokenizer.encode_parts."""
        if row.is_chat and row.turns and not self.chat:
            raise ValueError(f"{row.where}: a row of several turns needs --template chat")
        if row.turns and self.chat:
            return self.chat.around(row.turns)
        before, after = self.string.split(TEXT)
        parts = []
        for role, said in row.turns:
            if role == "user":
                parts += [(before, True), (said, False), (after + self.space, True)]
            else:
                parts += [(said, False), (BETWEEN, True)]
        return [*parts, (before, True)], [(after, True)]


TEMPLATES = {
    # the released code's, up to where the answer starts
    "sentiment": Template(
        "### Text: {text}\n\n"
        "### Question: What is the sentiment of the given text?\n\n"
        "### Sentiment:"
    ),
    "question": Template("### Question: {text}\n\n### Answer:"),
}


# -------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """A line of a file: a text for the template and its label, or (raw) a prompt and completion."""

    text: str
    label: str  # None where a row to retain has none
    where: str  # file:line
    raw: bool = False  # used as it is: no template, and no space added before the answer
    forget: bool = None  # the row's own flag, if it has one
    paraphrase: str = None  # the answer in other words, if the row has it
    wrong: tuple = ()  # wrong answers of the same form
    turns: tuple = ()  # (role, content) of what is said before the text: a chat's, or another row
    is_chat: bool = False  # given as messages

    @property
    def key(self):
        """What makes two rows the same: all that is said, but for case and white space."""
        said = [content for _, content in self.turns]
        return "\n".join(normalised(text) for text in (*said, self.text))


def read_rows(path, unlabelled=False):
    """The rows of a file. Raises ValueError, with file:line, for the first bad row.

    unlabelled: rows may be without a label.
    """
    rows = [Row(**fields) for fields in read_fields(path)]
    if not unlabelled:
        check_labelled(rows, "each of these rows")
    return rows


def read_sets(forget, retain=None, unlabelled=False):
    """The forget rows and the retain rows, of two files, or of one with "forget": true or false.

    Without a retain file and without flags there are no retain rows. unlabelled: retain rows may
    be without a label. Raises ValueError where only some rows have the flag, where both a file and
    flags are given, or where no row is to be forgotten.
    """
    rows = read_rows(forget, unlabelled=True)
    unflagged = [row for row in rows if row.forget is None]
    if len(unflagged) == len(rows):
        check_labelled(rows, "a row to forget")
        return rows, read_rows(retain, unlabelled) if retain else []
    if unflagged:
        where = unflagged[0].where
        raise ValueError(f'{where}: no "forget" here, though other rows of the file have it')
    if retain:
        raise ValueError(f"{forget}: its rows say which to forget: leave --retain out")
    forget_rows = [row for row in rows if row.forget]
    if not forget_rows:
        raise ValueError(f'{forget}: no row has "forget": true')
    check_labelled(forget_rows, "a row to forget")
    retain_rows = [row for row in rows if not row.forget]
    if not unlabelled:
        check_labelled(retain_rows, "each of these rows")
    return forget_rows, retain_rows


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


def are_sentences(examples):
    """Whether the answers are: half of them have SENTENCE tokens or more."""
    return statistics.median(e.n for e in examples) >= SENTENCE


def answer_ids(tokenizer, label, template=None, end=True):
    """The ids of an answer: with the space before it, and with its end. No template: as it is."""
    if template is None:
        return tokenizer.encode_inside(label)
    ids = tokenizer.encode_inside(template.space + label)
    if end and template.end:
        ids += tokenizer.encode_parts([(template.end, True)], inside=True)
    return ids


def generic_ids(tokenizer, answer, template, completion=None, end=True):
    """The ids of a generic answer; in place of a completion with that one's outer white space."""
    if completion is None:
        return answer_ids(tokenizer, answer, template, end)
    before = completion[: len(completion) - len(completion.lstrip())]
    after = completion[len(completion.rstrip()) :]
    return answer_ids(tokenizer, before + answer + after)


def prompt_ids(row, tokenizer, template, length=None):
    """The ids before a row's answer, with the first `length` characters of its text.

    BOS stands before them once: also where the template writes it itself.
    """
    if row.raw:
        return tokenizer.bos + tokenizer.encode(row.text[:length])
    before, after = template.around(row)
    text = row.text[:length]
    text = text.strip() if template.strips else text
    ids = tokenizer.encode_parts([*before, (text, False), *after])
    n = len(tokenizer.bos)
    has_bos = not template.add_bos or ids[:n] == tokenizer.bos
    return ids if has_bos else tokenizer.bos + ids


def make_example(row, tokenizer, template, max_length, forget=False, generic=None):
    """A row -> its Example, and whether its text was cut. generic: an answer in place of its own.

    A text that is too long for max_length tokens loses its end; template and answer stay whole.
    Raises ValueError where these alone are too long, or where no token comes before the answer.
    """
    if generic is None:
        answer = answer_ids(tokenizer, row.label, None if row.raw else template)
    else:
        answer = generic_ids(tokenizer, generic, template, row.label if row.raw else None)

    def ids_of(length):
        return prompt_ids(row, tokenizer, template, length)

    length = longest_fit(ids_of, len(row.text), max_length - len(answer))
    ids = ids_of(length)
    if len(ids) + len(answer) > max_length:
        raise ValueError(
            f"{row.where}: template and answer alone are {len(ids) + len(answer)} tokens, over the "
            f"limit of {max_length}: raise --max-length or shorten the answer"
        )
    if not ids:
        raise ValueError(f"{row.where}: an empty prompt, and the tokenizer has no BOS either")
    if not answer:
        raise ValueError(f"{row.where}: the answer has no tokens")
    tokenizer.check_table(ids + answer, row.where)
    span = text_span(ids, row, tokenizer, template)
    example = Example(tuple(ids + answer), len(answer), generic or row.label, forget, span)
    return example, length < len(row.text)


def longest_fit(ids_of, length, room):
    """The most characters, up to length, whose prompt has at most `room` tokens, by bisection."""
    if len(ids_of(length)) <= room:
        return length
    fits = 0
    too_long = length
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if len(ids_of(middle)) <= room:
            fits = middle
        else:
            too_long = middle
    return fits


def text_span(ids, row, tokenizer, template):
    """From where to where ids are the row's text: not BOS, nor the template before and after."""
    before, after = ([], []) if row.raw else template.around(row)
    start = tokenizer.encode_parts(before)
    if ids[: len(tokenizer.bos)] == tokenizer.bos and start[: len(tokenizer.bos)] != tokenizer.bos:
        start = tokenizer.bos + start
    end = tokenizer.encode_parts(after, inside=True)
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
    lengths: tuple  # of the rows in tokens, without padding
    is_text: torch.Tensor  # (B, T), True where they are the row's own text
    rows: torch.Tensor  # (N,), the row of each answer token
    columns: torch.Tensor  # (N,), the column of tokens whose output predicts it: one before its own
    targets: torch.Tensor  # (N,), its id
    forget: torch.Tensor  # (N,), True in forget rows
    weights: torch.Tensor  # (N,), what its row counts in the mean over rows, 1 unless drawn by loss
    n_f: int  # forget rows
    n_r: int  # retain rows


def common_prefix(examples):
    """The ids that all examples begin with, up to the last token before an answer."""
    return os.path.commonprefix([e.ids[: -e.n - 1] for e in examples])


def collate(examples, device="cpu", shared_ids=(), keep_last=False, weights=None):
    """Examples that all begin with shared_ids -> Batch. Padding is token 0, unseen and unscored.

    keep_last: keep each row's last token, too. Its output predicts nothing that is scored; only
    an L_kl "after-label" reads it. weights: what each row counts in the mean over rows (None: 1).
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
    weights = torch.tensor(weights or [1.0] * len(examples), device=device)  # (B,)
    n_f = sum(e.forget for e in examples)
    return Batch(
        shared_ids=shared_ids,
        tokens=tokens.to(device),
        lengths=tuple(map(len, texts)),
        is_text=is_text.to(device),
        rows=rows,
        columns=columns,
        targets=targets,
        forget=forget.bool(),
        weights=weights[rows],
        n_f=n_f,
        n_r=len(examples) - n_f,
    )


def by_length(examples, batch_size):
    """Batches of indices, longest rows first, so that memory runs out at once or never."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
