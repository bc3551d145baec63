"""The comparisons of a study: objectives, arms, the grids of options, sizes and seeds."""

import dataclasses
import itertools
import json
from typing import Any

from soul_kernels.backends import BACKENDS
from soul_kernels.errors import argument_error, check_choice, check_range

OBJECTIVES = {"graddiff": "GradDiff", "po": "PO", "npo": "NPO", "simnpo": "SimNPO"}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> title, options of `soul.run.config.UnlearnConfig`
    "adamw": ("AdamW", {"optimizer": "adamw"}),
    "soul": ("SOUL as published", {"optimizer": "soul", "published_code": True}),
    "soul_retain": ("SOUL, retain curvature", {"optimizer": "soul", "curvature": "retain"}),
    "soul_gnb": ("SOUL, GNB on retain tokens", {"optimizer": "soul", "curvature": "gnb"}),
}
INFLUENCE = "influence"  # an objective and an arm of its own
BASELINE = "adamw"


@dataclasses.dataclass
class StudyConfig:
    """Everything that decides a study.

    Attributes:
        forget_authors: number of authors to forget; as many are held out.
        retain_authors: number of authors to retain.
        rows_per_author: number of rows taken from each author, the shortest ones.
        vocab_size: vocabulary of the byte-level BPE tokenizer.
        hidden_size: width of the Llama.
        layers: number of layers of the Llama.
        train_epochs: epochs of the training from scratch.
        train_lr: peak learning rate of that training.
        train_batch: sequences per step of that training.
        epochs: epochs of unlearning over the forget set.
        batch_size: forget sequences per step of unlearning, with as many retain sequences.
        objectives: names in ``OBJECTIVES``.
        lrs: arm -> learning rates, equally many for each arm; together with ``alphas`` they are the grid of the arm.
        alphas: weights of the retain term; the weight of the forget term is 1.
        clip_target: fraction of coordinates to clip in the arms with retain curvature and GNB, as in `UnlearnConfig`.
        curvature_every: steps between two refreshes of the curvature in these arms.
        dampings: dampings of the influence update; with ``steps`` they are its grid, of as many points as that of an arm.
        steps: factors of the influence update.
        keep: a run can be chosen if it keeps at least this fraction of the retain probability before unlearning.
        retain_rows: number of retain rows to measure probability on; at most as many are asked with false answers.
        seeds: seeds of the initial weights, the order of the data, and drawn labels; each seed has models of its own.
        device: "auto", "cpu" or "cuda".
        backend: "auto", "triton", "compile", "torch" or "reference".
        workers: number of processes on a CPU; 0: one for each core.

    Raises:
        ArgumentError: a value is unknown or out of range, or the grids of the arms differ in size.
    """

    forget_authors: int = 12
    retain_authors: int = 48
    rows_per_author: int = 5
    vocab_size: int = 2048
    hidden_size: int = 128
    layers: int = 2
    train_epochs: int = 40
    train_lr: float = 3e-3
    train_batch: int = 16
    epochs: int = 5
    batch_size: int = 6
    objectives: tuple[str, ...] = tuple(OBJECTIVES)
    lrs: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=lambda: dict.fromkeys(ARMS, (2e-4, 6e-4, 2e-3)))
    alphas: tuple[float, ...] = (1.0, 5.0)
    clip_target: float = 0.3
    curvature_every: int = 5
    dampings: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    steps: tuple[float, ...] = (0.25, 1.0)
    keep: float = 0.95
    retain_rows: int = 40
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "auto"
    backend: str = "auto"
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("objectives", "alphas", "dampings", "steps", "seeds"):
            value = tuple(getattr(self, name))
            setattr(self, name, value)
            if not value or len(set(value)) < len(value):
                raise argument_error(name, "at least one value, and none twice", value, "check the options")
        for name in self.objectives:
            check_choice("objectives", name, tuple(OBJECTIVES))
        for seed in self.seeds:
            if not 0 <= seed < 2**63:
                raise argument_error("seed", "a whole number in [0, 2^63)", seed, "choose another one")
        if self.lrs.keys() != ARMS.keys():
            raise argument_error("lrs", f"learning rates of {', '.join(ARMS)}", ", ".join(self.lrs), "every arm has its own")
        self.lrs = {arm: tuple(lrs) for arm, lrs in self.lrs.items()}
        sizes = {arm: len(set(lrs)) * len(self.alphas) for arm, lrs in self.lrs.items()}
        sizes[INFLUENCE] = len(self.dampings) * len(self.steps)
        if len(set(sizes.values())) > 1:
            raise argument_error("lrs", "grids of equal size for every arm", sizes, "no arm may be searched more than another")
        check_range("keep", self.keep, high=1.0)
        check_choice("backend", self.backend, BACKENDS)

    def decisive(self) -> dict[str, Any]:
        """Return the options that decide the numbers of a run, as JSON values. A resumed study must have the same ones."""
        may_change = ("objectives", "seeds", "workers", "device", "backend", "keep")
        options = {name: value for name, value in dataclasses.asdict(self).items() if name not in may_change}
        return json.loads(json.dumps(options))


@dataclasses.dataclass(frozen=True)
class Run:
    """One point of a grid, from the models of one seed; ``options`` are pairs of a name and a number."""

    seed: int
    objective: str
    arm: str
    options: tuple[tuple[str, float], ...]

    @property
    def name(self) -> str:
        """The name of the run's files, without a suffix."""
        return "_".join([self.objective, self.arm, *(f"{name}{value:g}" for name, value in self.options)])


def runs(config: StudyConfig) -> list[Run]:
    """Return all runs of a study, seed by seed."""
    all_runs = []
    for seed in config.seeds:
        for objective, arm in itertools.product(config.objectives, ARMS):
            grid = itertools.product(config.lrs[arm], config.alphas)
            all_runs += [Run(seed, objective, arm, (("lr", lr), ("alpha", alpha))) for lr, alpha in grid]
        grid = itertools.product(config.dampings, config.steps)
        all_runs += [Run(seed, INFLUENCE, INFLUENCE, (("damping", damping), ("step", step))) for damping, step in grid]
    return all_runs


PRESETS = {
    # 12 to 17 minutes on two cores: 306 runs of a few seconds, two models of 0.6 M parameters for each seed.
    "laptop": StudyConfig(),
    # One GPU, all 200 authors, about 90 M parameters; one seed, meant to stay below ten minutes; its time is not measured yet.
    "tofu": StudyConfig(
        forget_authors=20,
        retain_authors=160,
        rows_per_author=20,
        vocab_size=8192,
        hidden_size=768,
        layers=12,
        train_epochs=20,
        train_lr=6e-4,
        train_batch=64,
        batch_size=32,
        lrs={"adamw": (1e-4, 3e-4), "soul": (3e-5, 1e-4), "soul_retain": (1e-4, 3e-4), "soul_gnb": (1e-4, 3e-4)},
        dampings=(1e-4, 1e-3),
        retain_rows=200,
        seeds=(0,),
    ),
    # Below five minutes on two cores, on fictitious authors.
    "demo": StudyConfig(
        forget_authors=4,
        retain_authors=36,
        rows_per_author=10,
        vocab_size=1024,
        objectives=("graddiff", "npo"),
        alphas=(1.0,),
        steps=(0.25,),
        seeds=(0,),
    ),
}
