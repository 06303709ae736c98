"""General text: what L_keep compares on, what finetune rehearses, what is measured elsewhere.

It comes from --general FILE, or the model writes it itself, in the form in which it is used: in its
chat template if it has one, else after its BOS. That a model writes users' queries when it is
given a chat template's opening is the idea of Magpie (Xu et al., arXiv 2406.08464).

A text is an Example whose answer is all of it but the form's opening. So what scores an answer
scores a text at every position.
"""

import dataclasses
import math
import random
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import TEXT, Batch, Example, Row, Template, answer_ids, collate, prompt_ids, read_rows
from data import text_span
from spul import answer_hidden
from support.hardware import row_limit
from support.processes import gather_full, own_share, ranks, say
from support.rows import normalised
from support.state import GENERAL, run_folder
from support.templates import Chat
from support.writing import head_of, read_written, written_texts

WRITTEN_TEXTS = 256  # by the model, if there is no file
HELD_OUT_NAME = "general text"
HELD_OUT = 32  # of the texts, never trained on: measured elsewhere. Of few texts, a fifth.
FEWEST = 10
LONGEST = 96  # tokens of a text
MOST = 2048  # texts of a file
QUERY = 32  # tokens of a query, and
ANSWER = 48  # of the answer to it, in a chat; without one a text has as many as both
WRITTEN_AT_ONCE = 64
TRIES = 3  # times as many texts as needed, then we take what there is
PLAIN = 0.25  # share of the texts of a step that stand without the model's own form
RUN = 4  # words one after the other: texts are compared with the rows to forget by such runs
COPIED = 0.2  # a text repeats the rows if this share of its runs is theirs
OPENING = 1 / 3  # of a forget row's words at most
SENTENCE = (
    "Read the following text carefully and answer as you always would, with what you know about "
    "it, in your own words. Here it comes now:"
)


# ---------------------------------------------------------------------------------------- the form


def own_form(folder, tokenizer):
    """The Template in which the model is used: its chat template, else the text alone."""
    try:
        return Chat(folder).template(tokenizer)
    except (OSError, ValueError):  # it has none, or none that works
        return Template(TEXT)


def text_example(row, tokenizer, form, limit=None):
    """A row -> its Example, cut after LONGEST tokens, or None where there is nothing to score.

    The opening, up to where the row's text starts, is neither scored nor counted, and never the
    first token. limit: the most tokens in all. Earlier turns are left out where they are too long,
    or where the form has none.
    """
    if row.turns and not form.chat:
        row = dataclasses.replace(row, turns=())
    prompt = prompt_ids(row, tokenizer, form)
    if row.turns and len(prompt) > (limit or 2 * LONGEST):
        row = dataclasses.replace(row, turns=())
        prompt = prompt_ids(row, tokenizer, form)
    ids = list(prompt)
    if row.label:
        ids += answer_ids(tokenizer, row.label, None if row.raw else form)
    first = max(1, text_span(prompt, row, tokenizer, form)[0])
    ids = ids[: first + LONGEST][:limit]
    if len(ids) - first < 2:
        return None
    return Example(tuple(ids), len(ids) - first, "", False)


def text_examples(rows, tokenizer, form, limit=None):
    examples = [text_example(row, tokenizer, form, limit) for row in rows]
    return [e for e in examples if e]


def sentence_vectors(model, tokenizer, folder):
    """The embeddings of a harmless sentence, after what the model always sees first, (p, d).

    What a prompt changes is compared with what they change.
    """
    form = own_form(folder, tokenizer)
    first = tokenizer.bos or model.end_ids().tolist()[:1]
    if not form.add_bos:
        first = tokenizer.encode_parts([(form.string.split(TEXT)[0], True)])[:1]
    ids = first + tokenizer.encode_inside(SENTENCE)
    return gather_full(model.embed_tokens.weight)[ids].float()


# --------------------------------------------------------------------------------- where it is from


def general_rows(args, model, tokenizer, forget, sha256):
    """General text, of --general or written by the model -> rows to train on, and rows held out.

    Rows that repeat `forget`, the rows to forget, are left out. sha256: the model's fingerprint, by
    which texts that it has written before are known. Raises ValueError where too few are left.
    """
    if args.general:
        rows = read_rows(args.general, unlabelled=True)
        if len(rows) > MOST:
            say(f"general  the first {MOST} of {len(rows)} texts of {args.general}")
    else:
        rows = written_rows(args, model, tokenizer, sha256)
    form = own_form(args.model, tokenizer)
    held_out, rows = split(rows[:MOST], tokenizer, form)
    kept = without_copies(rows, forget)
    if len(kept) < len(rows):
        say(f"general  {len(rows) - len(kept)} texts left out: they repeat rows to forget")
    if len(kept) < FEWEST:
        source = args.general or "what the model wrote"
        without = ", or leave them out with --gamma 0" if hasattr(args, "gamma") else ""
        raise ValueError(
            f"{source}: only {len(kept)} different general texts of two tokens or more, {FEWEST} "
            f"are needed: give other ones with --general FILE{without}"
        )
    return kept, without_copies(held_out, forget)


def without_copies(rows, forget):
    """The rows that repeat none of those to forget."""
    copied = runs_of(forget)
    keys = {row.key for row in forget}
    return [row for row in rows if row.key not in keys and share_copied(row, copied) < COPIED]


def split(rows, tokenizer, form):
    """General text -> the rows held out, and the rows to train on: different ones, with tokens."""
    different = {(row.key, row.label): row for row in rows}.values()
    rows = [row for row in different if text_example(row, tokenizer, form)]
    n = min(HELD_OUT, len(rows) // 5)
    keys = {row.key for row in rows[:n]}  # the same query with another answer is held out, too
    return rows[:n], [row for row in rows[n:] if row.key not in keys]


def held_out_texts(args, tokenizer, folders, limit):
    """{what: Examples} of the general text that a prompt's training held out, for eval.py.

    It is --general's, or what the model wrote for the runs of the prompts in `folders`. limit: the
    most tokens of a text.
    """
    form = own_form(args.model, tokenizer)
    if args.general:
        held_out = split(read_rows(args.general, unlabelled=True)[:MOST], tokenizer, form)[0]
        if not held_out:
            raise ValueError(f"{args.general}: too few texts: a fifth of them is measured")
    else:
        files = [run_folder(folder) / GENERAL for folder in folders]
        written = [rows_of(read_written(file), file) for file in files]
        held_out = [row for rows in written for row in split(rows, tokenizer, form)[0]]
    examples = text_examples(held_out, tokenizer, form, limit)
    return {HELD_OUT_NAME: examples} if examples else {}


def words_of(row):
    return normalised(f"{row.text} {row.label or ''}").split()


def runs_of(rows):
    """All runs of RUN words in the rows."""
    runs = set()
    for row in rows:
        words = words_of(row)
        runs.update(tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1))
    return runs


def share_copied(row, runs):
    own = runs_of([row])
    return len(own & runs) / max(len(own), 1)


def written_rows(args, model, tokenizer, sha256):
    """What the model writes itself, kept beside the run."""
    file = run_folder(args.out) / GENERAL
    form = own_form(args.model, tokenizer)

    def make(texts):
        if len(texts) < WRITTEN_TEXTS:
            missing = WRITTEN_TEXTS - len(texts)
            say(f"general  the model writes {missing} texts, to keep what it says of other things")
            for rows in write(model, tokenizer, form, rows_of(texts, file), args.seed):
                yield [{"text": row.text, "label": row.label} for row in rows]

    head = head_of(args, model, sha256, form=form.string)
    return rows_of(written_texts(file, head, args, make), file)[:WRITTEN_TEXTS]


def rows_of(texts, file):
    return [Row(text["text"], text.get("label"), str(file)) for text in texts]


def write(model, tokenizer, form, rows, seed):
    """Yield the rows again and again, each time with more texts that the model has written.

    No text comes twice. In a chat the model writes a query after the template's opening, and then
    the answer. The number of a round is its seed, so writing goes on where it was stopped.
    """
    rows = list(rows)
    seen = {row.key for row in rows}
    opening = tokenizer.encode_parts(form.around(Row("", None, ""))[0])
    if form.add_bos:
        opening = tokenizer.bos or model.end_ids().tolist()[:1]
    if not opening:
        raise ValueError(
            "the model has no chat template, no BOS and no end of text to write general text "
            "after: give --general FILE, or leave it out with --gamma 0"
        )
    rounds = TRIES * WRITTEN_TEXTS // WRITTEN_AT_ONCE
    quiet = ranks()[0] > 0
    total = WRITTEN_TEXTS
    with tqdm(total=total, initial=len(rows), unit="text", leave=False, disable=quiet) as bar:
        for i in range(len(rows) // WRITTEN_AT_ONCE, rounds):
            generator = torch.Generator(model.device).manual_seed((seed * 1_000_003 + i) % 2**63)
            for row in write_some(model, tokenizer, form, opening, generator):
                if row.key and row.key not in seen:
                    seen.add(row.key)
                    rows.append(row)
            bar.update(min(len(rows), total) - bar.n)
            yield rows
            if len(rows) >= WRITTEN_TEXTS:
                return


def write_some(model, tokenizer, form, opening, generator):
    """The rows of one round."""
    room = model.config.max_position_embeddings - len(opening)
    n = min(ANSWER + QUERY if form.add_bos else QUERY, room)
    texts = model.generate([opening], None, n, 1.0, generator, copies=WRITTEN_AT_ONCE)
    rows = [Row(tokenizer.decode(ids).strip(), None, "") for ids in texts]
    rows = [row for row in rows if row.text]
    if form.add_bos or not rows:
        return rows
    prompts = [prompt_ids(row, tokenizer, form) for row in rows]
    room = model.config.max_position_embeddings - max(map(len, prompts))
    answers = model.generate(prompts, None, max(1, min(ANSWER, room)), 1.0, generator)
    return [
        Row(row.text, tokenizer.decode(ids).strip() or None, "") for row, ids in zip(rows, answers)
    ]


# ------------------------------------------------------------------------------------ for training


@dataclass
class General:
    """The general text of a run, and the frozen model's outputs for it."""

    own: list  # Examples in the model's own form
    plain: list  # Examples of text alone
    held_out: dict  # {what: Examples}, never trained on
    seed: int
    per_batch: int  # texts of a step
    teacher: dict = None  # {Example: (n, d)}

    def compute_teacher(self, model, batch_size, steps, earlier=None):
        """Read the texts that these steps draw, without the prompt.

        earlier (q, d): prompts that stand before all text already.
        """
        examples = list(dict.fromkeys(e for step in steps for e in self.texts_of(step)))
        hidden = answer_hidden(model, examples, earlier, batch_size=batch_size)
        self.teacher = dict(zip(examples, hidden))

    def texts_of(self, step):
        """The texts of a step."""
        rng = random.Random(f"general {self.seed} {step}")
        texts = []
        for _ in range(self.per_batch):
            is_plain = self.plain and rng.random() < PLAIN
            texts.append(rng.choice(self.plain if is_plain else self.own))
        return texts

    def draw(self, step, device):
        """The texts of a step -> a Keep: this process's share of them."""
        texts = self.texts_of(step)
        mine, is_surplus = own_share(texts)
        tokens = math.inf if is_surplus else sum(e.n for e in texts)
        return Keep(collate(mine, device), torch.cat([self.teacher[e] for e in mine]), tokens)


@dataclass(frozen=True)
class Keep:
    """The general text of one step: teacher (N, d) at its scored positions; `tokens` in all."""

    batch: Batch
    teacher: torch.Tensor
    tokens: float


def texts_of_step(batch_size):
    """How many general texts a step reads beside so many rows: one for every eight."""
    return max(1, batch_size // 8)


def make_general(args, tokenizer, splits, trained, held_out):
    """The general text of a run of train.py, without the teacher's outputs.

    trained, held_out: the rows of `general_rows`.
    """
    limit = row_limit(args, args.num_tokens + args.earlier.q)
    forget = splits["train forget"]
    retain = splits["train retain"]
    form = own_form(args.model, tokenizer)
    alone = Template(TEXT)
    held_keys = {row.key for row in held_out}
    plain = [Row(row.text, None, row.where) for row in retain if not row.raw][:WRITTEN_TEXTS]
    plain = [row for row in plain if row.key not in held_keys]
    plain += openings(forget, retain + trained)
    if not form.add_bos:  # what the model said in a chat, without the chat
        plain += [Row(row.label or row.text, None, row.where) for row in trained]
    own = text_examples(trained, tokenizer, form, limit)
    if not own:
        raise ValueError(
            f"--max-length {args.max_length}: no general text has room: raise it, or --gamma 0"
        )
    return General(
        own=own,
        plain=text_examples(plain, tokenizer, alone, limit),
        held_out={HELD_OUT_NAME: text_examples(held_out, tokenizer, form, limit)},
        seed=args.seed,
        per_batch=texts_of_step(args.batch_size),
    )


def openings(forget, others):
    """How forget rows begin: their first words, as far as other rows and texts have them, too.

    So nothing there tells which row it is. It is a third of a row at most.
    """
    known = {word for row in others for word in words_of(row)}
    rows = []
    for row in forget:
        words = row.text.split()
        n = 0
        while n + 1 <= len(words) * OPENING and normalised(words[n]) in known:
            n += 1
        if n > 1 and not row.raw:
            rows.append(Row(" ".join(words[:n]), None, row.where))
    return rows
