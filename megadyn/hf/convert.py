"""Writes a Hugging Face folder that loads without megadyn."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from megadyn.config import ModelConfig
from megadyn.config.config_map import document_fields, to_dense_config, to_hf_config
from megadyn.config.dense_map import TITLES, zero_biases
from megadyn.files import readable
from megadyn.hf.tokenizer_files import check_auto_tokenizer, write_json, write_tokenizer
from megadyn.kinds import Kind, module_of
from megadyn.log import log
from megadyn.tokenization.tokenizer import load_tokenizer

UNMASKED = (
    "The model was trained with masked documents, but transformers' {} does not mask them by itself: for a text "
    "of several documents give it position_ids that start again"
)


def write_hf_folder(
    folder: Path,
    model: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    tokenizer: str,
    style: str,
    dtype: str,
    shard_bytes: int,
    eod: str | None = None,
    document_mask: bool = False,
) -> dict[str, Any]:
    """Fills an empty `folder` with weights, configuration, tokenizer and, in `megadyn` style, the model code.

    Args:
        tensors: whole tensors under their Hugging Face names, taken one at a time.
        style: `megadyn`, or one of DENSE_TYPES for a dense model as plain Qwen2ForCausalLM and so on.
        dtype: torch's name of the weights' type, for config.json.
        eod: the token that ended documents in training, if that is not the tokenizer's own.
        document_mask: whether the run masked its samples by document; config.json then says so, with the id that ends one.
    """
    is_dense = style != "megadyn"
    summary = write_shards(
        with_zero_biases(tensors, zero_biases(model, style)) if is_dense else tensors, folder, shard_bytes
    )
    log.info("writing tokenizer and configuration")
    special, note = write_tokenizer(tokenizer, folder, model.max_position, eod)
    described = to_dense_config(model, style, dtype) if is_dense else to_hf_config(model, dtype)
    documents = document_fields(load_tokenizer(tokenizer, eod).eod if document_mask else None)
    write_json(folder / "config.json", described | special | documents)
    write_json(folder / "generation_config.json", {"do_sample": False, **special})
    if not is_dense:
        write_code(folder, type(model.routing))
    elif warning := check_auto_tokenizer(folder, tokenizer, TITLES[style]):
        note += f". {warning}"
    if is_dense and document_mask:
        unmasked = UNMASKED.format(TITLES[style])
        log.warning("%s", unmasked)
        note += f". {unmasked}"
    return summary | {"tokenizer": note}


CODE = (
    "cache_megadyn.py",
    "configuration_megadyn.py",
    "generation_megadyn.py",
    "inputs_megadyn.py",
    "layers_megadyn.py",
    "modeling_megadyn.py",
    "packing_megadyn.py",
    "room_megadyn.py",
    "rope_megadyn.py",
    "static_megadyn.py",
)
"""Files of this folder that every export contains."""


def write_code(folder: Path, kind: type[Kind]) -> None:
    """The Python files that run the model without megadyn: those common to all exports, and the kind's `exported.py`."""
    for name in (*CODE, *kind.shared):
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    own = Path(str(module_of(kind, "exported").__file__)).read_text()
    (folder / f"routing_{kind.name}.py").write_text(own.replace("from megadyn.hf.", "from ."))
    (folder / "routing_of.py").write_text(ROUTING_OF.format(name=kind.name))


ROUTING_OF = '''"""The model's kind of routing."""

from typing import Any

from .configuration_megadyn import ExportedKind
from .routing_{name} import EXPORTED


def exported_kind(routing: dict[str, Any]) -> ExportedKind:
    """Raises ValueError for another kind: the folder contains the code of only one."""
    if routing.get("kind") != "{name}":
        raise ValueError(f"routing.kind = {{routing.get('kind')!r}}: this folder's code supports only '{name}'")
    return EXPORTED
'''


def with_zero_biases(
    tensors: Iterable[tuple[str, Tensor]], projections: tuple[str, ...]
) -> Iterable[tuple[str, Tensor]]:
    """With a bias of zeros for `projections`, which the model has without and the architecture with."""
    for name, tensor in tensors:
        yield name, tensor
        if name.endswith(tuple(f"{projection}.weight" for projection in projections)):
            yield name.replace(".weight", ".bias"), tensor.new_zeros(tensor.shape[0])


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> dict[str, Any]:
    """Writes model.safetensors, or numbered shards of about `shard_bytes` and an index. Holds one shard in memory."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = parameters = 0

    def flush() -> None:
        save_file(pending, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        readable(folder / f"part-{len(shards)}")
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor.contiguous()
        total, parameters = total + tensor.nbytes, parameters + tensor.numel()
    flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):  # a shard's name contains the number of shards, known only now
        final = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        (folder / f"part-{number}").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(shards) > 1:
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    return {"parameters": parameters, "bytes": total, "shards": len(shards)}
