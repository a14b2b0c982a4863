"""Ranks that die or hang, and signals: the job ends everywhere, says who and why, and what follows loses nothing."""

import json
import os
import random
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.test_faults import tensors
from tests.end_to_end.test_pretrain import DEEPSPEED, ENVIRONMENT
from tests.helpers.crew import Crew, last_step, lines, resumed_at, wait_until
from tests.helpers.sabotage import in_step, slow_disk
from tests.helpers.tiny import ROOT

ENDLESS = ("training.iterations=100000", "training.eval_interval=0", "data.validation_fraction=0")
TIMEOUT = 20.0
INTERVAL = 3
KILLS = int(os.environ.get("MEGADYN_KILLS", 4))


def test_killed_anywhere_the_run_ends_with_the_same_weights(config_file: Path) -> None:
    """SIGKILL to a random rank at random moments, half of them while a checkpoint is written; saved in place and beside."""
    settings = (
        "data.validation_fraction=0",
        "parallel.pipeline=2",
        "training.iterations=24",
        f"checkpoint.interval={INTERVAL}",
    )
    straight = Crew(config_file, *settings, f"output_dir={config_file.parent}/straight", world=2)
    assert straight.wait() == [0, 0], straight.output()
    draw = random.Random(KILLS)
    out = config_file.parent / "out"
    saving = 0
    for kill in range(KILLS):
        background = kill % 2 == 1
        crew = Crew(
            config_file,
            *settings,
            f"checkpoint.background={background}",
            world=2,
            sabotage=partial(slow_disk, seconds=0.05),
        )
        if kill % 4 < 2:
            wait_until(
                lambda ranks=crew.ranks: is_saving(out) or not any(rank.is_alive() for rank in ranks),
                poll_s=0.001,
            )
            time.sleep(draw.uniform(0, 0.1))
        else:
            time.sleep(draw.uniform(1, 3))
        saving += is_saving(out)
        crew.signal(draw.randrange(2), signal.SIGKILL)
        statuses = crew.end_after(5)  # a rank may have died before it met the other
        assert -signal.SIGKILL in statuses or statuses == [0, 0]
        # While one is written in the background, training may be an interval ahead of it.
        newest = max((int(path.name[-8:]) for path in out.glob("checkpoints/iteration-*")), default=0)
        assert last_step(out) - newest <= INTERVAL * (2 if background else 1)
    crew = Crew(config_file, *settings, world=2)
    assert crew.wait() == [0, 0], crew.output()
    assert saving or KILLS < 4
    end = "checkpoints/iteration-00000024"
    assert tensors(out / end) == tensors(config_file.parent / "straight" / end)
    assert not list(out.glob("checkpoints/.*"))
    train = [line["iteration"] for line in lines(out) if "lm_loss" in line]
    assert train == list(range(1, 25))


def is_saving(run: Path) -> bool:
    return any(run.glob("checkpoints/.writing-*"))


def disturbed(config_file: Path, what: str, victim: int) -> tuple[Crew, Path]:
    """An endless run in which a rank fails, crashes, hangs or is to be stopped; and its output folder."""
    folder = config_file.parent / f"{what}-{victim}"
    folder.mkdir()
    own = folder / config_file.name
    own.write_text(config_file.read_text())
    crew = Crew(
        own,
        *ENDLESS,
        "parallel.tensor=2",
        f"training.timeout_s={TIMEOUT}",
        f"output_dir={folder}/out",
        world=2,
        sabotage=None if what == "stop" else partial(in_step, victim=victim, step=3, what=what),
    )
    return crew, folder / "out"


def check_named(crew: Crew, victim: int, said: str) -> list[int]:
    """The other rank ends soon, and names the victim; returns the exit statuses."""
    began = time.monotonic()
    statuses = crew.wait(60)
    assert time.monotonic() - began < TIMEOUT + 5  # and a slow machine's share
    assert 0 not in statuses
    (other,) = crew.errors(1 - victim)
    assert f"rank {victim} (process {crew.ranks[victim].pid} on " in other
    assert said in other
    assert "Traceback" not in crew.output(1 - victim)
    return statuses


def test_a_rank_that_fails_ends_the_others_by_name(config_file: Path) -> None:
    crew, _ = disturbed(config_file, "fail", victim=1)
    check_named(crew, 1, "failed, reading samples of step 3: RuntimeError: the disk is on fire")
    assert "RuntimeError: the disk is on fire" in crew.output(1)
    assert "Traceback" in crew.output(1)  # a fault of ours shows where


def test_a_rank_that_crashes_ends_the_others_by_name(config_file: Path) -> None:
    crew, _ = disturbed(config_file, "crash", victim=0)
    check_named(crew, 0, "died: killed from outside, out of memory, or crashed")
    assert "Fatal Python error: Aborted" in crew.output(0)


def test_a_rank_that_stops_or_hangs_ends_the_others_by_name_and_shows_its_stack(config_file: Path) -> None:
    """Three runs at once, because each waits for its timeout."""
    hung, hung_out = disturbed(config_file, "hang", victim=1)
    stopped = [disturbed(config_file, "stop", victim) for victim in (0, 1)]
    for victim, (crew, out) in enumerate(stopped):
        wait_until(lambda out=out: last_step(out) >= 2)
        crew.signal(victim, signal.SIGSTOP)
    assert hung.wait(60) == [1, 1]
    assert "made no progress for" in hung.errors(1)[0]
    assert "reading samples of step 3" in hung.errors(1)[0]
    assert "in read" in hung.output(1)  # where it sleeps
    assert "rank 1" in hung.errors(0)[0]
    for rank in (0, 1):
        stacks = (hung_out / f"ended/rank{rank}-stacks.txt").read_text()
        assert hung.errors(rank)[0].removeprefix("error: ") in stacks
        assert ("in read" in stacks) == (rank == 1)
        collectives = json.loads((hung_out / f"ended/rank{rank}-collectives.json").read_text())
        assert any("all_reduce" in one["profiling_name"] for one in collectives["entries"])
    for victim, (crew, out) in enumerate(stopped):
        statuses = check_named(crew, victim, "it is stopped (SIGSTOP)")
        assert statuses[victim] == -signal.SIGKILL  # it could not end by itself
        assert "most recent call first" in crew.output(1 - victim)
        assert [path.name for path in sorted((out / "ended").iterdir())] == [
            f"rank{1 - victim}-collectives.json",
            f"rank{1 - victim}-stacks.txt",
        ]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_saves_and_ends_all(number: signal.Signals, config_file: Path) -> None:
    crew = Crew(config_file, *ENDLESS, "parallel.pipeline=2", "checkpoint.background=true", world=2)
    wait_until(lambda: last_step(config_file.parent / "out") >= 2)
    crew.signal(1, number)
    assert crew.wait(60) == [0, 0], crew.output()
    last = last_step(config_file.parent / "out")
    assert (config_file.parent / f"out/checkpoints/iteration-{last:08d}/manifest.json").exists()


def test_one_that_cannot_save_within_the_grace_time_is_ended(config_file: Path) -> None:
    crew = Crew(
        config_file, *ENDLESS, "training.grace_s=1", sabotage=partial(in_step, victim=0, step=3, what="hang")
    )
    wait_until(lambda: last_step(config_file.parent / "out") >= 2)
    time.sleep(0.2)
    crew.signal(0, signal.SIGTERM)
    assert crew.wait(30) == [1]
    assert (
        "not saved and ended within training.grace_s = 1 s of SIGTERM (reading samples of step 3)"
        in crew.errors()[0]
    )


# ---- under the launchers -------------------------------------------------------------------------


def ranks_of(launcher: int, config_file: Path) -> dict[int, psutil.Process]:
    found = {}
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            if (
                str(config_file) in process.cmdline()
                and "RANK" in process.environ()
                and "LOCAL_RANK" in process.environ()
            ):
                found[int(process.environ()["RANK"])] = process
        except psutil.NoSuchProcess:
            continue
    return found


def test_torchrun_restarts_a_run_that_lost_a_rank(config_file: Path) -> None:
    """By the script, which `test_launch_scripts.py` does not start again."""
    out = config_file.parent / "out"
    settings = [
        "data.validation_fraction=0",
        "training.iterations=25",
        "parallel.tensor=2",
        "checkpoint.interval=5",
    ]
    process = subprocess.Popen(
        [ROOT / "examples/launch/torchrun.sh", str(config_file), *settings],
        cwd=ROOT,
        env=ENVIRONMENT | {"GPUS": "2", "MAX_RESTARTS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: (out / "checkpoints/latest").exists(), 120)
        ranks_of(process.pid, config_file)[1].kill()
        output, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert resumed_at(output) >= 5
    assert "exitcode: -9" in output or "Signal 9" in output or "died: killed" in output
    assert json.loads((out / "checkpoints/iteration-00000025/manifest.json").read_text())["iteration"] == 25


def test_deepspeed_ends_all_when_one_rank_is_killed(config_file: Path) -> None:
    process = subprocess.Popen(
        [*DEEPSPEED, str(config_file), *ENDLESS, "parallel.tensor=2"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: last_step(config_file.parent / "out") >= 1, 120)
        ranks = ranks_of(process.pid, config_file)
        ranks[1].kill()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert f"rank 1 (process {ranks[1].pid} on " in output
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks.values())
