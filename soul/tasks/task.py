"""A task as plain data: sources to forget and to keep, sets to measure on, and the options of its published protocol."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from soul.data.instructions import IGNORANCE
from soul.tasks.measures import MEASURES, ROLES
from soul_kernels.errors import argument_error, check_choice


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """Rows that a model is measured on.

    Attributes:
        source: a path or a name, as `soul.data.sources.rows` takes it. If every measure looks at generated text alone, rows may
            be prompts without answers: a column ``prompt`` or ``question`` with a text, or ``prompt`` with ``{"text": ...}``.
        role: "forget": what the model should not know; "retain": what it should; "unseen": like the rows to forget, but of no
            training set, for comparison.
        measures: names in `soul.tasks.measures.MEASURES`.
    """

    source: str
    role: str
    measures: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Published:
    """Options of a published run.

    Attributes:
        model: name of the model.
        parameters: how many it has; they decide which published run is nearest to a model.
        method: method of ``soul unlearn``.
        optimizer: "soul" or "adamw".
        options: options of ``soul unlearn`` by name, such as ``lr``, ``alpha`` and ``epochs``.
    """

    model: str
    parameters: float
    method: str
    optimizer: str
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be forgotten and kept, and what is measured.

    Attributes:
        name: its name.
        forget: source of the rows to forget, as ``soul unlearn --forget`` takes it.
        retain: source of the rows to keep; None: the protocol leaves it to the user.
        learn: sources of what ``soul memorize`` teaches a model that does not know the rows to forget.
        sets: name -> `TaskSet`.
        refusals: path of a file with one refusal a line, for the methods "po" and "dpo" and the measure "refusal_rate"; None:
            those of the library.
        instruction: what ``--system-prompt default`` puts before every question.
        published: published runs.
        harness: tasks of EleutherAI's harness that belong to it.
        privacy: names of the two sets, learned and never seen, whose lowest log-probabilities are compared; or None.
        retrained: area under the curve of that comparison for a model that was trained without the rows to forget; or None.
        tofu: where TOFU's perturbed files are, "tofu" for the hub: the task is measured as ``soul evaluate --data`` does. None
            for every other task.
        split: TOFU's name of the forget set.
    """

    name: str
    forget: str
    retain: str | None = None
    learn: tuple[str, ...] = ()
    sets: Mapping[str, TaskSet] = dataclasses.field(default_factory=dict)
    refusals: str | None = None
    instruction: str = IGNORANCE
    published: tuple[Published, ...] = ()
    harness: tuple[str, ...] = ()
    privacy: tuple[str, str] | None = None
    retrained: float | None = None
    tofu: str | None = None
    split: str = "forget10"

    def __post_init__(self) -> None:
        for name, of_set in self.sets.items():
            check_choice(f"{self.name}, {name}, role", of_set.role, ROLES)
            if not of_set.measures:
                raise argument_error(f"{self.name}, {name}, measures", "at least one", "none", f"names: {', '.join(MEASURES)}")
            for measure in of_set.measures:
                check_choice(f"{self.name}, {name}, measures", measure, tuple(MEASURES))

    def nearest(self, parameters: int, method: str | None, optimizer: str) -> Published | None:
        """Return the published run whose model is nearest in size, within a factor of 4; None if there is none.

        Args:
            parameters: of the model that is to forget.
            method: of the run; None: any, and the first one of the nearest size is taken.
            optimizer: "soul" or "adamw".
        """
        fitting = [
            run
            for run in self.published
            if run.optimizer == optimizer
            and method in (None, run.method)
            and parameters / 4 <= run.parameters <= parameters * 4
        ]
        return min(fitting, key=lambda run: max(run.parameters / parameters, parameters / run.parameters), default=None)
