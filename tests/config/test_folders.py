"""Folders that are no Hugging Face folder, although they hold a model: what they are, and what would do."""

import re
from pathlib import Path

import pytest

from megadyn.config.shape import read_shape
from megadyn.errors import UserError
from megadyn.hf.source import open_source
from tests.helpers.tiny import tiny_config

MEGATRON = r"is a checkpoint of Megatron-LM, not a Hugging Face folder: .* Megatron Bridge \(AutoBridge\.export_ckpt\)"
DEEPSPEED = r"is a checkpoint of DeepSpeed, not a Hugging Face folder: .*zero_to_fp32\.py"
EXPORT = r"not a Hugging Face folder: export it \(megadyn export --checkpoint {} --output HF\)"
FOLDERS = {
    "Megatron-LM's, torch": (
        [
            "latest_checkpointed_iteration.txt",
            "iter_0000100/mp_rank_00/model_optim_rng.pt",
            "iter_0000100/mp_rank_01/model_optim_rng.pt",
        ],
        MEGATRON,
    ),
    "an iteration of it": (["mp_rank_00_000/model_optim_rng.pt"], MEGATRON),
    "Megatron-LM's, torch_dist": (
        ["latest_checkpointed_iteration.txt", "iter_0000100/common.pt", "iter_0000100/__0_0.distcp"],
        MEGATRON,
    ),
    "an iteration of torch_dist": ([".metadata", "common.pt", "metadata.json", "__0_0.distcp"], MEGATRON),
    "DeepSpeed's": (["latest", "global_step10/mp_rank_00_model_states.pt"], DEEPSPEED),
    "a step of DeepSpeed's": (["mp_rank_00_model_states.pt"], DEEPSPEED),
    "a run": (
        ["config.yaml", "checkpoints/iteration-00000002/manifest.json"],
        f"is a run of megadyn, {EXPORT}",
    ),
    "its averages": (["iteration-00000002/manifest.json"], f"is a run of megadyn, {EXPORT}"),
    "a checkpoint": (["manifest.json", "config.yaml"], f"is a checkpoint of megadyn, {EXPORT}"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_another_form_is_named_with_what_would_do(name: str, tmp_path: Path) -> None:
    files, message = FOLDERS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    place = re.escape(str(tmp_path))
    with pytest.raises(UserError, match=f"^{place} {message.format(place)}") as caught:
        open_source(tmp_path, tiny_config("dense").model, 24)
    assert ("checkpoint.fork_from" in str(caught.value)) == ("megadyn" in message)
    with pytest.raises(UserError, match=f"^model.shape_from = '{place}' {message.format(place)}"):
        read_shape(str(tmp_path))
