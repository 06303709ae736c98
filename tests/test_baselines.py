"""The other ways to unlearn: extras/baselines.py and extras/guards.py."""

import dataclasses
import json
import math
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import eval as evaluate
from data import TEMPLATES, collate, make_example, make_examples, read_rows
from extras import baselines, finetune, guards
from model import Llama
from support.tokenizer import Tokenizer
from support.templates import template_from_json
from tests.helpers import (
    DEMO,
    call,
    make_rows,
    stop_at,
    tiny,
    write_rows,
)

FORGET, RETAIN, RANDOM = baselines.FORGET, baselines.RETAIN, baselines.RANDOM


def some_terms(dtype=torch.float64):
    """Two forget rows of 2 and 1 answer tokens, two retain rows of 1 and 2, a random row of 2.

    The vocabulary has 5 tokens.
    """
    draw = torch.Generator().manual_seed(3)
    rows = torch.tensor([0, 0, 1, 2, 3, 3, 4, 4])
    return baselines.Terms(
        torch.randn(8, 5, generator=draw).to(dtype).requires_grad_(),
        torch.tensor([0, 3, 1, 2, 4, 0, 1, 3]),
        rows,
        torch.tensor([FORGET, FORGET, RETAIN, RETAIN, RANDOM]),
        torch.randn(3, 5, generator=draw),
        torch.tensor([2.0, 0.5]),
    )


def by_hand(t):
    """The answer tokens' cross-entropies, row by row, and the KL of the retain rows' tokens."""
    p = [[math.exp(v) / sum(math.exp(w) for w in line) for v in line] for line in t.logits.tolist()]
    ce = [[-math.log(p[i][t.targets[i]]) for i in range(8) if t.rows[i] == row] for row in range(5)]
    known = [
        [math.exp(v) / sum(math.exp(w) for w in line) for v in line]
        for line in t.reference_logits.tolist()
    ]
    kl = [sum(a * math.log(a / b) for a, b in zip(q, p[i])) for q, i in zip(known, (3, 4, 5))]
    return ce, kl


def test_each_baseline_loss_is_its_formula():
    t, mean = some_terms(), lambda values: sum(values) / len(values)
    (f1, f2, r1, r2, random_row), kl = by_hand(t)
    forget, retain, kl_rows = mean(f1 + f2), mean(r1 + r2), (kl[0] + kl[1] + kl[2]) / 2

    def log_sigmoid(x):
        return -math.log(1 + math.exp(-x))

    want = {
        "ga": -forget,
        "rl": forget,
        "ga-kl": -forget + kl_rows,
        "ga-gd": -forget + retain,
        "npo": -2
        / 0.1
        * mean([log_sigmoid(0.1 * (sum(f1) - 2.0)), log_sigmoid(0.1 * (sum(f2) - 0.5))])
        + retain,
        "simnpo": -0.1375
        * 2
        / 2.5
        * mean([log_sigmoid(2.5 * mean(f1)), log_sigmoid(2.5 * mean(f2))])
        + retain,
        "llmu": -0.5 * mean([mean(f1), mean(f2)]) + mean(random_row) + kl_rows,
        "sku": 2.5 * mean([mean(f1), mean(f2)]) + 2.5 * mean(random_row) - kl_rows,
    }
    assert set(want) == set(baselines.LOSSES)
    for name, value in want.items():
        assert baselines.LOSSES[name](t).item() == pytest.approx(value, abs=1e-5), name


def test_a_batch_without_forget_or_without_retain_rows_gives_finite_losses():
    t = some_terms()
    for kind, known, reference in (
        (FORGET, torch.zeros(0, 5), torch.ones(5)),
        (RETAIN, torch.zeros(8, 5), torch.ones(0)),
    ):
        one_sided = dataclasses.replace(
            t, kind=torch.full((5,), kind), reference_logits=known, reference_ce=reference
        )
        for name, loss in baselines.LOSSES.items():
            assert loss(one_sided).isfinite(), name


def test_npo_weighs_a_row_by_twice_a_sigmoid_over_b_and_simnpo_likewise():
    beta = 0.7
    logits = torch.tensor([[9.0, 0.0], [0.0, 0.0], [-9.0, 0.0]]).requires_grad_()
    t = baselines.Terms(
        logits,
        torch.tensor([0, 0, 0]),
        torch.arange(3),
        torch.full((3,), FORGET),
        None,
        torch.tensor([1.0, 0.2, 3.0]),
    )
    ce = F.cross_entropy(logits, t.targets, reduction="none")
    slope = torch.autograd.grad(baselines.npo(t, beta), logits)[0][
        :, 1
    ]  # d ce / d logits[:, 1] = p of token 1
    weight = slope / logits.softmax(dim=1)[:, 1]
    torch.testing.assert_close(weight, -2 * torch.sigmoid(-beta * (ce - t.reference_ce)) / 3)
    assert (weight.abs() < 2 / 3).all() and weight.abs().max() > 0.4


def test_gradient_ascent_goes_up_and_the_kl_pulls_back_only_when_the_model_has_moved():
    t = some_terms(torch.float32)
    up = torch.autograd.grad(baselines.ga(t), t.logits)[0]
    p, hot = t.logits.softmax(dim=1), F.one_hot(t.targets, 5)
    torch.testing.assert_close(up[:3], (hot - p)[:3] / 3)  # away from the true answers
    assert not up[3:].any()
    retain = t.kind[t.rows] == RETAIN
    same = dataclasses.replace(t, reference_logits=t.logits[retain].detach())
    assert same.kl().item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(same.kl(), t.logits)[0], torch.zeros(8, 5), atol=1e-6, rtol=0
    )
    pull = torch.autograd.grad(t.kl(), t.logits)[0]  # (p - p_reference) / rows
    torch.testing.assert_close(pull[retain], (p[retain] - t.reference_logits.softmax(dim=1)) / 2)


def test_sku_learns_what_is_to_go_and_drives_the_rest_away_up_to_ten_nats():
    t = some_terms(torch.float32)
    slope, pull = (
        torch.autograd.grad(x, t.logits, retain_graph=True)[0] for x in (baselines.sku(t), t.kl())
    )
    retain = t.kind[t.rows] == RETAIN
    torch.testing.assert_close(slope[retain], -pull[retain])  # descending it goes up in KL
    assert (
        (slope * F.one_hot(t.targets, 5)).sum(dim=1)[:3] < 0
    ).all()  # and towards the forget answers
    far = dataclasses.replace(
        t,
        reference_logits=torch.tensor([[60.0, 0, 0, 0, 0]] * 3),
        logits=torch.tensor([[0.0, 60, 60, 60, 60]] * 8).requires_grad_(),
    )
    assert far.kl().item() > 80 and far.kl(baselines.SKU_LIMIT).item() == pytest.approx(
        15
    )  # 3 tokens, 2 rows
    assert not torch.autograd.grad(far.kl(baselines.SKU_LIMIT), far.logits)[0].any()


def baseline_args(folder, files, out, *more):
    return [
        "--model",
        folder,
        "--forget",
        files["forget"],
        "--retain",
        files["retain"],
        "--dtype",
        "fp32",
        "--batch-size",
        8,
        "--out",
        out,
        *more,
    ]


@pytest.mark.parametrize("how", ["full", "lora"])
def test_the_reference_of_the_kl_is_not_the_model_that_learns(
    how, folder, files, tmp_path, monkeypatch
):
    values, known, plain = [], [], baselines.Terms.kl

    def spy(t, *given):
        values.append(plain(t, *given))
        known.append(t.reference_logits.clone())
        return values[-1]

    monkeypatch.setattr(baselines.Terms, "kl", spy)
    assert (
        call(
            baselines,
            "ga-kl",
            *baseline_args(
                folder, files, tmp_path / "m", "--train", how, "--lr", "1e-3", "--epochs", 2
            ),
        )
        == 0
    )
    assert values[0].item() == pytest.approx(0, abs=1e-4) and values[-1].item() > 0.01
    first, second = (
        torch.cat(part) for part in (known[:7], known[7:])
    )  # two epochs, in other orders
    torch.testing.assert_close(
        *(x[x[:, 0].argsort()] for x in (first, second)), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "method, how", [(method, how) for method in baselines.LOSSES for how in ("full", "lora")]
)
def test_every_baseline_makes_a_model_that_eval_measures(
    method, how, folder, files, tmp_path, capsys
):
    lr, out = {"full": "1e-3", "lora": "5e-3"}[how], tmp_path / "m"
    assert (
        call(
            baselines,
            method,
            *baseline_args(folder, files, out, "--train", how, "--lr", lr, "--stop-ce", 0),
        )
        == 0
    )
    report = json.loads((out / "run.json").read_text())
    assert report["method"] == method and report["stopped"] is None
    assert report["steps"] == math.ceil(12 / 8 if method in ("ga", "rl") else 52 / 8)
    sizes = [parameter.numel() for parameter in Llama.from_pretrained(folder).parameters()]
    assert (
        report["trainable"] == sum(sizes) if how == "full" else 0 < report["trainable"] < sum(sizes)
    )
    assert (
        call(
            evaluate,
            "--model",
            out,
            "--forget",
            files["forget"],
            "--retain",
            files["retain"],
            "--dtype",
            "fp32",
            "--json",
            tmp_path / "t.json",
        )
        == 0
    )
    assert "cost: " in capsys.readouterr().out
    table = json.loads((tmp_path / "t.json").read_text())
    assert table["cost"] == {
        name: report[name] for name in ("trainable", "steps", "seconds", "peak_bytes")
    }
    assert {"train forget", "train retain"} <= set(table["without"])
    rows = make_examples(
        read_rows(files["forget"]), Tokenizer(folder), TEMPLATES["sentiment"], 500
    )[0]
    before, after = (
        evaluate.measure(Llama.from_pretrained(path), Tokenizer(folder), rows)["probability"]
        for path in (folder, out)
    )
    assert after < before if method == "ga" else after != before


def test_ascent_stops_by_its_rule_and_says_at_which_step(folder, files, tmp_path, capsys):
    args = baseline_args(
        folder, files, tmp_path / "m", "--epochs", 40, "--lr", "3e-3", "--stop-ce", 20
    )
    assert call(baselines, "ga", *args) == 0
    report = json.loads((tmp_path / "m" / "run.json").read_text())
    assert 1 < report["stopped"] < 80 and report["steps"] == report["stopped"] - 1
    assert f"stopped at step {report['stopped']}" in capsys.readouterr().out
    assert (
        call(baselines, "ga", *baseline_args(folder, files, tmp_path / "n")) == 0
    )  # by default: as bad as a guess
    report = json.loads((tmp_path / "n" / "run.json").read_text())
    assert report["options"]["stop_ce"] == pytest.approx(math.log(2048))
    assert report["stopped"] <= 2


@pytest.mark.parametrize("how", ["full", "lora"])
@pytest.mark.parametrize("strength", [0, 0.5, 2])
def test_sku_ends_on_the_other_side_of_where_it_started(
    strength, how, folder, files, tmp_path, monkeypatch
):
    learned, plain = [], baselines.negate

    def spy(llama, *given):
        layer = llama.layers[1].mlp.up_proj
        learned.append(
            layer.weight.detach().clone()
            if how == "full"
            else layer.base.weight + layer.scale * layer.B @ layer.A
        )
        plain(llama, *given)

    monkeypatch.setattr(baselines, "negate", spy)
    assert (
        call(
            baselines,
            "sku",
            *baseline_args(
                folder, files, tmp_path / "m", "--train", how, "--lr", "1e-2", "--negate", strength
            ),
        )
        == 0
    )
    start, end = (
        Llama.from_pretrained(path).layers[1].mlp.up_proj.weight
        for path in (folder, tmp_path / "m")
    )
    assert (learned[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(end - start, -strength * (learned[0] - start), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method, label", [("llmu", "dog"), ("sku", "cat")])
def test_random_answers_are_those_of_other_rows(method, label, folder, tmp_path, monkeypatch):
    """llmu takes those of the retain rows, SKU those of the forget rows."""
    files = {
        side: write_rows(tmp_path / f"{side}.jsonl", make_rows(10, [label], side))
        for side, label in (("forget", "cat"), ("retain", "dog"))
    }
    drawn, plain = [], baselines.with_random_answers
    monkeypatch.setattr(
        baselines, "with_random_answers", lambda *a: drawn.extend(plain(*a)) or plain(*a)
    )
    assert (
        call(baselines, method, *baseline_args(folder, files, tmp_path / "m", "--randoms", 2)) == 0
    )
    assert len(drawn) == 20 and {e.label for e in drawn} == {label}


def test_random_answers_come_after_the_texts_of_forget_rows():
    example = data.Example((1, 5, 6, 7, 8, 9), 2, "x y", True)
    drawn = baselines.with_random_answers(
        [example], [((3,), "a"), ((4, 2), "b")], 50, random.Random(0)
    )
    assert {e.ids for e in drawn} == {(1, 5, 6, 7, 3), (1, 5, 6, 7, 4, 2)} and {
        e.n for e in drawn
    } == {1, 2}


def test_a_stopped_baseline_goes_on_as_if_nothing_had_been(
    folder, files, tmp_path, monkeypatch, capsys
):
    def args(out):
        return baseline_args(
            folder, files, tmp_path / out, "--dropout", "0.1", "--train", "lora", "--epochs", 2
        )

    assert call(baselines, "llmu", *args("whole")) == 0
    calls = stop_at(9, monkeypatch, finetune)
    assert (
        call(baselines, "llmu", *args("part")) == 130
        and "after step 9 of 14" in capsys.readouterr().err
    )
    assert call(baselines, "llmu", *args("part"), "--resume") == 0
    whole, part = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part")
    )
    assert whole == part and len(calls) == 14


def test_retraining_is_memorising_on_the_retain_rows_alone(folder, files, tmp_path):
    assert (
        call(baselines, "retrain", *baseline_args(folder, files, tmp_path / "a", "--lr", "1e-2"))
        == 0
    )
    assert (
        call(
            finetune,
            "--model",
            folder,
            "--data",
            files["retain"],
            "--dtype",
            "fp32",
            "--batch-size",
            8,
            "--lr",
            "1e-2",
            "--out",
            tmp_path / "b",
        )
        == 0
    )
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


E4 = torch.tensor([[1.0, -4.0, 3.0, 0.5], [-2.0, 0.0, 1.0, 8.0]])


@pytest.mark.parametrize(
    "kind, dims, want",
    [
        ("zero_first", 2, [[0, 0, 3, 0.5], [0, 0, 1, 8]]),
        ("zero_top", 1, [[1, 0, 3, 0.5], [-2, 0, 1, 0]]),
        ("flip_top", 2, [[1, 4, -3, 0.5], [2, 0, 1, -8]]),
        ("flip_first", 99, [[-1, 4, -3, -0.5], [2, 0, -1, -8]]),
        ("sub_top", 1, [[1, -4, 1, 0.5], [-2, 0, 1, 6]]),
        ("add_least", 1, [[1, -2, 3, 0.5], [0, 0, 1, 8]]),
        ("reverse", 1, [[-2, 0, 1, 8], [1, -4, 3, 0.5]]),
    ],
)
def test_a_corruption_changes_what_its_name_says(kind, dims, want):
    assert guards.corrupt(E4, kind, dims, 2.0, 0).tolist() == want


@pytest.mark.parametrize("kind", guards.ECO_CORRUPTIONS)
def test_every_corruption_is_the_same_for_the_same_seed_and_stays_finite_in_half_precision(kind):
    e = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    once, again, other = (guards.corrupt(e, kind, 5, 0.7, seed) for seed in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, e)
    if "noise" in kind or "rand" in kind or "shift" in kind or kind == "shuffle":
        assert not torch.equal(once, other)
    if "_" in kind:
        assert ((once != e).sum(dim=1) <= 5).all()
    if kind.startswith("shift"):
        torch.testing.assert_close((once - e).abs().amax(dim=1), torch.full((6,), 0.7))
    assert guards.corrupt(e.half(), kind, 5, 1e6, 1).isfinite().all()


def test_noise_has_the_strength_as_its_spread():
    noise = guards.corrupt(torch.zeros(200, 64), "noise_first", 64, 3.0, 0)
    assert noise.std().item() == pytest.approx(3.0, rel=0.03) and abs(noise.mean().item()) < 0.1


def test_averages_are_those_of_each_prompt_alone():
    llama = tiny()
    examples = [
        data.Example((1, 5, 6, 7, 8, 9, 3), 2, "", False),
        data.Example((1, 4, 2), 1, "", False),
    ]
    found = guards.averages(llama, examples)
    for i, ids in enumerate(([1, 5, 6, 7, 8], [1, 4])):
        torch.testing.assert_close(
            found[i], llama.hidden(torch.tensor([ids]))[0].mean(dim=0), atol=1e-5, rtol=1e-5
        )


def test_the_classifier_separates_what_can_be_separated_and_weighs_both_classes_the_same():
    draw = torch.Generator().manual_seed(0)
    y = torch.cat([torch.ones(20), torch.zeros(400)])
    x = torch.randn(420, 8, generator=draw) * 0.3 + y[:, None] * torch.tensor([2.0] + [0.0] * 7) + 5
    w, b = guards.fit_classifier(x, y)
    assert (((x @ w + b) > 0) == (y > 0)).all()
    w, b = guards.fit_classifier(torch.zeros(420, 8), y)
    assert torch.sigmoid(b).item() == pytest.approx(0.5, abs=1e-3)  # with nothing to go by


def test_thresholds_miss_no_more_than_they_may():
    p, y = torch.linspace(0.01, 1, 100), torch.cat([torch.zeros(50), torch.ones(50)])
    tau = guards.threshold(p, y, 0.1, False)
    assert (p[50:] <= tau).sum() == 5  # a tenth of the 50 rows to forget
    p, y = torch.tensor([0.1, 0.2, 0.4, 0.7, 0.9, 0.95]), torch.tensor([0.0, 0, 1, 0, 1, 1])
    # 1 - p(true class): .1 .2 .6 .7 .1 .05; the ceil(7 (1 - 1/4)) = 6th is q = .7
    assert guards.threshold(p, y, 0.25, True) == pytest.approx(0.7, abs=1e-6)


@pytest.fixture(scope="module")
def eco(folder, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("guard") / "eco"
    assert call(baselines, "eco", *baseline_args(folder, files, out, "--strength", 3)) == 0
    return out


def test_eco_corrupts_the_prompts_of_flagged_queries_and_nothing_else(eco, folder, files):
    llama, tokenizer = Llama.from_pretrained(folder), Tokenizer(folder)
    guard, info = guards.load(eco, folder)
    template = template_from_json(info["template"])
    examples = [
        e
        for name in ("forget", "retain")
        for e in make_examples(read_rows(files[name]), tokenizer, template, 500)[0]
    ]
    p = guard.probability(guards.averages(llama, examples))
    guard.info["tau"] = p.median().item()  # half of them
    same, embed, report = guard.apply(llama, tokenizer, examples)
    assert same is examples and report["flagged"] == pytest.approx(0.5, abs=0.03)
    batch = collate(examples)
    before, after = (
        llama.embed_tokens(batch.tokens),
        embed([e.prompt for e in examples], batch.tokens),
    )
    for row, e in enumerate(examples):
        n = len(e.prompt) - 1 if p[row] > guard.info["tau"] else 0
        assert (
            torch.equal(before[row, n:], after[row, n:])
            and (before[row, :n] != after[row, :n]).all()
        )
    for e, h in zip(examples[:3], guards.guarded_hidden(llama, examples, embed)):  # as each alone
        alone = llama.run(embed([e.prompt], torch.tensor([e.ids[:-1]])))[0][0, -e.n :]
        torch.testing.assert_close(h, alone, atol=1e-4, rtol=1e-4)
    want = evaluate.measure(llama, tokenizer, examples)
    got = guards.measure_guarded(llama, tokenizer, examples, guard)
    assert got["probability"] != want["probability"]
    guard.info["strength"] = 0.0
    assert guards.measure_guarded(llama, tokenizer, examples, guard)[
        "probability"
    ] == pytest.approx(want["probability"], abs=1e-6)


def test_a_guard_is_measured_and_asked(eco, folder, files, tmp_path, capsys):
    args = ["--model", folder, "--prompt", eco, "--dtype", "fp32"]
    assert (
        call(
            guards,
            *args,
            "--forget",
            files["forget"],
            "--retain",
            files["retain"],
            "--json",
            tmp_path / "t.json",
        )
        == 0
    )
    text, table = capsys.readouterr().out, json.loads((tmp_path / "t.json").read_text())
    assert "flagged" in text and "cost: " in text and table["cost"]["trainable"] == 33  # w and b
    assert (
        0 <= table["with"]["train retain"]["flagged"] <= 1
        and "flagged" not in table["without"]["train retain"]
    )
    assert (
        call(guards, *args, "--ask", "red green") == 0
        and "with the prompt:" in capsys.readouterr().out
    )
    other = tmp_path / "other"
    finetune.save_weights(tiny(5), other)
    shutil.copy(DEMO / "model" / "tokenizer.model", other)
    assert call(guards, "--model", other, "--prompt", eco, "--forget", files["forget"]) == 2
    assert "trained on another model" in capsys.readouterr().err


def test_eco_searches_the_strength_that_comes_nearest_to_the_target(
    folder, files, tmp_path, capsys
):
    assert (
        call(
            baselines,
            "eco",
            *baseline_args(folder, files, tmp_path / "g", "--target", folder, "--miss", 0.5),
        )
        == 0
    )
    info = json.loads((tmp_path / "g" / "guard.json").read_text())
    assert info["strength"] >= 0.1 and f"strength {info['strength']:.3g}" in capsys.readouterr().out


def test_icul_puts_wrong_then_right_rows_before_the_query(folder, files, tmp_path, capsys):
    args = baseline_args(folder, files, tmp_path / "g", "--k", 2, "--context", 3)
    assert call(baselines, "icul", *args) == 0
    guard, info = guards.load(tmp_path / "g", folder)
    forget, llama, tokenizer = (
        read_rows(files["forget"]),
        Llama.from_pretrained(folder),
        Tokenizer(folder),
    )
    assert all(
        {text: label for text, label in info["wrong"]}[row.text] != row.label for row in forget
    )
    kept = {row.text: row.label for row in read_rows(files["retain"])}
    assert len(info["right"]) == 3 and all(kept[text] == label for text, label in info["right"])
    example = make_example(forget[0], tokenizer, template_from_json(info["template"]), 500)[0]
    (found,), embed, report = guard.apply(llama, tokenizer, [example])
    assert embed is None and report == {} and found.ids[-example.n :] == example.ids[-example.n :]
    lines = tokenizer.decode(list(found.prompt)).split("### Text:")[1:]
    assert (
        len(lines) == 6 and forget[0].text in lines[0] and forget[0].text in lines[-1]
    )  # itself is the nearest
    assert dict(map(tuple, info["wrong"]))[forget[0].text] in lines[0]
    assert found.ids[: len(tokenizer.bos)] == tuple(tokenizer.bos)
    assert (
        call(
            guards,
            "--model",
            folder,
            "--prompt",
            tmp_path / "g",
            "--forget",
            files["forget"],
            "--dtype",
            "fp32",
        )
        == 0
    )
    assert (
        call(baselines, "icul", *baseline_args(folder, files, tmp_path / "h", "--context", 40)) == 0
    )
    assert (
        call(guards, "--model", folder, "--prompt", tmp_path / "h", "--forget", files["forget"])
        == 2
    )
    assert "fewer --context rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        (["ga", "--forget", "F"], "--model DIR is missing"),
        (["ga", "--model", "M"], "--forget FILE is missing"),
        (["ga", "--model", "M", "--forget", "F"], "--retain FILE is missing"),
        (["ga", "--model", "M", "--forget", "F", "--retain", "F"], "the same text as"),
        (["ga", "--model", "M", "--forget", "F", "--retain", "R", "--beta", "1"], "ga has none"),
        (
            ["npo", "--model", "M", "--forget", "F", "--retain", "R", "--quantize", "int8"],
            "16 or 32 bit",
        ),
        (
            ["npo", "--model", "M", "--forget", "F", "--retain", "R", "--test-retain", "R"],
            "eval.py measures",
        ),
        (
            ["rl", "--model", "M", "--forget", "F", "--retain", "R", "--generic", "positive"],
            "is also a generic answer",
        ),
        (
            ["rl", "--model", "M", "--forget", "F", "--retain", "R", "--generic", ","],
            "at least one answer",
        ),
        (["eco", "--model", "M", "--forget", "F", "--retain", "R", "--target", "none"], "none"),
        (["eco", "--model", "M", "--forget", "F", "--retain", "R", "--target", "7"], "from 0 to 1"),
        (["icul", "--model", "M", "--forget", "ONE", "--retain", "SAME"], "only one"),
        (["melt", "--model", "M"], "invalid choice"),
    ],
)
def test_wrong_input_of_baselines_gets_one_line_and_status_2(
    args, message, folder, files, tmp_path, capsys
):
    for name in ("ONE", "SAME"):
        write_rows(tmp_path / name, make_rows(4, ["positive"], name))
    known = {
        "M": folder,
        "F": files["forget"],
        "R": files["retain"],
        "ONE": tmp_path / "ONE",
        "SAME": tmp_path / "SAME",
    }
    assert call(baselines, *(known.get(arg, arg) for arg in args), "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: (path / "guard.json").write_text("{}"), "not as extras.baselines writes it"),
        (lambda path: (path / "guard.safetensors").write_bytes(b"half"), "not a complete file"),
        (
            lambda path: save_file(
                {"w": torch.ones(3), "b": torch.ones(1)}, path / "guard.safetensors"
            ),
            "not the tensors",
        ),
    ],
)
def test_a_broken_guard_is_refused(change, message, eco, folder, files, tmp_path, capsys):
    shutil.copytree(eco, tmp_path / "g")
    change(tmp_path / "g")
    assert (
        call(guards, "--model", folder, "--prompt", tmp_path / "g", "--forget", files["forget"])
        == 2
    )
    assert message in capsys.readouterr().err
