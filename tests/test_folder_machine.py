"""Settings that are run, killed, edited, sharded and resumed in any order.

What is asserted is worked out here from the files alone, and from what the data were when each
command was last started; nothing of the harness's own reading is used for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
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
from runs import MODEL, composed, run, stub_generate, write_lines

import evals.run.runner
from buzz import ConfigError
from evals.results.folder import SettingFolder, sha256
from evals.results.frame import NOT_RUN, load
from evals.tasks.text import rouge

METHODS = ("full", "local", "h2o")
SHARDS = (None, "0/2", "1/2")
WORDS = ("bees", "wax", "comb", "hive", "dance", "sing")
GARBAGE = ("", "{", "[]", "{}", "null", '{"id": "0"}')

Variant = tuple[str, str | None]
VARIANTS = st.tuples(st.sampled_from(METHODS), st.sampled_from(SHARDS))
REFERENCES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=2).map(" ".join)
DEATHS = st.tuples(st.integers(0, 9), st.booleans())


class Killed(BaseException):
    """As by SIGKILL: nothing may catch it."""


def answer(prompt: str) -> str:
    """A word that the text decides, and the text's version."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return f"{WORDS[digest[0] % len(WORDS)]} {prompt.split()[-1]}"


def prompt_of(number: int, version: int) -> str:
    return f"text {number} of version {version}"


def one_pass(*given: Any, own: bool, kl: bool, chunk: int | None) -> list[list[dict[str, Any]]]:
    """Stands for a pass of several: answers as :func:`answer`, distances by the full cache's."""
    _, tokenizer, prompts, policies, _, _, references = given
    found = []
    for prompt, reference in zip(prompts, references, strict=True):
        said = answer(prompt.sample.prompt.split("\n")[0])
        tokens = reference or tokenizer(said)["input_ids"]
        near = {"kl_to_full": len(tokens) / 10, "reference_sha256": sha256(tokens)}
        bytes_of = dict.fromkeys(("kv_nbytes_mean", "kv_nbytes_peak"), 1.0)
        entries = dict.fromkeys(("kv_entries_mean", "kv_entries_peak"), 1.0)
        made = {"prediction": said, "tokens": tokens, "timed": False, **bytes_of, **entries}
        made["generated_tokens"] = len(tokens)
        found.append([(made if own else {}) | (near if kl else {}) for _ in policies[0]])
    return found


class Folders(RuleBasedStateMachine):
    """
    Attributes:
        data: of each sample the version of its text and its reference.
        started: the data when a command was last started that got as far as writing.
        runs_of: by file, the data when it was last run to its end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.file = self.root / "data.jsonl"
        self.patch = pytest.MonkeyPatch()
        self.asked = stub_generate(self.patch, lambda prompt: answer(prompt.split("\n")[0]))
        self.patch.setattr("evals.results.environment._git_revision", lambda: "abc")
        self.patch.setattr(evals.run.runner, "answer_together", one_pass)
        self.data: list[tuple[int, str]] = []
        self.broken: set[str] = set()

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.root)

    @initialize(references=st.lists(REFERENCES, min_size=4, max_size=5))
    def write(self, references: list[str]) -> None:
        self.data = [(0, reference) for reference in references]
        self._save()

    @rule(
        how=st.sampled_from(("reference", "all references", "shorten", "lengthen", "text")),
        number=st.integers(0, 5),
        reference=REFERENCES,
    )
    def edit_data(self, how: str, number: int, reference: str) -> None:
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
        rows = [
            {"article": prompt_of(i, version), "summary": reference}
            for i, (version, reference) in enumerate(self.data)
        ]
        write_lines(self.file, rows)

    # --- commands ---------------------------------------------------------------------------------

    @rule(variant=VARIANTS, kl=st.booleans())
    def run(self, variant: Variant, kl: bool) -> None:
        """Nothing that is there is computed again or lost, and nothing that is due is missing."""
        method, shard = variant
        due = [i for i in range(len(self.data)) if shard is None or i % 2 == int(shard[0])]
        files = [self._file(name, shard) for name in dict.fromkeys(("full", method))]
        before = {file: self._records(file) for file in files}
        lines = {file: self._lines(file) for file in files}
        other_texts = any(
            str(i) in known and known[str(i)]["meta_version"] != self.data[i][0]
            for known in before.values()
            for i in due
        )
        broken = any(file.name in self.broken for file in files)
        self.asked.clear()
        try:
            assert self._go(variant, kl).name == files[-1].name
        except ConfigError as error:
            assert "\n" not in str(error) and error.field == "output"
            assert (other_texts or broken) and not self.asked
            assert {file: self._lines(file)[: len(lines[file])] for file in files} == lines
            return
        assert not other_texts and not broken
        missing = sum(str(i) not in known for known in before.values() for i in due)
        warm_ups = sum(any(str(i) not in known for i in due) for known in before.values())
        assert kl or len(self.asked) == missing + warm_ups
        known, files = files, [self._file(name, shard) for name in dict.fromkeys(("full", method))]
        for file, before_it in zip(files, known, strict=True):
            assert self._lines(file)[: len(lines[before_it])] == lines[before_it]
            now = self._records(file)
            for i in due:
                expected = rouge(self.data[i][1], answer(prompt_of(i, self.data[i][0])))
                assert now[str(i)]["scores"]["rougeL"] == pytest.approx(expected["rougeL"])
        if kl and method != "full":
            full, own = (self._records(file) for file in files)
            for i in due:
                assert own[str(i)]["reference_sha256"] == sha256(full[str(i)]["tokens"])

    @rule(variant=VARIANTS, dies=DEATHS)
    def kill(self, variant: Variant, dies: tuple[int, bool]) -> None:
        """Ends a command at its n-th write to the disk, of which half may be done."""
        left, torn = dies

        def dying(folder: SettingFolder, file: Path, record: dict[str, Any]) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                if torn:
                    line = json.dumps(record).encode()
                    with open(file, "ab") as lines:
                        lines.write(line[: len(line) // 2])
                raise Killed
            append(folder, file, record)

        append = SettingFolder.append
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SettingFolder, "append", dying)
            with contextlib.suppress(Killed, ConfigError):
                self._go(variant, kl=False)

    @precondition(lambda self: self._files())
    @rule(number=st.integers(0, 9), garbage=st.sampled_from(GARBAGE))
    def break_a_line(self, number: int, garbage: str) -> None:
        file = self._files()[number % len(self._files())]
        with open(file, "ab") as lines:
            if file.read_bytes()[-1:] not in (b"\n", b""):
                lines.write(b"\n")
                self.broken.add(file.name)  # what was torn is a line now
            lines.write(garbage.encode() + b"\n")
        if garbage:
            self.broken.add(file.name)

    @precondition(lambda self: self._files())
    @rule(number=st.integers(0, 9))
    def remove(self, number: int) -> None:
        file = self._files()[number % len(self._files())]
        file.unlink()
        self.broken.discard(file.name)

    # --- what a reader sees -----------------------------------------------------------------------

    @invariant()
    def what_counts_is_what_was_asked(self) -> None:
        """Samples with the references that they had at the last start, each once a row."""
        folders = list(self.root.glob("runs/*/prompts.json"))
        if not folders:
            return
        (asked,) = folders
        samples = json.loads(asked.read_text())["samples"]
        frame = load(self.root / "runs")
        for row, group in frame.groupby("row"):
            assert list(group.id) == list(samples)
            for one in group.to_dict("records"):
                if one["status"] != NOT_RUN:
                    assert one["sample_sha256"] == samples[one["id"]]
                    version = self._version(row, one["id"], one["sample_sha256"])
                    text = answer(prompt_of(int(one["id"]), version))
                    assert one["prediction"] == text
        for name in self.broken:
            assert any(name in reason for reason in frame.attrs["left_out"])

    def _version(self, row: str, name: str, wanted: str) -> int:
        """Of the text that was answered, in the one of a row's files that has the wanted sample."""
        files = [file for file in self._files() if file.name.startswith(row)]
        found = [self._records(file).get(name, {}) for file in files]
        return next(one["meta_version"] for one in found if one.get("sample_sha256") == wanted)

    # --- helpers ----------------------------------------------------------------------------------

    def _go(self, variant: Variant, kl: bool) -> Path:
        method, shard = variant
        task = ["task=xsum", f"task.data_file={self.file}", "task.max_new_tokens=4"]
        if shard:
            task.append(f"task.shard='{shard}'")
        budget = [] if method == "full" else ["budget=40"]
        chosen = [f"method={method}", *budget, f"kl={str(kl).lower()}", f"output={self.root}/runs"]
        return run(composed(*MODEL, *task, *chosen))

    def _files(self) -> list[Path]:
        return sorted(self.root.glob("runs/*/*.jsonl"))

    def _file(self, method: str, shard: str | None) -> Path:
        row = method if method == "full" else f"{method}@40"
        name = f"{row}.{shard.replace('/', 'of')}.jsonl" if shard else f"{row}.jsonl"
        folders = {file.parent for file in self._files()} or {self.root / "runs" / "none"}
        (folder,) = folders
        return folder / name

    def _lines(self, file: Path) -> list[bytes]:
        """Whole lines."""
        return file.read_bytes().split(b"\n")[:-1] if file.exists() else []

    def _records(self, file: Path) -> dict[str, dict[str, Any]]:
        """By id, the last line; `meta_version`: of the text that it answered."""
        found = {}
        if file.exists():
            for line in file.read_bytes().split(b"\n"):
                try:
                    record = json.loads(line)
                    texts = {answer(prompt_of(int(record["id"]), v)): v for v in (0, 1)}
                    version = texts[record["prediction"]]
                    found[record["id"]] = record | {"meta_version": version}
                except (ValueError, KeyError, TypeError):
                    continue
        return found


def test_no_order_of_events_loses_or_miscounts_a_record() -> None:
    machine = settings(max_examples=25, stateful_step_count=14, deadline=None)
    run_state_machine_as_test(Folders, settings=machine)
