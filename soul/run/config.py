"""The options of a run, and the optimizer, schedule and curvature that they ask for."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from soul import losses
from soul.data.examples import REFUSALS, read_refusals
from soul.data.templates import check_template
from soul.models.causal_lm import trained
from soul.optim.curvature import GNB, Curvature, RetainFisher
from soul.optim.optimizer import SophiaG
from soul.optim.soul import SOUL
from soul.run.aim import parse_aim
from soul.run.influence import Influence
from soul.run.rule import check_dynamics
from soul_kernels.backends import BACKENDS, multiplies_bf16
from soul_kernels.errors import argument_error, check_choice, check_positive, check_range, check_whole, shown
from soul_kernels.rounding import ROUNDINGS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIMIZERS = ("soul", "adamw")
CURVATURES = ("unlearn", "retain", "gnb")
DATA_FIELDS = ("max_length", "long_texts", "template", "system", "drop_unusable")
SOUL_FIELDS = (
    "curvature", "clip_target", "gradient_release", "cuda_graph", "state_dtype", "state_offload", "param_rounding",
    "published_code",
)  # fmt: skip
INFLUENCE_FIELDS = (
    "method", "batch_size", "seed", "backend", "aim", "keep_retain", "draws", "replicas", "head_in_shards", *DATA_FIELDS,
)  # fmt: skip
METHODS: dict[str, type] = {**losses.OBJECTIVES, "influence": Influence}
LAYOUT = ("replicas", "cpu_offload", "head_in_shards")  # where a model lies, as soul.distributed.shard takes it
MEMORIZE = "memorize"
CLASSES: dict[str, type] = {**METHODS, MEMORIZE: losses.Memorize}  # METHODS are those that forget


@dataclasses.dataclass
class UnlearnConfig:
    """The options of a run.

    Attributes:
        method: name of the objective, one of ``soul.losses.OBJECTIVES``; or "influence", one second-order step over all data,
            which takes only ``batch_size``, ``seed``, ``backend`` and the options of the data; or "memorize", fine-tuning
            (`soul.losses.Memorize`): "forget" is then the name of the rows to be learned.
        method_options: keyword arguments of the method (gamma, alpha, retain, beta, ...; see `soul.run.influence.Influence`).
        optimizer: "soul" or "adamw".
        lr: peak learning rate.
        betas: decays of the optimizer; None takes (0.9, 0.95) for SOUL and (0.9, 0.999) for AdamW.
        rho: SOUL's clipping threshold.
        clip_target: fraction of the coordinates that should be clipped; rho starts at 0.04 and moves until it is. None: rho is
            fixed.
        bs: number of predictions behind h.
        curvature: source of h: "unlearn", the gradient of every step, as in SOUL's code; "retain", the gradient of the
            cross-entropy of the step's retain tokens; or "gnb", the same with labels drawn from the model. The last two use
            `soul.SophiaG` with bias correction, and refresh h before the step; ``bs`` should then be the number of retain
            tokens in a step.
        curvature_every: steps between two refreshes of h, with "retain" and "gnb".
        state_dtype: dtype of SOUL's states: "float32", "bfloat16" or "8bit"; None: h in fp32, m like the parameters.
        state_offload: keep SOUL's states and low bits in main memory, and pass them over the GPU in every step, two buckets of
            64 MiB at a time; not with ``cuda_graph``. On a CPU, where they are in main memory anyway, this only adds copies.
        cpu_offload: in several processes (torchrun): keep the shards of parameters, gradients and states in main memory
            (FSDP2's ``CPUOffloadPolicy``), and step them there; a layer is copied to the GPU when it computes.
        replicas: number of copies of the shards of a model in several processes (HSDP); a divisor of their number.
        param_rounding: how SOUL rounds parameters below fp32: "nearest", "stochastic" or "compensated"; "auto" is the last.
        published_code: use SOUL with the momentum of its published code.
        weight_decay: decoupled weight decay.
        epochs: passes over the forget set.
        batch_size: forget examples in a micro-batch (each with its refusal for DPO); as many retain sequences go with them.
        accumulate: micro-batches in a step. Loss and gradient are those of one batch of all of them up to rounding: every mean
            is over the whole step. Gradients are added up in the dtype of the parameters.
        head_in_shards: with several processes, never gather the output head, nor the embeddings: each of them has its rows of
            the vocabulary, and their gradient, alone.
        max_grad_norm: global L2 norm that larger gradients are scaled down to; None or inf: no clipping. SOUL clips within its
            step.
        gradient_checkpointing: keep one hidden state per layer, and compute the rest again in the backward pass.
        gradient_release: step each parameter in the backward pass and free its gradient (`soul.release_gradients`); needs SOUL,
            no ``max_grad_norm`` and no ``clip_target``.
        compile: run the model's body under ``torch.compile``; of a model in shards, each layer by itself.
        cuda_graph: replay the whole step, loss and optimizer included, as one CUDA graph (`soul.run.graph`); needs SOUL and a
            GPU.
        schedule: how lr falls after the warm-up: "linear" or "cosine", to 0; or "constant", not at all.
        warmup_ratio: fraction of the steps over which lr rises linearly.
        max_length: tokens of a sequence at most.
        long_texts: "split" or "truncate" longer texts (rows without a prompt); answers are always truncated.
        template: "plain", "chat" or a text: how `soul.Unlearner` asks the questions that it reads (`soul.data.Template`).
        system: system message of the chat template, or None.
        drop_unusable: let `soul.Unlearner` leave out, and count, rows that are blank or whose prompt leaves no room for an
            answer; otherwise they are an error.
        refusals: path of a file with one refusal per line, for "po" and "dpo"; None: those of ``soul.data.REFUSALS``. It is
            read (`soul.data.read_refusals`) when the config is made and whenever it is used.
        eval_every: steps between two evaluations; 0: none. The log then has ``forget_prob`` and ``retain_prob``, the
            probabilities of the answers (`soul.evaluate.answer_probability`) of all forget examples, and of the same number of
            retain examples, the first ones.
        eval_metrics: other numbers that are measured at every evaluation, from ``soul.run.rule.METRICS``: ``forget_rouge`` and
            more of the run's own rows, ``model_utility`` and more of TOFU's files.
        eval_data: folder with TOFU's perturbed files, or "tofu" for those of the hub; for metrics of `soul.evaluate`.
        eval_split: TOFU's name of the forget set.
        eval_rows: number of rows of each of these files that are taken, the first ones; None: all.
        eval_retain_logs: folder with the logs of a model that never saw the forget set, for ``forget_quality``.
        keep_best: a rule, such as "forget_quality subject to model_utility >= 0.95*start": the run ends with the weights of the
            evaluated point that is best by it (`soul.run.rule`). None: with the last ones.
        until_prob: end the run once ``forget_prob`` is at or above it, with the method "memorize"; None: never. Without
            ``eval_every`` it is evaluated after every epoch.
        stop_forget_prob: end the run once ``forget_prob`` is at or below it; None: never.
        stop_retain_prob: end the run, with the reason in the log, once ``retain_prob`` is below it; None: never.
        aim: "auto": lead the run to an aim, the probability of the forget answers at or below chance, while control rows keep
            theirs; or "forget_prob=X", with X in place of chance. ``lr`` is then where the pilot begins, alpha is moved from
            evaluation to evaluation, ``epochs`` is a cap, and ``schedule`` is not used (docs/running.md). None or "off": no
            aim.
        keep_retain: fraction of their probability that control rows must keep for an aim to be reached.
        draws: for a config with an aim: drawn answers to each forget question after the run; one that says the fact is enough
            to fail.
        seed: seed of the data order, of the refusals and of the drawn answers.
        backend: "auto", "triton", "compile", "torch" or "reference".
        reference_cache: directory that keeps what `soul.models.ref_model` computes; or None.

    Raises:
        ArgumentError: an option does not fit, by itself or beside another one.
    """

    method: str = "graddiff"
    method_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: str = "soul"
    lr: float = 1e-5
    betas: tuple[float, float] | None = None
    rho: float = 0.04
    clip_target: float | None = None
    bs: int = 5120
    curvature: str = "unlearn"
    curvature_every: int = 10
    state_dtype: str | None = None
    state_offload: bool = False
    cpu_offload: bool = False
    replicas: int = 1
    param_rounding: str = "auto"
    published_code: bool = False
    weight_decay: float = 0.0
    epochs: int = 5
    batch_size: int = 4
    accumulate: int = 1
    head_in_shards: bool = False
    max_grad_norm: float | None = 1.0
    gradient_checkpointing: bool = False
    gradient_release: bool = False
    compile: bool = False
    cuda_graph: bool = False
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    max_length: int = 512
    long_texts: str = "split"
    template: str = "plain"
    system: str | None = None
    drop_unusable: bool = False
    refusals: str | None = None
    eval_every: int = 0
    eval_metrics: tuple[str, ...] = ()
    eval_data: str | None = None
    eval_split: str = "forget10"
    eval_rows: int | None = None
    eval_retain_logs: str | None = None
    keep_best: str | None = None
    until_prob: float | None = None
    stop_forget_prob: float | None = None
    stop_retain_prob: float | None = None
    aim: str | None = None
    keep_retain: float = 0.95
    draws: int = 4
    seed: int = 0
    backend: str = "auto"
    reference_cache: str | None = None

    def __post_init__(self) -> None:
        self.eval_metrics = tuple(self.eval_metrics)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("backend", self.backend, BACKENDS)
        check_range("warmup_ratio", self.warmup_ratio, high=1.0)
        for name in ("lr", "rho", "weight_decay"):
            check_range(name, getattr(self, name))
        if norm_limit(self) is not None:
            check_positive("max_grad_norm", self.max_grad_norm, "pass inf not to clip")
        if isinstance(self.seed, bool) or not (isinstance(self.seed, int) and -(2**63) <= self.seed < 2**63):
            raise argument_error("seed", "a whole number of 64 bits", shown(self.seed), "for instance 0")
        if not isinstance(self.method_options, dict):
            remedy = "for instance {'beta': 0.1}"
            raise argument_error("method_options", "a dict of the method's arguments", repr(self.method_options), remedy)
        for name in ("epochs", "batch_size", "accumulate", "max_length", "draws", "bs", "curvature_every", "replicas"):
            check_whole(name, getattr(self, name), "check the options")
        check_choice("curvature", self.curvature, CURVATURES)
        check_choice("state_dtype", self.state_dtype, (None, "float32", "bfloat16", "8bit"))
        check_choice("param_rounding", self.param_rounding, ("auto", *ROUNDINGS))
        check_choice("schedule", self.schedule, tuple(SCHEDULES))
        check_choice("long_texts", self.long_texts, ("split", "truncate"))
        check_template(self.template, self.system)
        if self.clip_target is not None:
            check_range("clip_target", self.clip_target, high=1.0)
            if self.rho != UnlearnConfig.rho:
                raise argument_error("rho", f"{UnlearnConfig.rho} with clip_target", self.rho, "rho starts there and moves")
        self._check_aim()
        self._check_refusals()
        self._check_optimizer()
        self._check_release()
        self._check_graph()
        self._check_head()
        self._check_offload()
        self._check_influence()
        if self.published_code and self.curvature != "unlearn":
            raise argument_error(
                "published_code", "False with another curvature", True, "it changes the momentum of SOUL's own step"
            )
        check_whole("eval_every", self.eval_every, "0 evaluates nothing", low=0)
        if self.until_prob is not None and self.method != MEMORIZE:
            remedy = "stop_forget_prob ends a run that unlearns"
            raise argument_error("until_prob", f"None with the method {self.method!r}", self.until_prob, remedy)
        for name in ("stop_forget_prob", "stop_retain_prob", "until_prob"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
                raise argument_error(name, "a probability in [0, 1]", repr(value), "check the options")
            if value is not None and not self.eval_every and name != "until_prob":
                raise argument_error("eval_every", f"a positive number with {name}", 0, "say how often to evaluate")
        check_dynamics(self)

    @property
    def aims(self) -> bool:
        """Whether the run has an aim."""
        return parse_aim(self.aim) is not None

    def _check_aim(self) -> None:
        """Raise for options that do not go with an aim."""
        check_range("keep_retain", self.keep_retain, high=1.0)
        if not self.aims:
            if self.keep_retain != UnlearnConfig.keep_retain:
                raise argument_error("keep_retain", "nothing without an aim", self.keep_retain, "pass an aim, such as 'auto'")
            return
        if self.cuda_graph:
            remedy = "alpha moves, and a graph would repeat the first one: leave it out, or pass the aim 'off'"
            raise argument_error("cuda_graph", "False with an aim", True, remedy)
        for name in ("stop_forget_prob", "stop_retain_prob"):
            if getattr(self, name) is not None:
                raise argument_error(
                    name, "None with an aim", getattr(self, name), "the aim ends the run: leave one of them out"
                )

    def _check_refusals(self) -> None:
        """Raise for refusals that the method does not use, and for a file that holds none."""
        method = CLASSES.get(self.method)
        if self.refusals is not None and not (getattr(method, "relabels", True) or getattr(method, "pairs", True)):
            raise argument_error("refusals", f"None with the method {self.method!r}", self.refusals, "only po and dpo use them")
        self.refusal_texts()

    def refusal_texts(self) -> tuple[str, ...]:
        """Return the refusals that answer the questions to be forgotten.

        Raises:
            ArgumentError: as `soul.data.read_refusals`.
        """
        return REFUSALS if self.refusals is None else read_refusals(self.refusals)

    def _check_optimizer(self) -> None:
        """Raise for options that AdamW would ignore, other than rho and bs: a study gives these for both optimizers."""
        for name in SOUL_FIELDS if self.optimizer != "soul" else ():
            if getattr(self, name) != getattr(UnlearnConfig, name):
                raise argument_error("optimizer", "'soul'", repr(self.optimizer), f"{name} belongs to it")

    def _check_release(self) -> None:
        """Raise for options that need all gradients before the first parameter moves."""
        for name, off in (("max_grad_norm", "inf"), ("clip_target", None)):
            value = norm_limit(self) if name == "max_grad_norm" else self.clip_target
            if self.gradient_release and value is not None:
                remedy = f"it needs all gradients at once: set it to {off}, or leave gradient_release out"
                raise argument_error(name, f"{off} with gradient_release", value, remedy)

    def _check_graph(self) -> None:
        """Raise for options that a graph cannot replay."""
        remedies = {
            "accumulate": "a graph replays one backward pass and its step: raise batch_size",
            "gradient_checkpointing": "it puts random states back, which a capture cannot: leave one of them out",
            "gradient_release": "it steps in the backward pass, and a graph replays one step after it: leave one of them out",
            "state_offload": "a graph replays fixed memory, through which no buckets of states pass: leave one of them out",
        }
        for name in remedies:
            fixed = getattr(UnlearnConfig, name)
            if self.cuda_graph and getattr(self, name) != fixed:
                raise argument_error(name, f"{fixed} with cuda_graph", getattr(self, name), remedies[name])

    def _check_head(self) -> None:
        """Raise for a backend that cannot compute with a part of the head."""
        if self.head_in_shards and self.backend == "reference":
            remedy = "it computes whole rows of logits: leave one of them out"
            raise argument_error("backend", "another one than 'reference' with head_in_shards", repr(self.backend), remedy)

    def _check_offload(self) -> None:
        """Raise for options that do not go with the place of the parameters."""
        if self.cpu_offload and self.state_offload:
            remedy = "the states then are where they are stepped, in main memory: leave it out"
            raise argument_error("state_offload", "False with cpu_offload", True, remedy)

    def _check_influence(self) -> None:
        """Raise for options that the method "influence" does not take."""
        for field in dataclasses.fields(self) if self.method == "influence" else ():
            value = getattr(self, field.name)
            if field.name not in ("method_options", *INFLUENCE_FIELDS) and value != field.default:
                remedy = f"it takes {', '.join(INFLUENCE_FIELDS[1:])} and the method's own options"
                raise argument_error(field.name, f"{field.default!r} with the method 'influence'", value, remedy)

    def decisive(self) -> dict[str, Any]:
        """Return the options that decide the numbers of a run, by name: a run can only be resumed with the same ones.

        A file of refusals is represented by a hash of its content. ``state_offload`` changes no number; where the model lies
        may change last bits, as the number of processes does.
        """
        left_out = ["reference_cache", "state_offload", *LAYOUT, *([] if self.aims else ["aim", "keep_retain"])]
        options = {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}
        options["eval_metrics"] = list(self.eval_metrics)  # as JSON has it
        if self.refusals is not None:
            options["refusals"] = hashlib.blake2b("\n".join(self.refusal_texts()).encode(), digest_size=16).hexdigest()
        return options

    def objective(self) -> losses.Objective | Influence:
        """Return the objective of ``method`` with ``method_options``, or a `soul.run.influence.Influence`.

        Raises:
            ArgumentError: there is no such method, or it does not take one of the options.
        """
        return losses.build(CLASSES, self.method, self.method_options)


def parameter_dtype(
    dtype: str, config: UnlearnConfig, adapters: dict[str, Any] | None = None, device_type: str = "cuda"
) -> str:
    """Return the name of the parameters' dtype; "auto" is resolved, any other name is returned as it is.

    "auto" is bfloat16 for SOUL, which keeps 8 more bits of every weight, and under adapters, which are fp32 themselves; and
    float32 for AdamW and the method "influence". On a processor that multiplies bf16 slowly it is float32 for all.

    Args:
        dtype: a name, or "auto".
        config: `UnlearnConfig`.
        adapters: arguments of `soul.models.add_adapters`, or None.
        device_type: type of the device that the model will run on: "cpu" or "cuda".
    """
    if dtype != "auto":
        return dtype
    keeps_bits = config.optimizer == "soul" and config.method != "influence"
    slow = device_type == "cpu" and not multiplies_bf16()
    return "bfloat16" if (adapters or keeps_bits) and not slow else "float32"


def build_optimizer(model: "PreTrainedModel", config: UnlearnConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a config over all trainable parameters of a model.

    Raises:
        ArgumentError: the model has no trainable parameters.
    """
    params = trained(model)
    if config.optimizer == "adamw":
        betas = config.betas or (0.9, 0.999)
        return torch.optim.AdamW(params, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)
    options: dict[str, Any] = dict(
        lr=config.lr,
        betas=config.betas or (0.9, 0.95),
        rho=config.rho if config.clip_target is None else "auto",
        clip_target=config.clip_target,
        bs=config.bs,
        weight_decay=config.weight_decay,
        max_grad_norm=norm_limit(config),
        capturable=config.cuda_graph,
        state_dtype=config.state_dtype,
        state_offload=config.state_offload,
        param_rounding=config.param_rounding,
        backend=config.backend,
    )
    if config.curvature == "unlearn":
        return SOUL(params, published_code=config.published_code, **options)
    return SophiaG(params, bias_correction=True, **options)


def build_curvature(optimizer: torch.optim.Optimizer, config: UnlearnConfig) -> Curvature | None:
    """Return the `Curvature` that refreshes the optimizer's h before a step, or None if the step itself does it."""
    if config.curvature == "unlearn":
        return None
    # With several micro-batches a gradient is complete only after the last one.
    in_backward = config.gradient_release and config.accumulate == 1
    sophia = cast(SophiaG, optimizer)  # `UnlearnConfig` refuses AdamW with such a curvature
    if config.curvature == "retain":
        return RetainFisher(sophia, config.curvature_every, in_backward=in_backward)
    return GNB(sophia, config.curvature_every, in_backward=in_backward, seed=config.seed)


# The fraction of the steps after the warm-up that is still to come, from 1 down to 0 -> the fraction of the peak learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda remaining: remaining,
    "cosine": lambda remaining: (1 - math.cos(math.pi * remaining)) / 2,
    "constant": lambda remaining: 1.0,
}


def build_scheduler(
    optimizer: torch.optim.Optimizer, steps: int, warmup_ratio: float, schedule: str = "linear"
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a scheduler with a linear warm-up, followed by one of ``SCHEDULES``; lr is above 0 in the first step.

    Args:
        optimizer: its ``lr`` is the peak.
        steps: number of steps of the whole run.
        warmup_ratio: fraction of the steps over which lr rises.
        schedule: a name in ``SCHEDULES``.
    """
    warmup = max(1, round(steps * warmup_ratio))

    def factor(step: int) -> float:
        if step + 1 < warmup:
            return (step + 1) / warmup
        remaining = max(0.0, (steps - step) / max(1, steps - warmup))
        return SCHEDULES[schedule](min(1.0, remaining))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def norm_limit(config: UnlearnConfig) -> float | None:
    """Return the gradient norm that the optimizer clips to, or None if it does not clip."""
    return None if config.max_grad_norm == math.inf else config.max_grad_norm
