"""The published configurations, and how ``--preset`` gives them."""

import pathlib

import pytest

from soul import presets
from soul.cli import _parsers, main
from soul.commands.config_file import expand
from soul.run.config import UnlearnConfig

# lr, weight decay, epochs and SOUL's gamma, our alpha, as in configs/TOFU and configs/Toxic of its code.
PUBLISHED = {
    "tofu-graddiff-first": ("graddiff", "adamw", 5e-6, 0.1, 5, 0.3),
    "tofu-graddiff-second": ("graddiff", "soul", 5e-6, 0.1, 5, 2.0),
    "tofu-po-first": ("po", "adamw", 2e-5, 0.1, 5, 1.0),
    "tofu-po-second": ("po", "soul", 1e-5, 0.1, 5, 5.0),
    "detox-opt-1.3b-first": ("po", "adamw", 2e-5, 0.0, 5, 0.1),
    "detox-opt-1.3b-second": ("po", "soul", 2e-5, 0.0, 5, 0.1),
    "detox-llama2-7b-first": ("po", "adamw", 1e-5, 0.0, 10, 1.0),
    "detox-llama2-7b-second": ("po", "soul", 1e-5, 0.0, 10, 0.1),
}
PATHS = ["--model=m", "--forget=f", "--retain=r", "--output=o"]


def parsed(*words):
    parser, parser_of = _parsers()
    return parser.parse_args(expand(["unlearn", *words, *PATHS], parser_of))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_what_was_published(name):
    args = parsed("--preset", name)
    assert (args.method, args.optimizer, args.lr, args.weight_decay, args.epochs, args.alpha) == PUBLISHED[name]
    assert (args.batch_size, args.accumulate, args.gamma, args.rho, args.max_grad_norm) == (1, 4, 1.0, 0.04, 1.0)
    assert args.published_code == (args.optimizer == "soul") and args.preset == name
    options = {key: value for key, value in presets.PRESETS[name].options.items() if key not in ("gamma", "alpha")}
    UnlearnConfig(**options, method_options={"gamma": args.gamma, "alpha": args.alpha}).objective()
    partner = presets.PRESETS[presets.PRESETS[name].partner]
    assert partner.partner == name and partner.options["optimizer"] != args.optimizer
    other = PUBLISHED[presets.PRESETS[name].partner]
    assert bool(partner.unfair) == (other[2:] != PUBLISHED[name][2:])


def test_all_published_configurations_are_there():
    assert presets.PRESETS.keys() == PUBLISHED.keys()


def test_options_that_are_given_win(tmp_path):
    """In this order: the command line, a file, the preset, which the file may name."""
    assert parsed("--lr=1e-3", "--preset=tofu-po-first").lr == 1e-3
    (tmp_path / "run.yaml").write_text("preset: tofu-po-first\nepochs: 3\nalpha: 7\n")
    args = parsed("--config", str(tmp_path / "run.yaml"), "--alpha", "8")
    assert (args.lr, args.epochs, args.alpha) == (2e-5, 3, 8.0)
    args = parsed("--config", str(tmp_path / "run.yaml"), "--preset", "tofu-graddiff-first")
    assert (args.method, args.lr, args.epochs, args.alpha) == ("graddiff", 5e-6, 3, 7.0)
    assert parsed().preset is None and parsed().lr is None


def test_presets_are_listed(capsys):
    with pytest.raises(SystemExit) as end:
        main(["unlearn", "--preset", "list"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert presets.table() in text and presets.DIFFERENCES in text
    assert main(["unlearn", "--preset", "best", *PATHS]) == 2
    assert "preset: expected list, tofu-graddiff-first, tofu-graddiff-second" in capsys.readouterr().err


def test_the_guide_has_the_table():
    guide = pathlib.Path(__file__).parents[1] / "docs" / "objectives.md"
    assert presets.table() in guide.read_text()
