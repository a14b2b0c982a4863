"""Random text that is awkward in every way a tokenizer must survive, as files; and what datasets of them hold."""

import json
import random
from pathlib import Path

KINDS = ("bin", "idx", "json")
WORDS = [
    "def",
    "return",
    "self",
    "x",
    "naïve",
    "日本語",
    "🙂",
    "  ",
    "\n",
    "\t",
    "1234",
    "it's",
    "-->",
    "\r\n",
    "\0",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 0 to 60 words, some of them empty."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(0, 60))) if draw.random() > 0.1 else ""
        for _ in range(count)
    ]


def corpus_file(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def contents(prefix: Path, kinds: tuple[str, ...] = KINDS) -> list[bytes]:
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in kinds]
