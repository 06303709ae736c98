"""Draw pictures (pip install matplotlib).

    python -m extras.plot trade-off results/sst2/main.json --out trade-off.png
    python -m extras.plot embeddings --model DIR --prompt DIR --forget FILE --retain FILE --out FILE
    python -m extras.plot steps prompt/log.jsonl [...] --out steps.png

trade-off   accuracy on the retain rows over that on the forget rows, a dot for each method, from a
            table of results/study.py
embeddings  final-norm outputs where the answer is predicted, without and with the prompt, each in
            the two dimensions in which they spread most (the paper's picture of the effect); and
            how many forget rows are still nearest to the retain rows of their label
steps       the terms of the loss in training, averaged over 20 steps, from logs of train.py

Letters: d width, n points, k dimensions or neighbouring values.
"""

import itertools
import json
from pathlib import Path

import torch

from data import make_examples, read_sets
from eval import template_of
from spul import answer_hidden, load_prompt
from support.cli import Parser, add_options, check_required, non_empty, run
from support.files import read_json, read_text, write_whole
from support.hardware import load_model, row_limit

COLORS = {"forget": "tab:red", "retain": "tab:blue"}
MARKERS = "o^sDvP*X"
SMOOTH = 20  # steps
FORMATS = (".png", ".svg", ".pdf")
ROW_COUNTS = {"loss_f": "n_f", "loss_r": "n_r", "loss_kl": "n_r"}  # of which rows a term is a mean


# -------------------------------------------------------------------------------------- trade-off


def trade_off(plt, file):
    """A table of results/study.py -> the figure. Raises ValueError if the file is not one."""
    rows = read_json(file).get("rows", [])
    chosen = [row for row in rows if isinstance(row, dict) and row.get("chosen")]
    if not chosen or not all("splits" in row for row in chosen):
        raise ValueError(f"{file}: not a table of results/study.py")
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for panel, part in zip(panels, ("train", "test")):
        points = {}  # {method: a dot for each of its rows}; SPUL has several rows
        for row in chosen:
            forget = row["splits"][f"{part} forget"]["accuracy"]
            retain = row["splits"][f"{part} retain"]["accuracy"]
            points.setdefault(row["method"], []).append((100 * forget, 100 * retain))
        draw_methods(panel, points)
        panel.set(title=part, xlabel="forget accuracy, %", xlim=(-3, 122))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("retain accuracy, %")
    return figure


def draw_methods(panel, points):
    """Draw {method: [(x, y), ...]}, with each method's name beside its rightmost dot."""
    all_dots = list(itertools.chain(*points.values()))
    names = []  # where they are so far
    for method, dots in sorted(points.items(), key=lambda item: -item[1][0][1]):
        color = "black"
        marker = "o"
        if method == "SPUL":
            color = "tab:red"
            marker = "*"
        panel.scatter(*zip(*dots), color=color, marker=marker, zorder=3)
        x, y = max(dots)
        name_y = free_height(x, y, all_dots, names)
        names.append((x, name_y))
        line = None
        if name_y < y:
            line = {"arrowstyle": "-", "lw": 0.4, "shrinkB": 3}
        place = (x + 1.5, name_y)
        panel.annotate(
            method, (x, y), place, fontsize=8, va="center", color=color, arrowprops=line
        )


def free_height(x, y, dots, names):
    """The highest place, from y down, where a name to the right of x covers no dot and no name."""

    def is_taken(y):
        on_dot = any(x < a < x + 22 and abs(y - b) < 3 for a, b in dots)
        on_name = any(abs(x - a) < 22 and abs(y - b) < 4 for a, b in names)
        return on_dot or on_name

    while is_taken(y):
        y -= 1
    return y


# ------------------------------------------------------------------------------------- embeddings


def principal_axes(x, k=2):
    """x (n, d) -> (n, k), along the k directions in which x spreads most."""
    x = x - x.mean(dim=0)
    axes = torch.linalg.svd(x, full_matrices=False).Vh[:k].T  # (d, k)
    largest = axes.abs().argmax(dim=0)[None]  # (1, k)
    axes = axes * axes.gather(0, largest).sign()  # the same picture on every machine
    return x @ axes


def nearest_label(x, label, is_reference):
    """x (n, d), label (n,) -> (n,), the label whose mean is nearest to each point.

    is_reference (n,): True for the points that the means are of.
    """
    labels = label[is_reference].unique()
    means = [x[is_reference & (label == i)].mean(dim=0) for i in labels]
    distances = torch.cdist(x, torch.stack(means))  # (n, labels)
    return labels[distances.argmin(dim=1)]


@torch.no_grad()
def embeddings(plt, args):
    """The options -> the figure. Raises ValueError or OSError for files that do not fit."""
    phi, info = load_prompt(args.prompt, args.model)  # (p, d)
    forget, retain = read_sets(args.forget, args.retain)
    if not retain:
        raise ValueError("--retain FILE is missing")
    template = template_of(args, info, forget + retain)
    model, tokenizer = load_model(args)
    limit = row_limit(args, len(phi))
    examples = make_examples(forget, tokenizer, template, limit, True)[0]
    examples += make_examples(retain, tokenizer, template, limit, False)[0]
    is_forget = torch.tensor([e.forget for e in examples])  # (n,)
    names = sorted({e.label for e in examples})
    label = torch.tensor([names.index(e.label) for e in examples])  # (n,)

    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    sides = {"without the prompt": None, "with the prompt": phi.to(model.device)}
    for panel, (title, prompt) in zip(panels, sides.items()):
        hidden = answer_hidden(model, examples, prompt, batch_size=args.batch_size)
        x = torch.stack([h[0].float().cpu() for h in hidden])  # (n, d), where the answers begin
        is_nearest = nearest_label(x, label, ~is_forget) == label  # (n,)
        share = 100 * is_nearest[is_forget].float().mean()
        panel.set_title(
            f"{title}: {share:.1f} % of the forget rows nearest to their own label", fontsize=10
        )
        draw_labels(panel, principal_axes(x), is_forget, label, names)
    panels[0].legend(fontsize=8)
    return figure


def draw_labels(panel, points, is_forget, label, names):
    """Draw points (n, 2): filled markers for forget rows, a marker for each of the labels."""
    for side in ("retain", "forget"):
        color = COLORS[side]
        fill = color if side == "forget" else "none"
        is_side = is_forget == (side == "forget")  # (n,)
        for i, (name, marker) in enumerate(zip(names, itertools.cycle(MARKERS))):
            x, y = points[is_side & (label == i)].T
            if len(x):
                style = {"marker": marker, "color": color, "facecolors": fill}
                panel.scatter(x, y, s=9, alpha=0.6, label=f"{side}, {name}", **style)


# ------------------------------------------------------------------------------------------ steps


def moving_average(values, k=SMOOTH):
    """The mean of each k neighbouring values, or of all if there are fewer."""
    k = min(k, len(values))
    return torch.tensor(values).unfold(0, k, 1).mean(dim=1).tolist()


def read_terms(file):
    """A log of train.py -> {term of the loss, such as "loss_f": [(step, value), ...]}.

    A term has no value at steps whose batch has no such rows. Raises ValueError if the file is
    not a log.
    """
    try:
        lines = [json.loads(line) for line in read_text(file).splitlines()]
        terms = {name: [] for name in lines[0] if name.startswith("loss_")}
        for line in lines:
            for name, points in terms.items():
                has_rows = name not in ROW_COUNTS or line[ROW_COUNTS[name]] > 0
                if has_rows:
                    points.append((int(line["step"]), float(line[name])))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{file}: not a log of train.py") from None
    if not terms:
        raise ValueError(f"{file}: not a log of train.py")
    return terms


def steps(plt, files):
    """Logs of train.py -> the figure, a panel for each term of the loss."""
    logs = [read_terms(file) for file in files]
    names = list(dict.fromkeys(itertools.chain(*logs)))
    size = (4 * len(names), 4)
    figure, panels = plt.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False)
    for panel, name in zip(panels[0], names):
        for file, terms in zip(files, logs):
            points = terms.get(name)
            if points:
                averages = moving_average([value for _, value in points])
                ends = [step for step, _ in points][-len(averages) :]
                panel.plot(ends, averages, label=Path(file).parent.name)
        panel.set(title=name.replace("loss", "L"), xlabel="step")
    panels[0, 0].legend(fontsize=8)
    return figure


# ------------------------------------------------------------------------------------ the command


def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("picture", choices=["trade-off", "embeddings", "steps"])
    add("files", nargs="*", metavar="FILE", help="the table, or logs")
    add_options(parser)
    add = parser.add_argument_group("the picture").add_argument
    add("--prompt", type=non_empty, metavar="DIR", help="the folder that train.py wrote")
    add("--out", type=non_empty, required=True, metavar="FILE",
        help="the picture: .png, .svg or .pdf")
    return parser


def parse(argv):
    args = make_parser().parse_args(argv)
    if Path(args.out).suffix not in FORMATS:
        raise ValueError(f"--out {args.out}: a name in .png, .svg or .pdf is expected")
    if args.picture == "embeddings":
        check_required(args, "model", "prompt", "forget")
    if args.picture == "trade-off" and len(args.files) != 1:
        raise ValueError("trade-off: one table of results/study.py is needed")
    if args.picture == "steps" and not args.files:
        raise ValueError("steps: a log is needed")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        import matplotlib
    except ImportError:
        raise ValueError("extras.plot needs a package: pip install matplotlib") from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    if args.picture == "trade-off":
        figure = trade_off(plt, args.files[0])
    elif args.picture == "embeddings":
        figure = embeddings(plt, args)
    else:
        figure = steps(plt, args.files)
    out = Path(args.out)
    kind = out.suffix.removeprefix(".")
    write_whole(out, lambda temporary: figure.savefig(temporary, format=kind, dpi=120))
    print(f"picture in {out}")


if __name__ == "__main__":
    run(main)
