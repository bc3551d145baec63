"""How a row becomes a prompt and an answer: a plain text with both, or the tokenizer's chat template."""

from soul._limits import limited
from soul.data.examples import TEMPLATE, Example, ask
from soul.data.rows import check_unicode, is_blank
from soul_kernels.errors import ArgumentError, argument_error

PLAIN, CHAT = "plain", "chat"
# Templates that write today's date take this one, which is Llama 3.2's own where there is no clock: a run must not depend on
# the day.
DATE = "26 Jul 2024"
LIMITS = dict(seconds=5.0, memory_gib=1.0)  # of a chat template and a row, against templates without end
_MARK = "soul-answer-goes-here"


class Template:
    """Puts questions and answers, and conversations, into `soul.data.Example`.

    Args:
        name: "plain": ``soul.data.TEMPLATE``; "chat": the tokenizer's chat template, a question as the user's message and an
            answer as the assistant's; or a text with ``{question}`` that ends in ``{answer}``.
        tokenizer: a Hugging Face tokenizer; needed for "chat", and for rows that are conversations.
        system: system message of every conversation that has none; for "chat" only.

    Raises:
        ArgumentError: `check_template`, or a "chat" without a chat template.
    """

    def __init__(self, name=PLAIN, tokenizer=None, system=None):
        check_template(name, system)
        self.name, self.tokenizer, self.system = name, tokenizer, system
        if name == CHAT:
            self._check_tokenizer()

    def ask(self, question, answer, where="row"):
        """The `soul.data.Example` of a question and its answer; ``where`` is for errors, which are those of `converse`."""
        if self.name != CHAT:
            return ask(question, answer, TEMPLATE if self.name == PLAIN else self.name)
        return self.converse([_message("user", question)], [_message("assistant", answer)], where)

    def converse(self, prompt, completion, where="row"):
        """The `soul.data.Example` of a conversation, by the chat template, whatever ``name`` is.

        The prompt is what the template makes of the prompt's messages, with what opens an answer (or, where the last of them is
        the assistant's, as the beginning of that); the answer is what it adds for prompt and completion together, up to its
        end-of-sequence token.

        Args:
            prompt: list of ``{"role", "content"}``, texts.
            completion: the same, of what follows.
            where: what to call the row in errors.

        Raises:
            ArgumentError: no chat template; not such lists; the template refuses the conversation, or does not put the
                completion, as it is, after the prompt alone.
        """
        for part in (prompt, completion):
            _check_messages(part, where)
        if any(is_blank(message["content"]) for message in completion):
            raise argument_error(where, "some text", "a blank answer", "drop the row")
        self._check_tokenizer()
        if self.system is not None and prompt[0]["role"] != "system":
            prompt = [_message("system", self.system), *prompt]
        goes_on = prompt[-1]["role"] == "assistant"
        before = self._render(prompt, where, **{"continue_final_message" if goes_on else "add_generation_prompt": True})
        answer = self._after(before, prompt, completion, goes_on, where)
        opening, found, closing = self._after(before, prompt, [_message("assistant", _MARK)], goes_on, where).partition(_MARK)
        if not found or not (answer.startswith(opening) and answer.endswith(closing)):
            self._refuse(where, "an answer between the same marks in every row", "other ones")
        return Example(before, answer, (opening, closing))

    def _after(self, before, prompt, completion, goes_on, where):
        """What the template adds to a rendered prompt for a completion."""
        together = [*prompt, *completion]
        if goes_on and completion[0]["role"] == "assistant":  # one message, begun in the prompt
            whole = {**prompt[-1], "content": prompt[-1]["content"] + completion[0]["content"]}
            together = [*prompt[:-1], whole, *completion[1:]]
        text = self._render(together, where)
        if not text.startswith(before) or not text[len(before) :].strip():
            self._refuse(where, "a completion that follows its prompt", "other text under the chat template")
        answer, end = text[len(before) :], self.tokenizer.eos_token
        if end and answer.rstrip().endswith(end):
            answer = answer.rstrip()  # templates put a newline after the end of the last message
        return answer

    def _render(self, messages, where, **options):
        try:
            with limited("chat template", **LIMITS):
                return self.tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE, **options)
        except ArgumentError:
            raise
        except Exception as error:  # whatever the template raises: of roles that it does not know, or in another order
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise argument_error(where, "a conversation that the chat template takes", reason[0], "fix the row, or choose "
                                 "another template") from error  # fmt: skip

    def _refuse(self, where, expected, got):
        raise argument_error(where, expected, got, "the template must render the prompt alone as the beginning of the whole")

    def _check_tokenizer(self):
        if getattr(self.tokenizer, "chat_template", None) is None:
            remedy = "pass the model's tokenizer, set its chat_template, or choose another template"
            raise argument_error("tokenizer", "one with a chat template", type(self.tokenizer).__name__, remedy)


def check_template(name, system=None):
    """Raises unless a template is "plain", "chat" or a text, and a system message goes with "chat"."""
    if name not in (PLAIN, CHAT):
        ask("", "", name)
    if system is not None and name != CHAT:
        raise argument_error("system", "none without the chat template", repr(system), "pass the template 'chat'")


def _message(role, content):
    return {"role": role, "content": content}


def _check_messages(messages, where):
    shaped = isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    if not messages or not shaped:
        expected = "text after a text, or a conversation after a conversation: lists of {'role', 'content'}"
        raise argument_error(where, expected, type(messages).__name__, "fix the row")
    for message in messages:
        if not isinstance(message["content"], str):
            raise argument_error(f"{where}, {message['role']}", "text", type(message["content"]).__name__, "fix the row")
        check_unicode(f"{where}, {message['role']}", message["content"])
