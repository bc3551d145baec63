"""The optimizers under schedulers, torch.compile, accelerate, Trainer and GradScaler, in one process."""

import copy
import itertools
import math
import sys
import types

import pytest
import torch
from torch.optim import lr_scheduler

from soul import SOUL, SophiaG

STEPS = 6


def make_net(device="cpu", dtype=torch.float32):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).to(device, dtype)


def batches(n=STEPS, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(4, d, generator=generator).to(device, dtype) for d in (6, 3)] for _ in range(n)]


def loss_of(net, x, y):
    return torch.nn.functional.mse_loss(net(x), y)


def assert_same(got, want, what=""):
    """Check bitwise equality of nested dicts and lists of tensors and numbers; NaN equals NaN."""
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype and got.shape == want.shape, what
        assert torch.equal(got.nan_to_num(nan=123.0), want.nan_to_num(nan=123.0)), f"{what}: {got} is not {want}"
    elif isinstance(want, dict):
        assert list(got) == list(want), what
        for key in want:
            assert_same(got[key], want[key], f"{what}.{key}")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), what
        for index, (a, b) in enumerate(zip(got, want)):
            assert_same(a, b, f"{what}[{index}]")
    else:
        assert got == want or (got != got and want != want), f"{what}: {got} is not {want}"


def snapshot(net, opt):
    return copy.deepcopy([net.state_dict(), opt.state_dict()])


SCHEDULES = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.9**step),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.02, total_steps=STEPS + 1, cycle_momentum=False),
    "warm-up, cosine": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(opt, STEPS - 3)], milestones=[3]
    ),
}


def train(opt, net, scheduler=None, lrs=None):
    """Train with a scheduler or with given learning rates; return the learning rates used."""
    used = []
    for index, (x, y) in enumerate(batches(device=next(net.parameters()).device)):
        if lrs is not None:
            opt.param_groups[0]["lr"] = lrs[index]
        used.append(float(opt.param_groups[0]["lr"]))
        loss_of(net, x, y).backward()
        opt.step()
        opt.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return used


@pytest.mark.parametrize("schedule", SCHEDULES)  # each writes lr in another way: absolute, from its own options, by a factor
def test_schedulers_write_lr_and_the_step_reads_it(schedule, device):
    """A float lr follows the schedule as SGD's does. With capturable=True lr stays one tensor, filled in place with the same
    schedule in fp32, and the trajectory is that of floats of these values, bit for bit."""
    plain, captured, by_hand = (make_net(device) for _ in range(3))
    sgd = torch.optim.SGD(plain.parameters(), lr=0.01)
    expected = train(sgd, plain, SCHEDULES[schedule](sgd))

    plain = make_net(device)
    opt = SOUL(plain.parameters(), lr=0.01)
    assert train(opt, plain, SCHEDULES[schedule](opt)) == expected

    opt = SOUL(captured.parameters(), lr=0.01, capturable=True)
    lr = opt.param_groups[0]["lr"]
    lrs = train(opt, captured, SCHEDULES[schedule](opt))
    assert opt.param_groups[0]["lr"] is lr and len(set(lrs)) > 4
    assert lrs == pytest.approx(expected, rel=1e-5, abs=1e-9)

    opt = SOUL(by_hand.parameters(), lr=1.0)
    train(opt, by_hand, lrs=lrs)
    assert_same(captured.state_dict(), by_hand.state_dict())
    for a, b in zip(captured.parameters(), plain.parameters()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_compiled_training_step_is_the_eager_one():
    """Forward, backward, update_hessian and step in one compiled function: the numbers of the eager loop, and new values of lr
    and rho compile nothing anew."""
    from torch._dynamo.testing import CompileCounterWithBackend

    results = []
    for counter in (None, CompileCounterWithBackend("eager")):
        torch._dynamo.reset()
        net = make_net()
        opt = SophiaG(net.parameters(), lr=0.01, bs=4, rho="auto", max_grad_norm=0.5)

        def step(x, y, net=net, opt=opt):
            loss = loss_of(net, x, y)
            loss.backward()
            opt.update_hessian()
            opt.step()
            opt.zero_grad()
            return loss

        run = step if counter is None else torch.compile(step, backend=counter)
        scheduler = lr_scheduler.LambdaLR(opt, lambda index: 0.9**index)
        losses, compiled = [], []
        for x, y in batches(10):
            losses.append(run(x, y).item())
            scheduler.step()
            compiled.append(counter and counter.frame_count)
        results.append([losses, snapshot(net, opt)])
    assert compiled[0] >= 1 and compiled[-1] == compiled[3], f"graphs compiled after each step: {compiled}"
    assert_same(results[1], results[0])


@pytest.fixture
def fresh_accelerate():
    """Reset accelerate's state, which is global."""
    state = pytest.importorskip("accelerate.state")
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def test_accelerate_with_gradient_accumulation_is_the_plain_loop(fresh_accelerate):
    """prepare() loads the optimizer's own state_dict into it, and wraps step and zero_grad. rho='auto' is a tensor in there."""
    from accelerate import Accelerator

    plain, net = make_net(), make_net()
    reference = SOUL(plain.parameters(), lr=0.01, rho="auto")
    for index, (x, y) in enumerate(batches()):
        (loss_of(plain, x, y) / 2).backward()
        if index % 2:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            reference.step()
            reference.zero_grad()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    inner = SOUL(net.parameters(), lr=0.01, rho="auto")
    net, opt = accelerator.prepare(net, inner)
    for x, y in batches():
        with accelerator.accumulate(net):
            accelerator.backward(loss_of(net, x, y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 0.5)
            opt.step()
            opt.zero_grad()
    assert inner.state[next(net.parameters())]["step"] == STEPS // 2
    assert_same(accelerator.unwrap_model(net).state_dict(), plain.state_dict())
    assert_same(opt.state_dict()["state"], reference.state_dict()["state"])
    assert opt.param_groups[0]["rho"] == reference.param_groups[0]["rho"] != 0.04


def test_trainer_resumes_to_the_weights_of_an_uninterrupted_run(tmp_path, fresh_accelerate):
    """The Trainer calls a bare step(), clips by itself, and writes and reads the checkpoint: in bf16, with low bits,
    whose noise depends on the step."""
    transformers = pytest.importorskip("transformers")
    from tests.support.models import tiny_model

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, 300, (12, 10)).tolist()]

    def trainer(lr):
        model = tiny_model().to(torch.bfloat16)
        opt = SOUL(model.parameters(), lr=lr)
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, save_steps=1, save_strategy="steps", per_device_train_batch_size=2,
            max_grad_norm=0.5, report_to="none", logging_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        scheduler = lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
        return transformers.Trainer(model, args, train_dataset=rows, optimizers=(opt, scheduler)), model, opt

    whole, model, opt = trainer(lr=1e-2)
    start = [p.detach().clone() for p in model.parameters()]
    whole.train()
    assert not any(torch.equal(p, s) for p, s in zip(model.parameters(), start))
    resumed, again, other = trainer(lr=9.0)  # lr comes from the checkpoint
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3 and other.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == 1e-2 / 8
    assert_same(again.state_dict(), model.state_dict())
    assert_same(other.state_dict()["state"], opt.state_dict()["state"])
    assert any(state["low_bits"].any() for state in other.state.values())


@pytest.mark.parametrize("options", [
    {},
    {"max_grad_norm": 0.1},  # the norm is that of the scaled gradients, to begin with
    {"max_grad_norm": 0.1, "skip_nonfinite": True},  # two reasons to skip a step
    {"rho": "auto", "capturable": True},  # a skipped step must not move rho: the verdict is a factor
])  # fmt: skip
def test_grad_scaler_changes_no_bit(options, device):
    """The scale is a power of two, so that everything scales exactly: the norm, its limit and the gradients."""
    scaled, plain = make_net(device), make_net(device)
    opt, reference = (SOUL(net.parameters(), lr=0.01, bs=4, **options) for net in (scaled, plain))
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=2)
    for x, y in batches(5, device):
        scaler.scale(loss_of(scaled, x, y)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        loss_of(plain, x, y).backward()
        reference.step()
        reference.zero_grad()
    assert scaler.get_scale() == 2.0**12  # it grew twice on the way
    assert_same(snapshot(scaled, opt), snapshot(plain, reference))
    assert_same(opt.telemetry(), reference.telemetry())


def test_gradients_that_were_unscaled_are_not_unscaled_again(device):
    """The documented way to clip: unscale_, clip_grad_norm_, step."""
    scaled, plain = make_net(device), make_net(device)
    opt, reference = (SOUL(net.parameters(), lr=0.01, bs=4) for net in (scaled, plain))
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    for x, y in batches(3, device):
        scaler.scale(loss_of(scaled, x, y)).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(scaled.parameters(), 0.1)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        loss_of(plain, x, y).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        reference.step()
        reference.zero_grad()
    assert_same(snapshot(scaled, opt), snapshot(plain, reference))


@pytest.mark.parametrize("dtype, options", [
    (torch.float32, {}),
    (torch.float32, {"capturable": True, "max_grad_norm": 0.1, "skip_nonfinite": True}),
    (torch.bfloat16, {"rho": "auto"}),  # and low bits
    (torch.bfloat16, {"param_rounding": "stochastic", "state_dtype": torch.bfloat16}),  # noise, which depends on the step
    (torch.bfloat16, {"state_dtype": "8bit", "bias_correction": True}),  # scales, and a power of the number of steps
])  # fmt: skip
def test_a_step_with_an_infinite_gradient_changes_nothing(dtype, options, device):
    """Parameters, states, counters and rho keep every bit, in the first step and in later ones; the scaler halves its scale."""
    net, reference_net = make_net(device, dtype), make_net(device, dtype)
    opt, reference = (SOUL(n.parameters(), lr=0.01, bs=4, **options) for n in (net, reference_net))
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
    overflows = 0
    for index, (x, y) in enumerate(batches(4, device, dtype)):
        if index in (0, 2):
            scaler.scale(loss_of(net, x, y)).backward()
            net[2].bias.grad[1] = math.inf if index else math.nan
            weights = copy.deepcopy(net.state_dict())
            scale = scaler.get_scale()
            states = copy.deepcopy(opt.state_dict())
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            overflows += 1
            assert scaler.get_scale() == scale / 2
            assert_same(net.state_dict(), weights)
            assert_same(opt.state_dict()["param_groups"], states["param_groups"])
            if index:
                assert_same(opt.state_dict()["state"], states["state"])
            assert opt.telemetry()["skipped_steps"] == overflows
        loss_of(reference_net, x, y).backward()
        reference.step()
        reference.zero_grad()
        loss_of(net, x, y).backward()
        opt.step()
        opt.zero_grad()
    assert_same(snapshot(net, opt), snapshot(reference_net, reference))


def test_only_grad_scaler_is_told_that_the_step_unscales(device):
    """Lightning asks as the functions below do: it unscales and clips by itself where the answer is False, and else refuses to
    clip, in bf16 without any scaler as well."""

    def handles_unscaling(optimizer):
        return getattr(optimizer, "_step_supports_amp_scaling", False)

    def clip_gradients(optimizer, net, value):
        if value > 0 and handles_unscaling(optimizer):
            raise RuntimeError(f"{type(optimizer).__qualname__} does not allow for gradient clipping")
        torch.nn.utils.clip_grad_norm_(net.parameters(), value)

    nets = [make_net(device) for _ in range(3)]
    opts = [SOUL(net.parameters(), lr=0.01, bs=4) for net in nets]
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    for x, y in batches(3, device):
        for net, opt, scaled in zip(nets, opts, (False, True, False)):  # bf16-mixed, 16-mixed, a plain loop
            loss = loss_of(net, x, y)
            (scaler.scale(loss) if scaled else loss).backward()
            if scaled and not handles_unscaling(opt):
                scaler.unscale_(opt)
            if opt is opts[2]:
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            else:
                clip_gradients(opt, net, 0.1)
            if scaled:
                scaler.step(opt)
                scaler.update()
            else:
                opt.step()
            opt.zero_grad()
    for net, opt in zip(nets[:2], opts):
        assert_same(snapshot(net, opt), snapshot(nets[2], opts[2]))
    opts[0]._step_supports_amp_scaling = False  # as people do with other optimizers
    assert handles_unscaling(opts[0]) is False


def test_grad_scaler_leaves_unscaling_to_the_step(device):
    """The scaler then does not wait for the device, and accepts fp16 parameters, whose gradients it would refuse to unscale."""
    net = make_net(device, torch.float16)
    opt = SOUL(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
    scaler.scale(sum((p.float() * 0.5).sum() for p in net.parameters())).backward()
    scales = []
    opt.register_step_pre_hook(
        lambda optimizer, *rest: scales.append((float(optimizer.grad_scale), float(optimizer.found_inf)))
    )
    scaler.step(opt)
    assert scales == [(4.0, 0.0)] and all((p.grad == 2).all() for p in net.parameters())


def test_update_hessian_takes_scaled_gradients(device):
    """h is quadratic in the gradients: a forgotten scale would be off by 2^20."""
    nets = [make_net(device) for _ in range(3)]
    opts = [SophiaG(net.parameters()) for net in nets]
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    for x, y in batches(2, device):
        for net, opt, factor in zip(nets, opts, (None, "number", "tensor")):
            loss = loss_of(net, x, y)
            (loss if factor is None else scaler.scale(loss)).backward()
            grad_scale = scaler.get_scale() if factor == "number" else scaler._scale
            opt.update_hessian(grad_scale=None if factor is None else grad_scale)
            opt.zero_grad()
    states = [opt.state_dict()["state"] for opt in opts]
    assert states[0][0]["hessian"].abs().max() > 0
    assert_same(states[1:], states[:1] * 2)


def test_averaged_model_follows_the_parameters():
    """The step writes through addresses, beside autograd: whoever reads the parameters next must see it."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    net = make_net()
    opt = SOUL(net.parameters(), lr=0.1)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = None
    for x, y in batches(3):
        loss_of(net, x, y).backward()
        opt.step()
        opt.zero_grad()
        average.update_parameters(net)
        weight = net[0].weight.detach()
        expected = weight.clone() if expected is None else 0.5 * expected + 0.5 * weight
    assert torch.allclose(average.module[0].weight, expected)


def test_averaged_model_sees_all_bits_of_24_bit_weights():
    """As docs/integrations.md has it: with a step far below the last bit of bf16, only the low bits move."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    net = make_net(dtype=torch.bfloat16)
    opt = SOUL(net.parameters(), lr=2e-5, weight_decay=0.0)
    start = net[0].weight.detach().clone()
    with opt.export_fp32():
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = None
    for x, y in batches(4, dtype=torch.bfloat16):
        loss_of(net, x, y).backward()
        opt.step()
        opt.zero_grad()
        with opt.export_fp32() as exported:
            average.update_parameters(net)
        weight = exported[net[0].weight]
        expected = weight if expected is None else 0.5 * expected + 0.5 * weight
    averaged = average.module[0].weight
    assert averaged.dtype == torch.float32 and net[0].weight.dtype == torch.bfloat16
    assert torch.allclose(averaged, expected, rtol=1e-7, atol=0)
    moved = (averaged != start.float()).float().mean()
    lost = (averaged.bfloat16() == start).float().mean()
    assert moved > 0.9 and lost > 0.7, (moved, lost)  # an average of the bf16 values would miss most of it
    opt.import_fp32({p: average.module.get_parameter(name).detach() for name, p in net.named_parameters()})
    assert (opt.export_fp32()[net[0].weight] - averaged).abs().max() <= averaged.abs().max() * 2.0**-16


def test_hooks_of_the_optimizer_fire():
    net = make_net()
    opt = SOUL(net.parameters(), lr=0.1)
    calls = []

    def record(name):
        def hook(optimizer, *rest):
            calls.append((name, optimizer is opt, int(optimizer.state[net[0].weight].get("step", 0))))

        return hook

    opt.register_step_pre_hook(record("before the step"))
    opt.register_step_post_hook(record("after the step"))
    opt.register_state_dict_pre_hook(record("before state_dict"))
    opt.register_state_dict_post_hook(lambda optimizer, state_dict: state_dict | {"note": "kept"})
    loss_of(net, *batches(1)[0]).backward()
    opt.step()
    assert opt.state_dict()["note"] == "kept"
    assert calls == [("before the step", True, 0), ("after the step", True, 1), ("before state_dict", True, 1)]


def test_a_flat_piece_of_deepspeed_is_not_taken_for_the_whole(monkeypatch):
    """A norm of some sub-groups would clip each differently. DeepSpeed itself: tests/clients/test_deepspeed.py."""
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    cases = (
        ({"max_grad_norm": 1.0}, "max_grad_norm: expected None where ZeRO steps several .*; set gradient_clipping in DeepSp"),
        ({"skip_nonfinite": True}, "skip_nonfinite: expected False where ZeRO steps several"),
        ({"rho": "auto"}, "rho: expected a number where ZeRO-3 steps several sub-groups one by one"),
        ({"max_grad_norm": math.inf}, None),
    )
    for (options, message), n_groups in itertools.product(cases, (1, 2)):
        params = list(make_net().parameters())
        opt = SOUL([{"params": params[n::n_groups]} for n in range(n_groups)], **options)
        group = opt.param_groups[0]
        opt.param_groups = [group]  # as ZeRO-1 does
        pieces = [torch.ones(40, requires_grad=True), torch.ones(3, requires_grad=True)]
        for number, piece in enumerate(pieces):
            group["params"] = [piece]  # the next sub-group of ZeRO-3
            piece.grad = torch.ones_like(piece)
            if message is None or (number == 0 and (n_groups == 1 or "rho" in options)):
                opt.step()
                assert not piece.eq(1).any()
                continue
            with pytest.raises(ValueError, match=message):
                opt.step()
            assert piece.eq(1).all() and piece not in opt.state
    opt = SOUL(make_net().parameters(), max_grad_norm=1.0)  # not under DeepSpeed, though it has been imported
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.telemetry()["grad_norm"] > 1
