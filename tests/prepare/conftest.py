"""The fixtures of `tests/helpers/datasets.py`."""

from tests.helpers.datasets import (
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
