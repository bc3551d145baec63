"""The options of a command from a YAML file."""

import argparse
import pathlib
import re

from soul._extras import require
from soul_kernels.errors import argument_error


def expand(words, parser_of):
    """Puts the options of ``--config FILE`` before the other ones, which then win.

    The file is a mapping of option names, with - or _, to values: true for a flag, a list to repeat an option, a mapping for
    the NAME=VALUE of one. null and false leave an option out. Every other value is the text that the command line would have:
    nothing is taken for a date, an octal number or minutes and seconds. The ``soul_config.json`` of a run is such a file.

    Args:
        words: the command line, the command first.
        parser_of: command -> its ``argparse.ArgumentParser``.

    Returns:
        The command line without ``--config``.

    Raises:
        ArgumentError: no such file, no mapping, a name that is no option of the command or stands there twice, several values
            of one, or values within values.
    """
    if not words or words[0] not in parser_of:
        return words
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--config")
    found, rest = only.parse_known_args(words[1:])
    if found.config is None:
        return words
    known = {action.dest: action for action in parser_of[words[0]]._actions if action.dest not in ("help", "config")}
    return [words[0], *_words(found.config, _mapping(found.config), known), *rest]


def _mapping(path):
    yaml = require("yaml", "hf")
    if not pathlib.Path(path).is_file():
        raise argument_error("config", "a YAML file", f"{path}, which is none", "check the path")
    try:
        content = yaml.load(pathlib.Path(path).read_text(encoding="utf-8"), Loader=_loader(yaml))
    except Exception as error:  # whatever the library says of broken text, endless nesting, or tags that do not fit
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise argument_error("config", "a YAML file", f"{path} ({reason})", "fix the file") from error
    if not isinstance(content, dict):
        raise argument_error("config", "a mapping of options", f"{path} with a {type(content).__name__}", "write NAME: VALUE")
    return content


def _loader(yaml) -> type:
    """Return a loader of YAML that knows true, false and null, and leaves all other values texts; keys must differ.

    YAML 1.1 reads 1:30 as 90, 010 as 8, yes as true, and 2026-12-01 as a date.
    """

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {}

        def construct_mapping(self, node, deep=False):
            lines = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if str(key.value) in lines:
                    raise ValueError(f"{key.value} stands in line {lines[str(key.value)]} and again in line {line}")
                lines[str(key.value)] = line
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(null|Null|NULL|~|)$"), ["n", "N", "~", ""])
    return Loader


def _words(path, content, known):
    words, names = [], set()
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in names:
            raise argument_error("config", "every option once", f"{key!r} in {path}, with - and with _", f"fix {path}")
        names.add(name)
        action = known.get(name)
        if action is None:
            remedy = f"the options are {', '.join(known)}"
            raise argument_error("config", "options of the command", f"{key!r} in {path}", remedy)
        if value is None or value is False:
            continue
        option = action.option_strings[0]
        if action.nargs == 0:  # a flag
            if value is not True:
                raise argument_error(str(key), "true or false", repr(value), f"fix {path}")
            words.append(option)
            continue
        for single in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            if isinstance(single, (dict, list)) or single is True and not isinstance(value, dict):
                remedy = f"fix {path}; a text that says true stands in quotes"
                raise argument_error(str(key), "a value", "true" if single is True else "values within it", remedy)
        if isinstance(value, dict):
            value = [f"{name}={given}" for name, given in value.items()]
        if isinstance(value, list) and not isinstance(action.default, list):  # the last one alone would count
            raise argument_error(str(key), f"one value, as {option} on the command line", repr(content[key]), f"fix {path}")
        words += [f"{option}={given}" for given in (value if isinstance(value, list) else [value])]
    return words
