"""Momentum, Hessian EMA, decay, clipped update and rounding of many tensors in one pass over memory.

How it works. `SophiaStep.prepare` checks the arguments and keeps a table of the tensors' addresses on the device
(``_table.py``); the call that it returns launches `sophia_step_kernel` once for all tensors of the same dtypes and alignment.
Each program takes one chunk of one tensor: it looks up its pointers and its noise (``_foreach.py``), then walks over the
chunk in blocks. `_step_block` updates a block: it loads every operand once, computes in fp32 and rounds once to each tensor's
storage (``rounding.py``). Full blocks are accessed without a mask, because only unmasked accesses are 16 bytes wide. What is
left of a tensor, less than a block, is accessed with a mask, half a block at a time.

``reference/sophia_step.py`` defines the results. The kernel gives the same bits. Safe to change: the configurations. A change
of the arithmetic or of its order must be made in both files. A new tensor of the step needs an entry in ``ROLES`` and a field
of `Pointers`; a new option needs a field of `StepOptions` and one of `Numbers`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from soul_kernels._compiled import Compiled
from soul_kernels._foreach import (
    ChunkNoise,
    PreparedCall,
    chunk_of_program,
    chunk_pointer,
    noise_of_chunk,
    nothing_to_do,
    number_of_tensor,
    rebuild_table,
    scale_pointer,
)
from soul_kernels._launch import tl, triton
from soul_kernels._table import TensorTable
from soul_kernels.backends import resolve_backend
from soul_kernels.bundles import (
    DEFAULT_NOISE,
    NO_GUARDS,
    ON_DEVICE_BITS,
    Guards,
    LooseStepFields,
    Noise,
    StepOptions,
    StepTensors,
    check_numbers,
    check_numbers_on_device,
    check_step_tensors,
    refuse_unknown_keywords,
    with_fields,
)
from soul_kernels.hessian_ema import ema
from soul_kernels.reference.rounding import draws_codes
from soul_kernels.reference.sophia_step import sophia_step as _reference_sophia_step
from soul_kernels.reference.sophia_step import step_block
from soul_kernels.rounding import (
    GROUP,
    Block,
    join,
    load,
    load_state,
    noise_words,
    round_nearest,
    round_stochastic,
    split,
    store_state,
)
from soul_kernels.tensors import (
    check_on_device,
    has_data,
)

# Elements per program, elements per loop iteration, warps. Sane choices differ by 1 to 2% (measured on an H100); with 8 warps
# older compilers stop at 128 registers a thread and spill. Steps with 8-bit states have more to compute: they need 16 warps a
# multiprocessor, which is 128 registers a thread; without the limit they take up to 168.
CONFIG = {"chunk": 16384, "BLOCK": 1024, "num_warps": 4}
CONFIG_8BIT = CONFIG | {"maxnreg": 128}
# The first rows of the table, in this order; the kernel knows them by index. Element counts, salts and offsets follow.
ROLES = ("p", "g", "m", "h", "low", "m_scale", "h_scale", "step", "correction")
AUXILIARY = ("m_scale", "h_scale", "step", "correction")  # roles that are not walked element by element
OWNED = ROLES[2:]  # roles for which the caller may vouch
P_ROW, G_ROW, M_ROW, H_ROW, LOW_ROW, M_SCALE_ROW, H_SCALE_ROW, STEP_ROW, CORRECTION_ROW = map(tl.constexpr, range(len(ROLES)))
N_ROLES = tl.constexpr(len(ROLES))
# The bits of ON_DEVICE, which tell the kernel what options are tensors on the device.
LR_BIT, WEIGHT_DECAY_BIT, RHO_BIT, BS_BIT = map(tl.constexpr, ON_DEVICE_BITS.values())


class Pointers(NamedTuple):
    """Pointers to the first element of a chunk in the tensor of each role, within the kernel."""

    p: Any
    g: Any
    m: Any
    h: Any
    low: Any
    m_scale: Any
    h_scale: Any


class Numbers(NamedTuple):
    """Numbers that all elements of a tensor share, in fp32, within the kernel."""

    lr: Any
    weight_decay: Any
    h_weight: Any  # rho bs, divided by the tensor's bias correction
    beta1: Any
    beta1_rest: Any  # 1 - beta1, or its negative to maximize
    beta2: Any
    beta2_rest: Any  # 1 - beta2
    eps: Any
    factor: Any  # of the gradients, or None


class Variant(NamedTuple):
    """Compile-time constants of `_step_block`."""

    P_DTYPE: Any
    M_DTYPE: Any
    H_DTYPE: Any
    HESSIAN_IN_STEP: Any
    ADD_EPS: Any
    ROUNDING: Any
    STOCHASTIC_CODES: Any  # whether an 8-bit h is rounded stochastically
    CROSSES: Any  # as in `noise_words`


@triton.jit
def option(value, ON_DEVICE: tl.constexpr, BIT: tl.constexpr):
    """Return an option in fp32: ``value`` itself, or the number that it points to where ``ON_DEVICE`` has ``BIT``."""
    if BIT & ON_DEVICE:  # in this order: the interpreter of Triton 3.6 has no `int & constexpr`
        return tl.load(value).to(tl.float32)
    else:
        return tl.zeros([], tl.float32) + value


@triton.jit
def _step_block(
    pointers,  # `Pointers`
    block,  # `Block`
    noise,  # `ChunkNoise`
    numbers,  # `Numbers`
    VARIANT: tl.constexpr,  # `Variant`
    BLOCK: tl.constexpr,
):
    """Update one block; return two values for each coordinate: 1 if clipped plus 2^16 if lost to rounding, and the update."""
    P_DTYPE: tl.constexpr = VARIANT.P_DTYPE
    M_DTYPE: tl.constexpr = VARIANT.M_DTYPE
    H_DTYPE: tl.constexpr = VARIANT.H_DTYPE
    ROUNDING: tl.constexpr = VARIANT.ROUNDING
    stored = load(pointers.p, block.offsets, block.mask)
    if ROUNDING == "compensated":
        p = join(stored, load(pointers.low, block.offsets, block.mask), P_DTYPE)
    else:
        p = stored.to(tl.float32)
    g = load(pointers.g, block.offsets, block.mask).to(tl.float32)
    if numbers.factor is not None:
        g = g * numbers.factor
    m = load_state(pointers.m, pointers.m_scale, block, M_DTYPE, False, BLOCK)
    h = load_state(pointers.h, pointers.h_scale, block, H_DTYPE, True, BLOCK)
    words = 0
    if noise.key is not None:
        words = noise_words(noise.key, noise.first, block.offsets, VARIANT.CROSSES)
    m = numbers.beta1 * m + numbers.beta1_rest * g
    store_state(pointers.m, pointers.m_scale, m, words, block, M_DTYPE, False, False, BLOCK)
    if VARIANT.HESSIAN_IN_STEP:
        h = ema(h, g * g, numbers.beta2, numbers.beta2_rest)
        store_state(pointers.h, pointers.h_scale, h, words, block, H_DTYPE, True, VARIANT.STOCHASTIC_CODES, BLOCK)
    # NaN must come through every clamp. Hutchinson's estimate may be negative.
    curvature = numbers.h_weight * tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if VARIANT.ADD_EPS:
        denominator = curvature + numbers.eps
    else:
        denominator = tl.maximum(curvature, numbers.eps, propagate_nan=tl.PropagateNan.ALL)
    update = tl.div_rn(m, denominator)
    clipped = tl.abs(update) >= 1.0
    update = tl.minimum(update, 1.0, propagate_nan=tl.PropagateNan.ALL)
    update = tl.maximum(update, -1.0, propagate_nan=tl.PropagateNan.ALL)
    # Decay and step in one fp32 expression: (1 - lr wd) in fp32 would be off by 5% at lr wd = 5e-7.
    change = numbers.lr * (numbers.weight_decay * p + update)
    if ROUNDING == "compensated":
        new, low = split(p - change, words, P_DTYPE)
        tl.store(pointers.low + block.offsets, low, mask=block.mask)
    elif ROUNDING == "stochastic":
        new = round_stochastic(p - change, words, P_DTYPE)
    else:
        new = round_nearest(p - change, P_DTYPE)
    tl.store(pointers.p + block.offsets, new, mask=block.mask)
    counts = clipped.to(tl.int32)
    if ROUNDING == "nearest" and P_DTYPE != tl.float32:
        counts += ((new.to(tl.float32) == p) & (change != 0.0)).to(tl.int32) << 16
    return counts, change


@triton.jit(do_not_specialize=["n_tensors"])
def sophia_step_kernel(
    table_ptr,  # [12, n_tensors] int64: an address for each of ROLES; element counts; salts and offsets of the noise
    chunk_tensor_ptr,  # [programs] int32: the tensor of this program
    chunk_piece_ptr,  # [programs] int32: index of this program's piece, of CHUNK elements, in that tensor
    telemetry_ptr,  # [3] fp64: clipped and lost coordinates and the update's squared norm are added here; None: not counted
    factor_ptr,  # [] fp32: the gradients are multiplied by it; None: 1
    skip_ptr,  # [] fp32: unless it is 0, nothing is changed; None: 0
    n_tensors,
    lr,  # this and the next three: a number, or a pointer to one where ON_DEVICE says so
    weight_decay,
    rho,
    bs,
    beta1,
    beta1_rest,  # 1 - beta1, or its negative to maximize; computed in double precision on the host
    beta2,
    beta2_rest,  # 1 - beta2
    eps,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    H_DTYPE: tl.constexpr,
    LOW_DTYPE: tl.constexpr,
    ON_DEVICE: tl.constexpr,  # sum of ON_DEVICE_BITS
    HESSIAN_IN_STEP: tl.constexpr,
    ADD_EPS: tl.constexpr,
    ROUNDING: tl.constexpr,
    STOCHASTIC_CODES: tl.constexpr,  # whether an 8-bit h is rounded stochastically
    STEPS: tl.constexpr,  # whether the noise depends on a step of each tensor
    CORRECTIONS: tl.constexpr,  # whether h is divided by a number of each tensor
    CROSSES: tl.constexpr,  # whether a chunk may lie on both sides of a multiple of 2^32 in its noise
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one chunk of one parameter and its states."""
    if skip_ptr is not None:
        if tl.load(skip_ptr) != 0.0:
            return
    chunk = chunk_of_program(table_ptr, chunk_tensor_ptr, chunk_piece_ptr, n_tensors, N_ROLES, CHUNK)
    pointers = Pointers(
        p=chunk_pointer(chunk, P_ROW, P_DTYPE, ALIGNED),
        g=chunk_pointer(chunk, G_ROW, G_DTYPE, ALIGNED),
        m=chunk_pointer(chunk, M_ROW, M_DTYPE, ALIGNED),
        h=chunk_pointer(chunk, H_ROW, H_DTYPE, ALIGNED),
        low=chunk_pointer(chunk, LOW_ROW, LOW_DTYPE, ALIGNED),
        m_scale=scale_pointer(chunk, M_SCALE_ROW, M_DTYPE),
        h_scale=scale_pointer(chunk, H_SCALE_ROW, H_DTYPE),
    )
    # fp32 parameters are stored as they come out, whatever the caller asked for.
    STORED: tl.constexpr = "nearest" if P_DTYPE == tl.float32 else ROUNDING
    VARIANT: tl.constexpr = Variant(P_DTYPE, M_DTYPE, H_DTYPE, HESSIAN_IN_STEP, ADD_EPS, STORED, STOCHASTIC_CODES, CROSSES)
    noise = ChunkNoise(None, None)
    if STORED != "nearest" or H_DTYPE == tl.bfloat16 or STOCHASTIC_CODES:
        noise = noise_of_chunk(chunk, N_ROLES, STEP_ROW, STEPS)
    factor = None
    if factor_ptr is not None:
        factor = tl.load(factor_ptr)
    lr = option(lr, ON_DEVICE, LR_BIT)
    weight_decay = option(weight_decay, ON_DEVICE, WEIGHT_DECAY_BIT)
    h_weight = option(rho, ON_DEVICE, RHO_BIT) * option(bs, ON_DEVICE, BS_BIT)
    if CORRECTIONS:
        h_weight = tl.div_rn(h_weight, number_of_tensor(chunk, CORRECTION_ROW))
    numbers = Numbers(
        lr=lr,
        weight_decay=weight_decay,
        h_weight=h_weight,
        beta1=beta1,
        beta1_rest=beta1_rest,
        beta2=beta2,
        beta2_rest=beta2_rest,
        eps=eps,
        factor=factor,
    )
    lanes = tl.arange(0, BLOCK)
    groups = tl.cdiv(chunk.count, GROUP)
    # Sums are kept per lane: one reduction per program, not one per block. Both counts of a lane stay below 2^16.
    counted = tl.zeros([BLOCK], tl.int32)
    moved = tl.zeros([BLOCK], tl.float32)
    full = chunk.count // BLOCK
    for index in range(full):
        block = Block(index * BLOCK + lanes, None, index * (BLOCK // GROUP), groups)
        counts, change = _step_block(pointers, block, noise, numbers, VARIANT, BLOCK)
        counted += counts
        moved += change * change
    # A block with a mask needs more registers than one without: whole, the rest of a tensor would decide how many warps fit on
    # a multiprocessor. In halves it needs no more than the loop above.
    HALF: tl.constexpr = BLOCK // 2
    counted = tl.sum(tl.reshape(counted, [HALF, 2]), 1)
    moved = tl.sum(tl.reshape(moved, [HALF, 2]), 1)
    for index in range(2 * full, tl.cdiv(chunk.count, HALF)):
        offsets = index * HALF + tl.arange(0, HALF)
        mask = offsets < chunk.count
        block = Block(offsets, mask, index * (HALF // GROUP), groups)
        counts, change = _step_block(pointers, block, noise, numbers, VARIANT, HALF)
        counted += tl.where(mask, counts, 0)
        moved += tl.where(mask, change * change, 0.0)
    if telemetry_ptr is not None:
        # Counts are integers, exact in fp64 in whatever order they are added. Nothing in this launch reads the sums, so the
        # additions are relaxed: by default each has a memory barrier before and after it.
        tl.atomic_add(telemetry_ptr, tl.sum(counted & 0xFFFF, 0).to(tl.float64), sem="relaxed")
        if STORED == "nearest" and P_DTYPE != tl.float32:
            tl.atomic_add(telemetry_ptr + 1, tl.sum(counted >> 16, 0).to(tl.float64), sem="relaxed")
        tl.atomic_add(telemetry_ptr + 2, tl.sum(moved, 0).to(tl.float64), sem="relaxed")


class SophiaStep:
    """Repeated Sophia steps on the same tensors: `sophia_step` in two parts, `prepare` and the call that it returns.

    Tensors are checked once, and the table of their addresses stays on the device. Before every step the dtypes, devices,
    shapes, strides and addresses of all tensors are compared with those of the step before; if one has changed, also behind the
    same Python object, everything is checked again.

    `prepare` checks and changes nothing; the object that it returns steps. To step several lists of tensors, prepare all of
    them first: an error then leaves all of them unchanged.

    Example::

        sophia = SophiaStep()
        for batch in batches:
            ...  # gradients
            tensors = StepTensors(params, grads, exp_avgs, hessians)
            step = sophia.prepare(tensors, StepOptions(lr=1e-4, beta1=0.9, rho=0.04, bs=64))
            step()
    """

    def __init__(self) -> None:
        self._table = TensorTable()
        self._constants: dict[str, Any] | None = None  # arguments of the kernel, fixed by the last `prepare`

    @property
    def version(self) -> int:
        """Number of calls with other tensors than the call before; gradients that have only moved do not count."""
        return self._table.version

    def prepare(
        self,
        tensors: StepTensors,
        options: StepOptions,
        *,
        noise: Noise = DEFAULT_NOISE,
        guards: Guards = NO_GUARDS,
        telemetry: Tensor | None = None,
        backend: str = "auto",
    ) -> PreparedCall:
        """Check all arguments and change nothing.

        Args:
            tensors: the tensors to step.
            options: the hyper-parameters.
            noise: where the noise of stochastic rounding comes from.
            guards: a factor of the gradients, and a flag to skip the step; both on the device.
            telemetry: as in `sophia_step`.
            backend: as in `sophia_step`.

        Returns:
            The step, to be called once; see `PreparedCall`.

        Raises:
            ValueError: an argument does not fit.
        """
        self._constants = None
        on_device = options.check()
        params = tensors.params
        steps = None if noise.steps is None else [noise.steps]
        corrections = None if options.corrections is None else [options.corrections]
        roles = dict(zip(ROLES, (*tensors, steps, corrections)))
        key = (noise.seed, noise.tensor_ids, noise.tensor_offsets, options.param_rounding)
        table = self._table
        copy = None
        if not table.unchanged(roles, key):
            table.forget()
            check_step_tensors(tensors, options.param_rounding)
            if not params:
                return PreparedCall(table, nothing_to_do)
            salts = noise.salts(params)
            offsets = noise.offsets(tensors.exp_avgs, tensors.hessians)
            copy = rebuild_table(table, roles, key, read=("g",), salts=salts, offsets=offsets, auxiliary=AUXILIARY, owned=OWNED)
        options.check_on_device(on_device, table.devices, len(params))
        guards.check(table.devices)
        check_on_device("steps", noise.steps, table.devices, numel=len(params))
        check_on_device("telemetry", telemetry, table.devices, torch.float64, 3)
        backend = resolve_backend(backend, params[0], compiled=table.numel)
        if backend == "triton":
            eight_bits = tensors.exp_avg_scales is not None or tensors.hessian_scales is not None
            beta1 = options.beta1
            beta2 = 0.0 if options.beta2 is None else options.beta2
            self._constants = {
                "telemetry_ptr": telemetry,
                "beta1": float(beta1),
                "beta1_rest": float(beta1 - 1 if options.maximize else 1 - beta1),
                "beta2": float(beta2),
                "beta2_rest": 0.0 if options.beta2 is None else float(1 - beta2),
                "eps": float(options.eps),
                "HESSIAN_IN_STEP": options.beta2 is not None,
                "ADD_EPS": options.eps_mode == "add",
                "ROUNDING": options.param_rounding,
                "STOCHASTIC_CODES": tensors.hessian_scales is not None and draws_codes(options.beta2),
                "STEPS": noise.steps is not None,
                "CORRECTIONS": options.corrections is not None,
                **(CONFIG_8BIT if eight_bits else CONFIG),
            }
            return PreparedCall(table, self._launch(options.numbers(), on_device, guards), copy)
        run = functools.partial(
            _reference_sophia_step, **tensors._asdict(), **options._asdict(), salts=table.salts, offsets=table.offsets,
            steps=noise.steps, grad_factor=guards.grad_factor, skip=guards.skip if has_data(params[0]) else None,
            telemetry=telemetry, run=Compiled(step_block) if backend == "compile" else step_block,
        )  # fmt: skip
        return PreparedCall(table, torch.no_grad()(run))  # kernels know nothing of autograd

    def prepare_again(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        numbers: Mapping[str, float | Tensor],
        *,
        guards: Guards = NO_GUARDS,
    ) -> PreparedCall | None:
        """Prepare the step of the last `prepare` once more, in a fraction of its time.

        The caller vouches that all arguments which are not passed are those of the last `prepare`: that the lists would hold
        the same objects, and that nobody has put other memory under them. They are neither compared nor checked.

        Args:
            params: as in `StepTensors`.
            grads: as in `StepTensors`.
            numbers: the options that schedules change, as in `StepOptions`: ``lr``, ``weight_decay``, ``rho`` and ``bs``.
            guards: as in `prepare`.

        Returns:
            The step, as from `prepare`; or None if `prepare` must be called: because parameters or gradients are others, not
            counting gradients that have only moved; or because a reference steps.

        Raises:
            ValueError: an option does not fit.
        """
        table = self._table
        if self._constants is None or not table.unchanged_but_owned([*params, *grads]):
            return None
        on_device = check_numbers(numbers)
        if on_device:
            check_numbers_on_device(numbers, table.devices)
        guards.check(table.devices)
        return PreparedCall(table, self._launch(numbers, on_device, guards))

    def _launch(self, numbers: Mapping[str, float | Tensor], on_device: int, guards: Guards) -> Callable[[], None]:
        """Return the launch of the kernel for every bucket of the table."""
        arguments: dict[str, Any] = {
            # Triton would compile another variant for an int.
            name: value if isinstance(value, Tensor) else float(value)
            for name, value in numbers.items()
        }
        return functools.partial(
            self._table.launch,
            sophia_step_kernel,
            **arguments,
            ON_DEVICE=on_device,
            factor_ptr=guards.grad_factor,
            skip_ptr=guards.skip,
            **(self._constants or {}),
        )


def sophia_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    rho: float | Tensor,
    bs: float | Tensor,
    eps: float = 1e-15,
    weight_decay: float | Tensor = 0.0,
    beta2: float | None = None,
    param_rounding: str = "nearest",
    noise: Noise = DEFAULT_NOISE,
    guards: Guards = NO_GUARDS,
    telemetry: Tensor | None = None,
    backend: str = "auto",
    **fields: Unpack[LooseStepFields],
) -> None:
    """Take one Sophia step in place: for every element, in fp32, rounded once to the storage of each tensor::

        m = beta1 * m + (1 - beta1) * g
        h = beta2 * h + (1 - beta2) * g * g                      # only with beta2: SOUL, the Hessian in the same pass
        p = p - lr * (weight_decay * p + clamp(m / (rho * bs * max(h, 0) + eps), -1, 1))

    Without ``beta2`` this is ``SophiaG.step`` of the published class (Liu et al. 2023, arXiv 2305.14342, algorithm 3): its
    ``sign(m) min(|m| / (rho bs h + eps), 1)`` is the clamp. NaN and inf in a gradient propagate as they do in PyTorch.

    **Rounding of parameters** in bf16 and fp16. "nearest" loses every update smaller than half a unit in the last place: at
    lr 5e-6 that is about 95% of the update. "stochastic" rounds up or down so that the mean is right. "compensated" keeps the
    next 8 bits of every parameter in ``low_bits``: together they are a 24-bit weight, and ``params`` is the nearest 16-bit
    number.

    **8-bit states** are uint8 codes with one scale of 16 bits for 32 consecutive elements in memory: levels of a companded
    value, denser where values are small. They are rounded to nearest, h stochastically with ``beta2`` above 0.99.
    ``soul_kernels/reference/rounding.py`` defines both formats and the noise. m in bf16 is rounded to nearest, h in bf16
    stochastically.

    To step the same tensors again and again, keep a `SophiaStep`: it takes less time on the host.

    Args:
        params: list of dense tensors, any shapes, fp32, bf16 or fp16; mutated.
        grads: list of tensors of the same shapes, fp32, bf16 or fp16; not changed.
        exp_avgs: list of momenta m, fp32, bf16 or 8-bit (uint8), laid out as the parameters; mutated.
        hessians: list of diagonal Hessian estimates h, of the dtypes and layout of ``exp_avgs``; mutated with ``beta2`` only.
        lr: learning rate, >= 0. This, ``weight_decay``, ``rho`` and ``bs`` may be an fp32 tensor of one element on the
            parameters' device instead; it is then read there, and its value is not checked.
        beta1: decay of the momentum, in [0, 1).
        rho: scale of the clipping threshold, >= 0 (the paper's gamma).
        bs: number of predictions in the batch that produced h, > 0.
        eps: added to the denominator, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        beta2: decay of the Hessian estimate, in [0, 1); None leaves it as it is.
        param_rounding: "nearest", "stochastic" or "compensated", which needs ``low_bits``; fp32 parameters are stored exactly
            in any case.
        noise: where the noise of stochastic rounding comes from. Pass another ``seed`` at every call.
        guards: a factor of the gradients, and a flag to skip the step; both on the device.
        telemetry: fp64 [3] on the parameters' device, added to: the number of clipped coordinates (``|m| >=`` denominator:
            they move by the full lr), the number of coordinates whose update was lost to rounding to nearest, and the squared
            norm of ``lr * (...)``. None: not counted.
        backend: "auto" (Triton on a GPU and under the interpreter; on a CPU "compile" where that pays; else the reference),
            "triton", "compile" or "reference". "compile" is the reference under torch.compile, with the same bits.
        **fields: the other fields of `StepTensors` (``low_bits``, ``exp_avg_scales``, ``hessian_scales``) and of `StepOptions`
            (``maximize``, ``eps_mode``, ``corrections``), and those of `Noise` (``seed``, ``tensor_ids``, ``tensor_offsets``,
            ``steps``) and `Guards` (``grad_factor``, ``skip``), which override the fields of ``noise`` and ``guards``.

    Raises:
        ValueError: an argument does not fit; nothing was changed.
    """
    keywords: dict[str, Any] = {**fields}
    more_tensors = {name: keywords.pop(name) for name in ("low_bits", "exp_avg_scales", "hessian_scales") if name in keywords}
    tensors = StepTensors(params, grads, exp_avgs, hessians, **more_tensors)
    options = StepOptions(lr, beta1, rho, bs, eps, weight_decay, beta2, param_rounding=param_rounding)
    options = with_fields(options, keywords)
    noise = with_fields(noise, keywords)
    guards = with_fields(guards, keywords)
    refuse_unknown_keywords("sophia_step", keywords)
    step = SophiaStep().prepare(tensors, options, noise=noise, guards=guards, telemetry=telemetry, backend=backend)
    step()
