import copy
import gc
import io
import weakref

import pytest
import torch

from soul import SOUL, SophiaG, curvature
from soul_kernels.reference.rounding import load_state
from tests import tolerances as tol
from tests.helpers import assert_close

FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


class PublishedSophiaG(torch.optim.Optimizer):
    """The published class, as far as its numbers go; ``soul`` adds what SOUL's code does before it in every step."""

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.04, weight_decay=0.1, maximize=False, soul=False):
        defaults = dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay, maximize=maximize, capturable=False)
        super().__init__(params, defaults)
        self.soul = soul

    def _state(self, p):
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["hessian"] = torch.zeros_like(p), torch.zeros_like(p)
        return state

    @torch.no_grad()
    def update_hessian(self):
        for group in self.param_groups:
            for p in group["params"]:
                b2 = group["betas"][1]
                self._state(p)["hessian"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)

    @torch.no_grad()
    def step(self, bs=5120):
        if self.soul:
            self.update_hessian()
        for group in self.param_groups:
            b1, lr = group["betas"][0], group["lr"]
            for p in group["params"]:
                state = self._state(p)
                state["step"] += 1
                if self.soul:
                    state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                p.mul_(1 - lr * group["weight_decay"])
                state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                ratio = (state["exp_avg"].abs() / (group["rho"] * bs * state["hessian"] + 1e-15)).clamp(None, 1)
                p.addcmul_(state["exp_avg"].sign(), ratio, value=-lr)


def make(device="cpu", dtype=FLOAT, shapes=((40, 5), (7,), ())):
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def twin(params, dtype=None):
    return [p.detach().to(dtype or p.dtype).clone().requires_grad_() for p in params]


def give_gradients(params, *others, scale=1.0, generator=None):
    for index, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator).to(p) * scale
        for other in others:
            other[index].grad = p.grad.to(other[index].dtype, copy=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["SophiaG", "SOUL"])
def test_follows_the_published_class_in_fp64(kind, backend, device):
    """50 steps, with update_hessian every third, a schedule of lr, and bs from the group and from the call."""
    params = make(device)
    doubles = twin(params, torch.float64)
    options = dict(lr=1e-2, betas=(0.9, 0.95), rho=0.04, weight_decay=0.1)
    if kind == "SOUL":
        ours = SOUL(params, **options, bs=60, published_code=True, backend=backend)
    else:
        ours = SophiaG(params, **options, bs=60, backend=backend)
    theirs = PublishedSophiaG(doubles, **options, soul=kind == "SOUL")
    start = [p.detach().clone() for p in doubles]
    for index in range(50):
        give_gradients(params, doubles)
        for opt in (ours, theirs):
            opt.param_groups[0]["lr"] = 1e-2 * (1 - index / 60)
            if kind == "SophiaG" and index % 3 == 0:
                opt.update_hessian()
        if index % 2:
            ours.step(bs=90), theirs.step(bs=90)
        else:
            ours.step(), theirs.step(bs=60)
    for p, q, s in zip(params, doubles, start):
        assert_close(p.double() - s, q - s, 1e-4, "displacement")
        for name in ("exp_avg", "hessian"):
            assert_close(ours.state[p][name], theirs.state[q][name], tol.STEP_50_FP32, name)


def test_published_code_is_one_average_with_beta1_squared():
    params = make()
    others, grads = twin(params), twin(params)
    a = SOUL(params, betas=(0.9, 0.95), lr=1e-3, published_code=True)
    b = SOUL(others, betas=(0.81, 0.95), lr=1e-3)
    give_gradients(grads, params, others)
    a.step(), b.step()
    assert all(torch.allclose(p, q, rtol=1e-6, atol=0) for p, q in zip(params, others))
    paper = SOUL(others, betas=(0.9, 0.95), lr=1e-3)
    paper.step()
    expected = 0.1 * others[0].grad
    assert_close(paper.state[others[0]]["exp_avg"], expected, 1e-6, "the paper's momentum, updated once")


def test_loads_a_checkpoint_of_the_published_class_and_goes_on(device):
    params = make(device)
    others = twin(params)
    published = PublishedSophiaG(others, lr=1e-3)
    for _ in range(3):
        give_gradients(params, others)
        published.update_hessian()
        published.step()
    params = twin(others)
    ours = SophiaG(params, lr=5.0, bs=5120)
    buffer = io.BytesIO()
    torch.save(published.state_dict(), buffer)
    buffer.seek(0)
    ours.load_state_dict(torch.load(buffer, weights_only=True))
    assert ours.param_groups[0]["lr"] == 1e-3 and ours.param_groups[0]["eps"] == 1e-15
    assert ours.state[params[0]]["step"] == 3
    give_gradients(params, others)
    ours.step(), published.step()
    for p, q in zip(params, others):
        assert_close(p, q, 1e-6, "p after loading")


def through_torch_save(state_dict, tmp_path):
    torch.save(state_dict, tmp_path / "optimizer.pt")
    return torch.load(tmp_path / "optimizer.pt", weights_only=True)


def through_safetensors(state_dict, tmp_path):
    """Tensors flat, by index and name; options beside them."""
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    save_file({f"{i}.{n}": t for i, state in state_dict["state"].items() for n, t in state.items()}, tmp_path / "o.safetensors")
    states = {}
    for key, tensor in load_file(tmp_path / "o.safetensors").items():
        index, name = key.split(".")
        states.setdefault(int(index), {})[name] = tensor
    return {"state": states, "param_groups": copy.deepcopy(state_dict["param_groups"])}


@pytest.mark.parametrize("through", [through_torch_save, through_safetensors])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("state_dtype", [None, FLOAT, BRAIN, "8bit"], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF], ids=str)
def test_resume_is_bitwise(dtype, state_dtype, rounding, through, device, tmp_path):
    """torch's own load_state_dict would cast every state, int8 codes and scales included, to the parameter's dtype."""
    params = make(device, dtype, shapes=((40, 7), (300,), ()))
    options = dict(bias_correction=True, rho="auto", seed=3, state_dtype=state_dtype, param_rounding=rounding)
    opt = SophiaG(params, lr=1e-3, **options)
    for _ in range(2):
        give_gradients(params)
        opt.update_hessian()
        opt.step()
    resumed_params = twin(params)
    resumed = SophiaG(resumed_params, lr=9.0)  # options come from the checkpoint
    resumed.load_state_dict(state_dict=through(opt.state_dict(), tmp_path))
    for _ in range(2):
        give_gradients(params, resumed_params)
        for each in (opt, resumed):
            each.update_hessian()
            each.step()
    assert torch.equal(opt.param_groups[0]["rho"], resumed.param_groups[0]["rho"])
    for p, q in zip(params, resumed_params):
        assert torch.equal(p, q)
        assert opt.state[p].keys() == resumed.state[q].keys()
        for name, value in opt.state[p].items():
            assert value.dtype == resumed.state[q][name].dtype and torch.equal(value, resumed.state[q][name]), name


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


def test_groups_schedulers_closures_and_gradients_that_come_and_go(device):
    a, b, c = make(device, shapes=((5,), (6,), (7,)))
    opt = SOUL([{"params": [a], "lr": 1e-2}, {"params": [b], "weight_decay": 0.0}], lr=1e-3)
    opt.add_param_group({"params": [c], "rho": 1.0})
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)

    def closure():
        opt.zero_grad()
        loss = (a**2).sum() + (b**2).sum()
        loss.backward()
        return loss

    before = [t.detach().clone() for t in (a, b, c)]
    assert opt.step(closure).item() == pytest.approx(((before[0] ** 2).sum() + (before[1] ** 2).sum()).item())
    scheduler.step()
    assert [g["lr"] for g in opt.param_groups] == [5e-3, 5e-4, 5e-4]
    assert not torch.equal(a, before[0]) and not torch.equal(b, before[1])
    assert torch.equal(c, before[2]) and c not in opt.state  # no gradient: no step, no state
    step = opt.state[a]["step"].clone()
    a.grad = None
    opt.step()
    assert opt.state[a]["step"] == step and opt.state[b]["step"] == step + 1


def test_goes_downhill_and_learns(device):
    """The contract of every optimizer: with and without maximize, the loss moves the right way."""
    for maximize in (False, True):
        x = torch.tensor([3.0, -2.0], device=device).requires_grad_()
        opt = SOUL([x], lr=1e-2, rho=1.0, bs=1, weight_decay=0.0, maximize=maximize)
        for _ in range(100):
            opt.zero_grad()
            loss = (x**2).sum() * (-1 if maximize else 1)
            loss.backward()
            opt.step()
        assert x.abs().max() < 2.8


def test_gradient_is_kept_and_zero_gradients_move_nothing(device):
    params = make(device)
    opt = SOUL(params, lr=1e-2, weight_decay=0.0)
    give_gradients(params)
    grads = [p.grad.clone() for p in params]
    opt.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads))
    fresh = make(device)
    opt = SOUL(fresh, lr=1e-2, weight_decay=0.0)
    for p in fresh:
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in fresh]
    opt.step()
    assert all(torch.equal(p, b) for p, b in zip(fresh, before))


def test_clip_fraction(device):
    (p,) = params = make(device, shapes=((1000,),))
    opt = SophiaG([{"params": params}], lr=1e-3, rho=1.0, bs=1, betas=(0.0, 0.0), weight_decay=0.0)
    assert opt.clip_fraction() != opt.clip_fraction()  # NaN before the first step
    p.grad = torch.ones_like(p)
    opt.update_hessian()  # h = 1
    p.grad[:250] = 0.5  # |m| / h = 0.5: not clipped
    opt.step()
    assert opt.clip_fraction() == [0.75]
    opt.step()
    assert opt.clip_fraction() == [0.75]  # of the last step, not a running sum


def test_deepcopy_and_tied_parameters(device):
    params = make(device)
    opt = SOUL(params, lr=1e-3, published_code=True)
    give_gradients(params)
    opt.step()
    other = copy.deepcopy(opt)
    other.step()
    assert other.param_groups[0]["published_code"] and other.clip_fraction()[0] > 0
    with pytest.warns(UserWarning, match="duplicate parameters"):
        tied = SOUL([params[0], params[0]], lr=1e-3, weight_decay=0.0, rho=0.0)
    before = params[0].detach().clone()
    tied.step()
    assert torch.allclose((params[0] - before).abs(), torch.full_like(before, 1e-3), rtol=1e-3)  # stepped once


@pytest.mark.parametrize("options, message", [
    ({"lr": -1.0}, "lr: expected a number >= 0.0, got -1.0"),
    ({"lr": torch.ones(2)}, "lr: expected one number"),
    ({"betas": (0.9,)}, "betas: expected two numbers"),
    ({"max_grad_norm": 0.0}, "max_grad_norm: expected a positive number or None, got 0.0"),
    ({"lr": float("inf")}, "lr: expected a number >= 0.0, got inf"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\]: expected a number in \[0.0, 1.0\), got 1.0"),
    ({"rho": float("nan")}, "rho: expected"),
    ({"bs": 0}, "bs: expected a positive number, got 0"),
    ({"weight_decay": -0.1}, "weight_decay: expected"),
    ({"clip_target": 0.5}, "clip_target: expected None with a fixed rho, got 0.5; pass rho='auto'"),
    ({"rho": "auto", "clip_target": 1.5}, "clip_target: expected a number in"),
    ({"rho": "car"}, "rho: expected"),
    ({"eps_mode": "mean"}, "eps_mode: expected one of 'add', 'max'"),
    ({"param_rounding": "up"}, "param_rounding: expected one of 'auto', 'nearest', 'stochastic', 'compensated', got 'up'"),
    ({"state_dtype": HALF}, "state_dtype: expected one of"),
    ({"backend": "cuda"}, "backend: expected one of"),
])  # fmt: skip
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SOUL(make(), **options)


def test_bad_parameters_and_gradients_change_nothing():
    good = make()
    with pytest.raises(ValueError, match="parameter 1 in group 0: expected dense strides"):
        SOUL([good[0], torch.zeros(8)[::2].requires_grad_()])
    with pytest.raises(ValueError, match="parameter 0 in group 0: expected a real tensor"):
        SOUL([torch.zeros(3, dtype=torch.complex64).requires_grad_()])
    with pytest.raises(ValueError, match="parameter 0 in group 0: expected dtype"):
        SOUL([torch.zeros(3, dtype=torch.float64).requires_grad_()])
    opt = SOUL(good)
    with pytest.raises(ValueError, match="rho: expected"):
        opt.add_param_group({"params": make(), "rho": -1.0})
    assert len(opt.param_groups) == 1
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    before = embedding.weight.detach().clone()
    opt = SOUL([embedding.weight, *make()])
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="gradient of parameter 0 in group 0: expected a dense tensor"):
        opt.step()
    assert torch.equal(embedding.weight, before) and not opt.state
    with pytest.raises(RuntimeError, match="use SophiaG"):
        opt.update_hessian()


def test_checkpoint_of_another_shape_is_refused():
    a, b = SOUL(make()), SOUL(make(shapes=((4, 5), (7,), ())))
    give_gradients(a.param_groups[0]["params"])
    a.step()
    b.param_groups[0]["lr"] = 0.5
    give_gradients(b.param_groups[0]["params"])
    b.step()
    before = copy.deepcopy(b.state_dict())
    with pytest.raises(ValueError, match=r"state_dict exp_avg: expected shape \(4, 5\), got \(40, 5\)"):
        b.load_state_dict(a.state_dict())
    after = b.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(after["state"][key][name], value) for name, value in state.items())


def test_checkpoints_of_other_optimizers_and_with_bad_options_are_refused():
    params = make()
    opt = SOUL(params, lr=1e-3)
    give_gradients(params)
    opt.step()
    adam = torch.optim.AdamW(others := twin(params))
    give_gradients(params, others)
    adam.step()
    bad = copy.deepcopy(opt.state_dict())
    bad["param_groups"][0]["rho"] = -1.0
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="state_dict: expected states exp_avg, hessian, got exp_avg, exp_avg_sq, step"):
        opt.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="rho: expected"):
        opt.load_state_dict(bad)
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    assert torch.equal(opt.state[params[0]]["exp_avg"], before["state"][0]["exp_avg"])
    opt.load_state_dict(before)
    assert opt.clip_fraction() != opt.clip_fraction()  # NaN: the last step was another optimizer's


def test_loading_keeps_what_the_checkpoint_does_not_say():
    params = make()
    published = PublishedSophiaG(twin(params), lr=1e-3)
    ours = SophiaG([{"params": params, "bs": 7}], backend="reference")
    ours.load_state_dict(published.state_dict())
    assert ours.param_groups[0]["bs"] == 7 and ours.param_groups[0]["backend"] == "reference"
    other = SophiaG(twin(params), backend="auto", rho=0.5)
    other.load_state_dict(ours.state_dict())
    assert other.param_groups[0]["backend"] == "auto" and other.param_groups[0]["rho"] == 0.04


def test_load_hooks_see_and_change_the_checkpoint():
    params = make(dtype=BRAIN)
    a, b = SOUL(params, lr=1e-3), SOUL(twin(params), lr=1e-3)
    give_gradients(params)
    a.step()
    seen = []

    def double_hessian(optimizer, state_dict):
        for state in state_dict["state"].values():
            state["hessian"] = 2 * state["hessian"]
        return state_dict

    b.register_load_state_dict_pre_hook(double_hessian)
    b.register_load_state_dict_post_hook(lambda optimizer: seen.extend(s["hessian"].dtype for s in optimizer.state.values()))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert seen == [FLOAT] * 3  # the post-hook finds the states as they are going to stay
    for p, q in zip(params, b.param_groups[0]["params"]):
        assert torch.equal(b.state[q]["hessian"], 2 * a.state[p]["hessian"])


def test_works_under_another_default_device():
    params = make()
    before = params[0].detach().clone()
    torch.set_default_device("meta")
    try:
        opt = SOUL(params, lr=1e-3)
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    finally:
        torch.set_default_device(None)
    assert opt.state[params[0]]["step"] == 1 and opt.clip_fraction() == [0.0]
    assert (params[0] != before).all()


def test_nothing_moves_when_a_later_group_is_wrong():
    good, bad = make(), make()
    opt = SOUL([{"params": good}, {"params": bad}], lr=1e-3)
    give_gradients(good, bad)
    before = [p.detach().clone() for p in good]
    opt.param_groups[1]["rho"] = -1.0
    with pytest.raises(ValueError, match="rho: expected"):
        opt.step()
    assert all(torch.equal(p, b) for p, b in zip(good, before)) and not opt.state
    opt.param_groups[1]["rho"] = 0.04
    with pytest.raises(ValueError, match="bs: expected a positive number, got 0"):
        opt.step(bs=0)
    assert not opt.state


def test_nothing_moves_when_a_later_parameter_changed_its_layout():
    good, image = make(), torch.randn(2, 3, 4, 5).requires_grad_()
    opt = SOUL([{"params": good}, {"params": [image]}], lr=1e-3)
    give_gradients([*good, image])
    opt.step()
    image.data = image.data.to(memory_format=torch.channels_last)
    before = [p.detach().clone() for p in good]
    with pytest.raises(ValueError, match="parameter 0 in group 1: expected strides"):
        opt.step()
    assert all(torch.equal(p, b) for p, b in zip(good, before))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("call", ["step", "update_hessian"])
def test_a_known_gradient_that_fits_no_more_is_named_and_nothing_moves(groups, call):
    """Known plans are checked by the ops, which know it as entry of a list."""
    params = make()
    opt = SophiaG([{"params": params[:2]}, {"params": params[2:]}] if groups == 2 else params, lr=1e-3, max_grad_norm=1.0)
    give_gradients(params)
    opt.update_hessian(), opt.step()
    params[-1].grad.data = params[-1].grad.data.double()
    before = [t.clone() for p in params for t in (p, *opt.state[p].values())]
    name = "parameter 0 in group 1" if groups == 2 else "parameter 2 in group 0"
    with pytest.raises(ValueError, match=f"the gradient of {name}: expected dtype .* got torch.float64"):
        getattr(opt, call)()
    assert all(torch.equal(a, b) for a, b in zip(before, (t for p in params for t in (p, *opt.state[p].values()))))


def test_learning_rate_may_be_a_tensor():
    params = make()
    others = twin(params)
    a, b = SOUL(params, lr=torch.tensor(1e-3)), SOUL(others, lr=1e-3)
    give_gradients(params, others)
    a.step(), b.step()
    assert all(torch.allclose(p, q) for p, q in zip(params, others))


def test_a_published_checkpoint_loads_into_any_storage():
    params = make(shapes=((300,),))
    published = PublishedSophiaG(params, lr=1e-3)
    give_gradients(params)
    published.update_hessian(), published.step()
    for state_dtype, tolerance in ((FLOAT, 0.0), (BRAIN, 5e-3), ("8bit", 0.04)):
        (param,) = other = twin(params, BRAIN)
        opt = SophiaG(other, state_dtype=state_dtype, bias_correction=True)
        opt.load_state_dict(published.state_dict())
        state = opt.state[param]
        for name in ("exp_avg", "hessian"):
            value = load_state(state[name], state.get(f"{name}_scale"), name)
            assert_close(value, published.state[params[0]][name], tolerance, f"{name} as {state_dtype}")
        give_gradients(other)
        opt.step()
        assert param.isfinite().all() and state["low_bits"].any()


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
    for p, k in zip(linear.parameters(), kept):
        assert torch.equal(p, k) and torch.equal(exported[p].bfloat16(), k) and not torch.equal(exported[p], k.float())
    give_gradients(list(linear.parameters()))
    opt.step()  # and on


def norm_of(params):
    return torch.cat([p.grad.flatten().double() for p in params]).norm().item()


@pytest.mark.parametrize("factor", [0.1, 10.0], ids=["clipped", "not clipped"])
def test_max_grad_norm_is_clip_grad_norm_within_the_step(factor, device):
    params = make(device)
    others = twin(params)
    give_gradients(params, others)
    norm = norm_of(params)
    groups = [{"params": params[:1]}, {"params": params[1:]}]  # the norm is that of all groups together
    ours = SOUL(groups, lr=1e-3, rho=1.0, bs=1, max_grad_norm=norm * factor)
    theirs = SOUL(others, lr=1e-3, rho=1.0, bs=1)
    ours.step()
    torch.nn.utils.clip_grad_norm_(others, norm * factor)
    theirs.step()
    assert norm_of(params) == norm  # the gradients are not changed
    assert ours.telemetry()["grad_norm"] == pytest.approx(norm, rel=1e-6)
    for p, q in zip(params, others):
        assert_close(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"], 1e-6, "m")
        assert_close(ours.state[p]["hessian"], theirs.state[q]["hessian"], 1e-6, "h")
        assert_close(p, q, 1e-6, "p")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_bad_gradients_is_skipped_and_counted(bad, device):
    params = make(device, BRAIN)
    opt = SophiaG(
        [{"params": params[:2]}, {"params": params[2:]}], lr=1e-3, rho="auto", skip_nonfinite=True, state_dtype="8bit"
    )
    give_gradients(params)
    opt.update_hessian(), opt.step()
    before = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    params[2].grad.fill_(bad)  # of the other group
    opt.update_hessian(), opt.step()
    for index, state in opt.state_dict()["state"].items():
        assert all(torch.equal(value, before[0]["state"][index][name]) for name, value in state.items())
    assert all(torch.equal(p, k) for p, k in zip(params, before[1]))
    assert [g["rho"] for g in opt.param_groups] == [g["rho"] for g in before[0]["param_groups"]]
    assert opt.telemetry()["skipped_steps"] == 1
    give_gradients(params)
    opt.step()
    assert opt.state[params[0]]["step"] == 2 and opt.telemetry()["skipped_steps"] == 1
    loud = SOUL(others := make(device))  # without it NaN goes through, as in torch
    give_gradients(others)
    others[0].grad.view(-1)[0] = float("nan")
    loud.step()
    assert others[0].isnan().sum() == 1


def test_rho_auto_holds_the_clip_target(device):
    params = make(device, shapes=((64, 50), (300,)))
    opt = SOUL(params, lr=1e-3, rho="auto", clip_target=0.3, weight_decay=0.0)
    for _ in range(60):
        give_gradients(params, scale=1e-3)
        opt.step()
    assert opt.clip_fraction()[0] == pytest.approx(0.3, abs=0.03)
    rho = opt.param_groups[0]["rho"]
    assert rho.device.type == device.type and rho.dtype == FLOAT and opt.telemetry()["groups"][0]["rho"] == rho.item() != 0.04
    kept = rho.clone()
    opt.param_groups[0]["lr"] = 0.0  # torch.distributed.checkpoint steps like this to make states
    give_gradients(params)
    opt.step()
    assert torch.equal(rho, kept)


def test_rho_waits_for_a_hessian(device):
    """Without one everything is clipped, and rho would run away."""
    params = make(device)
    opt = SophiaG(params, lr=1e-3, rho="auto")
    give_gradients(params)
    opt.step()
    assert opt.clip_fraction() == [1.0] and opt.param_groups[0]["rho"].item() == pytest.approx(0.04)
    opt.update_hessian(), opt.step()
    assert opt.param_groups[0]["rho"].item() != pytest.approx(0.04)


def test_bias_correction_makes_a_young_hessian_a_mean(device):
    (param,) = params = make(device, shapes=((50,),))
    grads = [torch.rand(50, device=device) + 0.1 for _ in range(3)]
    opt = SophiaG(params, lr=1.0, betas=(0.0, 0.9), rho=1.0, bs=1, eps=0.0, weight_decay=0.0, bias_correction=True)
    for grad in grads:
        param.grad = grad
        opt.update_hessian()
    mean = sum(w * g * g for w, g in zip((0.081, 0.09, 0.1), grads)) / (1 - 0.9**3)
    before, small = param.detach().clone(), mean / 2  # not clipped
    param.grad = small
    opt.step()
    assert_close(before - param, small / mean, 1e-4, "update")
    soul = SOUL(
        others := twin(params), lr=1.0, betas=(0.0, 0.9), rho=2.0, bs=1, eps=0.0, weight_decay=0.0, bias_correction=True
    )
    before, others[0].grad = others[0].detach().clone(), small
    soul.step()
    assert_close(before - others[0], (1 / (2 * small)).clamp(max=1), 1e-4, "update of SOUL: h is g g at once")


def test_telemetry(device):
    params = make(device, BRAIN, shapes=((400,),))
    opt = SOUL([{"params": params}, {"params": make(device)}], lr=1e-6, rho=0.0, weight_decay=0.0, param_rounding="nearest")
    give_gradients(params)
    opt.step()
    moved, unmoved = opt.telemetry()["groups"]
    assert moved["update_norm"] == pytest.approx(400**0.5 * 1e-6, rel=1e-4)
    assert moved["clip_fraction"] == 1.0 and moved["lost_fraction"] > 0.9  # at 1e-6 nearly all is lost
    assert all(
        unmoved[name] != unmoved[name] for name in ("clip_fraction", "update_norm", "lost_fraction")
    )  # NaN: no gradients
    assert opt.telemetry()["grad_norm"] is None


def test_groups_of_mixed_dtypes_layouts_and_sizes(device):
    """0-dim, empty, channels_last, transposed, misaligned, fp32 gradients of bf16 parameters: as the reference does it."""

    def build():
        torch.manual_seed(0)
        flat = torch.randn(1001, device=device)
        image = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
        made = [torch.randn((), device=device), torch.zeros(0, 3, device=device), image,
                torch.randn(6, 7, device=device).t(), flat[1:], flat.bfloat16()[3:70]]  # fmt: skip
        params = [torch.nn.Parameter(t) for t in made] + [torch.nn.Parameter(torch.randn(50, device=device).half())]
        for p in params:
            dtype = p.dtype
            if dtype == BRAIN and hasattr(p, "grad_dtype"):  # torch 2.10 and newer
                p.grad_dtype = dtype = FLOAT
            p.grad = torch.randn(p.shape, device=device).to(dtype)  # contiguous, where p may not be
        return params

    runs = []
    for backend in ("auto", "reference"):
        params = build()
        opt = SOUL(params[:4], lr=1e-2, backend=backend, state_dtype=BRAIN)
        opt.step()
        opt.add_param_group({"params": params[4:], "param_rounding": "stochastic"})  # in mid-run
        opt.step(), opt.step()
        runs.append(params)
        assert opt.state[params[2]]["exp_avg"].stride() == params[2].stride()
        assert [int(opt.state[p]["step"]) for p in params] == [3, 3, 3, 3, 2, 2, 2]
    assert all(torch.equal(p, q) for p, q in zip(*runs))


def test_parameters_that_share_memory_are_refused():
    base = torch.zeros(100)
    params = [torch.nn.Parameter(base[:60]), torch.nn.Parameter(base[40:])]
    opt = SOUL(params)
    give_gradients(params)
    with pytest.raises(ValueError, match="expected memory of its own"):
        opt.step()
    assert not base.any()


def test_capturable_keeps_its_options_on_the_device_and_follows_a_scheduler(device):
    """Bit for bit what numbers do, and no tensor is ever replaced: a captured step reads the same addresses."""
    params = make(device)
    others = twin(params)
    a = SOUL(params, lr=1e-2, capturable=True)
    b = SOUL(others, lr=1e-2)
    options = {name: a.param_groups[0][name] for name in ("lr", "weight_decay", "rho", "bs")}
    assert all(t.device.type == device.type and t.dtype == FLOAT for t in options.values())
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in (a, b)]
    for index in range(4):
        give_gradients(params, others)
        for opt, scheduler in zip((a, b), schedulers):
            opt.step(), scheduler.step()
        if index == 1:
            a.param_groups[0]["weight_decay"].fill_(0.25)
            b.param_groups[0]["weight_decay"] = 0.25
    assert all(torch.equal(p, q) for p, q in zip(params, others))
    assert all(a.param_groups[0][name] is t for name, t in options.items())
    resumed = SOUL(twin(params), lr=5.0, capturable=True)
    resumed.load_state_dict(b.state_dict())  # of an optimizer with numbers
    assert resumed.param_groups[0]["capturable"] and resumed.param_groups[0]["lr"].item() == pytest.approx(1e-2 / 16)


def test_capture_refuses_what_replays_would_get_wrong(monkeypatch):
    params = make()
    plain, capturable = SOUL(params), SOUL(twin(params), capturable=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    give_gradients(params, capturable.param_groups[0]["params"])
    with pytest.raises(ValueError, match="^capturable: expected True in a CUDA graph, got False in group 0"):
        plain.step()
    with pytest.raises(ValueError, match="^CUDA graph: expected states that exist"):
        capturable.step()
    capturable.param_groups[0]["params"][1].grad = None
    with pytest.raises(ValueError, match="^CUDA graph: expected a gradient for every parameter, got 1 without one in group 0"):
        capturable.step()
    assert not plain.state and not capturable.state
    resumed = SOUL(others := twin(params), capturable=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    plain.step()
    resumed.load_state_dict(plain.state_dict())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    give_gradients(others)
    with pytest.raises(ValueError, match="^CUDA graph: expected the parameters and states of the last step, got others"):
        resumed.step()


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("options", [
    {}, {"max_grad_norm": 1.0, "skip_nonfinite": True, "rho": "auto", "bias_correction": True}, {"state_dtype": "8bit"},
], ids=["plain", "everything", "8bit"])  # fmt: skip
def test_replays_equal_eager_steps(options, device):
    """With a schedule of lr and weight decay, gradients that change, and the noise of every step its own."""
    params = make(device, BRAIN, shapes=((300, 40), (77,)))
    others = twin(params)
    runs = [SOUL(p, lr=1e-3, capturable=True, **options) for p in (params, others)]
    give_gradients(params, others)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        runs[0].step()
    torch.cuda.current_stream().wait_stream(side)
    runs[1].step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runs[0].step()
    for index in range(4):
        for p, q in zip(params, others):
            p.grad.copy_(torch.randn_like(p))
            q.grad.copy_(p.grad)
        for run in runs:
            run.param_groups[0]["lr"].fill_(1e-3 / (index + 1))
        graph.replay()
        runs[1].step()
    for p, q in zip(params, others):
        assert torch.equal(p, q)
        assert all(torch.equal(v, runs[1].state[q][n]) for n, v in runs[0].state[p].items())


@on_gpu
@pytest.mark.parametrize("options", [
    {}, {"max_grad_norm": 1.0, "skip_nonfinite": True, "rho": "auto", "bias_correction": True, "state_dtype": "8bit"},
    {"capturable": True},
], ids=["plain", "everything", "capturable"])  # fmt: skip
def test_a_step_never_waits_for_the_device(options, device):
    params = make(device, BRAIN)
    opt = SophiaG(params, lr=1e-3, **options)
    give_gradients(params)
    opt.update_hessian(), opt.step()  # compiles, and makes states
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)  # lies elsewhere: the table is uploaded
            opt.step(), opt.update_hessian()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_published_class_loads_our_checkpoint_and_goes_on():
    params = make()
    others = twin(params)
    ours = SophiaG(params, lr=1e-3)
    give_gradients(params)
    ours.update_hessian(), ours.step()
    others = twin(params)
    published = PublishedSophiaG(others, lr=9.0)
    published.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch would share the tensors
    give_gradients(params, others)
    ours.step(), published.step()
    for p, q in zip(params, others):
        assert_close(p, q, 1e-6, "p after loading")


def test_schedules_do_not_recompile_the_kernel(device, monkeypatch):
    """Triton compiles for constants and for kinds of arguments: numbers stay numbers, and are not looked at."""
    seen = set()

    def launch(kernel, grid, device, **arguments):
        numbers = {"lr", "weight_decay", "rho", "bs", "beta1", "beta1_rest", "beta2", "beta2_rest", "eps"}
        assert all(isinstance(arguments[name], float) for name in numbers)
        constants = {name: value for name, value in arguments.items() if name not in numbers and not torch.is_tensor(value)}
        seen.add(repr(constants))

    monkeypatch.setattr("soul_kernels._table.launch", launch)
    params = make(device, shapes=((300,),))
    opt = SOUL(params, backend="auto")
    for index in range(4):
        give_gradients(params)
        opt.param_groups[0].update(
            lr=[1e-3, 0, 1.0, 1][index], weight_decay=[0.1, 0, 1, 2.0][index], rho=[1, 0.5, 0.04, 2][index]
        )
        opt.step(bs=[1, 16, 5120, 2.5][index])
    assert len(seen) == 1


def scaled(opt, params, grad_scale, found_inf):
    """A step as GradScaler calls it."""
    opt.grad_scale, opt.found_inf = torch.tensor(grad_scale), torch.tensor(found_inf)
    opt.step()
    del opt.grad_scale, opt.found_inf


def test_verdicts_of_several_devices_or_ranks_are_one_verdict():
    """GradScaler adds them up: 2.0, in one element or none, is a skipped step, and one of them."""
    params = make()
    opt = SOUL(params, lr=1e-3, rho="auto")
    give_gradients(params)
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    for found in (2.0, [1.0], 1.0):
        scaled(opt, params, 4.0, found)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in after["state"].items():
        assert all(torch.equal(value, before["state"][index][name]) for name, value in state.items())
    assert opt.telemetry()["skipped_steps"] == 3


def test_a_refused_step_leaves_nothing_of_the_scaler():
    """torch multiplies by a grad_scale that it finds."""
    (param,) = params = make(shapes=((5,),))
    opt = SOUL(params, lr=1e-3)
    param.grad = torch.ones(5)
    opt.param_groups[0]["rho"] = -1.0
    with pytest.raises(ValueError, match="^rho"):
        scaled(opt, params, 65536.0, 0.0)
    opt.param_groups[0]["rho"] = 1.0
    opt.step()
    assert_close(opt.state[param]["exp_avg"], torch.full((5,), 0.1), 1e-6, "m")


def test_scaled_gradients_that_overflow_do_not_stay_in_the_hessian():
    (param,) = params = make(shapes=((5,),))
    opt = SophiaG(params)
    for value, count in ((3.0 * 1024, 1), (float("inf"), 1), (3.0 * 1024, 2)):
        param.grad = torch.full((5,), value)
        opt.update_hessian(grad_scale=torch.tensor(1024.0))
        assert int(opt.state[param]["hessian_step"]) == count
    assert_close(opt.state[param]["hessian"], torch.full((5,), 9 * (1 - 0.99**2)), 1e-5, "h")


@pytest.mark.parametrize("spoil, message", [
    (lambda a, b, opt: setattr(b, "data", torch.zeros(3, 2)), "shape"),  # the gradient's is another
    (lambda a, b, opt: setattr(b, "data", a.data[1:7]), "memory of its own"),
    (lambda a, b, opt: opt.param_groups[1].update(param_rounding="stochastic"), "low_bits: expected None"),
    (lambda a, b, opt: opt.param_groups[1].update(seed=1.5), "seed: expected an integer, got 1.5"),
], ids=["shape", "memory", "rounding", "seed"])  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_error_in_one_group_comes_before_another_moves(spoil, message, backend):
    a, b = (torch.randn(n).bfloat16().requires_grad_() for n in (8, 6))
    opt = SophiaG([{"params": [a]}, {"params": [b]}], lr=1e-2, backend=backend)
    give_gradients([a, b])
    opt.step()
    spoil(a, b, opt)
    kept = [a.detach().clone(), copy.deepcopy(opt.state_dict()["state"][0])]
    for call in (opt.step, opt.update_hessian):
        if call == opt.update_hessian and not message.startswith("seed"):
            continue  # of the parameters it needs the gradients only
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"probes: expected one .* got none for parameter 0 in group 1|shape|memory|seed"):
        opt.update_hessian(probes={a: torch.ones(8)})
    assert torch.equal(a, kept[0]) and all(torch.equal(opt.state[a][n], v) for n, v in kept[1].items())


def test_8_bit_states_load_into_another_memory_format():
    """Groups are of neighbours in memory: codes that were copied by index would meet the wrong scales."""
    params = make(shapes=((4, 6, 5, 7),))
    opt = SOUL(params, state_dtype="8bit")
    params[0].grad = torch.randn(4, 6, 5, 7) * torch.logspace(-4, 0, 6)[:, None, None]
    opt.step()
    (other,) = others = [params[0].detach().to(memory_format=torch.channels_last).requires_grad_()]
    loaded = SOUL(others)
    loaded.load_state_dict(opt.state_dict())
    for name in ("exp_avg", "hessian"):
        got, want = (
            load_state(o.state[p][name], o.state[p][f"{name}_scale"], name) for o, p in ((loaded, other), (opt, params[0]))
        )
        assert_close(got, want, 0.04, name)


def test_a_published_checkpoint_leaves_rho_auto():
    params = make()
    published = PublishedSophiaG(params, lr=1e-3, rho=0.5)
    opt = SophiaG(twin(params), rho="auto", clip_target=0.3)
    opt.load_state_dict(published.state_dict())
    group = opt.param_groups[0]
    assert group["clip_target"] == 0.3 and group["rho"].item() == pytest.approx(0.04) and group["lr"] == 1e-3


def test_low_bits_of_another_model_are_refused():
    params = make(dtype=BRAIN)
    opt = SOUL(params)
    give_gradients(params)
    opt.step()
    checkpoint = copy.deepcopy(opt.state_dict())
    checkpoint["state"][0]["low_bits"] = torch.zeros(3, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"^state_dict low_bits: expected \(40, 5\) of torch.int8, got \(3,\)"):
        opt.load_state_dict(checkpoint)


def test_small_things_that_once_broke(device):
    empty = SOUL([torch.zeros(0, device=device).requires_grad_()], rho="auto")
    empty.param_groups[0]["params"][0].grad = torch.zeros(0, device=device)
    empty.step()
    assert empty.param_groups[0]["rho"].isfinite()  # 0 of 0 coordinates were clipped
    for backend in ("auto", "reference"):
        scalar = torch.tensor(1.0, device=device, requires_grad=True)
        scalar.grad = torch.ones_like(scalar)
        SOUL([scalar], lr=torch.tensor([0.1]), backend=backend).step()  # one element is one number
        assert scalar.shape == () and scalar < 1
    model = torch.nn.Linear(3, 3, device=device)
    opt = SophiaG(model.parameters(), rho=0.5)
    opt.param_groups[0]["params"][0] = model.weight = torch.nn.Parameter(torch.ones(3, 3, device=device))
    curvature.RetainFisher(opt, every=1, in_backward=True).step(lambda: model(torch.ones(2, 3, device=device)).square().sum())
    assert opt.state[model.weight]["hessian"].any()


def test_states_are_freed_with_their_optimizer():
    """At once: a cycle of references would keep gigabytes until Python's collector runs."""
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = SOUL([param])
    gc.disable()
    try:
        optimizer.step()
        state = weakref.ref(optimizer.state[param]["exp_avg"])
        del optimizer
        assert state() is None
    finally:
        gc.enable()


def test_another_default_device_or_dtype_changes_nothing():
    """torch.set_default_device and set_default_dtype, as models are loaded under: scalars on the way must not follow."""
    outcomes = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        for backend in ("auto", "reference"):
            params = make(dtype=BRAIN)
            give_gradients(params)
            torch.set_default_device(default)
            torch.set_default_dtype(BRAIN if default == "meta" else FLOAT)
            try:
                opt = SophiaG(params, rho="auto", capturable=True, max_grad_norm=1.0, skip_nonfinite=True, backend=backend)
                opt.update_hessian(), opt.step()
                outcomes.append((default, backend, opt.telemetry(), [p.detach().clone() for p in params]))
            finally:
                torch.set_default_device(None)
                torch.set_default_dtype(FLOAT)
    for (_, _, a, p), (_, _, b, q) in zip(outcomes[:2], outcomes[2:]):
        assert a == b and all(torch.equal(x, y) for x, y in zip(p, q))


def test_what_a_capture_uses_stays_where_it_is(monkeypatch):
    """Eager calls between replays must not move the counters, nor drop the plans, that the graph goes on writing to."""
    params = make()
    opt = SophiaG(params, capturable=True)
    give_gradients(params)
    opt.update_hessian(), opt.step()
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    capturing[0] = True
    opt.step()
    opt.param_groups[0]["lr"], lr = 0.5, opt.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="^lr: expected a tensor in a CUDA graph, got 0.5 in group 0"):
        opt.step()
    opt.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="^bs: expected a tensor or None in a CUDA graph, got 7"):
        opt.step(bs=7)
    capturing[0] = False
    addresses = [state[name].data_ptr() for state in opt.state.values() for name in ("step", "hessian_step")]
    curvature.RetainFisher(opt, every=1, in_backward=True).step(lambda: sum(p.sum() for p in params))
    assert addresses == [state[name].data_ptr() for state in opt.state.values() for name in ("step", "hessian_step")]
    params[0].grad = None  # another set of parameters would need counters of its own
    with pytest.raises(ValueError, match="^gradients: expected those of the parameters in the captured step"):
        opt.step()
    assert addresses == [state[name].data_ptr() for state in opt.state.values() for name in ("step", "hessian_step")]
