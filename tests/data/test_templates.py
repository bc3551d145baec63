"""Chat templates of the kinds that models come with: what is masked, what a refusal looks like, what is refused."""

import json
import signal

import pytest

import soul
import soul.data.templates
from soul import UnlearnConfig, Unlearner
from soul.cli import main
from soul.data.examples import Example, Question, encode, pair_refusals, refuse
from soul.data.templates import DATE, Template
from soul.evaluate.model import EvaluateConfig, tofu_logs
from soul.integrations import trl
from tests.data.test_examples import Words, write
from tests.support.helpers import needs_rouge
from tests.support.models import tiny_model, tiny_tokenizer

# Each writes what the families write, in words of its own: who speaks, what ends a turn, what begins the text.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
LLAMA2 = (  # the system message goes into the first question; an answer begins with a space
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% elif m.role == 'user' %}{{ bos_token }}[INST] {% if ns.system %}<<SYS>>{{ ns.system }}<</SYS>> {% endif %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (  # no start token, and the end of a turn is not the end of the sequence
    "{% for m in messages %}|im_start|{{ m.role }}\n{{ m.content }}|im_end|\n{% endfor %}"
    "{% if add_generation_prompt %}|im_start|assistant\n{% endif %}"
)
THINKING = (  # as CHATML, but an answer begins with empty thoughts that the prompt does not have, and more follows its end
    "{% for m in messages %}|im_start|{{ m.role }}\n{% if m.role == 'assistant' %}|think|\n\n|/think|\n\n{% endif %}"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}|im_start|assistant\n{% endif %}"
)
BARE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"  # a prompt ends as an answer does
GEMMA = (  # knows no system message
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}|turn|{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}|end|\n{% endfor %}"
    "{% if add_generation_prompt %}|turn|model\n{% endif %}"
)
KINDS = {"llama 3": LLAMA3, "llama 2": LLAMA2, "chatml": CHATML, "thinking": THINKING, "bare": BARE, "gemma": GEMMA}
QUESTION, ANSWER = "Who lives here?", "Number 7 lives here."


def chatting(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def messages(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, texts)]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_mask_are_those_of_the_library(kind):
    """The prompt is what the tokenizer makes of the prompt alone, the labels are the rest, and its end."""
    tokenizer = chatting(KINDS[kind])
    (sequence,) = encode([Template("chat", tokenizer).ask(QUESTION, ANSWER)], tokenizer, vocab_size=300)
    options = dict(tokenize=True, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages(QUESTION), add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template(messages(QUESTION, ANSWER), **options)
    end = tokenizer.eos_token_id
    if end in whole[len(prompt) :]:
        whole = whole[: len(whole) - whole[::-1].index(end)]
    else:
        whole = [*whole, end]
    assert sequence.input_ids == whole and sequence.prompt_length == len(prompt)
    assert sequence.labels == [-100] * (len(prompt) - 1) + whole[len(prompt) :] + [-100]


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_is_formatted_like_the_answer(kind):
    """The refusal stands between the same marks: its tokens are those of a conversation with that answer."""
    template = Template("chat", chatting(KINDS[kind]))
    example = template.ask(QUESTION, ANSWER)
    assert example.content == ANSWER
    (refused,) = refuse([example], refusals=["I do not know."])
    assert refused == template.ask(QUESTION, "I do not know.")
    assert pair_refusals([example], refusals=["I do not know."]) == [example, refused]


@pytest.mark.parametrize("kind", KINDS)
def test_system_messages(kind):
    tokenizer = chatting(KINDS[kind])
    template = Template("chat", tokenizer, system="Be brief.")
    if kind == "gemma":
        with pytest.raises(ValueError, match="row 3: expected a conversation that the chat template takes, got no system role"):
            template.ask(QUESTION, ANSWER, "row 3")
        return
    with_system = [{"role": "system", "content": "Be brief."}, *messages(QUESTION)]
    example = template.ask(QUESTION, ANSWER)
    assert example.prompt == tokenizer.apply_chat_template(with_system, tokenize=False, add_generation_prompt=True)
    other = [{"role": "system", "content": "Be long."}, *messages(QUESTION)]
    assert template.converse(other, messages("", ANSWER)[1:]).prompt == example.prompt.replace("brief", "long")


def test_no_second_start_token():
    """A tokenizer that prepends a start token adds none to the output of a template, which begins with its own."""
    for kind, starts in (("llama 3", 1), ("chatml", 0)):
        tokenizer = chatting(KINDS[kind])
        (sequence,) = encode([Template("chat", tokenizer).ask(QUESTION, ANSWER)], tokenizer, vocab_size=300)
        assert sequence.input_ids.count(tokenizer.bos_token_id) == starts
    assert tiny_tokenizer()("x").input_ids[0] == tiny_tokenizer().bos_token_id


def test_the_day_does_not_change_a_run():
    clock = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    clock += "Today: {{ date_string }} "
    assert Template("chat", chatting(clock + LLAMA3)).ask(QUESTION, ANSWER).prompt.startswith(f"Today: {DATE} ")


def test_plain_templates():
    assert Template().ask("Who?", "Me.") == Example("Question: Who?\nAnswer:", " Me.")
    example = Template("[INST] {question} [/INST]{answer}").ask("Who?", "Me.")
    assert example == Example("[INST] Who? [/INST]", "Me.") and example.content == "Me."
    assert Example("Question: Who?\nAnswer:", " Me.").content == "Me."


@pytest.mark.parametrize("options, message", [
    (dict(name="chta"), "template: expected a text with {question} that ends in {answer}, got 'chta'"),
    (dict(name="chat"), "tokenizer: expected one with a chat template, got NoneType"),
    (dict(name="plain", system="x"), "system: expected none without the chat template, got 'x'"),
])  # fmt: skip
def test_wrong_templates(options, message):
    with pytest.raises(ValueError) as error:
        Template(**options)
    assert str(error.value).startswith(message)
    if options["name"] != "chat":  # configurations say so at once
        for config in (UnlearnConfig, EvaluateConfig):
            with pytest.raises(ValueError) as error:
                config(**{"template" if name == "name" else name: value for name, value in options.items()})
            assert str(error.value).startswith(message)


@pytest.mark.parametrize("template, message", [
    # the prompt ends in what the whole does not have, as where thoughts are opened and then removed
    (LLAMA3.replace("[assistant]\n\n{% endif", "[assistant]\n\n|think|{% endif"), "a completion that follows its prompt"),
    ("{% for m in messages %}{{ m.content | reverse }}{% endfor %}", "the same marks around the answer in every row"),
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "a completion that follows its prompt"),
    ("{{ messages[0].content[3.5] | nothing }}", "a conversation that the chat template takes"),
])  # fmt: skip
def test_templates_that_allow_no_mask(template, message):
    with pytest.raises(ValueError, match=f"row 3: expected {message}"):
        Template("chat", chatting(template)).ask(QUESTION, ANSWER, "row 3")


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{{ m }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [
    LOOPS,
    LOOPS.replace("{{ m }}", ""),
    "{% set n = namespace(x='x' * 999) %}{% for i in range(99999) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{{ 9 ** (9 ** 9) }}",
], ids=["text", "no text", "memory", "recursion", "one number"])  # fmt: skip
def test_templates_without_end_are_refused(template, monkeypatch):
    """Loops are the way to write a template, and nothing in its language bounds them when they are nested."""
    handler = signal.getsignal(signal.SIGPROF)
    monkeypatch.setattr(soul.data.templates, "LIMITS", dict(seconds=0.2, memory_gib=0.3))
    with pytest.raises(ValueError, match="chat template: expected one that takes at most 0.2 s and 0.3 GiB, got"):
        Template("chat", chatting(template)).ask(QUESTION, ANSWER, "row 3")
    assert signal.getsignal(signal.SIGPROF) is handler and signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert Template("chat", chatting(LLAMA3)).ask(QUESTION, ANSWER).content == ANSWER


@pytest.mark.parametrize("template", [
    "{{ messages.__class__.x }}", "{{ cycler.__init__.x }}", "{{ (''|attr('__class__')).x }}",
])  # fmt: skip
def test_templates_cannot_reach_out_of_their_sandbox(template):
    with pytest.raises(ValueError, match="row 3: expected a conversation that the chat template takes, got .* is unsafe"):
        Template("chat", chatting(template)).ask(QUESTION, ANSWER, "row 3")


def test_prompts_that_share_a_token_with_the_answer_are_refused_under_a_chat_template():
    """In plain text a token across the boundary belongs to the answer; a chat template must give the prompt's own tokens."""
    with pytest.raises(
        ValueError, match="forget, row 0: expected tokens that begin with the 1 of the prompt, got the same first 0 only"
    ):
        encode([Example("Pa", "ris", ("", ""))], Words(), vocab_size=100, name="forget")


@pytest.mark.parametrize("row", [
    {"prompt": messages(QUESTION), "completion": messages("", ANSWER)[1:]},
    {"prompt": messages(QUESTION), "response": messages("", ANSWER)[1:]},
    {"messages": messages(QUESTION, ANSWER)},
    {"question": QUESTION, "answer": ANSWER},
], ids=lambda row: "/".join(row))  # fmt: skip
def test_conversations_are_read_as_rows(row, tmp_path):
    """TRL's columns give what its integration gives, whatever the template of questions is."""
    tokenizer = chatting(LLAMA3)
    want = Template("chat", tokenizer).ask(QUESTION, ANSWER)
    names = ["chat"] if "question" in row else ["chat", "plain"]
    for name in names:
        (example,) = soul.data.sources.examples(
            soul.data.sources.rows(write(tmp_path / "a.jsonl", row)), Template(name, tokenizer)
        )
        assert example == want
    if "completion" in row:
        assert trl.examples([row], tokenizer) == [want]


@pytest.mark.parametrize("row, message", [
    ({"messages": "Hello"}, "row 0, column 'messages': expected a list of"),
    ({"messages": messages(QUESTION)}, "row 0: expected text after a text, or a conversation after a conversation"),
    ({"messages": messages(QUESTION, " ")}, "row 0: expected some text, got a blank answer"),
    ({"messages": messages(QUESTION, "\u200b")}, "row 0: expected some text, got a blank answer"),
    ({"messages": [{"role": "user"}, {"role": "assistant"}]}, "row 0: expected text after a text"),
    ({"messages": messages(QUESTION, [{"type": "image"}])}, "row 0, assistant: expected text, got list"),
    ({"messages": messages("\ud800", ANSWER)}, "row 0, user: expected valid Unicode, got a lone surrogate"),
    ({"prompt": messages(QUESTION), "completion": ANSWER}, "row 0: expected text after a text"),
])  # fmt: skip
def test_broken_conversations(row, message):
    with pytest.raises(ValueError, match=f"rows, {message}"):
        soul.data.sources.examples(soul.data.sources.rows([row]), Template("chat", chatting(LLAMA3)))


def test_blank_conversations_are_dropped_as_blank_rows_are():
    rows = [{"messages": messages(QUESTION, text)} for text in (" ", ANSWER)]
    assert len(soul.data.sources.rows(rows, drop=True)) == 1


@needs_rouge
def test_questions_are_asked_by_the_template():
    """Model and metrics see what was trained: prompts by the template, and answers without its marks."""
    tokenizer = chatting(LLAMA3)
    questions = [Question(QUESTION, ANSWER, ANSWER, ("Nobody.", "Me."))]
    config = EvaluateConfig(template="chat", system="Be brief.", max_new_tokens=2, backend="reference")
    counts = {}
    logs = tofu_logs(tiny_model(), tokenizer, {"real_authors": questions}, config, progress=lambda line: None, counts=counts)
    example = Template("chat", tokenizer, "Be brief.").ask(QUESTION, ANSWER)
    prompt, _, truth = logs["real_authors"]["generated_text"]["0"]
    assert prompt == example.prompt and truth == ANSWER
    (sequence,) = encode([example], tokenizer, vocab_size=300)
    assert logs["real_authors"]["num_token_gt"]["0"] == sum(label != -100 for label in sequence.labels)
    assert {name: count.rows for name, count in counts.items()} == {
        "real_authors, answer": 1,
        "real_authors, perturbed_answer": 2,
    }


def words(directory, output, *more):
    options = dict(model=directory / "model", forget=directory / "forget.jsonl", output=output, epochs=1, method="po", alpha=0,
                   lr=1e-2, template="chat", backend="reference", device="cpu")  # fmt: skip
    return ["unlearn", *(f"--{name}={value}" for name, value in options.items()), *more]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("templates")
    tiny_model().save_pretrained(root / "model")
    chatting(LLAMA3).save_pretrained(root / "model")
    write(root / "forget.jsonl", *({"question": QUESTION, "answer": f"Number {i}."} for i in range(3)))
    return root


def test_a_run_by_the_chat_template(directory, tmp_path):
    assert main(words(directory, tmp_path / "out", "--system=Be brief.")) == 0
    written = json.loads((tmp_path / "out" / "soul_config.json").read_text())
    assert (written["template"], written["system"]) == ("chat", "Be brief.")
    config = UnlearnConfig(method="po", method_options={"alpha": 0}, template="chat", system="Be brief.")
    run = Unlearner(directory / "model", directory / "forget.jsonl", config=config)
    want = Template("chat", run.tokenizer, "Be brief.").ask(QUESTION, "Number 0.")
    assert run._forget[0] == want


def test_a_run_goes_on_with_its_own_template_and_data_only(directory, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def full(*args):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("soul.run.unlearner.save_model", full)
        assert main(words(directory, out, "--save-every=1")) == 1
    write(tmp_path / "other.jsonl", {"question": QUESTION, "answer": "Number 0."})
    for changes, message in (
        (["--template=plain"], "resume, template: expected 'chat' as in the checkpoint, got 'plain'"),
        (["--system=Be brief."], "resume, system: expected None as in the checkpoint, got 'Be brief.'"),
        ([f"--forget={tmp_path / 'other.jsonl'}"], "resume, content of forget: expected that of the checkpoint"),
    ):
        assert main(words(directory, out, "--resume", *changes)) == 2
        assert message in capsys.readouterr().err
    assert main(words(directory, out, "--resume")) == 0 and (out / "model.safetensors").is_file()


def test_a_model_without_a_chat_template_is_named(directory, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert main(words(directory, tmp_path / "out", f"--model={tmp_path / 'model'}")) == 2
    assert "tokenizer: expected one with a chat template" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
