"""A whole run in Python: model and data by name, adapters, the loop, and what it leaves in a directory."""

import contextlib
import dataclasses
import json
import os

import torch

from soul.checkpoint.format import checksum, versions
from soul.checkpoint.local import Checkpoints, Stopped, has_ended, save_model
from soul.data import sources
from soul.data.examples import Counts, Example, answerable
from soul.data.templates import Template
from soul.distributed import processes as distributed
from soul.distributed.processes import Processes
from soul.models import causal_lm
from soul.models.adapters import add_adapters
from soul.models.encoding import encode_for
from soul.models.loading import load, pick_device
from soul.models.ref_model import base_weights, configuration, digest
from soul.output.directory import (
    CHECKPOINTS,
    DATA_FILE,
    LOG_FILE,
    RUN_FILE,
    check_complete,
    check_output,
    occupy,
    restore,
    write_in_place,
)
from soul.run.config import UnlearnConfig, parameter_dtype
from soul.run.loop import unlearn
from soul.run.prepare import prepare
from soul_kernels.errors import argument_error


class Unlearner:
    """Makes a model forget, as the ``soul unlearn`` command does::

        config = soul.UnlearnConfig(method="npo", lr=1e-5)
        unlearner = soul.Unlearner("meta-llama/Llama-3.2-1B-Instruct", "forget.jsonl", "retain.jsonl", config)
        records = unlearner.run("out/unlearned")   # model, tokenizer and log.jsonl are in there

    Args:
        model: directory or hub name of a causal language model; or a model that is loaded, changed in place by `run`.
        forget: a path, a name ("tofu:forget10", ...) or rows, as `soul.data.sources.rows` takes them; or a list of
            `soul.data.Example`.
        retain: the same, or None for a method without a retain term.
        config: `UnlearnConfig`; None: its defaults.
        tokenizer: of a model that is loaded.
        dtype: of the parameters of a model to be loaded: "float32", "bfloat16" or "float16". "auto" is bfloat16 for SOUL, which
            keeps 8 more bits of every weight, and under adapters, which are fp32; and float32 for AdamW, and for all on a
            processor without AMX, whose products of bf16 are slow.
        device: "auto", "cpu" or "cuda", of a model to be loaded.
        adapters: trains LoRA adapters instead of the model: a dict of `soul.models.add_adapters`'s arguments.

    Attributes:
        model: with its adapters.
        tokenizer: its tokenizer.
        config: the `UnlearnConfig`.
        counts: what became of the rows: "forget" and "retain" -> `soul.data.Counts`.

    Raises:
        ArgumentError: model, data or options do not fit together, or are not the same in all processes; nothing was changed.
    """

    def __init__(
        self, model, forget, retain=None, config=None, *, tokenizer=None, dtype="auto", device="auto", adapters=None
    ):  # fmt: skip
        self.config = UnlearnConfig() if config is None else config
        if not isinstance(self.config, UnlearnConfig):
            got, remedy = type(config).__name__, "for instance soul.UnlearnConfig(method='npo')"
            raise argument_error("config", "a soul.UnlearnConfig", got, remedy)
        processes = Processes.here()
        several = processes.size > 1
        if several:
            options = {"dtype": dtype, "device": device, "adapters": adapters}
            processes.check_alike({**self.config.decisive(), **options, **versions()})
            distributed.check_supported(self.config, adapters)
        by_name = isinstance(model, (str, os.PathLike))
        if by_name and tokenizer is not None:
            got, remedy = type(tokenizer).__name__, "the model's own is loaded; or pass a model that is loaded"
            raise argument_error("tokenizer", "None with a model by name", got, remedy)
        for name, value in (("dtype", dtype), ("device", device)):
            if not by_name and value != "auto":
                remedy = "it would not be used: convert the model"
                raise argument_error(name, "'auto' with a model that is loaded", repr(value), remedy)
        given = {"forget": forget} | ({} if retain is None else {"retain": retain})
        self.counts = {name: Counts() for name in given}
        place = processes.together(lambda: self._load(model, tokenizer, given, dtype, device, adapters, several))
        if several:
            processes.check_alike(self._contents())
            self.model = distributed.shard(self.model, place)
        prepare(self.model, self.tokenizer, self._forget, self._retain, self.config, self.counts)
        self._answers = encode_for(self.model, self.tokenizer, self._forget, self.config, "forget")

    @property
    def examples(self) -> tuple[list[Example], list[Example]]:
        """The examples to forget and those to retain, as they were read; `soul.plan.run` counts their tokens."""
        return self._forget, self._retain

    def _load(self, model, tokenizer, given, dtype, device, adapters, several):
        """Read data and model; return the device that the model is to run on."""
        rows = {name: self._rows(name, source) for name, source in given.items()}
        self._digests = {name: sources.digest(found) for name, found in rows.items()}
        if isinstance(model, (str, os.PathLike)):
            place = pick_device(device)
            dtype = parameter_dtype(dtype, self.config, adapters, place.type)
            # One card has no room for the whole model. `distributed.shard` copies what each process needs.
            model, tokenizer = load(model, dtype=dtype, device="cpu" if several else place, mapped=several)
        elif tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
            remedy = "a model that is loaded comes without one: load it with AutoTokenizer.from_pretrained"
            raise argument_error("tokenizer", "that of the model", repr(tokenizer), remedy)
        else:
            causal_lm.check_linear_head(model)
            place = next(model.parameters()).device
        if adapters:
            torch.manual_seed(self.config.seed)
            model = add_adapters(model, **adapters)
        self.model, self.tokenizer = model, tokenizer
        found = {name: self._examples(name, part) for name, part in rows.items()}
        self._forget, self._retain = found["forget"], found.get("retain", [])
        return place

    def _contents(self):
        """Return what was loaded, as hashes, and the model's configuration, for comparison between processes."""
        template = getattr(self.tokenizer, "chat_template", None)
        tokens = [self.tokenizer.get_vocab(), self.tokenizer.special_tokens_map, template]
        data = {"forget": self._forget, "retain": self._retain}
        return {
            **{f"configuration of the model, {name}": value for name, value in configuration(self.model).items()},
            **{f"content of {name}": checksum([vars(example) for example in part]) for name, part in data.items()},
            "content of the tokenizer": checksum(json.loads(json.dumps(tokens, sort_keys=True, default=str))),
            "content of the model": digest(base_weights(self.model)),
        }

    def _rows(self, name, source):
        """What is read before a model is loaded: rows, or the examples that were given."""
        counts = self.counts[name]
        if isinstance(source, (list, tuple)) and all(isinstance(item, Example) for item in source):
            counts.rows = len(source)
            return list(source)
        return sources.rows(source, name, drop=self.config.drop_unusable, counts=counts)

    def _examples(self, name, rows):
        config = self.config
        if rows and not isinstance(rows[0], Example):
            rows = sources.examples(rows, Template(config.template, self.tokenizer, config.system))
        if rows and config.drop_unusable:
            options = dict(max_length=config.max_length, name=name, counts=self.counts[name])
            return answerable(rows, self.tokenizer, **options)
        return rows

    def forget_probability(self):
        """Mean over the forget rows of ``exp(mean log p)`` of the answer, under the model as it is now."""
        from soul.evaluate.model import answer_probability

        options = dict(batch_size=self.config.batch_size, backend=self.config.backend)
        return answer_probability(self.model, self._answers, **options)

    def run(
        self, output=None, *, save_every=0, save_minutes=0, keep=2, resume=False, merge=False, about=None, progress=True
    ):  # fmt: skip
        """Unlearns, and saves what comes of it.

        Args:
            output: new or empty directory for model (or adapters), tokenizer, ``log.jsonl``, ``data.json`` (``counts``) and
                checkpoints; None: nothing is written.
            save_every: steps from one checkpoint to the next; 0: none by the number of steps.
            save_minutes: minutes from one checkpoint to the next; 0: none by time. With both 0 the run is saved only when
                SIGTERM comes. All checkpoints are removed at the end.
            keep: newest checkpoints that stay.
            resume: go on after the newest checkpoint in ``output``, where there is one.
            merge: add the adapters to the weights, and save a plain model.
            about: a dict that is kept as ``soul_config.json``.
            progress: show a progress bar on stderr.

        Returns:
            The log, as `soul.run.loop.unlearn` returns it.

        Raises:
            ArgumentError: the directory is not empty, not that of this run, or that of one that has ended; or another process
                runs in it.
            Diverged: the loss, its gradient or a weight is not finite any more.
            Stopped: by SIGTERM, after a checkpoint was written.
            OSError: something could not be written; the message says whether there is a checkpoint to go on from. Or the
                directory was removed during the run: the model is saved, the other files are lost.
        """
        given = (self.model, self.tokenizer, self._forget, self._retain, self.config)
        processes = Processes.of(self.model)
        saving = dict(save_every=save_every, save_minutes=save_minutes, keep=keep, resume=resume)
        processes.check_alike({"output": output and str(output), "merge": merge, **saving})
        torch.manual_seed(self.config.seed + processes.rank)  # of dropout, which differs between processes
        if output is None:
            records = unlearn(*given, progress=progress)
            self._merge(merge)
            return records
        output = processes.together(lambda: check_output(output, resume))  # before one of them writes
        saving = dict(every=save_every, minutes=save_minutes, keep=keep, resume=resume)
        checkpoints = _checkpoints(processes)(output / CHECKPOINTS, **saving)
        if processes.any(has_ended(output, checkpoints)):
            got, remedy = f"the model of one that has, in {output}", "load it, or choose another directory"
            raise argument_error("resume", "a run that has not ended", got, remedy)
        with processes.on_first(lambda: occupy(output)) or contextlib.nullcontext() as file:
            processes.on_first(lambda: self._make(output, about, checkpoints))
            try:
                records = unlearn(*given, log=output / LOG_FILE, progress=progress, checkpoints=checkpoints)
                with checkpoints.listening():  # a model that is there is saved, whatever comes
                    self._merge(merge)
                    processes.on_first(lambda: restore(output, file))
                    save_model(self.model, self.tokenizer, output)
                    checkpoints.end(output)
            except (OSError, Stopped) as error:
                raise type(error)(f"{error}; {checkpoints.advice()}") from error
            processes.on_first(lambda: check_complete(output))
        return records

    def _merge(self, merge):
        if merge and causal_lm.has_adapters(self.model):
            self.model = self.model.merge_and_unload()

    def _make(self, output, about, checkpoints):
        if checkpoints.steps():  # what was written then is said of the run that goes on; another one is refused
            return
        write_in_place(output / RUN_FILE, json.dumps(about or {}, indent=1, default=str) + "\n")
        counts = {n: {**dataclasses.asdict(counts), "content": self._digests[n]} for n, counts in self.counts.items()}
        if self.config.refusals is not None:
            counts["refusals"] = {"content": self.config.decisive()["refusals"]}
        write_in_place(output / DATA_FILE, json.dumps(counts, indent=1) + "\n")


def _checkpoints(processes):
    if processes.size == 1:
        return Checkpoints
    from soul.checkpoint.sharded import ShardedCheckpoints  # and with it much of torch.distributed

    return ShardedCheckpoints
