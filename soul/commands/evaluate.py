"""``soul evaluate``: TOFU's metrics."""

import dataclasses
import sys

from soul._extras import require
from soul.commands._place import add_place
from soul.commands._template import add_template
from soul.evaluate.metrics import MIN_K
from soul.output.console import print_result
from soul_kernels.errors import argument_error

HELP = "TOFU's metrics, of a model or of evaluation logs"


def add_arguments(parser):
    """Declares the options."""
    what = parser.add_argument_group("what")
    either = what.add_mutually_exclusive_group(required=True)
    either.add_argument("--from-logs", metavar="DIR", help="logs in TOFU's layout; no model, no GPU")
    either.add_argument(
        "--model", metavar="DIR_OR_NAME", help="directory or hub name of a causal LM; needs --data and --output"
    )
    what.add_argument("--retain-logs", metavar="DIR", help="logs of a model that never saw the forget set: for forget quality")
    what.add_argument("--json", metavar="FILE", help="new file for the numbers")
    how = parser.add_argument_group("with --model")
    how.add_argument("--data", metavar="DIR", help="directory with TOFU's *_perturbed.jsonl, or the word tofu for the hub's")
    how.add_argument("--output", metavar="DIR", help="new or empty directory for the logs, which --from-logs reads")
    how.add_argument("--retain-model", metavar="DIR_OR_NAME", help="in place of --retain-logs; its log goes to OUTPUT/retain")
    how.add_argument("--holdout", metavar="DATA", help="path or name of rows that the model never saw, as --forget "
                     "of soul unlearn: for the AUC of Min-K and Min-K++")  # fmt: skip
    how.add_argument("--split", default="forget10", metavar="NAME", help="what was to be forgotten (default: %(default)s)")
    how.add_argument("--rows", type=int, metavar="N", help="the first of each file (default: all; TOFU's own logs: 300)")
    add_template(how)
    how.add_argument("--min-k", type=float, default=MIN_K, metavar="X", help="part of the tokens (default: %(default)s)")
    how.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="of a generated answer (default: %(default)s)"
    )
    how.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens of a sequence (default: %(default)s)")
    how.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences a batch (default: %(default)s)")
    how.add_argument("--dtype", default="float32", metavar="NAME", help="of the parameters (default: %(default)s)")
    add_place(how)


def run(args):
    """Runs the command."""
    from soul.evaluate import logs as log_files
    from soul.evaluate.metrics import summarize
    from soul.output.directory import check_writable

    for name in ("scipy.stats", *(("sklearn.metrics",) if args.holdout else ())):  # before anything takes its time
        require(name, "eval")
    target = None if args.json is None else log_files.check_new_file(args.json, "json")
    if target is not None:
        check_writable("json", target)
    if args.from_logs is not None:
        for name in ("data", "output", "retain_model", "holdout"):
            if getattr(args, name) is not None:
                raise argument_error(name, "nothing beside --from-logs", getattr(args, name), "it goes with --model")
        columns, retain, written, counts = log_files.read_logs(args.from_logs), None, {}, {}
        if args.retain_logs is not None:
            retain = log_files.read_retain_log(args.retain_logs, len(columns["forget"]["avg_gt_loss"]))
    else:
        columns, retain, written, counts = _run_model(args, target)
    summary = summarize(columns, retain)
    lines = [f"{name:36} {value:.6g}" for name, value in summary.items()]
    if retain is None:
        lines.append("no forget quality: it needs a retain model's logs (--retain-logs)")
    try:
        for directory, logs in written.items():
            log_files.write_logs(directory, logs)
        for path, told in counts.items():
            log_files.write_json(path, told)
        if target is not None:
            log_files.write_json(target, summary)
    except BaseException:  # a full disk must not cost the numbers
        print(*lines, sep="\n")
        raise
    if target is None:
        print_result(*lines)
    else:  # they are in the file
        print(*lines, sep="\n")


def _run_model(args, target):
    """Columns of a model's logs, of the retain model's, and what to write: directory -> logs, and file -> counts."""
    import functools
    import pathlib

    from soul.data.sources import examples, read_questions, rows
    from soul.data.templates import Template
    from soul.evaluate import logs as log_files
    from soul.evaluate.model import EvaluateConfig, retain_log, tofu_logs
    from soul.models import causal_lm
    from soul.output.directory import DATA_FILE, check_output

    for name in ("data", "output"):
        if getattr(args, name) is None:
            raise argument_error(name, "a directory beside --model", "none", f"pass --{name}")
    if args.retain_logs is not None and args.retain_model is not None:
        raise argument_error("retain_model", "either it or --retain-logs", "both", "pass one")
    if args.rows is not None and args.rows < 1:
        raise argument_error("rows", "a positive whole number", args.rows, "leave it out to take all")
    config = EvaluateConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(EvaluateConfig)})
    output = check_output(args.output)
    if target is not None and log_files.in_the_way(target, (output, output / "retain")):
        raise argument_error("json", "a file beside the logs", str(target), "choose another name")
    require("rouge_score", "eval")
    files = {"forget": args.split, "retain": "retain", "real_authors": "real_authors", "world_facts": "world_facts"}
    sources = {name: f"tofu:{file}_perturbed" if args.data == "tofu" else pathlib.Path(args.data) / f"{file}_perturbed.jsonl"
               for name, file in files.items()}  # fmt: skip
    sets = {name: read_questions(source)[: args.rows] for name, source in sources.items()}
    held_out = rows(args.holdout) if args.holdout else []
    retain, written = None, {}
    if args.retain_logs is not None:
        retain = log_files.read_retain_log(args.retain_logs, len(sets["forget"]))
    load = functools.partial(causal_lm.load, dtype=args.dtype, device=causal_lm.pick_device(args.device))
    if args.retain_model is not None:  # first, and gone before the other one comes
        log = retain_log(*load(args.retain_model), sets["forget"], config)
        retain = log_files.columns(log, "retain model, forget", log_files.RATIO)
        written[output / "retain"] = {"forget": log}
    model, tokenizer = load(args.model)
    holdout = examples(held_out, Template(config.template, tokenizer, config.system)) if held_out else []
    counts, progress = {}, functools.partial(print, file=sys.stderr)
    logs = tofu_logs(model, tokenizer, sets, config, holdout=holdout, progress=progress, counts=counts)
    columns = log_files.check_logs(logs, {name: f"model, {name}" for name in logs})
    told = {name: dataclasses.asdict(count) for name, count in counts.items()}
    return columns, retain, {output: logs, **written}, {output / DATA_FILE: told}
