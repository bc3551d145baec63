"""Pages as HTML and as Markdown: what users wrote stays text, nothing is loaded from elsewhere, and curves become tables."""

import html.parser
import re
import sys
import xml.etree.ElementTree

import pytest

from soul.report import charts, markdown
from soul.report import html as html_page
from soul.report.page import (
    GOOD,
    Chart,
    Charts,
    Commands,
    Figure,
    Level,
    Page,
    Pairs,
    Prose,
    Sample,
    Samples,
    Section,
    Series,
    Table,
    Text,
    Verdict,
    curve_tables,
    spaced,
)
from soul.report.words import cleaned, duration, one_line, probability, ratio
from tests.support.helpers import mutant

NASTY = "<script>hacked = 1</script>&amp; | `a` \" ' *b* [c](http://x.example/d) <img src=http://x.example/e onerror=hacked=1>"
CHART = Chart(
    "Probability <of> answers",
    (Series("forget", ((0, 0.7), (5, 0.3), (10, 0.1)), 0), Series("control", ((0, 0.6), (10, 0.58)), 1)),
    levels=(Level("aim", 0.16, 0), Level("keep", 0.57, 1)),
    note="A note.",
    unit_interval=True,
)
RATES = Chart("lr", (Series("lr", tuple((x, 10.0**-x) for x in range(1, 31)), 2),), log=True)


def nasty_page():
    """Every kind of block, each with a text that would break a page that does not escape it."""
    blocks = (
        Text(NASTY),
        Prose("One **strong** `word`.\n\n- a\n- b\n  c\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n### Deeper"),
        Table((NASTY, "b"), ((NASTY, "1"),)),
        Pairs(((NASTY, NASTY), ("path", "/a/very/long/" + "x" * 300))),
        Charts((CHART, RATES)),
        Samples((Sample(NASTY, NASTY, NASTY, (("before", NASTY), ("after", "مرحبا\x1b[31m\ud800")), ("p 0.7", "")),)),
        Commands(((NASTY, "soul ask '" + NASTY + "' ```"),)),
    )
    verdict = Verdict(GOOD, NASTY, (NASTY,))
    sections = (Section(NASTY, blocks), Section("Folded", (Pairs((("a", "b"),)),), folded=True))
    return Page(NASTY, NASTY, verdict, (Figure(NASTY, NASTY, NASTY),), sections)


class Elements(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text; tags must match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_nothing_escapes(render):
    """Whatever users wrote is text: as often as the page has it, and no tag comes of it."""
    elements = Elements(render(nasty_page()))
    assert not {"script", "a", "iframe", "link", "form"} & {tag for tag, _ in elements.tags}
    assert [attributes for tag, attributes in elements.tags if tag == "img"] == []
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]
    assert elements.text.count("<script>hacked = 1</script>&amp;") == 20


def test_what_users_wrote_is_text():
    check_nothing_escapes(html_page.render)


@pytest.mark.parametrize("old, new", [
    ("return html.escape(cleaned(text))", "return cleaned(text)"),
    ("<td>{_text(value)}</td></tr>' for name, value", "<td>{value}</td></tr>' for name, value"),
    ('dir="auto">{_text(sample.prompt)}', 'dir="auto">{sample.prompt}'),
    ("<pre>{_text(command)}</pre>", "<pre>{command}</pre>"),
    ("<title>{_text(page.title)}</title>", "<title>{page.title}</title>"),
])  # fmt: skip
def test_a_text_that_is_not_escaped_is_found(old, new, tmp_path):
    with pytest.raises(AssertionError):
        check_nothing_escapes(mutant("soul.report.html", old, new, tmp_path).render)


def test_a_page_needs_nothing_from_elsewhere():
    text = html_page.render(nasty_page())
    elements = Elements(text)
    (policy,) = [attributes["content"] for _, attributes in elements.tags if attributes.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    references = [value for _, attributes in elements.tags for name, value in attributes.items()
                  if name in ("src", "href", "xlink:href", "action", "data")]  # fmt: skip
    assert all(reference.startswith(("#", "data:")) for reference in references)
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "@import" not in text and set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in ids}
    assert "\x1b" not in text and "\ud800" not in text and text.encode()


def test_charts_are_drawn_in_the_colors_of_the_page():
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    text = charts.svg(CHART, "c0")
    root = xml.etree.ElementTree.fromstring(text)
    assert root.get("viewBox") and "width" not in root.attrib and 'aria-label="Probability &lt;of&gt; answers' in text
    assert {f"var(--series-{i})" in text for i in (0, 1)} == {True} and "var(--ink)" in text
    left = {color for color in re.findall(r"#[0-9a-f]{6}\b", text)}
    assert left <= {"#000000"}, left
    assert "forget from 0.7 to 0.1" in charts.described(CHART)
    assert "1e" in charts.svg(RATES, "c1") or "10" in charts.svg(RATES, "c1")


def test_without_matplotlib_there_are_tables(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    elements = Elements(html_page.render(nasty_page()))
    assert "pip install 'soul-kernels[plots]'" in elements.text and "svg" not in {tag for tag, _ in elements.tags}
    assert "0.58" in elements.text and "1e-30" in elements.text


def test_curves_with_the_same_steps_share_a_table():
    chart = Chart("loss", (Series("a", ((1, 1.0), (2, 2.0))), Series("b", ((1, 3.0), (2, 4.0)))))
    first, second, third = curve_tables(Charts((CHART, chart)))
    assert (first.head[1:], second.head[1:]) == (("Probability <of> answers: forget",), ("Probability <of> answers: control",))
    assert third.head == ("step", "loss: a", "loss: b") and third.rows == (("1", "1", "3"), ("2", "2", "4"))
    (rates,) = curve_tables(Charts((RATES,)), rows=4)
    assert [row[0] for row in rates.rows] == ["1", "11", "20", "30"] and rates.head == ("step", "lr")
    assert spaced(3, 10) == [0, 1, 2] and spaced(5, 1) == [0] and spaced(0, 4) == []


def test_markdown_escapes_what_users_wrote():
    text = markdown.render(nasty_page())
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)  # of code, which shows what it holds
    assert "<script" not in outside and "<img" not in outside and not re.search(r"(?<!\\)\]\(http", outside)
    for line in text.splitlines():
        if line.startswith("| ") and NASTY[:3] in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert "````\nsoul ask" in text and "\x1b" not in text
    assert "\n\nProbability &lt;of&gt; answers: aim, keep\n\n" in text
    assert markdown.render(Page("a\n# b", "1. c\n- d", None, (), ())) == "# a ⏎ \\# b\n\n1\\. c ⏎ - d\n"
    assert "0.5" in markdown.render(Page("t", "", None, (Figure("x", "0.5"),), ()))


def test_prose_embeds_its_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    text = html_page.prose("![a <b>](a.png)\n\nText <i>.", tmp_path)
    assert 'alt="a &lt;b&gt;" src="data:image/png;base64,iVBORw==' in text and "<p>Text &lt;i&gt;.</p>" in text


def test_words():
    assert (duration(3.21), duration(75), duration(7320)) == ("3.2 s", "1 min 15 s", "2 h 2 min")
    assert (probability(0.1234), probability(0.00123), probability(0.0)) == ("0.123", "0.0012", "0.000")
    assert (ratio(1, 4), ratio(1, 0)) == ("25%", "?")
    assert cleaned("a\r\nb\x00\ud800\u200d") == "a\nb\ufffd\ufffd\u200d" and one_line(" a\n\tb ") == "a b"
