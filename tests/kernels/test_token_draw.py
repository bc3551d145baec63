import functools
import math

import pytest
import torch

from soul_kernels._head import rows as head_rows
from soul_kernels.reference import token_draw as reference
from soul_kernels.reference.token_logprob import token_logprob, transformed
from soul_kernels.token_draw import DRAW_CONFIG, draw_labels, likeliest_statistics
from soul_kernels.token_logprob import STATISTICS_CONFIG
from tests.kernels.test_token_logprob import oracle, overlaid, peaked
from tests.support import tolerances as tol
from tests.support.helpers import assert_rows_close, mutant


@pytest.fixture
def row_functions(backend, monkeypatch):
    """Run a test with the kernels, and with the PyTorch functions that replace them."""
    functions = head_rows.row_functions(backend)
    for name in ("likeliest_statistics", "draw_labels"):
        monkeypatch.setitem(globals(), name, getattr(functions, name))


def draw(logits, labels, uniforms, coefficients, out=None, likeliest=None, op=None, **transform):
    statistics = torch.zeros((4, len(labels)), device=logits.device)
    (likeliest or likeliest_statistics)(logits, labels, statistics, **transform)
    out = torch.full_like(logits, float("nan")) if out is None else out
    drawn = labels.clone()
    (op or draw_labels)(logits, drawn, uniforms, statistics, coefficients, out, **transform)
    return drawn, statistics, out


def check_draw(n_vocab, device, *, spread=2.0, **transform):
    n = 12
    logits = torch.randn(n, n_vocab, device=device) * spread
    logits[0, : n_vocab // 3] = -torch.inf  # u = 0 must not pick a label of probability 0
    logits[1, 2 * n_vocab // 3 + 1 :] = -torch.inf  # nor must u close to 1
    labels = torch.zeros(n, dtype=torch.int64, device=device)
    labels[3] = -100
    uniforms = torch.rand(n, device=device)
    uniforms[:3] = torch.tensor([0.0, 1 - 2**-24, 1 - 2**-24], device=device)
    coefficients = torch.randn(n, device=device)
    drawn, statistics, gradient = draw(logits, labels, uniforms, coefficients, **transform)
    leaf = logits.double().requires_grad_()
    shown = transformed(leaf, **transform)
    assert drawn[3] == -100 and statistics[0, 3] == 0 and (gradient[3] == 0).all()
    labelled = labels == 0
    p = shown.detach().softmax(1)
    assert (p.gather(1, drawn.clamp(min=0)[:, None])[labelled, 0] > 0).all()
    cdf = p.cumsum(1)
    above = cdf.gather(1, drawn.clamp(min=0)[:, None])[:, 0]
    below = above - p.gather(1, drawn.clamp(min=0)[:, None])[:, 0]
    u = uniforms.double()
    assert ((below <= u + 1e-5) & (u <= above + 1e-5))[labelled].all()  # sums of fp32 in another order
    logp = token_logprob(shown[labelled], drawn[labelled])
    (want,) = torch.autograd.grad((logp * coefficients[labelled]).sum(), leaf)
    assert (statistics[0, labelled].double() - logp).abs().max() <= 2 * tol.LOGP_ABS
    assert_rows_close(gradient, want.nan_to_num(0.0), 2 * tol.WORST_ROW_FP32, "dlogits")  # 0 times -inf in the oracle
    return drawn, reference.draw_labels(shown, uniforms)


# 1 and 2: next to nothing to choose from. 4097 and 12289: a column beyond two and six blocks of 2048; 50257: a tail.
@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("n_vocab", [1, 2, 129, 4097, 12289, 50257])
def test_labels_are_drawn_by_inverse_cdf(n_vocab, device):
    drawn, want = check_draw(n_vocab, device)
    assert (drawn == want)[drawn >= 0].float().mean() > 0.9  # all but where u falls on a border


@pytest.mark.usefixtures("row_functions")
def test_labels_are_drawn_from_capped_logits(device):
    check_draw(4100, device, spread=20.0, logit_scale=0.5, softcap=4.0)


def check_likeliest(device):
    """Rows whose maximum is far up or shared: by all columns; by columns of one lane, of several; by some and then exceeded."""
    block = STATISTICS_CONFIG["BLOCK"]
    n_vocab = 2 * block + 77
    rising = torch.linspace(-60, 60, n_vocab)
    logits = torch.stack([rising, rising.flip(0), torch.zeros(n_vocab), *(torch.randn(n_vocab).clamp(max=2.0),) * 4]).to(device)
    logits[3, [8, 9, block + 8, 2 * block + 8]] = 5.0
    logits[4, [8, 13, block + 100, 2 * block + 70]] = 5.0
    logits[5, [8, 9, block + 7, block + 8, 2 * block + 9]] = torch.tensor([5.0, 5.0, 3.0, 6.0, 6.0], device=device)
    # 1 - p of 8e-6. 6e-6 of it are 51.4 times 2^-23 and in the lane of the maximum, whose total of 1 + 51 2^-23 is too small.
    logits[6, [8, 9, 16]] = torch.tensor([30.0, 17.9972, 17.0], device=device)
    memorised = [torch.zeros(n_vocab) for _ in range(3)]
    for row, (column, value) in zip(memorised, [(0, 20.0), (1, 25.0), (2 * block + 1, 30.0)]):
        row[column] = value
    logits = torch.cat([logits, torch.stack(memorised).to(device)])
    statistics = torch.zeros(4, len(logits), device=device)
    op = draw.keywords["likeliest"] if isinstance(draw, functools.partial) else likeliest_statistics
    op(logits, torch.zeros(len(logits), dtype=torch.int64, device=device), statistics)
    highest, first = logits.double().max(1)
    exp = (logits.double() - highest[:, None]).exp()
    rest = exp.scatter(1, first[:, None], 0.0).sum(1)
    for name, got, want in [("total", statistics[2], 1 + rest), ("1 - p", statistics[3], rest / (1 + rest))]:
        assert ((got.double() - want).abs() <= tol.ONE_MINUS_P * want).all(), f"{name}: {got}, not {want}"
    assert torch.equal(statistics[1], logits.amax(1))


def test_statistics_of_the_likeliest_label(device):
    check_likeliest(device)


def check_sums_in_another_order(device):
    """Rows in which the sum of a block, its scan and the total of the row disagree by their roundings alone.

    Terms of 0.9 2^-24 are lost when they are added to 1 one by one, but not when they are added among themselves before.
    """
    block = DRAW_CONFIG["BLOCK"]
    tiny = math.log(0.9 * 2.0**-24)
    logits = torch.full((3, 9 * block), -torch.inf, device=device)
    logits[:, 0] = 0.0
    # One in every 128 columns: a sum adds them in a tree, a scan passes them on from warp to warp, and stays at 1 = target.
    # Nothing can be drawn at the start of the next block, which the sum enters above the target.
    logits[:2, 128:block:128] = tiny
    logits[1, block + 1000] = tiny
    # One in every block: the kernel's sum stays at 1, the row's total, which is summed without the 1, lies above the target.
    logits[2, block::block] = tiny
    last = torch.tensor([block - 128, block + 1000, 8 * block], device=device)
    p = logits.double().softmax(1)
    uniforms = (1 / logits.double().exp().sum(1)).float()  # times the total, this is 1
    uniforms[2] = 1 - 2**-24
    coefficients = torch.tensor([1.0, -2.0, 3.0], device=device)
    drawn, statistics, gradient = draw(logits, torch.zeros_like(last), uniforms, coefficients)
    assert torch.equal(drawn, last), drawn  # what is left of the row, and can be drawn
    want = coefficients[:, None] * (torch.zeros_like(p).scatter(1, last[:, None], 1.0) - p)
    assert ((gradient - want).abs() <= tol.GRAD_OBJECTIVE * want.abs()).all()
    assert (statistics[0] - p.gather(1, last[:, None])[:, 0].log()).abs().max() <= tol.LOGP_ABS


def test_sums_in_another_order_draw_possible_labels_only(device):
    check_sums_in_another_order(device)


@pytest.mark.usefixtures("row_functions")
def test_confident_rows_draw_their_label_and_keep_one_minus_p(device):
    """Drawn from memorised text the label is nearly always the likeliest, and its 1 - p must not be lost."""
    logits, labels = peaked(6, 5000, 1e-8, device)
    uniforms = torch.rand(6, device=device)
    drawn, statistics, gradient = draw(logits, torch.zeros_like(labels), uniforms, torch.ones(6, device=device))
    assert torch.equal(drawn, labels)
    logp, want = oracle(logits, labels, torch.ones(6, device=device))
    assert ((statistics[0].double() - logp) / logp).abs().max() <= tol.ONE_MINUS_P
    assert_rows_close(gradient, want, tol.WORST_ROW_FP32, "dlogits")


def test_the_gradient_of_a_draw_in_the_bytes_of_the_logits(device):
    n_vocab = 7 * DRAW_CONFIG["BLOCK"] + 500
    logits = torch.randn(4, n_vocab, device=device)
    labels = torch.tensor([0, 0, 0, -100], device=device)
    ones = torch.ones(4, device=device)
    uniforms = torch.tensor([0.3, 1 - 2**-24, 0.9, 0.5], device=device)
    padded, _ = overlaid(logits, torch.bfloat16)
    want = draw(padded, labels, uniforms, ones, out=torch.empty_like(logits, dtype=torch.bfloat16))
    copy, out = overlaid(logits, torch.bfloat16)
    for got, expected in zip(draw(copy, labels, uniforms, ones, out=out), want):
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("row_functions")
def test_draw_in_place_in_low_precision_and_of_nan(device):
    logits = torch.randn(3, 4200, device=device)
    logits[2, 9] = float("nan")
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    ones = torch.ones(3, device=device)
    uniforms = torch.tensor([0.3, 1 - 2**-24, 0.5], device=device)
    drawn, statistics, want = draw(logits, labels, uniforms, ones)
    assert statistics[0].isnan().tolist() == [False, False, True] and drawn[2] == -100
    low = torch.empty(3, 4200, device=device, dtype=torch.bfloat16)
    assert torch.equal(draw(logits, labels, uniforms, ones, out=low)[2][:2], want[:2].bfloat16())
    copy = logits.clone()
    assert torch.equal(draw(copy, labels, uniforms, ones, out=copy)[2][:2], want[:2])


def chi_square_of_draws(device, **ops):
    """One-sample chi-square of draws over 64 labels, some rare and two impossible, and the mean of onehot - p."""
    n = 100_000 if device.type == "cuda" else 800  # a row takes the interpreter milliseconds
    row = torch.randn(64, device=device) * 1.5
    row[[3, 40]] = -torch.inf
    logits = row.expand(n, 64).contiguous()
    drawn, _, gradient = draw(
        logits, torch.zeros(n, dtype=torch.int64, device=device), torch.rand(n, device=device), torch.ones(n, device=device),
        **ops,
    )  # fmt: skip
    counts = torch.bincount(drawn, minlength=64).double()
    expected = n * row.double().softmax(0)
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    # The mean of a score function is 0: each column within 5 of its standard deviations.
    p = row.double().softmax(0)
    assert (gradient.double().mean(0).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()
    return statistic, int(possible.sum()) - 1


@pytest.mark.usefixtures("row_functions")
def test_draws_follow_the_distribution(device, monkeypatch):
    monkeypatch.setattr("soul_kernels.token_draw.STATISTICS_CONFIG", {"BLOCK": 32, "num_warps": 1})  # two blocks a row
    monkeypatch.setattr("soul_kernels.token_draw.DRAW_CONFIG", {"BLOCK": 32, "num_warps": 1})
    statistic, freedom = chi_square_of_draws(device)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # p > 1e-4


@pytest.mark.parametrize("old, new", [
    ("draw.running + tl.cumsum(exp, 0) > ", "tl.cumsum(exp, 0) > "),  # each block from 0
    ("if chosen < 0:  # after", "if chosen < row.n_vocab:  # after"),  # the last crossing wins
    ("(exp > 0.0)\n", "(exp >= 0.0)\n"),
    ("coefficient * rest, gradient)", "coefficient, gradient)"),
    ("tl.where(lanes.row_max == row_max, lanes.rest, lanes.total)", "lanes.rest"),
    ("tl.exp(lanes.row_max - row_max) * lanes.total", "lanes.total"),  # lanes with different maxima added up as they are
    ("tl.where(is_max, lanes.rest, tl.exp(lanes.row_max - row_max) * lanes.total)",
     "tl.exp(lanes.row_max - row_max) * lanes.rest"),  # what equals the maximum of a lane that is not the row's
    ("tl.floor(lanes.total - lanes.rest + 0.5)", "(lanes.total - lanes.rest)"),  # 1 - p is lost
    ("uniforms_ptr + row.index) * total", "uniforms_ptr + row.index)"),
    ("tl.store(out_row + draw.last, ", "tl.store(out_row + draw.last - draw.last, "),
])  # fmt: skip
def test_mutants_do_not_pass(old, new, device, tmp_path, monkeypatch):
    broken = mutant("soul_kernels.token_draw", old, new, tmp_path)
    monkeypatch.setitem(
        globals(), "draw", functools.partial(draw, likeliest=broken.likeliest_statistics, op=broken.draw_labels)
    )
    with pytest.raises(AssertionError):
        check_sums_in_another_order(device)
        for n_vocab in (129, 4097, 12289):
            drawn, want = check_draw(n_vocab, device)
            assert (drawn == want)[drawn >= 0].float().mean() > 0.9
        test_confident_rows_draw_their_label_and_keep_one_minus_p(device)
        check_likeliest(device)
