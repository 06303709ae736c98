"""Retain rows that the model writes or labels itself (our addition, not in the paper)."""

import dataclasses
import hashlib
import json

from data import Row, answer_ids, make_example, read_rows
from support import neighbours
from support.files import read_text, write_text
from support.form import without_template
from support.hardware import row_limit
from support.processes import say
from support.state import TEXTS, WRITTEN, run_folder
from support.writing import head_of, written_texts

TRAINED = "train retain"
BACK = "written retain, kept back"
OTHER_KIND = "written retain, another kind"
ROWS_EACH = 3  # rows to write for each to forget,
FEWEST_ROWS, MOST_ROWS = 256, 2048
FEWEST = 10
KEPT_BACK = 64  # rows never trained on, and as many of a kind that is never trained on
AT_ONCE = 32  # rows labelled


def asked_of_model(args, splits):
    """What the model has to write or to label: a resumed run has to ask for the same."""
    given = splits.get("train retain")
    return [(row.key, row.label) for row in given] if given else args.write_retain


def own_retain(args, splits, model, tokenizer, sha256, general):
    """{split: rows} that the model has to write or label, or has in an earlier part of the run.

    They are all retain rows if it does any of it, and {} if it does not. Of rows that it writes
    some are for measuring. sha256: the model's fingerprint. general: rows of general text, if any.
    """
    given = splits.get(TRAINED)
    if given and all(row.label is not None for row in given):
        return {}
    file = run_folder(args.out) / WRITTEN
    if file.exists() and args.resume:
        return read_kept(file)
    if not given:
        return write_retain(args, splits["train forget"], model, tokenizer, sha256, general)
    unlabelled = sum(row.label is None for row in given)
    say(f"retain   {unlabelled} rows have no label: the model's own answer takes its place")
    rows = label_rows(args, splits["train forget"], model, tokenizer, given)
    if len(rows) < len(given):
        say(
            f"retain   {len(given) - len(rows)} of them left out: the model gives no answer, "
            "or a generic one"
        )
    if not rows:
        raise ValueError(f"{given[0].where}: the model answers none of the rows to retain")
    return {TRAINED: rows}


def rows_to_write(args, forget):
    """How many rows to retain the model writes, if there are none: to train on, and to measure."""
    n = args.write_retain or min(max(FEWEST_ROWS, ROWS_EACH * len(forget)), MOST_ROWS)
    return n, 2 * min(KEPT_BACK, n // 5)


def write_retain(args, forget, model, tokenizer, sha256, general):
    """{split: rows}: texts like those to forget, which the model writes and labels itself.

    A template that all rows have stands around the texts. Of each kind that is trained on some are
    kept back, and one whole kind. general: rows of general text, if any. Raises ValueError if there
    are too few texts.

    This keeps what the model says of itself, not what users ask of it.
    """
    n, measured = rows_to_write(args, forget)
    back = measured // 2
    before, after, inner = without_template(forget)
    ordinary = [f"{row.text} {row.label or ''}" for row in general]
    file = run_folder(args.out) / TEXTS
    say(
        f"no --retain: the model writes {n} texts like those to forget, and labels them (kept in "
        f"{file.parent}). Real rows are better: these keep what the model says, not what you ask."
    )

    def make(lines):
        texts = [neighbours.Written(**line) for line in lines]
        for texts in neighbours.write(
            model, tokenizer, args.model, inner, ordinary, n + measured, args.seed, texts
        ):
            yield [dataclasses.asdict(written) for written in texts]

    shown = before, after, [row.text for row in inner]
    rows_sha256 = hashlib.sha256(repr(shown).encode()).hexdigest()
    head = head_of(args, model, sha256, forget=rows_sha256)
    texts = [neighbours.Written(**line) for line in written_texts(file, head, args, make)]
    kept = neighbours.usable(texts, inner, ordinary)
    trained = [written.text for written in kept if written.kind != neighbours.HELD_OUT_KIND]
    others = [written.text for written in kept if written.kind == neighbours.HELD_OUT_KIND]
    identifying = neighbours.identifying_words(texts, inner, ordinary)
    made = neighbours.without_identity(inner, identifying)

    def labelled(texts):
        raw = forget[0].raw
        texts = [before + text + after for text in texts]
        rows = [Row(text, None, "written by the model", raw=raw) for text in texts]
        return label_rows(args, forget, model, tokenizer, rows)

    splits = {
        TRAINED: labelled(trained[back:] + made),
        BACK: labelled(trained[:back]),
        OTHER_KIND: labelled(others[:back]),
    }
    if len(splits[TRAINED]) < min(FEWEST, n):
        raise ValueError(
            f"--write-retain: the model wrote only {len(splits[TRAINED])} different texts of {n}: "
            "give --retain FILE"
        )
    return {name: rows for name, rows in splits.items() if rows}


def label_rows(args, forget, model, tokenizer, rows):
    """The rows with the model's greedy answer as their label, where they have none.

    It is no longer than the longest forget answer; of it the first line, unless the template is a
    chat's. Rows that the model does not answer, or with a generic answer, are left out.
    """
    template = args.template
    limit = row_limit(args, args.num_tokens)
    longest_row = max(forget, key=lambda row: len(row_answer(tokenizer, row, template)))
    longest = len(row_answer(tokenizer, longest_row, template))
    labelled = [row for row in rows if row.label is not None]
    without = [row for row in rows if row.label is None]
    for start in range(0, len(without), AT_ONCE):
        part = without[start : start + AT_ONCE]
        prompts = []
        for row in part:
            full = dataclasses.replace(row, label=longest_row.label)  # so that the answer has room
            prompts.append(make_example(full, tokenizer, template, limit)[0].prompt)
        for row, ids in zip(part, model.generate(prompts, None, longest)):
            label = tokenizer.decode(ids).strip()
            label = label if template.end else label.split("\n")[0].strip()
            is_text = label and "\ufffd" not in label  # that stands for bytes that are none
            if is_text and label not in args.generic:
                label = with_space(tokenizer, label, ids) if row.raw else label
                labelled.append(dataclasses.replace(row, label=label))
    return labelled


def with_space(tokenizer, label, ids):
    """A completion with the white space before it that the generated ids begin with.

    Decoding drops it, with some tokenizers.
    """
    for space in ("", " ", "\n"):
        if tokenizer.encode_inside(space + label)[:1] == ids[:1]:
            return space + label
    return label


def row_answer(tokenizer, row, template):
    return answer_ids(tokenizer, row.label, None if row.raw else template)


def row_to_json(row):
    """A row as `data.read_rows` reads it."""
    if row.raw:
        return {"prompt": row.text, "completion": row.label}
    if not row.is_chat:
        return {"text": row.text, "label": row.label}
    turns = [*row.turns, ("user", row.text), ("assistant", row.label)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def keep_rows(out, splits):
    """Keep the rows that the model wrote or labelled beside the prompt in `out`, if any."""
    lines = []
    for name, rows in splits.items():
        lines += [json.dumps({**row_to_json(row), "split": name}) + "\n" for row in rows]
    if lines:
        write_text(run_folder(out) / WRITTEN, "".join(lines))


def read_kept(file):
    """{split: rows} of a file that `keep_rows` wrote."""
    splits = {}
    lines = [json.loads(line) for line in read_text(file).split("\n") if line]
    for row, line in zip(read_rows(file), lines):
        splits.setdefault(line["split"], []).append(row)
    return splits
