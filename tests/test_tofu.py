"""TOFU's measures: extras/tofu.py."""

import json
import math
import random
import re

from tests.helpers import (
    call,
    concatenated,
    make_rows,
    tiny,
    tofu_rows,
    vectors,
    write_rows,
)

import pytest
import torch
import torch.nn.functional as F

import eval as evaluate
import train
from data import read_rows
from extras import finetune, tofu
from model import Llama
from support.tokenizer import Tokenizer


def test_forget_quality_is_the_p_value_of_kolmogorov_and_smirnov():
    from scipy.stats import ks_2samp

    rng = random.Random(0)
    for shift in (0, 0.2, 1):
        one, other = [rng.gauss(0, 1) for _ in range(40)], [rng.gauss(shift, 1) for _ in range(70)]
        expected = ks_2samp(one, other, method="exact").pvalue
        assert tofu.forget_quality(one, other) == pytest.approx(expected, rel=1e-6)
    assert tofu.forget_quality(one, one) == 1
    # two of the 70 orders of 4 and 4 values have one sample at one end
    assert tofu.forget_quality([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)


@pytest.mark.parametrize("p", [0, 4])
def test_the_truth_ratio_and_its_neighbours_equal_hand_arithmetic(p, folder, tmp_path):
    llama, tok, phi = (
        Llama.from_pretrained(folder),
        Tokenizer(folder),
        vectors(4).detach() if p else None,
    )
    rows = read_rows(write_rows(tmp_path / "r.jsonl", tofu_rows(3)))
    got = tofu.measure_answers(llama, tok, rows, None, 400, False, ["It"], phi, batch_size=2)
    ratios, chances, overlap, texts = [], [], [], []
    for row in rows:

        def chance(answer):
            ids = tok.bos + tok.encode(row.text)
            own = tok.encode_inside(answer)
            x = torch.tensor([ids + own])
            log_p = F.log_softmax(llama.head(concatenated(llama, x, phi)) if p else llama(x), -1)[0]
            return math.exp(
                sum(log_p[len(ids) + i - 1, t].item() for i, t in enumerate(own)) / len(own)
            )

        ratios.append(
            (chance(row.wrong[0]) + chance(row.wrong[1]) + chance(row.wrong[2]))
            / 3
            / chance(row.paraphrase)
        )
        chances.append(chance(row.label))
        n, ids = len(tok.encode_inside(row.label)), tok.bos + tok.encode(row.text)
        prefix = llama.prefix(phi) if p else None
        texts.append(
            tok.decode(llama.generate([ids], prefix, n)[0]).strip().split("\n")[0]
        )
        overlap.append(evaluate.rouge_l(texts[-1], row.label))
    mean = lambda values: sum(values) / 3
    assert got["ratios"] == pytest.approx(ratios, rel=1e-3) and got["said"] == texts
    assert got["per_token"] == pytest.approx(mean(chances), rel=1e-3) and got["rouge_l"] == mean(
        overlap
    )
    assert got["truth_ratio"] == pytest.approx(mean([max(0, 1 - r) for r in ratios]), rel=1e-3)
    parts = [max(got[name], 1e-30) for name in ("per_token", "rouge_l", "truth_ratio")]
    assert got["utility"] == pytest.approx(3 / sum(1 / part for part in parts))
    other = tofu.measure_answers(llama, tok, rows, None, 400, True, [], phi)
    assert other["truth_ratio"] == pytest.approx(mean([min(r, 1 / r) for r in ratios]), rel=1e-3)
    assert "utility" not in other


def test_tofus_measures_as_a_user_asks_for_them(folder, tmp_path, capsys):
    forget = write_rows(tmp_path / "f.jsonl", tofu_rows(6))
    retain = write_rows(tmp_path / "r.jsonl", tofu_rows(60, start=6))
    (tmp_path / "generic.txt").write_text("I do not know.\nNobody told me.\n")
    both = ["--model", folder, "--forget", forget, "--retain", retain, "--dtype", "fp32"]
    assert (
        call(
            train,
            *both,
            "--out",
            tmp_path / "p",
            "--epochs",
            1,
            "--num-tokens",
            3,
            "--generic",
            tmp_path / "generic.txt",
        )
        == 0
    )
    assert (
        call(
            tofu,
            *both,
            "--prompt",
            tmp_path / "p",
            "--retrained",
            folder,
            "--json",
            tmp_path / "out.json",
        )
        == 0
    )
    out, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert (
        "truth_ratio" in out
        and found["forget_quality"]["without"] == 1 >= found["forget_quality"]["with"]
    )
    assert f"forget quality: 1 -> {found['forget_quality']['with']:.3g}" in out
    assert (
        found["with"]["train retain"]["utility"] > 0
        and len(found["with"]["train forget"]["ratios"]) == 6
    )
    assert (
        call(
            evaluate,
            "--model",
            folder,
            "--prompt",
            tmp_path / "p",
            "--ask",
            "Question: who?\\nAnswer:",
        )
        == 0
    )
    finetune.save_weights(tiny(hidden_size=64, intermediate_size=96), tmp_path / "wide")
    plain = write_rows(tmp_path / "plain.jsonl", make_rows(3, ["a", "b"], 0))
    for args, pattern in [
        (["--forget", plain], r'plain\.jsonl:1: no "paraphrase".*TOFU'),
        (["--retain", forget, "--retrained", folder], r"--retrained: .*needs --forget"),
        (["--forget", forget, "--retrained", tmp_path / "wide"], r"wide: hidden_size 64"),
    ]:
        assert call(tofu, "--model", folder, *args) == 2 and re.search(
            pattern, capsys.readouterr().err
        )
