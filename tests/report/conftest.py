"""Run folders as training leaves them, made in milliseconds: a real network's weights, a real dataset, invented metrics."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megadyn.checkpoint.layout import FORMAT, file_digest, folder_name, publish, shard_file, write_manifest
from megadyn.config import save_config
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.network import routed_layers, thresholds_of
from tests.helpers.networks import end_step, make_network
from tests.helpers.tiny import tiny_config

TEXT = 'def main():\n\tprint("<b>héllo & wörld 🙂</b>")  # 日本\x00\n' * 3
GATES = {"gate_routed": 0.8, "gate_routed_std": 0.05, "gate_unrouted": 0.6, "gate_unrouted_std": 0.1}


def layer_record(step: int, layer: int) -> dict[str, float]:
    if layer % 2 == 0:
        return {
            "S_CE": 0.5 + step / 1000,
            "S_CU": 0.4,
            "D_st": 10.0**-layer,
            "D_ch": 0.1,
            "beta_ce": -0.3,
            "beta_cu": -0.6,
            "ce_log_offset": 0.02,
            "cu_multiplier": 1.1,
            "prior_loss": 0.01,
        }
    return {"threshold": 0.7, "routed_fraction": 0.5, "causal_agreement": 0.8 + layer / 100, **GATES}


def records(steps: int = 6, per_step: int = 96) -> list[dict[str, Any]]:
    """Of a DTF run of four layers that reported each step."""
    found: list[dict[str, Any]] = [{"iteration": 0, "validation": {"topk": 5.5, "causal": 5.6}}]
    for step in range(1, steps + 1):
        found.append(
            {
                "iteration": step,
                "consumed_samples": 4 * step,
                "consumed_tokens": per_step * step,
                "lm_loss": 5.5 - step / 10,
                "aux_losses": {"prior": 0.01 * step},
                "grad_norm": None if step == 2 else 1.0,
                "learning_rate": 1e-3 / step,
                "step_time_ms": 10.0,
                "data_time_ms": 0.1,
                "tokens_per_second": 9600.0,
                "model_tflops": 0.5,
                "routing": {str(layer): layer_record(step, layer) for layer in range(4)},
            }
        )
    return [*found, {"iteration": steps, "validation": {"topk": 4.9, "causal": 5.0}}]


def full_records(**options: Any) -> list[dict[str, Any]]:
    """The same of a run that also reports speed by part and device."""
    found = records(**options)
    for record in found[1:-1]:
        split = {
            "data": 0.1,
            "forward": 3.0,
            "backward": 5.0,
            "communication": 1.0,
            "optimizer": 0.8,
            "other": 0.1,
        }
        record |= {
            "tokens_per_second_per_gpu": 2400.0,
            "dense_equivalent_tflops": 72.0,
            "mfu_causal_half": 0.41,
            "mfu_whole_square": 0.45,
            "step_split_ms": split,
            "memory_gib": {"allocated_peak": 61.0, "reserved_peak": 70.0},
            "grad_norms": {
                "embedding": 0.5,
                "attention": 0.4,
                "mlp": 0.3,
                "norm": 0.2,
                "router": 0.1,
                "prior": 0.05,
                "head": 0.6,
            },
            "learning_rates": {"base": 1e-3, "router": 1e-2},
        }
    return found


def start(iteration: int = 0, **changes: Any) -> dict[str, Any]:
    """A line of environment.jsonl."""
    return {
        "started": "2026-01-02T03:04:05Z",
        "iteration": iteration,
        "versions": {
            "python": "3.11.7",
            "torch": "2.13.0+cu130",
            "megadyn commit": "0123abc",
            "flash-attn": None,
        },
        "command": ["x"],
        "platform": "Linux",
        "world": {"size": 4, "tensor": 2},
        "hosts": {"node<0>": 4},
        "devices": {"NVIDIA H200": 4},
        "variables": {"NCCL_DEBUG": "INFO"},
    } | changes


def write_starts(folder: Path, *starts: dict[str, Any]) -> None:
    (folder / "environment.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))


def write_metrics(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run("mod") -> an output folder with metrics, config.yaml and one checkpoint of that kind of model."""

    def make(kind: str = "dtf", name: str = "run", **model: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        if not (tmp_path / "text.idx").exists():
            tokens = np.frombuffer(TEXT.encode(), np.uint8)
            with IndexedWriter(tmp_path / "text", "<u2") as writer:
                writer.add(tokens, [len(tokens)], [1])
                writer.finish()
        config = tiny_config(kind, vocab_size=257, output_dir=str(folder), **model)
        config.data.train = config.data.validation = str(tmp_path / "text")
        config.data.split = [1.0, 0.0, 0.0]
        config.training.iterations = 6
        save_config(config, folder / "config.yaml")
        write_metrics(folder, records())
        network = make_network(config, dtype=torch.float32)
        temporary = folder / "checkpoints" / "new"
        temporary.mkdir(parents=True)
        save_config(config, temporary / "config.yaml")
        weights = temporary / shard_file("weights", 0, 0, 0)
        save_file({param.global_name: param.detach().clone() for param in network.parameters()}, weights)
        tokens = torch.from_numpy(np.frombuffer(TEXT.encode(), np.uint8).astype(np.int64)[:48]).view(2, 24)
        network(tokens, tokens)
        end_step(network)  # thresholds that part these tokens
        averages = thresholds_of(routed_layers(network))
        # not config.yaml, which tests change
        write_manifest(
            temporary,
            {
                "format": FORMAT,
                "iteration": 6,
                "consumed_samples": 24,
                "model": asdict(config.model),
                "topology": {"tensor": 1, "pipeline": 1, "data": 1, "zero": 1},
                "thresholds": {str(index): average.state() for index, average in averages.items()},
                "files": {weights.name: file_digest(weights)},
            },
        )
        publish(temporary, folder / "checkpoints" / folder_name(6))
        return folder

    return make
