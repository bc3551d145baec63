"""Packaging. Nothing is probed, compiled or downloaded here: Triton compiles the kernels when they first run."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "soul_kernels" / "__init__.py").read_text()).group(1)

# The oldest versions with which all tests were seen to pass, together; CONTRIBUTING.md says what fails below them.
HF = [
    "transformers>=4.57",
    "tokenizers>=0.22",
    "huggingface-hub>=0.34",
    "safetensors>=0.4.3",
    "peft>=0.20",  # older ones import modules that a model's files name
    "datasets>=4.0",
    "pyarrow>=17.0",
    "numpy>=2.0",
    "scipy>=1.13",  # intervals of the verdict
    "pyyaml>=6.0.1",
    "jinja2>=3.1.6",  # in whose sandbox chat templates run; older ones let them out
    "tqdm>=4.66.3",
]
EVAL = ["scikit-learn>=1.5", "rouge-score>=0.1.2", "sacrebleu>=2.4.3"]
PLOTS = ["matplotlib>=3.9"]
# No part of "all": peft imports it wherever it is, and it then says which of its GPU libraries do not load.
DURABILITY = ["torchao>=0.16"]
# A base of 4 bits below adapters. No part of "all", for the same reason; the oldest versions that were tried.
QUANT = ["bitsandbytes>=0.50", "accelerate>=1.7"]
# A tracker's extra has its name (soul/run/trackers.py). The oldest versions that were tried.
TRACKERS = {
    "tensorboard": ["tensorboard>=2.21"],
    "wandb": ["wandb>=0.31"],
    "trackio": ["trackio>=0.43"],
    "mlflow": ["mlflow>=3.17"],
}
TEST = ["pytest>=8.0", "pytest-xdist>=3.8", "numpy>=2.0", *DURABILITY, *QUANT]

setup(
    name="soul-kernels",
    version=VERSION,
    description="Fused Triton kernels for second-order unlearning of large language models",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    keywords=["machine unlearning", "large language models", "second-order optimization", "Sophia", "Triton"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["soul", "soul.*", "soul_kernels", "soul_kernels.*"]),
    # .ci/check_dist.py holds the wheel against the files of both packages.
    package_data={
        "soul": ["py.typed"],
        "soul.tasks": ["refusals/*.txt"],
        "soul_kernels": ["py.typed"],
        "soul.integrations.open_unlearning": ["README.md", "configs/trainer/*.yaml"],
    },
    install_requires=["torch>=2.10", "typing-extensions>=4.12", 'triton>=3.6; platform_system == "Linux"'],
    extras_require={
        "hf": HF,
        "eval": EVAL,
        "plots": PLOTS,
        # Not in "all": the first one pins scikit-learn, whose version it was trained with; the second one brings much else.
        "detox": ["alt-profanity-check>=1.5"],
        "lmeval": ["lm-eval>=0.4.9"],
        "durability": DURABILITY,
        "quant": QUANT,
        **TRACKERS,
        "bench": [*PLOTS, "pytest-benchmark>=4.0"],
        # What the benchmarks compare with, where it is installed. Only cut-cross-entropy from its repository has cce_exact.
        "peers": [
            "torch-optimi>=0.3.3",
            "flashoptim>=0.1.4",
            *DURABILITY,
            "bitsandbytes>=0.47",
            "pytorch-optimizer>=3.8",
            "liger-kernel>=0.8.5",
            'liger-kernel[cutedsl]>=0.8.5; platform_system == "Linux"',
            'quack-kernels>=0.6.5; platform_system == "Linux"',
            "cut-cross-entropy>=25.1.1",
        ],
        "test": TEST,
        # One version of the linter and of the type checker, the same on every machine and in CI.
        "lint": ["ruff==0.17.6", "mypy==2.4.1"],
        "docs": [
            "mkdocs>=1.6.1,<2",
            "mkdocs-material>=9.7,<10",
            "mkdocstrings[python]>=1.0,<2",
            "pymdown-extensions<12",  # newer ones fail with the last mkdocstrings that Python 3.10 gets
        ],
        "dist": ["build>=1.2.2,<2", "twine>=6.1,<8"],
        "all": [*HF, *EVAL, *PLOTS],
    },
    entry_points={"console_scripts": ["soul = soul.cli:main"]},
)
