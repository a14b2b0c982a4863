"""Any layout, ZeRO stage and recomputation trains as one plain PyTorch loop does."""

from functools import cache

import pytest

from tests.parity.curves import Case, Curve, curves, plain_curve

LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 3, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (1, 4, 1))
OTHERS = ("dtf-predictor", "mod", "mod-predictor", "mod-bce", "dtrnet-token", "dtrnet-expert")

# Dense and DTF: every layout under ZeRO 0 and 1, two also under 2 and 3; recomputed too. Dense alone needs fewer of them.
CASES = [Case(kind, *layout, zero=zero) for kind in ("dense", "dtf") for layout in LAYOUTS for zero in (0, 1)]
CASES = [case for case in CASES if case.zero or case.kind == "dtf" or case.world < 4]
CASES += [Case(kind, *layout, zero=zero) for kind in ("dense", "dtf") for layout in ((1, 1, 2), (2, 1, 2)) for zero in (2, 3)]
CASES += [case._replace(recompute="full") for case in CASES if case.zero and (case.kind == "dtf" or case.world == 2)]
CASES += [Case("dtf", *layout, zero=zero, tied=True) for layout, zero in (((2, 2, 1), 1), ((1, 2, 1), 0), ((1, 1, 2), 3))]
# The other kinds: each layout of two processes, and both cuts at once with recomputation.
CASES += [Case(kind, *layout) for kind in OTHERS for layout in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))]
CASES += [Case(kind, 2, 2, 1, recompute="full") for kind in ("mod", "dtrnet-token", "dtrnet-expert")]
CASES += [Case(kind, 1, 1, 2, zero=3, recompute="full") for kind in ("mod", "dtrnet-token")]
# Every kind under every normalisation: lns through a pipeline cut, for it knows the layer's global number, hybridnorm
# through a tensor cut, for its weights serve the heads of all ranks.
CASES += [Case(kind, *layout, norm=norm) for kind in ("dense", "dtf", "mod", "dtrnet-token", "dtrnet-expert")
          for norm, layout in (("lns", (1, 2, 1)), ("hybridnorm", (2, 1, 1)))]
# Documents: their ids cross the pipeline cut, between a Decision and its Dynamic layer too.
CASES += [Case(kind, *layout, documents=True, recompute=recompute) for kind in ("dense", "dtf", "mod", "dtrnet-token")
          for layout, recompute in (((2, 1, 1), "full"), ((1, 2, 1), "selective"))]
CASES += [Case("dtf", 1, 4, 1, documents=True)]
# Sequence parallelism: every kind; with a pipeline cut between Decision and Dynamic layer, documents and recomputation; ZeRO.
CASES += [Case(kind, 2, 1, 1, sequence=True) for kind in ("dense", "dtf", *OTHERS)]
CASES += [Case(kind, 2, 2, 1, sequence=True, documents=True, recompute="full") for kind in ("dense", "dtrnet-token")]
CASES += [Case("mod", 2, 2, 1, sequence=True, recompute="selective"), Case("dtf", 2, 1, 2, zero=3, sequence=True),
          Case("dtf", 2, 2, 1, sequence=True, tied=True), Case("dtf", 2, 1, 1, sequence=True, documents=True)]

TWO = (((1, 1, 1), 1), ((2, 1, 1), 1), ((1, 2, 1), 1), ((1, 1, 2), 1))
HALF = [Case(kind, *layout, zero=zero, precision="bf16") for kind in ("dense", "dtf")
        for layout, zero in (*TWO, ((1, 1, 2), 2), ((1, 1, 2), 3), ((2, 2, 1), 1))]
HALF += [Case("dtf", *layout, precision="bf16") for layout in ((2, 1, 2), (1, 2, 2))]
HALF += [Case(kind, *layout, zero=zero, precision="bf16") for kind in ("mod", "dtrnet-token") for layout, zero in TWO]
HALF += [Case("dtf", *layout, zero=zero, precision="fp16") for layout, zero in TWO]
HALF += [Case(kind, 2, 1, 1, precision="bf16", sequence=True) for kind in ("dense", "dtf")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """Curves of all cases: one launch for each number of processes."""
    found: dict[str, Curve] = {}
    for world in (1, 2, 3, 4):
        found |= curves([case for case in CASES + HALF if case.world == world], tmp_path_factory.mktemp(f"world{world}"))
    return found


@cache
def plain(kind: str, tied: bool = False, norm: str = "pre", documents: bool = False) -> Curve:
    return plain_curve(Case(kind, tied=tied, norm=norm, documents=documents))


def farthest(got: list[float], want: list[float]) -> float:
    """Largest relative difference."""
    assert len(got) == len(want)
    return max(abs(g - w) / abs(w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_curve_is_that_of_one_process(case: Case, trained: dict[str, Curve]) -> None:
    curve, whole = trained[str(case)], plain(case.kind, case.tied, case.norm, case.documents)
    assert farthest(curve["loss"], whole["loss"]) < 1e-5
    assert farthest(curve["grad_norm"], whole["grad_norm"]) < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case.is_evaluated], ids=str)
def test_validation_losses_are_those_of_one_process(case: Case, trained: dict[str, Curve]) -> None:
    """The running threshold too is the same under every layout: the causal loss shows it."""
    alone = trained[str(Case(case.kind))]
    share = Case(case.kind, data=case.data)      # ranks evaluate the last step's samples of their own
    assert farthest(trained[str(case)]["validation"], (alone if case.data == 1 else trained[str(share)])["validation"]) < 1e-5


@pytest.mark.parametrize("case", HALF, ids=str)
def test_half_precision_curve_is_near(case: Case, trained: dict[str, Curve]) -> None:
    """A rounding can flip a routed token, which a gradient norm shows: one step may stand out there, the rest not."""
    curve, whole = trained[str(case)], trained[str(Case(case.kind, precision=case.precision))]
    assert farthest(curve["loss"], whole["loss"]) < 1e-2
    off = sorted(abs(got - want) / want for got, want in zip(curve["grad_norm"], whole["grad_norm"], strict=True))
    assert off[-1] < (1e-2 if case.kind == "dense" else 5e-2)
    assert off[len(off) // 2] < 1e-2


def test_the_comparison_can_fail(trained: dict[str, Curve]) -> None:
    """Dense and routed curves differ by far more than the tolerance, and training moves the loss."""
    dense, dtf = plain("dense")["loss"], plain("dtf")["loss"]
    assert farthest(dense, dtf) > 1e-3
    assert abs(dtf[-1] - dtf[0]) > 1e-2
