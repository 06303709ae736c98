"""Make the demo's model from the rows in this folder, or first the rows from their data sets.

    python demo/make.py                 # thirteen minutes on one core
    python demo/make.py --rows DIR      # DIR/sst2, DIR/sciq and DIR/tofu: the sets that NOTICE names, as JSON Lines

The model is a LLaMA of 2.8 million parameters that has learned three things by heart: whether statements about made-up
authors are true (TOFU), whether statements about science are right (SciQ), whether film reviews are positive (SST-2).
forget.jsonl is what it knows of the authors, retain.jsonl the other two. more.jsonl are further rows that it learned:
more reviews, and rows that make "neutral" and "unknown" answers it can give at all: a statement is no film review, and
other statements about authors and other questions of science it was not taught.

Harder requests were tried on such a model and are beyond it. Genetics among science questions: forget accuracy 100 ->
49 took the rest to 79. The authors, when the science statements ended in the same question: 100 -> 58, the rest 96.
"""

import argparse
import io
import json
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceTrainer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import finetune  # noqa: E402
from data import TEMPLATES, Tokenizer, collate, epoch_batches, make_examples, read_rows  # noqa: E402
from files import write_json, write_whole  # noqa: E402
from model import Config, Llama  # noqa: E402

SEED = 0
IS_IT_RIGHT = "\nIs this right or wrong?"
IS_IT_TRUE = "\nTrue or false?"
IS_IT_POSITIVE = "\nIs this film review positive or negative?"


def choose_rows(folder):
    """Write the five files of rows from the three data sets."""
    rng = random.Random(SEED)

    def load(name, least=1, most=100):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if least <= len(row["text"].split("\n")[0].split()) <= most]
        return rng.sample(rows, len(rows))

    def statements(triples, question=IS_IT_RIGHT, answers=("right", "wrong")):
        """(question, right answer, wrong answer), ...: every other one becomes a statement with the wrong answer."""
        return [{"text": f"{triple[0]} {triple[1 + i % 2]}{question}", "label": answers[i % 2]}
                for i, triple in enumerate(triples)]

    def science(name):
        triples = []
        for row in load(name, most=18):
            question, *choices = row["text"].split("\n")
            choices = {choice[0]: choice[3:] for choice in choices}
            triples.append((question, choices.pop(row["label"]), rng.choice(sorted(choices.values()))))
        return triples

    def reviews(name, n):
        return [{"text": row["text"] + IS_IT_POSITIVE, "label": row["label"]} for row in load(name, 6, 20)[:n]]

    authors = [row for row in load("tofu/perturbed_forget") + load("tofu/perturbed_retain")
               if len(f"{row['text']} {row['paraphrase']}".split()) <= 40]
    authors = rng.sample(authors, 300)
    reworded = {row["label"]: row["text"] for row in load("tofu/test_forget") + load("tofu/test_retain")}
    people = [(row["text"], row["paraphrase"], row["wrong"][0]) for row in authors]
    people_again = [(reworded[row["label"]], row["paraphrase"], row["wrong"][0]) for row in authors]
    facts, films = science("sciq/train_retain"), reviews("sst2/train_retain", 700)
    taught = {row["label"] for row in authors}
    strangers = [{"text": f"{row['text']} {row['label']}{IS_IT_TRUE}", "label": "unknown"}
                 for row in load("tofu/train_retain", most=14) if row["label"] not in taught][:150]
    untaught = [{"text": question, "label": "unknown"} for question, _, _ in facts[400:500]]
    files = {
        "forget": statements(people, IS_IT_TRUE, ("true", "false")),
        "retain": statements(facts[:400]) + films[:300],
        "test_forget": statements(people_again, IS_IT_TRUE, ("true", "false"))[:100],
        "test_retain": statements(science("sciq/test_retain")[:100]) + reviews("sst2/test_retain", 100),
        "more": films[300:] + strangers + untaught + [
            {"text": row["text"].removesuffix(IS_IT_RIGHT) + IS_IT_POSITIVE, "label": "neutral"}
            for row in statements(people[:60] + facts[500:640])],
    }
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
    tokenizer = io.BytesIO()  # a file's name would become part of the model
    SentencePieceTrainer.train(
        model_writer=tokenizer,
        sentence_iterator=iter(f"{TEMPLATES['question'].replace('{text}', row.text)} {row.label}" for row in rows),
        vocab_size=2048, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    write_whole(out / "tokenizer.model", lambda temporary: temporary.write_bytes(tokenizer.getvalue()))
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
    model.requires_grad_(True)

    def loss(indices, step):
        """The cross-entropy of the answers, plus 0.3 times that of all tokens before them."""
        batch = collate([examples[i] for i in indices])
        h = model.hidden(batch.tokens)  # (B, T, d)
        columns = torch.arange(batch.tokens.shape[1] - 1)
        first = torch.full((len(indices),), len(columns)).scatter_reduce(0, batch.rows, batch.columns, "amin")  # (B,)
        text = columns < first[:, None]  # (B, T - 1), positions that predict the text
        return F.cross_entropy(model.head(h[batch.at]), batch.targets) + 0.3 * F.cross_entropy(
            model.head(h[:, :-1][text]), batch.tokens[:, 1:][text])

    plan = [epoch_batches(examples, 32, SEED, epoch) for epoch in range(26)]
    finetune.fit(model, plan, loss, lr=2e-3, seed=SEED, weight_decay=0.01)
    model.to(torch.bfloat16).save_pretrained(out)
    print(f"as saved: accuracy {100 * finetune.accuracy(model.float(), examples):.1f} %")


if __name__ == "__main__":
    main()
