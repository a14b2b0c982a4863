"""Folders that hold a model in another form than Hugging Face's, by their names of files."""

from pathlib import Path

OURS = "of megadyn"
MEGATRON = ("latest_checkpointed_iteration.txt", "iter_*", "mp_rank_*", "common.pt")
"""In a folder of Megatron-LM, or in one of its iterations: of the format torch, and of torch_dist."""
DEEPSPEED = ("global_step*", "mp_rank_*_model_states.pt", "zero_pp_rank_*", "*_optim_states.pt")
"""In a folder of DeepSpeed's checkpoints, or in one of them."""


def another_form(path: Path) -> str | None:
    """What `path` is, and what would make it a Hugging Face folder; None if it is one, or nothing known."""
    if not path.is_dir() or (path / "config.json").exists():
        return None
    is_checkpoint = (path / "manifest.json").exists()
    if is_checkpoint or (path / "checkpoints").is_dir() or any(path.glob("iteration-*/manifest.json")):
        what = "checkpoint" if is_checkpoint else "run"
        return (
            f"is a {what} {OURS}, not a Hugging Face folder: export it (megadyn export --checkpoint {path} --output HF) "
            "and name the export"
        )
    if holds(path, DEEPSPEED):
        return (
            "is a checkpoint of DeepSpeed, not a Hugging Face folder: make it one first, with the tool of the code that wrote it "
            "(zero_to_fp32.py beside it gives the weights, by that code's names)"
        )
    if holds(path, MEGATRON):
        return (
            "is a checkpoint of Megatron-LM, not a Hugging Face folder: make it one first, with Megatron Bridge "
            "(AutoBridge.export_ckpt) or the tool of the code that wrote it, and name that"
        )
    return None


def holds(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(path.glob(pattern), None) is not None for pattern in patterns)
