"""The base models that the examples name, in small: with their published heads, rotary positions and ties.

A run takes shape and weights from each folder, and a dense one goes back to its class, or becomes every kind of routing.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megadyn.checkpoint.export import export
from megadyn.config import Config, load_config
from megadyn.config.config_map import from_hf_config, to_hf_config
from megadyn.hf.configuration_megadyn import MegadynConfig
from megadyn.hf.modeling_megadyn import MegadynForCausalLM
from megadyn.hf.reader import HfFolder
from megadyn.kinds import BUILT_IN, DENSE
from megadyn.model.rope import Rotary
from tests.helpers.published import CONFIGS
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import ROOT, micro_batches, tiny_tokens

VOCAB, LENGTH = 259, 24
LAYOUTS = ((1, 1, 1), (2, 2, 1), (1, 1, 2))
"""Tensor x pipeline x data."""
DOCUMENT = ROOT / "docs/configuration.md"


def small(name: str) -> dict[str, Any]:
    """A published config.json with four narrow layers."""
    published = CONFIGS[name]
    heads = published["num_attention_heads"]
    narrow = {"hidden_size": 4 * heads, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": VOCAB}
    if "head_dim" in published:  # whose heads are wider together than the model, or as wide
        ratio = published["hidden_size"] / (heads * published["head_dim"])
        narrow |= {"head_dim": 4, "hidden_size": int(4 * heads * ratio)}
    return published | narrow | {"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}


def folder_of(name: str, root: Path) -> Path:
    return root / name.partition("/")[2]


def write_random(name: str, root: Path) -> None:
    """Random weights, and a config.json in the form in which it was published."""
    torch.manual_seed(3)
    folder, given = folder_of(name, root), small(name)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))
    for param in model.parameters():
        if param.ndim == 1:  # ones and zeros would hide a norm or a bias that is lost
            torch.nn.init.normal_(param, mean=0.5, std=0.2)
    model.save_pretrained(folder)
    made = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"architectures": made["architectures"]} | given))
    (folder / "run.yaml").write_text(f"""
model: {{shape_from: {folder}, max_position: {LENGTH}}}
data: {{train: unused}}
tokenizer: {{path: byte}}
training: {{iterations: 1, global_batch_size: 4, micro_batch_size: 1, sequence_length: {LENGTH}}}
precision: fp32
deepspeed_config: zero1
output_dir: {folder}-run
""")


def config_of(folder: Path, kind: str = DENSE, tensor: int = 1, pipeline: int = 1) -> Config:
    layout = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    return load_config(folder / "run.yaml", [*layout, f"model.routing.kind={kind}"])


def fits(name: str, tensor: int) -> bool:
    """Whether tensor ranks can divide its heads and its feed-forward."""
    published = CONFIGS[name]
    heads, of_keys = published["num_attention_heads"], published["num_key_value_heads"]
    divides_keys = of_keys % tensor == 0 or tensor % of_keys == 0
    return heads % tensor == 0 and divides_keys and published["intermediate_size"] % tensor == 0


def held_out() -> torch.Tensor:
    return tiny_tokens(9, vocab=VOCAB)[-1]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The folders, with checkpoints of runs that started from them; and first losses, by model, kind and layout."""
    root = tmp_path_factory.mktemp("published")
    losses: dict[str, float] = {}
    for name in CONFIGS:
        write_random(name, root)
    for tensor, pipeline, data in LAYOUTS:
        run_on_ranks(_start_all, tensor * pipeline * data, str(root), tensor, pipeline)
        losses |= json.loads((root / "losses.json").read_text())
    return root, losses


def _start_all(root: str, tensor: int, pipeline: int) -> None:
    from megadyn.launch import launch
    from megadyn.parallel.grid import make_grid

    launch.join()
    grid, losses = make_grid(tensor, pipeline), {}
    layout = f"{tensor}x{pipeline}x{grid.dp.size}"
    for name in CONFIGS:
        for kind in BUILT_IN if layout == "1x1x1" else (DENSE,):
            if fits(name, tensor):
                losses[f"{name} {kind} {layout}"] = _first_loss(folder_of(name, Path(root)), kind, grid)
    if dist.get_rank() == 0:
        (Path(root) / "losses.json").write_text(json.dumps(losses))


def _first_loss(folder: Path, kind: str, grid: Any) -> float:
    """Starts a run from the folder, whose tensors must all be in the model. Its checkpoint is kept if it is dense."""
    from megadyn.checkpoint import save_load
    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.parallel.params import name_of

    config = config_of(folder, kind, grid.tp.size, grid.pp.size)
    engine = Engine(config, batch_plan(config, dist.get_world_size()), grid, None)
    save_load.init_from(engine, folder)
    batches = micro_batches(held_out()[grid.dp.rank :: grid.dp.size], 1)
    loss = engine.evaluate(batches, len(batches), "topk")
    if dist.get_world_size() == 1:
        given = load_file(folder / "model.safetensors")
        own = {name_of(param): param for param in engine.parameters()}
        assert given.keys() <= own.keys()
        assert all(torch.equal(own[key], value) for key, value in given.items())
    if kind == DENSE and dist.get_world_size() == 1:
        save_load.save(engine, Path(f"{folder}-run"), iteration=0, consumed_samples=0)
    engine.engine.destroy()
    return loss


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    """transformers' own."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()(held_out()[:, :-1]).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_starts_with_their_loss(started: tuple[Path, dict[str, float]], name: str) -> None:
    root, losses = started
    want = F.cross_entropy(logits_of(folder_of(name, root)).flatten(0, 1), held_out()[:, 1:].flatten()).item()
    found = {key: loss for key, loss in losses.items() if key.startswith(f"{name} {DENSE} ")}
    assert len(found) == sum(fits(name, tensor) for tensor, _, _ in LAYOUTS)
    assert found == dict.fromkeys(found, pytest.approx(want, rel=1e-5))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_starts_from_it(started: tuple[Path, dict[str, float]], name: str) -> None:
    """With all of its tensors (the rank has compared them), and near its loss: routers and priors are new."""
    _, losses = started
    dense = losses[f"{name} {DENSE} 1x1x1"]
    routed = {kind: losses[f"{name} {kind} 1x1x1"] for kind in BUILT_IN if kind != DENSE}
    assert all(0 < abs(loss - dense) < 3 for loss in routed.values()), (dense, routed)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_goes_back_to_its_class(started: tuple[Path, dict[str, float]], name: str, tmp_path: Path) -> None:
    folder = folder_of(name, started[0])
    run = Path(f"{folder}-run") / "iteration-00000000"
    export(run, tmp_path / "hf", style=CONFIGS[name]["model_type"])
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (logits_of(tmp_path / "hf") - logits_of(folder)).abs().max() < 1e-4


def context(name: str) -> int:
    """What it was trained on first."""
    scaling = CONFIGS[name].get("rope_scaling") or {}
    return scaling.get("original_max_position_embeddings") or CONFIGS[name]["max_position_embeddings"]


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_at_twice_its_context_it_is_theirs(started: tuple[Path, dict[str, float]], name: str) -> None:
    """With the published heads: the angles of training bit for bit. Then logits of the last tokens before that position: equal in
    float32; in bfloat16, ours stray no further than theirs."""
    end = 2 * context(name)
    positions = torch.arange(end - LENGTH, end)[None].expand(len(held_out()), -1)
    theirs, ours = AutoConfig.for_model(**CONFIGS[name]), from_hf_config(CONFIGS[name])
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions[:1])
    found = Rotary(ours.head_dim, ours.rope).angles(end, torch.zeros(1))
    for table, want in zip(found, (cos, sin), strict=True):
        assert torch.equal(table[-LENGTH:], want[0, :, : ours.head_dim // 2])

    folder, logits = HfFolder(folder_of(name, started[0])), {}
    model = MegadynForCausalLM(MegadynConfig(**to_hf_config(folder.model, "float32"))).eval()
    model.load_state_dict({key: folder.whole(key) for key in folder.names()}, strict=False)
    model.tie_weights()
    for whose, one in (("ours", model), ("theirs", AutoModelForCausalLM.from_pretrained(folder.folder))):
        for dtype in (torch.float32, torch.bfloat16):
            out = one.eval().to(dtype)(held_out()[:, :LENGTH], position_ids=positions, use_cache=False)
            logits[whose, dtype] = out.logits.float()
    exact = logits["theirs", torch.float32]
    assert (logits["ours", torch.float32] - exact).abs().max() < 1e-4
    strayed, allowed = (
        (logits[whose, torch.bfloat16] - exact).square().mean().sqrt() for whose in ("ours", "theirs")
    )
    assert 0 < strayed < 1.5 * allowed


# ---- the table of the documents


def needed(config: Config) -> str:
    """What a model's keys say beyond defaults, in short."""
    model = config.model
    heads_apart = model.head_dim != model.hidden_size // model.num_heads
    found = {
        "`tie_embeddings: true`": model.tie_embeddings,
        "`qkv_bias: true`": model.qkv_bias,
        "`qk_norm: true`": model.qk_norm,
        "`head_dim`": heads_apart,
        f"`rope.type: {model.rope.type}`": model.rope.type != "default",
    }
    return ", ".join(key for key, applies in found.items() if applies)


def table(root: Path) -> str:
    rows = [
        "| base model | architecture | heads, of keys | `parallel.tensor` up to 8 | keys of `model` |",
        "|---|---|---|---|---|",
    ]
    for name, published in CONFIGS.items():
        folder = folder_of(name, root)
        heads, of_keys = published["num_attention_heads"], published["num_key_value_heads"]
        sizes = ", ".join(str(size) for size in range(1, 9) if fits(name, size))
        rows.append(
            f"| {name} | `{published['model_type']}` | {heads}, {of_keys} | {sizes} | {needed(config_of(folder))} |"
        )
    return "\n".join(rows)


def test_the_documents_have_these_models(started: tuple[Path, dict[str, float]]) -> None:
    assert table(started[0]) in DOCUMENT.read_text(), f"{DOCUMENT} should have:\n{table(started[0])}"
