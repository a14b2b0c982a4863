"""Any layout, ZeRO stage and recomputation trains as one plain PyTorch loop does."""

from functools import cache

import pytest

from tests.parity.curves import Case, Curve, curves, plain_curve

LAYOUTS = (
    (1, 1, 1),
    (2, 1, 1),
    (1, 2, 1),
    (1, 1, 2),
    (1, 3, 1),
    (2, 2, 1),
    (2, 1, 2),
    (1, 2, 2),
    (4, 1, 1),
    (1, 4, 1),
)
# DTF under every layout; DTF under each ZeRO stage. The conformance suite has every kind and rule, dense among them, under the
# layouts of two processes, with ZeRO 2 and 3, sequence parallelism, documents and recomputation.
CASES = [Case("dtf", *layout) for layout in LAYOUTS]
CASES += [
    Case("dtf", *layout, zero=zero) for layout, zero in (((2, 1, 1), 0), ((1, 1, 2), 2), ((1, 1, 2), 3))
]
CASES += [Case("dtf", 2, 1, 2, zero=2)]
CASES += [Case("dense", 1, 1, 2, zero=zero) for zero in (0, 3)]
CASES += [Case("dtf", 2, 2, 1, recompute="full"), Case("mod", 1, 1, 2, zero=3, recompute="full")]
CASES += [Case("dtf", *layout, zero=zero, tied=True) for layout, zero in (((1, 2, 1), 0), ((1, 1, 2), 3))]
CASES += [
    Case("dtf", *layout, zero=zero, partial=True)
    for layout, zero in (((1, 2, 1), 1), ((2, 1, 1), 0), ((1, 1, 2), 3))
]
CASES += [
    Case(kind)
    for kind in ("dense", "mod", "mod-predictor", "mod-bce", "dtf-predictor", "dtrnet-token", "dtrnet-expert")
]
# Every normalisation: lns through a pipeline cut, for it knows the layer's global number, hybridnorm through a tensor cut, for
# its weights serve the heads of all ranks.
CASES += [
    Case(kind, *layout, norm=norm)
    for kind in ("dtf", "dtrnet-token")
    for norm, layout in (("lns", (1, 2, 1)), ("hybridnorm", (2, 1, 1)))
]
# Documents: their ids cross the pipeline cut, between a Decision and its Dynamic layer too.
CASES += [Case("dtf", 1, 4, 1, documents=True), Case("mod", 1, 2, 1, documents=True, recompute="selective")]
# Sequence parallelism with a pipeline cut between Decision and Dynamic layer, documents and recomputation; ZeRO.
CASES += [
    Case("dtrnet-token", 2, 2, 1, sequence=True, documents=True, recompute="full"),
    Case("mod", 2, 1, 1, sequence=True, recompute="selective"),
    Case("dtf", 2, 1, 2, zero=3, sequence=True),
    Case("dtf", 2, 2, 1, sequence=True, tied=True),
]
# Muon: a matrix is one, however it is cut. Four tensor ranks are more than key/value heads. With rates by name, pipeline stages
# have groups of matrices that others lack.
MUON = [Case("dense", *layout, muon=True) for layout in ((2, 2, 1), (4, 1, 1))]
MUON += [Case("dense", 2, 1, 2, zero=0, muon=True)]
MUON += [
    Case("dtf", *layout, zero=zero, muon=True)
    for layout, zero in (((2, 1, 1), 0), ((1, 1, 2), 2), ((1, 1, 2), 3))
]
MUON += [Case("dtf", 1, 2, 1, tied=True, muon=True), Case("dtf", 1, 2, 1, partial=True, muon=True)]
CASES += MUON

HALF = [Case("dtf", *layout, precision="bf16") for layout in LAYOUTS[1:4]]
HALF += [
    Case(kind, 2, 1, 1, precision="bf16", muon=kind == "dense") for kind in ("dense", "mod", "dtrnet-token")
]
HALF += [Case("dtf", 1, 1, 2, zero=zero, precision="bf16") for zero in (2, 3)]
HALF += [Case("dtf", 2, 1, 1, precision="bf16", sequence=True)]
HALF += [Case("dtf", 2, 1, 1, precision="fp16")]


def compared_with(case: Case) -> list[Case]:
    """The trained cases, beside itself, that a test holds this one to."""
    if case.precision != "fp32":
        return [Case(case.kind, precision=case.precision, muon=case.muon)]
    return [Case(case.kind, data=case.data)] if case.is_evaluated and not case.muon else []


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """Curves of the cases that the selected tests need: one launch for each number of processes."""
    asked = {
        item.callspec.params["case"]
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    }
    needed = asked | {other for case in asked for other in compared_with(case)}
    found: dict[str, Curve] = {}
    for world in (1, 2, 3, 4):
        if cases := [case for case in sorted(needed, key=str) if case.world == world]:
            found |= curves(cases, tmp_path_factory.mktemp(f"world{world}"))
    return found


@cache
def plain(
    kind: str,
    tied: bool = False,
    norm: str = "pre",
    documents: bool = False,
    partial: bool = False,
    muon: bool = False,
) -> Curve:
    return plain_curve(Case(kind, tied=tied, norm=norm, documents=documents, partial=partial, muon=muon))


def farthest(got: list[float], want: list[float]) -> float:
    """Largest relative difference."""
    assert len(got) == len(want)
    return max(abs(g - w) / abs(w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_curve_is_that_of_one_process(case: Case, trained: dict[str, Curve]) -> None:
    whole = plain(case.kind, case.tied, case.norm, case.documents, case.partial, case.muon)
    curve = trained[str(case)]
    assert len(curve["loss"]) == case.steps
    assert farthest(curve["loss"], whole["loss"][: case.steps]) < 1e-5
    assert farthest(curve["grad_norm"], whole["grad_norm"][: case.steps]) < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case.is_evaluated and not case.muon], ids=str)
def test_validation_losses_are_those_of_one_process(case: Case, trained: dict[str, Curve]) -> None:
    """The running threshold too is the same under every layout: the causal loss shows it."""
    (other,) = compared_with(case)  # of as many data ranks: each evaluates the last step's samples of its own
    assert farthest(trained[str(case)]["validation"], trained[str(other)]["validation"]) < 1e-5


@pytest.mark.parametrize("case", HALF, ids=str)
def test_half_precision_curve_is_near(case: Case, trained: dict[str, Curve]) -> None:
    """A rounding can flip a routed token, which a gradient norm shows: one step may stand out there, the rest not."""
    curve, whole = trained[str(case)], trained[str(compared_with(case)[0])]
    assert farthest(curve["loss"], whole["loss"]) < 1e-2
    off = sorted(
        abs(got - want) / want for got, want in zip(curve["grad_norm"], whole["grad_norm"], strict=True)
    )
    assert off[-1] < (1e-2 if case.kind == "dense" else 5e-2)
    assert off[len(off) // 2] < 1e-2


def test_the_comparison_can_fail() -> None:
    """Curves of dense and routed models, and of optimizers, differ by far more than the tolerance; training moves the loss."""
    dense, dtf = plain("dense")["loss"], plain("dtf")["loss"]
    assert farthest(dense, dtf) > 1e-3
    assert farthest(dense, plain("dense", muon=True)["loss"]) > 1e-3
    assert abs(dtf[-1] - dtf[0]) > 1e-2
