"""Data with TRL's columns as `soul.data.Example`: prompt/completion or prompt/chosen/rejected, texts or conversations."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from soul.data.examples import Example
from soul.data.templates import Template
from soul_kernels.errors import argument_error, check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAKE = ("completion", "rejected", "chosen", "pairs")


def examples(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    take: str = "completion",
    name: str = "rows",
) -> list[Example]:
    """Return the examples of rows with TRL's columns.

    In preference data ``chosen`` is the preferred answer and ``rejected`` the one to be forgotten. So take "rejected" for NPO,
    gradient ascent and similar objectives, "pairs" for DPO, and "chosen" for retaining or for `soul.losses.PO`.

    A text is taken as it is. A conversation, a list of ``{"role", "content"}``, goes through the tokenizer's chat template. The
    prompt ends with the template's opening of an answer or, if its last message is the assistant's, with that message left
    open. The answer is what the template adds to the prompt for prompt and completion together, up to its end-of-sequence
    token. Texts of chat templates may carry their own begin-of-sequence token; `soul.data.encode` adds no second one.

    Args:
        rows: for instance a ``datasets.Dataset``; further columns are ignored.
        tokenizer: a tokenizer with a chat template; needed for conversations only.
        take: "completion", "rejected" or "chosen": the column with the answer; or "pairs": each rejected answer, and right
            after it the chosen one, as `soul.losses.DPO` expects them.
        name: name of the rows in errors.

    Returns:
        One example a row, two for pairs.

    Raises:
        ArgumentError: a column is missing, or holds a blank text or neither text nor conversation; or the template does not put
            a completion after its prompt. The error names the row.
    """
    check_choice("take", take, TAKE)
    columns = ("rejected", "chosen") if take == "pairs" else (take,)
    template = Template(tokenizer=tokenizer)
    result: list[Example] = []
    for index, row in enumerate(rows):
        for column in ("prompt", *columns):
            if column not in row:
                remedy = "choose another column by take, or make the prompt explicit (trl.extract_prompt)"
                raise argument_error(f"{name}, row {index}", f"a column {column!r}", "/".join(row) or "none", remedy)
        for column in columns:
            result.append(_example(row["prompt"], row[column], template, f"{name}, row {index}, column {column!r}"))
    return result


def _example(prompt: object, answer: object, template: Template, where: str) -> Example:
    """Return the example of one row; ``where`` names it in errors."""
    if isinstance(prompt, str) and isinstance(answer, str):
        if not answer.strip():
            raise argument_error(where, "some text", "a blank text", "drop the row")
        return Example(prompt, answer)
    return template.converse(prompt, answer, where)
