"""Pages say what is there: pictures their command, settings their files, tables their numbers."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
import pytest
import test_golden_methods
from hydra.core.override_parser.overrides_parser import OverridesParser
from runs import composed

from buzz import POLICIES
from evals.run import plan
from hydra_plugins.one_pass import OnePassSweeper

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURE = re.compile(r"^!\[[^\]]+\]\(([^)]+)\)\n\n(.*)$", re.MULTILINE)
PICTURES = [(page, *found) for page in PAGES for found in PICTURE.findall(page.read_text())]


def commands(page: str) -> list[list[str]]:
    """Arguments of every `python run.py` on a page, with the shell's variables filled in."""
    text = (ROOT / "docs" / page).read_text()
    code = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    known = {
        name: value.strip('"') for name, value in re.findall(r'^(\w+)=("[^"]*"|\S+)', code, re.M)
    }
    known |= {name: first for name, first in re.findall(r"for (\w+) in (\S+)", code)}
    known.setdefault("DATA", "data")  # tasks.md's word for the reader's folder
    found = re.findall(r"^ *python run\.py (.*?)(?: +&.*| +#.*)?$", code, re.M)
    return [shlex.split(Template(one).substitute(known)) for one in found]


def jobs(arguments: list[str]) -> list[list[list[str]]]:
    """A command's jobs: for each of their rows the overrides."""
    overrides = [one for one in arguments if one != "-m" and "launcher" not in one]
    if named := [one for one in overrides if one.startswith("+sweep=")]:
        typed = {one.partition("=")[0] for one in overrides}
        grid = composed(*named, return_hydra_config=True).hydra.sweeper.params
        overrides += [f"{name}={value}" for name, value in grid.items() if name not in typed]
    parser = OverridesParser.create()
    parsed = parser.parse_overrides([one for one in overrides if one not in named])
    found = []
    for job in OnePassSweeper.split_arguments(parsed, None)[0]:
        *shared, last = job
        each = parser.parse_override(last).value() if last.startswith("rows=") else [[last]]
        found.append([[*shared, *row] for row in each])
    return found


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch):
    """The plan of a row, checked as far as it can be without a model or data."""
    for name in ("check_model", "device_of"):
        monkeypatch.setattr(plan, name, lambda *_: None)

    def complete_model(model: Any) -> None:
        model["max_length"] = model.get("max_length") or 8192

    monkeypatch.setattr(plan, "complete_model", complete_model)
    monkeypatch.setattr(plan, "model_digest", lambda model: model["name"])
    monkeypatch.setattr(plan, "rope_by_length", lambda model: None)
    build = plan.build

    def without_data(section: str, *rest: Any) -> Any:
        found = build(section, *rest)
        if section == "task":
            found.prepare = lambda: None
            vars(found).update(dict.fromkeys(vars(found).keys() & {"data_dir", "data_file"}))
        return found

    monkeypatch.setattr(plan, "build", without_data)
    prefix = "method."
    return lambda overrides: plan.Plan.of(
        composed(*overrides),
        {one.removeprefix(prefix).split("=")[0] for one in overrides if one.startswith(prefix)},
    )


@pytest.fixture
def docs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module


def test_every_image_is_looked_at() -> None:
    texts = [page.read_text() for page in PAGES]
    badges = sum(text.count("[![") for text in texts)
    assert len(PICTURES) == sum(text.count("![") for text in texts) - badges > 10


@pytest.mark.parametrize(("page", "image", "below"), PICTURES, ids=lambda value: str(value)[-40:])
def test_below_a_picture_stands_the_command_that_makes_it(
    page: Path, image: str, below: str, docs
) -> None:
    assert (page.parent / image).is_file()
    made = re.match(r"\*Made by `(make|python(?: -m)?) (\S+?)(?: (\w+))?`.*\*$", below)
    assert made, f"{page.name}: below {image} must stand: *Made by `COMMAND`.*"
    how, what, word = made.groups()
    if how == "make":
        assert re.search(rf"^{what}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif how == "python -m":
        module = importlib.import_module(f"{what}.__main__" if word else what)
        assert not word or f'"{word}"' in inspect.getsource(module)
    else:
        assert (ROOT / what).is_file()
    if what == "docs/pictures.py":
        assert Path(image).stem == word and callable(getattr(docs("pictures"), word))


def parts(page: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n(?=##+ )", page)]


def test_the_configuration_is_of_these_files(docs) -> None:
    """A file that has no part yet gets one by `make docs`."""
    configuration = docs("configuration")
    page = configuration.PAGE.read_text()
    stale = set(parts(page)) - set(parts(configuration.written(page)))
    assert len(parts(page)) > 50 and not stale, "python docs/configuration.py writes it anew"
    shown = {ROOT / path for path in re.findall(r"<!-- configs (\S+) -->", page)}
    files = {path for path in (ROOT / "configs").rglob("*.yaml") if "hydra" not in path.parts}
    assert not {path for path in files if not {path, path.parent} & shown}


def test_docstrings_say_what_each_parameter_of_a_method_is(docs) -> None:
    configuration = docs("configuration")
    for name, method in POLICIES.items():
        fields = {field.name for field in dataclasses.fields(method)}
        assert fields <= configuration.meanings(method).keys(), name
    # A method's own words come before those of the method that it builds on.
    own, built_on = (configuration.meanings(POLICIES[name])["heavy"] for name in ("vatp", "h2o"))
    assert own != built_on and "sink" in own


def test_the_readme_shows_the_committed_results() -> None:
    """Cell by cell."""
    summary = pd.read_csv(ROOT / "results/embedded/fidelity.csv")
    summary = summary[summary.budget == 0.25].set_index(["method", "task"])
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("| `")
    ]
    rows = [row for row in rows if len(row) == 6]
    assert len(rows) > 10
    for name, *cells, held, evictions in rows:
        own = summary.loc[name.strip("`")]
        for task, cell in zip(("nq10", "xsum", "multi_news"), cells, strict=True):
            one = own.loc[task]
            assert cell == f"{one.kl:.2f} [{one.kl_low:.2f}, {one.kl_high:.2f}]"
        three = own.loc[["nq10", "xsum", "multi_news"]]
        assert held == f"{three.held_over_budget.mean():.2f}"
        assert evictions == f"{three.evictions.mean():.0f}"


def test_the_page_on_honeycomb_shows_what_was_measured() -> None:
    """Cell by cell: differences to H2O, and evictions as a part of H2O's."""
    summary = pd.read_csv(ROOT / "results/embedded/honeycomb_check/fidelity.csv")
    summary = summary.set_index(["method", "task", "budget"])
    columns = [(task, budget) for task in ("nq10", "xsum", "multi_news") for budget in (0.1, 0.25)]
    page = (ROOT / "docs/honeycomb.md").read_text().split("## The other half, looked at once")[1]
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    shown = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row[2] != "-"]
    method = ""
    for name, *cells in shown:
        method = name.split("`")[1] if "`" in name else method
        for cell, (task, budget) in zip(cells, columns, strict=True):
            own, rival = summary.loc[method, task, budget], summary.loc["h2o", task, budget]
            if "`" in name:
                ends = [own[f"kl_less_h2o{end}"] for end in ("", "_low", "_high")]
                told = [float(number) for number in re.findall(r"[-+]?\d\.\d{3}", cell)]
                assert told == pytest.approx(ends, abs=6e-4), name  # both are rounded
                assert cell.startswith("**") == (ends[2] < 0)
            else:
                assert cell == f"{own.evictions / rival.evictions:.0%}".replace("%", " %"), method
    assert len(shown) == 8


def test_published_numbers_have_commands_that_can_be_run(planned) -> None:
    """Each row of a table is a row of the command above it, and says that it was not run."""
    page = (ROOT / "docs/verified.md").read_text().split("## Published numbers")[1]
    made = [jobs(command) for command in commands("verified.md")]
    assert [[len(job) for job in one] for one in made] == [[2], [1], [5], [1], [1]]
    pythia, llama, sinks, longbench, ruler = ([planned(row) for row in job] for (job,) in made)
    for one, sink, window in [(pythia[0], 4, 1020), (llama[0], 4, 1020), (sinks[1], 1, 4095)]:
        policy, held = one.fit(8192)
        assert (policy.sink, policy.window, held) == (sink, window, sink + window)
    assert pythia[1].fit(8192)[0].window == 1024
    assert longbench[0].policy.capacity == 128 and len(longbench[0].task.subsets) == 6
    assert ruler[0].task.samples * len(ruler[0].task.subtasks or range(13)) == 650
    tables = [line for line in page.splitlines() if line.startswith("| ") and "bar" not in line]
    told = [line for line in tables if not line.startswith("| ---")]
    assert len(told) == 4 + 5 + 6 + 1
    assert all("not run |" in line or "refused: " in line for line in told)


def test_what_was_verified_is_asserted_by_a_test_of_that_name() -> None:
    page = (ROOT / "docs/verified.md").read_text()
    named = re.findall(r"`pytest (\S+)::(\w+)`", page)
    assert len(named) > 12 and page.count("pytest ") == len(named)
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), name
    golden = ROOT / "tests/golden"
    traces, methods, longbench, verdicts = (
        json.loads((golden / f"{name}.json").read_text())
        for name in ("eviction_traces", "methods", "longbench_scores", "math_scores")
    )
    steps = sum(len(case["chunks"]) for case in traces)
    counts = [f"{len(traces)} recordings, {steps:,} steps", f"{len(longbench)} predictions"]
    counts += [f"{len(verdicts)} answers", f"{18 * len(test_golden_methods.POLICIES)} recordings"]
    assert not [count for count in counts if count not in page]
    by_method: dict[str, set[str]] = {}
    for name, record in methods.items():
        own = by_method.setdefault(re.sub("_(grouped|max|mean|unsorted)$", "", name), set())
        own |= {source["repository"] for source in record["sources"]}
    repositories = set().union(*by_method.values())
    assert f"{len(by_method)} methods of {len(repositories)} repositories" in page
    presses = {name for name, own in by_method.items() if "NVIDIA/kvpress" in own} - {"h2o"}
    told = page.split("kvpress's own code made the recordings of")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", told)) == presses


def test_the_hours_are_of_the_rows_that_the_commands_have(planned) -> None:
    page = (ROOT / "docs/reproduce.md").read_text()
    found, alone = [], 0
    for command in commands("reproduce.md"):
        made = jobs(command)
        assert len(made) == (4 if any("0/4,1/4" in one for one in command) else 1)
        assert planned(made[-1][-1]).folder
        asked = [" ".join(row) for row in made[-1]]
        scaled = [row for row in asked if re.search(r"logn_base: *\d", row)]
        alone += len(scaled)
        # The full cache is one row; a stride of 2 keeps everything, which meets no budget.
        unlike = {*asked} - {*scaled}
        found.append(1 + sum("method=full" not in x and "stride=2" not in x for x in unlike))
    steps, ablations = found[6:20], found[20:26]  # after the pilot, and before four cards
    table = re.findall(r"^\| (\d)\. .*\| (\d+)(?:, alone)? \| [\d.]+ \| [\d.]+ \|$", page, re.M)
    told = {step: {int(n) for at, n in table if at == step} for step, _ in table}
    assert told == {"1": {*steps[:5]}, "2": {*steps[5:9]}, "3": {steps[9]}, "4": {*steps[10:]}} | {
        "5": {alone + sum(ablations) - 5}  # the full cache is there after the first
    }
    first, *others = ablations
    assert f"(R = {', '.join(map(str, [first, *(one - 1 for one in others)]))})" in page


OTHER_TESTS = {"recipes.md", "reproduce.md", "verified.md"}  # compose the commands of these


@pytest.mark.parametrize("name", [page.name for page in PAGES if page.name not in OTHER_TESTS])
def test_commands_can_be_run(name: str, planned) -> None:
    """By the last row of each, but for searches and suites, which are no grids."""
    skipped = {"...", "task=NAME", "task=suite", "+sweep=optuna", "+sweep=pareto"}
    made = commands(f"../{name}" if name == "README.md" else name)
    assert name != "README.md" or len(made) > 4
    for command in made:
        if not skipped & {*command}:
            planned(jobs(command)[-1][-1])


def anchors(page: Path) -> set[str]:
    """What headings of a page can be linked by."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    plain = (re.sub(r"\[([^\]]+)\]\([^)]*\)|`", r"\1", title) for title in titles)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", one).strip().lower()) for one in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text())
    for file, _, anchor in (link.partition("#") for link in links):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), file
        if anchor and "--8<--" not in target.read_text():  # which takes another page in
            assert anchor in anchors(target), f"{file}#{anchor}"


def test_one_version_and_date_everywhere() -> None:
    pyproject, citation, changes = (
        (ROOT / name).read_text() for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")
    )
    version, day = re.search(r"^## (\S+) \(([\d-]+)\)$", changes, re.M).groups()
    assert f'\nversion = "{version}"\n' in pyproject
    assert f"\nversion: {version}\ndate-released: {day}\n" in citation


def test_agents_are_told_of_files_that_are_there() -> None:
    page = (ROOT / "AGENTS.md").read_text()
    paths = re.findall(r"\b(?:docs|tests|baselines|buzz|evals|configs)/[\w/.]*|\b[A-Z]+\.md", page)
    assert len(paths) > 10 and not [path for path in paths if not (ROOT / path).exists()]
