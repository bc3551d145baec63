"""Pages in a real browser, of the width of a phone and of a desktop, in the light and in the dark.

With ``SOUL_SCREENSHOTS=DIR`` the pictures are kept, for people to look at.
"""

import itertools
import os
import pathlib

import pytest

from soul.report import html
from tests.report.test_pages import nasty_page
from tests.support.browser import Browser, executable

SIZES = {"phone": (390, 844), "small phone": (320, 568), "desktop": (1280, 800)}

# Elements whose box leaves the window, unless one around them scrolls.
OUTSIDE = """[...document.body.querySelectorAll("*")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5) && !e.closest(".scroll");
}).map(e => e.outerHTML.slice(0, 200))"""

# The lowest contrast of a text against what is behind it, as WCAG defines it, and that text.
CONTRAST = """(() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = color => { const [r, g, b] = channels(color).map(linear); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (channels(color)[3] !== 0) return color;
    }
  };
  let lowest = [99, ""];
  for (const e of document.body.querySelectorAll("*")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const pair = [light(e instanceof SVGElement ? style.fill : style.color), light(behind(e))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < lowest[0]) lowest = [contrast, e.outerHTML.slice(0, 120)];
  }
  return lowest;
})()"""

# The size on the screen of the smallest text, in pixels, those of charts included.
SMALLEST = """Math.min(...[...document.body.querySelectorAll("*")]
  .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length)
  .map(e => parseFloat(getComputedStyle(e).fontSize) *
            (e.ownerSVGElement ? e.ownerSVGElement.getScreenCTM().a : 1)))"""


@pytest.fixture(scope="module")
def browser():
    if executable() is None:
        pytest.skip("no Chromium here: make chromium")
    browser = Browser()
    yield browser
    browser.close()


def check_page(browser, path, name):
    """A page fits every window, is readable in both schemes, and neither loads nor runs anything."""
    browser.requests.clear()
    browser.messages.clear()
    backgrounds = {}
    for (size, (width, height)), dark in itertools.product(SIZES.items(), (False, True)):
        browser.show(path, width, height, dark)
        browser.run("document.querySelectorAll('details').forEach(e => e.open = true)")
        assert browser.run("document.documentElement.scrollWidth") <= width, size
        assert browser.run(OUTSIDE) == [], size
        contrast, text = browser.run(CONTRAST)
        assert contrast >= 4.5, (size, dark, contrast, text)
        assert browser.run(SMALLEST) >= (8 if width < 390 else 10), size
        backgrounds[dark] = browser.run("getComputedStyle(document.body).backgroundColor")
        if folder := os.environ.get("SOUL_SCREENSHOTS"):
            browser.picture(pathlib.Path(folder) / f"{name}-{size.replace(' ', '-')}-{'dark' if dark else 'light'}.png")
    assert backgrounds[False] != backgrounds[True]
    assert browser.run("typeof hacked") == "undefined"
    assert {url for url in browser.requests if not url.startswith("data:")} == {
        path.resolve().as_uri()
    } and browser.messages == []


def test_a_page_full_of_traps(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(html.render(nasty_page()), encoding="utf-8")
    check_page(browser, path, "traps")
    assert browser.run("document.querySelectorAll('svg').length") == 2
    assert browser.run("[...document.querySelectorAll('svg')].every(e => e.getBoundingClientRect().height > 100)")


@pytest.mark.parametrize("old, new", [
    (".pairs td { overflow-wrap: anywhere;", ".pairs td { white-space: nowrap;"),  # a path leaves the window
    ("--ink: #e4e7eb", "--ink: #24272b"),  # dark on dark
    ("default-src 'none'; style-src 'unsafe-inline'; img-src data:", "style-src 'unsafe-inline'"),  # a picture is loaded
])  # fmt: skip
def test_faults_are_seen(browser, tmp_path, old, new):
    text = html.render(nasty_page())
    assert old in text
    picture = '<img src="http://127.0.0.1:9/x.png" alt="">' if "img-src" in old else ""
    text = text.replace(old, new).replace("</main>", f"{picture}</main>")
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError):
        check_page(browser, path, "fault")
