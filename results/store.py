"""What the runs of a study measured: runs/STUDY.json, {name of the run: its entry}, a line a run.

An entry also holds the run's commands and the digest of the model with which they began. So
no figure is shown with commands that it does not come from. A run that diverged has the reason in
its entry instead of figures, as "failed".
"""

import json
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.files import read_json, write_text  # noqa: E402

LOCK = threading.Lock()  # several runs side by side change the file one after the other


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def read_entries(file):
    """{name: entry} of a study's file. It is empty before the first run."""
    return read_json(file) if file.exists() else {}


def write_entries(file, entries):
    lines = [f"{dumps(name)}: {dumps(entry)}" for name, entry in sorted(entries.items())]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "{\n" + ",\n".join(lines) + "\n}\n")


def find(run):
    """The run's entry, or None if it has none. Raises ValueError if other commands led to it."""
    entry = read_entries(run.store).get(run.name)
    if entry is None:
        return None
    if any(entry.get(key) != value for key, value in run.origin().items()):
        raise ValueError(
            f"{run.store}: {run.name}: measured with other commands, or another --base or --work: "
            f"it says which; take those, or delete that entry and {run.kept} to measure anew"
        )
    return entry


def measured(run):
    """What the run measured, or None if it did not run or has diverged."""
    entry = find(run)
    if entry is None or "failed" in entry:
        return None
    return entry


def add(run, found):
    """Write what a run measured, or {"failed": why}, into its study's file."""
    with LOCK:
        entries = read_entries(run.store)
        entries[run.name] = slim(found) | run.origin()
        write_entries(run.store, entries)


def slim(found):
    """Leave out what is long: most answers of TOFU, and what follows from the rest."""
    found = {key: value for key, value in found.items() if key not in ("finished", "lines")}
    for side in ("without", "with"):
        if found.get(side):
            found[side] = {name: slim_split(name, split) for name, split in found[side].items()}
    return found


def slim_split(name, split):
    """The figures of one split. Of what the model said, the table shows the forget rows' part."""
    dropped = ["ratios"] if name == "train forget" else ["ratios", "said"]
    return {key: value for key, value in split.items() if key not in dropped}


def write_table(file, study, rows):
    """A study's table as JSON, a line a row."""
    lines = ",\n".join(map(dumps, rows))
    write_text(file, f'{{"study": {dumps(study)}, "rows": [\n{lines}\n]}}\n')
