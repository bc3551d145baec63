"""What is stored: low bits, 8-bit states, and how far bf16 parameters get."""

import pytest
import torch

from soul import SOUL, SophiaG
from tests.optimizers import BRAIN, FLOAT, HALF, give_gradients, make


def test_storage_policy():
    """Parameter dtype, state_dtype and param_rounding -> dtypes of m, h and the low bits."""
    int8, uint8 = torch.int8, torch.uint8
    for dtype, state_dtype, rounding, m, h, low in (
        (FLOAT, None, "auto", FLOAT, FLOAT, None),
        (BRAIN, None, "auto", BRAIN, FLOAT, int8),
        (HALF, None, "auto", FLOAT, FLOAT, int8),
        (BRAIN, None, "nearest", BRAIN, FLOAT, None),
        (BRAIN, FLOAT, "stochastic", FLOAT, FLOAT, None),
        (FLOAT, BRAIN, "compensated", BRAIN, BRAIN, None),
        (BRAIN, "8bit", "auto", uint8, uint8, int8),
    ):
        (param,) = params = make(dtype=dtype, shapes=((300,),))
        opt = SOUL(params, state_dtype=state_dtype, param_rounding=rounding)
        give_gradients(params)
        opt.step()
        state = opt.state[param]
        assert (state["exp_avg"].dtype, state["hessian"].dtype) == (m, h)
        assert (state["low_bits"].dtype if "low_bits" in state else None) == low
        assert ("exp_avg_scale" in state) == (state_dtype == "8bit")


def bf16_run(steps=500, lr=5e-6, weight_decay=0.1, zero_gradients=False, **options):
    """Displacement of bf16 parameters, in fp64, and that of an fp32 run with the same gradients from the same start.

    By the reference, which the kernels equal bit for bit: the interpreter would take minutes.
    """
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(4096, generator=generator) * 0.02).bfloat16()
    low, exact = start.clone().requires_grad_(), start.float().requires_grad_()
    more = dict(lr=lr, weight_decay=weight_decay, bs=1, rho=0.04, backend="reference")
    runs = [SOUL([low], **more, **options), SOUL([exact], **more)]
    drift = torch.randn(4096, generator=generator)
    for _ in range(steps):
        grad = torch.zeros(4096) if zero_gradients else drift + torch.randn(4096, generator=generator)
        low.grad, exact.grad = grad.bfloat16(), grad.bfloat16().float()
        for run in runs:
            run.step()
    moved = runs[0].export_fp32()[low].double() - start.double()
    return moved, exact.detach().double() - start.double(), start.double()


@pytest.mark.parametrize("options, low, high", [
    ({"param_rounding": "compensated"}, 0.99, 1.01),
    ({"param_rounding": "compensated", "state_dtype": "8bit"}, 0.97, 1.03),  # another h, hence another clip here and there
    ({"param_rounding": "stochastic"}, 0.95, 1.05),  # unbiased, but noisy: 4 standard deviations of 4096 walks
    ({"param_rounding": "nearest"}, -1.0, 0.3),  # the published practice; the reason for all of this
], ids=["compensated", "8bit", "stochastic", "nearest"])  # fmt: skip
def test_bf16_goes_as_far_as_fp32(options, low, high):
    """Projection of the displacement on that of an fp32 run, 500 steps of 5e-6."""
    moved, want, _ = bf16_run(**options)
    assert low <= (moved @ want / (want @ want)).item() <= high


@pytest.mark.parametrize("rounding, works", [("compensated", True), ("nearest", False)])
def test_decay_alone_shrinks_bf16_parameters(rounding, works):
    """lr wd = 5e-7, far below the last bit even of 24-bit weights: only stochastic rounding there keeps it."""
    moved, want, start = bf16_run(zero_gradients=True, param_rounding=rounding)
    shrink = (moved @ start / (start @ start)).item() / (want @ start / (start @ start)).item()
    assert (abs(shrink - 1) < 0.1) == works


def tiny_language_model_loss(**options):
    """Final loss of a bigram model with a hidden layer on a fixed random text, trained with SophiaG."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 24, (4, 33), generator=generator)
    text[:, 1::2] = (text[:, :-1:2] * 5 + 3) % 24  # half of it can be learned
    weights = [torch.randn(s, generator=generator) * 0.3 for s in ((24, 32), (32, 48), (48, 24))]
    params = [w.requires_grad_() for w in weights]
    opt = SophiaG(params, lr=5e-3, rho="auto", bs=1, weight_decay=0.0, backend="reference", **options)
    for index in range(150):
        hidden = torch.tanh(params[0][text[:, :-1]] @ params[1]) @ params[2]
        loss = torch.nn.functional.cross_entropy(hidden.flatten(0, 1), text[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        if index % 5 == 0:
            opt.update_hessian()
        opt.step()
    return loss.item()


def test_8_bit_states_train_as_well_as_fp32_states():
    exact = tiny_language_model_loss()
    assert exact < 2.0  # it has learned: ln 24 is 3.2
    assert tiny_language_model_loss(state_dtype="8bit") == pytest.approx(exact, rel=0.02)
    assert tiny_language_model_loss(state_dtype=BRAIN) == pytest.approx(exact, rel=0.02)


def test_export_fp32(device):
    linear = torch.nn.Linear(8, 4, device=device).bfloat16()
    opt = SOUL(linear.parameters(), lr=1e-4)
    before = opt.export_fp32()
    assert all(torch.equal(before[p], p.float()) and before[p].data_ptr() != p.data_ptr() for p in linear.parameters())
    give_gradients(list(linear.parameters()))
    opt.step()
    kept = [p.detach().clone() for p in linear.parameters()]
    with opt.export_fp32() as exported:
        for p in linear.parameters():
            assert p.dtype == FLOAT and torch.equal(p, exported[p])
        assert linear(torch.ones(1, 8, device=device)).dtype == FLOAT
        with pytest.raises(ValueError, match="export_fp32: expected parameters in the dtype of training, got fp32 values"):
            opt.export_fp32()
    for p, k in zip(linear.parameters(), kept):
        assert torch.equal(p, k) and torch.equal(exported[p].bfloat16(), k) and not torch.equal(exported[p], k.float())
    give_gradients(list(linear.parameters()))
    opt.step()  # and on
