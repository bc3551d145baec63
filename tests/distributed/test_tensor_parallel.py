"""A program of its own under tensor parallelism: `soul.unlearning_loss` and the optimizers on a model that `parallelize_module`
has cut, in two processes over gloo on the CPU.

Linear layers are cut by rows (ColwiseParallel) and by columns (RowwiseParallel), the head along the vocabulary; embeddings and
norms are whole in both processes. One process runs the same program on the whole model.
"""

import copy
import importlib.util

import pytest
import torch
import torch.distributed as dist

import soul
from soul import SOUL, SophiaG, losses, release_gradients
from soul.optim.curvature import GNB, RetainFisher
from tests.distributed.test_processes import outcome, restore, run, state_dicts, whole
from tests.support import parity

pytestmark = [
    pytest.mark.slow(reason="starts two processes that import transformers"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
]

STEPS = 3
# Of its weights, q_proj has shards of whole groups of 32 values, o_proj shards that cut them: a row has 32, a shard of it 16.
CUT = "model.layers.0.self_attn.o_proj.weight"
CASES = {
    "reference, rho, clipping": {"objective": losses.NPO(alpha=1.3), "optimizer": {"max_grad_norm": 0.5, "rho": "auto"}},
    "divergence, gradient checkpointing": {"objective": losses.KLMin(alpha=0.7), "checkpointing": True},
    "one ratio of the batch": {"objective": losses.NPO(reduction="token_mean")},
    "curvature of retain data": {"objective": losses.GradDiff(), "curvature": RetainFisher},
    "curvature of drawn labels": {"objective": losses.GradDiff(), "curvature": GNB},
    "adapters": {"objective": losses.KLMin(alpha=0.7), "adapters": True},
    "saved": {"objective": losses.GradDiff(), "save": True},
}
HAS_CODES = all(importlib.util.find_spec(module) for module in ("bitsandbytes", "accelerate"))
CODES = {"objective": losses.KLMin(alpha=0.7), "adapters": True, "codes": True}  # the head alone is cut
if HAS_CODES:
    CASES["adapters over a base of 4 bits"] = CODES
EIGHT_BITS = {"objective": losses.GradDiff(), "optimizer": {"state_dtype": "8bit"}}


def cut(model, mesh, layers=True):
    """Cut the head of a model in place, and its linear layers or not; below adapters, their second matrices like the layers."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    rows, columns = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
    plan = {}
    for name, module in model.named_modules():
        layer = next((part for part in reversed(name.split(".")) if part.endswith("_proj")), None)
        if isinstance(module, torch.nn.Linear) and "lora_A" not in name:
            if name.endswith("lm_head") or (layers and layer in rows):
                plan[name] = ColwiseParallel()
            elif layers and layer in columns:
                plan[name] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


def batch():
    """Return sides for `soul.unlearning_loss`, the same in every process."""
    generator = torch.Generator().manual_seed(3)
    sides = {}
    for side in ("forget", "retain"):
        ids = torch.randint(2, 300, (2, 9), generator=generator)
        sides[side] = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 3, -100)}
    return sides


def models(mesh, adapters=False, codes=None):
    """Return a model and a reference model of other weights, which adapters make needless.

    ``codes``: the directory above a base model; the adapters then are over its weights in 4 bits, and the head alone is cut.
    """
    from tests.support.models import lora_model, tiny_model  # transformers, which only the processes of this file import

    if codes is not None:
        from tests.models.test_quantized import adapted

        model = adapted(codes / "base")
        return model if mesh is None else cut(model, mesh, layers=False), None
    model = lora_model(r=4) if adapters else tiny_model("llama, untied")
    ref_model = None
    if not adapters:
        ref_model = copy.deepcopy(model)
        with torch.no_grad():
            for number, parameter in enumerate(ref_model.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(0.05 * noise)
    if mesh is not None:
        model, ref_model = (each and cut(each, mesh) for each in (model, ref_model))
    return model, ref_model


def trained(model, opt, ref_model, steps, objective, curvature=None, **_):
    """Take some steps; return their losses."""
    from soul.data.batches import collate
    from soul.models import gnb_loss
    from tests.support.models import sequences

    torch.manual_seed(5)
    drawn_for = collate(sequences(2), sequences(2))
    refresh = None if curvature is None else curvature(opt, every=2)
    values = []
    for _ in range(steps):
        opt.zero_grad()
        loss = soul.unlearning_loss(model, batch(), objective, ref_model=ref_model)
        loss.backward()
        if isinstance(refresh, GNB):
            refresh.step(lambda: gnb_loss(model, drawn_for, generator=refresh.generator()))
        elif refresh is not None:
            refresh.step(lambda: soul.unlearning_loss(model, batch(), losses.GradDiff(gamma=0.0)))
        opt.step()
        values.append(loss.detach())
    return torch.stack(values)


def optimizer(model, options=None, curvature=None, **_):
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"lr": 1e-3, "bs": 5000, **(options or {})}  # a part of the coordinates is clipped
    return SOUL(params, **options) if curvature is None else SophiaG(params, bias_correction=True, **options)


def program(case, mesh, folder):
    """Return losses, telemetry, and whole parameters of some steps."""
    model, ref_model = models(mesh, case.get("adapters", False), folder if case.get("codes") else None)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable()  # as every version of transformers has it
        model.train()
    opt = optimizer(model, case.get("optimizer"), case.get("curvature"))
    values = trained(model, opt, ref_model, STEPS, **case)
    if case.get("save"):
        saved = {name: whole(value) for name, value in model.state_dict().items()}
        if mesh is not None:
            import torch.distributed.checkpoint as dcp

            dcp.save(state_dicts(model, opt), checkpoint_id=folder / "checkpoint")
        trained(model, opt, ref_model, 1, **case)
    result = {"losses": values, **({"saved": saved} if case.get("save") else {})}
    params = {name: whole(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**result, "params": params, "telemetry": opt.telemetry(), "rho": float(opt.param_groups[0]["rho"])}


def eight_bits(mesh, **options):
    """Return the outcome of steps with 8-bit states."""
    model, _ = models(mesh)
    opt = optimizer(model, EIGHT_BITS["optimizer"] | options)
    trained(model, opt, None, STEPS, EIGHT_BITS["objective"])
    return outcome(model, opt)["state"], {name: opt.state[p] for name, p in model.named_parameters()}[CUT]


def of_cut_parameters(mesh, releases):
    """Train the parameters in shards alone, with gradient release or without; return them, whole."""
    model, _ = models(mesh)
    for parameter in model.parameters():
        parameter.requires_grad_(hasattr(parameter, "device_mesh"))
    opt = optimizer(model)
    if releases:
        release_gradients(model, opt)
    trained(model, opt, None, 2, losses.GradDiff())
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def refusals(mesh, folder):
    """Return the errors of what does not work with a model that somebody else has cut, or with whole parameters beside it."""
    from soul.data.examples import Example
    from tests.support.models import tiny_tokenizer

    model, _ = models(mesh)
    rows = [[Example("a", f" {name} {i}") for i in range(2)] for name in ("b", "c")]
    calls = [
        lambda: release_gradients(model, optimizer(model)),
        lambda: soul.Unlearner(model, *rows, tokenizer=tiny_tokenizer()),
    ]
    if HAS_CODES:
        codes = cut(models(None, codes=folder)[0], mesh)
        calls.append(lambda: soul.unlearning_loss(codes, batch(), losses.GradDiff()))
        calls.append(lambda: soul.reference_logps(codes, []))
    texts = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            texts.append(str(error))
    return texts


def worker(folder):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    results = {name: program(case, mesh, folder) for name, case in CASES.items()}
    state, cut_state = eight_bits(mesh)
    return {
        "cases": results,
        "8bit": state,
        "scales": list(cut_state["hessian_scale"].shape),
        "8bit, offloaded": eight_bits(mesh, state_offload=True)[0],
        "released": [of_cut_parameters(mesh, releases) for releases in (False, True)],
        "refusals": refusals(mesh, folder),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.support.models import tiny_model

    folder = tmp_path_factory.mktemp("tensor parallel")
    tiny_model("llama, untied").save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return run(folder, worker)


@pytest.mark.parametrize("name", [name for name in CASES if "4 bits" not in name])
@pytest.mark.covers("reference model (KL, DPO, NPO)", "TP")
@pytest.mark.covers("curvature of retain data", "TP")
@pytest.mark.covers("adapters (LoRA)", "TP")
@pytest.mark.covers("gradient checkpointing", "TP")
@pytest.mark.covers("objectives that are sums over sequences", "TP")
@pytest.mark.covers("NPO with one ratio of the batch", "TP")
def test_two_processes_are_one(name, results, folder):
    """Losses, parameters, norm and rho; both processes have the same bits."""
    case = CASES[name]
    got, other = (process["cases"][name] for process in results)
    one = program(case, None, folder)
    assert got["params"].keys() == other["params"].keys()
    assert all(torch.equal(got["params"][key], other["params"][key]) for key in got["params"])
    assert got["telemetry"] == other["telemetry"]
    assert torch.allclose(got["losses"], one["losses"], rtol=1e-5)
    untrained, _ = models(None, case.get("adapters", False), folder if case.get("codes") else None)
    start = {key: parameter.detach() for key, parameter in untrained.named_parameters()}
    parity.moved_alike(got["params"], one["params"], start)
    assert got["rho"] == pytest.approx(one["rho"], rel=1e-4)
    if "max_grad_norm" in case.get("optimizer", {}):
        assert got["telemetry"]["grad_norm"] == pytest.approx(one["telemetry"]["grad_norm"], rel=1e-4)


@pytest.mark.covers("8-bit states", "TP")
@pytest.mark.covers("states in main memory (`--state-offload`)", "TP")
def test_8_bit_states_also_in_shards_of_columns_that_cut_groups(results):
    """Offloaded they are the same bits. Against one process the groups differ, and the roundings with them."""
    first, second = results
    assert first["scales"] == [1, 2, 2 * 16]  # 32 rows of 16 columns each, 16 groups
    one, _ = eight_bits(None)
    start = dict(models(None)[0].named_parameters())
    for process in (first, second):
        parity.bit_for_bit(process["8bit, offloaded"], process["8bit"], versus="states beside their parameters")
        assert all(torch.equal(process["8bit"][name], value) for name, value in first["8bit"].items())
    params = [{name: state[name] for name in start} for state in (first["8bit"], one)]
    parity.moved_alike(*params, {name: parameter.detach() for name, parameter in start.items()}, limit=0.05)


@pytest.mark.covers("checkpoints of torch.distributed.checkpoint, for another number of processes", "TP")
def test_what_two_processes_have_saved_one_goes_on_with(results, folder):
    got, _ = (process["cases"]["saved"] for process in results)
    case = CASES["saved"]
    model, _ = models(None)
    opt = optimizer(model)
    restore(model, opt, folder / "checkpoint")
    assert all(torch.equal(value, got["saved"][name]) for name, value in model.state_dict().items())
    trained(model, opt, None, 1, **case)
    start = {name: parameter.detach() for name, parameter in models(None)[0].named_parameters()}
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    parity.moved_alike(params, got["params"], start, versus="two processes that went on")


@pytest.mark.covers("gradient release", "TP")
def test_gradients_of_parameters_in_shards_are_released(results):
    """Of those alone: nothing says whether the gradient of a whole parameter is complete, so these are refused."""
    for process in results:
        kept, released = process["released"]
        parity.bit_for_bit(released, kept, versus="the same steps without release")
        assert process["refusals"][0].startswith("model: expected one process, or sharded parameters, got plain parameters")


@pytest.mark.refuses("aim", "TP", "a run cuts its model itself, by `soul.distributed.shard`")
@pytest.mark.refuses("evaluation and best point during a run", "TP", "a run cuts its model itself, by `soul.distributed.shard`")
@pytest.mark.refuses("influence", "TP", "a run cuts its model itself, by `soul.distributed.shard`")
def test_runs_are_refused(results):
    """`soul.Unlearner` cuts a model itself."""
    for process in results:
        assert process["refusals"][1].startswith("model: expected ")


@pytest.mark.skipif(not HAS_CODES, reason="the extra quant is not installed")
@pytest.mark.covers("adapters over a base of 4 bits", "TP")
def test_adapters_over_a_base_of_four_bits_whose_head_is_cut(results, folder):
    """The layers stay whole in each process. Where torch has cut them, their scales do not fit, and they are refused."""
    test_two_processes_are_one("adapters over a base of 4 bits", results, folder)
    for process in results:
        for text in process["refusals"][2:]:
            assert text.startswith("model: expected codes of 4 bits that are whole in each process, got a shard of "), text
