"""The benchmark runs at a small size; its figures are for reading, not for passing."""

import json

import pytest

from megadyn.benchmark import samples as benchmark
from megadyn.benchmark.samples import Figure, as_table, in_a_process, main
from megadyn.errors import UserError


def test_it_measures_everything_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "RUNS", 1)
    monkeypatch.setattr(benchmark, "ROUNDS", 2)
    main(["--documents", "4000", "--folder", str(tmp_path), "--json"])
    *table, last = capsys.readouterr().out.splitlines()
    figures = [Figure(**figure) for figure in json.loads(last)]
    assert "\n".join(table) == as_table(figures)
    assert [figure.goal for figure in figures if figure.goal] == [
        "under 50",
        "under 1",
        "under 0.5",
        "over 50,000",
    ]
    assert all(figure.value > 0 and figure.cpu_value > 0 and figure.peak_mb > 10 for figure in figures)
    assert not list(tmp_path.iterdir())


def test_a_table_shows_three_figures_or_more():
    figures = [
        Figure("a", 0.1234, 0.1, "s", "under 1", 99.6),
        Figure("b", 12.345, 11.111, "ms", "", 10),
        Figure("c", 85393.2, 99999.9, "1/s", "", 10),
    ]
    assert as_table(figures).splitlines()[2:] == [
        "| a | 0.123 s | 0.100 s | under 1 | 100 MB |",
        "| b | 12.3 ms | 11.1 ms |  | 10 MB |",
        "| c | 85,393 1/s | 100,000 1/s |  | 10 MB |",
    ]


def test_a_measurement_that_fails_is_named(tmp_path):
    with pytest.raises(UserError, match="measuring open_dataset failed"):
        in_a_process(benchmark.open_dataset, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--documents", "10"], "at least 1000"),
        (["--documents", "0"], "at least 1"),
        (["--folder", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_named(words, sentence):
    with pytest.raises(UserError, match=sentence):
        main(words)
