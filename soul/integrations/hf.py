"""The Hugging Face Trainer with SOUL's optimizers and fused unlearning losses::

    class UnlearnTrainer(SOULTrainerMixin, transformers.Trainer):
        pass

    args = TrainingArguments(..., learning_rate=1e-5, max_grad_norm=0, remove_unused_columns=False)
    trainer = UnlearnTrainer(model, args, train_dataset=UnlearningDataset(forget, retain), data_collator=collate_unlearning,
                             objective=soul.losses.NPO(beta=0.1), soul_args={"rho": 0.04, "max_grad_norm": 1.0})
    trainer.train()

Without ``objective`` the mixin changes the optimizer only. It works with transformers 4.57 and 5, and with 4.45, which
open-unlearning pins; with accelerate, DDP, FSDP2, HSDP, tensor parallelism and models wrapped by peft. Nothing is patched: the
mixin overrides public methods of the Trainer and calls the base class for everything that is not its own. These methods must
keep their names, and so must `SOULTrainerMixin.prepare_reference_model`, which `soul.integrations.open_unlearning` overrides.
"""

import collections.abc
import dataclasses
import inspect
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from soul import losses
from soul.data.examples import Sequence
from soul.distributed.shards import hidden_sharding, is_sharded
from soul.integrations import zero
from soul.model_loss import unlearning_loss
from soul.models import causal_lm
from soul.models.head_call import call_at_head, shifted_labels
from soul.optim.curvature import GNB, RetainFisher
from soul.optim.optimizer import SophiaG
from soul.optim.soul import SOUL
from soul_kernels import Head, linear_gnb, linear_objective
from soul_kernels.errors import argument_error, check_choice
from soul_kernels.tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    _Trainer = object  # the base class stands after the mixin: class X(SOULTrainerMixin, transformers.Trainer)

OPTIMIZERS: dict[str, type[SophiaG]] = {"soul": SOUL, "sophiag": SophiaG}
CURVATURES = (None, "retain_fisher", "gnb")


def optimizer_of(soul_args: object, args: "TrainingArguments") -> tuple[type[SophiaG], dict[str, Any]]:
    """Return the class and the keyword arguments of the optimizer that a Trainer will make.

    Args:
        soul_args: None, a mapping or a dataclass: ``optimizer`` ("soul", the default, or "sophiag"), and any keyword argument
            of that optimizer but lr and weight_decay.
        args: TrainingArguments. Their ``learning_rate`` is the lr, which schedulers then change. The weight_decay is in
            the Trainer's own parameter groups, and 0 there for biases and norms.

    Returns:
        The class, and its keyword arguments. Under DeepSpeed ``max_grad_norm`` is not among them: DeepSpeed clips
        (`SOULTrainerMixin`).

    Raises:
        ArgumentError: an option does not exist or is set elsewhere; Trainer and optimizer would both clip; or, under DeepSpeed,
            an option needs the gradients of all processes.
    """
    options = _entries(soul_args)
    name = options.pop("optimizer", "soul")
    check_choice("soul_args.optimizer", name, tuple(OPTIMIZERS))
    for option, argument in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        if option in options:
            remedy = f"set {argument} of the TrainingArguments"
            raise argument_error(f"soul_args.{option}", "none, since the Trainer sets it", options[option], remedy)
    known = {*inspect.signature(OPTIMIZERS[name]).parameters} - {"params"}
    for option in options:
        if option not in known:
            raise argument_error("soul_args", f"options of {OPTIMIZERS[name].__name__} ({', '.join(sorted(known))})", option,
                                 "check the name")  # fmt: skip
    if options.get("max_grad_norm") is not None and args.max_grad_norm:
        remedy = "set it to 0: the step clips by soul_args.max_grad_norm"
        raise argument_error("args.max_grad_norm", "0 with soul_args.max_grad_norm", args.max_grad_norm, remedy)
    if getattr(args, "deepspeed_plugin", None) is not None:
        options.pop("max_grad_norm", None)
        if options.get("skip_nonfinite"):
            remedy = "it steps the Trainer's groups one after the other: set check_grad_overflow in its section bf16"
            raise argument_error("soul_args.skip_nonfinite", "not True under DeepSpeed", "True", remedy)
    return OPTIMIZERS[name], {"lr": args.learning_rate, **options}


class SOULTrainerMixin(_Trainer):
    """SOUL's optimizers and, with an objective, unlearning for a Trainer: ``class MyTrainer(SOULTrainerMixin, Trainer)``.

    Learning rate, weight decay and its exceptions, schedules, gradient accumulation and checkpoints stay the Trainer's.
    An optimizer passed as ``optimizers=`` or ``optimizer_cls_and_kwargs=`` is used in place of SOUL's, as in any Trainer.

    Clipping: either by the Trainer's ``max_grad_norm`` (its default is 1); or within the step, without a pass over the
    gradients and without waiting for the device, by ``soul_args={"max_grad_norm": 1.0}`` and ``max_grad_norm=0`` in the
    TrainingArguments. Under DeepSpeed, which steps the Trainer's parameter groups one after the other, that number becomes
    ``gradient_clipping`` of DeepSpeed's configuration.

    Gradient accumulation: the loss is the mean over micro-batches of their losses, each a mean over its own tokens or
    sequences. ``num_items_in_batch`` is accepted, and does not change it.

    Args:
        *args: as for the Trainer.
        soul_args: as in `optimizer_of`. Also ``curvature`` ("retain_fisher" or "gnb", on the retain batch; for "sophiag",
            whose h stays 0 otherwise) and ``every`` (optimizer steps from one refresh to the next, 10).
        objective: a `soul.losses.Objective`; None: the Trainer's own loss.
        ref_model: a frozen reference model for objectives that need one; None: a copy of the model is made if it is needed,
            which works for any model but one in shards (tensor parallelism).
            Without ``objective`` it goes to the base class, which must have an argument of this name, as TRL's DPOTrainer does.
        **kwargs: as for the Trainer.

    Raises:
        ArgumentError: options do not fit together; an objective for a trainer of TRL, which takes only its own data sets; or a
            reference model that nothing would use. Raised before anything is loaded or moved.
    """

    compat: str | None = None  # as in `unlearning_loss`

    def __init__(
        self,
        *args: Any,
        soul_args: object = None,
        objective: losses.Objective | None = None,
        ref_model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.update(self._arguments_of_base(objective, ref_model))
        options = _entries(soul_args)
        self.curvature = options.pop("curvature", None)
        self.every = options.pop("every", 10)
        self.soul_args = options
        self.objective = objective
        self.ref_model = ref_model
        optimizer = options.get("optimizer", "soul")
        check_choice("soul_args.optimizer", optimizer, tuple(OPTIMIZERS))
        check_choice("soul_args.curvature", self.curvature, CURVATURES)
        if (self.curvature is None) != (optimizer == "soul"):
            remedy = "'retain_fisher' or 'gnb' for sophiag, whose h stays 0 otherwise; soul refreshes it by itself"
            raise argument_error("soul_args.curvature", "one for sophiag, none for soul", repr(self.curvature), remedy)
        if self.curvature is not None and objective is None:
            raise argument_error("soul_args.curvature", "None without an objective", repr(self.curvature), "pass an objective")
        training_args = next((a for a in (*args, kwargs.get("args")) if hasattr(a, "remove_unused_columns")), None)
        if training_args is not None:
            optimizer_of(options, training_args)
            self._check_deepspeed(getattr(training_args, "deepspeed_plugin", None))
            if objective is not None and training_args.remove_unused_columns:
                remedy = "the Trainer would remove forget and retain, which are no arguments of the model"
                raise argument_error("args.remove_unused_columns", "False with an objective", True, remedy)
        self._hessian: Any = None  # GNB or RetainFisher, made once there is an optimizer
        super().__init__(*args, **kwargs)
        plugin = getattr(self.args, "deepspeed_plugin", None)
        limit = options.get("max_grad_norm")
        if plugin is not None and limit is not None:  # the Trainer has put args.max_grad_norm here, which is 0
            plugin.deepspeed_config["gradient_clipping"] = limit
        if objective is not None:
            self._prepare_reference(objective)
            self.add_callback(_epoch_callback(self.train_dataset))

    def _check_deepspeed(self, plugin: Any) -> None:
        """Raise for options that cannot work under DeepSpeed; ``plugin`` is accelerate's, or None without DeepSpeed."""
        if plugin is None:
            return
        if self.curvature is not None:
            remedy = "it adds the gradients of all backward passes up, so h would have none of its own: use 'soul', or FSDP2"
            raise argument_error("soul_args.curvature", "none under DeepSpeed", repr(self.curvature), remedy)
        if "optimizer" in plugin.deepspeed_config:
            got = plugin.deepspeed_config["optimizer"]
            remedy = "take it out: DeepSpeed would use that one"
            raise argument_error("DeepSpeed's configuration", "no optimizer with soul_args", got, remedy)

    def _arguments_of_base(
        self, objective: losses.Objective | None, ref_model: torch.nn.Module | None
    ) -> dict[str, torch.nn.Module]:
        """Return the base class's arguments beside the caller's: a reference model, if there is no objective that takes it.

        Raises:
            ArgumentError: an objective for a trainer of TRL, or a reference model that neither an objective nor the base class
                uses.
        """
        bases: tuple[Any, ...] = type(self).__mro__[type(self).__mro__.index(SOULTrainerMixin) + 1 :]
        if objective is not None:
            for base in bases:
                if base.__module__.split(".")[0] == "trl":
                    remedy = "its data sets have columns of its own; use class X(SOULTrainerMixin, transformers.Trainer)"
                    raise argument_error("objective", f"None with trl's {base.__name__}", objective, remedy)
            return {}
        if ref_model is None:
            return {}
        if not any("ref_model" in inspect.signature(base.__init__).parameters for base in bases):
            remedy = "pass objective=, or leave the reference model out"
            raise argument_error("ref_model", "None without an objective", type(ref_model).__name__, remedy)
        return {"ref_model": ref_model}

    def get_optimizer_cls_and_kwargs(
        self, args: "TrainingArguments", model: Any = None
    ) -> tuple[type[SophiaG], dict[str, Any]]:
        """Return the class and the keyword arguments of the optimizer for `create_optimizer`; see `optimizer_of`."""
        return optimizer_of(self.soul_args, args)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer over the Trainer's parameter groups, unless one was passed.

        Raises:
            ArgumentError: this version of the Trainer made another optimizer.
        """
        passed = self.optimizer is not None or getattr(self, "optimizer_cls_and_kwargs", None) is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not passed and not isinstance(self._inner_optimizer(), SophiaG):
            remedy = "pass optimizers=(soul.SOUL(...), None)"
            raise argument_error("transformers", "a Trainer that makes the optimizer of its subclass", type(optimizer), remedy)
        return optimizer

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return the objective of an unlearning batch, by `unlearning_loss`, or the Trainer's loss of any other batch."""
        if self.objective is None or "forget" not in inputs:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss, outputs = unlearning_loss(
            model, inputs, self.objective, ref_model=self.ref_model, compat=self.compat, return_outputs=True
        )
        if model.training and self._trainer_assumes_division(num_items_in_batch):
            loss = loss / getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return the objective of an unlearning batch, without logits, or the Trainer's result for any other batch."""
        if self.objective is None or "forget" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def training_step(self, model: torch.nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take the Trainer's step. With a curvature, refresh h at the last micro-batch of an optimizer step if it is due."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.curvature is not None and self.accelerator.sync_gradients:
            optimizer = self._inner_optimizer()
            if self._hessian is None or self._hessian.optimizer is not optimizer:
                kind = GNB if self.curvature == "gnb" else RetainFisher
                self._hessian = kind(optimizer, self.every)
            self._hessian.schedule.calls = self.state.global_step  # so that a resumed run goes on where it was
            retain = self._prepare_inputs(inputs["retain"])
            with self.compute_loss_context_manager():
                self._hessian.step(lambda: self._curvature_loss(model, retain))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with ``clip_fraction`` beside the loss.

        It is the fraction of the coordinates that moved by the full lr. It is left out under FSDP1, where the
        optimizer sees one process's piece only.
        """
        optimizer = self._inner_optimizer()
        counts_all = isinstance(optimizer, SophiaG) and all(
            hidden_sharding(group["params"]) != "FSDP1" for group in optimizer.param_groups
        )
        if "loss" in logs and counts_all:
            stepped = [group for group in optimizer.telemetry()["groups"] if group["numel"]]
            if stepped:
                clipped = sum(group["clip_fraction"] * group["numel"] for group in stepped)
                logs = {**logs, "clip_fraction": clipped / sum(group["numel"] for group in stepped)}
        return super().log(logs, *args, **kwargs)

    def prepare_reference_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return a frozen copy of ``model``, whole and in evaluation mode, prepared by accelerate as the model is."""
        copied = zero.whole_copy(model).to(self.accelerator.device).eval().requires_grad_(False)
        return self.accelerator.prepare_model(copied, evaluation_mode=True)

    def _prepare_reference(self, objective: losses.Objective) -> None:
        """Provide the reference model that the objective needs, or its results, by the cheapest means.

        Log-probabilities go into the data sets, if they are ours and nothing else is needed. A peft model is its own reference
        model, with its adapters off. Otherwise a copy of the model is kept.

        Raises:
            ArgumentError: the model would have to be copied, and its parameters are in shards already.
        """
        if self.ref_model is not None or not (objective.needs_reference or objective.divergence):
            return
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        ours = [dataset for dataset in (self.train_dataset, *evaluated) if isinstance(dataset, UnlearningDataset)]
        if objective.divergence is None and any(dataset is self.train_dataset for dataset in ours):
            with zero.computing(self.model):
                for dataset in ours:
                    dataset.add_reference(self.model)
        elif not causal_lm.has_adapters(causal_lm.bare(self.model)):
            if any(map(is_sharded, self.model.parameters())):  # whose forward functions belong to this very model
                expected = f"a reference model for {type(objective).__name__}, since a model in shards cannot be copied"
                remedy = "load one with the same distributed_config, and pass it"
                raise argument_error("ref_model", expected, None, remedy)
            self.ref_model = self.prepare_reference_model(self.model)

    def _trainer_assumes_division(self, num_items_in_batch: Any) -> bool:
        """Tell whether the Trainer assumes that the loss was divided by the number of micro-batches, which ours never is."""
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if is_scaled is not None:
            return is_scaled
        by_model = num_items_in_batch is not None and getattr(self, "model_accepts_loss_kwargs", False)
        return by_model or getattr(self, "compute_loss_func", None) is not None

    def _inner_optimizer(self) -> Any:
        """Return the optimizer without the wrappers of accelerate and DeepSpeed."""
        optimizer: Any = self.optimizer
        while getattr(optimizer, "optimizer", None) is not None:  # DeepSpeed's wrapper is no torch.optim.Optimizer
            optimizer = optimizer.optimizer
        return optimizer

    def _curvature_loss(self, model: torch.nn.Module, retain: Mapping[str, Any]) -> torch.Tensor:
        """Return the loss whose squared gradient refreshes h, with the retain labels or with labels drawn from the model."""
        labels = shifted_labels(retain)

        def value(
            hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transform: causal_lm.Transform
        ) -> torch.Tensor:
            moved_labels = labels.to(hidden.device)
            head = Head(weight, bias, **transform)
            if self.curvature == "gnb":
                keep = moved_labels != IGNORE_INDEX
                return linear_gnb(hidden, head, keep, generator=self._hessian.generator())[0]
            return linear_objective(hidden, head, moved_labels, losses.PO(alpha=0.0))

        return call_at_head(model, retain, value)


def _epoch_callback(dataset: object) -> "TrainerCallback":
    """Return a callback that sets the epoch of a data set.

    With several processes accelerate sets the epoch of the sampler, but not that of the data set.
    """
    from transformers import TrainerCallback

    class Epochs(TrainerCallback):
        def on_epoch_begin(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
        ) -> None:
            if isinstance(dataset, UnlearningDataset):
                dataset.set_epoch(int(state.epoch or 0))

    return Epochs()


class UnlearningDataset(torch.utils.data.Dataset):
    """Forget sequences, each with a retain sequence drawn at random, in the format of open-unlearning.

    Item i is ``{"forget": row, "retain": row}``; a row has ``input_ids`` and ``labels`` (not shifted) and, after
    `add_reference`, ``ref_logps``. With pairs the forget entry is ``{"original": row, "alternate": row}``. Which retain
    sequence goes with item i is a hash of (seed, epoch, i), so workers and resumed runs draw the same; `SOULTrainerMixin` sets
    the epoch.

    Args:
        forget: sequences from `soul.data.encode`; for pairs, each answer with the preferred one after it.
        retain: sequences from `soul.data.encode`; empty for objectives without a retain term.
        pairs: whether the forget sequences are pairs.
        seed: seed of the draws.

    Raises:
        ArgumentError: there is nothing to forget, or a pair is not complete.
    """

    def __init__(
        self,
        forget: list[Sequence],
        retain: collections.abc.Sequence[Sequence] = (),
        *,
        pairs: bool = False,
        seed: int = 0,
    ) -> None:
        if not forget or (pairs and len(forget) % 2):
            expected = "at least one sequence" if not forget else "an even number of sequences for pairs"
            raise argument_error("forget", expected, len(forget), "check the data")
        self.forget = forget
        self.retain = retain
        self.pairs = pairs
        self.seed = seed
        self.epoch = 0
        self.ref_logps: list[float] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the draws of retain sequences depend."""
        self.epoch = epoch

    def add_reference(self, model: torch.nn.Module, *, cache: str | None = None, batch_size: int = 8) -> None:
        """Put ``ref_logps`` into the rows, computed from the model as it is now (`soul.reference_logps`).

        The model is not changed. A second call changes nothing.

        Args:
            model: the model before unlearning, bare or in wrappers with a ``module``.
            cache: directory to keep the numbers in, or None.
            batch_size: sequences per batch.
        """
        from soul.models.ref_model import reference_logps

        if self.ref_logps is None:
            self.ref_logps = reference_logps(causal_lm.bare(model), self.forget, cache=cache, batch_size=batch_size)

    def __len__(self) -> int:
        return len(self.forget) // (2 if self.pairs else 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any]
        if self.pairs:
            item = {"forget": {"original": self._row(2 * index), "alternate": self._row(2 * index + 1)}}
        else:
            item = {"forget": self._row(index)}
        if self.retain:
            drawn = random.Random(f"{self.seed} {self.epoch} {index}").randrange(len(self.retain))
            item["retain"] = _unshifted(self.retain[drawn])
        return item

    def _row(self, index: int) -> dict[str, Any]:
        row = _unshifted(self.forget[index])
        return row if self.ref_logps is None else {**row, "ref_logps": self.ref_logps[index]}


def collate_unlearning(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate items of an `UnlearningDataset`, or rows like its own: ``input_ids`` and ``labels`` are padded on the right.

    Padding has id 0, mask 0 and label -100. The tokenizer's own padding token is not used, since it may have been added without
    a row in the model.

    Args:
        items: dicts, nested or not, whose rows have ``input_ids``, ``labels`` and, if the first one has them, ``ref_logps``;
            lists or tensors.

    Returns:
        Dicts of ``input_ids``, ``attention_mask`` and ``labels`` [B, T] int64 and ``ref_logps`` [B] fp32, nested as the items.
    """
    if "input_ids" not in items[0]:
        return {name: collate_unlearning([item[name] for item in items]) for name in items[0]}
    ids = [torch.as_tensor(item["input_ids"], dtype=torch.int64) for item in items]
    labels = [torch.as_tensor(item["labels"], dtype=torch.int64) for item in items]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }
    if "ref_logps" in items[0]:
        batch["ref_logps"] = torch.tensor([float(item["ref_logps"]) for item in items], dtype=torch.float32)
    return batch


def _unshifted(sequence: Sequence) -> dict[str, Any]:
    """Return the row of a sequence, with each label at the position of its own token, as models of transformers expect."""
    return {"input_ids": sequence.input_ids, "labels": [IGNORE_INDEX, *sequence.labels[:-1]]}


def _entries(soul_args: object) -> dict[str, Any]:
    """Return the entries of a mapping or a dataclass as a dict; an empty one for None.

    Raises:
        ArgumentError: it is something else.
    """
    if dataclasses.is_dataclass(soul_args):
        return {field.name: getattr(soul_args, field.name) for field in dataclasses.fields(soul_args)}
    if soul_args is None or isinstance(soul_args, Mapping):
        return dict(soul_args or {})
    raise argument_error("soul_args", "a mapping or a dataclass", type(soul_args).__name__, "for instance {'rho': 0.04}")
