"""Tasks of unlearning: what is forgotten and kept, and what is measured. `soul unlearn` and `soul evaluate` take them by name.

May import: _connection, _extras, data, evaluate, models, presets.
Start reading with `task`, then `published`, which has the five that come with the library.
"""

from soul.tasks.evaluate import TaskResult, evaluate_task, prepare_task
from soul.tasks.registry import TASKS, register, task_of
from soul.tasks.task import Published, Task, TaskSet
from soul.tasks.toxicity import scorer_of

__all__ = [
    "TASKS",
    "Published",
    "Task",
    "TaskResult",
    "TaskSet",
    "evaluate_task",
    "prepare_task",
    "register",
    "scorer_of",
    "task_of",
]
