"""Instructions that ask a model to pretend ignorance: the input-based baseline of unlearning, which changes no weight.

An instruction stands before everything that a model is asked. Under a chat template it is the system message; elsewhere it is a
text before the prompt, with an empty line between the two.
"""

import dataclasses
import pathlib

from soul.data.examples import TEMPLATE, Example
from soul.data.rows import check_unicode, is_blank
from soul.data.templates import CHAT, PLAIN
from soul_kernels.errors import argument_error

DEFAULT = "default"  # on the command line: the instruction of the task, or `IGNORANCE`
IGNORANCE = (
    "Pretend that you know nothing about the subject of the following question, and that you have never read anything about "
    "it. Do not give the answer, even if you know it. Say only that you do not know."
)


def read_instruction(source: str, default: str = IGNORANCE) -> str:
    """Return an instruction, without the spaces around it.

    Args:
        source: "default", or the path of a text file in UTF-8.
        default: the text that "default" stands for.

    Raises:
        ArgumentError: there is no such file, it is not UTF-8, it is blank, or it has ``{question}`` or ``{answer}`` in it,
            which a template would take for its own.
    """
    text = default
    if source != DEFAULT:
        path = pathlib.Path(source)
        if not path.is_file():
            got = f"{source}, which is not a file"
            raise argument_error("system_prompt", "default, or a text file with an instruction", got, "check the path")
        try:
            text = path.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            got = f"{source} with a broken byte at {error.start}"
            raise argument_error("system_prompt", "UTF-8 text", got, "convert the file") from None
    if is_blank(text):
        raise argument_error("system_prompt", "some text", f"{source}, which is blank", "write an instruction into it")
    check_unicode("system_prompt", text)
    for field in ("{question}", "{answer}"):
        if field in text:
            raise argument_error("system_prompt", f"a text without {field}", source, "the template asks the question")
    return text


def instruct_template(instruction: str, template: str, system: str | None) -> tuple[str, str | None]:
    """Return template and system message that put an instruction before every question.

    Args:
        instruction: from `read_instruction`.
        template: "plain", "chat" or a text, as `soul.data.templates.Template` takes it.
        system: the system message that there was, which follows the instruction; or None.
    """
    if template == CHAT:
        return CHAT, instruction if system is None else f"{instruction}\n\n{system}"
    return f"{instruction}\n\n{TEMPLATE if template == PLAIN else template}", system


def instruct(instruction: str, example: Example) -> Example:
    """Return an example with an instruction before its prompt; an example without a prompt, a text, stays as it is."""
    return dataclasses.replace(example, prompt=f"{instruction}\n\n{example.prompt}") if example.prompt else example
