"""The model card of a run, ``README.md`` beside the saved model: what was forgotten, how, with which figures and limits.

It is made of the files in the output directory and rendered like the report (`soul.report`). Unlike the report it is meant for
strangers: it has no row of the data, no answer of the model, and no directory of the machine. Files are named without their
directories.
"""

import os
import pathlib
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from soul._extras import require
from soul.output.directory import CARD_FILE
from soul.output.files import replace_text
from soul.report import markdown
from soul.report.page import Block, Commands, Figure, Page, Pairs, Prose, Section, Table, Text
from soul.report.records import Run
from soul.report.run import run_page
from soul.report.words import counted, number, options_of, probability
from soul_kernels import __version__

TAG = "soul-kernels"  # of every card of ours
MEMORIZE = "memorize"  # the method of a run that learns its rows
# The options that a card shows. None of them holds a path.
OPTIONS = (
    "method", "optimizer", "aim", "until_prob", "lr", "gamma", "alpha", "beta", "option", "method_options",
    "epochs", "batch_size", "accumulate", "curvature", "clip_target", "lora_rank", "lora_alpha", "merge", "max_length",
    "template", "dtype", "seed",
)  # fmt: skip
LIBRARIES = ("torch", "transformers", "peft")
LIMITS = """
- **Only this was measured**: the probability that the model gives to the answers of the rows above, in the words of these rows.
- **What was forgotten may still be there.** Other words, another language, a question about the same fact from another side
  or a longer conversation may bring it out. So may training on related texts, and rounding of the weights to fewer bits.
- **What was to be kept may have suffered elsewhere.** The figure for kept rows is about rows of that kind. General abilities,
  safety and bias were not evaluated.
- **This is no proof of erasure.** Nothing here says that a text cannot be extracted, or that a legal duty to delete it is
  fulfilled.
- Limits and license of the model before unlearning still hold.
"""
MEMORIZE_LIMITS = """
- **The model is made to repeat these rows.** It is a starting point or a yardstick for unlearning, and no assistant.
- **Only this was measured**: the probability that the model gives to the answers of these rows. What it lost of its other
  abilities was not evaluated, nor were safety and bias.
- Limits and license of the model before fine-tuning still hold.
"""


def write_card(
    directory: pathlib.Path, *, numbers: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None
) -> pathlib.Path:
    """Write the card of the run in an output directory as ``README.md``, and return its path.

    Args:
        directory: the output directory, with a saved model.
        numbers: what the notes of the run are to have beside their content, such as ``forget_prob``, before and after.
        options: options of the run that ``soul_config.json`` does not have, as in a run from Python.

    Raises:
        MissingExtra: huggingface_hub is not installed.
        OSError: the file could not be written.
    """
    run = Run(directory)
    run.notes |= numbers or {}
    run.options = {**(options or {}), **run.options}
    replace_text(directory / CARD_FILE, f"---\n{_metadata(run)}\n---\n\n{markdown.render(_page(run))}")
    return directory / CARD_FILE


def has_card(directory: pathlib.Path) -> bool:
    """Tell whether a directory has a card of ours, perhaps edited since. peft saves adapters with an empty form for a card."""
    return TAG in (_front_matter(directory / CARD_FILE).get("tags") or ())


def hub_name(model: str) -> str | None:
    """Return a model's name if it is one on the hub, and None for a directory."""
    utils = require("huggingface_hub.utils", "hf")
    try:
        utils.validate_repo_id(model)
    except utils.HFValidationError:
        return None
    return None if os.path.exists(model) else model


def without_directories(source: str) -> str:
    """Return the last part of a path; a data set by name stays as it is, without the directory behind an "@"."""
    if re.match(r"[a-z]{2,}:", source):
        return source.partition("@")[0]
    return re.split(r"[\\/]", source.rstrip("\\/"))[-1]


def _metadata(run: Run) -> str:
    """Return the YAML by which the hub finds and sorts the model."""
    options = run.options
    model = str(options.get("model") or "")
    theirs = _card_of(model)
    base = hub_name(model) if model else None
    ancestor = theirs.get("base_model")  # of a model in a directory, which the hub cannot know
    tags = [TAG, *([] if options.get("method") == MEMORIZE else ["unlearning"])]
    tags += [str(options[name]) for name in ("method", "optimizer") if options.get(name)]
    data = require("huggingface_hub", "hf").ModelCardData(
        base_model=base or (ancestor if isinstance(ancestor, str) else None),
        library_name="peft" if (run.directory / "adapter_config.json").is_file() else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        **{key: theirs[key] for key in ("license", "license_name", "license_link") if isinstance(theirs.get(key), str)},
    )
    return str(data.to_yaml())


def _card_of(model: str) -> dict[str, Any]:
    """Return the metadata in a model's own card: in its directory, or in the cache of downloads; {} if there is none."""
    if os.path.isdir(model):
        return _front_matter(pathlib.Path(model) / CARD_FILE)
    if not model or hub_name(model) is None:
        return {}
    cached = require("huggingface_hub", "hf").try_to_load_from_cache(model, CARD_FILE)
    return _front_matter(pathlib.Path(cached)) if isinstance(cached, str) else {}


def _front_matter(path: pathlib.Path) -> dict[str, Any]:
    """Return the metadata at the head of a card; {} if there is no card, or a broken one."""
    try:
        return require("huggingface_hub", "hf").metadata_load(path) or {}
    except Exception:  # of the file, or of YAML in the hands of others
        return {}


def _page(run: Run) -> Page:
    learned = run.options.get("method") == MEMORIZE
    report = run_page(run)
    model = str(run.options.get("model") or "a model")
    base = hub_name(model) or without_directories(model)
    figures = report.figures
    if learned:
        ends = run.ends("forget")
        value = "" if ends is None else f"{probability(ends[0])} → {probability(ends[1])}"
        known = (Figure("Probability of the answers", value, "before and after"),) if value else ()
        figures = (*known, *(figure for figure in figures if not figure.label.endswith("probability")))
    sections = [
        Section("What it was to learn" if learned else "What it was to forget, and to keep", tuple(_sets(run, learned))),
        Section("How", tuple(_how(run))),
        Section("Limits", (Prose(MEMORIZE_LIMITS if learned else LIMITS),)),
        Section("How to load and measure it", (_commands(run, base, learned),)),
    ]
    return Page(
        title=f"{base.rpartition('/')[2]}, {'fine-tuned' if learned else 'after unlearning'}",
        subtitle=f"{base}, trained by soul-kernels {__version__} to {'know' if learned else 'forget'} some rows.",
        verdict=None if learned else report.verdict,
        figures=figures,
        sections=tuple(sections),
    )


def _sets(run: Run, learned: bool) -> Iterator[Block]:
    """Yield the sources of the rows, and how many there are. The rows themselves are what the model is to forget."""
    titles = {"forget": "learned" if learned else "to forget", "retain": "to keep", "control": "control, never trained on",
              "unseen": "unseen, for the aim"}  # fmt: skip
    rows = []
    for name, title in titles.items():
        counts = run.data.get(name)
        if isinstance(counts, dict) and "rows" in counts:
            rows.append((title, _source(run, name), number(counts["rows"])))
    if rows:
        yield Table(("rows", "from", "number"), tuple(rows), plain=True)
    yield Text("The rows are not quoted here" + ("." if learned else ", since they are what is to be forgotten."))


def _source(run: Run, name: str) -> str:
    """Return the file names of a set, or its names on the hub."""
    sources = run.options.get(name) or (run.options.get("data") if name == "forget" else None)
    if not sources:
        return "held out of the rows to keep" if name == "control" else "not recorded"
    return ", ".join(without_directories(str(source)) for source in (sources if isinstance(sources, list) else [sources]))


def _how(run: Run) -> Iterator[Block]:
    options = {name: value for name in OPTIONS if (value := run.options.get(name)) is not None and value is not False}
    if run.verdict:
        yield Text("The run was given an aim. It chose the learning rate, and moved alpha, by itself; these are its options:")
    if run.options.get("system"):
        yield Text("Questions were asked with a system prompt, which is not quoted here.")
    versions = {name: run.notes.get("environment", {}).get(name) for name in LIBRARIES}
    steps = {"steps": counted(int(run.steps[-1]["step"]), "step")} if run.steps else {}
    yield Pairs(options_of({**options, **steps, TAG: __version__, **versions}))


def _commands(run: Run, base: str, learned: bool) -> Commands:
    name = "THIS"
    template = run.options.get("template")
    words = f" --template {shlex.quote(str(template))}" if template in ("chat", "plain") else ""
    commands = [
        (f"In Python. {name} stands for the name of this repository, or for a directory with its files:",
         f"from soul.models import load\nmodel, tokenizer = load({name!r})"),
        ("Ask it and the model before it the same questions:", f"soul ask {name} --against {shlex.quote(base)}{words}"),
        ("Measure it with TOFU's metrics, of a directory with TOFU's files:",
         f"soul evaluate --model {name} --data DIR --output OUT{words}"),
    ]  # fmt: skip
    if learned:
        commands.append(("Make it forget:", f"soul unlearn --model {name} --forget FILE --retain FILE --output OUT{words}"))
    return Commands(tuple(commands))
