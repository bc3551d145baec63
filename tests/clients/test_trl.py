"""TRL's own trainers with SOUL's optimizers: their losses, and their reference models, are those of TRL."""

import copy

import pytest
import torch

pytest.importorskip("trl")

import transformers
import trl
from datasets import Dataset

from soul import SOUL, losses
from soul.integrations.hf import SOULTrainerMixin, UnlearningDataset, collate_unlearning
from tests.support.models import sequences, tiny_model, tiny_tokenizer

QUESTIONS = [f"Where is number {i}?" for i in range(4)]
PAIRS = [{"prompt": text, "chosen": f" in house {i}", "rejected": f" nobody knows {i}"} for i, text in enumerate(QUESTIONS)]
RATED = [{"prompt": text, "completion": f" in house {i}", "label": i % 2 == 0} for i, text in enumerate(QUESTIONS)]
ANSWERS = [{"prompt": text, "completion": f" in house {i}"} for i, text in enumerate(QUESTIONS)]
TRAINERS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, PAIRS),
    "kto": (trl.KTOTrainer, trl.KTOConfig, RATED),
    "sft": (trl.SFTTrainer, trl.SFTConfig, ANSWERS),
}


# The trainers are tested here, not the kernels.
pytestmark = pytest.mark.usefixtures("without_kernels")


@pytest.fixture
def model(tmp_path):
    """A model that TRL can load again by its name, which it does where it gets no reference model."""
    tiny_model("llama, untied").save_pretrained(tmp_path / "model")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def distant(model):
    """A reference model so different that every loss with it is far from the loss with the model as its own reference."""
    changed = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(3 * parameter.std() * torch.randn_like(parameter))
    return changed


def logged(kind, folder, model, *, mixin=True, **options):
    """Return the losses of two steps, and the trainer."""
    base, config, rows = TRAINERS[kind]
    args = config(
        output_dir=str(folder / "out"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    cls = type("OurTrainer", (SOULTrainerMixin, base), {}) if mixin else base
    arguments = {"train_dataset": Dataset.from_list(rows), "processing_class": tiny_tokenizer()} | options
    trainer = cls(copy.deepcopy(model), args=args, **arguments)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_the_reference_is_the_callers(kind, model, tmp_path):
    """At the first step no optimizer has moved anything: the loss is TRL's. Without a reference it is another one."""
    reference = distant(model)
    (want, _), plain = logged(kind, tmp_path, model, mixin=False, ref_model=copy.deepcopy(reference))
    (got, later), trainer = logged(kind, tmp_path, model, ref_model=copy.deepcopy(reference))
    (alone, _), _ = logged(kind, tmp_path, model)
    assert got == want and abs(got - alone) > 1e-3
    assert type(trainer._inner_optimizer()) is SOUL and type(plain.optimizer.optimizer) is not SOUL and later != want
    assert any("clip_fraction" in entry for entry in trainer.state.log_history)
    for mine, theirs in zip(trainer.ref_model.parameters(), reference.parameters()):
        assert torch.equal(mine, theirs)


def test_supervised_fine_tuning(model, tmp_path):
    (want, _), _ = logged("sft", tmp_path, model, mixin=False)
    (got, later), trainer = logged("sft", tmp_path, model)
    assert got == want and later < want and type(trainer._inner_optimizer()) is SOUL
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < want


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_an_objective_is_refused_with_the_remedy(kind, model, tmp_path):
    """TRL's own message is of the type of the data set: expected a `Dataset`, got `UnlearningDataset`."""
    data = {"train_dataset": UnlearningDataset(sequences(4), sequences(4)), "data_collator": collate_unlearning}
    with pytest.raises(ValueError, match="objective: expected None with trl's .*transformers.Trainer"):
        logged(kind, tmp_path, model, objective=losses.GradDiff(), **data)
