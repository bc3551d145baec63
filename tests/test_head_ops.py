"""The ops on hidden states within a compiled model: one opaque op each, the numbers of the eager call."""

import pytest
import torch

from soul import losses
from soul_kernels import linear_gnb, linear_kl, linear_logprob, linear_objective, linear_statistics
from soul_kernels._head_rows import HeadRows
from soul_kernels._launch import interpreting
from tests.helpers import assert_close

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


def inputs(device):
    torch.manual_seed(3)
    labels = torch.randint(V, (B, T), device=device)
    labels[:, :2], labels[1] = -100, -100
    rows = (labels.flatten() != -100).nonzero()[:, 0].cpu()
    is_forget = torch.tensor([True, True, False, False])
    ref_hidden, ref_weight = torch.randn(B, T, D, device=device), torch.randn(V, D, device=device)
    uniforms, upstream = torch.rand(B, T, device=device), torch.randn(B, T, device=device)
    ref_logps = torch.full((B,), -15.0, device=device)
    reference = dict(ref_hidden=ref_hidden, ref_weight=ref_weight)
    options = dict(rows=rows, backend="triton")

    def objective(name, **kw):
        made = losses.get(name, **kw)

        def loss_of(hidden, weight, bias):
            extra = reference if made.divergence else {}
            loss, logps = linear_objective(
                hidden, weight, labels, made, bias=bias, is_forget=is_forget.to(device), ref_logps=ref_logps,
                return_logps=True, **extra, **options,
            )  # fmt: skip
            return 3.0 * loss, logps

        return loss_of

    def logprob(hidden, weight, bias):
        logps = linear_logprob(hidden, weight, labels, bias=bias, softcap=20.0, **options)
        return (logps * upstream).sum(), logps

    def kl(hidden, weight, bias):
        values = linear_kl(hidden, weight, labels, ref_hidden, ref_weight=ref_weight, bias=bias, **options)
        return (values * upstream).sum(), values

    def gnb(hidden, weight, bias):
        return linear_gnb(hidden, weight, labels != -100, uniforms=uniforms, bias=bias, **options)

    def no_rows(hidden, weight, bias):  # all rows, and those that are ignored are zero
        logps = linear_logprob(hidden, weight, labels, bias=bias, backend="triton")
        loss = linear_objective(hidden, weight, labels, made, bias=bias, is_forget=is_forget, backend="triton")
        return loss + (logps * upstream).sum(), logps

    made = losses.GradDiff()
    cases = {name: objective(name) for name in ("graddiff", "npo", "ceu", "klmin", "undial")}
    return cases | {"logprob": logprob, "kl": kl, "gnb": gnb, "no rows": no_rows}


CASES = ["graddiff", "npo", "ceu", "klmin", "undial", "logprob", "kl", "gnb", "no rows"]


def run(model, x, loss_of, call):
    loss, others = call(x, loss_of)
    leaves = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), others, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
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
    loads, real = [], HeadRows.load
    monkeypatch.setattr(HeadRows, "load", lambda self, chunk: loads.append(chunk) or real(self, chunk))
    torch._dynamo.reset()
    model, x = Model(frozen_head=True).to(device), torch.randn(B, T, 8, device=device)
    loss_of = inputs(device)[name]
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loads.clear()
        run(model, x, loss_of, call)
        assert len(loads) == 1


def test_autocast_and_upstream_factors_in_a_compiled_step(device):
    """What autocast asks for is decided when the op is traced: at run time it is not on any more."""
    torch._dynamo.reset()
    model, x = Model().to(device), torch.randn(B, T, 8, device=device)
    loss_of = inputs(device)["npo"]

    def call(x, loss_of):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return model(x, loss_of)

    want = run(model, x, loss_of, call)
    got = run(model, x, loss_of, torch.compile(call, backend="aot_eager", fullgraph=True))
    assert_close(got[0], want[0], 1e-6, "loss")
    for a, b in zip(got[2], want[2]):
        assert_close(a, b, 1e-2, "gradient")


@pytest.mark.parametrize("name", ["npo", "kl", "logprob", "gnb"])
def test_the_ops_are_what_their_fakes_promise(name, device, monkeypatch):
    """Shapes, dtypes and strides, on which inductor relies; hidden states and weight lie transposed in memory."""
    from soul_kernels import _head_ops

    calls = []
    for op in ("_objective", "_gnb", "_per_token", "_per_token_backward"):
        real = getattr(_head_ops, op)
        monkeypatch.setattr(_head_ops, op, lambda *args, real=real: calls.append((real, args)) or real(*args))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    hidden = torch.randn(T, B, D, device=device).transpose(0, 1).requires_grad_()
    weight, bias = torch.randn(D, V, device=device).T.requires_grad_(), torch.randn(V, device=device, requires_grad=True)
    loss_of = inputs(device)[name]  # which keeps the objective alive
    loss, _ = loss_of(hidden, weight, bias)
    loss.backward()
    for op, args in calls:
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_compiled_calls_check_labels_and_rows(device):
    torch._dynamo.reset()
    hidden, weight = torch.randn(B, T, D, device=device), torch.randn(V, D, device=device)
    labels = torch.randint(V, (B, T), device=device)
    for op in (linear_logprob, linear_statistics):

        def call(labels, rows, op=op):
            return op(hidden, weight, labels, rows=rows, backend="triton")

        compiled = torch.compile(call, backend="eager", fullgraph=True)
        every = torch.arange(B * T)
        for a, b in zip(compiled(labels, every), call(labels, every)):
            assert torch.equal(a, b)
        with pytest.raises(Exception, match=r"labels.*\[B, T\] \(4, 6\)"):  # in torch's words up to 2.11
            compiled(labels[:, :-1], every)
        with pytest.raises(ValueError, match="rows: expected every labelled token once, got 2 of 24"):
            compiled(labels, every[2:4])
        if not labels.is_cuda:  # with rows, labels on a GPU are not read
            with pytest.raises(ValueError, match=r"labels: expected values in \[0, 131\) or -100, got 131"):
                compiled(labels.clone().index_fill_(0, torch.tensor([1]), V), every)


def test_the_objective_is_differentiated_whatever_the_state_of_autograd_was(device):
    """An import, or a first call, in inference mode must not leave anything behind."""
    torch._dynamo.reset()
    model, x = Model().to(device), torch.randn(B, T, 8, device=device)
    loss_of = inputs(device)["npo"]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        quiet, _ = compiled(x, loss_of)
    want = run(model, x, loss_of, model)
    assert_close(quiet, want[0], 1e-6, "loss in inference mode")
    for a, b in zip(run(model, x, loss_of, compiled)[2], want[2]):
        assert_close(a, b, 1e-5, "gradient")


def test_plain_functions_break_the_graph_and_work(device):
    torch._dynamo.reset()
    model, x = Model().to(device), torch.randn(B, T, 8, device=device)
    labels = torch.randint(V, (B, T), device=device)

    def loss_of(hidden, weight, bias):
        return linear_objective(hidden, weight, labels, lambda logps, batch: -logps.mean(), bias=bias, backend="triton"), labels

    want = run(model, x, loss_of, model)
    got = run(model, x, loss_of, torch.compile(model, backend="aot_eager"))
    assert_close(got[0], want[0], 1e-6, "loss")
    for a, b in zip(got[2], want[2]):
        assert_close(a, b, 1e-5, "gradient")
