"""``soul push``, which publishes a saved model on the Hugging Face Hub, and ``--push-to-hub``, which does so after a run."""

import argparse
import pathlib
import shlex
from typing import Any

from soul.checkpoint.local import is_saved
from soul.hub.card import write_card
from soul.hub.push import check_repository, open_repository, publish, upload
from soul.output.console import print_result
from soul.output.directory import RUN_FILE
from soul_kernels.errors import argument_error

HELP = "push the model that a run has saved, with its model card, to the Hugging Face Hub"
NAME = "push_to_hub"  # the option, in errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("output", metavar="OUTPUT", help="output directory of a run that has ended")
    add("repository", metavar="REPOSITORY", help="OWNER/NAME on the hub, or NAME in your account; created if it does not exist")
    add("--private", action="store_true", help="only you may see the repository")
    add("--with-report", action="store_true", help="push report.html and report.md too, which quote rows to be forgotten")


def add_hub(group: argparse._ActionsContainer) -> None:
    """Declare the options by which a run is pushed at its end."""
    add = group.add_argument
    add(
        "--push-to-hub",
        metavar="REPOSITORY",
        help="push model, tokenizer and model card to OWNER/NAME at the end, with the login of `hf auth login` or HF_TOKEN",
    )
    add("--hub-private", action="store_true", help="with --push-to-hub: only you may see the repository")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    directory = pathlib.Path(args.output)
    if not is_saved(directory) or not (directory / RUN_FILE).is_file():
        expected = "the output directory of a run that has ended"
        raise argument_error("OUTPUT", expected, f"{directory} without {RUN_FILE} or a saved model", "check the path")
    url = publish(directory, args.repository, private=args.private, report=args.with_report, name="REPOSITORY")
    print_result(f"pushed: {url}")


def check_hub(args: argparse.Namespace) -> None:
    """Check the options in ``args`` of a run that is to be pushed, and complete the name; nothing is created."""
    if args.push_to_hub is not None:
        args.push_to_hub = check_repository(NAME, args.push_to_hub)
    elif args.hub_private:
        raise argument_error("hub_private", "nothing without --push-to-hub", True, "pass --push-to-hub REPOSITORY")


def open_hub(args: argparse.Namespace) -> None:
    """Create the repository that the run in ``args`` is to be pushed to, and make sure that it can be."""
    if args.push_to_hub is not None:
        open_repository(NAME, args.push_to_hub, args.hub_private)


def push_run(args: argparse.Namespace, status: int) -> None:
    """Push the model of the run in ``args`` that has ended with an exit status, unless it has missed its aim.

    Raises:
        NotPushed: it could not be pushed.
    """
    if args.push_to_hub is None or args.dry_run:
        return
    if status:
        command = f"soul push {shlex.quote(args.output)} {args.push_to_hub}"
        print(f"aim not reached, so not pushed; to push it all the same: {command}")
        return
    print(f"pushed: {upload(pathlib.Path(args.output), args.push_to_hub)}")


def card_of_run(directory: pathlib.Path, numbers: dict[str, Any] | None = None) -> None:
    """Write the model card of a run that has ended; if that fails, a line says why, and the run is none the worse for it."""
    try:
        write_card(directory, numbers=numbers)
    except Exception as error:  # as with a report (`soul.report.write.attempt`)
        print(f"no model card: {type(error).__name__}: {error}")
