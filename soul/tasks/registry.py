"""Tasks by name, and a task of one's own: a YAML file, or a function that is registered."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from soul._extras import require
from soul.tasks import published
from soul.tasks.published import MODEL
from soul.tasks.task import Published, Task, TaskSet
from soul_kernels.errors import ArgumentError, argument_error

Build = Callable[[Mapping[str, str]], Task]


@dataclasses.dataclass(frozen=True)
class NamedTask:
    """A task that has a name.

    Attributes:
        build: options by name -> the task.
        options: name of an option -> its meaning and its default, for messages. An option without a value is not passed.
    """

    build: Build
    options: Mapping[str, str]


TASKS: dict[str, NamedTask] = {
    "tofu": NamedTask(published.tofu, published.TOFU_OPTIONS),
    "copyright": NamedTask(published.copyrighted, published.COPYRIGHT_OPTIONS),
    "detox": NamedTask(published.detox, published.DETOX_OPTIONS),
    "muse": NamedTask(published.muse, published.MUSE_OPTIONS),
    "wmdp": NamedTask(published.wmdp, published.WMDP_OPTIONS),
}


def register(name: str, build: Build, options: Mapping[str, str] | None = None) -> None:
    """Add a task of one's own to ``TASKS``, so that `task_of` knows it.

    Args:
        name: its name.
        build: function from a dict of options, texts, to a `Task`. The option "model" is the model that is to forget, where one
            is known.
        options: name of an option -> what it means; None: the task has none.

    Raises:
        ArgumentError: the name is taken, or it could be a path.
    """
    if name in TASKS or not name.replace("-", "_").isidentifier():
        raise argument_error("task", "a new name of letters, digits and -", repr(name), "choose another name")
    TASKS[name] = NamedTask(build, dict(options or {}))


def task_of(name: str, options: Mapping[str, str] | None = None, *, model: str | None = None) -> Task:
    """Return a task by its name, or from its YAML file.

    Args:
        name: one of ``TASKS``, or the path of a file that ends in ``.yaml`` or ``.yml``.
        options: options of a task by name; a file has none.
        model: directory or hub name of the model that is to forget, whose tokens "copyright" counts.

    Raises:
        ArgumentError: there is no such task or option, or the file is not that of a task.
    """
    options = dict(options or {})
    if name.endswith((".yaml", ".yml")):
        if options:
            raise argument_error("task_option", f"nothing with the file {name}", ", ".join(options), "write it into the file")
        return _read_task(name)
    if name not in TASKS:
        raise argument_error("task", f"one of {', '.join(TASKS)}, or a YAML file", repr(name), "choose one of these")
    known = TASKS[name].options
    for option in options:
        if option not in known:
            meanings = "; ".join(f"{key}: {meaning}" for key, meaning in known.items()) or "none"
            raise argument_error("task_option", f"an option of {name}", option, f"options: {meanings}")
    if model is not None:
        options[MODEL] = model
    return TASKS[name].build(options)


def _read_task(path: str) -> Task:
    """Return the task of a YAML file, whose keys are the attributes of `Task`."""
    yaml = require("yaml", "hf")
    if not pathlib.Path(path).is_file():
        raise argument_error("task", "a YAML file", f"{path}, which is not a file", "check the path")
    try:
        content = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # the library raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise argument_error("task", "a YAML file", f"{path} ({reason})", "fix the file") from error
    values = _fields(path, content, Task)
    values.setdefault("name", pathlib.Path(path).stem)
    for name in ("learn", "harness"):
        if isinstance(values.get(name), str):
            values[name] = (values[name],)
    sets = values.get("sets") or {}
    if not isinstance(sets, Mapping):
        raise argument_error(f"{path}, sets", "a mapping of sets", type(sets).__name__, "write NAME: {source: ..., role: ...}")
    values["sets"] = {str(name): TaskSet(**_set_fields(f"{path}, sets, {name}", of_set)) for name, of_set in sets.items()}
    runs = values.get("published") or ()
    values["published"] = tuple(Published(**_fields(f"{path}, published", run, Published)) for run in runs)
    arguments: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        return Task(**arguments)
    except ArgumentError:
        raise
    except (TypeError, ValueError) as error:  # a value of the wrong type
        raise argument_error(path, "the attributes of soul.tasks.Task", str(error), "see docs/tasks.md") from error


def _set_fields(where: str, content: object) -> dict[str, Any]:
    values = _fields(where, content, TaskSet)
    measures = values["measures"]
    values["measures"] = (measures,) if isinstance(measures, str) else tuple(measures or ())
    return values


def _fields(where: str, content: object, of: type) -> dict[str, Any]:
    """Return a mapping of a file as keyword arguments of a dataclass, with all that it needs."""
    if not isinstance(content, Mapping):
        raise argument_error(where, "a mapping", type(content).__name__, "see docs/tasks.md")
    fields = {field.name: field for field in dataclasses.fields(of)}
    unknown = [str(name) for name in content if name not in fields]
    if unknown:
        raise argument_error(where, f"keys among {', '.join(fields)}", unknown[0], "check the spelling")
    needed = [name for name, field in fields.items()
              if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING]  # fmt: skip
    missing = [name for name in needed if name not in content and not (of is Task and name == "name")]
    if missing:
        raise argument_error(where, f"the keys {', '.join(needed)}", f"none named {missing[0]}", "add it")
    return dict(content)
