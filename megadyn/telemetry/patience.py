"""Keeps a failing sink from ending the run: records wait in memory, are written later, and are counted if they are lost."""

from collections import deque

from megadyn.log import log
from megadyn.telemetry.sinks import Record, Sink

WAITING = 2000
"""Largest number of records that wait for one sink: hours of reports, some tens of MB."""


class PatientSink:
    """Wraps a sink so that its methods never raise. An OSError is logged once, until the sink works again."""

    def __init__(self, sink: Sink):
        self.sink = sink
        self.waiting: deque[Record] = deque()
        self.back_to: int | None = None  # iteration to which the sink still has to go back
        self.dropped = 0  # records dropped because too many were waiting
        self.is_failing = False

    def write(self, record: Record) -> None:
        self.waiting.append(record)
        self._catch_up()
        if len(self.waiting) > WAITING:
            self.waiting.pop()
            self.dropped += 1

    def go_back(self, iteration: int) -> None:
        self.waiting = deque(record for record in self.waiting if record["iteration"] <= iteration)
        self.back_to = iteration if self.back_to is None else min(iteration, self.back_to)
        self._catch_up()

    def close(self) -> None:
        """Tries a last time, and logs what was lost."""
        self._catch_up()
        try:
            self.sink.close()
        except OSError as error:
            log.warning("%s: the last metrics may be missing: %s", self.sink.name, error)
        if lost := len(self.waiting) + self.dropped:
            log.warning("%s: %d records could not be written and are lost", self.sink.name, lost)

    def _catch_up(self) -> None:
        """Does everything that is still waiting, in order, until something fails."""
        try:
            if self.back_to is not None:
                self.sink.go_back(self.back_to)
                self.back_to = None
            while self.waiting:
                self.sink.write(self.waiting[0])
                self.waiting.popleft()
        except OSError as error:
            if not self.is_failing:
                log.warning(
                    "%s cannot be written: %s; the run continues, and records wait in memory",
                    self.sink.name,
                    error,
                )
            self.is_failing = True
        else:
            if self.is_failing:
                log.info("%s can be written again", self.sink.name)
            self.is_failing = False
