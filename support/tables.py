"""What is measured, as a table on the screen and as JSON."""

from pathlib import Path

from support.files import read_json, write_json

# accuracy: answers that are the true one. probability: of the true answer. f1: weighted by the
# rows of each label. generic: generic answers. outside: answers that are not a label. commonest:
# share of the commonest answer. rouge_l: words of the true answer, in order, in the generated one.
METRICS = ("accuracy", "probability", "f1", "generic", "outside", "commonest", "rouge_l")
COSTS = {
    "trainable": "parameters trained",
    "steps": "steps",
    "seconds": "s in them",
    "peak_bytes": "bytes of memory at most",
}


def table(before, after=None, metrics=METRICS):
    """The results as text: a line per split, metrics in per cent, without -> with the prompt."""
    sides = [before, after] if after else [before]
    names = [m for m in metrics if any(m in result for result in sides[-1].values())]
    width = 17 if after else 13
    longest = max(12, *map(len, before))

    def line(head, rows, cells):
        return f"{head:{longest + 1}}{rows:>7}" + "".join(f"{cell:>{width}}" for cell in cells)

    lines = [line("%", "rows", names)]
    for split in before:
        cells = []
        for name in names:
            values = [f"{100 * side[split][name]:5.1f}" for side in sides if name in side[split]]
            cells.append(" -> ".join(values).strip())
        lines.append(line(split, before[split]["rows"], cells))
    return "\n".join(lines)


def costs(info):
    """What spul.json or run.json says of the cost."""
    return {name: info[name] for name in COSTS if type(info.get(name)) in (int, float)}


def report(args, model, info, before, after, metrics=METRICS, **more):
    """Print the table and the cost, and write both, and more, to --json."""
    cost = costs(info or run_info(args.model))
    print(table(before, after, metrics))
    if cost:
        print("cost: " + ", ".join(f"{value:,.0f} {COSTS[name]}" for name, value in cost.items()))
    if args.json:
        results = {
            "model": args.model,
            "prompt": args.prompt,
            "dtype": str(model.dtype),
            "cost": cost,
            "memorised": run_info(args.model).get("elsewhere"),
            "without": before,
            "with": after or None,
        }
        write_json(args.json, results | more)


def run_info(folder):
    """The run.json of a model folder that a command of extras/ wrote, or {}."""
    file = Path(folder) / "run.json"
    return read_json(file) if file.is_file() else {}
