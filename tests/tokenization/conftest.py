"""The fixtures of `tests/datasets.py`."""

from tests.datasets import (
    logged,
    own_proofs,
    run_tool_script,
    sentencepiece_model,
    small_units,
    tokenizer_folder,
    write_dataset,
)

__all__ = [
    "logged",
    "own_proofs",
    "run_tool_script",
    "sentencepiece_model",
    "small_units",
    "tokenizer_folder",
    "write_dataset",
]
