"""The table that lets a step skip its checks: it must notice everything."""

import copy
import random
import weakref

import pytest
import torch

from soul import SOUL
from soul_kernels import SophiaStep, TensorTable, _table, sophia_step
from soul_kernels.backends import resolve_backend
from tests.support.helpers import assert_close

OPTIONS = dict(lr=1e-2, beta1=0.9, rho=0.04, bs=50, beta2=0.95, weight_decay=0.1)


@pytest.fixture(params=["guard", "attributes"])
def check(request, monkeypatch):
    """Both ways to compare metadata: torch's C++ guard, and the public attributes where it is missing."""
    if request.param == "attributes":
        monkeypatch.setattr(_table, "_guard", lambda tensors: None)
    return request.param


def lists(device, n=3):
    shapes = [(5, 8), (300,), (4, 6)]
    made = {role: [torch.randn(s, device=device) for s in shapes[:n]] for role in "pgmh"}
    made["h"] = [h.abs() for h in made["h"]]
    return made


def built(roles):
    table = TensorTable()
    table.rebuild(roles, "key", read_only="g", salts=[0] * len(roles["p"]))
    return table


def test_knows_the_same_tensors_again_and_gradients_that_lie_elsewhere(device, check):
    roles = lists(device)
    table = built(roles)
    assert not TensorTable().unchanged(roles, "key")
    assert table.unchanged(roles, "key") and table.unchanged(dict(roles), "key")
    assert not table.unchanged(roles, "other key")
    before = table.buckets[0].on_device()
    roles["g"] = [g.clone() for g in roles["g"]]
    assert table.unchanged(roles, "key")
    after = table.buckets[0].on_device()
    assert after is not before  # on a GPU what was uploaded does not follow
    assert after[3:6].tolist() == [g.data_ptr() for g in roles["g"]] and torch.equal(after[:3], before[:3])
    assert table.buckets[0].on_device() is after  # nothing moved: not uploaded again


ROLES = ("p", "g", "m", "h", "low", "m_scale", "h_scale")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("change", [
    lambda t: t.t(), lambda t: t[:3], lambda t: t.to(torch.bfloat16), lambda t: t.reshape(-1), lambda t: None,
    lambda t: t.view(2, 20), lambda t: torch.empty(80, device=t.device)[::2].view(5, 8), lambda t: t.to("meta"),
], ids=["transposed", "shorter", "dtype", "flat", "None", "viewed", "strided", "device"])  # fmt: skip
def test_notices_every_change(role, change, device, check):
    """Also where the address stays: an allocator gives it to another tensor, or a view of another shape begins there."""
    roles = lists(device)
    roles |= {role: [torch.zeros_like(p) for p in roles["p"]] for role in ROLES if role not in roles}
    table = built(roles)
    assert table.unchanged(roles, "key")
    roles[role][0] = change(roles[role][0])
    assert not table.unchanged(roles, "key")


CHANGES = {
    "address": lambda t: t.clone(),
    "dtype": lambda t: t.to(torch.int16 if not t.is_floating_point() else torch.half),
    "shape": lambda t: t[:1],
    "strides": lambda t: t.t(),  # of a square: neither its address nor its shape tells
    "address and strides": lambda t: t.t().contiguous().t(),
}
STATES = ("exp_avg", "hessian", "low_bits", "exp_avg_scale", "hessian_scale")


def settled(device, **options):
    """Return an optimizer that has known its tensors for some steps, and an equal one that knows nothing of tables."""
    params = [torch.nn.Parameter(torch.randn(32, 32, device=device).bfloat16()) for _ in range(3)]
    opt = SOUL(params, lr=1e-2, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    opt.step()
    twin = copy.deepcopy(opt)  # this changes states, which `opt` has to settle once more
    for p, q in zip(params, twin.param_groups[0]["params"]):
        q.grad = p.grad.clone()
    for optimizer in (twin, opt):  # in this order: the first step of the copy changes states as well
        optimizer.step(), optimizer.step()
    twin._reset()
    return opt, twin


def contents(opt):
    return [t.clone() for p in opt.param_groups[0]["params"] for t in (p, *opt.state[p].values())]


def assert_same_step(opt, twin):
    """Step both: the same numbers, or the same error and no change."""
    before = contents(opt)
    outcomes = []
    for optimizer in (opt, twin):
        try:
            outcomes.append(optimizer.step())
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    for a, b in zip(contents(opt), before if outcomes[0] else contents(twin), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


MANY = pytest.mark.slow(reason="five changes of eleven tensors; two changes of each, and all of a gradient, are always tested")


@pytest.mark.parametrize("kind, replaced, change", [
    pytest.param(kind, replaced, change, marks=[] if change in ("address", "strides") or kind == "grad" else MANY)
    for kind, replaced in [(kind, False) for kind in ("param", "grad", *STATES)] + [(state, True) for state in STATES]
    for change in CHANGES
])  # fmt: skip
def test_a_step_does_after_every_change_what_a_new_optimizer_does(kind, replaced, change, device, check):
    """And memory that was given back is not written to. Of states behind the same objects, all are moved."""
    opt, twin = settled(device, state_dtype="8bit" if "scale" in kind else None)
    given_back = []
    for optimizer in (opt, twin):
        params = optimizer.param_groups[0]["params"]
        for p in params if kind in STATES and not replaced else params[1:2]:
            changed = {"param": p, "grad": p.grad} | optimizer.state[p]
            value = CHANGES[change](changed[kind].data)
            if value.data_ptr() != changed[kind].data_ptr():
                given_back.append((changed[kind].data, changed[kind].data.clone()))
            if replaced:
                optimizer.state[p][kind] = value
            else:
                changed[kind].data = value
    assert_same_step(opt, twin)
    for memory, kept in given_back:
        assert torch.equal(memory, kept)


def option(**options):
    return lambda opt, params: opt.param_groups[0].update(options)


def swap_parameter(opt, params):
    new = torch.nn.Parameter(torch.ones_like(params[1]))
    new.grad = params[1].grad
    opt.state[new] = opt.state.pop(params[1])
    params[1] = new


def pop_and_put_back(opt, params):
    opt.state[params[1]]["hessian"] = opt.state[params[1]].pop("hessian") * 2


def replace_state(opt, params):
    """By a dict of the user's own, which notes no changes."""
    opt.state[params[1]] = {name: value.clone() for name, value in opt.state[params[1]].items()}
    opt.step(), opt.step()
    opt.state[params[1]]["exp_avg"] = torch.ones_like(params[1])


def change_betas_in_place(opt, params):
    opt.param_groups[0]["betas"] = [0.9, 0.95]
    opt.step(), opt.step()
    opt.param_groups[0]["betas"][0] = 0.5


def fill_a_tensor(opt, params):
    opt.param_groups[0]["lr"] = lr = torch.tensor(1e-2)
    opt.step(), opt.step()
    lr.fill_(-1.0)


def load(opt, params):
    opt.load_state_dict({"state": copy.deepcopy(opt.state_dict()["state"]), "param_groups": opt.state_dict()["param_groups"]})


@pytest.mark.parametrize("change", [
    swap_parameter, pop_and_put_back, replace_state, change_betas_in_place, fill_a_tensor, load,
    lambda opt, params: opt.state[params[1]].__setitem__("step", torch.tensor(7.0, device=params[1].device)),
    lambda opt, params: opt.state[params[1]].update(exp_avg=torch.ones_like(params[1])),
    lambda opt, params: opt.state[params[1]].__ior__({"hessian": torch.ones_like(params[1], dtype=torch.float32)}),
    lambda opt, params: opt.state[params[1]].clear(),
    lambda opt, params: opt.state.pop(params[1]),
    lambda opt, params: setattr(params[1], "grad", None),
    lambda opt, params: setattr(params[1], "grad", params[1].grad.clone()),
    option(lr=0.5), option(lr=-1.0), option(weight_decay=0.5), option(rho=1.0), option(bs=1), option(betas=(0.5, 0.5)),
    option(eps=0.5), option(eps=-1.0), option(maximize=True), option(eps_mode="max", eps=0.5), option(seed=3),
    option(param_rounding="nearest"), option(bias_correction=True), option(max_grad_norm=0.1), option(published_code=True),
    option(backend="reference"), option(clip_target=0.5), option(lr="much"),
])  # fmt: skip
def test_a_settled_step_notices_what_the_user_changes(change, device):
    opt, twin = settled(device)
    for optimizer in (twin, opt):
        change(optimizer, optimizer.param_groups[0]["params"])
    twin._reset()
    assert_same_step(opt, twin)
    assert_same_step(opt, twin)


def test_a_settled_step_is_prepared_without_its_states(device, monkeypatch):
    """Neither a schedule nor gradients that lie elsewhere make it look at them again, and replaced ones are freed at once."""
    opt, _ = settled(device)
    if resolve_backend("auto", opt.param_groups[0]["params"][0]) != "triton":
        pytest.skip("the reference looks at all tensors in any case")
    prepared = []
    prepare = SophiaStep.prepare
    monkeypatch.setattr(SophiaStep, "prepare", lambda *args, **options: prepared.append(1) or prepare(*args, **options))
    opt.step()  # the copy has changed states
    prepared.clear()
    params = opt.param_groups[0]["params"]
    for lr in (1e-2, 1e-3, torch.tensor(1e-3), 1e-4):
        opt.param_groups[0]["lr"] = lr
        params[0].grad = params[0].grad.clone()
        opt.step()
    assert not prepared
    old = weakref.ref(opt.state[params[0]]["exp_avg"])
    opt.state[params[0]]["exp_avg"] = torch.zeros_like(params[0])
    assert old() is None
    opt.step()
    assert prepared == [1]


def test_notices_what_is_written_to_elsewhere_and_other_numbers_of_tensors(device, check):
    for role in "pmh":
        roles = lists(device)
        table = built(roles)
        roles[role][1] = roles[role][1].clone()
        assert not table.unchanged(roles, "key")
    roles = lists(device)
    table = built(roles)
    assert not table.unchanged({r: t[:2] for r, t in roles.items()}, "key")
    assert not table.unchanged(roles | {"h": None}, "key")
    misaligned = torch.empty(301, device=device)[1:]
    roles["g"][1] = misaligned  # another variant of the kernel
    assert not table.unchanged(roles, "key")


def test_notices_a_none_that_wanders(device, check):
    """Low bits are None for fp32 parameters: the same tensors in another order are another table."""
    roles = lists(device) | {"low": [None, torch.zeros(5, 8), None]}
    table = built(roles)
    assert table.unchanged(roles, "key")
    roles["low"] = [roles["low"][1], None, None]
    assert not table.unchanged(roles, "key")


def test_a_parameter_whose_data_is_replaced_in_place_is_noticed(device, check):
    """`p.data = ...` keeps the Python object: identity proves nothing."""
    roles = lists(device)
    table = built(roles)
    p = roles["p"][0]
    p.data = p.data.t()
    assert not table.unchanged(roles, "key")
    p.data = torch.zeros(5, 8, device=device)
    assert not table.unchanged(roles, "key")


def test_fuzz_of_steps_with_one_table(device, check):
    """Gradients come, go, move, change layout and dtype, parameters are replaced: always what a fresh call computes."""
    rng = random.Random(0)
    shapes = [(), (1,), (17,), (5, 7), (0,), (2, 3, 4, 5), (300,)]
    params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in shapes]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    cached = SOUL(params, lr=1e-2, backend="auto")
    for _ in range(25):
        for p, q in zip(params, twins):
            kind = rng.choice(["keep", "new", "none", "strided", "misaligned", "half", "zero"])
            if kind == "none":
                p.grad = None
            elif kind == "new" or p.grad is None:
                p.grad = torch.randn_like(p)
            elif kind == "strided" and p.dim() == 2:
                p.grad = torch.randn(p.shape[::-1], device=device).t()
            elif kind == "misaligned":
                p.grad = torch.randn(p.numel() + 1, device=device)[1:].view(p.shape)
            elif kind == "zero":
                p.grad.zero_()
            q.grad = None if p.grad is None else p.grad.clone()
            if kind == "half" and p.dim() == 2:
                p.data = p.data.clone()
        fresh = SOUL(twins, lr=1e-2, backend="reference")
        for p, q in zip(params, twins):
            if cached.state.get(p):
                fresh.state[q] = {name: value.clone() for name, value in cached.state[p].items()}
        cached.step()
        fresh.step()
        for p, q in zip(params, twins):
            assert torch.equal(p, q)


def test_state_tensors_that_the_user_replaces_are_used(device):
    params = [torch.nn.Parameter(torch.randn(20, device=device)) for _ in range(3)]
    opt = SOUL(params, lr=1e-2, weight_decay=0.0)
    for p in params:
        p.grad = torch.randn_like(p)
    opt.step()
    opt.state[params[1]]["exp_avg"] = torch.zeros(20, device=device)  # a new tensor in the state
    opt.state[params[2]] = {k: v.clone() for k, v in opt.state[params[2]].items()} | {"step": torch.tensor(7.0, device=device)}
    kept = opt.state[params[2]]["exp_avg"].clone()
    opt.step()
    assert_close(opt.state[params[1]]["exp_avg"], 0.1 * params[1].grad, 1e-6, "the new momentum")
    assert opt.state[params[2]]["step"] == 8 and opt.state[params[0]]["step"] == 2
    assert_close(opt.state[params[2]]["exp_avg"], 0.9 * kept + 0.1 * params[2].grad, 1e-6, "momentum of the new state")


def test_3000_tensors_are_one_launch(device, monkeypatch):
    grids = []
    monkeypatch.setattr("soul_kernels._table.launch", lambda kernel, grid, device, **a: grids.append(grid))
    made = [[torch.zeros(3, device=device) for _ in range(3000)] for _ in range(4)]
    sophia_step(*made, **OPTIONS, backend="triton")
    assert grids == [(3000,)]
