"""Rows as users have them: the forms that are read, and what is wrong with others.

Everything here raises ValueError with the place, file:line, and the remedy.
"""

import json
import math
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

EXAMPLE = '{"text": "...", "label": "..."}'

# How files begin that are no JSON: what they are, and what to do.
PARQUET = "datasets.Dataset.from_parquet(FILE).to_json('rows.jsonl') writes JSON Lines"
ARROW = "datasets.Dataset.from_file(FILE).to_json('rows.jsonl') writes JSON Lines"
PANDAS = ".to_json('rows.jsonl', orient='records', lines=True) writes JSON Lines"
UTF16 = "UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"
MAGIC = {
    b"PAR1": f"a parquet file: {PARQUET}",
    b"\xff\xff\xff\xff": f"an arrow file, as datasets writes: {ARROW}",
    b"ARROW1": f"an arrow file: pandas.read_feather(FILE){PANDAS}",
    b"\x1f\x8b": "compressed with gzip: gunzip it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "compressed with xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"PK\x03\x04": "a zip archive (xlsx files are that, too): unpack it, or save it as JSON Lines",
    b"\x80": "a pickle, which can run code when read: save it as JSON Lines",
    b"\xff\xfe": UTF16,
    b"\xfe\xff": UTF16,
}
TABLES = {".csv": "pandas.read_csv(FILE)", ".tsv": r"pandas.read_csv(FILE, sep='\t')"}
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
        given = value.get(FORMS[question_key(value, where)])
        converted += not isinstance(given, str | None)
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
        raise ValueError(f"{path}: a folder, and a file of rows is expected{folder_hint(path)}")
    content = path.read_bytes()
    for magic, what in MAGIC.items():
        if content.startswith(magic):
            raise ValueError(f"{path}: {what}")
    content = content.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    start = content.lstrip()[:1]
    kind = path.suffix.lower()
    if kind in TABLES and start not in (b"{", b"["):
        raise ValueError(f"{path}: a table of values: {TABLES[kind]}{PANDAS}")
    lines = decode_lines(content, path)
    if start == b"[":
        yield from array_values("\n".join(lines), path)
        return
    for number, text in enumerate(lines, 1):
        where = f"{path}:{number}"
        if text.strip():
            try:
                yield where, json.loads(text)
            except (ValueError, RecursionError) as e:
                reason = getattr(e, "msg", e)
                raise ValueError(
                    f"{where}: not JSON: {reason}: one row on each line is expected, as {EXAMPLE}"
                ) from None


def folder_hint(path):
    """How to write the rows of a folder that the datasets library saved; "" for another folder."""
    is_dict = (path / "dataset_dict.json").is_file()
    if not is_dict and not any(path.glob("*.arrow")):
        return ""
    part = "['train']" if is_dict else ""
    return f": datasets.load_from_disk('{path}'){part}.to_json('rows.jsonl') writes its rows"


def decode_lines(content, path):
    """The lines of a file's bytes. Bytes are split first, so that the bad line can be named."""
    lines = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}:{number}: not UTF-8 (byte {e.start} of the line)") from None
    return lines


def array_values(text, path):
    """Yield the place and the value of each element of a JSON array.

    The place is file:line, or file[index] where the array is all on one line.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as e:
        line = getattr(e, "lineno", 1)
        reason = getattr(e, "msg", e)
        raise ValueError(
            f"{path}:{line}: the file is a JSON array, and this is not JSON: {reason}"
        ) from None
    if "\n" not in text.strip():
        for i, value in enumerate(values):
            yield f"{path}[{i}]", value
        return
    decoder = json.JSONDecoder()
    gap = re.compile(r"[\s,\[]*")
    end = 0
    line = 1
    for value in values:
        start = gap.match(text, end).end()
        line += text.count("\n", end, start)
        yield f"{path}:{line}", value
        end = decoder.raw_decode(text, start)[1]
        line += text.count("\n", start, end)


# -------------------------------------------------------------------------------------------- rows


def parse_row(value, where):
    """A JSON value -> the fields of a row; its label is None where it has none.

    A key with the value null counts as one that is not there.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a JSON object is expected, such as {EXAMPLE}")
    key = question_key(value, where)
    forget = value.get("forget")
    if not isinstance(forget, bool | None):
        raise ValueError(f'{where}: "forget" is neither true nor false')
    common = {"forget": forget, **other_answers(value, where)}
    if key == "messages":
        return {**parse_messages(value, where), **common}
    raw = key == "prompt"
    check_field(value, key, where)
    text = value[key]
    if key == "instruction":
        text += parse_input(value.get("input"), where)
    label = parse_label(value, FORMS[key], where)
    label = label if raw or label is None else label.strip()
    return {"text": text, "label": label, "raw": raw, **common}


def question_key(value, where):
    """Which form of row it is, by the key of what is asked.

    Of several, the one that has its answer: data sets for chats keep the first "prompt" beside
    "messages". But a "text" beside "messages" could be either's.
    """
    keys = [key for key in value if value[key] is not None]
    found = [key for key in FORMS if key in keys]
    if len(found) > 1:
        whole = [key for key in found if FORMS[key] is None or FORMS[key] in keys]
        if len(whole) != 1 or {"text", "messages"} <= set(found):
            names = " and ".join(f'"{key}"' for key in found)
            raise ValueError(f"{where}: {names} in one row: keep one form of row")
        found = whole
    if found:
        return found[0]
    if "conversations" in keys:
        raise ValueError(
            f'{where}: "conversations": write it as "messages", a list of "role" and "content"'
        )
    for key, answer in FORMS.items():  # the first that the row has half of
        if answer in keys:
            raise ValueError(f'{where}: no "{key}": a row needs {ACCEPTED}')
    names = ", ".join(f'"{key}"' for key in keys) or "nothing"
    raise ValueError(f"{where}: {names} in it: a row needs {ACCEPTED}")


def check_field(value, name, where):
    if not isinstance(value[name], str):
        raise ValueError(f'{where}: "{name}" is not a string')
    if not value[name].strip() and name != "prompt":
        raise ValueError(f'{where}: "{name}" is empty')
    check_text(value[name], f'{where}: "{name}"')


def parse_input(extra, where):
    """What follows an instruction: a blank line and its input, or "" where there is none."""
    if extra is None:
        return ""
    if not isinstance(extra, str):
        raise ValueError(f'{where}: "input" is not a string')
    check_text(extra, f'{where}: "input"')
    return f"\n\n{extra}" if extra.strip() else ""


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
        kinds = {float: "a number with a fraction", list: "a list", dict: "an object"}
        what = kinds[type(label)]
        if isinstance(label, float) and not math.isfinite(label):
            what = "no finite number"
        raise ValueError(
            f'{where}: "{name}" is {what} ({short(label)}): a string, a whole number, true or '
            "false is expected"
        )
    check_field(value, name, where)
    return label


def short(value):
    """A value as an error shows it."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def parse_messages(value, where):
    """A conversation -> its last user's text, the answer to it, and the turns before."""
    messages = value["messages"]
    if value.get("tools"):
        raise ValueError(f'{where}: "tools" beside "messages": only text is read')
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: "messages" is not a list of "role" and "content", or is empty')
    turns = [parse_turn(turn, f"{where}: message {i}") for i, turn in enumerate(messages, 1)]
    check_roles([role for role, _ in turns], where)
    label = turns.pop()[1].strip() if turns[-1][0] == "assistant" else None
    return {
        "text": turns[-1][1],
        "label": label,
        "turns": tuple(turns[:-1]),
        "is_chat": True,
    }


def check_roles(roles, where):
    """Refuses other orders than at most one system, then user and assistant in turn."""
    first = 1 if roles[0] == "system" else 0
    if first == len(roles):
        raise ValueError(f"{where}: a system message alone: one of user is expected after it")
    for i, role in enumerate(roles[first:]):
        expected = "assistant" if i % 2 else "user"
        if role != expected:
            raise ValueError(
                f"{where}: message {first + i + 1}: its role is {role}, and {expected} is "
                "expected: user and assistant speak in turn, after at most one system"
            )


def parse_turn(turn, where):
    """A message -> its role and content. Only a system message may be empty: it stands for none."""
    if not isinstance(turn, dict):
        raise ValueError(f'{where}: not an object of "role" and "content"')
    role = turn.get("role")
    if role not in ("system", "user", "assistant"):
        raise ValueError(
            f"{where}: its role is {short(repr(role))}: system, user and assistant are read"
        )
    if turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError(f"{where}: it calls a tool: only text is read")
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(parse_part(part, where) for part in content)
    if not isinstance(content, str):
        raise ValueError(f'{where}: "content" is not a string')
    if not content.strip() and role != "system":
        raise ValueError(f'{where}: "content" is empty')
    check_text(content, where)
    return role, content


def parse_part(part, where):
    """One of several parts of a message's content -> its text."""
    kind = part.get("type") if isinstance(part, dict) else part
    if not isinstance(part, dict) or kind != "text":
        raise ValueError(f"{where}: its content holds {short(repr(kind))}: only text is read")
    if not isinstance(part.get("text"), str):
        raise ValueError(f'{where}: its content holds a "text" that is not a string')
    return part["text"]


def other_answers(value, where):
    """The optional paraphrase and wrong answers of a row."""
    paraphrase = value.get("paraphrase")
    wrong = value.get("wrong")
    wrong = [] if wrong is None else wrong
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
                f"{row.where}: no answer: {what} needs the one that it has now: add it. Only "
                "the rows to retain of train.py may be without"
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
