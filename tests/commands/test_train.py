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
    assert "import of torch halted" in done.stderr
    assert done.stdout.splitlines() == said
