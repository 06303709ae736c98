"""A gate: put the prompt before queries that look like those to forget, and before no others.

    python -m extras.gate --model DIR --prompt DIR --forget FILE --retain FILE
        [--test-forget FILE] [--test-retain FILE] [--general FILE] [--json FILE]
    python -m extras.gate --model DIR --prompt DIR --ask "a question"

The first command makes the gate, keeps it in the prompt's folder, and measures it. What is there
already is measured only. The second shows the answers without the prompt and through the gate.

A query that the gate does not flag is answered as if there were no prompt. So the prompt can harm
no other queries than those that are flagged falsely. What the gate misses is not forgotten. The
folder then holds, besides the prompt, what tells its forget rows from others.

The gate is a logistic regression on the frozen model's own hidden states: the outputs of one layer,
normalised as the last one's are, and averaged over the query's tokens. Routing by a classifier is
the idea of O3 (arXiv 2407.10223) and CURaTE (arXiv 2604.14644), which train a model of their own
for it; the regression is that of ECO (extras/guards.py).

Letters: n queries, d width, L layers.
"""

import argparse
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file

from data import Row, make_examples, read_rows
from eval import asking_of, generator, label_set, load_prompts, measure, template_of
from extras.guards import fit_classifier, layer_averages
from extras.probes import OTHER_SIDE, Setting, Subject, auc, changed_queries
from spul import answer_hidden
from support.answers import ask
from support.asking import after_another, spread, wordings
from support.cli import DEMO, Parser, add_options, check_required, non_empty, number, read_splits
from support.cli import run, use_demo
from support.elsewhere import compare, examples_to_ask, leaves_out, texts_elsewhere
from support.files import check_json_path, read_json, write_json, write_tensors
from support.general import MOST, held_out_texts, own_form, rows_of, split, text_examples
from support.general import without_copies
from support.hardware import load_model, read_config, row_limit
from support.identity import check_fingerprint, fingerprint
from support.rows import check_disjoint, check_rows
from support.state import GATE_FILES, GENERAL, run_folder
from support.tables import METRICS, report
from support.writing import read_written

FORMAT = "spul gate 1"
MOST_ROWS = 2000  # of each side, by which the gate is made
WORDINGS = 8  # in one of which each row is asked once more
HELD_OUT = 5  # every fifth row is held out of the fit: by these layer and threshold are chosen
FEWEST = 10  # rows of a side
DECAY = 0.1  # of the regression's weights; 0.01 tells unseen rows apart as well, 0.5 less well
CHANGED = 100  # rows of a side, held out of the fit, whose queries are changed
OFTEN = 0.1  # more than this share missed, or flagged falsely, is said in a sentence
GATE_METRICS = [*METRICS, "flagged"]  # flagged: share of queries that get the prompt
NO_GATE = "no gate yet: the command makes it with --forget FILE --retain FILE, and without --ask"


# ---------------------------------------------------------------------------------------- the gate


class Gate:
    """Flags a query where x w + b is at least 0, for the query's average x (d,) at one layer.

    info: what gate.json holds. tensors: w (d,) and b (1,).
    """

    def __init__(self, info, tensors):
        self.info = info
        self.w = tensors["w"]
        self.b = tensors["b"]

    def flags(self, model, prompts, batch_size=32):
        """Of each of the prompts, lists of ids, whether it is to get the prompt's vectors."""
        x = layer_averages(model, prompts, [self.info["layer"]], batch_size)[0]  # (n, d)
        return (x @ self.w + self.b >= 0).tolist()


def gated_hidden(model, examples, flags, phi, without, batch_size=32):
    """`spul.answer_hidden` with the prompt phi (p, d) before the flagged examples alone.

    without: that of all examples without a prompt, from which the others' are taken.
    """
    hidden = list(without)
    flagged = [i for i, flag in enumerate(flags) if flag]
    if flagged:
        with_prompt = answer_hidden(
            model, [examples[i] for i in flagged], phi, batch_size=batch_size
        )
        for i, h in zip(flagged, with_prompt):
            hidden[i] = h
    return hidden


def gated_generator(model, gate, phi, batch_size=32):
    """As `eval.generator`, with the prompt before the queries that the gate flags."""
    generators = {True: generator(model, phi), False: generator(model)}

    def generate(prompts, n):
        flags = gate.flags(model, prompts, batch_size)
        answers = [None] * len(prompts)
        for side, own in generators.items():
            indices = [i for i, flag in enumerate(flags) if flag == side]
            if indices:
                for i, answer in zip(indices, own([prompts[i] for i in indices], n)):
                    answers[i] = answer
        return answers

    return generate


# ------------------------------------------------------------------------------------- making it


@dataclass
class Asker:
    """What rows become queries with."""

    args: argparse.Namespace
    tokenizer: object
    template: object  # the prompt's
    generic: list
    limit: int  # tokens of a row

    def ids(self, rows, template=None):
        """The ids of each row's query; what is too long is cut, as in training."""
        template = template or self.template
        examples, _ = make_examples(rows, self.tokenizer, template, self.limit)
        return [e.prompt for e in examples]

    def in_other_wordings(self, rows):
        """The ids of each row in one of several wordings; none in a chat, and of whole prompts."""
        if self.template.chat or any(row.raw for row in rows):
            return []
        others = wordings(self.template, WORDINGS, self.args.seed)
        return [ids for i, other in enumerate(others) for ids in self.ids(rows[i::WORDINGS], other)]

    def after(self, rows, others, generic=None):
        """The ids of each row after one of the others and its answer, where it can stand there."""
        rng = random.Random(f"gate {self.args.seed}")
        mixed = after_another(rows, others, rng, generic)
        return self.ids([row for row, alone in zip(mixed, rows) if row is not alone])

    def queries(self, forget, retain, texts):
        """Three lists of queries, ids of each: to forget, mixed, and all others.

        Mixed are rows to retain after rows to forget, as many as these at most. They are to be
        flagged, too, because a row to forget is in the query. General text is asked in the
        prompt's template, and stands alone in the model's own form.
        """
        form = own_form(self.args.model, self.tokenizer)
        alone = text_examples(texts, self.tokenizer, form, self.limit)
        texts = [Row(row.text, self.generic[0], row.where) for row in texts]  # not their answer
        return [
            self.ids(forget) + self.in_other_wordings(forget) + self.after(forget, retain),
            self.after(spread(retain, len(forget)), forget, self.generic),
            self.ids(retain)
            + self.in_other_wordings(retain)
            + self.ids(texts)
            + [list(e.ids) for e in alone],
        ]


def parts(rows, seed):
    """At most MOST_ROWS of the rows, drawn by the seed -> those to fit to, and those held out."""
    drawn = random.Random(f"gate rows {seed}").sample(rows, min(len(rows), MOST_ROWS))
    n = -(-len(drawn) // HELD_OUT)
    return drawn[n:], drawn[:n]


def general_texts(args, tokenizer, forget):
    """Rows of general text that the prompt was trained on, or of --general: none is to be flagged.

    What the prompt's training held out is not among them, nor what repeats rows to forget.
    """
    if args.general:
        rows = read_rows(args.general, unlabelled=True)[:MOST]
    else:
        file = run_folder(args.prompt[0]) / GENERAL
        rows = rows_of(read_written(file), file)
    if not rows:
        print("gate     no general text beside the prompt: give --general FILE, to flag less of it")
    return without_copies(split(rows, tokenizer, own_form(args.model, tokenizer))[1], forget)


def make_gate(args, model, asker, forget, retain, texts):
    """A gate from the rows, and general text -> what `save` takes.

    The layer tells held-out queries apart best. The threshold misses at most the share --miss of
    the held-out queries that ask rows to forget. "mixed" queries count in the fit alone.
    """
    sides = [parts(rows, args.seed) for rows in (forget, retain, texts)]
    groups = []  # of queries: to forget, mixed, others; of the fit, then held out
    for of_part in zip(*sides):
        groups += asker.queries(*of_part)
    sizes = [len(group) for group in groups]
    layers = range(1, len(model.layers) + 1)
    all_x = layer_averages(model, sum(groups, []), layers, args.batch_size)  # (L, n, d)
    best = None
    for layer, x in zip(layers, all_x):
        of_fit, held_out = x.split([sum(sizes[:3]), sum(sizes[3:])])  # (n, d) each
        y = (torch.arange(len(of_fit)) < sizes[0] + sizes[1]).float()
        w, _ = fit_classifier(of_fit, y, DECAY)
        of_forget, _, of_others = (held_out @ w).split(sizes[3:])
        found = auc(of_forget.tolist(), of_others.tolist())
        if best is None or found > best[0]:
            best = found, layer, w, of_forget, of_others
    found, layer, w, of_forget, of_others = best
    least = of_forget.sort().values[int(args.miss * len(of_forget))]  # that is flagged
    bound = least - 1e-4  # scores differ so much by rounding
    print(
        f"gate     layer {layer} of {len(layers)}, of {sum(sizes)} queries; of a fifth, by which "
        f"it was chosen (AUC {found:.3f}), {percent(of_forget < bound)} % of those to forget are "
        f"missed, {percent(of_others >= bound)} % of the others flagged"
    )
    info = {"layer": layer, "miss": args.miss, "seed": args.seed, "auc": found}
    return info, {"w": w, "b": -bound[None]}


def percent(is_so):
    return f"{100 * is_so.float().mean():.1f}"


# ----------------------------------------------------------------------------------- on the disk


def digest(phi):
    return hashlib.sha256(phi.cpu().numpy().tobytes()).hexdigest()


def save(folder, info, tensors):
    """gate.json is written last: its presence marks the gate complete."""
    description, weights = (Path(folder) / name for name in GATE_FILES)
    description.unlink(missing_ok=True)
    write_tensors(weights, tensors)
    write_json(description, {"format": FORMAT, **info})


def load(folder, model_folder, phi, layers):
    """The Gate in a prompt's folder, or None if it has none. layers: those of the model.

    Raises ValueError if it is not whole, or is not for this model and the prompt phi (p, d).
    """
    description, weights = (Path(folder) / name for name in GATE_FILES)
    if not description.is_file():
        return None
    info = read_json(description)
    layer = info.get("layer")
    if info.get("format") != FORMAT or type(layer) is not int or not 1 <= layer <= layers:
        raise ValueError(f"{description}: not as extras.gate writes it: --overwrite makes it anew")
    check_fingerprint(info.get("base_sha256"), model_folder, description)
    if info.get("prompt_sha256") != digest(phi):
        raise ValueError(f"{description}: it is of another prompt: --overwrite makes it anew")
    try:
        tensors = load_file(weights)
    except (safetensors.SafetensorError, OSError) as e:
        raise ValueError(f"{weights}: not a complete file: {e}") from None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    is_finite = all(tensor.isfinite().all() for tensor in tensors.values())
    if shapes != {"w": (phi.shape[1],), "b": (1,)} or not is_finite:
        raise ValueError(f"{weights}: not the tensors of a gate: --overwrite makes it anew")
    return Gate(info, tensors)


# --------------------------------------------------------------------------------------- measuring


def measure_splits(args, model, gate, phi, asker, splits):
    """{split: what is measured} without the prompt, and through the gate."""
    tokenizer, generic = asker.tokenizer, asker.generic
    all_rows = [row for rows in splits.values() for row in rows]
    labels = label_set(all_rows, tokenizer, generic, asker.template)
    generate = gated_generator(model, gate, phi, args.batch_size)
    before, after = {}, {}
    asked = splits, asker.template, generic, tokenizer, asker.limit
    for name, examples, _ in examples_to_ask(*asked):
        common = {"labels": labels, "generic": generic, "batch_size": args.batch_size}
        without = answer_hidden(model, examples, batch_size=args.batch_size)
        before[name] = measure(model, tokenizer, examples, hidden=without, **common)
        if leaves_out(name, before):
            del before[name]
            continue
        flags = gate.flags(model, [e.prompt for e in examples], args.batch_size)
        hidden = gated_hidden(model, examples, flags, phi, without, args.batch_size)
        after[name] = measure(
            model, tokenizer, examples, hidden=hidden, generate=generate, **common
        )
        after[name]["flagged"] = share(flags)
    return before, after


def measure_changes(args, model, gate, asker, splits):
    """{change of the query: {"forget": share flagged, "retain": share flagged}}.

    Of train rows that the gate was not fitted to.
    """
    rows = {}
    for side in ("forget", "retain"):
        _, held_out = parts(splits[f"train {side}"], gate.info["seed"])
        rows[f"train {side}"] = spread(held_out, CHANGED)
    options = argparse.Namespace(**{**vars(args), "template": asker.template})
    setting = Setting(options, asker.tokenizer, rows, [], None, asker.limit)
    subject = Subject("before", model, None, {}, Path(args.model), args.batch_size)
    changes = {}
    for side in ("forget", "retain"):
        for name, examples in changed_queries(subject, setting, side).items():
            flags = gate.flags(model, [e.prompt for e in examples], args.batch_size)
            changes.setdefault(name, {})[side] = share(flags)
    return changes


@torch.no_grad()
def measure_texts(args, model, gate, phi, texts):
    """`support.elsewhere.compare` of texts, {what: Examples}, and the share of them flagged."""
    results = {}
    for what, examples in texts.items():
        flags = gate.flags(model, [e.ids for e in examples], args.batch_size)
        before = answer_hidden(model, examples, batch_size=args.batch_size)
        after = gated_hidden(model, examples, flags, phi, before, args.batch_size)
        results[what] = compare(examples, model, before, model, after)
        results[what] |= {"texts": len(flags), "flagged": share(flags)}
    return results


def share(flags):
    return sum(flags) / len(flags)


def changes_table(changes, texts):
    """What the gate flags of changed queries, and of other texts, as text."""
    longest = max(map(len, [*changes, *texts])) + 1
    lines = [f"{'% flagged':{longest}}{'to forget':>11}{'others':>9}"]
    for name, flagged in changes.items():
        cells = f"{100 * flagged['forget']:11.1f}{100 * flagged['retain']:9.1f}"
        lines.append(f"{name:{longest}}{cells}")
    for name, result in texts.items():
        kl = f"   KL {result['kl']:.3f} a token, {result['texts']} texts"
        lines.append(f"{name:{longest}}{'':11}{100 * result['flagged']:9.1f}{kl}")
    return "\n".join(lines)


def has_row_to_forget(name):
    """Whether in this way a row to forget stands beside each row to retain: flags are right."""
    return name in OTHER_SIDE or name.endswith("after a forget row")


def gate_verdicts(after, changes, texts):
    """Where the gate is the weak point, in lines."""
    missed, wrong = {}, {}
    for name, result in after.items():
        if name.split(",")[0].endswith("forget"):
            missed[name] = 1 - result["flagged"]
        elif not has_row_to_forget(name):
            wrong[name] = result["flagged"]
    for name, flagged in changes.items():
        missed[name] = 1 - flagged["forget"]
        if not has_row_to_forget(name):
            wrong[name] = flagged["retain"]
    wrong |= {name: result["flagged"] for name, result in texts.items()}
    lines = []
    for shares, what, end in (
        (missed, "MISSES rows to forget", "they are answered as if there were no prompt"),
        (wrong, "FLAGS what is not to be forgotten", "it gets the prompt, as without a gate"),
    ):
        bad = {name: share for name, share in shares.items() if share > OFTEN}
        if bad:
            found = "; ".join(f"{name}: {100 * share:.0f} %" for name, share in bad.items())
            lines.append(f"THE GATE {what} ({found}): {end}.")
    return lines or [f"The gate errs in at most {100 * OFTEN:.0f} % of each line's queries."]


# ------------------------------------------------------------------------------------- the command


def parse(argv):
    parser = Parser(__doc__)
    add_options(parser)
    add = parser.add_argument_group("the gate").add_argument
    add("--prompt", type=non_empty, action="append", metavar="DIR",
        help="the folder that train.py wrote; the gate is kept in it")
    add("--miss", type=number(float, 0, 0.5), default=0.05, metavar="R",
        help="share of the queries to forget that may be missed, of those held out (default 0.05)")
    add("--general", type=non_empty, metavar="FILE",
        help="texts that are not to be flagged (default: what the model wrote for the prompt)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all draws (default 0)")
    add("--overwrite", action="store_true", help="make the gate anew")
    add("--ask", metavar="TEXT", help="show the answers to one text instead")
    add("--json", type=non_empty, metavar="FILE", help="also write what is measured to this file")
    args = parser.parse_args(argv)
    if use_demo(args) and not args.prompt and (DEMO / "prompt" / "spul.json").exists():
        args.prompt = [str(DEMO / "prompt")]
    check_required(args, "model", "prompt")
    if len(args.prompt) > 1:
        raise ValueError(f"--prompt {args.prompt[1]}: a gate is of one prompt")
    if args.ask is not None and (args.overwrite or args.general or args.json):
        raise ValueError(
            "--ask shows the answers to one text: leave out --overwrite, --general and --json"
        )
    check_json_path(args.json)
    return args


def read_sides(args, is_new):
    """The rows of each split. is_new: the gate is to be made, so there have to be enough."""
    check_required(args, "forget")
    splits = read_splits(args)
    if "train retain" not in splits:
        raise ValueError("--retain FILE is missing")
    check_rows(splits)
    check_disjoint(splits["train forget"], splits["train retain"])
    for name in ("train forget", "train retain"):
        if is_new and len(splits[name]) < FEWEST:
            file = splits[name][0].where.rpartition(":")[0]
            raise ValueError(f"{file}: {len(splits[name])} rows; at least {FEWEST} are needed")
    return splits


def main(argv=None):
    args = parse(argv)
    folder = args.prompt[0]
    config = read_config(args.model)
    phi, info = load_prompts(args.prompt, config, args.model)
    gate = None
    if not args.overwrite:
        gate = load(folder, args.model, phi, config.num_hidden_layers)
    if args.ask is not None and gate is None:
        raise ValueError(f"{folder}: {NO_GATE}")
    splits = {} if args.ask is not None else read_sides(args, is_new=gate is None)
    template = template_of(args, info, [row for rows in splits.values() for row in rows])
    model, tokenizer = load_model(args)
    sha256 = digest(phi)
    phi = phi.to(model.device)
    if args.ask is not None:
        asking = asking_of(args, model, tokenizer, info, p=len(phi))
        ask(args, asking, {"without": generator(model), "with": gated_generator(model, gate, phi)})
        return
    if (info.get("options") or {}).get("after"):
        print("gate     the prompt is of several requests: --forget has to hold the rows of all")
    limit = row_limit(args, len(phi))
    asker = Asker(args, tokenizer, template, info["generic"] or ["unknown"], limit)
    held_out = held_out_texts(args, tokenizer, args.prompt, limit)
    texts = texts_elsewhere(args.model, tokenizer, limit, held_out)
    if gate is None:
        general = general_texts(args, tokenizer, splits["train forget"])
        sides = splits["train forget"], splits["train retain"]
        found, tensors = make_gate(args, model, asker, *sides, general)
        found |= {"base_sha256": fingerprint(args.model), "prompt_sha256": sha256}
        save(folder, found, tensors)
        gate = Gate(found, tensors)
    before, after = measure_splits(args, model, gate, phi, asker, splits)
    changes = measure_changes(args, model, gate, asker, splits)
    texts = measure_texts(args, model, gate, phi, texts)
    more = {"gate": gate.info, "changes": changes, "texts": texts}
    report(args, model, info, before, after, GATE_METRICS, **more)
    print(changes_table(changes, texts))
    print("\n".join(gate_verdicts(after, changes, texts)))


if __name__ == "__main__":
    run(main)
