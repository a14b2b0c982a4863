"""What a step sends over data-parallel ranks, and how often it synchronizes the device."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megadyn.config import engine_settings, reduction_type
from megadyn.errors import ConfigError
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import micro_batches, tiny_config, tiny_tokens

STEPS = 5
"""DeepSpeed's timers begin after a few."""
CASES = [(1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
"""ZeRO stage, and `communication_data_type`; all in bf16."""
SENDING = ("all_reduce", "reduce_scatter_tensor", "reduce_scatter", "reduce")
"""torch.distributed's functions that sum."""


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("wire")
    run_on_ranks(_watch_all, 2, str(folder))
    return json.loads((folder / "sent.json").read_text())


def _watch_all(folder: str) -> None:
    from megadyn.launch import launch

    launch.join(90)
    found = {f"{zero} {reduced_in}": _watch(Path(folder), zero, reduced_in) for zero, reduced_in in CASES}
    group = dist.new_group([0, 1])
    assert group is not None
    found["timeout_s"] = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    if dist.get_rank() == 0:
        (Path(folder) / "sent.json").write_text(json.dumps(found))


def _watch(folder: Path, zero: int, reduced_in: str) -> dict[str, Any]:
    """Types in which more than a few numbers were summed in the last step, and how often it synchronized the device."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.parallel.grid import make_grid

    config = tiny_config("dtf", precision="bf16", micro_batch=1)
    path = folder / f"{zero}-{reduced_in}-{dist.get_rank()}.json"
    asked = {} if reduced_in == "fp32" else {"communication_data_type": reduced_in}  # fp32 is the default
    path.write_text(json.dumps({"zero_optimization": {"stage": zero}} | asked))
    config.deepspeed_config = str(path)
    plan = batch_plan(config, 2)
    engine = Engine(config, plan, make_grid(1, 1))
    tokens, share = tiny_tokens(STEPS), plan.global_batch // 2
    rank = engine.grid.dp.rank
    own = [micro_batches(step[rank * share : (rank + 1) * share], 1) for step in tokens]
    assert len(own[0]) == 2
    for batches in own[:-1]:
        engine.train_step(batches, 1e-3)
    with pytest.MonkeyPatch.context() as patch:
        types: set[str] = set()
        waits: list[int] = []
        for name in SENDING:
            patch.setattr(dist, name, _noting(getattr(dist, name), types))
        backend = deepspeed.comm.comm.cdb  # holds a function of its own
        patch.setattr(backend, "reduce_scatter_function", _noting(backend.reduce_scatter_function, types))
        patch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(1))
        engine.train_step(own[-1], 1e-3)
    engine.engine.destroy()
    return {"types": sorted(types), "waits": len(waits)}


def _noting(real: Any, types: set[str]) -> Any:
    def noting(*args: Any, **named: Any) -> Any:
        tensors = [x for x in (*args, *named.values()) if isinstance(x, torch.Tensor)]
        types.update(str(x.dtype) for x in tensors if x.numel() > 500)
        return real(*args, **named)

    return noting


@pytest.mark.parametrize(("zero", "reduced_in"), CASES)
def test_gradients_are_summed_in_the_type_that_was_asked_for(
    zero: int, reduced_in: str, sent: dict[str, Any]
) -> None:
    want = {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[reduced_in]
    assert sent[f"{zero} {reduced_in}"]["types"] == [want]


@pytest.mark.parametrize(("zero", "reduced_in"), CASES)
def test_a_step_never_synchronizes_the_device(zero: int, reduced_in: str, sent: dict[str, Any]) -> None:
    assert sent[f"{zero} {reduced_in}"]["waits"] == 0


def test_groups_wait_as_long_as_the_run_allows(sent: dict[str, Any]) -> None:
    assert sent["timeout_s"] == 90


def test_the_type_is_fp32_unless_another_is_asked_for(tmp_path: Path) -> None:
    config = tiny_config("dtf", precision="bf16")
    assert reduction_type(engine_settings(config), "bf16") == "fp32"
    assert reduction_type(engine_settings(config), "fp16") == "fp16"
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "communication_data_type": "half"}))
    config.deepspeed_config = str(path)
    with pytest.raises(ConfigError, match="must be one of fp32, bf16, fp16"):
        engine_settings(config)
