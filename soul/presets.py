"""The configurations that SOUL's paper published, as options of ``soul unlearn --preset NAME``.

From ``configs/TOFU`` and ``configs/Toxic`` of its code at commit 30f7a41, with first-order and second-order optimizers. SOUL's
gamma weighs the retain set: it is alpha here. The two runs of most pairs differ in more than the optimizer, so comparing them
does not show what the optimizer does (`Preset.unfair`); ``--lr`` and ``--alpha`` make them equal. An option that is given wins
over a preset's.
"""

import dataclasses
from typing import Any

# Of every configuration, by its files or by the defaults of its code: a step of four rows, linear warm-up and decay, clipping.
COMMON = {
    "gamma": 1.0,
    "batch_size": 1,
    "accumulate": 4,
    "max_grad_norm": 1.0,
    "warmup_ratio": 0.1,
    "schedule": "linear",
}
FIRST = {"optimizer": "adamw"}
SECOND = {"optimizer": "soul", "rho": 0.04, "bs": 5120, "published_code": True}
TOFU = {**COMMON, "weight_decay": 0.1}
DETOX = {**COMMON, "weight_decay": 0.0, "method": "po"}
TOFU_MODEL, TOFU_DATA = "locuslab/tofu_ft_llama2-7b", "TOFU: forget10, retain90"
DETOX_DATA = "PKU-SafeRLHF: 200 unsafe answers; C4"
# True of every preset, beside what its own text says.
DIFFERENCES = (
    "The published runs keep bf16 weights, rounded to nearest, which loses most of an update at these rates: "
    "--dtype bfloat16 --param-rounding nearest does that. Refusals are drawn from eight of ours unless --refusals names the "
    "published file. Their answers keep one token of the original and the attention mask of it (po); ours do not."
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published configuration.

    Attributes:
        options: options of ``soul unlearn``, with _ for -, and their values.
        model: the model that was unlearned.
        data: the rows to forget and to retain.
        partner: name of the preset with the other optimizer.
        unfair: how it differs from its partner beside the optimizer, "" if it does not.
    """

    options: dict[str, Any]
    model: str
    data: str
    partner: str
    unfair: str = ""


def _pair(
    name: str, model: str, data: str, options: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
) -> dict[str, Preset]:
    """Return the two presets of a name, from their common options and those of each."""
    different = [f"{key} {first[key]:g} against {second[key]:g}" for key in first if first[key] != second[key]]
    unfair = f"first against second order: {', '.join(different)}" if different else ""
    names = (f"{name}-first", f"{name}-second")
    return {
        names[0]: Preset({**options, **FIRST, **first}, model, data, names[1], unfair),
        names[1]: Preset({**options, **SECOND, **second}, model, data, names[0], unfair),
    }


PRESETS: dict[str, Preset] = {
    **_pair(
        "tofu-graddiff",
        TOFU_MODEL,
        TOFU_DATA,
        {**TOFU, "method": "graddiff", "epochs": 5},
        {"lr": 5e-6, "alpha": 0.3},
        {"lr": 5e-6, "alpha": 2.0},
    ),
    **_pair(
        "tofu-po",
        TOFU_MODEL,
        TOFU_DATA,
        {**TOFU, "method": "po", "epochs": 5},
        {"lr": 2e-5, "alpha": 1.0},
        {"lr": 1e-5, "alpha": 5.0},
    ),
    **_pair(
        "detox-opt-1.3b",
        "facebook/opt-1.3b",
        DETOX_DATA,
        {**DETOX, "epochs": 5},
        {"lr": 2e-5, "alpha": 0.1},
        {"lr": 2e-5, "alpha": 0.1},
    ),
    **_pair(
        "detox-llama2-7b",
        "meta-llama/Llama-2-7b-hf",
        DETOX_DATA,
        {**DETOX, "epochs": 10},
        {"lr": 1e-5, "alpha": 1.0},
        {"lr": 1e-5, "alpha": 0.1},
    ),
}


def words(name: str) -> list[str]:
    """Return the options of a preset as words of a command line."""
    out: list[str] = []
    for option, value in PRESETS[name].options.items():
        flag = f"--{option.replace('_', '-')}"
        out.append(flag if value is True else f"{flag}={value}")
    return out


def table() -> str:
    """Return all presets as a table in Markdown, and what is true of all of them."""
    lines = [
        "| preset | model and data | method | optimizer | lr | alpha | epochs | weight decay | differs beside the optimizer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, preset in PRESETS.items():
        get = preset.options.__getitem__
        numbers = " | ".join(f"{get(key):g}" for key in ("lr", "alpha", "epochs", "weight_decay"))
        row = f"`{name}` | {preset.model}; {preset.data} | {get('method')} | {get('optimizer')} | {numbers}"
        lines.append(f"| {row} | {preset.unfair or 'no'} |")
    return "\n".join(lines)
