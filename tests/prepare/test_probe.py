"""The probe's language: every answer and every number of lookups is worked out again from the words, one at a time."""

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from megadyn.data.indexed import IndexedDataset
from megadyn.data.labels import labels_path, read_labels
from megadyn.errors import ConfigError
from megadyn.prepare import probe
from megadyn.prepare.probe import (
    CLASSES,
    LONGER,
    SUCCESSORS,
    Language,
    documents,
    write_dataset,
    write_tokenizer,
)
from megadyn.tokenization.tokenizer import load_tokenizer

LANGUAGES = [
    Language(),
    Language(nodes=10, lookups=5, walks=3, states=4, longest=3, lists=2, terms=5, sums=3, words=7),
]


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "AT_ONCE", 24)


def labels_of(words: list[str], language: Language) -> list[tuple[str, int]]:
    """Class and hops of each word of a document; checks its answers on the way."""
    table = dict(word.split(">") for word in words if len(word) == 3 and word[1] == ">")
    found: list[tuple[str, int]] = []
    value, terms, steps = "", [], 0
    for before, word in zip(["", *words], words):
        inside = before == ">" or before[:1] in ("p", "+")
        if word == ">" or word[0] == "p":
            steps = steps + 1 if inside else 1
            value = value if inside else before
            found.append(("step", steps - 1))
            value = table[value] if word == ">" else str(language.permutation[int(word[1:])][int(value)])
        elif word[0] == "+":
            terms = [*terms, int(word[1:])] if inside else [int(word[1:])]
            found.append(("step", max(0, len(terms) - 2)))
        elif word[0] == "s":
            assert word == f"s{sum(terms) % language.modulus}" and len(terms) > 1
            found.append(("sum", len(terms) - 1))
        elif inside:
            assert word == value
            walked = "recall" if steps == 1 else "chase"
            found.append((walked if before == ">" else "state", steps))
        else:
            kinds = {">": "table", "t": "text", "<": "end"}
            kind = next((kinds[letter] for letter in "<>t" if letter in word and word not in "t"), "question")
            found.append((kind, 0))
    return found


@pytest.mark.parametrize("language", LANGUAGES, ids=["default", "several walks"])
def test_answers_and_hops_are_right(language: Language) -> None:
    vocabulary, seen = language.vocabulary, Counter()
    for tokens, labels in documents(language, 60, seed=3):
        assert tokens.shape[1] == language.length
        given = [(CLASSES[c], int(h)) for c, h in zip(labels.classes, labels.hops)]
        for row, line in enumerate(tokens.tolist()):
            words = [vocabulary[token] for token in line]
            assert words[-1] == "<eos>" and words.count("<eos>") == 1
            want = labels_of(words, language)
            assert given[row * language.length : (row + 1) * language.length] == want
            seen.update(want)
    assert seen[("table", 0)] == 60 * language.nodes
    for kind, deepest in (
        ("chase", language.lookups),
        ("state", language.longest),
        ("sum", language.terms - 1),
    ):
        assert max(hops for of, hops in seen if of == kind) == deepest
    assert seen[("recall", 1)] and seen[("text", 0)]


def test_each_length_of_a_list_is_as_likely_as_it_should_be() -> None:
    language = Language(longest=4)
    counts = Counter()
    for _, labels in documents(language, 400, seed=1):
        counts.update(labels.hops[labels.classes == CLASSES.index("state")].tolist())
    assert set(counts) == {1, 2, 3, 4}
    for hops in (1, 2, 3):  # longer ones fit a little less often at a document's end
        assert counts[hops + 1] / counts[hops] == pytest.approx(LONGER, abs=0.08)


def test_permutations_cannot_be_exchanged() -> None:
    """Else their order in a list would not matter, and one sum over them would do."""
    for language in LANGUAGES:
        permutations = language.permutation
        assert len(permutations) == language.permutations
        assert all(sorted(one) == list(range(language.states)) for one in permutations)
        for one, other in combinations(permutations, 2):
            assert [one[to] for to in other] != [other[to] for to in one]


def test_the_table_is_one_cycle() -> None:
    (tokens, _), *_ = documents(Language(), 5, seed=1)
    for line in tokens.tolist():
        table = dict(Language().vocabulary[token].split(">") for token in line[: Language().nodes])
        node, passed = "a", []
        while node not in passed:
            passed.append(node)
            node = table[node]
        assert len(passed) == Language().nodes


def test_text_follows_its_chain() -> None:
    """Each word has as many successors as there are probabilities, and the likeliest comes half of the time."""
    language = Language(words=5, run=80, walks=0, lists=0, sums=0)  # hardly two runs side by side
    pairs = Counter()
    for tokens, labels in documents(language, 48, seed=1):
        text = labels.classes == CLASSES.index("text")
        words = tokens.ravel() - language.first("t0")
        inside = text[1:] & text[:-1]
        pairs.update(zip(words[:-1][inside].tolist(), words[1:][inside].tolist()))
    for word in range(5):
        counts = np.array([pairs[word, second] for second in language.successors[word]])
        assert counts / counts.sum() == pytest.approx(SUCCESSORS, abs=0.06)


def test_a_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    language = LANGUAGES[1]
    write_tokenizer(language, tmp_path / "tokenizer")

    def write(name: str, count: int, seed: int) -> list[bytes]:
        write_dataset(language, tmp_path / name, count, seed, tmp_path / "tokenizer")
        return [Path(f"{tmp_path / name}.{kind}").read_bytes() for kind in ("bin", "idx", "json", "labels")]

    one = write("one", 30, 1)
    assert write("two", 30, 1) == one
    assert write("two", 30, 2)[0] != one[0]
    assert one[0].startswith(write("two", 10, 1)[0])  # more documents begin with the same ones
    dataset = IndexedDataset(tmp_path / "one")
    assert len(dataset) == dataset.num_documents == 30 and set(dataset.sizes) == {language.length}
    labels = read_labels(dataset)
    assert len(labels.classes) == dataset.num_tokens and labels.names == CLASSES


def test_documents_can_be_read_and_written_as_words(tmp_path: Path) -> None:
    language = LANGUAGES[1]
    write_tokenizer(language, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == len(language.vocabulary) and tokenizer.eod == 0
    (tokens, _), *_ = documents(language, 1, seed=1)
    text = tokenizer.decode(tokens[0].tolist())
    assert text.endswith(" <eos>")
    assert tokenizer.encode_batch([text])[0].tolist() == tokens[0].tolist()


def test_a_dataset_that_is_not_finished_has_no_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels of the dataset that is replaced would look like its own."""
    language = LANGUAGES[1]
    write_tokenizer(language, tmp_path)
    write_dataset(language, tmp_path / "set", 2, 1, tmp_path)
    monkeypatch.setattr(probe.Writer, "document", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_dataset(language, tmp_path / "set", 2, 2, tmp_path)
    assert not labels_path(tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"nodes": 27}, "language.nodes = 27: must be from 3 to 26"),
        ({"nodes": 7, "lookups": 4}, "language.lookups = 4: must be from 1 to language.nodes / 2 = 3"),
        ({"permutations": 1}, "language.permutations = 1: must be at least 2"),
        ({"states": 2}, "language.states = 2: must be at least 3"),
        (
            {"permutations": 7, "states": 3},
            "language.permutations = 7: must be at most 4 of 3 states, or two could be exchanged",
        ),
        ({"lists": -1}, "language.lists = -1: must be at least 0"),
        ({"words": 3}, "language.words = 3: must be at least 4"),
        ({"modulus": 1}, "language.modulus = 1: must be at least 2"),
        ({"terms": 1}, "language.terms = 1: must be at least 2"),
    ],
)
def test_sizes_that_make_no_document_are_refused(sizes: dict[str, int], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Language(**sizes)
