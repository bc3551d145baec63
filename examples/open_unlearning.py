"""Run open-unlearning with SOUL's optimizer and fused losses, without a change to its files: its own command line after ours.

python examples/open_unlearning.py CHECKOUT --config-name=unlearn.yaml experiment=unlearn/tofu/default \
    forget_split=forget10 retain_split=retain90 trainer=SOULNPO task_name=soul_npo
"""

import pathlib
import runpy
import sys

from common import compare

from soul.integrations.open_unlearning import CONFIGS

checkout = pathlib.Path(sys.argv.pop(1)).resolve()
sys.path.insert(0, str(checkout / "src"))
import trainer as theirs  # noqa: E402  open-unlearning's package

from soul.integrations.open_unlearning import trainers as ours  # noqa: E402


class Compared:
    """A trainer that first compares a batch's loss with that of open-unlearning's trainer of the same objective."""

    def train(self, *args, **kwargs):
        """Compare, then train."""
        cls = theirs.TRAINER_REGISTRY.get(type(self).__name__.removeprefix("SOUL"))
        if cls is not None:
            batch = self._prepare_inputs(next(iter(self.get_train_dataloader())))
            plain = cls.__new__(cls)  # its trainer, with this one's model and, as attributes, the numbers of the objective
            options = vars(self.objective)
            numbers = {name: options[name] for name in {"beta", "gamma", "alpha", "delta"} & options.keys()}
            vars(plain).update(vars(self) | numbers)
            plain.retain_loss_type = "KL" if self.objective.retain == "kl" else "NLL"
            self.model.train()  # in evaluation mode its trainers may take another loss
            compare(
                "loss and gradients",
                lambda: self.compute_loss(self.model, batch).backward(),
                lambda: plain.compute_loss(self.model, batch).backward(),
                self.model.zero_grad,
            )
        return super().train(*args, **kwargs)


for cls in ours.ALL:
    theirs._register_trainer(type(cls.__name__, (Compared, cls), {}))
sys.argv.append(f"hydra.searchpath=[file://{CONFIGS.parent}]")  # in place of a copy of the configurations
runpy.run_path(str(checkout / "src" / "train.py"), run_name="__main__")
