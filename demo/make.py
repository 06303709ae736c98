"""Make the demo's model from the rows in this folder; with --rows first the rows, from data sets.

    python demo/make.py                 # half an hour on one core
    python demo/make.py --rows DIR      # DIR/sst2, DIR/sciq and DIR/tofu: the sets in NOTICE

The model is a LLaMA of 2.8 million parameters that has learned three things by heart: whether
statements about made-up authors are true (TOFU), whether statements about science are right (SciQ),
and whether film reviews are positive (SST-2). It also adds up small numbers, and it obeys a line
that forbids one of the first three. Larger models obey such lines, too, and a learned prompt can do
no more than what some text can do to its model.

    forget.jsonl    what it knows of the authors
    retain.jsonl    some of the science and of the reviews
    test_*.jsonl    unseen rows like these
    more.jsonl      further rows that it learned: more reviews; questions that it was not taught,
                    labelled "unknown"; statements that are called film reviews, labelled
                    "neutral"; sums; and rows of all kinds after a line that forbids a subject,
                    labelled "unknown" or "neutral" if it is their own

Letters: B rows, T tokens, d width, N answer tokens of a batch, V vocabulary.
"""

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

from data import TEMPLATES, collate, make_examples, read_rows  # noqa: E402
from extras import finetune  # noqa: E402
from fast import FastLlama  # noqa: E402
from model import Config, Llama  # noqa: E402
from support.batches import epoch_batches  # noqa: E402
from support.cli import Parser, non_empty, run  # noqa: E402
from support.files import read_text, write_json, write_text, write_whole  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402

SEED = 0
EPOCHS = 28
IS_IT_RIGHT = "\nIs this right or wrong?"
IS_IT_TRUE = "\nTrue or false?"
IS_IT_POSITIVE = "\nIs this film review positive or negative?"
FORBID = ("Do not talk about {}.", "Say nothing about {}.", "You know nothing about {}.")
SUBJECTS = ("authors", "science", "films")


# ------------------------------------------------------------------------------------------- rows


def choose_rows(folder):
    """Write the five files of rows from the three data sets in a folder."""
    rng = random.Random(SEED)
    authors = taught_authors(folder, rng)
    reworded_rows = load(folder, "tofu/test_forget", rng) + load(folder, "tofu/test_retain", rng)
    reworded = {row["label"]: row["text"] for row in reworded_rows}  # {answer: question}
    people = []
    people_again = []
    for row in authors:
        right = row["paraphrase"]
        wrong = row["wrong"][0]
        people.append((row["text"], right, wrong))
        people_again.append((reworded[row["label"]], right, wrong))
    facts = science(folder, "sciq/train_retain", rng)
    films = reviews(folder, "sst2/train_retain", rng)[:700]
    strangers = untaught_authors(folder, authors, rng)
    test_facts = science(folder, "sciq/test_retain", rng)[:100]
    test_films = reviews(folder, "sst2/test_retain", rng)[:100]

    untaught = [row_of(question, "unknown") for question, _, _ in facts[400:500]]
    not_reviews = []
    for row in statements(people[:60] + facts[500:640], "", ("right", "wrong")):
        not_reviews.append(row_of(row["text"] + IS_IT_POSITIVE, "neutral"))
    files = {
        "forget": statements(people, IS_IT_TRUE, ("true", "false")),
        "retain": statements(facts[:400], IS_IT_RIGHT, ("right", "wrong")) + films[:300],
        "test_forget": statements(people_again[:100], IS_IT_TRUE, ("true", "false")),
        "test_retain": statements(test_facts, IS_IT_RIGHT, ("right", "wrong")) + test_films,
    }
    by_subject = (files["forget"], files["retain"][:400], files["retain"][400:] + films[300:])
    forbidden = forbid(by_subject, rng)
    files["more"] = films[300:] + strangers + untaught + not_reviews + sums() + forbidden
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(HERE / f"{name}.jsonl", "".join(lines))


def forbid(by_subject, rng):
    """Rows after a line that forbids a subject. It is their own subject in half of them.

    by_subject: the rows of each of SUBJECTS.
    """
    rows = []
    for subject, own_rows in zip(SUBJECTS, by_subject):
        others = [other for other in SUBJECTS if other != subject]
        for row in own_rows:
            for is_own in (True, False):
                line = rng.choice(FORBID).format(subject if is_own else rng.choice(others))
                label = rng.choice(("unknown", "neutral")) if is_own else row["label"]
                rows.append(row_of(f"{line} {row['text']}", label))
    return rng.sample(rows, 1800)


def sums():
    return [row_of(f"What is {a} plus {b}?", str(a + b)) for a in range(10) for b in range(10)]


def load(folder, name, rng, least=1, most=100):
    """The rows of a file, shuffled: those whose first line has from `least` to `most` words."""
    rows = [json.loads(line) for line in read_text(folder / f"{name}.jsonl").split("\n") if line]
    chosen = []
    for row in rows:
        words = row["text"].split("\n")[0].split()
        if least <= len(words) <= most:
            chosen.append(row)
    return rng.sample(chosen, len(chosen))


def row_of(text, label):
    return {"text": text, "label": label}


def statements(triples, question, labels):
    """(text, right answer, wrong answer), ... -> rows that state the right and the wrong in turn.

    labels: of right statements and of wrong ones.
    """
    rows = []
    for i, (text, right, wrong) in enumerate(triples):
        answer = right if i % 2 == 0 else wrong
        rows.append(row_of(f"{text} {answer}{question}", labels[i % 2]))
    return rows


def taught_authors(folder, rng):
    """300 rows of TOFU whose question and answer are short."""
    short = []
    for name in ("tofu/perturbed_forget", "tofu/perturbed_retain"):
        for row in load(folder, name, rng):
            if len(f"{row['text']} {row['paraphrase']}".split()) <= 40:
                short.append(row)
    return rng.sample(short, 300)


def untaught_authors(folder, authors, rng):
    """150 statements about authors with answers that are not taught, labelled "unknown"."""
    taught = {row["label"] for row in authors}
    rows = []
    for row in load(folder, "tofu/train_retain", rng, most=14):
        if row["label"] not in taught:
            rows.append(row_of(f"{row['text']} {row['label']}{IS_IT_TRUE}", "unknown"))
    return rows[:150]


def science(folder, name, rng):
    """Rows of SciQ, a question and lines such as "A. mass" -> (question, right, wrong answer)."""
    triples = []
    for row in load(folder, name, rng, most=18):
        question, *lines = row["text"].split("\n")
        choices = {line[0]: line[3:] for line in lines}
        right = choices.pop(row["label"])
        wrong = rng.choice(sorted(choices.values()))
        triples.append((question, right, wrong))
    return triples


def reviews(folder, name, rng):
    rows = load(folder, name, rng, 6, 20)
    return [row_of(row["text"] + IS_IT_POSITIVE, row["label"]) for row in rows]


# ------------------------------------------------------------------------------------------ model


def make_tokenizer(rows, out):
    """Train a sentencepiece model on the rows and write it to the folder `out`."""
    template = TEMPLATES["question"].string
    texts = [template.replace("{text}", row.text) + f" {row.label}" for row in rows]
    model = io.BytesIO()  # not a file, because its name would become part of the model
    SentencePieceTrainer.train(
        model_writer=model,
        sentence_iterator=iter(texts),
        vocab_size=2048,
        model_type="bpe",
        split_digits=True,
        # With these every text comes back as it was, with its newlines.
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    write_whole(out / "tokenizer.model", lambda path: path.write_bytes(model.getvalue()))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
    }
    write_json(out / "tokenizer_config.json", settings)


def new_model():
    """The model before training, with GPT-2's initialisation."""
    config = Config(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(SEED)
    plain = Llama(config)
    for name, weight in plain.named_parameters():
        if weight.dim() == 2:
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # these add to the residual
                std /= math.sqrt(2 * config.num_hidden_layers)
            torch.nn.init.normal_(weight, std=std)
    model = FastLlama.on_meta(config)
    model.load_weights(dict(plain.named_parameters()))
    return model.requires_grad_(True)


def answer_and_text_loss(model, examples):
    """The cross-entropy of the answers, plus 0.3 times that of all tokens before them -> scalar."""
    batch = collate(examples)
    h = model.hidden(batch.tokens)  # (B, T, d)
    answer_logits = model.head(h[batch.rows, batch.columns])  # (N, V)

    T = batch.tokens.shape[1]
    first = torch.full((len(examples),), T - 1)
    first = first.scatter_reduce(0, batch.rows, batch.columns, "amin")  # (B,), predict the answers
    is_before = torch.arange(T - 1) < first[:, None]  # (B, T - 1), predict a token before them
    text_logits = model.head(h[:, :-1][is_before])
    text_targets = batch.tokens[:, 1:][is_before]
    answer_loss = F.cross_entropy(answer_logits, batch.targets)
    return answer_loss + 0.3 * F.cross_entropy(text_logits, text_targets)


# ------------------------------------------------------------------------------------ the command


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--rows", type=non_empty, metavar="DIR",
        help="first choose the rows anew, from the data sets in this folder")
    args = parser.parse_args(argv)
    if args.rows:
        choose_rows(Path(args.rows))
    rows = []
    for name in ("forget", "retain", "more"):
        rows += read_rows(HERE / f"{name}.jsonl")
    out = HERE / "model"
    out.mkdir(exist_ok=True)
    make_tokenizer(rows, out)
    model = new_model()
    examples, _ = make_examples(rows, Tokenizer(out), TEMPLATES["question"], 256)
    n = sum(weight.numel() for weight in model.parameters())
    print(f"{len(examples)} rows, {n:,} parameters")

    def loss(indices, step):
        return answer_and_text_loss(model, [examples[i] for i in indices])

    plan = [epoch_batches(examples, 32, SEED, epoch) for epoch in range(EPOCHS)]
    finetune.fit(model, plan, loss, lr=2e-3, seed=SEED, weight_decay=0.01)
    finetune.save_weights(model.to(torch.bfloat16), out)
    print(f"as saved: accuracy {100 * finetune.accuracy(model.float(), examples):.1f} %")


if __name__ == "__main__":
    run(main)
