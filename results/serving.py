"""Whether other programs answer from an exported folder as we do.

    python results/serving.py --model DIR --prompt DIR --forget FILE --retain FILE [--rows 50]
        --exported DIR [--gguf FILE]

Greedy answers of 16 tokens, for rows in the prompt's template and in the model's chat form: ours
with the prompt, and those of transformers from the folder of `extras.export --as vocabulary`; or,
with --gguf, of llama.cpp (package llama-cpp-python) from a file made of `extras.export --as gguf`.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Row, prompt_ids, read_rows  # noqa: E402
from extras.export import EXPORT  # noqa: E402
from model import Llama  # noqa: E402
from spul import load_prompt  # noqa: E402
from support.asking import spread  # noqa: E402
from support.cli import run  # noqa: E402
from support.files import read_json  # noqa: E402
from support.templates import read_template, template_from_json  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402

NEW = 16  # tokens of an answer


def ours(args, rows, templates):
    """{form: greedy answers as ids}, by the plain forward pass with the prompt."""
    model = Llama.from_pretrained(args.model)
    tokenizer = Tokenizer(args.model)
    phi, _ = load_prompt(args.prompt, args.model)
    prefix = model.prefix(phi.to(torch.bfloat16).float())  # as a folder in bf16 holds it
    answers = {}
    for form, template in templates.items():
        prompts = [prompt_ids(row, tokenizer, template) for row in rows]
        answers[form] = []
        for start in range(0, len(prompts), 25):
            answers[form] += model.generate(prompts[start : start + 25], prefix, NEW)
    return answers


def of_transformers(args, rows, templates):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.exported, dtype=torch.float32)
    answers = {}
    for form, template in templates.items():
        answers[form] = []
        for row in rows:
            if template.chat:
                messages = [{"role": "user", "content": row.text}]
                ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
                ids = ids["input_ids"]
            else:
                ids = tokenizer(template.string.replace("{text}", row.text)).input_ids
            new = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
            answers[form].append(new[0, len(ids) :].tolist())
    return answers


def of_llama_cpp(args, rows, templates):
    import llama_cpp

    model = llama_cpp.Llama(args.gguf, n_ctx=1024, n_threads=args.threads, verbose=False)
    said = model.metadata["tokenizer.chat_template"]
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(said, "", "")
    prefix = read_json(Path(args.exported) / EXPORT)["prefix"]
    answers = {}
    for form, template in templates.items():
        answers[form] = []
        for row in rows:
            text = prefix + template.string.replace("{text}", row.text)
            if template.chat:
                text = formatter(messages=[{"role": "user", "content": row.text}]).prompt
            ids = model.tokenize(text.encode(), add_bos=False, special=True)
            model.reset()
            new = []
            for token in model.generate(ids, top_k=1, temp=0.0):
                if token == model.token_eos() or len(new) == NEW:
                    break
                new.append(token)
            answers[form].append(new)
    return answers


def cut(ids, ends):
    """Ids up to the first that ends a text."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "prompt", "forget", "retain", "exported"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--gguf", help="ask llama.cpp with this file, and not transformers")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    parser.add_argument("--rows", type=int, default=50, help="of each file")
    args = parser.parse_args()
    rows = []
    for file in (args.forget, args.retain):
        rows += [Row(row.text, "", row.where) for row in spread(read_rows(file), args.rows)]
    _, info = load_prompt(args.prompt, args.model)
    templates = {
        "the prompt's template": template_from_json(info["template"]),
        "a chat": read_template("chat", args.model),
    }
    ends = Llama.from_pretrained(args.model).end_ids().tolist()
    want = ours(args, rows, templates)
    name, answer = ("llama.cpp", of_llama_cpp) if args.gguf else ("transformers", of_transformers)
    for form, got in answer(args, rows, templates).items():
        pairs = [(cut(a, ends), cut(b, ends)) for a, b in zip(want[form], got)]
        same = sum(a == b for a, b in pairs)
        first = sum(a[:1] == b[:1] for a, b in pairs)
        shown = f"{same} of {len(rows)} answers are the same, {first} in the first token"
        print(f"{name}, {form}: {shown}")


if __name__ == "__main__":
    run(main)
