"""--after: a second request, with earlier prompts before every query."""

import json

import pytest
import torch

import eval as evaluate
import train
from spul import SoftPrompt, answer_hidden, load_prompt
from support.elsewhere import EARLIER, earlier_verdict
from support.options import parse
from tests.helpers import call, make_rows, phi_of, stop_at, train_args, write_rows


@pytest.fixture
def second(files, tmp_path):
    """The files of a second request: its own rows to forget, the same to keep, the first's."""
    rows = make_rows(10, ["positive", "negative"], "second")
    new = write_rows(tmp_path / "second.jsonl", rows)
    return {**files, "forget": new}, files["forget"]


def after(folder, trained, second, out, *more):
    files, first_rows = second
    options = ["--after", trained, "--after-forget", first_rows, *more]
    return train_args(folder, files, out, *options, tests=True)


@pytest.mark.parametrize("hidden", [0, 7])
def test_earlier_vectors_come_first_and_stay_and_all_new_ones_learn(hidden):
    earlier = torch.randn(3, 12)
    prompt = SoftPrompt(5, 12, hidden, earlier)
    start = prompt()[3:].detach()
    assert torch.equal(start, prompt.mlp(prompt.E))
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.1)
    prompt().square().sum().backward()
    optimizer.step()
    assert torch.equal(prompt()[:3], earlier)
    assert (prompt()[3:] != start).all(dim=1).all()


def test_one_folder_holds_both_and_works_as_one_prompt(
    folder, trained, second, tmp_path, capsys
):
    out = tmp_path / "both"
    assert call(train, *after(folder, trained, second, out, "--generic", "none")) == 0
    shown = capsys.readouterr().out
    assert "4 vectors of earlier prompts stand before it and do not learn" in shown
    phi, info = load_prompt(out, folder)
    assert phi.shape == (8, 32) and info["p"] == 8 and info["options"]["num_tokens"] == 4
    assert torch.equal(phi[:4], phi_of(trained))
    assert info["generic"] == ["unknown", "none"]
    # Without the new prompt is with the earlier one.
    with_first = json.loads((trained / "spul.json").read_text())["results"]["with"]
    without = info["results"]["without"]
    assert without["test retain"]["probability"] == pytest.approx(
        with_first["test retain"]["probability"], rel=1e-4
    )
    assert without[EARLIER]["probability"] == pytest.approx(
        with_first["train forget"]["probability"], rel=1e-4
    )
    # eval.py measures the same.
    files, _ = second
    args = ["--model", folder, "--prompt", out, "--dtype", "fp32", "--retain", files["retain"]]
    assert call(evaluate, *args, "--json", tmp_path / "r.json") == 0
    again = json.loads((tmp_path / "r.json").read_text())["with"]["train retain"]
    assert again["probability"] == pytest.approx(
        info["results"]["with"]["train retain"]["probability"], rel=1e-4
    )


def test_a_third_request_comes_after_two_prompts(folder, trained, second, tmp_path):
    two, three = tmp_path / "two", tmp_path / "three"
    files, first_rows = second
    assert call(train, *train_args(folder, files, two, "--seed", 5)) == 0
    rows = make_rows(8, ["positive", "negative"], "third")
    files = {**files, "forget": write_rows(tmp_path / "third.jsonl", rows)}
    more = ["--after", trained, "--after", two, "--after-forget", first_rows]
    assert call(train, *train_args(folder, files, three, *more)) == 0
    phi = phi_of(three)
    assert torch.equal(phi[:8], torch.cat([phi_of(trained), phi_of(two)]))
    assert len(phi) == 12 and load_prompt(three, folder)[1]["p"] == 12


def job_of(args):
    args, _ = parse([str(a) for a in args])
    args.device = "cpu"
    return train.prepare(args, train.read_data(args), "new")


def test_the_teacher_is_the_model_with_the_earlier_prompts(folder, trained, second, tmp_path):
    job = job_of(after(folder, trained, second, tmp_path / "both", "--gamma", 1))
    _, teacher = train.measure_before(job)
    teacher.learn(range(len(job.examples)))
    phi = phi_of(trained)
    retain = list(teacher.outputs)
    assert len(retain) == sum(not e.forget for e in job.examples)
    want = answer_hidden(job.model, [job.examples[i] for i in retain], phi)
    for i, h in zip(retain, want):
        torch.testing.assert_close(teacher.outputs[i], h, atol=1e-4, rtol=0)
    texts = list(job.general.teacher)[:5]
    for h, text in zip(answer_hidden(job.model, texts, phi), texts):
        torch.testing.assert_close(job.general.teacher[text], h, atol=1e-4, rtol=0)


def test_earlier_rows_are_kept_forgotten_as_rows_to_retain(folder, trained, second, tmp_path):
    job = job_of(after(folder, trained, second, tmp_path / "both"))
    kept = [e for e in job.examples if not e.forget and e.label == "unknown"]
    assert len(kept) == 12
    assert len(job.measured[EARLIER]) == 12
    assert all(e.label in ("positive", "negative") for e in job.measured[EARLIER])
    first = job.examples[: -len(kept)]
    retain = [e for e in first if not e.forget]
    assert [e.ids for e in job.measured["train retain"]] == [e.ids for e in retain]


def test_a_stopped_run_goes_on_with_the_same_bits(
    folder, trained, second, tmp_path, monkeypatch
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert call(train, *after(folder, trained, second, whole)) == 0
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert call(train, *after(folder, trained, second, stopped)) == 130
    assert call(train, *after(folder, trained, second, stopped, "--resume")) == 0
    assert torch.equal(phi_of(whole), phi_of(stopped))


def test_another_earlier_prompt_does_not_go_on(
    folder, trained, second, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "both"
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert call(train, *after(folder, trained, second, out)) == 130
    assert call(train, *after(folder, trained, second, out, "--resume", "--after", trained)) == 2
    assert "after" in capsys.readouterr().err


@pytest.mark.parametrize(
    ["change", "message"],
    [
        (lambda a: drop(a, "--after"), "--after-forget: rows that"),
        (lambda a: drop(a, "--retain"), "--after: --retain FILE with labels is needed"),
        (lambda a: [*a, "--template", "{text}?"], "--template: another than"),
        (lambda a: replace(a, "--after", "demo/model"), "no spul.json"),
    ],
)
def test_what_does_not_go_together_is_said(
    change, message, folder, trained, second, tmp_path, capsys
):
    args = [str(a) for a in after(folder, trained, second, tmp_path / "both")]
    assert call(train, *change(args)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "both").exists()


def drop(args, option):
    i = args.index(option)
    return args[:i] + args[i + 2 :]


def replace(args, option, value):
    i = args.index(option)
    return [*args[: i + 1], value, *args[i + 2 :]]


def test_a_row_that_is_forgotten_and_kept_is_named(folder, trained, files, tmp_path, capsys):
    args = train_args(folder, files, tmp_path / "both", "--after", trained)
    assert call(train, *args, "--after-forget", files["retain"]) == 2
    assert "which is to be forgotten" in capsys.readouterr().err


def test_rows_that_come_back_are_said():
    before, after = {EARLIER: {"accuracy": 0.05}}, {EARLIER: {"accuracy": 0.4}}
    (line,) = earlier_verdict(before, after)
    assert "5 -> 40 %" in line
    assert earlier_verdict(before, {EARLIER: {"accuracy": 0.1}}) == []
    assert earlier_verdict({}, {}) == []
