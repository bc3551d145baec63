"""Data with TRL's columns, prompt/completion or prompt/chosen/rejected, of texts or conversations -> `soul.data.Example`."""

from soul.data import Example
from soul_kernels._checks import argument_error, check_choice

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
    found = []
    for index, row in enumerate(rows):
        for column in ("prompt", *columns):
            if column not in row:
                remedy = "choose what to take, or make the prompt explicit (trl.extract_prompt)"
                raise argument_error(f"{name}, row {index}", f"a column {column!r}", "/".join(row) or "none", remedy)
        found += [
            _example(row["prompt"], row[column], tokenizer, f"{name}, row {index}, column {column!r}") for column in columns
        ]
    return found


def _example(prompt, answer, tokenizer, where):
    if isinstance(prompt, str) and isinstance(answer, str):
        if not answer.strip():
            raise argument_error(where, "some text", "a blank one", "drop the row")
        return Example(prompt, answer)
    for part in (prompt, answer):
        if isinstance(part, str) or not part or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in part):
            expected = "text after a text, or a conversation after a conversation: lists of {'role', 'content'}"
            raise argument_error(where, expected, type(part).__name__, "fix the row")
    if getattr(tokenizer, "chat_template", None) is None:
        remedy = "pass the model's tokenizer, or set its chat_template"
        raise argument_error("tokenizer", "one with a chat template", type(tokenizer).__name__, remedy)
    goes_on = prompt[-1]["role"] == "assistant"
    opening = dict(continue_final_message=True) if goes_on else dict(add_generation_prompt=True)
    before = tokenizer.apply_chat_template(prompt, tokenize=False, **opening)
    together = [*prompt, *answer]
    if goes_on and answer[0]["role"] == "assistant":  # one message, begun in the prompt
        whole = {**prompt[-1], "content": prompt[-1]["content"] + answer[0]["content"]}
        together = [*prompt[:-1], whole, *answer[1:]]
    text = tokenizer.apply_chat_template(together, tokenize=False)
    if not text.startswith(before) or not text[len(before) :].strip():
        remedy = "the template must render the prompt alone as the beginning of the whole"
        raise argument_error(where, "a completion that follows its prompt", "other text under the chat template", remedy)
    answer, end = text[len(before) :], tokenizer.eos_token
    if end and answer.rstrip().endswith(end):
        answer = answer.rstrip()  # templates put a newline after the end of the last message
    return Example(before, answer)
