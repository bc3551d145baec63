"""open-unlearning's own source with our trainers in it, in the environment of its pins: `make test-clients`.

OPEN_UNLEARNING names a checkout of locuslab/open-unlearning. Its public interface without its source is tested in
tests/integrations/test_integrations.py, which the same target runs at the same pins.
"""

import copy
import os
import pathlib
import runpy
import sys

import pytest
import torch

pytest.importorskip("transformers")
SOURCE = os.environ.get("OPEN_UNLEARNING")
if not SOURCE:
    pytest.skip("OPEN_UNLEARNING is not set: make test-clients OPEN_UNLEARNING=checkout", allow_module_level=True)
OmegaConf = pytest.importorskip("omegaconf").OmegaConf

from soul import SOUL, functional  # noqa: E402
from soul.integrations import open_unlearning  # noqa: E402
from soul.integrations.hf import SOULTrainerMixin  # noqa: E402
from soul.integrations.open_unlearning import CONFIGS  # noqa: E402
from tests.integrations.test_integrations import ForgetRetain, fresh_accelerate, its_collator  # noqa: E402, F401
from tests.support import tolerances as tol  # noqa: E402
from tests.support.helpers import assert_close, peak_bytes  # noqa: E402
from tests.support.models import sequences, tiny_model  # noqa: E402

OU = "open-unlearning"
ROOT = pathlib.Path(__file__).parents[2]
REGISTRATION = """
from soul.integrations.open_unlearning import trainers as soul_trainers

for soul_trainer in soul_trainers.ALL:
    _register_trainer(soul_trainer)
"""  # as in our README


@pytest.fixture(scope="module")
def source():
    """open-unlearning's package ``trainer``, with our lines at the end of its __init__."""
    readme = (CONFIGS.parent.parent / "README.md").read_text()
    assert all(line.strip() in readme for line in REGISTRATION.splitlines())
    folder = str(pathlib.Path(SOURCE) / "src")
    assert (pathlib.Path(folder) / "trainer").is_dir(), f"OPEN_UNLEARNING={SOURCE} has no src/trainer"
    sys.path.insert(0, folder)
    import trainer

    exec(REGISTRATION, vars(trainer))
    yield trainer
    sys.path.remove(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "trainer"] + [open_unlearning.__name__ + ".trainers"]:
        del sys.modules[name]
    del open_unlearning.trainers


def configuration(path, folder, **method_args):
    """One of our YAML files over its finetune.yaml, as Hydra merges them, with what a CPU and four steps need."""
    base = OmegaConf.load(pathlib.Path(SOURCE) / "configs" / "trainer" / "finetune.yaml")
    few = dict(output_dir=str(folder), logging_dir=str(folder), max_steps=2, per_device_train_batch_size=4, use_cpu=True,
               gradient_accumulation_steps=1, report_to="none", bf16=False, bf16_full_eval=False, gradient_checkpointing=False,
               disable_tqdm=True, eval_strategy="no", eval_on_start=False, ddp_find_unused_parameters=False)  # fmt: skip
    config = OmegaConf.merge(base, OmegaConf.load(path), {"args": few, "method_args": method_args})
    del config["defaults"]
    return config


class Evaluator:
    def evaluate(self, **options):
        return {"tofu": 0.5}


def make(source, path, folder, model, **method_args):
    alternate = sequences(8) if path.stem in ("SOULDPO", "SOULPO") else None
    data = ForgetRetain(sequences(8), sequences(4), alternate)
    trainer, _ = source.load_trainer(
        configuration(path, folder, **method_args), model, train_dataset=data, data_collator=its_collator,
        evaluators={"tofu": Evaluator()}, template_args={},
    )  # fmt: skip
    return trainer, its_collator([data[i] for i in range(8)])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_trains_and_evaluates(path, tmp_path, source):
    model = tiny_model()
    before = copy.deepcopy(model)
    trainer, _ = make(source, path, tmp_path, model)
    trainer.train()
    assert trainer.state.global_step == 2 and isinstance(trainer._inner_optimizer(), SOUL)
    assert any(not torch.equal(got, old) for got, old in zip(model.parameters(), before.parameters()))
    assert trainer.evaluate()["tofu"] == 0.5


@pytest.mark.parametrize("name, their_name, method_args", [
    ("SOULGradDiff", "GradDiff", dict(retain_loss_type="KL", gamma=0.7, alpha=1.3)),
    ("SOULNPO", "NPO", dict(retain_loss_type="KL", beta=0.5)),
    ("SOULUNDIAL", "UNDIAL", dict(beta=10.0, alpha=0.5)),
    ("SOULUNDIAL", "UNDIAL", dict(beta=10.0, alpha=0.5, retain_loss_type="KL")),
])  # fmt: skip
def test_compat_is_its_trainers_loss(name, their_name, method_args, tmp_path, source):
    """Compare value and gradients on a model that has moved away from the reference model."""
    path = CONFIGS / f"{name}.yaml"
    values = {}
    for handler, options in ((name, dict(method_args, compat=OU)), (their_name, method_args)):
        model = tiny_model("llama, untied")
        torch.manual_seed(1)
        config = configuration(path, tmp_path)
        config.handler = handler
        config.method_args = options
        data = ForgetRetain(sequences(8), sequences(4))
        trainer, _ = source.load_trainer(config, model, train_dataset=data, data_collator=its_collator)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.5 * parameter.std() * torch.randn_like(parameter))
        batch = its_collator([data[i] for i in range(4)])
        loss = trainer.compute_loss(trainer.model.eval(), batch)
        values[handler] = [loss, *torch.autograd.grad(loss, list(trainer.model.parameters()))]
    for got, want in zip(values[name], values[their_name]):
        assert_close(got, want, tol.WORST_ROW_FP32, name)


@pytest.mark.parametrize("name", ["compute_kl_divergence", "compute_undial_loss"])
def test_functions_are_its_own_and_take_less_memory(name, source):
    """At a vocabulary of 32,000, the memory beyond weights, inputs and the graph of the layers is that of the chunks."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=32000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=64)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    reference = copy.deepcopy(model).requires_grad_(False)
    ids = torch.randint(2, 32000, (4, 128))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids % 3 == 0, -100)}
    options = (10.0,) if name == "compute_undial_loss" else ()
    theirs = getattr(source.utils, name)
    ours = getattr(functional, name)
    peaks = []
    losses = []
    for call in (lambda: ours(model, reference, inputs, *options, compat=OU)[0],
                 lambda: theirs(model, reference, inputs, *options)[0]):  # fmt: skip
        losses.append(call().detach())
        model.zero_grad()
        peaks.append(peak_bytes(lambda call=call: call().backward(), torch.device("cpu")))
    assert_close(losses[0], losses[1], tol.GRAD_FP32, name)
    assert peaks[0] < 0.6 * peaks[1], peaks


def test_its_own_loss_with_souls_optimizer(tmp_path, source):
    """docs/integrations.md: ``class X(SOULTrainerMixin, TheirTrainer)``."""
    from trainer.unlearn.npo import NPO

    class SOULOptimizedNPO(SOULTrainerMixin, NPO):
        pass

    source._register_trainer(SOULOptimizedNPO)
    config = configuration(CONFIGS / "SOULNPO.yaml", tmp_path)
    config.handler = "SOULOptimizedNPO"
    config.method_args = {"beta": 0.5, "soul_args": {"rho": 0.04, "max_grad_norm": 1.0}}
    trainer, _ = source.load_trainer(config, tiny_model(), train_dataset=ForgetRetain(sequences(8), sequences(4)),
                                     data_collator=its_collator)  # fmt: skip
    assert trainer.train().training_loss > 0 and isinstance(trainer._inner_optimizer(), SOUL)
    assert trainer.ref_model is not None and trainer.beta == 0.5


TRAIN = """
import sys

import trainer
from tests.clients.test_open_unlearning import CONFIGS, make
from tests.support.models import tiny_model

options = dict(word.split("=", 1) for word in sys.argv[1:])
made, _ = make(trainer, CONFIGS / f"{options['trainer']}.yaml", options["folder"], tiny_model("llama, untied"))
made.train()
"""


@pytest.mark.parametrize("name", ["SOULGradDiff", "SOULNPO", "SOULSimNPO"])
def test_the_example_compares_with_its_trainer(name, tmp_path, source, monkeypatch, capsys):
    """examples/open_unlearning.py, with a train.py that needs no data set."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "train.py").write_text(TRAIN)
    monkeypatch.setattr(source, "TRAINER_REGISTRY", dict(source.TRAINER_REGISTRY))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["open_unlearning.py", str(tmp_path), f"trainer={name}", f"folder={tmp_path / 'out'}"])
    monkeypatch.syspath_prepend(ROOT / "examples")
    runpy.run_path(str(ROOT / "examples" / "open_unlearning.py"), run_name="__main__")
    assert "loss and gradients" in capsys.readouterr().out
