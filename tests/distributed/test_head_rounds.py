"""The ops on hidden states with a head that is cut along the vocabulary and tokens of their own in every process, over gloo.

The processes divide the sequences of tests/distributed/test_head_shards.py among them, and together have the results of one.
"""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import soul_kernels
from soul import losses
from soul_kernels import LinearOptions, TokenBatch
from soul_kernels.backends import has_triton
from soul_kernels.chunks import ResolvedOptions, chunk_rows, memory_share, round_rows
from soul_kernels.errors import ArgumentError
from soul_kernels.lookup import look_up
from soul_kernels.tokens import Head
from tests.distributed.test_head_shards import OPS, OURS, VARIANTS, B, D, call, in_one_process, make
from tests.distributed.test_processes import run
from tests.support import parity
from tests.support.helpers import assert_close, loose

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")

# Sequence 2 has no label, so that the second division leaves a process without any token.
DIVISIONS = {
    "uneven": ([0, 3], [1, 2]),
    "nothing in one": ([0, 1, 3], [2]),
    "of three": ([0, 3], [2], [1]),
}
NAMES = [
    name
    for name, case in OPS.items()
    if case.get("hidden") is None and case.get("cross_entropy", {}).get("reduction") != "mean" and "memorised 5" not in name
]
N_BYTES = 200  # rows of a head and of a table whose bytes are counted
PER_SEQUENCE = ("hidden", "ref_hidden", "labels", "uniforms", "upstream", "ref_logps", "is_forget")
OWN = {
    "cross-entropy, smoothed": {"reduction": "sum", "label_smoothing": 0.2, "z_loss": 0.1, "class_weights": True},
    "cross-entropy, vocabulary 4": {"reduction": "sum", "label_smoothing": 0.2, "class_weights": True},
}


class Share:
    """An objective on one process's sequences of a larger batch."""

    def __init__(self, objective, whole):
        self.objective = objective
        self.whole = whole
        for name in ("additive", "linear", "divergence", "needs_statistics"):
            setattr(self, name, getattr(objective, name))

    def __call__(self, logps, batch):
        return self.objective(logps, batch.within(self.whole, add_up))


def add_up(value):
    total = value.clone()
    dist.all_reduce(total)
    return total


def case_of(name):
    return OPS[name] | ({"cross_entropy": OWN[name]} if name in OWN else {})


def worker(folder, variants, names, divisions, more=()):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = {
        f"{variant}, {division}, {name}": computed(name, variant, DIVISIONS[division][dist.get_rank()], mesh)
        for variant in variants
        for division in divisions
        for name in names
    }
    return results | {name: MORE[name](mesh) for name in more}


def computed(name, variant, sequences, mesh):
    """Return results and gradients of this process's sequences, and the whole gradients of the head."""
    from torch.distributed.tensor import Shard, distribute_tensor

    dtype, options, *_ = VARIANTS[variant]
    case = case_of(name)
    inputs = make(case, dtype)
    whole = TokenBatch.from_labels(inputs["labels"], inputs["is_forget"])
    for key in PER_SEQUENCE:
        inputs[key] = inputs[key][sequences]
    if "strengths" in case:
        inputs["strengths"] = case["strengths"][sequences]
    for key in ("weight", "bias", *(() if case.get("whole reference") else ("ref_weight", "ref_bias"))):
        inputs[key] = None if inputs[key] is None else distribute_tensor(inputs[key], mesh, [Shard(0)])
    if "objective" in case:
        inputs["objective"] = Share(case["objective"], whole)
    if name.startswith("gnb"):
        inputs["n_tokens"] = whole.mask.sum()
    leaves = [key for key in ("hidden", "weight", "bias") if inputs[key] is not None]
    for key in leaves:
        inputs[key].requires_grad_(key == "hidden" or not case.get("frozen"))
    # Several rounds: a process has 2 rows in each.
    chunked = {"chunk_bytes": 4 * 64 * 4 * (2 if "kind" in case else 1), "own_tokens": True, **options}
    if case.get("padded"):
        chunked["token_indices"] = torch.arange(inputs["labels"].numel())
    results, loss = call(name, case, inputs, map(loose, OURS), chunked)
    if loss is not None:
        loss.backward()
    gradients = {key: inputs[key].grad for key in leaves if inputs[key].grad is not None}
    held = gradients["weight"].to_local().nbytes if "weight" in gradients else 0
    whole_gradients = {key: g.full_tensor() if hasattr(g, "full_tensor") else g for key, g in gradients.items()}
    return {"results": [r.detach() for r in results], "gradients": whole_gradients, "held": held}


def of_factors(mesh):
    """Return the error of a loss that each process multiplies by a number of its own."""
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = distribute_tensor(torch.randn(5, D), mesh, [Shard(0)]).requires_grad_()
    labels = torch.ones(B, 3, dtype=torch.int64)
    head = Head(weight, own_tokens=True)
    loss = soul_kernels.linear_objective(torch.randn(B, 3, D), head, labels, losses.PO(alpha=0.0))
    try:
        (loss * (1 + dist.get_rank())).backward()
    except ArgumentError as error:
        return str(error)
    return ""


def of_embeddings(mesh):
    """Return embeddings of this process's tokens, and the whole gradient of the table and that of its own function."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(5)
    table, upstream = torch.randn(11, D), torch.randn(6, 2, D)
    ids = torch.tensor([[0, 3], [10, 10], [4, 3], [7, 5], [5, 6], [10, 0]])
    by_count = {}
    for n_own in (4, 6):  # of 6 rows in the first process: the other one has 2 or none
        start, stop = ((0, n_own), (n_own, 6))[dist.get_rank()]
        weight = distribute_tensor(table, mesh, [Shard(0)]).requires_grad_()
        values = look_up(ids[start:stop], weight, padding_idx=3)
        (values * upstream[start:stop]).sum().backward()
        whole = table.clone().requires_grad_()
        want = torch.nn.functional.embedding(ids, whole, padding_idx=3)
        (want * upstream).sum().backward()
        by_count[n_own] = {
            "values": values.detach(),
            "want": want.detach()[start:stop],
            "gradient": weight.grad.full_tensor(),
            "want gradient": whole.grad,
        }
    return by_count


class Largest(TorchDispatchMode):
    """Records the largest fp32 tensor with D columns that an operation returns, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and tensor.shape[1:] == (D,):
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


def of_bytes(mesh):
    """Return the bytes of the largest fp32 gradient of the head that a step makes here: of a whole head, and of one in shards;
    and of embeddings in shards."""
    from torch.distributed.tensor import Shard, distribute_tensor

    sizes = []
    for own_tokens in (False, True):
        weight = torch.randn(N_BYTES, D, dtype=torch.bfloat16)
        weight = (distribute_tensor(weight, mesh, [Shard(0)]) if own_tokens else weight).requires_grad_()
        hidden = torch.randn(B, 3, D, dtype=torch.bfloat16, requires_grad=True)
        head = Head(weight, own_tokens=own_tokens)
        with Largest() as largest:
            loss = soul_kernels.linear_objective(
                hidden,
                head,
                torch.ones(B, 3, dtype=torch.int64),
                losses.NPO(alpha=0.0),
                ref_logps=torch.zeros(B),
                options=LinearOptions(backend="torch"),
            )
            loss.backward()
        sizes.append(largest.bytes)
    table = distribute_tensor(torch.randn(N_BYTES, D, dtype=torch.bfloat16), mesh, [Shard(0)]).requires_grad_()
    with Largest() as largest:
        look_up(torch.arange(6), table).sum().backward()
    return [*sizes, largest.bytes]


MORE = {"factors": of_factors, "bytes": of_bytes, "embeddings": of_embeddings}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), worker, ["fp64"], NAMES, ["uneven", "nothing in one"], list(MORE))


def check(processes, variant, division, name):
    """Each process has the results of its sequences, and losses and gradients of the head add up to those of one process."""
    _, _, limit, gradient_limit = VARIANTS[variant]
    want, want_gradients = in_one_process(name, variant, case_of(name))
    got = [process[f"{variant}, {division}, {name}"] for process in processes]
    order = torch.tensor([sequence for sequences in DIVISIONS[division] for sequence in sequences]).argsort()
    for number, expected in enumerate(want):
        values = [process["results"][number] for process in got]
        value = torch.stack(values).sum(0) if expected.dim() == 0 else torch.cat(values)[order]
        assert_close(value, expected, 0.0 if expected.dtype == torch.int64 else limit, name)
    for process in got:
        assert process["gradients"].keys() == want_gradients.keys()
    for key, expected in want_gradients.items():
        for process in got if key != "hidden" else ():
            assert_close(process["gradients"][key], expected, gradient_limit, f"gradient of {key}")
        if key == "hidden":
            gradient = torch.cat([process["gradients"][key] for process in got])[order]
            assert_close(gradient, expected, gradient_limit, "gradient of hidden")
    if "weight" in want_gradients:
        assert sum(process["held"] for process in got) == want_gradients["weight"].numel() * VARIANTS[variant][0].itemsize


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("division", ["uneven", "nothing in one"])
def test_two_processes_with_tokens_of_their_own_are_one(division, name, results):
    check(results, "fp64", division, name)


def test_a_loss_with_another_factor_in_each_process_is_refused(results):
    """The sum over their tokens is formed before the factors are known."""
    for process in results:
        assert process["factors"].startswith("loss: expected the same upstream gradient in all processes that share a head, ")


def test_embeddings_in_shards_are_those_of_the_whole_table(results):
    """Bit for bit, and so is the gradient but for the order of its sums; a row of padding gets none."""
    for process in results:
        for got in process["embeddings"].values():
            assert torch.equal(got["values"], got["want"])
            assert_close(got["gradient"], got["want gradient"], 1e-6, "gradient")
            assert not got["gradient"][3].any()


@pytest.mark.counts
def test_no_process_ever_has_the_whole_gradient_of_head_or_embeddings(results):
    """Of two processes each has half of it: the fp32 tensor of a whole head has V D 4 bytes. The embeddings' has a row for all
    tokens of other processes."""
    for process in results:
        assert process["bytes"] == [N_BYTES * D * 4, N_BYTES // 2 * D * 4, (N_BYTES // 2 + 1) * D * 4]
        what = f"fp32 gradient of a head of {N_BYTES:,} x {D}, in each of two processes; head in shards"
        parity.count(what, *process["bytes"][:2])


def test_hidden_states_of_a_round_take_no_more_memory_than_its_logits():
    """With LLaMA-3.1-70B on cards of 80 GB: where n processes put in as many rows as their logits allow, 64 of them would have
    hidden states of 12.9 GB."""
    options = ResolvedOptions(torch.bfloat16, torch.float32, None)
    budget, width = memory_share(80e9), 8192
    for n, want, of_logits in ((8, 4880, 4880), (64, 800, 4800)):
        columns = -(-128256 // n)
        assert round_rows(columns, width, options, False, budget, n) == want
        assert chunk_rows(columns, options, False, budget) // n == of_logits
        assert want * n * width * (2 + 4) <= budget
    assert round_rows(4, 10**9, options, False, budget, 1000) == 1


@pytest.mark.slow(reason="starts processes that run kernels in Triton's interpreter")
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_kernels_in_rounds(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = ["objective", "objective, lowered labels", "gnb", "statistics", "cross-entropy, smoothed"]
    names = [name for name in names if name in NAMES]
    processes = run(tmp_path, worker, ["kernels"], names, ["of three"], world=3, start_method="spawn")
    for name in names:
        check(processes, "kernels", "of three", name)


def test_what_does_not_go_with_tokens_of_their_own_is_refused():
    hidden, weight, labels = torch.randn(B, 3, D), torch.randn(5, D), torch.ones(B, 3, dtype=torch.int64)
    with pytest.raises(ArgumentError, match="weight: expected a head in shards with own_tokens, got a plain tensor; leave"):
        soul_kernels.linear_logprob(hidden, Head(weight, own_tokens=True), labels, options=LinearOptions())
