"""What users can get wrong in answers: one clear line each.

Everything here raises ValueError, with the place and, where there is one, the remedy.
"""

import os.path

from support.files import read_text


def read_generic(value):
    """--generic -> the generic answers, of "A,B,..." or of a file with one on each line."""
    if os.path.isfile(value):
        words = read_text(value).splitlines()
    elif value.endswith(".txt"):
        raise ValueError(f"--generic {value}: this file does not exist")
    else:
        words = value.split(",")
    words = [word.strip() for word in words if word.strip()]
    if not words:
        raise ValueError(f"--generic {value}: at least one answer is needed")
    return list(dict.fromkeys(words))


def check_generic(rows, generic):
    """Refuses a row whose own answer is among the generic ones."""
    for row in rows:
        label = (row.label or "").strip()
        if label in generic:
            raise ValueError(
                f"{row.where}: the label {label!r} is also a generic answer: "
                "choose others with --generic"
            )
