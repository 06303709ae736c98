"""Prompts trained on changed queries: extras/robust.py."""

import dataclasses

from tests.helpers import (
    call,
    phi_of,
    small_batch,
    stop_at,
    teacher_of,
    tiny,
    train_args,
    vectors,
)

import pytest
import torch
import torch.nn.functional as F

import train
from data import Row, Template, collate, make_example
from extras import robust
from model import Llama
from spul import SoftPrompt


def draws(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_noise_has_the_size_asked_for_and_falls_on_the_text_alone():
    e, text = vectors(800, 64).detach().view(2, 400, 64), torch.zeros(2, 400, dtype=torch.bool)
    text[0, 10:390], text[1, 100:200] = True, True
    change = robust.noise(e, text, 0.3, 0.5, draws(1, 2)) - e
    assert not change[~text].any()
    assert change[text].std() == pytest.approx(0.15, rel=0.02) and abs(change[text].mean()) < 0.005
    assert (change[text] / 0.15).pow(4).mean() == pytest.approx(
        3, rel=0.05
    )  # the fourth moment of a normal variable
    alone = robust.noise(e[1:, :250], text[1:, :250], 0.3, 0.5, draws(2)) - e[1:, :250]
    assert torch.equal(alone, change[1:, :250])  # whatever else is in the batch


def test_tokens_become_near_ones_at_the_rate_asked_for():
    table = vectors(40, 16).detach()
    near = robust.neighbours(table, range(30), special={0, 1, 7}, k=3)
    for i in range(40):
        others = [j for j in range(40) if j not in (0, 1, 7, i)]
        likest = sorted(others, key=lambda j: -F.cosine_similarity(table[i], table[j], dim=0))[:3]
        assert near[i].tolist() == (likest if i < 30 and i not in (0, 1, 7) else [i] * 3)
    tokens, text = torch.full((2, 5000), 9), torch.ones(2, 5000, dtype=torch.bool)
    text[:, :1000] = False
    new = robust.semantic(tokens, text, 0.2, near, draws(1, 2))
    assert not (new != tokens)[~text].any() and torch.equal(tokens, torch.full((2, 5000), 9))
    hit = new[text] != 9
    assert hit.float().mean() == pytest.approx(0.2, abs=0.015)
    counts = torch.stack([(new[text] == j).float().mean() for j in near[9]])
    torch.testing.assert_close(counts, torch.full((3,), 0.2 / 3), atol=0.01, rtol=0)


def test_the_adversarial_step_climbs_each_rows_own_loss():
    """Against the gradient of whole rows, one at a time, with the prompt before each."""
    llama, prompt, examples = tiny(), SoftPrompt(4, 32, 8), small_batch(2, 3)
    examples = [dataclasses.replace(e, text=(1, len(e.ids) - e.n)) for e in examples]
    batch, seen = collate(examples), []
    corrupt = robust.corruption(
        llama, "adversarial", 0.25, 0, llama.embed_tokens.weight, examples, set()
    )
    phi = prompt().detach()
    changed = corrupt(batch, phi, step=3, rows=range(5))
    e0 = llama.embed_tokens(batch.tokens).detach()
    length = (
        torch.cat([e0[i, 1 : len(e.ids) - e.n] for i, e in enumerate(examples)]).norm(dim=-1).mean()
    )

    def own(e, i):
        x = torch.cat([phi, e[: len(examples[i].ids) - 1]])[None]
        log_q = F.log_softmax(llama.head(llama.run(x)[0]), -1)[0, len(phi) :]
        ids, n = examples[i].ids, examples[i].n
        return -sum(log_q[t - 1, ids[t]] for t in range(len(ids) - n, len(ids)))

    for i, e in enumerate(examples):
        x = e0[i].clone().requires_grad_()
        (g,) = torch.autograd.grad(own(x, i), x)
        inside = slice(1, len(e.ids) - e.n)
        step = torch.zeros_like(x)
        step[inside] = 0.25 * length * F.normalize(g[inside], dim=-1)
        torch.testing.assert_close(changed[i] - e0[i], step, atol=1e-4, rtol=1e-3)
        seen.append((own(e0[i] + 0.01 * step, i) - own(e0[i], i)).item())
    assert min(seen) > 0 and not changed.requires_grad


def test_corruption_changes_what_the_prompt_reads_and_not_what_is_asked_of_it():
    llama, prompt, examples = tiny(), SoftPrompt(4, 32, 8), small_batch(2, 3)
    examples = [dataclasses.replace(e, text=(1, len(e.ids) - e.n)) for e in examples]
    teacher = teacher_of(llama, examples)
    plain = train.losses(llama, prompt, collate(examples), teacher)["loss"]
    same = train.losses(
        llama, prompt, collate(examples), teacher, read=lambda batch, phi: batch.tokens
    )["loss"]
    assert torch.equal(plain, same)
    other = [dataclasses.replace(e, ids=(e.ids[0], 5, *e.ids[2:])) for e in examples]
    read = train.losses(
        llama, prompt, collate(examples), teacher, read=lambda batch, phi: collate(other).tokens
    )
    torch.testing.assert_close(read, train.losses(llama, prompt, collate(other), teacher))


@pytest.mark.parametrize("kind", ["noise", "adversarial", "semantic"])
def test_corruption_is_drawn_anew_at_each_step_and_again_after_a_stop(
    kind, folder, files, tmp_path, monkeypatch
):
    def args(name, *more):
        return train_args(folder, files, tmp_path / name, "--epochs", 2, "--corrupt", kind, *more)

    assert call(robust, *args("whole")) == 0
    stop_at(8, monkeypatch, train)
    assert call(robust, *args("part")) == 130 and call(robust, *args("part", "--resume")) == 0
    assert torch.equal(phi_of(tmp_path / "whole"), phi_of(tmp_path / "part"))
    assert call(robust, *args("strong", "--corrupt-strength", 0.9)) == 0
    assert not torch.equal(phi_of(tmp_path / "whole"), phi_of(tmp_path / "strong"))


@pytest.mark.parametrize("kind", ["noise", "semantic"])
def test_a_rows_corruption_depends_on_the_step_and_on_the_row(kind, tokenizer, folder):
    llama = Llama.from_pretrained(folder)
    examples = [
        make_example(
            Row("a film by john carpenter", "positive", ""), tokenizer, Template("{text} is"), 99
        )[0]
    ] * 2
    change = robust.corruption(
        llama, kind, 0.5, 0, llama.embed_tokens.weight, examples, tokenizer.special
    )
    batch = collate(examples)
    one, again, two = (change(batch, None, step, [4, 5]) for step in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, two) and not torch.equal(one[0], one[1])
    assert torch.equal(change(batch, None, 1, [5, 9])[0], one[1])


def test_a_batch_without_text_stays_as_it_is_under_an_adversary():
    e = torch.ones(2, 3, 4)
    assert torch.equal(
        robust.adversarial(e, torch.zeros(2, 3, dtype=torch.bool), 0.3, torch.ones(2, 3, 4)), e
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (["--corrupt-strength", 0.3], "needs --corrupt noise"),
        (["--corrupt", "semantic", "--corrupt-strength", 2], "at most 1"),
        (["--corrupt", "louder"], "invalid choice"),
    ],
)
def test_a_wrong_kind_or_strength_is_refused(options, words, folder, files, tmp_path, capsys):
    assert call(robust, *train_args(folder, files, tmp_path / "p", *options)) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "p").exists()


def test_changed_queries_are_trained_on_with_recomputation(folder, files, tmp_path):
    args = train_args(folder, files, tmp_path / "p", "--corrupt", "adversarial", "--recompute")
    assert call(robust, *args) == 0
    assert phi_of(tmp_path / "p").isfinite().all()


def test_a_stopped_run_with_changed_queries_is_not_resumed_without_them(
    folder, files, tmp_path, monkeypatch, capsys
):
    args = train_args(folder, files, tmp_path / "p", "--epochs", 2)
    stop_at(3, monkeypatch, train)
    assert call(robust, *args, "--corrupt", "noise") == 130
    assert call(train, *args, "--resume") == 2
    assert "corrupt, corrupt_strength changed" in capsys.readouterr().err
