"""A substitute retain set that the model writes itself (our addition, not in the paper)."""

import torch

from data import Row, answer_ids

TEMPERATURE = 1.0
TOKENS = 64  # of a text at most
TEXTS = 32  # written at once
TRIES = 8  # times as many texts as needed, then we give up: some models only repeat themselves


def write_retain(model, tokenizer, template, n, forget, generic, max_length, seed):
    """n different rows that the model writes and labels itself.

    Texts are sampled after the template's first words, up to where the template would go on. The
    label is the model's own greedy answer, no longer than the longest forget answer. Texts of the
    forget rows and generic answers are left out. Raises ValueError if there are too few.

    This keeps what the model says of itself, not what users ask of it.
    """
    before, after = template.split("{text}")
    start = tokenizer.bos + tokenizer.encode(before.rstrip())
    if not start:
        raise ValueError("--write-retain: the template starts with the text, and there is no BOS")
    end = after.strip().split("\n")[0]  # the words that would follow the text
    generator = torch.Generator(model.device).manual_seed(seed)
    answer_length = max(len(answer_ids(tokenizer, row.label)) for row in forget)
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
            row = Row(text, "", "written by the model")
            if row.key and row.key not in seen:
                new[row.key] = row
        for row in label_rows(model, tokenizer, template, list(new.values()), answer_length):
            if row.label and row.label not in generic:
                rows.append(row)
                seen.add(row.key)
        if len(rows) >= n:
            return rows[:n]
    raise ValueError(
        f"--write-retain: the model wrote only {len(rows)} different texts of {n}: "
        "give --retain FILE"
    )


def label_rows(model, tokenizer, template, rows, answer_length):
    """The rows with the first line of the model's greedy answer as their label."""
    if not rows:
        return []
    prompts = []
    for row in rows:
        prompts.append(tokenizer.bos + tokenizer.encode(template.replace("{text}", row.text)))
    answers = model.generate(prompts, None, answer_length)
    labels = [tokenizer.decode(ids).strip().split("\n")[0].strip() for ids in answers]
    return [Row(row.text, label, row.where) for row, label in zip(rows, labels)]
