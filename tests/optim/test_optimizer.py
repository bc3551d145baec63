"""step() and update_hessian() against the published class; groups, options and errors."""

import copy
import gc
import inspect
import math
import warnings
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from soul import SOUL, SophiaG
from soul.optim import curvature
from tests.support import tolerances as tol
from tests.support.helpers import assert_close
from tests.support.optimizers import BRAIN, FLOAT, HALF, PublishedSophiaG, give_gradients, make, norm_of, twin


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


def test_step_leaves_the_gradient_alone_and_zero_gradients_move_nothing(device):
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


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["computed", "of the step"])
def test_grad_norm_is_that_before_clipping(options, device):
    params = make(device)
    opt = SOUL([{"params": params[:1]}, {"params": params[1:]}], lr=1e-3, **options)
    assert opt.grad_norm() is None  # no gradients
    give_gradients(params)
    opt.step()
    assert opt.grad_norm().item() == pytest.approx(norm_of(params), rel=1e-6) and opt.grad_norm().shape == ()
    assert (opt.telemetry()["grad_norm"] is None) == (not options)


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


@pytest.mark.parametrize("call, defaults, missing", [
    (SophiaG, {}, set()),
    (SOUL, {"lr": 5e-6, "betas": (0.9, 0.95), "published_code": False}, set()),
    (SOUL.as_published, {"lr": 5e-6, "betas": (0.9, 0.95)}, {"param_rounding", "state_dtype"}),  # which it sets
])  # fmt: skip
def test_every_option_is_spelled_out_with_its_type_and_default(call, defaults, missing):
    """help() and an editor show every option; the defaults are those of SophiaG, apart from documented exceptions."""
    options = inspect.signature(SophiaG).parameters
    signature = inspect.signature(call).parameters
    assert {*signature} == {*options, *defaults} - missing and "weight_decay" in signature
    for name, parameter in signature.items():
        assert parameter.kind is not inspect.Parameter.VAR_KEYWORD and parameter.annotation is not inspect.Parameter.empty
        if name in options:
            assert parameter.annotation == options[name].annotation
        assert parameter.default == (defaults[name] if name in defaults else options[name].default)


@pytest.mark.parametrize("options, message", [
    ({"lr": -1.0}, "lr: expected a number >= 0.0, got -1.0"),
    ({"lr": torch.ones(2)}, "lr: expected one number"),
    ({"betas": (0.9,)}, "betas: expected two numbers"),
    ({"max_grad_norm": 0.0}, "max_grad_norm: expected a positive number, got 0.0"),
    ({"max_grad_norm": "1"}, "max_grad_norm: expected a positive number, got '1'"),
    ({"bs": None}, "bs: expected a positive number, got None"),
    ({"lr": [1e-3]}, r"lr: expected a number >= 0.0, got \[0.001\]"),
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
    with pytest.raises(ValueError, match="parameter 1 in group 0: expected elements that share no memory"):
        SOUL([good[0], torch.zeros(3, 1).expand(3, 4).requires_grad_()])
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


def test_works_under_another_default_device():
    params = make()
    before = params[0].detach().clone()
    with torch.device("meta"):
        opt = SOUL(params, lr=1e-3)
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
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
    good = make()
    image = torch.randn(2, 3, 4, 5).requires_grad_()
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
    """Known step groups are checked by the ops, whose errors name an entry of a list."""
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
    a = SOUL(params, lr=torch.tensor(1e-3))
    b = SOUL(others, lr=1e-3)
    give_gradients(params, others)
    a.step(), b.step()
    assert all(torch.allclose(p, q) for p, q in zip(params, others))


def test_bias_correction_makes_a_young_hessian_a_mean(device):
    (param,) = params = make(device, shapes=((50,),))
    grads = [torch.rand(50, device=device) + 0.1 for _ in range(3)]
    opt = SophiaG(params, lr=1.0, betas=(0.0, 0.9), rho=1.0, bs=1, eps=0.0, weight_decay=0.0, bias_correction=True)
    for grad in grads:
        param.grad = grad
        opt.update_hessian()
    mean = sum(w * g * g for w, g in zip((0.081, 0.09, 0.1), grads)) / (1 - 0.9**3)
    before = param.detach().clone()
    small = mean / 2  # not clipped
    param.grad = small
    opt.step()
    assert_close(before - param, small / mean, 1e-4, "update")
    soul = SOUL(
        others := twin(params), lr=1.0, betas=(0.0, 0.9), rho=20.0, bs=1, eps=0.0, weight_decay=0.0, bias_correction=True
    )
    before = others[0].detach().clone()
    others[0].grad = small
    soul.step()
    expected = (1 / (20 * small)).clamp(max=1)
    assert (expected < 1).float().mean() > 0.5  # where all are clipped, h plays no part
    assert_close(before - others[0], expected, 1e-4, "update of SOUL: h is g g at once")


@pytest.mark.parametrize("kind", [SophiaG, SOUL])
@pytest.mark.parametrize("eps_mode", ["add", "max"])
def test_options_together_follow_their_formulas_in_fp64(kind, eps_mode, device):
    """Norm clipping, which h of `update_hessian` does not see, bias correction, both denominators, decay, a rho that moves."""
    lr = 1e-2
    b1 = 0.9
    b2 = 0.95
    bs = 20
    eps = 1e-3
    decay = 0.1
    limit = 1.0
    target = 0.3
    params = make(device)
    opt = kind(params, lr=lr, betas=(b1, b2), rho="auto", clip_target=target, bs=bs, eps=eps, eps_mode=eps_mode,
               weight_decay=decay, max_grad_norm=limit, bias_correction=True)  # fmt: skip
    want = [p.detach().double() for p in params]
    rho = 0.04
    updates = 0
    both = 0
    m, h = ([torch.zeros_like(p) for p in want] for _ in range(2))
    for step in range(8):
        give_gradients(params, scale=(0.02, 1.0)[step % 2])  # below the limit, and above it
        factor = min(1.0, limit / (norm_of(params) + 1e-6))
        grads = [p.grad.double() for p in params]
        if kind is SophiaG and step % 3 == 0:
            opt.update_hessian()
        if kind is SOUL or step % 3 == 0:
            hessian_grads = [g * factor if kind is SOUL else g for g in grads]
            h = [b2 * a + (1 - b2) * g * g for a, g in zip(h, hessian_grads)]
            updates += 1
        opt.step()
        m = [b1 * a + (1 - b1) * g * factor for a, g in zip(m, grads)]
        weighted = [rho * bs * a / (1 - b2**updates) for a in h]
        ratios = [a / (w + eps if eps_mode == "add" else w.clamp(min=eps)) for a, w in zip(m, weighted)]
        want = [p - lr * (decay * p + r.clamp(-1, 1)) for p, r in zip(want, ratios)]
        clipped = sum((r.abs() >= 1).sum().item() for r in ratios) / sum(r.numel() for r in ratios)
        assert opt.clip_fraction()[0] == pytest.approx(clipped)
        both += 0 < clipped < 1
        rho *= math.exp(clipped - target)
        assert opt.param_groups[0]["rho"].item() == pytest.approx(rho, rel=1e-5)
    assert both >= 6  # steps with coordinates of either kind
    for p, q in zip(params, want):
        assert_close(p, q, 1e-5, "parameters")


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
    """0-dim, empty, channels_last, transposed and misaligned tensors, fp32 gradients of bf16 parameters: as the reference."""

    def build():
        torch.manual_seed(0)
        flat = torch.randn(1001, device=device)
        image = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
        made = [torch.randn((), device=device), torch.zeros(0, 3, device=device), image,
                torch.randn(6, 7, device=device).t(), flat[1:], flat.bfloat16()[3:70]]  # fmt: skip
        params = [torch.nn.Parameter(t) for t in made] + [torch.nn.Parameter(torch.randn(50, device=device).half())]
        for p in params:
            dtype = p.dtype
            if dtype == BRAIN:
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
    saved = [a.detach().clone(), copy.deepcopy(opt.state_dict()["state"][0])]
    for call in (opt.step, opt.update_hessian):
        if call == opt.update_hessian and not message.startswith("seed"):
            continue  # of the parameters it needs the gradients only
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"probes: expected one .* got none for parameter 0 in group 1|shape|memory|seed"):
        opt.update_hessian(probes={a: torch.ones(8)})
    assert torch.equal(a, saved[0]) and all(torch.equal(opt.state[a][n], v) for n, v in saved[1].items())


def test_regressions(device):
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
    """A deleted optimizer is freed at once: a cycle of references would keep gigabytes until Python's collector runs."""
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
    """Models are loaded under another default device and dtype: the scalars of a step must not follow them."""
    outcomes = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        for backend in ("auto", "reference"):
            params = make(dtype=BRAIN)
            give_gradients(params)
            torch.set_default_dtype(BRAIN if default == "meta" else FLOAT)
            try:
                with torch.device(default):
                    opt = SophiaG(params, rho="auto", capturable=True, max_grad_norm=1.0, skip_nonfinite=True, backend=backend)
                    opt.update_hessian(), opt.step()
                    outcomes.append((default, backend, opt.telemetry(), [p.detach().clone() for p in params]))
            finally:
                torch.set_default_dtype(FLOAT)
    for (_, _, a, p), (_, _, b, q) in zip(outcomes[:2], outcomes[2:]):
        assert a == b and all(torch.equal(x, y) for x, y in zip(p, q))


@pytest.mark.parametrize("build", [lambda: SophiaG(None, lr=-1), lambda: SOUL(None, lr=-1), lambda: SOUL(iter(()), lr=-1)])
def test_a_bad_option_is_named_before_bad_parameters(build):
    with pytest.raises(ValueError, match="^lr: expected a number >= 0.0, got -1"):
        build()


def test_options_of_all_groups_need_no_defaults():
    """A default that is wrong only together with another one is not used where groups override it."""
    opt = SOUL([{"params": make(), "rho": "auto"}], clip_target=0.3)
    assert opt.param_groups[0]["clip_target"] == 0.3


@pytest.mark.parametrize("before, after, message", [
    (FLOAT, BRAIN, "expected torch.float32, or low_bits in its state, got torch.bfloat16 without"),
    (BRAIN, FLOAT, "expected torch.bfloat16 or torch.float16, beside its low_bits, got torch.float32"),
    (FLOAT, torch.float64, "expected dtype torch.float32, torch.bfloat16, torch.float16, got torch.float64; convert it first"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("groups", [1, 2])
def test_a_model_that_was_converted_is_named_with_the_remedy(groups, before, after, message):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(before)
    params = list(model.parameters())
    opt = SOUL(params if groups == 1 else [{"params": params[:2]}, {"params": params[2:]}], lr=1e-2, max_grad_norm=1.0)
    give_gradients(params)
    opt.step()
    model.to(after)
    saved = copy.deepcopy(opt.state_dict()["state"])
    with pytest.raises(ValueError, match=f"^parameter 0 in group 0: {message}") as error:
        opt.step()
    assert all(
        torch.equal(state[name], value) for i, state in saved.items() for name, value in opt.state_dict()["state"][i].items()
    )
    if after != torch.float64:
        assert "optimizer.load_state_dict(optimizer.state_dict())" in str(error.value)
        opt.load_state_dict(opt.state_dict())
        give_gradients(params)
        opt.step()
        assert opt.state[params[0]]["step"] == 2 and params[0].dtype == after and params[0].isfinite().all()


def test_a_model_on_another_device_than_its_states_is_named_with_the_remedy():
    """The error after model.to("cuda"); without a GPU, the states go to another device instead."""
    params = make()
    opt = SOUL(params)
    give_gradients(params)
    opt.step()
    opt.state[params[1]]["hessian"] = opt.state[params[1]]["hessian"].to("meta")
    with pytest.raises(
        ValueError, match=r"^parameter 1 in group 0: expected device meta, as its hessian, got cpu; after model.to"
    ):
        opt.step()


DATALESS = {
    "plain": {}, "everything": dict(max_grad_norm=1.0, skip_nonfinite=True, rho="auto", bias_correction=True, capturable=True),
    "8bit": dict(state_dtype="8bit"), "stochastic": dict(param_rounding="stochastic", state_dtype=BRAIN),
}  # fmt: skip


MANY = pytest.mark.slow(reason="the reference of every option in both modes; plain and everything are always tested")


@pytest.mark.parametrize("mode, backend, options", [
    pytest.param(mode, backend, options, marks=MANY if backend == "reference" and options in ("8bit", "stochastic") else [])
    for mode in ("fake", "meta") for backend in ("auto", "reference") for options in DATALESS
])  # fmt: skip
def test_steps_on_tensors_without_data(mode, backend, options):
    """FakeTensorMode and the device meta have shapes and dtypes alone, for estimates of memory and exports of graphs."""
    with FakeTensorMode() if mode == "fake" else torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*data pointer")  # whoever reads an address is warned
        params = [torch.nn.Parameter(torch.ones(s, dtype=d)) for s in ((4, 32), (300,)) for d in (FLOAT, BRAIN)]
        opt = SophiaG(
            [{"params": params[:2]}, {"params": params[2:]}], lr=torch.tensor(1e-3), backend=backend, **DATALESS[options]
        )
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.update_hessian()
            opt.step()
        opt.step(bs=torch.tensor(7.0))
    assert [opt.state[p]["exp_avg"].shape for p in params] == [p.shape for p in params]
    low = [p.dtype for p in params if "low_bits" in opt.state[p]]
    assert low == ([] if options == "stochastic" else [BRAIN] * 2)


def test_an_estimator_of_memory_sees_the_states():
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    with FakeTensorMode():
        model = torch.nn.Linear(64, 64, bias=False)
        opt = SOUL(model.parameters(), backend="reference")
        tracking = tracker.MemTracker()
        tracking.track_external(model, opt)
        with tracking:
            model(torch.ones(2, 64)).sum().backward()
            opt.step()
        snapshot = tracking.get_tracker_snapshot("current")
    bytes_by_kind = {kind.value: size for memory in snapshot.values() for kind, size in memory.items() if kind != "Total"}
    assert bytes_by_kind["Optstate"] >= 2 * 64 * 64 * 4 == 2 * bytes_by_kind["Parameter"], bytes_by_kind


def test_hooks_and_profiles_see_steps():
    """torch's wrapper of ``step`` is passed by only where it has nothing to do."""
    params = make()
    give_gradients(params)
    opt = SOUL(params)
    calls = []
    hooks = [
        opt.register_step_pre_hook(lambda *args: calls.append("before")),
        opt.register_step_post_hook(lambda *args: calls.append("after")),
        register_optimizer_step_pre_hook(lambda *args: calls.append("before, any")),
        register_optimizer_step_post_hook(lambda *args: calls.append("after, any")),
    ]
    for hook in hooks:
        opt.step()
        hook.remove()
    opt.step()
    expected = [["before, any", "before", "after", "after, any"], ["before, any", "after", "after, any"]]
    expected += [["before, any", "after, any"], ["after, any"]]
    assert calls == sum(expected, [])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert "Optimizer.step#SOUL.step" in {event.key for event in profile.key_averages()}
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        opt.step(), scheduler.step()
