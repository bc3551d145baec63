"""The tables of the losses: five losses from hidden states, against eager PyTorch, torch.compile, and fused cross-entropies.

On a GPU there is a case for every loss of CE, GradDiff, NPO, KL (to a reference model, over all tokens) and GNB (labels drawn
from the model), every shape (D, V) of (2048, 128256), (4096, 32000), (4096, 128256), N of 512, 4096 and 16384 tokens, trained
and frozen head. By default one setting at a time differs from N 4096, D 2048, V 128256, trained head: all losses with a frozen
head, the other shapes for CE and KL, the other sizes for CE and NPO. Ask for the rest by name: ``--only head`` runs all 90,
``--only "NPO, N 16384"`` its six.

On a CPU there is one case at full size: CE with the widths of SmolLM2-135M, of whose 4,096 tokens 1,024 have a label. The small
ones of the others run by name.

Peers are compared where the work is equal, for CE, each as it comes and at its most accurate. Errors of every variant stand
beside its time: see `bench._heads`. Eager PyTorch, Liger and quack round their logits to the dtype of the inputs, as "ours,
bf16 logits" does. The interfaces of peers were read in torch 2.13, Liger 0.8.5, quack 0.6.5, and cut-cross-entropy 25.1.1 and
its repository at 3a79837.

``--only "CE over chunks"`` shows what the size of a chunk is worth where all logits take 3.9 GiB.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F

from bench._harness import Case, Errors, compiled
from bench._heads import (
    FLOOR,
    LOSSES,
    QUICK,
    SHAPES,
    SIZES,
    SMALL,
    Function,
    Functions,
    Inputs,
    Output,
    functions_of,
    make_case,
    ours,
    relative,
    split,
    train,
)

_Policy: TypeAlias = Literal["accurate", "balanced", "compact", "auto"]  # of torch.nn.LinearCrossEntropyOptions


def liger(**options: torch.dtype) -> Function:
    """Return Liger's fused linear cross-entropy: bf16 logits; dW in ``accum_dtype``, by default the dtype of the weight."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(inputs: Inputs) -> Output:
        x, labels = inputs.flat
        return liger_fused_linear_cross_entropy(x, inputs.weight, labels, **options)

    return loss


def liger_hopper() -> Function:
    """Return Liger's loss for Hopper in the CuTe DSL: bf16 logits, dW at once over all tokens.

    It takes bf16, a multiple of 128 tokens and of 256 tokens of the vocabulary. All logits are kept until backward, and dW is
    computed even of a frozen head, which would not be equal work.
    """
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    def loss(inputs: Inputs) -> Output:
        x, labels = inputs.flat
        if not inputs.weight.requires_grad:
            raise ValueError("it computes dW of a frozen head too")
        return liger_fused_linear_cross_entropy_sm90(x, inputs.weight, labels)

    return loss


def quack(**options: bool) -> Function:
    """Return quack's loss in chunks of 4,096 tokens: bf16 logits, dW in fp32 until it is complete.

    On a Hopper it keeps ``exp(logits)`` in bf16, scaled by powers of two, in place of the logits, unless ``use_scaled_exp`` is
    false.
    """
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(inputs: Inputs) -> Output:
        x, labels = inputs.flat
        return chunked_linear_cross_entropy(x, inputs.weight, labels, **options)

    return loss


def cut(**options: str | None) -> Function:
    """Return cut cross-entropy.

    It leaves out blocks of small gradients unless ``filter_eps`` is None. With ``impl="cce_exact"`` it also adds up in fp32;
    not every release has that.
    """
    from cut_cross_entropy import linear_cross_entropy

    if options.get("impl") == "cce_exact" and "accum_c_fp32" not in inspect.signature(linear_cross_entropy).parameters:
        raise ValueError("needs git+https://github.com/apple/ml-cross-entropy")

    def loss(inputs: Inputs) -> Output:
        x, labels = inputs.flat
        return linear_cross_entropy(x, inputs.weight, labels, **options)

    return loss


def of_torch(acc_policy: _Policy | None = None, acc_dtype: torch.dtype | None = None) -> Function:
    """Return torch's own loss, from 2.13 on: without a policy a plain matrix product and cross-entropy, with one in chunks."""

    def loss(inputs: Inputs) -> Output:
        x, labels = inputs.flat
        chunking = None
        if acc_policy is not None:
            # Versions of torch differ in the policies that they name.
            chunking = torch.nn.LinearCrossEntropyOptions(
                acc_policy=acc_policy,  # type: ignore[arg-type, unused-ignore]
                acc_dtype=acc_dtype,
            )
        return F.linear_cross_entropy(x, inputs.weight, labels, options=chunking)

    return loss


def inductor_chunks() -> Function:
    """Return plain PyTorch under inductor's auto-chunker: 8 chunks of tokens, whose gradients are computed in forward.

    By itself it leaves these shapes as they are: only logits of more than 8 times the size of the inputs are chunked.
    """
    from torch._inductor import metrics

    options: dict[str, Any] = {
        "auto_chunker.enable": True, "auto_chunker.output_size_threshold": 0, "auto_chunker.amplify_ratio_threshold": 0,
    }  # fmt: skip
    step = torch.compile(mean_cross_entropy, dynamic=False, options=options)
    compiled_before = False

    def loss(inputs: Inputs) -> Output:
        nonlocal compiled_before
        x, labels = inputs.flat
        if compiled_before:
            return step(x, inputs.weight, labels)
        chunked = metrics.num_auto_chunking
        caches_disabled = torch.compiler.config.force_disable_caches
        torch.compiler.config.force_disable_caches = True  # a graph from a cache is not counted
        try:
            result = step(x, inputs.weight, labels)
        finally:
            torch.compiler.config.force_disable_caches = caches_disabled
        if metrics.num_auto_chunking == chunked:
            raise RuntimeError("inductor did not chunk it")
        compiled_before = True
        return result

    return loss


def mean_cross_entropy(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in plain PyTorch: logits rounded to the dtype of the inputs, then fp32."""
    return F.cross_entropy((x @ weight.T).float(), labels)


PEERS: dict[str, Callable[[], Function]] = {
    "quack": quack,
    "quack, no scaled exp": lambda: quack(use_scaled_exp=False),
    "Liger, CuTe for Hopper": liger_hopper,
    "Liger": liger,
    "Liger, accum_dtype fp32": lambda: liger(accum_dtype=torch.float32),
    "cut-cross-entropy": cut,
    "cut-cross-entropy, no filter": lambda: cut(filter_eps=None),
    "cut-cross-entropy, cce_exact": lambda: cut(impl="cce_exact"),
    "torch linear_cross_entropy": of_torch,
    "torch linear_cross_entropy, chunks": lambda: of_torch(acc_policy="auto"),
    # The accumulator's dtype must be named: only the policy "auto" looks for one above that of the inputs.
    "torch linear_cross_entropy, accurate": lambda: of_torch(acc_policy="accurate", acc_dtype=torch.float32),
}
AUTO_CHUNKER = "inductor, auto-chunker"
CHUNKS_GIB = (1, 2, 4, 8)


@dataclasses.dataclass
class SomeKept(Inputs):
    """Inputs of which some tokens are ignored: ours takes all of them, and ``flat`` are those with a label."""

    def __post_init__(self) -> None:
        self.keep = self.labels >= 0
        self.token_indices = self.keep.flatten().nonzero()[:, 0]
        self.is_forget_on_cpu = self.is_forget

    @property
    def flat(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [n, D] and labels [n] of the tokens with a label."""
        return self.hidden.flatten(0, 1)[self.token_indices], self.labels.flatten()[self.token_indices]


def of_all_tokens(inputs: Inputs) -> Output:
    """Compute the loss as Hugging Face's models do: logits of every token in fp32, cross-entropy with -100 ignored."""
    return F.cross_entropy((inputs.hidden @ inputs.weight.T).float().flatten(0, 1), inputs.labels.flatten())


def of_labelled_tokens(inputs: Inputs) -> Output:
    """Compute the same loss as a careful user writes it: logits of the tokens with a label only."""
    x, labels = inputs.flat
    return mean_cross_entropy(x, inputs.weight, labels)


def fresh_gemms(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the three matrix products alone, of the tokens with a label, each result in new memory: logits, dX, dW."""
    logits = x @ w.T
    return logits @ w, logits.T @ x


def compare(functions: Functions, inputs: Inputs) -> Errors:
    """Return the relative errors of every variant that runs, of loss and gradients, against the plain loss of all tokens.

    All compute in fp32, so that they differ by the order of sums. AssertionError where ours is wrong.
    """

    def results(function: Function) -> dict[str, torch.Tensor]:
        loss, _ = split(function(inputs))
        return {"loss": loss.detach()[None, None]} | dict(zip(("dX", "dW"), torch.autograd.grad(loss, inputs.trained)))

    want = results(of_all_tokens)
    errors = {}
    for name, make in functions.items():
        try:
            got = results(make())
        except Exception:  # a peer that does not run here says why when it is to be timed
            if name.startswith("ours"):
                raise
            continue
        errors[name] = {key: relative(got[key].flatten(0, -2), value.flatten(0, -2)) for key, value in want.items()}
        wrong = {key: error for key, error in errors[name].items() if not error < 1e-4}
        assert not (wrong and name.startswith("ours")), f"{name}: {wrong}"
    return errors


@dataclasses.dataclass
class Training:
    """Forward and backward of one variant, as a call, with the memory of its gradients for the row."""

    function: Function
    inputs: Inputs

    def __call__(self) -> None:
        """Run forward and backward once."""
        train(self.function, self.inputs)

    @property
    def row_fields(self) -> dict[str, float]:
        """For `bench._harness.measure`."""
        return {"gradients_mib": sum(tensor.nbytes for tensor in self.inputs.trained) / 2**20}


def make_labelled_case(n: int, n_labelled: int, d: int, n_vocab: int, device: torch.device) -> Case:
    """Make the case of cross-entropy in fp32 where ``n_labelled`` of n tokens have a label; trained head, all peers."""
    weight = (torch.randn(n_vocab, d, device=device) * (2 / d**0.5)).requires_grad_()
    hidden = torch.randn(8, n // 8, d, device=device).requires_grad_()
    labels = torch.randint(n_vocab, (8, n // 8), device=device)
    labels[:, : -n_labelled // 8] = -100  # prompts, of which nothing is learned
    inputs = SomeKept(hidden, weight, labels, torch.ones(8, dtype=torch.bool))
    assert len(inputs.token_indices) == n_labelled
    functions: Functions = {
        "ours": lambda: ours("CE"),
        "plain Hugging Face loss": lambda: of_all_tokens,
        "eager, of tokens with a label": lambda: of_labelled_tokens,
        "torch.compile of it": lambda: compiled(of_labelled_tokens),
        AUTO_CHUNKER: inductor_chunks,
        **{name: make for name, make in PEERS.items() if name in ("Liger", "torch linear_cross_entropy, chunks")},
    }
    made = {name: functools.cache(make) for name, make in functions.items()}

    def start(name: str) -> Training:
        return Training(made[name](), inputs)

    x = inputs.flat[0].detach()
    variants: dict[str, Callable[[], Any]] = {FLOOR: lambda: functools.partial(fresh_gemms, x, weight.detach())}
    case = Case(
        f"CE, N {n_labelled} of {n}, D {d}, V {n_vocab}, float32, trained head",
        variants | {name: functools.partial(start, name) for name in functions},
        lambda: compare({name: make for name, make in made.items() if name in case.variants}, inputs),
        flops=3 * 2 * n_labelled * n_vocab * d,
        floor=FLOOR,
        at={"N": n_labelled, "D": d, "V": n_vocab},
    )
    return case


def runs_by_default(loss: str, n: int, d: int, n_vocab: int, frozen: bool) -> bool:
    """Tell whether a case runs without being asked for: at most one setting differs from the first of each."""
    if frozen:
        return n == SIZES[0] and (d, n_vocab) == SHAPES[0]
    if n != SIZES[0]:
        return loss in ("CE", "NPO") and (d, n_vocab) == SHAPES[0]
    return (d, n_vocab) == SHAPES[0] or loss in ("CE", "KL")


def cases(device: torch.device, quick: bool) -> Iterator[Callable[[], Case]]:
    """Yield functions that make the cases; without a GPU one of each loss and head at a small size, and one at full size.

    Without a GPU and quick, only CE runs with a frozen head.
    """
    if device.type == "cpu":
        if not quick:
            yield functools.partial(make_labelled_case, 4096, 1024, 576, 49152, device)
        sizes = [(loss, *SMALL, frozen) for frozen in (False, True) for loss in LOSSES]
        if quick:
            sizes = [*((loss, *QUICK, False) for loss in LOSSES), ("CE", *QUICK, True)]
    else:
        grid = itertools.product((False, True), SHAPES, SIZES, LOSSES)
        sizes = [(loss, n, d, n_vocab, frozen) for frozen, (d, n_vocab), n, loss in grid]
    for size in sizes:
        functions = functions_of(size[0], device, quick)
        if size[0] == "CE":
            functions |= PEERS | ({} if quick else {AUTO_CHUNKER: inductor_chunks})
        default = quick if device.type == "cpu" else runs_by_default(*size)
        yield functools.partial(make_case, *size, functions, device, default=default)
    if device.type != "cpu":
        sweep = {"ours": functools.partial(ours, "CE")} | {
            f"ours, chunks of {gib} GiB": functools.partial(ours, "CE", chunk_bytes=gib * 2**30) for gib in CHUNKS_GIB
        }
        size = ("CE", 8192, *SHAPES[2], False)
        yield functools.partial(make_case, *size, sweep, device, op="CE over chunks", default=False)
