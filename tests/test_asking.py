"""Other ways to ask: wordings, rows after other rows, and which of them are trained on."""

import argparse
import dataclasses
import random

import pytest

import train
from data import TEMPLATES, Row, Template, make_example, prompt_ids
from support import asking
from support.asking import after_another, reworded, training_ways, understanding, wordings
from support.batches import Batches, epoch_batches
from support.elsewhere import ways_to_ask
from support.options import PAPER
from tests.helpers import call, logged, small_batch, tiny, train_args, without

QUESTION = TEMPLATES["question"]


def always(*_):
    return True


def rows_of(n, label, **more):
    return [Row(f"{label} text {i}", label, f"f:{i}", **more) for i in range(n)]


def options(**changed):
    given = {"template": QUESTION, "more_templates": [], "rewordings": 2, "single": False}
    given |= {"seed": 0, "generic": ["unknown"]}
    return argparse.Namespace(**{**given, **changed})


# ----------------------------------------------------------------------------- two in a query


def test_a_row_after_another_is_that_ones_query_and_answer_and_then_its_own(tokenizer):
    row = Row("Who are you?", "me", "f:1", turns=(("user", "Who am I?"), ("assistant", "you")))
    alone = prompt_ids(Row("Who are you?", "me", "f:1"), tokenizer, QUESTION)
    first = QUESTION.string.replace("{text}", "Who am I?") + " you\n\n"
    second = QUESTION.string.replace("{text}", "Who are you?")
    ids = prompt_ids(row, tokenizer, QUESTION)
    assert ids == tokenizer.bos + tokenizer.encode(first + second)
    example, _ = make_example(row, tokenizer, QUESTION, 200)
    start, end = example.text
    text = tokenizer.decode(example.ids[start:end])
    assert "Who are you" in text and "Who am I" not in text
    assert example.answer == make_example(Row("x", "me", ""), tokenizer, QUESTION, 200)[0].answer
    assert len(ids) > len(alone)


def test_a_retain_row_follows_a_forget_row_and_its_generic_answer():
    forget, retain = rows_of(3, "yes"), rows_of(5, "no")
    *_, ([template], mixed_forget, mixed_retain) = training_ways(options(), forget, retain, always)
    assert template == QUESTION
    for row in mixed_forget:
        (_, said), (_, answer) = row.turns
        assert said.startswith("no text") and answer == "no" and row.label == "yes"
    for row in mixed_retain:
        (_, said), (_, answer) = row.turns
        assert said.startswith("yes text") and answer == "unknown" and row.label == "no"
    assert [row.text for row in mixed_retain] == [row.text for row in retain]


def test_a_long_row_is_cut_where_it_stands_before_another():
    long = [Row("word " * 500, "no", "")]
    (row,) = after_another(rows_of(1, "yes"), long, random.Random(0))
    assert len(row.turns[0][1].split()) == asking.LONGEST_BEFORE


def test_rows_that_are_prompts_stand_alone():
    raw = rows_of(2, "yes", raw=True)
    assert after_another(raw, rows_of(2, "no"), None) == raw
    assert after_another(rows_of(2, "no"), raw, None) == rows_of(2, "no")
    assert len(training_ways(options(), raw, raw, always)) == 1


# ----------------------------------------------------------------------------------------- wordings


OWN = Template("Tell me: {text}\n\n## Answer:")


@pytest.mark.parametrize("template", [*TEMPLATES.values(), OWN])
def test_wordings_to_train_in_are_others_than_those_to_measure_in(template):
    ours = [other.string for other in wordings(template, 100, 0)]
    assert len(ours) == len(set(ours)) >= 32
    assert all(string.count("{text}") == 1 for string in ours)
    assert not {template.string, *(other.string for other in reworded(template))} & set(ours)
    assert [other.string for other in wordings(template, 5, 0)] == ours[:5]
    assert [other.string for other in wordings(template, 5, 1)] != ours[:5]


def test_the_papers_way_is_one_and_each_option_adds_to_it():
    def ways_of(**changed):
        return training_ways(options(**changed), rows_of(2, "yes"), rows_of(2, "no"), always)

    assert len(ways_of(rewordings=0, single=True)) == 1
    assert len(ways_of(rewordings=2, single=True)) == 3
    assert len(ways_of(rewordings=0)) == 2
    more = [Template("{text}?")]
    ways = ways_of(rewordings=0, single=True, more_templates=more)
    assert [way[0] for way in ways] == [[QUESTION], more]
    assert PAPER["rewordings"] == 0 and PAPER["single"]


def test_each_named_template_has_wordings():
    more = [OWN, dataclasses.replace(OWN, chat=object())]
    given = options(rewordings=9, single=True, more_templates=more)
    ways = training_ways(given, rows_of(2, ""), [], always)
    templates = {template.string for way in ways[3:] for template in way.templates}
    ours, theirs = wordings(QUESTION, 5, 0), wordings(OWN, 5, 0)
    assert templates == {template.string for template in ours + theirs[:4]}
    named = {template.string for template in asking.wordings_of([OWN, QUESTION], 1000, 0)}
    assert len(named) > 60 and not named & {template.string for template in reworded(QUESTION)}


def test_each_row_is_asked_in_several_wordings_in_turn():
    ways = training_ways(options(rewordings=9, single=True), rows_of(2, ""), [], always)
    assert [len(templates) for templates, *_ in ways] == [1, 9, 9, 9]
    assert len({templates[0].string for templates, *_ in ways}) == 4
    assert {t.string for t in ways[1][0]} == {t.string for t in ways[3][0]}


def test_a_way_that_the_model_does_not_understand_is_left_out(tokenizer, monkeypatch):
    """The tiny model answers nothing right, so we say what is right: what it answers in one way."""
    llama = tiny()
    monkeypatch.setattr(asking, "make_examples", lambda rows, *_: (rows, 0))
    right = [dataclasses.replace(e, n=1) for e in small_batch(0, 4)]
    wrong = small_batch(0, 4, seed=9)
    hidden = asking.answer_hidden(llama, right)
    best = [llama.head(h).argmax(dim=-1).tolist() for h in hidden]
    right = [type(e)((*e.ids[: -e.n], *ids), e.n, "", False) for e, ids in zip(right, best)]
    is_understood = understanding(llama, tokenizer, QUESTION, right, 100, 4)
    assert is_understood(OWN, right, 4, 1.0) and not is_understood(OWN, wrong, 4, 0.1)
    half = right[:2] + wrong[:2]
    assert is_understood(OWN, half, 4, 0.5) and not is_understood(OWN, half, 4, 0.6)
    assert is_understood(OWN, half, 2, 0.5)  # every second row: one is right
    rows = rows_of(2, "yes"), rows_of(2, "no")
    assert len(training_ways(options(), *rows, lambda *_: False)) == 1
    # after another row it is enough that the model answers in half of the cases
    (_, after) = training_ways(options(), *rows, lambda _, rows, n, share: (n, share) == (100, 0.5))
    assert all(row.turns for row in (*after.forget, *after.retain))


# ------------------------------------------------------------------------------------------ batches


def test_a_batch_is_asked_in_one_way_and_every_second_one_in_the_first():
    examples = small_batch(12, 36) * 3
    batches = epoch_batches(examples, 8, seed=0, epoch=0, forget_per_batch="share", ways=3)
    ways = []
    for batch in batches:
        (way,) = {i // 48 for i in batch}
        ways.append(way)
    assert ways[0::2] == [0] * 3 and set(ways[1::2]) <= {1, 2}
    assert sorted(i % 48 for batch in batches for i in batch) == list(range(48))


@pytest.mark.parametrize("forget_per_batch", ["loss", "share"])
def test_rows_of_a_single_batch_are_asked_otherwise_in_every_second_step(forget_per_batch):
    examples = small_batch(2, 4) * 3
    batches = Batches(examples, 3, 10, 8, 0, forget_per_batch)
    ways = []
    for step in range(len(batches)):
        _, indices, _ = batches.batch(step)
        ways.append(indices[0] // 6)
        batches.tell(indices, [1.0] * len(indices))
    assert ways[0::2] == [0] * 5 and set(ways[1::2]) <= {1, 2}


def test_each_batch_has_its_share_of_both_sides():
    examples = small_batch(25, 75)
    batches = epoch_batches(examples, 8, seed=3, epoch=1, forget_per_batch="share")
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    assert {sum(examples[i].forget for i in batch) for batch in batches} <= {1, 2}
    assert max(map(len, batches)) <= 8


# -------------------------------------------------------------------------------------- the command


def test_a_run_in_several_ways_says_so_and_can_go_on(folder, files, tmp_path, capsys):
    args = train_args(folder, files, tmp_path / "p")
    args = [a for a in without(args, "--rewordings") if a != "--single"]
    assert call(train, *args, "--template", "question", "--template", "{text}?") == 0
    printed = capsys.readouterr().out
    assert "asked in" in printed
    assert "train retain, after a forget row" in printed
    assert "train forget, after a retain row" in printed
    assert len(logged(tmp_path / "p")) == 14


def test_rows_after_another_are_measured_with_the_answers_they_would_get():
    splits = {"train forget": rows_of(3, "yes"), "train retain": rows_of(4, "no")}
    ways = ways_to_ask(splits, QUESTION, ["unknown"])
    _, forget = ways["train forget, after a retain row"]
    _, retain = ways["train retain, after a forget row"]
    assert {row.turns[1][1] for row in forget} == {"no"}
    assert {row.turns[1][1] for row in retain} == {"unknown"}
