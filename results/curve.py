"""train.py, and how far the prompt had come on the way: python results/curve.py OPTIONS

With the options of train.py it learns a prompt. Before that one is measured, the prompts of every
50th step are, on train rows. The lines go into curve.json in the prompt's folder.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from support.cli import run  # noqa: E402
from support.files import write_text  # noqa: E402
from support.state import LOG, run_folder  # noqa: E402

SIDES = ("train forget", "train retain")


def curve(job, kept):
    """[{"step", "seconds", "forget", "retain"}]: kept {step: phi (p, d)}."""
    log = (run_folder(job.args.out) / LOG).read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in log]
    sides = dataclasses.replace(job, measured={name: job.measured[name] for name in SIDES})
    lines = []
    for step, phi in kept.items():
        found = train.measure_splits(sides, phi)
        forget, retain = (round(100 * found[name]["accuracy"], 1) for name in SIDES)
        spent = round(sum(seconds[:step]))
        lines.append({"step": step, "seconds": spent, "forget": forget, "retain": retain})
        print(json.dumps(lines[-1]), flush=True)
    return lines


def main(argv):
    if "--resume" in argv:
        raise ValueError("--resume: the prompts of the steps before are not kept; begin anew")
    kept = {}
    save_state, finish = train.save_state, train.finish

    def save_and_keep(out, prompt, optimizer, step, description):
        kept[step] = prompt().detach().clone()
        save_state(out, prompt, optimizer, step, description)

    def measure_and_finish(job, before):
        lines = curve(job, kept)
        finish(job, before)
        text = ",\n".join(map(json.dumps, lines))
        write_text(Path(job.args.out) / "curve.json", f"[\n{text}\n]\n")

    train.save_state, train.finish = save_and_keep, measure_and_finish
    train.main(argv)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
