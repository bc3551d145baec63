"""``soul info``: what to put into a bug report."""

from soul import __version__
from soul._extras import MissingExtra, require
from soul.output.console import print_result

HELP = "versions, devices and backends: what to put into a bug report"


def add_arguments(parser):
    """Declares the options: none."""


def run(args):
    """Runs the command."""
    import platform
    import shutil

    import torch

    from soul_kernels.backends import PAYS, cpp_compiler, interpreting, resolve_backend, resolve_head_backend, triton_version

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    device = "cuda" if gpus else "cpu"
    tensor = torch.empty(0, device=device)
    step, loss = resolve_backend("auto", tensor), resolve_head_backend("auto", tensor)
    lines = [
        f"soul-kernels {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__}, triton {triton_version() or 'not installed'}",
        f"GPUs: {', '.join(gpus) or 'none'}",
        f"backend on {device}: {loss} for losses, {step} for steps{' (interpreted)' if interpreting() else ''}",
    ]
    if device == "cpu" and not interpreting():
        found = shutil.which(cpp_compiler())
        lines.append(
            f"steps from {PAYS} parameters on: {f'compile, by {found}' if found else f'reference, without {cpp_compiler()}'}"
        )
    for extra, modules in {
        "hf": ("transformers", "tokenizers", "safetensors", "peft", "datasets", "pyarrow", "yaml"),
        "eval": ("rouge_score", "scipy", "sklearn"),
        "plots": ("matplotlib",),
    }.items():
        for module in modules:
            try:
                lines.append(f"{module} {getattr(require(module, extra), '__version__', 'installed')}")
            except MissingExtra as error:
                lines.append(str(error))
    print_result(*lines)
