"""Rows as users have them: the forms that are read, and what is wrong with others.

Everything here raises ValueError with the place, file:line, and the remedy.
"""

import json
import re
import unicodedata
from pathlib import Path

from support.processes import say

# A row's form is known by the key of what is asked. Each has a key for the answer.
FORMS = {
    "text": "label",
    "sentence": "label",
    "question": "answer",
    "instruction": "output",
    "prompt": "completion",
    "messages": None,
}
ACCEPTED = (
    '"text" and "label", "sentence" and "label", "question" and "answer", "prompt" and '
    '"completion", "instruction", "input" and "output", or "messages"'
)

# How files begin that are no JSON: what they are, and what to do.
PARQUET = "datasets.Dataset.from_parquet(FILE).to_json('rows.jsonl') writes JSON Lines"
MAGIC = {
    b"PAR1": f"a parquet file: {PARQUET}",
    b"ARROW1": "an arrow file: datasets.Dataset.from_file(FILE).to_json('rows.jsonl') writes rows",
    b"\x1f\x8b": "compressed with gzip: gunzip it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "compressed with xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"PK\x03\x04": "a zip archive (xlsx files are that, too): unpack it, or save it as JSON Lines",
    b"\x80\x04": "a pickle, which can run code when read: save it as JSON Lines",
    b"\x80\x05": "a pickle, which can run code when read: save it as JSON Lines",
    b"\xff\xfe": "UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
}
CSV = "pandas.read_csv(FILE).to_json('rows.jsonl', orient='records', lines=True) writes JSON Lines"
FOLDER = "datasets.load_from_disk(FOLDER).to_json('rows.jsonl') writes the rows of a datasets folder"
INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF])


# ------------------------------------------------------------------------------------------- files


def read_fields(path):
    """The fields of each row of a file, dicts for data.Row.

    The file holds a JSON object on each line, or is a JSON array of objects.
    """
    rows = []
    converted = 0
    for where, value in read_values(path):
        fields = parse_row(value, where)
        fields["where"] = where
        converted += not isinstance(value.get(answer_key(value), ""), str | None)
        rows.append(fields)
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    if converted:
        say(f"{path}: {converted} labels are numbers or true and false: read as words")
    return rows


def read_values(path):
    """Yield the place, file:line, and the JSON value of each row."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder, and a file of rows is expected: {FOLDER}")
    content = path.read_bytes()
    for magic, what in MAGIC.items():
        if content.startswith(magic):
            raise ValueError(f"{path}: {what}")
    content = content.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    start = content.lstrip()[:1]
    if path.suffix in (".csv", ".tsv") and start not in (b"{", b"["):
        raise ValueError(f"{path}: a table of values: {CSV}")
    lines = content.split(b"\n")
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}:{number}: not UTF-8 (byte {e.start} of the line)") from None
    if start == b"[":
        yield from array_values("\n".join(texts), path)
        return
    for number, text in enumerate(texts, 1):
        where = f"{path}:{number}"
        if text.strip():
            try:
                yield where, json.loads(text)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{where}: not JSON: {e}") from None


def array_values(text, path):
    """Yield the place, file:line, and the value of each element of a JSON array."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(
            f"{path}:{e.lineno}: the file is a JSON array, and this is not JSON: {e.msg}"
        ) from None
    except RecursionError as e:
        raise ValueError(f"{path}: not JSON: {e}") from None
    decoder = json.JSONDecoder()
    gap = re.compile(r"[\s,\[]*")
    end = 0
    line = 1
    for value in values:
        start = gap.match(text, end).end()
        line += text.count("\n", end, start)
        yield f"{path}:{line}", value
        after = decoder.raw_decode(text, start)[1]
        line += text.count("\n", start, after)
        end = after


# -------------------------------------------------------------------------------------------- rows


def parse_row(value, where):
    """A JSON value -> the fields of a row; its label is None where it has none."""
    if not isinstance(value, dict):
        example = '{"text": "...", "label": "..."}'
        raise ValueError(f"{where}: a JSON object is expected, such as {example}")
    key = question_key(value, where)
    if not isinstance(value.get("forget", False), bool):
        raise ValueError(f'{where}: "forget" is neither true nor false')
    common = {"forget": value.get("forget"), **other_answers(value, where)}
    if key == "messages":
        return {**parse_messages(value["messages"], where), **common}
    raw = key == "prompt"
    check_field(value, key, where)
    text = value[key]
    if key == "instruction" and value.get("input"):
        check_field(value, "input", where)
        text = f"{text}\n\n{value['input']}"
    label = parse_label(value, FORMS[key], where)
    label = label if raw or label is None else label.strip()
    return {"text": text, "label": label, "raw": raw, **common}


def question_key(value, where):
    """Which form of row it is, by the key of what is asked."""
    found = [key for key in FORMS if key in value]
    if len(found) > 1:
        whole = [key for key in found if FORMS[key] is None or FORMS[key] in value]
        if len(whole) != 1:
            names = " and ".join(f'"{key}"' for key in found)
            raise ValueError(f"{where}: {names} in one row: keep one form of row")
        found = whole
    if found:
        return found[0]
    if "conversations" in value:
        raise ValueError(
            f'{where}: "conversations": write it as "messages", a list of "role" and "content"'
        )
    for key, answer in FORMS.items():  # the first that the row has half of
        if answer in value:
            raise ValueError(f'{where}: no "{key}": a row needs {ACCEPTED}')
    keys = ", ".join(f'"{key}"' for key in value) or "nothing"
    raise ValueError(f"{where}: {keys} in it: a row needs {ACCEPTED}")


def answer_key(value):
    """The key of a valid row's answer; None for messages."""
    keys = [key for key in FORMS if key in value]
    whole = [key for key in keys if FORMS[key] in value]
    return FORMS[(whole or keys)[0]]


def check_field(value, name, where):
    if not isinstance(value[name], str):
        raise ValueError(f'{where}: "{name}" is not a string')
    if not value[name].strip() and name != "prompt":
        raise ValueError(f'{where}: "{name}" is empty')
    check_text(value[name], f'{where}: "{name}"')


def parse_label(value, name, where):
    """The answer as a string. A whole number and true or false become their text."""
    label = value.get(name)
    if label is None:
        return None
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int):
        return str(label)
    if not isinstance(label, str):
        what = {float: "a number with a fraction", list: "a list", dict: "an object"}
        raise ValueError(
            f'{where}: "{name}" is {what[type(label)]} ({label}): a string, a whole number, true '
            "or false is expected"
        )
    check_field(value, name, where)
    return label


def parse_messages(messages, where):
    """A conversation -> its last user's text, the answer to it, and the turns before."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: "messages" is not a list of "role" and "content", or is empty')
    turns = [parse_turn(turn, f"{where}: message {i}") for i, turn in enumerate(messages, 1)]
    roles = [role for role, _ in turns]
    has_system = roles[0] == "system"
    expected = ["user", "assistant"] * len(roles)
    if roles[has_system:] != expected[: len(roles) - has_system] or roles[-1] == "system":
        order = ", ".join(roles)
        raise ValueError(
            f"{where}: the roles are {order}: expected are user and assistant in turn, with at "
            "most one system first"
        )
    label = turns.pop()[1] if roles[-1] == "assistant" else None
    if label is not None and not label.strip():
        raise ValueError(f"{where}: the last message, the answer, is empty")
    return {
        "text": turns[-1][1],
        "label": label and label.strip(),
        "turns": tuple(turns[:-1]),
        "is_chat": True,
    }


def parse_turn(turn, where):
    """A message -> its role and content."""
    role = turn.get("role") if isinstance(turn, dict) else None
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"{where}: its role is {role!r}: system, user and assistant are read")
    if turn.get("tool_calls"):
        raise ValueError(f"{where}: it calls a tool: only text is read")
    content = turn.get("content")
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
        if any(kind != "text" for kind in kinds):
            raise ValueError(f"{where}: its content is {', '.join(map(str, kinds))}: text is read")
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ValueError(f'{where}: "content" is not a string')
    check_text(content, where)
    return role, content


def other_answers(value, where):
    """The optional paraphrase and wrong answers of a row."""
    paraphrase = value.get("paraphrase")
    wrong = value.get("wrong", [])
    if paraphrase is not None and not is_filled(paraphrase):
        raise ValueError(f'{where}: "paraphrase" is not a string, or is empty')
    if not isinstance(wrong, list) or not all(map(is_filled, wrong)):
        raise ValueError(f'{where}: "wrong" is not a list of strings, or one of them is empty')
    for answer in (paraphrase or "", *wrong):
        check_text(answer, f'{where}: "paraphrase" or "wrong"')
    return {"paraphrase": paraphrase, "wrong": tuple(wrong)}


def is_filled(value):
    return isinstance(value, str) and value.strip() != ""


def check_text(text, where):
    """Refuses what JSON and a shell can hand over, but no tokenizer can read."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where} holds bytes or half a surrogate pair, which are not text")


# ------------------------------------------------------------------------------------ sets of rows


def normalised(text):
    """A text without what a reader does not see: case, white space, invisible characters."""
    text = unicodedata.normalize("NFC", text.translate(INVISIBLE).casefold())
    return " ".join(text.split())


def check_labelled(rows, what):
    """Refuses a row without its answer. what: the rows that need one, for the message."""
    for row in rows:
        if row.label is None:
            raise ValueError(
                f"{row.where}: no answer: {what} needs the answer that it has now. Only rows to "
                "retain may be without: the model's own answer takes its place"
            )


def check_disjoint(forget, retain):
    """Refuses a text that is to be both forgotten and kept."""
    seen = {row.key: row.where for row in forget}
    for row in retain:
        if row.key in seen:
            raise ValueError(
                f"{row.where}: the same text as {seen[row.key]}, which is to be forgotten: drop one"
            )


def check_rows(splits):
    """Refuse rows that are to be forgotten and kept; say which rows are there twice.

    splits: {"train forget": rows, ...}. Texts are compared as `normalised` leaves them.
    """
    check_disjoint(splits.get("train forget", []), splits.get("train retain", []))
    trained = {}
    for name, rows in splits.items():
        first = {}
        again = []
        unlike = []
        for row in rows:
            earlier = first.setdefault(row.key, row)
            if earlier is not row:
                again.append(row)
                if None not in (row.label, earlier.label) and row.label != earlier.label:
                    unlike.append(row)
        note(name, again, "rows that repeat an earlier text")
        note(name, unlike, "rows that repeat an earlier text with another label")
        if name.startswith("train"):
            trained |= first
        else:
            seen = [row for row in rows if row.key in trained]
            note(name, seen, "rows that are trained on, and so are not unseen")


def note(name, rows, what):
    if rows:
        say(f"{name}: {what}: {len(rows)} (the first is {rows[0].where})")
