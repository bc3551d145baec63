"""The Trainer mixin in several processes (gloo, on the CPU): FSDP2 and HSDP by accelerate's plugin, tensor parallelism as
transformers loads models for it. Each trains as one process does.
"""

import os
import types

import pytest
import torch

from soul import SOUL, losses, unlearning_loss
from soul.integrations.hf import UnlearningDataset, collate_unlearning, optimizer_of
from tests.distributed.test_processes import run, whole
from tests.integrations.test_integrations import UnlearnTrainer, arguments, inputs_of
from tests.support import parity
from tests.support.models import sequences, tiny_model

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow(reason="starts processes"), pytest.mark.usefixtures("without_kernels")]

# What ``accelerate launch`` sets for a configuration with fsdp_version: 2.
FSDP2_PLUGIN = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_SYNC_MODULE_STATES": "false",
}  # fmt: skip
# rho is steered, and fractions are logged, over all shards; a divergence needs a reference model.
CASES = {
    "npo": (losses.NPO(), {"max_grad_norm": 0.1, "rho": "auto"}),
    "npo, kl": (losses.NPO(retain="kl"), {"max_grad_norm": 0.1}),
    "h of the retain batch": (losses.GradDiff(), {"optimizer": "sophiag", "curvature": "retain_fisher", "every": 2}),
}
BATCH = 4  # sequences of a step, of one length: means are the same whoever takes which
CUT_BY_TRANSFORMERS = {"TP": {"tp_size": 2}, "FSDP2 over TP": {"fsdp_size": 2, "tp_size": 2}}
N_BATCHES = {"one process": 1, "FSDP2": 2, "HSDP": 4, "TP": 1, "FSDP2 over TP": 2}  # processes with a batch of their own


def loaded(folder, layout):
    """Return the model of all tests; for tensor parallelism cut by transformers, which reads it from the directory."""
    if layout not in CUT_BY_TRANSFORMERS:
        return tiny_model("llama, untied")
    config = transformers.distributed.DistributedConfig(**CUT_BY_TRANSFORMERS[layout])
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=config, dtype=torch.float32)


def trained(folder, name, layout, ref_model=None):
    """Return a Trainer after three steps, and the numbers that it logged."""
    from accelerate import ParallelismConfig
    from accelerate.state import DistributedType, PartialState

    objective, soul_args = CASES[name]
    options = {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)} if layout == "HSDP" else {}
    args = arguments(folder, per_device_train_batch_size=BATCH // N_BATCHES[layout], **options)
    if layout != "one process":  # accelerate does this where there are accelerators only, and asks for nothing else of them
        assert args.device.type == "cpu"
        PartialState().__dict__["distributed_type"] = DistributedType.MULTI_XPU
    model = loaded(folder, layout)
    torch.manual_seed(3)
    dataset = UnlearningDataset(sequences(60)[::5], sequences(40)[::5])
    trainer = UnlearnTrainer(
        model=model, args=args, train_dataset=dataset, data_collator=collate_unlearning, objective=objective,
        ref_model=ref_model, soul_args=dict(soul_args),
    )  # fmt: skip
    trainer.train()
    return trainer, [[entry["loss"], entry["clip_fraction"]] for entry in trainer.state.log_history if "loss" in entry]


def worker(_, folder, layout):
    """Return for each case the whole parameters and the log; before FSDP2's, those of a program without a Trainer."""
    from accelerate.state import AcceleratorState

    os.environ["TRITON_INTERPRET"] = "0"
    rank, size = str(torch.distributed.get_rank()), str(torch.distributed.get_world_size())
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}  # the group exists already
    os.environ |= {**address, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    results = {}
    if layout == "FSDP2":
        results["program"] = program(folder, sharded=True)
    if layout not in CUT_BY_TRANSFORMERS:
        os.environ |= FSDP2_PLUGIN
    for name, (objective, _) in CASES.items():
        ref_model = None
        if layout in CUT_BY_TRANSFORMERS and objective.divergence:
            with pytest.raises(ValueError, match="ref_model: expected a reference model for NPO, .* distributed_config"):
                trained(folder, name, layout)
            ref_model = loaded(folder, layout)
        trainer, log = trained(folder, name, layout, ref_model)
        assert trainer.accelerator.is_fsdp2 == (layout not in CUT_BY_TRANSFORMERS)
        parameters = [whole(parameter).detach() for parameter in trainer.model.parameters()]
        results[name] = [parameters, log, str(trainer.model.lm_head.weight.placements)]
        AcceleratorState._reset_state()
    return results


def program(folder, *, sharded):
    """Take two steps of NPO with a precomputed reference and the Trainer's groups; return losses and whole parameters."""
    from torch.distributed.fsdp import fully_shard

    batch = torch.load(folder / "batch.pt", weights_only=True)
    model = tiny_model("llama, untied")
    if sharded:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    groups = [[p for n, p in model.named_parameters() if ("norm" in n) == norm] for norm in (False, True)]
    args = types.SimpleNamespace(learning_rate=1e-3, max_grad_norm=0)
    cls, options = optimizer_of({"max_grad_norm": 0.1}, args)
    assert cls is SOUL
    optimizer = cls([{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], **options)
    values = []
    for _ in range(2):
        loss = unlearning_loss(model, batch, losses.NPO(beta=0.5))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.detach())
    return torch.stack(values), [whole(parameter) for parameter in model.parameters()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    tiny_model("llama, untied").save_pretrained(folder / "base")
    batch = inputs_of(sequences(3), sequences(2), False)
    batch["forget"]["ref_logps"] = torch.tensor([-20.0, -25.0, -21.0])
    torch.save(batch, folder / "batch.pt")
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    """Return for each case the parameters and the log of one process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    results = {}
    for name in CASES:
        trainer, log = trained(folder, name, "one process")
        results[name] = [list(trainer.model.parameters()), log]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return results


def assert_parameters_are(got, want, case):
    """Compare parameters: at the threshold of the clipping a coordinate may fall either way, by a tenth of a step at most."""
    for parameter, expected in zip(got, want, strict=True):
        parity.within("absolute", (parameter - expected).abs().max(), 1e-4, case)


def assert_trained_alike(results, one_process, placements):
    """Compare parameters and logs of every process with those of one process."""
    for name, (parameters, log) in one_process.items():
        for got, got_log, got_placements in (result[name] for result in results):
            assert got_placements == placements
            assert got_log == [pytest.approx(entry, rel=1e-3, abs=1e-4) for entry in log], name
            assert_parameters_are(got, parameters, name)


@pytest.mark.covers("Trainer mixin", "FSDP2")
def test_two_shards_are_one_process(folder, one_process, tmp_path):
    """Also a program without a Trainer: both processes have the same batch, so their mean gradient is that of one."""
    results = run(tmp_path, worker, folder, "FSDP2")
    values, parameters = program(folder, sharded=False)
    for got_values, got in (result["program"] for result in results):
        assert torch.allclose(got_values, values, rtol=1e-5)
        assert_parameters_are(got, parameters, "a program without a Trainer")
    assert_trained_alike(results, one_process, "(Shard(dim=0),)")


@pytest.mark.covers("Trainer mixin", "HSDP")
def test_two_copies_of_two_shards_are_one_process(folder, one_process, tmp_path):
    assert_trained_alike(run(tmp_path, worker, folder, "HSDP", world=4), one_process, "(Replicate(), Shard(dim=0))")


needs_distributed_config = pytest.mark.skipif(
    not hasattr(transformers, "distributed"), reason="transformers without tensor parallelism by DTensors"
)


@needs_distributed_config
@pytest.mark.covers("Trainer mixin", "TP")
def test_tensor_parallelism_is_one_process(folder, one_process, tmp_path):
    """With a reference model that is passed where the objective needs one: the model itself cannot be copied."""
    assert_trained_alike(run(tmp_path, worker, folder, "TP"), one_process, "(Shard(dim=0),)")


@needs_distributed_config
def test_shards_of_tensor_parallelism_are_one_process(folder, one_process, tmp_path):
    """Layers are in shards of FSDP2, cut from those of tensor parallelism, and only a forward pass gathers them."""
    assert_trained_alike(
        run(tmp_path, worker, folder, "FSDP2 over TP", world=4), one_process, "(_StridedShard(dim=0, sf=2), Shard(dim=0))"
    )
