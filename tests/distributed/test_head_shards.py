"""The ops on hidden states with a head that is cut along the vocabulary, in 2 and 3 processes, over gloo on the CPU.

Each set of processes computes all cases, and a test compares the results with the reference in fp64 in one process.
"""

import pytest
import torch
import torch.distributed as dist

import soul_kernels
from soul import losses
from soul_kernels import Reference
from soul_kernels.reference import linear_gnb as gnb_reference
from soul_kernels.reference import linear_kl as kl_reference
from soul_kernels.reference import linear_loss as loss_reference
from tests.distributed.test_processes import run
from tests.support import tolerances as tol
from tests.support.helpers import assert_close, assert_rows_close, loose

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")

B, T, D = 4, 7, 16
STRENGTHS = torch.tensor([0.0, 2.0, 5.0, 1.0])
# 131 rows are cut unevenly; of 4 rows, 3 processes have 2, 2 and 0; of 1 row only the first process has one.
OPS = {
    "logprob": {},
    "logprob, vocabulary 4": {"n_vocab": 4},
    "logprob, vocabulary 1": {"n_vocab": 1},
    "logprob, frozen head": {"frozen": True},
    "logprob, replicated hidden": {"hidden": "replicated"},
    "logprob, sequences in shards": {"hidden": "sequences", "bias": True},
    "logprob, tokens in shards": {"hidden": "tokens", "bias": True},
    "objective": {"objective": losses.NPO(beta=0.2, gamma=0.7, alpha=1.3), "bias": True},
    "objective, two sweeps": {"objective": losses.NPO(beta=0.2, reduction="token_mean"), "n_vocab": 4},
    "objective, linear": {"objective": losses.GradDiff(alpha=1.3), "hidden": "tokens"},
    "objective, divergence of some": {"objective": losses.KLMin(alpha=0.7), "bias": True},
    "objective, lowered labels": {"objective": losses.UNDIAL(beta=3.0, alpha=0.5), "hidden": "tokens"},
    "kl": {"kind": "kl", "bias": True},
    "kl, lowered labels": {"kind": "kl", "strengths": STRENGTHS},
    "kl, vocabulary 4": {"kind": "kl", "n_vocab": 4},
    "reverse_kl": {"kind": "reverse_kl", "strengths": STRENGTHS, "whole reference": True},
    "jsd": {"kind": "jsd", "beta": 0.3, "hidden": "tokens"},
    "soul_kl": {"kind": "soul_kl", "n_vocab": 4},
    "kl, frozen head of both": {"kind": "kl", "frozen": True, "shared": True},
    "gnb": {"bias": True},
    "gnb, vocabulary 4": {"n_vocab": 4, "hidden": "tokens"},
    "gnb, vocabulary 1": {"n_vocab": 1},
}
CAPPED = {"logit_scale": 0.7, "softcap": 8.0}
# dtype and options of a backend -> the largest errors of values and of gradients.
VARIANTS = {
    "fp64": (torch.float64, {"backend": "torch"}, 1e-12, 1e-11),
    "fp32": (torch.float32, {"backend": "torch", **CAPPED}, tol.GRAD_OBJECTIVE, tol.GRAD_OBJECTIVE),
    "bf16": (torch.bfloat16, {"backend": "torch"}, tol.GRAD_OBJECTIVE, tol.GRAD_BF16),
    "kernels": (torch.float32, {"backend": "triton", **CAPPED}, tol.GRAD_OBJECTIVE, tol.GRAD_OBJECTIVE),
}


def make(case, dtype):
    """Return the inputs of a case, the same in every process: ragged sequences, one of them without a label."""
    generator = torch.Generator().manual_seed(7)
    n_vocab = case.get("n_vocab", 131)
    inputs = {
        "hidden": torch.randn(B, T, D, generator=generator),
        "weight": torch.randn(n_vocab, D, generator=generator) * 3 / D**0.5,
        "bias": torch.randn(n_vocab, generator=generator) if case.get("bias") else None,
        "ref_hidden": torch.randn(B, T, D, generator=generator),
        "ref_weight": torch.randn(n_vocab, D, generator=generator) * 3 / D**0.5,
        "upstream": torch.randn(B, T, generator=generator),
        "ref_logps": torch.randn(B, generator=generator) - 20,
    }
    inputs = {name: None if value is None else value.to(dtype) for name, value in inputs.items()}
    labels = torch.randint(n_vocab, (B, T), generator=generator)
    labels[0, :3] = labels[1, 5:] = labels[2] = -100
    return inputs | {"labels": labels, "uniforms": torch.rand(B, T, generator=generator)}


def call(name, case, inputs, ops, options):
    """Call the op of a case with hidden states and head, of which some are in shards; return its results and its loss."""
    logprob, objective, kl, gnb = ops
    head = {name: inputs[name] for name in ("hidden", "weight", "bias")} | options
    labels = inputs["labels"]
    reference = Reference(inputs["ref_hidden"], None if case.get("shared") else inputs["ref_weight"])
    if name.startswith("logprob"):
        values = logprob(**head, labels=labels)
        return [values], (values * inputs["upstream"]).sum()
    if name.startswith("gnb"):
        loss, drawn = gnb(**head, keep=labels != -100, uniforms=inputs["uniforms"])
        return [loss, drawn], 3 * loss
    if "objective" in case:
        loss, logps = objective(
            **head, labels=labels, objective=case["objective"], is_forget=torch.arange(B) % 2 == 0, reference=reference,
            ref_logps=inputs["ref_logps"].to(loss_dtype(inputs)),
        )  # fmt: skip
        return [loss, logps], 3 * loss
    divergence = {key: case[key] for key in ("kind", "beta", "strengths") if key in case}
    values = kl(**head, labels=labels, reference=reference, **divergence)
    return [values], (values * inputs["upstream"]).sum()


def loss_dtype(inputs):
    return torch.promote_types(inputs["hidden"].dtype, torch.float32)


def returning_logps(*args, **kwargs):
    return soul_kernels.linear_objective(*args, return_logps=True, **kwargs)


def in_one_process(name, variant):
    """Return results and gradients of the reference in fp64, for inputs that have been rounded to the dtype of a variant."""
    dtype, options, *_ = VARIANTS[variant]
    case = OPS[name]
    inputs = {
        key: value.double() if value is not None and value.is_floating_point() and key != "uniforms" else value
        for key, value in make(case, dtype).items()
    }
    trained = ("hidden",) if case.get("frozen") else ("hidden", "weight", "bias")
    leaves = [key for key in trained if inputs[key] is not None]
    for key in leaves:
        inputs[key].requires_grad_()
    ops = (loss_reference.linear_logprob, loss_reference.linear_objective, kl_reference.linear_kl, gnb_reference.linear_gnb)
    options = {key: value for key, value in options.items() if key != "backend"}
    results, loss = call(name, case, inputs, map(loose, ops), options)
    return results, dict(zip(leaves, torch.autograd.grad(loss, [inputs[key] for key in leaves])))


def placed(case, inputs, mesh):
    """Cut the inputs of a case over the mesh."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    hidden = {"replicated": Replicate(), "sequences": Shard(0), "tokens": Shard(1)}.get(case.get("hidden"))
    rows = Shard(0)
    placements = {"hidden": hidden, "ref_hidden": hidden, "weight": rows, "bias": rows}
    if not case.get("whole reference"):
        placements["ref_weight"] = rows
    cut = {
        key: distribute_tensor(inputs[key], mesh, [placement])
        for key, placement in placements.items()
        if placement is not None and inputs[key] is not None
    }
    return inputs | cut


def worker(folder, variants):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ops = (soul_kernels.linear_logprob, returning_logps, soul_kernels.linear_kl, soul_kernels.linear_gnb)
    found = {}
    for variant in variants:
        dtype, options, *_ = VARIANTS[variant]
        for name, case in OPS.items():
            inputs = placed(case, make(case, dtype), mesh)
            leaves = [key for key in ("hidden", "weight", "bias") if inputs[key] is not None]
            for key in leaves:
                inputs[key].requires_grad_(key == "hidden" or not case.get("frozen"))
            chunked = {"chunk_bytes": 9 * 64 * 4 * (2 if "kind" in case else 1), **options}  # three chunks
            results, loss = call(name, case, inputs, map(loose, ops), chunked)
            loss.backward()
            gradients = {key: inputs[key].grad for key in leaves if inputs[key].grad is not None}
            held = gradients["weight"].to_local().nbytes if "weight" in gradients else 0
            whole = {key: g.full_tensor() if hasattr(g, "full_tensor") else g for key, g in gradients.items()}
            found[f"{variant}, {name}"] = {"results": [r.detach() for r in results], "gradients": whole, "held": held}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return for each number of processes what they have computed."""
    worlds = {2: ["fp64", "fp32"], 3: ["fp64", "bf16"]}
    return {n: run(tmp_path_factory.mktemp(f"of_{n}"), worker, variants, world=n) for n, variants in worlds.items()}


def check(processes, variant, name):
    """Every process has the results of one; together they have its gradients, and each holds its rows of that of the head."""
    dtype, _, limit, gradient_limit = VARIANTS[variant]
    want, want_gradients = in_one_process(name, variant)
    rank_0 = processes[0][f"{variant}, {name}"]
    for process in processes:
        got = process[f"{variant}, {name}"]
        for value, first, expected in zip(got["results"], rank_0["results"], want, strict=True):
            assert torch.equal(value, first)  # bit for bit, so that all processes decide alike
            assert_close(value, expected, 0.0 if expected.dtype == torch.int64 else limit, name)
        assert got["gradients"].keys() == want_gradients.keys()
        for key, expected in want_gradients.items():
            assert got["gradients"][key].dtype == dtype
            assert_close(got["gradients"][key], expected, gradient_limit, f"gradient of {key}")
            if key == "weight" and variant == "fp32":
                assert_rows_close(got["gradients"][key], expected, tol.WORST_ROW_KL, f"gradient of {key}")
    if "weight" in want_gradients:
        n_vocab = OPS[name].get("n_vocab", 131)
        largest = -(-n_vocab // len(processes))
        held = [process[f"{variant}, {name}"]["held"] for process in processes]
        assert sum(held) == n_vocab * D * dtype.itemsize and held[0] == largest * D * dtype.itemsize


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("world, variant", [(2, "fp64"), (2, "fp32"), (3, "fp64"), (3, "bf16")])
def test_processes_are_one(world, variant, name, results):
    check(results[world], variant, name)
