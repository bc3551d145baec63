"""``soul init``: writes the options of a run of ``soul unlearn`` into a YAML file, with the reason beside each.

Model and data are read as far as a plan needs it (configuration, tokenizer, rows; no weights), so what the run would refuse is
refused here. The memory of the run decides between a few sets of options, the cheapest in time first (``SAVINGS``).
"""

import argparse
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from soul._extras import require
from soul.data.sources import rows
from soul.data.templates import CHAT, PLAIN
from soul.output.console import print_result
from soul.output.directory import check_output, check_writable
from soul.output.files import write_text
from soul.plan.cards import CARDS, Card, card_of
from soul.plan.planner import Plan
from soul.plan.run import RunInputs, plan_inputs, read_inputs, read_tokenizer
from soul.run.config import UnlearnConfig, parameter_dtype
from soul_kernels.errors import ArgumentError, argument_error

HELP = "write the options of a run of soul unlearn for a model and data, with the reason beside each"
HERE = "this machine"

# What saves memory: options, and the reason for them. Each set is tried if the one before does not fit.
SAVINGS: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, ""),
    ({"batch_size": 1, "accumulate": 4}, "one row at a time, in steps of four, since four at once do not fit"),
    ({"gradient_checkpointing": True}, "a third more time, since the activations of all layers do not fit"),
    ({"gradient_checkpointing": True, "state_dtype": "8bit"}, "two bytes for SOUL's two states, since longer ones do not fit"),
    (
        {"gradient_checkpointing": True, "state_dtype": "8bit", "state_offload": True},
        "SOUL's states in main memory, from which they pass over the GPU in every step, since they do not fit beside the rest",
    ),
    (
        {"gradient_checkpointing": True, "lora_rank": 16, "batch_size": 1, "accumulate": 4},
        "adapters, since the gradients of all parameters do not fit; --merge adds them to the weights",
    ),
    (
        {"gradient_checkpointing": True, "lora_rank": 16, "load_in_4bit": True, "batch_size": 1, "accumulate": 4},
        "adapters over a model in 4 bits (pip install 'soul-kernels[quant]'), since it does not fit in 16",
    ),
)
ADAPTED = ("lora_rank", "load_in_4bit")  # options among these that are none of `UnlearnConfig`


class Proposal(NamedTuple):
    """The options that are proposed beside model and data.

    Attributes:
        options: name -> value, those that differ from the defaults to save memory.
        reason: why, or "".
        plan: the `soul.plan.Plan` of the run with them.
    """

    options: dict[str, Any]
    reason: str
    plan: Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_NAME", help="directory or hub name of a causal LM")
    add("--forget", required=True, metavar="DATA", help="rows to forget, as soul unlearn takes them")
    add("--retain", metavar="DATA", help="rows to keep, in the same formats")
    add("--output", default="out/unlearned", metavar="DIR", help="output directory of the run (default: %(default)s)")
    add("--file", default="unlearn.yaml", metavar="FILE", help="the file to write, which must not exist (default: %(default)s)")
    add("--template", metavar="TEXT", help="plain, chat or a text with {question} and {answer} (default: chat where rows are "
        "questions and the tokenizer has a chat template)")  # fmt: skip
    add("--card", default=HERE, metavar="NAME", help=f"what the run must fit on: {', '.join(CARDS)}, or GB:GB/s:TFLOP/s "
        "(default: the GPU of this machine or, without one, its main memory)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    path = pathlib.Path(args.file)
    if os.path.lexists(path):
        raise argument_error("file", "a new file", f"{path}, which exists", "edit it, or choose another name")
    if not path.absolute().parent.is_dir():
        raise argument_error("file", "a file in a directory that exists", str(path), "make the directory first")
    check_writable("file", path)
    check_output(args.output)
    device = "cuda" if args.card != HERE or torch.cuda.is_available() else "cpu"
    card = _card_here() if args.card == HERE else card_of(args.card)
    require("yaml", "hf")  # without it nobody could run the file
    template = args.template or _template(args.model, args.forget)
    method = "ga" if args.retain is None else "npo"
    config = UnlearnConfig(method=method, template=template)
    inputs = read_inputs(args.model, args.forget, args.retain, config)
    proposal = _propose(inputs, config, card, device)
    named = {"model": args.model, "forget": args.forget, "retain": args.retain, "output": args.output}
    write_text(path, "".join(f"{line}\n" for line in _lines(named, config, inputs, proposal)))
    print_result(f"{path}: {_memory(proposal)}", f"read it, edit it, and start the run: soul unlearn --config {path}")


def _card_here() -> Card:
    """Return the memory of this machine's GPU or, without one, its main memory; the rates are not used."""
    memory = CARDS["h100"].memory
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    elif hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Card(HERE, memory, CARDS["h100"].bandwidth, CARDS["h100"].flops)


def _template(model: str, forget: str) -> str:
    """Return the template by which the model was most likely taught to answer."""
    _, first = rows(forget, "forget", drop=True)[0]
    has_chat = getattr(read_tokenizer(model), "chat_template", None) is not None
    return CHAT if has_chat and {"question", "answer"} <= first.keys() else PLAIN


def _propose(inputs: RunInputs, config: UnlearnConfig, card: Card, device: str) -> Proposal:
    """Return the first set of ``SAVINGS`` that fits on the card; if none does, the one that needs least."""
    proposals = []
    for options, reason in SAVINGS:
        if device == "cpu" and "state_offload" in options:  # the states are in main memory anyway
            continue
        rank = options.get("lora_rank")
        adapters = None if rank is None else {"rank": rank}
        fields = {name: value for name, value in options.items() if name not in ADAPTED}
        changed = dataclasses.replace(config, **fields)
        dtype = parameter_dtype("auto", changed, adapters, device)
        try:
            how = dict(card=card, dtype=dtype, adapters=adapters, load_in_4bit=options.get("load_in_4bit", False))
            plan = plan_inputs(inputs, changed, **how)
        except ArgumentError:  # a family without gradient checkpointing
            continue
        proposals.append(Proposal(options, reason, plan))
        if plan.fits:
            return proposals[-1]
    return min(proposals, key=lambda proposal: proposal.plan.peak_bytes)


def _memory(proposal: Proposal) -> str:
    """Return the memory that the run needs, in words."""
    plan = proposal.plan
    memory = f"{plan.peak_bytes / 1e9:.1f} GB of {plan.case.card.memory / 1e9:.1f} ({plan.case.card.name})"
    if plan.fits:
        return f"the run needs {memory}, by the shapes of the model"
    return f"the run does not fit: {memory}; take a larger card, or several by torchrun"


def _lines(named: dict[str, str | None], config: UnlearnConfig, inputs: RunInputs, proposal: Proposal) -> Iterator[str]:
    """Yield the lines of the file."""
    shape = inputs.shape
    yield "# Options of a run of soul unlearn, proposed by soul init. Edit them, and start the run:"
    yield "#     soul unlearn --config FILE"
    yield "# Every option of `soul unlearn --help` can stand here; those on the command line win."
    yield ""
    yield _option("model", named["model"], f"{shape.numel:,} parameters in {shape.layers} layers")
    yield _option("forget", named["forget"], _rows(inputs, "forget", config))
    if named["retain"] is None:
        yield "# retain: FILE  # rows to keep: without them much else is lost; the method can then be npo"
    else:
        yield _option("retain", named["retain"], _rows(inputs, "retain", config))
    yield _option("output", named["output"], "model, tokenizer and log; new or empty")
    yield ""
    yield _option("template", config.template, TEMPLATE_REASONS.get(config.template, "as given"))
    yield _option("max_length", config.max_length, "tokens of a row, prompt included")
    yield ""
    yield _option("method", config.method, METHOD_REASONS[config.method])
    yield _option("optimizer", config.optimizer, "second-order; adamw is the baseline to compare with")
    yield "# lr and alpha are left out on purpose: without them the run aims at chance level for the rows to forget, keeps the"
    yield "# others, and chooses both by itself. With one of them it takes exactly the steps that these options say."
    yield "# lr: 1e-5"
    yield "# alpha: 1"
    yield ""
    yield f"# Memory: {_memory(proposal)}."
    if proposal.reason:
        yield f"# {proposal.reason[0].upper()}{proposal.reason[1:]}."
    options = {"batch_size": config.batch_size, **proposal.options}
    for name, value in options.items():
        yield _option(name, value, SAVING_REASONS[name])
    yield _option("seed", config.seed, "order of the rows: the same seed gives the same run")


TEMPLATE_REASONS = {
    CHAT: "the tokenizer's chat template, by which the model was taught to answer",
    PLAIN: "rows that are texts stay as they are; a question and its answer become two lines",
}
METHOD_REASONS = {
    "npo": "bounded: what is forgotten already gets no more gradient, unlike ga and graddiff",
    "ga": "there are no rows to keep, which the other methods need; it is unbounded, so few steps are enough",
}
SAVING_REASONS = {
    "batch_size": "rows to forget in a micro-batch, and as many to keep",
    "accumulate": "micro-batches in a step",
    "gradient_checkpointing": "one hidden state a layer is kept, the rest is computed again",
    "state_dtype": "one byte for an element of each of SOUL's states",
    "state_offload": "the same numbers, and more time",
    "load_in_4bit": "nf4 of bitsandbytes, which the adapters learn to live with",
    "lora_rank": "adapters of this rank are trained in place of the model",
}


def _rows(inputs: RunInputs, name: str, config: UnlearnConfig) -> str:
    """Return the numbers of rows and tokens of a set, in words."""
    sequences = {"forget": inputs.forget, "retain": inputs.retain}[name]
    labelled = sum(sequence.n_labels for sequence in sequences)
    longest = max(len(sequence.input_ids) for sequence in sequences)
    text = (
        f"{inputs.counts[name].summary(config.max_length)}; {labelled:,} tokens in the answers; the longest row has {longest}"
    )
    return text


def _option(name: str, value: object, reason: str) -> str:
    """Return the line of an option, with the reason behind it."""
    return f"{name}: {_scalar(value)}  # {reason}"


def _scalar(value: object) -> str:
    """Return a value as YAML that `soul.commands.config_file` reads as the same value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    is_plain = re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./@:-]*", text) and not text.endswith(":")
    if is_plain and text.lower() not in ("true", "false", "null"):
        return text
    return require("yaml", "hf").safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).rstrip("\n")
