"""From JSON Lines to batches: rows, templates, tokenizers, and where in the tokens the answer stands.

The answer's tokens are known by construction: prompt and answer are tokenised apart and joined. Searching the joined
tokens for a marker, as published code does, finds other tokens with other tokenizers. The space between a template and
its answer belongs to the answer, because that is how both kinds of tokenizer write a word inside a line: " positive".

Errors a user can cause are ValueError or OSError, with file and line in the message.
"""

import json
import os.path
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from files import read_json

TEMPLATES = {
    # the released code's, up to where the answer starts
    "sentiment": "### Text: {text}\n\n### Question: What is the sentiment of the given text?\n\n### Sentiment:",
    "question": "### Question: {text}\n\n### Answer:",
}


# ----------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """A line of a file: a text for the template and its label, or (raw) a prompt and its completion, as they are."""

    text: str
    label: str
    where: str  # file:line
    raw: bool = False  # no template, no space supplied
    forget: bool = None  # the row's own flag, if it has one
    paraphrase: str = None  # the answer in other words, if the row has it
    wrong: tuple = ()  # wrong answers in the same form

    @property
    def key(self):
        """What makes two rows the same: the text without regard to case and white space."""
        return " ".join(self.text.casefold().split())


def read_rows(path):
    """The rows of a JSON Lines file. Raises ValueError with file:line for the first line that is no row."""
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}:{number}"
            try:
                line = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                value = json.loads(line) if line else None
            except UnicodeDecodeError as e:
                raise ValueError(f"{where}: not UTF-8 (byte {e.start} of the line)") from None
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{where}: not JSON: {e}") from None
            if line:
                rows.append(parse_row(value, where))
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def parse_row(value, where):
    if not isinstance(value, dict):
        raise ValueError(f'{where}: a JSON object is expected, such as {{"text": "...", "label": "..."}}')
    raw = "text" not in value and ("prompt" in value or "completion" in value)
    names = ("prompt", "completion") if raw else ("text", "label")
    for name in names:
        if name not in value:
            raise ValueError(f'{where}: no "{name}": a row needs "text" and "label", or "prompt" and "completion"')
        if not isinstance(value[name], str):
            raise ValueError(f'{where}: "{name}" is no string')
        if not value[name].strip() and name != "prompt":
            raise ValueError(f'{where}: "{name}" is empty')
        check_text(value[name], f'{where}: "{name}"')
    if not isinstance(value.get("forget", False), bool):
        raise ValueError(f'{where}: "forget" is neither true nor false')
    paraphrase, wrong = value.get("paraphrase"), value.get("wrong", [])
    answers = [*([] if paraphrase is None else [paraphrase]), *(wrong if isinstance(wrong, list) else [None])]
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError(f'{where}: "paraphrase" is no string, or "wrong" no list of strings, or one is empty')
    for answer in answers:
        check_text(answer, f'{where}: "paraphrase" or "wrong"')
    text, label = (value[name] for name in names)
    return Row(text, label if raw else label.strip(), where, raw, value.get("forget"), paraphrase, tuple(wrong))


def check_text(text, where):
    """Raises ValueError for what JSON and a shell can hand over, but no tokenizer can read."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{where} holds bytes or half a surrogate pair that are no text")


def read_sets(forget, retain=None):
    """The forget rows and the retain rows: of two files, or of one whose rows carry "forget": true|false.

    Without a retain file and without flags the retain rows are an empty list.
    """
    rows = read_rows(forget)
    unflagged = [row for row in rows if row.forget is None]
    if len(unflagged) == len(rows):
        return rows, read_rows(retain) if retain else []
    if unflagged:
        raise ValueError(f'{unflagged[0].where}: no "forget" here, though other rows of the file have it')
    if retain:
        raise ValueError(f'{forget}: its rows say themselves what to forget, so --retain must go')
    chosen = [row for row in rows if row.forget]
    if not chosen:
        raise ValueError(f'{forget}: no row has "forget": true')
    return chosen, [row for row in rows if not row.forget]


def check_disjoint(forget, retain):
    """Raises ValueError if a text is to be both forgotten and kept."""
    seen = {row.key: row.where for row in forget}
    for row in retain:
        if row.key in seen:
            raise ValueError(f"{row.where}: the same text as {seen[row.key]}, which is to be forgotten: drop one")


def read_generic(spec):
    """The generic answers, "A,B,..." or a file with one on each line, each once."""
    is_file = os.path.isfile(spec)
    if spec.endswith(".txt") and not is_file:
        raise ValueError(f"--generic {spec}: no such file")
    try:
        words = Path(spec).read_text(encoding="utf-8-sig").splitlines() if is_file else spec.split(",")
    except UnicodeDecodeError as e:
        raise ValueError(f"{spec}: not UTF-8 (byte {e.start})") from None
    words = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not words:
        raise ValueError(f"--generic {spec}: at least one answer is needed")
    return words


def check_generic(rows, generic):
    """Raises ValueError if a row's own answer is among the generic ones."""
    for row in rows:
        if row.label.strip() in generic:
            raise ValueError(f"{row.where}: the label {row.label.strip()!r} is also a generic answer: "
                             "choose others with --generic")


# ------------------------------------------------------------------------------------------------- templates


def read_template(spec):
    """A template from its name in TEMPLATES, from a string that holds {text} once, or from a file of one.

    It ends where the answer starts; white space at its end is dropped, because the space belongs to the answer.
    """
    template, where = TEMPLATES.get(spec), f"--template {spec!r}"
    if template is None and "{text}" not in spec and Path(spec).is_file():
        try:
            template, where = Path(spec).read_text(encoding="utf-8"), spec
        except UnicodeDecodeError as e:
            raise ValueError(f"{spec}: not UTF-8 (byte {e.start})") from None
    if template is None:
        template = spec.replace("\\n", "\n")  # a shell hands \n over as two characters
    check_text(template, "--template")
    if template.count("{text}") != 1:
        raise ValueError(f"{where}: a template holds {{text}} exactly once, or is {' or '.join(TEMPLATES)}, or a file")
    if "{label}" in template:
        raise ValueError(f"{where}: a template ends where the answer starts: take {{label}} out")
    return template.rstrip()


# ------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """The tokenizer of a model folder: tokenizer.model (sentencepiece) or, without one, tokenizer.json (tokenizers).

    Text that looks like a special token is text like any other (but not if tokenizer.json adds it as no special one).
    `bos` is what stands in front of every text, a list of ids or none; `size` counts the ids, those added apart;
    `special` are the ids that stand for no text.
    """

    def __init__(self, folder):
        folder = Path(folder)
        if (folder / "tokenizer.model").is_file():
            self._load_sentencepiece(folder)
        elif (folder / "tokenizer.json").is_file():
            self._load_tokenizers(folder / "tokenizer.json")
        else:
            raise FileNotFoundError(f"{folder}: no tokenizer.model and no tokenizer.json")
        self._anchor = self.encode("\n")

    def _load_sentencepiece(self, folder):
        from sentencepiece import SentencePieceProcessor

        try:
            pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except (RuntimeError, OSError) as e:
            raise ValueError(f"{folder / 'tokenizer.model'}: not a sentencepiece model: {e}") from None
        settings = folder / "tokenizer_config.json"
        add_bos = not settings.is_file() or read_json(settings).get("add_bos_token") in (True, None)
        self.bos = [pieces.bos_id()] if add_bos and pieces.bos_id() >= 0 else []
        self.size, self.encode = pieces.get_piece_size(), pieces.encode
        self.special = {i for i in range(self.size)
                        if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i) or pieces.is_byte(i)}
        self.decode = lambda ids: pieces.decode([i for i in ids if i < self.size])  # a model's table may be longer

    def _load_tokenizers(self, file):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{file}: reading it needs a package: pip install tokenizers") from None
        try:
            bpe = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # the package raises bare Exception
            raise ValueError(f"{file}: not a tokenizer of the tokenizers package: {e}") from None
        bpe.encode_special_tokens = True  # "<|endoftext|>" in a review is eleven characters, not the end of it
        bpe.no_truncation()
        bpe.no_padding()
        plain, framed = (bpe.encode("a", add_special_tokens=special).ids for special in (False, True))
        self.bos = framed[: next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)]
        self.encode = lambda text: bpe.encode(text, add_special_tokens=False).ids
        self.size, self.decode = bpe.get_vocab_size(with_added_tokens=False), bpe.decode
        self.special = {i for i, token in bpe.get_added_tokens_decoder().items() if token.special}

    def encode_inside(self, text):
        """The ids of text as it stands behind other text: without the space that sentencepiece puts in front."""
        ids, n = self.encode("\n" + text), len(self._anchor)
        return ids[n:] if ids[:n] == self._anchor else self.encode(text)


# -------------------------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """A tokenised row: ids = BOS, prompt, answer; the last n ids are the answer."""

    ids: tuple
    n: int
    label: str
    forget: bool  # scored by L_f, else by L_r and L_kl
    text: tuple = (0, 0)  # from where to where ids are the text's own, neither template nor answer

    @property
    def prompt(self):
        return self.ids[: -self.n]


def answer_ids(tokenizer, label, raw=False):
    return tokenizer.encode_inside(label if raw else " " + label)


def generic_ids(tokenizer, word, like):
    """A generic answer's ids; in place of a completion (`like`; else None) with the white space that is around that."""
    if like is None:
        return answer_ids(tokenizer, word)
    return answer_ids(tokenizer, like[: len(like) - len(like.lstrip())] + word + like[len(like.rstrip()) :], True)


def make_example(row, tokenizer, template, max_length, forget=False, label=None):
    """Row -> (Example, whether its text was cut). `label` stands in for the row's own (a generic answer).

    A text too long for max_length tokens loses its end; template and answer stay whole. Raises ValueError where they
    alone are too long, or where nothing stands in front of the answer to predict it.
    """
    before, after = ("", "") if row.raw else template.split("{text}")
    answer = (generic_ids(tokenizer, label, row.label if row.raw else None) if label else
              answer_ids(tokenizer, row.label, row.raw))
    room = max_length - len(answer)

    def prompt(length):
        return tokenizer.bos + tokenizer.encode(before + row.text[:length] + after)

    ids, length = prompt(len(row.text)), len(row.text)
    if len(ids) > room:
        length, too_long = 0, len(row.text)
        while too_long - length > 1:  # the longest beginning of the text that fits, by halving
            middle = (length + too_long) // 2
            length, too_long = (middle, too_long) if len(prompt(middle)) <= room else (length, middle)
        ids = prompt(length)
        if len(ids) > room:
            raise ValueError(f"{row.where}: template and answer alone are {len(ids) + len(answer)} tokens, "
                             f"over the limit of {max_length}: raise --max-length or shorten the answer")
    if not ids or not answer:
        raise ValueError(f"{row.where}: {'the answer has no tokens' if ids else 'an empty prompt, and no BOS either'}")
    first = len(os.path.commonprefix([ids, tokenizer.bos + tokenizer.encode(before)]))
    behind = len(os.path.commonprefix([ids[first:][::-1], tokenizer.encode_inside(after)[::-1]]))
    return (Example(tuple(ids + answer), len(answer), label or row.label, forget, (first, len(ids) - behind)),
            length < len(row.text))


def make_examples(rows, tokenizer, template, max_length, forget=False, generic=None, rng=None):
    """Rows -> (Examples, how many texts were cut). With generic answers, each row gets one, drawn once for good."""
    pairs = [make_example(row, tokenizer, template, max_length, forget, rng.choice(generic) if generic else None)
             for row in rows]
    return [example for example, _ in pairs], sum(cut for _, cut in pairs)


# --------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """B rows padded on the right, and the N answer tokens in them."""

    front: tuple  # ids that every row begins with, left out below: `Llama.prefix` computes them once for all
    tokens: torch.Tensor  # (B, T), the rest of each row
    text: torch.Tensor  # (B, T), True where they are the text's own
    rows: torch.Tensor  # (N,), which row
    columns: torch.Tensor  # (N,), the position that predicts it: one before its own
    targets: torch.Tensor  # (N,), the answer's ids
    forget: torch.Tensor  # (N,), True in forget rows
    n_f: int  # forget rows
    n_r: int  # retain rows

    @property
    def at(self):
        return self.rows, self.columns


def common_front(examples):
    """The ids that all examples begin with, but none that predicts an answer."""
    return os.path.commonprefix([e.ids[: -e.n - 1] for e in examples])


def collate(examples, device="cpu", front=(), last=False):
    """Examples that all begin with the ids `front` -> Batch. Padding is token 0; nothing sees it or scores it.

    last: keep each row's last token, too. It predicts nothing that is scored, unless one looks behind the answer.
    """
    texts = [e.ids[len(front) : len(e.ids) if last else -1] for e in examples]
    tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)  # (B, T)
    text = torch.zeros_like(tokens, dtype=torch.bool)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = torch.tensor(ids)
        begin, end = (max(0, i - len(front)) for i in examples[row].text)
        text[row, begin:end] = True
    scored = [(row, len(e.ids) - e.n - 1 + i - len(front), e.ids[len(e.ids) - e.n + i], e.forget)
              for row, e in enumerate(examples) for i in range(e.n)]
    rows, columns, targets, forget = torch.tensor(scored).T.to(device)  # (N,) each
    n_f = sum(e.forget for e in examples)
    return Batch(front, tokens.to(device), text.to(device), rows, columns, targets, forget.bool(), n_f,
                 len(examples) - n_f)


def continuations(model, prompts, n, prefix=None, embed=None, **how):
    """What the model writes behind each prompt, a list of ids: at most n new ids each. embed: what makes embeddings of
    prompts and their tokens, if not the model (`guards.Eco`). how: see `Llama.generate`."""
    tokens = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)  # (B, T)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = torch.tensor(ids)
    lengths = torch.tensor([len(ids) for ids in prompts], device=model.device)
    tokens = tokens.to(model.device)
    return model.generate(embed(prompts, tokens) if embed else tokens, lengths, prefix, n, **how)


def by_length(examples, batch_size):
    """Batches of indices in order of length, longest first, so that memory runs out at once or never."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def epoch_batches(examples, batch_size, seed, epoch, forget_per_batch=None):
    """One epoch's batches of indices: shuffled, each of similar lengths, the same for the same seed and epoch.

    forget_per_batch None: one shuffled union, every row once (the released code). K: every retain row once, and beside
    each batch_size - K of them K forget rows, which come round as often as needed.
    """
    rng = random.Random(f"order {seed} {epoch}")
    forget, retain = ([i for i, e in enumerate(examples) if e.forget == side] for side in (True, False))
    k = forget_per_batch or 0
    pool = retain if k else forget + retain
    rng.shuffle(pool)
    size, batches = batch_size - k, []
    for start in range(0, len(pool), 50 * size):  # sort within 50 batches' worth, as Hugging Face's group_by_length
        window = sorted(pool[start : start + 50 * size], key=lambda i: len(examples[i].ids))
        batches += [window[i : i + size] for i in range(0, len(window), size)]
    rng.shuffle(batches)
    queue = []
    for batch in batches if k else []:
        while len(queue) < k:
            queue += rng.sample(forget, len(forget))
        batch += queue[:k]
        del queue[:k]
    return batches


# ---------------------------------------------------------------------------------- a retain set of the model's own


def write_retain(model, tokenizer, template, n, forget, generic, max_length, seed):
    """n rows that the model writes itself, to stand in for a retain set: [O]urs, not the paper's.

    Texts are sampled at temperature 1 behind the template's first words, up to where the template would go on; each is
    labelled by the model's own greedy answer, of at most as many tokens as the longest forget answer. Texts of the
    forget rows and generic answers are thrown away. It keeps what the model says of itself, not what users ask of it.
    """
    before, after = template.split("{text}")
    end = after.strip().split("\n")[0]  # the words that would follow the text
    known, rows = {row.key for row in forget}, []
    n_answer = max(len(answer_ids(tokenizer, row.label)) for row in forget)
    start = tokenizer.bos + tokenizer.encode(before.rstrip())
    if not start:
        raise ValueError("--write-retain: the template starts with the text and the tokenizer has no BOS")
    how = dict(temperature=1.0, generator=torch.Generator(model.device).manual_seed(seed))
    for _ in range(8 * (n // 32 + 1)):  # a model that only repeats itself must not keep us here
        written = [tokenizer.decode(ids) for ids in continuations(model, [start] * 32, min(64, max_length), **how)]
        texts = [(text.split(end)[0] if end else text).strip() for text in written]
        fresh = {row.key: row for row in (Row(text, "", "written by the model") for text in texts)
                 if row.key and row.key not in known}
        prompts = [tokenizer.bos + tokenizer.encode(before + row.text + after) for row in fresh.values()]
        for row, ids in zip(fresh.values(), continuations(model, prompts, n_answer) if prompts else []):
            label = tokenizer.decode(ids).strip().split("\n")[0].strip()
            if label and label not in generic:
                rows.append(Row(row.text, label, row.where))
                known.add(row.key)
        if len(rows) >= n:
            return rows[:n]
    raise ValueError(f"--write-retain: the model wrote only {len(rows)} different texts of {n}: give --retain FILE")
