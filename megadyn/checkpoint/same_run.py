"""What a run must have in common with the checkpoint it resumes from, and what has changed between the two.

A run may change anything that affects neither the shape nor the meaning of what a checkpoint holds: weights, the
optimizer's states, the averages of routed layers, and the position in the data. So loss weights, momentum, capacity, the causal
rule, RoPE's base, learning rates and layouts may change. MUST_EQUAL lists everything else, each with its reason.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megadyn.config import Config, ModelConfig, OptimizerConfig, resolved_config
from megadyn.config.rope import with_rope_section
from megadyn.errors import UserError
from megadyn.kinds import expand_layout
from megadyn.kinds.kind import SHAPES, TRAINED_SO

ORDER = "it determines the order of the samples"

MUST_EQUAL = {
    **dict.fromkeys(
        (
            f"model.{name}"
            for name in (
                "hidden_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "ffn_size",
                "vocab_size",
                "qkv_bias",
                "output_bias",
                "qk_norm",
                "tie_embeddings",
            )
        ),
        SHAPES,
    ),
    "model.normalization": TRAINED_SO,
    "model.logit_softcap": TRAINED_SO,
    "model.rope.skip_layers": TRAINED_SO,
    "model.sliding_window": TRAINED_SO,
    "model.window_layers": TRAINED_SO,
    "model.routing.kind": "it determines the layers and tensors of the model",
    "training.seed": ORDER,
    "training.sequence_length": ORDER,
}
"""In addition to the keys in the kind's `Kind.fixed`."""
LATER = ("output_bias", "qk_norm", "logit_softcap", "sliding_window", "window_layers", "rope.skip_layers")
"""Keys of the model section that checkpoints of 0.1.0 lack."""
SAME_TRAINING = ("seed", "sequence_length")
"""Keys of the training section in MUST_EQUAL. A manifest stores these, and the whole model section."""

COMPARED = (
    "model",
    "data",
    "tokenizer",
    "parallel",
    "optimizer",
    "training",
    "precision",
    "deepspeed_config",
)
"""Sections of the configuration whose changes are reported; the others only control reporting and saving."""


def begins_data(config: Config, manifest: dict[str, Any]) -> bool:
    """Whether the training data of `config` begin behind those of the checkpoint (`data.origin`), so that its own data, and how
    they were cut into samples, do not matter."""
    origin = config.data.origin
    return manifest.get("data_origin", 0) < origin <= manifest["consumed_samples"]


def check_phases(config: Config, manifest: dict[str, Any], folder: Path) -> None:
    """Raises UserError if the phases behind the checkpoint are not those of `config`, which is one phase's."""
    if (phase := config.phase) is None:
        return
    iteration, there = manifest["iteration"], manifest.get("phases", [])
    for place, ((_, was, *step), (name, now, *here)) in enumerate(zip(there, phase.passed)):
        is_over = place < len(there) - 1
        if step != here or (was != now if is_over else now < iteration):
            raise UserError(
                f"{folder}: phase {name!r} cannot change once it has begun: its steps were {step[0]} x {step[1]} tokens up to "
                f"iteration {was}, and here they are {here[0]} x {here[1]} up to {now}; only a later end of the last one can"
            )
    planned = phase.samples + (min(iteration, phase.end) - phase.begin) * phase.batch
    if manifest["consumed_samples"] < planned:
        raise UserError(
            f"{folder}: has consumed {manifest['consumed_samples']} samples, but these phases consume {planned} up to its "
            f"iteration {iteration}; give the phases the lengths and batch sizes that the run had"
        )


def check_same_run(config: Config, manifest: dict[str, Any], folder: Path) -> None:
    """Raises UserError, with each offending key and the reason, if `config` cannot resume from the checkpoint."""
    check_phases(config, manifest, folder)
    there = flat({"model": manifest["model"], "training": manifest["training"]})
    here = flat({"model": asdict(config.model), "training": asdict(config.training)})
    routing = config.model.routing
    own = {f"model.routing.{key}": reason for key, reason in routing.fixed.items()}
    # What an earlier version did not have, its models had at its default.
    defaults = flat({"model": asdict(ModelConfig())})
    of_kind = flat({"model": {"routing": asdict(type(routing)())}})
    later = {key: defaults[key] for key in (f"model.{name}" for name in LATER)}
    if there.get("model.routing.kind") == routing.kind:
        later |= {key: of_kind[key] for key in own if of_kind[key] is not None}
    there = later | there
    found = []
    for key, reason in (MUST_EQUAL | own).items():
        if key not in there or key not in here:
            continue  # a key that one of the two versions does not have
        if key == "training.sequence_length" and begins_data(config, manifest):
            continue
        was, now = there[key], here[key]
        if key == "model.routing.layout" and there["model.num_layers"] == config.model.num_layers:
            was, now = (expand_layout(layout or "bilayer", config.model.num_layers) for layout in (was, now))
        if was != now:
            found.append(f"{key} is {was!r} in the checkpoint and {now!r} here ({reason})")
    # An average has weights alone, which any optimizer takes; versions without the key had AdamW.
    optimizer = manifest.get("optimizer", OptimizerConfig().name)
    if "averaged" not in manifest and optimizer != config.optimizer.name:
        found.append(
            f"optimizer.name is {optimizer!r} in the checkpoint and {config.optimizer.name!r} here (the two keep different "
            "states; an average or an export of the checkpoint has none, and starts a run with either)"
        )
    if found:
        raise UserError(
            f"{folder} is a checkpoint of another run: {'; '.join(found)}. "
            "Change the configuration, or set checkpoint.resume=never with another output_dir"
        )


def changes(config: Config, folder: Path) -> dict[str, dict[str, Any]]:
    """By dotted key: the value when the verified checkpoint was saved (`was`) and the value now (`is`)."""
    path = folder / "config.yaml"
    there = flat(with_rope_section(OmegaConf.to_container(OmegaConf.load(path)), str(path)))
    here = flat(resolved_config(config))
    return {
        key: {"was": there[key], "is": value}
        for key, value in here.items()
        if key.partition(".")[0] in COMPARED and key in there and there[key] != value
    }


def changes_line(changed: dict[str, dict[str, Any]]) -> str:
    """`changes` as one line. Keys that only affect initial values are marked."""
    return "; ".join(
        f"{key} was {value['was']} and is {value['is']}"
        + (" (no effect now)" if key.endswith(FIRST_VALUES) else "")
        for key, value in changed.items()
    )


FIRST_VALUES = ("_init", ".init_std")


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens a nested dictionary to dotted keys; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
