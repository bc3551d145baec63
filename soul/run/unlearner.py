"""A whole run in Python: model and data by name, adapters, the loop, and the files in the output directory.

`Unlearner` reads and checks everything when it is made; `Unlearner.run` takes the steps. In several processes each one reads
everything but the weights, which the first one reads; they compare what they have read, and only then is the model cut into
shards. An output directory gets its description (`soul_config.json`, `data.json`) before the first step, the log during the
run, and the model at the end.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO, cast

import torch

from soul.checkpoint.format import checksum, versions
from soul.checkpoint.local import Checkpoints, Stopped, has_ended
from soul.checkpoint.saving import save_model
from soul.data import sources
from soul.data.examples import Counts, Example, answerable
from soul.data.facts import Fact, facts, read_paraphrases
from soul.data.templates import Template
from soul.distributed.processes import Processes, check_layout, check_shards, check_supported, shard
from soul.distributed.scatter import shard_from_first
from soul.models import causal_lm
from soul.models.adapters import add_adapters
from soul.models.encoding import encode_for
from soul.models.loading import is_stored_in_codes, load, pick_device
from soul.models.quantized import cannot_merge_error, check_codes, is_quantized
from soul.models.ref_model import base_weights, configuration, digest
from soul.output.directory import (
    CHECKPOINTS,
    DATA_FILE,
    LOG_FILE,
    RUN_FILE,
    VERDICT_FILE,
    check_complete,
    check_output,
    occupy,
    restore,
    write_in_place,
)
from soul.output.progress import shown
from soul.run.config import LAYOUT, UnlearnConfig, parameter_dtype
from soul.run.loop import Record, unlearn
from soul.run.measures import AimData, Measures, split_control, split_untouched
from soul.run.notes import Notes, check_samples
from soul.run.prepare import prepare
from soul.run.trackers import Trackers, check_trackers
from soul_kernels.errors import argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Path = str | os.PathLike[str]
Source = Path | Iterable[Any]  # a path, a name, rows, or a list of Example
Rows = list[Any]  # the content of a source: (location, dict) for each row, or a list of Example


class Unlearner:
    """Makes a model forget, as the ``soul unlearn`` command does::

        config = soul.UnlearnConfig(method="npo", lr=1e-5)
        unlearner = soul.Unlearner("meta-llama/Llama-3.2-1B-Instruct", "forget.jsonl", "retain.jsonl", config)
        records = unlearner.run("out/unlearned")   # leaves the model, its tokenizer and log.jsonl there

    Args:
        model: directory or hub name of a causal language model; or a loaded model, which `run` changes in place.
        forget: a path, a name ("tofu:forget10", ...) or rows, as `soul.data.sources.rows` takes them; or a list of
            `soul.data.Example`.
        retain: the same, or None for a method without a retain term.
        config: `UnlearnConfig`; None: its defaults.
        tokenizer: the tokenizer of a loaded model; None with a model by name.
        dtype: dtype of the parameters, for a model by name: "float32", "bfloat16" or "float16". "auto" is bfloat16 for SOUL,
            which keeps 8 more bits of every weight, and under adapters, which are fp32 themselves; and float32 for AdamW, and
            for all on a processor without AMX, which multiplies bf16 slowly.
        device: "auto", "cpu" or "cuda", for a model by name.
        adapters: arguments of `soul.models.add_adapters`, to train LoRA adapters instead of the model; or None.
        load_in_4bit: with adapters, for a model by name: keep its linear layers in 4 bits (bitsandbytes). Each of several
            processes then reads them, and has them whole. A loaded model may be quantized already, by a
            ``quantization_config`` of its own.
        control: for a config with an aim: rows that must be kept and are not trained on, like ``forget``. None: some of the
            retain rows are held out.
        unseen: for a config with an aim: rows like those to forget that the model has never seen, from which the aim is taken
            where rows have no prompts; or None.
        untouched: for a config with an aim: rows that must be kept, that are not trained on and do not steer the run: the
            model is asked them before and after it. None: some of the retain rows are held out, if there are enough.
        paraphrases: for a config with an aim: rows of ``{"question", "paraphrases"}`` with other wordings of forget questions,
            beside those in a column ``paraphrases`` of ``forget``; or None.

    Attributes:
        model: the model, with its adapters.
        tokenizer: its tokenizer.
        config: the `UnlearnConfig`.
        counts: "forget" and, with a retain set, "retain" -> `soul.data.Counts`, the numbers of rows that were used, cut or left
            out. With an aim also "control", and "unseen" if there are any.
        measures: the `soul.run.measures.Measures` of a config with an aim: the aim in numbers and, after `run`, the verdict.
            None without an aim.

    Raises:
        ArgumentError: model, data or options do not fit together, or are not the same in all processes; nothing was changed.
    """

    def __init__(
        self,
        model: "Path | PreTrainedModel",
        forget: Source,
        retain: Source | None = None,
        config: UnlearnConfig | None = None,
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        dtype: str = "auto",
        device: str = "auto",
        adapters: dict[str, Any] | None = None,
        control: Source | None = None,
        unseen: Source | None = None,
        untouched: Source | None = None,
        paraphrases: Source | None = None,
        load_in_4bit: bool = False,
    ) -> None:
        self.model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase
        self._forget: list[Example]
        self._retain: list[Example]
        self.config = UnlearnConfig() if config is None else config
        if not isinstance(self.config, UnlearnConfig):
            remedy = "for instance soul.UnlearnConfig(method='npo')"
            raise argument_error("config", "a soul.UnlearnConfig", type(config).__name__, remedy)
        processes = Processes.here()
        several = processes.size > 1
        layout: dict[str, Any] = {name: getattr(self.config, name) for name in LAYOUT}
        if several:
            options = {"dtype": dtype, "device": device, "adapters": adapters, "load_in_4bit": load_in_4bit}
            processes.check_alike({**self.config.decisive(), **layout, **options, **versions()})
            check_supported(self.config)
        check_layout(self.config, processes.size)
        _check_model_options(model, tokenizer, dtype, device, load_in_4bit)
        if load_in_4bit and not adapters:
            remedy = "codes of 4 bits have no gradient: pass adapters={'rank': 16}, or --lora-rank 16"
            raise argument_error("load_in_4bit", "adapters on a quantized model", "all parameters to be trained", remedy)
        self._load_in_4bit = load_in_4bit
        sources_by_name = {"forget": forget, "retain": retain, "control": control, "unseen": unseen, "untouched": untouched}
        data = {name: source for name, source in sources_by_name.items() if source is not None}
        for name, source in (("control", control), ("unseen", unseen), ("untouched", untouched), ("paraphrases", paraphrases)):
            if source is not None and not self.config.aims:
                raise argument_error(name, "None without an aim", "rows", "pass an aim, or leave them out")
        self._paraphrases = paraphrases
        self.counts = {name: Counts() for name in data}
        run_device = processes.together(lambda: self._load(model, tokenizer, data, dtype, device, adapters, several))
        if several:
            in_each = not isinstance(model, (str, os.PathLike)) or is_quantized(self.model)
            processes.check_alike(self._contents(weights=in_each))
            self.model = (shard if in_each else shard_from_first)(self.model, run_device, **layout)
        prepare(self.model, self.tokenizer, self._forget, self._retain, self.config, self.counts)
        self._sources = {name: str(source) for name, source in data.items() if isinstance(source, (str, os.PathLike))}
        self._saved: pathlib.Path | None = None  # the output directory of a run that has ended
        self._answers = encode_for(self.model, self.tokenizer, self._forget, self.config, "forget")
        self.measures: Measures | None = None
        if self.config.aims and not any(p.is_meta for p in self.model.parameters()):
            self.measures = Measures(self.model, self.tokenizer, self._forget, self._aim_data, self.config)

    @property
    def examples(self) -> tuple[list[Example], list[Example]]:
        """The examples to forget and those to retain, as they were read; `soul.plan.run` counts their tokens."""
        return self._forget, self._retain

    def _load(
        self,
        model: "Path | PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None",
        data: dict[str, Source],
        dtype: str,
        device: str,
        adapters: dict[str, Any] | None,
        several: bool,
    ) -> torch.device:
        """Read data and model; return the device that the model will run on."""
        rows = {name: self._rows(name, source) for name, source in data.items()}
        self._digests = {name: sources.digest(rows_of_set) for name, rows_of_set in rows.items()}
        if isinstance(model, (str, os.PathLike)):
            run_device = pick_device(device)
            dtype = parameter_dtype(dtype, self.config, adapters, run_device.type)
            where: dict[str, Any] = {"device": run_device}
            if several and not (self._load_in_4bit or is_stored_in_codes(os.fspath(model))):
                # A GPU may have no room for the whole model: it is cut on the CPU. The first process reads it.
                where = {"device": "cpu", "mapped": True, "weights": Processes.here().first}
            model, tokenizer = load(os.fspath(model), dtype=dtype, load_in_4bit=self._load_in_4bit, **where)
        elif tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
            remedy = "a loaded model comes without its tokenizer: load that with AutoTokenizer.from_pretrained"
            raise argument_error("tokenizer", "that of the model", repr(tokenizer), remedy)
        else:
            check_shards(model)
            causal_lm.check_linear_head(model)
            run_device = next(model.parameters()).device
        if adapters:
            torch.manual_seed(self.config.seed)
            model = add_adapters(model, **adapters)
        if is_quantized(model):
            if several:
                check_codes(model)
            causal_lm.trained(model)  # refuses one without adapters
        self.model = model
        self.tokenizer = tokenizer
        self._forget = self._examples("forget", rows["forget"])
        self._retain = self._examples("retain", rows["retain"]) if "retain" in rows else []
        if self.config.aims:
            control = self._examples("control", rows["control"]) if "control" in rows else None
            unseen = self._examples("unseen", rows["unseen"]) if "unseen" in rows else []
            untouched = self._examples("untouched", rows["untouched"]) if "untouched" in rows else None
            self._retain, control = split_control(self._forget, self._retain, control, self.config.seed)
            self._retain, untouched = split_untouched(self._forget, self._retain, control, untouched, self.config.seed)
            self.counts.setdefault("control", Counts(rows=len(control)))
            if untouched:
                self.counts.setdefault("untouched", Counts(rows=len(untouched)))
            self._aim_data = AimData(control, self._false_answers(rows["forget"]), unseen, untouched, self._facts(rows))
        return run_device

    def _contents(self, weights: bool) -> dict[str, Any]:
        """Return hashes of data and tokenizer, and the model's configuration, for comparison between processes.

        Args:
            weights: whether to add a hash of the model's weights. Those that the first process alone reads need none.
        """
        template = getattr(self.tokenizer, "chat_template", None)
        tokenizer_values = [self.tokenizer.get_vocab(), self.tokenizer.special_tokens_map, template]
        data = {"forget": self._forget, "retain": self._retain}
        if self.config.aims:
            aim = self._aim_data
            data |= {"control": aim.control, "wrong": aim.wrong, "unseen": aim.unseen, "untouched": aim.untouched}
        return {
            **{f"configuration of the model, {name}": value for name, value in configuration(self.model).items()},
            **{f"content of {name}": checksum([vars(example) for example in examples]) for name, examples in data.items()},
            "content of the tokenizer": checksum(json.loads(json.dumps(tokenizer_values, sort_keys=True, default=str))),
            **({"content of the model": digest(base_weights(self.model))} if weights else {}),
        }

    def _rows(self, name: str, source: Source) -> Rows:
        """Return the rows of a source, or the examples that the caller has passed; this needs no model."""
        counts = self.counts[name]
        if isinstance(source, (list, tuple)) and all(isinstance(item, Example) for item in source):
            counts.rows = len(source)
            return list(source)
        return sources.rows(source, name, drop=self.config.drop_unusable, counts=counts)

    def _examples(self, name: str, rows: Rows) -> list[Example]:
        """Return rows as examples; with ``drop_unusable`` those that leave no room for an answer are left out and counted."""
        config = self.config
        examples = rows
        if rows and not isinstance(rows[0], Example):
            examples = sources.examples(rows, Template(config.template, self.tokenizer, config.system))
        if examples and config.drop_unusable:
            counts = self.counts[name]
            return answerable(examples, self.tokenizer, max_length=config.max_length, name=name, counts=counts)
        return examples

    def _facts(self, rows: Mapping[str, Rows]) -> dict[Example, Fact]:
        """Return the rows of all sets with their keys and other wordings, by their examples."""
        template = Template(self.config.template, self.tokenizer, self.config.system)
        by_example = {fact.example: fact for name in rows if name != "forget" for fact in facts(rows[name], template)}
        wordings: dict[str, list[str]] = {}
        if self._paraphrases is not None:
            questions = {fact.question for fact in facts(rows["forget"], template)} - {""}
            wordings = read_paraphrases(self._paraphrases, questions)
        return by_example | {fact.example: fact for fact in facts(rows["forget"], template, wordings)}

    def _false_answers(self, rows: Rows) -> list[Example]:
        """Return questions with a false answer each, where all rows have some, as in TOFU's perturbed files; else []."""
        false_rows = []
        for index, row in enumerate(rows):
            answers = None if isinstance(row, Example) else row[1].get("perturbed_answer")
            if not (isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)):
                return []
            where, columns = row
            if not {"question", "answer"} <= columns.keys():
                return []
            false_rows.append((where, {**columns, "answer": answers[index % len(answers)]}))
        return sources.examples(false_rows, Template(self.config.template, self.tokenizer, self.config.system))

    def forget_probability(self) -> float:
        """Return the mean over the forget rows of ``exp(mean log p)`` of the answer, under the model as it is now."""
        from soul.evaluate.model import answer_probability

        return answer_probability(self.model, self._answers, batch_size=self.config.batch_size, backend=self.config.backend)

    def run(
        self,
        output: Path | None = None,
        *,
        save_every: int = 0,
        save_minutes: float = 0,
        keep: int = 2,
        resume: bool = False,
        merge: bool = False,
        options: dict[str, Any] | None = None,
        samples: int | None = None,
        progress: bool = True,
        report_to: Sequence[str] = (),
    ) -> list[Record]:
        """Unlearn, and save the model.

        Args:
            output: new or empty directory for model (or adapters), tokenizer, ``log.jsonl``, ``data.json`` (``counts``) and
                checkpoints; None: nothing is written.
            save_every: steps between two checkpoints; 0: none by number of steps.
            save_minutes: minutes between two checkpoints; 0: none by time. With both 0 the run is saved only on SIGTERM. All
                checkpoints are removed at the end.
            keep: number of checkpoints that stay, the newest ones.
            resume: go on after the newest checkpoint in ``output``, if there is one.
            merge: add the adapters to the weights, and save a plain model; not where these are quantized.
            options: a dict to be kept as ``soul_config.json``.
            samples: keep what `soul.report.run` shows in ``report.json``: the environment, and what the model says before and
                after (`soul.run.notes`), and every so many steps if this is not 0. None: nothing.
            progress: show on stderr how far the run is: bars in a terminal, otherwise a line every half minute.
            report_to: "tensorboard", "wandb", "trackio", "mlflow": trackers that get the log's numbers as well. One that fails
                is turned off with a line on stderr.

        Returns:
            The log, as `soul.run.loop.unlearn` returns it.

        Raises:
            ArgumentError: the directory is not empty, is that of another run or of a run that has ended, or another process
                uses it; a tracker is unknown, or asked for without a directory; or quantized weights are to be merged.
            MissingExtra: the library of a tracker is not installed.
            Diverged: the loss, its gradient or a weight is no longer finite.
            Stopped: by SIGTERM, after a checkpoint was written.
            OSError: something could not be written; the message says whether there is a checkpoint to go on from. Or the
                directory was removed during the run: the model is saved, the other files are lost.
        """
        check_trackers(report_to, output)
        check_samples(samples, self.config)
        if merge and is_quantized(self.model):
            raise cannot_merge_error()
        inputs = (self.model, self.tokenizer, self._forget, self._retain, self.config)
        if self.config.aims and self.measures is None:
            self.measures = Measures(self.model, self.tokenizer, self._forget, self._aim_data, self.config)
        processes = Processes.of(self.model)
        saving = dict(save_every=save_every, save_minutes=save_minutes, keep=keep, resume=resume, samples=samples)
        processes.check_alike({"output": output and str(output), "merge": merge, **saving})
        torch.manual_seed(self.config.seed + processes.rank)  # for dropout, which differs between processes
        if output is None:
            records = unlearn(*inputs, progress=progress, measures=self.measures)
            self._merge(merge)
            return records
        directory = processes.together(lambda: check_output(output, resume))  # in all of them, before one of them writes
        checkpoints = _checkpoints_class(processes)(
            directory / CHECKPOINTS, every=save_every, minutes=save_minutes, keep=keep, resume=resume
        )
        if processes.any(has_ended(directory, checkpoints)):
            remedy = "load it, or choose another directory"
            raise argument_error("resume", "a run that has not ended", f"a finished model in {directory}", remedy)
        with (
            shown(progress and processes.first),
            processes.on_first(lambda: occupy(directory)) or contextlib.nullcontext() as file,
            Trackers(report_to if processes.first else (), directory, options) as trackers,  # ended after the model is saved
        ):
            # A resumed run has its description already.
            processes.on_first(lambda: None if checkpoints.steps() else self._describe(directory, options))
            notes = None if samples is None else self._notes(directory, samples)
            watch = None if notes is None else notes.watch
            try:
                records = unlearn(
                    *inputs,
                    log=directory / LOG_FILE,
                    progress=progress,
                    checkpoints=checkpoints,
                    watch=watch,
                    measures=self.measures,
                    trackers=trackers,
                )
                with checkpoints.listening():  # a SIGTERM no longer keeps the finished model from being saved
                    self._merge(merge)
                    processes.on_first(lambda: restore(directory, cast(TextIO, file)))
                    if self.measures is not None:
                        verdict = json.dumps(self.measures.verdict, indent=1) + "\n"
                        processes.on_first(lambda: write_in_place(directory / VERDICT_FILE, verdict))
                    save_model(self.model, self.tokenizer, directory)
                    checkpoints.end(directory)
            except (OSError, Stopped) as error:
                if isinstance(error, Stopped):
                    processes.on_first(lambda: self._describe_again(directory, cast(TextIO, file), options))
                raise type(error)(f"{error}; {checkpoints.advice()}") from error
            self._saved = directory
            processes.on_first(lambda: check_complete(directory))
            if notes is not None:
                notes.end(self.model, len(records))
        return records

    def push(self, repository: str, *, private: bool = False) -> str | None:
        """Push the model that `run` has saved, its tokenizer and a model card to the Hugging Face Hub.

        The login is huggingface_hub's own: ``hf auth login``, or ``HF_TOKEN``. In several processes the first one pushes.

        Args:
            repository: OWNER/NAME, or NAME in the account of the login; created if it does not exist.
            private: only its owner may see a new repository. One that exists must be private already.

        Returns:
            The address of the repository; None in processes other than the first.

        Raises:
            ArgumentError: no run has saved a model; the name is none of a repository; nobody is logged in, or the login may
                not write there; or the hub does not answer.
            soul.hub.push.NotPushed: the upload has failed; the message says how to push again.
            OSError: the card could not be written.
        """
        from soul.hub.push import publish

        if self._saved is None:
            raise argument_error("push", "a run that has saved its model", "none", "call run(output) before")
        if not Processes.of(self.model).first:
            return None
        options = {"model": self.model.config.name_or_path, **self._sources, **dataclasses.asdict(self.config)}
        return publish(self._saved, repository, private=private, options=options)

    def _notes(self, directory: pathlib.Path, samples: int) -> Notes:
        sets = {"forget": self._forget, "retain": self._retain}
        if self.config.aims and self._aim_data.control:  # rows that are not trained on show what is kept
            sets = {"forget": self._forget, "control": self._aim_data.control}
        return Notes(directory, self.model, self.tokenizer, sets, self.config, samples)

    def _merge(self, merge: bool) -> None:
        if merge and causal_lm.has_adapters(self.model):
            self.model = self.model.merge_and_unload()

    def _describe_again(self, directory: pathlib.Path, file: TextIO, options: dict[str, Any] | None) -> None:
        """Write the description of a stopped run again if it was removed: without it the run could not go on."""
        restore(directory, file)
        if not (directory / RUN_FILE).exists():
            self._describe(directory, options)

    def _describe(self, directory: pathlib.Path, options: dict[str, Any] | None) -> None:
        """Write the options and the counts of a run."""
        write_in_place(directory / RUN_FILE, json.dumps(options or {}, indent=1, default=str) + "\n")
        data: dict[str, Any] = {}
        for name, counts in self.counts.items():
            data[name] = dataclasses.asdict(counts)
            if name in self._digests:  # rows of a source of their own
                data[name]["content"] = self._digests[name]
        if self.config.refusals is not None:
            data["refusals"] = {"content": self.config.decisive()["refusals"]}
        write_in_place(directory / DATA_FILE, json.dumps(data, indent=1) + "\n")


def _check_model_options(
    model: "Path | PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", dtype: str, device: str, load_in_4bit: bool
) -> None:
    """Raise for a tokenizer beside a model by name, and for options of loading beside a model that is loaded."""
    if isinstance(model, (str, os.PathLike)):
        if tokenizer is not None:
            remedy = "the model's own is loaded; or pass a loaded model"
            raise argument_error("tokenizer", "None with a model by name", type(tokenizer).__name__, remedy)
        return
    for name, value, default in (("dtype", dtype, "auto"), ("device", device, "auto"), ("load_in_4bit", load_in_4bit, False)):
        if value != default:
            remedy = "it would not be used: convert the model"
            raise argument_error(name, f"{default!r} with a model that is loaded", repr(value), remedy)


def _checkpoints_class(processes: Processes) -> type[Checkpoints]:
    if processes.size == 1:
        return Checkpoints
    from soul.checkpoint.sharded import ShardedCheckpoints  # and with it much of torch.distributed

    return ShardedCheckpoints
