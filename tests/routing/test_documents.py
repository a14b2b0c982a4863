"""Documents packed into one sample are computed as if each stood alone."""

import itertools

import pytest
import torch
from torch import Tensor

from megadyn.model.block import LayerContext
from megadyn.model.documents import documents_of, from_ids
from megadyn.network import Network, routed_layers, set_routing_mode
from megadyn.parallel.params import ParamMaker
from megadyn.parallel.sharding import Sharding
from megadyn.routing.layer import LossScale
from megadyn.routing.surprise import moving_average
from tests.helpers.tiny import KINDS, VOCAB, tiny_config

EOD = 0


def packed(lengths: tuple[int, ...], seed: int = 0) -> Tensor:
    """One sample [1, T] of documents of these lengths, each closed by EOD."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [
            torch.cat([torch.randint(1, VOCAB, (n - 1,), generator=generator), torch.tensor([EOD])])
            for n in lengths
        ]
    ).unsqueeze(0)


def network(kind: str, norm: str, eod: int | None) -> Network:
    model = tiny_config(kind, normalization=norm).model
    net = Network(LayerContext(model, ParamMaker(Sharding(1, 2), dtype=torch.float64), eod=eod), LossScale())
    set_routing_mode(routed_layers(net), "causal")
    for layer in routed_layers(net):
        router = layer.causal_router
        # near the middle of the scores: some route, some do not
        if router is not None and router.threshold is not None:
            middle = {"dtf": 1.4, "mod": 0.0, "dtrnet": 0.0}[model.routing.kind]
            router.threshold.average, router.threshold.steps = torch.tensor(middle * 0.01), 1
    return net


@pytest.mark.parametrize("norm", ["pre", "lns", "hybridnorm"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_themselves_alone(kind: str, norm: str) -> None:
    lengths = (13, 1, 9, 20, 2)  # one longer than the moving average's window of 7, one a lone end token
    tokens = packed(lengths)
    with torch.no_grad():
        together = network(kind, norm, EOD)(tokens)
        alone = network(kind, norm, None)
        ends = list(itertools.accumulate(lengths, initial=0))
        apart = torch.cat([alone(tokens[:, a:b]) for a, b in itertools.pairwise(ends)], dim=1)
        across = alone(tokens)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-9)
    assert (across - apart).abs().max() > 1e-3  # without the mask, documents do see each other


def test_routing_in_these_comparisons_is_mixed() -> None:
    for kind in KINDS:
        net = network(kind, "pre", EOD)
        with torch.no_grad():
            net(packed((13, 9, 20)))
        found = [layer.monitor.read() for layer in routed_layers(net)]
        fractions = [float(record["routed_fraction"]) for record in found if "routed_fraction" in record]
        assert kind == "dense" or any(0 < fraction < 1 for fraction in fractions), kind


def test_ids_and_positions() -> None:
    documents = documents_of(torch.tensor([[4, 0, 5, 6, 0, 0, 7], [1, 2, 3, 4, 5, 6, 7]]), eod=0)
    ids, ends, longest = documents.segments
    assert ids.tolist() == [[0, 0, 1, 1, 1, 2, 3], [4] * 7]
    assert longest == 7
    assert documents.positions.tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6]]
    assert ends.tolist() == [0, 2, 5, 6, 7, 14]
    again = from_ids(ids)  # as behind a pipeline cut
    assert torch.equal(again.segments.ids, ids)
    assert torch.equal(again.positions, documents.positions)


def test_moving_average_starts_anew_in_each_document() -> None:
    tokens = packed((5, 12, 3))
    documents, values = documents_of(tokens, EOD), torch.randn(1, 20, dtype=torch.float64)
    got = moving_average(values, 4, documents)[0].tolist()
    want = []
    for length, start in ((5, 0), (12, 5), (3, 17)):
        row = values[0, start : start + length].tolist()
        for t in range(length):
            window = [row[max(0, t - k)] if t - k >= 0 else row[0] for k in range(4)]
            want.append(sum(window) / 4)
    assert got == pytest.approx(want, rel=1e-12)
