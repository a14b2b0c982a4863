"""Dense models of transformers' own classes: a run starts from their folders, and goes back to them by `megadyn export --as`."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megadyn.checkpoint.export import export
from megadyn.config import Config, RopeConfig
from megadyn.config.config_map import DENSE_TYPES, from_hf_config, to_hf_config
from megadyn.config.dense_map import misfit
from megadyn.errors import UserError, run_tool
from megadyn.evaluation.saved import load_network, open_saved
from megadyn.hf.configuration_megadyn import MegadynConfig
from megadyn.hf.modeling_megadyn import MegadynForCausalLM
from megadyn.hf.reader import HfFolder
from megadyn.hf.source import open_source
from megadyn.model.rope import Rotary
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import ROOT, micro_batches, tiny_config, tiny_tokens

VOCAB, LENGTH, ORIGINAL = 259, 24, 12
"""Sequences are twice as long as the context that the stretched models were made for."""
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
YARN = {"factor": 4.0, "beta_fast": 3.0}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}


class Base(NamedTuple):
    """A model of transformers, and the same by our keys."""

    type: str
    theirs: dict[str, Any]
    ours: dict[str, Any]


def rope(kind: str, numbers: dict[str, float], theta: float = 100.0) -> dict[str, Any]:
    parameters = {"rope_type": kind, "rope_theta": theta, **numbers}
    if kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = ORIGINAL
    return {"rope_parameters": parameters}


BASES = {
    "qwen2": Base(
        "qwen2",
        rope("yarn", YARN) | {"tie_word_embeddings": True},
        {"qkv_bias": True, "tied": True, "rope": RopeConfig("yarn", 100.0, original_max_position=12, **YARN)},
    ),
    "llama3": Base(
        "llama",
        rope("llama3", LLAMA3) | {"attention_bias": True},
        {
            "qkv_bias": True,
            "output_bias": True,
            "rope": RopeConfig("llama3", 100.0, original_max_position=12, **LLAMA3),
        },
    ),
    "llama-linear": Base(
        "llama", rope("linear", {"factor": 2.0}), {"rope": RopeConfig("linear", 100.0, 2.0)}
    ),
    "llama-dynamic": Base(
        "llama",
        rope("dynamic", {"factor": 2.0}) | {"max_position_embeddings": ORIGINAL},
        {"rope": RopeConfig("dynamic", 100.0, 2.0, 12)},
    ),
    "mistral": Base("mistral", {"sliding_window": 7}, {"sliding_window": 7}),
    "qwen3": Base(
        "qwen3",
        rope("yarn", YARN) | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        {
            "qk_norm": True,
            "sliding_window": 9,
            "window_layers": [1, 2, 3],
            "rope": RopeConfig("yarn", 100.0, original_max_position=12, **YARN),
        },
    ),
    "smollm3": Base(
        "smollm3",
        {
            "no_rope_layers": [1, 0, 1, 1],
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
        {
            "tied": True,
            "sliding_window": 5,
            "window_layers": [1],
            "rope": RopeConfig(theta=2e6, skip_layers=[1]),
        },
    ),
}

EVERYWHERE = ("qwen2", "llama3", "mistral", "qwen3", "smollm3")
"""Under several layouts: one of each architecture."""
LAYOUTS = ((1, 1, 1), (2, 2, 1), (1, 1, 2))
"""Tensor x pipeline x data."""


def config_of(base: Base, kind: str = "dense", **layout: Any) -> Config:
    shape = {"vocab_size": VOCAB, "ffn_size": 128, "head_dim": 16, "norm_eps": 1e-5, "qkv_bias": False}
    return tiny_config(kind, **shape | base.ours | layout)


def held_out() -> torch.Tensor:
    return tiny_tokens(9, vocab=VOCAB)[-1]


def write_random(base: Base, folder: Path) -> None:
    """As transformers writes it, every tensor random: ones and zeros would hide a norm or a bias that is lost."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(base.type, **SHAPE | base.theirs)
    model = AutoModelForCausalLM.from_config(config)
    for param in model.parameters():
        if param.ndim == 1:
            torch.nn.init.normal_(param, mean=0.5, std=0.2)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Folders of transformers, checkpoints of runs that started from them, and their first losses by layout."""
    folder = tmp_path_factory.mktemp("bases")
    for name, base in BASES.items():
        write_random(base, folder / name)
    losses = {}
    for tensor, pipeline, data in LAYOUTS:
        run_on_ranks(_start_all, tensor * pipeline * data, str(folder), tensor, pipeline)
        losses |= json.loads((folder / "losses.json").read_text())
    return folder, losses


def _start_all(folder: str, tensor: int, pipeline: int) -> None:
    from megadyn.checkpoint import save_load
    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.launch import launch
    from megadyn.parallel.grid import make_grid

    launch.join()
    losses = {}
    grid = make_grid(tensor, pipeline)
    layout = f"{tensor}x{pipeline}x{grid.dp.size}"
    cases = [(name, "dense") for name in BASES if layout == "1x1x1" or name in EVERYWHERE]
    for name, kind in cases + ([("qwen3", "mod")] if layout == "1x1x1" else []):
        config = config_of(BASES[name], kind, tensor=tensor, pipeline=pipeline)
        engine = Engine(config, batch_plan(config, dist.get_world_size()), grid, None)
        save_load.init_from(engine, Path(folder) / name)
        batches = micro_batches(held_out()[grid.dp.rank :: grid.dp.size], 1)
        losses[f"{name} {kind} {layout}"] = engine.evaluate(batches, len(batches), "topk")
        if kind == "dense" and (pipeline == 2 or name not in EVERYWHERE):
            save_load.save(engine, Path(folder) / f"{name}-run", iteration=0, consumed_samples=0)
        engine.engine.destroy()
    if dist.get_rank() == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(losses))


@torch.no_grad()
def logits_of_folder(folder: Path) -> torch.Tensor:
    """transformers' own."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()(held_out()[:, :-1]).logits


@pytest.mark.parametrize("name", BASES)
def test_a_run_starts_with_their_loss(started: tuple[Path, dict[str, float]], name: str) -> None:
    folder, losses = started
    samples, logits = held_out(), logits_of_folder(folder / name)
    want = F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()).item()
    for layout in ("1x1x1", "2x2x1", "1x1x2") if name in EVERYWHERE else ("1x1x1",):
        assert losses[f"{name} dense {layout}"] == pytest.approx(want, rel=1e-5)
    with torch.no_grad():
        ours = load_network(open_saved(folder / name), torch.device("cpu"))(samples[:, :-1])
    assert (ours - logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", sorted({*BASES} - {"llama-dynamic"}))
def test_angles_are_theirs_far_away(name: str) -> None:
    """Bit for bit, of every type but `dynamic`, whose base theirs has in float32: a number of radians per position that is
    rounded otherwise is another position there."""
    end, base = 2**17, BASES[name]
    config = AutoConfig.for_model(base.type, **SHAPE | base.theirs)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(end)[None])
    found = Rotary(SHAPE["head_dim"], config_of(base).model.rope).angles(end, torch.zeros(1))
    half = SHAPE["head_dim"] // 2
    assert all(torch.equal(ours, want[0, :, :half]) for ours, want in zip(found, (cos, sin), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
def test_long_positions_in_bf16(started: tuple[Path, dict[str, float]], name: str) -> None:
    """At twice the original context, ours strays from float32 no further than transformers' own bfloat16 does."""
    folder, tokens = started[0] / name, held_out()[:, :-1]
    exact = logits_of_folder(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()(tokens).logits
    half = replace(open_saved(folder), precision="bf16")
    ours = load_network(half, torch.device("cpu"))(tokens)
    late = slice(ORIGINAL, None)
    strayed, allowed = ((x.float() - exact)[:, late].square().mean().sqrt() for x in (ours, theirs))
    assert 0 < strayed < 1.5 * allowed


@pytest.mark.parametrize("name", BASES)
def test_cached_generation_is_theirs(name: str, tmp_path: Path) -> None:
    """One token after another, to twice the original context: of `dynamic` too, whose base grows on the way."""
    write_random(BASES[name], tmp_path)
    folder = HfFolder(tmp_path)
    ours = MegadynForCausalLM(MegadynConfig(**to_hf_config(folder.model, "float32"))).eval()
    weights = {key: folder.whole(key) for key in folder.names()}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    ours.tie_weights()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    found, want = (
        model.generate(
            held_out()[:2, :8],
            max_new_tokens=LENGTH - 8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for model in (ours, theirs)
    )
    assert found.sequences.tolist() == want.sequences.tolist()
    for step, (mine, reference) in enumerate(zip(found.logits, want.logits, strict=True)):
        assert (mine - reference).abs().max() < 1e-4, step


def test_a_routed_model_starts_from_one(started: tuple[Path, dict[str, float]]) -> None:
    _, losses = started
    assert 1 < losses["qwen3 mod 1x1x1"] != pytest.approx(losses["qwen3 dense 1x1x1"], rel=1e-3)


@pytest.mark.parametrize("name", BASES)
def test_a_run_goes_back_to_its_class(
    started: tuple[Path, dict[str, float]], name: str, tmp_path: Path
) -> None:
    """The very tensors, and logits of its own class and of ours."""
    folder, _ = started
    export(folder / f"{name}-run" / "iteration-00000000", tmp_path / "hf", style=BASES[name].type)
    before, after = (load_file(path / "model.safetensors") for path in (folder / name, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    was, now = (AutoConfig.from_pretrained(path) for path in (folder / name, tmp_path / "hf"))
    assert type(was) is type(now)
    assert {key: now.rope_parameters.get(key) for key in was.rope_parameters} == was.rope_parameters
    assert now.max_position_embeddings == was.max_position_embeddings
    want = logits_of_folder(folder / name)
    assert (logits_of_folder(tmp_path / "hf") - want).abs().max() < 1e-4
    with torch.no_grad():
        ours = load_network(open_saved(tmp_path / "hf"), torch.device("cpu"))(held_out()[:, :-1])
    assert (ours - want).abs().max() < 1e-4


def test_a_bias_that_the_model_lacks_is_zeros(started: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    """Qwen2 has none on the output of attention, Llama has all four or none."""
    folder, _ = started
    export(folder / "qwen2-run" / "iteration-00000000", tmp_path / "hf", style="llama")
    want = logits_of_folder(folder / "qwen2")
    assert (logits_of_folder(tmp_path / "hf") - want).abs().max() < 1e-4
    assert not load_file(tmp_path / "hf" / "model.safetensors")["model.layers.0.self_attn.o_proj.bias"].any()


FITS = {
    "qwen2": {"qwen2", "llama", "smollm3"},
    "llama3": {"llama", "smollm3"},
    "llama-linear": {"qwen2", "llama", "mistral", "smollm3"},
    "llama-dynamic": {"qwen2", "llama", "mistral", "smollm3"},
    "mistral": {"qwen2", "mistral", "smollm3"},
    "qwen3": {"qwen3"},
    "smollm3": {"smollm3"},
}


@pytest.mark.parametrize("name", BASES)
def test_which_architectures_a_model_fits(name: str) -> None:
    model = config_of(BASES[name]).model
    assert {style for style in DENSE_TYPES if misfit(model, style) is None} == FITS[name]


@pytest.mark.parametrize(
    ("style", "kind", "ours", "message"),
    [
        ("llama", "mod", {}, "it is a mod model, and only a dense one fits"),
        ("llama", "dense", {"normalization": "lns"}, "not model.normalization = lns"),
        ("qwen3", "dense", {}, "Qwen3 norms queries and keys, but model.qk_norm = false"),
        ("llama", "dense", {"qk_norm": True}, "no norms on queries and keys, but model.qk_norm = true"),
        ("llama", "dense", {"rope": RopeConfig(skip_layers=[2])}, r"but model\.rope\.skip_layers = \[2\]"),
        ("llama", "dense", {"sliding_window": 8}, "no sliding window, but model.sliding_window = 8"),
        (
            "mistral",
            "dense",
            {"sliding_window": 8, "window_layers": [1]},
            r"in every layer or none, but model.window_layers = \[1\]",
        ),
        ("mistral", "dense", {"qkv_bias": True}, "Mistral has no biases, but model.qkv_bias = true"),
        ("qwen2", "dense", {"output_bias": True}, "but model.output_bias = true"),
        ("llama", "dense", {"hidden_size": 30}, "needs a hidden size that its heads divide"),
    ],
)
def test_a_model_that_does_not_fit_says_why(
    style: str, kind: str, ours: dict[str, Any], message: str
) -> None:
    found = misfit(config_of(Base("", {}, ours), kind).model, style)
    assert found is not None
    assert re.search(message, found)


def test_export_refuses_in_one_sentence(
    started: tuple[Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megadyn.commands.export import main

    run = started[0] / "qwen3-run" / "iteration-00000000"
    args = ["--checkpoint", str(run), "--output", str(tmp_path / "hf"), "--as", "llama"]
    assert run_tool(lambda: main(args)) == 2
    *_, error = capsys.readouterr().err.splitlines()  # behind what it was about to do
    assert re.fullmatch(r"error: .* cannot be exported as llama: Llama has no norms.*", error)
    assert not list(tmp_path.iterdir())


# ---- folders


Change = Callable[[Path], None]


def edited(**changes: Any) -> Change:
    """config.json with other values; None takes a key out."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def with_tensors(**tensors: torch.Tensor) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file(load_file(path) | named, path, metadata={"format": "pt"})

    return change


def only_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


REFUSED: dict[str, tuple[str, Change, str]] = {
    "a sliding window": (
        "mistral",
        edited(sliding_window=23),
        "model.sliding_window is 23 there and 7 here$",
    ),
    "a sliding window of some layers": (
        "qwen3",
        edited(layer_types=["full_attention"] * 2 + ["sliding_attention"] * 2),
        r"model.window_layers is \[2, 3\] there and \[1, 2, 3\] here$",
    ),
    "pickled weights": (
        "llama3",
        only_bin,
        r"has its weights in .bin files.*\(AutoModelForCausalLM.*save_pretrained",
    ),
    "another head than the embedding": (
        "smollm3",
        with_tensors(lm_head__weight=torch.ones(VOCAB, 32)),
        "lm_head.weight differs from model.embed_tokens.weight, but .*tie_word_embeddings",
    ),
    "another base": (
        "llama3",
        edited(
            rope_parameters=rope("llama3", LLAMA3, 99.0)["rope_parameters"]
            | {"original_max_position_embeddings": 12}
        ),
        "model.rope.theta is 99.0 there and 100.0 here",
    ),
    "another factor": (
        "llama-linear",
        edited(rope_parameters=None, rope_theta=100.0, rope_scaling={"type": "linear", "factor": 8.0}),
        "model.rope.factor is 8.0 there and 2.0 here",
    ),
    "layers without positions": (
        "smollm3",
        edited(no_rope_layers=[1, 1, 1, 0]),
        r"model.rope.skip_layers is \[3\] there and \[1\] here",
    ),
    "a bias": ("llama-linear", edited(attention_bias=True), "model.output_bias is True there and False here"),
}


def refusal(name: str, change: Change, folder: Path) -> str:
    write_random(BASES[name], folder)
    change(folder)
    with pytest.raises(UserError) as caught:
        open_source(folder, config_of(BASES[name]).model, LENGTH)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_started_from(case: str, tmp_path: Path) -> None:
    name, change, message = REFUSED[case]
    assert re.search(message, refusal(name, change, tmp_path))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3", with_tensors(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))),
        (
            "qwen2",
            edited(use_sliding_window=True, sliding_window=LENGTH, layer_types=["sliding_attention"] * 4),
        ),
        ("qwen2", edited(use_sliding_window=False, sliding_window=4, max_window_layers=0)),
        (
            "llama3",  # as Llama 3.1 was published
            edited(
                rope_parameters=None,
                rope_theta=100.0,
                rope_scaling=LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 12},
            ),
        ),
        ("llama-dynamic", edited(rope_parameters={"type": "dynamic", "factor": 2.0, "rope_theta": 100.0})),
    ],
)
def test_what_changes_nothing_is_read(name: str, change: Change, tmp_path: Path) -> None:
    write_random(BASES[name], tmp_path)
    names = HfFolder(tmp_path).names()
    change(tmp_path)
    assert open_source(tmp_path, config_of(BASES[name]).model, LENGTH).names() == names


def test_a_tied_head_may_be_there_twice(tmp_path: Path) -> None:
    write_random(BASES["smollm3"], tmp_path)
    names = HfFolder(tmp_path).names()
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    with_tensors(lm_head__weight=embedding.clone())(tmp_path)
    assert open_source(tmp_path, config_of(BASES["smollm3"]).model, LENGTH).names() == names


DENSE = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 9,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma2"},
            r"model_type 'gemma2' in config.json: must be one of .* \(gemma2: it scales the em",
        ),
        ({"model_type": "qwen3_moe"}, r"qwen3_moe: it is a mixture of experts"),
        ({"model_type": "deepseek_v3"}, r"keys and values share a latent vector"),
        (
            {"model_type": "olmo2"},
            r"norms the outputs of attention and feed-forward, and queries and keys over their",
        ),
        ({"model_type": "phi3"}, r"one tensor holds queries, keys and values"),
        ({"model_type": "nobody"}, r"must be one of megadyn, qwen2, llama, mistral, qwen3, smollm3$"),
        ({"mlp_bias": True}, "mlp_bias = True in config.json: must be False"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_type 'longrope' in config.json: must be one of default",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_type 'linear' in config.json: rope_scaling has no factor",
        ),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 8,
                    "truncate": False,
                }
            },
            "rope_scaling.truncate = False in config.json: must be left out, or True",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}},
            r"rope_parameters.mrope_section = \[1, 2\] in config.json: rope_type 'default' has no such number",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor = 0.5 in config.json: must be left out, or 1",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]},
            "layer_types in config.json: 'linear_attention' is no attention of ours",
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["sliding_attention"],
            },
            "layer_types in config.json: must have 2 entries",
        ),
        (
            {"model_type": "smollm3", "no_rope_layers": [1]},
            "no_rope_layers in config.json: must have 2 entries",
        ),
    ],
)
def test_what_differs_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        from_hf_config(DENSE | changes)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_left_out_has_transformers_default() -> None:
    for style in DENSE_TYPES:
        given = DENSE | {
            "model_type": style,
            "num_attention_heads": 32,
            "hidden_size": 256,
            "intermediate_size": 64,
        }
        theirs, ours = AutoConfig.for_model(**given), from_hf_config(given)
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.head_dim == getattr(theirs, "head_dim", 8)
        assert ours.tie_embeddings == theirs.tie_word_embeddings
        assert (ours.norm_eps, ours.rope.theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])
        turns = getattr(theirs, "no_rope_layers", [1, 1])
        assert ours.rope.skip_layers == [layer for layer in (0, 1) if not turns[layer]]


def test_the_documents_name_every_architecture() -> None:
    for page in ("configuration.md", "export.md"):
        text = (ROOT / "docs" / page).read_text()
        assert all(f"`{style}`" in text for style in DENSE_TYPES), page
