"""Evaluates a checkpoint on tasks of lm_eval (`training.tasks`), in a process that a run starts and that ends with it.

    python -m megadyn.evaluation.tasks JSON

The checkpoint is exported to a temporary folder, and lm_eval loads that, as `examples/eval/run.sh` does. With `"output": null` it
only checks the names of the tasks and the device. Exit status 2 and a line `error: ...` for what the user can change.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from megadyn.checkpoint import layout
from megadyn.config.tasks import is_path
from megadyn.errors import ConfigError, UserError, did_you_mean, one_line, run_tool
from megadyn.log import log, start_logging
from megadyn.training.task_process import export_beside

PARENT_S = 1.0
"""Between looks whether the run is still there."""
YIELDS = 10
"""Niceness on a CPU: ranks that want the same cores get nine tenths of them."""
BOOTSTRAPS = 1000
"""Of each standard error that has no formula; lm_eval's own 100,000 take minutes."""
KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
"""Of lm_eval's results, what is kept whole."""


@dataclass(frozen=True)
class Asked:
    """What to do; made by `training.task_process`."""

    names: list[str]
    device: str
    parent: int
    """The process that waits for the results."""
    batch_size: int = 1
    limit: int | None = None
    num_fewshot: int | None = None
    checkpoint: str = ""
    digest: str = ""
    """Of the checkpoint's manifest: one that replaces it meanwhile is another."""
    output: str | None = None
    """File for the results; the export lies beside it while it is needed."""


def main() -> None:
    asked = Asked(**json.loads(sys.argv[1]))
    threading.Thread(target=end_with, args=(asked.parent,), name="parent", daemon=True).start()
    start_logging()
    if asked.output is None:
        check_device(asked.device)
        specs_of(asked.names)
        return
    if asked.device == "cpu":
        os.nice(YIELDS)
    evaluate(asked, Path(asked.output))


def end_with(parent: int) -> None:
    """Ends this process, and those that it started, when the run is gone."""
    while os.getppid() == parent:
        time.sleep(PARENT_S)
    os.killpg(0, signal.SIGKILL)


def evaluate(asked: Asked, output: Path) -> None:
    """Writes the results of `asked.checkpoint` to `output`."""
    from megadyn.checkpoint.export import export  # seconds of imports, which a check of names does without

    began, checkpoint = time.monotonic(), Path(asked.checkpoint)
    folder = export_beside(output)
    try:
        export(checkpoint, folder, overwrite=True)
        if (checkpoint / layout.DIGEST).read_text() != asked.digest:
            raise UserError(f"{checkpoint}: replaced while it was read")
        found = run_lm_eval(asked, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    whole = {name: found[name] for name in KEPT if name in found}
    result = {
        "checkpoint": asked.digest,
        "seconds": time.monotonic() - began,
        "tasks": scores(found),
        "lm_eval": whole,
    }
    layout.write_file(output, json.dumps(result, indent=1, default=str))


def run_lm_eval(asked: Asked, folder: Path) -> dict[str, Any]:
    import lm_eval

    specs, manager = specs_of(asked.names)
    log.info("evaluating %s", folder)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": True, "routing_mode": "causal"},
        tasks=specs,
        num_fewshot=asked.num_fewshot,
        batch_size=asked.batch_size,
        device=asked.device,
        limit=asked.limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=BOOTSTRAPS,
    )
    return found


def scores(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """All numbers of each task by their short names; of a group that has a score of its own, not those of its members."""
    results: dict[str, dict[str, Any]] = found["results"]
    numbers = {name: numbers_of(one) for name, one in results.items()}
    groups = {name: members for name, members in found.get("group_subtasks", {}).items() if numbers.get(name)}
    inside = {member for name, members in groups.items() for member in members if member != name}
    return {name: one for name, one in numbers.items() if one and name not in inside}


def numbers_of(result: dict[str, Any]) -> dict[str, float]:
    """`acc,none` is `acc`; a filter of answers follows its metric: `exact_match/strict-match`."""
    kept = {}
    for key, value in result.items():
        metric, comma, chosen = key.partition(",")
        if comma and isinstance(value, int | float) and not isinstance(value, bool):
            kept[metric if chosen == "none" else f"{metric}/{chosen}"] = float(value)
    return kept


def check_device(device: str) -> None:
    """Raises ConfigError for a GPU that is not there."""
    if device == "cpu":
        return
    import torch

    number = int(device.partition(":")[2] or 0)
    if number >= (count := torch.cuda.device_count()):
        raise ConfigError(
            "training.tasks.device", device, f"cpu, or one of the {count} GPUs that rank 0 sees here"
        )


def specs_of(names: list[str]) -> tuple[list[str], Any]:
    """What lm_eval takes for `training.tasks.names`, and its manager, which knows them.

    Raises:
        UserError: for a name that it does not know, and a file that is no task.
    """
    files = {name: task_files(Path(name)) for name in names if is_path(name)}
    plain = [name for name in names if name not in files]
    local = {file: task_in(file) for file in chain(*files.values())}
    needed = list(chain(*(members(one) for one in local.values() if "group" in one)))

    from lm_eval.tasks import TaskManager

    folders = [name for name in files if Path(name).is_dir()]
    manager = TaskManager(include_path=folders or None, include_defaults=bool(plain or needed))
    for name in [*plain, *needed]:
        if not manager.match_tasks([name]):
            known = sorted(manager.all_tasks)
            raise UserError(
                f"training.tasks.names: lm_eval has no task {name!r}{did_you_mean(name, known)}; a file of your own needs "
                "its path, with / or .yaml"
            )
    matched = chain(*(manager.match_tasks([name]) for name in plain))
    return list(dict.fromkeys([*matched, *map(str, local)])), manager


def task_files(path: Path) -> list[Path]:
    """The file `path`, or the files with tasks in a folder."""
    if path.is_file():
        return [path.absolute()]
    if not path.is_dir():
        raise UserError(f"training.tasks.names: {path}: no such file or folder")
    found = [file.absolute() for file in sorted(path.rglob("*.yaml")) if task_in(file, is_asked=False)]
    if not found:
        raise UserError(f"training.tasks.names: {path}: no YAML file there has a key task or group")
    return found


class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml comes without types
    """Reads `!function` as nothing: lm_eval resolves it."""


Loader.add_multi_constructor("!", lambda *_: None)


def task_in(file: Path, *, is_asked: bool = True) -> dict[str, Any]:
    """The content of a file with a task or group; nothing of another one, for which it raises UserError if it `is_asked`."""
    try:
        content = yaml.load(file.read_bytes(), Loader)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"training.tasks.names: {file}: {one_line(error)}") from None
    if isinstance(content, dict) and content.keys() & {"task", "group"}:
        return content
    if is_asked:
        raise UserError(f"training.tasks.names: {file}: has neither a key task nor a key group")
    return {}


def members(group: dict[str, Any]) -> list[str]:
    """The tasks that a local group names."""
    named = group.get("task") or []
    return [name for name in ([named] if isinstance(named, str) else named) if isinstance(name, str)]


if __name__ == "__main__":
    raise SystemExit(run_tool(main))
