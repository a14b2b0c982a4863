"""A run that takes only algorithms that give the same bits each time."""

from pathlib import Path

from tests.helpers.crew import Crew, lines
from tests.helpers.sabotage import asserted_deterministic


def test_two_deterministic_runs_are_equal(config_file: Path) -> None:
    """Every part of a step has an algorithm that torch accepts, with masked documents and a routed model on two ranks."""
    losses = []
    for out in ("one", "two"):
        crew = Crew(
            config_file,
            "training.deterministic=true",
            "training.iterations=3",
            "data.document_mask=true",
            "data.validation_fraction=0",
            f"output_dir={config_file.parent}/{out}",
            world=2,
            sabotage=asserted_deterministic,
        )
        assert crew.wait() == [0, 0], crew.output()
        assert "deterministic algorithms: on (cuBLAS workspace :4096:8)" in crew.output()
        losses.append(
            [
                (line["lm_loss"], line["grad_norm"])
                for line in lines(config_file.parent / out)
                if "lm_loss" in line
            ]
        )
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
