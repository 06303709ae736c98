"""--ask: a model's answers to one text, to lines as they are typed, or to a file of rows."""

import json
import sys
from dataclasses import dataclass

from tqdm import tqdm

from data import Row, Template, prompt_ids, read_rows
from support.files import check_json_path, write_text
from support.rows import check_text

MAX_ANSWER = 256  # tokens of an answer in a chat
MAX_LINE = 64  # and else, where an answer is one line


@dataclass
class Asking:
    """How queries are asked, and answers read."""

    tokenizer: object
    template: Template
    labels: dict  # {answer: its ids}; {}: any answer is taken
    room: int  # positions that the model has after the prompt
    is_raw: bool = False  # whether texts are whole prompts

    def row(self, text, where):
        check_text(text, where)
        return Row(text, "", where, self.is_raw)

    def prompts(self, rows):
        """Of each row the ids, and how many new ones its answer may have.

        Raises ValueError, with the row's place, where there is no room.
        """
        wanted = MAX_ANSWER if self.template.end else MAX_LINE
        n = max(map(len, self.labels.values()), default=wanted)
        prompts = []
        for row in rows:
            ids = prompt_ids(row, self.tokenizer, self.template)
            most = min(n, max(self.room - len(ids), 1))
            if not ids or len(ids) + most > self.room:
                room = self.room - most
                raise ValueError(
                    f"{row.where}: {len(ids)} tokens, but there is room for 1 to {room}"
                )
            prompts.append((ids, most))
        return prompts

    def read(self, ids):
        """An answer's ids -> a label if it is one; else one line, or in a chat all of it."""
        answer = self.tokenizer.decode(ids).strip()
        if not self.template.end:
            answer = answer.split("\n")[0]
        return match_answer(ids, self.labels) or answer


def match_answer(ids, answers):
    """The longest of the answers, {answer: its ids}, that ids begin with, or None."""
    fits = [name for name, own in answers.items() if ids[: len(own)] == own]
    return max(fits, key=lambda name: len(answers[name]), default=None)


def answer(rows, asking, generate, batch_size=32, what=None):
    """The greedy answer to each row. what: the bar's name; None: there is none.

    generate(prompts, max_new_tokens) -> lists of new ids.
    """
    prompts = asking.prompts(rows)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i][0]))
    answers = [None] * len(rows)
    with tqdm(total=len(rows), desc=what, unit="row", leave=False, disable=not what) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            longest = max(prompts[i][1] for i in part)
            for i, ids in zip(part, generate([prompts[i][0] for i in part], longest)):
                answers[i] = asking.read(ids[: prompts[i][1]])
            bar.update(len(part))
    return answers


def show(row, asking, generators):
    """Print each generator's answer to a row."""
    for name, generate in generators.items():
        before = f"{name} the prompt:"
        print(f"{before:19} {answer([row], asking, generate)[0]}", flush=True)


def ask(args, asking, generators, rows=()):
    """Answer what --ask asks. generators: {"without": generate, "with": generate}.

    It is a text, or True: each line that is typed. rows: those of its file, for --out.
    """
    if rows:
        answer_file(args, rows, asking, generators)
        return
    if args.ask is not True:
        text = args.ask.replace("\\n", "\n")  # a shell passes \n on as two characters
        show(asking.row(text, "--ask"), asking, generators)
        return
    is_typed = sys.stdin.isatty()
    if is_typed:
        print("a line is a query; the end (Ctrl-D) ends", flush=True)
    for number, line in enumerate(sys.stdin, 1):
        text = line.strip().replace("\\n", "\n")
        if not text:
            continue
        try:
            show(asking.row(text, f"line {number}"), asking, generators)
        except ValueError as e:
            if not is_typed:
                raise
            print(e, flush=True)  # the next line may be better


def answer_file(args, rows, asking, generators):
    """Write the answers to rows to --out, a JSON object a line, with each generator's name."""
    answers = {
        name: answer(rows, asking, generate, args.batch_size, name)
        for name, generate in generators.items()
    }
    lines = []
    for i, row in enumerate(rows):
        line = {"text": row.text} | ({"label": row.label} if row.label else {})
        line |= {name: answers[name][i] for name in generators}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(args.out, "".join(lines))
    changed = sum(len(set(each)) > 1 for each in zip(*answers.values()))
    also = f", {changed} of them others with the prompt" if len(generators) > 1 else ""
    print(f"{args.out}: the answers to {len(rows)} rows{also}")


def rows_to_ask(args):
    """The rows of the file that --ask names, if --out is given; else none. Checks both."""
    if not args.out:
        return []
    if args.ask is None:
        raise ValueError("--out: for the answers to --ask FILE")
    if args.ask is True:
        raise ValueError("--out: --ask needs the FILE whose rows are to be answered")
    check_json_path(args.out, "--out")
    return read_rows(args.ask, unlabelled=True)
