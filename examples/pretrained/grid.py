"""The runs of the comparison: arms, equal grids, seeds. All of it was fixed before the first run."""

import itertools

STEPS = dict(method="npo", epochs=20, batch_size=4, template="chat", backend="auto")  # 60 steps with 12 rows to forget
SEEDS = (0, 1, 2)
ALPHAS = (20.0, 60.0)  # weight of the retain term; at 1 and 5 everything is lost, as a first look with one seed has shown
ARMS = {  # name -> title, options that all runs share, three choices of further options
    "adamw": ("AdamW", {"optimizer": "adamw"}, ({"lr": 2e-5}, {"lr": 4e-5}, {"lr": 8e-5})),
    "soul": ("SOUL as published", {"optimizer": "soul", "published_code": True}, ({"lr": 5e-6}, {"lr": 1e-5}, {"lr": 2e-5})),
    "soul_retain": (
        "SOUL, retain curvature",
        {"optimizer": "soul", "curvature": "retain", "curvature_every": 5},
        ({"lr": 4e-5, "clip_target": 0.1}, {"lr": 1e-4, "clip_target": 0.1}, {"lr": 2e-4, "clip_target": 0.03}),
    ),
}
BASELINE = "adamw"


def runs():
    """Return (name, arm, seed, alpha, choice) of every run, seed by seed, the arms in turn."""
    points = []
    for seed, alpha, choice in itertools.product(SEEDS, ALPHAS, range(3)):
        for arm in ARMS:
            points.append((f"seed{seed}_{arm}_alpha{alpha:g}_choice{choice}", arm, seed, alpha, choice))
    return points


def options(arm, seed, alpha, choice):
    """Return the fields of `soul.UnlearnConfig` of a run."""
    _, shared, choices = ARMS[arm]
    return {**STEPS, **shared, **choices[choice], "seed": seed, "method_options": {"alpha": alpha}}
