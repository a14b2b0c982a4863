"""A sink that fails ends no run: what it could not write waits in memory, is tried again, and is counted where it is lost."""

from collections import deque

from megadyn.log import log
from megadyn.telemetry.sinks import Record, Sink

WAITING = 2000
"""Records that wait for one sink at most: hours of reports, some tens of MB."""


class PatientSink:
    """A sink whose methods raise nothing: an OSError is told once, until the sink works again."""

    def __init__(self, sink: Sink):
        self.sink = sink
        self.waiting: deque[Record] = deque()
        self.back_to: int | None = None  # an iteration to which the sink has yet to go back
        self.dropped = 0  # records for which there was no more room to wait
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
        """Tries for the last time, and says what was lost."""
        self._catch_up()
        try:
            self.sink.close()
        except OSError as error:
            log.warning("%s: the last metrics may be missing: %s", self.sink.name, error)
        if lost := len(self.waiting) + self.dropped:
            log.warning("%s: %d records could not be written and are lost", self.sink.name, lost)

    def _catch_up(self) -> None:
        """Does all that is still to be done, in order, as far as it goes."""
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
