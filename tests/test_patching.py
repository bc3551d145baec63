"""soul.patch on tiny models of many families, against the same models as they were."""

import copy
import io
import os
import pathlib
import pickle

import pytest
import torch
import torch.nn.functional as F

import soul
from soul import losses
from soul.models import causal_lm, head_call
from tests.distributed.test_processes import run
from tests.support.helpers import peak_bytes
from tests.support.models import lora_model, tiny_model
from tests.test_model_loss import (
    FAMILIES,
    Squared,
    check_gradients,
    check_loss_and_gradients,
    gradients,
    logps_of,
    make_batch,
    model_of,
    side,
    with_attribute,
)

transformers = pytest.importorskip("transformers")
ForCausalLMLoss = pytest.importorskip("transformers.loss.loss_utils").ForCausalLMLoss
peft = pytest.importorskip("peft")

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "drop-in.md"
BATCH = side((9, 6, 7), prompt=2, seed=0)
IDS, MASK, LABELS = (BATCH[name] for name in ("input_ids", "attention_mask", "labels"))

# The way from a model to the ops is tested here, not the kernels.
pytestmark = pytest.mark.usefixtures("without_kernels")


def both(model, **inputs):
    """The outputs of a model as it is, and patched, with the same draws of dropout."""
    torch.manual_seed(0)
    want = model(**inputs)
    with soul.fused(model, return_logits=False):
        torch.manual_seed(0)
        return model(**inputs), want


def check(model, **inputs):
    got, want = both(model, **inputs)
    assert type(got) is type(want) and got.logits is None
    check_loss_and_gradients(model, got.loss, want.loss)


def check_embeddings(model):
    check(model, inputs_embeds=model.get_input_embeddings()(IDS).detach(), attention_mask=MASK, labels=LABELS)


def check_packed(model):
    """Three texts in a row, each with positions of its own."""
    packed = side((12,), prompt=1, seed=0)
    packed["labels"][:, [5, 9]] = -100
    del packed["attention_mask"]
    check(model, **packed, position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]))


def check_checkpointing(model):
    model.train()
    with causal_lm.checkpointing(model):
        check(model, **BATCH)


def check_adapters(model):
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    soul.patch(model, return_logits=False)
    wrapped = peft.get_peft_model(model, config)
    before = wrapped(**BATCH).loss
    soul.unpatch(wrapped)
    want = wrapped(**BATCH).loss
    after = soul.patch(wrapped, return_logits=False)(**BATCH).loss
    assert torch.equal(before, after)
    check_loss_and_gradients(wrapped, after, want)


def check_generation(model):
    options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    want = model.generate(input_ids=IDS[:1, :5], **options)
    with soul.fused(model):
        got = model.generate(input_ids=IDS[:1, :5], **options)
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(*pair) for pair in zip(got.logits, want.logits))


def check_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        got, want = both(model, **BATCH)
    assert abs(got.loss - want.loss) <= 1e-2 * want.loss
    check_gradients(gradients(model, got.loss), gradients(model, want.loss), 0.1)


def check_objective(model):
    is_forget = torch.tensor([True, False, True])
    logps, labelled = logps_of(model, BATCH)
    forget, retain = (logps[rows].sum() / labelled[rows].sum() for rows in (is_forget, ~is_forget))
    with soul.fused(model, losses.GradDiff(gamma=0.5, alpha=2.0), return_logits=False):
        output = model(**BATCH, is_forget=is_forget)
        whole = model(**BATCH, is_forget=is_forget.long(), return_logits=True)
    assert output.logits is None and whole.logits.shape == (*IDS.shape, 64) and torch.equal(whole.loss, output.loss)
    check_loss_and_gradients(model, output.loss, 0.5 * forget - 2.0 * retain)


def check_logits(model):
    """All of them by the model's own forward; some beside the fused loss, with their gradients."""
    want = model(**BATCH)
    with soul.fused(model):
        whole = model(**BATCH)
        last = model(**BATCH, logits_to_keep=2, return_logits=False)
        picked = model(**BATCH, logits_to_keep=torch.tensor([1, 4]))
    assert torch.equal(whole.logits, want.logits) and torch.equal(whole.loss, want.loss)
    assert torch.allclose(last.logits, want.logits[:, -2:], atol=1e-4, rtol=1e-5)
    assert torch.allclose(picked.logits, want.logits[:, [1, 4]], atol=1e-4, rtol=1e-5)
    check_loss_and_gradients(model, last.loss + last.logits.square().mean(), want.loss + want.logits[:, -2:].square().mean())


def check_tuple(model):
    got, want = both(model, **BATCH, return_dict=False, output_hidden_states=True)
    assert isinstance(got, tuple) and len(got) == len(want) - 1  # no logits
    assert torch.allclose(got[0], want[0], rtol=2e-5)
    assert all(torch.equal(*pair) for pair in zip(got[-1], want[-1]))


def check_router(model):
    """The loss of the router is added by the family's own forward."""
    model.config.output_router_logits = True
    check(model, **BATCH)
    got, want = both(model, **BATCH)
    assert torch.equal(got.aux_loss, want.aux_loss) and got.aux_loss > 0


POSITIONLESS = {"bloom", "mpt"}  # forwards without position_ids
FEATURES = {
    "loss, gradients": lambda model: check(model, **BATCH),
    "`num_items_in_batch`": lambda model: check(model, **BATCH, num_items_in_batch=torch.tensor(7)),
    "`inputs_embeds`": check_embeddings,
    "`position_ids`": check_packed,
    "checkpointing": check_checkpointing,
    "LoRA": check_adapters,
    "`generate`": check_generation,
    "bf16 autocast": check_autocast,
    "`objective`": check_objective,
    "some logits": check_logits,
    "tuple": check_tuple,
    "router": check_router,
}
WITHOUT = {"`position_ids`": POSITIONLESS, "router": FAMILIES.keys() - {"mixtral"}}  # what a family does not have
ALWAYS = {"loss, gradients", "router", "llama", "gemma2", "phi", "cohere"}


def head_of(family):
    """Words for the head of a family."""
    model = model_of(family)
    weight, bias = causal_lm.head(model)
    transform = causal_lm.transform(model)
    words = {"tied": weight is model.get_input_embeddings().weight, "bias": bias is not None,
             "scaled": transform["logit_scale"] != 1, "capped": transform["softcap"] is not None}  # fmt: skip
    return ", ".join(word for word, has in words.items() if has)


def table():
    """Return the table of docs/drop-in.md, one mark for each case of `test_a_patched_family`."""
    rows = [["family", "head", *FEATURES], ["---"] * (2 + len(FEATURES))]
    for family in FAMILIES:
        marks = ["" if family in WITHOUT.get(feature, ()) else "yes" for feature in FEATURES]
        rows.append([f"`{family}`", head_of(family), *marks])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cases():
    """Every feature on every family that has it; without --slow the loss of all, and all on every kind of head."""
    slow = pytest.mark.slow(reason="the loss of the family, and the feature on each kind of head, are always tested")
    for family in FAMILIES:
        for feature in FEATURES:
            if family not in WITHOUT.get(feature, ()):
                always = family in ALWAYS or feature in ALWAYS
                yield pytest.param(family, feature, marks=() if always else slow)


@pytest.mark.parametrize("family, feature", cases())
def test_a_patched_family(family, feature):
    FEATURES[feature](model_of(family))


def test_the_table_of_the_documentation_is_the_one_of_the_tests():
    assert table() in PAGE.read_text(), f"docs/drop-in.md lacks this table:\n{table()}"


def test_the_very_same_forward_is_there_afterwards():
    model = model_of("llama").train()
    method = model.forward
    modules = list(model.modules())
    attributes = dict(vars(model))
    assert soul.patch(model) is model and model.forward != method
    assert vars(model).keys() - attributes.keys() == {"forward"} and all(module.training for module in modules)
    assert soul.unpatch(model) is model
    assert model.forward == method and vars(model) == attributes and list(model.modules()) == modules

    def forward(**inputs):
        return method(**inputs)

    model.forward = forward
    with pytest.raises(KeyError), soul.fused(model):
        assert model.forward is not forward
        raise KeyError
    assert model.forward is forward


def test_what_stands_around_the_forward_stays():
    """A hook of accelerate, with the patch under it or above it."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = model_of("llama")
    method = model.forward
    soul.patch(model, return_logits=False)
    hooks.add_hook_to_module(model, hooks.ModelHook())
    assert model(**BATCH).logits is None
    soul.unpatch(model)
    assert model(**BATCH).logits is not None and model._old_forward == method
    hooked = model.forward
    soul.patch(model, return_logits=False)
    assert model(**BATCH).logits is None
    soul.unpatch(model)
    assert model.forward is hooked
    hooks.remove_hook_from_module(model)
    assert model.forward == method


def test_mixed_precision_of_accelerate():
    other = pytest.importorskip("accelerate.utils.other")
    operations = pytest.importorskip("accelerate.utils.operations")
    model = soul.patch(model_of("llama"), return_logits=False)
    want = model(**BATCH).loss
    model._original_forward = model.forward  # as Accelerator.prepare_model does
    model.forward = operations.convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    assert 0 < abs(model(**BATCH).loss - want) < 1e-2 * want
    with pytest.raises(ValueError, match="model: expected one that is not patched, got a patched one"):
        soul.patch(model)
    with pytest.raises(ValueError, match="expected the patched forward, got one that was wrapped.*keep_fp32_wrapper=False"):
        soul.unpatch(model)
    other.extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert torch.equal(model(**BATCH).loss, want)
    soul.unpatch(model)
    assert "forward" not in vars(model)


def test_copies_are_patched_and_independent(tmp_path):
    model = soul.patch(model_of("gemma2"), losses.GradDiff(), return_logits=False)
    inputs = BATCH | {"is_forget": torch.tensor([True, False, True])}
    want = model(**inputs).loss
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(**inputs).loss, want)
        with torch.no_grad():
            twin.get_output_embeddings().weight.mul_(0.5)
        assert not torch.equal(twin(**inputs).loss, want)
        soul.unpatch(twin)
        assert "forward" not in vars(twin)
    assert torch.equal(model(**inputs).loss, want)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys() and "forward" not in vars(loaded)


def test_logits_are_left_out_in_training_mode():
    model = soul.patch(model_of("llama"))
    assert model(**BATCH).logits.shape == (3, 9, 64)
    model.train()
    assert model(**BATCH).logits is None and model(**BATCH, return_logits=True).logits is not None
    assert model(input_ids=IDS).logits.shape == (3, 9, 64)
    soul.unpatch(model)
    soul.patch(model, return_logits=True)
    assert model(**BATCH).logits is not None and model(**BATCH, return_logits=False).logits is None
    assert model(IDS, MASK, labels=LABELS, return_logits=False).logits is None  # arguments by position


def test_labels_that_are_shifted_or_ignored_in_other_ways():
    model = model_of("llama")
    check(model, **BATCH, shift_labels=F.pad(LABELS, (0, 1), value=-100)[:, 1:].contiguous())
    check(model, input_ids=IDS, attention_mask=MASK, labels=LABELS.masked_fill(LABELS == -100, -1), ignore_index=-1)
    got, want = both(model, input_ids=IDS, labels=torch.full_like(IDS, -100))
    assert got.loss == 0 and want.loss.isnan()
    assert all(not gradient.any() for gradient in gradients(model, got.loss).values())


@pytest.mark.parametrize("objective", [
    losses.GradAscent(), losses.GradDiff(), losses.Memorize(), losses.NPO(beta=0.5), losses.SimNPO(), losses.WGA(),
    losses.SatImp(), losses.CEU(), losses.KLMin(), losses.UNDIAL(), losses.DPO(beta=0.5),
], ids=lambda objective: type(objective).__name__)  # fmt: skip
def test_objectives_are_those_of_unlearning_loss(objective):
    """With a reference model, and with sequences in another order."""
    model, reference = model_of("llama"), model_of("llama")
    batch = make_batch()
    if objective.pairs:
        batch["forget"] = {"original": batch["forget"], "alternate": batch["forget"] | side((7, 6), prompt=2, seed=4)}
        batch["forget"] = {name: {k: v for k, v in s.items() if k != "ref_logps"} for name, s in batch["forget"].items()}
    else:
        del batch["forget"]["ref_logps"]
    want = soul.unlearning_loss(model, batch, objective, ref_model=reference)
    sides = [*batch["forget"].values()] if objective.pairs else [batch["forget"]]
    first = {name: torch.stack([s[name] for s in sides], 1).flatten(0, 1) for name in BATCH}
    rows = {name: torch.cat([F.pad(first[name], (0, 2), value=-100 * (name == "labels")), batch["retain"][name]])
            for name in BATCH}  # fmt: skip
    is_forget = torch.arange(len(rows["labels"])) < len(first["labels"])
    rows, is_forget = {name: value.flip(0) for name, value in rows.items()}, is_forget.flip(0)
    if objective.pairs:
        order = torch.tensor([0, 1, 3, 2, 5, 4])  # the answer to be forgotten comes first
        rows, is_forget = {name: value[order] for name, value in rows.items()}, is_forget[order]
    with soul.fused(model, objective, ref_model=reference, return_logits=False):
        got = model(**rows, is_forget=is_forget, position_ids=torch.arange(9)[None]).loss
    check_loss_and_gradients(model, got, want)


def test_reference_from_the_batch_or_from_adapters_that_are_off():
    model = lora_model()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    forget = {"forget": batch}
    objective = losses.NPO(beta=0.5, alpha=0.0)
    with soul.fused(model, objective, return_logits=False):
        got = model(**batch).loss
    check_loss_and_gradients(model, got, soul.unlearning_loss(model, forget, objective))
    with model.disable_adapter():
        ref_logps = logps_of(model, batch)[0].sum(1).detach()
    with soul.fused(model.get_base_model(), objective, return_logits=False):
        got = model(**batch, ref_logps=ref_logps.double()).loss  # as numpy's columns are
        check_loss_and_gradients(model, got, soul.unlearning_loss(model, forget, objective))
        with pytest.raises(ValueError, match="ref_model: expected a reference model for NPO"):
            model(**batch)


def test_memory_of_a_step():
    """The plain forward keeps logits of all tokens, 32 MiB, and their gradient."""
    sizes = FAMILIES["llama"] | dict(vocab_size=32768)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).train()
    ids = torch.randint(3, 32768, (4, 64))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    plain = peak_bytes(step, torch.device("cpu"))
    with soul.fused(model):
        patched = peak_bytes(step, torch.device("cpu"))
    assert patched <= 0.6 * plain, f"{patched / 2**20:.0f} MiB, and {plain / 2**20:.0f} MiB"


@pytest.fixture
def fresh_accelerate():
    """Reset accelerate's state, which is global."""
    state = pytest.importorskip("accelerate.state")
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def trained(folder, model, rows, collator=None):
    """Return the losses of three steps of the Trainer, each of two micro-batches with other numbers of labels."""
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        lr_scheduler_type="constant", report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1,
        optim="sgd",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=lambda p: {"shape": p.predictions.shape},
        data_collator=collator,
    )  # fmt: skip
    trainer.train()
    evaluated = trainer.evaluate()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], evaluated


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_of_the_trainer_is_the_plain_one(tmp_path):
    """num_items_in_batch, gradient accumulation, columns that the model does not take, predictions for metrics."""
    lengths = torch.tensor([9, 3, 6, 4, 8, 5] * 2)
    many = side(lengths.tolist(), prompt=1, seed=3) | {"unknown": lengths}
    rows = [{name: value[i] for name, value in many.items()} for i in range(len(lengths))]
    plain, patched = tiny_model(), soul.patch(tiny_model())
    want, want_evaluated = trained(tmp_path, plain, rows)
    got, evaluated = trained(tmp_path, patched, rows)
    assert got == pytest.approx(want, rel=1e-5) and len(got) == 3
    assert evaluated["eval_shape"] == want_evaluated["eval_shape"] == (12, 9, 300)
    assert evaluated["eval_loss"] == pytest.approx(want_evaluated["eval_loss"], rel=1e-4)
    for a, b in zip(patched.parameters(), plain.parameters()):
        assert torch.allclose(a, b, atol=2e-5)


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_objective_in_the_trainer(tmp_path):
    """Its columns reach the model, and the loss of a step is the mean over its micro-batches."""
    many = side((9, 3, 6, 4, 8, 5, 7, 9), prompt=1, seed=3) | {"is_forget": torch.tensor([True, False] * 4)}
    rows = [{name: value[i] for name, value in many.items()} for i in range(8)]
    batches = []
    model = tiny_model().requires_grad_(False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(300))  # trained, and all but 0 for a loss of two steps
    model = soul.patch(model, losses.GradDiff(gamma=0.5))

    def collate(items):
        batches.append(transformers.default_data_collator(items))
        return batches[-1]

    got, evaluated = trained(tmp_path, model, rows, collate)
    assert evaluated["eval_shape"] == (8, 9, 300)
    with torch.no_grad():
        model.lm_head.bias.zero_()
        want = [model(**batch).loss.item() for batch in batches[:6]]
    assert got == pytest.approx([(a + b) / 2 for a, b in zip(want[0::2], want[1::2])], abs=0.05)


def sharded_worker(folder):
    from torch.distributed.fsdp import fully_shard

    os.environ["TRITON_INTERPRET"] = "0"
    batch = torch.load(folder / "batch.pt", weights_only=True)
    results = []
    for patch_first in (True, False):
        model = tiny_model("llama, untied")
        if patch_first:
            soul.patch(model, return_logits=False)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        if not patch_first:
            soul.patch(model, return_logits=False)
        loss = model(**batch).loss
        loss.backward()
        results.append([loss.detach(), [p.grad.full_tensor() for p in model.parameters()]])
        soul.unpatch(model)
        results.append([model(**batch).loss.detach(), []])
    return results


@pytest.mark.slow(reason="starts processes")
def test_shards_of_fsdp2(tmp_path):
    """Patched before or after the model was sharded. Both processes have the same batch, so their mean is that of one."""
    torch.save(BATCH, tmp_path / "batch.pt")
    model = tiny_model("llama, untied")
    want = model(**BATCH).loss
    expected = list(gradients(model, want).values())
    for results in run(tmp_path, sharded_worker):
        for loss, got in results:
            assert torch.allclose(loss, want, rtol=1e-5)
            for a, b in zip(got, expected):
                assert (a - b).norm() <= 2e-5 * max(b.norm(), 1e-2)


@pytest.mark.slow(reason="compiles")
@pytest.mark.parametrize("family, backend", [
    ("llama", "inductor"), ("gemma2", "aot_eager"), ("mixtral", "aot_eager"), ("phi", "aot_eager")
])  # fmt: skip
@pytest.mark.parametrize("way", [torch.compile, lambda model, **options: model.compile(**options) or model],
                         ids=["function", "method"])  # fmt: skip
def test_a_patched_model_is_compiled(family, backend, way):
    torch._dynamo.reset()
    model = model_of(family)
    want = model(**BATCH)
    wanted = gradients(model, want.loss)
    soul.patch(model, return_logits=False)
    compiled = way(model, backend=backend)
    for _ in range(2):
        output = compiled(**BATCH)
        assert output.logits is None and type(output) is type(want)
        assert torch.allclose(output.loss, want.loss, rtol=2e-5)
        check_gradients(gradients(model, output.loss), wanted)
    assert not {"forward", "_loss_function"} & vars(model.get_output_embeddings()).keys()
    soul.unpatch(compiled)
    assert "forward" not in vars(model)


class OwnLoss(transformers.LlamaForCausalLM):
    """A forward that computes its cross-entropy itself."""

    def forward(self, input_ids, attention_mask=None, labels=None, **inputs):
        output = super().forward(input_ids, attention_mask, **inputs)
        output.loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output


class Weighted(transformers.LlamaForCausalLM):
    """A loss that leaves padding out, whatever its labels."""

    def forward(self, input_ids, attention_mask=None, labels=None, **inputs):
        labels = labels.masked_fill(attention_mask == 0, -100)
        return super().forward(input_ids, attention_mask, labels=labels, **inputs)


class Unlabelled(transformers.LlamaForCausalLM):
    """A forward for inference alone."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask)


class Lossless(transformers.LlamaForCausalLM):
    """A forward that makes nothing of its labels."""

    def forward(self, labels=None, **inputs):
        return super().forward(**inputs)


class Penalized(transformers.LlamaForCausalLM):
    """A loss of the logits beside that of loss_function."""

    def forward(self, input_ids, attention_mask=None, labels=None, **inputs):
        output = super().forward(input_ids, attention_mask, labels=labels, **inputs)
        output.loss = output.loss + 0.01 * output.logits.square().mean()
        return output


class Twice(transformers.LlamaForCausalLM):
    """The mean of two losses."""

    def forward(self, input_ids, attention_mask=None, labels=None, **inputs):
        output = super().forward(input_ids, attention_mask, labels=labels, **inputs)
        output.loss = (output.loss + self.loss_function(output.logits, labels, vocab_size=self.config.vocab_size)) / 2
        return output


def family_of(cls):
    return cls(transformers.LlamaConfig(**FAMILIES["llama"])).eval()


def with_compiled_forward():
    model = model_of("llama")
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def with_nan():
    model = model_of("llama")
    model.model.norm.weight.data[3] = torch.nan
    return model


def with_loss_function(function):
    model = model_of("llama")
    model.loss_function = function
    return model


def quantized(dtype):
    model = model_of("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(dtype), requires_grad=False)
    return model


class Codes(torch.Tensor):
    """A tensor of another library, as torchao's."""


def with_codes():
    model = model_of("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().as_subclass(Codes))
    return model


def adapted_head():
    return peft.get_peft_model(tiny_model("llama, untied"), peft.LoraConfig(target_modules=["lm_head"]))


REFUSED = {
    "squares": (lambda: family_of(Squared), "got other logits in Squared"),
    "scale that is not the configuration's": (lambda: with_attribute("cohere", "logit_scale", 0.25),
                                              "got other logits in CohereForCausalLM"),
    "cap in the configuration alone": (lambda: with_attribute("llama", "config.final_logit_softcapping", 30.0),
                                       "got other logits in LlamaForCausalLM"),
    "a loss of its own": (lambda: family_of(OwnLoss), "expected a loss by loss_function alone, got ValueError in OwnLoss"),
    "no labels": (lambda: family_of(Unlabelled), "expected a forward that takes labels, got Unlabelled"),
    "no loss": (lambda: family_of(Lossless), "expected a loss for labels, got none in Lossless"),
    "a loss of logits beside it": (lambda: family_of(Penalized), r"expected the loss of its own forward, .* in Penalized"),
    "two losses": (lambda: family_of(Twice), "calls its loss_function once, got 2 calls of it in Twice"),
    "NaN": (with_nan, "expected finite weights, got NaN or inf in model.norm.weight"),
    "other labels": (lambda: family_of(Weighted), "hands its labels to loss_function, got other labels in Weighted"),
    "a loss function of the user's": (lambda: with_loss_function(F.cross_entropy),
                                      "expected a model with transformers' ForCausalLMLoss, got cross_entropy of Llama"),
    "encoder and decoder": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)), "T5ForConditionalGeneration"),
    "no head": (lambda: model_of("llama").model, "expected a linear language-model head, got LlamaModel"),
    "no model of transformers": (lambda: torch.nn.Linear(2, 2), "expected a Hugging Face causal language model, got Linear"),
    "8 bits": (lambda: quantized(torch.int8), "a head that is not quantized, got Parameter of torch.int8 in Llama"),
    "a weight of another library": (with_codes, "a head that is not quantized, got Codes of torch.float32 in Llama"),
    "adapters on the head": (adapted_head, "expected a head without adapters"),
    "DataParallel": (lambda: torch.nn.DataParallel(model_of("llama")), "expected one process a GPU, got DataParallel"),
    "compiled": (lambda: torch.compile(model_of("llama"), backend="eager"), "not compiled yet, .*; patch it, then compile it"),
    "a compiled forward": (with_compiled_forward, "not compiled yet"),
    "compiled in place": (lambda: (model := model_of("llama")).compile(backend="eager") or model, "not compiled yet"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_patched_is_refused_by_name_and_left_as_it_was(name):
    make, message = REFUSED[name]
    model = make()
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"model: .*{message}"):
        soul.patch(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes


def test_patching_twice_and_unpatching_what_is_not_patched():
    model = model_of("llama")
    with pytest.raises(ValueError, match=r"model: expected a patched one, got LlamaForCausalLM as it was; call soul.patch"):
        soul.unpatch(model)
    soul.patch(model)
    forward = model.forward
    for again in (model, peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(ValueError, match=r"model: expected one that is not patched, got a patched one; call soul.unpatch"):
            soul.patch(again)
    assert model.forward is forward
    with pytest.raises(ValueError, match="objective: expected an objective of soul.losses, got 'npo'"):
        soul.patch(model_of("llama"), "npo")


def resized(model):
    model.resize_token_embeddings(70)


def replaced(model):
    class Own(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden)

    model.lm_head = Own(32, 64, bias=False)


def with_bias(model):
    model.lm_head = torch.nn.Linear(32, 64)


@pytest.mark.parametrize("change, got", [(resized, r"\[70, 32\]"), (replaced, r"\[64, 32\] of Own"), (with_bias, "of Linear")])
def test_a_head_that_changed_is_named(change, got):
    model = soul.patch(model_of("llama"), return_logits=False)
    change(model)
    message = rf"model: expected the head that was patched, \[64, 32\], got .*{got}.*; call soul.unpatch\(model\) and"
    with pytest.raises(ValueError, match=message):
        model(**BATCH)
    soul.unpatch(model)
    check(model, **BATCH)


def test_a_head_that_is_tied_or_quantized_later():
    """One of the same kind is read at every call."""
    model = soul.patch(model_of("llama"), return_logits=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    got = model(**BATCH).loss
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="a head that is not quantized"):
        model(**BATCH)
    model.lm_head.weight = model.model.embed_tokens.weight
    soul.unpatch(model)
    check_loss_and_gradients(model, got, model(**BATCH).loss)


def test_a_loss_function_that_is_set_later():
    model = soul.patch(model_of("llama"), return_logits=False)
    model.loss_function = ForCausalLMLoss  # the same one
    model(**BATCH)
    assert vars(model)["_loss_function"] is ForCausalLMLoss
    model.loss_function = F.cross_entropy
    with pytest.raises(ValueError, match="expected a model with transformers' ForCausalLMLoss, got cross_entropy of Llama"):
        model(**BATCH)


def test_adapters_with_a_trained_head_after_the_patch():
    """peft keeps the head that was patched within its wrapper."""
    model = soul.patch(tiny_model("llama, untied"), return_logits=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    got = wrapped(**BATCH).loss
    soul.unpatch(wrapped)
    check_loss_and_gradients(wrapped, got, wrapped(**BATCH).loss)


FLAG = torch.tensor([True, False, True])
GRAD_DIFF = losses.GradDiff()


@pytest.mark.parametrize("objective, inputs, message", [
    (None, {"labels": LABELS[:, 1:]}, r"labels: expected shape \(3, 9\), as the tokens, got shape \(3, 8\); do not shift them"),
    (None, {"labels": LABELS, "is_forget": FLAG}, "is_forget: expected none without an objective, got a tensor; pass"),
    (None, {"labels": LABELS.masked_fill(LABELS != -100, 64)}, r"labels: expected values in \[0, 64\)"),
    (GRAD_DIFF, {"is_forget": FLAG}, "labels: expected labels beside is_forget, got None"),
    (GRAD_DIFF, {"labels": LABELS}, r"is_forget: expected \[B\] bool for GradDiff\(.*, got None; .* or set alpha to 0"),
    (GRAD_DIFF, {"labels": LABELS, "is_forget": FLAG[:2]}, r"is_forget: expected .*"),
    (GRAD_DIFF, {"labels": LABELS, "is_forget": FLAG, "num_items_in_batch": 3}, "num_items_in_batch: expected none with Grad"),
    (losses.NPO(), {"labels": LABELS, "is_forget": FLAG}, "ref_model: expected a reference model for NPO"),
    (losses.DPO(), {"labels": LABELS[:2], "input_ids": IDS[:2], "is_forget": FLAG[:2]}, "is_forget: expected the same at 2i"),
])  # fmt: skip
def test_batches_that_do_not_fit_are_named(objective, inputs, message):
    model = soul.patch(model_of("llama"), objective, return_logits=False)
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS} | inputs)
    assert "forward" not in vars(model.lm_head) and "_loss_function" not in vars(model)


def test_inputs_that_a_reference_model_cannot_take_are_named():
    model = soul.patch(model_of("llama"), losses.NPO(alpha=0.0), ref_model=model_of("llama"), return_logits=False)
    cache = transformers.DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="past_key_values: expected a row for each of 3 sequences, got DynamicCache"):
        model(**BATCH, past_key_values=cache)
    assert model(**BATCH, past_key_values=cache, ref_logps=torch.zeros(3)).loss.isfinite()  # which needs no reference model


def test_weights_that_are_elsewhere_are_tried_in_the_first_call():
    """A model on the meta device is patched, and refused once there is something to refuse."""
    with torch.device("meta"):
        model = family_of(Squared)
    soul.patch(model, return_logits=False)
    model.to_empty(device="cpu")
    model.load_state_dict(family_of(Squared).state_dict())
    head_call._VERIFIED.pop(model, None)
    with pytest.raises(ValueError, match="got other logits in Squared"):
        model(**BATCH)
