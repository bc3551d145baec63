"""The whole run, from paths to a model that transformers loads; adapters, gradient release, graphs and option files."""

import importlib
import json
import math

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import soul
from soul import UnlearnConfig, Unlearner
from soul.cli import main
from soul.data.batches import collate
from soul.data.sources import read_examples
from soul.models import causal_lm
from soul.models.loading import load
from soul.optim.step_groups import StepGroups
from soul.run.config import build_optimizer, build_scheduler, parameter_dtype
from soul.run.graph import GraphedStep, pad
from soul.run.influence import unlearn_once
from soul.run.loop import unlearn
from soul.run.prepare import prepare
from soul.run.step import train_step
from soul_kernels import LinearOptions, TensorTable, linear_objective
from tests.evaluate.test_model import ROWS, question_rows
from tests.support.helpers import mutant, needs_kernels_on_cpu, needs_rouge
from tests.support.models import FAMILIES, examples, sequences, tiny_model, tiny_tokenizer

unlearn_module = importlib.import_module("soul.run.loop")
FAST = dict(epochs=2, batch_size=2, lr=1e-3, backend="reference")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model, training data, and data to evaluate with in TOFU's layout."""
    root = tmp_path_factory.mktemp("unlearner")
    tiny_model("llama, untied").save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    for name, rows in (("forget", examples(4)), ("retain", examples(9)[5:])):
        lines = [json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in rows]
        (root / f"{name}.jsonl").write_text("".join(lines))
    (root / "data").mkdir()
    for name in ROWS:
        file = "forget10" if name == "forget" else name
        lines = [json.dumps(row) + "\n" for row in question_rows(name, 2)]
        (root / "data" / f"{file}_perturbed.jsonl").write_text("".join(lines))
    return root


def words(folder, output, *more, model="model"):
    arguments = dict(model=folder / model, forget=folder / "forget.jsonl", retain=folder / "retain.jsonl", output=output,
                     epochs=1, batch_size=2, lr=1e-2, backend="reference", device="cpu")  # fmt: skip
    return ["unlearn", *(f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()), *more]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12)[None]).logits.float()


ALWAYS = ("gpt2, tied", "llama, untied", "phi, head with a bias", "gemma2, capped")  # each kind of head
SLOW = pytest.mark.slow(reason="a run, an evaluation and a report for each family; each kind of head is always tested")


@needs_rouge
@pytest.mark.parametrize("family", [pytest.param(name, marks=[] if name in ALWAYS else SLOW) for name in FAMILIES])
def test_every_family_is_unlearned_saved_reloaded_and_evaluated(family, folder, tokenizer, tmp_path, capsys):
    tiny_model(family).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert main(words(folder, out, "--dtype=float32", "--method=npo", model=tmp_path / "model")) == 0
    said = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    before = tiny_model(family)
    now = logits(tiny_model(family))
    assert {name: p.shape for name, p in model.named_parameters()} == {n: p.shape for n, p in before.named_parameters()}
    assert not torch.equal(logits(model), now)
    (answers,) = [Unlearner(model, folder / "forget.jsonl", config=UnlearnConfig(method="ga", backend="reference"),
                            tokenizer=AutoTokenizer.from_pretrained(out)).forget_probability()]  # fmt: skip
    assert f"{answers:.3f} after" in said
    arguments = dict(model=out, data=folder / "data", output=tmp_path / "logs", json=tmp_path / "metrics.json", batch_size=8,
                 max_new_tokens=2, device="cpu", backend="reference")  # fmt: skip
    assert main(["evaluate", *(f"--{name.replace('_', '-')}={value}" for name, value in arguments.items())]) == 0
    measured = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 < measured["forget_prob"] < 1 and measured["forget_rows"] == 2
    assert "No retain model, so no forget quality" in (tmp_path / "logs" / "report.html").read_text()


def test_adapters_by_flag(folder, tmp_path):
    """Only the adapters are saved; on top of their base model they equal the merged model."""
    peft = pytest.importorskip("peft", reason="the extra hf is not installed")
    assert main(words(folder, tmp_path / "lora", "--lora-rank=4", "--dtype=float32")) == 0
    assert not (tmp_path / "lora" / "model.safetensors").exists() and not (tmp_path / "lora" / "checkpoints").exists()
    config = peft.LoraConfig.from_pretrained(tmp_path / "lora")
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 8, str(folder / "model"))
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert not any("lm_head" in name for name in config.target_modules) and len(config.target_modules) == 2 * 7
    before = logits(base)
    want = logits(peft.PeftModel.from_pretrained(base, tmp_path / "lora"))
    assert (want - before).abs().max() > 1e-3
    loaded, _ = load(tmp_path / "lora")
    assert torch.equal(logits(loaded), want)
    flags = ("--lora-rank=4", "--lora-alpha=8", "--lora-targets=q_proj,v_proj", "--merge", "--dtype=float32")
    assert main(words(folder, tmp_path / "merged", *flags)) == 0
    merged, base = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "merged", folder / "model"))
    changed = {n for (n, p), q in zip(merged.named_parameters(), base.parameters()) if not torch.equal(p, q)}
    assert len(changed) == 4 and all("q_proj" in name or "v_proj" in name for name in changed)
    again, _ = load(tmp_path / "lora", dtype="bfloat16")
    assert {p.dtype for n, p in again.named_parameters() if "lora" not in n} == {torch.bfloat16}


def test_a_run_of_adapters_that_has_ended_is_not_begun_again(folder, tmp_path, capsys):
    assert main(words(folder, tmp_path / "out", "--lora-rank=2")) == 0
    assert main(words(folder, tmp_path / "out", "--lora-rank=2", "--resume")) == 0
    assert "this run has ended" in capsys.readouterr().out


@pytest.mark.parametrize("flags, dtype, tiles", [  # all choices: the next test
    ((), torch.bfloat16, True), (("--optimizer=adamw",), torch.float32, True),
    (("--optimizer=adamw", "--lora-rank=2"), torch.bfloat16, False),
])  # fmt: skip
def test_parameters_are_bf16_where_nothing_is_lost(flags, dtype, tiles, folder, tmp_path, monkeypatch):
    """bf16 is used if it loses no bits of an update, and no time on a processor without tiles for bf16 products."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    if not (tiles or torch.cuda.is_available()):
        dtype = torch.float32
    models = []
    monkeypatch.setattr(
        "soul.run.unlearner.unlearn", lambda model, *args, log, **_: models.append(model) or log.touch() or [{}]
    )
    assert main(words(folder, tmp_path / "out", *flags)) == 0
    parameters = dict(models[0].named_parameters())
    assert {p.dtype for name, p in parameters.items() if "lora" not in name} == {dtype}
    assert {p.dtype for p in parameters.values() if p.requires_grad} == {torch.float32 if "--lora-rank=2" in flags else dtype}


def test_the_dtype_of_parameters_goes_by_optimizer_and_device(monkeypatch):
    soul = UnlearnConfig()
    adamw = UnlearnConfig(optimizer="adamw")
    influence = UnlearnConfig(method="influence")
    for tiles in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        for device_type in ("cpu", "cuda"):
            low = "bfloat16" if tiles or device_type == "cuda" else "float32"
            for config, adapters, expected in (
                (soul, None, low), (adamw, None, "float32"), (adamw, {"rank": 2}, low), (influence, None, "float32"),
            ):  # fmt: skip
                assert parameter_dtype("auto", config, adapters, device_type) == expected
                assert parameter_dtype("float16", config, adapters, device_type) == "float16"
        assert parameter_dtype("auto", soul) == "bfloat16"  # a plan is for a GPU
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # without oneDNN nobody uses the tiles
    assert parameter_dtype("auto", soul, None, "cpu") == "float32"


def test_adamw_is_one_pass_on_every_device():
    layer = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(layer, UnlearnConfig(optimizer="adamw"))
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]


def test_options_from_a_file(folder, tmp_path):
    """A file gives the same run as flags, the command line overrides it, and the file that a run saves repeats that run."""
    flags = ("--method=npo", "--beta=0.2", "--option=retain=kl", "--published-code", "--seed=3")
    assert main(words(folder, tmp_path / "flags", *flags)) == 0
    options = dict(method="npo", beta=0.2, option={"retain": "kl"}, published_code=True, seed=7, epochs=None, resume=False)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    assert main(words(folder, tmp_path / "file", "--config", str(tmp_path / "run.yaml"), "--seed=3")) == 0
    saved_config = tmp_path / "flags" / "soul_config.json"
    assert main(["unlearn", f"--config={saved_config}", f"--output={tmp_path / 'again'}"]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("flags", "file", "again")]
    assert weights[0] == weights[1] == weights[2]
    assert json.loads(saved_config.read_text())["beta"] == 0.2


@pytest.mark.parametrize("text, message", [
    ("lrr: 1", "config: expected options of the command, got 'lrr'"),
    ("lora_targets: [q_proj, v_proj]", "lora_targets: expected one value, as --lora-targets on the command line, got ['q"),
    ("- 1", "config: expected a mapping of options"),
    ("a: [", "config: expected a YAML file"),
    ("resume: maybe", "resume: expected true or false, got 'maybe'"),
    (None, "config: expected a YAML file"),
])  # fmt: skip
def test_a_broken_file_of_options_ends_with_2(text, message, folder, tmp_path, capsys):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    assert main(words(folder, tmp_path / "out", "--config", str(tmp_path / "run.yaml"))) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def run(tokenizer, n=5, **options):
    model = tiny_model()
    config = UnlearnConfig(**FAST | options)
    return model, unlearn(model, tokenizer, examples(n), examples(9)[5:], config, progress=False)


@pytest.mark.parametrize("options", [
    {}, dict(accumulate=2), dict(curvature="gnb", curvature_every=2), dict(curvature="retain", accumulate=2, batch_size=1),
], ids=["plain", "accumulate", "gnb", "retain"])  # fmt: skip
@pytest.mark.covers("gradient release", "one process")
def test_released_gradients_change_memory_only(options, tokenizer, monkeypatch):
    """Tied embeddings: the head's gradient is formed in the forward pass, and complete only at the end of the backward pass."""
    want, records = run(tokenizer, max_grad_norm=None, **options)
    held = []
    real = StepGroups.collect

    def spy(step_groups, *args):
        held.append(sum(p.grad is not None for p in step_groups._optimizer.param_groups[0]["params"]))
        return real(step_groups, *args)

    monkeypatch.setattr(StepGroups, "collect", spy)
    got, released = run(tokenizer, max_grad_norm=None, gradient_release=True, **options)
    assert [n for n in held if not n] == [0] * len(records)  # the others are refreshes of h from micro-batches
    assert len(held) == len(records) or options == dict(curvature="retain", accumulate=2, batch_size=1)
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters()))
    assert all("grad_norm" not in record and record["loss"] == r["loss"] for record, r in zip(released, records, strict=True))
    assert not any(p._post_accumulate_grad_hooks for p in got.parameters())


@pytest.mark.covers("influence", "one process")
def test_influence_is_a_method(folder, tmp_path):
    """The weights and the numbers of `unlearn_once`; a model is saved, and the log has one line."""
    arguments = dict(model=folder / "model", forget=folder / "forget.jsonl", retain=folder / "retain.jsonl", method="influence")
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    flags += ["--batch-size=2", "--option=clip=0.01", "--option=curvature=fisher", "--option=blockwise=false", "--device=cpu"]
    flags += [f"--output={tmp_path / 'out'}"]
    assert main(["unlearn", *flags]) == 0
    (record,) = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    model, tokenizer = load(folder / "model")
    config = UnlearnConfig(method="influence", batch_size=2)
    datasets = prepare(model, tokenizer, *(read_examples(arguments[name]) for name in ("forget", "retain")), config)
    results = unlearn_once(model, *datasets, batch_size=2, clip=0.01, curvature="fisher")
    assert record["factor"] == results["step"] and record["step"] == 1
    assert all(record[name] == pytest.approx(results[name]) for name in ("forget_nll", "retain_nll", "damping", "update_norm"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), model.parameters()))
    assert not torch.equal(logits(saved), logits(load(folder / "model")[0]))


def test_schedules():
    results = {}
    for schedule in ("linear", "cosine", "constant"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        scheduler = build_scheduler(optimizer, 10, 0.2, schedule)
        results[schedule] = []
        for _ in range(10):
            results[schedule].append(scheduler.get_last_lr()[0])
            optimizer.step(), scheduler.step()
    assert all(lrs[:3] == [0.5, 1.0, 1.0] for lrs in results.values()) and results["constant"][3:] == [1.0] * 7
    assert results["cosine"][6] == pytest.approx(0.5) == results["linear"][6]
    assert results["cosine"][4] > results["linear"][4] and results["cosine"][9] < results["linear"][9]


@pytest.mark.slow(reason="torch.compile traces a body for each shape of a batch")
@pytest.mark.covers("compilation (`--compile`)", "one process")
def test_a_compiled_body_gives_the_same_numbers(tokenizer, monkeypatch):
    """Without inductor, which needs a compiler: the same part is compiled, and the same steps follow."""
    monkeypatch.setattr(causal_lm, "COMPILE", dict(backend="aot_eager"))
    torch._dynamo.reset()
    compiled = causal_lm.compiled
    calls = []

    def spy(model):
        calls.append(model)
        return compiled(model)

    monkeypatch.setattr(unlearn_module, "compiled", spy)
    want, records = run(tokenizer, method="npo")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    got, compiled_records = run(tokenizer, method="npo", compile=True)
    assert calls == [got] and torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert got.base_model._compiled_call_impl is None and got.state_dict().keys() == want.state_dict().keys()
    for a, b in zip(compiled_records, records):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


class Padded(GraphedStep):
    """The steps of a `GraphedStep`, padded, and none of them captured: for machines without a GPU."""

    def __init__(self, step, device):
        self._step = step
        self.shapes = set()

    def __call__(self, batch):
        batch = pad(batch, tokens=8, rows=16)
        self.shapes.add((tuple(batch.input_ids.shape), len(batch.token_indices)))
        return self._step(batch)


@needs_kernels_on_cpu
@pytest.mark.parametrize("options", [
    dict(method="npo"), dict(method="dpo", method_options={"retain": "kl"}),
], ids=lambda options: options["method"])  # fmt: skip
def test_padded_steps_are_those_of_the_batch(options, tokenizer, monkeypatch):
    """Triton's sweep takes padded rows; their gradient must be nothing. By losses over steps that depend on each other."""
    want, records = run(tokenizer, n=3, backend="triton", epochs=1, **options)
    made = []
    monkeypatch.setattr(unlearn_module, "GraphedStep", lambda *args: made.append(Padded(*args)) or made[-1])
    monkeypatch.setattr("soul.run.prepare._check_device", lambda *args: None)
    got, padded = run(tokenizer, n=3, backend="triton", epochs=1, cuda_graph=True, **options)
    assert len(made[0].shapes) <= len(padded) == len(records)
    for a, b in zip(padded, records):
        for name in a.keys() - {"tokens_per_s", "peak_memory_gib"}:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-5), name


def check_padding(module):
    """Labels stay beside their tokens, every labelled row is there once, and what is added has no label."""
    batch = collate(sequences(3), sequences(5)[3:], ref_logps=[-1.0] * 3)
    wide = module.pad(batch, tokens=16, rows=64)
    assert wide.labels.shape == (5, 16) and len(wide.token_indices) == 64 and wide.attention_mask is None
    length = batch.labels.shape[1]
    assert torch.equal(wide.labels[:, :length], batch.labels) and (wide.labels[:, length:] == -100).all()
    assert torch.equal(wide.input_ids[:, :length], batch.input_ids)
    labelled = (wide.labels.flatten() != -100).nonzero()[:, 0]
    assert (
        torch.equal(wide.token_indices[: len(labelled)], labelled)
        and (wide.labels.flatten()[wide.token_indices[len(labelled) :]] == -100).all()
    )
    weight = torch.randn(300, 8, requires_grad=True)
    hidden = torch.randn(5, 16, 8)
    loss = linear_objective(hidden, weight, wide.labels, soul.losses.NPO(), is_forget=wide.is_forget,
                            ref_logps=wide.ref_logps, options=LinearOptions(wide.token_indices, backend="triton"))  # fmt: skip
    plain = linear_objective(hidden[:, :length], weight, batch.labels, soul.losses.NPO(), is_forget=batch.is_forget,
                             ref_logps=batch.ref_logps,
                             options=LinearOptions(batch.token_indices, backend="triton"))  # fmt: skip
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


@needs_kernels_on_cpu
def test_padding():
    check_padding(importlib.import_module("soul.run.graph"))


@needs_kernels_on_cpu
@pytest.mark.parametrize("old, new", [("// length * n_padding", "* 0"), ("value=last", "value=0"),
                                      ("wider(batch.labels, IGNORE_INDEX)", "wider(batch.labels, 0)")])  # fmt: skip
def test_wrong_padding_is_noticed(old, new, tmp_path):
    with pytest.raises((AssertionError, ValueError)):
        check_padding(mutant("soul.run.graph", old, new, tmp_path))


@pytest.mark.parametrize("limit", [1.0, math.inf])  # inf: the step does without the norm, which is logged all the same
def test_a_step_reuses_the_tables_of_the_step_before(limit, monkeypatch):
    """A graph is captured after one eager step, and nothing can be allocated on the host then."""
    made = []
    real = TensorTable.rebuild
    monkeypatch.setattr(
        TensorTable, "rebuild", lambda table, *args, **options: made.append(table) or real(table, *args, **options)
    )
    model = tiny_model().train()
    config = UnlearnConfig(method="graddiff", max_grad_norm=limit)
    optimizer = build_optimizer(model, config)
    batch = collate(sequences(2), sequences(4)[2:])
    norms = []
    for _ in range(2):
        made.clear()
        norms.append(train_step(model, [batch], config.objective(), optimizer, config)["grad_norm"].item())
    assert not made and norms[0] != norms[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("options", [
    dict(method="npo"), dict(method="graddiff", curvature="retain", curvature_every=2, clip_target=0.5),
    dict(method="klmin", state_dtype="8bit"),
], ids=["npo", "retain", "klmin"])  # fmt: skip
def test_replayed_steps_are_eager_ones(options, tokenizer):
    results = []
    for cuda_graph in (False, True):
        model = tiny_model().cuda()
        config = UnlearnConfig(**FAST | dict(backend="auto", epochs=4), cuda_graph=cuda_graph, **options)
        results.append(unlearn(model, tokenizer, examples(5), examples(9)[5:], config, progress=False))
    for eager, replayed in zip(*results, strict=True):
        for name in eager.keys() - {"tokens_per_s", "peak_memory_gib"}:
            assert replayed[name] == pytest.approx(eager[name], rel=2e-2, abs=1e-4), name  # bf16 autocast, other padding


def test_unlearner_from_python(tokenizer, folder, tmp_path):
    """A loaded model is changed in place; with an output directory it is also saved."""
    model = tiny_model("llama, untied")
    config = UnlearnConfig(method="graddiff", **FAST)
    unlearner = Unlearner(model, examples(5), examples(9)[5:], config, tokenizer=tokenizer)
    before = unlearner.forget_probability()
    records = unlearner.run(progress=False)
    assert len(records) == 6 and unlearner.model is model and unlearner.forget_probability() < before
    unlearner = Unlearner(
        folder / "model", folder / "forget.jsonl", folder / "retain.jsonl", config, dtype="float32", device="cpu"
    )
    unlearner.run(tmp_path / "out", progress=False)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), unlearner.model.parameters()))
    with pytest.raises(ValueError, match="^output: expected a new or an empty directory"):
        unlearner.run(tmp_path / "out", progress=False)


@pytest.mark.parametrize("options, message", [
    (dict(tokenizer=None), "tokenizer: expected that of the model, got None"),
    (dict(tokenizer="name"), "tokenizer: expected that of the model, got 'name'; a loaded model comes without"),
    (dict(config=dict(method="npo")), "config: expected a soul.UnlearnConfig, got dict"),
    (dict(model=tiny_model().requires_grad_(False)), "model: expected parameters that require a gradient, got none"),
    (dict(dtype="bfloat16"), "dtype: expected 'auto' with a model that is loaded, got 'bfloat16'; it would not"),
    (dict(device="cpu"), "device: expected 'auto' with a model that is loaded"),
    (dict(model="name"), "tokenizer: expected None with a model by name"),
    (dict(forget=7), "forget: expected a path, a name, or a list of rows, got int"),
    (dict(adapters=dict(rank=0)), "lora_rank: expected a positive whole number, got 0"),
    (dict(adapters=dict(rank=2, dropout=1.0)), "lora_dropout: expected a number"),
    (dict(adapters=dict(rank=2, targets=["nothing"])), "lora_targets: expected linear layers of the model, got"),
    (dict(adapters=dict(rank=2, targets=["q_proj", "prj"])), "lora_targets: expected linear layers of the model, got 'prj'"),
    (dict(adapters=dict(rank=2, alpha=float("nan"))), "lora_alpha: expected a positive number, got nan"),
    (dict(adapters=dict(rank=2, alpha=0)), "lora_alpha: expected a positive number, got 0"),
    (dict(config=UnlearnConfig(replicas=2)), "replicas: expected a divisor of 1, the number of processes, got 2; each copy"),
    (dict(config=UnlearnConfig(cpu_offload=True)), "cpu_offload: expected False with one process, got True; FSDP2 offloads"),
])  # fmt: skip
@pytest.mark.refuses(
    "parameters in main memory (CPUOffloadPolicy)", "one process", "FSDP2, which offloads, needs several processes"
)
def test_what_does_not_fit_is_named(options, message, tokenizer):
    arguments = dict(model=tiny_model(), forget=examples(2), retain=examples(2), tokenizer=tokenizer) | options
    with pytest.raises(ValueError) as error:
        Unlearner(**arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("options, message", [
    (dict(gradient_release=True), "max_grad_norm: expected inf with gradient_release, got 1.0; it needs all gradients"),
    (dict(gradient_release=True, max_grad_norm=None, clip_target=0.5), "clip_target: expected None with gradient_release"),
    (dict(gradient_release=True, optimizer="adamw"), "optimizer: expected 'soul'"),
    (dict(state_dtype="8bit", optimizer="adamw"), "optimizer: expected 'soul', got 'adamw'; state_dtype belongs to it"),
    (dict(published_code=True, optimizer="adamw"), "optimizer: expected 'soul', got 'adamw'; published_code belongs to it"),
    (dict(rho=0.1, clip_target=0.5), "rho: expected 0.04 with clip_target, got 0.1; rho starts there and moves"),
    (dict(cuda_graph=True, accumulate=2), "accumulate: expected 1 with cuda_graph, got 2; a graph replays one backward"),
    (dict(cuda_graph=True, gradient_checkpointing=True), "gradient_checkpointing: expected False with cuda_graph"),
    (dict(cuda_graph=True, state_offload=True), "state_offload: expected False with cuda_graph, got True; a graph replays"),
    (dict(state_offload=True, optimizer="adamw"), "optimizer: expected 'soul', got 'adamw'; state_offload belongs to it"),
    (dict(cpu_offload=True, state_offload=True), "state_offload: expected False with cpu_offload, got True; the states then"),
    (dict(head_in_shards=True, backend="reference"), "backend: expected another one than 'reference' with head_in_shards"),
    (dict(replicas=0), "replicas: expected a positive whole number, got 0"),
    (dict(lr="1e-5"), "lr: expected a number >= 0.0, got '1e-5'"),  # as YAML reads it
    (dict(schedule="step"), "schedule: expected one of 'linear', 'cosine', 'constant'"),
    (dict(state_dtype="4bit"), "state_dtype: expected one of"),
    (dict(param_rounding="up"), "param_rounding: expected one of"),
    (dict(method="influence", lr=1e-4), "lr: expected 1e-05 with the method 'influence', got 0.0001; it takes batch_size"),
    (dict(method="influence", eval_every=1), "eval_every: expected 0 with the method 'influence'"),
])  # fmt: skip
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError) as error:
        UnlearnConfig(**options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("flags, message", [
    (("--cuda-graph",), "cuda_graph: expected a model on a GPU, got cpu; no other device has such graphs: leave it out"),
    (("--merge",), "merge: expected nothing without --lora-rank"),
    (("--lora-alpha=0",), "lora_alpha: expected nothing without --lora-rank"),
    (("--lora-dropout=0.1",), "lora_dropout: expected nothing without --lora-rank"),
    (("--replicas=2",), "replicas: expected a divisor of 1, the number of processes, got 2"),
    (("--gpus=8",), "gpus: expected 1 without --dry-run, got 8; torchrun"),
    (("--lora-rank=2", "--lora-targets=q_proj,k_prj"), "lora_targets: expected linear layers of the model, got 'k_prj'"),
])  # fmt: skip
def test_flags_that_do_not_fit_end_with_2(flags, message, folder, tmp_path, capsys):
    assert main(words(folder, tmp_path / "out", *flags)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
