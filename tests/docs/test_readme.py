"""The README stays short enough to be read."""

from tests.helpers.tiny import ROOT

MOST_WORDS = 1300


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS
