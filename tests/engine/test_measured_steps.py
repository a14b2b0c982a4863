"""A measured step under every layout: norms by component, a time that adds up, and no collective more than another step."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megadyn.engine.engine import memory_gib
from megadyn.engine.gradient_norms import COMPONENTS, component_of, unclipped
from megadyn.engine.replaced import replaced
from megadyn.engine.step_clock import PARTS
from tests.helpers.crew import Crew
from tests.helpers.tiny import ROOT, micro_batches
from tests.parity.curves import Case, config_of, plain_network, tokens_of

OFFLOADED = ROOT / "ds_configs" / "zero3_offload.json"
CASES = [
    Case("dtf", 2, 2, 1),
    Case("dtrnet-expert", 2, 2, 1, zero=0, tied=True),
    Case("mod", 2, 1, 2, zero=2),
    Case("dtf", 2, 1, 2, sequence=True, norm="hybridnorm"),
    Case("dtrnet-token", 2, 1, 2, zero=3, muon=True),
    Case("dtf", 1, 2, 2, precision="bf16", tied=True),
]
WATCHED = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_gather_object",
    "all_to_all_single",
    "send",
    "recv",
    "barrier",
)


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.norm.weight", "norm"),
        ("model.layers.3.input_layernorm.weight", "norm"),
        ("model.layers.3.self_attn.q_norm.weight", "attention"),
        ("model.layers.3.self_attn.k_proj.bias", "attention"),
        ("model.layers.3.mlp.up_proj.weight", "mlp"),
        ("model.layers.0.prior.norm.weight", "prior"),
        ("model.layers.0.prior.gate_proj.weight", "prior"),
        ("model.layers.1.router.fc1.weight", "router"),
        ("model.layers.1.causal_router.fc2.weight", "router"),
    ],
)
def test_a_parameters_component_is_read_from_its_name(name, component):
    assert component_of(name) == component


def test_norms_are_those_before_clipping():
    squares = torch.tensor([0.04, 0.09])
    assert unclipped(squares, 4.0, 2.0) == pytest.approx([0.4, 0.6])
    assert unclipped(squares, 0.5, 2.0) == unclipped(squares, 4.0, 0.0) == pytest.approx([0.2, 0.3])


def plain_norms(case: Case) -> dict[str, float]:
    """Of the first step of a plain PyTorch loop."""
    net = plain_network(case)
    ((tokens, labels),) = micro_batches(tokens_of(case)[0], 4)
    net(tokens, labels).backward()
    squares = dict.fromkeys(COMPONENTS, 0.0)
    for param in net.parameters():
        if param.grad is not None:
            squares[component_of(param.global_name)] += float(param.grad.square().sum())
    return {name: square**0.5 for name, square in squares.items()}


def measure_all(output: str) -> None:
    found = {str(case): measured(case) for case in CASES}
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))


def measured(case: Case) -> dict:
    """Some steps, not all of them measured, and what was found out about them."""
    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine, StepResult
    from megadyn.parallel.grid import make_grid

    config = config_of(case)
    if case.zero == 3:
        config.deepspeed_config = str(OFFLOADED)
    plan, grid = batch_plan(config, dist.get_world_size()), make_grid(case.tensor, case.pipeline)
    engine = Engine(config, plan, grid)
    share = plan.global_batch // plan.data_parallel
    samples = iter(tokens_of(case)[:, grid.dp.rank * share : (grid.dp.rank + 1) * share])

    def step(**options) -> StepResult:
        return engine.train_step(micro_batches(next(samples), case.micro_batch), 1e-3, **options)

    result = step(measure=True)
    found = {"grad_norm": float(result.grad_norm), "first": engine.step_statistics(float(result.grad_norm))}
    with counting() as found["unmeasured"]:  # not the first step, in which a pipeline also exchanges shapes
        step()
    began = time.perf_counter()
    with counting() as found["measured"]:
        result = step(measure=True)
    spent_ms = torch.tensor((time.perf_counter() - began) * 1e3)
    with counting() as found["reporting"]:
        found["split"] = engine.step_statistics(float(result.grad_norm))["step_split_ms"]
    dist.all_reduce(spent_ms)
    assert step(loss_limit=0.0, measure=True).problem is not None
    bad = engine.step_statistics(math.nan)["grad_norms"].values()
    step()
    unasked = engine.norms.take(engine.device).tolist()
    engine.engine.destroy()
    return found | {"spent_ms": float(spent_ms) / dist.get_world_size(), "bad": list(bad), "unasked": unasked}


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts this process's collectives, by name."""
    count: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return original(*args, **kwargs)

        return call

    with ExitStack() as restored:
        for name in WATCHED:
            restored.enter_context(replaced(dist, name, counted(name)))
        yield count


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("measured")
    crew = Crew.of_check(measure_all, folder, str(folder / "found.json"), world=4)
    assert crew.wait(200) == [0, 0, 0, 0], crew.output(0)[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norms_of_the_components_are_the_whole_models_and_sum_to_its_norm(found, case):
    norms, whole = found[str(case)]["first"]["grad_norms"], found[str(case)]["grad_norm"]
    assert whole > 1  # so that it was clipped
    assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(whole, rel=1e-5)
    assert norms == pytest.approx(plain_norms(case), rel=1e-4 if case.precision == "fp32" else 0.05, abs=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_of_a_step_add_up_to_it(found, case):
    """Both are means over the ranks."""
    split = found[str(case)]["split"]
    assert sum(split.values()) == pytest.approx(found[str(case)]["spent_ms"], rel=0.05, abs=5)
    assert all(split[part] > 0 for part in PARTS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_measuring_costs_two_collectives_at_the_report_and_none_in_a_step(found, case):
    record = found[str(case)]
    assert sum(record["unmeasured"].values()) > 0
    assert record["measured"] == record["unmeasured"]
    assert record["reporting"] == {"all_reduce": 2}
    assert record["first"]["memory_gib"]["resident_peak"] > 0.1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_step_has_no_norms_and_one_not_measured_adds_none_up(found, case):
    assert any(math.isnan(norm) for norm in found[str(case)]["bad"])
    assert len(found[str(case)]["unasked"]) == len(COMPONENTS)
    assert all(math.isnan(norm) for norm in found[str(case)]["unasked"])


def test_on_a_gpu_memory_is_what_torch_took(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 4 * 2**30)
    assert memory_gib(torch.device("cuda:1")) == {"allocated_peak": 3, "reserved_peak": 4}
