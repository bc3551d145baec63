"""The ``soul`` command: parsing, and the exit status. The commands themselves are in ``soul/commands``.

Bad input ends with a message and exit status 2, before anything is written.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from soul import __version__
from soul._extras import MissingExtra
from soul.checkpoint.local import Stopped
from soul.commands import ask, demo, evaluate, info, init, memorize, plan, push, report, study, unlearn
from soul.commands.config_file import expand
from soul.distributed import exit_process, launched
from soul.hub.push import NotPushed
from soul.output import console, notices, progress
from soul.run.loop import Diverged
from soul_kernels.errors import ArgumentError, argument_error

COMMANDS = {
    "unlearn": unlearn,
    "memorize": memorize,
    "init": init,
    "report": report,
    "push": push,
    "ask": ask,
    "plan": plan,
    "evaluate": evaluate,
    "study": study,
    "demo": demo,
    "info": info,
}
NOT_PUSHED = 4  # exit status: the model is saved, and could not be pushed to the hub
RUNS = ("unlearn", "memorize")  # the commands that train a model, in one process or several


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    The status is that of the work, even if reports on the console are lost (`soul.output.console`). Without ``argv`` a
    process of torchrun ends here (`soul.distributed.exit_process`).

    Args:
        argv: the command line without the name of the program; None: that of the process.

    Returns:
        0; 1 for a run that failed or a result that could not be written; 2 for bad input or a missing extra; 3 for a run that
        has ended in order without reaching its aim; 4 for a model that is saved and could not be pushed to the hub; 130 after
        Ctrl-C; 141 if the reader of a result has gone; 143 for a run that SIGTERM has stopped and ``--resume`` continues.
    """
    with console.safe(whole_process=argv is None):
        status = _status(sys.argv[1:] if argv is None else list(argv))
    if argv is None and "WORLD_SIZE" in os.environ:
        exit_process(status)
    return status


def _status(words: list[str]) -> int:
    """Run the command line ``words``, print any error, and return the exit status."""
    parser, parser_of = _parsers()
    command = words[0] if words else ""
    args = None
    try:
        args = _parsed(parser, expand(words, parser_of))
        if launched() > 1 and command not in RUNS:
            expected = " or ".join(f"'soul {name}'" for name in RUNS)
            remedy = "start it without torchrun: each process would do all of the work"
            raise argument_error("torchrun", expected, f"'soul {command}'", remedy)
        is_first = launched() == 1 or int(os.environ["RANK"]) == 0
        with notices.filtered(), progress.shown(is_first):
            status = args.run(args)
    except (ArgumentError, MissingExtra) as error:
        print(f"soul {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        state = unlearn.state_of_output(args) if command in RUNS and args is not None else "no model was saved"
        print(f"soul {command}: interrupted; {state}", file=sys.stderr)
        return 130
    except Stopped as error:
        print(f"soul {command}: {error}", file=sys.stderr)
        return 128 + 15  # the status of a process that SIGTERM ended
    except console.Unwritten as error:
        if error.errno == errno.EPIPE:  # as in `soul plan ... | head -1`
            return 128 + 13  # the status of a process that SIGPIPE ended
        print(f"soul {command}: standard output could not be written ({error.strerror})", file=sys.stderr)
        return 1
    except NotPushed as error:
        print(f"soul {command}: {error}", file=sys.stderr)
        return NOT_PUSHED
    except (Diverged, OSError) as error:  # OSError: a directory that cannot be written, a full disk
        print(f"soul {command}: {error}", file=sys.stderr)
        return 1
    return status or 0


def _parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Return the parsed options. The text of --help or --version must be written like any other result."""
    try:
        return parser.parse_args(words)
    except SystemExit as end:
        if not end.code:
            console.check_written(sys.stdout)
        raise


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the command line, and a dict from each command to its own parser.

    Options cannot be abbreviated: --conf would pass for --config, but its file would not be read.
    """
    description = "Second-order unlearning of large language models."
    parser = argparse.ArgumentParser(prog="soul", description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser_of = {}
    for name, command in COMMANDS.items():
        parser_of[name] = subparsers.add_parser(name, help=command.HELP, allow_abbrev=False)
        parser_of[name].set_defaults(run=command.run)
        parser_of[name].add_argument("--config", metavar="FILE", help="YAML with options of this command by name; the command "
                                     "line wins")  # fmt: skip
        command.add_arguments(parser_of[name])
    return parser, parser_of


if __name__ == "__main__":
    sys.exit(main())
