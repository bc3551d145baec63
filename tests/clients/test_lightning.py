"""Lightning's own Trainer: automatic optimization in mixed precision, with its gradient clipping."""

import copy

import pytest
import torch

lightning = pytest.importorskip("lightning")

from soul import SOUL  # noqa: E402


class Module(lightning.LightningModule):
    """A regression whose optimizer is SOUL."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
        self.options = options
        self.norms = []

    def training_step(self, batch, index):
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x).float(), y)

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())

    def configure_optimizers(self):
        self.optimizer = SOUL(self.parameters(), lr=1e-2, bs=4, **self.options)
        return self.optimizer


def batches():
    generator = torch.Generator().manual_seed(2)
    data = [torch.randn(16, d, generator=generator) for d in (6, 3)]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=4)


def fit(tmp_path, precision, clip=None, plugins=None, **options):
    module = Module(**options)
    start = copy.deepcopy(module.state_dict())
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=4, precision=precision, gradient_clip_val=clip, plugins=plugins, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, batches())
    assert trainer.global_step == 4 and int(module.optimizer.state[next(module.parameters())]["step"]) == 4
    assert not torch.equal(start["net.0.weight"], module.net[0].weight)
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_by_the_trainer_is_clipping_within_the_step(precision, tmp_path):
    """`gradient_clip_val` was refused in bf16-mixed for the optimizer's `_step_supports_amp_scaling`."""
    theirs = fit(tmp_path, precision, clip=0.05)
    ours = fit(tmp_path, precision, max_grad_norm=0.05)
    assert min(theirs.norms) > 0.05  # so that it clips
    for a, b in zip(theirs.parameters(), ours.parameters()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_clipping_with_a_grad_scaler(tmp_path):
    """As in 16-mixed on a GPU: the plugin unscales, clips, and lets the scaler call the step."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    scaled = fit(tmp_path, None, clip=0.05, plugins=[plugin])
    ours = fit(tmp_path, "bf16-mixed", max_grad_norm=0.05)
    for a, b in zip(scaled.parameters(), ours.parameters()):
        assert torch.allclose(a, b, rtol=0.1, atol=2e-2)  # fp16 beside bf16: the signs of four steps of 1e-2, mostly
    assert scaler.get_scale() == 2.0**10
