import math

import pytest
import torch

from soul import SOUL, SophiaG
from soul.data.batches import collate
from soul.models import causal_lm
from soul.optim import curvature
from soul_kernels import LinearOptions, linear_gnb
from tests.support.helpers import assert_close
from tests.support.models import sequences, tiny_model

KINDS = (curvature.RetainFisher, curvature.GNB, curvature.Hutchinson)


def quadratic(n=12):
    """0.5 x A x with a symmetric A that is not diagonally dominant, and its parameter."""
    root = torch.randn(n, n, dtype=torch.float64)
    matrix = (root @ root.T / n + torch.diag(torch.linspace(-0.5, 2, n, dtype=torch.float64))).float()
    x = torch.randn(n).requires_grad_()
    return x, matrix, lambda: 0.5 * x @ matrix @ x


def test_hutchinson_estimates_the_diagonal():
    """Probes are +-1, both of them: with u always -1 the estimate is a row sum, a bug of a published class."""
    x, matrix, loss = quadratic()
    opt = SophiaG([x], betas=(0.9, 0.995), bias_correction=True, bs=1, backend="reference")
    hutchinson = curvature.Hutchinson(opt, every=1)
    for _ in range(1000):  # with bias correction h has forgotten how it began
        hutchinson.step(loss)
    h = opt.state[x]["hessian"]
    assert_close(h, matrix.diagonal(), 0.1, "diagonal")  # the mean of about 400 draws of +-|off-diagonal|
    assert (matrix.diagonal() < 0).any() == (h < 0).any()  # negative curvature is kept in h ...
    assert x.grad is None
    x.grad = torch.full_like(x, 1e-3)
    before = x.detach().clone()
    opt.param_groups[0].update(rho=1.0, weight_decay=0.0, lr=1e-2)
    opt.step()
    moved = (before - x.detach()) / 1e-2
    assert (moved[h <= 0] == 1).all() and (moved > 0).all()  # ... and counts as 0: a full step downhill


@pytest.mark.parametrize("kind", [curvature.RetainFisher, curvature.GNB])
@pytest.mark.parametrize("in_backward", [False, True])
def test_h_is_the_average_of_squared_gradients_of_the_closures_loss(kind, in_backward):
    """h averages squared gradients, and gradients that the parameters had before are restored."""
    w = torch.randn(5, 3).requires_grad_()
    b = torch.randn(3).requires_grad_()
    unused = torch.randn(4).requires_grad_()
    opt = SophiaG([w, b, unused], betas=(0.9, 0.8))
    source = kind(opt, every=2, in_backward=in_backward)
    w.grad = torch.ones(5, 3)
    want = torch.zeros(5, 3)
    refreshed = []
    for index in range(5):
        x = torch.randn(7, 5)
        due = index % 2 == 0
        if due:
            (grad,) = torch.autograd.grad((x @ w + b).square().mean(), w)
            want = 0.8 * want + 0.2 * grad * grad
        refreshed.append(source.step(lambda x=x: (x @ w + b).square().mean()))
    assert refreshed == [True, False, True, False, True]
    assert_close(opt.state[w]["hessian"], want, 1e-5, "h")
    assert torch.equal(w.grad, torch.ones(5, 3)) and b.grad is None
    assert int(opt.state[w]["hessian_step"]) == 3 and unused not in opt.state


def test_gnb_with_sampled_labels_estimates_the_gauss_newton_diagonal():
    """The mean of B g g over labels drawn from the model is sum x x (p - p^2) / B; with true labels it is another one."""
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    w = (torch.randn(6, 5) * 0.5).requires_grad_()
    opt = SophiaG([w], betas=(0.9, 0.995), bias_correction=True, backend="reference")
    gnb = curvature.GNB(opt, every=1)
    generator = torch.Generator().manual_seed(0)

    def loss():
        keep = torch.ones(1, 40, dtype=torch.bool)
        return linear_gnb(x[None], w.T, keep, generator=generator, options=LinearOptions(backend="reference"))[0]

    for _ in range(1000):
        gnb.step(loss)
    p = torch.softmax(x @ w.detach(), -1)
    want = (x * x).T @ (p - p * p) / 40
    assert_close(40 * opt.state[w]["hessian"], want, 0.12, "Gauss-Newton diagonal")


def test_labels_differ_between_steps_and_seeds_and_come_again_after_a_restart():
    w = torch.randn(3, requires_grad=True)
    opt = SophiaG([w])

    def numbers(gnb):
        return torch.rand(4, generator=gnb.generator()).tolist()

    def loss():
        return (w * w).sum()

    gnb = curvature.GNB(opt, every=1, seed=5)
    first = numbers(gnb)
    assert numbers(gnb) == first  # of one step
    gnb.step(loss)
    second = numbers(gnb)
    resumed = curvature.GNB(opt, every=1, seed=5)
    resumed.load_state_dict(gnb.state_dict())
    assert numbers(resumed) == second != first
    assert numbers(curvature.GNB(opt, every=1, seed=6)) != first


def test_gnb_loss_of_a_language_model():
    """The loss is a mean over the labelled tokens with drawn labels: at initialisation about log V."""
    model = tiny_model()
    batch = collate(sequences(3), [])
    gnb = curvature.GNB(SophiaG(model.parameters(), betas=(0.9, 0.9), backend="reference"), every=1)
    losses = []

    def loss():
        losses.append(causal_lm.gnb_loss(model, batch, generator=gnb.generator()))
        return losses[-1]

    gnb.step(loss)
    assert abs(losses[0].item() - math.log(300)) < 0.2
    weight, _ = causal_lm.head(model)
    assert gnb.optimizer.state[weight]["hessian"].sum() > 0


def test_schedule_and_what_checkpoints_carry():
    """A resumed run refreshes at the same steps, with the same h, bias correction and noise."""

    def run(stop_at=None):
        torch.manual_seed(0)
        w = torch.randn(10, 32).requires_grad_()
        opt = SophiaG([w], lr=1e-2, state_dtype="8bit", bias_correction=True, rho="auto")
        source = curvature.RetainFisher(opt, every=3)
        for index in range(8):
            if index == stop_at:
                saved = [opt.state_dict(), source.state_dict(), w.detach().clone()]
                w = saved[2].requires_grad_()
                opt = SophiaG([w])
                source = curvature.RetainFisher(opt, every=3)
                opt.load_state_dict(saved[0])
                source.load_state_dict(saved[1])
            generator = torch.Generator().manual_seed(index)
            w.grad = torch.randn(10, 32, generator=generator)
            opt.step()
            source.step(lambda generator=generator, w=w: (w * torch.randn(10, 32, generator=generator)).sum())
        return w

    assert torch.equal(run(), run(stop_at=4))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_arguments_are_named(kind):
    w = torch.randn(3).requires_grad_()
    with pytest.raises(ValueError, match="^optimizer: expected a SophiaG, got SOUL"):
        kind(SOUL([w]))
    with pytest.raises(ValueError, match="^optimizer: expected a SophiaG, got AdamW; pass the SophiaG itself; DeepSpeed"):
        kind(torch.optim.AdamW([w]))
    for every in (0, 2.5):
        with pytest.raises(ValueError, match="^every: expected an integer >= 1"):
            kind(SophiaG([w]), every)


def test_hutchinson_of_a_linear_loss_and_in_8_bits():
    linear, curved = torch.ones(3).requires_grad_(), torch.ones(3).requires_grad_()
    opt = SophiaG([linear, curved], betas=(0.9, 0.5))
    source = curvature.Hutchinson(opt, every=1)
    for _ in range(2):
        source.step(lambda: linear.sum() + (curved**2).sum())
        source.step(lambda: linear.sum() + curved.sum())
    assert int(opt.state[linear]["hessian_step"]) == 4 and not opt.state[linear]["hessian"].any()
    assert_close(
        opt.state[curved]["hessian"], torch.full((3,), 2 * (0.25 + 0.0625)), 1e-6, "h, halved where nothing was curved"
    )
    with pytest.raises(ValueError, match="^state_dtype: expected fp32 or bf16 with Hutchinson's estimate, got '8bit'"):
        curvature.Hutchinson(SophiaG([curved], state_dtype="8bit"), every=1).step(lambda: (curved**2).sum())


def test_a_closure_that_fails_leaves_the_gradients():
    w = torch.randn(3).requires_grad_()
    w.grad = torch.ones(3)
    opt = SophiaG([w])

    def fails():
        raise KeyError("no batch")

    for source in (curvature.RetainFisher(opt, 1, in_backward=True), curvature.Hutchinson(opt, 1)):
        with pytest.raises(KeyError):
            source.step(fails)
        assert torch.equal(w.grad, torch.ones(3)) and not opt.state
    w.sum().backward()
    assert not opt.state  # no hook was left behind
