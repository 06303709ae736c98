"""What the model writes for a run, kept beside the prompt. What is there is not written again.

A file has a head, which says of which model and by which options it is, then a text on each line.
"""

import json

from support.files import read_text, write_text
from support.processes import ranks, wait_for_all


def written_texts(file, head, args, make):
    """The texts of a file, dicts, once all are written. Ctrl-C loses a round at most.

    make(texts): yields the texts again and again, each time with more, and ends when they are
    enough. Of several processes the first one's count. Raises ValueError where a run that goes on
    has a file of another head.
    """
    texts = read_written(file, head)
    if args.resume and not texts and read_written(file):
        raise ValueError(
            f"--resume: {file} was written by another model, or with another --seed, --dtype or "
            "--quantize: give those again, or start again with --overwrite"
        )
    wait_for_all()  # until all have read it, so that all do the same
    for texts in make(texts):
        if ranks()[0] == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, "".join(json.dumps(line) + "\n" for line in [head, *texts]))
    wait_for_all()
    if ranks()[1] > 1:
        texts = read_written(file, head)
    return texts


def read_written(file, head=None):
    """The texts in a file that `written_texts` wrote; [] if it is broken, or has another head.

    head: None: any.
    """
    if not file.is_file():
        return []
    try:
        first, *texts = [json.loads(line) for line in read_text(file).split("\n") if line]
        for text in texts:
            if not isinstance(text["text"], str) or not isinstance(text.get("label"), str | None):
                return []
    except (ValueError, KeyError, TypeError):  # somebody else's: it is written anew
        return []
    return texts if head in (None, first) else []


def head_of(args, model, sha256, **more):
    """What texts that a model wrote depend on."""
    head = {"base_sha256": sha256, "seed": args.seed, "dtype": str(model.dtype)}
    return head | {"quantize": args.quantize, **more}
