"""How much longer a step with L_keep takes: python results/keep_cost.py --model DIR

Steps with and without general text take turns, on the same rows, so that other programs disturb
both alike. The texts have as many tokens as train.py cuts them to.
"""

import random
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import TEMPLATES, Example, collate, common_prefix, make_examples, read_rows  # noqa: E402
from spul import SoftPrompt, answer_hidden  # noqa: E402
from support.cli import Parser, add_options, check_required, number, run  # noqa: E402
from support.general import LONGEST, General  # noqa: E402
from support.hardware import load_model  # noqa: E402
from train import make_optimizer, train_step  # noqa: E402

HERE = Path(__file__).resolve().parent


def main(argv=None):
    parser = Parser(__doc__)
    add_options(parser, data=False, batch_size=8)
    parser.add_argument("--rounds", type=number(int, 1), default=8, help="of both (default 8)")
    args = parser.parse_args(argv)
    check_required(args, "model")
    model, tokenizer = load_model(args)
    options = tokenizer, TEMPLATES["sentiment"], args.max_length
    n_f = args.batch_size // 4
    rows = read_rows(HERE / "sst2/forget.jsonl")[:n_f]
    forget, _ = make_examples(rows, *options, True, ["unknown"], random.Random(0))
    rows = read_rows(HERE / "sst2/retain.jsonl")[: args.batch_size - n_f]
    retain, _ = make_examples(rows, *options)
    ids = [i for e in forget + retain for i in e.ids]
    texts = [Example(tuple(ids[i : i + LONGEST]), LONGEST - 1, "", False) for i in range(16)]
    general = General(texts, [], {}, 0, max(1, args.batch_size // 8))
    general.compute_teacher(model, args.batch_size)
    examples = forget + retain
    batch = collate(examples, model.device, common_prefix(examples))
    teacher = torch.cat(answer_hidden(model, retain))
    prompt = SoftPrompt(30, model.config.hidden_size).to(model.device)
    optimizer = make_optimizer(prompt, 1e-3)
    seconds = {False: [], True: []}
    for step in range(args.rounds + 2):
        for has_texts, times in seconds.items():
            texts = general.draw(step, model.device) if has_texts else None
            began = time.perf_counter()
            train_step(model, prompt, optimizer, batch, teacher, keep=texts)
            times.append(time.perf_counter() - began)
    without, with_texts = (median(times[2:]) for times in seconds.values())  # 2 warm up
    print(
        f"{args.batch_size} rows a step: {without:.3f} s, with {general.per_batch} texts of "
        f"{LONGEST} tokens {with_texts:.3f} s: {with_texts / without:.2f} times"
    )


if __name__ == "__main__":
    run(main)
