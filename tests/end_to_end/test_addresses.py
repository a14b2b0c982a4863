"""A run that starts from an address on the hub."""

from functools import partial
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM

from megadyn.config import load_config
from megadyn.config.config_map import to_dense_config
from tests.helpers.crew import Crew
from tests.helpers.servers import HubServer, serving


def reach(url: str, cache: Path, rank: int) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE say, in a process that has already imported the hub's library."""
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
        constants.ENDPOINT, url
    )
    constants.ENDPOINT, constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = url, str(cache), False


def test_ranks_start_from_weights_that_one_of_them_downloads(config_file: Path, tmp_path: Path) -> None:
    model = load_config(
        config_file, ["model.routing.kind=dense", "model.vocab_size=257", "model.qkv_bias=true"]
    ).model
    settings = to_dense_config(model, "qwen2", "float32")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).save_pretrained(
        tmp_path / "base", max_shard_size="50KB"
    )
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    assert sum(name.endswith(".safetensors") for name in files) > 1
    server = HubServer()
    server.put("org/base", files)
    with serving(server):
        crew = Crew(
            config_file,
            "checkpoint.init_from=org/base",
            "training.iterations=1",
            "model.qkv_bias=true",
            "parallel.tensor=2",
            world=2,
            sabotage=partial(reach, server.url, tmp_path / "hub"),
        )
        assert crew.wait() == [0, 0], crew.output() + crew.output(1)
    assert "weights from org/base" in crew.output()
    for name in files:
        gets = [line for line in server.seen if line.startswith("GET") and line.endswith(f"/{name}")]
        assert len(gets) == (name != "generation_config.json"), name
