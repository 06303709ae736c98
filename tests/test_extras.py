"""Splitting, pictures and the benchmark: extras/split.py, plot.py, bench.py."""

import json
import random
import re

from support.state import run_folder
from tests.helpers import (
    CONFIG,
    call,
    python,
    lines_of,
    tokens_of,
    write_rows,
)

import pytest
import torch

from extras import bench, plot
from extras import split as splitting
from model import Config, Llama


def test_names_are_found_as_whole_words_in_text_and_label(tmp_path, capsys):
    texts = [
        "a challenging film",
        "Woody  ALLEN's best",
        "fallen",
        "by woody allen",
        "allen",
        "nobody",
    ]
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [{"text": t, "label": "positive", "id": i} for i, t in enumerate(texts)]
        + [{"prompt": "who?", "completion": "Woody Allen"}],
    )
    (tmp_path / "names").write_text("woody allen\n\nlen\nchall\n")  # whole words at both ends
    test = write_rows(
        tmp_path / "test.jsonl",
        [{"text": text, "label": "x"} for text in ("Nobody", "woody allen!", "another")],
    )
    assert (
        call(
            splitting, rows, "--names", tmp_path / "names", "--test", test, "--out", tmp_path / "s"
        )
        == 0
    )
    forget, retain = (lines_of(tmp_path / "s" / f"{side}.jsonl") for side in ("forget", "retain"))
    assert [row.get("id") for row in forget] == [1, 3, None] and [row["id"] for row in retain] == [
        0,
        2,
        4,
        5,
    ]
    assert [row["text"] for row in lines_of(tmp_path / "s" / "test_forget.jsonl")] == [
        "woody allen!"
    ]
    assert [row["text"] for row in lines_of(tmp_path / "s" / "test_retain.jsonl")] == ["another"]
    said = capsys.readouterr().out
    for message in (
        "1 rows left out",
        "9 different texts, 0 of them in two files",
        "forget.jsonl: 3 rows",
    ):
        assert message in said
    assert call(splitting, rows, "--names", tmp_path / "names", "--out", tmp_path / "s") == 2
    assert "choose a new folder" in capsys.readouterr().err


def test_equal_texts_stay_on_one_side(tmp_path):
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"text": "Fine", "label": "good"},
            {"text": "fine ", "label": "bad"},
            {"text": "other", "label": "good"},
            {"text": "more", "label": "GOOD"},
        ],
    )
    assert (
        call(splitting, rows, "--regex", "^bad$", "--out", tmp_path / "a") == 2
    )  # text and label together
    assert call(splitting, rows, "--regex", "\nbad$", "--out", tmp_path / "a") == 0
    assert [row["text"] for row in lines_of(tmp_path / "a" / "forget.jsonl")] == ["Fine", "fine "]


def test_clusters_come_apart_by_their_words(tmp_path, capsys):
    pytest.importorskip("sklearn")
    rng, kinds = (
        random.Random(0),
        (["apple", "pear", "plum", "fig"], ["car", "bus", "train", "tram"]),
    )
    texts = [
        " ".join(rng.choices(kinds[i % 3 > 0], k=5)) + f" {i}" for i in range(60)
    ]  # 20 of fruit, 40 of wheels
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"text": text, "label": "x"} for text in texts[:45]]
    )
    test = write_rows(
        tmp_path / "test.jsonl", [{"text": text, "label": "x"} for text in texts[45:]]
    )
    assert call(splitting, rows, "--clusters", 2, "--test", test, "--out", tmp_path / "s") == 0
    assert "(forget)" in capsys.readouterr().out
    for name, n in (("forget", 15), ("test_forget", 5)):
        found = lines_of(tmp_path / "s" / f"{name}.jsonl")
        assert len(found) == n and all(set(row["text"].split()) & set(kinds[0]) for row in found)
    assert (
        call(splitting, rows, "--clusters", 2, "--forget-clusters", "0,1", "--out", tmp_path / "t")
        == 2
    )
    assert "no rows to retain" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "one of --names"),
        (["--regex", "a", "--clusters", 2], "one of --names"),
        (["--regex", "("], "regular expression"),
        (["--regex", "zzz"], "no rows to forget: none of 12"),
        (["--regex", "."], "no rows to retain: all of 12"),
        (["--names", "EMPTY"], "no names in it"),
        (["--regex", "a", "--forget-clusters", 1], "goes with --clusters"),
        (["--clusters", 99], "only 12 different texts"),
        (["--clusters", 2, "--forget-clusters", 2], "clusters are 0 to 1"),
        (["--clusters", 2, "--forget-clusters", "x"], "numbers are expected"),
        (["--names", "nowhere"], "No such file"),
    ],
)
def test_a_split_that_cannot_be_is_refused_in_one_line(args, message, files, tmp_path, capsys):
    (tmp_path / "EMPTY").write_text("\n")
    args = [tmp_path / arg if arg == "EMPTY" else arg for arg in args]
    assert call(splitting, files["forget"], *args, "--out", tmp_path / "s") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "s").exists()


def test_the_axes_of_the_picture_are_where_the_points_spread_most():
    x = (
        torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 9, 1, 1, 5, 1])
        + 3
    )
    points = plot.principal_axes(x)
    values = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    torch.testing.assert_close(torch.cov(points.T), torch.diag(values[:2]), atol=1e-3, rtol=1e-3)
    assert plot.moving_average([1.0, 2.0, 6.0, 0.0], 2) == [1.5, 4.0, 3.0] and plot.moving_average(
        [3.0], 20
    ) == [3.0]


def test_the_nearest_label_is_that_of_the_nearest_mean_of_the_known():
    x = torch.tensor([[0.0, 0], [2, 0], [10, 0], [4, 0], [7, 0]])
    known = torch.tensor([True, True, True, False, False])
    assert plot.nearest_label(x, torch.tensor([3, 3, 8, 8, 8]), known).tolist() == [
        3,
        3,
        8,
        3,
        8,
    ]  # means 1 and 10


def test_plot_draws_each_picture(folder, trained, files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = [
        {
            "method": method,
            "chosen": method != "RL",
            "splits": {
                f"{part} {side}": {"accuracy": 0.5}
                for part in ("train", "test")
                for side in ("forget", "retain")
            },
        }
        for method in ("SPUL", "SPUL", "NPO", "RL")
    ]
    (tmp_path / "main.json").write_text(json.dumps({"rows": rows}))
    assert call(plot, "trade-off", tmp_path / "main.json", "--out", tmp_path / "a.svg") == 0
    names = [
        re.findall(f"<!-- {method} -->", (tmp_path / "a.svg").read_text())
        for method in ("SPUL", "NPO", "RL")
    ]
    assert list(map(len, names)) == [2, 2, 0]  # in each panel once, whatever the seeds
    assert call(plot, "steps", run_folder(trained) / "log.jsonl", "--out", tmp_path / "b.png") == 0
    assert (
        call(
            plot,
            "embeddings",
            "--model",
            folder,
            "--prompt",
            trained,
            "--forget",
            files["forget"],
            "--retain",
            files["retain"],
            "--dtype",
            "fp32",
            "--out",
            tmp_path / "c.pdf",
        )
        == 0
    )
    assert (tmp_path / "b.png").read_bytes()[1:4] == b"PNG" and (tmp_path / "c.pdf").read_bytes()[
        :4
    ] == b"%PDF"
    capsys.readouterr()
    for args, message in [
        (["steps", tmp_path / "main.json"], "not a log of train.py"),
        (["steps"], "a log is needed"),
        (["trade-off", trained / "spul.json"], "not a table of results/study.py"),
        (["embeddings"], "--model DIR is missing"),
        (
            ["embeddings", "--model", folder, "--prompt", trained, "--forget", files["forget"]],
            "--retain FILE is missing",
        ),
    ]:
        assert call(plot, *args, "--out", tmp_path / "d.png") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "d.png").exists()
    assert call(plot, "steps", run_folder(trained) / "log.jsonl", "--out", tmp_path / "d.txt") == 2


def test_the_benchmark_takes_the_same_step_as_transformers_and_peft(tmp_path):
    """All sides start from the same loss: an independent computation of the whole loss."""
    file = tmp_path / "b.json"
    options = ["--dtype", "fp32", "--rounds", 1, "--batches", 1, "--json", file]
    result = python("-m", "extras.bench", *options)
    assert result.returncode == 0, result.stderr
    found = json.loads(file.read_text())
    steps = found["training"]
    assert len(steps) == 10 and {"torch", "peft", "transformers"} <= set(found["versions"])
    same = [name for name in steps if "10" not in name and "50" not in name]
    other = [steps.pop(f"{side}, p = 30, in bf16") for side in ("spul", "transformers + peft")]
    same = [name for name in same if name in steps]
    losses = [steps[name]["loss"] for name in same if "L_keep" not in name]
    assert len(losses) == 4  # the fast and the plain forward, peft, and peft with checkpointing
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)
    kept = [steps[name]["loss"] for name in same if "L_keep" in name]
    assert len(kept) == 2 and kept == pytest.approx([kept[0]] * 2, rel=1e-4)
    assert kept[0] > losses[0] + 0.01
    for figures in other:
        assert figures["loss"] == pytest.approx(losses[0], rel=0.05)
        assert figures["loss"] != pytest.approx(losses[0], rel=1e-4)  # bf16 has fewer digits
        assert figures["of peak"] is None and figures["ratio"] > 0
    for words in (
        "training step (peak",
        "plain forward",
        "prefix computed once",
        "prompt concatenated",
        "loading",
        "of peak",
    ):
        assert words in result.stdout
    assert all(0 < figures["of peak"] < 2 for figures in steps.values())


def test_the_benchmark_makes_models_of_known_shapes():
    for name, millions in [("7b", 6738), ("13b", 13016), ("1b", 1236), ("135m", 135)]:
        with torch.device("meta"):
            count = sum(p.numel() for p in Llama(bench.SHAPES[name]).parameters())
        assert round(count / 1e6) == pytest.approx(millions, abs=1)
    config = Config(**CONFIG)
    for quantize in (None, "int8"):
        llama = bench.random_model(config, torch.bfloat16, "cpu", quantize=quantize)
        assert llama(tokens_of(1, 5)).isfinite().all()
