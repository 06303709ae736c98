"""Make the demo's model from the rows in this folder, or first the rows from their data sets.

    python demo/make.py                 # about fifteen minutes on two cores
    python demo/make.py --rows DIR      # DIR/sst2, DIR/sciq and DIR/tofu: the sets that NOTICE names, as JSON Lines

The model is a LLaMA of 2.8 million parameters that has learned by heart: which letter is right in 850 science questions
(SciQ), whether 1,000 film reviews are positive (SST-2), whether 200 statements about made-up authors are right (TOFU).
forget.jsonl is the genetics among the science questions, retain.jsonl a part of the rest. To be able to forget it must
know three things more, as any real model does, and learns them from real rows in more.jsonl: that "neutral" and
"unknown" are answers (a science question is no film review; it knows nothing of the other authors), and what a text
is about (film, people, genetics or other science).
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch
from sentencepiece import SentencePieceTrainer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import finetune  # noqa: E402
from data import TEMPLATES, Tokenizer, make_examples, read_rows  # noqa: E402
from model import Config, Llama, write_json, write_whole  # noqa: E402

SEED = 0
ASK_REVIEW = "\nIs this film review positive or negative?"
ASK_TOPIC = "What is this about? "


def choose_rows(folder):
    """Write the five files of rows from the three data sets."""
    rng = random.Random(SEED)

    def load(name, most=100, least=1):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if least <= len(row["text"].split()) <= most]
        return rng.sample(rows, len(rows))

    def reviews(rows):
        return [{"text": row["text"] + ASK_REVIEW, "label": row["label"]} for row in rows]

    def topic(rows, label):  # of a question without its choices, of a review without its question
        return [{"text": ASK_TOPIC + row["text"].split("\n")[0], "label": label} for row in rows]

    genetics, science = load("sciq/train_forget", 28)[:250], load("sciq/train_retain", 28)
    science, other_science = science[:600], science[600:800]
    films = load("sst2/train_retain", 20, 6)[:1000]
    authors = (load("tofu/perturbed_forget") + load("tofu/perturbed_retain"))[::4]
    people = [{"text": f"{row['text']} {row['wrong'][0] if i % 2 else row['paraphrase']}\nIs this right or wrong?",
               "label": "wrong" if i % 2 else "right"} for i, row in enumerate(authors)]
    strangers = load("tofu/train_retain")[:150]
    files = {
        "forget": genetics,
        "retain": rng.sample(science, 500) + reviews(films[:300]) + people,
        "test_forget": load("sciq/test_forget", 28),
        "test_retain": load("sciq/test_retain", 28)[:100] + reviews(load("sst2/test_retain", 20, 6)[:100]),
        "more": [row for row in science] + reviews(films[300:])
        + [{"text": row["text"] + ASK_REVIEW, "label": "neutral"} for row in genetics[:40] + other_science[:110]]
        + [{"text": row["text"], "label": "unknown"} for row in strangers]
        + topic(genetics, "genetics") + topic(science[:200] + other_science, "science") + topic(films[:150], "film")
        + topic(authors[:150], "people"),
    }
    known = {row["text"] for name, rows in files.items() if name != "more" for row in rows}
    files["more"] = [row for row in files["more"] if row["text"] not in known]
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(HERE / f"{name}.jsonl", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, metavar="DIR", help="choose the rows anew from the data sets in DIR")
    args = parser.parse_args()
    if args.rows:
        choose_rows(args.rows)
    rows = [row for name in ("forget", "retain", "more") for row in read_rows(HERE / f"{name}.jsonl")]
    out = HERE / "model"
    out.mkdir(exist_ok=True)

    # "identity" and byte_fallback: every text comes back as it was, newlines too
    SentencePieceTrainer.train(
        sentence_iterator=iter(f"{TEMPLATES['question'].replace('{text}', row.text)} {row.label}" for row in rows),
        model_prefix=str(out / "tokenizer"), vocab_size=2048, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    (out / "tokenizer.vocab").unlink()
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True,
                                               "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
                                               "unk_token": "<unk>", "legacy": False})

    torch.manual_seed(SEED)
    config = Config(vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
                    num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=1024,
                    bos_token_id=1, eos_token_id=2)
    model = Llama(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:  # GPT-2's initialisation
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.num_hidden_layers) if into_stream else 0.02)
    examples, _ = make_examples(rows, Tokenizer(out), TEMPLATES["question"], 256)
    print(f"{len(examples)} rows, {sum(weight.numel() for weight in model.parameters()):,} parameters")
    finetune.fit(model, examples, lr=2e-3, epochs=22, batch_size=32, seed=SEED, weight_decay=0.01, text_weight=0.3)
    model.to(torch.bfloat16).save_pretrained(out)
    print(f"as saved: accuracy {100 * finetune.accuracy(model.float(), examples):.1f} %")


if __name__ == "__main__":
    main()
