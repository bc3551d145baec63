"""``soul plan``: memory and least time of a step, and the ways that fit, computed without a GPU, weights or data."""

import argparse
import math

from soul.commands.card_options import add_card, card_options
from soul.commands.lists import names_of
from soul.losses import OBJECTIVES
from soul.output.console import print_result
from soul.plan.shapes import PRESETS
from soul_kernels.errors import argument_error

HELP = "memory and time of a run on given cards, and the ways to run a model there, computed from its shapes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    what = parser.add_argument_group("what")
    what.add_argument("--model", required=True, metavar="DIR_OR_NAME", help=f"{', '.join(PRESETS)}; or a directory or hub "
                      "name, from which only the configuration is read")  # fmt: skip
    what.add_argument("--batch-size", type=int, default=4, metavar="N", help="forget examples per micro-batch, and as many to "
                      "retain (default: %(default)s)")  # fmt: skip
    what.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a sequence (default: %(default)s)")
    what.add_argument("--labelled", type=int, metavar="N", help="tokens with a label in a micro-batch (default: all)")
    add_card(parser.add_argument_group("where"))
    how = parser.add_argument_group("how, as in soul unlearn")
    how.add_argument("--method", default="graddiff", metavar="NAME", help=f"{', '.join(OBJECTIVES)} (default: %(default)s)")
    how.add_argument("--optimizer", default="soul", metavar="NAME", help="soul or adamw (default: %(default)s)")
    how.add_argument("--state-dtype", metavar="NAME", help="float32, bfloat16 or 8bit (default: h in fp32, m as parameters)")
    how.add_argument("--param-rounding", default="auto", metavar="NAME", help="nearest, stochastic or compensated (default)")
    how.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches per step (default: %(default)s)")
    how.add_argument("--gradient-checkpointing", action="store_true", help="keep one hidden state per layer")
    how.add_argument("--gradient-release", action="store_true", help="step in the backward pass; without norm clipping")
    how.add_argument("--state-offload", action="store_true", help="keep soul's states in main memory")
    how.add_argument("--replicas", type=int, default=1, metavar="N", help="copies of the shards (HSDP; default: %(default)s)")
    how.add_argument(
        "--cpu-offload", action="store_true", help="keep shards of parameters, gradients and states in main memory"
    )
    how.add_argument("--head-in-shards", action="store_true", help="never gather output head and embeddings")
    how.add_argument("--lora-rank", type=int, metavar="R", help="train LoRA adapters of this rank instead of the model")
    how.add_argument("--lora-targets", metavar="A,B", help="names of layers (default: all linear layers but the head)")
    how.add_argument("--load-in-4bit", action="store_true", help="with --lora-rank: the model below the adapters in 4 bits")
    how.add_argument("--dtype", default="auto", metavar="NAME", help="dtype of the parameters: bfloat16 or float32 (default: "
                     "bfloat16 for soul and under adapters, float32 for adamw)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from soul.plan import plan, ways
    from soul.plan.planner import tokens_of
    from soul.run.config import UnlearnConfig

    names = ("method", "optimizer", "state_dtype", "param_rounding", "batch_size", "accumulate", "gradient_checkpointing",
             "gradient_release", "state_offload", "replicas", "cpu_offload", "head_in_shards")  # fmt: skip
    limit = math.inf if args.gradient_release else 1.0
    config = UnlearnConfig(**{name: getattr(args, name) for name in names}, max_grad_norm=limit)
    adapters = None
    for name in ("lora_targets", "load_in_4bit"):
        if args.lora_rank is None and getattr(args, name):
            raise argument_error(name, "nothing without --lora-rank", getattr(args, name), "pass --lora-rank N")
    if args.lora_rank is not None:
        adapters = dict(rank=args.lora_rank, targets=names_of(args.lora_targets) if args.lora_targets else "all-linear")
    tokens = tokens_of(config, args.length, args.labelled)
    options = dict(dtype=args.dtype, adapters=adapters, load_in_4bit=args.load_in_4bit, **card_options(args))
    planned = plan(args.model, config, tokens, **options)
    fitting = ways(args.model, config, length=args.length, labelled=args.labelled, **options)
    print_result(planned.table(), "", fitting.table())
