"""The report in headless Chromium, at three widths, light and dark: nothing runs off the page, nothing overlaps, all
words are readable."""

import json

import pytest
from browser import Page, chromium
from run_folder import MEASURED, RANKS
from test_gate_rows import FOUND
from tolerances import CONTRAST

from nemo_minitron.export import write_report

pytestmark = pytest.mark.skipif(chromium() is None, reason="Chromium is not installed here (Debian: chromium)")
WIDTHS = (390, 768, 1280)
BEYOND = """
[...document.querySelectorAll("body *")]
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(e => e.tagName + "." + e.getAttribute("class")).concat(
    document.documentElement.scrollWidth > document.documentElement.clientWidth ? ["the page scrolls sideways"] : [])
"""
OVERLAPS = """
[...document.querySelectorAll(".tiles"), ...document.querySelectorAll("svg")].flatMap(box => {
  const parts = [...box.querySelectorAll(box.tagName == "svg" ? "text" : ".tile")]
    .map(e => [e, e.getBoundingClientRect()]).filter(([e, r]) => r.width);
  return parts.flatMap(([e, r], i) => parts.slice(i + 1).filter(([f, s]) =>
    Math.min(r.right, s.right) - Math.max(r.left, s.left) > 1
      && Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > 3
  ).map(([f, s]) => e.textContent + " / " + f.textContent));
})
"""
BROKEN = """
[...document.querySelectorAll("td, th, .tile span, p, figcaption")].flatMap(e => [...e.childNodes])
  .filter(n => n.nodeType == 3 && n.parentElement.getClientRects().length).flatMap(n =>
    [...n.textContent.matchAll(/(?<!\\S)[A-Za-z]{2,10}(?!\\S)/g)].filter(word => {
      const range = document.createRange();
      range.setStart(n, word.index);
      range.setEnd(n, word.index + word[0].length);
      return new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1;
    }).map(word => word[0]))
"""
CONTRASTS = """
(() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = numbers(getComputedStyle(e).backgroundColor);
      if (c.length == 3 || c[3]) return c;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("body *")].filter(e => e.getClientRects().length
      && [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())).map(e => {
    const style = getComputedStyle(e), svg = e.namespaceURI.endsWith("svg");
    const [a, b] = [light(numbers(svg ? style.fill : style.color)), light(behind(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.textContent.trim().slice(0, 40)];
  });
})()
"""


@pytest.fixture
def browser(run):
    (run / "search").mkdir()
    for name, rows in (("measured", MEASURED), ("ranks", RANKS)):
        (run / "search" / f"{name}.json").write_text(json.dumps(rows))
    with Page(write_report(run)) as page:
        yield page


def test_the_report_fits_and_is_readable(browser):
    for width in WIDTHS:
        for dark in (False, True):
            browser.show(width, dark=dark)
            assert browser.run(BEYOND) == [], width
            assert browser.run(OVERLAPS) == [], width
            contrasts = browser.run(CONTRASTS)
            assert len(contrasts) > 100
            assert min(contrasts)[0] >= CONTRAST, (width, dark, min(contrasts))


def test_no_short_word_is_broken(run):
    """At 768 px the table of numbers is as narrow as it gets, and had `corpu s`; the table of gates had `pass ed`."""
    numbers = json.loads((run / "numbers.json").read_text())
    sized = {"corpus": "corpus", "parameters": 134_515_008, "bits_per_byte": 1.5, "perplexity": 24_653.0}
    (run / "numbers.json").write_text(json.dumps([row | sized for row in numbers]))
    long = "the loss is smaller by 4.8790 nats, standard error 0.3334; the cut costs 0.9999"
    gates = [gate | {"name": "ranked before first units", "note": long} for gate in FOUND["gates"]]
    (run / "gates.json").write_text(json.dumps(FOUND | {"gates": gates}))
    with Page(write_report(run)) as browser:
        for width in WIDTHS:
            browser.show(width)
            assert browser.run(BROKEN) == [], width
            assert browser.run(BEYOND) == [], width


def test_the_colours_follow_the_scheme_and_paper_is_white(browser):
    page = "getComputedStyle(document.body).backgroundColor"
    seen = []
    for dark, medium in ((False, "screen"), (True, "screen"), (True, "print")):
        browser.show(1280, dark=dark, medium=medium)
        seen.append(browser.run(page))
    assert seen == ["rgb(255, 255, 255)", "rgb(18, 23, 30)", "rgb(255, 255, 255)"]
    assert browser.run("[...document.querySelectorAll('.narrow')].some(e => e.getClientRects().length)") is False
