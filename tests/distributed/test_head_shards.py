"""The ops on hidden states with a head that is cut along the vocabulary, in 2 and 3 processes, over gloo on the CPU.

Each set of processes computes all cases, and a test compares the results with the reference in fp64 in one process.
"""

import copy
import importlib
import pathlib
import tempfile

import pytest
import torch
import torch.distributed as dist

import soul
import soul_kernels
from soul import losses
from soul_kernels import LinearOptions, Reference, linear_logprob
from soul_kernels.backends import has_triton
from soul_kernels.errors import ArgumentError
from soul_kernels.reference import linear_cross_entropy as cross_entropy_reference
from soul_kernels.reference import linear_gnb as gnb_reference
from soul_kernels.reference import linear_kl as kl_reference
from soul_kernels.reference import linear_loss as loss_reference
from tests.distributed.test_processes import run
from tests.support import parity
from tests.support import tolerances as tol
from tests.support.helpers import assert_close, assert_rows_close, loose, mutant

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")

B, T, D = 4, 7, 16
STRENGTHS = torch.tensor([0.0, 2.0, 5.0, 1.0])
# 131 rows are cut unevenly; of 4 rows, 3 processes have 2, 2 and 0; of 1 row only the first process has one.
OPS = {
    "logprob": {},
    "logprob, vocabulary 4": {"n_vocab": 4},
    "logprob, vocabulary 1": {"n_vocab": 1},
    "logprob, frozen head": {"frozen": True},
    "logprob, padded": {"padded": True},  # rows without a label
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
    "kl, padded": {"kind": "kl", "n_vocab": 4, "strengths": STRENGTHS, "padded": True},
    "reverse_kl": {"kind": "reverse_kl", "strengths": STRENGTHS, "whole reference": True},
    "jsd": {"kind": "jsd", "beta": 0.3, "hidden": "tokens"},
    "soul_kl": {"kind": "soul_kl", "n_vocab": 4},
    "kl, frozen head of both": {"kind": "kl", "frozen": True, "shared": True},
    "gnb": {"bias": True},
    "gnb, padded": {"n_vocab": 4, "hidden": "tokens", "padded": True},
    "gnb, vocabulary 1": {"n_vocab": 1},
    "statistics": {"bias": True},
    "statistics, vocabulary 4": {"n_vocab": 4, "padded": True},
    "objective, statistics": {"objective": losses.CEU(alpha=0.7), "bias": True},
    "cross-entropy": {"cross_entropy": {"reduction": "mean"}, "hidden": "tokens"},
    "cross-entropy, smoothed": {"cross_entropy": {"label_smoothing": 0.2, "z_loss": 0.1, "class_weights": True}, "bias": True},
    "cross-entropy, vocabulary 4": {"cross_entropy": {"label_smoothing": 0.2, "class_weights": True}, "n_vocab": 4},
    "cross-entropy of tokens": {
        "cross_entropy": {"reduction": "none", "label_smoothing": 0.2, "class_weights": True},
        "lse": True,
    },
}
# 1 - p of the label is 1e-10 or so at every token; the label is in the first shard or in the last.
MEMORISED = {
    f"{op}, memorised {label}": {"label": label, "bias": True, **case}
    for label in (5, 130)
    for op, case in {
        "logprob": {},
        "objective": {"objective": losses.NPO(beta=0.2, alpha=1.3)},
        "kl": {"kind": "kl"},
        "statistics": {},
        "objective, statistics": {"objective": losses.CEU(ignore_first=0, alpha=0.0)},
    }.items()
}
OPS |= MEMORISED
REFERENCE = "the reference in fp64 in one process"
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
        "ref_bias": None,
        "upstream": torch.randn(B, T, generator=generator),
        "ref_logps": torch.randn(B, generator=generator) - 20,
    }
    inputs = {name: None if value is None else value.to(dtype) for name, value in inputs.items()}
    labels = torch.randint(n_vocab, (B, T), generator=generator)
    if "label" in case:
        labels.fill_(case["label"])
        row = torch.tensor(case["label"])
        for name in ("hidden", "ref_hidden", "bias"):
            inputs[name] = inputs[name] / 10
        for name in ("weight", "ref_weight"):
            inputs[name].index_fill_(0, row, 0.0)
        inputs["ref_bias"] = inputs["bias"].index_fill(0, row, 27.0)
        inputs["bias"].index_fill_(0, row, 28.0)
    labels[0, :3] = labels[1, 5:] = labels[2] = -100
    inputs |= {"labels": labels, "uniforms": torch.rand(B, T, generator=generator), "is_forget": torch.arange(B) % 2 == 0}
    return inputs | {"class_weights": torch.rand(n_vocab, generator=generator).to(dtype)}


def call(name, case, inputs, ops, options):
    """Call the op of a case with hidden states and head, of which some are in shards; return its results and its loss."""
    logprob, objective, kl, gnb, statistics, cross_entropy = ops
    head = {name: inputs[name] for name in ("hidden", "weight", "bias")} | options
    labels = inputs["labels"]
    reference = Reference(inputs["ref_hidden"], None if case.get("shared") else inputs["ref_weight"], inputs["ref_bias"])
    if name.startswith("logprob"):
        values = logprob(**head, labels=labels)
        return [values], (values * inputs["upstream"]).sum()
    if name.startswith("gnb"):
        mean = {"n_tokens": inputs["n_tokens"]} if "n_tokens" in inputs else {}
        loss, drawn = gnb(**head, keep=labels != -100, uniforms=inputs["uniforms"], **mean)
        return [loss, drawn], 3 * loss
    if name.startswith("statistics"):
        return [*statistics(**head, labels=labels)], None
    if "cross_entropy" in case:
        choices = dict(case["cross_entropy"])
        if "class_weights" in choices:
            choices["class_weights"] = inputs["class_weights"]
        values, lse, predicted = cross_entropy(**head, labels=labels, return_lse="lse" in case, **choices)
        if "lse" in case:
            return [values, predicted, lse], ((values + lse) * inputs["upstream"]).sum()
        return [values, predicted], 3 * values
    if "objective" in case:
        loss, logps = objective(
            **head, labels=labels, objective=inputs.get("objective", case["objective"]), is_forget=inputs["is_forget"],
            reference=reference, ref_logps=inputs["ref_logps"].to(loss_dtype(inputs)),
        )  # fmt: skip
        return [loss, logps], 3 * loss
    divergence = {key: inputs.get(key, case[key]) for key in ("kind", "beta", "strengths") if key in case}
    values = kl(**head, labels=labels, reference=reference, **divergence)
    return [values], (values * inputs["upstream"]).sum()


def loss_dtype(inputs):
    return torch.promote_types(inputs["hidden"].dtype, torch.float32)


def returning_logps(*args, **kwargs):
    return soul_kernels.linear_objective(*args, return_logps=True, **kwargs)


def cross_entropy(*args, **kwargs):
    values, *lse, predictions = soul_kernels.linear_cross_entropy(*args, return_predictions=True, **kwargs)
    return values, lse[0] if lse else None, predictions.ids


def reference_cross_entropy(*args, return_lse, **kwargs):
    return cross_entropy_reference.linear_cross_entropy(*args, **kwargs)


OURS = (
    soul_kernels.linear_logprob, returning_logps, soul_kernels.linear_kl, soul_kernels.linear_gnb,
    soul_kernels.linear_statistics, cross_entropy,
)  # fmt: skip
REFERENCES = (
    loss_reference.linear_logprob, loss_reference.linear_objective, kl_reference.linear_kl, gnb_reference.linear_gnb,
    loss_reference.linear_statistics, reference_cross_entropy,
)  # fmt: skip


def in_one_process(name, variant, case=None):
    """Return results and gradients of the reference in fp64, for inputs that have been rounded to the dtype of a variant."""
    dtype, options, *_ = VARIANTS[variant]
    case = OPS[name] if case is None else case
    inputs = {
        key: value.double() if value is not None and value.is_floating_point() and key != "uniforms" else value
        for key, value in make(case, dtype).items()
    }
    trained = ["hidden"] if case.get("frozen") else ["hidden", "weight", "bias"]
    leaves = [key for key in trained if inputs[key] is not None]
    for key in leaves:
        inputs[key].requires_grad_()
    options = {key: value for key, value in options.items() if key != "backend"}
    results, loss = call(name, case, inputs, map(loose, REFERENCES), options)
    gradients = [] if loss is None else torch.autograd.grad(loss, [inputs[key] for key in leaves])
    return results, dict(zip(leaves, gradients))


def placed(case, inputs, mesh):
    """Cut the inputs of a case over the mesh."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    hidden = {"replicated": Replicate(), "sequences": Shard(0), "tokens": Shard(1)}.get(case.get("hidden"))
    rows = Shard(0)
    placements = {"hidden": hidden, "ref_hidden": hidden, "weight": rows, "bias": rows}
    if not case.get("whole reference"):
        placements |= {"ref_weight": rows, "ref_bias": rows}
    cut = {
        key: distribute_tensor(inputs[key], mesh, [Replicate()] * (mesh.ndim - 1) + [placement])
        for key, placement in placements.items()
        if placement is not None and inputs[key] is not None
    }
    return inputs | cut


def worker(folder, variants, names, more):
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size()
    # The vocabulary is cut along the last dimension.
    shape, names_of_dims = ((world,), ("vocabulary",)) if world == 2 else ((1, world), ("replicas", "vocabulary"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names_of_dims)
    by_name = {name: MORE[name](mesh) for name in more}
    return by_name | {f"{variant}, {name}": computed(name, variant, mesh) for variant in variants for name in names}


def computed(name, variant, mesh):
    """Return results, whole gradients, and the bytes of the head's gradient that are here."""
    dtype, options, *_ = VARIANTS[variant]
    case = OPS[name]
    inputs = placed(case, make(case, dtype), mesh)
    leaves = [key for key in ("hidden", "weight", "bias") if inputs[key] is not None]
    for key in leaves:
        inputs[key].requires_grad_(key == "hidden" or not case.get("frozen"))
    chunked = {"chunk_bytes": 9 * 64 * 4 * (2 if "kind" in case else 1), **options}  # three chunks
    if case.get("padded"):
        chunked["token_indices"] = torch.arange(B * T)
    results, loss = call(name, case, inputs, map(loose, OURS), chunked)
    if loss is not None:
        loss.backward()
    gradients = {key: inputs[key].grad for key in leaves if inputs[key].grad is not None}
    held = gradients["weight"].to_local().nbytes if "weight" in gradients else 0
    whole = {key: g.full_tensor() if hasattr(g, "full_tensor") else g for key, g in gradients.items()}
    return {"results": [r.detach() for r in results], "gradients": whole, "held": held}


def drawn_by_generator(mesh):
    """Return labels from uniform numbers that every process would draw differently."""
    inputs = placed({}, make({}, torch.float64), mesh)
    torch.manual_seed(100 + dist.get_rank())
    return labels_of_gnb(inputs)


def labels_of_gnb(inputs):
    options = LinearOptions(backend="torch")
    return soul_kernels.linear_gnb(inputs["hidden"], inputs["weight"], inputs["labels"] != -100, options=options)[1]


LAYOUTS = {  # options of ColwiseParallel
    "gathered": lambda replicate: {"output_layouts": replicate},
    "gathered DTensor": lambda replicate: {"output_layouts": replicate, "use_local_output": False},
    "in shards": lambda replicate: {},
    "DTensor in shards": lambda replicate: {"use_local_output": False},
}
MODEL_OBJECTIVES = {"npo": losses.NPO(beta=0.2, alpha=1.3), "klmin": losses.KLMin(alpha=0.7)}


def model_and_batch(family):
    """Return a model, a reference model with other weights, and a batch, the same in every process."""
    from tests.support.models import tiny_model  # other cases need no transformers, which takes each process seconds to import

    model = tiny_model(family)
    ref_model = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in ref_model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    sides = {}
    for side in ("forget", "retain"):
        ids = torch.randint(2, 300, (2, 9))
        sides[side] = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 3, -100)}
    return model, ref_model, sides


def of_models(mesh):
    """Return loss, gradients and bytes of the head's gradient for models whose head ColwiseParallel has cut."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    by_layout = {}
    for (layout, options), (name, objective) in zip(LAYOUTS.items(), 2 * list(MODEL_OBJECTIVES.items()), strict=True):
        family = "llama, untied" if name == "npo" else "phi, head with a bias"
        model, ref_model, batch = model_and_batch(family)
        for each in (model, ref_model):
            parallelize_module(each, mesh["vocabulary"], {"lm_head": ColwiseParallel(**options(Replicate()))})
        loss = soul.unlearning_loss(model, batch, objective, ref_model=ref_model)
        loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        held = gradients["lm_head.weight"].to_local().nbytes
        whole = {key: g.full_tensor() if hasattr(g, "full_tensor") else g for key, g in gradients.items()}
        by_layout[layout] = {"family": family, "objective": name, "loss": loss.detach(), "gradients": whole, "held": held}
    return by_layout


# Faults of the functions that combine shards -> a case that notices them.
MUTANTS = {
    ("-logp.exp())", "logp.exp())"): "objective",
    ("statistics[LOGP], logp)", "statistics[LOGP], statistics[LOGP])"): "reverse_kl",
    ("torch.where(mine, own[ONE_MINUS_P], 1.0)", "1.0"): "logprob, memorised 5",  # the label stays in the sum
    ("lowered(ref_statistics, labels, strengths)", "lowered(ref_statistics, labels, None)"): "kl, lowered labels",
    ("add_up(self.shard, divergences)", "None"): "kl",
    ("(uniforms - before) / p", "uniforms"): "gnb",
    ("drawn + self.shard.start", "drawn"): "gnb",
}


def of_mutants(mesh):
    """Return what each mutant computes in its case."""
    rows = importlib.import_module("soul_kernels._head.rows")
    functions = rows.ShardFunctions
    by_mutant = {}
    for number, ((old, new), name) in enumerate(MUTANTS.items()):
        with tempfile.TemporaryDirectory() as folder:
            rows.ShardFunctions = mutant("soul_kernels._head.shards", old, new, pathlib.Path(folder)).ShardFunctions
        by_mutant[str(number)] = computed(name, "fp64", mesh)
    rows.ShardFunctions = functions
    return by_mutant


MORE = {"drawn by generator": drawn_by_generator, "models": of_models, "mutants": of_mutants}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what two processes have computed."""
    return run(tmp_path_factory.mktemp("two"), worker, ["fp64", "fp32"], list(OPS), ["drawn by generator", "mutants"])


@pytest.fixture(scope="module")
def results_of_three(tmp_path_factory):
    """Return what three processes have computed."""
    return run(tmp_path_factory.mktemp("three"), worker, ["fp64", "bf16"], list(OPS), ["models"], world=3)


def check(processes, variant, name):
    """Every process has the results of one; together they have its gradients, and each holds its rows of that of the head."""
    dtype, _, limit, gradient_limit = VARIANTS[variant]
    if name in MEMORISED and dtype != torch.float64:
        limit, gradient_limit = 2 * tol.ONE_MINUS_P, max(2 * tol.ONE_MINUS_P, gradient_limit)
    want, want_gradients = in_one_process(name, variant)
    rank_0 = processes[0][f"{variant}, {name}"]
    for process in processes:
        got = process[f"{variant}, {name}"]
        for value, first, expected in zip(got["results"], rank_0["results"], want, strict=True):
            assert torch.equal(value, first)  # bit for bit, so that all processes decide alike
            if expected.dtype == torch.int64:
                parity.bit_for_bit(value, expected, f"{variant}, {name}", REFERENCE)
            else:
                parity.norms_alike(value, expected, limit, f"{variant}, {name}", REFERENCE)
        assert got["gradients"].keys() == want_gradients.keys()
        for key, expected in want_gradients.items():
            assert got["gradients"][key].dtype == dtype
            parity.norms_alike(
                got["gradients"][key], expected, gradient_limit, f"{variant}, {name}, gradient of {key}", REFERENCE
            )
            if key == "weight" and variant == "fp32":
                assert_rows_close(got["gradients"][key], expected, tol.WORST_ROW_KL, f"gradient of {key}")
    if "weight" in want_gradients:
        n_vocab = OPS[name].get("n_vocab", 131)
        largest = -(-n_vocab // len(processes))
        held = [process[f"{variant}, {name}"]["held"] for process in processes]
        assert sum(held) == n_vocab * D * dtype.itemsize and held[0] == largest * D * dtype.itemsize


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("variant", ["fp64", "fp32"])
@pytest.mark.covers("loss of a head along the vocabulary", "TP")
def test_two_processes_are_one(variant, name, results):
    check(results, variant, name)


@pytest.mark.slow(reason="starts processes; two are tested always")
def test_three_processes_are_one(results_of_three):
    """Of which one has no rows of a small vocabulary; the vocabulary is cut along one of two dimensions of a mesh."""
    for variant in ("fp64", "bf16"):
        for name in OPS:
            check(results_of_three, variant, name)


def test_mutants_do_not_pass(results):
    for number, name in enumerate(MUTANTS.values()):
        with pytest.raises(AssertionError):
            check([{f"fp64, {name}": process["mutants"][str(number)]} for process in results], "fp64", name)


def test_one_process_draws_the_uniform_numbers_for_all(results):
    drawn = [process["drawn by generator"] for process in results]
    torch.manual_seed(100)
    want = labels_of_gnb(make({}, torch.float64))
    assert torch.equal(drawn[0], want) and torch.equal(drawn[1], want)


@pytest.mark.slow(reason="starts processes that import transformers")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_whose_head_is_in_shards_has_the_loss_of_a_whole_one(layout, results_of_three):
    """Whatever becomes of the logits behind the head; and the head is not gathered for its gradient."""
    for process in results_of_three:
        got = process["models"][layout]
        model, ref_model, batch = model_and_batch(got["family"])
        loss = soul.unlearning_loss(model, batch, MODEL_OBJECTIVES[got["objective"]], ref_model=ref_model)
        loss.backward()
        assert_close(got["loss"], loss, 1e-6, "loss")
        for name, parameter in model.named_parameters():
            assert_close(got["gradients"][name], parameter.grad, 2 * tol.GRAD_OBJECTIVE, name)
        assert got["held"] == model.lm_head.weight.nbytes // 3


@pytest.mark.slow(reason="starts processes that run kernels in Triton's interpreter")
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_kernels_on_shards(tmp_path, monkeypatch):
    """The kernels see a label that stands in for one elsewhere: they are the same, and so are their results."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = ["logprob, padded", "objective", "objective, lowered labels", "kl, padded", "jsd", "gnb, padded"]
    names.append("logprob, memorised 130")
    processes = run(tmp_path, worker, ["kernels"], names, [], start_method="spawn")
    for name in names:
        check(processes, "kernels", name)


@pytest.fixture
def mesh(tmp_path):
    """A mesh of one process."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_what_does_not_make_up_a_head_is_refused_with_the_remedy(mesh):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    hidden, weight, bias = torch.randn(B, T, D), torch.randn(131, D), torch.randn(131)
    labels = torch.randint(131, (B, T))
    rows = DTensor.from_local(weight, mesh, [Shard(0)])
    bias_rows = DTensor.from_local(bias, mesh, [Shard(0)])

    def by(tensor, placement, **shape):
        return DTensor.from_local(tensor, mesh, [placement], **shape)

    def logprob(h=hidden, w=rows, b=bias_rows, **options):
        return lambda: linear_logprob(h, w, labels, bias=b, options=LinearOptions(**options))

    not_rows = r"weight: expected a plain tensor, or a DTensor that Shard\(0\) cuts along one dimension of its mesh, got"
    not_tokens = "hidden: expected a plain tensor, or a DTensor on the mesh of the weight, replicated or cut along the tokens, "
    cases = [
        (not_rows, logprob(w=by(weight, Shard(1)))),
        (not_rows, logprob(w=by(weight, Partial()))),
        (rf"{not_rows} .*; distribute it with .*, or gather it: weight.full_tensor", logprob(w=by(weight, Replicate()))),
        (r"weight: expected 132 of the 132 rows in process 0 of 1, got 131; cut it",
         logprob(w=by(weight, Shard(0), shape=torch.Size([132, D]), stride=(D, 1)), b=None)),
        (f"{not_tokens}got a DTensor", logprob(h=by(hidden, Shard(2)))),
        (f"{not_tokens}got a DTensor", logprob(h=by(hidden, Partial()))),
        (r"bias: expected a DTensor with placements .*, got a plain tensor \(131,\); distribute it over", logprob(b=bias)),
        (r"bias: expected a plain tensor, or a DTensor that Shard\(0\)", logprob(b=by(bias, Replicate()))),
        ("backend: expected 'auto', 'triton' or 'torch' with a head in shards, got 'ref", logprob(backend="reference")),
        ("weight: expected a whole head under torch.compile, torch.func and where tensors hold no values, got a DTensor",
         lambda: torch.func.grad(lambda h: logprob(h)().sum())(hidden)),
        ("labels: expected values in .*; was the tokenizer .* Of a head in shards, pass the DTensor",
         lambda: linear_logprob(hidden, weight[:50], labels.fill_(60))),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(ArgumentError, match=message):
            call()


def test_a_reference_model_that_is_cut_otherwise_is_refused(mesh):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    hidden, weight = torch.randn(B, T, D), torch.randn(131, D)
    labels = torch.randint(131, (B, T))
    rows = DTensor.from_local(weight, mesh, [Shard(0)])
    for reference, message in (
        (
            Reference(hidden, DTensor.from_local(weight, mesh, [Replicate()])),
            r"reference.weight: expected a plain tensor, or a DT",
        ),
        (Reference(hidden, weight[:100]), r"reference.weight: expected shape \(131, 16\), got \(100, 16\)"),
        (Reference(DTensor.from_local(hidden, mesh, [Shard(2)]), weight), "reference.hidden: expected a plain tensor, or a DT"),
    ):
        with pytest.raises(ArgumentError, match=message):
            soul_kernels.linear_kl(hidden, rows, labels, reference)
