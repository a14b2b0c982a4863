"""Everything that is cut over tensor ranks, against the same thing whole: output, input gradient, weight gradients.

In float64 against random output gradients. One launch a world size runs every check.
"""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from megadyn.model.attention import Attention
from megadyn.model.block import Mlp
from megadyn.model.norm import HeadNorm
from megadyn.network import routed_layers
from megadyn.parallel import loss
from megadyn.parallel.grid import Axis, Grid, make_grid
from megadyn.parallel.linear import (
    ColumnParallelLinear,
    KeyValueLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megadyn.parallel.loss import linear_cross_entropy
from megadyn.parallel.mappings import (
    copy_to_tp,
    enter_tp,
    gather_from_tp,
    leave_tp,
    max_over,
    own_part,
    reduce_from_tp,
    sum_over,
    whole_sequence,
)
from megadyn.parallel.params import ParamMaker, normal
from megadyn.parallel.sharding import Sharding
from tests.helpers.networks import ALONE, disturb, gradients, known, make_network, with_routing
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import KINDS, tiny_config, tiny_tokens

F64 = torch.float64


@pytest.mark.parametrize("tensor", [2, 4])
def test_split_equals_whole(tensor):
    run_on_ranks(check_all, tensor)


def check_all() -> None:
    tp = make_grid(dist.get_world_size(), 1).tp
    check_mappings(tp)
    check_column(tp)
    check_row(tp)
    for kv_heads in (1, 2, 4):
        check_key_value(tp, kv_heads)
        check_attention(tp, kv_heads, "pre")
        check_attention(tp, kv_heads, "hybridnorm")
    check_head_norm(tp)
    check_mlp(tp)
    check_embedding(tp)
    for vocab, chunk_tokens in ((61, 1000), (61, 3), (5, 3), (64, 7)):
        check_loss(tp, vocab, chunk_tokens)
    check_network(tp, "dense", tied=True)
    check_network(tp, "dtf", num_layers=5, num_kv_heads=1)
    check_network(tp, "dtf", num_layers=5, num_kv_heads=4, tied=True)
    check_network(tp, "dtrnet-token", num_kv_heads=1, normalization="lns")
    check_network(tp, "mod", sequence=True)
    if tp.size == 4:
        check_grids()
        return  # how kinds put these layers together does not depend on the number of ranks
    for kind in KINDS:
        check_network(tp, kind, normalization="hybridnorm")
        check_network(tp, kind, sequence=True)
    for kind in ("dense", "dtf", "mod", "dtrnet-token", "dtrnet-expert"):
        check_network(tp, kind, sequence=True, num_kv_heads=1, normalization="hybridnorm")
        check_network(tp, kind, sequence=True, tied=True, normalization="lns", recompute="full")
    for kind in ("dense", "mod", "dtrnet-token"):
        for sequence in (False, True):
            check_network(tp, kind, sequence=sequence, num_kv_heads=1, qk_norm=True, output_bias=True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def of_ranks(tp: Axis, *shape: int) -> list[Tensor]:
    """Another random tensor for each rank, all known to all."""
    return [random(*shape, seed=100 + rank) for rank in range(tp.size)]


# ---- collectives ---------------------------------------------------------------------------------


def check_mappings(tp: Axis) -> None:
    x, grads = of_ranks(tp, 3, 4), of_ranks(tp, 3, 4)
    mine = x[tp.rank].clone().requires_grad_()

    copied = copy_to_tp(mine, tp)
    assert torch.equal(copied, x[tp.rank])
    grad = grads[tp.rank].clone()
    copied.backward(grad)
    assert_close(mine.grad, sum(grads))
    assert torch.equal(grad, grads[tp.rank]), "a collective wrote into its caller's tensor"

    mine.grad = None
    total = reduce_from_tp(mine, tp)
    assert_close(total, sum(x))
    assert torch.equal(mine, x[tp.rank]), "a collective wrote into its caller's tensor"
    total.backward(grads[tp.rank])
    assert torch.equal(mine.grad, grads[tp.rank])

    mine.grad = None
    joined = gather_from_tp(mine, tp)
    assert torch.equal(joined, torch.cat(x, dim=-1))
    wide = random(3, 4 * tp.size, seed=5)
    joined.backward(wide)
    assert torch.equal(mine.grad, wide[:, 4 * tp.rank : 4 * tp.rank + 4])

    parts = of_ranks(tp, 2, 3, 4)  # of a sequence
    mine = parts[tp.rank].clone().requires_grad_()
    entered, grads = enter_tp(mine, tp, tp), of_ranks(tp, 2, 3 * tp.size, 4)
    assert torch.equal(entered, torch.cat(parts, dim=1))
    entered.backward(grads[tp.rank])
    assert_close(mine.grad, own_part(sum(grads), tp))
    mine = grads[tp.rank].clone().requires_grad_()
    left = leave_tp(mine, tp, tp)
    assert_close(left, own_part(sum(grads), tp))
    left.backward(parts[tp.rank])
    assert torch.equal(mine.grad, torch.cat(parts, dim=1))
    assert torch.equal(whole_sequence(own_part(grads[0], tp), tp), grads[0])

    turned = x[tp.rank].T  # not contiguous
    assert_close(sum_over(turned, tp), sum(x).T)
    assert_close(max_over(turned, tp), torch.stack(x).amax(dim=0).T)
    assert_close(gather_from_tp(turned, tp), torch.cat([part.T for part in x], dim=-1))
    assert torch.equal(turned, x[tp.rank].T)


def check_grids() -> None:
    """On four ranks: tensor fastest, then data, then pipeline."""
    me = dist.get_rank()
    half, parity = me // 2, me % 2
    for tensor, pipeline, place in (
        (2, 2, (parity, 0, half)),
        (2, 1, (parity, half, 0)),
        (1, 2, (0, parity, half)),
        (1, 1, (0, me, 0)),
        (1, 4, (0, 0, me)),
    ):
        grid: Grid = make_grid(tensor, pipeline)
        assert (grid.tp.rank, grid.dp.rank, grid.pp.rank) == place
        assert (grid.tp.size, grid.pp.size, grid.dp.size) == (tensor, pipeline, 4 // (tensor * pipeline))
        assert (grid.is_first_stage, grid.is_last_stage) == (grid.pp.rank == 0, grid.pp.rank == pipeline - 1)
        for axis, stride in ((grid.tp, 1), (grid.dp, tensor), (grid.pp, 4 // pipeline)):
            line = [me + (i - axis.rank) * stride for i in range(axis.size)]
            assert sum_over(torch.tensor(2**me), axis) == sum(2**rank for rank in line), (
                f"{axis.name} of {tensor}, {pipeline}"
            )
            assert (axis.group is None) == (axis.size == 1)


# ---- layers --------------------------------------------------------------------------------------


def pair(
    tp: Axis, build: Callable[[ParamMaker], nn.Module], kv_heads: int = 2
) -> tuple[nn.Module, nn.Module]:
    """A module whole and cut, from the same random weights."""
    whole, split = (ParamMaker(Sharding(axis.size, kv_heads), 3, axis, dtype=F64) for axis in (ALONE, tp))
    return disturb(build(whole), whole), disturb(build(split), split)


def assert_gradients_match(whole: nn.Module, split: nn.Module, tp: Axis, kv_heads: int = 2) -> None:
    reference, sharding = gradients(whole), Sharding(tp.size, kv_heads)
    mine = gradients(split)
    assert mine.keys() == reference.keys()
    for name, grad in mine.items():
        want = sharding.cut(name, reference[name], tp.rank)
        assert_close(grad, want, msg=lambda text, name=name: f"{name}, rank {tp.rank}: {text}")


def part(x: Tensor, tp: Axis) -> Tensor:
    return x.chunk(tp.size, dim=-1)[tp.rank]


def twice(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.clone().requires_grad_(), x.clone().requires_grad_()


def check_column(tp: Axis) -> None:
    whole, split = pair(
        tp,
        lambda make: ColumnParallelLinear(
            "model.layers.0.self_attn.q_proj", 6, 8, make=make, init=normal(1), bias=True
        ),
    )
    (x, x_split), grad = twice(random(2, 3, 6)), random(2, 3, 8, seed=1)
    y, y_split = whole(x), split(copy_to_tp(x_split, tp))
    y.backward(grad)
    y_split.backward(part(grad, tp))
    assert_close(y_split, part(y, tp))
    assert_close(x_split.grad, x.grad)
    assert_gradients_match(whole, split, tp)


def check_row(tp: Axis) -> None:
    whole, split = pair(
        tp, lambda make: RowParallelLinear("model.layers.0.self_attn.o_proj", 8, 6, make=make, init=normal(1))
    )
    (x, x_whole), grad = twice(random(2, 3, 8)), random(2, 3, 6, seed=1)
    y, y_split = whole(x_whole), split(part(x, tp))
    y.backward(grad)
    y_split.backward(grad)
    assert_close(y_split, y)
    assert_close(part(x.grad, tp), part(x_whole.grad, tp))
    assert_gradients_match(whole, split, tp)


def check_key_value(tp: Axis, kv_heads: int) -> None:
    """Each rank's heads are those that its share of 4 query heads attends with."""
    whole, split = pair(
        tp,
        lambda make: KeyValueLinear(
            "model.layers.0.self_attn.k_proj", 6, kv_heads, 3, make=make, init=normal(1), bias=True
        ),
        kv_heads,
    )
    (x, x_split), grads = twice(random(2, 5, 6)), random(2, 5, 4, 3, seed=1)  # a gradient for each query head
    of_query = torch.arange(4) * kv_heads // 4  # the kv head of each query head
    y = whole(x).unflatten(-1, (kv_heads, 3))[:, :, of_query]
    y_split = split(copy_to_tp(x_split, tp)).unflatten(-1, (-1, 3))
    y_split = y_split.repeat_interleave(4 // tp.size // y_split.shape[2], dim=2)
    mine = slice(tp.rank * 4 // tp.size, (tp.rank + 1) * 4 // tp.size)
    y.backward(grads)
    y_split.backward(grads[:, :, mine])
    assert_close(y_split, y[:, :, mine])
    assert_close(x_split.grad, x.grad)
    assert_gradients_match(whole, split, tp, kv_heads)


def check_attention(tp: Axis, kv_heads: int, norm: str) -> None:
    model = tiny_config("dense", num_kv_heads=kv_heads, normalization=norm).model
    whole, split = pair(
        tp,
        lambda make: Attention("model.layers.0.self_attn", model, backend="sdpa", make=make, output_std=0.2),
        kv_heads,
    )
    positions = torch.tensor([[0, 2, 3, 7, 19], [1, 4, 5, 6, 8]])
    for given in (None, positions):
        whole.zero_grad()
        split.zero_grad()
        (x, x_split), grad = twice(random(2, 5, 32)), random(2, 5, 32, seed=1)
        y, y_split = whole(x, given, 20), split(x_split, given, 20)
        y.backward(grad)
        y_split.backward(grad)
        assert_close(y_split, y)
        assert_close(x_split.grad, x.grad)
        assert_gradients_match(whole, split, tp, kv_heads)


def check_head_norm(tp: Axis) -> None:
    """Each rank norms its own heads; the weight, whole everywhere, takes the gradients of all."""
    whole, split = pair(tp, lambda make: HeadNorm("model.layers.0.self_attn.q_norm", 6, 1e-6, make=make))
    (x, x_whole), grad = twice(random(2, 3, 4, 6)), random(2, 3, 4, 6, seed=1)
    y, y_split = whole(x_whole), split(x.chunk(tp.size, dim=2)[tp.rank])
    y.backward(grad)
    y_split.backward(grad.chunk(tp.size, dim=2)[tp.rank])
    assert_close(y_split, y.chunk(tp.size, dim=2)[tp.rank])
    assert_close(x.grad.chunk(tp.size, dim=2)[tp.rank], x_whole.grad.chunk(tp.size, dim=2)[tp.rank])
    assert_gradients_match(whole, split, tp)


def check_mlp(tp: Axis) -> None:
    model = tiny_config("dense").model
    whole, split = pair(tp, lambda make: Mlp("model.layers.0.mlp", model, make=make, output_std=0.2))
    (x, x_split), grad = twice(random(2, 5, 32)), random(2, 5, 32, seed=1)
    y, y_split = whole(x), split(x_split)
    y.backward(grad)
    y_split.backward(grad)
    assert_close(y_split, y)
    assert_close(x_split.grad, x.grad)
    assert_gradients_match(whole, split, tp)


def check_embedding(tp: Axis) -> None:
    whole, split = pair(
        tp, lambda make: VocabParallelEmbedding("model.embed_tokens", 61, 6, make=make, init=normal(1))
    )
    # all of them, some twice
    tokens = torch.cat([torch.arange(61), torch.tensor([0, 60, 60, 15, 16, 31])]).view(1, -1)
    grad = random(1, tokens.shape[1], 6, seed=1)
    y, y_split = whole(tokens), split(tokens)
    y.backward(grad)
    y_split.backward(grad)
    assert_close(y_split, y)
    assert_gradients_match(whole, split, tp)


# ---- loss ----------------------------------------------------------------------------------------


def check_loss(tp: Axis, vocab: int, block_rows: int) -> None:
    """`vocab` = 5 leaves a rank of four with padding alone. Padding rows hold large weights here, and must not matter."""
    sharding, name = Sharding(tp.size, 2), "lm_head.weight"
    (hidden, hidden_split), weight = twice(random(3, 4, 6)), random(vocab, 6, seed=1).requires_grad_()
    mine = sharding.cut(name, weight.detach(), tp.rank).clone()
    rows = mine.shape[0]
    mine[max(0, vocab - tp.rank * rows) :] = 50.0
    mine.requires_grad_()
    labels = torch.randint(0, vocab, (3, 4), generator=torch.Generator().manual_seed(2))
    labels[0, 0], labels[1, 1] = 0, vocab - 1
    grad = torch.tensor(-1.7, dtype=F64)

    logits = 1.5 * torch.tanh((hidden @ weight.T).flatten(0, 1) / 1.5)
    whole = F.cross_entropy(logits, labels.flatten())
    ((whole + 0.3 * logits.logsumexp(1).square().mean()) * grad).backward()
    default, loss.LOGITS_AT_ONCE = loss.LOGITS_AT_ONCE, block_rows * labels.numel()
    split = linear_cross_entropy(
        copy_to_tp(hidden_split, tp),
        mine,
        labels,
        vocab_size=vocab,
        tp=tp,
        options=loss.LogitOptions(softcap=1.5, z_weight=0.3),
    )
    loss.LOGITS_AT_ONCE = default
    split.backward(grad)
    assert_close(split, whole)
    assert_close(hidden_split.grad, hidden.grad)
    assert_close(mine.grad, sharding.cut(name, weight.grad, tp.rank))


# ---- the whole network ---------------------------------------------------------------------------


def check_network(tp: Axis, kind: str, sequence: bool = False, **options) -> None:
    """DTRNet with jitter and with choices filled up; every auxiliary loss heavy enough to show."""
    config = tiny_config(kind, tensor=tp.size, **options)
    config = with_routing(
        config,
        **known(
            config,
            capacity=0.4,
            prior_loss_weight=0.7,
            jitter=0.2,
            predictor_loss_weight=0.5,
            bce_loss_weight=0.3,
            z_loss_weight=0.2,
            aux_loss_lambda=0.4,
            entropy_bonus=0.3,
            safe_min_attn_ratio=0.4,
        ),
    )
    whole = make_network(config)
    config.parallel.sequence = sequence
    split = make_network(config, tp)
    samples = tiny_tokens(1, samples=3)[0]
    tokens, labels = samples[:, :-1], samples[:, 1:]
    grad = torch.tensor(1.3, dtype=F64)
    loss_whole, loss_split = whole(tokens, labels), split(tokens, labels)
    loss_whole.backward(grad)
    loss_split.backward(grad)
    assert_close(loss_split, loss_whole)
    assert_gradients_match(whole, split, tp, config.model.num_kv_heads)
    assert all(g.any() for g in gradients(whole).values()), "a gradient that is zero can tell nothing"
    statistics = [[layer.monitor.read() for layer in routed_layers(network)] for network in (whole, split)]
    for reference, mine in zip(*statistics, strict=True):
        if sequence:  # some are means over a part of the sequence
            mine = {name: sum_over(value, tp) / tp.size for name, value in mine.items()}
        assert_close(mine, reference)
    with torch.no_grad():
        logits = split(tokens)
        assert logits.shape == (3, 24, 61)
        assert_close(logits, whole(tokens))
