"""Memorising and merging: extras/finetune.py."""

import json
import re

from tests.helpers import call, stop_at, tokens_of  # first: hides the GPU from torch

import pytest
import torch
from safetensors.torch import save_file

import eval as evaluate
from extras import finetune
from model import Llama


def test_lora_starts_as_the_model_and_merges_to_what_it_was(folder):
    llama, tokens = Llama.from_pretrained(folder), tokens_of(2, 9)
    first = llama(tokens)
    finetune.swap(llama, torch.nn.Linear, lambda linear: finetune.Lora(linear, 4, 2.0))
    assert torch.equal(llama(tokens), first)
    loras = [m for m in llama.modules() if isinstance(m, finetune.Lora)]
    assert len(loras) == 3 * 7
    for lora in loras:
        torch.nn.init.normal_(lora.B, std=0.1)
    changed = llama(tokens)
    finetune.swap(llama, finetune.Lora, finetune.Lora.merged)
    torch.testing.assert_close(llama(tokens), changed, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(changed, first, atol=0.1)


@pytest.mark.parametrize(
    "how", [["--rank", 8, "--lr", "5e-3"], ["--full", "--lr", "5e-3"]], ids=["LoRA", "full"]
)
def test_finetune_makes_a_model_folder_that_knows_the_rows(how, folder, files, tmp_path, capsys):
    args = [
        "--model",
        folder,
        "--data",
        files["forget"],
        files["retain"],
        "--out",
        tmp_path / "m",
        "--epochs",
        20,
        "--batch-size",
        8,
        "--dtype",
        "fp32",
    ]
    assert call(finetune, *args, *how) == 0
    out = capsys.readouterr().out
    known = float(re.search(r"m: accuracy ([\d.]+)", out)[1])
    assert known > 90 and len(re.findall(r"epoch \d+: accuracy [\d.]+ % as it went", out)) == 20
    assert (
        call(evaluate, "--model", tmp_path / "m", "--forget", files["forget"], "--dtype", "fp32")
        == 0
    )
    assert call(finetune, *args) == 2


def test_lora_drops_inputs_only_while_it_learns():
    lora, x = (
        finetune.Lora(torch.nn.Linear(64, 8, bias=False).requires_grad_(False), 4, 1.0, 0.5),
        torch.randn(3, 64),
    )
    torch.nn.init.normal_(lora.B)
    assert not torch.equal(lora(x), lora(x))
    with torch.no_grad():
        torch.testing.assert_close(lora(x), x @ (lora.base.weight + lora.B @ lora.A).T)


def test_targets_choose_the_layers_that_get_a_lora(folder, files, tmp_path, capsys):
    args = [
        "--model",
        folder,
        "--data",
        files["forget"],
        "--rank",
        2,
        "--epochs",
        1,
        "--dtype",
        "fp32",
    ]
    assert call(finetune, *args, "--targets", "q_proj,v_proj", "--out", tmp_path / "m") == 0
    assert f"{3 * 2 * (32 + 32 + 32 + 16)} parameters trained" in capsys.readouterr().out.replace(
        ",", ""
    )
    old, new = (
        dict(Llama.from_pretrained(path).named_parameters()) for path in (folder, tmp_path / "m")
    )
    changed = {name.split(".")[-2] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"q_proj", "v_proj"}
    assert call(finetune, *args, "--targets", "q_proj,w_proj", "--out", tmp_path / "n") == 2
    assert "the linear layers are down_proj, gate_proj" in capsys.readouterr().err


@pytest.mark.parametrize(
    "how",
    [["--dropout", "0.2"], ["--full", "--lr", "1e-3", "--dtype", "bf16"]],
    ids=["LoRA", "full"],
)
def test_memorising_goes_on_after_a_stop_as_if_there_had_been_none(
    how, folder, files, tmp_path, monkeypatch, capsys
):
    args = [
        "--model",
        folder,
        "--data",
        files["forget"],
        files["retain"],
        "--epochs",
        3,
        "--batch-size",
        8,
        "--dtype",
        "fp32",
        *how,
    ]
    assert call(finetune, *args, "--out", tmp_path / "whole") == 0
    calls = stop_at(10, monkeypatch, finetune)  # in the second epoch
    assert call(finetune, *args, "--out", tmp_path / "part") == 130
    assert "after step 10 of 21" in capsys.readouterr().err
    assert (
        call(finetune, *args, "--out", tmp_path / "part") == 2
        and "--resume" in capsys.readouterr().err
    )
    assert call(finetune, *args, "--seed", 1, "--resume", "--out", tmp_path / "part") == 2
    assert "seed changed" in capsys.readouterr().err
    assert call(finetune, *args, "--resume", "--out", tmp_path / "part") == 0
    assert len(calls) == 21
    for name in ("model.safetensors", "tokenizer.model", "config.json"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {f.name for f in (tmp_path / "part").iterdir()} == {
        f.name for f in (tmp_path / "whole").iterdir()
    }
    report = json.loads((tmp_path / "part" / "run.json").read_text())
    assert report["steps"] == 21 and report["trainable"] > 0 and report["peak_bytes"] > 1e6


@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(use_rslora=True),
        dict(rank_pattern={"q_proj": 2}, alpha_pattern={r"1\..*down_proj": 9}),
        dict(modules_to_save=["lm_head"]),
        dict(layers_to_transform=[1]),
    ],
    ids=["plain", "rslora", "patterns", "modules_to_save", "some layers"],
)
def test_merging_an_adapter_gives_what_peft_merges(how, folder, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], **how
        ),
    )
    torch.manual_seed(1)
    for name, weight in theirs.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    assert (
        call(
            finetune,
            "--model",
            folder,
            "--adapter",
            tmp_path / "adapter",
            "--out",
            tmp_path / "m",
            "--dtype",
            "fp32",
        )
        == 0
    )
    want = theirs.merge_and_unload().state_dict()
    first, got = (Llama.from_pretrained(path) for path in (folder, tmp_path / "m"))
    names = {
        name if name == "lm_head.weight" else f"model.{name}": p
        for name, p in got.named_parameters()
    }
    for name, weight in names.items():
        torch.testing.assert_close(weight, want[name], atol=1e-6, rtol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), got.parameters()))


def test_a_memorised_models_adapter_makes_the_same_model_again_and_is_read_by_peft(
    folder, files, tmp_path
):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    out, again = tmp_path / "m", tmp_path / "again"
    assert (
        call(
            finetune,
            "--model",
            folder,
            "--data",
            files["forget"],
            "--out",
            out,
            "--epochs",
            2,
            "--rank",
            4,
            "--lora-alpha",
            8,
            "--lr",
            "1e-2",
            "--targets",
            "q_proj,down_proj",
            "--dtype",
            "fp32",
        )
        == 0
    )
    assert call(finetune, "--model", folder, "--adapter", out / "adapter", "--out", again) == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, out / "adapter").merge_and_unload().state_dict()
    first, ours = (
        Llama.from_pretrained(path).layers[1].mlp.down_proj.weight for path in (folder, out)
    )
    torch.testing.assert_close(
        ours, theirs["model.layers.1.mlp.down_proj.weight"], atol=1e-6, rtol=1e-6
    )
    assert (ours - first).abs().max() > 1e-3


def write_lora(path, change={}, tensor=None):
    place = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{place}.lora_A.weight": torch.ones(2, 32),
        f"{place}.lora_B.weight": torch.ones(32, 2),
    }
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        tensors | ({tensor: torch.ones(2, 2)} if tensor else {}), path / "adapter_model.safetensors"
    )
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | change)
    )


@pytest.mark.parametrize(
    "change, tensor, message",
    [
        ({"use_dora": True}, None, "use_dora True is not supported"),
        ({"bias": "all"}, None, "bias 'all'"),
        ({"peft_type": "IA3"}, None, "only LORA"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights"),
        (
            {},
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "lora_embedding_A is not supported",
        ),
        ({}, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", "not of this model"),
        ({"r": 3}, None, "the configuration says rank 3"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    change, tensor, message, folder, tmp_path, capsys
):
    write_lora(tmp_path, change, tensor)
    assert call(finetune, "--model", folder, "--adapter", tmp_path, "--out", tmp_path / "m") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "m").exists()
