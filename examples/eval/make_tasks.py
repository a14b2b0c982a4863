"""Writes two tasks for lm_eval from held-out documents: their perplexity, and which of four lines comes next.

    python examples/eval/make_tasks.py runs/quickstart/corpus/validation.jsonl [runs/eval]

Writes FOLDER/heldout_text.jsonl and FOLDER/next_line.jsonl, which the files in examples/eval/tasks read. The same input
gives the same tasks: wrong lines are drawn from the other documents with a fixed seed.
"""

import json
import random
import sys
from pathlib import Path

from megadyn.errors import UserError, run_tool
from megadyn.prepare.readers import Corpus

DOCUMENTS, CHARACTERS = 100, 4000
"""Largest number of documents per task, and of characters per document."""
CONTEXT_LINES, CHOICES = 8, 4


def main(corpus: Path, folder: Path) -> None:
    texts = list(Corpus([corpus]))
    texts = [text[:CHARACTERS] for text in texts if text.strip()][:DOCUMENTS]
    questions = next_lines(texts)
    if not questions:
        raise UserError(
            f"{corpus}: no two documents of more than {CONTEXT_LINES} lines to make questions from"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("heldout_text", [{"text": text} for text in texts]), ("next_line", questions)):
        temporary = folder / f".{name}.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.rename(folder / f"{name}.jsonl")
        print(f"{folder / name}.jsonl: {len(rows)} rows")


def next_lines(texts: list[str]) -> list[dict[str, object]]:
    """One question per document that is long enough: `context` lines, `choices` for the next line, and the index of the
    `answer`."""
    draw = random.Random(0)
    documents = [[line for line in text.splitlines(keepends=True) if line.strip()] for text in texts]
    documents = [lines for lines in documents if len(lines) > CONTEXT_LINES]
    questions: list[dict[str, object]] = []
    for i, lines in enumerate(documents):
        at = draw.randrange(CONTEXT_LINES, len(lines))
        others = sorted(
            {line for other in documents[:i] + documents[i + 1 :] for line in other} - {lines[at]}
        )
        if len(others) < CHOICES - 1:
            continue
        choices, answer = draw.sample(others, CHOICES - 1), draw.randrange(CHOICES)
        choices.insert(answer, lines[at])
        questions.append(
            {"context": "".join(lines[at - CONTEXT_LINES : at]), "choices": choices, "answer": answer}
        )
    return questions


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    raise SystemExit(
        run_tool(lambda: main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "runs/eval")))
    )
