"""The ``soul`` command: unlearn, evaluate, study, demo, info.

Bad input ends with a message and exit status 2, before anything is written.
"""

import argparse
import dataclasses
import inspect
import json
import math
import sys
import time

from soul import __version__
from soul._extras import MissingExtra, require
from soul.checkpoint import Stopped
from soul.data import TEMPLATE
from soul.losses import OBJECTIVES
from soul.metrics import MIN_K
from soul.unlearn import Diverged
from soul_kernels._checks import ArgumentError, argument_error, check_choice


def main(argv=None):
    """Runs the command; returns the exit status: 0, 2 for bad input or a missing extra, 1 for a run that failed, 143 for one
    that SIGTERM has stopped and ``--resume`` continues.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ArgumentError, MissingExtra) as error:
        print(f"soul {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"soul {args.command}: interrupted; no model was saved", file=sys.stderr)
        return 130
    except Stopped as error:
        print(f"soul {args.command}: {error}", file=sys.stderr)
        return 128 + 15  # as of a process that SIGTERM ended
    except (Diverged, OSError) as error:  # OSError: a directory that cannot be written, a full disk
        print(f"soul {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="soul", description="Second-order unlearning of large language models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    unlearn = commands.add_parser("unlearn", help="make a Hugging Face causal language model forget a file of text")
    unlearn.set_defaults(run=_unlearn)
    need = unlearn.add_argument_group("what")
    need.add_argument("--model", required=True, metavar="DIR_OR_NAME", help="directory or hub name of a causal LM")
    need.add_argument("--forget", required=True, metavar="FILE", help="JSON lines: question/answer, prompt/completion or text")
    need.add_argument("--retain", metavar="FILE", help="JSON lines to keep; needed unless the method has no retain term")
    need.add_argument("--output", required=True, metavar="DIR", help="new or empty directory for model, tokenizer and log")
    how = unlearn.add_argument_group("how")
    how.add_argument("--method", default="graddiff", metavar="NAME", help=f"{', '.join(OBJECTIVES)} (default: %(default)s)")
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
    how.add_argument("--warmup-ratio", type=float, default=0.1, metavar="X", help="part of the steps (default: %(default)s)")
    how.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens of a sequence (default: %(default)s)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="data order and refusals (default: %(default)s)")
    how.add_argument("--dtype", default="float32", metavar="NAME", help="of the parameters: float32 (bf16 autocast on a GPU), "
                     "or bfloat16, with 8 more bits in soul's state; adamw then loses most updates below lr 1e-4")  # fmt: skip
    how.add_argument(
        "--eval-every", type=int, default=0, metavar="N", help="steps from one evaluation to the next (default: none)"
    )
    how.add_argument("--stop-forget-prob", type=float, metavar="X", help="end once the probability of a forget answer is <= X")
    how.add_argument("--stop-retain-prob", type=float, metavar="X", help="end once that of a retain answer is below X")
    how.add_argument("--save-every", type=int, default=500, metavar="N", help="steps from one checkpoint to the next; 0: only "
                     "when SIGTERM comes (default: %(default)s)")  # fmt: skip
    how.add_argument("--keep", type=int, default=2, metavar="N", help="newest checkpoints that stay (default: %(default)s)")
    how.add_argument("--resume", action="store_true", help="go on after the newest checkpoint in --output, bit for bit; all "
                     "other options as before. Without one, from the start")  # fmt: skip
    _where(how)

    evaluate = commands.add_parser("evaluate", help="TOFU's metrics, of a model or of evaluation logs")
    evaluate.set_defaults(run=_evaluate)
    what = evaluate.add_argument_group("what")
    either = what.add_mutually_exclusive_group(required=True)
    either.add_argument("--from-logs", metavar="DIR", help="logs in TOFU's layout; no model, no GPU")
    either.add_argument(
        "--model", metavar="DIR_OR_NAME", help="directory or hub name of a causal LM; needs --data and --output"
    )
    what.add_argument("--retain-logs", metavar="DIR", help="logs of a model that never saw the forget set: for forget quality")
    what.add_argument("--json", metavar="FILE", help="new file for the numbers")
    how = evaluate.add_argument_group("with --model")
    how.add_argument("--data", metavar="DIR", help="directory with TOFU's *_perturbed.jsonl")
    how.add_argument("--output", metavar="DIR", help="new or empty directory for the logs, which --from-logs reads")
    how.add_argument("--retain-model", metavar="DIR_OR_NAME", help="in place of --retain-logs; its log goes to OUTPUT/retain")
    how.add_argument("--holdout", metavar="FILE", help="JSON lines that the model never saw: for the AUC of Min-K and Min-K++")
    how.add_argument("--split", default="forget10", metavar="NAME", help="what was to be forgotten (default: %(default)s)")
    how.add_argument("--rows", type=int, metavar="N", help="the first of each file (default: all; TOFU's own logs: 300)")
    how.add_argument("--template", default=TEMPLATE, metavar="TEXT", help="the text that is put to the model, with {question} "
                     "and {answer} (default: as in training, 'Question: ...' and 'Answer: ...' on two lines)")  # fmt: skip
    how.add_argument("--min-k", type=float, default=MIN_K, metavar="X", help="part of the tokens (default: %(default)s)")
    how.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="of a generated answer (default: %(default)s)"
    )
    how.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens of a sequence (default: %(default)s)")
    how.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences a batch (default: %(default)s)")
    how.add_argument("--dtype", default="float32", metavar="NAME", help="of the parameters (default: %(default)s)")
    _where(how)

    study = commands.add_parser("study", help="AdamW against SOUL on TOFU, with a small model trained from scratch")
    study.set_defaults(run=_study)
    study.add_argument("--data", required=True, metavar="DIR", help="directory with TOFU's forget10.jsonl and retain90.jsonl")
    study.add_argument("--authors", type=int, default=40, metavar="N", help="of TOFU's 200, one in ten to forget (default: 40)")
    study.add_argument("--output", default="out/study", metavar="DIR", help="new or empty directory (default: %(default)s)")
    study.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)")
    _where(study)

    demo = commands.add_parser("demo", help="the whole story in minutes on a CPU, without a download")
    demo.set_defaults(run=_demo)
    demo.add_argument("--output", default="out/demo", metavar="DIR", help="new or empty directory (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)")
    _where(demo)

    info = commands.add_parser("info", help="versions, devices and backends: what to put into a bug report")
    info.set_defaults(run=_info)
    return parser


def _where(group):
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: %(default)s)")
    group.add_argument("--backend", default="auto", metavar="NAME", help="auto, triton or reference (default: %(default)s)")


def _unlearn(args):
    import torch

    from soul import models
    from soul.checkpoint import Checkpoints, save_model
    from soul.data import read_jsonl
    from soul.evaluate import answer_probability
    from soul.unlearn import RUN_FILE, UnlearnConfig, check_output, encode_for, prepare, unlearn

    fields = [field.name for field in dataclasses.fields(UnlearnConfig) if hasattr(args, field.name)]
    config = UnlearnConfig(
        **{name: getattr(args, name) for name in fields},
        method_options=_method_options(args),
    )
    config.objective()
    output = check_output(args.output, args.resume)
    checkpoints = Checkpoints(output / "checkpoints", every=args.save_every, keep=args.keep, resume=args.resume)
    require("transformers", "hf")
    if args.resume and (output / "config.json").is_file() and not checkpoints.steps():
        print(f"{output}: this run has ended, and there is nothing to resume")
        return
    forget = read_jsonl(args.forget)
    retain = read_jsonl(args.retain) if args.retain else []
    model, tokenizer = models.load(args.model, dtype=args.dtype, device=models.pick_device(args.device))
    prepare(model, tokenizer, forget, retain, config)
    answers = encode_for(model, tokenizer, forget, config, "forget")  # what can be wrong with the input has been found now

    output.mkdir(parents=True, exist_ok=True)
    if not (output / RUN_FILE).exists():
        (output / RUN_FILE).write_text(json.dumps(vars(args) | {"run": None}, indent=1, default=str) + "\n")
    before = answer_probability(model, answers, batch_size=args.batch_size, backend=args.backend)
    begun = time.perf_counter()
    torch.manual_seed(args.seed)  # of dropout
    try:
        records = unlearn(model, tokenizer, forget, retain, config, log=output / "log.jsonl", checkpoints=checkpoints)
        with checkpoints.listening():  # a model that is there is saved, whatever comes
            save_model(model, tokenizer, output)
            checkpoints.remove()
    except (OSError, Stopped) as error:
        raise type(error)(f"{error}; {checkpoints.advice()}") from error
    seconds = time.perf_counter() - begun
    after = answer_probability(model, answers, batch_size=args.batch_size, backend=args.backend)
    if "stopped" in records[-1]:
        print(f"ended after step {len(records)}: {records[-1]['stopped']}")
    print(f"{len(records)} steps in {seconds:.1f} s; probability of a forget answer: {before:.3f} before, {after:.3f} after")
    print(f"model, tokenizer and log.jsonl: {output}")


def _method_options(args):
    """The keyword arguments of the method, from the options of their own and from ``--option``."""
    check_choice("method", args.method, tuple(OBJECTIVES))
    known = inspect.signature(OBJECTIVES[args.method]).parameters
    options = {name: getattr(args, name) for name in ("gamma", "alpha", "beta") if getattr(args, name) is not None}
    for given in args.option:
        name, equals, text = given.partition("=")
        if not equals:
            raise argument_error("option", "NAME=VALUE", given, f"names for {args.method}: {', '.join(known)}")
        if name in options:
            raise argument_error(name, "one value", "two", "give it once")
        options[name] = _parsed(name, text, type(known[name].default)) if name in known else text
    return options


def _parsed(name, text, kind):
    """A text as a value of the type that the argument's default has."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if kind is not str and not math.isfinite(value):
        expected = "a whole number" if kind is int else "a number"
        raise argument_error(name, expected, repr(text), "check the options")
    return value


def _evaluate(args):
    from soul import eval_logs
    from soul.metrics import summarize

    for name in ("scipy.stats", *(("sklearn.metrics",) if args.holdout else ())):  # before anything takes its time
        require(name, "eval")
    target = None if args.json is None else eval_logs.check_new_file(args.json, "json")
    if args.from_logs is not None:
        for name in ("data", "output", "retain_model", "holdout"):
            if getattr(args, name) is not None:
                raise argument_error(name, "nothing beside --from-logs", getattr(args, name), "it goes with --model")
        columns, retain, written = eval_logs.read_logs(args.from_logs), None, {}
        if args.retain_logs is not None:
            retain = eval_logs.read_retain_log(args.retain_logs, len(columns["forget"]["avg_gt_loss"]))
    else:
        columns, retain, written = _run_model(args, target)
    summary = summarize(columns, retain)
    for directory, logs in written.items():
        eval_logs.write_logs(directory, logs)
    if target is not None:
        eval_logs.write_json(target, summary)
    for name, value in summary.items():
        print(f"{name:36} {value:.6g}")
    if retain is None:
        print("no forget quality: it needs a retain model's logs (--retain-logs)")


def _run_model(args, target):
    """Columns of a model's logs, of the retain model's, and what to write: directory -> logs."""
    import functools
    import pathlib

    from soul import eval_logs, models
    from soul.data import read_jsonl, read_questions
    from soul.evaluate import EvaluateConfig, retain_log, tofu_logs
    from soul.unlearn import check_output

    for name in ("data", "output"):
        if getattr(args, name) is None:
            raise argument_error(name, "a directory beside --model", "none", f"pass --{name}")
    if args.retain_logs is not None and args.retain_model is not None:
        raise argument_error("retain_model", "either it or --retain-logs", "both", "pass one")
    if args.rows is not None and args.rows < 1:
        raise argument_error("rows", "a positive whole number", args.rows, "leave it out to take all")
    config = EvaluateConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(EvaluateConfig)})
    output = check_output(args.output)
    if target is not None and eval_logs.in_the_way(target, (output, output / "retain")):
        raise argument_error("json", "a file beside the logs", str(target), "choose another name")
    require("rouge_score", "eval")
    files = {"forget": args.split, "retain": "retain", "real_authors": "real_authors", "world_facts": "world_facts"}
    sets = {name: read_questions(pathlib.Path(args.data) / f"{file}_perturbed.jsonl")[: args.rows]
            for name, file in files.items()}  # fmt: skip
    holdout = read_jsonl(args.holdout, config.template) if args.holdout else []
    retain, written = None, {}
    if args.retain_logs is not None:
        retain = eval_logs.read_retain_log(args.retain_logs, len(sets["forget"]))
    load = functools.partial(models.load, dtype=args.dtype, device=models.pick_device(args.device))
    if args.retain_model is not None:  # first, and gone before the other one comes
        log = retain_log(*load(args.retain_model), sets["forget"], config)
        retain = eval_logs.columns(log, "retain model, forget", eval_logs.RATIO)
        written[output / "retain"] = {"forget": log}
    logs = tofu_logs(*load(args.model), sets, config, holdout=holdout, progress=functools.partial(print, file=sys.stderr))
    columns = eval_logs.check_logs(logs, {name: f"model, {name}" for name in logs})
    return columns, retain, {output: logs, **written}


def _study(args):
    from soul.study import StudyConfig, check_ready, run_study, tofu_data

    config = StudyConfig(seed=args.seed, device=args.device, backend=args.backend)
    output = check_ready(args.output, config)
    forget, retain = tofu_data(args.data, args.authors)
    note = f"TOFU, {args.authors} of its 200 authors: {len(forget)} rows to forget, {len(retain)} to retain."
    _report(*run_study(forget, retain, output, config, title="Unlearning TOFU", data_note=note))


def _demo(args):
    from soul.data import read_jsonl
    from soul.study import DEMO, check_ready, demo_data, run_study

    config = dataclasses.replace(DEMO, seed=args.seed, device=args.device, backend=args.backend)
    output = check_ready(args.output, config)
    output.mkdir(parents=True, exist_ok=True)
    forget, retain = (read_jsonl(path) for path in demo_data(output, seed=args.seed))
    note = f"Fictitious authors made up from seed {args.seed}: {len(forget)} rows to forget, {len(retain)} to retain."
    _report(*run_study(forget, retain, output, config, title="Unlearning fictitious authors", data_note=note))


def _report(rows, report):
    from soul.study import table

    print(f"\n{table(rows)}\n\nreport:   {report}")
    print(f"pictures: {report.parent / 'tradeoff.png'}, {report.parent / 'curves.png'}")


def _info(args):
    import platform

    import torch

    from soul_kernels._launch import has_triton, interpreting, resolve_backend, triton

    print(f"soul-kernels {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, triton {triton.__version__ if has_triton() else 'not installed'}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs: {', '.join(gpus) or 'none'}")
    device = "cuda" if gpus else "cpu"
    backend = resolve_backend("auto", torch.empty(0, device=device))
    print(f"backend of tensors on {device}: {backend}{' (interpreted)' if interpreting() else ''}")
    for extra, modules in {
        "hf": ("transformers", "tokenizers"),
        "eval": ("rouge_score", "scipy", "sklearn"),
        "plots": ("matplotlib",),
    }.items():
        for module in modules:
            try:
                print(f"{module} {getattr(require(module, extra), '__version__', 'installed')}")
            except MissingExtra as error:
                print(error)


if __name__ == "__main__":
    sys.exit(main())
