"""The options of a command that choose the template of questions."""

import argparse


def add_template(group: argparse._ActionsContainer) -> None:
    """Declare ``--template`` and ``--system`` on a parser or on a group of one."""
    group.add_argument("--template", default="plain", metavar="TEXT", help="how questions are asked: plain (Question: ... and "
                       "Answer: ... on two lines), chat (the tokenizer's chat template), or a text with {question} that ends "
                       "in {answer} (default: %(default)s)")  # fmt: skip
    group.add_argument("--system", metavar="TEXT", help="system message of the chat template (default: the template's own)")
