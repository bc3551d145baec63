"""States in main memory: the same bits as on the device, and each byte goes up once and down once."""

import contextlib
import copy

import pytest
import torch

import soul.optim.offload as offload
from soul import SOUL, SophiaG, release_gradients
from soul.optim import curvature
from soul_kernels.errors import ArgumentError
from tests.support import parity
from tests.support.helpers import needs_kernels_on_cpu
from tests.support.optimizers import BRAIN, FLOAT, HALF, give_gradients

# Rows of whole groups, and of others; one longer than a bucket; a scalar, and nothing.
SHAPES = ((64, 96), (7,), (3, 5), (), (0, 4), (40, 64))
STATE_DTYPES = [None, "float32", "bfloat16", "8bit"]


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """Pieces of two groups and buckets of 6,000 bytes: the matrices above are cut, and vectors share a bucket."""
    monkeypatch.setattr(offload, "PIECE", 64)
    monkeypatch.setattr(offload, "BUCKET_BYTES", 6000)


def parameters(dtype):
    torch.manual_seed(0)
    params = [(torch.randn(shape) * 0.1).to(dtype).requires_grad_() for shape in SHAPES]
    transposed = torch.randn(33, 64).to(dtype).t().requires_grad_()  # dense, but not in the order of its rows
    with_gaps = torch.randn(32, 80).to(dtype)[:, 8:40].requires_grad_()
    return [*params, transposed, with_gaps]


def pair(dtype, make=SOUL, backend="reference", **options):
    """Return parameters and an optimizer, twice: with states beside their parameters and with states in main memory."""
    options = dict(lr=1e-2, backend=backend, **options)
    params, others = parameters(dtype), parameters(dtype)
    return params, make(params, **options), others, make(others, state_offload=True, **options)


def assert_equal(params, a, others, b):
    for p, q in zip(params, others):
        assert torch.equal(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        for name, value in a.state[p].items():
            assert value.dtype == b.state[q][name].dtype and torch.equal(value, b.state[q][name]), name


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.covers("states in main memory (`--state-offload`)", "one process")
def test_steps_are_equal_bit_for_bit(dtype, state_dtype):
    """Also where noise is drawn, where the norm is clipped, and in a step that is skipped."""
    params, a, others, b = pair(dtype, state_dtype=state_dtype, max_grad_norm=1.0, skip_nonfinite=True, betas=(0.9, 0.995))
    for step in range(3):
        give_gradients(params, others)
        if step == 1:
            params[0].grad[0, 0] = others[0].grad[0, 0] = float("nan")
        a.step()
        b.step()
    assert_equal(params, a, others, b)
    assert b.telemetry()["skipped_steps"] == 1
    assert b.clip_fraction() == a.clip_fraction()


@needs_kernels_on_cpu
def test_kernels_step_buckets_as_they_step_whole_tensors():
    params, a, others, b = pair(BRAIN, backend="triton", state_dtype="8bit", betas=(0.9, 0.995), bias_correction=True)
    for _ in range(2):
        give_gradients(params, others)
        a.step()
        b.step()
    assert_equal(params, a, others, b)


@pytest.mark.parametrize("state_dtype", [None, "8bit"])
def test_hessians_of_sophia_pass_over_the_device_too(state_dtype):
    """With bias corrections, of which a bucket takes a slice, and with probes; in the step h goes up, and not down."""
    params, a, others, b = pair(BRAIN, SophiaG, state_dtype=state_dtype, bias_correction=True)
    for _ in range(2):
        give_gradients(params, others)
        for optimizer in (a, b):
            optimizer.update_hessian()
            optimizer.step()
    if state_dtype is None:
        probes = [torch.randn_like(p) for p in params]
        a.update_hessian(probes=dict(zip(params, probes)))
        b.update_hessian(probes=dict(zip(others, probes)))
    assert_equal(params, a, others, b)
    transfers = b._stepper.transfers[torch.device("cpu")]
    h = sum(b.state[q][name].nbytes for q in others for name in ("hessian", "hessian_scale") if name in b.state[q])
    updates = 2 if state_dtype == "8bit" else 3
    assert transfers.bytes_up == 2 * bytes_of_states(b) + updates * h
    assert transfers.bytes_down == 2 * (bytes_of_states(b) - h) + updates * h


def bytes_of_states(optimizer):
    counters = ("step", "hessian_step")
    return sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name not in counters)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.counts
def test_each_byte_goes_up_once_and_down_once_and_two_buckets_are_on_the_device(released):
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64), torch.nn.Linear(64, 32)).bfloat16()
    twin = copy.deepcopy(model)
    a = SOUL(twin.parameters(), lr=1e-2, state_dtype="8bit", backend="reference")
    b = SOUL(model.parameters(), lr=1e-2, state_dtype="8bit", backend="reference", state_offload=True)
    if released:
        release_gradients(model, b)
    for step in range(1, 4):
        for each in (twin, model):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
            each(x).float().square().mean().backward()
        a.step()
        b.step()
        a.zero_grad()
        b.zero_grad()
        transfers = b._stepper.transfers[torch.device("cpu")]
        assert transfers.bytes_up == transfers.bytes_down == step * bytes_of_states(b)
    assert 6000 < transfers.device_bytes <= 2 * (6000 + 5 * offload.ALIGNMENT)
    numel = sum(parameter.numel() for parameter in model.parameters())
    what = f"8-bit states of {numel:,} parameters on the device; states in main memory, with buckets of 6,000 bytes"
    parity.count(what + released * ", gradient release", bytes_of_states(b), transfers.device_bytes)
    assert_equal(list(twin.parameters()), a, list(model.parameters()), b)


class Streams:
    """Streams that run copies as late as their events allow, or at once: in place of ``torch.cuda``.

    Work on the stream that computes is done at once, and so is what it waits for. A copy that nobody has ordered behind the
    step or before it is then too late or too early, and the bits are others.
    """

    def __init__(self, eager=()):
        self.stream_of_now = self.main = FakeStream(self)
        self.made = []
        self.eager = eager  # indices of streams, in the order in which they are made

    def Stream(self):
        self.made.append(FakeStream(self))
        return self.made[-1]

    def current_stream(self, device=None):
        return self.stream_of_now

    @contextlib.contextmanager
    def stream(self, stream):
        self.stream_of_now = stream
        yield
        self.stream_of_now = self.main

    def copy(self, pairs):
        stream = self.stream_of_now
        for target, source in pairs:
            stream.queue.append(lambda target=target, source=source: target.copy_(source))
        if self.made.index(stream) in self.eager:
            stream.run(len(stream.queue))
        return sum(source.nbytes for _, source in pairs)


class FakeStream:
    def __init__(self, streams):
        self.streams = streams
        self.queue = []
        self.done = 0

    def record_event(self):
        return self, len(self.queue)

    def wait_event(self, event):
        stream, length = event
        if self is self.streams.main:
            stream.run(length)
        else:
            self.queue.append(lambda: stream.run(length))

    def run(self, length):
        while self.done < length:
            self.done += 1
            self.queue[self.done - 1]()


@pytest.mark.parametrize("eager", [(), (0,), (1,)], ids=["late copies", "early up", "early down"])
def test_events_order_copies_and_steps(monkeypatch, eager):
    """Whenever the copies run within what the events allow, the bits are the same."""
    streams = Streams(eager)
    params, a, others, b = pair(BRAIN)
    monkeypatch.setattr(offload, "_copy", streams.copy)
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    for _ in range(3):
        give_gradients(params, others)
        a.step()
        b.step()
    up, down = streams.made
    down.run(len(down.queue))  # what `wait` does on a GPU
    assert_equal(params, a, others, b)


@pytest.mark.parametrize("kept", ["up", "down", "free"])
def test_the_fake_streams_notice_a_missing_event(monkeypatch, kept):
    """Each of the three waits is needed: without it the bits are others."""
    streams = Streams(eager={"free": (0,)}.get(kept, ()))
    run = offload.Transfers.run

    def without(self, call):
        stream = {"up": streams.main, "free": self._up, "down": self._down}[kept]
        with monkeypatch.context() as patch:
            patch.setattr(stream, "wait_event", lambda event: None)
            if kept == "down":
                streams.eager = (1,)
                patch.setattr(call.op.__class__, "__call__", lambda op: None)
            run(self, call)

    params, a, others, b = pair(BRAIN)
    monkeypatch.setattr(offload, "_copy", streams.copy)
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    monkeypatch.setattr(offload.Transfers, "run", without)
    for _ in range(2):
        give_gradients(params, others)
        a.step()
        b.step()
    streams.made[1].run(len(streams.made[1].queue))
    with pytest.raises(AssertionError):
        assert_equal(params, a, others, b)


@pytest.mark.parametrize("state_dtype", [None, "8bit"])
def test_checkpoints_do_not_depend_on_it(state_dtype):
    """A state dict that was saved with it loads without, and the other way round; then both take the same steps."""
    params, a, others, b = pair(BRAIN, state_dtype=state_dtype)
    for _ in range(2):
        give_gradients(params, others)
        a.step()
        b.step()
    saved_a, saved_b = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
    assert saved_b["param_groups"][0]["state_offload"] is True
    a.load_state_dict(saved_b)
    b.load_state_dict(saved_a)
    assert [optimizer.param_groups[0]["state_offload"] for optimizer in (a, b)] == [False, True]
    give_gradients(params, others)
    a.step()
    b.step()
    assert_equal(params, a, others, b)
    exported = zip(a.export_fp32().values(), b.export_fp32().values())
    assert all(torch.equal(x, y) for x, y in exported)
    b.import_fp32(b.export_fp32())
    assert_equal(params, a, others, b)
    again = pair(BRAIN, state_dtype=state_dtype)[3]
    again.load_state_dict(copy.deepcopy(b).state_dict())
    assert len(again.state) == len(others)


def test_states_that_are_loaded_do_not_pass_over_the_device(monkeypatch):
    """torch's own loading would cast every state to the parameter's dtype, on its device."""
    params, a, others, b = pair(BRAIN)
    give_gradients(params, others)
    a.step()
    cast = []
    original = torch.optim.Optimizer._process_value_according_to_param_policy
    monkeypatch.setattr(torch.optim.Optimizer, "_process_value_according_to_param_policy",
                        staticmethod(lambda *args, **options: cast.append(args) or original(*args, **options)))  # fmt: skip
    b.load_state_dict(a.state_dict())
    assert not cast and len(b.state) == len(others)


def test_curvature_in_the_backward_pass():
    """GNB and the retain set's Fisher update one parameter at a time."""
    model = torch.nn.Linear(64, 48).bfloat16()
    twin = copy.deepcopy(model)
    optimizers = []
    for each, offloaded in ((twin, False), (model, True)):
        optimizer = SophiaG(each.parameters(), lr=1e-2, backend="reference", state_offload=offloaded)
        fisher = curvature.RetainFisher(optimizer, every=1, in_backward=True)
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        for _ in range(2):
            loss = lambda: each(x).float().square().mean()  # noqa: B023, E731
            fisher.step(loss)
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
    assert_equal(list(twin.parameters()), optimizers[0], list(model.parameters()), optimizers[1])


@pytest.mark.covers("states in main memory (`--state-offload`)", "FSDP2")
def test_shards_of_fsdp2_also_with_parameters_in_main_memory(tmp_path):
    """States are DTensors of the same mesh; with CPUOffloadPolicy parameters and gradients are in main memory as well."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    plain = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)).bfloat16()
    x = torch.randn(4, 64).bfloat16()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    try:
        ended = []
        for policy in (None, OffloadPolicy(), CPUOffloadPolicy(pin_memory=False)):
            model = copy.deepcopy(plain)
            if policy is not None:
                fully_shard(model, mesh=init_device_mesh("cpu", (1,)), offload_policy=policy)
            options = dict(lr=1e-2, state_dtype="8bit", backend="reference", state_offload=policy is not None)
            optimizer = SOUL(model.parameters(), **options)
            for _ in range(2):
                optimizer.zero_grad()
                model(x).float().square().mean().backward()
                optimizer.step()
            whole = [state[name].full_tensor() if policy else state[name]
                     for state in optimizer.state.values() for name in ("exp_avg", "hessian", "low_bits")]  # fmt: skip
            ended.append([*(p.full_tensor() if policy else p for p in model.parameters()), *whole])
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    finally:
        torch.distributed.destroy_process_group()
    for policy, others in zip(("shards", "shards in main memory"), ended[1:]):
        parity.bit_for_bit(others, ended[0], policy)


def test_what_cannot_work_is_refused():
    params = parameters(FLOAT)
    with pytest.raises(ArgumentError, match="state_offload: expected False with capturable, got True; a CUDA graph replays"):
        SOUL(params, capturable=True, state_offload=True)
    with pytest.raises(ArgumentError, match="state_offload: expected True or False, got 'cpu'"):
        SOUL(params, state_offload="cpu")
    optimizer = SOUL(params, state_offload=True, backend="reference")
    give_gradients(params)
    optimizer.step()
    before = [p.clone() for p in params]
    optimizer.state[params[5]]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ArgumentError, match=r"parameter 5 in group 0: expected shape \(3,\), as its exp_avg"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before))
