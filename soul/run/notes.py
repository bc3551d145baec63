"""What a report shows of a run beside its log: environment, times, and what the model says before, during and after (`Notes`).

All of it goes into one file of the output directory, ``report.json``, from which `soul.report.run` makes the page. Prompts are
chosen by position alone and answered greedily, so that nothing is drawn at random and nothing is picked: `unlearn` gives the
same weights with and without notes. An error here never ends a run; it becomes a line of the file and of the console.
"""

import json
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from soul.checkpoint.format import versions
from soul.data.examples import Example, Sequence
from soul.data.templates import CHAT, Template
from soul.distributed.processes import Processes
from soul.evaluate.model import answer_probabilities, answer_probability, generate
from soul.models.causal_lm import device_of
from soul.models.encoding import encode_for
from soul.output.directory import NOTES_FILE
from soul.output.files import replace_text
from soul.run.config import UnlearnConfig
from soul_kernels.errors import argument_error, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

ROWS = 4  # prompts from each set
MAX_NEW_TOKENS = 40  # of an answer
TEXT_TOKENS = 32  # of a row without a prompt, at most, that the model is asked to go on from
MEASURED = 64  # sequences of the set to be kept whose probability is measured
GENERAL = (
    "What is the capital of France?",
    "How many days are there in a week?",
    "Write one sentence about the sea.",
)
_MARK = "soul-question-goes-here"


def check_samples(samples: int | None, config: UnlearnConfig) -> None:
    """Raise unless a run of ``config`` can generate answers every ``samples`` steps.

    Raises:
        ArgumentError: it is no whole number, or the model's body is compiled, and generation would compile it anew.
    """
    if samples is not None:
        check_whole("samples", samples, "0 asks the model before and after the run only", low=0)
    if samples and config.compile:
        remedy = "answers of each length would compile it anew: leave one of them out"
        raise argument_error("samples", "0 with compile", samples, remedy)


class Prompt(NamedTuple):
    """A prompt that a model is asked.

    Attributes:
        set: "forget", "retain", "control" or "general".
        text: the question without its template; of a row without a prompt, the beginning of the text.
        answer: the answer in the data, or "".
        sequence: prompt and answer as token ids.
    """

    set: str
    text: str
    answer: str
    sequence: Sequence


def evenly(items: list[T], most: int) -> list[T]:
    """Return the first of each of ``most`` equal parts of a list; all of it if it is shorter."""
    return items if len(items) <= most else [items[index * len(items) // most] for index in range(most)]


def choose_prompts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sets: Mapping[str, list[Example]],
    config: UnlearnConfig,
) -> list[Prompt]:
    """Return ``ROWS`` prompts of each set, evenly spaced over its rows, and those in ``GENERAL``.

    General questions are asked by the chat template if the rows are conversations, and otherwise by the run's template.

    Args:
        model: the model that will be asked.
        tokenizer: its tokenizer.
        sets: name -> examples.
        config: template and lengths.
    """
    everything = [example for examples in sets.values() for example in examples]
    name = CHAT if everything and everything[0].frame is not None else config.template
    template = Template(name, tokenizer, config.system if name == CHAT else None)
    before, _, after = template.ask(_MARK, "-").prompt.partition(_MARK)
    chosen = [(name, example) for name, examples in sets.items() for example in evenly(examples, ROWS)]
    chosen += [("general", template.ask(question, "-")) for question in GENERAL]
    prompts = []
    for name, example in chosen:
        (sequence, *_) = encode_for(model, tokenizer, [example], config, name)
        text = example.prompt
        answer = "" if name == "general" else example.content
        if not text:
            ids = sequence.input_ids
            length = max(1, min(TEXT_TOKENS, len(ids) // 2))
            sequence = Sequence(ids, sequence.labels, length)
            text = tokenizer.decode(ids[:length], skip_special_tokens=True)
            answer = tokenizer.decode(ids[length:], skip_special_tokens=True)
        elif len(text) > len(before + after) and text.startswith(before) and text.endswith(after):
            text = text[len(before) : len(text) - len(after)]
        prompts.append(Prompt(name, text, answer, sequence))
    return prompts


class Notes:
    """The notes on a run, in ``report.json`` of its output directory.

    Args:
        directory: the output directory.
        model: as it was before unlearning.
        tokenizer: its tokenizer.
        sets: name -> examples: "forget", and "retain" or "control".
        config: options of the run.
        every: steps from one set of answers to the next; 0: only before and after the run.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        sets: Mapping[str, list[Example]],
        config: UnlearnConfig,
        every: int = 0,
    ) -> None:
        self._path = directory / NOTES_FILE
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self._every = every
        self._processes = Processes.of(model)
        self._begun = time.perf_counter()
        self._prompts: list[Prompt] = []
        self._kept: tuple[str, list[Sequence]] | None = None
        self._is_silent = False  # after an error nothing is asked any more
        self.content: dict[str, Any] = {"environment": environment(model), "max_new_tokens": MAX_NEW_TOKENS, "asked": []}
        self._attempt(lambda: self._prepare(sets))
        if self._processes.first and self._path.is_file():  # of the run that this one resumes
            self.content |= {"resumed": True, "asked": _read_asked(self._path, self.content.get("prompts"))}
        self._ask(0, measure=True)
        self._has_written = False  # not before the first step: until then a run that is resumed may be refused

    def watch(self, step: int) -> None:
        """Ask the model after a step, if that is due."""
        is_due = bool(self._every) and step % self._every == 0
        if is_due:
            self._ask(step)
        if is_due or not self._has_written:
            self._write()

    def end(self, model: "PreTrainedModel", step: int) -> None:
        """Ask the model after the run.

        Args:
            model: the model as it was saved.
            step: number of the last step.
        """
        self._model = model
        self._ask(step, measure=True, is_end=True)
        self.content["seconds"] = time.perf_counter() - self._begun
        self.content["ended_at"] = time.strftime("%Y-%m-%d %H:%M")
        self._write()

    def _prepare(self, sets: Mapping[str, list[Example]]) -> None:
        """Choose the prompts, and the rows to be kept whose probability is measured."""
        if not getattr(self._model, "can_generate", lambda: True)():
            raise argument_error("model", "one that generates", type(self._model).__name__, "its answers are not shown")
        self._prompts = choose_prompts(self._model, self._tokenizer, sets, self._config)
        self.content["prompts"] = [{"set": p.set, "prompt": p.text, "answer": p.answer} for p in self._prompts]
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(prompt.sequence.prompt_length for prompt in self._prompts)
        if positions:
            self.content["max_new_tokens"] = max(1, min(MAX_NEW_TOKENS, positions - longest))
        for name, examples in sets.items():
            if name != "forget" and examples:
                rows = encode_for(self._model, self._tokenizer, evenly(examples, MEASURED), self._config, name)
                self._kept = name, evenly(rows, MEASURED)

    def _ask(self, step: int, measure: bool = False, is_end: bool = False) -> None:
        """Add the model's answers after a step, in the place of earlier ones after the same step; in all processes.

        Args:
            step: number of the step.
            measure: whether to measure the probability of the answers to be kept as well.
            is_end: whether these are the answers of the model as it was saved.
        """
        record: dict[str, Any] = {"step": step, "end": is_end}
        if not self._attempt(lambda: record.update(self._answers(measure))):
            return
        others = [other for other in self.content["asked"] if other["step"] != step]
        self.content["asked"] = sorted([*others, record], key=lambda record: record["step"])

    def _answers(self, measure: bool) -> dict[str, Any]:
        config = self._config
        options: dict[str, Any] = {"batch_size": config.batch_size, "backend": config.backend}
        sequences = [prompt.sequence for prompt in self._prompts]
        most = self.content["max_new_tokens"]
        record: dict[str, Any] = {"texts": generate(self._model, self._tokenizer, sequences, max_new_tokens=most)}
        known = [index for index, prompt in enumerate(self._prompts) if prompt.set != "general"]
        values = answer_probabilities(self._model, [sequences[index] for index in known], **options).tolist()
        record["probabilities"] = dict(zip(map(str, known), values))
        if measure and self._kept is not None:
            name, rows = self._kept
            record[f"{name}_prob"] = answer_probability(self._model, rows, **options)
        return record

    def _attempt(self, work: Callable[[], None]) -> bool:
        """Do something in all processes, and tell whether it was done; if it fails in one, say why and ask no more."""
        if self._is_silent:
            return False
        try:
            self._processes.together(work)
            return True
        except Exception as error:  # a library may raise anything, and a report is no reason to end a run
            self._is_silent = True
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.content["no_samples"] = f"The model was not asked: {lines[0]}"
            self._say(f"no sample answers: {lines[0]}")
            return False

    def _write(self) -> None:
        """Write the file, in the first process; a file that cannot be written is no error."""
        self._has_written = True
        if not self._processes.first:
            return
        try:
            replace_text(self._path, json.dumps(self.content, indent=1, default=str) + "\n")
        except (OSError, ValueError) as error:
            self._say(f"{self._path} could not be written: {error}")

    def _say(self, line: str) -> None:
        if self._processes.first:
            print(line)


def _read_asked(path: pathlib.Path, prompts: object) -> list[dict[str, Any]]:
    """Return the answers to ``prompts`` in the file of an earlier run; [] if it has other prompts or is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        asked = [{"step": int(record["step"]), **record} for record in content["asked"]]
        return asked if content["prompts"] == prompts else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def environment(model: "PreTrainedModel") -> dict[str, Any]:
    """Return what a run is computed on and with: machine, libraries, and the sizes of the model."""
    parameters = list(model.parameters())
    device = device_of(model)
    return {
        "device": device_name(device),
        "processes": Processes.of(model).size,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions(),
        "architecture": type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__,
        "dtype": ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of the processor, where the system knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or "CPU"
