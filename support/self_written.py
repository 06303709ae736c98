"""Retain rows that the model writes or labels itself (our addition, not in the paper)."""

import dataclasses
import json

import torch

from data import Row, answer_ids, make_example, read_rows
from support.files import write_text
from support.hardware import row_limit
from support.processes import say
from support.state import WRITTEN, run_folder

TEMPERATURE = 1.0
TOKENS = 64  # of a text at most
TEXTS = 32  # written at once
TRIES = 8  # times as many texts as needed, then we give up: some models only repeat themselves


def asked_of_model(args, splits):
    """What the model has to write or to label: a resumed run has to ask for the same."""
    given = splits.get("train retain")
    return [(row.key, row.label) for row in given] if given else args.write_retain


def own_retain(args, splits, model, tokenizer):
    """The retain rows that the model has to write or label, or has in an earlier part of the run.

    They are all retain rows if it does any of it, and [] if it does not.
    """
    given = splits.get("train retain")
    if given and all(row.label is not None for row in given):
        return []
    file = run_folder(args.out) / WRITTEN
    if file.exists() and args.resume:
        return read_rows(file)
    limit = row_limit(args, args.num_tokens)
    forget = splits["train forget"]
    if given:
        unlabelled = sum(row.label is None for row in given)
        say(f"retain   {unlabelled} rows have no label: the model's own answer takes its place")
        rows = label_rows(model, tokenizer, args.template, given, forget, args.generic, limit)
        if len(rows) < len(given):
            say(
                f"retain   {len(given) - len(rows)} of them left out: the model gives no answer, "
                "or a generic one"
            )
        if not rows:
            raise ValueError(f"{given[0].where}: the model answers none of the rows to retain")
        return rows
    say(
        f"no --retain: the model writes {args.write_retain} texts and labels them itself (kept in "
        f"{file}). Real rows are better: these keep what the model says, not what you will ask."
    )
    return write_retain(
        model, tokenizer, args.template, args.write_retain, forget, args.generic, limit, args.seed
    )


def write_retain(model, tokenizer, template, n, forget, generic, max_length, seed):
    """n different rows that the model writes and labels itself.

    Texts are sampled after the template's first words, up to where the template would go on. The
    label is the model's own greedy answer, no longer than the longest forget answer. Texts of the
    forget rows and generic answers are left out. Raises ValueError if there are too few.

    This keeps what the model says of itself, not what users ask of it.
    """
    before, after = template.string.split("{text}")
    if template.add_bos:
        start = tokenizer.bos + tokenizer.encode_parts([(before.rstrip(), True)])
    else:
        start = tokenizer.encode_parts([(before, True)])
    if not start:
        raise ValueError("--write-retain: the template starts with the text, and there is no BOS")
    end = after.strip().split("\n")[0]  # the words that would follow the text
    generator = torch.Generator(model.device).manual_seed(seed)
    seen = {row.key for row in forget}
    rows = []
    for _ in range(TRIES * (n // TEXTS + 1)):
        texts = []
        for ids in model.generate(
            [start] * TEXTS, None, min(TOKENS, max_length), TEMPERATURE, generator
        ):
            text = tokenizer.decode(ids)
            texts.append(text.split(end)[0].strip() if end else text.strip())
        new = {}
        for text in texts:
            row = Row(text, None, "written by the model")
            if row.key and row.key not in seen:
                new[row.key] = row
        candidates = list(new.values())
        for row in label_rows(model, tokenizer, template, candidates, forget, generic, max_length):
            rows.append(row)
            seen.add(row.key)
        if len(rows) >= n:
            return rows[:n]
    raise ValueError(
        f"--write-retain: the model wrote only {len(rows)} different texts of {n}: "
        "give --retain FILE"
    )


def label_rows(model, tokenizer, template, rows, forget, generic, max_length):
    """The rows with the model's greedy answer as their label, where they have none.

    It is no longer than the longest forget answer; of it the first line, unless the template is a
    chat's. Rows that the model does not answer, or with a generic answer, are left out.
    """
    longest_row = max(forget, key=lambda row: len(row_answer(tokenizer, row, template)))
    longest = len(row_answer(tokenizer, longest_row, template))
    labelled = [row for row in rows if row.label is not None]
    without = [row for row in rows if row.label is None]
    for start in range(0, len(without), TEXTS):
        part = without[start : start + TEXTS]
        prompts = []
        for row in part:
            full = dataclasses.replace(row, label=longest_row.label)  # so that the answer has room
            prompts.append(make_example(full, tokenizer, template, max_length)[0].prompt)
        for row, ids in zip(part, model.generate(prompts, None, longest)):
            label = tokenizer.decode(ids).strip()
            label = label if template.end else label.split("\n")[0].strip()
            is_text = label and "\ufffd" not in label  # that stands for bytes that are none
            if is_text and label not in generic:
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


def keep_rows(out, rows):
    """Keep the rows that the model wrote or labelled beside the prompt in `out`, if any."""
    if rows:
        lines = [json.dumps(row_to_json(row)) + "\n" for row in rows]
        write_text(run_folder(out) / WRITTEN, "".join(lines))
