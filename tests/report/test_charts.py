"""Charts: what is drawn is what was given."""

import json
import re
from html import unescape
from xml.etree import ElementTree

import numpy as np
import pytest

from megadyn.report import charts
from megadyn.report.charts import Curve, heat_map, line_chart

X = np.array([0.0, 10.0, 20.0, 30.0])


def parse(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart.replace("&nbsp;", " ").replace("<wbr>", ""))


def hover(chart: str) -> dict:
    return json.loads(parse(chart).attrib["data-hover"])


def points(chart: str, colour: int = 0) -> list[tuple[float, float]]:
    d = re.search(rf'<path class="line c{colour} [^"]*" d="([^"]*)"/>(?!</svg>)', chart)[1]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", d)]


def test_a_line_goes_from_corner_to_corner():
    chart = line_chart("Loss", [Curve("a", X, X, 0)], x_name="iteration", y_range=(0, 30))
    (left, bottom), *_, (right, top) = points(chart)
    assert (left, right) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert (top, bottom) == (charts.TOP, charts.HEIGHT - charts.BOTTOM)
    assert hover(chart)["curves"] == [{"name": "a", "x": [0, 10, 20, 30], "y": [0, 10, 20, 30]}]


def test_a_missing_value_is_a_gap_and_no_zero():
    y = np.array([1.0, np.nan, 3.0, 4.0])
    chart = line_chart("Norm", [Curve("a", X, y)], x_name="iteration", named=False)
    d = re.search(r'class="line c0 " d="([^"]*)"', chart)[1]
    assert d.count("M") == 2 and d.count("L") == 1
    assert hover(chart)["curves"][0]["y"] == [1, None, 3, 4]
    assert "legend" not in chart


def test_curves_of_decades_stand_on_a_logarithm():
    chart = line_chart("Loss", [Curve("a", X, np.array([0.001, 0.01, 0.1, 1.0]))], x_name="iteration")
    assert "(logarithmic)" in chart
    heights = [y for _, y in points(chart)]
    assert np.diff(heights) == pytest.approx([heights[1] - heights[0]] * 3, abs=0.2)
    assert "(logarithmic)" not in line_chart("Loss", [Curve("a", X, X + 1)], x_name="iteration")


def test_nothing_to_draw_is_no_chart():
    assert line_chart("Loss", [], x_name="iteration") == ""
    assert line_chart("Loss", [Curve("a", X, np.full(4, np.nan))], x_name="iteration") == ""
    assert heat_map("Share", [1], X, np.full((1, 4), np.nan), x_name="iteration", low=0, high=1) == ""


def test_a_band_is_twice_the_spread():
    chart = line_chart(
        "Gate", [Curve("a", X, np.full(4, 5.0), spread=np.full(4, 2.0))], x_name="iteration", y_range=(0, 10)
    )
    heights = {float(pair.split(",")[1]) for pair in re.search(r'points="([^"]*)"', chart)[1].split()}
    assert max(heights) - min(heights) == pytest.approx(
        0.4 * (charts.HEIGHT - charts.TOP - charts.BOTTOM), abs=0.2
    )


def test_names_are_escaped():
    name = '</output><script>"&'
    for chart in (
        line_chart(name, [Curve(name, X, X)], x_name=name),
        heat_map(name, [1], X, X[None], x_name=name, low=0, high=30),
    ):
        assert parse(chart).find("figcaption").text.startswith(name)
        assert "<script" not in chart
    assert unescape(name) == name


def test_a_heat_map_shades_by_value_and_shows_the_last():
    z = np.array([[0.0, 0.0, 1.0, 1.0], [0.5, np.nan, 0.5, 0.25]])
    chart = heat_map("Share", [3, 17], X, z, x_name="iteration", low=0, high=1)
    shades = {
        int(shade): cells.count("z") for shade, cells in re.findall(r'<path class="h(\d)" d="([^"]*)"', chart)
    }
    assert shades == {0: 1, 8: 1, 4: 2, 2: 1}  # neighbours of one shade are one cell; a missing value is none
    found = hover(chart)
    assert found["rows"] == [3, 17] and found["z"] == [[0, 0, 1, 1], [0.5, None, 0.5, 0.25]]
    texts = [element.text for element in parse(chart).iter("text")]
    assert {"3", "17", "1", "0.25"} <= set(texts)


def test_a_heat_map_of_one_value_and_one_record_is_drawn():
    chart = heat_map("Share", [0], np.array([5.0]), np.array([[0.5]]), x_name="iteration", low=0.5, high=0.5)
    assert '<path class="h4"' in chart
    parse(chart)


def test_many_layers_and_steps_stay_small():
    steps, layers = 5_000, 36
    z = np.random.default_rng(0).random((layers, steps))
    chart = heat_map(
        "Share", list(range(layers)), np.arange(steps) * 10.0, z, x_name="iteration", low=0, high=1
    )
    assert len(chart) < 150_000
    assert len(hover(chart)["columns"]) == charts.HEAT_COLUMNS
