"""A job: one setting and one or more methods. Missing samples are answered, scored and recorded.

The full cache is always one of the methods: the others are compared with it. Methods share one pass
(:mod:`evals.run.forked`). A method runs alone (:mod:`evals.run.generate`) if it is the only one, or
cannot share a pass; and every method does so on a few samples, in turn, for its timings.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baselines import FullPolicy
from buzz import EvictionCache, Policy
from buzz.errors import ConfigError
from evals.results.environment import Neighbours, busy, environment, process
from evals.results.folder import REFERENCE, InUse, RunFailed, SettingFolder, digest
from evals.results.record import Record
from evals.run.console import progress, say
from evals.run.faults import LengthMismatch, attempt, fault
from evals.run.forked import Fidelity, Found, answer_together
from evals.run.generate import TIMINGS, answer_questions, generate
from evals.run.interrupt import deferred_signals
from evals.run.memory import free_nbytes, row_nbytes
from evals.run.models import load_model, load_tokenizer, own_settings
from evals.run.plan import Plan
from evals.run.prompts import Prompt, batch_size, batches, load_prompts
from evals.run.read import read
from evals.run.row import Row
from evals.run.sampling import Sampling
from evals.run.speed import Method, measure
from evals.tasks.throughput import Throughput

FIDELITY = {field.name for field in dataclasses.fields(Fidelity)} | {"reference_sha256"}
NO_ANSWER = {"prediction": "", "tokens": [], "generated_tokens": 0, "stop_reason": "end"}
WINDOW_CHUNK = 1024  # tokens; in one step, layers with a window need a mask of all token pairs
# Memory in use, by all that is in the process.
PEAKS = {f"{name}_nbytes" for name in ("memory_peak", "memory_before")}
PEAKS |= {f"{name}_peak_nbytes" for name in ("context", "question")}
# Few rows leave linear layers idle, so prompts share a pass, up to so many rows, prompts, tokens.
ROWS, PROMPTS, TOKENS = 128, 4, 2**14
ROOM = 0.7  # of the free memory, for the rows of a pass


@dataclass(frozen=True)
class Outcome:
    """The outcome of one method of a job.

    Attributes:
        file: its records.
        records: of the setting's samples, in their order.
        error: why it is incomplete; None if it is complete.
        failed: samples, and comparisons with the full cache, that failed.
        new: whether any sample was run, or scored again.
    """

    plan: Plan
    file: Path
    records: list[Record]
    error: Exception | None = None
    failed: int = 0
    new: bool = False


def run_job(plans: Sequence[Plan]) -> list[Outcome]:
    """Runs what is still missing of several methods under one setting.

    Returns:
        The outcome of each, in their order. A method that cannot be served stops no other.

    Raises:
        ConfigError: the setting cannot be served.
        RunFailed: nothing can be written.
        Interrupted: by a signal, after the samples in flight.
    """
    with ExitStack() as stack:
        job = Job(plans, stack)
        with deferred_signals() as stop_here:
            job.run(stop_here)
        return [job.outcome(plan) for plan in plans]


class Job:
    """One setting and its rows.

    Attributes:
        plan: of one of the rows, for what they share.
        prompts: in the task's order.
        asked: the rows that the user asked for, by name.
        full: the full cache's row, asked for or not; None if it cannot be served.
        rows: all of them, the full cache's first.
    """

    def __init__(self, plans: Sequence[Plan], stack: ExitStack) -> None:
        self.plan = plans[0]
        self.kl = any(plan.config["kl"] for plan in plans)
        self.folder = SettingFolder(self.plan.folder)
        torch.manual_seed(self.plan.config["seed"])
        loaded = load_prompts(self.plan, _tokenizer(self.plan))
        self.prompts = loaded.prompts
        self.asked: dict[str, Row] = {}
        for plan in plans:
            if plan.row not in self.asked:
                self.asked[plan.row] = self._row(plan, stack)
        self.full = self.asked.get(REFERENCE) or self._reference(stack)
        others = [row for name, row in self.asked.items() if name != REFERENCE]
        self.rows = [self.full, *others] if self.full else others
        self.several = len(others) > 1
        if self.running:
            self.folder.write("setting.yaml", self.plan.setting)
            self.folder.ask(loaded.stored, loaded.order)

    def _row(self, plan: Plan, stack: ExitStack) -> Row:
        """A method's row, locked for this process, with its records; or with its error."""
        file = self.folder.file(plan.row, plan.task.shard)
        row = Row(plan, self.folder, file, {})
        try:
            stack.enter_context(self.folder.lock(file))
            row.records = self.folder.read(file)
            lengths = [prompt.context for prompt in self.prompts]
            for tokens in (min(lengths), max(lengths)):
                plan.fit(tokens)  # refuses a budget that cannot be met, before the model is loaded
            if doubt := plan.doubts(max(lengths)):
                say(doubt)
            if again := row.begin(self.prompts):
                say(f"{file}: {again} answers scored again: other references, or other metrics")
            if there := len(row.done):
                say(f"{file}: {there} of {len(self.prompts)} samples are there already")
        except ConfigError as error:
            row.error = error
        return row

    def _reference(self, stack: ExitStack) -> Row | None:
        """The full cache's row, if the user did not ask for it.

        Raises:
            ConfigError: it cannot be served, and answers are to be compared with it; or its records
                are of other prompts.
        """
        try:
            plan = self.plan.reference()
        except ConfigError as error:
            if self.kl:
                raise ConfigError("kl", True, f"needs the full cache's answers: {error}") from error
            say(f"without the full cache: {error}")
            return None
        row = self._row(plan, stack)
        if isinstance(row.error, InUse):  # another job writes the same records
            row.error, row.file = None, None
            row.records, _ = self.folder.put_together(self.folder.rows.get(REFERENCE, []))
            row.begin(self.prompts)
        if row.error:
            raise row.error
        return row

    @property
    def running(self) -> list[Row]:
        return [row for row in self.rows if row.error is None]

    def run(self, stop_here: Callable[[], None]) -> None:
        """Makes the answers, comparisons and timings that are missing."""
        room = self.plan.task.room is not None
        parts = [] if room else list(batches(self.prompts, self.plan.task.batch_size))
        self.batch_of = {prompt.sample.id: part for part in parts for prompt in part}
        if any(self._lacks(row, self.prompts) for row in self.running) or any(
            self._untimed(part) for part in self._chosen(parts)
        ):
            self._load()
            groups = [(group, self._missing(group)) for group in self._groups(parts)]
            methods = f"{len(self.rows)} method{'s' * (len(self.rows) > 1)}"
            with self._progress(methods, sum(count for _, count in groups)) as advance:
                for group, count in groups:
                    if count:
                        self._answer(group)
                        advance(count)
                        stop_here()
            rows = self.running if room else []  # each has its own largest batch
            with self._progress(methods, sum(self._unanswered(row) for row in rows)) as advance:
                for row in rows:
                    left, size = self._unanswered(row), self._largest(row)
                    for part in batches(self.prompts, size) if size else ():
                        self._alone(row, part)
                        advance(left - self._unanswered(row))
                        left = self._unanswered(row)
                        stop_here()
                    advance(left)  # if no batch fits
            timed = [(row, part) for part in self._chosen(parts) for row in self._untimed(part)]
            with self._progress("timings", len(timed)) as advance:
                for row, part in timed:
                    self._time(row, part)
                    advance(1)
                    stop_here()

    def _groups(self, parts: Sequence[list[Prompt]]) -> Iterator[list[list[Prompt]]]:
        """Batches that share a pass: single prompts in groups, each with its own budget.

        Those of a group are read in equally many steps, and padded by at most a quarter.
        """
        rows = sum(self._shares(row) for row in self.running)
        most = min(PROMPTS, ROWS // rows) if rows and not self.plan.task.timed else 1
        group: list[list[Prompt]] = []

        def joins(part: list[Prompt], other: list[Prompt]) -> bool:
            if len(part) > 1 or len(other) > 1 or part[0].sample.shared:
                return False
            one, two = sorted((part[0], other[0]), key=lambda prompt: len(prompt.ids))
            steps = [(p.max_new_tokens, p.sample.stop, p.before and p.later) for p in (one, two)]
            alike = steps[0] == steps[1] and 4 * len(one.ids) >= 3 * len(two.ids)
            # The first chunk must reach into both.
            alike = alike and (not self.chunk or len(two.ids) - len(one.ids) < self.chunk)
            return alike and len(two.ids) * (len(group) + 1) <= TOKENS

        for part in parts:
            if group and not (len(group) < most and all(joins(part, other) for other in group)):
                yield group
                group = []
            group = [*group, part]
        if group:
            yield group

    def _largest(self, row: Row) -> int | None:
        """Prompts of a row's largest batch; None if not one fits, which is then its error."""
        try:
            return batch_size(row.plan, self.prompts, self.model)
        except ConfigError as error:
            row.error = error
            return None

    def _lacks(self, row: Row, prompts: Iterable[Prompt]) -> bool:
        """Whether answers are missing, or their comparison with the full cache's."""
        return any(
            prompt.sample.id not in row.done or self._uncompared(row, prompt) for prompt in prompts
        )

    def _unanswered(self, row: Row) -> int:
        return sum(prompt.sample.id not in row.done for prompt in self.prompts)

    def _missing(self, group: list[list[Prompt]]) -> int:
        """How many prompts of a group lack something."""
        prompts = [prompt for batch in group for prompt in batch]
        return sum(any(self._lacks(row, [p]) for row in self.running) for p in prompts)

    def _uncompared(self, row: Row, prompt: Prompt) -> bool:
        compares = self.kl and self.full is not None and row is not self.full
        return compares and not row.compared(prompt, self.full)

    def _load(self) -> None:
        self.model, self.tokenizer = _load(self.plan)
        for row in self.rows:
            told = row.plan.policy.for_tokenizer(self.tokenizer)
            row.plan = dataclasses.replace(row.plan, policy=told)
        parameters = sum(weights.numel() for weights in self.model.parameters())
        now = environment(str(self.model.device), self.plan.config["seed"], parameters)
        now |= own_settings(self.model, self.tokenizer)
        self.chunk = self._chunk()
        self.made = {"environment": self.folder.note(now), "process": process()}
        self.neighbours = Neighbours()

    def _chunk(self) -> int | None:
        """Tokens of the chunks in which prompts are read; None: they are read in one step."""
        cache = EvictionCache(self.model, FullPolicy(), positions="true")
        chunk, by_length = (self.plan.config[name] for name in ("prefill_chunk", "rope_by_length"))
        if chunk and not cache.reads_chunks:
            remedy = "a recurrent layer of this model reads a prompt in one piece; leave it out"
            raise ConfigError("prefill_chunk", chunk, remedy)
        windows = any(cache.is_sliding) and cache.reads_chunks and not by_length
        return chunk or (WINDOW_CHUNK if windows else None)

    def _progress(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Shows how much of `total` is done, and the mean score of the last row."""
        last, headline = self.rows[-1], self.plan.task.headline

        def status() -> str:
            ran = [r["scores"][headline] for r in last.of(self.prompts) if r["status"] == "ok"]
            return f"{last.plan.row} {headline} {sum(ran) / len(ran):.3g}" if ran else ""

        return progress(f"{self.plan.task.name}, {name}", total, status)

    def _answer(self, group: list[list[Prompt]]) -> None:
        """Answers batches under every row that lacks them, and makes missing comparisons."""
        prompts = [prompt for batch in group for prompt in batch]
        lacking = [r for r in self.running if any(p.sample.id not in r.done for p in prompts)]
        together = [row for row in lacking if self._shares(row)]
        for row in lacking:
            for batch in group if row not in together else ():
                self._alone(row, batch)
        self._together(together, prompts, own=True)
        left = [r for r in self.running if any(self._uncompared(r, prompt) for prompt in prompts)]
        self._together(left, prompts, own=False)

    def _shares(self, row: Row) -> bool:
        """Whether a method is a row of a pass of several.

        In a timed task only if methods take their steps in turn. Elsewhere if several methods, or
        comparisons, were asked for, except: conversations (rows would be fed different numbers of
        tokens), compiled decoding (a graph is of one cache), log n scaling (rows would differ in
        the prompt already), and models that rotate keys by the longest text in a pass.
        """
        task, options = row.plan.task, row.plan.cache_options
        if isinstance(task, Throughput):
            return task.paired
        alone = options["logn_base"] or options["compiled"] or task.conversation
        alone = alone or row.plan.config["rope_by_length"]
        return (self.several or self.kl) and task.mode == "answer" and not alone

    # --- several methods in one pass --------------------------------------------------------------

    def _together(self, rows: list[Row], prompts: list[Prompt], own: bool) -> None:
        """Answers and compares prompts under several rows.

        Args:
            own: whether the rows answer by themselves; otherwise they are only compared.
        """
        shared = bool(prompts[0].sample.shared)
        if not shared:
            prompts = [p for p in prompts if any(self._lacks(row, [p]) for row in rows)]
        for positions in dict.fromkeys(row.plan.cache_options["positions"] for row in rows):
            alike = [row for row in rows if row.plan.cache_options["positions"] == positions]
            size, count = self._fitting(alike, prompts)
            count = len(prompts) if shared else 1 if self.plan.task.timed else count
            for first in range(0, len(prompts), count):
                some = prompts[first : first + count]
                for start in range(0, len(alike), size):
                    part = [row for row in alike[start : start + size] if row.error is None]
                    self._record_pass([r for r in part if self._lacks(r, some)], some, own)

    def _fitting(self, rows: Sequence[Row], prompts: Sequence[Prompt]) -> tuple[int, int]:
        """How many rows of one prompt, and how many prompts of all rows, fit into free memory.

        Keys, values and logits are counted. Every prompt is held whole once: while it is read, and
        then by the full cache.
        """
        longest = max(prompts, key=lambda prompt: len(prompt.ids))
        steps = [len(longest.ids)] + [1] * longest.max_new_tokens
        held: dict[Any, int] = {}  # by the type of entries
        for row in rows:
            dtype, policy = row.plan.cache_options["dtype"], row.plan.fit(longest.context)[0]
            held[dtype] = max(held.get(dtype, 0), *policy.lengths(steps))
        vocabulary = self.model.config.get_text_config().vocab_size
        logits, seen = 16 * vocabulary, sum(steps)
        each = max(row_nbytes(self.model, n, seen, kind) for kind, n in held.items()) + logits
        whole = row_nbytes(self.model, seen, seen) + logits
        if self.kl:  # copies of the caches are fed the full cache's answer
            each, whole = 2 * each, 2 * whole
        room = int(ROOM * free_nbytes(self.model.device))
        return max(1, (room - whole) // each), max(1, room // (whole + len(rows) * each))

    def _record_pass(self, rows: list[Row], prompts: list[Prompt], own: bool) -> None:
        """Runs a pass. If a row or a prompt fails in it, the others are run without it."""
        if not rows:
            return
        if len(prompts) > 1 and not prompts[0].sample.shared:
            try:
                found: list[Any] = self._pass(rows, prompts, own)
            except (ConfigError, LengthMismatch, RunFailed):
                raise
            except Exception:  # of any kind: half as many prompts take less memory
                found = []
            if not found:
                gc.collect()  # after the except block, as the exception held the cache
                half = len(prompts) // 2
                for some in (prompts[:half], prompts[half:]):
                    self._record_pass([r for r in rows if self._lacks(r, some)], some, own)
                return
        else:
            found = attempt(rows, lambda some: self._pass(some, prompts, own), self.model.device)
        conditions = self._conditions()
        for row, made in zip(rows, found, strict=True):
            ones = made if isinstance(made, list) else [made] * len(prompts)
            for prompt, one in zip(prompts, ones, strict=True):
                if not self._lacks(row, [prompt]):
                    continue  # the row needed nothing for this prompt
                known = row.records.get(prompt.sample.id)
                if prompt.sample.id not in row.done:
                    self._record(row, prompt, one, len(rows), conditions)
                elif isinstance(one, Exception) or "status" in one:
                    row.uncompared += 1
                    reason = one if isinstance(one, Exception) else one["error"]
                    say(f"comparison of {prompt.sample.id} under {row.plan.row} failed: {reason}")
                else:
                    row.add(known | {name: one[name] for name in FIDELITY & one.keys()})

    def _pass(
        self, rows: list[Row], prompts: list[Prompt], own: bool
    ) -> list[list[Found] | Exception]:
        """For each row and prompt the fields of a record. With KL the full cache takes part."""
        batches = [self.batch_of[prompt.sample.id] for prompt in prompts]
        contexts = [min(prompt.context for prompt in batch) for batch in batches]
        if own and self.plan.task.timed:
            new = prompts[0].max_new_tokens
            with ExitStack() as stack:
                methods = [
                    self._method(row, policy, stack.enter_context(self._cache(row, policy)))
                    for row in rows
                    for policy in [row.plan.fit(contexts[0])[0]]
                ]
                return measure(self.model, [prompt.ids for prompt in prompts], methods, new)
        beside = [self.full] if self.kl and self.full and self.full not in rows else []
        everyone = [*beside, *rows]
        found = answer_together(
            self.model,
            self.tokenizer,
            prompts,
            [[row.plan.fit(context)[0] for row in everyone] for context in contexts],
            {
                "positions": rows[-1].plan.cache_options["positions"],
                "dtype": [row.plan.cache_options["dtype"] for row in everyone],
            },
            [self.plan.task.sampling([prompt.sample]) for prompt in prompts],
            [self.full.answer(prompt) if self.full else None for prompt in prompts],
            own=own,
            kl=self.kl and self.full is not None,
            chunk=self.chunk,
        )
        return [list(of_row) for of_row in zip(*found, strict=True)][len(beside) :]

    def _record(
        self,
        row: Row,
        prompt: Prompt,
        found: Found,
        rows: int,
        conditions: Record,
    ) -> None:
        """Scores and records a prompt's answer, or error, under one row."""
        batch = self.batch_of[prompt.sample.id]
        record = row.frame(prompt, batch) | {"rows": rows}
        try:
            if isinstance(found, LengthMismatch):
                row.error = RunFailed(str(found))
            if isinstance(found, Exception):
                raise found
            record |= {"status": "ok"} | found
            if record["status"] == "ok":
                record["scores"] = row.score(prompt, record)
        except Exception as error:
            record = row.frame(prompt, batch) | fault(error, self.model.device)
        row.add(record | conditions)

    # --- a method alone ---------------------------------------------------------------------------

    def _alone(self, row: Row, batch: list[Prompt]) -> None:
        """Answers what a row lacks of a batch, with the method alone, and with timings."""
        todo = [prompt for prompt in batch if prompt.sample.id not in row.done]
        if not todo or row.error:
            return
        if not row.warm:
            self._warm_up(row)
        try:
            found = self._attempt(row, batch)
        except LengthMismatch as error:
            found = [{"status": "failed", "error": str(error)}] * len(batch)
            row.error = RunFailed(str(error))
        conditions = self._conditions()
        for prompt, one in zip(batch, found, strict=True):
            if prompt in todo:
                row.add(row.frame(prompt, batch) | one | conditions)

    def _attempt(self, row: Row, batch: list[Prompt]) -> list[Record]:
        """The batch's records. Smaller batches, too, have the budget of the whole one."""
        policy, _ = row.plan.fit(min(prompt.context for prompt in batch))

        def results(prompts: list[Prompt]) -> list[Record]:
            with self._cache(row, policy) as cache:
                found = self._made(row, prompts, policy, batch, cache)
            others = [other.cache for other in self.rows if other is not row]
            beside = sum(cache.nbytes(allocated=True) for cache in others if cache is not None)
            for prompt, record in zip(prompts, found, strict=True):
                record |= {"status": "ok", "batch_size": len(prompts)}
                record |= {name: record[name] - beside for name in PEAKS & record.keys()}
                record["scores"] = row.score(prompt, record)
                record.pop("losses", None)  # as long as the text
            return found

        return attempt(batch, results, self.model.device)

    @contextmanager
    def _cache(self, row: Row, policy: Policy) -> Iterator[EvictionCache | None]:
        """A row's cache, empty, with the buffers of its last batch; None: make a new one.

        It is kept if decoding is compiled, as a graph is recorded for the addresses of buffers;
        otherwise it would only take memory. That of a method that keeps everything is not kept, as
        the next prompt makes larger buffers beside it. Nor is any after an error.
        """
        options, cache, row.cache = row.plan.cache_options, row.cache, None
        if not options["compiled"] or policy.evicts == "never":
            yield None
            return
        if cache is None or cache.policy != policy:
            cache = EvictionCache(self.model, policy, **options)
        try:
            yield cache
        except Exception:
            for other in self.rows:
                other.cache = None  # memory may have run out
            raise
        cache.reset()
        cache.hold_until = 0
        row.cache = cache

    def _made(
        self,
        row: Row,
        batch: list[Prompt],
        policy: Policy,
        together: list[Prompt],
        cache: EvictionCache | None,
    ) -> list[Record]:
        """Records of a batch that is timed, read or answered.

        Args:
            together: the whole batch, if `batch` is a part of it. A conversation is always answered
                from its beginning.
            cache: an empty one; None: a new one.
        """
        task, options = row.plan.task, row.plan.cache_options
        every, new = [prompt.ids for prompt in batch], batch[0].max_new_tokens
        if task.timed:
            (measured,) = measure(self.model, every, [self._method(row, policy, cache)], new)
            if isinstance(measured, Exception):
                raise measured
            return measured
        if task.mode == "read":
            return [self._read(row, prompt, policy, cache) for prompt in batch]
        if batch[0].sample.shared:
            asked = together if task.conversation else batch
            rest = policy, options, task.conversation, self.chunk, cache
            found = answer_questions(self.model, self.tokenizer, asked, *rest)
            return [found[asked.index(prompt)].record() for prompt in batch]
        sampled = task.sampling([prompt.sample for prompt in batch])
        made = generate(
            self.model,
            self.tokenizer,
            every,
            policy,
            new,
            batch[0].sample.stop,
            options,
            batch[0].later,
            sampling=None if sampled is None else Sampling(*sampled),
            chunk=self.chunk,
            cache=cache,
        )
        return [one.record() for one in made]

    def _read(
        self, row: Row, prompt: Prompt, policy: Policy, cache: EvictionCache | None
    ) -> Record:
        if cache is not None:
            cache.reset()
        task = row.plan.task
        rest = task.chunk, row.plan.cache_options, prompt.sample.starts, cache
        measured, losses = read(self.model, prompt.ids, policy, *rest)
        blocks = [float(block.mean()) for block in np.array_split(losses, task.blocks)]
        return NO_ANSWER | measured.record() | {"losses": losses, "blocks": blocks}

    @staticmethod
    def _method(row: Row, policy: Policy, cache: EvictionCache | None) -> Method:
        task = row.plan.task
        assert isinstance(task, Throughput)
        return Method(policy, row.plan.cache_options, task.prefill_chunk, task.hold, cache)

    # --- timings ----------------------------------------------------------------------------------

    def _chosen(self, parts: Sequence[list[Prompt]]) -> list[list[Prompt]]:
        """The batches that are timed: all if one method was asked for, else some, evenly spread."""
        if not self.several or not parts:
            return list(parts)
        count = min(len(parts), -(-self.plan.config["time_samples"] // len(parts[0])))
        return [parts[i] for i in np.linspace(0, len(parts) - 1, count).round().astype(int)]

    def _untimed(self, batch: list[Prompt]) -> list[Row]:
        """The rows that answered a whole batch in a pass with others, and were not timed on it."""
        if self.plan.task.conversation:
            return []
        return [
            row
            for row in self.running
            if row.file is not None
            and all(r["status"] == "ok" and not r["timed"] for r in row.of(batch))
            and len(row.of(batch)) == len(batch)
        ]

    def _time(self, row: Row, batch: list[Prompt]) -> None:
        """Times a method alone on a batch. Methods take turns on the same prompts."""
        if not row.warm:
            self._warm_up(row)
        with suppress(LengthMismatch):
            found = self._attempt(row, batch)
            conditions = self._conditions()
            for known, one in zip(row.of(batch), found, strict=True):
                if one["status"] == "ok":
                    names = (*TIMINGS, "allocated_nbytes", "batch_size")
                    timings = {k: one[k] for k in names if k in one}
                    row.add(known | timings | {"timed": True} | conditions)

    def _warm_up(self, row: Row) -> None:
        """Runs a short prompt: the cost of a first run (kernels, allocators) must not be timed."""
        row.warm = True
        if row.plan.task.timed:  # `measure` warms up itself
            return
        with suppress(Exception):  # the sample will fail, too, and is recorded
            first, options = [self.prompts[0].ids[:32]], row.plan.cache_options
            generate(self.model, self.tokenizer, first, row.plan.policy, 2, (), options)

    def _conditions(self) -> Record:
        """The fields of a record that say where it was made, and how busy the machine was."""
        threads, load = torch.get_num_threads(), self.neighbours.load()
        needed = threads if self.model.device.type == "cpu" else 1
        loaded = busy(load, needed, psutil.cpu_count() or 1)
        more = {"threads": threads, "load": load, "loaded": loaded}
        if self.chunk and not self.plan.task.timed and self.plan.task.mode != "read":
            more["prefill_chunk"] = self.chunk
        return self.made | more

    def outcome(self, plan: Plan) -> Outcome:
        """The outcome of a row; prints the samples that failed."""
        row = self.asked[plan.row]
        records, error = row.of(self.prompts), row.error
        failed = [record for record in records if record["status"] == "failed"]
        for record in failed if row.new else ():
            say(f"sample {record['id']} failed under {row.plan.row}: {record['error']}")
        if error is None and records and len(failed) == len(records):
            text = f"all {len(failed)} samples failed, the first with {failed[0]['error']}"
            error = RunFailed(text)
        file = self.folder.file(plan.row, plan.task.shard)
        return Outcome(row.plan, file, records, error, len(failed) + row.uncompared, row.new)


_loaded: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}


def _load(plan: Plan) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model; kept for the next job of this process, if that needs the same."""
    if _key(plan) not in _loaded:
        _loaded.clear()
        _loaded[_key(plan)] = load_model(plan.config["model"], plan.config["device"])
    return _loaded[_key(plan)]


def _tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """The tokenizer alone, so that wrong prompts are found before a model is loaded."""
    known = _loaded.get(_key(plan))
    return known[1] if known else load_tokenizer(plan.config["model"])


def _key(plan: Plan) -> str:
    return digest([plan.config[name] for name in ("model", "model_digest", "device")])
