import functools

import pytest
import torch

from soul_kernels._head import rows as head_rows
from soul_kernels.backends import runs_on_cpu
from soul_kernels.chunks import row_width
from soul_kernels.reference import token_logprob as reference
from soul_kernels.reference.token_logprob import token_logprob
from soul_kernels.token_logprob import STATISTICS_CONFIG, statistics_and_gradient, token_gradient, token_statistics
from tests.support import tolerances as tol
from tests.support.helpers import assert_rows_close, mutant

# 1: nothing beside the label. 127 to 129: around a warp's worth. 4096, 4097: one block, and one element more.
# 32003, 50257: odd vocabularies of real models.
VOCABULARIES = (1, 2, 17, 127, 128, 129, 4096, 4097, 32003, 50257)
BLOCK = STATISTICS_CONFIG["BLOCK"]
SEVERAL_BLOCKS = 3 * BLOCK + 77  # three whole blocks, one of which may hold the label, and a tail
LABELS = (5, BLOCK + 5, 3 * BLOCK - 1, 3 * BLOCK + 5)  # in the first whole block, the second, the last, and the tail


@pytest.fixture
def row_functions(backend, monkeypatch):
    """Run a test with the kernels, and with the PyTorch functions that replace them."""
    functions = head_rows.row_functions(backend)
    for name in ("token_statistics", "token_gradient", "statistics_and_gradient"):
        monkeypatch.setitem(globals(), name, getattr(functions, name))


def run(logits, labels, coefficients, out=None, statistics_op=None, gradient_op=None):
    statistics = torch.full((4, len(labels)), float("nan"), device=logits.device)
    (statistics_op or token_statistics)(logits, labels, statistics)
    out = torch.full_like(logits, float("nan")) if out is None else out
    (gradient_op or token_gradient)(logits, labels, statistics, coefficients, out)
    return statistics, out


def oracle(logits, labels, coefficients):
    leaf = logits.double().requires_grad_()
    logp = token_logprob(leaf, labels)
    (gradient,) = torch.autograd.grad(logp, leaf, coefficients.double())
    return logp.detach(), gradient


def peaked(n, n_vocab, rest, device):
    """Rows whose label has probability 1 - rest, with the rest spread unevenly over the other entries."""
    labels = torch.randint(n_vocab, (n,), device=device)
    logits = torch.randn(n, n_vocab, device=device)
    others = logits.double().scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    at_label = others + torch.log1p(torch.tensor(-rest, dtype=torch.float64)) - torch.log(torch.tensor(rest).double())
    return logits.scatter(1, labels[:, None], at_label.float()[:, None]), labels


@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("n_vocab", VOCABULARIES)
def test_every_vocabulary_size(n_vocab, device):
    logits = torch.randn(5, n_vocab, device=device) * 4
    labels = torch.tensor([0, n_vocab - 1, n_vocab // 2, 0, n_vocab - 1], device=device)
    coefficients = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], device=device)
    statistics, gradient = run(logits, labels, coefficients)
    logp, want = oracle(logits, labels, coefficients)
    assert (statistics[0].double() - logp).abs().max() <= tol.LOGP_ABS
    assert_rows_close(gradient, want, tol.WORST_ROW_FP32, "dlogits")
    assert gradient.double().sum(1).abs().max() <= 1e-5  # a softmax gradient sums to 0


# From uniform predictions to memorised text, where unlearning starts.
@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("rest", [1 - 1e-4, 0.5, 1e-2, 1e-4, 1e-7, 1e-10])
def test_one_minus_p_stays_accurate_on_memorised_tokens(rest, device):
    logits, labels = peaked(6, 5000, rest, device)
    statistics, gradient = run(logits, labels, torch.ones(6, device=device))
    logp, want = oracle(logits, labels, torch.ones(6, device=device))
    exact = -torch.expm1(logp)
    assert ((statistics[3].double() - exact) / exact).abs().max() <= tol.ONE_MINUS_P
    assert ((statistics[0].double() - logp) / logp).abs().max() <= tol.ONE_MINUS_P
    assert_rows_close(gradient, want, tol.WORST_ROW_FP32, "dlogits")
    naive = 1 - logits.softmax(1).gather(1, labels[:, None])[:, 0].double()
    if rest <= 1e-7:  # what the field computes is lost here: the test can tell the difference
        assert ((naive - exact) / exact).abs().max() > 100 * tol.ONE_MINUS_P


@pytest.mark.usefixtures("row_functions")
def test_extreme_logits(device):
    logits = torch.full((4, 300), -80.0, device=device)
    logits[0, 5], logits[1, 7], logits[2, :] = 80.0, 80.0, 80.0
    logits[3, 100:] = -torch.inf  # vocabulary entries that are masked out
    labels = torch.tensor([5, 8, 0, 1], device=device)
    statistics, gradient = run(logits, labels, torch.ones(4, device=device))
    want = logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    assert (statistics[0].double() - want).abs().max() <= 1e-4  # |log p| is up to 160 here
    assert torch.isfinite(gradient).all()


@pytest.mark.usefixtures("row_functions")
def test_ignored_rows_are_zero_and_foreign_labels_are_nan(device):
    logits = torch.randn(4, 200, device=device)
    logits[0] = float("nan")  # hidden states of padding may be anything
    labels = torch.tensor([-100, 7, 200, -1], device=device)
    statistics, gradient = run(logits, labels, torch.ones(4, device=device))
    assert statistics[0, 0] == 0 and statistics[0, 2:].isnan().all()
    assert (gradient[[0, 2, 3]] == 0).all() and (gradient[1] != 0).all()


@pytest.mark.usefixtures("row_functions")
def test_nan_logits_surface(device):
    logits = torch.randn(2, 200, device=device)
    logits[1, 150] = float("nan")
    statistics, _ = run(logits, torch.tensor([3, 3], device=device), torch.ones(2, device=device))
    assert statistics[0].isnan().tolist() == [False, True]


@pytest.mark.usefixtures("row_functions")
def test_nan_logits_surface_from_every_block(device):
    """The NaN lies in the label's block, before and behind it, or is the label's logit."""
    labels = torch.tensor(LABELS, device=device).repeat(len(LABELS))
    columns = torch.tensor(LABELS, device=device).repeat_interleave(len(LABELS))
    logits = torch.randn(len(labels), SEVERAL_BLOCKS, device=device).scatter_(1, columns[:, None], float("nan"))
    statistics = torch.empty(7, len(labels), device=device)
    token_statistics(logits, labels, statistics)
    assert statistics[[0, 3, 5]].isnan().all()


@pytest.mark.usefixtures("row_functions")
def test_infinite_logits(device):
    """A label that is masked out has p = 0. An infinite logit has no distribution, and no finite log-probability of another."""
    labels = torch.tensor(LABELS, device=device)
    logits = torch.randn(4, SEVERAL_BLOCKS, device=device)
    statistics, _ = run(logits.scatter(1, labels[:, None], -torch.inf), labels, torch.ones(4, device=device))
    assert (statistics[0] == -torch.inf).all() and ((statistics[3] - 1).abs() <= tol.ONE_MINUS_P).all()
    for column in (7, BLOCK + 7, SEVERAL_BLOCKS - 1):
        logits[:, column] = torch.inf
        statistics, _ = run(logits, labels, torch.ones(4, device=device))
        assert not statistics[0].isfinite().any()
        logits[:, column] = 0.0


@pytest.mark.usefixtures("row_functions")
def test_in_place_and_low_precision_outputs(device):
    logits = torch.randn(3, 4200, device=device)
    labels = torch.tensor([1, 4199, 77], device=device)
    coefficients = torch.randn(3, device=device)
    _, want = run(logits, labels, coefficients)
    buffer = torch.full((3, 4224), float("nan"), device=device, dtype=torch.bfloat16)  # padded rows
    _, rounded = run(logits, labels, coefficients, out=buffer[:, :4200])
    assert torch.equal(rounded, want.bfloat16()) and buffer[:, 4200:].isnan().all()
    copy = logits.clone()
    _, in_place = run(copy, labels, coefficients, out=copy)
    assert torch.equal(in_place, want)


def overlaid(logits, dtype):
    """Return a copy of logits in padded rows, and memory for a gradient in the bytes of each row."""
    shape = (len(logits), row_width(logits.shape[1]))
    memory = torch.full(shape, float("nan"), dtype=logits.dtype, device=logits.device)
    memory[:, : logits.shape[1]] = logits
    return memory[:, : logits.shape[1]], memory.view(dtype)[:, : logits.shape[1]]


# One block; whole blocks; and past each block at which threads wait for each other: 0, 2, 6 and their tails.
@pytest.mark.parametrize("n_vocab", [130, 2 * 4096, 3 * 4096 + 9, 7 * 4096 + 1001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_gradient_in_the_bytes_of_the_logits(n_vocab, dtype, device):
    logits = torch.randn(3, n_vocab, device=device)
    labels = torch.tensor([1, n_vocab - 1, -100], device=device)
    coefficients = torch.randn(3, device=device)
    padded, _ = overlaid(logits, dtype)
    _, want = run(padded, labels, coefficients, out=torch.empty_like(logits, dtype=dtype))
    copy, out = overlaid(logits, dtype)
    _, got = run(copy, labels, coefficients, out=out)
    assert torch.equal(got, want)


# The dtypes of the ops: fp32; bf16 with fp32 logits, which the gradient overwrites with half the bytes; bf16 throughout.
LAYOUTS = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


def check_one_kernel(device, n_vocab, dtype, out_dtype, op=None, **transform):
    """Statistics and gradient, in the place of the logits, have the bits of two kernels that write somewhere else."""
    logits, _ = overlaid((torch.randn(6, n_vocab, device=device) * 4).to(dtype), out_dtype)
    logits[4] = float("nan")
    labels = torch.tensor([0, n_vocab - 1, n_vocab // 2, n_vocab, 0, -100], device=device)
    coefficients = torch.tensor([1.0, -2.0, 0.5, 1.0, 1.0, 3.0], device=device)
    want = torch.full((4, 6), float("nan"), device=device)
    token_statistics(logits, labels, want, **transform)
    want_gradient = torch.full((6, n_vocab), float("nan"), dtype=out_dtype, device=device)
    token_gradient(logits, labels, want, coefficients, want_gradient, **transform)
    got = torch.full_like(want, float("nan"))
    copy, out = overlaid(logits, out_dtype)
    (op or statistics_and_gradient)(copy, labels, got, coefficients, out, **transform)
    for a, b in ((got, want), (out, want_gradient)):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
    assert got[0].isnan().tolist() == [False] * 3 + [True] * 2 + [False] and (out[[3, 5]] == 0).all()


@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("n_vocab", [2, 129, 4096, 7 * 4096 + 1001])
@pytest.mark.parametrize("backend, dtypes", [
    *(("triton", dtypes) for dtypes in LAYOUTS), ("torch", LAYOUTS[0]),  # without kernels both dtypes are the same
], indirect=["backend"], ids=str)  # fmt: skip
def test_one_kernel_has_the_bits_of_two(dtypes, n_vocab, device):
    check_one_kernel(device, n_vocab, *dtypes)


def test_one_kernel_has_the_bits_of_two_for_capped_logits(device):
    check_one_kernel(device, 3 * 4096 + 5, *LAYOUTS[1], logit_scale=-2.0, softcap=5.0)


@pytest.mark.parametrize("old, new", [
    ("scale=coefficient / values.total", "scale=1.0 / values.total"),
    ("at_label=coefficient * values.one_minus_p", "at_label=values.one_minus_p"),
    ("row_max=values.row_max, scale", "row_max=0.0, scale"),
    ("_store_statistics(statistics_ptr, statistics_stride, row, values, False)", "pass"),
    ("values = _row_statistics(row, transform, False, BLOCK)",
     "values = _row_statistics(row, Transform(logit_scale=None, softcap=None), False, BLOCK)"),
])  # fmt: skip
def test_mutants_of_the_one_kernel_do_not_pass(old, new, device, tmp_path):
    broken = mutant("soul_kernels.token_logprob", old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_one_kernel(device, 4097, *LAYOUTS[1], op=broken.statistics_and_gradient, logit_scale=-2.0, softcap=5.0)


@pytest.mark.skipif(not runs_on_cpu(), reason="4 GiB a matrix: untouched memory costs nothing on the CPU only")
def test_rows_beyond_two_to_the_31(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # with NaN: it would be touched
    rows = 3
    stride = 2**30 + 64  # row 2 starts beyond 2^31 elements
    logits = torch.empty(2 * stride + 64, dtype=torch.float16).as_strided((rows, 50), (stride, 1))
    logits.copy_(torch.randn(rows, 50))
    labels = torch.tensor([1, 2, 3])
    statistics, _ = run(logits, labels, torch.ones(rows), out=torch.empty(rows, 50))
    want = logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    assert (statistics[0].double() - want).abs().max() <= tol.LOGP_ABS


# Capped as Gemma 2 does, scaled as Cohere and Granite do, both; a cap far below the logits, where tanh saturates.
@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("logit_scale, softcap", [(1.0, 30.0), (0.0625, None), (-2.0, 5.0), (1.0, 0.5)])
def test_capped_and_scaled_logits(logit_scale, softcap, device):
    raw = torch.randn(4, 4100, device=device) * 20  # a tail of 4 columns: what lies beyond must not be capped into the sum
    labels = torch.tensor([0, 4099, 7, -100], device=device)
    transform = dict(logit_scale=logit_scale, softcap=softcap)
    statistics = torch.empty(7, 4, device=device)
    out = torch.full_like(raw, float("nan"))
    token_statistics(raw, labels, statistics, **transform)
    token_gradient(raw, labels, statistics, torch.ones(4, device=device), out, **transform)
    leaf = raw.double().requires_grad_()
    logits = reference.transformed(leaf, **transform)
    logp = token_logprob(logits[:3], labels[:3])
    (want,) = torch.autograd.grad(logp.sum(), leaf)
    assert (statistics[0, :3].double() - logp).abs().max() <= 2 * tol.LOGP_ABS
    assert_rows_close(out, want, 2 * tol.WORST_ROW_FP32, "dlogits")
    check_all_statistics(statistics[:, :3], logits[:3], labels[:3], but="hits")  # where tanh saturates, logits tie in fp32


def check_all_statistics(statistics, logits, labels, but=None):
    want = reference.token_statistics(logits, labels)
    got = (statistics[0], statistics[1] + statistics[2].log(), *statistics[4:])
    for name, a, b in zip(want._fields, got, want):
        assert name == but or ((a.double() - b).abs() <= 1e-4 * (0.2 + b.abs())).all(), (
            f"{name}: {(a.double() - b).abs().max():.1e}"
        )


@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("n_vocab", [1, 2, 129, 4097, 50257])  # one entry, a warp and one, a block and one, a real odd one
def test_all_statistics(n_vocab, device):
    """Flat to peaked rows, masked entries, labels anywhere, likely and not."""
    logits = torch.randn(8, n_vocab, device=device) * torch.tensor([0.0, 0.1, 1, 3, 8, 3, 3, 30], device=device)[:, None]
    logits[5:7, n_vocab // 2 + 1 :] = -torch.inf
    labels = torch.randint(n_vocab // 2 + 1, (8,), device=device)
    labels[2:7:2] = logits[2:7:2].argmax(1)
    statistics = torch.empty(7, 8, device=device)
    token_statistics(logits, labels, statistics)
    check_all_statistics(statistics, logits.double(), labels)
    basic = torch.empty(4, 8, device=device)
    token_statistics(logits, labels, basic)
    assert torch.equal(basic, statistics[:4])  # asking for more changes nothing


@pytest.mark.usefixtures("row_functions")
def test_all_statistics_of_several_blocks(device):
    """Each lane of the kernel has a maximum of its own. It rises in every block, in none, or stays where all else is masked."""
    rising = torch.linspace(-60, 60, SEVERAL_BLOCKS)
    one_lane = torch.full_like(rising, -torch.inf)
    one_lane[5::BLOCK] = torch.tensor([1.0, 3.0, 2.0, -20.0])
    logits = torch.stack([rising, rising.flip(0), one_lane, torch.randn(SEVERAL_BLOCKS) * 8]).to(device)
    for label in LABELS:
        labels = torch.full((4,), label, device=device)
        logits[2] = one_lane
        logits[2, label] = 2.5
        statistics = torch.empty(7, 4, device=device)
        token_statistics(logits, labels, statistics)
        check_all_statistics(statistics, logits.double(), labels)
        exact = -torch.expm1(token_logprob(logits.double(), labels))
        assert ((statistics[3].double() - exact).abs() <= tol.ONE_MINUS_P * exact).all()


@pytest.mark.usefixtures("row_functions")
def test_the_first_of_equal_logits_is_the_likeliest(device):
    others = torch.tensor([4, 6, BLOCK - 1, BLOCK + 4, BLOCK + 6, SEVERAL_BLOCKS - 1], device=device)
    for label in LABELS:
        logits = torch.randn(len(others), SEVERAL_BLOCKS, device=device).clamp(max=4.0)
        logits[:, label] = 5.0
        logits.scatter_(1, others[:, None], 5.0)
        statistics = torch.empty(7, len(others), device=device)
        token_statistics(logits, torch.full_like(others, label), statistics)
        assert torch.equal(statistics[4] == 1, others > label)


@pytest.mark.usefixtures("row_functions")
def test_statistics_of_memorised_tokens_and_ties(device):
    logits, labels = peaked(4, 5000, 1e-7, device)
    logits[2:] = 0.0
    logits[2, [10, 4500]], logits[3, [10, 4500]] = 5.0, 5.0  # the argmax is the first of equals, as in torch
    labels[2:] = torch.tensor([10, 4500], device=device)
    statistics = torch.empty(7, 4, device=device)
    token_statistics(logits, labels, statistics)
    want = reference.token_statistics(logits.double(), labels)
    assert statistics[4].tolist() == want.hits.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert ((statistics[5].double() - want.entropies) / want.entropies).abs().max() <= tol.ONE_MINUS_P
    assert ((statistics[6].double() - want.variances) / want.variances).abs().max() <= tol.ONE_MINUS_P


def check_values(device, n_vocab, weighted, statistics_op=None, gradient_op=None, **transform):
    """Log-probability, logsumexp and mean logit of rows, and the gradient of any combination of them, against fp64."""
    raw = torch.randn(5, n_vocab, device=device) * 4
    labels = torch.tensor([0, n_vocab - 1, n_vocab // 2, -100, n_vocab], device=device)  # the last two have no valid label
    raw[range(2), labels[:2]] = 18.0  # two likely labels
    class_weights = torch.rand(n_vocab, device=device) * 2 if weighted else None
    sizes = {"coefficients": 1, "lse_coefficients": 1, "mean_coefficients": n_vocab}
    coefficients = {name: torch.randn(5, device=device) * size for name, size in sizes.items()}
    statistics, means = torch.full((4, 5), float("nan"), device=device), torch.full((5,), float("nan"), device=device)
    (statistics_op or token_statistics)(raw, labels, statistics, means=means, class_weights=class_weights, **transform)
    plain = torch.full_like(statistics, float("nan"))
    token_statistics(raw, labels, plain, **transform)
    torch.testing.assert_close(statistics, plain, rtol=1e-6, atol=1e-6, equal_nan=True)  # other statistics stay as they are
    out = torch.full_like(raw, float("nan"))
    (gradient_op or token_gradient)(
        raw, labels, statistics, out=out, class_weights=class_weights, **coefficients, **transform
    )  # fmt: skip
    leaf = raw[:3].double().requires_grad_()
    logits = reference.transformed(leaf, **transform)
    want_means = reference.mean_logit(logits, None if class_weights is None else class_weights.double())
    assert (means[:3].double() - want_means).abs().max() <= tol.LOGP_ABS and (means[3:] == 0).all()
    values = token_logprob(logits, labels[:3]), logits.logsumexp(1), want_means
    (want,) = torch.autograd.grad(values, leaf, [c[:3].double() for c in coefficients.values()])
    assert_rows_close(out[:3], want, tol.WORST_ROW_FP32, "dlogits")
    assert (out[3:] == 0).all()


@pytest.mark.usefixtures("row_functions")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n_vocab", [1, 2, 129, 4096, SEVERAL_BLOCKS])  # one entry; a tail alone; whole blocks; both
def test_logsumexp_and_mean_logit(n_vocab, weighted, device):
    check_values(device, n_vocab, weighted)


@pytest.mark.usefixtures("row_functions")
def test_logsumexp_and_mean_logit_of_capped_logits(device):
    check_values(device, 4100, True, logit_scale=-2.0, softcap=5.0)


@pytest.mark.parametrize("old, new", [
    ("z = z * tl.load(class_weights_ptr + block.columns, mask=block.mask)", "z = z"),
    ("z = tl.where(block.mask, z, 0.0)", "z = tl.where(block.mask, z, 1.0)"),
    ("mean = tl.sum(lanes, 0) / row.n_vocab", "mean = tl.sum(lanes, 0) / row.tail"),
    ("ColumnBlock(start + columns, None), transform, class_weights_ptr)",
     "ColumnBlock(columns, None), transform, class_weights_ptr)"),  # the first block again and again
    ("addend.share * tl.load(addend.class_weights + block.columns, mask=block.mask)", "addend.share"),
    ("at_label += lse_coefficient * tl.exp(", "at_label += tl.exp("),
    ("coefficient -= lse_coefficient", "coefficient += lse_coefficient"),
    ("tl.load(mean_coefficients_ptr + row.index) / n_vocab", "tl.load(mean_coefficients_ptr + row.index)"),
])  # fmt: skip
def test_mutants_of_logsumexp_and_mean_logit_do_not_pass(old, new, device, tmp_path):
    broken = mutant("soul_kernels.token_logprob", old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_values(device, SEVERAL_BLOCKS, True, broken.token_statistics, broken.token_gradient)


@pytest.mark.parametrize("old, new", [
    ("tl.where(block.columns == row.label, -float(\"inf\"), z)", "z"),  # the label counted twice
    ("rest=rescale * sums.rest, ", "rest=sums.rest, "),
    # The sums of lanes with different maxima added up as they are.
    ("_relative_to(lanes, tl.max(lanes.row_max, 0), ALL)",
     "RowSums(tl.max(lanes.row_max, 0), lanes.rest, lanes.sum1, lanes.sum2)"),
    ("_relative_to(others, row_max, ALL)", "others"),  # the label's maximum left out
    ("tl.where(start < row.label_block, 0, BLOCK)", "0"),  # the label's block twice, and one of the others not at all
    ("if row.others < row.tail:", "if row.others > row.tail:"),  # the label's block not at all
    ("at_label, -tl.exp(z - factors.row_max)", "at_label, tl.exp(z - factors.row_max)"),
    ("at_label = coefficient * tl.load", "at_label = tl.load"),
    ("tl.load(statistic(statistics_ptr, statistics_stride, row, ONE_MINUS_P))",
     "(1.0 - tl.exp(tl.load(statistic(statistics_ptr, statistics_stride, row, LOGP))))"),  # softmax - 1
    ("log1p(sums.rest), tl.log(total)", "tl.log(1.0 + sums.rest), tl.log(total)"),
    ("columns == row.label", "columns == row.label + 1"),
    ("scale=coefficient / total", "scale=1.0 / total"),
])  # fmt: skip
def test_mutants_do_not_pass(old, new, device, tmp_path, monkeypatch):
    broken = mutant("soul_kernels.token_logprob", old, new, tmp_path)
    ops = dict(statistics_op=broken.token_statistics, gradient_op=broken.token_gradient)
    monkeypatch.setitem(globals(), "run", functools.partial(run, **ops))
    with pytest.raises(AssertionError):
        for n_vocab in (4097, SEVERAL_BLOCKS):
            test_every_vocabulary_size(n_vocab, device)
        for rest in (0.5, 1e-10):
            test_one_minus_p_stays_accurate_on_memorised_tokens(rest, device)


@pytest.mark.parametrize("old, new", [
    ("shift * (2.0 * sum1 + shift * sums.rest)", "shift * (sum1 + shift * sums.rest)"),
    ("sum1 + shift * sums.rest)", "sum1)"),
    ("BLOCK) < at_label", "BLOCK) <= at_label"),
    ("if others.row_max == at_label:", "if others.row_max > at_label:"),
    ("columns < row.label)", "columns <= row.label)"),
    ("- exp_label * label_gap) / total", ") / total"),
    ("- mean * mean", ""),
    ("gap = tl.maximum(gap, -200.0)", "gap = 1.0 * gap"),
    # Sums of lanes with different maxima, moved to the highest of them without their first moments.
    ("sum2 = rescale * (sum2 + ", "sum2 = rescale * (sum2 + 0.0 * "),
])  # fmt: skip
def test_mutants_of_the_other_statistics_do_not_pass(old, new, device, tmp_path, monkeypatch):
    broken = mutant("soul_kernels.token_logprob", old, new, tmp_path)
    monkeypatch.setitem(globals(), "token_statistics", broken.token_statistics)
    with pytest.raises(AssertionError):
        for n_vocab in (2, 50257):  # where the label weighs much, and where it weighs little
            test_all_statistics(n_vocab, device)
        test_the_first_of_equal_logits_is_the_likeliest(device)
        test_statistics_of_memorised_tokens_and_ties(device)
