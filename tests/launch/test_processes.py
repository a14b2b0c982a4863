"""Which processes started a rank, told from a table of processes."""

import os

import pytest

from megadyn.launch.processes import Process, here, launchers, process_of, process_start

PYTHON = "/venv/bin/python"
RUNNER = f"{PYTHON} /venv/bin/deepspeed --num_gpus 2 --module megadyn.pretrain c.yaml"
LAUNCH = f"{PYTHON} -u -m deepspeed.launcher.launch --world_info=x --module megadyn.pretrain c.yaml"


@pytest.mark.parametrize(
    ("above", "watched"),
    [
        ([LAUNCH, RUNNER, "bash run.sh", "init"], 2),
        ([LAUNCH, "bash -c cd", "sshd: me@notty", "init"], 2),  # the command of pdsh: its connection counts
        ([LAUNCH, "-bash", "sshd: me@pts/0", "init"], 1),  # left behind by whoever logged in
        ([LAUNCH, "init"], 1),
        ([f"{PYTHON} /venv/bin/torchrun --nproc_per_node 2", "bash", "init"], 1),
        ([f"{PYTHON} -m torch.distributed.run --nproc_per_node 2", "bash", "init"], 1),
        ([f"{PYTHON} -m megadyn.launch.torchrun --nproc_per_node 2", "bash", "init"], 1),
        (["numactl -C 0 python", LAUNCH, RUNNER, "init"], 2),  # a wrapper between
        (["bash -c python", "slurmstepd: [12.0]", "init"], 1),
        (["/usr/bin/orted --daemonize", "init"], 1),
        (["hydra_pmi_proxy --control-port 1", "mpiexec.hydra -n 2", "init"], 2),
        (["bash run.sh", "tmux", "init"], 0),  # in the background of a shell, which may end
        (["init"], 0),
        (["pytest deepspeed", "init"], 0),
    ],
)
def test_only_launchers_are_watched(above: list[str], watched: int) -> None:
    table = {
        os.getppid() + i: Process(
            os.getppid() + i,
            "0",
            os.getppid() + i + 1,
            tuple(
                line.split(" ", 1)[:1]
                + ([line.split(" ", 1)[1]] if line.startswith("sshd") or "[" in line else line.split()[1:])
            ),
        )
        for i, line in enumerate(above)
    }
    found = launchers(table.get)
    assert len(found) == watched
    assert all(process.words for process in found)


def test_this_process_is_known() -> None:
    me = process_of(os.getpid())
    assert me is not None and me.is_alive and me.parent == os.getppid() and me.words
    assert process_start(os.getpid()) == me.start
    assert not me._replace(start="1").is_alive
    assert here().pid == os.getpid()
    assert process_of(2**22 + 1) is None
