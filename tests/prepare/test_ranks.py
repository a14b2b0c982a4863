"""Which processes are one job, as launchers tell, and how rank 0 takes the parts of all."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadyn.errors import UserError
from megadyn.prepare import parts as parts_module
from megadyn.prepare import preprocess as preprocess_module
from megadyn.prepare import ranks as ranks_module
from megadyn.prepare.parts import Part, Parts, PartWriter
from megadyn.prepare.preprocess import ALL_SENT, Encoder, NumberedPart, first_documents, parts_of_all
from megadyn.prepare.ranks import MpiRanks, Ranks, ranks_of_job
from megadyn.prepare.readers import Corpus
from megadyn.tokenization.tokenizer import ByteTokenizer

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "1"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "1"}
# of the script that sbatch starts, once
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


class FourRanks(Ranks):
    """What MPI finds."""

    rank, size, library = 1, 4, "Any MPI"


@pytest.mark.parametrize(
    "given",
    [
        OPEN_MPI,
        MPICH,
        SRUN,
        SRUN | {"PMIX_RANK": "1"},
        {"PMIX_RANK": "1"},
        SRUN | MPICH,
        BATCH | OPEN_MPI,
        SRUN | {"SLURM_STEP_NUM_TASKS": "2"} | MPICH,
    ],
)
def test_several_processes_of_a_launcher_are_one_job(given, monkeypatch):
    """The last one: an mpirun that has srun start its helper on each of two hosts."""
    monkeypatch.setattr(os, "environ", given)
    monkeypatch.setattr(ranks_module, "MpiRanks", FourRanks)
    assert ranks_of_job().size == 4


@pytest.mark.parametrize(
    "given",
    [
        {},
        BATCH,
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
    ],
)
def test_one_process_needs_no_mpi(given, monkeypatch):
    monkeypatch.setattr(os, "environ", given)
    monkeypatch.setattr(ranks_module, "MpiRanks", None)
    assert type(ranks_of_job()) is Ranks


@pytest.mark.parametrize("given", [OPEN_MPI, MPICH, SRUN])
def test_processes_that_mpi_cannot_join_are_refused(given, monkeypatch):
    monkeypatch.setattr(os, "environ", given)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match="started as one of several processes, but mpi4py .* is missing"):
        MpiRanks()
    with pytest.raises(UserError, match="mpi4py .* is missing"):
        ranks_of_job()
    monkeypatch.setattr(ranks_module, "MpiRanks", type("Lonely", (FourRanks,), {"rank": 0, "size": 1}))
    with pytest.raises(UserError, match=r"started as 4 processes, but MPI \(Any MPI\) joins 1 of them"):
        ranks_of_job()


class Rank0(Ranks):
    """Of several; each call of `received` brings the next of `messages`."""

    def __init__(self, size: int, messages: list[list[Any]]) -> None:
        self.size, self.messages = size, messages

    def received(self) -> list[Any]:
        return self.messages.pop(0) if self.messages else []


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    monkeypatch.setattr(preprocess_module, "POLL_SECONDS", 0.0)
    parts = Parts(tmp_path / "x")
    parts.folder.mkdir()
    return Encoder(Corpus([]), [], ByteTokenizer(), parts, eod=None, limit=None)


def part(encoder: Encoder, number: int) -> Part:
    """A finished part of two documents."""
    with PartWriter(encoder.parts, f"part{number}") as writer:
        writer.add(np.arange(3, dtype=encoder.dtype), np.array([1, 2]), 3)
        return writer.finish(0, None)


def test_rank_0_takes_parts_in_order_and_goes_on_with_its_own_meanwhile(encoder):
    made = []

    def own() -> Iterator[NumberedPart]:
        for number in (0, 3, 6):
            made.append(number)
            yield number, part(encoder, number)

    one, two, four, five, seven = ((number, part(encoder, number)) for number in (1, 2, 4, 5, 7))
    ranks = Rank0(3, [[], [five], [], [two, one], [], [], [], [ALL_SENT], [four], [], [seven, ALL_SENT]])
    found = parts_of_all(encoder, own(), ranks)
    assert (next(found)[1].name, made) == ("part0", [0])
    assert (next(found)[1].name, made) == ("part1", [0, 3])  # of it nothing was there, so unit 3 came first
    assert [(number, part.name) for number, part in found] == [
        (number, f"part{number}") for number in range(2, 8)
    ]
    assert not ranks.messages


def test_as_many_documents_as_are_wanted_end_the_wait_for_more(encoder):
    """Rank 1 stops by itself where it has as many, so that its next part never comes."""
    ranks = Rank0(2, [[], [], [(1, part(encoder, 1))]])
    found = parts_of_all(encoder, iter([(0, part(encoder, 0))]), ranks)
    assert [part.name for part in first_documents(encoder, found, 4)] == ["part0", "part1"]


@pytest.mark.parametrize("kind", ["bin", "len"])
def test_a_part_that_rank_0_cannot_see_ends_the_job(encoder, monkeypatch, kind):
    monkeypatch.setattr(parts_module, "VISIBLE_SECONDS", 0.05)
    monkeypatch.setattr(parts_module, "POLL_SECONDS", 0.01)
    hidden = part(encoder, 1)
    file = encoder.parts.folder / f"part1.{kind}"
    whole = file.read_bytes()

    def taken() -> list[NumberedPart]:
        return list(parts_of_all(encoder, iter([(0, part(encoder, 0))]), Rank0(2, [[(1, hidden), ALL_SENT]])))

    file.write_bytes(whole[:-1])
    with pytest.raises(
        UserError,
        match=rf"part1\.{kind}: rank 1 has written it, but rank 0 on .* not see all of it within 0.05",
    ):
        taken()
    file.unlink()
    with pytest.raises(UserError, match="on a file system that all hosts share"):
        taken()
    looks: list[float] = []

    def wait(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            file.write_bytes(whole)

    monkeypatch.setattr(parts_module.time, "sleep", wait)
    assert [part.name for _, part in taken()] == ["part0", "part1"]
    assert len(looks) == 2
    file.unlink()
    encoder.joined = {"part1": hidden}  # the dataset begins with it: its tokens have left their file
    assert len(taken()) == 2


def test_a_folder_that_another_rank_cannot_see_ends_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "VISIBLE_SECONDS", 0.05)
    parts = Parts(tmp_path / "x")
    with pytest.raises(
        UserError, match=r"x\.parts/lock: rank 0 has written it, but rank 3 on .* does not see all of it"
    ):
        parts.wait_for_folder(3)
    with parts.locked():
        parts.wait_for_folder(3)


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def no_locks(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(parts_module.fcntl, "flock", no_locks)
    parts = Parts(tmp_path / "x")
    with (
        pytest.raises(UserError, match=r"x\.parts: cannot be locked \(Function not implemented\)"),
        parts.locked(),
    ):
        pass
