"""A run's checkpoint as a Hugging Face folder."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megadyn.checkpoint.card import last_records, model_card
from megadyn.checkpoint.layout import damage, read_manifest
from megadyn.checkpoint.merge import ShardedTensors, thresholds
from megadyn.config import load_config
from megadyn.config.dense_map import misfit
from megadyn.errors import UserError
from megadyn.hf.convert import write_hf_folder
from megadyn.log import log
from megadyn.parallel.params import PRECISIONS
from megadyn.progress import each
from megadyn.tokenization.tokenizer import load_tokenizer

SHARD_BYTES = 5 * 10**9


def export(
    checkpoint: Path,
    output: Path,
    *,
    style: str = "megadyn",
    precision: str | None = None,
    tokenizer: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Merges a checkpoint's shards into `output`, which appears complete or not at all; returns a summary.

    Args:
        style: `megadyn`, or one of DENSE_TYPES for a dense model as plain Qwen2ForCausalLM and so on.
        precision: of the weights; tokenizer: its path. The run's own when left out.

    Raises:
        UserError: damaged checkpoint, a model that does not fit the architecture, an existing output.
    """
    manifest = read_manifest(checkpoint)
    log.info("verifying %s", checkpoint)
    if problem := damage(checkpoint, sorted(manifest["files"])):
        raise UserError(problem)
    _refuse_output(output, checkpoint, overwrite)
    config = load_config(checkpoint / "config.yaml")
    if style != "megadyn" and (problem := misfit(config.model, style)):
        raise UserError(f"{checkpoint} cannot be exported as {style}: {problem}")
    _refuse_tokenizer(tokenizer, config.tokenizer.path)
    precision = precision or config.precision
    with _complete_folder(output) as folder:
        summary = write_hf_folder(
            folder,
            config.model,
            whole_tensors(checkpoint, PRECISIONS[precision]),
            tokenizer=tokenizer or config.tokenizer.path,
            eod=config.tokenizer.eod,
            style=style,
            dtype=str(PRECISIONS[precision]).removeprefix("torch."),
            shard_bytes=shard_bytes,
            document_mask=config.data.document_mask,
        )
        history = last_records(checkpoint.absolute().parent.parent / "metrics.jsonl", manifest["iteration"])
        (folder / "README.md").write_text(
            model_card(
                config,
                manifest["iteration"],
                manifest["consumed_samples"],
                history,
                consumed_tokens=manifest.get("consumed_tokens"),
                phases=[name for name, *_ in manifest.get("phases", [])],
                style=style,
                precision=precision,
                tokenizer=summary["tokenizer"],
                averaged=[one["iteration"] for one in manifest.get("averaged", {"of": []})["of"]],
            )
        )
    return {"output": str(output), "iteration": manifest["iteration"], "precision": precision, **summary}


@contextmanager
def _complete_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, which takes the name `output`, and the place of what had it, when the block ends well."""
    log.info("writing %s", output)
    temporary = output.with_name(f".writing-{output.name}")
    old = output.with_name(f".replaced-{output.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if output.exists():
            output.rename(old)
        temporary.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output}: not written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_tokenizer(given: str | None, of_run: str) -> None:
    """Before anything is written. The run's own path may lead nowhere from here."""
    try:
        load_tokenizer(given or of_run)
    except UserError as error:
        if given:
            raise
        raise UserError(
            f"{error}; the run's configuration names it, and relative paths count from the working directory: "
            "export from the folder where the run was started, or name the tokenizer with --tokenizer"
        ) from None


def _refuse_output(output: Path, checkpoint: Path, overwrite: bool) -> None:
    """Only an earlier export may be replaced: never a run, or a folder of something else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{output} exists; pass --overwrite to replace it")
    if checkpoint.resolve().is_relative_to(output.resolve()) or not (output / "config.json").is_file():
        raise UserError(
            f"{output} is not an earlier export (it has no config.json, or holds the checkpoint): not replaced"
        )


def whole_tensors(checkpoint: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by name, one at a time: weights in `dtype`, thresholds in fp32."""
    weights = ShardedTensors(checkpoint, "weights")
    names = sorted(weights.names())
    for name in each(names, "exporting tensors", len(names)):
        yield name, weights.whole(name).to(dtype)
    for layer, threshold in thresholds(read_manifest(checkpoint)).items():
        yield f"model.layers.{layer}.causal_router.threshold", threshold.value.reshape(1)
