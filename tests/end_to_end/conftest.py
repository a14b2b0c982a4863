"""A small corpus as a dataset of bytes, and a configuration file that trains on it in seconds."""

import json
from pathlib import Path

import pytest

from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.readers import Corpus
from tests.helpers.tiny import ROOT


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the project's own sources as bytes."""
    folder = tmp_path_factory.mktemp("dataset")
    texts = [path.read_text() for path in sorted((ROOT / "megadyn").rglob("*.py"))]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text))
    preprocess(Corpus([folder / "corpus.jsonl"]), "byte", folder / "bytes", append_eod=True)
    return folder / "bytes"


@pytest.fixture
def config_file(dataset: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"""
model: {{hidden_size: 32, num_layers: 4, num_heads: 4, num_kv_heads: 2, routing: {{kind: dtf, threshold_momentum: 0.9}}}}
data: {{train: {dataset}, validation_fraction: 0.1}}
tokenizer: {{path: byte}}
training: {{iterations: 6, global_batch_size: 4, micro_batch_size: 1, sequence_length: 48, eval_interval: 3, eval_samples: 8}}
optimizer: {{warmup_iterations: 2}}
logging: {{interval: 1, tensorboard: false}}
precision: fp32
deepspeed_config: {ROOT}/ds_configs/zero1.json
output_dir: {tmp_path}/out
""")
    return path
