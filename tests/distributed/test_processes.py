"""The optimizers in two processes: DDP, FSDP2 and torch.distributed.checkpoint, over gloo on the CPU."""

import contextlib
import copy
import time
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy

from soul import SOUL, SophiaG, release_gradients
from soul.distributed import exit_process
from soul.distributed.shards import local
from soul.optim.curvature import RetainFisher
from soul.optim.scales import decoded, own_scales
from soul_kernels import sophia_step
from soul_kernels.reference.rounding import join
from tests.support import parity

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")

TIMEOUT = 300  # of a set of processes, which takes 10 s on two idle cores


def run(folder, worker, *args, world=2, timeout=TIMEOUT, start_method="forkserver"):
    """Call ``worker(folder, *args)`` in ``world`` processes with a process group; return what each of them returned.

    A failed process ends the others, and its exception is raised here. They are forked from a process that has imported
    everything (tests/conftest.py); what a test puts into the environment needs new ones (``start_method="spawn"``).
    """
    context = torch.multiprocessing.start_processes(
        _start, (folder, world, worker, args), world, join=False, start_method=start_method
    )
    end = time.monotonic() + timeout
    try:
        while not context.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"{worker.__name__} took more than {timeout} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(world)]


def _start(rank, folder, world, worker, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=world)
    try:
        torch.save(worker(folder, *args), folder / f"result{rank}.pt")
        dist.barrier()
    except dcp.api.CheckpointException as error:  # no Exception: it would not get through
        raise RuntimeError(str(error)) from error
    finally:
        dist.destroy_process_group()
    exit_process(0)


class Net(torch.nn.Module):
    """A net whose rows split unevenly over two processes: 7 and 5 give unequal shards, and 1 leaves the second one empty."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(6, 7)
        self.b = torch.nn.Linear(7, 5)
        self.c = torch.nn.Linear(5, 1)

    def forward(self, x):
        return self.c(self.b(self.a(x).tanh()).tanh())


class WideNet(torch.nn.Module):
    """A net of which two weights have 8-bit states, with 5 rows, or with one, which leaves the second process none."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(6, 64)
        self.b = torch.nn.Linear(64, 5)
        self.c = torch.nn.Linear(5, 64)
        self.d = torch.nn.Linear(64, 1)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x).tanh()).tanh()).tanh())


def make_net(dtype=torch.float32, options=()):
    torch.manual_seed(1)
    return (WideNet() if "state_dtype" in options and options["state_dtype"] == "8bit" else Net()).to(dtype)


def batch(index, dtype=torch.float32):
    generator = torch.Generator().manual_seed(index)
    return torch.randn(8, 6, generator=generator).to(dtype), torch.randn(8, 1, generator=generator).to(dtype)


def loss_of(net, index, rows=slice(None)):
    x, y = (t[rows] for t in batch(index, next(net.parameters()).dtype))
    return torch.nn.functional.mse_loss(net(x), y)


def backward(net, index, rows=slice(None)):
    loss_of(net, index, rows).backward()


def train(net, opt, indices, rows=slice(None)):
    for index in indices:
        backward(net, index, rows)
        if type(opt) is SophiaG:
            opt.update_hessian()
        opt.step()
        opt.zero_grad()


def whole(value):
    """Return the whole of a value that may be in shards."""
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def outcome(net, opt):
    """Return everything that can be compared across processes and with a single one: whole tensors by name."""
    opt = getattr(opt, "optimizer", opt)
    state = {}
    for name, param in net.named_parameters():
        name = name.removeprefix("module.")
        state[name] = whole(param)
        state |= {f"{name}.{key}": whole(value) for key, value in opt.state.get(param, {}).items()}
    return {
        "state": state,
        "telemetry": opt.telemetry(),
        "fraction": opt.clip_fraction(),
        "rho": float(opt.param_groups[0]["rho"]),
    }


def named(dtype, options):
    """Return the name of a case."""
    return ", ".join([str(dtype).removeprefix("torch."), *(f"{name} {value}" for name, value in options.items())])


def differing(a, b, rtol=0.0, atol=0.0):
    """Return the names of the tensors that differ by more than the tolerances."""
    assert list(a) == list(b) and a
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.allclose(a[name], b[name], rtol, atol)]


def ddp_worker(folder, cases):
    results = []
    rows = slice(dist.get_rank(), None, 2)
    for dtype, options in cases:
        net = torch.nn.parallel.DistributedDataParallel(make_net(dtype))
        opt = SOUL(net.parameters(), lr=0.01, **options)
        train(net, opt, range(3), rows)
        results.append(outcome(net, opt))
    return results


@pytest.mark.slow(reason="starts processes; FSDP2 is tested always")
def test_ddp(tmp_path):
    """Two replicas, each with half of the data, are one process with all of it; and no noise ever drives them apart."""
    cases = [
        (torch.float32, {"max_grad_norm": 0.5}),
        (torch.float32, {"rho": "auto"}),
        (torch.bfloat16, {"param_rounding": "stochastic", "state_dtype": torch.bfloat16}),
        (torch.bfloat16, {"param_rounding": "compensated", "state_dtype": "8bit"}),
    ]
    first, second = run(tmp_path, ddp_worker, cases)
    for (dtype, options), a, b in zip(cases, first, second):
        assert not differing(a["state"], b["state"]), options
        assert (a["telemetry"], a["rho"]) == (b["telemetry"], b["rho"]), options
        if dtype == torch.float32:
            net = make_net()
            opt = SOUL(net.parameters(), lr=0.01, **options)
            train(net, opt, range(3))
            one = outcome(net, opt)
            assert not differing(a["state"], one["state"], rtol=1e-4, atol=1e-6), options
            assert a["rho"] == pytest.approx(one["rho"], rel=1e-6), options


def shard(net, mesh=None, **options):
    """FSDP2: every layer, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (2,))
    for layer in net.children():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


# With the same batch in both processes the averaged gradients are exactly those of one process.
BOTH = {"max_grad_norm": 0.05, "rho": "auto", "bs": 8}
SHARDED = [
    ("all", SOUL, torch.float32, {"bs": 8}),
    ("all", SophiaG, torch.float32, {"max_grad_norm": 0.05, "bs": 8}),
    ("all", SophiaG, torch.float32, {"rho": "auto", "bs": 8, "bias_correction": True}),
    ("all", SOUL, torch.float32, BOTH | {"skip_nonfinite": True, "capturable": True}),
    ("all", SOUL, torch.bfloat16, {}),
    # Sharded beside whole parameters, replicas of shards: each coordinate must count once in the norm and in the fraction.
    ("some", SOUL, torch.float32, BOTH),
    ("replicas", SOUL, torch.float32, BOTH),
    ("replicas", SOUL, torch.bfloat16, {"param_rounding": "stochastic", "state_dtype": torch.bfloat16}),
    ("all", SOUL, torch.bfloat16, {"state_dtype": "8bit"}),
    ("replicas", SophiaG, torch.float32, {"state_dtype": "8bit", "betas": (0.9, 0.999)}),  # h is rounded stochastically
]


def flattened(original):
    """Return the refusals under FSDP1, whose parameters do not say that they are shards; check that a plain step moves them."""
    net = FullyShardedDataParallel(make_net(), use_orig_params=original, device_id=torch.device("cpu"))
    backward(net, 0)
    texts = []
    for options in ({"max_grad_norm": 1.0}, {"rho": "auto"}, {"skip_nonfinite": True}, {}):
        opt = SOUL(net.parameters(), lr=0.01, **options)
        before = [p.detach().clone() for p in net.parameters()]
        try:
            opt.step()
            opt.telemetry()
        except ValueError as error:
            texts.append(str(error))
        moved = any(not torch.equal(p, b) for p, b in zip(net.parameters(), before) if p.numel())
        assert moved == (not options)
    return texts


RELEASED = [
    (SOUL, torch.float32, {}),
    (SOUL, torch.bfloat16, {"state_dtype": "8bit"}),
    (SophiaG, torch.float32, {"bias_correction": True, "betas": (0.9, 0.999)}),
]


def gradient_bytes(params):
    """Return the bytes of the storages in which the shards of the gradients lie; those of one layer share one."""
    grads = [param.grad.to_local() for param in params if param.grad is not None]
    return sum({grad.untyped_storage().data_ptr(): grad.untyped_storage().nbytes() for grad in grads}.values())


def released(kind, dtype, options, releases, **sharding):
    """Train with or without release; return the outcome and the most bytes of gradients that lived at once.

    The processes have different rows; the second step has two micro-batches. A `SophiaG` has its h refreshed in between.
    """
    net = shard(make_net(dtype, options), mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32), **sharding)
    params = list(net.parameters())
    opt = kind(params, lr=0.01, **options)
    rows = slice(dist.get_rank(), None, 2)
    sizes = []
    hooks = [p.register_post_accumulate_grad_hook(lambda _: sizes.append(gradient_bytes(params))) for p in params]
    release = release_gradients(net, opt) if releases else None  # its hooks are called after the others
    backward(net, 0, rows)
    assert not releases or all(p.grad is None for p in params)
    opt.step()
    for hook in hooks:
        hook.remove()
    opt.zero_grad()
    if kind is SophiaG:
        RetainFisher(opt, in_backward=releases).step(lambda: loss_of(net, 1, rows))
    with release.paused() if releases else contextlib.nullcontext():
        backward(net, 2, rows)
    backward(net, 3, rows)
    opt.step()
    return outcome(net, opt), max(sizes)


def local_shapes(state):
    return [tuple(state[name].to_local().shape) for name in ("hessian", "hessian_scale")]


def fsdp_worker(folder):
    from torch.distributed.device_mesh import init_device_mesh

    results = []
    replicas = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    for how, kind, dtype, options in SHARDED:
        net = make_net(dtype, options)
        shard(net, replicas if how == "replicas" else None, ignored_params=set(net.b.parameters()) if how == "some" else None)
        opt = kind(net.parameters(), lr=0.01, **options)
        train(net, opt, range(3))
        results.append(outcome(net, opt))
    eight_bits = {name: opt.state[param] for name, param in net.named_parameters() if "exp_avg_scale" in opt.state[param]}
    # One process alone holds the coordinate that is not finite.
    net = shard(make_net())
    sizes = [param.to_local().numel() for param in net.parameters()]
    opt = SOUL(net.parameters(), lr=0.01, skip_nonfinite=True)
    backward(net, 0)
    if dist.get_rank() == 0:
        net.c.bias.grad.to_local().fill_(float("nan"))
    before = {name: whole(param) for name, param in net.named_parameters()}
    opt.step()
    untouched = not differing(before, {name: whole(param) for name, param in net.named_parameters()})
    return {
        "flattened": [flattened(original) for original in (False, True)],
        "results": results,
        "released": [[released(*case, releases) for releases in (False, True)] for case in RELEASED],
        "offloaded": [released(*case, True, offload_policy=CPUOffloadPolicy(pin_memory=False)) for case in RELEASED],
        "sizes": sizes,
        "codes": {name: local_shapes(state) for name, state in eight_bits.items()},
        "skipped": (untouched, opt.telemetry()["skipped_steps"]),
    }


def shard_numel(param):
    """Return the elements of the larger of two shards; that of the other process is padded to them."""
    return -(-len(param) // 2) * param[0].numel()


@pytest.mark.covers("norm, clipping, rho, telemetry", "FSDP2")
@pytest.mark.covers("parameters in main memory (CPUOffloadPolicy)", "FSDP2")
@pytest.mark.counts
def test_fsdp2(tmp_path):
    """Shards of unequal size and empty ones: states, global norm, rho and telemetry are those of one process.

    With gradient release they are those without it, bit for bit, and the gradients of one layer at most live at once. With
    parameters and gradients in main memory too; without a GPU that only shows that such parameters are stepped.
    """
    first, second = run(tmp_path, fsdp_worker)
    assert first["sizes"][-1] == 1 and second["sizes"][-1] == 0 and second["sizes"][0] == 3 * 6  # of 7 rows
    for result in (first, second):
        assert result["codes"] == {"b.weight": [(5, 64), (5, 4)], "d.weight": [(1, 64), (1, 4)]}
        assert result["skipped"] == (True, 1)
        for texts in result["flattened"]:
            assert len(texts) == 4 and all(" under FSDP1" in text for text in texts)
            names = [text.split(":")[0] for text in texts]
            assert names == ["max_grad_norm", "rho", "skip_nonfinite", "telemetry"]
        for (_, dtype, options), ((kept, kept_bytes), (freed, freed_bytes)), (offloaded, _) in zip(
            RELEASED, result["released"], result["offloaded"], strict=True
        ):
            parity.bit_for_bit(freed["state"], kept["state"], named(dtype, options), "the same steps without release")
            assert (freed["telemetry"], freed["fraction"]) == (kept["telemetry"], kept["fraction"])
            sizes = [sum(map(shard_numel, layer.parameters())) for layer in make_net(dtype, options).children()]
            parity.bit_for_bit(
                offloaded["state"], kept["state"], named(dtype, options), "the same steps with parameters on the device"
            )
            assert (kept_bytes, freed_bytes) == (sum(sizes) * dtype.itemsize, max(sizes) * dtype.itemsize)
            if options == {}:
                what = "fp32 gradients of a net of three layers that live at once, in each of two processes; gradient release"
                parity.count(what, kept_bytes, freed_bytes)
    for case, a, b in zip(SHARDED, first["results"], second["results"]):
        how, kind, dtype, options = case
        assert not differing(a["state"], b["state"]), case
        assert (a["telemetry"], a["fraction"], a["rho"]) == (b["telemetry"], b["fraction"], b["rho"]), case
        net = make_net(dtype, options)
        opt = kind(net.parameters(), lr=0.01, **options)
        train(net, opt, range(3))
        one = outcome(net, opt)
        # Shards draw the noise of whole parameters. A norm is added up in another order.
        exact = options == {"bs": 8} or dtype == torch.bfloat16 or "state_dtype" in options
        tolerance = {} if exact else dict(rtol=1e-5, atol=1e-8)
        parity.elements_alike(a["state"], one["state"], **tolerance, case=f"{how}, {kind.__name__}, {named(dtype, options)}")
        assert a["rho"] == pytest.approx(one["rho"], rel=1e-6) and (a["rho"] != 0.04) == ("rho" in options), case
        if dtype == torch.float32:
            assert a["fraction"] == pytest.approx(one["fraction"]) and a["fraction"][0] > 0, case
            assert a["telemetry"]["skipped_steps"] == one["telemetry"]["skipped_steps"] == 0, case
            norms = [result["telemetry"]["groups"][0]["update_norm"] for result in (a, one)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-5), case
            if "max_grad_norm" in options:
                norm = a["telemetry"]["grad_norm"]
                assert norm == pytest.approx(one["telemetry"]["grad_norm"], rel=1e-6) and norm > options["max_grad_norm"], case


def noise_worker(folder):
    """Refusals of checkpoints by how parameters are sharded and stored; the numbers of the first elements."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    refusals = []
    offsets = []
    for placement, dtype, options in NOISY:
        whole = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
        param = torch.nn.Parameter(
            distribute_tensor(whole, mesh, [{"rows": Shard(0), "columns": Shard(1)}.get(placement, Replicate())])
        )
        param.grad = torch.ones_like(param)
        opt = SOUL([param], lr=0.1, **options)
        opt.step()
        offsets.append(opt._stepper.stepped[id(opt.param_groups[0])][0].tensor_offsets[0])
        checkpoint = opt.state_dict()
        opt.load_state_dict(copy.deepcopy(checkpoint))
        del checkpoint["param_groups"][0]["noise"]  # of the first version, which had no number
        try:
            opt.load_state_dict(checkpoint)
            refusals.append("")
        except ValueError as error:
            refusals.append(str(error))
            checkpoint["param_groups"][0]["noise"] = 2  # as the message says
            opt.load_state_dict(checkpoint)
    return {"refusals": refusals, "offsets": offsets}


NOISY = [
    ("rows", torch.float32, {}),
    ("rows", torch.bfloat16, {"param_rounding": "nearest"}),
    ("whole", torch.bfloat16, {}),
    ("rows", torch.bfloat16, {}),
    ("columns", torch.float32, {"state_dtype": torch.bfloat16}),
]


@pytest.mark.slow(reason="starts processes; FSDP2 is tested always")
def test_checkpoints_of_other_noise_are_refused_where_shards_draw_it(tmp_path):
    for rank, result in enumerate(run(tmp_path, noise_worker)):
        assert result["offsets"] == [18 * rank, 18 * rank, 0, 18 * rank, (1 + rank) << 40]
        assert result["refusals"][:3] == [""] * 3
        for text in result["refusals"][3:]:
            assert text.startswith("state_dict noise: expected version 2, got 1; resume with") and "set noise = 2 in" in text


def partial_worker(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    net = parallelize_module(torch.nn.LayerNorm(6), mesh, SequenceParallel())
    net.extra = torch.nn.Parameter(distribute_tensor(torch.ones(3, 7), mesh, [Shard(1)]))
    opt = SOUL(net.parameters(), lr=0.01, max_grad_norm=0.5, rho="auto")
    for index in range(3):
        x = distribute_tensor(batch(index)[0][None], mesh, [Shard(1)])
        ((net(x) - x) ** 2).mean().backward()
        (net.extra * net.extra).sum().backward()
        opt.step()
        opt.zero_grad()
    return outcome(net, opt)


@pytest.mark.slow(reason="starts processes; FSDP2 is tested always")
def test_gradients_with_other_placements_than_their_parameters(tmp_path):
    """SequenceParallel leaves gradients that are still to be summed over the processes, for parameters that are replicated."""
    first, second = run(tmp_path, partial_worker)
    net = torch.nn.LayerNorm(6)
    net.extra = torch.nn.Parameter(torch.ones(3, 7))
    opt = SOUL(net.parameters(), lr=0.01, max_grad_norm=0.5, rho="auto")
    for index in range(3):
        x = batch(index)[0][None]
        ((net(x) - x) ** 2).mean().backward()
        (net.extra * net.extra).sum().backward()
        opt.step()
        opt.zero_grad()
    assert not differing(first["state"], second["state"])
    assert not differing(first["state"], outcome(net, opt)["state"], rtol=1e-5, atol=1e-7)
    assert first["telemetry"]["grad_norm"] == pytest.approx(opt.telemetry()["grad_norm"], rel=1e-5)


CHECKPOINTED = [
    (SophiaG, torch.float32, {"rho": "auto", "bs": 8, "bias_correction": True}),
    (SOUL, torch.bfloat16, {"rho": "auto", "capturable": True}),  # low bits and noise, which depends on the step
    (SOUL, torch.bfloat16, {"param_rounding": "stochastic", "state_dtype": torch.bfloat16}),
    (SOUL, torch.bfloat16, {"state_dtype": "8bit"}),
]
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def tensor_parallel_worker(folder):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8))
    parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(net, mesh=mesh["data"])
    opt = SOUL(net.parameters(), lr=0.1, max_grad_norm=0.05, rho="auto", backend="reference")
    net(batch(0)[0]).square().sum().backward()
    norm = torch.cat([p.grad.full_tensor().flatten() for p in net.parameters()]).norm().item()
    opt.step()
    offsets = [offset for step_group in opt._stepper.stepped[id(opt.param_groups[0])] for offset in step_group.tensor_offsets]
    result = {"norm": norm, "rho": opt.param_groups[0]["rho"].item(), "telemetry": opt.telemetry(), "offsets": offsets}
    hybrids = [hybrid(*case, folder / f"hybrid {number}") for number, case in enumerate(HYBRID)]
    return result | {"hybrid": hybrids, "blocks": blocks(mesh)}


def blocks(mesh):
    """Return a tensor cut by rows and columns, stepped with 8-bit states in shards and alone; and a refusal."""
    from torch.distributed.tensor import Shard, distribute_tensor

    tensors = [distribute_tensor(tensor, mesh, [Shard(0), Shard(1)]) for tensor in column_tensors(1)]
    try:
        column_steps(tensors[0].redistribute(mesh, [Shard(1), Shard(1)]))
    except ValueError as error:
        return (own_outcome(column_steps(*tensors)), stepped_alone(*tensors)), str(error)


HYBRID = [
    (torch.float32, BOTH),
    (torch.bfloat16, {"param_rounding": "stochastic"}),
    (torch.bfloat16, {"state_dtype": "8bit"}),
]


def hybrid(dtype, options, folder):
    """Return what HSDP makes of three steps: shards over two processes, and two copies of them. Save it too."""
    net = shard(
        make_net(dtype, options), dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    )
    opt = SOUL(net.parameters(), lr=0.01, **options)
    train(net, opt, range(3))
    dcp.save(state_dicts(net, opt), checkpoint_id=folder)
    return outcome(net, opt)


@pytest.mark.slow(reason="starts four processes")
@pytest.mark.covers("checkpoints of torch.distributed.checkpoint, for another number of processes", "HSDP")
@pytest.mark.covers("norm, clipping, rho, telemetry", "TP")
@pytest.mark.covers("norm, clipping, rho, telemetry", "HSDP")
@pytest.mark.covers("24-bit and stochastic weights", "HSDP")
@pytest.mark.covers("8-bit states", "HSDP")
def test_fsdp_over_tensor_parallelism_and_with_copies_of_shards(tmp_path):
    """Placements are _StridedShards there, which are no Shards to torch: norm and rho are those of all four processes.

    With copies of shards (HSDP) every coordinate counts once, and the steps are those of one process.
    """
    results = run(tmp_path, tensor_parallel_worker, world=4)
    for number, (dtype, options) in enumerate(HYBRID):
        net = make_net(dtype, options)
        opt = SOUL(net.parameters(), lr=0.01, **options)
        train(net, opt, range(3))
        one = outcome(net, opt)
        for got in (process["hybrid"][number] for process in results):
            tolerance = dict(rtol=1e-5, atol=1e-8) if dtype == torch.float32 else {}
            parity.elements_alike(got["state"], one["state"], **tolerance, case=named(dtype, options))
            assert got["rho"] == pytest.approx(one["rho"], rel=1e-6), options
            if "max_grad_norm" in options:
                assert got["telemetry"]["grad_norm"] == pytest.approx(one["telemetry"]["grad_norm"], rel=1e-6)
                assert got["fraction"] == pytest.approx(one["fraction"])
        net = make_net(dtype, options)
        opt = SOUL(net.parameters(), lr=9.0, **options)
        restore(net, opt, tmp_path / f"hybrid {number}")
        loaded = outcome(net, opt)["state"]
        saved = results[0]["hybrid"][number]["state"]
        parity.bit_for_bit(loaded, saved, named(dtype, options), "the four processes that saved it")
    for (own, alone), refusal in (process["blocks"] for process in results):
        parity.bit_for_bit(own, alone, "blocks", "the shard stepped alone")
        assert refusal.startswith("state_dtype: expected fp32 or bf16 where columns are sharded, and one dimension by several")
    assert all(f["telemetry"] == results[0]["telemetry"] and f["rho"] == results[0]["rho"] for f in results)
    assert results[0]["telemetry"]["grad_norm"] == pytest.approx(results[0]["norm"], rel=1e-6)
    assert [f["offsets"] for f in results] == [[0, 0], [24, 4], [12, 2], [36, 6]]  # rank 1 has the other half of the rows


def state_dicts(net, opt):
    return {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, opt)}


def restore(net, opt, folder):
    """Restore as torch.distributed.checkpoint requires: into the state_dict of the existing objects."""
    target = state_dicts(net, opt)
    dcp.load(target, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(net, target["model"])
    set_optimizer_state_dict(net, opt, target["optim"])


def checkpoint_worker(folder):
    results = []
    for number, (kind, dtype, options) in enumerate(CHECKPOINTED):
        net = shard(make_net(dtype, options))
        opt = kind(net.parameters(), lr=0.01, **options)
        before = outcome(net, opt)
        get_optimizer_state_dict(net, opt)
        fresh = before, outcome(net, opt)
        assert len(opt.state) == len(list(net.parameters()))  # DCP has made a step
        opt = kind(net.parameters(), lr=0.01, **options)
        train(net, opt, range(2))
        dcp.save(state_dicts(net, opt), checkpoint_id=folder / str(number))
        saved = outcome(net, opt)
        full = copy.deepcopy(get_optimizer_state_dict(net, opt, options=FULL))
        train(net, opt, range(2, 4))
        end = outcome(net, opt)
        net = shard(make_net(dtype, options))
        opt = kind(net.parameters(), lr=0.01, **options)
        restored = []
        for _ in range(2):  # the second time from a state that is in use
            restore(net, opt, folder / str(number))
            train(net, opt, range(2, 4))
            restored.append(outcome(net, opt))
        results.append(dict(fresh=fresh, saved=saved, full=full, end=end, restored=restored))
    return results


@pytest.mark.slow(reason="starts processes for each layout of a checkpoint")
@pytest.mark.covers("checkpoints of torch.distributed.checkpoint, for another number of processes", "FSDP2")
def test_distributed_checkpoint(tmp_path):
    """DCP initializes a fresh optimizer by a step with zero gradients and lr 0, which moves nothing. A run restored into new
    shards, or into one process, continues as an uninterrupted one."""
    first, second = run(tmp_path, checkpoint_worker)
    for number, (case, a, b) in enumerate(zip(CHECKPOINTED, first, second)):
        kind, dtype, options = case
        for rank in (a, b):
            before, after = rank["fresh"]
            assert before["rho"] == after["rho"], case
            for name, value in after["state"].items():
                assert (
                    torch.equal(value, before["state"][name])
                    if name in before["state"]
                    else name.endswith(("step", "_scale")) or not value.any()
                ), name
            for restored in rank["restored"]:
                end = rank["end"]["state"]
                parity.bit_for_bit(restored["state"], end, named(dtype, options), "the run that was not stopped")
                assert (restored["telemetry"]["groups"], restored["rho"]) == (
                    rank["end"]["telemetry"]["groups"],
                    rank["end"]["rho"],
                ), case
        assert differing(a["saved"]["state"], a["end"]["state"]), case

        for source in ("files", "full_state_dict"):
            net = make_net(dtype, options)
            opt = kind(net.parameters(), lr=9.0, **options)
            if source == "files":
                restore(net, opt, tmp_path / str(number))
            else:
                net.load_state_dict({name: a["saved"]["state"][name] for name in net.state_dict()})
                set_optimizer_state_dict(net, opt, a["full"], options=FULL)
            one = outcome(net, opt)
            parity.bit_for_bit(
                one["state"], a["saved"]["state"], f"{named(dtype, options)}, {source}", "the two processes that saved it"
            )
            assert one["rho"] == a["saved"]["rho"] and opt.param_groups[0]["lr"] == pytest.approx(0.01), (case, source)
            if dtype == torch.float32:
                train(net, opt, range(2, 4))
                assert not differing(outcome(net, opt)["state"], a["end"]["state"]), (case, source)


# Rows that 2 and 3 processes divide unevenly, and fewer rows than processes; the last two have fp32 states.
ROWS = ((5, 64), (1, 32), (4, 3, 32), (7, 33), (9,))
STORED = [
    (torch.bfloat16, {"state_dtype": "8bit"}),
    (torch.bfloat16, {"state_dtype": "8bit", "param_rounding": "stochastic", "betas": (0.9, 0.999)}),
    (torch.float32, {"state_dtype": "8bit", "bias_correction": True}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"param_rounding": "stochastic", "state_dtype": torch.bfloat16}),
]


def rows_of(placed, dtype):
    """Return a net of parameters without a forward pass; ``placed`` makes the DTensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in ROWS]
    return torch.nn.ParameterList([torch.nn.Parameter(placed(tensor)) for tensor in tensors])


def steps_of(placed, net, opt, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in net:
            param.grad = placed(torch.randn(param.shape, generator=generator).to(param.dtype))
        opt.step()
        opt.zero_grad()


def rows_worker(folder, load):
    """Steps of rows in shards; ``load``: the last ones, from what another number of processes has saved."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))

    def placed(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)])

    return {"results": rows_results(folder, placed, load), **(columns_results(mesh, folder) if not load else {})}


def rows_results(folder, placed, load=None):
    results = []
    for number, (dtype, options) in enumerate(STORED):
        net = rows_of(placed, dtype)
        opt = SOUL(net, lr=0.01, **options)
        if not load:
            steps_of(placed, net, opt, range(2))
            if load is not None:
                dcp.save(state_dicts(net, opt), checkpoint_id=folder / str(number))
        else:
            restore(net, opt, folder / str(number))
        steps_of(placed, net, opt, range(2, 4))
        published = {f"{i}.published": whole(state["hessian"]) for i, state in opt.export_published()["state"].items()}
        results.append(outcome(net, opt)["state"] | published)
    return results


# Columns of 64 are cut between groups, which then are those of rows. All others have groups of their own in each shard: two
# whose last group is shorter, shards of unequal size, and one that leaves the second process nothing.
COLUMNS = ((5, 64), (5, 96), (3, 32, 3), (3, 3, 32), (3, 1, 32))
# Half of the largest distance of two neighbouring codes, for a group whose largest magnitude is 1.
HALF_CODE = {"exp_avg": 0.0083, "hessian": 0.004}


def column_tensors(number):
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(COLUMNS[number], generator=generator) for _ in range(3)]


def column_steps(values, *grads, **options):
    """Return the optimizer of one parameter, with 8-bit states, after some steps."""
    param = torch.nn.Parameter(values.clone())
    opt = SOUL([param], lr=0.01, state_dtype="8bit", **options)
    for grad in grads:
        param.grad = grad.clone()
        opt.step()
    return opt


def weights_of_24_bits(tensors):
    """Return the fp32 values of a bf16 parameter and its low bits after a step."""
    values, grad, _ = (tensor.bfloat16() for tensor in tensors)
    ((param, state),) = column_steps(values, grad).state.items()
    return join(whole(param), whole(state["low_bits"]))


def column_outcome(opt):
    """Return the parameter and its state by name, whole, and the decoded states."""
    ((param, state),) = opt.state.items()
    decoded_states = {f"{name}, decoded": decoded(state, name) for name in HALF_CODE}
    return {name: whole(tensor) for name, tensor in {"param": param, **state, **decoded_states}.items()}


def own_outcome(opt):
    """Return what this process holds of the parameter, of codes and of scales."""
    ((param, state),) = opt.state.items()
    codes = {name: local(state[name]).clone() for name in HALF_CODE}
    scales = {f"{name}_scale": own_scales(state[f"{name}_scale"], param).clone() for name in HALF_CODE}
    return {"param": local(param).detach().clone(), **codes, **scales}


def stepped_alone(values, *grads):
    """Step what this process holds with the op, whose groups are counted from the first element; return as `own_outcome`."""
    result = {"param": local(values).clone()}
    result |= {name: torch.zeros_like(result["param"], dtype=torch.uint8) for name in HALF_CODE}
    n_bytes = -(-result["param"].numel() // 32) * 2
    result |= {f"{name}_scale": torch.zeros(n_bytes, dtype=torch.uint8) for name in HALF_CODE}
    lists = {"exp_avg_scales": [result["exp_avg_scale"]], "hessian_scales": [result["hessian_scale"]]}
    for grad in grads:
        sophia_step([result["param"]], [local(grad)], [result["exp_avg"]], [result["hessian"]], lr=0.01, beta1=0.9, beta2=0.95,
                    rho=0.04, bs=5120, weight_decay=0.1, backend="reference", **lists)  # fmt: skip
    return result


def loaded_with_warnings(opt, checkpoint):
    """Return the outcome of an optimizer that has loaded a checkpoint, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.load_state_dict(checkpoint)
    return column_outcome(opt), [str(warning.message) for warning in caught]


def columns_results(mesh, folder):
    """Steps of columns in shards, and what becomes of their states when they are loaded."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    results = []
    for number in range(len(COLUMNS)):
        tensors = [distribute_tensor(tensor, mesh, [Shard(1)]) for tensor in column_tensors(number)]
        opt = column_steps(*tensors)
        checkpoint = copy.deepcopy(opt.state_dict())
        whole_checkpoint = checkpoint | {"state": {0: {name: whole(value) for name, value in checkpoint["state"][0].items()}}}
        other = column_steps(tensors[0], tensors[2])
        results.append({
            "24 bits": weights_of_24_bits(tensors),
            "whole": column_outcome(opt),
            "own": own_outcome(opt),
            "alone": stepped_alone(*tensors),
            "offloaded": column_outcome(column_steps(*tensors, state_offload=True)),
            "checkpoint": whole_checkpoint,
            "same shards": loaded_with_warnings(other, checkpoint),
            "same shards, from whole tensors": loaded_with_warnings(other, whole_checkpoint),
            "from one process": loaded_with_warnings(other, column_steps(*column_tensors(number)).state_dict()),
        })  # fmt: skip
    dcp.save({"state": opt.state_dict()["state"]}, checkpoint_id=folder / "columns")
    with_gaps = DTensor.from_local(torch.zeros(48, 5).t(), mesh, [Shard(1)], shape=torch.Size((5, 96)), stride=(96, 1))
    try:
        SOUL([torch.nn.Parameter(with_gaps)], state_dtype="8bit")
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return {"columns": results, "with gaps": refusal}


@pytest.mark.slow(reason="starts five processes")
@pytest.mark.covers("24-bit and stochastic weights", "FSDP2")
@pytest.mark.covers("24-bit and stochastic weights", "TP")
@pytest.mark.covers("8-bit states", "FSDP2")
@pytest.mark.covers("8-bit states", "TP")
def test_rows_in_shards_are_stepped_and_resharded_bit_for_bit(tmp_path):
    """24-bit and stochastic weights, 8-bit states, on 1, 2 and 3 processes; what two have saved, three and one go on with.

    Shards of columns have 24-bit weights, with noise of their own, and 8-bit states. Between shards and one process these are
    encoded anew, with one warning.
    """
    two = run(tmp_path, rows_worker, False)
    (tmp_path / "init").unlink(missing_ok=True)
    three = run(tmp_path, rows_worker, True, world=3)
    one = rows_results(tmp_path, lambda tensor: tensor)
    again = rows_results(tmp_path, lambda tensor: tensor, load=True)
    for number, (dtype, options) in enumerate(STORED):
        for result in (*[rank["results"] for rank in (*two, *three)], again):
            parity.bit_for_bit(result[number], one[number], named(dtype, options))
    for rank in two:
        assert rank["with gaps"].startswith(
            "state_dtype: expected fp32 or bf16 where shards of columns have gaps, got '8bit' for"
        )
        for number, columns in enumerate(rank["columns"]):
            check_columns(columns, number)
    one = column_steps(*column_tensors(len(COLUMNS) - 1))
    with pytest.raises(dcp.api.CheckpointException, match="Size mismatch between saved .* for state.0.exp_avg_scale"):
        dcp.load({"state": one.state_dict()["state"]}, checkpoint_id=tmp_path / "columns", no_dist=True)


def check_columns(columns, number):
    """Compare what `columns_results` returns of one tensor with steps of one process."""
    in_rows = number == 0
    weights = weights_of_24_bits(column_tensors(number))
    error = ((columns["24 bits"] - weights).abs() / weights.abs()).max()
    parity.within("element", error, 2.0**-15, f"24 bits, {COLUMNS[number]}")  # the last of 16 bits of mantissa
    parity.bit_for_bit(columns["own"], columns["alone"], COLUMNS[number], "the shard stepped alone")  # as the tensor that it is
    assert not differing(columns["offloaded"], columns["whole"])
    for how in ("same shards", "same shards, from whole tensors"):
        outcome, messages = columns[how]
        outcome["param"] = columns["whole"]["param"]  # of another optimizer
        assert not messages and not differing(outcome, columns["whole"]), how
    one = column_steps(*column_tensors(number))
    values = column_outcome(one)
    other = column_steps(*column_tensors(number)[:2])
    for want, (outcome, messages) in (
        (columns["whole"], loaded_with_warnings(other, columns["checkpoint"])),
        (values, columns["from one process"]),
    ):
        assert len(messages) == (0 if in_rows else 1) and all("encoded anew" in text for text in messages)
        for name, half in HALF_CODE.items():
            error = (outcome[f"{name}, decoded"] - want[f"{name}, decoded"]).abs().max()
            assert error <= (0 if in_rows else half) * want[f"{name}, decoded"].abs().max(), (COLUMNS[number], name)
