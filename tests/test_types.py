"""The type checker that `make lint` runs finds a wrong argument in a call of the public API."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PLANTED = """\
import torch

import soul
import soul_kernels

model, labels = torch.nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.int64)
hidden, weight = torch.zeros(1, 2, 2), torch.zeros(3, 2)
soul.SOUL(model.parameters(), lr="1e-5")
soul.SOUL(model.parameters(), max_grad_nrm=1.0)
soul.UnlearnConfig(epochs="5")
soul.losses.NPO(beta="0.1")
soul_kernels.linear_logprob(hidden, [weight], labels)
soul_kernels.sophia_step(model, [weight], [weight], [weight], lr=0.1, beta1=0.9, rho=0.04, bs=1)
soul_kernels.sophia_step([weight], [weight], [weight], [weight], lr=0.1, beta1=0.9, rho=0.04, bs=1, seed="0")
soul.SOUL(model.parameters(), lr=1e-5)
soul_kernels.linear_logprob(hidden, soul_kernels.Head(weight), labels)
"""


@pytest.mark.slow(reason="mypy reads torch and both packages")
def test_a_wrong_argument_of_a_public_function_is_found(tmp_path):
    pytest.importorskip("mypy")
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(script)]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = re.findall(r"planted\.py:(\d+): error:", checked.stdout)
    planted = PLANTED.splitlines().index('soul.SOUL(model.parameters(), lr="1e-5")') + 1
    assert {int(line) for line in errors} == set(range(planted, planted + 7)), checked.stdout
