"""The ``soul`` command. What each command does is in ``soul/commands``.

Bad input ends with a message and exit status 2, before anything is written.
"""

import argparse
import sys

from soul import __version__
from soul._extras import MissingExtra
from soul.checkpoint import Stopped
from soul.commands import demo, evaluate, info, study, unlearn
from soul.unlearn import Diverged
from soul_kernels._checks import ArgumentError

COMMANDS = {"unlearn": unlearn, "evaluate": evaluate, "study": study, "demo": demo, "info": info}


def main(argv=None):
    """Runs the command; returns the exit status: 0, 2 for bad input or a missing extra, 1 for a run that failed, 143 for one
    that SIGTERM has stopped and ``--resume`` continues.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ArgumentError, MissingExtra) as error:
        print(f"soul {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"soul {args.command}: interrupted; no model was saved", file=sys.stderr)
        return 130
    except Stopped as error:
        print(f"soul {args.command}: {error}", file=sys.stderr)
        return 128 + 15  # as of a process that SIGTERM ended
    except (Diverged, OSError) as error:  # OSError: a directory that cannot be written, a full disk
        print(f"soul {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="soul", description="Second-order unlearning of large language models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.HELP)
        own.set_defaults(run=command.run)
        command.add_arguments(own)
    return parser


if __name__ == "__main__":
    sys.exit(main())
