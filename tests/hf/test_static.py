"""Static shapes: the same choices and logits as with the growing cache, in one graph, without a look from the host."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from megadyn.hf import layers_megadyn
from megadyn.hf.cache_megadyn import MegadynCache
from megadyn.hf.routing_of import exported_kind
from megadyn.hf.static_megadyn import MegadynStaticCache
from megadyn.kinds import BUILT_IN
from tests.hf.test_cache import EOD, MORE, looks_of
from tests.hf.test_modeling import TOKENS, padding
from tests.hf.tiny_models import LAYOUTS, MAIN_KINDS, tiny_model

EXACT = {"atol": 1e-9, "rtol": 0}
SHORT = {
    "dense": ("dense", ["dense"]),
    "dtf": ("dtf4", ["dtf_decision", "dtf_dynamic"]),
    "mod": ("mod", ["dense", "mod"]),
    "dtrnet": ("dtrnet-token", ["dense", "dtrnet"]),
    "fixed": ("fixed", ["dense", "fixed"]),
    "stt": ("stt", ["dense", "stt"]),
    "nested": ("nested", ["dense", "nested"]),
    "subskip": ("subskip", ["dense", "subskip"]),
    "skip_middle": ("skip_middle", ["skip_middle_out", "skip_middle_back"]),
}
"""Of each kind of routing a model as short as can be: compiling takes time with each layer."""


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def static_cache(model, rows: int = 3, length: int = 37) -> MegadynStaticCache:
    return model.static_cache(rows, length)


def short_model(kind: str):
    layout, layer_types = SHORT[kind]
    return tiny_model(layout, routed_layer_types=layer_types, num_hidden_layers=len(layer_types)).double()


def assert_both_alike(model, steps, mask, tokens=TOKENS, **keywords):
    """Calls of `steps` columns with a growing and with a static cache give the same."""
    growing, static, end = MegadynCache(len(model.model.layers)), static_cache(model), 0
    for step in steps:
        start, end = end, end + step
        part, real = tokens[:, start:end], mask[:, start:end].bool()
        want = model(part, mask[:, :end], past_key_values=growing, output_routing=True, **keywords)
        found = model(part, mask[:, start:end], past_key_values=static, output_routing=True, **keywords)
        assert_close(found.logits[real], want.logits[real], **EXACT)
        for ours, theirs in zip(found.routing, want.routing, strict=True):
            assert torch.equal(ours, theirs)
    if model.config.sliding_window is None:  # else the growing cache drops what no later token sees
        assert static.tokens_per_layer() == growing.tokens_per_layer()
    assert static.get_seq_length() == end


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_static_cache_gives_what_the_growing_one_does(kind):
    model = tiny_model(kind).double()
    assert_both_alike(model, [5, 1, 9, 1, 1, 11], padding("left"))
    assert_both_alike(model, [2, 1, 1, 7, 1], padding("right"))
    assert_both_alike(model, [1] * 4, torch.ones_like(TOKENS))  # without a prompt


@pytest.mark.parametrize("kind", LAYOUTS)
def test_routing_static_changes_no_result(kind):
    model, mask = tiny_model(kind).double(), padding("left")
    for mode in ("causal", "topk"):
        model.config.routing_mode, model.config.routing_static = mode, False
        want = model(TOKENS, mask, output_routing=True)
        model.config.routing_static = True
        found = model(TOKENS, mask, output_routing=True)
        assert_close(found.logits, want.logits, **EXACT)
        for ours, theirs in zip(found.routing, want.routing, strict=True):
            assert torch.equal(ours, theirs)
    model.config.routing_mode, cache = "causal", static_cache(model)
    parts = [model(part, past_key_values=cache).logits for part in TOKENS.split([7, 1, 20], dim=1)]
    model.config.routing_static = False
    assert_close(torch.cat(parts, dim=1), model(TOKENS).logits, **EXACT)


@pytest.mark.parametrize("kind", MAIN_KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"document_mask": True, "eod_token_id": EOD},
        {"sliding_window": 5},
        {"normalization": "hybridnorm", "attn_implementation": "eager"},
    ],
    ids=str,
)
def test_documents_windows_and_eager_attention(kind, changes):
    tokens = TOKENS.clone()
    tokens[:, (9, 22)] = EOD
    model = tiny_model(kind, **changes).double()
    assert_both_alike(model, [5, 1, 9, 1, 1, 4, 1, 1, 1], padding("left"), tokens)


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_a_static_step_never_waits_for_the_device(kind):
    model, mask = tiny_model(kind), torch.ones(3, 1)
    cache = static_cache(model)
    model(TOKENS, past_key_values=cache)
    positions = torch.full((3, 1), TOKENS.shape[1])
    given = {"past_key_values": cache, "cache_position": torch.tensor([TOKENS.shape[1]])}
    assert looks_of(model, MORE[:, :1], mask, positions, **given) == 0
    model.config.routing_static = True
    assert looks_of(model, MORE[:, :3], mask.expand(3, 3), past_key_values=cache) == 0
    assert looks_of(model, TOKENS, padding("left")) == 0


class OnTheHost(TorchDispatchMode):
    """The operations that gave a tensor on the CPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        given = out if isinstance(out, tuple | list) else (out,)
        self.found += [
            str(operation) for x in given if isinstance(x, torch.Tensor) and x.device.type == "cpu"
        ]
        return out


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_static_step_needs_no_values_and_stays_on_its_device(kind, monkeypatch):
    """On the device `meta`, whose tensors have no values: so nothing can be read, and every tensor of the host shows."""
    monkeypatch.setattr(
        layers_megadyn, "wide_linear", lambda x, weight, bias=None: F.linear(x, weight, bias)
    )  # autocast does not know that device
    model = tiny_model(kind).to("meta")
    cache, tokens = model.static_cache(3, 37), torch.zeros(3, 1, dtype=torch.long, device="meta")
    model(tokens, past_key_values=cache)
    with OnTheHost() as host:
        model(tokens, torch.ones(3, 1, device="meta"), tokens, past_key_values=cache)
    assert not host.found


def test_every_kind_is_compiled_here():
    assert sorted(SHORT) == sorted(BUILT_IN)
    for kind, (layout, layer_types) in SHORT.items():
        assert LAYOUTS[layout][1]["kind"] == kind
        assert set(exported_kind({"kind": kind}).layers) <= set(layer_types)


@pytest.mark.parametrize("kind", SHORT)
def test_one_graph_for_all_steps(kind):
    """One graph, no break and no recompilation over several steps; no tensor of the cache moves."""
    model, mask = short_model(kind), padding("left")
    growing, static = MegadynCache(len(model.model.layers)), static_cache(model)
    for cache in (growing, static):
        model(TOKENS[:, :12], mask[:, :12], past_key_values=cache)
    torch._dynamo.reset()
    counters.clear()
    backend = "aot_eager" if kind == "stt" else "eager"
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend)
    places = {name: tensor.data_ptr() for name, tensor in static.tensors().items()}
    for i in range(12, 20):
        want = model(TOKENS[:, i : i + 1], mask[:, : i + 1], past_key_values=growing, output_routing=True)
        found = step(TOKENS[:, i : i + 1], mask[:, i : i + 1], past_key_values=static, output_routing=True)
        real = mask[:, i].bool()
        assert_close(found.logits[real], want.logits[real], **EXACT)
        assert all(map(torch.equal, found.routing, want.routing))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"] and not counters["recompiles"]
    assert places == {name: tensor.data_ptr() for name, tensor in static.tensors().items()}
    # so that CUDA graphs, which cannot run here, do not copy it
    assert all(tensor._dynamo_static_input_type for tensor in static.tensors().values())
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["dtf", "nested"])
def test_an_exported_step_decodes_the_same(kind):
    model = short_model(kind)
    growing, static = MegadynCache(2), static_cache(model)
    with pytest.raises(ValueError, match="the cache holds no prompt yet"):
        model.decoding_step(static)
    for cache in (growing, static):
        model(TOKENS, past_key_values=cache)
    before = {name: tensor.clone() for name, tensor in static.tensors().items()}
    program = torch.export.export(model.decoding_step(static), (MORE[:, :1],))
    assert all(torch.equal(tensor, before[name]) for name, tensor in static.tensors().items())
    step = program.module()
    for i in range(9):
        part = MORE[:, i : i + 1]
        assert_close(step(part), model(part, past_key_values=growing).logits, **EXACT)


# ---- generate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHORT)
def test_generate_with_a_static_cache(kind):
    model, greedy = tiny_model(SHORT[kind][0]), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = padding("left")
    want = model.generate(TOKENS, attention_mask=mask, **greedy)
    out = model.generate(
        TOKENS,
        attention_mask=mask,
        **greedy,
        cache_implementation="static",
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, want)
    assert type(out.past_key_values) is MegadynStaticCache
    beams = greedy | {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(
        model.generate(TOKENS, attention_mask=mask, **beams, cache_implementation="static"),
        model.generate(TOKENS, attention_mask=mask, **beams),
    )
    model.config.routing_static = True
    assert torch.equal(model.generate(TOKENS, attention_mask=mask, **greedy), want)


def test_generate_compiles_one_step_for_several_prompts():
    model = short_model("dtf")
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    for tokens, mask in ((TOKENS, padding("left")), (TOKENS[:, :20], padding("left")[:, :20])):
        want = model.generate(tokens, attention_mask=mask, **greedy)
        static = {"cache_implementation": "static", "compile_config": compiled}
        assert torch.equal(model.generate(tokens, attention_mask=mask, **greedy, **static), want)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_copied_prefix_goes_on_by_itself():
    model = tiny_model("nested").double()
    prefix = static_cache(model)
    model(TOKENS, past_key_values=prefix)
    for tokens in (MORE, (MORE + 1) % 61):
        cache = copy.deepcopy(prefix)
        found = torch.cat([model(part, past_key_values=cache).logits for part in tokens.split(1, dim=1)], 1)
        assert_close(found, model(torch.cat([TOKENS, tokens], dim=1)).logits[:, 28:], **EXACT)
    prefix.reset()
    assert_close(model(MORE, past_key_values=prefix).logits, model(MORE).logits, **EXACT)


# ---- what is refused -----------------------------------------------------------------------------


def test_refused():
    model = tiny_model("mod")
    cache = static_cache(model, length=30)
    model(TOKENS, past_key_values=cache)
    with pytest.raises(ValueError, match="room for 30 columns, which this call exceeds"):
        model(MORE, past_key_values=cache)
    for i in range(2):
        model(MORE[:, i : i + 1], past_key_values=cache)
    with pytest.raises(RuntimeError, match="room for 30 columns, which this call exceeds"):
        model(MORE[:, 2:3], past_key_values=cache)
    with pytest.raises(ValueError, match="a static cache cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(
        ValueError, match=r"with a static cache it must be \[3, 1\], of the new columns alone"
    ):
        model(MORE[:, :1], torch.ones(3, 31), past_key_values=cache)
    with pytest.raises(RuntimeError, match="cache_position: must start at the number of columns"):
        model(MORE[:, :1], past_key_values=cache, cache_position=torch.tensor([29]))
    with pytest.raises(ValueError, match="holds 3 sequences, but the input has 2"):
        model(MORE[:2, :1], past_key_values=cache)
    with torch.enable_grad(), pytest.raises(ValueError, match="a static cache holds no gradients"):
        model(MORE[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="a routed model uses its own caches, dynamic or static"):
        model.generate(TOKENS, max_new_tokens=2, cache_implementation="offloaded")
    with pytest.raises(ValueError, match="not supported with Static cache"):  # by transformers
        model.generate(
            TOKENS[:1], prompt_lookup_num_tokens=3, cache_implementation="static", max_new_tokens=4
        )
    growing = model(TOKENS).past_key_values
    model.config.routing_static = True
    with pytest.raises(ValueError, match="a static cache cannot be cropped"):
        model.generate(TOKENS[:1, :8].repeat(1, 2), prompt_lookup_num_tokens=3, max_new_tokens=9)
    with pytest.raises(ValueError, match="past_key_values must be a MegadynStaticCache"):
        model(MORE, past_key_values=growing)
    with pytest.raises(ValueError, match="give seq_idx"):
        model(MORE[:1], cu_seq_lens_q=torch.tensor([0, 4, 9]))
    model.model.layers[0].to("meta")
    with pytest.raises(ValueError, match="needs the model on one device, but it is on cpu, meta"):
        model.static_cache(1, 8)
    dense = tiny_model("dense", attn_implementation="eager", routing_static=True)
    with pytest.raises(ValueError, match="output_attentions = True: must be asked for without"):
        dense(MORE, output_attentions=True)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0}
    with pytest.raises(ValueError, match="rope_type = 'dynamic': must be computed without routing_static"):
        tiny_model("dense", rope_parameters=rope, routing_static=True)(MORE)
