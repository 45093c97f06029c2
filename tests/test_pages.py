"""The pages in Chromium: what is clicked, filtered, dragged and printed; narrow, wide and dark."""

from __future__ import annotations

import dataclasses
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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for number, method in enumerate(["full", "local", "h2o", "buzz", "tova", "snapkv", "knorm"]):
        scores, budget = [number / 10, 1.0], None if method == "full" else 0.25
        where = {"task": "needle", "budget": budget, "kv": 10.0 ** (5 + number % 4)}
        hostile = "<script>document.title = 'taken'</script>"
        write_row(folder / "runs", method, scores, prediction=hostile, lengths=[512], **where)
    main([f"runs={folder / 'runs'}", f"out={folder}"])
    return folder / "report.html"


@pytest.mark.parametrize("width", [400, 1200])
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


def column(browser: Browser, number: int) -> list[str]:
    rows = f"[...document.querySelector('{TABLE}').tBodies[0].rows].filter(row => !row.hidden)"
    return browser.run(f"{rows}.map(row => row.cells[{number}].textContent)")


def test_a_table_unfolds_sorts_and_filters(browser, report) -> None:
    browser.open(report)
    browser.click("#costs > summary")
    assert browser.run(OPEN) == 1
    names = browser.run(f"[...document.querySelectorAll('{TABLE} th')].map(one => one.textContent)")
    memory, method = names.index("KV MB"), names.index("method")
    browser.click(f"{TABLE} th:nth-child({memory + 1}) button")
    ascending = [float(text) for text in column(browser, memory)]
    assert ascending == sorted(ascending) and ascending[0] < ascending[-1]
    browser.click(f"{TABLE} th:nth-child({memory + 1}) button")
    assert [float(text) for text in column(browser, memory)] == ascending[::-1]
    browser.type("#other_tasks input", "SNAP 0.25")
    assert column(browser, method) == ["snapkv"]
    assert browser.run("document.querySelector('#other_tasks .tools').innerText") == "1 of 7 rows"


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


@pytest.mark.parametrize("width", [400, 1200])
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
