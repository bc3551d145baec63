"""Replacements for open-unlearning's loss functions: its numbers with compat, the formulas without, under every wrapper."""

import contextlib
import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
import transformers

from soul import functional
from soul.models import head_call
from soul_kernels import chunks
from soul_kernels.reference import _rows
from tests.support import tolerances as tol
from tests.support.helpers import assert_close, mutant, peak_bytes
from tests.support.models import COMMON, tiny_model

OU = "open-unlearning"
# Tied: the gradient of the head meets that of the embedding in one tensor. Untied: a head that a wrapper may see on its own.
FAMILIES = ("llama, tied", "llama, untied")


def pair_of_models(family="llama, untied"):
    """A model that has opinions, and a reference close to it. Of spread 0.6, where a fresh one has 0.1; more, and a tied head
    would be sure of repeating each token, and the gradients of p / (1 - p) would be those of p below 1e-5.
    """
    model = tiny_model(family)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
        reference = copy.deepcopy(model)
        for parameter in reference.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
    return model, reference


def batch(prompts=(3, 1, 4, 2, 0), answers=(5, 2, 3, 1, 4), ignored=(2,), seed=0):
    """Ragged, prompts masked, padded on the right; one sequence without any label, one without a prompt: its first label has
    nothing that predicts it, which is where counting before and after the shift part."""
    generator = torch.Generator().manual_seed(seed)
    length = max(p + a for p, a in zip(prompts, answers))
    ids = torch.randint(2, 300, (len(prompts), length), generator=generator)
    position = torch.arange(length)
    prompt = torch.tensor(prompts)[:, None]
    end = (torch.tensor(prompts) + torch.tensor(answers))[:, None]
    labels = torch.where((position >= prompt) & (position < end), ids, -100)
    labels[list(ignored)] = -100
    mask = (position < end).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


LOSE = batch()
WIN = batch(prompts=(3, 1, 4, 2, 1), answers=(2, 6, 3, 3, 2), ignored=(3,), seed=1)  # of other lengths


def logits_and_labels(model, inputs):
    """Return logits [B, T - 1, V] and labels [B, T - 1] of the predicted positions."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return logits[:, :-1], inputs["labels"][:, 1:]


def nlls(model, inputs):
    """Return the negative log-likelihoods [B, T - 1], 0 where the label is ignored."""
    logits, labels = logits_and_labels(model, inputs)
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)


def labelled(inputs):
    return inputs["labels"][:, 1:] != -100


class Coded:
    """The formulas as they stand in locuslab/open-unlearning, in eager PyTorch."""

    @staticmethod
    def kl(model, ref, inputs):  # src/trainer/utils.py, compute_kl_divergence
        log_p, log_q = (m(**inputs).logits.log_softmax(-1).flatten(0, 1) for m in (model, ref))
        return F.kl_div(log_p, log_q.detach(), reduction="batchmean", log_target=True)

    @staticmethod
    def nll(model, ref, inputs):  # src/trainer/utils.py, compute_batch_nll
        return nlls(model, inputs).sum(1)

    @staticmethod
    def dpo(model, ref, win, lose, beta=0.1):  # src/trainer/utils.py, compute_dpo_loss
        ratios = [0.0 if x is None else -(nlls(model, x).sum(1) - nlls(ref, x).sum(1).detach()) for x in (win, lose)]
        return -2 / beta * F.logsigmoid(beta * (ratios[0] - ratios[1])).mean()

    @staticmethod
    def undial(model, ref, inputs, beta=3.0):  # src/trainer/utils.py, compute_undial_loss: -100 is an index from the end
        logits, labels = logits_and_labels(model, inputs)
        teacher = logits_and_labels(ref, inputs)[0].detach()
        lowered = torch.zeros_like(teacher).scatter(2, (labels % teacher.shape[2])[..., None], beta)
        assert (labels % 300)[labels == -100].eq(200).all()
        return F.cross_entropy(logits.flatten(0, 1), (teacher - lowered).softmax(-1).flatten(0, 1))

    @staticmethod
    def wga(model, ref, inputs, beta=0.7):  # src/trainer/utils.py, compute_wga_loss
        nll = nlls(model, inputs)[labelled(inputs)]
        return -((-nll).exp().detach() ** beta * nll).mean()

    @staticmethod
    def satimp(model, ref, inputs, beta1=0.5, beta2=1.5):  # src/trainer/utils.py, compute_satimp_loss
        nll = nlls(model, inputs)[labelled(inputs)]
        p = (-nll).exp().detach()
        return -(p**beta1 * (1 - p) ** beta2 * nll).mean()

    @staticmethod
    def ceu(model, ref, inputs, k=1):  # src/trainer/unlearn/ceu.py: the first k are counted before the shift
        labels = inputs["labels"]
        labels = labels.masked_fill((labels != -100).cumsum(1) <= k, -100)
        return Coded.cross_entropy_unlearning(model, inputs, labels[:, 1:])

    @staticmethod
    def cross_entropy_unlearning(model, inputs, labels):
        logits = logits_and_labels(model, inputs)[0][labels != -100]
        target = logits.detach().scatter(1, labels[labels != -100][:, None], -torch.inf).softmax(1)
        return F.cross_entropy(logits, target)


class Meant(Coded):
    """The formulas where their meaning differs from the code: only positions with a label, and sequences that have one."""

    @staticmethod
    def kl(model, ref, inputs):
        log_p, log_q = (logits_and_labels(m, inputs)[0].log_softmax(-1)[labelled(inputs)] for m in (model, ref))
        log_q = log_q.detach()
        return (log_q.exp() * (log_q - log_p)).sum(1).mean()

    @staticmethod
    def dpo(model, ref, win, lose, beta=0.1):
        counted = torch.stack([labelled(x).any(1) for x in (win, lose) if x is not None]).all(0)
        return Coded.dpo(model, ref, *(x and {k: v[counted] for k, v in x.items()} for x in (win, lose)), beta)

    @staticmethod
    def undial(model, ref, inputs, beta=3.0):
        logits, labels = (x[labelled(inputs)] for x in logits_and_labels(model, inputs))
        teacher = logits_and_labels(ref, inputs)[0][labelled(inputs)].detach()
        teacher[torch.arange(len(labels)), labels] -= beta
        return F.cross_entropy(logits, teacher.softmax(-1))

    @staticmethod
    def ceu(model, ref, inputs, k=1):
        labels = inputs["labels"][:, 1:]
        return Coded.cross_entropy_unlearning(model, inputs, labels.masked_fill((labels != -100).cumsum(1) <= k, -100))


def first(pair):
    return pair[0]


CASES = {  # name -> ours, theirs
    "kl": (lambda f, m, r, c: f.compute_kl_divergence(m, r, LOSE, compat=c), lambda e, m, r: e.kl(m, r, LOSE)),
    "nll": (lambda f, m, r, c: f.compute_batch_nll(m, LOSE, compat=c), lambda e, m, r: e.nll(m, r, LOSE)),
    "dpo": (lambda f, m, r, c: f.compute_dpo_loss(m, r, WIN, LOSE, 0.1, compat=c), lambda e, m, r: e.dpo(m, r, WIN, LOSE)),
    # one side only: NPO, and what would be its mirror image
    "npo": (lambda f, m, r, c: f.compute_dpo_loss(m, r, None, LOSE, 0.1, compat=c), lambda e, m, r: e.dpo(m, r, None, LOSE)),
    "win": (lambda f, m, r, c: f.compute_dpo_loss(m, r, WIN, beta=0.1, compat=c), lambda e, m, r: e.dpo(m, r, WIN, None)),
    "undial": (lambda f, m, r, c: f.compute_undial_loss(m, r, LOSE, 3.0, compat=c), lambda e, m, r: e.undial(m, r, LOSE)),
    "wga": (lambda f, m, r, c: f.compute_wga_loss(m, LOSE, 0.7, compat=c), lambda e, m, r: e.wga(m, r, LOSE)),
    "satimp": (lambda f, m, r, c: f.compute_satimp_loss(m, LOSE, 0.5, 1.5, compat=c), lambda e, m, r: e.satimp(m, r, LOSE)),
    "ceu": (lambda f, m, r, c: f.compute_batch_ceu(m, LOSE, compat=c), lambda e, m, r: e.ceu(m, r, LOSE)),
    "ceu, first 2": (lambda f, m, r, c: f.compute_batch_ceu(m, LOSE, 2, compat=c), lambda e, m, r: e.ceu(m, r, LOSE, 2)),
}
DIFFER = {"kl", "dpo", "npo", "win", "undial", "ceu", "ceu, first 2"}  # between the modes, on these batches


def total(value):
    """[B] losses must be right one by one: unequal weights."""
    return (value * torch.arange(1, value.numel() + 1, dtype=value.dtype).view(value.shape)).sum()


def gradients(model, value):
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(total(value), parameters.values())))


def check(module, name, family, compat):
    """Value and gradients of all parameters, against the eager formula on the same model in fp64."""
    ours, theirs = CASES[name]
    model, reference = pair_of_models(family)
    exact, exact_reference = copy.deepcopy(model).double(), copy.deepcopy(reference).double()
    got = ours(module, model, reference, compat)[0]
    want = theirs(Coded if compat else Meant, exact, exact_reference)
    assert got.dtype == torch.float32
    assert_close(got, want, tol.GRAD_FP32, name)
    grads = gradients(model, got)
    for parameter, expected in gradients(exact, want).items():
        assert_close(grads[parameter], expected, tol.WORST_ROW_FP32, f"{name}, {parameter}")  # fp32 through all layers
    assert all(parameter.grad is None for parameter in reference.parameters())
    return want


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_open_unlearning(name):
    for family in FAMILIES:
        coded = check(functional, name, family, OU)
    model, reference = (m.double() for m in pair_of_models(FAMILIES[-1]))
    meant = CASES[name][1](Meant, model, reference)
    assert (abs(total(meant - coded)) > 1e-6 * abs(total(coded))) == (name in DIFFER)  # the batch tells the modes apart


@pytest.mark.parametrize("name", CASES)
def test_what_the_formulas_mean(name):
    for family in FAMILIES:
        check(functional, name, family, None)


@pytest.mark.parametrize("module, name, compat, old, new", [
    ("compat", "kl", OU, "masked_fill(labels == IGNORE_INDEX, 0)", "clone()"),  # labelled positions only
    ("functional", "kl", None, "    if compat:\n        labels = labels_for", "    if True:\n        labels = labels_for"),
    ("compat", "undial", OU, "n_vocab + IGNORE_INDEX", "0"),
    ("compat", "undial", OU, "coded[:, -1] = IGNORE_INDEX", "pass"),  # the last position as well
    ("functional", "dpo", None, "torch.stack([lose, win], 1)", "torch.stack([win, lose], 1)"),
    ("functional", "dpo", OU, "labels if compat else", "labels if False else"),
    ("functional", "win", None, "= -logps\n            ref_logps = -ref_logps\n", "= logps\n"),
    ("functional", "ceu", OU, "> ignore_first_n", ">= ignore_first_n"),
    ("functional", "ceu", None, "CEU(ignore_first=ignore", "CEU(ignore_first=0 * ignore"),
    ("models.head_call", "nll", None, 'inputs["labels"][:, 1:], (0, 1)', 'inputs["labels"][:, :-1], (0, 1)'),  # not shifted
    ("models.head_call", "wga", None, "(value - value.detach())", "value.detach()"),  # no gradient
])  # fmt: skip
def test_mutants_do_not_pass(module, name, compat, old, new, tmp_path, monkeypatch):
    broken = mutant(f"soul.{module}", old, new, tmp_path)
    if module == "functional":
        tested = broken
    else:  # a mutant of what the functions import
        tested = functional
        for attribute, value in vars(broken).items():
            if getattr(value, "__module__", None) == broken.__name__ and hasattr(functional, attribute):
                monkeypatch.setattr(functional, attribute, value)
    with pytest.raises(AssertionError):
        check(tested, name, "llama, tied", compat)


@pytest.mark.parametrize("compat", [None, OU])
def test_nothing_labelled_is_zero_and_attached(compat):
    """A mean over nothing is NaN there and would end a training run; but what is counted without labels stays as it is."""
    nothing = {**LOSE, "labels": torch.full_like(LOSE["labels"], -100)}
    model, reference = pair_of_models()
    values = {
        "nll": functional.compute_batch_nll(model, nothing, compat=compat)[0].sum(),
        "wga": functional.compute_wga_loss(model, nothing, 1.0, compat=compat)[0],
        "satimp": functional.compute_satimp_loss(model, nothing, 5.0, 1.0, compat=compat)[0],
        "ceu": functional.compute_batch_ceu(model, nothing, compat=compat)[0],
        "npo": functional.compute_dpo_loss(model, reference, None, nothing, compat=compat)[0],
        "dpo": functional.compute_dpo_loss(model, reference, nothing, nothing, compat=compat)[0],
    }
    if compat is None:  # with compatibility unlabelled positions are what these count
        values["kl"] = functional.compute_kl_divergence(model, reference, nothing)[0]
        values["undial"] = functional.compute_undial_loss(model, reference, nothing, 10.0)[0]
    for name, value in values.items():
        log2 = 2 * torch.log(torch.tensor(2.0)) if compat and name in ("npo", "dpo") else 0.0
        assert value == log2, name
        assert all((gradient == 0).all() for gradient in gradients(model, value).values()), name


def theirs_undial(model, reference, inputs, beta=10.0):
    """`Coded.undial`, as it allocates: src/trainer/utils.py, compute_undial_loss."""
    logits = model(**inputs).logits
    labels = inputs["labels"][:, 1:]
    shifted = logits[:, :-1].contiguous()
    with torch.no_grad():
        teacher = reference(**inputs).logits[:, :-1].contiguous()
    mask = torch.zeros_like(teacher)
    mask[torch.arange(len(mask))[:, None, None], torch.arange(mask.shape[1])[None, :, None], labels[..., None]] = 1.0
    soft = (teacher - mask * beta).softmax(-1)
    return F.cross_entropy(shifted.flatten(0, 1), soft.flatten(0, 1), reduction="none").mean()


@pytest.mark.parametrize("name", ["kl", "undial"])
def test_takes_less_memory_than_open_unlearnings_code(name, monkeypatch, without_kernels):
    """On a CPU without kernels, at a vocabulary of 64 times the width. The batch is small, and so are the chunks."""
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 2**19)
    monkeypatch.setattr(_rows, "DIVERGENCE_BLOCK", 2**14)
    config = transformers.LlamaConfig(**COMMON | dict(vocab_size=4096, hidden_size=64))
    model = transformers.LlamaForCausalLM(config).eval()
    reference = copy.deepcopy(model).requires_grad_(False)
    ids = torch.randint(2, 4096, (4, 64))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    ours, theirs = {
        "kl": (lambda: functional.compute_kl_divergence(model, reference, inputs, compat=OU)[0],
               lambda: Coded.kl(model, reference, inputs)),
        "undial": (lambda: functional.compute_undial_loss(model, reference, inputs, 10.0, compat=OU)[0],
                   lambda: theirs_undial(model, reference, inputs)),
    }[name]  # fmt: skip
    assert_close(ours(), theirs(), tol.GRAD_FP32, name)
    peaks = []
    for loss in (ours, theirs):
        model.zero_grad()
        peaks.append(peak_bytes(lambda loss=loss: loss().backward(), torch.device("cpu")))
    assert peaks[0] < 0.6 * peaks[1], peaks


def test_names_and_signatures_are_those_of_open_unlearning():
    expected = {
        "compute_kl_divergence": "(model, target_model, inputs)",
        "compute_batch_nll": "(model, inputs)",
        "compute_dpo_loss": "(model, ref_model, win_inputs=None, lose_inputs=None, beta=1.0)",
        "compute_undial_loss": "(model, ref_model, inputs, beta)",
        "compute_wga_loss": "(model, inputs, beta)",
        "compute_satimp_loss": "(model, inputs, beta1, beta2)",
        "compute_batch_ceu": "(model, inputs, ignore_first_n_answer_tokens=1)",
    }
    for name, names_and_defaults in expected.items():
        signature = inspect.signature(getattr(functional, name))
        parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        assert str(inspect.Signature(parameters)) == names_and_defaults[:-1] + ", *, compat=None)"
    defined_there = (value for value in vars(functional).values() if getattr(value, "__module__", None) == functional.__name__)
    assert {value.__name__ for value in defined_there if value.__name__[0] != "_"} == set(expected)


def test_outputs_are_what_a_trainer_takes():
    """Loss and outputs, whose loss is that of the model itself; two of them from DPO, None where no batch was given."""
    model, reference = pair_of_models()
    want = model(**LOSE).loss
    for pair in (
        functional.compute_batch_nll(model, LOSE),
        functional.compute_kl_divergence(model, reference, LOSE, compat=OU),
        functional.compute_undial_loss(model, reference, LOSE, 10.0, compat=OU),
        functional.compute_batch_ceu(model, LOSE),
    ):
        outputs = pair[1]
        assert isinstance(outputs, transformers.modeling_outputs.CausalLMOutput)
        assert outputs.logits is None and not outputs.loss.requires_grad
        assert_close(outputs.loss, want, tol.GRAD_FP32, "loss")
    _, (win, lose) = functional.compute_dpo_loss(model, reference, None, LOSE)
    assert win is None
    assert_close(lose.loss, want, tol.GRAD_FP32, "loss")


def test_no_logits_are_made(monkeypatch):
    """The head returns one row, whatever the number of tokens; afterwards the model is what it was."""
    model, reference = pair_of_models()
    before = model(**LOSE).logits
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    functional.compute_undial_loss(model, reference, LOSE, 10.0)
    functional.compute_batch_nll(model, LOSE)
    handle.remove()
    assert shapes == [(1, 1, 300), (1, 1, 300)]
    assert "forward" not in vars(model.lm_head) and torch.equal(model(**LOSE).logits, before)
    with pytest.raises(ValueError, match="labels: expected values in"):
        functional.compute_batch_nll(model, {**LOSE, "labels": LOSE["labels"] + 1000})
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi, head with a bias"])
def test_models_that_transform_their_logits(family):
    """Capped, multiplied, divided, with a bias: each changes what passes from the head to the output on its own."""
    options = COMMON | dict(tie_word_embeddings=False)
    bent = {
        "gemma2": lambda: transformers.Gemma2Config(
            **options, num_key_value_heads=1, head_dim=16, final_logit_softcapping=3.0, attn_implementation="eager"
        ),
        "cohere": lambda: transformers.CohereConfig(**options, logit_scale=0.25),
        "granite": lambda: transformers.GraniteConfig(**options, logits_scaling=4.0),
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(bent[family]()).eval() if family in bent else tiny_model(family)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
    exact = copy.deepcopy(model).double()
    got = functional.compute_batch_nll(model, LOSE)[0]
    want = Coded.nll(exact, None, LOSE)
    assert_close(got, want, tol.GRAD_FP32, "nll")
    grads = gradients(model, got)
    for parameter, expected in gradients(exact, want).items():
        if expected.norm() > 1e-6:
            assert_close(grads[parameter], expected, 1e-3, parameter)


def test_distributed_data_parallel_sees_the_loss():
    """The reducer must see every forward, or replicas silently drift apart; a hook that doubles the gradients shows it."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for find_unused in (False, True):  # True: parameters are looked for in the graph of the output
            model, reference = pair_of_models()
            want = gradients(model, functional.compute_undial_loss(model, reference, LOSE, 10.0)[0])
            wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
            wrapped.register_comm_hook(None, doubled)
            for _ in range(2):
                model.zero_grad()
                functional.compute_undial_loss(wrapped, reference, LOSE, 10.0)[0].backward()
                for name, parameter in model.named_parameters():
                    assert_close(parameter.grad, 2 * want[name], 1e-5, name)
    finally:
        torch.distributed.destroy_process_group()


def doubled(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer() * 2)
    return future


def test_autocast_within_the_models_forward_reaches_the_head():
    """Accelerate puts its autocast into ``model.forward``; a call of the body alone would lose it."""
    model, _ = pair_of_models()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = functional.compute_wga_loss(model, LOSE, 1.0)[0]
    plain = functional.compute_wga_loss(model, LOSE, 1.0)[0]
    forward = model.forward
    model.forward = lambda **inputs: torch.autocast("cpu", dtype=torch.bfloat16)(forward)(**inputs)
    assert torch.equal(functional.compute_wga_loss(model, LOSE, 1.0)[0], want)
    assert not torch.equal(plain, want)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])  # frozen head; a trained copy of it
def test_adapters(modules_to_save):
    """LoRA against the eager formula; the reference is the same model without them."""
    peft = pytest.importorskip("peft")
    model, _ = pair_of_models()
    options = dict(target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=modules_to_save)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.0, **options)).eval()
    if modules_to_save:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.1)
    exact = copy.deepcopy(model).double()
    reference, exact_reference = WithoutAdapters(model), WithoutAdapters(exact)
    for got, want in (
        (functional.compute_undial_loss(model, reference, LOSE, 3.0)[0], Meant.undial(exact, exact_reference, LOSE)),
        (functional.compute_dpo_loss(model, reference, None, LOSE, 0.1)[0], Meant.dpo(exact, exact_reference, None, LOSE)),
    ):
        assert_close(got, want, tol.GRAD_FP32, "loss")
        trained = [[name for name, p in m.named_parameters() if p.requires_grad] for m in (model, exact)]
        assert trained[0] and trained[0] == trained[1]
        grads, expected = (
            torch.autograd.grad(value, [m.get_parameter(name) for name in trained[0]])
            for m, value in ((model, got), (exact, want))
        )
        for name, a, b in zip(trained[0], grads, expected):
            assert_close(a, b, tol.WORST_ROW_FP32, name)


class WithoutAdapters(torch.nn.Module):
    """A model with its adapters off, in a wrapper of the kind that has a ``module``."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, **inputs):
        with self.module.disable_adapter():
            return self.module(**inputs)


def test_bad_input_is_named():
    model, reference = pair_of_models()
    with pytest.raises(ValueError, match="compat: expected one of None, 'open-unlearning', got 'tofu'"):
        functional.compute_batch_nll(model, LOSE, compat="tofu")
    with pytest.raises(ValueError, match="win_inputs: expected a batch here or as lose_inputs, got None"):
        functional.compute_dpo_loss(model, reference)
    with pytest.raises(ValueError, match="lose_inputs: expected 5 sequences, as win_inputs, got 2"):
        functional.compute_dpo_loss(model, reference, WIN, {name: value[:2] for name, value in LOSE.items()})
    with pytest.raises(ValueError, match="model: expected a linear language-model head, got LlamaModel"):
        functional.compute_batch_nll(model.model, LOSE)
    with pytest.raises(ValueError, match="model: expected a forward that calls its head once, got 0 calls of it in Llama"):
        with bypassed_head(model):
            functional.compute_batch_nll(model, LOSE)


def test_a_small_vocabulary_has_no_token_for_ignored_labels():
    config = transformers.LlamaConfig(**COMMON | dict(vocab_size=99))
    model = transformers.LlamaForCausalLM(config)
    inputs = {**LOSE, "input_ids": LOSE["input_ids"] % 99}
    inputs["labels"] = torch.where(LOSE["labels"] == -100, -100, LOSE["labels"] % 99)
    with pytest.raises(ValueError, match="compat: expected a vocabulary of 100 or more, got 99"):
        functional.compute_undial_loss(model, model, inputs, 10.0, compat=OU)
    assert functional.compute_undial_loss(model, model, inputs, 10.0)[0].isfinite()


def test_adapters_on_the_head_are_refused():
    """Its weight alone would be the head without its adapter."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(pair_of_models()[0], peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="model: expected a head without adapters, got Linear; leave it out"):
        functional.compute_batch_nll(model, LOSE)


@contextlib.contextmanager
def bypassed_head(model):
    """A family that multiplies by the head's weight itself."""
    forward = model.forward
    model.forward = lambda input_ids, attention_mask, use_cache: (model.model(input_ids)[0] @ model.lm_head.weight.T,)
    yield
    model.forward = forward


def test_a_replaced_forward_is_compiled():
    """torch.compile traces through the replacement and the restoration; nothing of them is left on the module."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)

    def replaced(x):
        with head_call._forward_replaced(model[1], lambda hidden: hidden.sum()):
            return model(x)

    assert torch.compile(replaced, backend="eager")(x) == replaced(x) == model[0](x).sum()
    assert "forward" not in vars(model[1]) and model(x).shape == (5, 2)
