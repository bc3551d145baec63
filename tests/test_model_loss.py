"""soul.unlearning_loss on tiny models of many families, against the objective's formula on the model's own logits."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import soul
from soul import losses
from soul.models import causal_lm, head_call
from soul_kernels import Head, linear_objective
from tests.support import tolerances as tol
from tests.support.helpers import assert_close
from tests.support.models import examples, sequences, tiny_tokenizer

transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
TWO_KV = SIZES | dict(num_key_value_heads=2)
HEADS_OF_8 = TWO_KV | dict(head_dim=8)
GPT2 = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
BLOOM = dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
# Names of transformers. Scales and caps are such that every log-probability depends on them.
FAMILIES = {
    "llama": TWO_KV,
    "mistral": HEADS_OF_8,
    "mixtral": TWO_KV | EXPERTS,
    "qwen2": TWO_KV,
    "qwen3": HEADS_OF_8,
    "gemma": HEADS_OF_8,
    "gemma2": HEADS_OF_8 | dict(final_logit_softcapping=2.0, attn_implementation="eager"),
    "gemma3_text": HEADS_OF_8,
    "phi": TWO_KV,
    "phi3": TWO_KV,
    "gpt2": GPT2,
    "gpt_neo": dict(vocab_size=64, hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4,
                    max_position_embeddings=64, bos_token_id=1, eos_token_id=2),
    "gpt_neox": SIZES,
    "gptj": GPT2 | dict(rotary_dim=4),
    # The head of OPT-350m is narrower than its layers, and a projection lies between.
    "opt": dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=16,
                max_position_embeddings=64),
    "bloom": BLOOM,
    "falcon": dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "mpt": dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "cohere": TWO_KV | dict(logit_scale=0.0625),
    "cohere2": TWO_KV | dict(logit_scale=0.0625),
    "granite": TWO_KV | dict(logits_scaling=8.0),
    "olmo2": TWO_KV,
    "stablelm": TWO_KV,
    "starcoder2": TWO_KV,
    "smollm3": TWO_KV,
}  # fmt: skip
BENT = ("gemma2", "phi", "cohere", "cohere2", "granite")  # capped; with a bias; scaled


# The way from a model to the ops is tested here, not the kernels.
pytestmark = pytest.mark.usefixtures("without_kernels")


def randomized(model):
    """In evaluation mode, biases and norms included, with logits of several units: a lost cap or bias changes everything."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()


def model_of(family, **options):
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family] | options)
    return randomized(transformers.AutoModelForCausalLM.from_config(config))


def side(lengths, prompt, seed):
    """Sequences padded on the right; the prompt is not labelled."""
    position = torch.arange(max(lengths))
    end = torch.tensor(lengths)[:, None]
    mask = (position < end).long()
    ids = torch.randint(3, 64, mask.shape, generator=torch.Generator().manual_seed(seed)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((position < prompt) | (mask == 0), -100)}


def make_batch():
    forget = side((5, 7), prompt=2, seed=0) | {"ref_logps": torch.tensor([-20.0, -25.0])}
    return {"forget": forget, "retain": side((9, 6), prompt=1, seed=1)}


def logps_of(model, side):
    """Log-probabilities [B, T - 1] of the labels, from the model's own logits, and which positions are labelled."""
    logits = model(input_ids=side["input_ids"], attention_mask=side["attention_mask"], use_cache=False).logits
    labels = side["labels"][:, 1:]
    return -F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100), labels != -100


def npo_by_definition(model, batch, beta=0.1):
    forget, _ = logps_of(model, batch["forget"])
    retain, labelled = logps_of(model, batch["retain"])
    ratios = forget.sum(1) - batch["forget"]["ref_logps"]
    return -(2 / beta) * F.logsigmoid(-beta * ratios).mean() - retain.sum() / labelled.sum()


def gradients(model, loss):
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, grads))


def check_npo(model, batch, loss):
    check_loss_and_gradients(model, loss, npo_by_definition(model, batch))


def check_loss_and_gradients(model, loss, want):
    """Loss and gradient of each parameter, relative to its own norm or, where that is all but 0, to a 100th of the whole."""
    assert abs(loss - want) <= 2e-5 * abs(want), f"{loss} is not {want}"
    check_gradients(gradients(model, loss), gradients(model, want))


def check_gradients(got, expected, tolerance=2e-5):
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / max(gradient.norm(), 0.01 * whole)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_a_batch_that_is_padded_on_the_right_are_those_with_its_mask(family):
    """The mask is left out, but for families with attention code of their own."""
    model = model_of(family)
    batch = types.SimpleNamespace(**side((5, 9, 7), prompt=2, seed=0))
    masks = []
    model.base_model.register_forward_pre_hook(lambda _, args, inputs: masks.append(inputs["attention_mask"]), with_kwargs=True)
    want = causal_lm.hidden_states(model, batch)
    batch.pads_right = True
    got = causal_lm.hidden_states(model, batch)
    keeps_mask = family in ("gpt_neo", "bloom", "falcon", "mpt", "stablelm")
    # The last transformers that Python 3.10 gets still has attention of GPT-J's own.
    keeps_mask |= family == "gptj" and not model._supports_sdpa
    assert masks[0] is batch.attention_mask and masks[1] is (batch.attention_mask if keeps_mask else None)
    tokens = batch.attention_mask.bool()
    assert_close(got[tokens], want[tokens], 1e-5, "hidden states")


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(family):
    model = model_of(family)
    batch = make_batch()
    check_npo(model, batch, soul.unlearning_loss(model, batch, losses.NPO(beta=0.1)))
    causal_lm.check_linear_head(model)  # `soul unlearn` takes the other way, from hidden states that the body returns
    retain = batch["retain"] | {"labels": head_call.shifted_labels(batch["retain"]), "token_indices": None}
    with torch.no_grad():
        error = causal_lm.token_logps(model, types.SimpleNamespace(**retain))[:, :-1] - logps_of(model, batch["retain"])[0]
    assert error.abs().max() <= tol.LOGP_ABS


@pytest.mark.parametrize("family", BENT)
def test_a_lost_bias_scale_or_cap_would_be_noticed(family, monkeypatch):
    """The numbers show it, since the hidden states and the weight of the head alone give another loss; so does the error."""
    model = model_of(family)
    batch = make_batch()
    objective = losses.NPO(beta=0.1)
    bias = causal_lm.head(model)[1]
    assert (bias is None) != (family == "phi")
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="is not"):
        patch.setattr("soul.model_loss.linear_objective", lambda hidden, head, *args, **options: linear_objective(
            hidden, Head(head.weight), *args, **options))  # fmt: skip
        check_npo(model, batch, soul.unlearning_loss(model, batch, objective))
    if bias is None:
        monkeypatch.setattr(causal_lm, "transform", lambda model: {"logit_scale": 1.0, "softcap": None})
        with pytest.raises(ValueError, match=f"got other logits in {type(model).__name__}"):
            soul.unlearning_loss(model, batch, objective)


class Squared(transformers.LlamaForCausalLM):
    def bend(self, logits):
        return logits**2

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = self.bend(output.logits)
        return output


class Capped(Squared):
    def bend(self, logits):
        return 1000 * torch.tanh(logits / 1000)


class Shifted(Squared):
    """A bias outside the head, as in Bart."""

    def bend(self, logits):
        return logits + torch.linspace(-1, 1, logits.shape[-1])


class Cut(Squared):
    """A vocabulary that is padded to a round number, and cut."""

    def bend(self, logits):
        return logits[..., :-3]


class Normalized(torch.nn.Linear):
    """The head of Baichuan 2."""

    def forward(self, hidden):
        return F.linear(hidden, F.normalize(self.weight))


def normalized():
    model = model_of("llama")
    model.lm_head = Normalized(32, 64, bias=False)
    return model


def with_attribute(family, name, value):
    """A model whose logits are not those that its configuration describes."""
    model = model_of(family)
    holder, _, name = name.rpartition(".")
    setattr(model.config if holder else model, name, value)
    return model


REFUSED = {
    "squares": lambda: randomized(Squared(transformers.LlamaConfig(**TWO_KV))),
    "cap that the configuration does not name": lambda: randomized(Capped(transformers.LlamaConfig(**TWO_KV))),
    "bias outside the head": lambda: randomized(Shifted(transformers.LlamaConfig(**TWO_KV))),
    "part of the vocabulary": lambda: randomized(Cut(transformers.LlamaConfig(**TWO_KV))),
    "head that normalizes its weight": normalized,
    "scale that is not the configuration's": lambda: with_attribute("cohere", "logit_scale", 0.25),
    "cap in the configuration alone": lambda: with_attribute("llama", "config.final_logit_softcapping", 30.0),
    "scale in the configuration alone": lambda: with_attribute("mpt", "config.logit_scale", 0.5),  # transformers ignores it
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_logits_that_are_no_linear_map_of_the_hidden_states_are_refused(name):
    model = REFUSED[name]()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=rf"model: expected logits = softcap tanh.*got other logits in {type(model).__name__}"):
        soul.unlearning_loss(model, make_batch(), losses.NPO(beta=0.1))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before))
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("use", [
    lambda model: soul.Unlearner(model, examples(2), tokenizer=tiny_tokenizer()),
    lambda model: soul.reference_logps(model, sequences(2, vocab_size=64)),
    lambda model: soul.reference_hidden(model, sequences(2, vocab_size=64)),
], ids=["Unlearner", "reference_logps", "reference_hidden"])  # fmt: skip
def test_a_loaded_model_with_nonlinear_logits_is_refused_where_its_body_is_called(use):
    """A model by name is checked as it is loaded."""
    with pytest.raises(ValueError, match="got other logits in Squared"):
        use(REFUSED["squares"]())


def test_a_model_is_compared_with_its_configuration_once(monkeypatch):
    """The comparison waits for the device, so a training loop must not repeat it."""
    model = model_of("cohere")
    batch = make_batch()
    comparisons = []
    formula = head_call.transformed
    monkeypatch.setattr(head_call, "transformed", lambda *a, **options: comparisons.append(a) or formula(*a, **options))
    losses_of_steps = [soul.unlearning_loss(model, batch, losses.NPO(beta=0.1)).item() for _ in range(3)]
    assert len(comparisons) == 1 and len({*losses_of_steps}) == 1
    model.config.logit_scale = 0.5  # the model itself keeps the scale that it was made with
    with pytest.raises(ValueError, match="got other logits in CohereForCausalLM"):
        soul.unlearning_loss(model, batch, losses.NPO(beta=0.1))


def test_a_loss_without_values_has_its_shape():
    """Under FakeTensorMode, as torch's memory estimators run a training step."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_of("llama")
        loss = soul.unlearning_loss(model, make_batch(), losses.GradDiff())
        loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


def test_models_that_read_another_sequence_are_refused():
    config = transformers.BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                     decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)  # fmt: skip
    with pytest.raises(ValueError, match="model: expected a causal language model, got BartForConditionalGeneration"):
        soul.unlearning_loss(transformers.BartForConditionalGeneration(config), make_batch(), losses.NPO())


def test_a_head_of_its_own_class_that_is_linear_is_accepted():
    """Quantization and adapters wrap heads; what they compute decides."""

    class Linear(torch.nn.Linear):
        def forward(self, hidden):
            return hidden @ self.weight.T + self.bias

    model = model_of("llama")
    batch = make_batch()
    model.lm_head = Linear(32, 64)
    check_npo(model, batch, soul.unlearning_loss(model, batch, losses.NPO(beta=0.1)))


def test_a_model_that_is_compiled_as_a_whole_is_refused():
    """Its body may be compiled."""
    batch = make_batch()
    for compiled in (lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager") or m):
        refused = r"model: expected a model whose head is not compiled.*model.base_model.compile\(\)"
        with pytest.raises(ValueError, match=refused):
            soul.unlearning_loss(compiled(model_of("llama")), batch, losses.NPO(beta=0.1))
    model = model_of("llama")
    model.base_model.compile(backend="eager")
    check_npo(model, batch, soul.unlearning_loss(model, batch, losses.NPO(beta=0.1)))


def test_the_loss_of_a_router_is_not_taken_for_the_logits():
    """With output_router_logits it is the first of the model's outputs."""
    model = model_of("mixtral", output_router_logits=True)
    batch = make_batch()
    check_npo(model, batch, soul.unlearning_loss(model, batch, losses.NPO(beta=0.1)))


def test_loss_alone_or_with_outputs():
    model = model_of("llama")
    batch = make_batch()
    loss = soul.unlearning_loss(model, batch, losses.NPO(beta=0.1))
    again, outputs = soul.unlearning_loss(model, batch, losses.NPO(beta=0.1), return_outputs=True)
    forget, labelled = logps_of(model, batch["forget"])
    assert loss.shape == () and torch.equal(loss, again) and outputs.logits is None
    assert (
        outputs.loss.item() == pytest.approx(-(forget.sum() / labelled.sum()).item(), rel=1e-5)
        and not outputs.loss.requires_grad
    )


def test_a_batch_without_masks_is_attended_to_in_full():
    model = model_of("llama")
    batch = make_batch()
    batch = {name: side((6, 6), prompt=2, seed=3) | {"ref_logps": torch.zeros(2)} for name in batch}
    masks = [entry.pop("attention_mask") for entry in batch.values()]
    loss = soul.unlearning_loss(model, batch, losses.NPO(beta=0.1))
    for entry, mask in zip(batch.values(), masks):
        entry["attention_mask"] = mask
    check_npo(model, batch, loss)


def without(side, name):
    return {key: value for key, value in side.items() if key != name}


@pytest.mark.parametrize("change, message", [
    (lambda b: b["forget"], r"batch: expected a forget batch, got input_ids/attention_mask/labels/ref_logps; pass \{'forget'"),
    (lambda b: [b], "batch: expected a dict of forget and retain, got list"),
    (lambda b: {"forget": b["forget"]}, r"batch: expected a retain batch for NPO\(.*, got none"),
    (lambda b: b | {"forget": without(b["forget"], "labels")},
     r"batch\['forget'\]\['labels'\]: expected a tensor \[B, T\], got none"),
    (lambda b: b | {"retain": without(b["retain"], "input_ids")}, r"batch\['retain'\]\['input_ids'\]: expected a tensor"),
    (lambda b: b | {"retain": b["retain"]["input_ids"]}, r"batch\['retain'\]: expected a dict of tensors, got Tensor"),
    (lambda b: b | {"retain": b["retain"] | {"labels": [[1]]}}, r"batch\['retain'\]\['labels'\]: expected a tensor .*got list"),
    (lambda b: b | {"retain": b["retain"] | {"labels": b["forget"]["labels"]}},
     r"batch\['retain'\]\['labels'\]: expected shape \(2, 9\), as input_ids, got shape \(2, 7\)"),
    (lambda b: b | {"forget": b["forget"] | {"ref_logps": torch.zeros(3)}},
     r"batch\['forget'\]\['ref_logps'\]: expected shape \(2,\).*got shape \(3,\)"),
    (lambda b: {name: {key: value[0] for key, value in entry.items()} for name, entry in b.items()},
     r"batch\['forget'\]\['input_ids'\]: expected \[B, T\], got shape \(7,\)"),
])  # fmt: skip
def test_batches_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        soul.unlearning_loss(model_of("llama"), change(make_batch()), losses.NPO())


def test_every_objective_of_the_documented_batches_has_a_loss():
    """docs/objectives.md: a pair of answers for DPO and PO, a reference model for KL."""
    model = model_of("llama")
    batch = make_batch()
    pair = {"original": batch["forget"], "alternate": batch["forget"] | side((7, 6), prompt=2, seed=4)}
    for objective in (cls() for cls in losses.OBJECTIVES.values()):
        forget = pair if objective.pairs or objective.relabels else batch["forget"]
        loss = soul.unlearning_loss(model, batch | {"forget": forget}, objective, ref_model=model_of("llama"))
        assert loss.isfinite() and loss.requires_grad, objective


def test_an_objective_by_its_name_is_refused():
    with pytest.raises(
        ValueError, match=r"objective: expected an objective of soul.losses, got 'npo'; for instance soul.losses.NPO\(\)"
    ):
        soul.unlearning_loss(model_of("llama"), make_batch(), "npo")
