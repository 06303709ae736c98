"""The form of the rows to forget: what is the same in all of them, and so not what they are about.

    without_template  what all rows begin and end with, and the rest of each
    line_marks        how their lines begin, where they have several: "A.", "B."
    KeepsForm         puts these marks in while the model writes

Left to itself a model keeps a form in few of its texts. Beside those that do not have it a prompt
learns to refuse the form.
"""

import os.path
import re
from collections import Counter
from dataclasses import replace

FEWEST = 10  # so many rows show which lines they have
ALIKE = 0.95  # of the rows have these lines
MARK = r"(\W*\w{0,2}[^\w\s]+\s|\S+:\s)?"  # how a line begins: "A. ", "(b) ", "- ", "Question: "

# A template up to a row's own text,
BEFORE = re.compile(
    r"""
    (.*\n)?                 # whole lines,
    ( [^\w\n]*\w+:\s*       # a label: "### Text: ",
    | [^\n]*[>\]]\s* )?     # or all up to a bracket: "[INST] ",
    ["']?                   # and a quote
    """,
    re.DOTALL | re.VERBOSE,
)
# and from its end: a quote, and what begins with one of these.
AFTER = re.compile(
    r"""
    ["']?
    ( \s*\n                                   # a line
    | \s*[<\[]                                # a bracket: " [/INST]"
    | ( (?<=[?!]) | (?<=[^\W\d_]{4}\.) )\s+   # a sentence; after "Dr." there is none
    | \s\S+:\s*$                              # a label: " Answer:"
    | \s\W*$                                  # a sign: " ->"
    ).*
    """,
    re.DOTALL | re.VERBOSE,
)


def without_template(forget):
    """(before, after, rows): what all rows begin and end with, and the rest of each.

    In rows of prompt and completion that is their template. As a part of each example the model
    would write it, too, and nothing else. It ends and begins at a mark of a template: words in
    common may be what the rows are about. Rows without one are as they are.
    """
    texts = [row.text for row in forget]
    if len(texts) < 2:
        return "", "", forget
    before = BEFORE.match(os.path.commonprefix(texts)).group()
    ends = [text[len(before) :][::-1] for text in texts]
    found = AFTER.search(os.path.commonprefix(ends)[::-1])
    after = found.group() if found else ""
    inner = [text[len(before) : len(text) - len(after)] for text in texts]
    if not all(text.strip() for text in inner):
        return "", "", forget
    return before, after, [replace(row, text=text) for row, text in zip(forget, inner)]


def line_marks(forget):
    r"""How each line of the rows begins, ["", "\nA.", "\nB."], if nearly all have these lines.

    Else, and of rows of one line, or fewer than FEWEST: []. Words are no mark, as they may be what
    the rows are about; but one word and a colon is, such as who speaks.
    """
    rows = [parts_of(row.text) for row in forget]
    breaks, alike = Counter(tuple(parts[1::2]) for parts in rows).most_common(1)[0]
    if not breaks or alike < max(FEWEST, ALIKE * len(rows)):
        return []
    lines = zip(*[parts[::2] for parts in rows if tuple(parts[1::2]) == breaks])
    begins = [re.match(MARK, os.path.commonprefix(line)).group().rstrip() for line in lines]
    return [before + begin for before, begin in zip(("", *breaks), begins)]


def parts_of(text):
    """A text's lines, and what is between each two: [line, "\\n", line, "\\n\\n", line]."""
    return re.split(r"[^\S\r\n]*(\r?\n\s*)", text.strip())


def fits(text, marks):
    """Whether a text has the lines of `line_marks`."""
    parts = parts_of(text)
    lines = [before + line for before, line in zip(("", *parts[1::2]), parts[::2])]
    return not marks or (len(lines) == len(marks) and all(map(str.startswith, lines, marks)))


class KeepsForm:
    """Where the model ends a line it puts the next line's mark, and after the last line the end.

    So a text has the lines of the rows.
    """

    def __init__(self, marks, tokenizer, ends, n):
        """marks: of `line_marks`. ends: the ids that end a text. n: texts."""
        self.marks = marks
        self.tokenizer = tokenizer
        self.ends = ends
        self.line = [0] * n  # in which each text is
        self.to_come = [[] for _ in range(n)]  # ids to put next

    def __call__(self, tokens):
        """The tokens (n, 1) that were drawn -> those to take."""
        for i, token in enumerate(tokens[:, 0].tolist()):
            if not self.to_come[i]:
                self.to_come[i] = self.in_place_of(token, i)
            if self.to_come[i]:
                tokens[i] = self.to_come[i].pop(0)
        return tokens

    def in_place_of(self, token, i):
        """The ids to take for one that ends a line of text i; [] for another."""
        said = "" if token in self.ends else self.tokenizer.decode([token])
        is_within = token not in self.ends and "\n" not in said
        if is_within or self.line[i] == len(self.marks):
            return []
        self.line[i] += 1
        said = said.split("\n")[0]  # some tokenizers have a token for "?\n"
        if self.line[i] < len(self.marks):
            return self.tokenizer.encode_inside(said + self.marks[self.line[i]])
        return (self.tokenizer.encode_inside(said) if said else []) + self.ends[:1]
