"""Experiment trackers: the numbers of a run's log go to TensorBoard, Weights & Biases, Trackio or MLflow as well.

Each client class below is all that the module knows of one library. A client takes its address, its login and its modes from
that library's own settings. `Trackers` is what the loop sees: it keeps the runs' names in the output directory, so that a
resumed run is continued, and it turns off a tracker that fails, since no tracker may end a run.

Safe to change: what a client is given as options. Not safe: that Python's random state is restored after each call, since a
client that draws from it would change the steps that follow.
"""

import json
import math
import os
import pathlib
import random
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from soul._extras import require
from soul.output.console import safe_stream
from soul.output.directory import TENSORBOARD, TRACKERS_FILE, write_in_place
from soul_kernels.errors import argument_error, check_choice

PROJECT = "soul-kernels"  # the name of the project or experiment, unless the library's own variable names another


class Client(Protocol):
    """A run at one tracker. The constructor takes (directory, options, run, after).

    ``directory`` is the output directory, ``options`` the options of the run, ``run`` the name by which the tracker knows the
    run, or None for a new one, and ``after`` the number of steps whose numbers are there already and hold.

    Attributes:
        run: the name by which a later process continues the run.
    """

    run: str

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send the numbers of one step."""

    def close(self, failed: bool) -> None:
        """Send what is left, and end the run at the tracker."""


class _TensorBoard:
    """Event files in the output directory, by torch's `SummaryWriter`."""

    def __init__(self, directory: pathlib.Path, options: Mapping[str, Any], run: str | None, after: int) -> None:
        writer = require("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.run = TENSORBOARD
        self._writer = writer(os.fspath(directory / TENSORBOARD), purge_step=after + 1)  # hides steps that are taken again
        if run is None:
            self._writer.add_text("options", "\n".join(f"    {name}: {value}" for name, value in options.items()))

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a run that is killed keeps its curves

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WandB:
    """A run at Weights & Biases, or offline in the output directory with ``WANDB_MODE=offline``."""

    def __init__(self, directory: pathlib.Path, options: Mapping[str, Any], run: str | None, after: int) -> None:
        wandb = require("wandb", "wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=os.fspath(directory),
            id=run,
            config=dict(options),
            allow_val_change=True,  # --save-every, for instance, may change when a run is resumed
            resume="allow",
            settings=wandb.Settings(console="off"),  # the console of a command is `soul.output.console`'s
        )
        self.run = self._run.id

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    """A run of Trackio, in its own directory on this machine or in the Space that ``TRACKIO_SPACE_ID`` names."""

    def __init__(self, directory: pathlib.Path, options: Mapping[str, Any], run: str | None, after: int) -> None:
        self._trackio = require("trackio", "trackio")
        self.run = run or f"{directory.resolve().name}-{uuid.uuid4().hex[:8]}"  # trackio continues a run by its name
        self._trackio.init(project=PROJECT, name=self.run, config=dict(options), resume="allow", embed=False)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._trackio.log(numbers, step=step)

    def close(self, failed: bool) -> None:
        self._trackio.finish()


class _MLflow:
    """A run of MLflow, at ``MLFLOW_TRACKING_URI`` in the experiment ``MLFLOW_EXPERIMENT_NAME``."""

    def __init__(self, directory: pathlib.Path, options: Mapping[str, Any], run: str | None, after: int) -> None:
        mlflow = require("mlflow", "mlflow")
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient()
        if run is not None:
            self.run = run
            self._client.update_run(run, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        identifier = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self.run = self._client.create_run(identifier, run_name=directory.resolve().name).info.run_id
        params = [mlflow.entities.Param(name, str(value)) for name, value in options.items()]
        self._client.log_batch(self.run, params=params)

    def log(self, numbers: dict[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self.run, metrics=[self._metric(name, value, now, step) for name, value in numbers.items()])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


CLIENTS: dict[str, Callable[[pathlib.Path, Mapping[str, Any], str | None, int], Client]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
    "mlflow": _MLflow,
}


def check_trackers(names: Sequence[str], output: object = "") -> None:
    """Raise unless the trackers exist and their libraries are installed; start nothing.

    Args:
        names: keys of ``CLIENTS``.
        output: output directory of the run, which keeps its names at the trackers; None: the run has none.

    Raises:
        ArgumentError: a name is unknown, or there are names without an output directory.
        MissingExtra: a library is not installed; the message has the pip command.
    """
    for name in names:
        check_choice("report_to", name, tuple(CLIENTS))
    if names and output is None:
        raise argument_error("report_to", "an output directory beside it", "output=None", "pass output, or leave out report_to")
    for name in names:
        require(name, name)  # module and extra have the tracker's name


class Trackers:
    """The trackers of one run; without names an object that does nothing. Leaving its ``with`` block ends the runs there.

    Args:
        names: keys of ``CLIENTS``.
        directory: output directory of the run; ``TRACKERS_FILE`` in it has the runs' names at the trackers.
        options: options of the run, to be shown beside its curves.
    """

    def __init__(
        self, names: Sequence[str] = (), directory: pathlib.Path = pathlib.Path(), options: Mapping[str, Any] | None = None
    ) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._directory = directory
        self._options = {name: value for name, value in (options or {}).items() if value is not None}
        self._clients: dict[str, Client] = {}

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, client in tuple(self._clients.items()):
            self._attempt(name, partial(client.close, failed=kind is not None))
        self._clients = {}

    def start(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Begin the runs at the trackers, or continue those of the process that the run is resumed from.

        Args:
            lines: the log so far, up to the checkpoint of a resumed run. A tracker that is new to the run gets it.
        """
        runs = self._read()
        steps = max((line["step"] for line in lines), default=0)
        for name in self._names:
            run = runs.get(name)
            after = 0 if run is None else steps
            client = self._attempt(name, partial(CLIENTS[name], self._directory, self._options, run, after))
            if client is not None:
                self._clients[name] = client
                for line in lines if run is None else ():
                    self._send(name, line)
        if self._clients:
            runs |= {name: client.run for name, client in self._clients.items()}
            text = json.dumps(runs, indent=1) + "\n"
            path = self._directory / TRACKERS_FILE
            self._attempt(TRACKERS_FILE, partial(write_in_place, path, text), "a resumed run will be a new one at the trackers")

    def write(self, line: Mapping[str, Any]) -> None:
        """Send a line of the log to all trackers that work.

        Args:
            line: "step" and other entries, of which the finite numbers are sent by their names. If it is no step's record but
                has an "event", the names are ``event/name``.
        """
        for name in tuple(self._clients):
            self._send(name, line)

    def _send(self, name: str, line: Mapping[str, Any]) -> None:
        if name in self._clients:
            prefix = f"{line['event']}/" if "event" in line else ""
            numbers = {prefix + key: float(value) for key, value in line.items() if key != "step" and _is_finite_number(value)}
            self._attempt(name, partial(self._clients[name].log, numbers, line["step"]))

    def _attempt(self, name: str, call: Callable[[], Any], loss: str = "nothing more is reported there") -> Any:
        """Return ``call()``; if it fails, turn the tracker ``name`` off, say in one line what is lost, and return None."""
        random_state = random.getstate()
        try:
            return call()
        except Exception as error:  # of any library, for any reason: the run goes on
            self._clients.pop(name, None)
            text = " ".join(str(error).split())[:300]
            line = f"{name}: {type(error).__name__}: {text}; {loss}\n"
            safe_stream(sys.stderr).write(line)  # a warning could be made an error
            return None
        finally:
            random.setstate(random_state)

    def _read(self) -> dict[str, str]:
        """Return the runs' names at the trackers by tracker, {} in a new run."""
        try:
            runs = json.loads((self._directory / TRACKERS_FILE).read_text(encoding="utf-8")) if self._names else {}
        except (OSError, ValueError):
            return {}
        return {name: run for name, run in runs.items() if isinstance(run, str)} if isinstance(runs, dict) else {}


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
