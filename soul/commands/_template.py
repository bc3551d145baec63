"""How a command asks a question."""


def add_template(group):
    """Declares ``--template`` and ``--system``."""
    group.add_argument("--template", default="plain", metavar="TEXT", help="how questions are asked: plain (Question: ... and "
                       "Answer: ... on two lines), chat (the tokenizer's chat template), or a text with {question} that ends "
                       "in {answer} (default: %(default)s)")  # fmt: skip
    group.add_argument("--system", metavar="TEXT", help="system message of the chat template (default: none of ours)")
