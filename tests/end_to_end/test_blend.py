"""A run on a blend with a test set: it reports both, goes on at another data-parallel size, and only on the same blend."""

import json
from pathlib import Path

import numpy as np

from megadyn.data.indexed_writer import IndexedWriter
from tests.end_to_end.test_pretrain import losses, records, train


def test_a_blended_run_is_resumed_at_another_data_parallel_size(config_file: Path, dataset: Path) -> None:
    other = config_file.parent / "other"
    with IndexedWriter(other, "<u2") as writer:
        writer.add(np.random.default_rng(0).integers(0, 256, 9000), [300] * 30, [1] * 30)
        writer.finish()

    def blend(weight: int) -> list[str]:
        return [
            "data.validation_fraction=null",
            "data.split=[0.8,0.1,0.1]",
            "optimizer.schedule=constant",
            f"data.train=[{{prefix: {dataset}, weight: 3}}, {{prefix: {other}, weight: {weight}}}]",
        ]

    straight = config_file.parent / "straight"
    status, output = train(config_file, *blend(1), f"output_dir={straight}")
    assert status == 0, output
    status, output = train(config_file, *blend(1), "training.iterations=3", world=2)
    assert status == 0, output
    status, output = train(config_file, *blend(2))
    assert status == 2
    assert "was trained on other data or in another order" in output
    status, output = train(config_file, *blend(1))
    assert status == 0, output
    assert "data: a blend of 2 datasets" in output

    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    want = {line["iteration"]: line["lm_loss"] for line in lines if "lm_loss" in line}
    got = losses(config_file)
    assert list(got) == list(want) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)
    assert all(line["data_time_ms"] >= 0 for line in lines if "lm_loss" in line)
    tests = {line["iteration"]: line["test"] for line in records(config_file) if "test" in line}
    assert set(tests) == {3, 6}  # at the end of each of the two runs
    assert set(tests[6]) == {"topk", "causal"}
