"""An id that no rank has a row for is never taken for zeros: the loss is NaN, and the step is kept out of the weights."""

import pytest
import torch

from megadyn.parallel.grid import Axis
from megadyn.parallel.linear import VocabParallelEmbedding
from megadyn.parallel.loss import linear_cross_entropy
from megadyn.parallel.mappings import enter_tp
from megadyn.parallel.params import ParamMaker, normal
from megadyn.parallel.sharding import Sharding
from tests.helpers.ranks import run_on_ranks

VOCAB = 11  # padded to 12 rows under tensor 2
OUTSIDE = (-1, 11, 12, 10**6)


def tensor_axis(size: int) -> Axis:
    if size == 1:
        return Axis("tp")
    return Axis("tp", torch.distributed.get_rank(), size, torch.distributed.group.WORLD)


def check_outside_ids(size: int) -> None:
    tp = tensor_axis(size)
    make = ParamMaker(Sharding(size, 2), tp=tp)
    embed = VocabParallelEmbedding("model.embed_tokens", VOCAB, 4, make=make, init=normal(1.0))
    head = make("lm_head.weight", (VOCAB, 4), normal(1.0))

    def loss_of(tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = embed(tokens)
        return hidden, linear_cross_entropy(
            enter_tp(hidden, tp, Axis("seq")), head, labels, vocab_size=VOCAB, tp=tp
        )

    good = torch.arange(VOCAB).reshape(1, -1)
    hidden, loss = loss_of(good, good)
    assert hidden.isfinite().all() and loss.isfinite()
    assert (hidden != 0).any(dim=-1).all()  # every id has a row on some rank
    for bad_id in OUTSIDE:
        bad = good.clone()
        bad[0, 3] = bad_id
        hidden, loss = loss_of(bad, good)
        assert hidden[0, 3].isnan().all()
        assert hidden[0, 4:].isfinite().all()
        assert loss.isnan()
        assert loss_of(good, bad)[1].isnan()


@pytest.mark.parametrize("size", [1, 2])
def test_ids_outside_the_vocabulary_give_nan(size: int) -> None:
    if size == 1:
        check_outside_ids(1)
    else:
        run_on_ranks(check_outside_ids, size, size)
