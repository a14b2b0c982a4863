"""The launch scripts: each starts a job, one run goes on under all of them, and what cannot start is one line and status 2.

The mpirun command is the real one, and so are torchrun and deepspeed, which `test_deaths.py` and `test_pretrain.py` start.
Slurm, pdsh and ssh are stand-ins: sbatch runs the script from another place, as Slurm's daemon does, and srun starts the
processes with the variables that Slurm sets.
"""

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.test_pretrain import ENVIRONMENT, losses
from tests.helpers.crew import Crew
from tests.helpers.tiny import ROOT

SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
LAUNCH = ROOT / "examples/launch"
ROOT_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

SBATCH = """#!/bin/bash
set -eu
while [[ $1 == --* ]]; do
    case $1 in
        --nodes) nodes=$2;;
        --ntasks-per-node) export SLURM_NTASKS_PER_NODE=$2;;
        --cpus-per-task) export SLURM_CPUS_PER_TASK=$2;;
        --gpus-per-node) ;;
        *) echo "sbatch: unrecognized option $1" >&2; exit 1;;
    esac
    shift 2
done
cp "$1" "$SPOOL/slurm_script"
shift
export SLURM_JOB_ID=4711 SLURM_JOB_NODELIST="localhost[0]" SLURM_NTASKS=$((nodes * SLURM_NTASKS_PER_NODE))
exec "$SPOOL/slurm_script" "$@"
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames localhost[0]" ] && printf 'localhost\\nanother-host\\n'
"""
SRUN = """#!/bin/bash
# As one built with PMI-2 does, it sets MPICH's variables too.
[[ "$1 $2 $3" == "--kill-on-bad-exit=1 --cpus-per-task 2" ]] || { echo "srun: $*" >&2; exit 1; }
shift 3
processes=()
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_STEP_ID=0 SLURM_PROCID=$rank SLURM_LOCALID=$rank PMI_RANK=$rank PMI_SIZE=$SLURM_NTASKS "$@" &
    processes+=($!)
done
status=0
for process in "${processes[@]}"; do wait "$process" || status=$?; done
exit $status
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def commands(folder: Path, **texts: str) -> str:
    """A PATH on which these commands come first."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{ENVIRONMENT['PATH']}"


def call(script: str, *words: object, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LAUNCH / script, *map(str, words)],
        cwd=ROOT,
        env=ENVIRONMENT | ROOT_MPI | settings,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_one_run_goes_on_under_every_launcher_and_layout(config_file: Path, tmp_path: Path) -> None:
    """One curve, that of one process straight through."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    slurm = {
        "PATH": commands(tmp_path / "bin", sbatch=SBATCH, scontrol=SCONTROL, srun=SRUN),
        "SPOOL": str(tmp_path),
    }
    constant = ["optimizer.schedule=constant", "training.eval_interval=0"]
    for end, (script, layout, settings) in enumerate(
        (
            ("mpi.sh", "parallel.tensor=2", {"HOSTFILE": str(hosts), "MASTER_PORT": free_port()}),
            (
                "slurm.sh",
                "parallel.tensor=1",
                {"GPUS": "2", "CPUS": "2", "MASTER_PORT": free_port(), **slurm},
            ),
        ),
        1,
    ):
        done = call(script, config_file, layout, *constant, f"training.iterations={end}", **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "on 2 processes" in done.stdout
        assert ("resumed from" in done.stdout) == (end > 1)
    alone = Crew(config_file, *constant, "training.iterations=2", f"output_dir={tmp_path}/alone/out")
    assert alone.wait() == [0], alone.output()
    assert losses(config_file) == pytest.approx(losses(tmp_path / "alone/config.yaml"), rel=1e-5)
    assert list(losses(config_file)) == [1, 2]


ECHO = """#!/bin/sh
[ -z "$SAY_ADDRESS" ] || echo "at $MASTER_ADDR:$MASTER_PORT"
printf '%s\\n' "$@"
"""


@pytest.mark.parametrize(
    ("script", "settings", "started"),
    [
        ("deepspeed.sh", {}, "--log_level error --master_port 29500 --module megadyn.pretrain CONFIG a=b c"),
        (
            "deepspeed.sh",
            {"GPUS": "2", "DEEPSPEED_ARGS": "--bind_cores_to_rank --quiet"},
            "--log_level error --master_port 29500 --num_accelerators 2 --bind_cores_to_rank --quiet "
            "--module megadyn.pretrain CONFIG a=b c",
        ),
        (
            "deepspeed.sh",
            {"HOSTFILE": "HOSTS", "MASTER_PORT": "1"},
            "--log_level error --master_port 1 --hostfile HOSTS --no_ssh_check --master_addr "
            "127.0.0.2 --force_multi --module megadyn.pretrain CONFIG a=b c",
        ),
        (
            "deepspeed.sh",
            {"HOSTFILE": "HOSTS", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"},
            "--log_level error --master_port 29500 --hostfile HOSTS "
            "--no_ssh_check --master_addr 10.0.0.1 --no_ssh --node_rank 1 --module megadyn.pretrain CONFIG a=b c",
        ),
        (
            "torchrun.sh",
            {},
            "--nnodes 1 --nproc_per_node auto --max_restarts 0 --standalone -m megadyn.pretrain CONFIG a=b c",
        ),
        (
            "torchrun.sh",
            {"NNODES": "2", "GPUS": "2", "MASTER_ADDR": "node0", "MAX_RESTARTS": "3", "RUN_ID": "7"},
            "--nnodes 2 --nproc_per_node 2 --max_restarts 3 --rdzv_backend c10d --rdzv_endpoint node0:29500 --rdzv_id 7 "
            "-m megadyn.pretrain CONFIG a=b c",
        ),
        (
            "mpi.sh",
            {"HOSTFILE": "HOSTS", "MPIRUN_ARGS": "--mca btl tcp", "SAY_ADDRESS": "1"},
            "at 127.0.0.2:29500 --bind-to none "
            "--map-by slot --hostfile HOSTS -x ... --mca btl tcp python -m megadyn.pretrain CONFIG a=b c",
        ),
        (
            "mpi.sh",
            {"GPUS": "4", "SAY_ADDRESS": "1"},
            "at 127.0.0.1:29500 --bind-to none --map-by slot -n 4 --host localhost:4 "
            "-x ... python -m megadyn.pretrain CONFIG a=b c",
        ),
        (
            "run.sh",
            {"LAUNCHER": "torchrun"},
            "--nnodes 1 --nproc_per_node auto --max_restarts 0 --standalone -m megadyn.pretrain CONFIG a=b c",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith(".sh") else "",
)
def test_settings_become_the_launchers_options(
    script: str, settings: dict[str, str], started: str, config_file: Path, tmp_path: Path
) -> None:
    """`a=b c` stands for an override with a space in it, which must stay one word."""
    hosts = tmp_path / "hosts"
    hosts.write_text("# nodes\n127.0.0.2 slots=2\n127.0.0.1 slots=2\n")
    path = commands(
        tmp_path / "bin", deepspeed=ECHO, torchrun=ECHO, mpirun=ECHO, ssh="#!/bin/sh\n", pdsh="#!/bin/sh\n"
    )
    given = {name: value.replace("HOSTS", str(hosts)) for name, value in settings.items()}
    override = f"output_dir={tmp_path}/a b"
    more = {"PYTORCH_ALLOC_CONF": "", "WANDB_MODE": "offline"}
    script_path = LAUNCH / script
    if script == "run.sh":  # stands in the folder of its example as a link
        (tmp_path / "launch").symlink_to(LAUNCH)
        (config_file.parent / "example").mkdir()
        script_path = config_file.parent / "example" / "run.sh"
        script_path.symlink_to("../launch/run.sh")
        config_file = config_file.rename(script_path.with_name("config.yaml"))
    done = subprocess.run(
        [script_path, *([] if script == "run.sh" else [config_file]), override],
        cwd=ROOT,
        env=ENVIRONMENT | more | {"PATH": path} | given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()[1:]  # after what check_launch.py says
    assert override in words
    said = (
        " ".join(words)
        .replace(str(config_file), "CONFIG")
        .replace(override, "a=b c")
        .replace(str(hosts), "HOSTS")
    )
    assert re.sub(r"(-x \w+ )+", "-x ... ", said) == started
    if script == "mpi.sh":
        assert {
            "PATH",
            "PYTHONPATH",
            "MASTER_ADDR",
            "MASTER_PORT",
            "DS_ACCELERATOR",
            "OMP_NUM_THREADS",
            *more,
        } <= set(words)


@pytest.mark.parametrize("script", ["deepspeed.sh", "mpi.sh", "slurm.sh", "torchrun.sh"])
@pytest.mark.parametrize(
    ("given", "memory"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": ""}, ""),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ],
    ids=["unset", "emptied", "older name"],
)
def test_memory_grows_in_place_unless_told_otherwise(
    script: str, given: dict[str, str], memory: str, tmp_path: Path
) -> None:
    say = '#!/bin/sh\necho "memory=$PYTORCH_ALLOC_CONF"\n'
    path = commands(
        tmp_path / "bin",
        deepspeed=say,
        mpirun=say,
        srun=say,
        torchrun=say,
        python="#!/bin/sh\n",
        scontrol=say,
    )
    done = call(script, "config.yaml", PATH=path, GPUS="2", SLURM_JOB_ID="1", SLURM_JOB_NODELIST="a", **given)
    assert (done.returncode, done.stdout) == (0, f"memory={memory}\n")


@pytest.mark.parametrize(
    ("script", "settings", "words", "said"),
    [
        ("deepspeed.sh", {"HOSTFILE": "nowhere"}, [], "nowhere: No such file or directory"),
        ("deepspeed.sh", {"HOSTFILE": "EMPTY"}, [], "names no host; write one per line, as `name slots=8`"),
        ("deepspeed.sh", {"HOSTFILE": "UNKNOWN"}, [], "host 'no-such-host.invalid' is unknown here"),
        ("mpi.sh", {"HOSTFILE": "MALFORMED"}, [], "line 1: 'localhost' must be of the form `name slots=8`"),
        ("mpi.sh", {}, [], "neither HOSTFILE nor GPUS is set"),
        (
            "mpi.sh",
            {"GPUS": "3"},
            ["parallel.tensor=2"],
            "number of processes = 3: must be a multiple of parallel.tensor",
        ),
        ("torchrun.sh", {"NNODES": "2"}, [], "MASTER_ADDR is not set: 2 machines need"),
        ("torchrun.sh", {"GPUS": "2"}, ["model.num_layer=2"], "did you mean 'num_layers'"),
        (
            "slurm.sh",
            {"NODES": "2", "GPUS": "3"},
            ["parallel.pipeline=4"],
            "number of processes = 6: must be a multiple of",
        ),
        ("deepspeed.sh", {}, ["deepspeed_config=nowhere.json"], "nowhere.json"),
    ],
)
def test_what_cannot_start_is_one_line_and_status_2(
    script: str, settings: dict[str, str], words: list[str], said: str, config_file: Path, tmp_path: Path
) -> None:
    for name, text in (
        ("EMPTY", ""),
        ("UNKNOWN", "no-such-host.invalid slots=2\n"),
        ("MALFORMED", "localhost\n"),
    ):
        (tmp_path / name).write_text(text)
    given = {
        name: str(tmp_path / value) if (tmp_path / value).exists() else value
        for name, value in settings.items()
    }
    started = "#!/bin/sh\necho started; exit 99\n"
    path = commands(tmp_path / "bin", deepspeed=started, torchrun=started, mpirun=started, sbatch=started)
    done = call(script, config_file, *words, PATH=path, **given)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_folder_of_several_configurations_asks_for_one() -> None:
    script = ROOT / "examples/kinds/run.sh"
    done = subprocess.run([script], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "kinds/config.yaml: no such file; there are fixed.yaml" in done.stderr


def test_the_scripts_are_clean() -> None:
    """By shellcheck, at its strictest level of severity."""
    for script in SCRIPTS:
        assert os.access(script, os.X_OK), script
    done = subprocess.run(
        ["shellcheck", "--severity=style", *SCRIPTS],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
