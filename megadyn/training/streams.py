"""Where the training data of each phase begin, so that none repeats samples while there are new ones.

A phase with the data and the sequence length of the one before goes on in its stream. Another phase begins a stream of its own
at its first sample (`data.origin`). In that, a dataset that an earlier phase has used at this sequence length goes on
behind what was used (`skip`), in the same order (`order`). All of it follows from the configuration and the sizes of the
datasets, so that the samples of a step do not depend on how often the run was resumed.
"""

from typing import Any

from megadyn.config import Config, Source
from megadyn.data.blend import Blend
from megadyn.data.samples import Samples, Shifted


class Streams:
    """What the phases so far have used. Phases are settled in their order, each before its data are opened."""

    def __init__(self) -> None:
        self._orders: dict[str, int] = {}  # by dataset, as it was first named
        self._used: dict[tuple[str, int], int] = {}  # samples, by dataset and sequence length
        self._given: tuple[list[Source], int] | None = None
        self._settled: tuple[Any, int] = ("", 0)

    def settle(self, config: Config) -> None:
        """Sets `data.origin`, and `skip` and `order` in `data.train`, of a phase."""
        assert config.phase is not None
        section, length = config.data, config.training.sequence_length
        given = section.sources("train"), length
        for source in given[0]:
            self._orders.setdefault(source.prefix, len(self._orders))
        if given != self._given:
            units = _units(section.train)
            entries = [
                _entry(
                    source,
                    unit,
                    self._orders[source.prefix],
                    self._used.get((source.prefix, length), 0),
                    place,
                )
                for place, (source, unit) in enumerate(zip(given[0], units, strict=True))
            ]
            train = entries if isinstance(section.train, list) else entries[0]
            self._given, self._settled = given, (train, config.phase.samples)
        section.train, section.origin = self._settled

    def use(self, config: Config, train: Samples) -> None:
        """Counts what a settled phase uses of its data `train`."""
        assert config.phase is not None
        mix = train.samples if isinstance(train, Shifted) and config.data.origin else train
        count = config.phase.samples_at_end - config.data.origin
        sources, length = config.data.sources("train"), config.training.sequence_length
        drawn = mix.schedule.counts(count).tolist() if isinstance(mix, Blend) else [count]
        for source, here in zip(sources, drawn, strict=True):
            self._used[source.prefix, length] = source.skip + here


def _units(train: Any) -> list[str | None]:
    """The unit in which each entry's share was given."""
    entries = train if isinstance(train, list) else [train]
    return [
        next((unit for unit in ("weight", "tokens") if isinstance(entry, dict) and unit in entry), None)
        for entry in entries
    ]


def _entry(source: Source, unit: str | None, order: int, skip: int, place: int) -> Any:
    """An entry of `data.train`; a plain prefix where that is enough."""
    entry: dict[str, Any] = {"prefix": source.prefix}
    if unit is not None:
        entry[unit] = source.share
    if skip:
        entry["skip"] = skip
    if order != place:
        entry["order"] = order
    return entry if len(entry) > 1 else source.prefix
