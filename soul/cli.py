"""The ``soul`` command. What each command does is in ``soul/commands``.

Bad input ends with a message and exit status 2, before anything is written.
"""

import argparse
import sys

from soul import __version__
from soul._extras import MissingExtra
from soul.checkpoint import Stopped
from soul.commands import demo, evaluate, info, plan, study, unlearn
from soul.commands._file import expand
from soul.distributed import launched
from soul.unlearn import Diverged
from soul_kernels._checks import ArgumentError, argument_error

COMMANDS = {"unlearn": unlearn, "plan": plan, "evaluate": evaluate, "study": study, "demo": demo, "info": info}


def main(argv=None):
    """Runs the command; returns the exit status: 0, 2 for bad input or a missing extra, 1 for a run that failed, 143 for one
    that SIGTERM has stopped and ``--resume`` continues.
    """
    words = sys.argv[1:] if argv is None else argv
    parser, parser_of = _parsers()
    command = words[0] if words else ""
    try:
        args = parser.parse_args(expand(words, parser_of))
        if launched() > 1 and command != "unlearn":
            raise argument_error("torchrun", "'soul unlearn'", f"'soul {command}'", "start it without, in one process")
        args.run(args)
    except (ArgumentError, MissingExtra) as error:
        print(f"soul {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        remedy = "; --resume goes on from a checkpoint, where there is one" if command == "unlearn" else ""
        print(f"soul {command}: interrupted; no model was saved{remedy}", file=sys.stderr)
        return 130
    except Stopped as error:
        print(f"soul {command}: {error}", file=sys.stderr)
        return 128 + 15  # as of a process that SIGTERM ended
    except (Diverged, OSError) as error:  # OSError: a directory that cannot be written, a full disk
        print(f"soul {command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parsers():
    """The parser of the command line, and that of each command by name."""
    options = dict(allow_abbrev=False)  # --conf would be --config, and not read as it
    parser = argparse.ArgumentParser(prog="soul", description="Second-order unlearning of large language models.", **options)
    parser.add_argument("--version", action="version", version=__version__)
    commands, parser_of = parser.add_subparsers(dest="command", required=True, metavar="COMMAND"), {}
    for name, command in COMMANDS.items():
        parser_of[name] = commands.add_parser(name, help=command.HELP, **options)
        parser_of[name].set_defaults(run=command.run)
        parser_of[name].add_argument("--config", metavar="FILE", help="YAML with options of this command by name; what the "
                                     "command line says wins")  # fmt: skip
        command.add_arguments(parser_of[name])
    return parser, parser_of


if __name__ == "__main__":
    sys.exit(main())
