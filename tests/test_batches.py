"""Which rows a step takes: once each, and after the first epoch by their losses."""

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

import spul
import train
from data import SENTENCE, collate
from spul import Objective, SoftPrompt, answer_hidden, answer_loss, kl_loss, token_losses
from support import batches as of_batches
from support.batches import AHEAD, EPOCHS, FEWEST_DRAWS, FEWEST_OF_SENTENCES, FEWEST_STEPS
from support.batches import Batches, draw_rows, epoch_batches
from tests.helpers import call, logged, small_batch, teacher_of, tiny, train_args


def made(examples, ways=1, epochs=3, forget_per_batch="loss"):
    return Batches(examples, ways, epochs, 8, 5, forget_per_batch)


def run_through(batches, losses_of=lambda i: 1.0):
    """Each step's indices and weights, told so high losses."""
    steps = []
    for step in range(len(batches)):
        epoch, indices, weights = batches.batch(step)
        steps.append((epoch, indices, weights))
        batches.tell(indices, [losses_of(i) for i in indices])
    return steps


# -------------------------------------------------------------------------------------- the draws


def test_few_rows_have_as_many_epochs_as_make_enough_steps_unless_they_are_given():
    few, many = small_batch(4, 16), small_batch(100, 400)
    assert made(few, epochs=None).epochs == math.ceil(FEWEST_STEPS / 3)
    assert FEWEST_STEPS <= len(made(few, epochs=None)) < FEWEST_STEPS + 3
    assert made(many, epochs=None).epochs == EPOCHS
    assert made(few, epochs=2).epochs == 2
    lengths = range(SENTENCE - 2, SENTENCE + 1)  # of answers; the middle one counts
    for longer, fewest in ((0, FEWEST_STEPS), (1, FEWEST_OF_SENTENCES)):
        rows = small_batch(3, 18)
        true = [replace(e, n=n + longer) for e, n in zip(rows[3:], itertools.cycle(lengths))]
        few = [*rows[:3], *true]
        assert made(few, epochs=None).epochs == math.ceil(fewest / 3)


def test_a_row_is_drawn_half_by_its_loss_and_counts_the_inverse_of_how_often_it_comes():
    drawn, weights = draw_rows([5, 6, 7, 8], [0.0] * 5 + [0, 1, 0, 3], 8, random.Random(0))
    assert Counter(drawn) == {5: 1, 6: 2, 7: 1, 8: 4}  # 8 p_i
    assert weights == {5: 2.0, 6: 1.0, 7: 2.0, 8: 0.5}  # 1 / (4 p_i)


def test_the_expected_weight_of_all_rows_is_the_same():
    losses = [0.0, 0.1, 5.0, 0.3, 1.0]
    found = Counter()
    for seed in range(4000):
        drawn, weights = draw_rows([0, 1, 2, 3, 4], losses, 3, random.Random(seed))
        for i in drawn:
            found[i] += weights[i] / 3 / 4000
    assert [found[i] for i in range(5)] == pytest.approx([0.2] * 5, abs=0.02)


@pytest.mark.parametrize("losses", [[0.0, 0.0, 0.0], [1e-30, 1e-30, 1e-30], [2.0, 2.0, 2.0]])
def test_rows_of_the_same_loss_come_equally_often_and_count_1(losses):
    drawn, weights = draw_rows([0, 1, 2], losses, 6, random.Random(1))
    assert Counter(drawn) == {0: 2, 1: 2, 2: 2}
    assert list(weights.values()) == pytest.approx([1.0] * 3)
    assert draw_rows([], [], 0, random.Random(1)) == ([], {})


# ------------------------------------------------------------------------------------------ a run


def test_the_first_epoch_has_all_rows_once_and_later_ones_those_with_a_high_loss():
    examples = small_batch(25, 75)
    hard = {3, 40, 41}
    steps = run_through(made(examples), lambda i: 9.0 if i in hard else 1e-4)
    first = [indices for epoch, indices, _ in steps if epoch == 1]
    assert first == epoch_batches(examples, 8, 5, 0, "share")
    assert all(weights == [1.0] * 8 for epoch, _, weights in steps if epoch == 1 and weights[7:])
    counts = Counter(i for epoch, indices, _ in steps if epoch > 1 for i in indices)
    assert sum(counts[i] for i in hard) / 3 > 10 * sum(counts[i] for i in range(100)) / 100
    weights = {i: w for epoch, rows, ws in steps if epoch > 1 for i, w in zip(rows, ws)}
    assert weights[3] < 0.1 and weights[40] < 0.1
    assert min(w for i, w in weights.items() if i not in hard) > 1.9


def forget_rows(examples, steps):
    """How many each step has."""
    return [sum(examples[i].forget for i in indices) for _, indices, _ in steps]


def test_batches_drawn_by_loss_have_their_share_of_both_sides(monkeypatch):
    monkeypatch.setattr(of_batches, "FEWEST_DRAWS", 1)
    examples = small_batch(25, 75)
    steps = run_through(made(examples))
    assert len(steps) == 3 * 13
    assert set(forget_rows(examples, steps)) == {1, 2}
    for _, indices, weights in steps:
        assert 7 <= len(indices) <= 8 and len(weights) == len(indices)


@pytest.mark.parametrize("draws, least", [(FEWEST_DRAWS, 4), (110, 3)])
def test_where_rows_to_forget_are_few_batches_have_more_of_them_up_to_half(
    monkeypatch, draws, least
):
    monkeypatch.setattr(of_batches, "FEWEST_DRAWS", draws)
    examples = small_batch(5, 95)
    steps = run_through(made(examples))
    assert len(steps) == 3 * 13
    counts = forget_rows(examples, steps)
    assert set(counts[:13]) == {0, 1}  # every row once
    for n, (_, indices, weights) in zip(counts[13:], steps[13:]):
        assert n == min(least, len(indices) // 2)
        assert 7 <= len(indices) <= 8 and len(weights) == len(indices)
    mostly_forget = small_batch(95, 5)
    counts = forget_rows(mostly_forget, run_through(made(mostly_forget)))
    assert set(counts[13:]) == {7, 8}


def test_every_second_batch_drawn_by_loss_is_asked_in_the_first_way():
    examples = small_batch(100, 300) * 3
    steps = run_through(made(examples, ways=3, epochs=2))
    ways = []
    for _, indices, _ in steps:
        (way,) = {i // 400 for i in indices}
        ways.append(way)
    assert len(steps) == 100 > 3 * AHEAD
    assert set(ways[0::2]) == {0} and set(ways[1::2]) == {1, 2}


@pytest.mark.parametrize("forget_per_batch", [None, "loss"])
def test_what_the_teacher_reads_ahead_are_the_rows_of_the_next_batches(forget_per_batch):
    examples = small_batch(100, 300) * 3
    batches = made(examples, ways=3, epochs=2, forget_per_batch=forget_per_batch)
    read = set()
    for step in range(len(batches)):
        _, indices, _ = batches.batch(step)
        ahead = batches.ahead(step)
        assert len(ahead) <= AHEAD * 8
        read |= set(ahead)
        assert set(indices) <= read
        batches.tell(indices, [1.0] * len(indices))


def test_a_row_counts_by_what_it_lacks_beside_its_side_however_it_was_asked():
    batches = made(small_batch(4, 12) * 2, ways=2)
    half, quarter = math.log(2), math.log(4 / 3)
    batches.tell([16 + 3, 2, 16 + 9], [half, quarter, 0.0])  # they lack 1/2, 1/4 and 0
    mean = 0.8 + 0.2 * 0.375  # of the rows to forget, beginning at 1
    assert batches.hardness[2:4] == pytest.approx([0.25 / mean, 0.5 / mean])
    assert batches.means == pytest.approx({True: mean, False: 0.8})
    assert batches.hardness[9] == 0.0


def test_a_row_that_is_drawn_often_comes_in_different_batches():
    examples = small_batch(25, 75)
    steps = run_through(made(examples, epochs=6), lambda i: 9.0 if i in (3, 40, 41) else 1e-4)
    copies = [len(indices) - len(set(indices)) for _, indices, _ in steps]
    assert max(copies) <= 2 and sum(copies) < len(steps)


@pytest.mark.parametrize("forget_per_batch", [None, "share", 2])
def test_without_loss_every_epoch_is_drawn_without_it(forget_per_batch):
    examples = small_batch(25, 75)
    steps = run_through(made(examples, forget_per_batch=forget_per_batch), lambda i: float(i))
    for epoch in (1, 2, 3):
        found = [indices for number, indices, _ in steps if number == epoch]
        assert found == epoch_batches(examples, 8, 5, epoch - 1, forget_per_batch)
    assert {w for _, _, weights in steps for w in weights} == {1.0}


# --------------------------------------------------------------------------------- in the losses

LOGITS = [[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]


def test_weights_count_each_token_in_both_means():
    logits, targets = torch.tensor(LOGITS), torch.tensor([2, 1])
    losses = token_losses(logits, targets)
    alone = [answer_loss(losses[i : i + 1], 1) for i in (0, 1)]
    weights = torch.tensor([2.0, 0.5])
    expected = (2 * alone[0] + 0.5 * alone[1]) / 2
    torch.testing.assert_close(answer_loss(losses, 2, weights), expected)
    teacher = logits.flip(1)
    alone = [kl_loss(logits[i : i + 1], teacher[i : i + 1], 1) for i in (0, 1)]
    expected = (2 * alone[0] + 0.5 * alone[1]) / 2
    torch.testing.assert_close(kl_loss(logits, teacher, 2, weights), expected)


def test_a_row_that_counts_twice_is_as_the_row_twice():
    llama = tiny()
    prompt = SoftPrompt(4, 32, 8)
    examples = small_batch(2, 3)
    objective = Objective(gamma=0.0)
    chosen = [0, 1, 2, 3, 4]
    weighted = collate([examples[i] for i in chosen], weights=[2.0, 1.0, 1.0, 2.0, 0.0])
    one = train.losses(llama, prompt, weighted, teacher_of(llama, examples), objective)
    repeated = [examples[i] for i in (0, 0, 1, 2, 3, 3)]
    other = train.losses(llama, prompt, collate(repeated), teacher_of(llama, repeated), objective)
    torch.testing.assert_close(one["loss_f"] * 2, other["loss_f"] * 3)
    torch.testing.assert_close(one["loss_r"] * 3, other["loss_r"] * 3)
    torch.testing.assert_close(one["loss_kl"] * 3, other["loss_kl"] * 3)


def test_the_loss_of_each_row_is_that_of_the_row_alone():
    llama = tiny()
    prompt = SoftPrompt(4, 32, 8)
    examples = small_batch(2, 3)
    rows = train.losses(llama, prompt, collate(examples), teacher_of(llama, examples))["rows"]
    for row, example in zip(rows, examples, strict=True):
        teacher = torch.zeros(0, 32) if example.forget else teacher_of(llama, [example])
        alone = train.losses(llama, prompt, collate([example]), teacher)
        torch.testing.assert_close(row, alone["loss_f"] + alone["loss_r"], atol=1e-5, rtol=1e-5)
        assert not row.requires_grad


def test_the_teacher_reads_a_retain_row_once_and_no_other(monkeypatch):
    llama = tiny()
    examples = small_batch(2, 4)
    read = []
    counted = lambda model, rows, **more: read.extend(rows) or answer_hidden(model, rows, **more)
    monkeypatch.setattr(spul, "answer_hidden", counted)
    teacher = spul.Teacher(llama, examples)
    teacher.learn([0, 2, 3, 3])
    teacher.learn([3, 1, 4])
    assert read == [examples[2], examples[3], examples[4]]
    found = teacher.of([4, 0, 2])
    torch.testing.assert_close(found, teacher_of(llama, [examples[4], examples[2]]))
    assert teacher.of([0, 1]).shape == (0, 32)


# -------------------------------------------------------------------------------- in the command


def test_the_command_draws_by_the_losses_of_its_log(folder, files, tmp_path):
    args = train_args(folder, files, tmp_path / "p", "--epochs", 4)
    assert call(train, *args) == 0
    drawn = logged(tmp_path / "p")
    args = train_args(folder, files, tmp_path / "q", "--epochs", 4, "--forget-per-batch", "share")
    assert call(train, *args) == 0
    shared = logged(tmp_path / "q")
    epoch = len(shared) // 4
    assert [line["rows"] for line in drawn[:epoch]] == [line["rows"] for line in shared[:epoch]]
    assert drawn[epoch]["rows"] != shared[epoch]["rows"]
    batches = Batches(small_batch(12, 40), 1, 4, 8, 0, "loss")
    for step, line in enumerate(drawn):
        _, indices, _ = batches.batch(step)
        assert line["n_f"] == sum(i < 12 for i in indices)
        batches.tell(indices, line["rows"])


@pytest.mark.parametrize("change", ["a line less", "no rows", "not JSON"])
def test_resume_refuses_a_log_that_was_changed(change, folder, files, tmp_path, capsys):
    out = tmp_path / "p"
    args = train_args(folder, files, out)
    with pytest.MonkeyPatch.context() as patch:
        steps = iter(range(100))
        plain = train.train_step

        def failing(*all_of_it):
            if next(steps) == 9:
                raise FloatingPointError("loss not finite")
            return plain(*all_of_it)

        patch.setattr(train, "train_step", failing)
        assert call(train, *args) == 3
    log = tmp_path / "p.run" / "log.jsonl"
    lines = log.read_text().splitlines()
    assert len(lines) == 9
    if change == "a line less":
        lines = lines[1:]
    elif change == "no rows":
        lines[2] = json.dumps({**json.loads(lines[2]), "rows": []})
    else:
        lines[2] = lines[2][:20]
    log.write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    assert call(train, *args, "--resume") == 2
    message = capsys.readouterr().err
    assert "log.jsonl: --resume needs the lines of 9 steps" in message and "--overwrite" in message
