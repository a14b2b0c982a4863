"""The main job under real launchers: train, stop by signal, resume, damage, refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.crew import Crew
from tests.helpers.tiny import ROOT

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
PORT = str(20000 + os.getpid() % 10000)
"""This process's own: tests run beside each other."""
DEEPSPEED = ["deepspeed", "--num_accelerators", "2", "--master_port", PORT, "--module", "megadyn.pretrain"]


def train(config_file: Path, *overrides: str, world: int = 1) -> tuple[int, str]:
    """The job's exit status, the worst of its ranks', and what rank 0 printed."""
    crew = Crew(config_file, *overrides, world=world)
    return max(map(abs, crew.wait())), crew.output()


def records(config_file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config_file.parent / "out/metrics.jsonl").read_text().splitlines()]


def losses(config_file: Path) -> dict[int, float]:
    return {record["iteration"]: record["lm_loss"] for record in records(config_file) if "lm_loss" in record}


def test_metrics_hold_the_contract(config_file: Path) -> None:
    status, output = train(config_file, "logging.tensorboard=true")
    assert status == 0, output
    assert "untested optimizer" not in output  # DeepSpeed's remark on what it does not know
    found = records(config_file)
    step = next(record for record in found if "lm_loss" in record)
    assert set(step) >= {
        "iteration",
        "consumed_samples",
        "consumed_tokens",
        "lm_loss",
        "aux_losses",
        "grad_norm",
        "learning_rate",
        "step_time_ms",
        "tokens_per_second",
        "model_tflops",
        "routing",
    }
    assert step["consumed_tokens"] == step["consumed_samples"] * 48
    assert set(step["routing"]) == {"0", "1", "2", "3"}
    assert step["routing"]["1"]["routed_fraction"] == 0.5
    validations = {record["iteration"]: record["validation"] for record in found if "validation" in record}
    assert set(validations) == {0, 3, 6}
    assert all(set(validation) == {"topk", "causal"} for validation in validations.values())
    out = config_file.parent / "out"
    assert (out / "config.yaml").exists()
    assert list((out / "tensorboard").iterdir())
    assert (out / "checkpoints/latest").read_text().splitlines()[0] == "iteration-00000006"


def test_sigterm_saves_and_exits_0(config_file: Path) -> None:
    hosts = config_file.with_name("hosts")
    hosts.write_text("localhost slots=2\n")
    command = [
        str(ROOT / "examples/launch/deepspeed.sh"),
        str(config_file),
        "parallel.tensor=2",
        "training.iterations=100000",
        "training.eval_interval=0",
    ]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT | {"HOSTFILE": str(hosts), "NODE_RANK": "0", "MASTER_PORT": PORT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        metrics = config_file.parent / "out/metrics.jsonl"
        wait_until(lambda: metrics.exists() and '"lm_loss"' in metrics.read_text())
        ranks = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "--local_rank" in " ".join(child.cmdline()) and "launch" not in " ".join(child.cmdline())
        ]
        assert len(ranks) == 2
        ranks[0].send_signal(signal.SIGTERM)  # one is enough: all stop after the same step
        output, _ = process.communicate(timeout=60)
    finally:
        left = (
            [process]
            if process.poll() is not None
            else [*psutil.Process(process.pid).children(recursive=True), process]
        )
        for one in left:
            one.kill()
    assert process.returncode == 0, output
    assert "stopped by SIGTERM" in output
    last = max(losses(config_file))
    assert (config_file.parent / f"out/checkpoints/iteration-{last:08d}/manifest.json").exists()


def wait_until(condition: Any, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def test_damaged_and_foreign_checkpoints(config_file: Path) -> None:
    status, output = train(config_file, "checkpoint.interval=3")
    assert status == 0, output
    checkpoints = config_file.parent / "out/checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {
        "iteration-00000003",
        "iteration-00000006",
        "latest",
    }

    status, output = train(config_file, "model.hidden_size=64")
    assert status == 2
    assert "model.hidden_size is 32 in the checkpoint and 64 here" in output

    status, output = train(config_file, "checkpoint.resume=never")
    assert status == 2
    assert "holds checkpoints" in output

    shard = checkpoints / "iteration-00000006/weights-pp00-tp00-dp00.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    status, output = train(config_file, f"checkpoint.resume={checkpoints}/iteration-00000006")
    assert status == 2
    assert "damaged" in output

    status, output = train(config_file)  # auto takes the newest good one, and says so
    assert status == 0, output
    assert "checkpoint skipped" in output
    assert "resumed from" in output
    assert "iteration-00000003" in output
    assert sorted(losses(config_file)) == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(checkpoints)
