"""What each way of recomputation keeps for the backward pass, and what it computes again."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megadyn.planning.flops import training_flops
from tests.helpers.networks import make_network, with_routing
from tests.helpers.tiny import KINDS, VOCAB, tiny_config

LENGTH, BATCH = 128, 2


def kept_bytes(kind: str, recompute: str) -> int:
    """Of storages that autograd holds after the forward pass, weights apart."""
    network = make_network(
        with_routing(tiny_config(kind, recompute=recompute, ffn_size=128)), dtype=torch.float32
    )
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its address
        return x

    tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        network(tokens[:, :-1], tokens[:, 1:])
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_selective_keeps_less_than_all_and_full_keeps_least(kind):
    none, selective, full = (kept_bytes(kind, recompute) for recompute in ("none", "selective", "full"))
    assert full < selective < none
    if kind == "dense":
        # a token and layer: two inner products of SwiGLU [128] and what attention averaged [32], in four bytes
        least = 4 * BATCH * LENGTH * 4 * (2 * 128 + 32)
        assert none - selective >= least


def flops(recompute: str) -> int:
    network = make_network(tiny_config("dense", recompute=recompute), dtype=torch.float32)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    # knows nothing of fused attention on a CPU: projections alone
    with FlopCounterMode(display=False) as counter:
        network(tokens[:, :-1], tokens[:, 1:]).backward()
    return counter.get_total_flops()


def test_selective_repeats_no_projection_and_full_repeats_each_layer():
    none, selective, full = (flops(recompute) for recompute in ("none", "selective", "full"))
    assert selective == none
    model = tiny_config("dense").model
    assert full > 1.2 * none
    assert none <= BATCH * training_flops(model, LENGTH)
