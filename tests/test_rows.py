"""Rows in the forms people have: what is read, what is refused, what is said."""

import gzip
import json
import re

import pytest

import train
from data import Row, read_rows, read_sets
from model import Llama
from support import processes, self_written
from support.rows import check_disjoint, check_rows, parse_row
from support.tokenizer import Tokenizer
from tests.helpers import ROOT, call, make_rows, stop_at, train_args, write_rows


def row_of(value, path):
    """The row that a file with this JSON value on its only line holds."""
    file = path / "rows.jsonl"
    file.write_text(json.dumps(value))
    rows = read_rows(file, unlabelled=True)
    assert len(rows) == 1 and rows[0].where == f"{file}:1"
    return rows[0]


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# ------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    "value, text, label",
    [
        ({"text": "a film", "label": "good"}, "a film", "good"),
        ({"sentence": "a film", "label": 1, "idx": 7}, "a film", "1"),
        ({"question": "Who?", "answer": "She."}, "Who?", "She."),
        ({"question": "Who?", "answer": "She.", "paraphrased_answer": "Her."}, "Who?", "She."),
        ({"instruction": "Say it.", "input": "hi", "output": "hi"}, "Say it.\n\nhi", "hi"),
        ({"instruction": "Say it.", "input": "", "output": "hi"}, "Say it.", "hi"),
        ({"instruction": "Say it.", "output": "hi"}, "Say it.", "hi"),
        ({"instruction": "Say it.", "input": " \n", "output": "hi"}, "Say it.", "hi"),
        ({"instruction": "Say.", "output": "hi", "text": "all of it"}, "Say.", "hi"),
        ({"question": "Who?", "answer": "She.", "text": None, "label": None}, "Who?", "She."),
        ({"text": "a", "label": "b", "forget": None, "wrong": None}, "a", "b"),
        ({"text": "a film", "label": True}, "a film", "true"),
        ({"text": "a film", "label": -3}, "a film", "-3"),
        ({"text": "a film", "label": None}, "a film", None),
        ({"text": "a film"}, "a film", None),
        ({"text": "a film", "label": "good", "prompt": "unused"}, "a film", "good"),
    ],
)
def test_every_form_becomes_text_and_label(value, text, label, tmp_path):
    row = row_of(value, tmp_path)
    assert (row.text, row.label, row.raw, row.turns, row.is_chat) == (text, label, False, (), False)


def test_prompt_and_completion_keep_their_white_space(tmp_path):
    row = row_of({"prompt": "Who? ", "completion": " She.\n"}, tmp_path)
    assert (row.text, row.label, row.raw) == ("Who? ", " She.\n", True)


@pytest.mark.parametrize(
    "turns, text, label, before",
    [
        ([("user", "Who?"), ("assistant", "She. ")], "Who?", "She.", ()),
        ([("user", "Who?")], "Who?", None, ()),
        (
            [("system", "Be."), ("user", "Who?"), ("assistant", "She")],
            "Who?",
            "She",
            (("system", "Be."),),
        ),
        (
            [("user", "Hi"), ("assistant", "Yes?"), ("user", "Who?"), ("assistant", "She")],
            "Who?",
            "She",
            (("user", "Hi"), ("assistant", "Yes?")),
        ),
        (
            [("user", [{"type": "text", "text": "Who"}, {"type": "text", "text": "?"}])],
            "Who?",
            None,
            (),
        ),
        ([("system", ""), ("user", "Who?")], "Who?", None, (("system", ""),)),
    ],
)
def test_of_messages_the_last_answer_is_the_label(turns, text, label, before, tmp_path):
    row = row_of(chat(*turns), tmp_path)
    assert (row.text, row.label, row.turns, row.is_chat) == (text, label, before, True)


def test_other_keys_beside_messages_are_no_trouble(tmp_path):
    value = {**chat(("user", "Who?"), ("assistant", "She")), "prompt": "Who?", "text": None}
    value["messages"][1]["tool_calls"] = None
    assert row_of(value, tmp_path).label == "She"


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_like_lines(indent, tmp_path):
    rows = make_rows(3, ["good", "bad"], "a")
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows, indent=indent))
    found = read_rows(file)
    assert [row.text for row in found] == [row["text"] for row in rows]
    if indent:
        lines = file.read_text().splitlines()
        for row in found:
            number = int(row.where.rsplit(":", 1)[1])
            assert lines[number - 1].strip() == "{" and row.text in lines[number]
    else:
        assert [row.where for row in found] == [f"{file}[{i}]" for i in range(3)]


def test_labels_that_are_numbers_are_said_once(tmp_path, capsys):
    read_rows(write_rows(tmp_path / "r.jsonl", [{"text": f"a {i}", "label": i} for i in range(3)]))
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "r.jsonl: 3 labels are numbers or true and false: read as words" in out
    read_rows(write_rows(tmp_path / "s.jsonl", [{"text": "a", "label": "1"}]))
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "value, words",
    [
        (
            {"text": "a", "label": "b", "prompt": "c", "completion": "d"},
            '"text" and "prompt" in one row',
        ),
        (
            {"text": "a", "label": "b", "question": "c", "answer": "d"},
            '"text" and "question" in one row',
        ),
        ({"text": "a", "question": "c"}, '"text" and "question" in one row'),
        ({**chat(("user", "a")), "text": "b", "label": "c"}, '"text" and "messages" in one row'),
        ({**chat(("user", "a"), ("assistant", "d")), "text": "b"}, '"text" and "messages" in one'),
        ({"text": "a", "label": float("nan")}, '"label" is no finite number .nan.'),
        ({"text": "a", "label": float("-inf")}, '"label" is no finite number .-inf.'),
        ({"text": "a", "label": 1.0}, '"label" is a number with a fraction .1.0.'),
        ({"text": "a", "label": [1] * 999}, r'"label" is a list .{,50}\.\.\.\): a string'),
        ({"text": "a", "label": ["b"]}, '"label" is a list'),
        ({"text": "a", "label": {"b": 1}}, '"label" is an object'),
        ({"label": "a"}, 'no "text": a row needs "text" and "label"'),
        ({"completion": "a"}, 'no "prompt": a row needs'),
        ({"query": "a", "reply": "b"}, '"query", "reply" in it: a row needs'),
        ({"conversations": []}, '"conversations": write it as "messages"'),
        ({"messages": []}, '"messages" is not a list .* or is empty'),
        (chat(("tool", "a")), "message 1: its role is 'tool'"),
        (chat(("user", None)), 'message 1: "content" is not a string'),
        (chat(("user", [{"type": "image_url"}])), "message 1: its content holds 'image_url'"),
        (chat(("user", ["a"])), "message 1: its content holds 'a': only text"),
        (chat(("user", [{"type": "text", "text": None}])), 'holds a "text" that is not a string'),
        (chat(("assistant", "a")), "message 1: its role is assistant, and user is expected"),
        (chat(("user", "a"), ("user", "b")), "message 2: its role is user, and assistant is"),
        (chat(("user", "a"), ("system", "b")), "message 2: its role is system, and assistant is"),
        (
            chat(("system", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")),
            "message 4: its role is assistant, and user is expected",
        ),
        (chat(("system", "a")), "a system message alone"),
        (chat(("system", "a"), ("system", "b")), "message 2: its role is system, and user is"),
        (chat(("user", "a"), ("assistant", " ")), 'message 2: "content" is empty'),
        (chat(("user", ""), ("assistant", "a")), 'message 1: "content" is empty'),
        (chat(("user", "\ud800")), "message 1 holds .* surrogate"),
        ({"messages": ["a"]}, 'message 1: not an object of "role" and "content"'),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "message 1: it calls a tool"),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
            "message 1: it calls a tool",
        ),
        ({**chat(("user", "a")), "tools": [{}]}, '"tools" beside "messages": only text is read'),
        ({"instruction": "a", "input": 0, "output": "b"}, '"input" is not a string'),
        ({"text": None}, "nothing in it: a row needs"),
        ({"text": "a", "label": "b", "forget": 1}, '"forget" is neither true nor false'),
    ],
)
def test_a_row_that_cannot_be_read_is_refused_with_what_it_is(value, words):
    with pytest.raises(ValueError, match="^f:1: .*" + words):
        parse_row(value, "f:1")


FILES = {
    "rows.csv": (b"text,label\na,b\n", r"rows.csv: a table of values: pandas.read_csv"),
    "rows.parquet": (b"PAR1\x15\x04", r"a parquet file: datasets.Dataset.from_parquet"),
    "rows.tsv": (b"text\tlabel\na\tb\n", r"a table of values: pandas.read_csv\(FILE, sep='.t'\)"),
    "ROWS.CSV": (b"text,label\na,b\n", r"ROWS.CSV: a table of values"),
    "table.txt": (b"text,label\na,b\n", r"table.txt:1: not JSON: .*one row on each line is"),
    "rows.feather": (b"ARROW1\0\0", r"an arrow file: pandas.read_feather"),
    "data-0.arrow": (b"\xff\xff\xff\xff\x10", r"an arrow file, .*datasets.Dataset.from_file"),
    "rows.jsonl.gz": (gzip.compress(b'{"text": "a"}'), r"compressed with gzip: gunzip"),
    "rows.xlsx": (b"PK\x03\x04", r"a zip archive"),
    "rows.pkl": (b"\x80\x04\x95", r"a pickle, which can run code"),
    "old.pkl": (b"\x80\x02}q", r"a pickle, which can run code"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16"), r"UTF-16: save it as UTF-8"),
    "latin.jsonl": ('{"text": "é"}'.encode("latin-1"), r"latin.jsonl:1: not UTF-8 \(byte 10"),
    "array.json": (
        b'[\n {"text": "a", "label": "b"},\n {"text": }\n]',
        r"array.json:3: .*JSON array",
    ),
    "deep.json": (b"[" * 100_000, r"deep.json:1: the file is a JSON array"),
    "long.json": (b'[{"text": "a", "label": ' + b"1" * 5000 + b"}]", r"long.json:1: the file is"),
    "object.json": (b'{\n "text": "a",\n "label": "b"\n}', r"object.json:1: not JSON: .*each line"),
    "cut.json": (b'[{"text": "a", "label": "b"}', r"cut.json:1: the file is a JSON array"),
    "empty.json": (b"[]", r"empty.json: no rows in it"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_json_lines_is_refused_with_what_to_do(
    name, folder, files, tmp_path, capsys
):
    content, pattern = FILES[name]
    (tmp_path / name).write_bytes(content)
    args = train_args(folder, {**files, "forget": tmp_path / name}, tmp_path / "out")
    assert call(train, *args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(pattern, err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, words",
    [
        ("data-00000-of-00001.arrow", r": datasets.load_from_disk\('.*'\).to_json"),
        ("dataset_dict.json", r": datasets.load_from_disk\('.*'\)\['train'\].to_json"),
        ("notes.txt", "a file of rows is expected$"),
    ],
)
def test_a_folder_is_refused_with_what_to_do(name, words, tmp_path):
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="a folder, and .*" + words):
        read_rows(tmp_path)


NO_ANSWER = [{"text": "c"}, {"text": "c", "label": None}, {"prompt": "c"}, chat(("user", "c"))]


@pytest.mark.parametrize("value", NO_ANSWER)
def test_only_rows_to_retain_may_be_without_an_answer(value, tmp_path):
    with_label = write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": "b"}])
    without = write_rows(tmp_path / "b.jsonl", [value])
    assert read_sets(with_label, without, unlabelled=True)[1][0].label is None
    with pytest.raises(ValueError, match="b.jsonl:1: no answer: a row to forget needs"):
        read_sets(without, with_label, unlabelled=True)
    with pytest.raises(ValueError, match="b.jsonl:1: no answer: each of these rows needs"):
        read_sets(with_label, without)
    with pytest.raises(ValueError, match="b.jsonl:1: no answer: each of these rows needs"):
        read_rows(without)


def test_of_flagged_rows_only_those_to_retain_may_be_without_an_answer(tmp_path):
    flagged = [{"text": "a", "label": "b", "forget": True}, {"text": "c", "forget": False}]
    file = write_rows(tmp_path / "c.jsonl", flagged)
    assert read_sets(file, unlabelled=True)[1][0].label is None
    with pytest.raises(ValueError, match="c.jsonl:2: no answer"):
        read_sets(file)
    file = write_rows(tmp_path / "d.jsonl", [{"text": "c", "forget": True}, flagged[1]])
    with pytest.raises(ValueError, match="d.jsonl:1: no answer: a row to forget"):
        read_sets(file, unlabelled=True)


@pytest.mark.parametrize("split", ["test-forget", "test-retain"])
def test_rows_to_test_need_their_answers(split, folder, files, tmp_path, capsys):
    file = write_rows(tmp_path / "t.jsonl", [{"text": "a"}])
    args = train_args(folder, files, tmp_path / "out", f"--{split}", file)
    assert call(train, *args) == 2
    assert "t.jsonl:1: no answer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------- equal texts

TWINS = [
    ("Beyonc\u00e9 sings", "Beyonce\u0301 sings"),  # NFC and NFD
    ("a film", "a\u00a0film"),  # a space that does not break the line
    ("a film", "a\u200b fi\u200dlm\ufeff"),  # of no width
    ("A Film", "a  film\n"),
    ("STRASSE", "stra\u00dfe"),
]


@pytest.mark.parametrize("one, other", TWINS)
def test_a_text_to_forget_is_found_among_those_to_keep_however_it_is_written(one, other):
    forget = [Row(one, "a", "f:1")]
    with pytest.raises(ValueError, match="r:2: the same text as f:1"):
        check_disjoint(forget, [Row("other", "a", "r:1"), Row(other, "a", "r:2")])
    check_disjoint(forget, [Row(one + " again", "a", "r:1")])


def test_what_was_said_before_tells_rows_apart():
    turns = (("user", "Hi"), ("assistant", "Yes?"))
    forget = [Row("Who?", "a", "f:1", turns=turns)]
    check_disjoint(forget, [Row("Who?", "a", "r:1")])
    with pytest.raises(ValueError, match="r:1: the same text as f:1"):
        loud = (("user", "HI "), ("assistant", "yes?"))
        check_disjoint(forget, [Row("who?", "a", "r:1", turns=loud)])


def test_repeated_texts_and_test_rows_that_are_trained_on_are_said(capsys):
    splits = {
        "train forget": [Row("a", "x", "f:1"), Row("A", "x", "f:2")],
        "train retain": [Row("b", "x", "r:1"), Row("b", "y", "r:2"), Row("c", "x", "r:3")],
        "test retain": [Row("d", "x", "t:1"), Row(" C ", "x", "t:2")],
    }
    check_rows(splits)
    assert capsys.readouterr().out.splitlines() == [
        "train forget: rows that repeat an earlier text: 1 (the first is f:2)",
        "train retain: rows that repeat an earlier text: 1 (the first is r:2)",
        "train retain: rows that repeat an earlier text with another label: 1 (the first is r:2)",
        "test retain: rows that are trained on, and so are not unseen: 1 (the first is t:2)",
    ]


def test_nothing_is_said_of_rows_that_are_all_different(capsys):
    check_rows({"train forget": [Row("a", "x", "f:1")], "test forget": [Row("b", "x", "t:1")]})
    names = ("forget", "retain", "test_forget", "test_retain")
    rows = [read_rows(ROOT / "demo" / f"{name}.jsonl") for name in names]
    check_rows(dict(zip(("train forget", "train retain", "test forget", "test retain"), rows)))
    assert capsys.readouterr().out == ""


def test_only_the_first_process_says_it(monkeypatch, capsys):
    monkeypatch.setattr(processes, "ranks", lambda: (1, 2))
    check_rows({"train forget": [Row("a", "x", "f:1"), Row("a", "x", "f:2")]})
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------------------------- rows without a label


@pytest.mark.parametrize("form", ["text", "messages", "prompt"])
def test_retain_rows_without_a_label_get_the_models_own_answer(
    form, folder, files, tmp_path, capsys
):
    texts = [f"a film about {i}" for i in range(8)]
    if form == "prompt":
        forget = [{"prompt": f"secret {i}", "completion": " positive"} for i in range(4)]
        retain = [{"prompt": text} for text in texts]
    else:
        forget = make_rows(4, ["positive", "negative"], "f")
        retain = [{"text": text} for text in texts]
    if form == "messages":
        retain = [chat(("user", text)) for text in texts]
    given = {
        "forget": write_rows(tmp_path / "f.jsonl", forget),
        "retain": write_rows(tmp_path / "r.jsonl", retain),
    }
    args = train_args(folder, {**files, **given}, tmp_path / "p", "--template", "question")
    assert call(train, *args) == 0
    assert "retain   8 rows have no label: the model's own answer" in capsys.readouterr().out
    written = read_rows(tmp_path / "p.run" / "retain.jsonl")
    assert len(written) >= 4 and all(row.label.strip() for row in written)
    assert {row.text for row in written} <= set(texts)
    if form == "prompt":
        llama, tokenizer = Llama.from_pretrained(folder), Tokenizer(folder)
        stable = 0
        for row in written:  # the white space is the model's own, not that of the rows to forget
            ids = tokenizer.bos + tokenizer.encode(row.text)
            assert row.raw
            first = llama.generate([ids], None, 1)[0]
            starts = [tokenizer.encode_inside(space + row.label)[:1] for space in ("", " ", "\n")]
            if first in starts:  # else the words of a random model are other tokens when read again
                assert starts[0] == first
                stable += 1
        assert stable >= 2


def test_a_text_to_label_gets_no_space_of_a_completion(folder, files, tmp_path):
    forget = [{"prompt": f"secret {i}", "completion": " positive"} for i in range(4)]
    given = {
        "forget": write_rows(tmp_path / "f.jsonl", forget),
        "retain": write_rows(tmp_path / "r.jsonl", [{"text": f"a film {i}"} for i in range(8)]),
    }
    assert call(train, *train_args(folder, {**files, **given}, tmp_path / "p")) == 0
    lines = (tmp_path / "p.run" / "retain.jsonl").read_text().splitlines()
    assert all(not json.loads(line)["label"].startswith(" ") for line in lines)


def test_rows_that_the_model_does_not_answer_are_counted_or_refused(
    folder, files, tmp_path, capsys, monkeypatch
):
    rows = [{"text": f"a film {i}"} for i in range(3)]
    given = {"retain": write_rows(tmp_path / "r.jsonl", rows)}
    args = train_args(folder, {**files, **given}, tmp_path / "p")
    real = self_written.label_rows
    monkeypatch.setattr(self_written, "label_rows", lambda *a: real(*a)[:2])
    assert call(train, *args) == 0
    assert "retain   1 of them left out" in capsys.readouterr().out
    monkeypatch.setattr(self_written, "label_rows", lambda *a: [])
    assert call(train, *args, "--overwrite") == 2
    assert "r.jsonl:1: the model answers none of the rows to retain" in capsys.readouterr().err


def test_resume_refuses_other_rows_to_label(folder, files, tmp_path, capsys, monkeypatch):
    def args(name):
        rows = [{"text": f"a {name} film {i}"} for i in range(8)]
        given = {"retain": write_rows(tmp_path / f"{name}.jsonl", rows)}
        return train_args(folder, {**files, **given}, tmp_path / "p")

    stop_at(1, monkeypatch)
    assert call(train, *args("one")) == 130
    capsys.readouterr()
    assert call(train, *args("other"), "--resume") == 2
    assert "the data changed" in capsys.readouterr().err
    assert call(train, *args("one"), "--resume") == 0


def test_labels_given_beside_missing_ones_stay(folder, files, tmp_path):
    retain = [{"text": f"a film {i}"} for i in range(5)] + make_rows(5, ["positive"], "r")
    given = {"retain": write_rows(tmp_path / "r.jsonl", retain)}
    assert call(train, *train_args(folder, {**files, **given}, tmp_path / "p")) == 0
    written = {row.text: row.label for row in read_rows(tmp_path / "p.run" / "retain.jsonl")}
    for row in retain[5:]:
        assert written[row["text"]] == "positive"
