import types

import pytest
import torch

from soul import SOUL, SophiaG, release_gradients
from soul.distributed.shards import wait_for_offload
from soul.optim import curvature


def build():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8), torch.nn.Linear(8, 8))
    model[3].weight = model[2].weight = torch.nn.Parameter(torch.randn(8, 16) * 0.1)  # tied
    model[3] = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
    model[3][1].weight = model[2].weight
    return model.bfloat16()


def loss_of(model, seed, rows=4):
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(rows, 8, generator=generator).bfloat16()).float().square().mean()


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit", "param_rounding": "stochastic"}], ids=["default", "8bit"])
def test_released_steps_equal_plain_ones_bit_for_bit(options):
    """Also for a tied weight, whose gradient is complete only after both of its uses."""
    plain, released = build(), build()
    a = SOUL(plain.parameters(), lr=1e-3, **options)
    b = SOUL(released.parameters(), lr=1e-3, **options)
    release = release_gradients(released, b)
    for seed in range(4):
        a.zero_grad()
        loss_of(plain, seed).backward()
        a.step()
        loss_of(released, seed).backward()
        assert all(p.grad is None for p in released.parameters())
        b.step()  # as a training loop does: nothing is left to do
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), released.parameters()))
    assert a.clip_fraction() == b.clip_fraction()  # counted over all parameters of the last pass
    assert all(int(b.state[p]["step"]) == 4 for p in released.parameters())
    release.remove()
    loss_of(released, 9).backward()
    assert all(p.grad is not None for p in released.parameters())


def test_the_first_gradient_may_be_that_of_the_first_parameter():
    """This happens if one parameter is trained, or if the optimizer has them in the order in which gradients arrive."""
    plain, released = build(), build()
    a, b = (SOUL(list(model.parameters())[::-1], lr=1e-3) for model in (plain, released))
    release_gradients(released, b)
    for seed in range(2):
        a.zero_grad()
        loss_of(plain, seed).backward()
        a.step()
        loss_of(released, seed).backward()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), released.parameters()))


def test_only_a_few_gradients_live_at_once():
    model = build()
    opt = SOUL(model.parameters(), lr=1e-3)
    release_gradients(model, opt)
    most = [0]
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: most.__setitem__(0, max(most[0], alive(model))))
    loss_of(model, 0).backward()
    assert most[0] <= 2 < len(list(model.parameters()))


def alive(model):
    return sum(p.grad is not None for p in model.parameters())


def test_accumulation_while_the_release_is_paused():
    plain, released = build(), build()
    a, b = SOUL(plain.parameters(), lr=1e-3), SOUL(released.parameters(), lr=1e-3)
    release = release_gradients(released, b)
    for seed in (0, 2):
        a.zero_grad()
        for micro in (0, 1):
            loss_of(plain, seed + micro).backward()
        a.step()
        with release.paused():
            loss_of(released, seed).backward()
            assert alive(released) == len(list(released.parameters()))
        loss_of(released, seed + 1).backward()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), released.parameters()))


def test_hessian_passes_pause_the_release_and_hold_no_gradients():
    """The curvature's backward pass moves h and nothing else."""
    model = build()
    opt = SophiaG(model.parameters(), lr=1e-3)
    release_gradients(model, opt)
    refresh = curvature.RetainFisher(opt, every=1, in_backward=True)
    loss_of(model, 0).backward()
    saved = [p.detach().clone() for p in model.parameters()]
    refresh.step(lambda: loss_of(model, 1))
    assert alive(model) == 0 and all(torch.equal(p, k) for p, k in zip(model.parameters(), saved))
    assert all(opt.state[p]["hessian"].any() and int(opt.state[p]["step"]) == 1 for p in model.parameters())


@pytest.mark.parametrize("options, message", [
    ({"max_grad_norm": 1.0}, "max_grad_norm: expected None or False with gradient release, got 1.0; it needs"),
    ({"skip_nonfinite": True}, "skip_nonfinite: expected None or False with gradient release"),
    ({"rho": "auto"}, "clip_target: expected None or False with gradient release"),
])  # fmt: skip
def test_refuses_what_needs_all_gradients(options, message):
    model = build()
    with pytest.raises(ValueError, match=f"^{message}"):
        release_gradients(model, SOUL(model.parameters(), **options))
    loss_of(model, 0).backward()
    assert alive(model) == len(list(model.parameters()))  # no hook was left behind


def test_the_release_survives_loading_a_checkpoint():
    """accelerate.prepare() loads a state dict. The curvature must still pause the release, or its batch would be trained on."""
    model = build()
    opt = SophiaG(model.parameters(), lr=1e-3)
    release_gradients(model, opt)
    loss_of(model, 0).backward()
    opt.load_state_dict(opt.state_dict())
    saved = [p.detach().clone() for p in model.parameters()]
    curvature.RetainFisher(opt, every=1).step(lambda: loss_of(model, 1))
    assert all(torch.equal(p, k) for p, k in zip(model.parameters(), saved))
    assert all(int(opt.state[p]["step"]) == int(opt.state[p]["hessian_step"]) == 1 for p in model.parameters())
    clipping = SophiaG(build().parameters(), max_grad_norm=1.0).state_dict()
    with pytest.raises(ValueError, match="^max_grad_norm: expected None or False with gradient release"):
        opt.load_state_dict(clipping)
    with pytest.raises(ValueError, match="^optimizer: expected one whose gradients are not released"):
        release_gradients(model, opt)


def test_refuses_replicas(monkeypatch):
    """The inner module of a DDP module looks like any other; but with several processes no plain parameter is accepted."""
    model = build()
    opt = SOUL(model.parameters())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="^model: expected one process, or sharded parameters, got plain parameters in 2"):
        release_gradients(model, opt)


def test_refuses_scalers_foreign_parameters_and_doing_it_twice():
    model = build()
    opt = SOUL(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="^model: expected a module that has all parameters of the optimizer"):
        release_gradients(model[0], opt)
    with pytest.raises(ValueError, match="^optimizer: expected a SophiaG or SOUL, got AdamW"):
        release_gradients(model, torch.optim.AdamW(model.parameters()))
    release_gradients(model, opt)
    with pytest.raises(ValueError, match="^optimizer: expected one whose gradients are not released"):
        release_gradients(model, opt)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(ValueError, match="^GradScaler: expected no scaler with gradient release"):
        scaler.step(opt)
    opt.step()  # what the scaler had left is gone
    with pytest.raises(ValueError, match="^bs: expected None with gradient release"):
        opt.step(bs=8)


@pytest.mark.parametrize("device_type, waits", [("cuda", 1), ("cpu", 0)])
def test_gradients_on_their_way_to_main_memory_are_waited_for(device_type, waits, monkeypatch):
    """FSDP2 with a CPUOffloadPolicy, on a device that need not be there: only the shard lies in main memory."""
    waited = []
    stream = types.SimpleNamespace(synchronize=lambda: waited.append(True))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: stream)
    shard = types.SimpleNamespace(device_mesh=types.SimpleNamespace(device_type=device_type), to_local=lambda: torch.ones(1))
    wait_for_offload(shard)
    wait_for_offload(torch.nn.Parameter(torch.ones(1)))  # a whole parameter
    assert len(waited) == waits
