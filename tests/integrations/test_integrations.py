"""Hugging Face Trainer, TRL's columns and open-unlearning's trainers: against plain loops and against its public interface."""

import copy
import dataclasses
import math
import pathlib
import sys
import types

import pytest
import torch

from soul import SOUL, SophiaG, losses, unlearning_loss
from soul.data.batches import collate
from soul.data.examples import Example, encode
from soul.integrations import trl
from soul.integrations.hf import SOULTrainerMixin, UnlearningDataset, collate_unlearning, optimizer_of
from soul.integrations.open_unlearning import CONFIGS
from soul.models.causal_lm import head, hidden_states, transform
from soul.models.ref_model import reference_hidden, reference_logps
from soul.run.config import UnlearnConfig
from soul.run.prepare import prepare
from soul_kernels import Head, Reference, _launch, linear_objective
from tests.support import tolerances as tol
from tests.support.helpers import assert_close, mutant, needs_kernels_on_cpu, relative_error
from tests.support.models import examples, lora_model, sequences, tiny_model, tiny_tokenizer
from tests.test_functional import OU, Coded

transformers = pytest.importorskip("transformers")


class UnlearnTrainer(SOULTrainerMixin, transformers.Trainer):
    pass


# What is tested here is what calls the ops.
pytestmark = pytest.mark.usefixtures("without_kernels")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Reset accelerate's state, which is global."""
    state = pytest.importorskip("accelerate.state")
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def arguments(folder, **options):
    defaults = dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, max_grad_norm=0, remove_unused_columns=False,
        learning_rate=1e-3, lr_scheduler_type="constant", report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        logging_steps=1,
    )  # fmt: skip
    return transformers.TrainingArguments(**(defaults | options))


def make(folder, model, objective, *, forget=6, retain=5, soul_args=None, cls=UnlearnTrainer, **options):
    dataset = UnlearningDataset(sequences(forget), sequences(retain), pairs=objective.pairs)
    return cls(
        model=model, args=arguments(folder, **options), train_dataset=dataset, data_collator=collate_unlearning,
        objective=objective, soul_args=soul_args,
    )  # fmt: skip


def other(model, scale=0.3):
    """Return the same model with other weights, as a reference model that differs."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(scale * parameter.std() * torch.randn_like(parameter))
    return changed


ALL = {
    "ga": losses.GradAscent(),
    "graddiff": losses.GradDiff(gamma=0.7, alpha=1.3),
    "klmin": losses.KLMin(),
    "po": losses.PO(),
    "npo": losses.NPO(beta=0.5),
    "npo, kl": losses.NPO(beta=0.5, retain="kl"),
    "npo, token mean": losses.NPO(reduction="token_mean"),
    "simnpo": losses.SimNPO(),
    "dpo": losses.DPO(beta=0.5),
    "wga": losses.WGA(),
    "satimp": losses.SatImp(),
    "ceu": losses.CEU(),
    "undial": losses.UNDIAL(),
}


def by_hand(model, reference, forget, retain, objective):
    """Return the loss as the command computes it, with the outputs of `soul.models.ref_model`."""
    if not objective.alpha:
        retain = []
    hidden = None
    if objective.divergence is not None:
        hidden = reference_hidden(reference, [*forget, *retain], batch_size=16)
    batch = collate(forget, retain, ref_logps=reference_logps(reference, forget), ref_hidden=hidden and hidden.hidden)
    weight, bias = head(model)
    return linear_objective(
        hidden_states(model, batch), Head(weight, bias, **transform(model)), batch.labels, objective,
        is_forget=batch.is_forget, ref_logps=batch.ref_logps,
        reference=hidden and Reference(batch.ref_hidden, hidden.weight, hidden.bias),
    )  # fmt: skip


def inputs_of(forget, retain, pairs):
    """Return the inputs of a Trainer: forget and retain sequences, each padded to their own length."""
    dataset = UnlearningDataset(forget, pairs=pairs)
    batch = collate_unlearning([dataset[i] for i in range(len(dataset))])
    rows = UnlearningDataset(retain)
    return {**batch, "retain": collate_unlearning([rows[i] for i in range(len(rows))])["forget"]}


def check_loss_of(name, loss_of=unlearning_loss):
    objective = ALL[name]
    model = tiny_model("llama, untied")
    reference = other(model)
    forget = sequences(4)
    retain = sequences(7, prompt=1)[2:]
    expected = by_hand(model, reference, forget, retain, objective)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    batch = inputs_of(forget, retain, objective.pairs)
    loss, outputs = loss_of(model, batch, objective, ref_model=reference, return_outputs=True)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert_close(loss, expected, tol.GRAD_OBJECTIVE, name)
    for (parameter, _), got, want in zip(model.named_parameters(), grads, expected_grads):
        assert_close(got, want, tol.GRAD_OBJECTIVE, f"{name}: {parameter}")
    cross_entropy = by_hand(model, reference, forget, [], losses.PO(alpha=0.0))  # of both answers where they are pairs
    assert abs(outputs.loss - cross_entropy) < 1e-5 and not outputs.loss.requires_grad and outputs.logits is None


@pytest.mark.parametrize("name", ALL)
def test_loss_of_a_batch_is_the_commands(name):
    check_loss_of(name)


def as_coded(name, model, reference, inputs):
    """Return the loss of open-unlearning's trainers: one forward of forget and one of retain sequences, padded separately."""
    forget, retain = inputs["forget"], inputs["retain"]
    kl = Coded.kl(model, reference, retain)
    return {
        "klmin": lambda: kl - model(**forget).loss,
        "npo, kl": lambda: kl + Coded.dpo(model, reference, None, forget, beta=0.5),
        "undial": lambda: Coded.undial(model, reference, forget, beta=10.0) + model(**retain).loss,
        "undial, kl": lambda: Coded.undial(model, reference, forget, beta=10.0) + kl,
    }[name]()


def check_compat_of(name, longer, loss_of=unlearning_loss):
    objective = losses.UNDIAL(retain="kl") if name == "undial, kl" else ALL[name]
    model = tiny_model("llama, untied")
    reference = other(model, scale=2.0)
    short = sequences(3)
    long = sequences(5, prompt=6)
    inputs = inputs_of(*((long, short) if longer == "forget" else (short, long)), False)
    exact = copy.deepcopy(model).double()
    want = as_coded(name, exact, copy.deepcopy(reference).double(), inputs)
    got, outputs = loss_of(model, inputs, objective, ref_model=reference, compat=OU, return_outputs=True)
    assert_close(got, want, tol.GRAD_OBJECTIVE, name)
    expected = torch.autograd.grad(want, list(exact.parameters()))
    grads = torch.autograd.grad(got, list(model.parameters()))
    for (parameter, _), gradient, exact_gradient in zip(model.named_parameters(), grads, expected):
        assert_close(gradient, exact_gradient, tol.WORST_ROW_FP32, f"{name}: {parameter}")
    assert abs(outputs.loss - model(**inputs["forget"]).loss) < 1e-5
    (plain,) = torch.autograd.grad(loss_of(model, inputs, objective, ref_model=reference), model.lm_head.weight)
    assert relative_error(plain, expected[-1]) > 10 * tol.WORST_ROW_FP32  # the batch tells the modes apart


@pytest.mark.parametrize("longer", ["forget", "retain"])
@pytest.mark.parametrize("name", ["klmin", "npo, kl", "undial", "undial, kl"])
def test_compat_of_a_batch_is_open_unlearnings_code(name, longer):
    check_compat_of(name, longer)


@pytest.mark.parametrize("name, longer, old, new", [
    ("klmin", "forget", "coded[n_forget:, :length]", "coded[n_forget:]"),  # padding that its batch does not have
    ("undial", "retain", "coded[:n_forget, :length]", "coded[:n_forget]"),
    ("undial, kl", "forget", 'objective.retain == "kl"', 'objective.retain == "ce"'),
])  # fmt: skip
def test_mutants_of_compat_are_caught(name, longer, old, new, tmp_path, monkeypatch):
    monkeypatch.setattr("soul.model_loss.labels_as_coded", mutant("soul.compat", old, new, tmp_path).labels_as_coded)
    with pytest.raises(AssertionError):
        check_compat_of(name, longer)


@needs_kernels_on_cpu
def test_loss_of_a_batch_by_the_kernels(monkeypatch):
    monkeypatch.setattr(_launch, "runs_on_cpu", lambda: True)
    check_loss_of("npo, kl")  # log-probabilities, a divergence and an objective in one


@pytest.mark.parametrize("name, old, new", [
    ("dpo", "torch.stack(padded[:n_forget_sides], 1).flatten(0, 1)", "torch.cat(padded[:n_forget_sides])"),  # not interleaved
    ("npo", "index_copy_(0, rows, sums)", "index_copy_(0, rows.flip(0), sums)"),  # another sequence's reference
    ("klmin", '"retain": ~is_forget', '"retain": is_forget'),  # the reference of the wrong half
    ("graddiff", "< n_forget", "< n_forget - 1"),
    ("graddiff", '("labels", IGNORE_INDEX)', '("labels", 0)'),  # padding learned
])  # fmt: skip
def test_mutants_of_the_loss_are_caught(name, old, new, tmp_path):
    with pytest.raises((AssertionError, ValueError)):
        check_loss_of(name, mutant("soul.model_loss", old, new, tmp_path).unlearning_loss)


@pytest.mark.parametrize("name", ["npo", "undial"])
def test_a_models_reference_is_the_model_without_its_adapters(name):
    model = lora_model()
    objective = ALL[name]
    forget, retain = sequences(3), sequences(2)
    loss = unlearning_loss(model, inputs_of(forget, retain, False), objective)
    assert_close(loss, by_hand(model, model, forget, retain, objective), tol.GRAD_OBJECTIVE, name)
    assert any(p.requires_grad for p in model.parameters())


def test_optimizer_has_the_trainers_groups_and_follows_its_schedule(tmp_path):
    @dataclasses.dataclass
    class Options:
        rho: float = 0.1
        published_code: bool = True

    trainer = make(tmp_path, tiny_model(), losses.GradDiff(), soul_args=Options(), weight_decay=0.2, lr_scheduler_type="linear")
    trainer.train()
    optimizer = trainer._inner_optimizer()
    assert type(optimizer) is SOUL and [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0]
    norms = [p for n, p in trainer.model.named_parameters() if "norm" in n]
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in norms}
    assert all(g["rho"] == 0.1 and g["published_code"] and g["lr"] == 0.0 for g in optimizer.param_groups)
    logged = [entry for entry in trainer.state.log_history if "clip_fraction" in entry]
    assert len(logged) == 3 and all(0 <= entry["clip_fraction"] <= 1 for entry in logged)


@pytest.mark.parametrize("fused", [False, True])  # whether the optimizer or the Trainer clips
@pytest.mark.covers("Trainer mixin", "one process")
def test_training_is_the_plain_loop(tmp_path, fused):
    """Two micro-batches a step give the mean of their losses, whatever the Trainer passes as num_items_in_batch."""
    plain = tiny_model()
    objective = losses.NPO(beta=0.5)
    clipping = dict(max_grad_norm=0, soul_args={"max_grad_norm": 0.1}) if fused else dict(max_grad_norm=0.1, soul_args={})
    torch.manual_seed(3)
    trainer = make(tmp_path, tiny_model(), objective, forget=8, gradient_accumulation_steps=2, max_steps=2, seed=5, **clipping)
    batches = []
    collator = trainer.data_collator
    trainer.data_collator = lambda items: batches.append(collator(items)) or batches[-1]
    trainer.train()
    assert len(batches) == 4 and "ref_logps" in batches[0]["forget"] and trainer.ref_model is None
    groups = [{"params": [p for n, p in plain.named_parameters() if ("norm" in n) == norm]} for norm in (False, True)]
    optimizer = SOUL(groups, lr=1e-3, weight_decay=0.0, max_grad_norm=0.1 if fused else None)
    for step in range(2):
        for micro in range(2):
            (unlearning_loss(plain, batches[2 * step + micro], objective) / 2).backward()
        if not fused:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    for (name, got), want in zip(trainer.model.named_parameters(), plain.parameters()):
        assert torch.equal(got, want), name


def test_somebody_elses_trainer_as_documented(tmp_path, monkeypatch):
    """docs/integrations.md: ``class X(SOULTrainerMixin, TheirTrainer)`` has their loss and SOUL's optimizer."""
    monkeypatch.chdir(tmp_path)
    text = (pathlib.Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    (block,) = [block for block in text.split("```") if "class SOULTheirTrainer(SOULTrainerMixin, TheirTrainer)" in block]
    rows = [row(sequence) for sequence in sequences(4)]
    rows = [{name: value[:5] for name, value in one.items()} for one in rows]
    names = dict(transformers=transformers, SOULTrainerMixin=SOULTrainerMixin, model=tiny_model(), forget_dataset=rows)
    exec(block.removeprefix("python"), names)
    trainer = names["trainer"]
    batch = {name: torch.stack([one[name] for one in rows]) for name in rows[0]}
    before = trainer.model(**batch).loss.item()
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == -before
    trainer.train()
    assert type(trainer._inner_optimizer()) is SOUL and trainer._inner_optimizer().defaults["max_grad_norm"] == 1.0
    assert trainer.model.eval()(**batch).loss.item() > before


def test_num_items_in_batch_does_not_change_the_loss(tmp_path):
    """A Trainer that counts items assumes that the loss has been divided by the micro-batches, and does not divide it."""
    trainer = make(tmp_path, tiny_model(), losses.GradDiff(), gradient_accumulation_steps=4)
    trainer.current_gradient_accumulation_steps = 4
    batch = collate_unlearning([trainer.train_dataset[i] for i in range(2)])
    trainer.model.train()
    mean = trainer.compute_loss(trainer.model, batch)
    trainer.model_accepts_loss_kwargs = True
    divided, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True, num_items_in_batch=torch.tensor(9))
    assert torch.equal(mean / 4, divided) and outputs.logits is None
    text = batch["forget"]
    assert torch.allclose(trainer.compute_loss(trainer.model.eval(), dict(text)), outputs.loss)  # no unlearning batch


def test_resumes_to_the_weights_of_an_uninterrupted_run(tmp_path, monkeypatch):
    """With NPO, whose reference is the model that the Trainer was given, not that of the checkpoint; and SophiaG with its h."""
    if transformers.__version__ < "4.46":  # reads the states of generators, which are numpy's, with torch's new default
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

    def trainer():
        soul_args = {"optimizer": "sophiag", "curvature": "gnb", "every": 2, "bs": 8}
        saving = dict(max_steps=4, save_strategy="steps", save_steps=3)
        return make(tmp_path, tiny_model().to(torch.bfloat16), losses.NPO(), soul_args=soul_args, **saving)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, got), want in zip(resumed.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("kind", ["retain_fisher", "gnb"])
def test_h_is_refreshed_from_retain_data_when_it_is_due(tmp_path, kind):
    trainer = make(tmp_path, tiny_model(), losses.GradDiff(), soul_args={"optimizer": "sophiag", "curvature": kind, "every": 2})
    trainer.train()
    optimizer = trainer._inner_optimizer()
    assert type(optimizer) is SophiaG
    states = [optimizer.state[p] for p in trainer.model.parameters()]
    assert all(state["hessian_step"] == 2 and state["step"] == 3 for state in states)  # at steps 0 and 2
    assert sum(state["hessian"].abs().sum() for state in states) > 0


def test_evaluation_of_unlearning_batches_is_their_objective(tmp_path):
    dataset = UnlearningDataset(sequences(4), sequences(3))
    objective = losses.NPO()
    trainer = UnlearnTrainer(
        tiny_model(), arguments(tmp_path, per_device_eval_batch_size=4), train_dataset=dataset, eval_dataset={"own": dataset},
        data_collator=collate_unlearning, objective=objective,
    )  # fmt: skip
    batch = collate_unlearning([dataset[i] for i in range(4)])
    expected = unlearning_loss(trainer.model, batch, objective).item()
    assert trainer.evaluate()["eval_own_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_trainer_tells_the_dataset_its_epoch(tmp_path):
    """With several processes accelerate sets the epoch of the sampler only, so each epoch would draw the same retain rows."""
    trainer = make(tmp_path, tiny_model(), losses.GradDiff())
    trainer.state.epoch = 2.0
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert trainer.train_dataset.epoch == 2


def under_deepspeed(folder, **configuration):
    """Return TrainingArguments with accelerate's plugin, as far as it is read before the Trainer is made."""
    args = arguments(folder)
    args.deepspeed_plugin = types.SimpleNamespace(deepspeed_config=configuration)
    return args


def test_what_deepspeed_cannot_do_is_refused_before_the_trainer_is_made(tmp_path):
    """Against DeepSpeed itself: tests/clients/test_deepspeed.py."""
    args = under_deepspeed(tmp_path)
    assert optimizer_of({"max_grad_norm": 1.0, "rho": "auto"}, args) == (SOUL, {"lr": 1e-3, "rho": "auto"})  # DeepSpeed clips
    for configuration, soul_args, message in (
        ({}, {"skip_nonfinite": True}, "soul_args.skip_nonfinite: expected not True under DeepSpeed"),
        ({}, {"optimizer": "sophiag", "curvature": "gnb"}, "soul_args.curvature: expected none under DeepSpeed, .* FSDP2"),
        ({"optimizer": {"type": "AdamW"}}, {}, "DeepSpeed's configuration: expected no optimizer with soul_args"),
    ):
        with pytest.raises(ValueError, match=message):
            UnlearnTrainer(tiny_model(), under_deepspeed(tmp_path, **configuration), objective=losses.GradDiff(),
                           soul_args=soul_args)  # fmt: skip


def test_dataset_draws_retain_rows_by_epoch_and_keeps_pairs_together():
    forget, retain = sequences(6), sequences(50)
    dataset = UnlearningDataset(forget, retain, pairs=True)
    items = [dataset[i] for i in range(3)]
    assert len(dataset) == 3 and items[1]["forget"]["alternate"]["input_ids"] == forget[3].input_ids
    row = items[0]["forget"]["original"]
    assert row["labels"][3:] == row["input_ids"][3:] and row["labels"][:3] == [-100] * 3
    assert [dataset[i] for i in range(3)] == items
    dataset.set_epoch(1)
    assert [dataset[i]["retain"] for i in range(3)] != [item["retain"] for item in items]
    batch = collate_unlearning(items)["forget"]["original"]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize("options, message", [
    (dict(soul_args={"lr": 1.0}), "soul_args.lr"),
    (dict(soul_args={"roh": 1.0}), "roh"),
    (dict(soul_args={"optimizer": "adam"}), "soul_args.optimizer"),
    (dict(soul_args=3), "soul_args: expected a mapping"),
    (dict(soul_args={"optimizer": "sophiag"}), "soul_args.curvature"),
    (dict(soul_args={"curvature": "gnb"}), "soul_args.curvature"),
    (dict(soul_args={"max_grad_norm": 1.0}, max_grad_norm=1.0), "args.max_grad_norm"),
    (dict(remove_unused_columns=True), "args.remove_unused_columns"),
])  # fmt: skip
def test_errors_say_what_to_do(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tiny_model(), losses.GradDiff(), **options)


class PreferenceTrainer(transformers.Trainer):
    """A stand-in for TRL's DPOTrainer: its second argument is ``ref_model``, the model itself where there is none."""

    def __init__(self, model, ref_model=None, args=None, **options):
        super().__init__(model, args, **options)
        self.ref_model = copy.deepcopy(model) if ref_model is None else ref_model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ratios = []
        for answer in (inputs["forget"]["alternate"], inputs["forget"]["original"]):
            logp, ref_logp = (-which(**answer).loss for which in (model, self.ref_model))
            ratios.append((answer["labels"][:, 1:] != -100).sum() * (logp - ref_logp))
        return -torch.nn.functional.logsigmoid(ratios[0] - ratios[1])


@pytest.mark.parametrize("wrapped", [False, True])  # the argument may be named further down the line of base classes
@pytest.mark.parametrize("positional", [False, True])
def test_a_reference_without_an_objective_is_the_base_trainers(tmp_path, positional, wrapped):
    """TRL's DPOTrainer and KTOTrainer take a reference. Without it the first loss is log 2, whatever the model."""

    class Wrapped(PreferenceTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    class OurTrainer(SOULTrainerMixin, Wrapped if wrapped else PreferenceTrainer):
        pass

    model = tiny_model()
    args = arguments(tmp_path)
    batch = inputs_of(sequences(2), sequences(1), True)
    reference = other(model)
    theirs = PreferenceTrainer(model, reference, args)
    ours = OurTrainer(model, reference, args) if positional else OurTrainer(model=model, ref_model=reference, args=args)
    want = theirs.compute_loss(model, batch)
    assert ours.ref_model is reference and torch.equal(ours.compute_loss(model, batch), want)
    assert abs(want - math.log(2)) > 0.01
    assert OurTrainer(model, args=args).compute_loss(model, batch).item() == pytest.approx(math.log(2))


def test_a_reference_that_nothing_would_use_is_refused(tmp_path):
    """transformers.Trainer has no reference, so without an objective it would be ignored."""
    model = tiny_model()
    with pytest.raises(ValueError, match="ref_model: expected None without an objective, got LlamaForCausalLM; pass obj"):
        UnlearnTrainer(model, arguments(tmp_path), ref_model=model)
    UnlearnTrainer(model, arguments(tmp_path), ref_model=None)


def test_an_objective_with_a_trainer_of_trl_is_refused(tmp_path):
    """TRL's trainers accept only data sets with their own columns, and their error is about the type of the data set."""
    base = type("SFTTrainer", (transformers.Trainer,), {"__module__": "trl.trainer.sft_trainer"})
    cls = type("OurTrainer", (SOULTrainerMixin, base), {})
    message = r"objective: expected None with trl's SFTTrainer, got GradDiff.*class X\(SOULTrainerMixin, transformers.Trainer\)"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tiny_model(), losses.GradDiff(), cls=cls)
    assert cls(tiny_model(), arguments(tmp_path)).objective is None


def test_batches_that_do_not_fit_are_refused():
    model = tiny_model()
    batch = inputs_of(sequences(2), sequences(2), False)
    for inputs, objective, message in (
        ({"forget": batch["forget"]}, losses.GradDiff(), "a retain batch"),
        (batch, losses.DPO(), "alternate"),
        (batch, losses.NPO(), "ref_model"),
        (batch, losses.KLMin(), "ref_model"),
    ):
        with pytest.raises(ValueError, match=message):
            unlearning_loss(model, inputs, objective)
    with pytest.raises(ValueError, match="one process a GPU"):
        unlearning_loss(torch.nn.DataParallel(model), batch, losses.GradDiff())
    with pytest.raises(ValueError, match="even number"):
        UnlearningDataset(sequences(3), pairs=True)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_trl_columns():
    rows = [{"prompt": "Q", "chosen": " yes", "rejected": " no", "score": 1}]
    assert trl.examples(rows, take="rejected") == [Example("Q", " no")]
    assert trl.examples(rows, take="chosen") == [Example("Q", " yes")]
    assert trl.examples(rows, take="pairs") == [Example("Q", " no"), Example("Q", " yes")]
    assert trl.examples([{"prompt": "Q", "completion": " A"}]) == [Example("Q", " A")]
    for wrong, options, message in (
        (rows, {}, "row 0: expected a column 'completion'"),
        ([{"prompt": "Q", "completion": "  "}], {}, "some text"),
        ([{"prompt": "Q", "completion": [{"role": "assistant", "content": "A"}]}], {}, "a conversation after a conversation"),
        (
            [{"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]}],
            {},
            "chat templ",
        ),
        (rows, {"take": "best"}, "take"),
    ):
        with pytest.raises(ValueError, match=message):
            trl.examples(wrong, **options)


def test_trl_conversations_go_through_the_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    bos = tokenizer.bos_token or ""
    eos = tokenizer.eos_token
    user, said = ([{"role": role, "content": text}] for role, text in (("user", "Who?"), ("assistant", "Me.")))
    (example,) = trl.examples([{"prompt": user, "completion": said}], tokenizer)
    assert example == Example(f"{bos}<user>Who?<assistant>", f"Me.{eos}", ("", eos))
    begun = [*user, {"role": "assistant", "content": "It is"}]
    (example,) = trl.examples([{"prompt": begun, "completion": [{"role": "assistant", "content": " me."}]}], tokenizer)
    assert example == Example(f"{bos}<user>Who?<assistant>It is", f" me.{eos}", ("", eos))
    (sequence,) = encode([example], tokenizer, vocab_size=300)
    assert sequence.input_ids.count(tokenizer.eos_token_id) == 1 and sequence.labels[-2] == tokenizer.eos_token_id
    tokenizer.chat_template = "{% if add_generation_prompt %}other{% endif %}{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="a completion that follows its prompt"):
        trl.examples([{"prompt": user, "completion": said}], tokenizer)


# open-unlearning's public interface, after its src/trainer/{__init__,base,unlearn/base,unlearn/grad_diff}.py: what calls the
# trainers, and what they call.
OPEN_UNLEARNING = {
    "trainer.base": """
from transformers import Trainer
class FinetuneTrainer(Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", trial=None):
        return {name: run(model=self.model) for name, run in (self.evaluators or {}).items()}
""",
    "trainer.unlearn.base": """
from trainer.base import FinetuneTrainer
class UnlearnTrainer(FinetuneTrainer):
    def _prepare_deepspeed(self, model):
        raise NotImplementedError
""",
    "trainer.unlearn.grad_diff": """
import copy
from trainer.unlearn.base import UnlearnTrainer
class GradDiff(UnlearnTrainer):
    def __init__(self, gamma=1.0, alpha=1.0, retain_loss_type="NLL", *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma, self.alpha, self.retain_loss_type, self.ref_model = gamma, alpha, retain_loss_type, None
        if retain_loss_type == "KL":
            self.ref_model = self._prepare_ref_model(self.model)
    def _prepare_ref_model(self, model):
        ref_model = copy.deepcopy(model).to(self.accelerator.device)
        ref_model.eval()
        return self.accelerator.prepare_model(ref_model, evaluation_mode=True)
    def compute_loss(self, model, inputs, return_outputs=False):
        raise AssertionError("the loss is to be SOUL's")
""",
    "trainer": """
import inspect
from transformers import Trainer, TrainingArguments
from trainer.unlearn.grad_diff import GradDiff
TRAINER_REGISTRY = {}
TOKENIZER = "processing_class" if "processing_class" in inspect.signature(Trainer.__init__).parameters else "tokenizer"
def _register_trainer(trainer_class):
    TRAINER_REGISTRY[trainer_class.__name__] = trainer_class
def load_trainer(trainer_cfg, model, train_dataset=None, eval_dataset=None, tokenizer=None, data_collator=None, evaluators=None,
                 template_args=None):
    method_args = trainer_cfg.get("method_args", {})
    trainer_cls = TRAINER_REGISTRY.get(trainer_cfg.get("handler"))
    args = TrainingArguments(**trainer_cfg["args"])
    tokenizer = {TOKENIZER: tokenizer}  # "tokenizer" at its pins, "processing_class" in what came later
    trainer = trainer_cls(model=model, train_dataset=train_dataset, eval_dataset=eval_dataset, **tokenizer,
                          data_collator=data_collator, args=args, evaluators=evaluators, template_args=template_args,
                          **method_args)
    return trainer, args
_register_trainer(GradDiff)
from soul.integrations.open_unlearning import trainers as soul_trainers
for soul_trainer in soul_trainers.ALL:
    _register_trainer(soul_trainer)
""",
}


@pytest.fixture
def open_unlearning(monkeypatch):
    """open-unlearning's package ``trainer``, with our lines at the end of its __init__."""
    monkeypatch.delitem(sys.modules, "soul.integrations.open_unlearning.trainers", raising=False)
    monkeypatch.delattr("soul.integrations.open_unlearning.trainers", raising=False)
    for name in ("trainer", "trainer.unlearn", "trainer.base", "trainer.unlearn.base", "trainer.unlearn.grad_diff"):
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("trainer.base", "trainer.unlearn.base", "trainer.unlearn.grad_diff", "trainer"):
        exec(OPEN_UNLEARNING[name], vars(sys.modules[name]))
    yield sys.modules["trainer"]
    sys.modules.pop("soul.integrations.open_unlearning.trainers", None)


class ForgetRetain(torch.utils.data.Dataset):
    """Like open-unlearning's ForgetRetainDataset: torch draws the retain row, rows are tensors, alternatives optional."""

    def __init__(self, forget, retain, alternate=None):
        self.forget = forget
        self.retain = retain
        self.alternate = alternate

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, index):
        forget = row(self.forget[index])
        if self.alternate:
            forget = {"original": forget, "alternate": row(self.alternate[index])}
        return {"forget": forget, "retain": row(self.retain[torch.randint(0, len(self.retain), (1,)).item()])}


def row(sequence):
    ids = torch.tensor(sequence.input_ids)
    labels = torch.tensor([-100, *sequence.labels[:-1]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def its_collator(instances):
    """Collate like open-unlearning's DataCollatorForSupervisedDataset: nested, padded on the right."""
    if "input_ids" not in instances[0]:
        return {key: its_collator([instance[key] for instance in instances]) for key in instances[0]}
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([i["input_ids"] for i in instances], batch_first=True, padding_value=0)
    mask = pad([i["attention_mask"] for i in instances], batch_first=True, padding_value=0)
    return {"input_ids": ids, "attention_mask": mask, "labels": pad([i["labels"] for i in instances], True, -100)}


def configuration(path, folder):
    """Merge a YAML file over the content of open-unlearning's finetune.yaml, as Hydra does."""
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load(path.read_text())
    assert config["defaults"] == ["finetune"]
    few = dict(output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, report_to="none", use_cpu=True, seed=0,
               save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", logging_steps=1)  # fmt: skip
    lr = 1e-4 if path.stem == "SOULUNDIAL" else 2e-3  # its loss starts within 3e-3 of its minimum
    args = {**few, **config["args"], "learning_rate": lr}
    return {"handler": config["handler"], "args": args, "method_args": config["method_args"]}


MANY = pytest.mark.slow(reason="a run of the Trainer for each; those that differ in data or rate are always tested")
ALWAYS = ("SOULNPO", "SOULDPO", "SOULUNDIAL")


@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=[] if path.stem in ALWAYS else MANY) for path in sorted(CONFIGS.glob("*.yaml"))
])  # fmt: skip
def test_open_unlearning_trains_with_every_configuration(path, tmp_path, open_unlearning):
    """Trainers are registered by name, made by load_trainer and evaluated by its evaluators; 4 steps reduce the loss."""
    config = configuration(path, tmp_path)
    model = tiny_model()
    assert config["handler"] == path.stem
    alternate = sequences(8) if path.stem in ("SOULDPO", "SOULPO") else None
    data = ForgetRetain(sequences(8), sequences(1), alternate)
    before = copy.deepcopy(model)
    trainer, args = open_unlearning.load_trainer(
        config, model, train_dataset=data, data_collator=its_collator, template_args={}, tokenizer=None,
        evaluators={"tofu": lambda model: 0.5},
    )  # fmt: skip
    assert type(trainer).__name__ == path.stem and type(trainer).__mro__[1].__name__ == "SOULUnlearn"
    whole = its_collator([data[i] for i in range(8)])
    losses_at = []
    trainer.model.eval()
    losses_at.append(trainer.compute_loss(trainer.model, whole).item())
    trainer.train()
    assert isinstance(trainer._inner_optimizer(), SOUL) and args.max_grad_norm == 0
    losses_at.append(trainer.compute_loss(trainer.model.eval(), whole).item())
    assert losses_at[1] < losses_at[0], losses_at
    assert trainer.evaluate() == {"tofu": 0.5}
    if trainer.ref_model is not None:  # it did not move along
        for got, want in zip(trainer.ref_model.parameters(), before.parameters()):
            assert torch.equal(got, want) and not got.requires_grad
    needs = trainer.objective.needs_reference or trainer.objective.divergence is not None
    assert (trainer.ref_model is not None) == needs


def test_open_unlearning_has_a_configuration_for_every_objective(open_unlearning):
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names | {"SOULUnlearn"} == {trainer.__name__ for trainer in open_unlearning.soul_trainers.ALL}
    assert names == {f"SOUL{objective.__name__}" for objective in losses.OBJECTIVES.values()}


def test_open_unlearning_generic_trainer_and_its_errors(tmp_path, open_unlearning):
    made = dict(model=tiny_model(), args=arguments(tmp_path), train_dataset=ForgetRetain(sequences(2), sequences(2)))
    generic = open_unlearning.TRAINER_REGISTRY["SOULUnlearn"]
    trainer = generic(method="npo", beta=0.2, gamma=0.5, retain_loss_type="KL", **made)
    assert repr(trainer.objective) == repr(losses.NPO(beta=0.2, gamma=0.5, retain="kl"))
    assert repr(generic(method="ceu", ignore_first_n_answer_tokens=2, alpha=0.0, **made).objective) == repr(
        losses.CEU(ignore_first=2, alpha=0.0)
    )
    trainer = generic(method="graddiff", retain_loss_type="KL", compat=OU, ref_model=other(made["model"]), **made)
    batch = its_collator([made["train_dataset"][i] for i in range(2)])
    want = as_coded("klmin", trainer.model, trainer.ref_model, batch)
    assert_close(trainer.compute_loss(trainer.model, batch), want, tol.GRAD_OBJECTIVE, "compat")
    for options, message in (
        (dict(method="npo", compat=OU), "compat: expected None for npo with retain_loss_type NLL"),
        (dict(method="undial", compat="tofu"), "compat: expected one of"),
        (dict(method="rmu"), "method"),
        (dict(method="ga", retain_loss_type="KL"), "retain_loss_type"),
        (dict(method="npo", retain_loss_type="EMBED_DIFF"), "retain_loss_type"),
    ):
        with pytest.raises(ValueError, match=message):
            generic(**options, **made)


def test_optimizer_options_of_a_configuration(tmp_path):
    cls, options = optimizer_of({"optimizer": "sophiag", "rho": "auto", "state_dtype": "bfloat16"}, arguments(tmp_path))
    assert cls is SophiaG and options == {"lr": 1e-3, "rho": "auto", "state_dtype": "bfloat16"}


def test_command_prepares_the_same_sequences(tmp_path):
    """What the docs say: `soul.run.prepare.prepare` makes the sequences of an UnlearningDataset."""
    tokenizer = tiny_tokenizer()
    forget, retain = prepare(tiny_model(), tokenizer, examples(3), examples(2), UnlearnConfig(method="dpo"))
    assert len(UnlearningDataset(forget, retain, pairs=True)) == 3
