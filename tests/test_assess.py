"""The assessment: extras/assess.py and extras/probes.py."""

import argparse
import dataclasses
import json
import math
import random
import re
import shutil

import pytest
import torch
import torch.nn.functional as F

import data
import train
from data import Row, Template, make_example
from extras import assess, finetune, probes
from model import Llama
from tests.helpers import call, concatenated, make_rows, tiny, train_args, vectors, write_rows


def test_auc_and_tpr_equal_hand_arithmetic():
    assert probes.auc([3.0, 2.0, 1.0], [2.0, 0.0]) == pytest.approx((2 + 1.5 + 1) / 6)
    assert probes.auc([1.0], [1.0]) == 0.5 and probes.auc([0.0, 0.1], [1.0, 2.0]) == 0
    others = list(map(float, range(200)))  # 1 % of them, two, may be above
    assert (
        probes.tpr([197.5, 197.0, 199.5, 0.0], others) == 0.5
        and probes.tpr([9.0, 0.0], [5.0, 1.0]) == 0.5
    )


def test_the_bag_of_words_finds_what_words_tell_and_nothing_else():
    rng = random.Random(0)
    rows = lambda words, n: [Row(" ".join(rng.choices(words, k=8)), "a", "") for _ in range(n)]
    common = list("abcdefghijkl")
    assert probes.bag_of_words(rows([*common, "xyz"], 60), rows(common, 60), 0) > 0.7
    assert abs(probes.bag_of_words(rows(common, 100), rows(common, 100), 0) - 0.5) < 0.12


@pytest.mark.parametrize("p", [0, 4])
def test_token_probabilities_are_those_of_the_whole_row(p, folder, tokenizer):
    llama, phi = Llama.from_pretrained(folder), vectors(4).detach() if p else None
    subject = probes.Subject("with", llama, phi, {}, folder)
    row = Row("a film by john", "positive", "")
    e, _ = make_example(row, tokenizer, data.TEMPLATES["sentiment"], 99)
    (text,) = probes.texts([e])
    assert tokenizer.decode(list(text.ids[-text.n :])).strip() == row.text
    for example in (e, text):
        x = torch.tensor([example.ids])
        log_p = F.log_softmax(llama.head(concatenated(llama, x, phi)) if p else llama(x), -1)[0]
        places = range(len(example.ids) - example.n, len(example.ids))
        by_hand = torch.stack([log_p[t - 1, example.ids[t]] for t in places])
        torch.testing.assert_close(
            probes.token_log_p(subject, [example])[0], by_hand.detach(), atol=1e-4, rtol=1e-4
        )
    labels = {"good": [5, 9], "bad": [7], "best": [5, 8]}
    x = torch.tensor([e.ids[: -e.n]])
    chances = F.softmax(llama.head(concatenated(llama, x, phi)) if p else llama(x), -1)[0, -1]
    assert probes.outside(subject, [e], labels)[0] == pytest.approx(
        1 - (chances[5] + chances[7]).item(), abs=1e-5
    )
    assert probes.least(torch.tensor([-1.0, -5, -3, -2, -4, 0, -1, -1, -1, -1])) == -4.5


def test_changed_queries_are_changed_as_they_say():
    rng, text = random.Random(0), "the quick brown fox jumps over the lazy dog " * 20
    moved = probes.swapped(text, rng)
    wrong = sum(a != b for a, b in zip(text, moved))
    assert (
        sorted(moved) == sorted(text) and 0.75 <= wrong / 2 / (sum(map(str.isalpha, text)) / 8) <= 1
    )
    kept = len(probes.thinned(text, rng).split()) / len(text.split())
    assert 0.83 < kept < 0.96 and probes.thinned("one", random.Random(1)) == "one"
    rows = [Row("b", "yes", ""), Row("c", "no", "")]
    for _ in range(9):
        assert probes.joined(Row("a", "no", ""), rows, False, rng).text == "c\na"
        assert probes.joined(Row("a", "no", ""), rows, True, rng).text == "a\nc"
    assert probes.joined(Row("a", "maybe", ""), rows, True, rng).text in ("a\nb", "a\nc")
    first, second = probes.reworded(Template("### Say: {text}\n\n### Answer:"))
    assert first == Template("Say: {text}\n\n Answer:")
    assert second == Template("Say: {text} Answer:")
    for template in data.TEMPLATES.values():
        assert len({template, *probes.reworded(template)}) == 3
        assert all(other.string.count("{text}") == 1 for other in probes.reworded(template))


def test_weights_are_rounded_to_the_nearest_of_their_groups_values():
    w = torch.zeros(2, 128)
    w[0, :3], w[0, 64], w[1, 5] = torch.tensor([7.0, 3.4, -1.6]), 0.5, -70.0
    w[1, 6] = 12.0
    expected = torch.zeros(2, 128)
    expected[0, :3], expected[0, 64], expected[1, 5], expected[1, 6] = (
        torch.tensor([7.0, 3.0, -2.0]),
        0.5,
        -70.0,
        10.0,
    )
    torch.testing.assert_close(probes.rounded(w, 4), expected)  # steps 1, 0.5 / 7, 10
    torch.testing.assert_close(probes.rounded(w, 8), w, atol=0.3, rtol=0)
    assert probes.rounded(torch.randn(3, 40), 4).shape == (3, 40)


@pytest.fixture(scope="session")
def assessed(folder, tmp_path_factory):
    """Enough rows, a prompt and a second model of the same shape; the assessment of all parts."""
    out = tmp_path_factory.mktemp("assess")
    names = {"forget": 24, "retain": 40, "test_forget": 22, "test_retain": 22}
    files = {
        name: write_rows(out / f"{name}.jsonl", make_rows(n, ["positive", "negative"], seed))
        for seed, (name, n) in enumerate(names.items())
    }
    finetune.save_weights(tiny(seed=1), out / "other")
    shutil.copy(folder / "tokenizer.model", out / "other")
    assert call(train, *train_args(folder, files, out / "p")) == 0
    named = [a for n, f in files.items() for a in (f"--{n.replace('_', '-')}", f)]
    args = ["--model", folder, "--dtype", "fp32", *named]
    full = [
        *args,
        "--prompt",
        out / "p",
        "--retrained",
        out / "other",
        "--unrelated",
        files["test_retain"],
    ]
    before = (folder / "model.safetensors").read_bytes()
    assert call(assess, *full, "--json", out / "a.json") == 0
    assert (folder / "model.safetensors").read_bytes() == before
    return args, full, out


def test_the_assessment_has_every_part_and_every_column(assessed, capsys):
    args, full, out = assessed
    found = json.loads((out / "a.json").read_text())
    assert list(found["found"]) == list(assess.COLUMNS)
    assert all(list(values) == list(probes.PARTS) for values in found["found"].values())
    lines = {(row["part"], row["line"]): row for row in found["lines"]}
    assert {part for part, _ in lines} == set(probes.PARTS)
    assert sum(part == "robustness" for part, _ in lines) == 20 
    assert lines["removed", "prompt left out"]["with"] == lines["removed", "train forget"]["before"]
    assert lines["removed", "prompt left out"]["retrained"] is None
    assert lines["removed", "likeliest label"]["with"] >= lines["removed", "train forget"]["with"]
    own = found["found"]
    leak = [1 - own[name]["membership"]["loss, AUC"] for name in ("with", "retrained")]
    assert lines["membership", "loss, PrivLeak"]["with"] == pytest.approx(
        (leak[0] - leak[1]) / leak[1]
    )
    assert lines["relearning", "8 rows, 20 steps"]["retrained"] is not None
    assert (
        "relearning" in own["before"]
        and own["before"]["relearning"] == own["before"]["attack"] == {}
    )
    assert lines["cost", "parameters trained"]["with"] == 752
    assert [line for (_, line), row in lines.items() if "stored" in row["what"]] == [
        "bytes beside the model"
    ]
    assert lines["utility", "unrelated, perplexity"]["before"] > 1
    for row in found["lines"]:
        assert row["what"] and all(
            row[name] is None or math.isfinite(row[name]) for name in assess.COLUMNS
        )


def test_the_likeliest_label_leaves_all_other_answers_out():
    class Model:
        device = "cpu"

        def head(self, h):  # h (1, V) are the logits themselves
            return h

    hidden = [
        torch.tensor([[9.0, 2, 1, 0], [0, 0, 0, 9]]),
        torch.tensor([[9.0, 1, 1, 3]]),
    ]  # the first position counts
    s = probes.Subject("with", Model(), None, {}, None)
    assert probes.likeliest_label(s, hidden, {"no": [1, 3], "yes": [3]}) == ["no", "yes"]


def test_the_assessment_goes_on_where_it_was_stopped_and_says_what_holds(
    assessed, tmp_path, monkeypatch, capsys
):
    args, full, out = assessed
    assert call(assess, *full, "--json", tmp_path / "part.json", "--only", "removed") == 0
    assert "| removed | train forget | asked plainly" in capsys.readouterr().out
    part = json.loads((tmp_path / "part.json").read_text())
    assert all(list(values) == ["removed"] for values in part["found"].values())
    asked, real = [], dict(probes.PARTS)
    whole = json.loads((out / "a.json").read_text())
    del whole["found"]["with"]["attack"], whole["found"]["retrained"]["utility"]
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    for name, part in real.items():
        monkeypatch.setitem(
            probes.PARTS,
            name,
            lambda s, c, name=name, part=part: asked.append((s.name, name)) or part(s, c),
        )
    assert call(assess, *full, "--json", tmp_path / "whole.json") == 0
    assert asked == [("with", "attack"), ("retrained", "utility")]
    again, before = (
        json.loads(file.read_text())["lines"] for file in (tmp_path / "whole.json", out / "a.json")
    )
    assert again == before
    said = capsys.readouterr().out
    assert (
        "Whoever can leave the prompt out gets" in said
        and "Rely on it where" in said
        and "retrained" in said
    )
    for other in (["--rows", 21], ["--dtype", "bf16"]):
        assert call(assess, *full, *other, "--json", tmp_path / "whole.json") == 2
        assert "measured of other inputs" in capsys.readouterr().err
    first = [a for i, a in enumerate(full) if "--retrained" not in full[max(0, i - 1) : i + 1]]
    assert call(assess, *first, "--only", "removed", "--json", tmp_path / "later.json") == 0
    asked.clear()
    assert call(assess, *full, "--only", "removed", "--json", tmp_path / "later.json") == 0
    assert (
        asked == [("retrained", "removed")]
        and json.loads((tmp_path / "later.json").read_text())["finished"]
    )


def test_an_attack_learns_and_leaves_the_model_as_it_was(folder, tokenizer, monkeypatch):
    llama = Llama.from_pretrained(folder)
    before = {name: p.clone() for name, p in llama.named_parameters()}
    rows = {
        name: [Row(f"{name} number {i}", "ab"[i % 2], "") for i in range(24)]
        for name in assess.SPLITS
    }
    args = argparse.Namespace(template=data.TEMPLATES["sentiment"], seed=0)
    setting = probes.Setting(args, tokenizer, rows, [], {}, 99)
    subject = probes.Subject("with", llama, vectors(3).detach(), {}, folder)
    examples = setting.examples("train forget")
    known = lambda s, rows: (
        sum(log_p.sum().item() for log_p in probes.token_log_p(s, rows)) / len(rows)
    )  # in nats
    monkeypatch.setattr(probes.Subject, "accuracy", known)
    found = probes.tuned(subject, examples[:12], examples[:12], 0)
    first = known(subject, examples)
    assert list(found) == [1, 5, 20] and found[20] > found[5] > first and found[20] > first + 0.2
    assert probes.attack(subject, setting)["rows it was trained on"] > first + 0.2
    probes.quantised(subject, setting)
    after = dict(llama.named_parameters())
    assert after.keys() == before.keys() and all(
        torch.equal(after[name], p) for name, p in before.items()
    )


@pytest.fixture
def probing(folder, tokenizer):
    """A model after a prompt, and rows whose label says what they are.

    f: to forget, r: to retain, h: held out.
    """
    labels = {"train forget": "f", "train retain": "r", "test forget": "h", "test retain": "h"}
    rows = {
        name: [Row(f"red{i} film on {name} {i}", label, "") for i in range(24)]
        for name, label in labels.items()
    }
    args = argparse.Namespace(
        template=data.TEMPLATES["question"], unrelated_template=Template("Say: {text}"), seed=0
    )
    phi = vectors(3).detach()
    return (
        probes.Subject("with", Llama.from_pretrained(folder), phi, {}, folder),
        probes.Setting(args, tokenizer, rows, rows["test retain"], {"f": [5], "r": [6]}, 250),
    )


def test_membership_asks_whether_members_are_better_known(probing, monkeypatch):
    known = {"f": [-1.0, -2], "h": [-2.0, -3], "r": [-9.0, -9]}
    monkeypatch.setattr(
        probes, "token_log_p", lambda s, rows: [torch.tensor(known[e.label]) for e in rows]
    )
    outside = {"f": 0.9, "h": 0.5, "r": 0.1}
    monkeypatch.setattr(probes, "outside", lambda s, rows, labels: [outside[e.label] for e in rows])
    found = probes.membership(*probing)
    assert len(found) == 6 and all(value == 1 for value in found.values())
    known["f"] = [-5.0, -6]  # less known than the held-out rows
    assert [v for k, v in probes.membership(*probing).items() if "loss" in k or "Min" in k] == [
        0,
        0,
        0,
    ]


def test_robustness_changes_every_query_and_keeps_the_sides_apart(probing, monkeypatch):
    (s, c), asked = probing, []
    monkeypatch.setattr(
        probes.Subject,
        "accuracy",
        lambda s, rows: (
            asked.append(tuple(e.ids for e in rows))
            or sum(e.label == "f" for e in rows) / len(rows)
        ),
    )
    found = probes.robustness(s, c)
    assert len(found) == 20 and all(
        value == line.endswith("forget") for line, value in found.items()
    )
    assert (
        len(
            {
                *asked,
                *(
                    tuple(e.ids for e in c.examples(f"train {side}"))
                    for side in ("forget", "retain")
                ),
            }
        )
        == 22
    )
    drawn = list(asked)
    assert probes.robustness(s, c) == found and asked[20:] == drawn
    c.rows = {
        name: [dataclasses.replace(row, raw=True) for row in rows] for name, rows in c.rows.items()
    }
    assert (
        len(probes.robustness(s, c)) == 12 and len(set(asked[40:])) == 12
    )  # no template, nothing after the text


def test_attacks_are_measured_on_rows_they_have_not_seen(probing, monkeypatch):
    (s, c), tuned, seen, asked = probing, [], set(), []
    real = probes.collate
    monkeypatch.setattr(
        probes,
        "collate",
        lambda examples, *a, **k: seen.update(examples) or real(examples, *a, **k),
    )
    monkeypatch.setattr(
        probes.Subject, "accuracy", lambda s, rows: asked.append((s.phi, set(rows))) or 0.0
    )
    probes.attack(s, c)
    (phi, own), (_, others) = asked
    assert seen == own and len(own) == len(others) == 12 and not own & others
    assert len(phi) == 3 + probes.ATTACK["q"] and torch.equal(phi[:3], s.phi)
    monkeypatch.setattr(
        probes, "tuned", lambda s, rows, others, seed: tuned.append((s.phi, rows, others)) or {}
    )
    probes.relearning(s, c)
    assert [len(examples) for _, examples, _ in tuned] == [1, 2, 4, 8, 12]
    for phi, examples, others in tuned:
        assert phi is s.phi and len(others) == 12 and not {*examples} & {*others}
        assert {e.label for e in others} == {"f"}
    assert {e.label for e in tuned[-1][1]} == {"r"} and all(
        e.label == "f" for e in tuned[0][1] + tuned[3][1]
    )


def test_relearning_begins_the_same_each_time_and_has_the_prompt_before_it(probing, monkeypatch):
    (s, c), fronts = probing, []
    prefix = s.model.prefix

    def note(phi=None, shared_ids=()):
        fronts.append(phi)
        return prefix(phi, shared_ids)

    monkeypatch.setattr(s.model, "prefix", note)
    monkeypatch.setattr(
        probes.Subject,
        "accuracy",
        lambda s, rows: sum(map(float, (log_p.sum() for log_p in probes.token_log_p(s, rows)))),
    )
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(
            probes.tuned(s, c.examples("train forget")[:4], c.examples("train forget")[4:], 0)
        )
    assert found[0] == found[1] and all(front is not None for front in fronts) and len(fronts) >= 40


def test_rounded_weights_samples_and_perplexity_are_what_is_measured(probing, monkeypatch):
    (s, c), weights = probing, []
    layer = lambda model: model.layers[0].mlp.down_proj.weight
    monkeypatch.setattr(
        probes.Subject, "accuracy", lambda s, rows: weights.append(layer(s.model).clone()) or 0.5
    )
    probes.quantised(s, c)
    for weight, bits in zip(weights, (8, 8, 4, 4)):
        assert torch.equal(weight, probes.rounded(layer(s.model), bits)) and not torch.equal(
            weight, layer(s.model)
        )
    monkeypatch.setattr(
        probes,
        "score",
        lambda model, hidden, rows, batch_size: [(True, math.log(0.5), 0)] * len(rows),
    )
    found = probes.removed(s, c)
    assert (
        found["one of 8 samples"] == pytest.approx(1 - 0.5**8) and found["prompt left out"] == 0.5
    )
    monkeypatch.setattr(
        probes, "token_log_p", lambda s, rows: [torch.tensor([-1.0, -3.0])] * len(rows)
    )
    assert probes.utility(s, c)["unrelated, perplexity"] == pytest.approx(math.exp(2))
    c.unrelated = [Row("", "to be read", "", raw=True)]
    if c.tokenizer.bos:
        assert probes.utility(s, c)["unrelated, perplexity"] == pytest.approx(math.exp(2))


def test_the_summary_names_the_worst_and_does_not_praise_what_has_not_forgotten():
    def rows(forgotten):
        values = {
            ("removed", "train forget"): (1.0, forgotten),
            ("robustness", "upper case, forget"): (1.0, 0.2),
            ("robustness", "words left out, forget"): (1.0, 0.7),
            ("robustness", "upper case, retain"): (1.0, 0.6),
            ("robustness", "words left out, retain"): (1.0, 0.9),
        }
        return [
            {"part": part, "line": line, "before": before, "with": value, "retrained": None}
            for (part, line), (before, value) in values.items()
        ]

    said = assess.summary(rows(0.1), True)
    assert "brings back most is: words left out, forget, 70.0 %" in said
    assert "most is: upper case, retain, 60.0 %" in said
    assert "Rely on it where" in said and "Rely on it" not in assess.summary(rows(0.9), True)
    assert "Do not rely on it: asked plainly" in assess.summary(rows(0.9), False)
    assert "ely on it" not in assess.summary(rows(0.1)[1:], True)


def test_of_a_second_prompt_the_other_columns_are_taken_as_they_are(
    assessed, folder, tmp_path, monkeypatch, capsys
):
    args, full, out = assessed
    files = {name: out / f"{name}.jsonl" for name in ("forget", "retain")}
    assert call(train, *train_args(folder, files, tmp_path / "p"), "--seed", 5) == 0
    second = [tmp_path / "p" if a == out / "p" else a for a in full]
    asked = []
    for name in ("removed", "utility", "cost"):
        part = probes.PARTS[name]
        monkeypatch.setitem(
            probes.PARTS,
            name,
            lambda s, c, name=name, part=part: asked.append((s.name, name)) or part(s, c),
        )
    known = ["--known", out / "a.json"]
    for name in ("removed", "cost"):
        assert call(assess, *second, *known, "--only", name, "--json", tmp_path / "b.json") == 0
    first, other = (json.loads(f.read_text()) for f in (out / "a.json", tmp_path / "b.json"))
    times = [("before", "cost"), ("with", "cost"), ("retrained", "cost")]  # side by side
    assert asked == [("with", "removed"), *times]
    for column in ("before", "retrained"):
        assert other["found"][column]["removed"] == first["found"][column]["removed"]
    assert other["inputs"]["prompt"] != first["inputs"]["prompt"]

    assert call(assess, *second, *known, "--rows", 21) == 2
    assert "a.json: measured with other values of: rows\n" in capsys.readouterr().err
    (tmp_path / "c.json").write_text("{}")
    assert call(assess, *second, "--known", tmp_path / "c.json") == 2
    assert "c.json: not a --json of this command" in capsys.readouterr().err
    asked.clear()
    alone = [a for i, a in enumerate(second) if "--retrained" not in second[max(0, i - 1) : i + 1]]
    assert call(assess, *alone, *known, "--only", "utility", "--json", tmp_path / "d.json") == 0
    assert asked == [("with", "utility")]
    assert "retrained" not in json.loads((tmp_path / "d.json").read_text())["found"]


def test_a_baselines_model_is_assessed_in_place_of_a_prompt(assessed, tmp_path, capsys):
    args, _, out = assessed
    (out / "other" / "run.json").write_text(
        '{"options": 3, "steps": "x", "seconds": null, "trainable": 7}'
    )
    assert (
        call(
            assess,
            *args,
            "--prompt",
            out / "other",
            "--only",
            "cost",
            "--json",
            tmp_path / "c.json",
        )
        == 0
    )
    lines = {row["line"]: row for row in json.loads((tmp_path / "c.json").read_text())["lines"]}
    assert lines["parameters trained"]["with"] == 7 and "steps" not in lines
    assert (
        lines["bytes beside the model"]["before"] == 0
        and lines["bytes beside the model"]["with"] > 100_000
    )
    (out / "other" / "run.json").unlink()
    assert (
        call(
            assess,
            *args,
            "--prompt",
            out / "other",
            "--only",
            "removed",
            "--json",
            tmp_path / "b.json",
        )
        == 0
    )
    lines = {row["line"]: row for row in json.loads((tmp_path / "b.json").read_text())["lines"]}
    assert "prompt left out" not in lines and lines["train forget"]["with"] is not None
    assert "The weights were changed" in capsys.readouterr().out


def test_the_assessment_refuses_what_it_cannot_measure(assessed, folder, tmp_path, capsys):
    args, full, out = assessed
    finetune.save_weights(tiny(hidden_size=64, intermediate_size=96), tmp_path / "wide")
    few = write_rows(tmp_path / "few.jsonl", make_rows(5, ["positive", "negative"], 9))
    replaced = lambda option, value: [
        value if full[i - 1] == option else a for i, a in enumerate(full)
    ]
    for wrong, pattern in [
        (
            replaced("--retrained", tmp_path / "wide"),
            r"wide: hidden_size 64, but that of the model is 32",
        ),
        (replaced("--prompt", tmp_path / "wide"), r"wide: hidden_size 64"),
        (replaced("--model", out / "other"), r"trained on another model"),
        (replaced("--prompt", tmp_path), r"no spul\.json"),
        (replaced("--retrained", folder / "no"), r"no config\.json"),
        (replaced("--test-forget", few), r"few\.jsonl: 5 rows; at least 20"),
        (replaced("--test-forget", out / "forget.jsonl"), r"forget\.jsonl: 1 rows; at least 20"),
        ([*full, "--only", "memebership"], r"--only: invalid choice"),
        ([*full, "--quantize", "int8"], r"--quantize"),
        (full[:2], r"--prompt DIR is missing"),
        (
            [a for i, a in enumerate(full) if "--retain" not in full[max(0, i - 1) : i + 1]],
            r"--retain FILE is missing",
        ),
    ]:
        assert call(assess, *wrong) == 2
        assert re.search(pattern, capsys.readouterr().err.splitlines()[-1])
