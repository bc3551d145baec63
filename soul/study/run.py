"""The runs of a study, each from the start of its seed to a JSON file; what is there already is not run again."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import platform
import sys
import threading
import time

import torch

from soul._extras import require
from soul.checkpoint.local import save_model
from soul.evaluate.logs import write_json
from soul.models.encoding import encode_for
from soul.models.loading import load, pick_device
from soul.output.console import safe_stream
from soul.output.directory import check_no_links, check_output, lock
from soul.output.files import sweep, sync, whole
from soul.run.config import UnlearnConfig
from soul.run.influence import unlearn_once
from soul.run.loop import Diverged, unlearn
from soul.study.config import ARMS, INFLUENCE, runs
from soul.study.measure import encode_start, measure
from soul.study.scratch import new_model, train, train_tokenizer
from soul_kernels.backends import resolve_backend
from soul_kernels.errors import argument_error

STUDY_FILE, RESULTS_FILE = "study.json", "results.json"


@dataclasses.dataclass(frozen=True)
class Study:
    """A study and where it is kept: what every worker needs."""

    output: pathlib.Path
    data: object
    config: object

    def seed_dir(self, seed):
        """The directory of a seed."""
        return self.output / f"seed{seed}"

    def start(self, seed):
        """The file of what its models were before unlearning."""
        return self.seed_dir(seed) / "start.json"

    def result(self, run):
        """The file of a run."""
        return self.seed_dir(run.seed) / "runs" / f"{run.name}.json"


def check_ready(output, config):
    """Finds what would stop a study, before anything is written or trained; returns the path of the output directory.

    Raises:
        ArgumentError: the output directory is neither empty nor that of a study, or device or backend are not to be had.
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


def run_study(output, data, config):
    """Runs what is missing of a study: results in ``seed*/``.

    Args:
        output: path of a directory, from `check_ready`.
        data: `soul.study.data.StudyData`.
        config: `soul.study.config.StudyConfig`.

    Returns:
        The results, a dict: ``config``, ``data``, ``environment``, ``starts`` by seed, ``rows``, and ``seconds`` of this call,
        ``resumed`` where some runs had been there before.

    Raises:
        ArgumentError: the directory holds a study of other data or sizes, or one that is going on; nothing was written.
    """
    begun, study = time.perf_counter(), Study(output, data, config)
    identity = {"config": config.decisive(), "data": data.fingerprint()}
    _claim(output / STUDY_FILE, identity)
    with open(output / STUDY_FILE, "a", encoding="utf-8") as file:
        lock(file, "output", output)  # two would write the same models at once
        for directory in (output, *output.glob("seed*"), *output.glob("seed*/*")):
            if directory.is_dir():
                sweep(directory)
        _save_tokenizer(study)
        starts = [(seed, part) for seed in config.seeds for part in ("full", "retain") if _trained(study, seed, part) is None]
        unmeasured = [seed for seed in config.seeds if _read(study.start(seed), "full", "retain", "training") is None]
        todo = [run for run in runs(config) if _read(study.result(run), "objective", "arm", "seed") is None]
        with _workers(config) as each:
            each(_train, study, starts, "train")
            each(_measure_start, study, unmeasured, "measure")
            each(run_one, study, todo, "unlearn")
    kept, past = {}, output / RESULTS_FILE
    if not starts and not todo and past.exists():  # only the report is made anew
        before = _read(past, "environment", "seconds", "resumed")
        kept = {name: before[name] for name in ("environment", "seconds", "resumed")}
    results = {
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "data": data.note,
        "environment": environment(config, worker_count(config)),
        "starts": {str(seed): _read(study.start(seed)) for seed in config.seeds},
        "rows": [_read(study.result(run)) for run in runs(config)],
        "seconds": time.perf_counter() - begun,
        "resumed": len(todo) < len(runs(config)),
    }
    return results | kept


def environment(config, workers):
    """Names of the device and versions of what computed."""
    device = pick_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu()}, {workers} processes of one thread"
    return {"device": name, "torch": torch.__version__, "transformers": require("transformers", "hf").__version__}


def _cpu():
    """The name of the processor, where Linux knows it."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or "CPU"


def _claim(path, identity):
    if path.exists():
        found = _read(path, "config", "data", remedy="start the study in a new directory")
        wrong = [key for key in identity["config"] if found["config"].get(key) != identity["config"][key]]
        if wrong or found["data"] != identity["data"]:
            got = f"one with another {', '.join(wrong) or 'set of texts'}"
            raise argument_error("output", "the directory of this study, or a new one", got, "choose another one")
    else:
        write_json(path, identity)


def worker_count(config):
    """Processes: one on a GPU, else what the config says."""
    if pick_device(config.device).type == "cuda":
        return 1
    return config.workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


@contextlib.contextmanager
def _workers(config):
    """Gives ``each(function, study, jobs, title)``, which does jobs: on a CPU in ``worker_count`` processes of one thread."""
    count = worker_count(config)
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    options = dict(mp_context=context, initializer=_in_worker)
    pool = concurrent.futures.ProcessPoolExecutor(count, **options) if count > 1 else None

    def each(function, study, jobs, title):
        with require("tqdm", "hf").tqdm(total=len(jobs), desc=title, file=safe_stream(sys.stderr), disable=not jobs) as bar:
            if pool is None:
                for job in jobs:
                    function(study, job)
                    bar.update()
            else:
                try:
                    for done in concurrent.futures.as_completed([pool.submit(function, study, job) for job in jobs]):
                        done.result()
                        bar.update()
                except concurrent.futures.BrokenExecutor as error:
                    text = f"{title}: a worker process has died, for want of memory perhaps; the same command goes on"
                    raise ChildProcessError(f"{text} from the results in {study.output}") from error

    logging = require("transformers", "hf").utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one bar is enough
    try:
        yield each
    finally:
        if shown:
            logging.enable_progress_bar()
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _in_worker():
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    require("transformers", "hf").utils.logging.disable_progress_bar()


def _end_with_parent():
    """A worker would wait for ever where its parent was killed. Results are written whole or not at all."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _clock(config):
    """A stop-watch that runs: seconds of the wall on a GPU, of the processor on a CPU, where processes share it."""
    clock = time.perf_counter if pick_device(config.device).type == "cuda" else time.process_time
    begun = clock()
    return lambda: clock() - begun


def _save_tokenizer(study):
    place = study.output / "tokenizer"
    if not (place / "tokenizer_config.json").exists():
        examples = [*study.data.forget, *study.data.retain]
        place.mkdir(exist_ok=True)
        with whole(place, last=("tokenizer_config.json",)) as aside:
            train_tokenizer(examples, study.config.vocab_size).save_pretrained(aside)
    _tokenizer(study)


def _tokenizer(study):
    place = study.output / "tokenizer"
    try:
        return require("transformers", "hf").AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:  # whatever the libraries say of a truncated file
        got, remedy = f"a damaged one ({type(error).__name__})", "restore it from seed*/full, or start in a new directory"
        raise argument_error(str(place), "the tokenizer of the study", got, remedy) from error


def _trained(study, seed, part):
    """What is known of the training of one of the two models of a seed; None where it has not ended."""
    return _read(study.seed_dir(seed) / f"{part}.json", "loss", "parameters", "seconds")


def _train(study, job):
    """Trains one of the two models of a seed and saves it."""
    (seed, part), config, data, clock = job, study.config, study.data, _clock(study.config)
    tokenizer = _tokenizer(study)
    model = new_model(tokenizer, config, seed)
    examples = data.retain if part == "retain" else [*data.forget, *data.retain]
    losses = train(model, encode_for(model, tokenizer, examples, UnlearnConfig(), part), config, seed)
    place = study.seed_dir(seed) / part
    place.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, place)
    parameters = sum(p.numel() for p in model.parameters())
    seconds = clock()
    write_json(place.with_name(f"{part}.json"), {"loss": losses, "parameters": parameters, "seconds": seconds})


_LOADED = {}  # (directory, seed) -> `Start`, the last one only


def start_of(study, seed):
    """The `soul.study.measure.Start` of a seed, kept for the next run."""
    key = (study.output, seed)
    if key not in _LOADED:
        _LOADED.clear()
        device = pick_device(study.config.device)
        models = [load(study.seed_dir(seed) / part)[0].to(device) for part in ("full", "retain")]
        _LOADED[key] = encode_start(*models, _tokenizer(study), study.data, study.config)
    return _LOADED[key]


def _measure_start(study, seed):
    """Measures the two models of a seed."""
    start = start_of(study, seed)
    training = {part: _trained(study, seed, part) for part in ("full", "retain")}
    numbers = {part: measure(model, start) for part, model in (("full", start.full), ("retain", start.retain_model))}
    write_json(study.start(seed), {"seed": seed, "training": training, **numbers})


def unlearn_config(run, config):
    """The `soul.run.config.UnlearnConfig` of a run that is not of influence."""
    options, given = dict(run.options), dict(ARMS[run.arm][1])
    if "curvature" in given:
        given |= {"clip_target": config.clip_target, "curvature_every": config.curvature_every}
    return UnlearnConfig(
        method=run.objective,
        method_options={"alpha": options["alpha"]},
        lr=options["lr"],
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=run.seed,
        backend=config.backend,
        **given,
    )


def run_one(study, run):
    """One run, and what is measured on its model, to its file; and its log beside it. One that diverged is a result."""
    start, path = start_of(study, run.seed), study.result(run)
    log = path.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"seed": run.seed, "objective": run.objective, "arm": run.arm, **dict(run.options)}
    model, clock = copy.deepcopy(start.full), _clock(study.config)
    try:
        records = _unlearn(model, start, study, run, log)
        row |= {"seconds": clock(), "steps": len(records)}
        clipped = [record["clip_fraction"] for record in records if "clip_fraction" in record]
        if clipped:
            row["clip_fraction"] = sum(clipped) / len(clipped)
        numbers = measure(model, start)
        if not all(map(math.isfinite, numbers.values())):
            raise Diverged("what the model says is not finite")
        row |= numbers
    except Diverged as error:
        row["diverged"] = str(error)
    row["all_seconds"] = clock()
    if log.exists():
        sync(log)  # before the result, which says that the run is complete
    write_json(path, row)


def _unlearn(model, start, study, run, log):
    """Unlearns; returns the records of the steps."""
    data, config = study.data, study.config
    if run.objective != INFLUENCE:
        options = unlearn_config(run, config)
        return unlearn(model, start.tokenizer, data.forget, data.retain, options, log=log, progress=False)
    forget, retain = (encode_for(model, start.tokenizer, part, start.options, "study") for part in (data.forget, data.retain))
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(run.seed)
    try:
        record = unlearn_once(
            model, forget, retain, **dict(run.options), batch_size=config.batch_size, generator=generator,
            backend=config.backend,
        )  # fmt: skip
    except ValueError as error:  # the update is not finite
        raise Diverged(str(error)) from None
    log.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return [record]


def _read(path, *names, remedy="remove this file, and run the study again, which computes it anew"):
    """Return a JSON object that has all of these names; None where there is no such file.

    Raises:
        ArgumentError: the file is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise argument_error(str(path), "JSON", f"broken JSON ({type(error).__name__})", remedy) from None
    missing = [name for name in names if not isinstance(value, dict) or name not in value]
    if missing or not isinstance(value, dict):
        got = f"an object without {missing[0]!r}" if isinstance(value, dict) else type(value).__name__
        raise argument_error(str(path), "a JSON object of a study", got, remedy)
    return value
