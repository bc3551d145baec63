"""``soul unlearn``: one run, from files to a saved model.

Almost every option is one of `soul.UnlearnConfig`, `soul.Unlearner` or `soul.Unlearner.run`; this module declares them, checks
the others, and passes them on. The tuples of names below list the options that a comparison or a record leaves out.
"""

import argparse
import dataclasses
import inspect
import json
import math
import os
import pathlib
import time
from collections.abc import Collection
from typing import Any

from soul._extras import require
from soul.checkpoint.format import check_same
from soul.checkpoint.local import Checkpoints, has_ended, is_saved
from soul.commands.card_options import add_card, card_options
from soul.commands.config_file import ListPresets
from soul.commands.device_options import add_device
from soul.commands.lists import names_of
from soul.commands.push import add_hub, card_of_run, check_hub, open_hub, push_run
from soul.commands.task_options import add_task, fill_unlearn
from soul.commands.template_options import add_template
from soul.data.sources import digest, rows
from soul.distributed.processes import Processes, check_layout, check_supported, started
from soul.models.loading import pick_device
from soul.models.quantized import cannot_merge_error
from soul.output.console import print_result
from soul.output.directory import CHECKPOINTS, DATA_FILE, RUN_FILE, VERDICT_FILE, check_output
from soul.plan.run import plan_run
from soul.report.run import report_on_run
from soul.run.aim import AUTO, OFF, parse_aim, summary
from soul.run.config import MEMORIZE, METHODS, UnlearnConfig
from soul.run.judge import failed_lines
from soul.run.loop import Record
from soul.run.measures import Measures
from soul.run.notes import check_samples
from soul.run.rule import OWN, TOFU
from soul.run.trackers import CLIENTS, check_trackers
from soul.run.unlearner import Unlearner
from soul_kernels.errors import argument_error, check_choice

HELP = "make a Hugging Face causal language model forget a file of text"
SAVE_MINUTES = 10.0  # from one checkpoint to the next, by default
NOT_REACHED = 3  # exit status of a run that has ended in order without reaching its aim
AIM_EPOCHS = 20  # at most, with an aim
AIM_CLIP_TARGET = 0.5  # of SOUL with an aim
INFLUENCE = "influence"
UNSTEERED = ("ga", INFLUENCE)  # methods without a retain term, whose run an aim judges and does not steer
SHOWN_FAILURES = 10  # rows that failed, on the terminal; verdict.json has all of them
FEW_CONTROL = 8  # rows, below which the output says so
CHANCE_NOISE = 0.1  # an aim this much below chance is still chance

# Options that soul_config.json leaves out, since they do not describe the run.
NOT_RECORDED = (
    "command", "config", "run", "dry_run", "card", "gpus", "network", "host_bandwidth", "attention", "push_to_hub",
    "hub_private",
)  # fmt: skip
# Options that may change when a run is resumed.
FREE_ON_RESUME = (
    "output",
    "device",
    "state_offload",
    "cpu_offload",
    "replicas",
    "head_in_shards",
    "reference_cache",
    "save_every",
    "save_minutes",
    "keep",
    "resume",
    "samples",
    "no_samples",
    "report_to",
)
# Options that may differ between processes: paths, whose contents are compared instead.
FREE_AMONG_PROCESSES = ("run", "model", "data", "forget", "retain", "refusals", "config", "reference_cache")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    paths = parser.add_argument_group("model, data and output")
    add = paths.add_argument
    add("--model", required=True, metavar="DIR_OR_NAME", help="directory or hub name of a causal LM")
    add(
        "--forget",
        metavar="DATA",
        help="JSON lines or parquet with question/answer, prompt/completion, prompt/response, messages or text; "
        "or a name: tofu:forget10, tofu:forget10@DIR, muse:news/forget, wmdp:cyber-forget, "
        "hub:OWNER/NAME:SUBSET/SPLIT (docs/data.md)",
    )
    add("--retain", metavar="DATA", help="data to keep, in the same formats; needed unless the method has no retain term")
    add_task(paths, "it fills in --forget, --retain, --refusals and, near their size, the options of a published run")
    add("--output", required=True, metavar="DIR", help="new or empty directory for model, tokenizer and log")
    aim = parser.add_argument_group("aim", "What the run is for. Without --lr, --alpha and --stop-* it is on.")
    add = aim.add_argument
    add(
        "--aim",
        metavar="AIM",
        help="auto: forget rows at or below chance, control rows kept; forget_prob=X: X in place of chance; off "
        "(default: auto, but off with one of --lr, --alpha, --stop-*)",
    )
    add("--keep-retain", type=float, metavar="X", help="fraction of their probability that control rows keep (default 0.95)")
    add("--control", metavar="DATA", help="control rows, never trained on (default: a tenth of --retain, 8 to 64, held out)")
    add(
        "--unseen", metavar="DATA", help="rows like those to forget that the model never saw: the aim where rows have no prompt"
    )
    add(
        "--untouched",
        metavar="DATA",
        help="rows to be kept that neither train nor steer the run, asked before and after it (default: some of --retain)",
    )
    add(
        "--paraphrases",
        metavar="DATA",
        help="rows of question and paraphrases (a list): forget questions in other words, in which the model is asked too",
    )
    add("--draws", type=int, default=4, metavar="K", help="drawn answers to each forget question after the run (default 4)")
    options = parser.add_argument_group("run")
    add = options.add_argument
    add(
        "--preset",
        metavar="NAME",
        action=ListPresets,
        help="a configuration that SOUL's paper published; list: show them. Options that are given win",
    )
    add("--method", metavar="NAME", help=f"{', '.join(METHODS)} (default: npo with an aim, else graddiff)")
    add("--optimizer", default="soul", metavar="NAME", help="soul or adamw (default: %(default)s)")
    add("--gamma", type=float, metavar="X", help="weight of forgetting (default 1)")
    add("--alpha", type=float, metavar="X", help="weight of retaining (default 1; with an aim, where it begins)")
    add("--beta", type=float, metavar="X", help="beta of the method, such as the inverse temperature of npo and dpo")
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other argument of the method (retain=kl, reduction=token_mean, delta=0.1, ...: see "
        "soul/losses.py); may be repeated",
    )
    add("--reference-cache", metavar="DIR", help="keep the results of the model before unlearning that the method needs")
    add("--lr", type=float, metavar="X", help="peak learning rate (default 1e-5; with an aim, what the pilot tries first)")
    add("--rho", type=float, default=0.04, metavar="X", help="SOUL's clipping threshold (default: %(default)s)")
    add("--bs", type=int, default=5120, metavar="N", help="number of predictions that give SOUL's h (default: %(default)s)")
    add(
        "--clip-target",
        type=float,
        metavar="X",
        help="move rho until this fraction of the coordinates is clipped (default: rho stays; with an aim 0.5)",
    )
    add(
        "--curvature",
        metavar="NAME",
        help="source of h: unlearn (SOUL's code), retain or gnb, on the step's retain tokens (default: unlearn; with an aim "
        "retain)",
    )
    add("--curvature-every", type=int, default=10, metavar="K", help="steps between refreshes by retain or gnb")
    add("--published-code", action="store_true", help="SOUL: momentum as in the published code")
    add("--epochs", type=int, metavar="N", help="passes over the forget file (default 5; with an aim at most, 20)")
    add("--batch-size", type=int, default=4, metavar="N", help="forget examples per micro-batch, and as many to retain")
    add("--refusals", metavar="FILE", help="file with one refusal per line, for po and dpo (default: eight built-in ones)")
    add("--stop-forget-prob", type=float, metavar="X", help="end once the probability of a forget answer is <= X")
    add("--stop-retain-prob", type=float, metavar="X", help="end once the probability of a retain answer is below X")
    add(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="steps from one set of sample answers to the next, for the report (default: only before and after the run)",
    )
    add("--no-samples", action="store_true", help="do not ask the model anything before and after the run")
    add_training(options)
    add_plan(parser)


def add_training(group: argparse._ActionsContainer) -> None:
    """Declare the options of every run on rows, which `soul.commands.memorize` has too."""
    add = group.add_argument
    add(
        "--state-dtype",
        metavar="NAME",
        help="dtype of soul's states: float32, bfloat16 or 8bit (default: h in fp32, m like the parameters)",
    )
    add(
        "--state-offload",
        action="store_true",
        help="keep soul's states in main memory, and pass them over the GPU in every step: the same numbers, more time",
    )
    add(
        "--cpu-offload",
        action="store_true",
        help="with torchrun: keep parameters, gradients and states in main memory, and step them there (FSDP2's policy)",
    )
    add(
        "--replicas",
        type=int,
        default=1,
        metavar="N",
        help="with torchrun: N copies of the model, each in shards over 1/N of the processes (HSDP; default: %(default)s)",
    )
    add(
        "--param-rounding",
        default="auto",
        metavar="NAME",
        help="how soul rounds bf16 parameters: nearest, stochastic or compensated, which keeps 8 more bits (default)",
    )
    add("--weight-decay", type=float, default=0.0, metavar="X", help="decoupled weight decay (default: %(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="micro-batches per step (default: %(default)s)")
    add("--max-grad-norm", type=float, default=1.0, metavar="X", help="global norm clipping; inf: none (default: %(default)s)")
    add("--gradient-checkpointing", action="store_true", help="less memory for a third more time")
    add(
        "--gradient-release",
        action="store_true",
        help="step each parameter in the backward pass, and free its gradient; needs --max-grad-norm inf",
    )
    add(
        "--head-in-shards",
        action="store_true",
        help="with torchrun: never gather output head and embeddings; each process has its rows of both, and their gradient",
    )
    add("--compile", action="store_true", help="the model's body under torch.compile")
    add("--cuda-graph", action="store_true", help="replay the whole step as one CUDA graph, a graph for each shape")
    add("--warmup-ratio", type=float, default=0.1, metavar="X", help="fraction of the steps (default: %(default)s)")
    add("--schedule", default="linear", metavar="NAME", help="lr after the warm-up: linear, cosine or constant")
    add("--lora-rank", type=int, metavar="R", help="train LoRA adapters of this rank instead of the model")
    add("--lora-alpha", type=float, metavar="X", help="scale of the adapters (default: twice the rank)")
    add("--lora-dropout", type=float, default=0.0, metavar="X", help="dropout of the adapters' input (default: %(default)s)")
    add("--lora-targets", metavar="A,B", help="names of layers (default: all linear layers but the head)")
    add("--merge", action="store_true", help="add the adapters to the weights, and save a plain model")
    add(
        "--load-in-4bit",
        action="store_true",
        help="with --lora-rank: keep the model below the adapters in 4 bits (nf4 of bitsandbytes, as QLoRA)",
    )
    add("--max-length", type=int, default=512, metavar="N", help="tokens of a sequence (default: %(default)s)")
    add(
        "--long-texts",
        default="split",
        metavar="NAME",
        help="split or truncate longer texts (default: %(default)s); answers are truncated",
    )
    add("--drop-unusable", action="store_true", help="leave out blank rows and prompts that leave no room for an answer")
    add_template(group)
    add("--seed", type=int, default=0, metavar="N", help="data order and refusals (default: %(default)s)")
    add(
        "--dtype",
        default="auto",
        metavar="NAME",
        help="dtype of the parameters: bfloat16, with 8 more bits in soul's state, or float32, with bf16 "
        "autocast on a GPU; adamw loses most updates of bfloat16 below lr 1e-4 (default: bfloat16 for soul "
        "and under adapters; float32 for adamw and on CPUs without AMX)",
    )
    add("--eval-every", type=int, default=0, metavar="N", help="steps from one evaluation to the next (default: none)")
    add(
        "--eval-metrics",
        action="extend",
        type=names_of,
        default=[],
        metavar="NAME,...",
        help=f"what an evaluation measures beside the probabilities: {', '.join(OWN)}; with --eval-data {', '.join(TOFU)}",
    )
    add("--eval-data", metavar="DIR", help="folder with TOFU's *_perturbed.jsonl, or the word tofu for the hub's")
    add("--eval-split", default="forget10", metavar="NAME", help="TOFU's name of the forget set (default: %(default)s)")
    add("--eval-rows", type=int, metavar="N", help="take the first N rows of each of these files (default: all)")
    add("--eval-retain-logs", metavar="DIR", help="logs of a model that never saw the forget set: for forget_quality")
    add(
        "--keep-best",
        metavar="RULE",
        help="save the best evaluated point in place of the last, by a rule: 'forget_quality subject to model_utility >= "
        "0.95*start'",
    )
    add(
        "--save-every",
        type=int,
        default=500,
        metavar="N",
        help="steps from one checkpoint to the next; 0: none by steps (default: %(default)s)",
    )
    add(
        "--save-minutes",
        type=float,
        metavar="X",
        help=f"minutes from one checkpoint to the next; 0: none by time (default: {SAVE_MINUTES:g}; with "
        "--save-every 0 only SIGTERM saves the run)",
    )
    add("--keep", type=int, default=2, metavar="N", help="number of newest checkpoints to keep (default: %(default)s)")
    add(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint in --output, bit for bit, with all other options as before; without a "
        "checkpoint, start anew",
    )
    add(
        "--report-to",
        metavar="A,B",
        help=f"send the numbers of log.jsonl to trackers as well: {', '.join(CLIENTS)} (default: none)",
    )
    add_hub(group)
    add_device(group)


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Declare ``--dry-run``, and the cards for which it plans."""
    plan = parser.add_argument_group("plan")
    add = plan.add_argument
    add(
        "--dry-run",
        action="store_true",
        help="print the memory and the least time that the run takes on a card, from the model's configuration "
        "and the files; read no weights, and write nothing",
    )
    add_card(plan, "of --dry-run: ")


def run(args: argparse.Namespace) -> int:
    """Run the command, in every process that torchrun has started; return the exit status."""
    if args.method == MEMORIZE:
        raise argument_error("method", "a method that forgets", MEMORIZE, "soul memorize fine-tunes a model on rows")
    fill_unlearn(args)
    return train(args)


def train(args: argparse.Namespace, unrecorded: Collection[str] = ()) -> int:
    """Train a model as the options say: it forgets or, with the method "memorize", learns its rows.

    Args:
        args: every option of ``soul unlearn``.
        unrecorded: names of those that ``soul_config.json`` leaves out beside ``NOT_RECORDED``.

    Returns:
        The exit status.
    """
    with started(pick_device(args.device)):
        status = _train(args, {*NOT_RECORDED, *unrecorded})
        is_first = Processes.here().first
    if is_first:
        push_run(args, status)  # an upload may take longer than the other processes would wait
    return status


def state_of_output(args: argparse.Namespace) -> str:
    """Return a sentence on what an interrupted run has left in its output directory."""
    output = pathlib.Path(args.output)
    if not is_saved(output):
        return "no model was saved; --resume goes on from a checkpoint, if there is one"
    checkpoints = output / CHECKPOINTS
    remains = f"; checkpoints are left behind in {checkpoints}" if checkpoints.exists() else ""
    return f"the model is saved in {output}{remains}"


def _train(args: argparse.Namespace, unrecorded: set[str]) -> int:
    # All options are checked, unused ones too, before the model is read, which may take minutes.
    processes = Processes.here()
    processes.check_alike({name: value for name, value in vars(args).items() if name not in FREE_AMONG_PROCESSES})
    _settle(args)
    config = _config(args)
    config.objective()
    check_samples(args.samples, config)
    card = card_options(args)
    if args.gpus != 1 and not args.dry_run:
        raise argument_error("gpus", "1 without --dry-run", args.gpus, "torchrun --nproc-per-node N runs on several")
    save_minutes = args.save_minutes
    if save_minutes is None:
        save_minutes = SAVE_MINUTES if args.save_every else 0.0
    output = check_output(args.output, args.resume)
    checkpoints = Checkpoints(output / CHECKPOINTS, every=args.save_every, minutes=save_minutes, keep=args.keep)
    adapters = _adapters(args)
    report_to = names_of(args.report_to) if args.report_to else []
    check_trackers(report_to)
    check_layout(config, args.gpus if args.dry_run else processes.size)
    if processes.size > 1:
        check_supported(config)
    require("transformers", "hf")
    if args.dry_run:
        how = dict(dtype=args.dtype, adapters=adapters, load_in_4bit=args.load_in_4bit, **card)
        plan = plan_run(args.model, args.forget, args.retain, config, **how)
        print_result(plan.table())
        return 0
    processes.on_first(lambda: check_hub(args))
    if args.resume and processes.any(has_ended(output, checkpoints)):
        processes.on_first(lambda: _check_ended(args, output, config, unrecorded))
        if processes.first:
            print(f"{output}: this run has ended, and there is nothing to resume")
        return _status(_read_json(output / VERDICT_FILE))
    unlearner = Unlearner(
        args.model,
        args.forget,
        args.retain,
        config,
        adapters=adapters,
        dtype=args.dtype,
        device=args.device,
        control=args.control,
        unseen=args.unseen,
        untouched=args.untouched,
        paraphrases=args.paraphrases,
        load_in_4bit=args.load_in_4bit,
    )
    if processes.first:
        for name, counts in unlearner.counts.items():
            print(f"{'data' if config.method == MEMORIZE else name}: {counts.summary(config.max_length)}")
        if unlearner.measures is not None:
            _print_aim(unlearner.measures, unlearner.counts["control"].rows, args)
    processes.on_first(lambda: open_hub(args))
    probability_before = 0.0 if unlearner.measures is not None else unlearner.forget_probability()
    begun = time.perf_counter()
    records = unlearner.run(
        output,
        save_every=args.save_every,
        save_minutes=save_minutes,
        keep=args.keep,
        resume=args.resume,
        merge=args.merge,
        options={name: value for name, value in vars(args).items() if name not in unrecorded},
        samples=None if args.no_samples else args.samples,
        report_to=report_to,
    )
    seconds = time.perf_counter() - begun
    written = f"{'adapters' if adapters and not args.merge else 'model'}, tokenizer and log.jsonl: {output}"
    if unlearner.measures is not None:
        if processes.first:
            print(f"{_steps(records)} in {seconds:.1f} s; {written}")
            print(*report_on_run(output), sep="\n")
            card_of_run(output)
            verdict = unlearner.measures.verdict
            outcome, *lines = summary(verdict)
            failed = failed_lines(verdict.get("failed", ()))
            print(*lines, *failed[:SHOWN_FAILURES], sep="\n")
            if len(failed) > SHOWN_FAILURES:
                print(f"and {len(failed) - SHOWN_FAILURES} more: {output / VERDICT_FILE}, 'failed'")
            print(outcome)
        return _status(unlearner.measures.verdict)
    probability_after = unlearner.forget_probability()
    if processes.first:
        answer = "an answer" if config.method == MEMORIZE else "a forget answer"
        _print_result(records, seconds, answer, probability_before, probability_after)
        if config.until_prob is not None and probability_after < config.until_prob:
            print(f"until_prob {config.until_prob:g} was not reached: raise --epochs or --lr")
        print(written)
        numbers = {"forget_prob": [probability_before, probability_after]}
        if config.method != MEMORIZE:  # the report is on forgetting
            print(*report_on_run(output, numbers), sep="\n")
        card_of_run(output, numbers)
    return 0


def _settle(args: argparse.Namespace) -> None:
    """Decide whether the run has an aim, and fill in the options whose defaults depend on it."""
    tuned = [name for name in ("lr", "alpha", "stop_forget_prob", "stop_retain_prob") if getattr(args, name) is not None]
    tuned += ["option"] * any(assignment.startswith("alpha=") for assignment in args.option)
    if args.aim is None:
        args.aim = OFF if tuned or args.method in UNSTEERED else AUTO
    aims = parse_aim(args.aim) is not None
    if not aims:
        for name in ("keep_retain", "control", "unseen", "untouched", "paraphrases"):
            if getattr(args, name) not in (None, UnlearnConfig.keep_retain):
                got = f"{getattr(args, name)}, and {'--aim off' if not tuned else '--' + tuned[0].replace('_', '-')}"
                raise argument_error(name, "nothing without an aim", got, "pass --aim auto")
    args.method = args.method or ("npo" if aims else "graddiff")
    is_soul = aims and args.optimizer == "soul" and args.method != INFLUENCE and args.retain is not None
    if is_soul and not args.published_code:
        # What reached aim and keep on a pretrained model, where SOUL's own curvature did not: docs/running.md.
        if args.curvature is None and args.clip_target is None and args.rho == UnlearnConfig.rho:
            args.clip_target = AIM_CLIP_TARGET
        args.curvature = args.curvature or "retain"
    defaults = {"lr": UnlearnConfig.lr, "curvature": UnlearnConfig.curvature, "keep_retain": UnlearnConfig.keep_retain}
    steered = aims and args.method not in UNSTEERED
    defaults["epochs"] = AIM_EPOCHS if steered else UnlearnConfig.epochs
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _status(verdict: dict[str, Any]) -> int:
    """Return the exit status of a run that has ended in order."""
    return 0 if verdict.get("reached", True) else NOT_REACHED


def _print_aim(measures: Measures, n_control: int, args: argparse.Namespace) -> None:
    """Print what the run is to reach, and what was chosen for it."""
    target = measures.target
    name = "probability" if target.measure == "probability" else "questions answered"
    print(f"aim: forget {name}, {target.forget_start:.3f}, to {target.aim:.3f} or below ({target.source})")
    if target.control_start is not None:
        kept = f"{target.control_start:.3f}, at or above {target.level:.3f} ({target.keep:.0%} of it)"
        print(f"keep: control {name}, {kept}")
    if 0 < n_control < FEW_CONTROL:
        print(
            f"{n_control} control row{'s' * (n_control > 1)} only: a rough measure of what is kept (--control DATA gives more)"
        )
    if target.measure == "probability" and measures.chance is not None and target.aim < measures.chance * (1 - CHANCE_NOISE):
        print(
            f"the aim is below chance, {measures.chance:.3f}: answers that unlikely are more conspicuous than those of a model "
            "that never saw them"
        )
    if args.curvature == "retain" and args.clip_target is not None:
        print(f"SOUL: curvature of the retain rows, {args.clip_target:.0%} of the coordinates clipped")


def _steps(records: list[Record]) -> str:
    return f"{len(records)} step{'s' * (len(records) != 1)}"


def _print_result(
    records: list[Record], seconds: float, answer: str, probability_before: float, probability_after: float
) -> None:
    if "stopped" in records[-1]:
        print(f"ended after step {len(records)}: {records[-1]['stopped']}")
    before_and_after = f"{probability_before:.3f} before, {probability_after:.3f} after"
    print(f"{_steps(records)} in {seconds:.1f} s; probability of {answer}: {before_and_after}")


def _config(args: argparse.Namespace) -> UnlearnConfig:
    names = [field.name for field in dataclasses.fields(UnlearnConfig) if hasattr(args, field.name)]
    return UnlearnConfig(**{name: getattr(args, name) for name in names}, method_options=_method_options(args))


def _check_ended(args: argparse.Namespace, output: pathlib.Path, config: UnlearnConfig, unrecorded: set[str]) -> None:
    """Raise unless the run that has ended in ``output`` has the options of this command. The error names the first difference.

    Options are compared with those in ``soul_config.json``, rows with their digests in ``data.json``. The model is compared by
    its name, since loading it would take longer than the comparison is worth.
    """
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    recorded = _read_json(output / RUN_FILE)
    if not recorded:
        remedy = "choose another output directory"
        raise argument_error("resume", "the options of the run that has ended", f"{output / RUN_FILE} without any", remedy)
    names = vars(args).keys() - {*unrecorded, *FREE_ON_RESUME, "data", "refusals"}
    saved = {name: recorded.get(name, defaults.get_default(name)) for name in names}
    now = {name: getattr(args, name) for name in names}
    old_defaults = {"aim": OFF, "keep_retain": UnlearnConfig.keep_retain}
    saved |= {name: value for name, value in old_defaults.items() if name in names and name not in recorded}
    saved["merge"] = bool(recorded.get("lora_rank")) and not (output / "adapter_config.json").is_file()
    if _is_same_path(str(saved["model"]), now["model"]):
        now["model"] = saved["model"]
    data = _read_json(output / DATA_FILE)
    digests = {name: counts["content"] for name, counts in data.items() if isinstance(counts, dict) and "content" in counts}
    if digests:  # the rows decide, wherever the data are now
        for name in ("forget", "retain", "control", "unseen", "untouched"):
            saved.pop(name, None)
            now.pop(name, None)
            source = getattr(args, name)
            if source is not None:
                now[f"content of {name}"] = digest(rows(source, name, drop=config.drop_unusable))
        saved |= {f"content of {name}": content for name, content in digests.items()}
    if config.refusals is not None:
        now["content of refusals"] = config.decisive()["refusals"]
    check_same(saved, now, "the run that has ended")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the dict in a JSON file, or {} if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    return content if isinstance(content, dict) else {}


def _is_same_path(name: str, other: str) -> bool:
    return name == other or (os.path.exists(name) and os.path.exists(other) and os.path.samefile(name, other))


def _adapters(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the arguments of `soul.models.add_adapters`, or None without adapters."""
    if args.lora_rank is None:
        for name, off in (
            ("lora_alpha", None),
            ("lora_dropout", 0.0),
            ("lora_targets", None),
            ("merge", False),
            ("load_in_4bit", False),
        ):
            if getattr(args, name) != off:
                raise argument_error(name, "nothing without --lora-rank", getattr(args, name), "pass --lora-rank N")
        return None
    if args.load_in_4bit and args.merge:
        raise cannot_merge_error()
    targets = names_of(args.lora_targets) if args.lora_targets else "all-linear"
    return dict(rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout, targets=targets)


def _method_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of the method, from ``--gamma``, ``--alpha``, ``--beta`` and ``--option``."""
    if args.method == MEMORIZE:
        return {}
    check_choice("method", args.method, tuple(METHODS))
    parameters = inspect.signature(METHODS[args.method]).parameters
    options = {name: getattr(args, name) for name in ("gamma", "alpha", "beta") if getattr(args, name) is not None}
    for assignment in args.option:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise argument_error("option", "NAME=VALUE", assignment, f"names for {args.method}: {', '.join(parameters)}")
        if name in options:
            raise argument_error(name, "one value", "two", "give it once")
        options[name] = _parsed(name, text, parameters[name].default) if name in parameters else text
    return options


def _parsed(name: str, text: str, default: object) -> object:
    """Return a text as a value of the type of the argument's default; for the default None, as a number."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        check_choice(name, text.lower(), ("true", "false"))
        return text.lower() == "true"
    is_whole = isinstance(default, int)
    try:
        value = int(text) if is_whole else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argument_error(name, "a whole number" if is_whole else "a number", repr(text), "check the options")
    return value
