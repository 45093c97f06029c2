"""Run folders that are run, killed, edited, copied, sharded and resumed in any order.

What is asserted is worked out here from the files alone, and from what the data were when each
folder's command was last started; nothing of the harness's own reading is used for it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from omegaconf import OmegaConf
from rich.console import Console
from runs import MODEL, ROOT, stub_generate, write_lines

import evals.run.comparison
import evals.run.runner
from buzz import ConfigError
from evals.report.terminal import Setting, tables
from evals.results.reading import read_runs, read_summary
from evals.results.records import RunFolder
from evals.results.runs import Run
from evals.run.forced import Fidelity
from evals.tasks.text import rouge

METHODS = ("full", "local")
SHARDS = (None, "0/2", "1/2", "0/3")
DEVICES = ("auto", "cpu")  # which are one machine, and two folders
WORDS = ("bees", "wax", "comb", "hive", "dance", "sing")
GARBAGE = ("", "{", "[]", "{}", "null", '{"id": "0"}', '{"status": "complete"}')

Variant = tuple[str, str | None, str]
Edit = tuple[str, int, str]
VARIANTS = st.tuples(st.sampled_from(METHODS), st.sampled_from(SHARDS), st.sampled_from(DEVICES))
SEVERAL = st.lists(st.sampled_from(SHARDS), min_size=2, max_size=4, unique=True)
REFERENCES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=2).map(" ".join)
PART = st.floats(0, 1, exclude_max=True)
DEATHS = st.tuples(st.integers(0, 7), PART)
HOW = ("reference", "all references", "shorten", "lengthen", "text")
EDITS = st.tuples(st.sampled_from(HOW), st.integers(0, 5), REFERENCES)


class Killed(BaseException):
    """As by SIGKILL: nothing may catch it."""


def answer(prompt: str) -> str:
    """Two words that the text decides."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return f"{WORDS[digest[0] % len(WORDS)]} {WORDS[digest[1] % len(WORDS)]}"


def prompt_of(number: int, version: int) -> str:
    return f"text {number} of version {version}"


def strictly(text: str) -> Any:
    """JSON as the standard has it."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


class Folders(RuleBasedStateMachine):
    """
    Attributes:
        data: of each sample the version of its text and its reference.
        started: by folder, the data when its command was last started.
        finished: folders whose last command came to its end and that nobody touched since.
        variants: by folder, what its command was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.runs, self.file = self.root / "runs", self.root / "data.jsonl"
        self.runs.mkdir()
        self.patch = pytest.MonkeyPatch()
        self.asked = stub_generate(self.patch, lambda prompt: answer(prompt.split("\n")[0]))
        self.patch.setattr("evals.results.environment._git_revision", lambda: "abc")
        self.patch.setattr(evals.run.comparison, "compare_with_full", compared)
        self.data: list[tuple[int, str]] = []
        self.started: dict[str, list[tuple[int, str]]] = {}
        self.finished: set[str] = set()
        self.variants: dict[str, Variant] = {}
        self.copies = 0

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.root)

    # --- the data ---------------------------------------------------------------------------------

    @initialize(references=st.lists(REFERENCES, min_size=4, max_size=5))
    def write(self, references: list[str]) -> None:
        self.data = [(0, reference) for reference in references]
        self._save()

    @rule(edit=EDITS)
    def edit_data(self, edit: Edit) -> None:
        how, number, reference = edit
        number %= len(self.data)
        version, old = self.data[number]
        if how == "reference":
            self.data[number] = (version, reference)
        elif how == "all references":
            self.data = [(one, reference) for one, _ in self.data]
        elif how == "text":
            self.data[number] = (1 - version, old)
        elif how == "shorten" and len(self.data) > 3:  # so that no shard is empty
            self.data.pop()
        elif how == "lengthen" and len(self.data) < 6:
            self.data.append((0, reference))
        self._save()

    def _save(self) -> None:
        rows = enumerate(self.data)
        write_lines(
            self.file, [{"article": prompt_of(i, v), "summary": ref} for i, (v, ref) in rows]
        )

    # --- commands ---------------------------------------------------------------------------------

    @rule(variant=VARIANTS, kl=st.booleans())
    def run(self, variant: Variant, kl: bool) -> None:
        self._run(variant, kl)

    @rule(method=st.sampled_from(METHODS), shards=SEVERAL, edit=st.none() | EDITS)
    def run_several(self, method: str, shards: list[str | None], edit: Edit | None) -> None:
        for shard in shards:
            self._run((method, shard, "auto"), kl=False)
            if edit and shard == shards[0]:
                self.edit_data(edit)

    @precondition(lambda self: self.variants)
    @rule(number=st.integers(0, 9), edit=st.none() | EDITS, dies=st.none() | DEATHS)
    def run_again(self, number: int, edit: Edit | None, dies: tuple[int, float] | None) -> None:
        if edit:
            self.edit_data(edit)
        variant = self.variants[self._any(number).name]
        if dies:
            self._kill(variant, *dies)
        else:
            self._run(variant, kl=number % 2 == 0)

    @precondition(lambda self: self.variants)
    @rule(edit=EDITS)
    def run_everything_again(self, edit: Edit) -> None:
        """After which no folder is in doubt: copies go, as what can no longer be gone on with."""
        self.edit_data(edit)
        for name, variant in list(self.variants.items()):
            folder = self.runs / name
            trouble = self._own_trouble(folder) or self._other_texts(folder, variant)
            if name.startswith("copy") or trouble:
                self._remove(folder)
            else:
                self._run(variant, kl=False)

    def _remove(self, folder: Path) -> None:
        shutil.rmtree(folder)
        self.finished.discard(folder.name)
        for known in (self.started, self.variants):
            known.pop(folder.name, None)

    def _run(self, variant: Variant, kl: bool) -> None:
        folder = self._folder(variant)
        before = self._lines(folder)
        broken = self._own_trouble(folder)
        other_texts = self._other_texts(folder, variant)
        self.asked.clear()
        try:
            assert self._go(variant, kl) == folder
        except ConfigError as error:
            assert "\n" not in str(error)
            expected = "kl" if kl and error.field == "kl" else "output"
            assert error.field == expected
            assert expected == "kl" or broken or other_texts
            assert self.asked == [] and self._lines(folder)[: len(before)] == before
            return
        assert not broken and not other_texts
        self._has_run(folder, variant)
        done = {r["id"] for r in map(strictly, before) if r["status"] == "ok"}
        due = [i for i in self._ids(variant, self.data) if str(i) not in done]
        warm_up = bool(due)
        assert len(self.asked) == len(due) + warm_up  # what is there is not computed again
        assert self._lines(folder)[: len(before)] == before  # and nothing is lost
        summary = strictly((folder / "summary.json").read_text())
        own = self._belonging(folder)
        assert summary["n"] == len(own) == len(self._ids(variant, self.data))
        assert summary["score"] == pytest.approx(self._score(own.values()))
        everything = {strictly(line)["id"] for line in self._lines(folder)}
        assert summary["stale"] == len(everything) - len(own)
        assert read_summary(folder)["status"] == "complete"

    @rule(variant=VARIANTS, dies=DEATHS)
    def kill(self, variant: Variant, dies: tuple[int, float]) -> None:
        self._kill(variant, *dies)

    def _kill(self, variant: Variant, after: int, part: float) -> None:
        """Ends a command at its n-th write to the disk, of which a part is done."""
        folder = self._folder(variant)
        left = [after]

        def dying(call: Callable[..., None], torn: Callable[..., None]) -> Callable[..., None]:
            def act(files: RunFolder, *arguments: Any) -> None:
                left[0] -= 1
                if left[0] < 0:
                    torn(files, *arguments)
                    raise Killed
                call(files, *arguments)
                if arguments[0] == "prompts.json":
                    self._has_started(folder, variant)

            return act

        def half_a_line(files: RunFolder, record: dict, name: str = "samples.jsonl") -> None:
            line = json.dumps(record).encode() + b"\n"
            with open(files.path / name, "ab") as file:
                file.write(line[: int(part * len(line))])

        def half_a_file(files: RunFolder, name: str, content: Any) -> None:
            (files.path / f".{name}").write_text("half")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunFolder, "append", dying(RunFolder.append, half_a_line))
            patch.setattr(RunFolder, "write", dying(RunFolder.write, half_a_file))
            try:
                self._go(variant, kl=False)
            except Killed:
                self.finished.discard(folder.name)
                if (folder / "config.yaml").exists():
                    self.variants[folder.name] = variant
            except ConfigError:
                assert self._own_trouble(folder) or self._other_texts(folder, variant)
            else:
                self._has_run(folder, variant)

    def _go(self, variant: Variant, kl: bool) -> Path:
        return evals.run.runner.run(self._config(variant, kl))

    def _config(self, variant: Variant, kl: bool) -> Any:
        method, shard, device = variant
        cfg = copy.deepcopy(composed(method))
        cfg.task.data_file, cfg.task.shard = str(self.file), shard
        cfg.output, cfg.device, cfg.kl = str(self.runs), device, kl
        return cfg

    def _folder(self, variant: Variant) -> Path:
        return evals.run.runner.Plan.of(self._config(variant, False)).folder

    def _has_started(self, folder: Path, variant: Variant) -> None:
        self.started[folder.name] = list(self.data)
        self.variants[folder.name] = variant

    def _has_run(self, folder: Path, variant: Variant) -> None:
        self._has_started(folder, variant)
        self.finished.add(folder.name)

    # --- hands ------------------------------------------------------------------------------------

    def _any(self, number: int) -> Path:
        folders = sorted(path for path in self.runs.glob("*/") if path.name in self.variants)
        return folders[number % len(folders)]

    @precondition(lambda self: self.variants)
    @rule(number=st.integers(0, 9))
    def copy_folder(self, number: int) -> None:
        folder = self._any(number)
        self.copies += 1
        name = f"copy {self.copies}"
        shutil.copytree(folder, self.runs / name)
        self.variants[name] = self.variants[folder.name]
        if folder.name in self.started:
            self.started[name] = list(self.started[folder.name])
        if folder.name in self.finished:
            self.finished.add(name)

    @precondition(lambda self: self.variants)
    @rule(
        number=st.integers(0, 9),
        how=st.sampled_from(["score", "score", "NaN", "{}", "truncate", "garbage", "remove"]),
        name=st.sampled_from(["summary.json", "config.yaml", "prompts.json", "environment.json"]),
        content=st.sampled_from(GARBAGE),
        line=st.integers(0, 9),
        part=PART,
    )
    def damage(
        self, number: int, how: str, name: str, content: str, line: int, part: float
    ) -> None:
        folder = self._any(number)
        samples = folder / "samples.jsonl"
        self.finished.discard(folder.name)
        if how == "remove":
            self._remove(folder)
        elif how == "garbage" and (folder / name).exists():
            (folder / name).write_text(content)
        elif how == "truncate" and samples.exists():
            whole = samples.read_bytes()
            samples.write_bytes(whole[: int(part * len(whole))])
        elif lines := self._lines(folder):
            self._edit(samples, lines, line % len(lines), how)

    def _edit(self, path: Path, lines: list[str], line: int, how: str) -> None:
        if how == "{}":
            lines[line] = how
        elif is_record(lines[line]):
            record = strictly(lines[line])
            record["scores"] |= {"rougeL": math.nan if how == "NaN" else 77.0}
            lines[line] = json.dumps(record | {"edited": True})
        path.write_text("".join(f"{one}\n" for one in lines))

    @precondition(lambda self: self.variants)
    @rule(number=st.integers(0, 9))
    def remove_bad_lines(self, number: int) -> None:
        """As the remedy says."""
        path = self._any(number) / "samples.jsonl"
        if path.exists():
            good = [line for line in path.read_text().splitlines() if is_record(line)]
            path.write_text("".join(f"{line}\n" for line in good))
            self.finished.discard(path.parent.name)

    # --- what must hold ---------------------------------------------------------------------------

    @invariant()
    def every_table_is_a_fresh_computation_or_names_the_folder(self) -> None:
        folders = sorted(path.parent for path in self.runs.glob("*/config.yaml"))
        if not folders:
            return
        runs = read_runs(self.runs)
        assert sorted(path for run in runs for path in run.folders) == folders
        for run in runs:
            self._check(run)
        self._check_terminal(folders, runs)
        fine: dict[str, list[Path]] = {}
        for folder in folders:
            method = self.variants.get(folder.name, "?")[0]
            fine.setdefault(method, []).append(folder)
        for alike in fine.values():
            if self._must_be_shown(alike):
                (run,) = [run for run in runs if alike[0] in run.folders]
                assert run.scored and run.status == "complete", run.status

    def _check(self, run: Run) -> None:
        if not run.scored:
            assert run.status != "complete" and run.status.strip()
            if run.problem:
                assert run.records == [] and any(str(path) in run.problem for path in run.folders)
            return
        expected: dict[str, dict] = {}
        for folder in run.folders:
            for name, record in self._belonging(folder).items():
                one = expected.setdefault(name, record)
                for key in ("prediction", "prompt_sha256", "references", "scores"):
                    assert one[key] == record[key]
        assert {record["id"] for record in run.records} == expected.keys()
        assert len(run.records) == len(expected)
        data = self.started[run.folders[0].name]
        assert len(expected) == len(data)  # all samples, each once
        assert run.score() == pytest.approx(self._score(expected.values()))
        for name, record in expected.items():
            version, reference = data[int(name)]
            text = answer(prompt_of(int(name), version))
            assert record["prediction"] == text
            if not record.get("edited"):
                assert record["scores"]["rougeL"] == rouge(reference, text)["rougeL"]

    def _check_terminal(self, folders: list[Path], runs: list[Run]) -> None:
        scored = {run.folders: run for run in runs if run.scored}
        try:
            parts = tables(folders)
        except ConfigError as error:
            assert not scored and "\n" not in str(error)
            return
        console = Console(width=10_000)
        with console.capture() as capture:
            for part in parts:
                console.print(part, highlight=False)
        text = capture.get()
        shown = Setting.of(folders)
        rows = [pair for s in shown for pair in zip(s.runs, s.rows, strict=True)]
        assert {run.folders for run, _ in rows} == scored.keys()
        for run, row in rows:
            assert row["n"] == len(scored[run.folders].ran)
            assert row["score"] == pytest.approx(scored[run.folders].score())
        for run in runs:
            if not run.scored:
                assert f"not shown: {run.places}: {run.status}" in text
        for setting in shown:
            full = setting.reference
            for run, against in zip(setting.runs, setting.against_full(), strict=True):
                if full is None or against is None:
                    continue
                theirs = {r["id"]: r for r in full.records}
                both = [r for r in run.records if same(r, theirs.get(r["id"]))]
                assert against["n"] == len(both)
                if both:
                    difference = self._score(both) - self._score([theirs[r["id"]] for r in both])
                    assert against["difference"] == pytest.approx(difference)

    def _must_be_shown(self, folders: list[Path]) -> bool:
        """Whether folders of one method leave no doubt: all finished, of the same data, and all."""
        if any(folder.name not in self.finished for folder in folders):
            return False
        if any(self.started[f.name] != self.started[folders[0].name] for f in folders):
            return False
        records = [pair for folder in folders for pair in self._belonging(folder).items()]
        if any("edited" in record for _, record in records):  # and may contradict its copy
            return False
        return len({name for name, _ in records}) == len(self.started[folders[0].name])

    # --- the files, read plainly ------------------------------------------------------------------

    def _lines(self, folder: Path) -> list[str]:
        path = folder / "samples.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and not path.read_text().endswith("\n") and not is_object(lines[-1]):
            lines.pop()  # torn
        return lines

    def _ids(self, variant: Variant, data: list) -> list[int]:
        start, step = map(int, (variant[1] or "0/1").split("/"))
        return list(range(len(data)))[start::step]

    def _belonging(self, folder: Path) -> dict[str, dict]:
        """Of each sample that the folder's command was of the last record with its references."""
        data, found = self.started[folder.name], {}
        ids = {str(i) for i in self._ids(self.variants[folder.name], data)}
        for record in map(strictly, self._lines(folder)):
            if record["id"] in ids:
                found[record["id"]] = record
        return {
            name: record
            for name, record in found.items()
            if record["references"] == [data[int(name)][1]] and record["status"] == "ok"
        }

    def _score(self, records: Any) -> float:
        scores = [record["scores"]["rougeL"] for record in records]
        return sum(scores) / len(scores)

    def _own_trouble(self, folder: Path) -> bool:
        """Whether a file that the command would add to is broken."""
        for name in ("samples.jsonl", "fidelity.jsonl"):
            path = folder / name
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            if lines and not lines[-1].endswith("\n") and not is_object(lines[-1]):
                lines.pop()
            if not all(is_record(line) for line in lines):
                return True
        path = folder / "environment.json"
        if not path.exists():
            return False
        return path.read_text() in ("", "{", "null")

    def _other_texts(self, folder: Path, variant: Variant) -> bool:
        """Whether a record that is there is of another text than the data now have."""
        if self._own_trouble(folder):
            return False
        last = {}
        for record in map(strictly, self._lines(folder)):
            last[record["id"]] = record
        return any(
            last[str(i)]["prediction"] != answer(prompt_of(i, self.data[i][0]))
            for i in self._ids(variant, self.data)
            if str(i) in last
        )


def same(record: dict, other: dict | None) -> bool:
    keys = ("prompt_sha256", "references")
    return other is not None and all(record[key] == other[key] for key in keys)


def is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def is_record(line: str) -> bool:
    try:
        record = strictly(line)
    except ValueError:
        return False
    return isinstance(record, dict) and "id" in record


def compared(model: Any, prompts: list, answers: list, *rest: Any) -> list[Fidelity]:
    return [Fidelity(len(prompt) / 100, 0.5) for prompt in prompts]


_composed: dict[str, Any] = {}


def composed(method: str) -> Any:
    if method not in _composed:
        own = ["method.window=40"] if method == "local" else []
        task = ["task=xsum", "task.data_file=x", "task.max_new_tokens=3", "output=x"]
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            _composed[method] = compose("config", [*MODEL, *task, f"method={method}", *own])
        OmegaConf.set_struct(_composed[method], False)
    return _composed[method]


def run(**options: Any) -> None:
    run_state_machine_as_test(Folders, settings=settings(deadline=None, **options))


def test_the_same_orders_in_every_run() -> None:
    run(max_examples=30, stateful_step_count=15, derandomize=True, database=None)


@pytest.mark.slow
def test_other_orders_in_every_run() -> None:
    run(max_examples=300, stateful_step_count=40, print_blob=True)
