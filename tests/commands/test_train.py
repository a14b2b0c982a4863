"""What `megadyn train` says before the main job says anything."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("rank", "said"), [("0", ["loading torch and DeepSpeed"]), ("1", [])])
def test_the_first_rank_says_at_once_what_takes_seconds(rank: str, said: list[str], tmp_path: Path) -> None:
    """With torch out of reach, all that is printed was printed before it is imported."""
    program = (
        f"import os, sys; os.environ['RANK'] = {rank!r}; sys.modules['torch'] = None\n"
        f"from megadyn.commands.train import main; main([{str(tmp_path / 'config.yaml')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "'torch.distributed'" in done.stderr
    assert done.stdout.splitlines() == said


def test_a_rank_that_failed_has_the_last_word_but_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's own tables and traceback do not follow it."""
    from torch.distributed.elastic.multiprocessing import errors as torchrun_errors

    from megadyn.launch import torchrun

    def failing(argv: list[str]) -> None:
        failures = {1: torchrun_errors.ProcessFailure(1, 7, int(argv[0]), "none")}
        raise torchrun_errors.ChildFailedError("megadyn.pretrain", failures)

    monkeypatch.setattr(torchrun, "torchrun", failing)
    assert torchrun.main(["2"]) == 2
    assert capsys.readouterr().err == "error: rank 1 ended with status 2; what it said stands above\n"
    assert torchrun.main(["-9"]) == 1
    assert "was ended by signal 9" in capsys.readouterr().err
