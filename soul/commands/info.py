"""``soul info``: versions, devices and backends, for a bug report."""

import argparse

from soul import __version__
from soul.output.console import print_result

HELP = "versions, devices and backends, for a bug report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options. There are none."""


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import importlib.metadata
    import platform
    import shutil

    import torch

    from soul_kernels.backends import PAYS, cpp_compiler, interpreting, resolve_backend, resolve_head_backend, triton_version

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    device = "cuda" if gpus else "cpu"
    tensor = torch.empty(0, device=device)
    step_backend = resolve_backend("auto", tensor)
    loss_backend = resolve_head_backend("auto", tensor)
    lines = [
        f"soul-kernels {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__}, triton {triton_version() or 'not installed'}",
        f"GPUs: {', '.join(gpus) or 'none'}",
        f"backend on {device}: {loss_backend} for losses, {step_backend} for steps{' (interpreted)' if interpreting() else ''}",
    ]
    if device == "cpu" and not interpreting():
        compiler = shutil.which(cpp_compiler())
        backend = f"compile, by {compiler}" if compiler else f"reference, without {cpp_compiler()}"
        lines.append(f"steps from {PAYS} parameters on: {backend}")
    for extra, packages in {
        "hf": ("transformers", "tokenizers", "safetensors", "huggingface-hub", "peft", "datasets", "pyarrow", "PyYAML"),
        "eval": ("rouge-score", "scipy", "scikit-learn"),
        "plots": ("matplotlib",),
        "quant": ("bitsandbytes", "accelerate"),
        "durability": ("torchao",),
    }.items():
        for package in packages:
            try:
                lines.append(f"{package} {importlib.metadata.version(package)}")
            except importlib.metadata.PackageNotFoundError:
                lines.append(f"{package} is not installed; run: pip install 'soul-kernels[{extra}]'")
    print_result(*lines)
