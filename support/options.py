"""The options of train.py, and the paper's setting of them."""

from spul import Objective
from support.batches import EPOCHS, FEWEST_OF_SENTENCES, FEWEST_STEPS
from support.checks import read_generic
from support.cli import DEMO, Parser, add_layer_options, add_options, check_required, non_empty
from support.cli import number, use_demo

READ_AT_ONCE = 32  # rows, where no gradients are needed and so a row takes far less memory

# The paper's own setting, for --paper.
PAPER = {
    "num_tokens": 30,
    "encoder_hidden": 128,  # released code
    "alpha": 1.0,
    "beta": 0.5,
    "gamma": 0.0,
    "kl_position": "aligned",
    "generic": "neutral,unknown",
    "lr": 1e-4,
    "epochs": 10,
    "batch_size": 32,
    "forget_per_batch": None,
    "rewordings": 0,
    "single": True,
    "max_length": 1024,
    "measure_rows": 0,
}


def make_parser(description=""):
    parser = Parser(description)
    add_options(parser, batch_size=8, several=True)
    add = parser.add_argument_group("the prompt and its loss").add_argument
    add("--num-tokens", type=number(int, 1), default=30, metavar="P",
        help="prompt vectors p (default 30, where the paper forgets best)")
    add("--encoder-hidden", type=number(int, 0), default=128, metavar="H",
        help="encoder width (default 128, released code); 0: free vectors")
    add("--alpha", type=number(float, 0), default=Objective.alpha,
        help="weight of L_r (default 3, paper 1)")
    add("--beta", type=number(float, 0), default=Objective.beta,
        help="weight of L_kl (default 0.5, paper)")
    add("--gamma", type=number(float, 0), default=Objective.gamma,
        help="weight of L_keep (default 8); 0, paper: no such term, and other text changes")
    add("--general", type=non_empty, metavar="FILE",
        help="general text for L_keep, rows of any kind (default: the model writes it itself)")
    add("--kl-position", choices=["aligned", "after-label"], default="aligned",
        help="where L_kl compares: at the position that predicts an answer token (aligned), or one "
        "later, as the released code does (after-label)")
    add("--generic", default="unknown", metavar="A,B|FILE",
        help="answers for forgotten rows, one drawn for each (default unknown; paper "
        "neutral,unknown, which learns more slowly); in a file each line is one")
    add("--rewordings", type=number(int, 0), metavar="N",
        help="other wordings of the template to train in, too, at most (default 32; paper 0, and "
        "the demo, whose model hardly understands others)")
    add("--single", action="store_true",
        help="no rows asked after another row (paper)")
    add("--after", type=non_empty, action="append", metavar="DIR",
        help="a further request: earlier prompts, which stand before the new one; --out holds all "
        "vectors, as one prompt")
    add("--after-forget", type=non_empty, metavar="FILE",
        help="the rows that they made the model forget: it is to give them generic answers still")
    add("--write-retain", type=number(int, 1), metavar="N",
        help="without --retain: how many texts the model writes as retain rows (default 3 for each "
        "to forget, 256 to 2048)")

    add = parser.add_argument_group("training").add_argument
    add("--paper", action="store_true",
        help="the paper's setting as a whole; options given beside it still count")
    add("--lr", type=number(float, 0, above=True), default=1e-2,
        help="highest learning rate (default 1e-2, measured on hundreds of rows; paper 1e-4)")
    add("--epochs", type=number(int, 1),
        help=f"passes over as many rows as there are (default {EPOCHS}, but at least "
        f"{FEWEST_STEPS} steps, of sentences {FEWEST_OF_SENTENCES}; paper 10)")
    add("--forget-per-batch", type=forget_rows, metavar="K", default="loss",
        help="forget rows in every batch; share: all rows once an epoch, and each batch has its "
        "share of both sides; loss (default): the same, but after the first epoch rows not yet "
        "learned come more often and count less, and few ones to forget fill up to half of it; "
        "natural (paper): all rows once, as they come")
    add("--measure-rows", type=number(int, 0), default=300, metavar="N",
        help="rows of each split that are measured, at most, evenly from the file (default 300; 0, "
        "paper: all). eval.py measures all")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="seed of all random choices (default 0)")
    add("--out", type=non_empty, metavar="DIR",
        help="the prompt's folder (default prompt; for the demo demo/prompt)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add = add_layer_options(parser).add_argument
    add("--shard", action="store_true",
        help="with torchrun: each process keeps a part of the weights")
    return parser


def forget_rows(text):
    """An argparse type: of --forget-per-batch."""
    if text == "natural":
        return None
    return text if text in ("loss", "share") else number(int, 1)(text)


def parse(argv, description=""):
    """The options -> args, and whether this is the demo. Nothing is read but small text files."""
    parser = make_parser(description)
    args = parser.parse_args(argv)
    if args.paper:
        parser.set_defaults(**PAPER)
        args = parser.parse_args(argv)
    args.template, *args.more_templates = args.template or [None]
    is_demo = use_demo(args)
    check_required(args, "model", "forget")
    args.out = args.out or (str(DEMO / "prompt") if is_demo else "prompt")
    if args.rewordings is None:
        args.rewordings = 0 if is_demo else 32
    args.generic = read_generic(args.generic)
    args.read_batch_size = max(args.batch_size, min(4 * args.batch_size, READ_AT_ONCE))
    k = args.forget_per_batch
    if isinstance(k, int) and k >= args.batch_size:
        raise ValueError(
            f"--forget-per-batch {k} leaves no room in --batch-size {args.batch_size}"
        )
    if args.general and not args.gamma:
        raise ValueError("--general: the text of L_keep, which --gamma 0 leaves out")
    if args.shard and (args.quantize or args.compile):
        raise ValueError("--shard goes with neither --quantize nor --compile")
    return args, is_demo
