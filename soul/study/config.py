"""What a study compares: objectives, arms, the grid that all of them share, sizes and seeds."""

import dataclasses
import itertools
import json

from soul_kernels.backends import BACKENDS
from soul_kernels.errors import argument_error, check_choice, check_range

OBJECTIVES = {"graddiff": "GradDiff", "po": "PO", "npo": "NPO", "simnpo": "SimNPO"}
ARMS = {  # name -> title, options of `soul.run.config.UnlearnConfig`
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
        forget_authors: how many are to be forgotten; as many are held out.
        retain_authors: how many are to be kept.
        rows_per_author: the shortest rows of each author, at most that many.
        vocab_size: of the byte-level BPE tokenizer.
        hidden_size: width of the Llama.
        layers: its depth.
        train_epochs: passes of the training from scratch.
        train_lr: its peak learning rate.
        train_batch: its sequences a step.
        epochs: passes of the unlearning over the forget set.
        batch_size: forget sequences a step; as many retain sequences go with them.
        objectives: names of ``OBJECTIVES``.
        lrs: arm -> learning rates, as many for each; with ``alphas`` its grid.
        alphas: weights of the retain term; that of the forget term is 1.
        clip_target: fraction of clipped coordinates that SOUL with another curvature keeps to.
        curvature_every: steps from one refresh of its h to the next.
        dampings: of the influence update; with ``steps`` its grid, of as many points.
        steps: factors of the influence update.
        keep: part of the retain probability before unlearning that a run must keep to be chosen.
        retain_rows: retain rows to measure probability on; at most as many are asked with false answers.
        seeds: of initial weights, order of the data, and drawn labels; each has models of its own.
        device: "auto", "cpu" or "cuda".
        backend: "auto", "triton", "compile", "torch" or "reference".
        workers: processes, on a CPU; 0: one a core.
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
    objectives: tuple = tuple(OBJECTIVES)
    lrs: dict = dataclasses.field(default_factory=lambda: dict.fromkeys(ARMS, (2e-4, 6e-4, 2e-3)))
    alphas: tuple = (1.0, 5.0)
    clip_target: float = 0.3
    curvature_every: int = 5
    dampings: tuple = (1e-4, 3e-4, 1e-3)
    steps: tuple = (0.25, 1.0)
    keep: float = 0.95
    retain_rows: int = 40
    seeds: tuple = (0, 1, 2)
    device: str = "auto"
    backend: str = "auto"
    workers: int = 0

    def __post_init__(self):
        for name in ("objectives", "alphas", "dampings", "steps", "seeds"):
            value = tuple(getattr(self, name))
            setattr(self, name, value)
            if not value or len(set(value)) < len(value):
                raise argument_error(name, "at least one, each once", value, "check the options")
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
            raise argument_error("lrs", "grids of as many points for every arm", sizes, "no arm is searched more than another")
        check_range("keep", self.keep, high=1.0)
        check_choice("backend", self.backend, BACKENDS)

    def decisive(self):
        """The options that decide the numbers of one run, as JSON knows them: a study goes on with the same ones only."""
        spared = ("objectives", "seeds", "workers", "device", "backend", "keep")
        options = {name: value for name, value in dataclasses.asdict(self).items() if name not in spared}
        return json.loads(json.dumps(options))


@dataclasses.dataclass(frozen=True)
class Run:
    """One point of a grid, from one start; ``options`` are pairs of names and numbers."""

    seed: int
    objective: str
    arm: str
    options: tuple

    @property
    def name(self):
        """A file name."""
        return "_".join([self.objective, self.arm, *(f"{name}{value:g}" for name, value in self.options)])


def runs(config):
    """All runs of a study, seed by seed."""
    found = []
    for seed in config.seeds:
        for objective, arm in itertools.product(config.objectives, ARMS):
            grid = itertools.product(config.lrs[arm], config.alphas)
            found += [Run(seed, objective, arm, (("lr", lr), ("alpha", alpha))) for lr, alpha in grid]
        grid = itertools.product(config.dampings, config.steps)
        found += [Run(seed, INFLUENCE, INFLUENCE, (("damping", d), ("step", step))) for d, step in grid]
    return found


PRESETS = {
    # Two cores, 12 to 17 minutes: 306 runs of a few seconds, two models of 0.6 M parameters a seed.
    "laptop": StudyConfig(),
    # One GPU, all 200 authors, about 90 M parameters; one seed, so that it stays below ten minutes: not measured so far.
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
    # Two cores, below five minutes, on people made up.
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
