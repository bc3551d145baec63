"""Options of a command from a YAML file, ``--config FILE``, and of a published configuration, ``--preset NAME``."""

import argparse
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from soul import presets
from soul._extras import require
from soul_kernels.errors import argument_error

LIST = "list"  # in place of a preset's name


def expand(words: Sequence[str], parser_of: Mapping[str, argparse.ArgumentParser]) -> Sequence[str]:
    """Return the command line with the options of ``--preset NAME`` and ``--config FILE`` before its own options, which win.

    The options of a file win over those of a preset, which a file may name.

    The file is a mapping of option names, with - or _, to values: true for a flag, a list to repeat an option, a mapping for
    an option of the form NAME=VALUE. null and false leave an option out. Every other value is the text that the command line
    would have: nothing is taken for a date, an octal number or minutes and seconds. The ``soul_config.json`` of a run is such
    a file.

    Args:
        words: the command line, the command first.
        parser_of: command -> its parser.

    Returns:
        The command line without ``--config``.

    Raises:
        ArgumentError: the file does not exist or is not a mapping; a name in it is no option of the command or is there twice;
            an option has several values but takes one, or has values within values; there is no such preset.
    """
    if not words or words[0] not in parser_of:
        return words
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    parsed, rest = config_parser.parse_known_args(words[1:])
    options = [action for action in parser_of[words[0]]._actions if action.option_strings]  # not what is named by its place
    actions = {action.dest: action for action in options if action.dest not in ("help", "config")}
    if parsed.config is not None:
        rest = [*_words(parsed.config, _mapping(parsed.config), actions), *rest]
    elif "preset" not in actions:
        return words
    return [words[0], *(_words_of_preset(rest) if "preset" in actions else []), *rest]


def _words_of_preset(words: Sequence[str]) -> list[str]:
    """Return the options of the preset that a command line names, or none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    name = parser.parse_known_args(words)[0].preset
    if name in (None, LIST):
        return []
    if name not in presets.PRESETS:
        raise argument_error("preset", f"{LIST}, {', '.join(presets.PRESETS)}", repr(name), "choose one of these")
    return presets.words(name)


class ListPresets(argparse.Action):
    """Store the name of a preset; the name "list" prints all presets and ends the program, as ``--help`` does."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Handle the option where it stands on the command line."""
        if values == LIST:
            print(presets.table(), presets.DIFFERENCES, sep="\n\n")
            parser.exit()
        setattr(namespace, self.dest, values)


def _mapping(path: str) -> dict[Any, Any]:
    """Return the content of a YAML file."""
    yaml = require("yaml", "hf")
    if not pathlib.Path(path).is_file():
        raise argument_error("config", "a YAML file", f"{path}, which is not a file", "check the path")
    try:
        content = yaml.load(pathlib.Path(path).read_text(encoding="utf-8"), Loader=_loader(yaml))
    except Exception as error:  # the library raises many kinds for broken text, endless nesting or wrong tags
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise argument_error("config", "a YAML file", f"{path} ({reason})", "fix the file") from error
    if not isinstance(content, dict):
        raise argument_error("config", "a mapping of options", f"{path} with a {type(content).__name__}", "write NAME: VALUE")
    return content


def _loader(yaml: Any) -> type:
    """Return a YAML loader that knows true, false and null, leaves all other values texts, and refuses equal keys.

    YAML 1.1 reads 1:30 as 90, 010 as 8, yes as true, and 2026-12-01 as a date.

    Args:
        yaml: the module ``yaml``, which belongs to an extra.
    """

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, list[Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            lines: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if str(key.value) in lines:
                    raise ValueError(f"{key.value} is in line {lines[str(key.value)]} and again in line {line}")
                lines[str(key.value)] = line
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(null|Null|NULL|~|)$"), ["n", "N", "~", ""])
    return Loader


def _words(path: str, content: dict[Any, Any], actions: Mapping[str, argparse.Action]) -> list[str]:
    """Return the words of the command line that the options of a file stand for.

    Args:
        path: path of the file, for errors.
        content: option -> value.
        actions: name of an option, with _ -> its action in the parser.
    """
    words: list[str] = []
    names = set()
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in names:
            raise argument_error("config", "every option once", f"{key!r} in {path}, with - and with _", f"fix {path}")
        names.add(name)
        if name not in actions:
            remedy = f"the options are {', '.join(actions)}"
            raise argument_error("config", "options of the command", f"{key!r} in {path}", remedy)
        if value is not None and value is not False:
            words += _words_of_option(path, str(key), value, actions[name])
    return words


def _words_of_option(path: str, key: str, value: Any, action: argparse.Action) -> list[str]:
    """Return the words of one option of a file. Its value is neither null nor false."""
    option = action.option_strings[0]
    if action.nargs == 0:  # a flag
        if value is not True:
            raise argument_error(key, "true or false", repr(value), f"fix {path}")
        return [option]
    values = [value]
    if isinstance(value, dict):
        values = list(value.values())
    elif isinstance(value, list):
        values = value
    for entry in values:
        if isinstance(entry, (dict, list)) or (entry is True and not isinstance(value, dict)):
            remedy = f"fix {path}; put a text that says true in quotes"
            raise argument_error(key, "a value", "true" if entry is True else "values within it", remedy)
    if isinstance(value, dict):
        values = [f"{name}={entry}" for name, entry in value.items()]
    if isinstance(value, (dict, list)) and not isinstance(action.default, list):  # only the last one would count
        raise argument_error(key, f"one value, as {option} on the command line", repr(value), f"fix {path}")
    return [f"{option}={entry}" for entry in values]
