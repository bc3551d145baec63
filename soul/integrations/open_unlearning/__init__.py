"""Trainers and configurations for open-unlearning (locuslab/open-unlearning); README.md beside this file says how to use them.

May import: what `soul.integrations` may, and open-unlearning's own package ``trainer``, so `trainers` works only inside of it.
Start reading with `trainers`.
"""

import pathlib

CONFIGS = pathlib.Path(__file__).parent / "configs" / "trainer"  # to be copied into configs/trainer of open-unlearning
