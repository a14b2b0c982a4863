"""Hostfiles and the way to the hosts: what cannot work is said before any process starts."""

from pathlib import Path

import pytest

from megadyn.errors import UserError
from megadyn.launch.hosts import Host, check_ssh, read_hostfile


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_hosts_are_read_in_their_order(tmp_path):
    path = hostfile(
        tmp_path, "# two nodes\n\n127.0.0.2 slots=8\n  127.0.0.1\tslots=16   # the other\n::1 slots=1\n"
    )
    assert read_hostfile(path) == [Host("127.0.0.2", 8), Host("127.0.0.1", 16), Host("::1", 1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host; write one per line, as `name slots=8`"),
        ("# nothing\n\n", "names no host; write one per line, as `name slots=8`"),
        (
            "127.0.0.1\n",
            ", line 1: '127.0.0.1' must be of the form `name slots=8`, with as many slots as GPUs",
        ),
        ("127.0.0.1 slots=2\n127.0.0.2 slot=8\n", ", line 2: '127.0.0.2 slot=8' must be of the form"),
        ("127.0.0.1 slots=0\n", ", line 1: '127.0.0.1 slots=0' must be of the form"),
        ("127.0.0.1 slots=-1\n", "must be of the form"),
        ("127.0.0.1 slots=8x\n", "must be of the form"),
        ("a b slots=8\n", "must be of the form"),
        ("$(reboot) slots=8\n", "must be of the form"),
        ("-l slots=8\n", "must be of the form"),
        (
            "127.0.0.1 slots=1\n127.0.0.1 slots=1\n",
            ", line 2: host '127.0.0.1' is named twice; give it one line",
        ),
        (
            "localhost slots=1\n127.0.0.2 slots=1\n",
            "localhost means a different machine on each of 2 hosts; give the name",
        ),
        ("127.0.0.1 slots=1\nno-such-host.invalid slots=1\n", "host 'no-such-host.invalid' is unknown here"),
    ],
)
def test_a_hostfile_that_cannot_work_is_refused_in_one_sentence(text, said, tmp_path):
    path = hostfile(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hostfile_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: No such file"):
        read_hostfile(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary: not a text file"):
        read_hostfile(tmp_path / "binary")


SSH = """#!/bin/sh
for word; do last=$before before=$word; done       # the host stands before the command
case $last in
    down*) echo "a banner" >&2; echo "ssh: connect to host $last port 22: Connection refused" >&2; exit 255;;
esac
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only commands that are found: pdsh, and an ssh that reaches all hosts but those named down..."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("ssh", SSH), ("pdsh", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_hosts_that_ssh_does_not_reach_are_named(commands):
    check_ssh([Host("up", 1), Host("upper", 1)])
    with pytest.raises(UserError) as caught:
        check_ssh([Host("up", 1), Host("down1", 1), Host("down2", 1)])
    assert str(caught.value) == (
        "host 'down1' cannot be reached by ssh: ssh: connect to host down1 port 22: Connection refused "
        "(and 1 more hosts); set up ssh without a password, or run the script on each host with "
        "NODE_RANK=0, 1, ..."
    )


@pytest.mark.parametrize("missing", ["pdsh", "ssh"])
def test_a_missing_command_is_named_with_the_other_ways(commands, missing):
    (commands / missing).unlink()
    with pytest.raises(
        UserError, match=rf"needs {missing}, which is not installed: .*NODE_RANK=0, 1, .*mpi\.sh"
    ):
        check_ssh([Host("up", 1)])
