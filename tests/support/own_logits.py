"""A loss from hidden states against the model's own logits."""

import torch

from soul.data.batches import collate
from soul.losses import GradDiff
from soul.models import causal_lm
from soul_kernels import Head, LinearOptions, TokenBatch, linear_objective
from tests.support import tolerances as tol
from tests.support.helpers import assert_close
from tests.support.models import sequences


def check_against_own_logits(model):
    """Compare log-probabilities and gradients of a padded batch with those of its sequences one by one.

    Forget and retain sequences go through one forward pass of the body, and the loss takes hidden states and head.
    """
    causal_lm.check_linear_head(model)
    forget = sequences(3)
    retain = sequences(4)[1:]
    batch = collate(forget, retain)
    objective = GradDiff(gamma=0.5, alpha=2.0)
    weight, bias = causal_lm.head(model)
    head = Head(weight, bias, **causal_lm.transform(model))
    loss, logps = linear_objective(causal_lm.hidden_states(model, batch), head, batch.labels, objective,
                                   is_forget=batch.is_forget, return_logps=True,
                                   options=LinearOptions(token_indices=batch.token_indices))  # fmt: skip
    assert (causal_lm.token_logps(model, batch) - logps).abs().max() <= tol.LOGP_ABS
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    rows = []
    for sequence in [*forget, *retain]:
        ids = torch.tensor([sequence.input_ids])
        labels = torch.tensor(sequence.labels)
        row = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        row = row * (labels >= 0)
        rows.append(torch.nn.functional.pad(row, (0, batch.labels.shape[1] - len(row))))
    want_logps = torch.stack(rows)
    assert (logps - want_logps).abs().max() <= tol.LOGP_ABS
    objective(want_logps, TokenBatch.from_labels(batch.labels, batch.is_forget)).backward()
    assert got
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.norm() > 1e-6:
            assert_close(got[name], p.grad, 1e-3, name)  # padded attention sums in another order
