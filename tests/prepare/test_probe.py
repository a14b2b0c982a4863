"""The probe's language: every answer and every number of lookups is worked out again from the words, one at a time."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megadyn.data.indexed import IndexedDataset
from megadyn.data.labels import labels_path, read_labels
from megadyn.errors import ConfigError
from megadyn.prepare import probe
from megadyn.prepare.probe import CLASSES, SUCCESSORS, Language, documents, write_dataset, write_tokenizer
from megadyn.tokenization.tokenizer import load_tokenizer

LANGUAGES = [Language(), Language(nodes=6, hops=5, walks=3, answers=5, runs=2, run_length=3, sums=(2, 2, 4))]


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "AT_ONCE", 24)


def fewest_lookups(edges: list[tuple[str, str]], begin: str, end: str) -> int:
    """Breadth-first search over undirected edges."""
    seen, steps = {begin}, 0
    while end not in seen:
        seen |= {b for a, b in edges if a in seen} | {a for a, b in edges if b in seen}
        steps += 1
    return steps


def labels_of(words: list[str], modulus: int) -> list[tuple[str, int]]:
    """Class and hops of each word of a document; checks its answers on the way."""
    table = dict(word.split(">") for word in words if ">" in word)
    edges, found, terms, hops = list(table.items()), [], [], 0
    for before, word in zip(["", *words], words):
        if word in table and before in table:
            end = before
            for _ in range(hops):
                end = table[end]
            assert word == end
            found.append(("recall" if hops == 1 else "chase", fewest_lookups(edges, before, end)))
            edges.append((before, end))
        elif before == "=":
            assert word == f"s{sum(terms) % modulus}"
            found.append(("sum", len(terms) - 1))
            terms = []
        else:
            terms += [int(word[1:])] if word[0] == "+" else []
            hops = int(word[:-1]) if word[-1] == ":" else hops
            assert word not in table or before[-1] == ":"
            kinds = {">": "table", ":": "question", "t": "text", "+": "term", "=": "term", "<": "end"}
            kind = next((kinds[letter] for letter in word if letter in kinds), "question")
            found.append((kind, 0))
    return found


@pytest.mark.parametrize("language", LANGUAGES, ids=["default", "several walks"])
def test_answers_and_lookups_are_right(language: Language) -> None:
    vocabulary, seen = language.vocabulary, Counter()
    for tokens, labels in documents(language, 30, seed=3):
        assert tokens.shape[1] == language.length
        given = [(CLASSES[c], int(h)) for c, h in zip(labels.classes, labels.hops)]
        for row, line in enumerate(tokens.tolist()):
            words = [vocabulary[token] for token in line]
            assert words[-1] == "<eos>" and sorted(word[0] for word in words[: language.nodes]) == sorted(
                word[2] for word in words[: language.nodes]
            )
            assert sum(word[-1] == ":" for word in words) == language.walks
            want = labels_of(words, language.modulus)
            assert given[row * language.length : (row + 1) * language.length] == want
            seen.update(want)
    assert {("recall", 1), ("chase", 2), ("sum", 1), ("text", 0)} <= set(seen)
    deepest = max(hops for kind, hops in seen if kind == "chase")
    assert deepest == min(language.hops, language.nodes // 2)  # from there on, the other way round is shorter


def test_the_table_is_one_cycle() -> None:
    (tokens, _), *_ = documents(Language(), 5, seed=1)
    for line in tokens.tolist():
        table = dict(Language().vocabulary[token].split(">") for token in line[:7])
        node, passed = "a", []
        while node not in passed:
            passed.append(node)
            node = table[node]
        assert len(passed) == 7


def test_text_follows_its_chain() -> None:
    """Each word has as many successors as there are probabilities, and the likeliest comes half of the time."""
    language = Language(words=5, runs=4, run_length=40)
    (tokens, labels), *_ = documents(language, 24, seed=1)
    text = tokens.ravel()[labels.classes == CLASSES.index("text")].reshape(-1, 40) - language.first("t0")
    pairs = Counter(zip(text[:, :-1].ravel().tolist(), text[:, 1:].ravel().tolist()))
    for word in range(5):
        counts = sorted((of for (first, _), of in pairs.items() if first == word), reverse=True)
        assert np.array(counts) / sum(counts) == pytest.approx(SUCCESSORS, abs=0.06)


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
    monkeypatch.setattr(probe, "_documents", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_dataset(language, tmp_path / "set", 2, 2, tmp_path)
    assert not labels_path(tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"nodes": 27}, "language.nodes = 27: must be from 3 to 26"),
        ({"hops": 7}, "language.hops = 7: must be from 1 to language.nodes - 1 = 6"),
        ({"answers": 7}, "language.answers = 7: must be below language.nodes = 7"),
        ({"walks": 0}, "language.walks = 0: must be at least 1"),
        ({"words": 3}, "language.words = 3: must be at least 4"),
        ({"modulus": 1}, "language.modulus = 1: must be at least 2"),
        ({"sums": (1,)}, "language.sums"),
    ],
)
def test_sizes_that_make_no_document_are_refused(sizes: dict[str, int], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Language(**sizes)
