"""Ticks, labels, and which points of a long curve are drawn."""

import numpy as np
import pytest

from megadyn.report.axes import Axis, bin_means, brief, spans_decades, thin


@pytest.mark.parametrize(
    ("low", "high", "log", "shown"),
    [
        (0, 120, False, ["0", "50", "100"]),
        (4.2, 8.4, False, ["5", "6", "7", "8"]),
        (0.744, 0.765, False, ["0.745", "0.750", "0.755", "0.760", "0.765"]),
        (0, 1.3e12, False, ["0", "0.5T", "1.0T"]),
        (0, 60_000, False, ["0", "20k", "40k", "60k"]),
        (0, 3e-5, False, ["0", "1e-05", "2e-05", "3e-05"]),
        (-5e6, 0, False, ["-5M", "-4M", "-3M", "-2M", "-1M", "0"]),
        (1e-4, 1.0, True, ["0.0001", "0.001", "0.01", "0.1", "1"]),
        (-2, 1, False, ["-2", "-1", "0", "1"]),
    ],
)
def test_ticks_are_round_and_inside(low, high, log, shown):
    axis = Axis(low, high, log=log)
    assert [text for _, text in axis.ticks()] == shown
    places = axis.place(np.array([value for value, _ in axis.ticks()]))
    assert places.min() >= -1e-9 and places.max() <= 1 + 1e-9


@pytest.mark.parametrize("value", [0.0, 0.5, -3e8, 1e-12])
@pytest.mark.parametrize("log", [False, True])
def test_a_constant_has_an_axis(value, log):
    if log and value <= 0:
        return
    axis = Axis(value, value, log=log)
    assert 0.4 < float(axis.place(np.array([value]))[0]) < 0.6
    assert len(axis.ticks()) < 20


@pytest.mark.parametrize("log", [False, True])
def test_value_is_the_inverse_of_place(log):
    axis = Axis(0.01, 30.0, log=log)
    values = np.array([0.01, 0.5, 30.0])
    assert [axis.value(place) for place in axis.place(values)] == pytest.approx(values.tolist())


def test_a_logarithm_leaves_out_what_it_cannot_show():
    assert np.isnan(Axis(0.1, 10, log=True).place(np.array([0.0, -1.0]))).all()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.49751, "0.498"),
        (3457.2, "3,457"),
        (45_678, "45.7k"),
        (2e-5, "2e-05"),
        (1_234_567, "1.23M"),
        (2e15, "2.00e+15"),
        (-0.3071, "-0.307"),
        (0, "0"),
    ],
)
def test_brief_numbers(value, shown):
    assert brief(value) == shown


def test_a_long_curve_keeps_its_spikes_its_ends_and_its_gaps():
    y = np.sin(np.arange(50_000) / 900)
    y[12_345], y[30_001], y[40_000:41_000] = 99.0, -99.0, np.nan
    kept = thin(y)
    assert len(kept) <= 402
    assert {0, 12_345, 30_001, 49_999} <= set(kept.tolist())
    assert np.isnan(y[kept]).any()
    assert (np.diff(kept) > 0).all()
    assert thin(y[:400]).tolist() == list(range(400))


def test_bin_means_are_means_of_the_numbers_there_are():
    x, z = np.arange(10.0), np.array([np.arange(10.0), np.full(10, np.nan)])
    z[0, 3] = np.nan
    columns, means = bin_means(x, z, 2)
    assert columns.tolist() == [2.0, 7.0]
    assert means[0].tolist() == [(0 + 1 + 2 + 4) / 4, 7.0]
    assert np.isnan(means[1]).all()


def test_decades_ask_for_a_logarithm():
    assert spans_decades(np.array([0.01, 1.0, np.nan]))
    assert not spans_decades(np.array([0.1, 1.0]))
    assert not spans_decades(np.array([0.0, 1000.0]))
    assert not spans_decades(np.array([np.nan]))
