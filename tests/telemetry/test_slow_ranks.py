"""Which rank is named as slow, and which is not."""

from megadyn.telemetry.slow_ranks import SlowRanks

HOSTS = ["a", "a", "b", "b"]
EVEN = [100.0, 104.0, 98.0, 140.0]


def named(
    reports: list[list[float]], *, factor: float = 1.5, stages: int = 1, interval: int = 10
) -> list[int | None]:
    """The rank named after each report but the first, which does not count."""
    slow = SlowRanks(factor, HOSTS, stages, interval)
    assert slow.look([1.0, 99.0, 1.0, 1.0]) is None
    return [found.rank if (found := slow.look(report)) else None for report in reports]


def test_a_rank_is_named_in_its_second_report_in_a_row_and_again_after_it_recovered():
    slow = [100.0, 104.0, 160.0, 98.0]
    assert named([EVEN] * 5) == [None] * 5
    assert named([slow, EVEN, slow, slow, slow, EVEN, slow, slow]) == [
        None,
        None,
        None,
        2,
        None,
        None,
        None,
        2,
    ]
    assert named([slow] * 6, interval=1) == [None, None, None, None, 2, None]
    assert named([slow] * 3, interval=3) == [None, 2, None]
    assert named([slow] * 3, factor=0) == [None] * 3
    assert named([slow] * 3, factor=1.7) == [None] * 3


def test_the_slowest_is_named_with_its_host_and_those_that_are_slow_too():
    slow = SlowRanks(1.5, HOSTS, 1, 10)
    for _ in range(2):
        assert slow.look([100.0, 90.0, 170.0, 250.0]) is None
    found = slow.look([100.0, 90.0, 170.0, 250.0])
    assert (found.rank, found.host, found.own_ms, found.median_ms, found.others) == (
        3,
        "b",
        250.0,
        100.0,
        [2],
    )
    assert found.sentence == (
        "rank 3 on b is slow: its own part of a step took 250 ms, 2.5 times the median of 100 ms, in 2 reports in a row; "
        "slow too: ranks 2"
    )
    assert slow.figures([100.0, 90.0, 170.0, 250.0]) == {
        "rank_time_ms": {"median": 100.0, "slowest": 250.0},
        "slowest_rank": 3,
    }


def test_ranks_are_compared_with_those_of_their_stage():
    assert named([[100.0, 100.0, 300.0, 310.0]] * 3, stages=2) == [None] * 3
    assert named([[100.0, 180.0, 300.0, 310.0]] * 3, stages=2) == [None, 1, None]
    assert named([[100.0, 180.0, 300.0, 900.0]] * 3, stages=4) == [None] * 3
    assert SlowRanks(1.5, HOSTS, 4, 10).figures(EVEN) == {}


def test_after_going_back_the_count_starts_again():
    slow, report = SlowRanks(1.5, HOSTS, 1, 10), [100.0, 104.0, 160.0, 98.0]
    for _ in range(2):
        slow.look(report)
    slow.restart()
    assert [slow.look(report) is None for _ in range(3)] == [True, True, False]
