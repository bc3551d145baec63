"""Templates that turn a row into a prompt and an answer: a plain text with both, or the tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from soul._limits import limited
from soul.data.examples import TEMPLATE, Example, ask
from soul.data.rows import check_unicode, is_blank
from soul_kernels.errors import ArgumentError, argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]  # "role" and "content"
PLAIN = "plain"
CHAT = "chat"
# Templates that write today's date get this one, so that a run does not depend on the day. It is what Llama 3.2's own template
# writes where there is no clock.
DATE = "26 Jul 2024"
LIMITS: dict[str, float] = dict(seconds=5.0, memory_gib=1.0)  # for one row, since the loops of a chat template may be endless
_MARK = "soul-answer-goes-here"


class Template:
    """A template that turns questions with answers, and conversations, into `soul.data.Example`.

    Args:
        name: "plain": ``soul.data.TEMPLATE``; "chat": the tokenizer's chat template, a question as the user's message and an
            answer as the assistant's; or a text with ``{question}`` that ends in ``{answer}``.
        tokenizer: a Hugging Face tokenizer; needed for "chat", and for rows that are conversations.
        system: system message of every conversation that has none; for "chat" only.

    Raises:
        ArgumentError: as `check_template`, or "chat" with a tokenizer that has no chat template.
    """

    def __init__(
        self, name: str = PLAIN, tokenizer: "PreTrainedTokenizerBase | None" = None, system: str | None = None
    ) -> None:
        check_template(name, system)
        self.name = name
        self.tokenizer = tokenizer
        self.system = system
        if name == CHAT:
            self._chat_tokenizer()

    def ask(self, question: str, answer: str, where: str = "row") -> Example:
        """Return the `soul.data.Example` of a question and its answer.

        Args:
            question: a text.
            answer: a text.
            where: what to call the row in errors.

        Raises:
            ArgumentError: as `converse`.
        """
        if self.name != CHAT:
            return ask(question, answer, TEMPLATE if self.name == PLAIN else self.name)
        return self.converse([_message("user", question)], [_message("assistant", answer)], where)

    def converse(self, prompt: Any, completion: Any, where: str = "row") -> Example:
        """Return the `soul.data.Example` of a conversation, by the chat template, even if ``name`` is another template.

        The prompt is the template's text for the prompt's messages, with the text that opens an answer. If the last message of
        the prompt is the assistant's, the completion continues it. The answer is the text that the template adds for prompt and
        completion together, up to its end-of-sequence token.

        Args:
            prompt: list of ``{"role", "content"}``, texts.
            completion: list of the messages that follow.
            where: what to call the row in errors.

        Raises:
            ArgumentError: there is no chat template; prompt or completion is not such a list; the template refuses the
                conversation; or its text for the whole does not begin with its text for the prompt.
        """
        for messages in (prompt, completion):
            _check_messages(messages, where)
        if any(is_blank(message["content"]) for message in completion):
            raise argument_error(where, "some text", "a blank answer", "drop the row")
        self._chat_tokenizer()
        if self.system is not None and prompt[0]["role"] != "system":
            prompt = [_message("system", self.system), *prompt]
        continues = prompt[-1]["role"] == "assistant"
        rendered = self._render(prompt, where, **{"continue_final_message" if continues else "add_generation_prompt": True})
        answer = self._added(rendered, prompt, completion, continues, where)
        # The frame is the template's text around an answer. It must be the same around a mark in the answer's place.
        marked = self._added(rendered, prompt, [_message("assistant", _MARK)], continues, where)
        opening, mark, closing = marked.partition(_MARK)
        if not mark or not (answer.startswith(opening) and answer.endswith(closing)):
            self._raise_mismatch(where, "the same marks around the answer in every row", "other marks")
        return Example(rendered, answer, (opening, closing))

    def _added(
        self, rendered: str, prompt: Sequence[Message], completion: Sequence[Message], continues: bool, where: str
    ) -> str:
        """Return the text that the template adds to a rendered prompt for a completion."""
        messages = [*prompt, *completion]
        if continues and completion[0]["role"] == "assistant":  # one message, begun in the prompt
            joined = {**prompt[-1], "content": prompt[-1]["content"] + completion[0]["content"]}
            messages = [*prompt[:-1], joined, *completion[1:]]
        text = self._render(messages, where)
        if not text.startswith(rendered) or not text[len(rendered) :].strip():
            self._raise_mismatch(where, "a completion that follows its prompt", "other text under the chat template")
        answer = text[len(rendered) :]
        end = self._chat_tokenizer().eos_token
        if end and answer.rstrip().endswith(end):
            answer = answer.rstrip()  # templates put a newline after the end of the last message
        return answer

    def _render(self, messages: Sequence[Message], where: str, **options: bool) -> str:
        """Return the chat template's text for messages."""
        try:
            with limited("chat template", **LIMITS):
                return self._chat_tokenizer().apply_chat_template(messages, tokenize=False, date_string=DATE, **options)
        except ArgumentError:
            raise
        except Exception as error:  # the template may raise anything, for instance for unknown roles
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            expected = "a conversation that the chat template takes"
            raise argument_error(where, expected, reason[0], "fix the row, or choose another template") from error

    def _raise_mismatch(self, where: str, expected: str, got: str) -> NoReturn:
        raise argument_error(where, expected, got, "the template must render the prompt alone as the beginning of the whole")

    def _chat_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Return the tokenizer, and raise unless it has a chat template."""
        if self.tokenizer is None or getattr(self.tokenizer, "chat_template", None) is None:
            remedy = "pass the model's tokenizer, set its chat_template, or choose another template"
            raise argument_error("tokenizer", "one with a chat template", type(self.tokenizer).__name__, remedy)
        return self.tokenizer


def check_template(name: str, system: str | None = None) -> None:
    """Raise unless a template is "plain", "chat" or a text that `soul.data.examples.ask` takes.

    Args:
        name: name of the template, or its text.
        system: a system message, which is for "chat" only.

    Raises:
        ArgumentError: there is no such template, or there is a system message and the template is not "chat".
    """
    if name not in (PLAIN, CHAT):
        ask("", "", name)
    if system is not None and name != CHAT:
        raise argument_error("system", "none without the chat template", repr(system), "pass the template 'chat'")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _check_messages(messages: object, where: str) -> None:
    """Raise unless messages are a list of dicts with "role" and "content", whose contents are texts."""
    fits = isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    if not isinstance(messages, list) or not messages or not fits:
        expected = "text after a text, or a conversation after a conversation: lists of {'role', 'content'}"
        raise argument_error(where, expected, type(messages).__name__, "fix the row")
    for message in messages:
        if not isinstance(message["content"], str):
            raise argument_error(f"{where}, {message['role']}", "text", type(message["content"]).__name__, "fix the row")
        check_unicode(f"{where}, {message['role']}", message["content"])
