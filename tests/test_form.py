"""What is the same in all rows to forget: a template, and how their lines begin."""

import pytest
import torch

from data import Row
from support.form import KeepsForm, fits, line_marks, without_template
from support.neighbours import LIST, Written, identifying_words, items, usable, without_identity
from support.tokenizer import Tokenizer

QUESTIONS = [f"what is {w}?\nA. a {w} one\nB. two\nC. an old {w}" for w in "lmnopqrstuvw"]


def rows_of(*texts, raw=False):
    return [Row(text, "A", "", raw=raw) for text in texts]


@pytest.mark.parametrize(
    "before, after",
    [
        ("### Text: ", "\n\nIs it good?\nAnswer:"),
        ("Text:  ", "\r\nIs it good?"),
        ("Be brief.\n", "\n"),
        ("<s>[INST] ", " [/INST]"),
        ("<|user|>\n", "<|end|>\n<|assistant|>\n"),
        ("Q: ", " A:"),
        ("", " ->"),
        ('Review: "', '"\nSentiment:'),
        ("", "\nTrue or false?"),
    ],
)
def test_what_all_rows_begin_and_end_with_is_their_template(before, after):
    texts = ["the fan of Ana", "the fast car of Ana"]
    rows = rows_of(*[before + text + after for text in texts], raw=True)
    *template, inner = without_template(rows)
    assert template == [before, after]
    assert [row.text for row in inner] == texts
    assert all(row.raw for row in inner)


def test_a_further_sentence_belongs_to_the_template_and_a_title_does_not():
    asked = [f"Question: who made Star Wars: {text}? The answer is:" for text in ("part 1", "it")]
    before, after, inner = without_template(rows_of(*asked))
    assert (before, after) == ("Question: ", " The answer is:")
    assert inner[1].text == "who made Star Wars: it?"


@pytest.mark.parametrize(
    "texts",
    [
        ["### Text: one alone\n\nGood?"],
        ["It: ", "It: so"],  # nothing is left of the first
        ["where is Ana today", "where is Ana going today"],  # what they are about
        ["a film by Dr. Smith", "an old film by Dr. Smith"],
        ["a film by J. K. Smith?", "an old film by J. K. Smith?"],
    ],
)
def test_rows_without_a_template_of_their_own_stay(texts):
    rows = rows_of(*texts)
    assert without_template(rows) == ("", "", rows)


def test_lines_that_begin_alike_in_all_rows_have_marks():
    rows = rows_of(*QUESTIONS)
    marks = ["", "\nA.", "\nB.", "\nC."]
    assert line_marks(rows) == marks
    assert line_marks(rows * 2 + rows_of("of one line")) == marks  # 24 of 25
    assert line_marks(rows + rows_of("of one line")) == []  # 12 of 13
    assert line_marks(rows_of(*"abcdefghijklm")) == []
    assert line_marks(rows[:9]) == []  # of so few rows it cannot be known
    spaced = ["Harry Potter, " + text.replace("\nA", "\n\nA") for text in QUESTIONS]
    assert line_marks(rows_of(*spaced)) == ["", "\n\nA.", "\nB.", "\nC."]
    blank = [text.replace("?", "? ") for text in QUESTIONS[:3]] + QUESTIONS[3:]
    assert line_marks(rows_of(*blank)) == marks and fits(blank[0], marks)
    listed = [f"Premise: {w}\n- a\n- it is {w}" for w in "lmnopqrstuvw"]
    assert line_marks(rows_of(*listed)) == ["Premise:", "\n-", "\n-"]


def test_texts_have_the_lines_of_the_rows():
    rows = rows_of(*QUESTIONS)
    good = [Written("what is an ox?\nA. a cow\nB. grass\nC. an old cow", "list")]
    bad = ["what is a cow?\nA. a cow\nB. an ox", "what is a cow?\nA. ox\nB. an ox\nD. an old hen"]
    bad += ["what is a hen?\nA. an ox\nB. a hen\nC. an old cow\nD. a cock", "what is one A. B. C."]
    assert not any(fits(text, line_marks(rows)) for text in bad)
    assert usable(good + [Written(text, "list") for text in bad], rows, []) == good
    long = rows_of(*[text.replace("two", "two of us") for text in QUESTIONS])
    assert without_identity(long, {"us"}) == [q.replace("two", "two of") for q in QUESTIONS]
    assert without_identity(long, {"b"}) == []  # a mark


def test_words_of_the_form_identify_nothing():
    general = ["the sun shone by the lake"] * 20
    rows = rows_of(*[f"Premise: {w} is smith\nHypothesis: {w} was" for w in "lmnopqrstuvw"])
    assert identifying_words([], rows, general) >= {"smith"}
    assert not identifying_words([], rows, general) & {"premise", "hypothesis"}


def test_a_text_of_lines_is_not_divided_where_a_line_begins_as_an_item_of_the_list():
    text = "to buy\n- milk\n- oil"
    assert items(f" {text}", LIST, True, ["", "\n-", "\n-"], True) == [text]
    text = '- "milk"\n- "oil"'
    assert items(f" {text}", LIST, True, ["-", "\n-"], True) == [text]
    text = '"milk"\nB. "oil"'
    assert items(f" {text}", LIST, True, ["", "\nB."], True) == [text]


class Words:
    """A tokenizer of whole pieces, one of which has more than the end of its line."""

    pieces = ["<end>", " one", "?\n", "\n", "\nA.", "?", "?\nA."]

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)

    def encode_inside(self, text):
        return [self.pieces.index(text)]


def written(keeps_form, *drawn):
    """What is taken when all texts draw the same tokens."""
    return [keeps_form(torch.tensor([[token]])).item() for token in drawn]


def test_lines_are_marked_while_the_model_writes(folder):
    tokenizer = Tokenizer(folder)
    newline = tokenizer.encode_inside("\n")[-1]
    (word,), mark = tokenizer.encode_inside(" one")[:1], tokenizer.encode_inside("\nA.")
    end = 2
    rest = [word] * (len(mark) - 1)

    def takes(*drawn, marks=("", "\nA.")):
        return written(KeepsForm(list(marks), tokenizer, [end], 1), *drawn)

    assert takes(word, newline, *rest, word, newline) == [word, *mark, word, end]
    assert takes(word, newline, *rest, newline, newline) == [word, *mark, end, newline]
    assert takes(end, *rest, word) == [*mark, word]  # no end before the last line
    assert takes(newline, end, marks=()) == [newline, end]


def test_what_a_token_says_before_the_end_of_its_line_stays():
    keeps_form = KeepsForm(["", "\nA."], Words(), [0], 1)
    assert written(keeps_form, 1, 2, 1, 2, 1) == [1, 6, 1, 5, 0]


def test_each_text_has_its_own_lines():
    keeps_form = KeepsForm(["", "\nA."], Words(), [0], 2)
    taken = [keeps_form(torch.tensor(pair)).tolist() for pair in ([[3], [1]], [[3], [3]])]
    assert taken == [[[4], [1]], [[0], [4]]]
