"""Names ranks that make the others wait, from the time that each rank itself needed for a measured step.

In a step all ranks take equally long, because they wait for each other in collectives. What differs is a rank's own time:
the step without its communication. Ranks are compared with those of their pipeline stage, which do the same work; a
stage of one rank has nothing to compare with. Runs only on rank 0 and uses no tensors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

LEAST_REPORTS, LEAST_STEPS = 2, 5
"""How long a rank must be slow: so many consecutive reports, over so many steps. One step may be slow by chance."""


@dataclass
class SlowRank:
    """A rank that has become slow."""

    rank: int
    host: str
    own_ms: float
    median_ms: float
    """Of its stage."""
    reports: int
    """Consecutive ones in which it was slow."""
    others: list[int]
    """Ranks that became slow in the same report, but less so."""

    @property
    def sentence(self) -> str:
        too = f"; slow too: ranks {', '.join(map(str, self.others))}" if self.others else ""
        return (
            f"rank {self.rank} on {self.host} is slow: its own part of a step took {self.own_ms:.0f} ms, "
            f"{self.own_ms / self.median_ms:.1f} times the median of {self.median_ms:.0f} ms, in {self.reports} reports in a row"
            f"{too}"
        )

    def record(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "host": self.host,
            "own_ms": self.own_ms,
            "median_ms": self.median_ms,
            "others": self.others,
            "sentence": self.sentence,
        }


class SlowRanks:
    """Follows the own times of all ranks from report to report."""

    def __init__(self, factor: float, hosts: Sequence[str], stages: int, interval: int):
        """`factor`: of the median, above which a rank is slow; 0 names nobody. `hosts`: of each rank. `stages` of the
        pipeline, each with equally many successive ranks. `interval`: steps between reports."""
        self.factor, self.hosts = factor, hosts
        self.peers = len(hosts) // stages
        self.reports = max(LEAST_REPORTS, math.ceil(LEAST_STEPS / interval))
        """Consecutive ones after which a slow rank is named."""
        self.streaks = [0] * len(hosts)
        """Consecutive reports in which each rank was slow."""
        self._is_warm = False

    def restart(self) -> None:
        """The next report is the first of a start, or after going back: its step pays for warm-up, and does not count."""
        self.streaks, self._is_warm = [0] * len(self.hosts), False

    def medians(self, own_ms: Sequence[float]) -> list[float]:
        """For each rank the median of its stage; of two in the middle the lower one, so that one of two ranks can be
        slow."""
        starts = range(0, len(own_ms), self.peers)
        return [m for start in starts for m in [median_low(own_ms[start : start + self.peers])] * self.peers]

    def figures(self, own_ms: Sequence[float]) -> dict[str, Any]:
        """Fields of a report: the own time of the rank that exceeds the median of its stage most, and that median. Empty
        where no rank has peers."""
        if self.peers < 2:
            return {}
        medians = self.medians(own_ms)
        rank = max(range(len(own_ms)), key=lambda r: own_ms[r] / medians[r])
        return {
            "rank_time_ms": {"median": medians[rank], "slowest": own_ms[rank]},
            "slowest_rank": rank,
        }

    def look(self, own_ms: Sequence[float]) -> SlowRank | None:
        """The slowest of the ranks that have now been slow for long enough; None if there is no new one. A rank that
        was named is named again once it has not been slow in between."""
        if not self._is_warm or not self.factor or self.peers < 2:
            self._is_warm = True
            return None
        medians = self.medians(own_ms)
        over = [own / median for own, median in zip(own_ms, medians, strict=True)]
        self.streaks = [
            streak + 1 if ratio > self.factor else 0 for streak, ratio in zip(self.streaks, over, strict=True)
        ]
        found = [rank for rank, streak in enumerate(self.streaks) if streak == self.reports]
        if not found:
            return None
        worst = max(found, key=lambda rank: over[rank])
        return SlowRank(
            worst,
            self.hosts[worst],
            own_ms[worst],
            medians[worst],
            self.reports,
            [rank for rank in found if rank != worst],
        )
