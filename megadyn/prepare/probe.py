"""A generated language in which it is known how many steps, one after another, each token takes to predict.

Every document has the same length. Behind a table stand parts of these kinds, drawn until the next one does not fit:

    table   `c>f`          one token per entry of a random cycle over the nodes: what follows each node; in random order
    walk    `c > > > b`    a node, one arrow per lookup, and the node that they lead to: `recall` after one, else `chase`
    list    `3 q p s 1`    a state, names of permutations of the states, and the `state` in which they leave it
    sum     `+3 +1 +1 s0`  terms, and their `sum` modulo `modulus`
    text    `t5 t2 t9`     order-1 Markov text: only the last word tells about the next; fills what is left, too

A document ends with `<eos>`. What the names of permutations and the words of the text mean belongs to the language, and is the
same for all seeds.

A walk, a list or a sum may end after each of its steps, and shorter ones are likelier, which makes the longer ones easier to
learn. So at every step a model has to know what would come if this were the last: `hops` of a token is the number of lookups,
permutations or additions that lead to where its *prediction* is made, whether an answer follows or one more step. Everything
else has 0 hops: nothing but the last token tells about it, if anything does.

Hops are steps of a search from the part's beginning. Entries of the table, or permutations, could also be combined with each
other, which would halve the steps with each layer, and terms can be added all at once; whether models do so is to be measured.
A walk goes at most half around the cycle, so that backwards is no shorter.
"""

import json
import random
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

Ints = NDArray[np.int64]
Part = list[tuple[int, int, int]]
"""Token, class and hops of each position."""

CLASSES = ("end", "table", "question", "step", "recall", "chase", "state", "sum", "text")
END, TABLE, QUESTION, STEP, RECALL, CHASE, STATE, SUM, TEXT = range(len(CLASSES))
ANSWERS = ("recall", "chase", "state", "sum")
"""Classes of what takes steps to know. `step` takes none: it is chance, though its place in the part may be deep."""
SUCCESSORS = (0.5, 0.25, 0.15, 0.1)
"""Probabilities of the words that may follow a word of the text."""
AT_ONCE = 4096
"""Documents that are held in memory at a time."""
LONGER = 0.75
"""How likely a part of one step more is, against one of a step less."""
DRAWS = 1000
"""Among which the permutations of a language are looked for."""
NODE_NAMES = "abcdefghijklmnopqrstuvwxyz"
AT_ONCE = 4096
"""Documents that are held in memory at a time."""
LONGER = 0.75
"""How likely a part of one step more is, against one of a step less."""
DRAWS = 1000
"""Among which the permutations of a language are looked for."""
NODE_NAMES = "abcdefghijklmnopqrstuvwxyz"
LEAST_TEXT = 4
"""Words of a document's text if its other parts are as long as they may be."""


@dataclass(frozen=True, kw_only=True)
class Language:
    """Sizes of a document's parts."""

    length: int = 96
    """Tokens of a document, its end included: the sequence length to train with."""
    nodes: int = 6
    """Entries of the table, at most 26."""
    lookups: int = 3
    """Of the longest walk, at most half of `nodes`."""
    states: int = 5
    permutations: int = 4
    longest: int = 10
    """Permutations of the longest list."""
    modulus: int = 5
    terms: int = 3
    """Of the longest sum; the shortest has two."""
    words: int = 16
    """Words of the Markov text."""
    run: int = 8
    """Words of a run of text."""
    walks: int = 3
    lists: int = 7
    sums: int = 1
    texts: int = 2
    """How often a part is a walk, a list, a sum or a run of text, relative to the others."""

    def __post_init__(self) -> None:
        for name in ("walks", "lists", "sums", "texts"):
            at_least(f"language.{name}", getattr(self, name), 0)
        for name, least in {"permutations": 2, "longest": 1, "modulus": 2, "terms": 2, "run": 1}.items():
            at_least(f"language.{name}", getattr(self, name), least)
        at_least("language.walks + lists + sums + texts", self.walks + self.lists + self.sums + self.texts, 1)
        at_least("language.length", self.length, self.nodes + 1)
        at_least("language.words", self.words, len(SUCCESSORS))
        at_least("language.states", self.states, 3)  # permutations of two states can be applied in any order
        if (found := len(self.permutation)) < self.permutations:
            of = f"at most {found} of {self.states} states, or two could be exchanged"
            raise ConfigError("language.permutations", self.permutations, of)
        if not 3 <= self.nodes <= len(NODE_NAMES):
            raise ConfigError("language.nodes", self.nodes, f"from 3 to {len(NODE_NAMES)}")
        if not 1 <= self.lookups <= self.nodes // 2:
            raise ConfigError(
                "language.lookups", self.lookups, f"from 1 to language.nodes / 2 = {self.nodes // 2}"
            )

    @property
    def vocabulary(self) -> list[str]:
        """All tokens, by id."""
        names = NODE_NAMES[: self.nodes]
        return [
            "<eos>",
            *names,
            *(f"{a}>{b}" for a in names for b in names),
            ">",
            *map(str, range(self.states)),
            *(f"p{number}" for number in range(self.permutations)),
            *(f"+{term}" for term in range(self.modulus)),
            *(f"s{total}" for total in range(self.modulus)),
            *(f"t{word}" for word in range(self.words)),
        ]

    def first(self, token: str) -> int:
        """Id of a token, from which those of its group are counted."""
        return self.vocabulary.index(token)

    @property
    def permutation(self) -> list[list[int]]:
        """What each permutation makes of each state; no two of them can be exchanged."""
        rng = random.Random(self.states)
        found: list[list[int]] = []
        for _ in range(DRAWS):
            one = rng.sample(range(self.states), self.states)
            if all([one[of] for of in other] != [other[of] for of in one] for other in found):
                found.append(one)
            if len(found) == self.permutations:
                break
        return found

    @property
    def successors(self) -> list[list[int]]:
        """The words that may follow each word, the likeliest first."""
        rng = random.Random(self.words)
        return [rng.sample(range(self.words), len(SUCCESSORS)) for _ in range(self.words)]


class Writer:
    """Documents of a language, one after another from one stream of random numbers: more begin with the same ones."""

    def __init__(self, language: Language, seed: int):
        self.language, self.rng = language, random.Random(seed)
        self.first = {name: language.first(name) for name in ("a", "a>a", ">", "0", "p0", "+0", "s0", "t0")}
        self.permutation, self.successors = language.permutation, language.successors

    def document(self) -> Part:
        """`language.length` positions."""
        language = self.language
        document, following = self.table()
        kinds = (self.walk, self.list, self.sum, self.text)
        weights = (language.walks, language.lists, language.sums, language.texts)
        while True:
            (kind,) = self.rng.choices(kinds, weights)
            part = kind(following)
            left = language.length - 1 - len(document)
            if len(part) > left:
                return [*document, *self.text(following, left), (0, END, 0)]
            document += part

    def steps(self, most: int, least: int = 1) -> int:
        """Steps of a part: each number is LONGER times as likely as the one below."""
        numbers = range(least, most + 1)
        return self.rng.choices(numbers, [LONGER**number for number in numbers])[0]

    def table(self) -> tuple[Part, dict[int, int]]:
        """The table, and the node behind each node."""
        nodes = self.language.nodes
        cycle = self.rng.sample(range(nodes), nodes)
        following = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
        entries = self.rng.sample(sorted(following.items()), nodes)
        return [(self.first["a>a"] + node * nodes + behind, TABLE, 0) for node, behind in entries], following

    def walk(self, following: dict[int, int]) -> Part:
        node, lookups = self.rng.randrange(self.language.nodes), self.steps(self.language.lookups)
        part = [(self.first["a"] + node, QUESTION, 0)]
        for step in range(lookups):
            part.append((self.first[">"], STEP, step))
            node = following[node]
        return [*part, (self.first["a"] + node, RECALL if lookups == 1 else CHASE, lookups)]

    def list(self, following: dict[int, int]) -> Part:
        language = self.language
        state, steps = self.rng.randrange(language.states), self.steps(language.longest)
        part = [(self.first["0"] + state, QUESTION, 0)]
        for step in range(steps):
            which = self.rng.randrange(language.permutations)
            part.append((self.first["p0"] + which, STEP, step))
            state = self.permutation[which][state]
        return [*part, (self.first["0"] + state, STATE, steps)]

    def sum(self, following: dict[int, int]) -> Part:
        """Nothing has to be added before the second term."""
        language = self.language
        terms = [self.rng.randrange(language.modulus) for _ in range(self.steps(language.terms, least=2))]
        part = [(self.first["+0"] + term, STEP, max(0, number - 1)) for number, term in enumerate(terms)]
        return [*part, (self.first["s0"] + sum(terms) % language.modulus, SUM, len(terms) - 1)]

    def text(self, following: dict[int, int], length: int | None = None) -> Part:
        word = self.rng.randrange(self.language.words)
        part = []
        for _ in range(self.language.run if length is None else length):
            part.append((self.first["t0"] + word, TEXT, 0))
            (word,) = self.rng.choices(self.successors[word], SUCCESSORS)
        return part


def documents(language: Language, count: int, seed: int) -> Iterator[tuple[Ints, Labels]]:
    """`count` documents, some at a time: tokens [D, L] with the labels of these D x L tokens. The same for the same seed."""
    writer = Writer(language, seed)
    for first in range(0, count, AT_ONCE):
        some = np.array([writer.document() for _ in range(min(AT_ONCE, count - first))])
        yield (
            some[..., 0],
            Labels(CLASSES, some[..., 1].astype(np.uint8).ravel(), some[..., 2].astype(np.uint8).ravel()),
        )


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
