"""Run the experiments and write their tables, a .json and a .md each.

    python results/study.py sst2 --base smollm2        the paper's comparison: sst2/main
    python results/study.py sciq --base smollm2        the same on SciQ: sciq/main
    python results/study.py full --base smollm2        the same on all of SST-2: sst2/full
    python results/study.py ablations --base smollm2   the paper's ablations: sst2/ablations
    python results/study.py assessment --base smollm2  what SPUL and GA+GD really do: assessment
    python results/study.py robust --base smollm2      prompts trained on changed queries: robust
    python results/study.py tofu --base smollm2        answers of several words: tofu
    python results/study.py requests --base smollm2    two requests, one model: requests
    python results/study.py sizes --base smollm2       smaller and larger models: sizes
    python results/study.py elsewhere --base smollm2   other text, on a model that talks: elsewhere
    python results/study.py elsewhere_sst2 --base smollm2    the defaults there on more rows
    python results/study.py elsewhere_sciq --base smollm2    and on SciQ
    python results/study.py elsewhere_tofu --base smollm2    and on TOFU's sentences
    python results/study.py elsewhere_requests --base smollm2   a second prompt after the first

The tables go into results/. Every run is a few commands as a user would type them (plans.py). What
they measured goes, with the commands, into runs/STUDY.json beside the tables (store.py). What is
small of what they learned goes into runs/STUDY/: prompts, and the adapters of memorised models.
All else goes into the folder --work.

What is measured is not run again, on this machine or another. A memorised model that is still
needed is made from its adapter, if that is kept. What was stopped goes on, and the table is
written anew after each run. --jobs runs several side by side, each on its share of the cores.
"full", "tofu" and "elsewhere_tofu" need rows that results/rows.py draws, "full" also a GPU.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import plans  # noqa: E402
import store  # noqa: E402
import tables  # noqa: E402
from support.tables import costs  # noqa: E402
from extras.finetune import ADAPTER  # noqa: E402
from support.cli import run as run_command  # noqa: E402
from support.files import read_json, weight_files, write_text, write_whole  # noqa: E402
from support.state import PROMPT_FILES  # noqa: E402

TABLES = {  # where in results/ a study's table is, if not under its own name
    "sst2": "sst2/main",
    "full": "sst2/full",
    "sciq": "sciq/main",
    "ablations": "sst2/ablations",
}


# --------------------------------------------------------------------------------- one run


def is_whole(made):
    """Whether what a command makes, a JSON file or a folder, is there and complete."""
    if made.suffix == ".json":
        return made.exists() and read_json(made).get("finished", True)  # assess.py's can go on
    return any((made / name).exists() for name in ("config.json", "guard.json", "spul.json"))


def keep(run):
    """Copy a prompt, or a memorised model's adapter, from the folder of work to results."""
    folder = run.learned
    if (folder / ADAPTER).exists():
        folder = folder / ADAPTER
    for name in PROMPT_FILES:  # an adapter's files have the same names
        file = folder / name
        if file.exists():
            run.kept.mkdir(parents=True, exist_ok=True)
            write_whole(run.kept / name, lambda new, file=file: shutil.copyfile(file, new))


def read_measured(file, kept):
    """What a command measured: eval.py's file, or one of its form made from the prompt kept."""
    info = read_json(file)
    if file.parent != kept:
        return info
    return {
        "model": info["model"],
        "prompt": str(kept),
        "dtype": info["options"]["dtype"],
        "cost": costs(info),
        **info["results"],
    }


def add_measured(run):
    """Move what the run's commands measured into its study's file."""
    found = read_measured(run.found, run.kept)
    if run.more:
        found["more"] = read_measured(run.more, run.kept)
    store.add(run, found)
    for file in (run.found, run.more):
        if file and file.parent != run.kept:
            file.unlink()


def from_adapter(run, command):
    """The command that makes a run's model from the adapter that is kept, and not by training."""
    shutil.rmtree(run.learned, ignore_errors=True)  # what was stopped
    base = command[command.index("--model") + 1]
    tune = [*plans.extra("finetune"), "--model", base]
    return [*tune, "--adapter", run.kept, "--out", run.learned]


def execute(command, log, threads=None):
    """Run a command of ours -> None, or why it failed, and whether training diverged."""
    first, *options = map(str, command)
    if first != "-m":
        first = ROOT / first
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with open(log, "a") as out:
        done = subprocess.run(
            [sys.executable, first, *options],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        if done.returncode:
            out.write(done.stderr[-4000:])
    if done.returncode == 0:
        return None, False
    lines = done.stderr.strip().splitlines() or ["no message"]
    return lines[-1], done.returncode == 3 and "not finite" in lines[-1]


def perform(run, threads=None):
    """Do what of the run's commands has not been done. Returns whether the next runs can begin.

    A run that diverged would diverge again: its study's file keeps the reason.
    """
    entry = store.find(run)
    if entry and "failed" in entry:
        return not run.is_needed
    if entry and not (run.is_needed and not is_whole(run.learned)):
        return True
    for command in run.commands:
        made = Path(command[-1])
        is_learning = made == run.learned
        is_done = is_whole(made) or (is_learning and is_whole(run.kept))
        if made.suffix == ".json" and entry:
            is_done = True
        if not is_done:
            if run.is_needed and is_learning and (run.kept / "adapter_config.json").exists():
                command = from_adapter(run, command)
            why, has_diverged = execute(command, run.log, threads)
            if why:
                print(f"{run.name}: {why}", flush=True)
                if has_diverged:
                    store.add(run, {"failed": why})
                return has_diverged and not run.is_needed
        if is_learning:
            keep(run)
    if not entry:
        add_measured(run)
    if run.learned and not run.is_needed and (run.learned / "model.safetensors").exists():
        shutil.rmtree(run.learned)
    return True


# --------------------------------------------------------------------------------- the command


def perform_group(group, jobs, after_each):
    """Perform runs side by side. Raises ValueError if what follows cannot begin."""
    jobs = min(jobs, len(group))
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    pool = ThreadPoolExecutor(jobs)
    try:
        waiting = {pool.submit(perform, run, threads): run for run in group}
        for future in as_completed(waiting):
            state = "done" if future.result() else "not done"
            print(f"{waiting[future].name}: {state}", flush=True)
            after_each()
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C those that have not begun
    if not all(future.result() for future in waiting):
        raise ValueError(
            "stopped: what follows needs what is not done; the same command tries again"
        )


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", choices=[*plans.ROWS])
    add("--base", required=True, metavar="DIR", help="the base model")
    work = "for models and prompts, some GB (default work)"
    add("--work", default="work", metavar="DIR", help=work)
    add("--out", default=HERE, metavar="DIR", help="for the tables (default results)")
    add("--jobs", type=int, default=1, help="runs side by side (default 1)")
    only = "run nothing: write the table of what is there"
    add("--table", action="store_true", help=only)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    weight_files(args.base)  # says if it is not a model
    plan = plans.Plan(args.study, args.base, args.work, args.out)
    groups = plan.groups()
    runs = [run for group in groups for run in group]
    own = [run for run in runs if run.store == plan.store or args.study == "sizes"]
    table = Path(args.out) / TABLES.get(args.study, args.study)
    table.parent.mkdir(parents=True, exist_ok=True)

    def write():
        rows, text = tables.table(args.study, own)
        store.write_table(table.with_suffix(".json"), args.study, rows)
        write_text(table.with_suffix(".md"), text)

    if not args.table and not all(store.find(run) for run in runs):
        if plan.missing:
            file = os.path.relpath(plan.missing[0])
            raise ValueError(f"{file} is not there: python results/rows.py draws it")
        for group in groups:
            perform_group(group, args.jobs, write)
    write()
    print(f"tables in {table}.json and {table}.md")


if __name__ == "__main__":
    run_command(main)
