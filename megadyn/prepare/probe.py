"""A generated language in which it is known how many lookups, one after another, each token takes to predict.

Every document has the same length and the same parts, in random order behind its table:

    table      `c>f`   one token per entry of a random cycle over the nodes: what follows each node; in random order
    question   `3: c`  the head of a walk: a number of hops and a node; then come answers, each found from the node before it:
    recall     `f`     the next node, if the walk is one of one hop
    chase      `b`     the node two or more entries further, in a walk of that many hops
    text       `t5`    a run of order-1 Markov text: the last word alone tells what can be known about the next
    sum        `s4`    behind `+3 +1 =`: the sum of the terms modulo `modulus`

A document ends with `<eos>`. `hops` of an answer of a walk is the *fewest* lookups that give it, because an earlier answer is an
entry too: who has seen that three hops lead from c to b finds what is four hops behind c in two lookups. A lookup may go either
way along an entry. Of a sum, `hops` is the number of additions. Everything else has 0: nothing in the context but the last tokens
tells about it, if anything does. A walk is shorter than the cycle, so that nodes which have not been passed remain to guess from.

These are steps of a search that starts at the question. Entries of the table could also be combined with each other before
any question is asked, which would halve the steps with each layer; whether a model does so is to be measured.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megadyn.checks import at_least
from megadyn.data.indexed import dtype_for
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.data.labels import Labels, labels_path, write_labels
from megadyn.data.record import Record
from megadyn.errors import ConfigError
from megadyn.files import os_errors_named, temporary_beside
from megadyn.tokenization.tokenizer import load_tokenizer

# Dims: D documents of L tokens; W walks over N nodes.
Ints = NDArray[np.int64]

CLASSES = ("end", "table", "question", "recall", "chase", "text", "term", "sum")
END, TABLE, QUESTION, RECALL, CHASE, TEXT, TERM, SUM = range(len(CLASSES))
AT_ONCE = 4096
"""Documents that are generated together; part of what a seed means."""
SUCCESSORS = (0.5, 0.25, 0.15, 0.1)
"""Probabilities of the words that may follow a word of the text."""
NODE_NAMES = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class Language:
    """Sizes of a document's parts."""

    nodes: int = 7
    """Entries of the table, at most 26. If the number is prime, a walk of any number of hops passes all nodes."""
    hops: int = 3
    """Walks go 1 to this many hops at a time, each as often; below `nodes`."""
    walks: int = 1
    """Walks of a document, over the same table."""
    answers: int = 5
    """Answers of each walk, below `nodes`."""
    words: int = 16
    """Words of the Markov text."""
    runs: int = 1
    """Runs of text in a document."""
    run_length: int = 8
    modulus: int = 5
    sums: tuple[int, ...] = (2,)
    """Terms of each sum in a document."""

    def __post_init__(self) -> None:
        for name in ("walks", "answers", "runs", "run_length"):
            at_least(f"language.{name}", getattr(self, name), 1)
        at_least("language.words", self.words, len(SUCCESSORS))
        at_least("language.modulus", self.modulus, 2)
        if not 3 <= self.nodes <= len(NODE_NAMES):
            raise ConfigError("language.nodes", self.nodes, f"from 3 to {len(NODE_NAMES)}")
        if not 1 <= self.hops < self.nodes:
            raise ConfigError("language.hops", self.hops, f"from 1 to language.nodes - 1 = {self.nodes - 1}")
        if self.answers >= self.nodes:
            raise ConfigError("language.answers", self.answers, f"below language.nodes = {self.nodes}")
        if any(terms < 2 for terms in self.sums):
            raise ConfigError("language.sums", self.sums, "numbers of terms of at least 2")

    @property
    def length(self) -> int:
        """Tokens of a document, its end included: the sequence length to train with."""
        return sum(self.part_lengths) + self.nodes + 1

    @property
    def part_lengths(self) -> list[int]:
        """Tokens of each part that stands anywhere behind the table: walks, runs, sums."""
        return [
            *[2 + self.answers] * self.walks,
            *[self.run_length] * self.runs,
            *(terms + 2 for terms in self.sums),
        ]

    @property
    def vocabulary(self) -> list[str]:
        """All tokens, by id."""
        names = NODE_NAMES[: self.nodes]
        return [
            "<eos>",
            *names,
            *(f"{a}>{b}" for a in names for b in names),
            *(f"{hops}:" for hops in range(1, self.hops + 1)),
            *(f"t{word}" for word in range(self.words)),
            *(f"+{term}" for term in range(self.modulus)),
            "=",
            *(f"s{total}" for total in range(self.modulus)),
        ]

    def first(self, token: str) -> int:
        """Id of a token, from which those of its group are counted."""
        return self.vocabulary.index(token)


def documents(language: Language, count: int, seed: int) -> Iterator[tuple[Ints, Labels]]:
    """`count` documents, some at a time: tokens [D, L] with the labels of these D x L tokens. The same for the same seed."""
    for batch, first in enumerate(range(0, count, AT_ONCE)):
        rng = np.random.default_rng([seed, batch])
        tokens, classes, hops = _documents(language, rng, AT_ONCE)
        size = min(AT_ONCE, count - first)
        codes = (part[:size].astype(np.uint8).ravel() for part in (classes, hops))
        yield tokens[:size], Labels(CLASSES, *codes)


def _documents(language: Language, rng: np.random.Generator, count: int) -> tuple[Ints, Ints, Ints]:
    """Tokens, classes and hops, each [D, L]."""
    shape = (count, language.length)
    tokens, classes, hops = np.zeros(shape, np.int64), np.full(shape, END), np.zeros(shape, np.int64)
    place, node_at = _cycles(language, rng, count)
    entries = rng.permuted(np.tile(np.arange(language.nodes), (count, 1)), axis=1)
    next_place = (np.take_along_axis(place, entries, axis=1) + 1) % language.nodes
    behind = np.take_along_axis(node_at, next_place, axis=1)
    tokens[:, : language.nodes] = language.first("a>a") + entries * language.nodes + behind
    classes[:, : language.nodes] = TABLE

    starts = _starts(language, rng, count)
    rows = np.arange(count)[:, None, None]

    def fill(parts: slice, what: Ints, of_class: Ints | int, of_hops: Ints | int = 0, skip: int = 0) -> None:
        """Puts `what` [D, parts, tokens] `skip` tokens behind the starts of these parts."""
        at = starts[:, parts, None] + skip + np.arange(what.shape[2])
        tokens[rows, at], classes[rows, at], hops[rows, at] = what, of_class, of_hops

    hops_of, begins = _walks(language, rng, count)
    walks = slice(0, language.walks)
    passed = np.take_along_axis(node_at, begins.reshape(count, -1), axis=1).reshape(begins.shape)
    kinds = np.where(hops_of == 1, RECALL, CHASE)[..., None]
    fill(walks, language.first("1:") + hops_of[..., None] - 1, QUESTION)
    fill(walks, language.first("a") + passed[..., :1], QUESTION, skip=1)
    fewest = _fewest(language.nodes, begins, hops_of)
    fill(walks, language.first("a") + passed[..., 1:], kinds, fewest, skip=2)
    runs = slice(language.walks, language.walks + language.runs)
    fill(runs, _text(language, rng, count), TEXT)
    for part, terms in enumerate(language.sums, runs.stop):
        parts = slice(part, part + 1)
        summed = rng.integers(0, language.modulus, (count, 1, terms))
        total = summed.sum(axis=2, keepdims=True) % language.modulus
        fill(parts, language.first("+0") + summed, TERM)
        fill(parts, np.full((count, 1, 1), language.first("=")), TERM, skip=terms)
        fill(parts, language.first("s0") + total, SUM, terms - 1, skip=terms + 1)
    return tokens, classes, hops


def _cycles(language: Language, rng: np.random.Generator, count: int) -> tuple[Ints, Ints]:
    """A random cycle over the nodes per document: the place of each node, and the node at each place, both [D, N]."""
    node_at = rng.permuted(np.tile(np.arange(language.nodes), (count, 1)), axis=1)
    return np.argsort(node_at, axis=1), node_at


def _starts(language: Language, rng: np.random.Generator, count: int) -> Ints:
    """Where each part begins in its document, [D, parts]. Parts of a kind stand in the order of their numbers."""
    lengths = np.array(language.part_lengths)
    kinds = np.repeat(
        range(2 + len(language.sums)), [language.walks, language.runs, *[1] * len(language.sums)]
    )
    order = rng.permuted(np.tile(kinds, (count, 1)), axis=1)
    which = np.argsort(order, axis=1, kind="stable")  # position in the document of part 0, 1, ...
    in_order = np.empty((count, len(lengths)), np.int64)
    np.put_along_axis(in_order, which, np.tile(lengths, (count, 1)), axis=1)
    starts = language.nodes + np.cumsum(in_order, axis=1) - in_order
    return np.take_along_axis(starts, which, axis=1)


def _walks(language: Language, rng: np.random.Generator, count: int) -> tuple[Ints, Ints]:
    """Hops of each walk [D, W], and the places on the cycle that it passes [D, W, answers + 1]."""
    hops = rng.integers(1, language.hops + 1, (count, language.walks))
    first = rng.integers(0, language.nodes, hops.shape)
    steps = np.arange(language.answers + 1)
    return hops, (first[..., None] + hops[..., None] * steps) % language.nodes


def _fewest(nodes: int, passed: Ints, hops: Ints) -> Ints:
    """The fewest lookups per answer [D, W, answers] of walks over places of the cycle, given the table and the answers before.

    Entries and answers are the edges of a graph over the places, which can be walked in either direction.
    """
    count, walks, places = passed.shape
    documents, circle = np.arange(count), np.arange(nodes)
    edge = np.zeros((count, nodes, nodes), np.bool_)
    edge[:, circle, (circle + 1) % nodes] = edge[:, (circle + 1) % nodes, circle] = True
    found = np.repeat(hops[..., None], places - 1, axis=2)
    for walk, answer in np.ndindex(walks, places - 1):
        begin, end = passed[:, walk, answer], passed[:, walk, answer + 1]
        reached = circle == begin[:, None]
        for steps in range(1, int(hops.max())):
            reached = reached | (reached[:, :, None] & edge).any(axis=1)
            shorter = reached[documents, end] & (steps < found[:, walk, answer])
            found[shorter, walk, answer] = steps
        edge[documents, begin, end] = edge[documents, end, begin] = True
    return found


def _text(language: Language, rng: np.random.Generator, count: int) -> Ints:
    """Runs of Markov text, [D, runs, tokens]. The successors of each word belong to the language, not to the seed."""
    words = language.words
    successors = np.random.default_rng(words).permuted(np.tile(np.arange(words), (words, 1)), axis=1)
    drawn = rng.choice(len(SUCCESSORS), (count, language.runs, language.run_length), p=SUCCESSORS)
    found = np.empty_like(drawn)
    found[..., 0] = rng.integers(0, words, found.shape[:2])
    for at in range(1, language.run_length):
        found[..., at] = successors[found[..., at - 1], drawn[..., at]]
    return language.first("t0") + found


def write_tokenizer(language: Language, folder: Path) -> None:
    """A `tokenizer.json` with one word per token, so that documents can be read and written with spaces between the words."""
    content = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 0,
                "content": "<eos>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: id for id, token in enumerate(language.vocabulary)},
            "unk_token": "<eos>",
        },
    }
    path = folder / "tokenizer.json"
    with os_errors_named(path):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)


def write_dataset(language: Language, prefix: Path, count: int, seed: int, tokenizer: Path) -> Record:
    """`count` documents as an indexed dataset under PREFIX, and PREFIX.labels. The same bytes for the same arguments.

    `tokenizer`: the folder of `write_tokenizer`.
    """
    at_least("documents", count, 1)
    known = load_tokenizer(tokenizer)
    parts: list[Labels] = []
    labels_path(prefix).unlink(missing_ok=True)  # those of the dataset that is replaced
    with IndexedWriter(prefix, dtype_for(known.vocab_size)) as writer:
        for tokens, labels in documents(language, count, seed):
            lengths = np.full(len(tokens), language.length)
            writer.add(tokens.ravel(), lengths, np.ones(len(tokens), np.int64))
            parts.append(labels)
        record = Record(
            tokenizer=known.name,
            fingerprint=known.fingerprint,
            vocab_size=known.vocab_size,
            eod=known.eod,
            append_eod=True,
            documents=count,
            sequences=count,
            tokens=writer.num_tokens,
            sha256=writer.sha256,
            skipped=0,
            source=[f"generated: {language}, seed {seed}"],
        )
        writer.finish(record)
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in ("classes", "hops"))
    write_labels(prefix, Labels(CLASSES, *joined), record.sha256)
    return record
