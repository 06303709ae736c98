"""eval.py --ask: of a file, of lines that are typed, and what is wrong with both."""

import io
import json

import pytest

import eval as evaluate
from support.answers import Asking, answer
from support.templates import read_template
from tests.helpers import call, lines_of, write_rows


def rows_file(path, n=7):
    texts = [f"{i} red green " + "cat " * (5 * i % 7) for i in range(n)]
    rows = [{"text": text, "label": "positive"} for text in texts]
    del rows[2]["label"]
    return write_rows(path, rows)


def test_a_file_gets_the_answers_that_each_row_gets_alone(folder, trained, tmp_path, capsys):
    file = rows_file(tmp_path / "queries.jsonl")
    args = ["--model", folder, "--prompt", trained, "--dtype", "fp32"]
    out = tmp_path / "answers.jsonl"
    assert call(evaluate, *args, "--ask", file, "--out", out, "--batch-size", 3) == 0
    assert "answers to 7 rows" in capsys.readouterr().out
    written = lines_of(out)
    asked = lines_of(tmp_path / "queries.jsonl")
    assert [line["text"] for line in written] == [row["text"] for row in asked]
    assert [line.get("label") for line in written] == [row.get("label") for row in asked]
    for line in written:
        assert call(evaluate, *args, "--ask", line["text"]) == 0
        shown = capsys.readouterr().out
        assert f"without the prompt: {line['without']}\n" in shown
        assert f"with the prompt:    {line['with']}\n" in shown
    assert len({line["without"] for line in written} | {line["with"] for line in written}) > 1


def test_without_a_prompt_there_is_one_answer(folder, tmp_path):
    file = rows_file(tmp_path / "queries.jsonl", 3)
    out = tmp_path / "answers.jsonl"
    assert call(evaluate, "--model", folder, "--ask", file, "--out", out) == 0
    assert all("with" not in line and "without" in line for line in lines_of(out))


def test_lines_are_answered_as_they_are_typed(folder, trained, monkeypatch, capsys):
    args = ["--model", folder, "--prompt", trained, "--dtype", "fp32"]
    answers = []
    for text in ("red cat", "blue sun"):
        assert call(evaluate, *args, "--ask", text) == 0
        answers.append(capsys.readouterr().out)
    monkeypatch.setattr("sys.stdin", io.StringIO("red cat\n\nblue sun\n"))
    assert call(evaluate, *args, "--ask") == 0
    assert capsys.readouterr().out == "".join(answers)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_typed_line_that_is_too_long_is_named_and_the_next_is_answered(
    folder, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stdin", Terminal("red " * 600 + "\nred cat\n"))
    assert call(evaluate, "--model", folder, "--ask") == 0
    shown = capsys.readouterr().out
    assert "line 1:" in shown and "there is room for" in shown
    assert shown.count("without the prompt:") == 1


def test_a_row_has_as_many_new_tokens_as_there_is_room_behind_it(tokenizer):
    template = read_template("{text}", None)
    n = len(tokenizer.bos) + len(tokenizer.encode("red " * 100))
    asking = Asking(tokenizer, template, {}, room=n + 2)
    rows = [asking.row("red", "a"), asking.row("red " * 100, "b")]
    new = tokenizer.encode("red cat blue sun")
    assert len(new) > 2
    answers = answer(rows, asking, lambda prompts, most: [new] * len(prompts))
    assert answers == ["red cat blue sun", tokenizer.decode(new[:2]).strip()]
    with pytest.raises(ValueError, match="b: .* there is room for"):
        answer(rows, Asking(tokenizer, template, {}, room=n - 1), None)


@pytest.mark.parametrize(
    ["options", "message"],
    [
        (["--out", "a.jsonl", "--forget", "b.jsonl"], "--out: for the answers to --ask FILE"),
        (["--ask", "--out", "a.jsonl"], "--ask needs the FILE"),
        (["--ask", "no-such.jsonl", "--out", "a.jsonl"], "no-such.jsonl"),
        (["--ask", "x", "--out", "no-such-folder/a.jsonl"], "its folder does not exist"),
    ],
)
def test_what_is_wrong_is_said(folder, options, message, capsys):
    assert call(evaluate, "--model", folder, *options) == 2
    assert message in capsys.readouterr().err


def test_a_row_without_room_stops_before_anything_is_asked(folder, tmp_path, capsys):
    file = tmp_path / "queries.jsonl"
    rows = [{"text": "red"}, {"text": "red " * 600}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "answers.jsonl"
    assert call(evaluate, "--model", folder, "--ask", file, "--out", out) == 2
    assert "queries.jsonl:2: " in capsys.readouterr().err
    assert not out.exists()
