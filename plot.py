"""Pictures (pip install matplotlib).

    python plot.py trade-off results/sst2/main.json --out trade-off.png
    python plot.py embeddings --model DIR --prompt DIR --forget FILE --retain FILE --out embeddings.png
    python plot.py steps prompt/log.jsonl [...] --out steps.png

trade-off: each method's accuracy on the retain rows over that on the forget rows, from a table of results/study.py.
embeddings: final-norm outputs where the answer is predicted, without and with the prompt, each side in the two
dimensions in which it spreads most (the paper's picture of the effect), and how many forget rows still lie nearest to
the retain rows of their own label. steps: the losses of training, averaged over 20 steps, from the logs of train.py.
"""

import itertools
import json
from pathlib import Path

import torch

from cli import Parser, add_options, filled, load_model, row_limit, run
from data import make_examples, read_sets, read_template
from eval import answer_hidden
from files import read_json, write_whole
from spul import fingerprint, load_prompt

COLORS = {"forget": "tab:red", "retain": "tab:blue"}
SMOOTH = 20  # steps


def principal_axes(x, k=2):
    """x (n, d) -> (n, k), along the k directions in which x spreads most."""
    x = x - x.mean(dim=0)
    axes = torch.linalg.svd(x, full_matrices=False).Vh[:k].T  # (d, k)
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0)[None]).sign()  # the same picture on every machine
    return x @ axes


def nearest_label(x, label, known):
    """x (n, d), label (n,) -> (n,): of which label the mean of the known vectors, a mask (n,), is nearest."""
    names = label[known].unique()
    means = torch.stack([x[known & (label == name)].mean(dim=0) for name in names])  # (labels, d)
    return names[torch.cdist(x, means).argmin(dim=1)]


def moving_average(values, n=SMOOTH):
    """The mean of each n neighbouring values, or of all if there are fewer."""
    return torch.tensor(values).unfold(0, min(n, len(values)), 1).mean(dim=1).tolist()


def trade_off(plt, file):
    rows = [row for row in read_json(file).get("rows", []) if isinstance(row, dict) and row.get("chosen")]
    if not rows or not all("splits" in row for row in rows):
        raise ValueError(f"{file}: no table of results/study.py")
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for panel, part in zip(panels, ("train", "test")):
        points = {}  # by method, of which SPUL has several
        for row in rows:
            x, y = (100 * row["splits"][f"{part} {side}"]["accuracy"] for side in ("forget", "retain"))
            points.setdefault(row["method"], []).append((x, y))
        dots, names = [dot for own in points.values() for dot in own], []  # a name that would cover one goes below it
        for method, own in sorted(points.items(), key=lambda item: -item[1][0][1]):
            ours, dot = method == "SPUL", max(own)  # named beside its rightmost
            x, y = dot
            panel.scatter(*zip(*own), color="tab:red" if ours else "black", marker="*" if ours else "o", zorder=3)
            while any(x < a < x + 22 and abs(y - b) < 3 for a, b in dots) or any(
                    abs(x - a) < 22 and abs(y - b) < 4 for a, b in names):
                y -= 1
            names.append((x, y))
            panel.annotate(method, dot, (x + 1.5, y), fontsize=8, va="center", color="tab:red" if ours else "black",
                           arrowprops={"arrowstyle": "-", "lw": 0.4, "shrinkB": 3} if y < dot[1] else None)
        panel.set(title=part, xlabel="forget accuracy, %", xlim=(-3, 122))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("retain accuracy, %")
    return figure


@torch.no_grad()
def embeddings(plt, args):
    phi, info = load_prompt(args.prompt, fingerprint(args.model))
    model, tokenizer = load_model(args)
    template = read_template(args.template) if args.template else info["template"] or "{text}"
    forget, retain = read_sets(args.forget, args.retain)
    if not retain:
        raise ValueError("--retain is missing: embeddings needs --model, --prompt, --forget and --retain")
    examples = [example for rows, to_forget in ((forget, True), (retain, False))
                for example in make_examples(rows, tokenizer, template, row_limit(args, len(phi)), to_forget)[0]]
    hidden = [answer_hidden(model, examples, front, batch_size=args.batch_size)
              for front in (None, phi.to(model.device))]
    sides = [torch.stack([h[0].float().cpu() for h in side]) for side in hidden]  # (n, d) each, where answers begin
    to_forget, labels = torch.tensor([e.forget for e in examples]), sorted({e.label for e in examples})
    label = torch.tensor([labels.index(e.label) for e in examples])
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for panel, side, title in zip(panels, sides, ("without the prompt", "with the prompt")):
        points, own = principal_axes(side), nearest_label(side, label, ~to_forget) == label
        for kind in ("retain", "forget"):
            for i, (name, marker) in enumerate(zip(labels, itertools.cycle("o^sDvP*X"))):
                chosen = (to_forget == (kind == "forget")) & (label == i)
                if chosen.any():
                    panel.scatter(*points[chosen].T, s=9, alpha=0.6, marker=marker, color=COLORS[kind],
                                  facecolors="none" if kind == "retain" else COLORS[kind], label=f"{kind}, {name}")
        share = 100 * own[to_forget].float().mean()
        panel.set_title(f"{title}: {share:.1f} % of the forget rows nearest to their own label", fontsize=10)
    panels[0].legend(fontsize=8)
    return figure


def steps(plt, files):
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for file in files:
        try:
            log = [json.loads(line) for line in Path(file).read_text().splitlines()]
            for panel, (name, count) in zip(panels, {"loss_f": "n_f", "loss_r": "n_r", "loss_kl": "n_r"}.items()):
                here = [(line["step"], line[name]) for line in log if line[count]]  # batches that hold such rows
                n = min(SMOOTH, len(here))
                panel.plot([step for step, _ in here][n - 1 :], moving_average([value for _, value in here], n),
                           label=Path(file).parent.name)
                panel.set(title={"loss_f": "L_f", "loss_r": "L_r", "loss_kl": "L_kl"}[name], xlabel="step")
        except (ValueError, KeyError, TypeError, RuntimeError):
            raise ValueError(f"{file}: no log of train.py") from None
    panels[0].legend(fontsize=8)
    return figure


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("what", choices=["trade-off", "embeddings", "steps"])
    parser.add_argument("files", nargs="*", metavar="FILE", help="the table, or logs")
    add_options(parser)
    parser.add_argument("--prompt", type=filled, metavar="DIR", help="folder that train.py wrote")
    parser.add_argument("--out", type=filled, required=True, metavar="FILE", help="the picture: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plot.py needs a package: pip install matplotlib") from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    out = Path(args.out)
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out {out}: a name in .png, .svg or .pdf is expected")
    if args.what == "embeddings":
        if missing := [name for name in ("model", "prompt", "forget") if not getattr(args, name)]:
            raise ValueError(f"--{missing[0]} is missing: embeddings needs --model, --prompt, --forget and --retain")
        figure = embeddings(plt, args)
    elif not args.files or args.what == "trade-off" and len(args.files) > 1:
        raise ValueError("a table of results/study.py is needed" if args.what == "trade-off" else "a log is needed")
    else:
        figure = trade_off(plt, args.files[0]) if args.what == "trade-off" else steps(plt, args.files)
    write_whole(out, lambda temporary: figure.savefig(temporary, format=out.suffix[1:], dpi=120))
    print(f"picture in {out}")


if __name__ == "__main__":
    run(main)
