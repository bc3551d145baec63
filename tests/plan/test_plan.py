"""The planner: exact parameter counts, and the bytes that a step really takes."""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import shlex
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import soul.optim.optimizer
import soul.run.loop
from soul import SOUL, Unlearner
from soul.cli import main
from soul.commands.unlearn import add_arguments
from soul.data.batches import collate
from soul.data.examples import Sequence
from soul.distributed.processes import shard
from soul.distributed.shards import local
from soul.models.adapters import add_adapters
from soul.models.causal_lm import checkpointing, hidden_states, token_logps
from soul.models.loading import scales_of
from soul.models.quantized import four_bit
from soul.models.ref_model import reference_head
from soul.optim.offload import BUCKET_BYTES
from soul.optim.release import release_gradients
from soul.optim.states import new_state
from soul.plan import PRESETS, Card, Tokens, card_of, plan, shape_of, shapes, ways
from soul.plan.activations import layer_bytes
from soul.plan.case import Case
from soul.plan.memory import BACKWARD, FORWARD, STEP, phases, resident
from soul.plan.run import plan_run
from soul.plan.scaling import with_tables
from soul.plan.time import floor_seconds, step_seconds
from soul.plan.ways import FLAGS, ROOM
from soul.plan.ways import command as command_of
from soul.run.config import UnlearnConfig, build_optimizer
from soul.run.step import train_step
from soul_kernels import TokenBatch
from soul_kernels.backends import interpreting
from soul_kernels.errors import ArgumentError
from tests.support import parity
from tests.support.helpers import needs_kernels_on_cpu, peak_bytes
from tests.support.live_bytes import LiveBytes
from tests.support.models import FAMILIES, examples, tiny_model, tiny_tokenizer

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "scaling.md"
SIZES = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(autouse=True)
def one_thread():
    """Matrix products on a CPU take scratch memory for every thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass
class Measured:
    """A random Llama, and one step of it in Triton's interpreter, measured."""

    case: Case
    before: int  # bytes of parameters, states and everything else that is allocated all the time
    extra: int  # the most that a step allocates beyond them


def measure(length, *, labelled=8, dtype="bfloat16", sequences=2, ragged=False, attention="sdpa", adapters=None, tied=True,
            cast=False, layers=3, vocab=256, **options):  # fmt: skip
    """Measure the second step, as the first one makes the states, on whole sequences of ``length`` tokens."""
    config = UnlearnConfig(backend="triton", batch_size=sequences // 2, **options)
    sizes = SIZES | dict(vocab_size=vocab, tie_word_embeddings=tied, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, attn_implementation=attention))
    shape = shape_of(model)
    model = model.to(getattr(torch, dtype))
    if adapters is not None:
        model = add_adapters(model, **adapters)
    model.train()
    optimizer = build_optimizer(model, config)
    release = release_gradients(model, optimizer) if config.gradient_release else None
    batches = [batch(length, labelled, sequences, ragged, vocab) for _ in range(config.accumulate)]
    always = [*model.parameters()]
    ref_head = (None, None)
    if config.objective().divergence is not None:
        ref_head = reference_head(model)
        hidden = torch.randn(sequences, length, SIZES["hidden_size"]).to(getattr(torch, dtype))
        batches = [dataclasses.replace(micro_batch, ref_hidden=hidden) for micro_batch in batches]
        always += [ref_head[0], hidden]
    whole = None
    if len(batches) > 1:
        whole = TokenBatch.from_labels(*(torch.cat([getattr(b, name) for b in batches]) for name in ("labels", "is_forget")))
    step = lambda: train_step(model, batches, config.objective(), optimizer, config, ref_head, whole, release)  # noqa: E731
    with contextlib.ExitStack() as stack:
        if config.gradient_checkpointing:
            stack.enter_context(checkpointing(model))
        if cast:  # as on a GPU
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        step()
        optimizer.zero_grad(set_to_none=True)
        extra = peak_bytes(step, torch.device("cpu"))
    if config.state_offload:
        (transfers,) = optimizer._stepper.transfers.values()
        always += [slot.buffer for slot in transfers._slots]
    else:
        always += [value for state in optimizer.state.values() for value in state.values()]
    before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in always}.values())
    tokens = Tokens(sequences, length, labelled=len(batches[0].token_indices), masked=ragged)
    case = Case(shape, config, tokens, dtype, adapters, attention, card_of("h100"), autocast=cast)
    return Measured(case, before, extra)


def batch(length, labelled, sequences, ragged, vocab):
    encoded = []
    for index in range(sequences):
        ids = torch.randint(2, vocab, (length - 2 * (ragged and index > 0),)).tolist()
        prompt = len(ids) - labelled
        encoded.append(Sequence(ids, [-100] * (prompt - 1) + ids[prompt:] + [-100], prompt))
    made = collate(encoded[: sequences // 2], encoded[sequences // 2 :])
    return dataclasses.replace(made, pads_right=False)  # as for a family that keeps its mask


# The largest component differs between the cases. Labels are few: on a CPU, bf16 products for them go through copies in fp32.
# AdamW is faster than SOUL in the interpreter, and is used where the optimizer does not matter.
LONG = dict(length=192, optimizer="adamw")
MEASURED = {
    # Parameters, gradients and AdamW's states.
    "fp32 adamw, short": dict(length=6, labelled=2, dtype="float32", optimizer="adamw", layers=8),
    # The same with SOUL's default states and the low bits of compensated rounding.
    "bf16 soul, short": dict(length=6, labelled=2),
    # Activations, with fast attention kernels and equal lengths.
    "bf16, long": LONG,
    # A mask: keys and values of as many heads as queries, and a copy of the mask in every layer.
    "bf16, long, masked": dict(LONG, ragged=True),
    # Probabilities of all pairs of tokens, saved in fp32 and in bf16.
    "bf16, long, eager": dict(LONG, length=128, attention="eager"),
    # The same in fp32, where they are saved once.
    "fp32, long, eager": dict(LONG, length=128, attention="eager", dtype="float32"),
    # One hidden state for each layer, and one recomputed layer.
    "bf16, long, checkpoints": dict(LONG, gradient_checkpointing=True),
    # Neither all gradients nor states of two bytes: the loss and one layer remain.
    "bf16 soul, 8bit, release, checkpoints, untied": dict(
        length=48, labelled=4, state_dtype="8bit", gradient_release=True, max_grad_norm=None, gradient_checkpointing=True,
        tied=False, layers=2,
    ),
    # States in main memory, and two buckets of them here.
    "bf16 soul, short, offloaded": dict(length=6, labelled=2, state_offload=True),
    # Gradients of the first micro-batch beside the activations of the second.
    "fp32, accumulated": dict(LONG, length=48, dtype="float32", accumulate=2, layers=8),
    # A copy of the head, hidden states of the reference model, and logits of both models.
    "fp32, KL to a reference": dict(LONG, length=32, labelled=24, dtype="float32", method="klmin", vocab=2048),
    # fp32 parameters under autocast: bf16 copies of matrices and of what goes into them.
    "fp32, autocast": dict(LONG, dtype="float32", cast=True),
    # Frozen matrices save no input, but adapters do, in fp32.
    "adapters": dict(LONG, adapters=dict(rank=4, targets="all-linear")),
}  # fmt: skip


MANY = pytest.mark.slow(reason="a step under a profiler for each; states, activations, checkpoints and adapters always are")
ALWAYS = ("bf16 soul, short", "bf16, long", "bf16, long, checkpoints", "fp32, KL to a reference", "adapters")


@needs_kernels_on_cpu
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in ALWAYS else MANY) for name in MEASURED])
def test_plan_is_within_15_percent_of_what_a_step_takes(name):
    measured = measure(**MEASURED[name])
    planned = phases(measured.case)
    sums = {phase: sum(components.values()) for phase, components in planned.items()}
    if interpreting() and not measured.case.config.gradient_release:
        # The interpreter holds the arguments of its last launch until the next one.
        sums[BACKWARD] += planned[FORWARD]["logits of a chunk"]
    peak = max(sums.values())
    known = sum(resident(measured.case).values())
    assert measured.before == pytest.approx(known, rel=0.01, abs=4096)  # counters beside the states
    assert abs(peak / (measured.before + measured.extra) - 1) <= 0.15, sums
    assert abs((peak - known) / measured.extra - 1) <= 0.15, sums  # without the resident bytes, which hide errors


# bf16, and fp32, where fp32 copies are the tensors themselves; autocast; both kinds of attention, with a mask and without;
# adapters. Each has a term of its own in the formula.
@pytest.mark.parametrize("options", [
    dict(), dict(ragged=True), dict(dtype="float32", ragged=True), dict(attention="eager"),
    dict(dtype="float32", attention="eager"), dict(dtype="float32", cast=True), dict(lora=True),
    dict(lora=True, attention="eager"),
], ids=str)  # fmt: skip
def test_layer_bytes_are_what_autograd_saves(options):
    """The bytes are exact, but for the inverse deviations of the norms, 4 bytes a token each."""
    dtype = options.get("dtype", "bfloat16")
    attention = options.get("attention", "sdpa")
    ragged = options.get("ragged", False)
    cast = options.get("cast", False)
    adapters = dict(rank=4, targets="all-linear") if options.get("lora") else None
    tokens = Tokens(2, 44, masked=ragged)  # 88 tokens: no matrix has such a side
    mask = torch.ones(2, 44, dtype=torch.int64)
    mask[1, -5:] = 0 if ragged else 1
    shape = shape_of(LlamaConfig(**SIZES, vocab_size=64))

    def saved(layers):
        config = LlamaConfig(**SIZES | dict(vocab_size=64, num_hidden_layers=layers), attn_implementation=attention)
        model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).train()
        model = add_adapters(model, **adapters) if adapters else model
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        tensors = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensors.append(tensor) or tensor, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            hidden_states(model, types.SimpleNamespace(input_ids=torch.ones_like(mask), attention_mask=mask))
        if cast:  # copies of matrices, which another component counts
            sizes = {size[::-1] for size in shape.linear.values()}
            known |= {t.untyped_storage().data_ptr() for t in tensors if tuple(t.shape) in sizes}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(size for pointer, size in storages.items() if pointer not in known)

    case = Case(shape, UnlearnConfig(), tokens, dtype, adapters, attention, card_of("h100"), autocast=cast)
    assert layer_bytes(case) + 2 * 4 * tokens.n == pytest.approx((saved(5) - saved(3)) / 2, rel=1e-3)


def test_parameters_are_counted_exactly():
    published = {"llama-3.2-1b": 1_235_814_400, "llama-2-7b": 6_738_415_616, "llama-3.1-8b": 8_030_261_248,
                 "llama-3-70b": 70_553_706_496}  # fmt: skip
    assert {name: shape_of(name).numel for name in PRESETS} == published
    for name, sizes in PRESETS.items():  # and each matrix is as transformers makes it
        config = LlamaConfig(
            vocab_size=sizes["vocab"],
            hidden_size=sizes["hidden"],
            intermediate_size=sizes["intermediate"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["kv_heads"],
            tie_word_embeddings=sizes["tied"],
        )
        ours, theirs = shape_of(name), shape_of(config)
        assert dataclasses.replace(theirs, name=name) == ours


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_of_all_families(family):
    """A configuration, its dict and a model give the same shapes, and a plan without an error."""
    config = FAMILIES[family]()
    model = tiny_model(family)
    shape = shape_of(config)
    assert shape.numel == sum(p.numel() for p in model.parameters()) == shape_of(model).numel
    assert shape_of(config.to_dict()) == shape
    assert 0 < shape.outside_numel < shape.numel and shape.linear_numel < shape.numel
    per_layer = shape.linear_numel / shape.layers
    assert 0.95 * per_layer <= shape.layer_numel  # OPT projects outside of its layers as well
    assert shape.layer_numel <= 1.1 * per_layer + 20 * shape.hidden  # norms and biases
    assert plan(shape, length=16).peak_bytes > shape.numel * 11  # parameters, low bits, states and gradients


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model, and data of unequal lengths."""
    root = tmp_path_factory.mktemp("plan")
    tiny_model().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    rows = [json.dumps({"prompt": e.prompt, "completion": e.answer * (1 + i % 3)}) + "\n" for i, e in enumerate(examples(9))]
    (root / "forget.jsonl").write_text("".join(rows[:5]))
    (root / "retain.jsonl").write_text("".join(rows[5:]))
    return root


def command(directory, *more):
    files = [f"--{name}={directory / file}" for name, file in
             dict(model="model", forget="forget.jsonl", retain="retain.jsonl", output="out").items()]  # fmt: skip
    return ["unlearn", *files, "--batch-size=2", "--epochs=2", "--backend=reference", "--device=cpu", *more]


# DPO has two sequences an example, KL tokens that are compared, and accumulation several micro-batches a step, of which the
# last is smaller.
@pytest.mark.parametrize("options", [
    dict(), dict(method="dpo"), dict(method="klmin"), dict(accumulate=2), dict(method="ga"),
], ids=str)  # fmt: skip
def test_a_dry_run_knows_the_batches_of_the_run(directory, options, monkeypatch):
    config = UnlearnConfig(batch_size=2, epochs=2, backend="reference", **options)
    files = directory / "forget.jsonl", None if options.get("method") == "ga" else directory / "retain.jsonl"
    planned = plan_run(directory / "model", *files, config)
    shapes = []

    def step(model, batches, *others):
        for batch in batches:
            compared = 0 if batch.ref_hidden is None else int((batch.labels != -100)[~batch.is_forget].sum())
            shapes.append((*batch.labels.shape, len(batch.token_indices), compared))
        return {name: torch.zeros(()) for name in ("loss", "forget_nll")}

    monkeypatch.setattr(soul.run.loop, "train_step", step)
    monkeypatch.setattr(soul.optim.optimizer.SophiaG, "telemetry", lambda self: {"groups": [{"clip_fraction": 0.0}]})
    records = Unlearner(str(directory / "model"), *files, config, device="cpu").run(progress=False)
    tokens = planned.case.tokens
    assert planned.steps[0] == len(records)
    most = max(b * t for b, t, _, _ in shapes)
    assert (tokens.sequences, tokens.length, tokens.n_labelled, tokens.compared or 0) in shapes and tokens.n == most


def test_dry_run_writes_nothing_and_reads_no_weights(directory, capsys):
    (directory / "model" / "model.safetensors").rename(directory / "weights")
    try:
        before = sorted(directory.rglob("*"))
        assert main(command(directory, "--dry-run", "--card=24:1000:100", "--optimizer=adamw")) == 0
        printed = capsys.readouterr().out
        assert sorted(directory.rglob("*")) == before
    finally:
        (directory / "weights").rename(directory / "model" / "model.safetensors")
    assert "27,168 parameters in float32" in printed and "24:1000:100" in printed
    assert "Floor of the run: " in printed and "for 6 steps" in printed and "estimate on paper" in printed
    assert main(command(directory, "--dry-run", "--model=7b")) == 2 and "the preset '7b'" in capsys.readouterr().err
    assert main(command(directory, "--dry-run", "--card=nonsense")) == 2
    assert main(command(directory, "--dry-run", "--max-length=2")) == 2  # what would stop the run stops its plan
    errors = capsys.readouterr().err
    assert "card: expected" in errors and "raise --max-length" in errors


def test_plan_command(capsys):
    assert main(["plan", "--model=7b", "--gradient-checkpointing", "--gradient-release", "--state-dtype=8bit"]) == 0
    options = dict(state_dtype="8bit", gradient_release=True, gradient_checkpointing=True)
    printed = capsys.readouterr().out
    assert printed == f"{plan('7b', config_of(**options)).table()}\n\n{ways('7b', config_of(**options)).table()}\n"
    assert main(["plan", "--model=70b", "--gpus=16", "--lora-rank=8", "--length=128", "--labelled=99", "--network=25"]) == 0
    printed = capsys.readouterr().out
    assert "103,546,880 trained" in printed and "8 sequences of 128 tokens, 99 labelled; 16 x h100" in printed
    assert "25 GB/s a GPU as given" in printed
    assert "does not run" not in printed
    assert main(["plan", "--model=7b", "--gpus=2", "--state-dtype=8bit"]) == 0 and "does not run" not in capsys.readouterr().out
    assert main(["plan", "--model=7b", "--lora-rank=8", "--load-in-4bit"]) == 0
    assert "linear layers in 4 bits, 19,988,480 trained" in capsys.readouterr().out
    assert main(["plan", "--model=7b", "--load-in-4bit"]) == 2
    assert "load_in_4bit: expected nothing without --lora-rank" in capsys.readouterr().err
    assert main(["plan", "--model=7b", "--lora-targets=q_proj"]) == 2
    assert "lora_targets: expected nothing without --lora-rank" in capsys.readouterr().err


@pytest.mark.counts
def test_offloaded_states_take_main_memory_and_the_link():
    """The 8B, all parameters, within 32 GB; the same states, but for two buckets of them, are in main memory."""
    options = dict(state_dtype="8bit", gradient_release=True, gradient_checkpointing=True)
    inside, outside = plan("8b", config_of(**options)), plan("8b", config_of(**options, state_offload=True))
    assert outside.peak_bytes <= 32e9 and inside.host_bytes == 0
    what = "llama-3.1-8b, all parameters, 8-bit states, release, checkpointing, on one card; states in main memory"
    parity.count(what, inside.peak_bytes, outside.peak_bytes, "computed")
    sizes = inside.phases[FORWARD]
    assert outside.host_bytes == sizes["optimizer states"] + sizes["low bits"]
    assert outside.phases[FORWARD]["states on their way"] == 2 * BUCKET_BYTES
    assert inside.phase_bytes(FORWARD) - outside.phase_bytes(FORWARD) == outside.host_bytes - 2 * BUCKET_BYTES
    slow = plan("8b", config_of(**options, state_offload=True), host_bandwidth=10e9)
    assert slow.step_seconds == slow.seconds["transfer of states"] == outside.host_bytes / 10e9
    kept = plan("8b", config_of(state_dtype="8bit", state_offload=True))
    assert kept.step_seconds == kept.seconds["matrix products"] + kept.seconds["transfer of states"]
    shards = plan("8b", config_of(state_dtype="8bit", state_offload=True), gpus=4)
    assert shards.host_bytes == pytest.approx(kept.host_bytes / 4, rel=1e-6)
    assert plan("1b", config_of(state_offload=True), adapters=dict(rank=1, targets=["k_proj"])).host_bytes < BUCKET_BYTES
    assert "Main memory: 25.10 GB of states for each GPU" in outside.table()


def test_ways_fit_and_come_cheapest_first():
    listed = ways("8b", UnlearnConfig(), card="a100-80gb", gpus=2)
    assert len(listed.fitting) > 4
    seconds = [way.plan.step_seconds for way in listed.fitting]
    assert seconds == sorted(seconds)
    for way in listed.fitting:
        case = way.plan.case
        assert way.plan.peak_bytes + ROOM <= 80e9
        assert (way.command.startswith("torchrun --nproc-per-node 2 -m soul unlearn")) == (case.gpus == 2)
        alike = [
            each for each in listed.fitting if (each.plan.case.gpus, each.plan.case.adapters) == (case.gpus, case.adapters)
        ]
        for part in alike:  # one that saves less is slower
            assert not set(part.savings) < set(way.savings) or way.plan.step_seconds < 0.95 * part.plan.step_seconds
    assert listed.table().count("--lora-rank 16") == sum(way.plan.case.adapters is not None for way in listed.fitting)


def test_what_comes_nearest_if_nothing_fits():
    listed = ways("8b", UnlearnConfig(), card="6:1000:100", adapters=dict(rank=8, targets=["q_proj", "v_proj"]))
    assert not listed.fitting
    table = listed.table()
    assert "No way to run llama-3.1-8b on 1 x 6:1000:100 fits. The nearest misses by" in table
    miss = (listed.nearest.plan.peak_bytes + ROOM - 6e9) / 1e9
    assert f"misses by {miss:.1f} GB a GPU" in table and "--lora-targets q_proj,v_proj" in table


@pytest.mark.parametrize("options", [
    dict(), dict(method="ga", optimizer="adamw", dtype="float32"), dict(adapters=dict(rank=2, targets=["q_proj"])),
], ids=str)  # fmt: skip
def test_the_command_line_of_a_way_is_its_run(directory, options, monkeypatch):
    """The command plans the same options; what was asked for belongs to every way."""
    run_options = {name: options[name] for name in ("dtype", "adapters") if name in options}
    config = UnlearnConfig(**{name: value for name, value in options.items() if name not in run_options}, batch_size=2)
    listed = ways(directory / "model", config, length=16, **run_options)
    every = ways(directory / "model", config, length=16, card="0.001:1:1", **run_options)  # nothing fits
    planned = []

    def record(model, forget, retain, config, **others):
        planned.append((config, others))
        return types.SimpleNamespace(table=lambda: "")

    monkeypatch.setattr("soul.commands.unlearn.plan_run", record)
    for way in (*listed.fitting, every.nearest):
        words = shlex.split(way.command, comments=True)
        assert main([*words[1:], "--dry-run"]) == 0
        config, others = planned.pop()
        names = ("method", "max_length", *FLAGS)
        assert {name: getattr(config, name) for name in names} == {
            name: getattr(dataclasses.replace(way.plan.case.config, max_length=16), name) for name in names
        }
        for name in ("rank", "targets"):
            assert (others["adapters"] or {}).get(name) == (way.plan.case.adapters or {}).get(name)
        assert others["dtype"] == options.get("dtype", "auto")


def test_cards_of_several_machines_are_named():
    planned = plan("70b", config_of(gradient_checkpointing=True), gpus=16)
    line = command_of("DIR", planned, 512)
    start = "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m soul unlearn --model DIR"
    assert line.startswith(start)
    assert " --batch-size 64 --gradient-checkpointing" in line  # of 16 processes with 4 rows each


def test_the_tables_of_the_docs_are_what_the_planner_prints():
    text = DOCS.read_text(encoding="utf-8")
    assert with_tables(text) == text, "python -m soul.plan.scaling docs/scaling.md"
    assert "not measured" in text
    with pytest.raises(ArgumentError, match="whole"):
        with_tables("nothing")


def config_of(**options):
    return UnlearnConfig(**{"max_grad_norm": math.inf if options.get("gradient_release") else 1.0, **options})


def test_a_floor_that_was_worked_out_by_hand():
    """The 1B, 8 sequences of 96 tokens: 7.9 ms for the matrix products, 5.8 ms for 14 bytes a parameter."""
    config = config_of(state_dtype="bfloat16", param_rounding="stochastic", max_grad_norm=None)
    planned = plan("1b", config, Tokens(8, 96))
    assert planned.seconds["matrix products"] == pytest.approx(7.9e-3, rel=0.02)
    assert planned.seconds["optimizer"] == pytest.approx(14 * 1_235_814_400 / 3000e9, rel=1e-6)


def test_a_peak_that_was_measured_on_an_h100():
    """The same step by a prototype: 10.7 GiB."""
    config = config_of(state_dtype="bfloat16", param_rounding="stochastic", max_grad_norm=None)
    assert plan("1b", config, Tokens(8, 96)).peak_bytes == pytest.approx(10.7 * 2**30, rel=0.15)


def test_full_parameter_7b_within_40_gb():
    options = dict(state_dtype="8bit", gradient_release=True, gradient_checkpointing=True)
    planned = plan("7b", config_of(**options), length=512)
    assert planned.peak_bytes <= 40e9 and planned.fits
    sizes = planned.phases[FORWARD]
    assert sizes["parameters"] == 2 * 6_738_415_616 and sizes["low bits"] == 6_738_415_616
    norms = 65 * 4096  # with fp32 states; the rows of all matrices of this model are multiples of 32
    assert sizes["optimizer states"] == 2 * (1 + 2 / 32) * (6_738_415_616 - norms) + 2 * 4 * norms
    for name in options:  # each of the three is needed
        fewer = {**options, name: None if name == "state_dtype" else False}
        assert plan("7b", config_of(**fewer), length=512).peak_bytes > 40e9, name


BATCH = Tokens(8, 512)


def peak(model="1b", tokens=BATCH, /, card="h100", gpus=1, dtype="auto", adapters=None, attention="sdpa", **options):
    setup = dict(card=card, gpus=gpus, dtype=dtype, adapters=adapters, attention=attention)
    return plan(model, config_of(**options), tokens, **setup).peak_bytes


def test_options_that_take_more_memory():
    base = peak()
    assert peak("1b", Tokens(8, 1024)) == peak("1b", Tokens(16, 512)) > base  # pairs of tokens count in masks alone
    masked = functools.partial(Tokens, masked=True)
    assert peak("1b", masked(8, 1024)) > peak("1b", masked(16, 512)) > peak("1b", masked(8, 512)) > base
    assert peak("1b", Tokens(8, 512, labelled=100)) < base  # fewer logits
    assert peak(method="klmin") > base and peak(attention="eager") > base
    assert peak(dtype="float32") > base > peak(state_dtype="bfloat16") > peak(state_dtype="8bit")
    assert peak(param_rounding="stochastic") == base - 1_235_814_400
    assert (
        peak(accumulate=2) > base > peak(gradient_checkpointing=True) > peak(gradient_checkpointing=True, gradient_release=True)
    )
    assert peak(gradient_release=True, accumulate=2) == pytest.approx(
        peak(accumulate=2), rel=0.05
    )  # released in the last one only
    assert peak(gradient_checkpointing=True, adapters=dict(rank=8)) < peak(gradient_checkpointing=True) / 2
    planned = [plan("7b", config_of(state_dtype="8bit"), BATCH, adapters=dict(rank=rank)) for rank in (16, 32)]
    sizes = [p.phases[STEP]["optimizer states"] / 1e9 for p in planned]
    assert sizes == pytest.approx([0.213, 0.170], abs=1e-3)  # B of rank 16 has rows of 16, which are no whole groups
    shards = [peak("70b", gpus=n, gradient_checkpointing=True) for n in (1, 8, 64, 512)]
    assert shards == sorted(shards, reverse=True)
    alone, shared = (plan("70b", gpus=n) for n in (1, 64))
    assert shared.phases[STEP]["parameters"] == pytest.approx(alone.phases[STEP]["parameters"] / 64, rel=1e-6)


def test_options_that_take_longer():
    def case(tokens=BATCH, gpus=1, adapters=None, dtype="bfloat16", **options):
        return Case(shape_of("7b"), config_of(**options), tokens, dtype, adapters, "sdpa", card_of("h100"), gpus)

    base = step_seconds(case())
    assert base["matrix products"] * 4 / 3 > step_seconds(case(gradient_checkpointing=True))["matrix products"]
    assert base["matrix products"] < step_seconds(case(gradient_checkpointing=True))["matrix products"]
    assert step_seconds(case(accumulate=3))["matrix products"] == pytest.approx(3 * base["matrix products"])
    assert step_seconds(case(adapters=dict(rank=8)))["matrix products"] < base["matrix products"]
    assert step_seconds(case(Tokens(8, 512, labelled=64)))["matrix products"] < base["matrix products"]
    assert step_seconds(case(method="klmin"))["matrix products"] > base["matrix products"]
    sharded = step_seconds(case(gpus=8))
    assert sharded["optimizer"] == base["optimizer"] / 8
    rest = 2 * 32000 * 4096 + 4096  # gathered once in place of twice
    assert sharded["network"] == pytest.approx(7 / 8 * ((2 + 2 + 4) * 6_738_415_616 - 2 * rest) / 450e9)  # gradients in fp32
    assert step_seconds(case(gpus=16))["network"] > 8 * sharded["network"]  # between machines
    assert floor_seconds(sharded) == max(sharded["network"], sharded["matrix products"]) + sharded["optimizer"]


@pytest.mark.parametrize("ranks, tied, layout", [
    (64, False, {}), (256, False, {}), (64, False, dict(head_in_shards=True)), (256, False, dict(replicas=4)),
    (256, True, dict(replicas=4, head_in_shards=True)), (64, False, dict(replicas=4, head_in_shards=True, cpu_offload=True)),
], ids=str)  # fmt: skip
def test_planned_shards_are_those_of_fsdp2_on_many_ranks(ranks, tied, layout):
    """Counted on rank 0, on the meta device, in a group whose other processes do not exist; rows do not divide evenly.

    Parameters that are kept in main memory are those that FSDP2 cuts.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sizes = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=3, num_attention_heads=32, num_key_value_heads=8)
    config = LlamaConfig(**sizes, vocab_size=32003, tie_word_embeddings=tied)
    planned = plan(shape_of(config), config_of(state_dtype="8bit", **layout), gpus=ranks)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        shard(model, torch.device("cpu"), **layout)
        parts = {*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()}
        in_shards = parts if "head_in_shards" in layout else set()
        params = list(in_shards if "cpu_offload" in layout else model.parameters())
        states = [new_state(param, SOUL(params, state_dtype="8bit").param_groups[0], ()) for param in params]
        counted = {
            "parameters": sum(local(param).nbytes for param in params),
            "low bits": sum(local(state.pop("low_bits")).nbytes for state in states),
            "optimizer states": sum(local(tensor).nbytes for state in states for tensor in state.values()),
        }
        layers = {param for layer in model.model.layers[:2] for param in layer.parameters()}
        outside = {param for name, param in model.named_parameters() if ".layers." not in name} - in_shards
        whole = sum(2 * param.numel() for param in layers | outside)
    finally:
        torch.distributed.destroy_process_group()
    assert resident(planned.case) == pytest.approx(counted, rel=0.05)
    whole *= 1 + ("cpu_offload" in layout) / 2 / planned.case.shards  # the shards of a layer on their way up
    assert planned.phases[FORWARD]["gathered from shards"] == pytest.approx(whole, rel=0.05)


# Labels are few, as a CPU needs copies for the loss that a GPU does not: the loss is compared above.
@pytest.mark.parametrize("ranks, options", [
    pytest.param(64, dict(), marks=MANY), (256, dict(checkpoints=True)),
    pytest.param(64, dict(checkpoints=True, dtype="float32"), marks=MANY),
    (64, dict(checkpoints=True, layout=dict(head_in_shards=True, replicas=4))),
    (256, dict(tied=True, layout=dict(head_in_shards=True))), (4, dict(checkpoints=True, layout=dict(head_in_shards=True))),
    (64, dict(checkpoints=True, layout=dict(cpu_offload=True))),
    (256, dict(checkpoints=True, adapters=dict(rank=8, targets="all-linear"))),
    (4, dict(checkpoints=True, adapters=dict(rank=8, targets="all-linear"), layout=dict(head_in_shards=True))),
], ids=str)  # fmt: skip
def test_planned_activations_are_those_of_fsdp2_on_many_ranks(ranks, options):
    """The peak of a micro-batch, forward and backward, on rank 0 of a group whose other processes do not exist.

    Collectives do nothing there; the tensors are real, and so is what FSDP2 gathers, keeps and frees.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    options = dict(checkpoints=False, dtype="bfloat16", adapters=None, layout={}, tied=False) | options
    sizes = dict(hidden_size=128, intermediate_size=344, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**sizes, vocab_size=512, tie_word_embeddings=options["tied"])
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options["dtype"]))
        shape = shape_of(model)
        if options["adapters"]:
            model = add_adapters(model, **options["adapters"])
        shard(model.train(), torch.device("cpu"), **options["layout"])
        one_batch = batch(96, 1, 4, False, 512)
        live = LiveBytes([*model.parameters(), *model.buffers()])
        known = live.now
        with checkpointing(model) if options["checkpoints"] else contextlib.nullcontext(), live:
            logps = token_logps(model, one_batch, "torch")
            forward, live.peak = live.peak, 0
            logps.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    run = config_of(gradient_checkpointing=options["checkpoints"], **options["layout"])
    tokens = Tokens(4, 96, labelled=4)
    hardware = "sdpa", card_of("2:1000:1000"), ranks  # its chunks are those of a CPU
    case = Case(shape, run, tokens, options["dtype"], options["adapters"], *hardware, autocast=False)
    always = sum(resident(case).values())
    planned = {phase: sum(components.values()) - always for phase, components in phases(case).items()}
    assert planned[FORWARD] == pytest.approx(forward - known, rel=0.05)
    assert planned[BACKWARD] == pytest.approx(live.peak - known, rel=0.05)


def test_a_base_of_four_bits(tmp_path):
    """Its bytes, and the peak of a backward pass, in which weights are dequantized one at a time."""
    pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
    pytest.importorskip("accelerate", reason="the extra quant is not installed")
    sizes = dict(hidden_size=128, intermediate_size=336, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**sizes, vocab_size=512, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shape = shape_of(model)
    linear = sum(math.prod(size) for size in shape.linear.values())
    model.save_pretrained(tmp_path)
    options = dict(quantization_config=four_bit(torch.bfloat16), dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    adapters = dict(rank=4, targets="all-linear")
    base = [*model.parameters(), *scales_of(model)]
    model = add_adapters(model, **adapters).train()
    one_batch = batch(96, 1, 4, False, 512)
    # With checkpoints the peak is in the recomputation, where no whole weight is dequantized on a CPU; the plan adds one.
    for checkpoints, tolerance in ((False, 0.05), (True, 0.1)):
        run = config_of(gradient_checkpointing=checkpoints)
        hardware = dict(attention="sdpa", card=card_of("h100"), autocast=False)
        case = Case(shape, run, Tokens(4, 96, labelled=4), "bfloat16", adapters, load_in_4bit=True, **hardware)
        assert resident(case)["parameters"] == sum(tensor.nbytes for tensor in base)
        live = LiveBytes({id(tensor): tensor for tensor in (*base, *model.parameters(), *model.buffers())}.values())
        known = live.now
        with checkpointing(model) if checkpoints else contextlib.nullcontext(), live:
            token_logps(model, one_batch, "torch").sum().backward()
        model.zero_grad(set_to_none=True)
        planned = max(sum(components.values()) for phase, components in phases(case).items() if phase != STEP)
        assert planned - sum(resident(case).values()) == pytest.approx(live.peak - known, rel=tolerance)
        seconds, of_16_bits = step_seconds(case), step_seconds(dataclasses.replace(case, load_in_4bit=False))
        moved = (3 if checkpoints else 2) * (case.code_bytes + 2 * linear)
        assert seconds.pop("dequantization") == pytest.approx(moved / case.card.bandwidth)
        assert seconds == of_16_bits


def test_a_base_of_four_bits_is_whole_on_each_card():
    options = dict(adapters=dict(rank=16), load_in_4bit=True)
    alone, shared = plan("8b", **options), plan("8b", gpus=8, **options)
    codes = alone.case.code_bytes
    assert codes == pytest.approx(0.516 * shape_of("8b").linear_numel, rel=1e-3)
    parameters = [planned.phases[FORWARD]["parameters"] for planned in (alone, shared)]
    assert parameters[0] - codes == pytest.approx(8 * (parameters[1] - codes))
    assert plan("8b", gpus=8, adapters=dict(rank=16)).seconds["network"] > 4 * shared.seconds["network"]
    assert "in bfloat16, linear layers in 4 bits, 41,943,040 trained" in shared.title()
    listed = ways("8b", UnlearnConfig(), card="12:500:100")
    assert "base in 4 bits" in listed.fitting[0].savings and "--lora-rank 16 --load-in-4bit" in listed.fitting[0].command


@pytest.mark.counts
def test_layouts_of_several_cards():
    def layout(gpus=16, **options):
        return plan("70b", config_of(gradient_checkpointing=True, **options), gpus=gpus)

    base, head, copies, offloaded = layout(), layout(head_in_shards=True), layout(replicas=2), layout(cpu_offload=True)
    n_params, n_head = 70_553_706_496, 128256 * 8192
    name = "head's gradient in fp32"
    assert head.phases[FORWARD][name] == 4 * n_head / 16 == base.phases[FORWARD][name] / 16
    what = "fp32 gradient of the head of llama-3-70b, on each of 16 cards; head in shards"
    parity.count(what, base.phases[FORWARD][name], head.phases[FORWARD][name], "computed")
    # The hidden states of all tokens go to all processes and back, in place of the head and of the embeddings.
    assert base.seconds["network"] - head.seconds["network"] == pytest.approx(
        (15 / 16 * 2 * n_head * (2 + 4) - 15 * 4096 * 8192 * (2 + 4 + 2 + 2)) / 50e9
    )
    both = layout(head_in_shards=True, replicas=2)
    for component, held in both.phases[STEP].items():  # the layers exist twice, head and embeddings once
        assert held == pytest.approx(2 * base.phases[STEP][component] * (1 - n_head / n_params), rel=1e-3)
    for component in ("parameters", "optimizer states", "low bits"):
        assert copies.phases[STEP][component] == pytest.approx(2 * base.phases[STEP][component])
    outside = 2 * n_head + 8192
    within = 7 / 8 * ((2 + 2 + 4) * n_params - 2 * outside) / 450e9  # the shards of a copy are in one machine
    assert copies.seconds["network"] == pytest.approx(within + 2 * 1 / 2 * 4 * n_params / 8 / 50e9)
    assert "parameters" not in offloaded.phases[FORWARD] and offloaded.peak_bytes < base.peak_bytes
    held = sum(base.phases[STEP][component] for component in ("parameters", "gradients", "optimizer states", "low bits"))
    assert offloaded.host_bytes == pytest.approx(held)
    assert offloaded.seconds["transfer of parameters"] == pytest.approx((2 * 2 * n_params - 2 * outside) / 16 / 64e9)
    assert offloaded.seconds["optimizer"] == pytest.approx(base.seconds["optimizer"] * 3000 / (300 / 8))
    assert "GB of shards of parameters, gradients and states for each GPU" in offloaded.table()
    assert "16 x h100, FSDP2 with 2 copies of the shards" in copies.title()


def test_embeddings_that_read_their_rows_themselves_are_gathered(monkeypatch):
    """A run refuses them where they are tied to the head, and so does the plan. Those of Gemma, which are scaled, are not."""
    config = FAMILIES["gemma2, capped"]()
    assert plan(config, config_of(head_in_shards=True), gpus=2).case.looks_up
    monkeypatch.setattr(shapes, "can_look_up", lambda _: False)
    with pytest.raises(
        ValueError, match="head_in_shards: expected embeddings that are looked up .* got those of gemma2, which"
    ):
        plan(config, config_of(head_in_shards=True), gpus=2)
    config.tie_word_embeddings = False
    case = plan(config, config_of(head_in_shards=True), gpus=2).case
    assert not case.looks_up and case.vocabulary == {(case.shape.vocab, case.shape.hidden): 1}


def test_layouts_are_among_the_ways():
    """Each is an option of the command, whose parser takes the line."""
    listed = [
        *ways("8b", UnlearnConfig(), card="12:500:100", gpus=4).fitting,
        *ways("70b", UnlearnConfig(), gpus=16, adapters=dict(rank=16)).fitting,
    ]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    runs = []
    for way in listed:
        words = shlex.split(way.command)
        runs.append(parser.parse_args(words[words.index("unlearn") + 1 :]))
        case, run = way.plan.case, runs[-1]
        layout = case.replicas, case.cpu_offload, case.head_in_shards, case.load_in_4bit
        assert layout == (run.replicas, run.cpu_offload, run.head_in_shards, run.load_in_4bit)
        assert run.batch_size == case.config.batch_size * case.gpus
    frozen = [way for way in listed if way.plan.case.adapters is not None]
    assert any(way.plan.case.head_in_shards for way in frozen)  # head and embeddings are gathered there too
    for name, default in (("replicas", 1), ("cpu_offload", False), ("head_in_shards", False), ("load_in_4bit", False)):
        assert any(getattr(run, name) != default for run in runs), name


def test_cards():
    assert plan("1b", card="48:864:181").case.card == Card("48:864:181", 48e9, 864e9, 181e12)
    assert plan("1b", card=Card("x", 1e9, 1e9, 1e12)).fits is False
    assert not plan("70b", card="h100").fits and "does not fit" in plan("70b").table()


@pytest.mark.parametrize("call, message", [
    (lambda: plan("1b", card="3090"), "card: expected one of h100, h200"),
    (lambda: plan("1b", card="1:2:nan"), "card"),
    (lambda: plan("1b", gpus=0), "gpus"),
    (lambda: plan("1b", network=0.0), "network"),
    (lambda: plan("1b", host_bandwidth=0.0), "host_bandwidth"),
    (lambda: ways("1b", config_of(method="influence", max_grad_norm=1.0)), "method: expected .* is not planned"),
    (lambda: ways("1b", UnlearnConfig(), gpus=0), "gpus"),
    (lambda: plan("1b", attention="flash"), "attention"),
    (lambda: plan("1b", dtype="int8"), "dtype"),
    (lambda: plan("1b", adapters=dict(rank=4, targets=["query"])), "lora_targets: expected names .* k_proj"),
    (lambda: plan("1b", adapters=dict(rank=4, targets=["q_proj", "query"])), "lora_targets: expected names .* got 'query'"),
    (lambda: plan({"model_type": "mamba"}), "model: expected layers with attention heads, got MambaConfig"),
    (lambda: plan("1b", adapters=dict(rank=0)), "lora_rank: expected a positive whole number, got 0"),
    (lambda: plan("1b", load_in_4bit=True), "load_in_4bit: expected adapters"),
    (lambda: plan("1b", config_of(replicas=3), gpus=4), "replicas: expected a divisor of 4"),
    (lambda: plan("1b", config_of(cpu_offload=True)), "cpu_offload: expected False with one process"),
    (lambda: ways("1b", UnlearnConfig(), gpus=2, load_in_4bit=True, dtype="int8"), "dtype"),
    (lambda: plan("1b", length=0), "length"),
    (lambda: plan("1b", tokens=Tokens(2, 8, labelled=17)), "labelled: expected .* at most 16"),
    (lambda: plan("1b", config_of(method="influence", max_grad_norm=1.0)), "method: expected .* is not planned"),
    (lambda: plan("./nowhere"), "model: expected a directory"),
    (lambda: plan({"hidden_size": 8}), "model_type"),
    (lambda: plan({"model_type": "nonsense"}), "model_type"),
    (lambda: plan({"model_type": "llama", "num_hidden_layers": 10**9}), "num_hidden_layers: expected at most 4096"),
    (lambda: plan({"model_type": "t5"}), "causal language model"),
])  # fmt: skip
def test_bad_arguments(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
