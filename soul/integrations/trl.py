"""Data with TRL's columns, prompt/completion or prompt/chosen/rejected, of texts or conversations -> `soul.data.Example`."""

from soul.data.examples import Example
from soul.data.templates import Template
from soul_kernels.errors import argument_error, check_choice

TAKE = ("completion", "rejected", "chosen", "pairs")


def examples(rows, tokenizer=None, *, take="completion", name="rows"):
    """Maps rows with TRL's columns to examples.

    In preference data what is preferred is ``chosen``; what is to be forgotten is ``rejected``. So NPO, gradient ascent and
    their kin take "rejected" alone, DPO takes "pairs", and "chosen" is for retaining or for `soul.losses.PO`.

    A text is taken as it is. A conversation, a list of ``{"role", "content"}``, goes through the tokenizer's chat template: the
    prompt with what opens the answer (or, where its last message is the assistant's, as the beginning of that), and the answer
    is what the template adds to it for prompt and completion together, up to its end-of-sequence token. Texts of chat templates
    may carry their own begin-of-sequence token; `soul.data.encode` adds no second one.

    Args:
        rows: iterable of mappings, as a ``datasets.Dataset`` is; further columns are ignored.
        tokenizer: a Hugging Face tokenizer with a chat template; needed for conversations only.
        take: "completion", "rejected" or "chosen": the column with the answer; or "pairs": each rejected answer, and right
            after it the chosen one, as `soul.losses.DPO` expects them.
        name: what to call the rows in errors.

    Returns:
        List of `soul.data.Example`, one a row; two for pairs.

    Raises:
        ArgumentError: a column is missing, holds something else or a blank text, or the template does not put a completion
            after its prompt; naming the row.
    """
    check_choice("take", take, TAKE)
    columns = ("rejected", "chosen") if take == "pairs" else (take,)
    found, template = [], Template(tokenizer=tokenizer)
    for index, row in enumerate(rows):
        for column in ("prompt", *columns):
            if column not in row:
                remedy = "choose what to take, or make the prompt explicit (trl.extract_prompt)"
                raise argument_error(f"{name}, row {index}", f"a column {column!r}", "/".join(row) or "none", remedy)
        found += [
            _example(row["prompt"], row[column], template, f"{name}, row {index}, column {column!r}") for column in columns
        ]
    return found


def _example(prompt, answer, template, where):
    if isinstance(prompt, str) and isinstance(answer, str):
        if not answer.strip():
            raise argument_error(where, "some text", "a blank one", "drop the row")
        return Example(prompt, answer)
    return template.converse(prompt, answer, where)
