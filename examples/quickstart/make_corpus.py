"""Writes this machine's Python standard library as two JSONL corpora: real text that every machine has.

    python examples/quickstart/make_corpus.py FOLDER

Writes FOLDER/train.jsonl and FOLDER/validation.jsonl, one document per source file; every 20th file is used for validation.
"""

import json
import sys
import sysconfig
from pathlib import Path

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}


def main(folder: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in library.rglob("*.py") if not LEFT_OUT & set(path.relative_to(library).parts)
    )
    documents = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    documents = [text for text in documents if text.strip()]
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"validation": documents[::20], "train": [text for i, text in enumerate(documents) if i % 20]}
    for name, texts in parts.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        temporary.rename(folder / f"{name}.jsonl")
        print(f"{folder / name}.jsonl: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
