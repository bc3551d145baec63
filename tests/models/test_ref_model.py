import dataclasses
import warnings

import pytest
import torch

import soul
from soul import losses
from soul.data.batches import collate
from soul.models import causal_lm, ref_model
from soul.models.ref_model import reference_head, reference_hidden, reference_logps
from soul_kernels import LinearOptions, Reference, linear_objective
from tests.support import tolerances as tol
from tests.support.helpers import needs_kernels_on_cpu
from tests.support.models import lora_model, sequences, tiny_model, tiny_tokenizer

BACKENDS = ["reference", "torch", pytest.param("triton", marks=needs_kernels_on_cpu)]
FAST = dict(batch_size=2, backend="reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.covers("reference model (KL, DPO, NPO)", "one process")
def test_logps_are_the_sums_of_the_model(backend):
    model = tiny_model()
    dataset = sequences(5)
    got = soul.reference_logps(model, dataset, batch_size=2, backend=backend)
    for sequence, value in zip(dataset, got, strict=True):
        logps = model(input_ids=torch.tensor([sequence.input_ids])).logits[0].log_softmax(-1)
        want = sum(logps[t, label].item() for t, label in enumerate(sequence.labels) if label != -100)
        assert value == pytest.approx(want, abs=10 * tol.LOGP_ABS)
    assert reference_logps(model, []) == [] and reference_hidden(model, []).hidden == []


def test_hidden_states_are_those_of_the_model():
    model = tiny_model().bfloat16()
    dataset = sequences(5)
    states = soul.reference_hidden(model, dataset, batch_size=2)
    for sequence, hidden in zip(dataset, states.hidden, strict=True):
        labelled = [t for t, label in enumerate(sequence.labels) if label != -100]
        want = model.base_model(torch.tensor([sequence.input_ids])).last_hidden_state[0, labelled]
        assert hidden.dtype == torch.bfloat16 and hidden.shape == want.shape and not hidden.requires_grad
        assert (hidden - want).abs().max() < 0.05  # 2 units in the last place of values up to 4; padding sums in another order


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", [
    losses.NPO(beta=0.5, alpha=0.0), losses.NPO(beta=0.5, alpha=0.0, reduction="token_mean"), losses.DPO(beta=0.5, alpha=0.0),
    losses.KLMin(gamma=0.0), losses.UNDIAL(beta=0.0, alpha=0.0),
], ids=lambda objective: type(objective).__name__)  # fmt: skip
def test_ratios_and_divergences_of_an_unchanged_model_are_exactly_zero(objective, backend):
    """The same sequences and padding give a ratio and a KL of exactly 0; other batches differ by rounding only."""
    model = tiny_model()
    dataset = sequences(4)  # 4: sums and means of equal numbers are exact
    weight, _ = causal_lm.head(model)
    forget, retain = ([], dataset) if objective.alpha else (dataset, [])
    terms = []
    for size in (4, 1):  # the batch's own composition, and each sequence alone
        states = reference_hidden(model, dataset, batch_size=size)
        sums = reference_logps(model, dataset, batch_size=size, backend=backend) if forget else None
        batch = collate(forget, retain, ref_logps=sums, ref_hidden=states.hidden)
        assert states.weight is not weight and torch.equal(states.weight, weight)
        assert states.hidden[0].device.type == "cpu"

        def watched(logps, tokens, terms=terms):
            if objective.divergence:
                terms.append(tokens.divergences.abs().max().item())
            else:
                terms.append((logps.sum(1) - tokens.ref_logps).abs().max().item())
            return objective(logps, tokens)

        watched.divergence = objective.divergence
        loss = linear_objective(
            causal_lm.hidden_states(model, batch), weight, batch.labels, watched, is_forget=batch.is_forget,
            ref_logps=batch.ref_logps, reference=Reference(batch.ref_hidden, states.weight),
            options=LinearOptions(token_indices=batch.token_indices, backend=backend),
        )  # fmt: skip
        if objective.needs_reference and size == 4:
            assert loss.item() == (2 / 0.5 * torch.tensor(2.0).log()).item()
    assert terms[0] == 0.0
    assert terms[1] <= (10 * tol.LOGP_ABS if objective.needs_reference else 1e-9)  # a KL is quadratic in what moved


def test_reference_is_computed_without_adapters_and_restores_the_model():
    model = lora_model()
    base = tiny_model("llama, untied")
    dataset = sequences(3)
    model.train()
    rng = torch.get_rng_state()
    before = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    assert reference_logps(model, dataset, **FAST) == reference_logps(base, dataset, **FAST)
    states, base_states = reference_hidden(model, dataset), reference_hidden(base, dataset)
    assert all(map(torch.equal, states.hidden, base_states.hidden))
    assert ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]) == before
    assert torch.equal(torch.get_rng_state(), rng)
    batch = collate(dataset, [])
    assert (causal_lm.token_logps(model, batch) - causal_lm.token_logps(base, batch)).abs().max() > 1e-3  # on again


def test_the_head_is_copied_where_it_is_trained():
    model = tiny_model("phi, head with a bias")
    weight, bias = causal_lm.head(model)
    ref_head = reference_head(model)
    assert ref_head[0] is not weight and torch.equal(ref_head[0], weight) and torch.equal(ref_head[1], bias)
    weight.requires_grad_(False)
    ref_head = reference_head(model)  # a bias that is trained alone moves the logits as well
    assert ref_head[0] is weight and ref_head[1] is not bias
    bias.requires_grad_(False)
    assert reference_head(model) == (None, None)
    adapted = lora_model(modules_to_save=["lm_head"])
    adapted.get_output_embeddings().weight.data.zero_()
    assert torch.equal(reference_head(adapted)[0], tiny_model("llama, untied").lm_head.weight)
    assert reference_head(lora_model()) == (None, None)


@pytest.fixture
def counted(monkeypatch):
    """Count the batches of data that a model has been run on, without the probe tokens of `check_linear_head`."""
    calls = []
    real = causal_lm.hidden_states

    def hidden_states(model, batch):
        if hasattr(batch, "labels"):
            calls.append(len(batch.labels))
        return real(model, batch)

    for module in (causal_lm, soul.models.ref_model):
        monkeypatch.setattr(module, "hidden_states", hidden_states)
    return calls


def compute(kind, model, dataset, cache, **options):
    if kind == "logps":
        return reference_logps(model, dataset, cache=cache, backend="reference", **options)
    return torch.cat(reference_hidden(model, dataset, cache=cache, **options).hidden).tolist()


@pytest.mark.parametrize("kind", ["logps", "hidden"])
def test_cache_is_used_for_the_same_and_for_nothing_else(kind, tmp_path, counted):
    tokenizer = tiny_tokenizer()
    dataset = sequences(3)
    cache = tmp_path / "new" / "cache"

    def fresh(change=None):
        model = tiny_model()
        if change:
            change(model)
        return model

    want = compute(kind, fresh(), dataset, cache)
    (file,) = cache.iterdir()  # and nothing beside it
    assert file.suffix == ".safetensors" and counted == [3]
    assert compute(kind, fresh(), dataset, cache) == want and counted == [3]

    def bump(name, amount=1e-3):
        def change(model):
            dict([*model.named_parameters(), *model.named_buffers()])[name].data.view(-1)[-1] += amount

        return change

    relabelled = [dataclasses.replace(dataset[0], labels=[-100, *dataset[0].labels[1:]]), *dataset[1:]]
    relabelled[0].labels[-2] = 7
    others = {
        "weights": (fresh(bump("model.layers.1.mlp.down_proj.weight")), dataset, {}),
        "buffers": (fresh(bump("model.rotary_emb.inv_freq")), dataset, {}),
        "configuration": (fresh(lambda model: setattr(model.config, "rms_norm_eps", 0.3)), dataset, {}),
        "attention": (fresh(lambda model: model.set_attn_implementation("eager")), dataset, {}),
        "dtype": (fresh(lambda model: model.bfloat16()), dataset, {}),
        "labels": (fresh(), relabelled, {}),
        "order": (fresh(), dataset[::-1], {}),
        "tokenizer": (fresh(), dataset, dict(tokenizer=tokenizer)),
        "batch size": (fresh(), dataset, dict(batch_size=2)),  # decides the last bit
    }
    for index, (what, (model, data, options)) in enumerate(others.items()):
        before = len(counted)
        compute(kind, model, data, cache, **options)
        assert len(counted) > before and len(list(cache.iterdir())) == index + 2, what
    tokenizer.add_tokens(["new"])
    compute(kind, fresh(), dataset, cache, tokenizer=tokenizer)
    assert len(list(cache.iterdir())) == len(others) + 2


@pytest.mark.parametrize("kind", ["logps", "hidden"])
def test_a_cache_file_that_is_not_right_is_computed_again(kind, tmp_path, counted):
    model = tiny_model()
    dataset = sequences(3)
    want = compute(kind, model, dataset, tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    compute(kind, model, sequences(3), tmp_path / "other")
    (stale,) = (tmp_path / "other").iterdir()
    for content in (stale.read_bytes(), b"", good[:40], good[:-1], good[:-1] + bytes([good[-1] ^ 1]), good + b"more"):
        file.write_bytes(content)
        del counted[:]
        with pytest.warns(UserWarning, match=f"{file.name}: .*; computed again"):
            assert compute(kind, model, dataset, tmp_path) == want
        assert counted == [3]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert compute(kind, model, dataset, tmp_path) == want
        assert counted == [3]  # what was written in its place is right


def test_no_bit_of_a_cache_file_is_trusted(tmp_path):
    """Header, key, checksum, data: one flipped bit in any byte, and any truncation, is found."""
    path = tmp_path / "file"
    tensor = torch.randn(7)
    ref_model._write(path, "logps", "a key", tensor)
    good = path.read_bytes()
    assert torch.equal(ref_model._read(path, "logps", "a key", (7,))[0], tensor)
    bad = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    for content in [*bad, *(good[:size] for size in range(len(good)))]:
        path.write_bytes(content)
        assert ref_model._read(path, "logps", "a key", (7,))[0] is None
    ref_model._write(path, "logps", "a key", tensor)
    assert ref_model._read(path, "logps", "a key", (8,)) == (None, "shape (7,), expected (8,)")
    assert ref_model._read(path, "logps", "another", (7,)) == (None, "written for another key")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize("kind", ["logps", "hidden"])
def test_a_forged_cache_file_of_another_dtype_is_computed_again(kind, dtype, tmp_path):
    """Key, shape and checksum are right: whoever writes a file can compute them."""
    model = tiny_model()
    dataset = sequences(3)
    want = compute(kind, model, dataset, tmp_path)
    (file,) = tmp_path.iterdir()
    shape = (3,) if kind == "logps" else (sum(sequence.n_labels for sequence in dataset), 32)
    try:
        ref_model._write(file, kind, file.stem.removeprefix(f"{kind}-"), torch.zeros(shape).to(dtype))
    except KeyError:
        pytest.skip(f"this version of safetensors writes no {dtype}")
    with pytest.warns(UserWarning, match=f"{file.name}: dtype {dtype}, expected one of a model.s; computed again"):
        assert compute(kind, model, dataset, tmp_path) == want


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fails(*paths):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        reference_logps(tiny_model(), sequences(2), cache=tmp_path, **FAST)
    assert list(tmp_path.iterdir()) == []


def test_adapters_do_not_change_the_key(tmp_path, counted):
    """A resumed LoRA run finds the reference that it started from."""
    model = lora_model(modules_to_save=["lm_head"])
    dataset = sequences(2)
    reference_logps(model, dataset, cache=tmp_path, **FAST)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    del counted[:]
    reference_logps(model, dataset, cache=tmp_path, **FAST)
    assert counted == []
    dict(model.named_parameters())["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"].data.add_(0.1)
    reference_logps(model, dataset, cache=tmp_path, **FAST)
    assert counted == [2]


def test_bad_arguments_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cache: expected a directory, or a new one, got the file"):
            reference_logps(tiny_model(), sequences(1), cache=path)
    with pytest.raises(ValueError, match="backend: expected one of"):
        reference_logps(tiny_model(), sequences(1), backend="cuda")
