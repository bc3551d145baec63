"""The ops on hidden states where they are opaque: compiled, exported, without values, under torch.func; the numbers of the
eager call.
"""

import contextlib
import gc
import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from soul import losses
from soul_kernels import (
    Head,
    LinearOptions,
    Reference,
    linear_gnb,
    linear_kl,
    linear_logprob,
    linear_objective,
    linear_statistics,
)
from soul_kernels._head import registry
from soul_kernels._head.rows import HeadRows
from soul_kernels.backends import interpreting
from soul_kernels.errors import ArgumentError
from tests.support.helpers import assert_close

B, T, D, V = 4, 6, 16, 131

# "aot_eager" traces forward and backward as the default backend does, and compiles nothing.
BACKENDS = ["eager", "aot_eager"] + ([] if interpreting() else ["inductor"])


class Model(torch.nn.Module):
    """A body, and a head whose products never leave the op."""

    def __init__(self, frozen_head=False):
        super().__init__()
        self.body = torch.nn.Linear(8, D)
        self.head = torch.nn.Linear(D, V)
        self.head.requires_grad_(not frozen_head)

    def forward(self, x, loss_of):
        return loss_of(torch.tanh(self.body(x)), self.head.weight, self.head.bias)


def inputs(device, backend="triton"):
    torch.manual_seed(3)
    labels = torch.randint(V, (B, T), device=device)
    labels[:, :2] = -100
    labels[1] = -100
    rows = (labels.flatten() != -100).nonzero()[:, 0].cpu()
    is_forget = torch.tensor([True, True, False, False])
    reference = Reference(torch.randn(B, T, D, device=device), torch.randn(V, D, device=device))
    uniforms = torch.rand(B, T, device=device)
    upstream = torch.randn(B, T, device=device)
    ref_logps = torch.full((B,), -15.0, device=device)
    options = LinearOptions(token_indices=rows, backend=backend)

    def objective(name, **kw):
        made = losses.get(name, **kw)

        def loss_of(hidden, weight, bias):
            loss, logps = linear_objective(
                hidden, weight, labels, made, bias=bias, is_forget=is_forget.to(device), ref_logps=ref_logps,
                reference=reference if made.divergence else None, return_logps=True, options=options,
            )  # fmt: skip
            return 3.0 * loss, logps

        return loss_of

    def logprob(hidden, weight, bias):
        logps = linear_logprob(hidden, Head(weight, bias, softcap=20.0), labels, options=options)
        return (logps * upstream).sum(), logps

    def kl(hidden, weight, bias):
        values = linear_kl(hidden, weight, labels, reference, bias=bias, options=options)
        return (values * upstream).sum(), values

    def gnb(hidden, weight, bias):
        return linear_gnb(hidden, weight, labels != -100, uniforms=uniforms, bias=bias, options=options)

    def no_rows(hidden, weight, bias):  # all rows, and those that are ignored are zero
        every = LinearOptions(backend=backend)
        logps = linear_logprob(hidden, weight, labels, bias=bias, options=every)
        loss = linear_objective(hidden, weight, labels, made, bias=bias, is_forget=is_forget, options=every)
        return loss + (logps * upstream).sum(), logps

    made = losses.GradDiff()
    cases = {name: objective(name) for name in ("graddiff", "npo", "ceu", "klmin", "undial")}
    return cases | {"logprob": logprob, "kl": kl, "gnb": gnb, "no rows": no_rows}


CASES = ["graddiff", "npo", "ceu", "klmin", "undial", "logprob", "kl", "gnb", "no rows"]
FROZEN = pytest.mark.slow(reason="compiles every case once more, without the gradients of the head")
EVERY = pytest.mark.slow(reason="compiles every case with every backend; each case and each backend are always tested")


def run(model, x, loss_of, call):
    loss, others = call(x, loss_of)
    leaves = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), others, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("frozen_head", [False, pytest.param(True, marks=FROZEN)])
@pytest.mark.parametrize("backend, name", [
    pytest.param(backend, name, marks=[] if backend == "aot_eager" or name == "npo" else EVERY)
    for backend in BACKENDS for name in CASES
])  # fmt: skip
def test_compiled_without_a_graph_break(name, backend, frozen_head, device):
    torch._dynamo.reset()
    model = Model(frozen_head).to(device)
    x = torch.randn(B, T, 8, device=device)
    loss_of = inputs(device)[name]
    want = run(model, x, loss_of, model)
    got = run(model, x, loss_of, torch.compile(model, backend=backend, fullgraph=True))
    assert_close(got[0], want[0], 1e-6, "loss")
    assert_close(got[1].float(), want[1].float(), 1e-6, "log-probabilities or labels")
    for a, b in zip(got[2], want[2]):
        assert_close(a, b, 1e-5, "gradient")


@pytest.mark.parametrize("name", ["logprob", "kl"])
def test_with_a_frozen_head_logits_are_computed_once(name, device, monkeypatch):
    """Their gradient is formed while they are there, in the compiled call as in the eager one."""
    loads = []
    real = HeadRows.load
    monkeypatch.setattr(HeadRows, "load", lambda self, chunk: loads.append(chunk) or real(self, chunk))
    torch._dynamo.reset()
    model = Model(frozen_head=True).to(device)
    x = torch.randn(B, T, 8, device=device)
    loss_of = inputs(device)[name]
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loads.clear()
        run(model, x, loss_of, call)
        assert len(loads) == 1


def test_autocast_and_upstream_factors_in_a_compiled_step(device):
    """The dtypes of autocast are decided while the op is traced: at run time autocast is off."""
    torch._dynamo.reset()
    model = Model().to(device)
    x = torch.randn(B, T, 8, device=device)
    loss_of = inputs(device)["npo"]

    def call(x, loss_of):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return model(x, loss_of)

    want = run(model, x, loss_of, call)
    got = run(model, x, loss_of, torch.compile(call, backend="aot_eager", fullgraph=True))
    assert_close(got[0], want[0], 1e-6, "loss")
    for a, b in zip(got[2], want[2]):
        assert_close(a, b, 1e-2, "gradient")


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("name", ["npo", "kl", "logprob", "gnb"])
def test_the_ops_are_what_their_fakes_promise(name, backend, device, monkeypatch):
    """Shapes, dtypes and strides, on which inductor relies; hidden states and weight lie transposed in memory."""
    from soul_kernels._head import custom_ops

    calls = []
    for op in ("_objective", "_gnb", "_per_token", "_per_token_backward"):
        real = getattr(custom_ops, op)
        monkeypatch.setattr(custom_ops, op, lambda *args, real=real: calls.append((real, args)) or real(*args))
    # Not torch.compiler.is_compiling: dynamo, if imported during the test, would keep the patched function.
    monkeypatch.setattr(custom_ops, "is_opaque", lambda *args: True)
    hidden = torch.randn(T, B, D, device=device).transpose(0, 1).requires_grad_()
    weight = torch.randn(D, V, device=device).T.requires_grad_()
    bias = torch.randn(V, device=device, requires_grad=True)
    loss_of = inputs(device, backend)[name]  # which keeps the objective alive
    loss, _ = loss_of(hidden, weight, bias)
    loss.backward()
    assert calls
    for op, args in calls:
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["triton", pytest.param("torch", marks=EVERY), "reference"])
def test_compiled_calls_check_labels_and_rows(backend, device):
    torch._dynamo.reset()
    hidden = torch.randn(B, T, D, device=device)
    weight = torch.randn(V, D, device=device)
    labels = torch.randint(V, (B, T), device=device)
    for op in (linear_logprob, linear_statistics):

        def call(labels, rows, op=op):
            return op(hidden, weight, labels, options=LinearOptions(token_indices=rows, backend=backend))

        compiled = torch.compile(call, backend="eager", fullgraph=True)
        every = torch.arange(B * T)
        for a, b in zip(compiled(labels, every), call(labels, every)):
            assert torch.equal(a, b)
        with pytest.raises(Exception, match=r"labels.*\[B, T\] \(4, 6\)"):  # in torch's words up to 2.11
            compiled(labels[:, :-1], every)
        with pytest.raises(ValueError, match="token_indices: expected every labelled token once, got 2 of 24"):
            compiled(labels, every[2:4])
        if backend == "reference" or not labels.is_cuda:  # with rows, labels on a GPU are not read
            with pytest.raises(ValueError, match=r"labels: expected values in \[0, 131\) or -100, got 131"):
                compiled(labels.clone().index_fill_(0, torch.tensor([1]), V), every)


def test_the_objective_is_differentiated_whatever_the_state_of_autograd_was(device):
    """An import, or a first call, in inference mode must not leave anything behind."""
    torch._dynamo.reset()
    model = Model().to(device)
    x = torch.randn(B, T, 8, device=device)
    loss_of = inputs(device)["npo"]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        quiet, _ = compiled(x, loss_of)
    want = run(model, x, loss_of, model)
    assert_close(quiet, want[0], 1e-6, "loss in inference mode")
    for a, b in zip(run(model, x, loss_of, compiled)[2], want[2]):
        assert_close(a, b, 1e-5, "gradient")


def test_plain_functions_break_the_graph_and_work(backend, device):
    torch._dynamo.reset()
    model = Model().to(device)
    x = torch.randn(B, T, 8, device=device)
    labels = torch.randint(V, (B, T), device=device)

    def loss_of(hidden, weight, bias):
        return linear_objective(
            hidden, weight, labels, lambda logps, batch: -logps.mean(), bias=bias, options=LinearOptions(backend=backend)
        ), labels

    want = run(model, x, loss_of, model)
    got = run(model, x, loss_of, torch.compile(model, backend="aot_eager"))
    assert_close(got[0], want[0], 1e-6, "loss")
    for a, b in zip(got[2], want[2]):
        assert_close(a, b, 1e-5, "gradient")


@pytest.mark.parametrize("backend, name, frozen_head", [
    pytest.param(backend, name, frozen_head, marks=[] if backend == "torch" or name in ("npo", "gnb") else EVERY)
    for backend in ("torch", "reference") for name, frozen_head in (
        ("npo", False), ("npo", True), ("ceu", False), ("undial", False), ("logprob", False), ("logprob", True), ("kl", False),
        ("gnb", False), ("no rows", False))
])  # fmt: skip
def test_without_kernels_ops_are_compiled_without_a_graph_break(name, frozen_head, backend, device):
    """The graph holds the code of the eager call as one node, so the values are equal, bit for bit."""
    torch._dynamo.reset()
    model = Model(frozen_head).to(device)
    x = torch.randn(B, T, 8, device=device)
    loss_of = inputs(device, backend)[name]
    want = run(model, x, loss_of, model)
    got = run(model, x, loss_of, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    for a, b in zip(got[2], want[2]):
        assert_close(a, b, 1e-6, "gradient")


def test_without_kernels_ops_are_compiled_by_inductor():
    """What a user without a GPU gets from plain torch.compile. Little is around the op: compiling C++ takes seconds."""
    torch._dynamo.reset()
    hidden = torch.randn(B, T, D)
    weight = torch.randn(V, D, requires_grad=True)
    loss_of = inputs("cpu", "torch")["npo"]
    want, want_logps = loss_of(hidden, weight, None)
    got, logps = torch.compile(loss_of, fullgraph=True)(hidden, weight, None)
    assert torch.equal(got, want) and torch.equal(logps, want_logps)
    assert_close(torch.autograd.grad(got, weight)[0], torch.autograd.grad(want, weight)[0], 1e-6, "gradient")


@pytest.mark.parametrize("backend, dtype", [
    ("torch", torch.float64), ("reference", torch.bfloat16), pytest.param("torch", torch.bfloat16, marks=EVERY),
    pytest.param("reference", torch.float64, marks=EVERY),
])  # fmt: skip
def test_without_kernels_compiled_ops_keep_the_dtype_of_their_results(dtype, backend, device):
    """fp64 in, fp64 out; of bf16 the gradients are rounded once."""
    torch._dynamo.reset()
    model = Model().to(device, dtype)
    x = torch.randn(B, T, 8, device=device, dtype=dtype)
    labels = torch.randint(V, (B, T), device=device)
    objective = losses.GradAscent()

    def loss_of(hidden, weight, bias):
        options = LinearOptions(backend=backend)
        logps = linear_logprob(hidden, weight, labels, bias=bias, options=options)
        loss = linear_objective(hidden, weight, labels, objective, bias=bias, options=options)
        return loss + logps.sum(), linear_statistics(hidden, weight, labels, bias=bias, options=options).entropies

    want = run(model, x, loss_of, model)
    got = run(model, x, loss_of, torch.compile(model, backend="aot_eager", fullgraph=True))
    for a, b in zip((*got[:2], *got[2]), (*want[:2], *want[2])):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_statistics_of_a_trained_head_with_a_bias_are_compiled(backend, device):
    torch._dynamo.reset()
    model = Model().to(device)
    x = torch.randn(B, T, 8, device=device)
    labels = torch.randint(V, (B, T), device=device)

    def loss_of(hidden, weight, bias):
        entropies = linear_statistics(hidden, weight, labels, bias=bias, options=LinearOptions(backend=backend)).entropies
        return hidden.sum() + weight.sum() + bias.sum() + entropies.sum(), entropies

    want = run(model, x, loss_of, model)
    got = run(model, x, loss_of, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert_close(got[1], want[1], 1e-6, "entropies")


def export(model, x, loss_of, strict):
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, loss_of)

    return torch.export.export(Loss(), (x,), strict=strict)


@pytest.mark.parametrize("name, strict, backend", [
    pytest.param("npo", True, "reference", marks=EVERY), ("npo", False, "reference"), ("undial", False, "reference"),
    ("gnb", True, "reference"), ("npo", True, "torch"), ("undial", False, "torch"), ("logprob", False, "torch"),
    pytest.param("gnb", True, "torch", marks=EVERY), pytest.param("logprob", True, "reference", marks=EVERY),
    ("logprob", False, "reference"), ("no rows", False, "reference"), ("npo", True, "triton"),
])  # fmt: skip
def test_exported_programs_return_what_the_eager_call_does(name, strict, backend, device):
    torch._dynamo.reset()
    model = Model().to(device)
    x = torch.randn(B, T, 8, device=device)
    loss_of = inputs(device, backend)[name]
    want_loss, want_others, want = run(model, x, loss_of, model)
    file = io.BytesIO()
    torch.export.save(export(model, x, loss_of, strict), file)
    file.seek(0)
    program = torch.export.load(file).module()
    loss, others = program(x)
    assert_close(loss, want_loss, 1e-6, "loss")
    assert_close(others.float(), want_others.float(), 1e-6, "log-probabilities or labels")
    named = dict(program.named_parameters())
    for (key, _), b in zip(model.named_parameters(), want):
        assert_close(torch.autograd.grad(loss, named[f"model.{key}"], retain_graph=True)[0], b, 1e-5, "gradient")


def test_an_exported_program_never_takes_another_objective(device, monkeypatch):
    """It refers to its objective by a number, which in another process may be that of another one."""
    torch._dynamo.reset()
    model = Model().to(device)
    x = torch.randn(B, T, 8, device=device)
    loss_of = inputs(device, "reference")["npo"]
    program = export(model, x, loss_of, strict=True).module()
    monkeypatch.setattr(registry, "_process", registry._process ^ 1 << 40)  # as that of another process would be
    with pytest.raises(ArgumentError, match="objective: expected one that is alive in this process, got number"):
        program(x)


def test_what_an_exported_program_cannot_do_is_named(device):
    torch._dynamo.reset()
    model = Model().to(device)
    x = torch.randn(B, T, 8, device=device)
    labels = torch.randint(V, (B, T), device=device)
    by_reference = LinearOptions(backend="reference")

    def plain(hidden, weight, bias):
        return linear_objective(hidden, weight, labels, lambda logps, batch: -logps.mean(), bias=bias, options=by_reference)

    with pytest.raises(ArgumentError, match="objective: expected one that torch.export can refer to, got function"):
        export(model, x, plain, strict=False)
    loss_of = inputs(device, "reference")["npo"]  # which keeps the objective alive: the program has only its number
    with torch.no_grad():
        program = export(model, x, loss_of, strict=False)
    gc.collect()  # an objective that nobody keeps is gone now, not at a random time
    loss, _ = program.module()(x)
    with pytest.raises(ArgumentError, match="hidden: expected a program traced with its gradient"):
        loss.backward()


def test_with_a_plain_function_the_reference_breaks_the_graph_once(device):
    torch._dynamo.reset()
    model = Model().to(device)
    x = torch.randn(B, T, 8, device=device)
    labels = torch.randint(V, (B, T), device=device)
    by_reference = LinearOptions(backend="reference")

    def loss_of(hidden, weight, bias):
        loss = linear_objective(hidden, weight, labels, lambda logps, batch: -logps.mean(), bias=bias, options=by_reference)
        return loss, labels

    assert torch._dynamo.explain(model)(x, loss_of).graph_break_count <= 1
    want = run(model, x, loss_of, model)
    got = run(model, x, loss_of, torch.compile(model, backend="aot_eager"))
    for a, b in zip((got[0], *got[2]), (want[0], *want[2])):
        assert_close(a, b, 1e-6, "loss or gradient")


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_without_values_shapes_and_dtypes_are_known(where):
    """FakeTensorMode and the meta device, as planners of memory and shardings use them: nothing is read, so nothing of the
    values is checked, and a backward pass leaves gradients of the right shape.
    """
    mode = FakeTensorMode()

    def without_values(tensor):
        return mode.from_tensor(tensor) if where == "fake" else tensor.to("meta")

    for backend, dtype in (
        ("auto", torch.float32),
        ("torch", torch.float64),
        ("torch", torch.bfloat16),
        ("reference", torch.float64),
        ("reference", torch.bfloat16),
    ):
        real = Model().to(dtype)
        hidden = torch.randn(B, T, D, dtype=dtype)
        labels = torch.full((B, T), V)  # labels out of range: not looked at
        labels[0] = 3
        made = losses.UNDIAL()
        ref_hidden = torch.randn(B, T, D, dtype=dtype)

        def call(hidden, weight, bias, labels, ref_hidden, backend=backend, made=made):
            options = dict(bias=bias, options=LinearOptions(backend=backend))
            reference = Reference(ref_hidden, weight.detach())
            loss, logps = linear_objective(hidden, weight, labels, made, reference=reference, return_logps=True, **options)
            plain = linear_objective(hidden, weight, labels, lambda logps, batch: logps.sum(), **options)
            every = LinearOptions(token_indices=torch.arange(B * T), backend=backend)
            kl = linear_kl(hidden, weight, labels, reference, bias=bias, options=every)
            gnb_loss, drawn_labels = linear_gnb(hidden, weight, labels != -100, **options)
            statistics = linear_statistics(hidden, weight, labels, **options)
            logps = linear_logprob(hidden, weight, labels, **options)
            return loss, plain, kl.sum(), gnb_loss, drawn_labels, *statistics, logps.sum()

        leaves = [hidden, real.head.weight.detach(), real.head.bias.detach()]
        with mode if where == "fake" else contextlib.nullcontext():
            empty = [without_values(t).requires_grad_() for t in leaves]
            outputs = call(*empty, without_values(labels), without_values(ref_hidden))
            sum(output.sum() for output in outputs if output.requires_grad).backward()
        leaves = [t.clone().requires_grad_() for t in leaves]
        want = call(*leaves, labels.clamp(max=V - 1), ref_hidden, backend="reference")
        assert [(o.shape, o.dtype, o.requires_grad) for o in outputs] == [(o.shape, o.dtype, o.requires_grad) for o in want]
        for tensor, leaf in zip(empty, leaves):
            assert (tensor.grad.shape, tensor.grad.dtype) == (leaf.shape, leaf.dtype)
            assert tensor.grad.is_meta if where == "meta" else isinstance(tensor.grad, FakeTensor)


def test_without_values_arguments_are_checked_still():
    hidden = torch.empty(B, T, D, device="meta")
    weight = torch.empty(V, D, device="meta")
    labels = torch.empty(B, T, dtype=torch.int64, device="meta")
    with pytest.raises(ArgumentError, match=r"labels: expected \[B, T\] \(4, 6\), got \(4, 5\)"):
        linear_logprob(hidden, weight, labels[:, :-1])
    with pytest.raises(ArgumentError, match=r"token_indices: expected \[R\] int64"):
        linear_objective(hidden, weight, labels, losses.GradAscent(), options=LinearOptions(token_indices=labels))
    with pytest.raises(
        ArgumentError, match="reference: expected the hidden states and the head of the reference model, got None"
    ):
        linear_objective(hidden, weight, labels, losses.KLMin())


@pytest.mark.parametrize("name, backend", [
    ("logprob", "triton"), ("npo", "triton"), ("logprob", "reference"), ("npo", "reference"), ("gnb", "reference"),
    ("logprob", "torch"), ("npo", "torch"), ("gnb", "torch"), ("kl", "torch"),
])  # fmt: skip
def test_torch_func_differentiates_once(name, backend, device):
    loss_of = inputs(device, backend)[name]
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((B, T, D), (V, D), (V,))]
    want = torch.autograd.grad(loss_of(*leaves)[0], leaves)
    got = torch.func.grad(lambda *leaves: loss_of(*leaves)[0], argnums=(0, 1, 2))(*(t.detach() for t in leaves))
    by_vmap = torch.func.jacrev(lambda hidden: loss_of(hidden, *leaves[1:])[0])(leaves[0])
    for a, b in zip((*got, by_vmap), (*want, want[0])):
        assert_close(a, b, 1e-5, "gradient")


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_gradients_of_each_sequence_by_vmap(backend, device):
    hidden = torch.randn(B, T, D, device=device)
    weight = torch.randn(V, D, device=device)
    labels = torch.full((B, T), -100, device=device)
    labels[0, :2] = 7
    labels[1:3, :1] = 8
    objective = losses.GradAscent()

    def loss_of(weight, hidden, labels):
        return linear_objective(hidden[None], weight, labels[None], objective, options=LinearOptions(backend=backend))

    got = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0, 0))(weight, hidden, labels)
    for gradient, *sequence in zip(got, hidden, labels):
        assert_close(gradient, torch.func.grad(loss_of)(weight, *sequence), 1e-5, "gradient of a sequence")


@pytest.mark.parametrize("name", ["logprob", "npo"])
def test_second_derivatives_are_right_or_refused(name, backend, device):
    """Gradients that a kernel forms are constants to autograd, which would silently leave them out of a second derivative."""
    torch._dynamo.reset()
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((B, T, D), (V, D), (V,))]

    def curvature(loss_of):
        (gradient,) = torch.autograd.grad(loss_of(*leaves)[0], leaves[0], create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum() + leaves[1].sum(), leaves[1])

    fused = inputs(device, backend)[name]
    reference = inputs(device, "reference")[name]
    for loss_of in (fused, torch.compile(fused, backend="eager"), torch.compile(reference, backend="eager")):
        with pytest.raises(ArgumentError, match="backend: expected 'reference' for second derivatives"):
            curvature(loss_of)
    assert curvature(reference)[0].norm() > 0
    with pytest.raises(ArgumentError, match="backend: expected 'reference' for forward-mode derivatives"):
        torch.func.jvp(lambda hidden: fused(hidden, *leaves[1:])[0], (leaves[0].detach(),), (leaves[0].detach(),))


def test_results_may_be_changed_in_place(device):
    """As trainers do: ``loss /= accumulation_steps``."""
    hidden = torch.randn(B, T, D, device=device)
    weight = torch.randn(V, D, device=device, requires_grad=True)
    labels = torch.full((B, T), -100, device=device)
    labels[:2, :1] = 7
    objective = losses.GradAscent()
    uniforms = torch.rand(B, T, device=device)
    for backend in ("triton", "torch", "reference"):

        def values(backend=backend):
            options = LinearOptions(backend=backend)
            yield linear_objective(hidden, weight, labels, objective, options=options)
            yield linear_gnb(hidden, weight, labels >= 0, uniforms=uniforms, options=options)[0]
            if backend != "reference":
                yield linear_logprob(hidden, weight, labels, options=options)

        for value, changed in zip(values(), values()):
            changed /= 2
            want, got = (torch.autograd.grad(v.sum(), weight)[0] for v in (value, changed))
            assert_close(got, want / 2, 1e-6, "gradient")


def test_dtensors_beside_a_whole_head_are_refused_with_the_remedy():
    """Torch's own error speaks of mixed tensors. For heads that are DTensors see tests/distributed/test_head_shards.py."""
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        hidden = torch.randn(B, T, D)
        weight = torch.randn(V, D, requires_grad=True)
        bias = torch.randn(V)
        labels = torch.randint(V, (B, T))
        ref_hidden = torch.randn(B, T, D)
        sharded = DTensor.from_local(weight, mesh, [Shard(0)])
        calls = {
            "hidden": lambda t: linear_logprob(t, weight, labels),
            "bias": lambda t: linear_statistics(hidden, weight, labels, bias=t),
            "labels": lambda t: linear_logprob(hidden, weight, t),
            "keep": lambda t: linear_gnb(hidden, weight, t),
            "reference.weight": lambda t: linear_kl(hidden, weight, labels, Reference(ref_hidden, t)),
        }
        plain = dict(hidden=hidden, bias=bias, labels=labels, keep=labels >= 0)
        plain["reference.weight"] = weight.detach()
        for name, call in calls.items():
            tensor = DTensor.from_local(plain[name], mesh, [Shard(0)])
            message = rf"{name}: expected a plain tensor, got a DTensor with placements \(Shard.*; .*{name}.full_tensor"
            with pytest.raises(ArgumentError, match=message):
                call(tensor)
        linear_objective(hidden, sharded.full_tensor(), labels, losses.GradAscent()).backward()  # the remedy
        assert weight.grad.norm() > 0
    finally:
        distributed.destroy_process_group()
