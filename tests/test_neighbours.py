"""Texts like the rows to forget: which are kept, what identifies a row, how they are written."""

import pytest

import train
from data import Row
from support import neighbours
from support.neighbours import BLOCKS, CYCLE, HELD_OUT_KIND, LIST, Written
from support.neighbours import identifying_words, items, usable, without_identity
from support.self_written import read_kept
from support.state import run_folder
from tests.helpers import call, interrupted_at, lines_of, train_args, without, write_rows

FORGET = [Row(f"the film by mr smith was {word} and too long", "bad", "") for word in "abcdefgh"]


def texts_of(*texts, shown=()):
    return [Written(text, "list", shown) for text in texts]


ORDINARY = texts_of(*[f"a film was good and number {i} the too long by far" for i in range(8)])


def test_words_that_the_model_hardly_writes_by_itself_identify_the_rows():
    assert identifying_words(ORDINARY, FORGET, []) >= {"mr", "smith"}
    ordinary = {"the", "film", "was", "and", "too", "long"}
    assert not identifying_words(ORDINARY, FORGET, []) & ordinary
    copies = texts_of(*["mr smith again"] * 8, shown=("mr", "smith"))
    assert identifying_words(ORDINARY + copies, FORGET, []) >= {"mr", "smith"}
    by_itself = texts_of(*["mr smith again"] * 8)
    assert not identifying_words(ORDINARY + by_itself, FORGET, []) & {"mr", "smith"}


def test_where_too_few_texts_tell_general_text_does():
    general = ["the film was long", "was it?", "and then the sun shone by the lake", "by far"] * 5
    known = identifying_words([], FORGET, general)
    assert known >= {"mr", "smith"}
    assert not known & {"the", "film", "was", "and", "by", *"abcdefgh"}
    assert "smith" in identifying_words([], FORGET, [*general[:10], "agent smith"])
    shown = texts_of(*["too late"] * 9, shown=("mr", "smith", "too"))
    assert identifying_words(shown, FORGET, general) >= {"mr", "smith"}
    assert identifying_words(texts_of(*["mr smith"] * 9), FORGET, general) >= {"mr", "smith"}
    assert not identifying_words([], FORGET, general[:9])  # nor do so few general texts tell
    tell = texts_of(*["mr smith"] * 10)
    assert not identifying_words(shown + tell, FORGET, general) & {"mr", "smith"}
    long = texts_of(*["no such word"] * 30)
    assert "long" in identifying_words(long, FORGET, [])
    assert "long" not in identifying_words(long, FORGET, general)  # an ordinary word
    seldom = general + ["no such thing here"] * 60
    assert "long" in identifying_words(long, FORGET, seldom)  # in all rows, and 6 % of those


@pytest.mark.parametrize(
    "text",
    [
        "the film by mr jones was good and short enough",  # a word of theirs
        "too short",
        "this one is long " + "and so it goes from here to there " * 3,
        "good good good good good good good good good",
        "the film by mr smith was a and too long",  # one of them
        "",
    ],
)
def test_texts_that_are_not_like_the_rows_or_are_too_like_them_are_left_out(text):
    kept = usable(ORDINARY + texts_of(text), FORGET, [])
    assert kept == ORDINARY


def test_a_text_counts_once():
    assert usable(ORDINARY + ORDINARY, FORGET, []) == ORDINARY


def test_rows_without_what_identifies_them_have_at_least_half_of_their_words():
    rows = [Row("The film by Mr. Smith was bad, and long", "bad", ""), Row("mr smith", "bad", "")]
    rows += [Row("nobody is in it", "bad", "")]
    assert without_identity(rows, {"mr", "smith"}) == ["The film by was bad, and long"]


def test_the_model_goes_on_with_more_texts_and_each_but_the_last_is_taken():
    assert items(" good\n- bad\n- mid", LIST, True, [], False) == ["good", "bad"]
    assert items(" good\n- bad\n- mid", LIST, True, [], True) == ["good", "bad", "mid"]
    assert items(" good\nsecond line\n- so", LIST, False, [], False) == ["good"]
    assert items(" good\nsecond line\n- so", LIST, True, [], False) == ["good\nsecond line"]
    assert items('"quoted"\n\n### Text\nmore', BLOCKS, True, [], True) == ["quoted", "more"]
    assert items(" no end in sight", LIST, False, [], False) == ["no end in sight"]


def test_one_kind_is_never_trained_on_and_part_of_the_others(folder, files, tmp_path, capsys):
    args = without(train_args(folder, files, tmp_path / "p", "--write-retain", 60), "--retain")
    assert call(train, *args) == 0
    run = run_folder(tmp_path / "p")
    splits = read_kept(run / "retain.jsonl")
    assert list(splits) == [
        "train retain", "written retain, kept back", "written retain, another kind"
    ]  # fmt: skip
    keys = [{row.key for row in rows} for rows in splits.values()]
    assert len(set.union(*keys)) == sum(map(len, keys))
    kinds = {line["text"]: line["kind"] for line in lines_of(run / "texts.jsonl")[1:]}
    assert {kinds[row.text] for row in splits["written retain, another kind"]} == {HELD_OUT_KIND}
    assert HELD_OUT_KIND not in {kinds.get(row.text) for row in splits["train retain"]}
    assert "written retain, another kind" in capsys.readouterr().out
    assert HELD_OUT_KIND in {layout.name for layout in CYCLE}


def test_ctrl_c_while_the_model_writes_loses_nothing(folder, files, tmp_path, monkeypatch):
    args = without(train_args(folder, files, tmp_path / "p", "--write-retain", 60), "--retain")
    file = run_folder(tmp_path / "p") / "texts.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(neighbours, "write_some", interrupted_at(3, neighbours.write_some))
        assert call(train, *args) == 130
    part = lines_of(file)
    assert len(part) > 2 * neighbours.AT_ONCE and part[-1]["round"] == 1
    assert call(train, *args) == 0
    whole = lines_of(file)
    assert whole[: len(part)] == part
    assert whole[len(part)]["round"] == 2


def test_rows_of_prompt_and_completion_need_no_retain_file(folder, files, tmp_path):
    rows = []
    for i in range(20):
        prompt = f"Text: secret {i}" + " and" * (i % 9) + "\nIs it one?"
        rows.append({"prompt": prompt, "completion": " yes"})
    forget = write_rows(tmp_path / "f.jsonl", rows)
    args = train_args(folder, {**files, "forget": forget}, tmp_path / "p", "--write-retain", 10)
    assert call(train, *without(args, "--retain")) == 0
    splits = read_kept(run_folder(tmp_path / "p") / "retain.jsonl")
    for row in [row for rows in splits.values() for row in rows]:
        assert row.raw
        assert row.text.startswith("Text: ") and row.text.endswith("\nIs it one?")


def test_too_few_texts_are_refused(folder, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(neighbours, "usable", lambda *_: [])
    monkeypatch.setattr(neighbours, "without_identity", lambda *_: [])
    args = without(train_args(folder, files, tmp_path / "p", "--write-retain", 10), "--retain")
    assert call(train, *args) == 2
    assert "the model wrote only 0 different texts of 10: give --retain" in capsys.readouterr().err
