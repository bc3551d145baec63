"""DeepSpeed's ZeRO in two processes on the CPU: by its own engine, and by the Trainer as open-unlearning starts it."""

import importlib.util
import json
import math
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

from soul import SOUL, SophiaG, losses, release_gradients
from soul.integrations.hf import SOULTrainerMixin, UnlearningDataset, collate_unlearning
from soul.integrations.open_unlearning import CONFIGS
from soul.integrations.zero import in_pieces
from soul.optim import scales
from soul.optim.curvature import RetainFisher
from tests.distributed.test_processes import backward, batch, make_net, run
from tests.support import parity
from tests.support.models import lora_model, sequences, tiny_model

deepspeed = pytest.importorskip("deepspeed")
transformers = pytest.importorskip("transformers")

STEPS = 4
TIMEOUT = 500  # DeepSpeed takes its time to be imported, and compiles something once
PORT = 29531
PIECES = {"stage3_param_persistence_threshold": 0, "sub_group_size": 20}  # several steps of the optimizer a step of DeepSpeed
ZERO = {"ZeRO-1": {"stage": 1}, "ZeRO-2": {"stage": 2}, "ZeRO-3": {"stage": 3}, "ZeRO-3, in pieces": {"stage": 3, **PIECES}}
# configs/accelerate/ of open-unlearning's default launch: what accelerate reads there.
OPEN_UNLEARNING = {
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"},
                          "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": "auto",
                          "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
                          "sub_group_size": 1e9, "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
                          "stage3_gather_16bit_weights_on_model_save": True},
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
}  # fmt: skip


class UnlearnTrainer(SOULTrainerMixin, transformers.Trainer):
    pass


def of_torchrun(rank):
    """Set the environment variables that torchrun sets."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    os.environ.update({name: str(value) for name, value in environment.items()})


def whole(model):
    """Return all parameters as one fp32 vector."""
    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")]):
        return torch.cat([p.detach().float().flatten() for p in parameters])


BF16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
UNCHECKED = {"bf16": {"enabled": True, "check_grad_overflow": False}}  # else DeepSpeed itself skips steps
# Options of the optimizer, and entries of DeepSpeed's configuration, by the feature that they ask for.
FEATURES = {
    "plain": ({}, {}),
    "DeepSpeed clips": ({}, {"gradient_clipping": 0.5}),
    "the step clips": ({"max_grad_norm": 0.5}, {}),
    "rho": ({"rho": "auto"}, {}),
    "8 bits": ({"state_dtype": "8bit"}, {}),
    "24 bits": ({}, {"bf16": BF16}),
    "offload": ({"state_offload": True}, {}),
    "graph": ({"capturable": True}, {}),
    "skip": ({"skip_nonfinite": True}, UNCHECKED),
}
NAN_AT = 2  # the step of "skip" in which the last process has a gradient that is not finite
STEP_BY_STEP = "where ZeRO steps several groups or sub-groups of parameters, one after the other"
WANTED = {  # refused with several sub-groups
    "the step clips": f"max_grad_norm: expected None {STEP_BY_STEP}, got 0.5; set gradient_clipping in DeepSpeed's",
    "skip": f"skip_nonfinite: expected False {STEP_BY_STEP}, got True; set check_grad_overflow in the section bf16",
    "rho": "rho: expected a number where ZeRO-3 steps several sub-groups one by one",
}


def optimizer_of(net, groups=1, **options):
    """Return the optimizer of a net; with two groups, biases are not decayed."""
    named = list(net.named_parameters())
    weights, biases = ([p for name, p in named if ("bias" in name) == is_bias] for is_bias in (False, True))
    one_or_two = [{"params": weights}, {"params": biases, "weight_decay": 0.0}] if groups == 2 else [*weights, *biases]
    return SOUL(one_or_two, 1e-2, weight_decay=0.1, **{"rho": 0.003, **options})  # of which a part is clipped


def engine_of(zero, optimizer, net, **configuration):
    """Return DeepSpeed's engine for a net and its optimizer."""
    config = {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True,
              "zero_optimization": ZERO[zero], "gradient_clipping": 0.0, **configuration}  # fmt: skip
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]


def train(engine, first=0, last=STEPS, nan_at=None):
    """Take steps on this process's half of the batches."""
    rank = torch.distributed.get_rank()
    dtype = next(engine.module.parameters()).dtype
    for index in range(first, last):
        x, y = (t[4 * rank : 4 * rank + 4].to(dtype) for t in batch(index))
        if index == nan_at and rank == 1:
            x = x * math.nan
        engine.backward(torch.nn.functional.mse_loss(engine(x), y))
        engine.step()


def engine_worker(folder):
    """Return, for each case, the parameters after all steps, the telemetry and the states; or the error."""
    of_torchrun(torch.distributed.get_rank())
    scales.FLAT_PIECE = 1  # or pieces as small as these would have no 8-bit states
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    results = {}
    cases = [(zero, feature, groups) for zero in ZERO for feature in FEATURES for groups in (1, 2)
             if groups == 1 or feature in ("plain", "the step clips", "skip")]  # fmt: skip
    for zero, feature, groups in cases:
        options, configuration = FEATURES[feature]
        net = make_net()
        optimizer = optimizer_of(net, groups, **options)
        start = whole(net)
        try:
            engine = engine_of(zero, optimizer, net, **configuration)
            train(engine, nan_at=NAN_AT if feature == "skip" else None)
            dtypes = sorted({str(value.dtype) for state in optimizer.state.values() for value in state.values()})
            results[zero, feature, groups] = [whole(net), optimizer.telemetry(), dtypes]
        except ValueError as error:
            results[zero, feature, groups] = [str(error), torch.equal(whole(net).bfloat16(), start.bfloat16())]
    for zero in ZERO:
        results[zero, "resumed"] = resumed(zero, folder / zero)
        results[zero, "released"] = [released(zero, before) for before in (True, False)]
        results[zero, "curvature"] = curvature(zero)
    return results


def resumed(zero, folder):
    """Return the parameters after all steps, and after the last ones by an engine that has loaded a checkpoint."""
    ends = []
    for first in (0, STEPS - 2):
        net = make_net()
        rho = 0.003 if zero == "ZeRO-3, in pieces" else "auto"
        engine = engine_of(zero, optimizer_of(net, rho=rho, state_dtype="8bit"), net)
        if first:
            engine.load_checkpoint(folder)
        for index in range(first, STEPS):
            if index == STEPS - 2 and not first:
                engine.save_checkpoint(folder)
            train(engine, index, index + 1)
        ends.append(whole(net))
    return ends


def released(zero, before):
    """Return the error of `soul.release_gradients`, before DeepSpeed has the optimizer or after."""
    net = make_net()
    optimizer = optimizer_of(net)
    if not before:
        engine_of(zero, optimizer, net)
    try:
        return release_gradients(net, optimizer)
    except ValueError as error:
        return str(error)


def curvature(zero):
    """Return whether ZeRO adds the gradients of two losses up, and shows the optimizer none; and the error of a curvature."""
    net = make_net()
    optimizer = SophiaG(net.parameters())
    engine = engine_of(zero, optimizer, net, gradient_accumulation_steps=2)
    x, y = batch(0)
    engine.backward(torch.nn.functional.mse_loss(engine(x), y))
    engine.step()  # takes no step, but counts the micro-batch
    engine.backward(3.0 * torch.nn.functional.mse_loss(engine(x), y))
    seen = [optimizer.grad_norm() is None, float(deepspeed.utils.safe_get_full_grad(net.c.bias))]
    try:
        return seen, RetainFisher(optimizer).step(lambda: None)
    except ValueError as error:
        return seen, str(error)


def one_process(groups=1, **options):
    """Return the parameters before and after the same steps in one process, and the telemetry."""
    net = make_net()
    start = torch.cat([p.detach().flatten() for p in net.parameters()])
    optimizer = optimizer_of(net, groups, **options)
    for index in range(STEPS):
        backward(net, index)
        optimizer.step()
        optimizer.zero_grad()
    return start, torch.cat([p.detach().flatten() for p in net.parameters()]), optimizer.telemetry()


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    return run(tmp_path_factory.mktemp("engines"), engine_worker, timeout=TIMEOUT)


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("feature", ["plain", "DeepSpeed clips", "the step clips", "8 bits", "24 bits", "offload"])
@pytest.mark.covers("norm, clipping, rho, telemetry", "DeepSpeed")
@pytest.mark.covers("8-bit states", "DeepSpeed")
@pytest.mark.covers("24-bit and stochastic weights", "DeepSpeed")
@pytest.mark.covers("states in main memory (`--state-offload`)", "DeepSpeed")
def test_two_processes_are_one(engines, zero, feature):
    """Groups of 8-bit states and the rounding of gradients to bf16 differ from those of one process: hence the tolerances."""
    options = {"max_grad_norm": 0.5} if feature.endswith("clips") else {}
    start, end, _ = one_process(**options)
    for results in engines:
        if (feature, zero) == ("the step clips", "ZeRO-3, in pieces"):
            assert results[zero, feature, 1][0].startswith(WANTED[feature])
            continue
        got, _, dtypes = results[zero, feature, 1]
        parity.moved_alike(got, end, start, {"8 bits": 0.1, "24 bits": 0.1}.get(feature, 1e-4))
        assert {"8 bits": "torch.uint8", "24 bits": "torch.int8"}.get(feature, "torch.float32") in dtypes  # codes, low bits
        if feature == "offload":
            parity.bit_for_bit(got, results[zero, "plain", 1][0], versus="states beside their parameters")


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("groups", [1, 2])
def test_telemetry_counts_all_pieces(engines, zero, groups):
    """Whatever ZeRO steps in how many calls; what it fills pieces up with is among the coordinates, and never clipped."""
    _, _, want = one_process(groups)
    for results in engines:
        _, got, _ = results[zero, "plain", groups]
        assert len(got["groups"]) == groups
        for ours, theirs in zip(got["groups"], want["groups"]):
            assert 0.1 < theirs["clip_fraction"] < 0.9 and theirs["numel"] <= ours["numel"] <= theirs["numel"] + 4 * 6
            assert ours["clip_fraction"] * ours["numel"] == pytest.approx(theirs["clip_fraction"] * theirs["numel"], abs=1)
            if "3" in zero:  # what it fills pieces up with is uninitialized memory
                assert math.isnan(ours["update_norm"])
            else:
                assert ours["update_norm"] == pytest.approx(theirs["update_norm"], rel=1e-3)
    if zero != "ZeRO-3, in pieces" and groups == 1:
        norms = [results[zero, "the step clips", 1][1]["grad_norm"] for results in engines]
        assert norms[0] == norms[1] == pytest.approx(one_process(max_grad_norm=0.5)[2]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("zero", ZERO)
def test_rho_is_steered_by_all_pieces(engines, zero):
    """Within what ZeRO fills the last piece up with, none of which is clipped; refused where several steps would move it."""
    if zero == "ZeRO-3, in pieces":
        assert all(results[zero, "rho", 1][0].startswith(WANTED["rho"]) for results in engines)
        return
    rhos = [results[zero, "rho", 1][1]["groups"][0]["rho"] for results in engines]
    rho = one_process(rho="auto")[2]["groups"][0]["rho"]
    assert rhos[0] == rhos[1] != 0.04 and rhos[0] == pytest.approx(rho, rel=0.2), rho


@pytest.mark.parametrize("zero", ZERO)
def test_a_gradient_of_one_process_that_is_not_finite_skips_the_step_of_all(engines, zero):
    """With ZeRO-3 DeepSpeed itself skips it, before it comes to the optimizer."""
    if zero == "ZeRO-3, in pieces":
        assert all(results[zero, "skip", 1][0].startswith(WANTED["skip"]) for results in engines)
        return
    (one, telemetry, _), (two, *_) = (results[zero, "skip", 1] for results in engines)
    assert one.isfinite().all() and torch.equal(one, two) and telemetry["skipped_steps"] == (zero != "ZeRO-3")


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.refuses("CUDA graphs (`--cuda-graph`)", "DeepSpeed", "a step of ZeRO waits for the device")
@pytest.mark.refuses("curvature of retain data", "DeepSpeed", "ZeRO adds up the gradients of all backward passes")
@pytest.mark.refuses("gradient release", "DeepSpeed", "ZeRO adds up the gradients of all processes, out of sight")
def test_what_cannot_work_is_refused_and_changes_nothing(engines, zero):
    """In the step, max_grad_norm of one process's piece gave 42% of the movement as error."""
    net = make_net()
    x, y = batch(0)
    torch.nn.functional.mse_loss(net(x), y).backward()
    want = net.c.bias.grad.item()
    for results in engines:
        for feature in ("the step clips", "skip"):
            error, unchanged = results[zero, feature, 2]
            assert error.startswith(WANTED[feature]) and unchanged
        error, unchanged = results[zero, "graph", 1]
        assert error.startswith("capturable: expected False under DeepSpeed") and unchanged
        before, after = results[zero, "released"]
        assert before.startswith("model: expected one process, or sharded parameters")
        assert after.startswith("model: expected a module that has all parameters of the optimizer") and "DeepSpeed" in after
        (hidden, gradient), error = results[zero, "curvature"]
        assert hidden and gradient == pytest.approx(2 * want, rel=1e-4)  # (1 + 3) / 2, the mean over micro-batches
        assert error.startswith("optimizer: expected one whose parameters hold their gradients, got pieces of DeepSpeed's ZeRO")


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.covers("checkpoints, resumed bit for bit", "DeepSpeed")
def test_its_checkpoints_resume_bit_for_bit(engines, zero):
    for results in engines:
        through, resumed_ = results[zero, "resumed"]
        parity.bit_for_bit(resumed_, through, versus="the run that was not stopped")
        assert not torch.equal(through, whole(make_net()))


def dataset():
    """One epoch. Sequences of one length: means over tokens are the same whoever takes which."""
    return UnlearningDataset(sequences(20 * STEPS)[::5], sequences(40)[::5])


def trainer_of(folder, make, objective, soul_args, *, pieces=False, **options):
    """Return a Trainer of the model that ``make`` returns; with ``pieces``, ZeRO-3 cuts the model while it is loaded."""
    defaults = dict(output_dir=str(folder), max_steps=STEPS, max_grad_norm=0, remove_unused_columns=False, learning_rate=1e-3,
                    lr_scheduler_type="constant", report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
                    logging_steps=1, dataloader_pin_memory=False)  # fmt: skip
    model = make(folder)  # before the arguments, as open-unlearning does
    if pieces:
        model.save_pretrained(folder / "model")  # which the first process does
        torch.distributed.barrier()
    args = transformers.TrainingArguments(**(defaults | options))
    if pieces:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(3)
    return UnlearnTrainer(model=model, args=args, train_dataset=dataset(), data_collator=collate_unlearning,
                          objective=objective, soul_args=soul_args)  # fmt: skip


def logged(trainer):
    """Return the losses and the clipped fractions of the steps."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry["loss"] for entry in steps], [entry["clip_fraction"] for entry in steps]


def over_codes(folder):
    """Return adapters over a base of 4 bits, which transformers quantizes as it reads files that the first process writes."""
    from tests.models.test_quantized import adapted

    tiny_model("llama, untied").save_pretrained(folder / "base")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return adapted(folder / "base")


TRAINED = {  # model by folder, objective, whether it is loaded in pieces, and TrainingArguments
    "tied head": (lambda _: tiny_model("llama, tied"), losses.NPO(), False, {}),
    "checkpointing": (lambda _: tiny_model("llama, untied"), losses.GradDiff(), False, {"gradient_checkpointing": True}),
    "reference of hidden states": (lambda _: tiny_model("llama, untied"), losses.NPO(retain="kl"), False, {}),
    "adapters": (lambda _: lora_model("llama, untied", r=3), losses.NPO(), False, {}),
    "pieces, reference by itself": (lambda _: tiny_model("llama, tied"), losses.NPO(), True, {}),
    "pieces, reference in a copy": (lambda _: tiny_model("llama, untied"), losses.NPO(retain="kl"), True, {}),
}
if all(importlib.util.find_spec(module) for module in ("bitsandbytes", "accelerate")):
    TRAINED["adapters over a base of 4 bits"] = (over_codes, losses.NPO(), False, {})


def shipped():
    """soul_args of the configurations for open-unlearning, which differ in their method only."""
    yaml = pytest.importorskip("yaml")
    configs = [yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.glob("*.yaml"))]
    assert all(config["args"]["max_grad_norm"] == 0 for config in configs)
    (soul_args,) = {json.dumps(config["method_args"]["soul_args"]) for config in configs}
    return json.loads(soul_args) | {"max_grad_norm": 0.1}  # so that it clips in this small case


def trainer_worker(folder):
    """As ``accelerate launch --config_file configs/accelerate/default_config.yaml`` starts it; by case, how it ended."""
    os.environ["TRITON_INTERPRET"] = "0"
    of_torchrun(torch.distributed.get_rank())
    (folder / "zero3.json").write_text(json.dumps(OPEN_UNLEARNING))
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
                   "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "zero3.json")}  # fmt: skip
    results = {}
    for name, (make, objective, pieces, options) in TRAINED.items():
        options = {"per_device_train_batch_size": 2, **options}
        trainer = trainer_of(folder / name, make, objective, shipped(), pieces=pieces, **options)
        assert pieces == in_pieces(trainer.model)
        trainer.train()
        results[name] = [whole(trainer.model), logged(trainer)]
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    for name, options in (("skip", {"skip_nonfinite": True}), ("curvature", {"optimizer": "sophiag", "curvature": "gnb"})):
        try:
            trainer_of(folder, lambda _: tiny_model(), losses.NPO(), options)
        except ValueError as error:
            results[name] = str(error)
    return results


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    return run(tmp_path_factory.mktemp("trainers"), trainer_worker, timeout=TIMEOUT)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.covers("Trainer mixin", "DeepSpeed")
@pytest.mark.covers("adapters (LoRA)", "DeepSpeed")
@pytest.mark.covers("adapters over a base of 4 bits", "DeepSpeed")
@pytest.mark.covers("gradient checkpointing", "DeepSpeed")
@pytest.mark.covers("objectives that are sums over sequences", "DeepSpeed")
@pytest.mark.covers("reference model (KL, DPO, NPO)", "DeepSpeed")
def test_open_unlearnings_launch_is_right_with_the_shipped_configuration(trainers, tmp_path, name):
    make, objective, _, options = TRAINED[name]
    trainer = trainer_of(tmp_path, make, objective, shipped(), per_device_train_batch_size=4, **options)
    start = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    trainer.train()
    end = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    for results in trainers:
        got, (losses_at, fractions) = results[name]
        want_losses, want_fractions = logged(trainer)
        assert losses_at == pytest.approx(want_losses, rel=1e-3)
        assert fractions == pytest.approx(want_fractions, rel=0.02) and len(fractions) == STEPS
        parity.moved_alike(got, end, start)


def test_options_that_cannot_work_are_refused_when_the_trainer_is_made(trainers):
    for results in trainers:
        assert results["skip"].startswith("soul_args.skip_nonfinite: expected not True under DeepSpeed")
        assert results["curvature"].startswith("soul_args.curvature: expected none under DeepSpeed")
