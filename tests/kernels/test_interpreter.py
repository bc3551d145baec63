"""Each kernel once more in Triton's interpreter, where the other tests execute what the compiler made of it."""

import os
import pathlib
import subprocess
import sys

import pytest

from soul_kernels.backends import has_triton, interpreting

CROSS_CHECKS = [
    "tests/kernels/test_sophia_step.py::test_every_storage_equals_the_reference_bit_for_bit",
    "tests/kernels/test_hessian_ema.py::test_kernel_equals_reference_bit_for_bit",
    "tests/kernels/test_grad_norm.py::test_against_fp64",
    "tests/kernels/test_rounding.py::test_kernel_rounds_every_bit_pattern_as_the_reference_does",
    "tests/kernels/test_rounding.py::test_8_bit_kernel_equals_reference",
    "tests/kernels/test_token_logprob.py::test_every_vocabulary_size[triton-4097]",
    "tests/kernels/test_token_logprob.py::test_all_statistics[triton-4097]",
    "tests/kernels/test_token_draw.py::test_labels_are_drawn_by_inverse_cdf[triton-4097]",
    "tests/kernels/test_kl_divergence.py::test_every_vocabulary_size[triton-kl-2049]",
    "tests/kernels/test_kl_divergence.py::test_every_vocabulary_size[triton-soul_kl-2049]",
    "tests/kernels/test_linear_loss.py::test_objectives_against_fp64[triton-dtype0-False]",
    "tests/kernels/test_linear_gnb.py::test_capped_and_scaled_logits[triton]",
    "tests/kernels/test_linear_kl.py::test_capped_and_scaled_logits[triton]",
]


@pytest.mark.slow(reason="the interpreter takes 20 s for what compiled kernels do in 1 s")
@pytest.mark.skipif(interpreting() or not has_triton(), reason="the other tests run in the interpreter, or nowhere")
def test_each_kernel_in_tritons_interpreter():
    """In a process of its own: Triton decides when a kernel is defined."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CROSS_CHECKS]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ended = subprocess.run(command, cwd=pathlib.Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]


@pytest.mark.slow(reason="processes that import torch and Triton")
@pytest.mark.skipif(not has_triton(), reason="Triton's own switch")
@pytest.mark.parametrize("value, expected", [("true", True), ("", False)])
def test_the_switch_is_read_as_triton_reads_it(value, expected):
    """Where Triton interprets and the library does not know it, bf16 would be truncated."""
    command = [sys.executable, "-c", "from soul_kernels.backends import interpreting; print(interpreting())"]
    ended = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": value}, capture_output=True, text=True, check=True)
    assert ended.stdout == f"{expected}\n"
