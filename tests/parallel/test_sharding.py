"""The table of cuts: every kind of parameter comes back from its parts, and no cut changes the initial weights."""

import zlib

import pytest
import torch

from megadyn.network import Network
from megadyn.parallel.grid import Axis
from megadyn.parallel.params import ParamMaker, normal
from megadyn.parallel.sharding import Sharding
from megadyn.routing.layer import LossScale
from tests.helpers.networks import layer_context
from tests.helpers.tiny import VOCAB, tiny_config

LAYER = "model.layers.3"
SHAPES = {
    "model.embed_tokens.weight": (VOCAB, 8),
    "lm_head.weight": (VOCAB, 8),
    "model.norm.weight": (8,),
    f"{LAYER}.self_attn.q_proj.weight": (16, 8),
    f"{LAYER}.self_attn.q_proj.bias": (16,),
    f"{LAYER}.self_attn.k_proj.weight": (8, 8),
    f"{LAYER}.self_attn.k_proj.bias": (8,),
    f"{LAYER}.self_attn.v_proj.weight": (8, 8),
    f"{LAYER}.self_attn.v_proj.bias": (8,),
    f"{LAYER}.self_attn.o_proj.weight": (8, 16),
    f"{LAYER}.mlp.gate_proj.weight": (12, 8),
    f"{LAYER}.mlp.up_proj.weight": (12, 8),
    f"{LAYER}.mlp.down_proj.weight": (8, 12),
    f"{LAYER}.input_layernorm.weight": (8,),
    f"{LAYER}.prior.gate_proj.weight": (12, 8),
    f"{LAYER}.prior.up_proj.weight": (12, 8),
    f"{LAYER}.prior.down_proj.weight": (8, 12),
    f"{LAYER}.prior.norm.weight": (8,),
    f"{LAYER}.router.beta_ce": (1,),
}
ROWS = {"embed_tokens", "lm_head", "q_proj", "mlp.gate_proj", "mlp.up_proj"}
KV = {"k_proj", "v_proj"}
COLUMNS = {"o_proj", "mlp.down_proj"}


def is_one_of(name: str, parts: set[str]) -> bool:
    return any(f".{part}." in f".{name}" for part in parts)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_a_parameter_comes_back_from_its_parts(name, kv_heads, size):
    sharding = Sharding(size, kv_heads)
    whole = torch.randn(SHAPES[name])
    parts = [sharding.cut(name, whole, rank) for rank in range(size)]
    assert torch.equal(sharding.uncut(name, parts, VOCAB), whole)

    expected = None
    if size > 1 and (is_one_of(name, ROWS) or (is_one_of(name, KV) and kv_heads >= size)):
        expected = 0
    elif size > 1 and is_one_of(name, COLUMNS):
        expected = 1
    assert sharding.dim(name) == expected
    for rank, part in enumerate(parts):
        if expected is None:
            assert torch.equal(part, whole)
            continue
        width = -(-whole.shape[expected] // size)
        assert part.shape[expected] == width
        mine = whole.narrow(expected, rank * width, min(width, whole.shape[expected] - rank * width))
        assert torch.equal(part.narrow(expected, 0, mine.shape[expected]), mine)


def test_the_vocabulary_is_padded_with_zeros():
    sharding = Sharding(4, 4)
    parts = [sharding.cut("lm_head.weight", torch.ones(VOCAB, 8), rank) for rank in range(4)]
    assert [int(part.sum() / 8) for part in parts] == [16, 16, 16, 13]
    assert all(part.shape == (16, 8) for part in parts)


def test_some_ranks_may_hold_nothing_but_padding():
    sharding = Sharding(4, 4)
    whole = torch.randn(5, 3)
    parts = [sharding.cut("model.embed_tokens.weight", whole, rank) for rank in range(4)]
    assert torch.equal(parts[3], torch.zeros(2, 3))
    assert torch.equal(sharding.uncut("model.embed_tokens.weight", parts, 5), whole)
    drawn = [
        ParamMaker(sharding, tp=Axis("tp", rank, 4))("model.embed_tokens.weight", (5, 3), normal(0.5))
        for rank in range(4)
    ]
    assert torch.equal(drawn[3], torch.zeros(2, 3))
    alone = ParamMaker(Sharding(1, 4))("model.embed_tokens.weight", (5, 3), normal(0.5))
    assert torch.equal(sharding.uncut("model.embed_tokens.weight", drawn, 5), alone)


def test_a_parameter_that_does_not_divide_is_never_padded_in_silence():
    with pytest.raises(AssertionError, match="does not divide by 4"):
        Sharding(4, 4).cut(f"{LAYER}.mlp.up_proj.weight", torch.ones(6, 8), 0)


def network_of_rank(tensor: int, rank: int, **kwargs) -> Network:
    """As built by one of `tensor` ranks; building takes no collective."""
    return Network(
        layer_context(tiny_config(tensor=tensor, **kwargs), Axis("tp", rank, tensor), torch.float32),
        LossScale(),
    )


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_do_not_depend_on_the_tensor_size(tensor, tied):
    whole = {p.global_name: p for p in network_of_rank(1, 0, tied=tied).parameters()}
    ranks = [
        {p.global_name: p for p in network_of_rank(tensor, rank, tied=tied).parameters()}
        for rank in range(tensor)
    ]
    sharding = Sharding(tensor, 2)
    for name, param in whole.items():
        assert torch.equal(sharding.uncut(name, [rank[name] for rank in ranks], VOCAB), param), name
        assert all(rank[name].tensor_model_parallel == (sharding.dim(name) is not None) for rank in ranks)
        assert all(rank[name].is_contiguous() for rank in ranks)
    assert all(rank.keys() == whole.keys() for rank in ranks)


def test_initial_weights_depend_on_the_name_and_the_seed_alone():
    def draw(name: str, seed: int) -> torch.Tensor:
        return ParamMaker(Sharding(1, 1), seed)(name, (4, 6), normal(0.5)).detach()

    first = draw("a.weight", 1)
    torch.manual_seed(99)  # the global generator is of no account
    assert torch.equal(draw("a.weight", 1), first)
    assert not torch.equal(draw("b.weight", 1), first)
    assert not torch.equal(draw("a.weight", 2), first)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", f"{LAYER}.mlp.up_proj.weight", f"{LAYER}.mlp.down_proj.weight"]
)
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_draws_only_the_strips_that_it_holds_and_the_same_numbers(name, size, monkeypatch):
    shape = (VOCAB if "head" in name else 48, 64)
    monkeypatch.setattr("megadyn.parallel.params.STRIP", 200)  # whole slices: 3 of 64 elements, or 4 of 48
    drawn = []

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        drawn.append(torch.Size(shape).numel())
        return torch.randn(shape, generator=generator)

    whole = ParamMaker(Sharding(1, 4))(name, shape, draw).detach()
    assert sum(drawn) == whole.numel() and max(drawn) <= 200
    slices = whole.T if "down" in name else whole
    assert len({tuple(row[:3].tolist()) for row in slices}) == len(slices), "no strip repeats another"
    for rank in range(size):
        drawn.clear()
        sharding = Sharding(size, 4)
        part = ParamMaker(sharding, tp=Axis("tp", rank, size))(name, shape, draw).detach()
        assert torch.equal(part, sharding.cut(name, whole, rank))
        assert sum(drawn) <= part.numel() + 2 * 200


def test_a_small_tensor_is_one_strip_of_the_seed_of_its_name(monkeypatch):
    """Runs of before strips begin as they did."""
    make = ParamMaker(Sharding(1, 4), 5)
    seed = zlib.crc32(b"5/model.norm.weight")
    expected = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed)) * 0.5
    assert torch.equal(make("model.norm.weight", (48, 64), normal(0.5)), expected)


def test_no_two_matrices_of_a_network_start_alike():
    matrices = [p for p in network_of_rank(1, 0).parameters() if p.ndim == 2]
    assert len({tuple(p.flatten()[:8].tolist()) for p in matrices}) == len(matrices)
