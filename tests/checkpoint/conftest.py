"""One real checkpoint, made once."""

import json
from pathlib import Path

import pytest

from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.readers import Corpus
from tests.helpers.crew import Crew
from tests.helpers.tiny import ROOT


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of two ranks that saved after step 2. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    text = "".join(path.read_text() for path in sorted((ROOT / "megadyn/model").glob("*.py")))
    (folder / "corpus.jsonl").write_text(json.dumps({"text": text}) + "\n")
    preprocess(Corpus([folder / "corpus.jsonl"]), "byte", folder / "bytes", append_eod=True)
    (folder / "config.yaml").write_text(f"""
model: {{hidden_size: 16, num_layers: 2, num_heads: 2, routing: {{kind: dtf}}}}
data: {{train: {folder}/bytes, validation_fraction: 0}}
tokenizer: {{path: byte}}
training: {{iterations: 2, global_batch_size: 2, sequence_length: 16}}
logging: {{tensorboard: false}}
parallel: {{tensor: 2}}
precision: fp32
deepspeed_config: {ROOT}/ds_configs/zero1.json
output_dir: {folder}/out
""")
    crew = Crew(folder / "config.yaml", world=2)
    assert crew.wait() == [0, 0], crew.output()
    return folder / "out"
