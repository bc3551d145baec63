import pytest
import torch
import transformers

from soul import models
from soul.data import collate
from soul.losses import GradDiff
from soul_kernels import TokenBatch, linear_objective
from tests import tolerances as tol
from tests.helpers import assert_close
from tests.models import COMMON, FAMILIES, sequences, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_and_gradients_are_those_of_the_model_itself(family):
    """Forget and retain in one padded forward, loss from hidden states, against the model's own logits one by one."""
    model = tiny_model(family)
    models.check_linear_head(model)
    forget, retain = sequences(3), sequences(4)[1:]
    batch = collate(forget, retain)
    objective = GradDiff(gamma=0.5, alpha=2.0)
    weight, bias = models.head(model)
    assert (bias is not None) == ("bias" in family)
    loss, logps = linear_objective(models.hidden_states(model, batch), weight, batch.labels, objective, bias=bias,
                                   is_forget=batch.is_forget, rows=batch.rows, return_logps=True)  # fmt: skip
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    rows = []
    for sequence in [*forget, *retain]:
        ids, labels = torch.tensor([sequence.input_ids]), torch.tensor(sequence.labels)
        row = model(input_ids=ids).logits[0].log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        row = row * (labels >= 0)
        rows.append(torch.nn.functional.pad(row, (0, batch.labels.shape[1] - len(row))))
    want_logps = torch.stack(rows)
    assert (logps - want_logps).abs().max() <= tol.LOGP_ABS
    objective(want_logps, TokenBatch.from_labels(batch.labels, batch.is_forget)).backward()
    assert got
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.norm() > 1e-6:
            assert_close(got[name], p.grad, 1e-3, name)  # padded attention sums in another order


def test_models_that_bend_their_logits_are_refused():
    options = COMMON | dict(num_key_value_heads=1, head_dim=16)
    gemma = transformers.AutoModelForCausalLM.from_config(transformers.Gemma2Config(**options, final_logit_softcapping=30.0))
    with pytest.raises(ValueError, match="model: expected logits = hidden @ weight.T .*, got final_logit_softcapping 30"):
        models.check_linear_head(gemma)  # logits this small do not show the cap
    cohere = transformers.AutoModelForCausalLM.from_config(transformers.CohereConfig(**COMMON, logit_scale=0.0625))
    with pytest.raises(ValueError, match="model: expected logits = hidden @ weight.T .*, got other logits"):
        models.check_linear_head(cohere)


def test_loading(tmp_path):
    with pytest.raises(ValueError, match="model: expected a directory with config.json, or a hub name"):
        models.load(tmp_path)
    with pytest.raises(ValueError, match="model: expected a causal language model, got nobody/nothing"):
        models.load("nobody/nothing")
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="model: expected a causal language model, got .*SafetensorError"):
        models.load(tmp_path)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        models.load(tmp_path, dtype="int8")
