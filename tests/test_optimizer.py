import copy
import io

import pytest
import torch

from soul import SOUL, SophiaG
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
            other[index].grad = p.grad.to(other[index].dtype)


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


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF])
@pytest.mark.parametrize("state_dtype", [None, FLOAT, BRAIN])
def test_resume_is_bitwise(dtype, state_dtype, device):
    """torch's own load_state_dict would cast the states to the parameter's dtype."""
    params = make(device, dtype)
    opt = SOUL(params, lr=1e-3, state_dtype=state_dtype)
    give_gradients(params)
    opt.step()
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    resumed_params = twin(params)
    resumed = SOUL(resumed_params, lr=9.0)  # options come from the checkpoint
    resumed.load_state_dict(state_dict=torch.load(buffer, weights_only=True))
    for _ in range(3):
        give_gradients(params, resumed_params)
        opt.step(), resumed.step()
    for p, q in zip(params, resumed_params):
        assert torch.equal(p, q)
        for name in ("exp_avg", "hessian"):
            assert opt.state[p][name].dtype == resumed.state[q][name].dtype
            assert torch.equal(opt.state[p][name], resumed.state[q][name])


def test_state_dtype_policy():
    for dtype, state_dtype, m, h in ((FLOAT, None, FLOAT, FLOAT), (BRAIN, None, BRAIN, FLOAT), (HALF, None, FLOAT, FLOAT),
                                     (BRAIN, FLOAT, FLOAT, FLOAT), (FLOAT, BRAIN, BRAIN, BRAIN)):  # fmt: skip
        (param,) = params = make(dtype=dtype, shapes=((3,),))
        opt = SOUL(params, state_dtype=state_dtype)
        give_gradients(params)
        opt.step()
        assert (opt.state[param]["exp_avg"].dtype, opt.state[param]["hessian"].dtype) == (m, h)


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
    ({"max_grad_norm": 1.0}, "max_grad_norm: expected None"),
    ({"lr": float("inf")}, "lr: expected a number >= 0.0, got inf"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\]: expected a number in \[0.0, 1.0\), got 1.0"),
    ({"rho": float("nan")}, "rho: expected"),
    ({"bs": 0}, "bs: expected a positive number, got 0"),
    ({"weight_decay": -0.1}, "weight_decay: expected"),
    ({"capturable": True}, "capturable: expected False"),
    ({"param_rounding": "up"}, "param_rounding: expected one of 'auto', 'nearest', got 'up'"),
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


def test_learning_rate_may_be_a_tensor():
    params = make()
    others = twin(params)
    a, b = SOUL(params, lr=torch.tensor(1e-3)), SOUL(others, lr=1e-3)
    give_gradients(params, others)
    a.step(), b.step()
    assert all(torch.allclose(p, q) for p, q in zip(params, others))
