"""Texts like the rows to forget: what is kept when there are no rows to retain.

Beside texts of other length, style or form a prompt learns to refuse these. So the model writes
texts after some of the forget rows' as examples, in several layouts. What is the same in all rows
is not left to it: a template that all rows have, and how their further lines begin ("A. ...").

Which words identify the rows to forget, we see from what the model writes by itself: words that are
common in the rows, and that it hardly writes where no example has them. Texts with such words are
left out; forget rows without them are one more kind of texts to keep.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import Row, prompt_ids
from support.form import KeepsForm, fits, line_marks
from support.general import COPIED, own_form, runs_of, share_copied
from support.processes import ranks
from support.rows import normalised

EXAMPLES = 6  # before a text that is to be like them
WORDS = 60  # of an example, at most
TOKENS = 128  # that the model writes after examples, at most,
MORE = 8  # and at most so many more than the longest row has
AT_ONCE = 32
COPIES = 4  # texts after the same examples: these are read once
TRIES = 6  # times as many texts as needed
OFTEN = 4  # a word identifies the rows if it is so many times as frequent there
FEW = 10  # so many texts can tell of a word
ORDINARY = 0.05  # of general texts have an ordinary word,
MUCH_MORE = 10  # unless it is so many times as frequent in the rows
ENDS = 0.02  # share of the forget rows' lengths at each end that a text need not have
SLACK = 1.3  # times longer or shorter than what is left
VARIED = 0.6  # different words, of all words of a text
LEFT = 0.5  # of a forget row's words, without those that identify it


@dataclass(frozen=True)
class Layout:
    """How examples are written one after the other, and where a text of the model's own ends."""

    name: str
    before: str
    item: str
    opening: str
    end: str

    def ids(self, texts, tokenizer, form):
        """The ids before a text. form: the model's chat template, for the layout that needs it."""
        string = self.before + "".join(self.item.format(text) for text in texts) + self.opening
        if self.name == CHAT.name:
            return prompt_ids(Row(string, None, ""), tokenizer, form)
        return tokenizer.bos + tokenizer.encode(string)


LIST = Layout("list", "", "- {}\n", "-", "\n-")
CHAT = Layout(
    "chat",
    "Here are some texts:\n\n",
    "- {}\n",
    "\nWrite one more such text, about something else. Write nothing but the text.",
    "\n-",
)
BLOCKS = Layout("blocks", "", "### Text\n{}\n\n", "### Text\n", "### Text")
CYCLE = (LIST, CHAT, LIST, CHAT, LIST, BLOCKS)
HELD_OUT_KIND = BLOCKS.name  # never trained on


@dataclass(frozen=True)
class Written:
    """A text of the model's, by which layout, the words that its examples have, and its round."""

    text: str
    kind: str
    shown: tuple = ()
    round: int = 0


def write(model, tokenizer, folder, forget, general, n, seed, texts=()):
    """Yield the texts again and again, each time with more, until n of them can be kept.

    general: general text, see `identifying_words`. texts: those of an earlier part of the run. The
    number of a round is its seed.
    """
    form = own_form(folder, tokenizer)
    layouts = [layout for layout in CYCLE if layout != CHAT or form.chat]
    longest = max(len(tokenizer.encode(row.text)) for row in forget)
    texts = list(texts)
    done = len(usable(texts, forget, general))
    with tqdm(total=n, initial=done, unit="text", leave=False, disable=ranks()[0] > 0) as bar:
        rounds = max(TRIES * n // AT_ONCE, TRIES * len(CYCLE))
        first = texts[-1].round + 1 if texts else 0
        for i in range(first, rounds):
            if done >= n:
                return
            layout = layouts[i % len(layouts)]
            tokens = min(TOKENS, longest + MORE)
            texts += write_some(model, tokenizer, form, layout, forget, tokens, i, seed)
            done = len(usable(texts, forget, general))
            bar.update(min(done, n) - bar.n)
            yield texts


def write_some(model, tokenizer, form, layout, forget, tokens, i, seed):
    """The texts of round i: what the model writes in so many tokens after each of its examples."""
    rng = random.Random(f"examples {seed} {i}")
    shown = [examples(forget, rng) for _ in range(AT_ONCE // COPIES)]
    prompts = [layout.ids(part, tokenizer, form) for part in shown]
    room = model.config.max_position_embeddings - max(map(len, prompts))
    new_tokens = min(tokens, room)
    if new_tokens < 1:
        raise ValueError("the rows to forget are too long to be examples: give --retain FILE")
    generator = torch.Generator(model.device).manual_seed((seed * 1_000_003 + i) % 2**63)
    has_lines = any("\n" in row.text.strip() for row in forget)
    texts = []
    marks = line_marks(forget)
    edit = KeepsForm(marks, tokenizer, model.end_ids().tolist(), AT_ONCE) if marks else None
    written = model.generate(prompts, None, new_tokens, 1.0, generator, copies=COPIES, edit=edit)
    shown_to = [part for part in shown for _ in range(COPIES)]
    for part, ids in zip(shown_to, written):
        words = tuple(sorted(set(words_of(" ".join(part)))))
        for text in items(tokenizer.decode(ids), layout, has_lines, marks, len(ids) < new_tokens):
            texts.append(Written(text, layout.name, words, i))
    return texts


def examples(forget, rng):
    chosen = rng.sample(forget, min(EXAMPLES, len(forget)))
    return [" ".join(row.text.strip().split(" ")[:WORDS]) for row in chosen]


def items(written, layout, has_lines, marks, is_whole):
    """The texts in what the model wrote after examples: where it goes on, each of them.

    The last is left out, unless the model ended there itself (is_whole). They are of one line, if
    all the rows are (not has_lines). With marks of lines, which may look like the layout's, there
    is one text.
    """
    parts = [written] if marks else written.split(layout.end)
    if len(parts) > 1 and not is_whole:
        parts.pop()
    texts = []
    for part in parts:
        text = part.strip()
        if not marks:
            text = text.removeprefix("- ")
        if not has_lines:
            text = text.split("\n")[0].strip()
        if not marks and len(text) > 1 and text[0] == text[-1] == '"':
            text = text[1:-1].strip()
        texts.append(text)
    return texts


# --------------------------------------------------------------------------------- which are kept


def usable(texts, forget, general):
    """The texts that can be kept: like the forget rows in form, and without their own words."""
    copied = runs_of(forget)
    seen = {row.key for row in forget}
    lengths = sorted(len(row.text.split()) for row in forget)
    ends = int(ENDS * len(lengths))
    shortest, longest = lengths[ends] / SLACK, lengths[-1 - ends] * SLACK
    identifying = identifying_words(texts, forget, general)
    marks = line_marks(forget)
    kept = []
    for written in texts:
        row = Row(written.text, None, "written by the model")
        words = words_of(written.text)
        is_like_them = shortest <= len(written.text.split()) <= longest and fits(row.text, marks)
        is_varied = len(set(words)) >= VARIED * len(words) > 0
        is_new = row.key not in seen and share_copied(row, copied) < COPIED
        if is_like_them and is_varied and is_new and not identifying & set(words):
            kept.append(written)
            seen.add(row.key)
    return kept


def identifying_words(texts, forget, general):
    """The words that are OFTEN times as frequent in the forget rows as in what the model writes.

    A text counts for a word only where none of its examples has the word. Where fewer than FEW
    count, as for a name that most rows have, `general` decides: FEW strings of general text or
    more. Without them such a word identifies nothing. Nor do words that are ORDINARY there, single
    letters, as they are a question's choices, and words of the rows' form.
    """
    in_rows = Counter(word for row in forget for word in set(words_of(row.text)))
    in_general = Counter(word for text in general for word in set(words_of(text)))
    in_texts = Counter()
    shown = Counter()
    for written in texts:
        shown.update(set(written.shown))
        in_texts.update(set(words_of(written.text)) - set(written.shown))
    of_form = set(words_of(" ".join(line_marks(forget))))
    found = set()
    for word, n in in_rows.items():
        by_itself = share(in_texts[word], len(texts) - shown[word])
        of_general = share(in_general[word], len(general))
        if len(general) >= FEW and len(texts) - shown[word] < FEW:
            by_itself = of_general
        frequency = n / len(forget)
        is_known = in_general[word] > max(1, ORDINARY * len(general))
        is_ordinary = is_known and frequency <= MUCH_MORE * of_general
        tells_nothing = is_ordinary or len(word) == 1 or word in of_form
        if frequency > OFTEN * by_itself and not tells_nothing:
            found.add(word)
    return found


def share(n, of):
    """n of so many, as a share that is never 0; where nothing was counted, a half."""
    return (n + 0.5) / (of + 1)


def without_identity(forget, identifying):
    """The forget rows' texts without the words that identify them, where enough is left."""
    marks = line_marks(forget)
    texts = []
    for row in forget:
        words = re.findall(r"\s*\S+", row.text)
        left = [word for word in words if not identifying & set(words_of(word))]
        text = "".join(left).strip()
        if LEFT * len(words) <= len(left) < len(words) and fits(text, marks):
            texts.append(text)
    return texts


def words_of(text):
    return re.findall(r"\w+", normalised(text))
