"""Cache length after each step, run-length encoded."""

from __future__ import annotations

from collections.abc import Sequence

from buzz.eviction import Group


class Trace:
    """Lengths of a batch's first row; consecutive steps of equal changes share one note."""

    def __init__(self) -> None:
        self._runs: list[list[int]] = []  # [steps, new tokens, change in length, evictions] alike
        self._last = (0, 0, 0)

    def note(self, groups: Sequence[Group]) -> None:
        """Records what the last step changed, if it is not recorded yet."""
        group = next((g for g in groups if 0 in g.rows), None)
        if group is None or group.seen == self._last[0]:
            return
        now = (group.seen, group.held, group.evictions)
        change = [after - before for after, before in zip(now, self._last, strict=True)]
        if self._runs and self._runs[-1][1:] == change:
            self._runs[-1][0] += 1
        else:
            self._runs.append([1, *change])
        self._last = now

    def steps(self) -> list[tuple[int, int, int]]:
        """(tokens seen, cache length, evictions) after each step."""
        seen = held = evictions = 0
        steps = []
        for times, new, change, evicted in self._runs:
            for _ in range(times):
                seen, held, evictions = seen + new, held + change, evictions + evicted
                steps.append((seen, held, evictions))
        return steps

    def copy(self) -> Trace:
        """An independent copy."""
        other = Trace()
        other._runs, other._last = [list(run) for run in self._runs], self._last
        return other
