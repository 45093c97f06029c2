"""The pages in Chromium: what is clicked, filtered, dragged and printed; narrow, wide and dark."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from browser import Browser
from report_runs import write_row
from test_show_kept import POLICIES, look

from evals.report.__main__ import main
from evals.report.kept import page
from evals.run.models import byte_tokenizer
from scripts.show_kept import pieces

pytestmark = pytest.mark.browser
OPEN = "[...document.querySelectorAll('details')].filter(one => one.open).length"
TABLE = "#other_tasks table"
FIGURES = "#other_tasks .charts figure"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


METHODS = ["full", "local", "h2o", "buzz", "tova", "snapkv", "knorm"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, so that their scores are two panels of one figure."""
    folder = tmp_path_factory.mktemp("report")
    hostile = "<script>document.title = 'taken'</script>"
    for model in ({"name": "a", "name_or_path": "x/A-1B"}, {"name": "b", "name_or_path": "x/B-2B"}):
        for number, method in enumerate(METHODS):
            for budget in [None] if method == "full" else [0.25, 0.5]:
                kv = 10.0 ** (5 + number % 4) * (1 + (budget or 0))
                where = {"task": "needle", "budget": budget, "kv": kv, "model": model}
                where |= {"kls": [0.25 * number, 0.5]} if method != "full" else {}
                scores = [number / 10, 1.0]
                write_row(
                    folder / "runs", method, scores, prediction=hostile, lengths=[512], **where
                )
    main([f"runs={folder / 'runs'}", f"out={folder}"])
    return folder / "report.html"


@pytest.mark.parametrize("width", [400, 1300])
@pytest.mark.parametrize("dark", [False, True])
def test_the_report_fits_its_window_and_asks_for_nothing(browser, report, width, dark) -> None:
    browser.open(report, width, dark)
    assert browser.run(OPEN) == 0 and browser.overflow == 0
    browser.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert browser.overflow == 0
    assert browser.errors == [] and browser.requests == [report.resolve().as_uri()]
    assert browser.run("document.title") == "BUZZ bench: report"
    back = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") != dark
    # No mark has the page's own colour, and panels stand below each other where it is narrow.
    marks = "[...document.querySelectorAll('.charts .mark:not(.over)')]"
    colors = set(browser.run(f"{marks}.map(one => getComputedStyle(one).fill)"))
    assert back not in colors and len(colors) == len(METHODS)
    lefts = browser.run(
        f"[...document.querySelectorAll('{FIGURES}')].map(one => one.getBoundingClientRect().left)"
    )
    assert len(lefts) == 2 and (lefts[0] == lefts[1]) == (width == 400)


def test_the_first_screen_is_your_scores(browser, report) -> None:
    """A table, then the figure of it; a phone sees the table's head without scrolling."""
    browser.open(report, 1300)
    tops = browser.run(
        f"['{TABLE}', '{FIGURES}', '#claims'].map("
        "one => document.querySelector(one).getBoundingClientRect().top)"
    )
    assert tops == sorted(tops) and tops[1] < 900
    assert "A-1B (a), B-2B (b)" in browser.run("document.querySelector('h1 + p').innerText")
    assert "25%, 50% of the prompt" in browser.run("document.querySelector('h1 + p').innerText")
    browser.open(report, 400)
    assert browser.run(f"document.querySelector('{TABLE}').getBoundingClientRect().top") < 900


def column(browser: Browser, number: int) -> list[str]:
    rows = f"[...document.querySelector('{TABLE}').tBodies[0].rows].filter(row => !row.hidden)"
    return browser.run(f"{rows}.map(row => row.cells[{number}].textContent)")


def heads(browser: Browser) -> list[str]:
    return browser.run(f"[...document.querySelectorAll('{TABLE} th')].map(one => one.textContent)")


def test_a_table_unfolds_sorts_and_filters(browser, report) -> None:
    browser.open(report)
    browser.click("#costs > summary")
    assert browser.run(OPEN) == 1
    memory, method = heads(browser).index("KV MB"), heads(browser).index("method")
    browser.click(f"{TABLE} th:nth-child({memory + 1}) button")
    ascending = [float(text.replace(",", "")) for text in column(browser, memory)]
    assert ascending == sorted(ascending) and ascending[0] < ascending[-1]
    browser.click(f"{TABLE} th:nth-child({memory + 1}) button")
    again = [float(text.replace(",", "")) for text in column(browser, memory)]
    assert again == ascending[::-1]
    browser.type("#other_tasks [type=search]", "SNAP needle")
    assert column(browser, method) == ["SnapKV"] * 4
    assert "4 of 26 rows" in browser.run("document.querySelector('#other_tasks .tools').innerText")


def points(browser: Browser) -> list[str]:
    """What the figure's points say."""
    marks = f"[...document.querySelectorAll('{FIGURES} .point')]"
    return browser.run(f"{marks}.map(one => one.getAttribute('aria-label'))")


def test_settings_that_only_their_tasks_tell_apart_are_two_panels(browser, tmp_path) -> None:
    for length, score in ((512, 0.2), (1024, 0.9)):
        for method in ("full", "h2o"):
            budget = None if method == "full" else 0.25
            write_row(
                tmp_path, method, [score, 1.0], task="needle", lengths=[length], budget=budget
            )
    main([f"runs={tmp_path}", f"out={tmp_path / 'out'}"])
    browser.open(tmp_path / "out/report.html")
    names = browser.run(
        f"[...document.querySelectorAll('{FIGURES} figcaption')].map(one => one.textContent)"
    )
    assert sorted(names) == ["lengths=[1024]", "lengths=[512]"]
    lines = browser.run(f"document.querySelectorAll('{FIGURES} polyline').length")
    assert lines == 4  # none joins points of two settings


def chip(browser: Browser, text: str) -> None:
    """Clicks the first tool that says so."""
    browser.run(
        "[...document.querySelectorAll('#other_tasks .tools label')]"
        f".find(one => one.textContent.trim() === {text!r}).id = 'chosen'"
    )
    browser.click("#chosen")
    browser.run("document.getElementById('chosen').removeAttribute('id')")


def test_methods_budgets_and_metric_are_chosen(browser, report) -> None:
    """The figure shows what the table does."""
    browser.open(report, 1300)
    assert len(points(browser)) == 26 and len(column(browser, 0)) == 26
    chip(browser, "SnapKV")
    assert len(points(browser)) == 22 and not any("SnapKV" in one for one in points(browser))
    chip(browser, "0.25")  # the full cache has no budget
    assert len(points(browser)) == 12 and sum("full cache" in one for one in points(browser)) == 2
    assert "0.25" not in column(browser, heads(browser).index("budget"))
    browser.run(
        "(one => { one.value = 'KL'; one.dispatchEvent(new Event('change')); })"
        "(document.querySelector('#other_tasks select'))"
    )
    assert len(points(browser)) == 10  # the full cache has none
    assert all(re.search(r"KL: \d\.\d+ \[", one) for one in points(browser))
    wins = heads(browser).index("wins") + 1
    shown = f"getComputedStyle(document.querySelector('{TABLE} th:nth-child({wins})')).display"
    assert browser.run(shown) == "none"
    chip(browser, "all columns")
    assert browser.run(shown) == "table-cell"


def test_a_point_says_its_numbers(browser, report) -> None:
    browser.open(report, 1300)
    browser.run(f"document.querySelector('{FIGURES}').scrollIntoView({{block: 'center'}})")
    start = "one => one.getAttribute('aria-label').startsWith('H2O, budget 0.5')"
    x, y = browser.run(
        "(b => [b.x + b.width / 2, b.y + b.height / 2])"
        f"([...document.querySelectorAll('{FIGURES} .point')].find({start})"
        ".querySelector('.mark').getBoundingClientRect())"
    )
    tip = "document.querySelector('#other_tasks .tip')"
    assert not browser.run(f"{tip}?.checkVisibility()")
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    said = browser.run(f"{tip}.innerText").splitlines()
    assert said[0] == "H2O, budget 0.5" and said[1].startswith("score: 0.600 [")
    assert said[2:] == ["KV cache: 15.00 MB", "n: 2"]
    method = heads(browser).index("method")
    assert browser.run(f"document.querySelector('tr.lit').cells[{method}].textContent") == "H2O"
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert not browser.run(f"{tip}.checkVisibility()")


def test_each_method_has_a_mark_of_its_own(browser, report) -> None:
    """In the list above the figure, in the order of the tables."""
    browser.open(report)
    chips = "[...document.querySelectorAll('#other_tasks .chip:has(svg)')]"
    names = browser.run(f"{chips}.map(one => one.textContent)")
    marks = browser.run(f"{chips}.map(one => one.querySelector('.mark').outerHTML)")
    assert names == ["full cache", "local window", "H2O", "TOVA", "SnapKV", "BUZZ", "Knorm"]
    assert len(set(marks)) == len(METHODS)


def test_what_is_folded_is_printed(browser, report) -> None:
    browser.open(report)
    browser.run("addEventListener('beforeprint', () => { window.opened = " + OPEN + "; })")
    assert browser.pdf().startswith(b"%PDF")
    assert browser.run("window.opened") == browser.run(
        "document.querySelectorAll('details').length"
    )
    assert browser.run(OPEN) == 0  # as it was before


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    found = [look(policy) for policy in POLICIES]
    tokenizer = byte_tokenizer()
    ids = tokenizer("</script><b>bees</b> 🐝 and some more words, and more")["input_ids"]
    found = [dataclasses.replace(one, ids=ids[: len(one.ids)]) for one in found]
    size = found[0].prompt_tokens
    answers = [pieces(tokenizer, one.ids[size:]) for one in found]
    path = tmp_path_factory.mktemp("kept") / "kept.html"
    path.write_text(page(found, pieces(tokenizer, found[0].ids[:size]), answers, "tiny"))
    return path, found


def ready(browser: Browser, path: Path, **how) -> None:
    browser.open(path, **how)
    for _ in range(200):
        if browser.run("document.body.dataset.ready"):
            return
    raise AssertionError(browser.errors)


def put(browser: Browser, name: str, value: int | str) -> None:
    browser.run(
        f"(e => {{ e.value = '{value}'; e.dispatchEvent(new Event('input')); }})"
        f"(document.getElementById('{name}'))"
    )


@pytest.mark.parametrize("width", [400, 1300])
@pytest.mark.parametrize("dark", [False, True])
def test_kept_tokens_fit_the_window(browser, kept, width, dark) -> None:
    ready(browser, kept[0], width=width, dark=dark)
    assert browser.overflow == 0 and browser.errors == []
    assert browser.requests == [kept[0].resolve().as_uri()]
    assert "</script><b>bees</b> 🐝 and" in browser.run("document.querySelector('pre').textContent")


def test_the_slider_shows_each_step_as_the_cache_had_it(browser, kept) -> None:
    path, found = kept
    ready(browser, path)
    steps = browser.run("data.steps")
    for layer, head, rows in (("", "", slice(None)), ("1", "0", slice(2, 3))):
        put(browser, "layer", layer)
        put(browser, "head", head)
        for step in (0, 1, steps):
            put(browser, "step", step)
            for number, one in enumerate(found):
                now = one.prompt_tokens + step
                values = one.dropped[rows, :now]
                held = ((values == 0) | (values > step + 1)).sum(0)
                gone = (values == step + 1).sum(0)
                counts = browser.run(
                    f"[data.methods[{number}].now].map(n => [[...n.held], [...n.gone]])"
                )
                assert counts[0][0][:now] == held.tolist() and not any(counts[0][0][now:])
                assert counts[0][1][:now] == gone.tolist()
                classes = browser.run(
                    f"data.methods[{number}].spans.map(p => [p.start, p.end, p.span.className])"
                )
                for start, end, name in classes:
                    assert ("later" in name) == (start >= now)
                    if end <= now:
                        assert ("gone" in name) == gone[start:end].any()


def test_the_slider_moves_by_keys(browser, kept) -> None:
    ready(browser, kept[0])
    last = browser.run("document.getElementById('at').textContent")
    browser.click("#step")
    for kind in ("rawKeyDown", "keyUp"):
        key = {"key": "Home", "code": "Home", "windowsVirtualKeyCode": 36}
        browser.send("Input.dispatchKeyEvent", type=kind, **key)
    assert browser.run("document.getElementById('at').textContent") == "after the prompt" != last
