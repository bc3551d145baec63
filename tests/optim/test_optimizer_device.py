"""What a step decides on the device, without waiting: clipping, skipping, rho, GradScaler, CUDA graphs."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from soul import SOUL, SophiaG
from soul.optim import curvature
from tests.support.helpers import assert_close
from tests.support.optimizers import BRAIN, FLOAT, give_gradients, make, norm_of, twin

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("factor", [0.1, 10.0], ids=["clipped", "not clipped"])
@pytest.mark.covers("norm, clipping, rho, telemetry", "one process")
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
    params = make(device, BRAIN, shapes=((40, 32), (7,), ()))
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
    saved = rho.clone()
    opt.param_groups[0]["lr"] = 0.0  # torch.distributed.checkpoint steps like this to make states
    give_gradients(params)
    opt.step()
    assert torch.equal(rho, saved)


def test_rho_waits_for_a_hessian(device):
    """Without a Hessian every coordinate is clipped, and rho would grow without bound."""
    params = make(device)
    opt = SophiaG(params, lr=1e-3, rho="auto")
    give_gradients(params)
    opt.step()
    assert opt.clip_fraction() == [1.0] and opt.param_groups[0]["rho"].item() == pytest.approx(0.04)
    opt.update_hessian(), opt.step()
    assert opt.param_groups[0]["rho"].item() != pytest.approx(0.04)


def test_capturable_keeps_its_options_on_the_device_and_follows_a_scheduler(device):
    """Tensors give the bits that numbers give, and none is ever replaced: a captured step reads the same addresses."""
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
    plain = SOUL(params)
    capturable = SOUL(twin(params), capturable=True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
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


@on_gpu
@pytest.mark.parametrize("options", [
    {}, {"max_grad_norm": 1.0, "skip_nonfinite": True, "rho": "auto", "bias_correction": True}, {"state_dtype": "8bit"},
], ids=["plain", "everything", "8bit"])  # fmt: skip
def test_replays_equal_eager_steps(options, device):
    """lr and weight decay follow a schedule, gradients change, and each step has noise of its own."""
    params = make(device, BRAIN, shapes=((300, 32), (77,)))
    others = twin(params)
    runs = [SOUL(p, lr=1e-3, capturable=True, **options) for p in (params, others)]
    give_gradients(params, others)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # for the gradients
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
def test_telemetry_is_of_the_last_replay_of_several_graphs(device):
    params = make(device, BRAIN)
    opt = SOUL(params, lr=1e-3, capturable=True, max_grad_norm=1.0)
    give_gradients(params)
    opt.step()
    torch.cuda.synchronize()
    graphs = []
    for _ in range(2):
        grads = [p.grad for p in params]
        graphs.append((torch.cuda.CUDAGraph(), grads))
        with torch.cuda.graph(graphs[-1][0]):
            opt.step()
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()  # the table of the next graph, whose gradients lie elsewhere
    for index in (0, 1, 0):
        graph, grads = graphs[index]
        for p, grad in zip(params, grads):
            p.grad = grad.mul_(1.5)
        graph.replay()
        assert opt.telemetry()["grad_norm"] == pytest.approx(norm_of(params), rel=1e-6)


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


class Recording(TorchDispatchMode):
    """A stand-in for a CUDA graph on the CPU: the operations of a call, which `replay` repeats in the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            if isinstance(result, torch.Tensor) and again.data_ptr() != result.data_ptr():
                result.copy_(again)


def test_telemetry_is_of_the_last_replay(device):
    """Several graphs of one optimizer, one for each shape of a batch, each with gradients of its own."""
    params = make(device)
    opt = SOUL(params, lr=1e-3, capturable=True, max_grad_norm=1.0, backend="reference")
    give_gradients(params)
    opt.step()
    recordings = []
    for scale in (2.0, 3.0):
        give_gradients(params, scale=scale)
        with Recording() as recording:
            opt.step()
        recordings.append((recording, [p.grad for p in params]))
    for index in (0, 1, 0):
        recording, grads = recordings[index]
        for p, grad in zip(params, grads):
            p.grad = grad.mul_(1.5)
        recording.replay()
        telemetry = opt.telemetry()
        assert telemetry["grad_norm"] == pytest.approx(norm_of(params), rel=1e-6), f"replay of graph {index}"
        assert 0 < telemetry["groups"][0]["update_norm"] < 1
    opt.param_groups[0]["max_grad_norm"] = None
    opt.step()
    assert opt.telemetry()["grad_norm"] is None  # it did not need one


def test_schedules_do_not_recompile_the_kernel(device, monkeypatch):
    """Triton compiles for constants and for kinds of arguments: numbers stay numbers, and are not looked at."""
    specializations = set()

    def launch(kernel, grid, device, **arguments):
        numbers = {"lr", "weight_decay", "rho", "bs", "beta1", "beta1_rest", "beta2", "beta2_rest", "eps"}
        assert all(isinstance(arguments[name], float) for name in numbers)
        constants = {name: value for name, value in arguments.items() if name not in numbers and not torch.is_tensor(value)}
        specializations.add(repr(constants))

    monkeypatch.setattr("soul_kernels._table.launch", launch)
    params = make(device, shapes=((300,),))
    opt = SOUL(params, backend="auto")
    for index in range(4):
        give_gradients(params)
        opt.param_groups[0].update(
            lr=[1e-3, 0, 1.0, 1][index], weight_decay=[0.1, 0, 1, 2.0][index], rho=[1, 0.5, 0.04, 2][index]
        )
        opt.step(bs=[1, 16, 5120, 2.5][index])
    assert len(specializations) == 1


def scaled(opt, params, grad_scale, found_inf):
    """A step as GradScaler calls it."""
    opt.grad_scale, opt.found_inf = torch.tensor(grad_scale), torch.tensor(found_inf)
    opt.step()
    del opt.grad_scale, opt.found_inf


def test_verdicts_of_several_devices_or_ranks_are_one_verdict():
    """GradScaler adds up the verdicts of devices: 2.0 is one skipped step, like 1.0 in a tensor [1] or []."""
    params = make()
    opt = SOUL(params, lr=1e-3, rho="auto")
    give_gradients(params)
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    for found_inf in (2.0, [1.0], 1.0):
        scaled(opt, params, 4.0, found_inf)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in after["state"].items():
        assert all(torch.equal(value, before["state"][index][name]) for name, value in state.items())
    assert opt.telemetry()["skipped_steps"] == 3


def test_a_refused_step_leaves_nothing_of_the_scaler():
    """torch multiplies a grad_scale that is already set."""
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


def test_what_a_capture_uses_stays_where_it_is(monkeypatch):
    """Eager calls between replays must neither move the counters nor drop the step groups that the graph writes to."""
    params = make()
    opt = SophiaG(params, capturable=True)
    give_gradients(params)
    opt.update_hessian(), opt.step()
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    capturing[0] = True
    opt.step()
    lr = opt.param_groups[0]["lr"]
    opt.param_groups[0]["lr"] = 0.5
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
