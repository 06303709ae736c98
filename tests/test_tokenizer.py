"""Tokenizers as model folders have them."""

import base64
import json
import shutil

import pytest

import eval as evaluate
from data import Row, Template, make_example
from support.tokenizer import Tokenizer
from tests.helpers import ROOT, call, save_weights, tiny, write_rows

PIECES = ROOT / "demo" / "model" / "tokenizer.model"


def write_tiktoken(path):
    """A tokenizer.model as Llama 3 has it: words in base64 and their ranks."""
    words = [bytes([i]) for i in range(256)]
    lines = [f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate(words)]
    (path / "tokenizer.model").write_text("\n".join(lines))


def settings_of(path, **settings):
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def test_tiktokens_file_gives_way_to_the_tokenizer_json_beside_it(bpe_folder, tmp_path):
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path)
    write_tiktoken(tmp_path)
    both = Tokenizer(tmp_path)
    assert both.encode("the film") == Tokenizer(bpe_folder).encode("the film")


def test_tiktokens_file_alone_is_refused_with_what_is_needed(tmp_path):
    write_tiktoken(tmp_path)
    with pytest.raises(ValueError, match="not a sentencepiece model .*tokenizer.json is needed"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "settings, bos",
    [
        ({}, [0]),  # the file's own post-processor
        ({"add_bos_token": False}, []),
        ({"add_bos_token": True, "bos_token": "<|endoftext|>"}, [1]),
        ({"add_bos_token": True, "bos_token": {"content": "<|endoftext|>"}}, [1]),
        ({"add_bos_token": None, "bos_token": "<|endoftext|>"}, [0]),
    ],
)
def test_bos_is_what_the_settings_say(settings, bos, bpe_folder, tmp_path):
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path)
    settings_of(tmp_path, **settings)
    assert Tokenizer(tmp_path).bos == bos


def test_what_a_tokenizer_puts_behind_a_text_is_not_taken_for_bos(bpe_folder, tmp_path):
    content = json.loads((bpe_folder / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [1], "tokens": ["<|endoftext|>"]}}
    processor = {"type": "TemplateProcessing", "single": [text, end], "pair": [text, end]}
    content["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            {**processor, "special_tokens": tokens},
        ],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer(tmp_path).bos == []


def test_a_tokenizer_without_the_letter_a_has_its_bos_all_the_same(tmp_path):
    """Once BOS was found by encoding a letter."""
    import tokenizers
    from tokenizers import models, processors

    words = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "film": 1, "?": 2}, unk_token="?"))
    words.add_special_tokens(["<s>"])
    words.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=[("<s>", 0)]
    )
    words.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).bos == [0, 0]


@pytest.mark.parametrize(
    "name, content",
    [
        ("added_tokens.json", {"<|end|>": 2050}),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"2050": {"content": "<|end|>", "special": True}}},
        ),
    ],
)
def test_tokens_added_beside_a_sentencepiece_model_count_in_templates(name, content, tmp_path):
    shutil.copy(PIECES, tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.count == 2051
    ids = tokenizer.encode_parts([("a film", True), ("<|end|>", False), ("<|end|>", True)])
    assert ids[-1] == 2050
    assert ids.count(2050) == 1  # not in the text
    assert tokenizer.decode(ids) == "a film<|end|>"


@pytest.mark.parametrize(
    "name, content",
    [
        ("added_tokens.json", {"<x>": None}),
        ("added_tokens.json", {"<x>": "seven"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": "<x>"}}),
    ],
)
def test_added_tokens_that_are_none_are_refused(name, content, tmp_path):
    shutil.copy(PIECES, tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="added tokens are not names with ids"):
        Tokenizer(tmp_path)


def test_settings_may_say_null_for_the_added_tokens(tmp_path):
    shutil.copy(PIECES, tmp_path)
    settings_of(tmp_path, added_tokens_decoder=None)
    assert Tokenizer(tmp_path).count == 2048


def test_a_token_beyond_the_models_table_is_named_with_its_row(tmp_path, capsys):
    save_weights(tiny(), tmp_path)
    shutil.copy(PIECES, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|end|>": 2050}')
    rows = write_rows(tmp_path / "r.jsonl", [{"text": "a film", "label": "good"}])
    args = ["--model", tmp_path, "--forget", rows, "--template", "{text}<|end|>"]
    assert call(evaluate, *args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "r.jsonl:1: the tokenizer gives '<|end|>' the id 2050" in err
    assert "table has 2048 rows" in err


def test_a_row_within_the_table_is_no_trouble(tokenizer):
    tokenizer.check_table([2047], "f:1")
    tokenizer.table = 2048
    try:
        make_example(Row("a film", "good", "f:1"), tokenizer, Template("{text}:"), 50)
        with pytest.raises(ValueError, match="f:1: .*id 2048"):
            tokenizer.check_table([2048], "f:1")
    finally:
        tokenizer.table = None
