"""The folders of a training run: what may be in them, and the state of a run that has not finished.

The prompt's folder, --out, holds no text of the rows, so that it can be handed on. What may tell of
them lies in a folder beside it: the state, the log, and text that the model wrote or labelled.

No random states are kept: every draw comes from the seed, the number of its epoch or step, and
the losses in the log.
"""

import hashlib
import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file

from support.files import check_not_inside_file, is_half_written, write_tensors, write_text
from support.templates import template_to_json

STATE = "state.safetensors"
LOG = "log.jsonl"
WRITTEN = "retain.jsonl"  # the retain rows that the model wrote itself
GENERAL = "general.jsonl"  # general text that it wrote; a new run with the same model takes it, too
TEXTS = "texts.jsonl"  # what the model wrote to make retain rows of
RUN_FILES = (STATE, LOG, WRITTEN, GENERAL, TEXTS)
PROMPT_FILES = ("spul.json", "adapter_model.safetensors", "adapter_config.json")  # 1st: it is whole
GATE_FILES = ("gate.json", "gate.safetensors")  # of extras/gate.py, in the prompt's folder
FORMAT = 7  # of the description of a run, and of how its rows are drawn


def run_folder(out):
    """The folder beside a prompt's that holds its run: prompt.run beside prompt."""
    out = Path(out).absolute()
    return out.with_name(f"{out.name}.run")


def check_out(args, may_replace):
    """Look at the folder --out without touching it -> "new", "resume" or "finished".

    may_replace: a finished prompt there may be replaced without --overwrite. Raises ValueError
    where a run cannot be kept.
    """
    out = Path(args.out)
    run = run_folder(out)
    own = [out / name for name in (*PROMPT_FILES, *RUN_FILES)] + [run / name for name in RUN_FILES]
    for folder in (out, run):
        check_not_inside_file("--out", folder)
    general = getattr(args, "general", None)
    for given in (args.forget, args.retain, args.test_forget, args.test_retain, general):
        if given and Path(given).resolve() in [file.resolve() for file in own]:
            raise ValueError(f"--out {out}: the run would overwrite {given}: choose another folder")
    in_out = names_in(out)
    in_run = names_in(run)
    is_finished = "spul.json" in in_out
    if in_run - set(RUN_FILES) or (in_out and not is_ours(in_out, in_run)):
        raise ValueError(f"--out {out}: the folder holds other files: choose a new one")
    is_started = bool(in_out) or STATE in in_run  # without a state there is nothing to lose
    may_start = args.overwrite or (is_finished and may_replace and not args.resume)
    if not is_started or may_start:
        return "new"
    if STATE in in_out:
        raise ValueError(
            f"{out / STATE}: an unfinished run of another version of spul: finish it with that "
            "version, or start again with --overwrite"
        )
    if args.resume:
        if is_finished:
            return "finished"
        return "resume" if STATE in in_run else "new"
    if is_finished:
        remedy = "holds a finished prompt: choose another folder, or --overwrite"
    else:
        remedy = "holds a run that has not finished: --resume it, or --overwrite"
    raise ValueError(f"--out {out}: {remedy}")


def names_in(folder):
    """The names of a folder's files, without those that a kill left half written."""
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names if not is_half_written(name)}


def is_ours(names, in_run):
    """Whether the files in --out are a finished prompt, or of a run that a kill ended."""
    is_earlier_versions = STATE in names or LOG in names  # whose run lay in the same folder
    if "spul.json" in names:
        return True
    is_started = bool(in_run) or is_earlier_versions
    return is_started and names <= {*PROMPT_FILES, *GATE_FILES, *RUN_FILES}


def clear_run(args):
    """Make the folders of a new run: without an earlier one's files, with a log that marks it.

    Text that the model has written for this run stays.
    """
    out = Path(args.out)
    run = run_folder(out)
    written = [TEXTS] if not args.retain else []
    written += [GENERAL] if args.gamma and not args.general else []
    of_prompt = (*PROMPT_FILES, *GATE_FILES, *RUN_FILES)
    for folder, names in ((out, of_prompt), (run, RUN_FILES)):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if name not in written:
                (folder / name).unlink(missing_ok=True)
    write_text(run / LOG, "")


def save_state(folder, module, optimizer, step, run):
    """Write what a run needs, beside its log, to go on after `step` steps.

    That is what learns in the module, the optimizer's moments, and `run`, which describes the run.
    """
    tensors = {}
    for name, parameter in learned(module):
        tensors[name] = parameter.detach().cpu().contiguous()
        for key, moment in optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = moment.detach().cpu().contiguous()
    metadata = {"step": str(step), "run": json.dumps({"format": FORMAT, **run})}
    write_tensors(Path(folder) / STATE, tensors, metadata)


def read_run(folder):
    """The step and the description of the run in a state file; ValueError if it is broken."""
    file = Path(folder) / STATE
    try:
        with safetensors.safe_open(file, framework="pt") as f:
            metadata = f.metadata()
        step = int(metadata["step"])
        run = json.loads(metadata["run"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f"{file}: not a complete state file ({e}): start again with --overwrite"
        ) from None
    if run.pop("format", 1) != FORMAT:
        raise ValueError(
            f"{file}: an unfinished run of another version of spul: finish it with that version, "
            "or start again with --overwrite"
        )
    return step, run


def describe(args, options, model, data, base_sha256):
    """What makes a run the same run, and so what a resumed one has to agree with.

    options: the names of those that matter. data: all that it learns from.
    """
    values = {name: getattr(args, name) for name in options}
    values["dtype"] = str(model.dtype)
    values["template"] = template_to_json(args.template)
    if "more_templates" in values:
        values["more_templates"] = [template_to_json(other) for other in args.more_templates]
    data_sha256 = hashlib.sha256(repr(data).encode()).hexdigest()
    return {"base_sha256": base_sha256, "options": values, "data_sha256": data_sha256}


def flat(description):
    """A description as {name: value}, with names for a message."""
    return {
        "the model": description["base_sha256"],
        "the data": description["data_sha256"],
        **description["options"],
    }


def check_same_run(folder, earlier, now):
    """Raises ValueError, with what changed, if a resumed run is not the one that was started."""
    names = {**earlier, **now}  # an option that only one of them has counts, too
    changed = [name for name in names if earlier.get(name) != now.get(name)]
    if changed:
        raise ValueError(
            f"--resume: not the run that was started in {folder}: {', '.join(changed)} changed"
        )


def stopped_message(step, steps, out):
    """What Ctrl-C says once the state is saved; nothing if the run keeps no state."""
    if not out:
        return ""
    return (
        f"stopped after step {step} of {steps}, saved in {out}: the same command with --resume "
        "goes on"
    )


def likely_cause(lr, out):
    """What to say of a run that has diverged."""
    return (
        f"most likely --lr {lr:g} is too high, or the model's weights are broken. "
        f"The last good state is kept in {out}"
    )


def read_log(file, steps):
    """The lines of the first steps of a log. ValueError if they are not as `fit` wrote them."""
    lines = file.read_text().splitlines()[:steps] if steps else []
    try:
        found = [json.loads(line) for line in lines]
        is_whole = [line["step"] for line in found] == [*range(1, steps + 1)] and all(
            len(line["rows"]) == line["n_f"] + line["n_r"] for line in found
        )
    except (KeyError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise ValueError(
            f"{file}: --resume needs the lines of {steps} steps, as they were written: start "
            "again with --overwrite"
        )
    return found


def cut_log(file, steps):
    """Keep the lines of the first steps of a log: those that the state knows of."""
    lines = file.read_text().splitlines(keepends=True) if steps else []
    write_text(file, "".join(lines[:steps]))


def load_state(folder, module, optimizer):
    """Put a state file's tensors back into the module and the optimizer."""
    tensors = load_file(Path(folder) / STATE)
    moments = {}
    for key, tensor in tensors.items():
        name, is_moment, moment = key.rpartition("/")
        if is_moment:
            moments.setdefault(name, {})[moment] = tensor
    with torch.no_grad():
        for name, parameter in learned(module):
            parameter.copy_(tensors[name])
            state = {}
            for key, tensor in moments.get(name, {}).items():
                state[key] = tensor if key == "step" else tensor.to(parameter.device)
            optimizer.state[parameter] = state


def learned(module):
    """The name and parameter of all that learns in a module."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
