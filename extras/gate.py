"""A gate: put the prompt before queries that look like those to forget, and before no others.

    python -m extras.gate --model DIR --prompt DIR --forget FILE --retain FILE
        [--test-forget FILE] [--test-retain FILE] [--general FILE] [--json FILE]
    python -m extras.gate --model DIR --prompt DIR --ask "a question"

The first command makes the gate, keeps it in the prompt's folder, and measures it. It is
gate.safetensors, and gate.json, which is written last. What is there already is measured only. The
second shows the answers without the prompt and through the gate.

A query that the gate does not flag is answered as if there were no prompt. So what it flags falsely
is all that a prompt can still harm. What it misses is not forgotten. --forget has to hold the rows
of all requests that the prompt is for.

The gate is a logistic regression on the frozen model's own hidden states: the outputs of one layer,
normalised as the last one's are, and averaged over the query's tokens. The layer is the one where
held-out rows are told apart best. Routing by a classifier is the idea of O3 (arXiv 2407.10223) and
CURaTE (arXiv 2604.14644), which train a model of their own for it; the regression is that of ECO
(extras/guards.py).

Letters: n queries, d width, L layers.
"""

import copy
import hashlib
import random
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from data import prompt_ids, read_rows
from eval import asking_of, generator, label_set, load_prompts, measure, template_of
from extras.guards import fit_classifier, threshold
from extras.probes import OTHER_SIDE, Setting, Subject, auc, changed_queries
from spul import answer_hidden
from support.answers import ask
from support.asking import after_another, spread, wordings
from support.cli import DEMO, Parser, add_options, check_required, non_empty, number, read_splits
from support.cli import run, use_demo
from support.elsewhere import compare, examples_to_ask, leaves_out, texts_elsewhere
from support.files import check_json_path, read_json, write_json, write_tensors
from support.general import MOST, held_out_texts, own_form, rows_of, split, text_examples
from support.hardware import load_model, read_config, row_limit
from support.identity import check_fingerprint, fingerprint
from support.rows import check_disjoint, check_rows
from support.state import GENERAL, run_folder
from support.tables import METRICS, report
from support.writing import read_written

FORMAT = "spul gate 1"
MOST_ROWS = 2000  # of each side, by which the gate is made
WORDINGS = 8  # in one of which each row is asked once more
HELD_OUT = 5  # every fifth row is held out: by these the layer and the threshold are chosen
FEWEST = 10  # rows of a side
DECAY = 0.1  # of the regression's weights; 0.01 tells unseen rows apart as well, 0.5 less well
CHANGED = 100  # rows of a side whose queries are changed
OFTEN = 0.1  # more than this share missed, or flagged falsely, is said in a sentence
GATE_METRICS = [*METRICS, "flagged"]  # flagged: share of queries that get the prompt


# ---------------------------------------------------------------------------------------- the gate


@torch.no_grad()
def averages(model, prompts, layers, batch_size=32):
    """Each layer's normalised outputs, averaged over a prompt's tokens -> (len(layers), n, d).

    prompts: n lists of ids. layers: numbers from 1 to L. They are float32, on the CPU.
    """
    cut = copy.copy(model)  # the model up to the last of these layers
    cut._modules = {**model._modules, "layers": model.layers[: max(layers)]}
    outputs = []  # of all layers, for one batch
    means = torch.empty(len(layers), len(prompts), model.config.hidden_size)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    starts = range(0, len(order), batch_size)
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
        for layer in cut.layers
    ]
    try:
        for start in tqdm(starts, "reading queries", unit="batch", leave=False, delay=5):
            indices = order[start : start + batch_size]
            tokens, lengths = model.pad([prompts[i] for i in indices])  # (B, T), (B,)
            outputs.clear()
            cut.hidden(tokens)
            places = torch.arange(tokens.shape[1], device=tokens.device)
            is_token = (places < lengths[:, None])[..., None]  # (B, T, 1), False at padding
            for i, layer in enumerate(layers):
                h = model.norm(outputs[layer - 1]).float()  # (B, T, d)
                mean = (h * is_token).sum(dim=1) / lengths[:, None]  # (B, d)
                means[i, indices] = mean.cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return means


class Gate:
    """Flags a query where sigmoid(x w + b) is above tau, for the query's average x (d,) at a layer.

    info: what gate.json holds. tensors: w (d,) and b (1,).
    """

    def __init__(self, info, tensors):
        self.info = info
        self.w = tensors["w"]
        self.b = tensors["b"]

    def flags(self, model, prompts, batch_size=32):
        """Of each of the prompts, lists of ids, whether it is to get the prompt's vectors."""
        if not prompts:
            return []
        x = averages(model, prompts, [self.info["layer"]], batch_size)[0]  # (n, d)
        return (torch.sigmoid(x @ self.w + self.b) > self.info["tau"]).tolist()


def gated(flags, items, with_prompt, without):
    """with_prompt(the items that are flagged) and without(the others), lists -> in their order."""
    results = [None] * len(items)
    for answer, side in ((with_prompt, True), (without, False)):
        indices = [i for i, flag in enumerate(flags) if flag == side]
        if indices:
            for i, result in zip(indices, answer([items[i] for i in indices])):
                results[i] = result
    return results


def gated_hidden(model, examples, flags, phi, batch_size=32):
    """As `spul.answer_hidden`, with the prompt phi (p, d) before the flagged examples alone."""

    def hidden(prompt):
        return lambda some: answer_hidden(model, some, prompt, batch_size=batch_size)

    return gated(flags, examples, hidden(phi), hidden(None))


def gated_generator(model, gate, phi):
    """As `eval.generator`, with the prompt before the queries that the gate flags."""
    prompted, plain = generator(model, phi), generator(model)

    def generate(prompts, n):
        flags = gate.flags(model, prompts)
        return gated(flags, prompts, lambda some: prompted(some, n), lambda some: plain(some, n))

    return generate


# ------------------------------------------------------------------------------------- making it


def queries_to_tell_apart(args, tokenizer, template, forget, retain, limit):
    """The queries that a gate learns from: ids of each, whether it is to be flagged, and its row.

    Each row is asked in the prompt's template, in another wording, and after a row of the other
    side with its answer. Then both are to be flagged, as there is a row to forget in the query:
    the prompt knows which of the two is asked.
    """
    rng = random.Random(f"gate {args.seed}")
    others = wordings(template, WORDINGS, args.seed) if not template.chat else []
    ids, is_flagged, row_of = [], [], []

    def add(rows, templates, flag):
        for i, row in enumerate(rows):
            prompt = prompt_ids(row, tokenizer, templates[i % len(templates)])
            if len(prompt) <= limit:
                ids.append(prompt)
                is_flagged.append(flag)
                row_of.append(i)

    for rows, other_side, flag in ((forget, retain, True), (retain, forget, False)):
        add(rows, [template], flag)
        if any(row.raw for row in rows):
            continue  # they have no other form
        if others:
            add(rows, others, flag)
        mixed = after_another(rows, other_side, rng)
        add([row for row, before in zip(mixed, rows) if row is not before], [template], True)
    return ids, is_flagged, row_of


def general_queries(args, tokenizer, limit):
    """Ids of general text that L_keep was trained on: of --general, or written for the prompt."""
    form = own_form(args.model, tokenizer)
    if args.general:
        rows = read_rows(args.general, unlabelled=True)[:MOST]
    else:
        file = run_folder(args.prompt[0]) / GENERAL
        rows = rows_of(read_written(file), file)
    return [e.ids for e in text_examples(split(rows, tokenizer, form)[1], tokenizer, form, limit)]


def make_gate(args, model, tokenizer, template, forget, retain, limit):
    """A gate from the rows -> what `save` takes.

    The threshold misses at most the share --miss of the held-out queries to forget.
    """
    forget, retain = spread(forget, MOST_ROWS), spread(retain, MOST_ROWS)
    found = queries_to_tell_apart(args, tokenizer, template, forget, retain, limit)
    ids, is_flagged, row_of = found
    general = general_queries(args, tokenizer, limit)
    ids += general
    is_flagged += [False] * len(general)
    row_of += range(len(general))
    y = torch.tensor(is_flagged).float()  # (n,)
    is_held_out = torch.tensor(row_of) % HELD_OUT == 0  # (n,)
    layers = range(1, len(model.layers) + 1)
    x = averages(model, ids, layers, args.batch_size)  # (L, n, d)
    fits = [fit(x[layer - 1], y, is_held_out, layer) for layer in layers]
    found, layer, w, b = max(fits, key=lambda of_layer: of_layer[0])
    p = torch.sigmoid(x[layer - 1][is_held_out] @ w + b)
    truth = y[is_held_out]
    tau = threshold(p, truth, args.miss, False)
    missed = (p[truth > 0] <= tau).float().mean().item()
    wrong = (p[truth == 0] > tau).float().mean().item()
    print(
        f"gate     layer {layer} of {len(layers)} tells {len(ids)} queries apart best (AUC "
        f"{found:.3f}, on a fifth that is held out): {100 * missed:.1f} % of those with a row to "
        f"forget missed, {100 * wrong:.1f} % of the others flagged"
    )
    info = {"layer": layer, "tau": tau, "miss": args.miss, "seed": args.seed, "auc": found}
    return info, {"w": w, "b": b}


def fit(x, y, is_held_out, layer):
    """The regression on a layer's averages x (n, d), y (n,) -> AUC if held out, layer, w, b."""
    w, b = fit_classifier(x[~is_held_out], y[~is_held_out], DECAY)
    scores = x[is_held_out] @ w + b
    truth = y[is_held_out] > 0
    return auc(scores[truth].tolist(), scores[~truth].tolist()), layer, w, b


# ----------------------------------------------------------------------------------- on the disk


def digest(phi):
    return hashlib.sha256(phi.cpu().numpy().tobytes()).hexdigest()


def save(folder, info, tensors):
    write_tensors(Path(folder) / "gate.safetensors", tensors)
    write_json(Path(folder) / "gate.json", {"format": FORMAT, **info})


def load(folder, model_folder, phi):
    """The Gate in a prompt's folder, or None if it has none.

    Raises ValueError if it is not whole, or is not for this model and the prompt phi (p, d).
    """
    file = Path(folder) / "gate.json"
    if not file.is_file():
        return None
    info = read_json(file)
    is_number = isinstance(info.get("tau"), float) and type(info.get("layer")) is int
    is_number = is_number and info["layer"] >= 1
    if info.get("format") != FORMAT or not is_number:
        raise ValueError(f"{file}: not as extras.gate writes it: --overwrite makes it anew")
    check_fingerprint(info.get("base_sha256"), model_folder, file)
    if info.get("prompt_sha256") != digest(phi):
        raise ValueError(f"{file}: it is of another prompt: --overwrite makes it anew")
    try:
        tensors = load_file(Path(folder) / "gate.safetensors")
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
    except (safetensors.SafetensorError, OSError) as e:
        raise ValueError(f"{Path(folder) / 'gate.safetensors'}: not a complete file: {e}") from None
    if shapes != {"w": (phi.shape[1],), "b": (1,)}:
        raise ValueError(f"{Path(folder) / 'gate.safetensors'}: not the tensors of a gate")
    return Gate(info, tensors)


# --------------------------------------------------------------------------------------- measuring


def measure_splits(args, model, tokenizer, gate, phi, info, splits, template):
    """{split: what is measured} without the prompt, and through the gate."""
    generic = info["generic"]
    limit = row_limit(args, len(phi))
    all_rows = [row for rows in splits.values() for row in rows]
    labels = label_set(all_rows, tokenizer, generic, template)
    before, after = {}, {}
    for name, examples, _ in examples_to_ask(splits, template, generic, tokenizer, limit):
        common = (model, tokenizer, examples, labels, generic)
        before[name] = measure(*common, batch_size=args.batch_size)
        if leaves_out(name, before):
            del before[name]
            continue
        flags = gate.flags(model, [e.prompt for e in examples], args.batch_size)
        hidden = gated_hidden(model, examples, flags, phi, args.batch_size)
        generate = gated_generator(model, gate, phi)
        after[name] = measure(
            *common, hidden=hidden, batch_size=args.batch_size, generate=generate
        )
        after[name]["flagged"] = sum(flags) / len(flags)
    return before, after


def measure_changes(args, model, tokenizer, gate, phi, splits, template):
    """{change of the query: {"forget": share flagged, "retain": share flagged}}, of train rows."""
    sides = ("forget", "retain")
    rows = {f"train {side}": spread(splits[f"train {side}"], CHANGED) for side in sides}
    args = copy.copy(args)
    args.template = template
    setting = Setting(args, tokenizer, rows, [], None, row_limit(args, len(phi)))
    subject = Subject("before", model, None, {}, Path(args.model), args.batch_size)
    changes = {}
    for side in sides:
        for name, examples in changed_queries(subject, setting, side).items():
            flags = gate.flags(model, [e.prompt for e in examples], args.batch_size)
            changes.setdefault(name, {})[side] = sum(flags) / len(flags)
    return changes


@torch.no_grad()
def measure_texts(args, model, tokenizer, gate, phi):
    """{what: as `support.elsewhere.compare`, and the share flagged} of texts never trained on."""
    limit = row_limit(args, len(phi))
    held_out = held_out_texts(args, tokenizer, args.prompt, limit)
    results = {}
    for what, examples in texts_elsewhere(args.model, tokenizer, limit, held_out).items():
        flags = gate.flags(model, [e.ids for e in examples], args.batch_size)
        before = answer_hidden(model, examples, batch_size=args.batch_size)
        after = gated_hidden(model, examples, flags, phi, args.batch_size)
        results[what] = compare(examples, model, before, model, after)
        results[what] |= {"texts": len(flags), "flagged": sum(flags) / len(flags)}
    return results


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
    forget = {
        name: 1 - result["flagged"]
        for name, result in after.items()
        if name.split(",")[0].endswith("forget")
    }
    forget |= {name: 1 - flagged["forget"] for name, flagged in changes.items()}
    others = {
        name: result["flagged"]
        for name, result in after.items()
        if name.split(",")[0].endswith("retain")
    }
    others |= {name: flagged["retain"] for name, flagged in changes.items()}
    others |= {name: result["flagged"] for name, result in texts.items()}
    others = {name: share for name, share in others.items() if not has_row_to_forget(name)}
    lines = []
    for shares, what, end in (
        (forget, "MISSES rows to forget", "they are answered as if there were no prompt"),
        (others, "FLAGS what is not to be forgotten", "it gets the prompt, as without a gate"),
    ):
        bad = {name: share for name, share in shares.items() if share > OFTEN}
        if bad:
            found = "; ".join(f"{name}: {100 * share:.0f} %" for name, share in bad.items())
            lines.append(f"THE GATE {what} ({found}): {end}.")
    return lines or [
        f"The gate errs in at most {100 * OFTEN:.0f} % of the queries, however they are changed."
    ]


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
    check_json_path(args.json)
    return args


def read_sides(args):
    """The rows of each split. Raises ValueError where one side has too few to make a gate."""
    check_required(args, "forget")
    splits = read_splits(args)
    if "train retain" not in splits:
        raise ValueError("--retain FILE is missing")
    check_rows(splits)
    check_disjoint(splits["train forget"], splits["train retain"])
    for name in ("train forget", "train retain"):
        if len(splits[name]) < FEWEST:
            file = splits[name][0].where.rpartition(":")[0]
            raise ValueError(f"{file}: {len(splits[name])} rows; at least {FEWEST} are needed")
    return splits


def main(argv=None):
    args = parse(argv)
    folder = args.prompt[0]
    phi, info = load_prompts(args.prompt, read_config(args.model), args.model)
    gate = None if args.overwrite else load(folder, args.model, phi)
    if args.ask is not None and gate is None:
        raise ValueError(f"{folder}: no gate yet: give --forget FILE and --retain FILE to make it")
    splits = {} if args.ask is not None else read_sides(args)
    template = template_of(args, info, [row for rows in splits.values() for row in rows])
    model, tokenizer = load_model(args)
    digest_of_prompt = digest(phi)
    phi = phi.to(model.device)
    if gate is None:
        limit = row_limit(args, len(phi))
        found, tensors = make_gate(
            args, model, tokenizer, template, splits["train forget"], splits["train retain"], limit
        )
        found |= {"base_sha256": fingerprint(args.model), "prompt_sha256": digest_of_prompt}
        save(folder, found, tensors)
        gate = Gate(found, tensors)
    if args.ask is not None:
        asking = asking_of(args, model, tokenizer, info, p=len(phi))
        generators = {"without": generator(model), "with": gated_generator(model, gate, phi)}
        ask(args, asking, generators)
        return
    before, after = measure_splits(args, model, tokenizer, gate, phi, info, splits, template)
    changes = measure_changes(args, model, tokenizer, gate, phi, splits, template)
    texts = measure_texts(args, model, tokenizer, gate, phi)
    more = {"gate": gate.info, "changes": changes, "texts": texts}
    report(args, model, info, before, after, GATE_METRICS, **more)
    print(changes_table(changes, texts))
    print("\n".join(gate_verdicts(after, changes, texts)))


if __name__ == "__main__":
    run(main)
