"""``soul memorize``: fine-tunes a model on rows, from files to a saved model.

An unlearning benchmark compares three models: "before", which has learned all rows; "retain", which has learned only those to
be kept; and "unlearned". This command makes the first two. It is a run of ``soul unlearn`` with the objective
`soul.losses.Memorize` and defaults of its own: the same loop, loss, checkpoints and files.
"""

import argparse

from soul.commands import unlearn
from soul.commands.task_options import add_task, fill_memorize
from soul.run.config import MEMORIZE, OPTIMIZERS
from soul_kernels.errors import argument_error, check_choice

HELP = "fine-tune a model on rows: the models before unlearning, and without what is to be forgotten"
UNTIL_PROB = 0.95
MOST_EPOCHS = 20
# With AdamW, 8 rows and a model of 135M, two fifths of these rates did not reach UNTIL_PROB: docs/commands.md.
LRS = {"adamw": 5e-5, "soul": 1e-5}  # of all parameters
LORA_LR = 5e-4  # of adapters, which begin at zero


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument_group("model, data and output").add_argument
    add("--model", required=True, metavar="DIR_OR_NAME", help="directory or hub name of a causal LM")
    add(
        "--data",
        action="append",
        default=[],
        metavar="DATA",
        help="rows to be learned, as --forget of soul unlearn takes them; may be repeated: the rows of all are learned",
    )
    add_task(parser, "it fills in --data")
    add("--output", required=True, metavar="DIR", help="new or empty directory for model, tokenizer and log")
    options = parser.add_argument_group("run")
    add = options.add_argument
    add("--method", default=MEMORIZE, help=argparse.SUPPRESS)  # so that --config takes the soul_config.json of a run
    add("--optimizer", default="adamw", metavar="NAME", help="soul or adamw (default: %(default)s)")
    add("--lr", type=float, metavar="X", help=f"peak learning rate (default: {LRS['adamw']:g}, for soul "
        f"{LRS['soul']:g}, with --lora-rank {LORA_LR:g})")  # fmt: skip
    add("--epochs", type=int, metavar="N", help=f"passes over the rows, at most (default: {MOST_EPOCHS})")
    add("--batch-size", type=int, default=4, metavar="N", help="rows per micro-batch (default: %(default)s)")
    add(
        "--until-prob",
        type=float,
        metavar="X",
        help="end once the mean probability of an answer is >= X, by default after every epoch, or every --eval-every steps "
        f"(default: {UNTIL_PROB:g}; with --epochs none)",
    )
    unlearn.add_training(options)
    unlearn.add_plan(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command, in every process that torchrun has started; return the exit status."""
    if args.method != MEMORIZE:
        raise argument_error("method", f"{MEMORIZE!r}", repr(args.method), "soul unlearn makes a model forget")
    fill_memorize(args)
    _settle(args)
    parser = argparse.ArgumentParser()
    unlearn.add_arguments(parser)
    defaults = vars(parser.parse_args(["--model=", "--forget=", "--output="]))
    options = argparse.Namespace(**{**defaults, "no_samples": True, **vars(args), "forget": args.data})
    return unlearn.train(options, unrecorded=defaults.keys() - vars(args).keys())


def _settle(args: argparse.Namespace) -> None:
    """Fill in the options whose defaults depend on others."""
    check_choice("optimizer", args.optimizer, OPTIMIZERS)
    if args.lr is None:
        args.lr = LRS[args.optimizer] if args.lora_rank is None else LORA_LR
    if args.epochs is None:
        args.until_prob = UNTIL_PROB if args.until_prob is None else args.until_prob
        args.epochs = MOST_EPOCHS
