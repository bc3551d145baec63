"""The optimizers in the place of AdamW: what torch's tools and the Trainer do with any optimizer, they do with these."""

import copy
import inspect

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook

from soul import SOUL, SophiaG
from tests.integrations.test_frameworks import assert_same, batches, fresh_accelerate, loss_of, make_net, train  # noqa: F401

KINDS = pytest.mark.parametrize("kind", [SOUL, SophiaG])


@KINDS
@pytest.mark.parametrize("capturable", [False, True])
def test_one_cycle_moves_the_momentum_as_well(kind, capturable, device):
    """OneCycleLR writes ``betas`` of a group. The trajectory is that of the same numbers written by hand, bit for bit."""
    scheduled, by_hand = make_net(device), make_net(device)
    opt = kind(scheduled.parameters(), lr=0.01, capturable=capturable)
    scheduler = lr_scheduler.OneCycleLR(opt, max_lr=0.02, total_steps=7, base_momentum=0.5, max_momentum=0.9)
    reference = kind(by_hand.parameters(), lr=1.0, capturable=capturable)
    betas = []
    for x, y in batches(device=device):
        betas.append(opt.param_groups[0]["betas"])
        for name in ("lr", "betas"):
            value = opt.param_groups[0][name]
            reference.param_groups[0][name] = value.clone() if isinstance(value, torch.Tensor) else value
        for net, optimizer in ((scheduled, opt), (by_hand, reference)):
            loss_of(net, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    assert len({first for first, _ in betas}) > 4 and {second for _, second in betas} == {opt.defaults["betas"][1]}
    assert min(first for first, _ in betas) == pytest.approx(0.5, abs=0.1) and betas[0][0] == 0.9
    assert_same(scheduled.state_dict(), by_hand.state_dict())


@KINDS
def test_stochastic_weight_averaging(kind):
    """SWALR anneals lr to a constant, and AveragedModel holds the mean of the weights after each step."""
    net = make_net()
    opt = kind(net.parameters(), lr=0.1)
    scheduler = swa_utils.SWALR(opt, swa_lr=0.02, anneal_epochs=2, anneal_strategy="linear")
    average = swa_utils.AveragedModel(net)
    weights, lrs = [], []
    for x, y in batches():
        lrs.append(opt.param_groups[0]["lr"])
        loss_of(net, x, y).backward()
        opt.step()
        opt.zero_grad()
        scheduler.step()
        average.update_parameters(net)
        weights.append(net[0].weight.detach().clone())
    assert lrs == pytest.approx([0.1, 0.06, 0.02, 0.02, 0.02, 0.02])
    assert torch.allclose(average.module[0].weight, torch.stack(weights).mean(0), atol=1e-6)
    assert int(average.n_averaged) == len(weights) and not torch.equal(weights[0], weights[-1])


@KINDS
def test_a_closure_gives_the_step_its_gradients(kind):
    """Also within torch.no_grad(), as with any optimizer; the value of the closure is returned."""
    plain, net = make_net(), make_net()
    reference, opt = kind(plain.parameters(), lr=0.01), kind(net.parameters(), lr=0.01)
    for x, y in batches(3):
        loss_of(plain, x, y).backward()
        expected = loss_of(plain, x, y).item()
        reference.step()
        reference.zero_grad()

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = loss_of(net, x, y)
            loss.backward()
            return loss

        with torch.no_grad():
            assert opt.step(closure).item() == expected
    assert_same(net.state_dict(), plain.state_dict())


@KINDS
def test_a_group_that_is_added_is_stepped_as_one_of_the_beginning(kind):
    """A layer that is trained only from the third step on, with options of its own."""
    whole, net = make_net(), make_net()
    later = {"lr": 0.03, "weight_decay": 0.0}
    opt = kind(net[0].parameters(), lr=0.01)
    both = kind([{"params": whole[0].parameters()}, {"params": whole[2].parameters(), **later}], lr=0.01)
    for index, (x, y) in enumerate(batches(4)):
        if index == 2:
            opt.add_param_group({"params": net[2].parameters(), **later})
        for module, optimizer in ((net, opt), (whole, both)):
            loss_of(module, x, y).backward()
            if index < 2:
                module[2].zero_grad()
            optimizer.step()
            optimizer.zero_grad()
    assert len(opt.param_groups) == 2 and len(opt.clip_fraction()) == 2
    assert_same(net.state_dict(), whole.state_dict())


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_frees_gradients_or_fills_them_in_place(to_none):
    net = make_net()
    opt = SOUL(net.parameters(), lr=0.01)
    plain = make_net()
    reference = SOUL(plain.parameters(), lr=0.01)
    for x, y in batches(3):
        loss_of(net, x, y).backward()
        grads = [p.grad for p in net.parameters()]
        opt.step()
        opt.zero_grad(set_to_none=to_none)
        for p, grad in zip(net.parameters(), grads):
            assert p.grad is None if to_none else p.grad is grad and not grad.any()
        loss_of(plain, x, y).backward()
        reference.step()
        plain.zero_grad()
    assert_same(net.state_dict(), plain.state_dict())


def test_hooks_for_every_optimizer_fire():
    """Those of one optimizer: test_frameworks.py."""
    opt = SOUL(make_net().parameters(), lr=0.01)
    steps = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *rest: steps.append(optimizer))
    opt.step()
    handle.remove()
    opt.step()
    assert steps == [opt]


def trainer_of(folder, base, model, options):
    """Return a Trainer of four steps on random tokens; ``options`` makes its further arguments of the TrainingArguments."""
    transformers = pytest.importorskip("transformers")
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, weight_decay=0.1,
        warmup_steps=2, max_grad_norm=0.0, report_to="none", logging_strategy="no", save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(3)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, 300, (8, 10)).tolist()]
    return base(model, args, train_dataset=rows, **options(args))


def test_a_plain_trainer_takes_the_optimizer_as_class_and_arguments(tmp_path, fresh_accelerate, without_kernels):  # noqa: F811
    """``optimizer_cls_and_kwargs=optimizer_of(...)`` is the mixin's optimizer: same groups, same schedule, same weights."""
    transformers = pytest.importorskip("transformers")
    from soul.integrations.hf import SOULTrainerMixin, optimizer_of
    from tests.support.models import tiny_model

    class Mixed(SOULTrainerMixin, transformers.Trainer):
        pass

    soul_args = {"rho": "auto", "max_grad_norm": 1.0}
    weights = []
    for base, options in (
        (Mixed, lambda args: {"soul_args": soul_args}),
        (transformers.Trainer, lambda args: {"optimizer_cls_and_kwargs": optimizer_of(soul_args, args)}),
    ):
        model = tiny_model()
        start = copy.deepcopy(model.state_dict())
        trainer = trainer_of(tmp_path, base, model, options)
        trainer.train()
        groups = trainer.optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0] and all(group["rho"] != 0.04 for group in groups)
        assert not any(torch.equal(value, start[name]) for name, value in model.state_dict().items())
        weights.append(model.state_dict())
    assert_same(weights[1], weights[0])


def test_training_arguments_take_no_names_of_others():
    """If this fails, transformers lets optimizers be registered, and ``optim="soul"`` can be offered."""
    transformers = pytest.importorskip("transformers")
    assert "optimizer_cls_and_kwargs" in inspect.signature(transformers.Trainer.__init__).parameters
    with pytest.raises(ValueError, match="'?soul'? is not a valid OptimizerNames"):
        transformers.TrainingArguments("out", optim="soul")
