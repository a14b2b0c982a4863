"""The smallest runs that take every branch: grouped heads, biases, a vocabulary that no tensor size divides."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadyn.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megadyn.kinds import make_kind

ROOT = Path(__file__).parents[2]
VOCAB = 61


KINDS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "dtf": {"kind": "dtf", "ma_window": 7},
    "dtf-predictor": {"kind": "dtf", "ma_window": 7, "causal": "predictor"},
    "mod": {"kind": "mod", "capacity": 0.3},
    "mod-predictor": {"kind": "mod", "capacity": 0.3, "causal": "predictor", "gate": "identity"},
    "mod-bce": {"kind": "mod", "capacity": 0.3, "causal": "bce"},
    "dtrnet-token": {"kind": "dtrnet", "aux_loss_lambda": 0.1, "aux_loss_warmup": 3},
    "dtrnet-expert": {
        "kind": "dtrnet",
        "router_type": "expert_choice",
        "capacity": 0.4,
        "layout": "TD3",
        "aux_loss_lambda": 0.1,
    },
}
"""Routing keys of the first kinds, and of their causal rules. Auxiliary losses weigh enough to show. What tests run over these
holds of the others by the conformance suite, which runs over every kind in the registry."""

AS_SAVED = {
    "capacity": 0.125,
    "layout": None,
    "causal": "threshold",
    "threshold_momentum": 0.99,
    "predictor_loss_weight": 0.01,
    "ma_window": 100,
    "prior_factor": 0.0625,
    "prior_loss_weight": 0.05,
    "gate": "identity",
    "bce_loss_weight": 0.01,
    "z_loss_weight": 0.0001,
    "router_type": "token_choice",
    "aux_loss_lambda": 0.0008,
    "aux_loss_warmup": 0,
    "safe_min_attn_ratio": 0.05,
    "jitter": 0.0,
    "entropy_bonus": 0.0,
}
"""`model.routing` of a run of version 0.1, which saved the keys of all kinds, but for `kind`."""

VARIANTS: dict[str, dict[str, Any]] = {
    "dtrnet-target": {"kind": "dtrnet", "target_share": 0.3, "aux_loss_lambda": 0.05},
    "mod-threshold": {"kind": "mod", "capacity": 0.3, "choose": "threshold", "threshold_start": 1},
    "stt": {"kind": "stt", "ma_window": 7, "prior_loss_weight": 0.1},
    "stt-scale-free": {"kind": "stt", "ma_window": 7, "prior_loss_weight": 0.1, "scale_free": True},
    "dtf-relative": {"kind": "dtf", "ma_window": 7, "scale_free": True, "relative_gate": True},
    "fixed": {"kind": "fixed", "capacity": 0.3},
    "fixed-stride": {"kind": "fixed", "capacity": 0.3, "score": "stride"},
    "nested": {"kind": "nested", "capacity": 0.3, "threshold_rate": 0.1},
    "subskip": {"kind": "subskip", "temperature_steps": 5},
    "skip_middle": {"kind": "skip_middle", "pressure_rate": 0.1},
}
"""Other kinds and variants, for tests that ask for one by name."""


def tiny_config(
    kind: str = "dtf",
    *,
    tensor: int = 1,
    pipeline: int = 1,
    zero: int = 1,
    recompute: str = "none",
    precision: str = "fp32",
    tied: bool = False,
    micro_batch: int = 1,
    iterations: int = 10,
    output_dir: str = "unused",
    **model: Any,
) -> Config:
    """A checked configuration of a four-layer model on sequences of 24 tokens, 4 samples a step.

    Weights are drawn large (0.2), so that tokens differ and the router's choices are no near-ties.
    """
    shape = {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": VOCAB,
        "qkv_bias": True,
        "init_std": 0.2,
        "tie_embeddings": tied,
    } | model
    return Config(
        model=ModelConfig(routing=make_kind(**(KINDS | VARIANTS)[kind]), **shape),
        data=DataConfig(train="unused"),
        tokenizer=TokenizerConfig(path="byte"),
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline),
        optimizer=OptimizerConfig(
            learning_rate=1e-3 if precision == "fp32" else 1e-4,
            min_learning_rate=1e-4,
            warmup_iterations=2,
            weight_decay=0.1,
        ),
        training=TrainingConfig(
            iterations=iterations,
            global_batch_size=4,
            micro_batch_size=micro_batch,
            sequence_length=24,
            recompute=recompute,
        ),
        precision=precision,
        deepspeed_config=str(ROOT / f"ds_configs/zero{zero}.json"),
        output_dir=output_dir,
    ).checked()


def tiny_tokens(steps: int, samples: int = 4, length: int = 24, vocab: int = VOCAB, seed: int = 7) -> Tensor:
    """[steps, samples, length + 1], the same on every rank."""
    return torch.randint(
        0, vocab, (steps, samples, length + 1), generator=torch.Generator().manual_seed(seed)
    )


def micro_batches(samples: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """[n, L + 1] as (tokens, labels) of `size` samples each."""
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in samples.split(size)]
