"""``soul memorize``: fine-tunes a model on rows, from files to a saved model.

An unlearning benchmark compares three models: "before", which has learned all rows; "retain", which has learned only those to
be kept; and "unlearned". This command makes the first two. It is a run of ``soul unlearn`` with the objective
`soul.losses.Memorize` and defaults of its own: the same loop, loss, checkpoints and files.
"""

import argparse

from soul.commands import unlearn
from soul.run.config import MEMORIZE
from soul_kernels.errors import argument_error

HELP = "fine-tune a model on rows: the models before unlearning, and without what is to be forgotten"
LR = 2e-5  # of all parameters
LORA_LR = 2e-4  # of adapters, which begin at zero


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument_group("model, data and output").add_argument
    add("--model", required=True, metavar="DIR_OR_NAME", help="directory or hub name of a causal LM")
    add(
        "--data",
        required=True,
        action="append",
        default=[],
        metavar="DATA",
        help="rows to be learned, as --forget of soul unlearn takes them; may be repeated: the rows of all are learned",
    )
    add("--output", required=True, metavar="DIR", help="new or empty directory for model, tokenizer and log")
    options = parser.add_argument_group("run")
    add = options.add_argument
    add("--method", default=MEMORIZE, help=argparse.SUPPRESS)  # so that --config takes the soul_config.json of a run
    add("--optimizer", default="adamw", metavar="NAME", help="soul or adamw (default: %(default)s)")
    add("--lr", type=float, metavar="X", help=f"peak learning rate (default: {LR:g}; with --lora-rank {LORA_LR:g})")
    add("--epochs", type=int, default=5, metavar="N", help="passes over the rows, at most (default: %(default)s)")
    add("--batch-size", type=int, default=4, metavar="N", help="rows per micro-batch (default: %(default)s)")
    add("--until-prob", type=float, metavar="X", help="end once the mean probability of an answer is >= X; needs --eval-every")
    unlearn.add_training(options)
    unlearn.add_plan(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command, in every process that torchrun has started."""
    if args.method != MEMORIZE:
        raise argument_error("method", f"{MEMORIZE!r}", repr(args.method), "soul unlearn makes a model forget")
    lr = args.lr
    if lr is None:
        lr = LR if args.lora_rank is None else LORA_LR
    parser = argparse.ArgumentParser()
    unlearn.add_arguments(parser)
    defaults = vars(parser.parse_args(["--model=", "--forget=", "--output="]))
    options = argparse.Namespace(**{**defaults, **vars(args), "forget": args.data, "lr": lr})
    unlearn.train(options, unrecorded=defaults.keys() - vars(args).keys())
