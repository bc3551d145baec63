"""LoRA over a base of 4 bits (bitsandbytes nf4): loss, gradients and reference, and what is saved and refused."""

import importlib
import json

import pytest
import safetensors.torch
import torch
import transformers

import soul
from soul import losses
from soul.cli import main
from soul.data.batches import collate
from soul.models import causal_lm
from soul.models.adapters import add_adapters
from soul.models.loading import load
from soul.models.quantized import dequantized, four_bit, is_quantized, keep_codes
from soul.models.ref_model import base_weights, digest, reference_head, reference_logps
from tests.support.models import COMMON, examples, sequences, tiny_model, tiny_tokenizer

pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
pytest.importorskip("accelerate", reason="the extra quant is not installed")
pytest.importorskip("peft", reason="the extra hf is not installed")


@pytest.fixture(autouse=True, params=["CPU with AVX512-BF16", "CPU without"])
def cpu(request, monkeypatch):
    """Make bitsandbytes believe in one kind of CPU, then in the other, on any."""
    modules = importlib.import_module("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: request.param == "CPU with AVX512-BF16")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    tiny_model("llama, untied").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def adapted(directory, skipped=None):
    """Return a quantized model with nonzero adapters; with ``skipped=[]`` its head is quantized too."""
    config = four_bit(torch.float32)
    config.llm_int8_skip_modules = skipped
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32)
    torch.manual_seed(1)
    model = add_adapters(model, rank=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("skipped", [None, []], ids=["plain head", "head of 4 bits"])
def test_loss_and_gradients_are_those_of_the_models_own_logits(directory, skipped):
    """In `token_logps`, and in a forward of the model's own with a function at its head."""
    model = adapted(directory, skipped)
    assert hasattr(model.get_output_embeddings().weight, "quant_state") == (skipped == [])
    causal_lm.check_linear_head(model)
    batch = collate(sequences(3), [])
    labels = torch.where(batch.labels >= 0, batch.labels, 0)
    own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    own = own.gather(-1, labels[..., None])[..., 0] * (batch.labels >= 0)
    own.sum().backward()
    trained = causal_lm.trained(model)
    want = [p.grad.clone() for p in trained]
    row = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels.roll(1, 1)}
    row["labels"][:, 0] = -100
    for name in ("token_logps", "unlearning_loss"):
        model.zero_grad()
        if name == "token_logps":
            logps = causal_lm.token_logps(model, batch, "reference")
            assert torch.allclose(logps, own, atol=1e-5)
            logps.sum().backward()
        else:
            loss = soul.unlearning_loss(model, {"forget": row, "retain": row}, losses.GradDiff(gamma=0.0))
            n_tokens = int((batch.labels >= 0).sum())
            assert loss.item() == pytest.approx(-own.sum().item() / n_tokens, rel=1e-5)
            (-loss * n_tokens).backward()
        for p, gradient in zip(trained, want, strict=True):
            assert (p.grad - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_the_reference_is_the_model_without_its_adapters(directory):
    model = adapted(directory, [])
    bare = transformers.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=model.config.quantization_config, dtype=torch.float32
    )
    data = sequences(3)
    assert reference_logps(model, data, backend="reference") == reference_logps(bare, data, backend="reference")
    assert reference_head(model) == (None, None)  # frozen codes of its own, of which nobody keeps a copy


def test_two_bases_of_the_same_codes_and_other_scales_are_not_the_same(directory):
    """The cache of the reference model and resumed runs go by this digest."""
    model, _ = load(directory, load_in_4bit=True)
    before = digest(base_weights(model))
    model.model.layers[0].mlp.up_proj.weight.quant_state.offset += 1.0
    assert digest(base_weights(model)) != before


def write_model(directory, width):
    """Write a model whose head has a multiple of 32 rows, which bitsandbytes could pack."""
    options = dict(hidden_size=width, intermediate_size=2 * width, vocab_size=320, tie_word_embeddings=False)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**COMMON | options)).save_pretrained(directory)


def step(model, batch):
    """Return the logits, the base, and the gradients of a step of training, as the model is."""
    model.train().zero_grad()
    logps = causal_lm.token_logps(model, batch, "reference")
    logps.sum().backward()
    return logps, digest(base_weights(model)), [p.grad.clone() for p in causal_lm.trained(model)]


@pytest.mark.parametrize("width", [32, 64], ids=["not a multiple of 64", "multiple of 64"])
def test_an_evaluation_leaves_codes_scales_loss_and_gradients_as_they_were_to_the_bit(width, tmp_path):
    write_model(tmp_path, width)
    model = adapted(tmp_path, [])
    batch = collate(sequences(3), [])
    weight = causal_lm.stored_head(model)[0]
    file, codes = dequantized(weight), weight.detach().clone()
    logps, base, gradients = step(model, batch)
    for _ in range(2):
        with causal_lm.evaluating(model):
            evaluated = causal_lm.token_logps(model, batch, "reference")
            own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            model.generate(batch.input_ids[:, :4], max_new_tokens=2)
        assert torch.equal(evaluated, logps) and own.isfinite().all()
        assert torch.equal(dequantized(weight), file) and torch.equal(weight, codes)
        again = step(model, batch)
        assert torch.equal(again[0], logps) and again[1] == base
        assert all(map(torch.equal, again[2], gradients))


def test_codes_that_bitsandbytes_has_packed_are_refused(tmp_path):
    """Its own functions show on any CPU what a forward does on one with AVX512-BF16: the values are no longer the file's."""
    functional = importlib.import_module("bitsandbytes.functional")
    write_model(tmp_path, 64)
    model = adapted(tmp_path, [])
    weight = causal_lm.stored_head(model)[0]
    file, base = dequantized(weight), digest(base_weights(model))
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert (functional.dequantize_4bit(weight, weight.quant_state).float() - file).abs().max() > file.abs().max()
    for unpacked in (False, True):
        if unpacked:
            of_file = functional._convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
            weight.data, weight.quant_state = of_file
            assert digest(base_weights(model)) != base
        for call in (causal_lm.head, causal_lm.check_linear_head, keep_codes):
            with pytest.raises(ValueError, match="model: expected codes of 4 bits as its file has them, got .*AVX512-BF16"):
                call(model)


@pytest.mark.covers("adapters over a base of 4 bits", "one process")
def test_a_run_trains_and_saves_adapters_alone(directory, tmp_path, monkeypatch):
    """The saved adapters on a base that is quantized again have the results of the run, evaluated before or not."""
    rows = [json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in examples(8)]
    for name, some in (("forget", rows[:4]), ("retain", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    base = {name: tensor.clone() for name, tensor in base_weights(load(directory, load_in_4bit=True)[0]).items()}
    config = soul.UnlearnConfig(method="npo", lr=1e-2, epochs=2, backend="reference")
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")]

    def prepared():
        return soul.Unlearner(str(directory), *paths, config, dtype="float32", adapters={"rank": 2}, load_in_4bit=True)

    unlearner = prepared()
    assert is_quantized(unlearner.model)
    before = unlearner.forget_probability()
    unlearner.run(tmp_path / "out", progress=False)
    after = unlearner.forget_probability()
    assert after < before
    kept = base_weights(unlearner.model)
    assert all(any(torch.equal(tensor, other) for other in kept.values()) for tensor in base.values())
    saved = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved) and not (tmp_path / "out" / "model.safetensors").exists()
    prepared().run(tmp_path / "not evaluated before", progress=False)
    other = safetensors.torch.load_file(tmp_path / "not evaluated before" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, other[name]) for name, tensor in saved.items())
    again, _ = load(tmp_path / "out", load_in_4bit=True)
    unlearner.model = again
    assert unlearner.forget_probability() == pytest.approx(after, rel=1e-5)


def test_files_that_are_quantized_load_by_themselves_and_do_not_hold_the_model(directory, tmp_path):
    model, tokenizer = load(directory, load_in_4bit=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    rows = examples(4)
    with pytest.raises(ValueError, match="model: expected weights that can be trained, got quantized ones"):
        soul.Unlearner(str(tmp_path), rows[:2], rows[2:])
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"x" * path.stat().st_size)
    assert digest(base_weights(again)) == digest(base_weights(model))


def test_what_codes_cannot_do_is_refused_by_name(directory, tmp_path, capsys):
    model, tokenizer = load(directory, load_in_4bit=True)
    rows = examples(4)
    with pytest.raises(ValueError, match="model: expected weights that can be trained, got quantized ones, .*--lora-rank 16"):
        soul.Unlearner(model, rows[:2], rows[2:], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="load_in_4bit: expected adapters on a quantized model"):
        soul.Unlearner(str(directory), rows[:2], rows[2:], load_in_4bit=True)
    with pytest.raises(ValueError, match="load_in_4bit: expected False with a model that is loaded"):
        soul.Unlearner(model, rows[:2], rows[2:], tokenizer=tokenizer, adapters={"rank": 2}, load_in_4bit=True)
    unlearner = soul.Unlearner(model, rows[:2], rows[2:], tokenizer=tokenizer, adapters={"rank": 2})
    with pytest.raises(ValueError, match="merge: expected False with a quantized model"):
        unlearner.run(tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()
    words = f"unlearn --model {directory} --forget a.jsonl --retain b.jsonl --output {tmp_path / 'out'} --load-in-4bit"
    for more, message in (
        ("", "load_in_4bit: expected nothing without --lora-rank"),
        ("--lora-rank 2 --merge", "merge: expected False with a quantized model"),
    ):
        assert main([*words.split(), *more.split()]) == 2
        assert message in capsys.readouterr().err
