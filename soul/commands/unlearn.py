"""``soul unlearn``: one run, from files to a model that is saved."""

import argparse
import dataclasses
import inspect
import json
import math
import os
import pathlib
import time

from soul._extras import require
from soul.commands._place import add_place
from soul.commands._plan import add_card, card_options, names_of
from soul.commands._template import add_template
from soul.output.console import print_result
from soul.run.config import METHODS
from soul_kernels.errors import argument_error, check_choice

NOT_OF_THE_RUN = ("command", "config", "run", "dry_run", "card", "gpus", "network", "attention")
SAVING = ("save_every", "save_minutes", "keep", "resume")
FREE_TO_CHANGE = ("output", "device", "reference_cache", *SAVING)  # of a run that goes on
SAVE_MINUTES = 10.0
NOT_COMPARED = ("run", "model", "forget", "retain", "refusals", "config", "reference_cache")  # paths: their contents are
HELP = "make a Hugging Face causal language model forget a file of text"


def add_arguments(parser):
    """Declares the options."""
    need = parser.add_argument_group("what")
    need.add_argument("--model", required=True, metavar="DIR_OR_NAME", help="directory or hub name of a causal LM")
    need.add_argument("--forget", required=True, metavar="DATA", help="JSON lines or parquet with question/answer, "
                      "prompt/completion, prompt/response, messages or text; or a name: tofu:forget10, tofu:forget10@DIR, "
                      "muse:news/forget, wmdp:cyber-forget, hub:OWNER/NAME:SUBSET/SPLIT (docs/data.md)")  # fmt: skip
    need.add_argument("--retain", metavar="DATA", help="the same, to keep; needed unless the method has no retain term")
    need.add_argument("--output", required=True, metavar="DIR", help="new or empty directory for model, tokenizer and log")
    how = parser.add_argument_group("how")
    how.add_argument("--method", default="graddiff", metavar="NAME", help=f"{', '.join(METHODS)} (default: %(default)s)")
    how.add_argument("--optimizer", default="soul", metavar="NAME", help="soul or adamw (default: %(default)s)")
    how.add_argument("--gamma", type=float, metavar="X", help="weight of forgetting (default 1)")
    how.add_argument("--alpha", type=float, metavar="X", help="weight of retaining (default 1)")
    how.add_argument("--beta", type=float, metavar="X", help="inverse temperature, or whatever the method calls so")
    how.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="any other argument of the method "
                     "(retain=kl, reduction=token_mean, delta=0.1, ...: see soul/losses.py); may be repeated")  # fmt: skip
    how.add_argument("--reference-cache", metavar="DIR", help="keep what the method needs of the model before unlearning")
    how.add_argument("--lr", type=float, default=1e-5, metavar="X", help="peak learning rate (default: %(default)s)")
    how.add_argument("--rho", type=float, default=0.04, metavar="X", help="SOUL's clipping threshold (default: %(default)s)")
    how.add_argument("--bs", type=int, default=5120, metavar="N", help="SOUL's predictions behind h (default: %(default)s)")
    how.add_argument("--clip-target", type=float, metavar="X", help="move rho until this part of the coordinates is clipped")
    how.add_argument("--curvature", default="unlearn", metavar="NAME", help="what h is taken from: unlearn (SOUL's code), "
                     "retain or gnb, on the step's retain tokens (default: %(default)s)")  # fmt: skip
    how.add_argument("--curvature-every", type=int, default=10, metavar="K", help="steps between refreshes by retain or gnb")
    how.add_argument("--published-code", action="store_true", help="SOUL: momentum as in the published code")
    how.add_argument("--state-dtype", metavar="NAME", help="of soul's states: float32, bfloat16 or 8bit (default: h in fp32, m "
                     "like the parameters)")  # fmt: skip
    how.add_argument("--param-rounding", default="auto", metavar="NAME", help="of bf16 parameters by soul: nearest, stochastic "
                     "or compensated, which keeps 8 more bits (default)")  # fmt: skip
    how.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="decoupled (default: %(default)s)")
    how.add_argument("--epochs", type=int, default=5, metavar="N", help="passes over the forget file (default: %(default)s)")
    how.add_argument(
        "--batch-size", type=int, default=4, metavar="N", help="forget examples a micro-batch, and as many to retain"
    )
    how.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches a step (default: %(default)s)")
    how.add_argument(
        "--max-grad-norm", type=float, default=1.0, metavar="X", help="global norm clipping; inf: none (default: %(default)s)"
    )
    how.add_argument("--gradient-checkpointing", action="store_true", help="less memory for a third more time")
    how.add_argument("--gradient-release", action="store_true", help="step each parameter in the backward pass, and free its "
                     "gradient; needs --max-grad-norm inf")  # fmt: skip
    how.add_argument("--compile", action="store_true", help="the model's body under torch.compile")
    how.add_argument(
        "--cuda-graph", action="store_true", help="replay the whole step as one CUDA graph, a graph for each shape"
    )
    how.add_argument("--warmup-ratio", type=float, default=0.1, metavar="X", help="part of the steps (default: %(default)s)")
    how.add_argument("--schedule", default="linear", metavar="NAME", help="of lr after it: linear, cosine or constant")
    how.add_argument("--lora-rank", type=int, metavar="R", help="train LoRA adapters of this rank instead of the model")
    how.add_argument("--lora-alpha", type=float, metavar="X", help="their scale (default: twice the rank)")
    how.add_argument("--lora-dropout", type=float, default=0.0, metavar="X", help="of their input (default: %(default)s)")
    how.add_argument("--lora-targets", metavar="A,B", help="names of layers (default: all linear ones but the head)")
    how.add_argument("--merge", action="store_true", help="add the adapters to the weights, and save a plain model")
    how.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens of a sequence (default: %(default)s)")
    how.add_argument("--long-texts", default="split", metavar="NAME", help="split or truncate longer texts (default: "
                     "%(default)s); answers are truncated")  # fmt: skip
    how.add_argument(
        "--drop-unusable", action="store_true", help="leave out blank rows and prompts that leave no room for an answer"
    )
    how.add_argument("--refusals", metavar="FILE", help="a refusal a line, for po and dpo (default: eight of ours)")
    add_template(how)
    how.add_argument("--seed", type=int, default=0, metavar="N", help="data order and refusals (default: %(default)s)")
    how.add_argument("--dtype", default="auto", metavar="NAME", help="of the parameters: bfloat16, with 8 more bits in soul's "
                     "state, or float32, with bf16 autocast on a GPU; adamw loses most updates of bfloat16 below lr 1e-4 "
                     "(default: bfloat16 for soul and under adapters; float32 for adamw and on CPUs without AMX)")  # fmt: skip
    how.add_argument(
        "--eval-every", type=int, default=0, metavar="N", help="steps from one evaluation to the next (default: none)"
    )
    how.add_argument("--stop-forget-prob", type=float, metavar="X", help="end once the probability of a forget answer is <= X")
    how.add_argument("--stop-retain-prob", type=float, metavar="X", help="end once that of a retain answer is below X")
    how.add_argument("--save-every", type=int, default=500, metavar="N", help="steps from one checkpoint to the next; 0: none "
                     "by steps (default: %(default)s)")  # fmt: skip
    how.add_argument("--save-minutes", type=float, metavar="X", help="minutes from one checkpoint to the next; 0: none by time "
                     f"(default: {SAVE_MINUTES:g}; with --save-every 0 only SIGTERM saves the run)")  # fmt: skip
    how.add_argument("--keep", type=int, default=2, metavar="N", help="newest checkpoints that stay (default: %(default)s)")
    how.add_argument("--resume", action="store_true", help="go on after the newest checkpoint in --output, bit for bit; all "
                     "other options as before. Without one, from the start")  # fmt: skip
    add_place(how)
    dry = parser.add_argument_group("plan")
    dry.add_argument("--dry-run", action="store_true", help="print the memory and the least time that the run takes on a card, "
                     "from the model's configuration and the files; read no weights, and write nothing")  # fmt: skip
    add_card(dry, "of --dry-run: ")


def run(args):
    """Runs the command, in every process that torchrun has started."""
    from soul.distributed.processes import started
    from soul.models.causal_lm import pick_device

    with started(pick_device(args.device)):
        _run(args)


def left(args):
    """Return what an interrupted run has left in its output directory, in words."""
    from soul.checkpoint.local import is_saved

    output = pathlib.Path(args.output)
    if not is_saved(output):
        return "no model was saved; --resume goes on from a checkpoint, where there is one"
    checkpoints = output / "checkpoints"
    rest = f"; checkpoints are left behind in {checkpoints}" if checkpoints.exists() else ""
    return f"the model is saved in {output}{rest}"


def _run(args):
    from soul.checkpoint.local import Checkpoints, has_ended
    from soul.distributed.processes import Processes, check_supported
    from soul.output.directory import CHECKPOINTS, check_output
    from soul.run.config import UnlearnConfig
    from soul.run.unlearner import Unlearner

    processes = Processes.here()
    processes.check_alike({name: value for name, value in vars(args).items() if name not in NOT_COMPARED})
    fields = [field.name for field in dataclasses.fields(UnlearnConfig) if hasattr(args, field.name)]
    config = UnlearnConfig(**{name: getattr(args, name) for name in fields}, method_options=_method_options(args))
    config.objective()
    card = card_options(args)  # checks them, whether they are used or not
    if args.gpus != 1 and not args.dry_run:
        raise argument_error("gpus", "1 without --dry-run", args.gpus, "torchrun --nproc-per-node N runs on several")
    minutes = args.save_minutes
    if minutes is None:
        minutes = SAVE_MINUTES if args.save_every else 0.0
    output, keeping = check_output(args.output, args.resume), dict(save_every=args.save_every, keep=args.keep)
    checkpoints = Checkpoints(output / CHECKPOINTS, every=args.save_every, minutes=minutes, keep=args.keep)  # checks them
    adapters = _adapters(args)
    if processes.size > 1:
        check_supported(config, adapters)
    require("transformers", "hf")
    if args.dry_run:
        from soul.plan.run import plan_run

        options = dict(dtype=args.dtype, adapters=adapters, **card)
        print_result(plan_run(args.model, args.forget, args.retain, config, **options).table())
        return
    if args.resume and processes.any(has_ended(output, checkpoints)):
        processes.on_first(lambda: _check_ended(args, output, config))
        if processes.first:
            print(f"{output}: this run has ended, and there is nothing to resume")
        return
    place = dict(dtype=args.dtype, device=args.device)
    unlearner = Unlearner(args.model, args.forget, args.retain, config, adapters=adapters, **place)
    for name, counts in unlearner.counts.items() if processes.first else ():
        print(f"{name}: {counts.told(config.max_length)}")
    before, begun = unlearner.forget_probability(), time.perf_counter()
    about = {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_RUN}
    records = unlearner.run(output, save_minutes=minutes, resume=args.resume, merge=args.merge, about=about, **keeping)
    seconds = time.perf_counter() - begun
    after = unlearner.forget_probability()
    if not processes.first:
        return
    if "stopped" in records[-1]:
        print(f"ended after step {len(records)}: {records[-1]['stopped']}")
    steps = f"{len(records)} step{'s' * (len(records) != 1)} in {seconds:.1f} s"
    print(f"{steps}; probability of a forget answer: {before:.3f} before, {after:.3f} after")
    print(f"{'adapters' if adapters and not args.merge else 'model'}, tokenizer and log.jsonl: {output}")


def _check_ended(args, output, config):
    """Raises unless a run that has ended in ``output`` is the one that is asked for; the first difference is named.

    Options are compared with those that the run has left in ``soul_config.json``, rows with their digests in ``data.json``.
    The model is compared by its name: loading it would take longer than it is worth.
    """
    from soul.checkpoint.format import check_same
    from soul.data.sources import digest, rows
    from soul.output.directory import DATA_FILE, RUN_FILE

    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    saved, now = _read_json(output / RUN_FILE), vars(args)
    if not saved:
        got, remedy = f"{output / RUN_FILE} without any", "choose another output directory"
        raise argument_error("resume", "the options of the run that has ended", got, remedy)
    merged = bool(saved.get("lora_rank")) and not (output / "adapter_config.json").is_file()
    names = now.keys() - {*NOT_OF_THE_RUN, *FREE_TO_CHANGE, "refusals"}
    saved = {name: saved.get(name, defaults.get_default(name)) for name in names} | {"merge": merged}
    now = {name: now[name] for name in names}
    if _same_place(str(saved["model"]), now["model"]):
        now["model"] = saved["model"]
    kept = _read_json(output / DATA_FILE)
    contents = {name: counts["content"] for name, counts in kept.items() if isinstance(counts, dict) and "content" in counts}
    if contents:  # of data that lie elsewhere now, the rows decide
        sources = {name: (saved.pop(name), now.pop(name))[1] for name in ("forget", "retain")}
        contents_now = {n: rows(s, n, drop=config.drop_unusable) for n, s in sources.items() if s is not None}
        saved |= {f"content of {name}": content for name, content in contents.items()}
        now |= {f"content of {name}": digest(found) for name, found in contents_now.items()}
    if config.refusals is not None:
        now["content of refusals"] = config.decisive()["refusals"]
    check_same(saved, now, "the run that has ended")


def _read_json(path):
    """The dict in a file, {} where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    return content if isinstance(content, dict) else {}


def _same_place(name, other):
    return name == other or (os.path.exists(name) and os.path.exists(other) and os.path.samefile(name, other))


def _adapters(args):
    """Arguments of `soul.models.add_adapters`, or None."""
    if args.lora_rank is None:
        for name, off in (("lora_alpha", None), ("lora_dropout", 0.0), ("lora_targets", None), ("merge", False)):
            if getattr(args, name) != off:
                raise argument_error(name, "nothing without --lora-rank", getattr(args, name), "pass --lora-rank N")
        return None
    targets = names_of(args.lora_targets) if args.lora_targets else "all-linear"
    return dict(rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout, targets=targets)


def _method_options(args):
    """The keyword arguments of the method, from the options of their own and from ``--option``."""
    check_choice("method", args.method, tuple(METHODS))
    known = inspect.signature(METHODS[args.method]).parameters
    options = {name: getattr(args, name) for name in ("gamma", "alpha", "beta") if getattr(args, name) is not None}
    for given in args.option:
        name, equals, text = given.partition("=")
        if not equals:
            raise argument_error("option", "NAME=VALUE", given, f"names for {args.method}: {', '.join(known)}")
        if name in options:
            raise argument_error(name, "one value", "two", "give it once")
        options[name] = _parsed(name, text, known[name].default) if name in known else text
    return options


def _parsed(name, text, default):
    """A text as a value of the type that the argument's default has; None stands for a number."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        check_choice(name, text.lower(), ("true", "false"))
        return text.lower() == "true"
    kind = int if isinstance(default, int) else float
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        expected = "a whole number" if kind is int else "a number"
        raise argument_error(name, expected, repr(text), "check the options")
    return value
