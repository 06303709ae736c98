"""train.py, and how far the prompt had come on the way: python results/curve.py OPTIONS

With the options of train.py it learns a prompt. Before that one is measured, the prompts of every
50th step are, on train rows, and at each of these steps the moving average of the prompts up to it,
in which each further step back counts 2 % less, and the first prompt all that is left. The lines go
into curve.json in the prompt's folder.
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
DECAY = 0.98  # of the average, a step


def curve(job, kept):
    """[{"step", "seconds", "forget", "retain", "averaged": [forget, retain]}].

    kept: {step: (phi (p, d), the average (p, d))}.
    """
    log = (run_folder(job.args.out) / LOG).read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in log]
    sides = dataclasses.replace(job, measured={name: job.measured[name] for name in SIDES})
    lines = []
    for step, prompts in kept.items():
        (forget, retain), averaged = (accuracies(sides, phi) for phi in prompts)
        line = {"step": step, "seconds": round(sum(seconds[:step]))}
        lines.append(line | {"forget": forget, "retain": retain, "averaged": averaged})
        print(json.dumps(lines[-1]), flush=True)
    return lines


def accuracies(job, phi):
    """In per cent, of each of the job's two splits."""
    found = train.measure_splits(job, phi)
    return [round(100 * found[name]["accuracy"], 1) for name in SIDES]


def main(argv):
    if "--resume" in argv:
        raise ValueError("--resume: the prompts of the steps before are not kept; begin anew")
    kept = {}
    average = None
    train_step, save_state, finish = train.train_step, train.save_state, train.finish

    def step_and_average(model, prompt, *rest):
        nonlocal average
        report = train_step(model, prompt, *rest)
        phi = prompt().detach()
        average = phi.clone() if average is None else average.lerp(phi, 1 - DECAY)
        return report

    def save_and_keep(out, prompt, optimizer, step, description):
        kept[step] = prompt().detach().clone(), average
        save_state(out, prompt, optimizer, step, description)

    def measure_and_finish(job, before):
        lines = curve(job, kept)
        finish(job, before)
        text = ",\n".join(map(json.dumps, lines))
        write_text(Path(job.args.out) / "curve.json", f"[\n{text}\n]\n")

    train.train_step = step_and_average
    train.save_state, train.finish = save_and_keep, measure_and_finish
    train.main(argv)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
