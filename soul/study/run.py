"""The runs of a study: each starts from the models of its seed and ends in a JSON file.

The directory of a study holds everything that a killed study needs to be resumed::

    study.json              the options and a hash of the data, which a resumed study must share; locked while it runs
    tokenizer/              of all models
    seed0/full/             the model before unlearning, and full.json with its training
    seed0/retain/           the model trained on the retain set alone, and retain.json
    seed0/start.json        measurements of both models
    seed0/runs/*.json       one file for each run, with its measurements; its log beside it, *.jsonl
    results.json            everything above in one file, from which the report is made

`run_study` computes the files that are missing, in this order, and no file twice. A JSON file is written whole or not at all,
after the files that it describes: if it exists, they are complete. On a CPU the jobs run in worker processes, which load the
models of a seed when they need them. Measurements may be added to `soul.study.measure`, but files of an
earlier study lack them. `soul.study.config.StudyConfig.decisive` lists the options that may differ when a study is resumed.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from soul._extras import require
from soul.checkpoint.saving import save_model
from soul.data.instructions import IGNORANCE
from soul.evaluate.logs import write_json
from soul.models.encoding import encode_for
from soul.models.loading import load, pick_device
from soul.output.directory import check_no_links, check_output, lock
from soul.output.files import sweep, sync, whole
from soul.output.notices import filtered
from soul.output.progress import shown, task
from soul.run.config import UnlearnConfig
from soul.run.influence import unlearn_once
from soul.run.loop import Diverged, unlearn
from soul.run.notes import device_name
from soul.study.config import ARMS, INFLUENCE, Run, StudyConfig, runs
from soul.study.data import StudyData
from soul.study.measure import Start, encode_start, measure
from soul.study.scratch import new_model, train, train_tokenizer
from soul_kernels.backends import resolve_backend
from soul_kernels.errors import argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STUDY_FILE, RESULTS_FILE = "study.json", "results.json"
MODELS = ("full", "retain")  # trained on all rows, and on the retain rows alone
PROMPT = "prompt"  # the input-based baseline: the first model, asked to pretend ignorance. Earlier studies lack it
_OF_WORKER = contextlib.ExitStack()  # what lasts as long as a worker process


@dataclasses.dataclass(frozen=True)
class Study:
    """A study and its directory: what every worker needs."""

    output: pathlib.Path
    data: StudyData
    config: StudyConfig

    def seed_dir(self, seed: int) -> pathlib.Path:
        """Return the directory of a seed."""
        return self.output / f"seed{seed}"

    def start_path(self, seed: int) -> pathlib.Path:
        """Return the path of the measurements of a seed's models before unlearning."""
        return self.seed_dir(seed) / "start.json"

    def result_path(self, run: Run) -> pathlib.Path:
        """Return the path of the result of a run."""
        return self.seed_dir(run.seed) / "runs" / f"{run.name}.json"


# Does jobs one by one or in parallel: run_jobs(function, study, jobs, title) calls function(study, job) for each job.
RunJobs = Callable[[Callable[[Study, Any], object], Study, Sequence[Any], str], None]


def check_ready(output: str | os.PathLike[str], config: StudyConfig) -> pathlib.Path:
    """Return the path of the output directory, and raise for anything that would stop a study. Nothing is written.

    Raises:
        ArgumentError: the output directory is neither empty nor that of a study, or the device or the backend is unavailable.
        MissingExtra: a package is not installed.
    """
    for module, extra in (("transformers", "hf"), ("scipy", "eval"), ("sklearn", "eval"), ("matplotlib", "plots")):
        require(module, extra)
    resolve_backend(config.backend, torch.empty(0, device=pick_device(config.device)))
    output = pathlib.Path(output)
    if not (output / STUDY_FILE).is_file():
        return check_output(output)
    check_no_links(output)
    return output


def run_study(output: pathlib.Path, data: StudyData, config: StudyConfig) -> dict[str, Any]:
    """Run the missing parts of a study, and write the results into ``seed*/``.

    Args:
        output: path of a directory, from `check_ready`.
        data: `soul.study.data.StudyData`.
        config: `soul.study.config.StudyConfig`.

    Returns:
        The results, a dict: ``config``, ``data``, ``environment``, ``starts`` by seed, ``rows``, ``seconds`` of this call, and
        ``resumed``, whether some runs had been done before. If only the report is missing, environment, seconds and resumed are
        those of the call before.

    Raises:
        ArgumentError: the directory holds a study of other data or sizes, or one that is running; nothing was written.
    """
    begun = time.perf_counter()
    study = Study(output, data, config)
    _claim(output / STUDY_FILE, {"config": config.decisive(), "data": data.fingerprint()})
    with open(output / STUDY_FILE, "a", encoding="utf-8") as file:
        lock(file, "output", output)  # two studies would write the same models at once
        for directory in (output, *output.glob("seed*"), *output.glob("seed*/*")):
            if directory.is_dir():
                sweep(directory)
        _save_tokenizer(study)
        untrained = [(seed, name) for seed in config.seeds for name in MODELS if _trained(study, seed, name) is None]
        unmeasured = [seed for seed in config.seeds if _read(study.start_path(seed), *MODELS, "training") is None]
        missing_runs = [run for run in runs(config) if _read(study.result_path(run), "objective", "arm", "seed") is None]
        with _workers(config) as run_jobs:
            run_jobs(_train, study, untrained, "train")
            run_jobs(_measure_start, study, unmeasured, "measure")
            run_jobs(run_one, study, missing_runs, "unlearn")
    results = {
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "data": data.note,
        "environment": environment(config, worker_count(config)),
        "starts": {str(seed): _read(study.start_path(seed)) for seed in config.seeds},
        "rows": [_read(study.result_path(run)) for run in runs(config)],
        "seconds": time.perf_counter() - begun,
        "resumed": len(missing_runs) < len(runs(config)),
    }
    computed_nothing = not untrained and not missing_runs
    earlier = _read(output / RESULTS_FILE, "environment", "seconds", "resumed") if computed_nothing else None
    if earlier is not None:
        results |= {name: earlier[name] for name in ("environment", "seconds", "resumed")}
    return results


def environment(config: StudyConfig, workers: int) -> dict[str, str]:
    """Return the name of the device and the versions of the libraries that compute."""
    device = pick_device(config.device)
    name = device_name(device) + ("" if device.type == "cuda" else f", {workers} processes of one thread")
    return {"device": name, "torch": torch.__version__, "transformers": require("transformers", "hf").__version__}


def _claim(path: pathlib.Path, identity: dict[str, Any]) -> None:
    """Write the file that identifies the study of the directory, or raise if it identifies another study."""
    saved = _read(path, "config", "data", remedy="start the study in a new directory")
    if saved is None:
        write_json(path, identity)
        return
    different = [key for key in identity["config"] if saved["config"].get(key) != identity["config"][key]]
    if different or saved["data"] != identity["data"]:
        got = f"one with another {', '.join(different) or 'set of texts'}"
        raise argument_error("output", "the directory of this study, or a new one", got, "choose another one")


def worker_count(config: StudyConfig) -> int:
    """Return the number of processes: one on a GPU, else the config's ``workers``, or one for each core."""
    if pick_device(config.device).type == "cuda":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return config.workers or cores or 1


@contextlib.contextmanager
def _workers(config: StudyConfig) -> Iterator[RunJobs]:
    """Yield a function that runs jobs with a progress bar; on a CPU in ``worker_count`` processes of one thread."""
    count = worker_count(config)
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    pool = None
    if count > 1:
        pool = concurrent.futures.ProcessPoolExecutor(count, mp_context=context, initializer=_in_worker)

    def run_jobs(function: Callable[[Study, Any], object], study: Study, jobs: Sequence[Any], title: str) -> None:
        with task(title, len(jobs), stays=True) as bar:
            if pool is None:
                for job in jobs:
                    with shown(False):  # one bar is enough
                        function(study, job)
                    bar.update()
                return
            try:
                for future in concurrent.futures.as_completed([pool.submit(function, study, job) for job in jobs]):
                    future.result()
                    bar.update()
            except concurrent.futures.BrokenExecutor as error:
                message = (
                    f"{title}: a worker process has died, perhaps because memory ran out; the same command continues from the "
                    f"results in {study.output}"
                )
                raise ChildProcessError(message) from error

    logging = require("transformers", "hf").utils.logging
    had_progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with shown():
            yield run_jobs
    finally:
        if had_progress_bar:
            logging.enable_progress_bar()
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _in_worker() -> None:
    """Set up a worker process."""
    _OF_WORKER.enter_context(filtered())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    require("transformers", "hf").utils.logging.disable_progress_bar()


def _end_with_parent() -> None:
    """End this process when its parent ends. Otherwise a worker would wait for ever for a parent that was killed.

    Nothing is lost: results are written whole or not at all.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _clock(config: StudyConfig) -> Callable[[], float]:
    """Start a clock, and return a function that reads it in seconds.

    On a GPU it measures wall-clock time; on a CPU, which the processes share, processor time.
    """
    clock = time.perf_counter if pick_device(config.device).type == "cuda" else time.process_time
    begun = clock()
    return lambda: clock() - begun


def _save_tokenizer(study: Study) -> None:
    """Train and save the tokenizer of the study unless that has been done; raise if it cannot be read."""
    directory = study.output / "tokenizer"
    if not (directory / "tokenizer_config.json").exists():
        examples = [*study.data.forget, *study.data.retain]
        directory.mkdir(exist_ok=True)
        with whole(directory, last=("tokenizer_config.json",)) as scratch:
            train_tokenizer(examples, study.config.vocab_size).save_pretrained(scratch)
    _tokenizer(study)


def _tokenizer(study: Study) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of the study.

    Raises:
        ArgumentError: its files are damaged.
    """
    directory = study.output / "tokenizer"
    try:
        return require("transformers", "hf").AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the libraries raise many kinds for a truncated file
        got = f"a damaged one ({type(error).__name__})"
        remedy = "restore it from seed*/full, or start in a new directory"
        raise argument_error(str(directory), "the tokenizer of the study", got, remedy) from error


def _trained(study: Study, seed: int, model_name: str) -> dict[str, Any] | None:
    """Return loss, size and time of the training of one of the models of a seed; None if it has not ended."""
    return _read(study.seed_dir(seed) / f"{model_name}.json", "loss", "parameters", "seconds")


def _train(study: Study, job: tuple[int, str]) -> None:
    """Train one of the two models of a seed and save it."""
    seed, model_name = job
    config = study.config
    clock = _clock(config)
    tokenizer = _tokenizer(study)
    model = new_model(tokenizer, config, seed)
    examples = study.data.retain if model_name == "retain" else [*study.data.forget, *study.data.retain]
    losses = train(model, encode_for(model, tokenizer, examples, UnlearnConfig(), model_name), config, seed)
    directory = study.seed_dir(seed) / model_name
    directory.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, directory)
    parameters = sum(p.numel() for p in model.parameters())
    record = {"loss": losses, "parameters": parameters, "seconds": clock()}
    write_json(directory.with_name(f"{model_name}.json"), record)


_LOADED: dict[tuple[pathlib.Path, int], Start] = {}  # (directory of the study, seed) -> the `Start` used last, and no other


def start_of(study: Study, seed: int) -> Start:
    """Return the `soul.study.measure.Start` of a seed; it stays in memory for the next run."""
    key = (study.output, seed)
    if key not in _LOADED:
        _LOADED.clear()
        device = pick_device(study.config.device)
        full, retain_model = (load(study.seed_dir(seed) / name)[0].to(device) for name in MODELS)
        _LOADED[key] = encode_start(full, retain_model, _tokenizer(study), study.data, study.config)
    return _LOADED[key]


def _measure_start(study: Study, seed: int) -> None:
    """Measure the two models of a seed; and the first one with an instruction to pretend ignorance before every question."""
    start = start_of(study, seed)
    training = {name: _trained(study, seed, name) for name in MODELS}
    full = measure(start.full, start)
    retain = measure(start.retain_model, start)
    prompted = encode_start(start.full, start.retain_model, start.tokenizer, study.data, study.config, IGNORANCE)
    numbers = {"full": full, "retain": retain, PROMPT: measure(start.full, prompted)}
    write_json(study.start_path(seed), {"seed": seed, "training": training, **numbers})


def unlearn_config(run: Run, config: StudyConfig) -> UnlearnConfig:
    """Return the `soul.run.config.UnlearnConfig` of a run; the influence update has none."""
    options = dict(run.options)
    arm_options = dict(ARMS[run.arm][1])
    if "curvature" in arm_options:
        arm_options |= {"clip_target": config.clip_target, "curvature_every": config.curvature_every}
    return UnlearnConfig(
        method=run.objective,
        method_options={"alpha": options["alpha"]},
        lr=options["lr"],
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=run.seed,
        backend=config.backend,
        **arm_options,
    )


def run_one(study: Study, run: Run) -> None:
    """Unlearn once, measure the model, and write the result to the run's file, with its log beside it.

    A run that diverged is a result too.
    """
    start = start_of(study, run.seed)
    path = study.result_path(run)
    log = path.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {"seed": run.seed, "objective": run.objective, "arm": run.arm, **dict(run.options)}
    model = copy.deepcopy(start.full)
    clock = _clock(study.config)
    try:
        records = _unlearn(model, start, study, run, log)
        row |= {"seconds": clock(), "steps": len(records)}
        clipped = [record["clip_fraction"] for record in records if "clip_fraction" in record]
        if clipped:
            row["clip_fraction"] = sum(clipped) / len(clipped)
        numbers = measure(model, start)
        if not all(map(math.isfinite, numbers.values())):
            raise Diverged("a measurement of the model is not finite")
        row |= numbers
    except Diverged as error:
        row["diverged"] = str(error)
    row["all_seconds"] = clock()
    if log.exists():
        sync(log)  # before the result, which says that the run is complete
    write_json(path, row)


def _unlearn(model: "PreTrainedModel", start: Start, study: Study, run: Run, log: pathlib.Path) -> list[dict[str, Any]]:
    """Unlearn in place, and return the records of the steps.

    Raises:
        Diverged: a loss, a gradient or an update is not finite.
    """
    data = study.data
    config = study.config
    if run.objective != INFLUENCE:
        options = unlearn_config(run, config)
        return unlearn(model, start.tokenizer, data.forget, data.retain, options, log=log, progress=False)
    forget = encode_for(model, start.tokenizer, data.forget, start.options, "study")
    retain = encode_for(model, start.tokenizer, data.retain, start.options, "study")
    grid_point = dict(run.options)
    try:
        record = unlearn_once(
            model,
            forget,
            retain,
            damping=grid_point["damping"],
            step=grid_point["step"],
            batch_size=config.batch_size,
            generator=torch.Generator(next(model.parameters()).device).manual_seed(run.seed),
            backend=config.backend,
        )
    except ValueError as error:  # the update is not finite
        raise Diverged(str(error)) from None
    log.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return [record]


def _read(
    path: pathlib.Path,
    *names: str,
    remedy: str = "remove this file, and run the study again, which computes it anew",
) -> dict[str, Any] | None:
    """Return the JSON object of a file, which must have all of these names; None if there is no such file.

    Raises:
        ArgumentError: the file is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise argument_error(str(path), "JSON", f"broken JSON ({type(error).__name__})", remedy) from None
    if not isinstance(value, dict):
        raise argument_error(str(path), "a JSON object of a study", type(value).__name__, remedy)
    missing = [name for name in names if name not in value]
    if missing:
        raise argument_error(str(path), "a JSON object of a study", f"an object without {missing[0]!r}", remedy)
    return value
