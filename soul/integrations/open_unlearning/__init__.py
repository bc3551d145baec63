"""Trainers and configurations for open-unlearning (locuslab/open-unlearning); README.md here says how to install them.

``soul.integrations.open_unlearning.trainers`` imports that code base's own package ``trainer``, so it works only inside it.
"""

import pathlib

CONFIGS = pathlib.Path(__file__).parent / "configs" / "trainer"  # to be copied into configs/trainer of open-unlearning
