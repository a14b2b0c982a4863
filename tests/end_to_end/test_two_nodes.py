"""Two machines as two namespaces: every launcher joins them, and a link that is cut ends the job on both."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.test_pretrain import ENVIRONMENT
from tests.helpers.crew import last_step, wait_until

TIMEOUT = 20.0
SETTINGS = ["data.validation_fraction=0", "parallel.tensor=2", "checkpoint.interval=2"]


LINK = "megadyn0"
INSIDE = ["ip", "netns", "exec"]
ALONE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


class Node:
    """A namespace with one address, linked to the other; no process of one sees those of the other."""

    def __init__(self, number: int):
        self.name, self.address = f"megadyn{os.getpid()}-{number}", f"10.231.7.{number}"

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        named = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": LINK} | environment
        return subprocess.Popen(
            [*INSIDE, self.name, *ALONE, *command],
            env=named,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    first, second = Node(1), Node(2)
    if missing := [command for command in ("ip", "unshare") if shutil.which(command) is None]:
        pytest.skip(f"no `{missing[0]}` command: the two namespaces cannot be made")
    try:
        for node in (first, second):
            ip("netns", "add", node.name)
        ip(
            "link",
            "add",
            LINK,
            "netns",
            first.name,
            "type",
            "veth",
            "peer",
            "name",
            LINK,
            "netns",
            second.name,
        )
        for node in (first, second):
            ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", LINK)
            ip("-n", node.name, "link", "set", LINK, "up")
            ip("-n", node.name, "link", "set", "lo", "up")
            subprocess.run([*INSIDE, node.name, *ALONE, "true"], check=True, capture_output=True, text=True)
        yield first, second
    except subprocess.CalledProcessError as error:
        pytest.skip(f"namespaces are not allowed here: {error.stderr.strip()}")
    finally:
        for node in (first, second):
            subprocess.run(["ip", "netns", "del", node.name], check=False, capture_output=True)


def finish(*processes: subprocess.Popen[str], seconds: float = 120) -> list[str]:
    """What they printed. None is left."""
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def torchrun(nodes: tuple[Node, Node], config_file: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    return [
        node.start(
            "torchrun",
            "--nnodes",
            "2",
            "--nproc_per_node",
            "1",
            "--node_rank",
            str(rank),
            "--master_addr",
            nodes[0].address,
            "--master_port",
            "29511",
            "-m",
            "megadyn.pretrain",
            str(config_file),
            *SETTINGS,
            *overrides,
        )
        for rank, node in enumerate(nodes)
    ]


def test_a_cut_link_ends_both_nodes_and_other_launchers_go_on(
    nodes: tuple[Node, Node], config_file: Path
) -> None:
    out = config_file.parent / "out"
    first, second = torchrun(
        nodes, config_file, "training.iterations=100000", f"training.timeout_s={TIMEOUT}"
    )
    try:
        wait_until(lambda: last_step(out) >= 3 or first.poll() is not None, 120)
        ip("-n", nodes[1].name, "link", "set", LINK, "down")
        began = time.monotonic()
        outputs = finish(first, second, seconds=90)
        took = time.monotonic() - began
    finally:
        ip("-n", nodes[1].name, "link", "set", LINK, "up")
        finish(first, second)
    assert first.returncode != 0
    assert second.returncode != 0
    assert "rank 1 (process " in outputs[0]
    assert "sent no heartbeat" in outputs[0]
    assert "rank 0 (process " in outputs[1]
    assert took < TIMEOUT + 15  # torchrun itself ends late

    stood = last_step(out)
    hosts = config_file.parent / "hosts"
    hosts.write_text(f"{nodes[0].address} slots=1\n{nodes[1].address} slots=1\n")
    run = [
        node.start(
            "deepspeed",
            "--hostfile",
            str(hosts),
            "--no_ssh",
            "--node_rank",
            str(rank),
            "--master_addr",
            nodes[0].address,
            "--master_port",
            "29512",
            "--module",
            "megadyn.pretrain",
            str(config_file),
            *SETTINGS,
            f"training.iterations={stood + 2}",
        )
        for rank, node in enumerate(nodes)
    ]
    outputs = finish(*run)
    assert [process.returncode for process in run] == [0, 0], outputs
    assert "resumed from" in outputs[0]

    remote = config_file.parent / "remote.sh"  # what ssh is elsewhere
    remote.write_text(
        f'#!/bin/sh\nhost="$1"; shift\n'
        f'exec {" ".join(INSIDE)} "{nodes[0].name[:-1]}${{host##*.}}" {" ".join(ALONE)} sh -c "$*"\n'
    )
    remote.chmod(0o755)
    mpi = nodes[0].start(
        "mpirun",
        "--allow-run-as-root",
        "-n",
        "2",
        "--hostfile",
        str(hosts),
        "--mca",
        "plm_rsh_agent",
        str(remote),
        "--mca",
        "btl_tcp_if_include",
        "10.231.7.0/24",
        "--mca",
        "oob_tcp_if_include",
        "10.231.7.0/24",
        "-x",
        "PATH",
        "-x",
        "PYTHONPATH",
        "-x",
        "OMP_NUM_THREADS",
        "-x",
        "DS_ACCELERATOR",
        "-x",
        "GLOO_SOCKET_IFNAME",
        "-x",
        f"MASTER_ADDR={nodes[0].address}",
        "-x",
        "MASTER_PORT=29513",
        "python",
        "-m",
        "megadyn.pretrain",
        str(config_file),
        *SETTINGS,
        f"training.iterations={stood + 4}",
    )
    (output,) = finish(mpi)
    assert mpi.returncode == 0, output
    assert "resumed from" in output
    assert last_step(out) == stood + 4
