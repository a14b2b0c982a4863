"""The measured choice of attention, on a CPU: stubs with the packages' signatures compute by torch, and a timer says how fast."""

import importlib.util
import logging
import sys
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
import torch.nn.attention.varlen
from torch.testing import assert_close

from megadyn.config import engine_settings
from megadyn.errors import ConfigError
from megadyn.model import attention, attention_choice
from megadyn.model.attention import ATTENTION, causal_attention
from megadyn.model.attention_choice import (
    Shape,
    Tried,
    agreed,
    choose_attention,
    fastest,
    shape_of,
    try_all,
)
from megadyn.model.block import LayerContext
from megadyn.model.documents import segments_of
from megadyn.network import Network
from megadyn.parallel.params import ParamMaker
from megadyn.parallel.sharding import Sharding
from megadyn.routing.layer import LossScale
from tests.helpers.tiny import tiny_config

CPU = torch.device("cpu")
SHAPE = Shape(rows=2, length=10, heads=4, groups=2, head_dim=8)


def plain(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    ).transpose(1, 2)


def by_segments(q, k, v, ends):
    sizes = ends.diff().tolist()
    parts = zip(*(x.unsqueeze(0).split(sizes, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([plain(*part).squeeze(0) for part in parts])


def flash_attn_3() -> ModuleType:
    """`flash_attn_interface`, with the arguments that flash-attn 3 documents."""
    module = ModuleType("flash_attn_interface")

    def flash_attn_func(
        *qkv,
        softmax_scale=None,
        causal=False,
        qv=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        assert causal and window_size == (-1, 0)
        return plain(*qkv)

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        window_size=(-1, -1),
        deterministic=False,
    ):
        assert causal and window_size == (-1, 0)
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k >= max(cu_seqlens_q.diff())
        return by_segments(q, k, v, cu_seqlens_q)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


@pytest.fixture
def packages(monkeypatch):
    """Both packages, the second in the form that also returns normalisers; torch's varlen, and cuDNN, in plain torch."""
    three = flash_attn_3()
    two = ModuleType("flash_attn")
    two.flash_attn_func = lambda *qkv, causal, window_size: (plain(*qkv), None)
    two.flash_attn_varlen_func = three.flash_attn_varlen_func
    for module in (two, three):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    known = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: known(name) if "flash" not in name else sys.modules.get(name)
    )
    monkeypatch.setattr(
        torch.nn.attention.varlen,
        "varlen_attn",
        lambda q, k, v, ends, *rest, window_size, enable_gqa: by_segments(q, k, v, ends),
    )
    monkeypatch.setattr(attention, "sdpa_kernel", lambda backend: nullcontext())
    return {"flash": two, "flash3": three}


@pytest.fixture
def gpu(packages, monkeypatch):
    """What the choice asks of a GPU."""
    monkeypatch.setattr(attention, "gpu_lacks", lambda what: None)
    for module in (attention, attention_choice):
        monkeypatch.setattr(module, "own_device", lambda: CPU)
    return packages


class Clock:
    """A timer that gives the times of calls in their order."""

    def __init__(self, *milliseconds):
        self.left = list(milliseconds)

    def __call__(self, call):
        call()
        return self.left.pop(0)


@pytest.mark.parametrize("name", ATTENTION)
def test_every_pair_computes_plain_attention(packages, name):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 10, heads, 8, generator=generator) for heads in (4, 2, 2))
    assert_close(causal_attention(q, k, v, name), plain(q, k, v))
    ids = torch.tensor([[0] * 7 + [1] * 3, [2] * 10])
    parts = segments_of(ids, 3, 10)
    want = by_segments(*(x.flatten(0, 1) for x in (q, k, v)), parts.ends).view_as(q)
    assert_close(causal_attention(q, k, v, name, parts), want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash-attn may be installed there")
def test_without_their_packages_on_a_cpu_all_but_plain_attention_drops_out_with_its_reason():
    """Real calls: nothing is in the place of anything."""
    found = try_all(SHAPE, torch.bfloat16, CPU, False, lambda call: 1.0)
    assert found["rows"]["sdpa"] == Tried(1.0)
    for case in ("rows", "segments"):
        assert found[case]["flash"].problem == "flash-attn is not installed"
        assert found[case]["flash3"].problem == "flash-attn 3 is not installed"
    assert found["rows"]["cudnn"].problem.startswith("RuntimeError: No ")
    assert found["segments"]["varlen"].ms is None
    assert fastest(found["segments"]) is None


def test_the_fastest_that_runs_is_taken_and_the_log_tells_all_times(gpu, caplog):
    del gpu["flash"].flash_attn_varlen_func
    config = tiny_config("dense", head_dim=8, precision="bf16")
    with caplog.at_level(logging.INFO, "megadyn"):
        backend = choose_attention(config, timer=Clock(3.0, 1.0, 2.0, 4.0, 2.5, 2.0))
    assert backend == "cudnn"  # whose segments are varlen's
    assert caplog.messages[-1] == (
        "attention: cudnn (auto: measured at 1 x 24 tokens; rows: flash3 3 ms, cudnn 1 ms, flash 2 ms, sdpa 4 ms; "
        "segments: flash3 2.5 ms, flash none (ImportError: cannot import name 'flash_attn_varlen_func' "
        "from 'flash_attn' (unknown location)), varlen 2 ms)"
    )


def test_rows_of_chosen_tokens_take_the_one_that_is_fastest_at_their_length(gpu, caplog):
    config = tiny_config(head_dim=8, precision="bf16", micro_batch=2)
    lengths = []
    known = gpu["flash3"].flash_attn_func
    gpu["flash3"].flash_attn_func = lambda q, k, v, **options: (
        lengths.append(q.shape[:2]),
        known(q, k, v, **options),
    )[1]
    with caplog.at_level(logging.INFO, "megadyn"):
        clock = Clock(3.0, 1.0, 2.0, 4.0, 2.5, 3.0, 2.0, 0.25, 0.5, 1.0, 1.0)
        backend = choose_attention(config, timer=clock)
    assert backend == "cudnn/flash3+varlen" and not clock.left
    assert set(lengths) == {(2, 24), (2, 12)}
    assert caplog.messages[-1] == (
        "attention: cudnn/flash3+varlen (auto: measured at 2 x 24 tokens; rows: flash3 3 ms, cudnn 1 ms, flash 2 ms, "
        "sdpa 4 ms; segments: flash3 2.5 ms, flash 3 ms, varlen 2 ms; rows of 12 chosen tokens: flash3 0.25 ms, "
        "cudnn 0.5 ms, flash 1 ms, sdpa 1 ms)"
    )
    same = Clock(3.0, 1.0, 2.0, 4.0, 2.5, 3.0, 2.0, 0.5, 0.25, 1.0, 1.0)
    assert choose_attention(config, timer=same) == "cudnn"


@pytest.mark.parametrize(
    ("kind", "keys", "chosen"),
    [
        ("mod", {}, 7),
        ("fixed", {"capacity": 0.25}, 6),
        ("mod", {"capacity": 1.0}, None),
        ("dense", {}, None),
        ("subskip", {}, None),  # its tokens choose for themselves
        ("dtrnet-token", {}, None),
        ("dtrnet-expert", {}, 9),
    ],
)
def test_chosen_tokens_are_measured_where_their_number_is_known(kind, keys, chosen):
    config = tiny_config(kind)
    for key, value in keys.items():
        setattr(config.model.routing, key, value)
    assert shape_of(config).chosen == chosen


def test_each_layer_takes_one_for_its_sequence_and_one_for_its_chosen_tokens(packages):
    """The whole model, in the names of which a run may pin them."""
    config = tiny_config("mod", attention="cudnn+flash/flash3+flash")
    called = []
    for name, module in packages.items():
        known = module.flash_attn_func
        module.flash_attn_func = lambda q, k, v, known=known, name=name, **options: (
            called.append((name, q.shape[1])),
            known(q, k, v, **options),
        )[1]
    network = Network(
        LayerContext(config.model, ParamMaker(Sharding(1, 2)), config.model.attention), LossScale()
    )
    tokens = torch.randint(7, (2, 24))
    loss = network(tokens, tokens)
    assert called == [("flash3", 7)] * 2 and torch.isfinite(loss)
    plain_config = tiny_config("mod", attention="sdpa")
    context = LayerContext(plain_config.model, ParamMaker(Sharding(1, 2)), "sdpa")
    assert_close(Network(context, LossScale())(tokens, tokens), loss)


@pytest.mark.parametrize("name", ["cudnn/auto", "flash/", "flash/flash/flash", "flash/flash4"])
def test_a_pair_that_is_none_is_refused(name):
    with pytest.raises(
        ConfigError, match=r"model\.attention = .*must be WHOLE/CHOSEN, each one of flash, flash3"
    ):
        tiny_config(attention=name)


def test_both_of_a_pair_must_run_here(gpu):
    del gpu["flash3"].flash_attn_func
    with pytest.raises(ConfigError, match="sdpa on this machine: flash3 attention failed at a first call"):
        choose_attention(tiny_config(head_dim=8, precision="bf16", attention="varlen/flash3"))


def test_what_computes_something_else_is_not_taken(gpu, monkeypatch):
    """However fast, and without a draw from the run's generator."""
    before = torch.get_rng_state()
    gpu["flash3"].flash_attn_func = lambda q, k, v, **options: plain(q, k, v) * 1.2
    found = try_all(SHAPE, torch.bfloat16, CPU, False, lambda call: 1.0)
    assert found["rows"]["flash3"].problem.endswith("e-02 off plain attention")
    assert fastest(found["rows"]) == "cudnn"
    assert torch.equal(torch.get_rng_state(), before)


def test_backward_is_part_of_the_trial(gpu):
    gpu["flash3"].flash_attn_func = lambda q, k, v, **options: plain(q, k, v).detach()
    found = try_all(SHAPE, torch.bfloat16, CPU, False, lambda call: 1.0)
    assert "does not require grad" in found["rows"]["flash3"].problem


def test_a_compiled_run_leaves_out_what_may_not_be_in_a_graph(gpu):
    found = try_all(SHAPE, torch.bfloat16, CPU, True, lambda call: 1.0)
    out = [case + " " + name for case in found for name in found[case] if found[case][name].ms is None]
    assert out == ["rows flash3", "rows cudnn", "segments flash3"]
    assert found["rows"]["cudnn"].problem == "not with training.compile"


def test_equally_fast_ones_are_taken_in_a_fixed_order():
    assert fastest({"cudnn": Tried(1.04), "sdpa": Tried(1.0)}) == "cudnn"
    assert fastest({"cudnn": Tried(1.06), "sdpa": Tried(1.0)}) == "sdpa"


def test_ranks_agree_on_what_runs_everywhere_by_its_slowest_time(gpu):
    """Rank 1 has slow cuDNN and no flash-attn 3: alone rank 0 would take other ones."""
    config = tiny_config("dense", head_dim=8, precision="bf16")
    other = {
        "rows": {
            "flash3": Tried(None, "not here"),
            "cudnn": Tried(9.0),
            "flash": Tried(2.0),
            "sdpa": Tried(3.0),
        },
        "segments": {"flash3": Tried(None, "not here"), "flash": Tried(5.0), "varlen": Tried(2.0)},
    }
    times = (0.5, 1.0, 2.0, 4.0, 0.5, 1.0, 2.0)
    assert choose_attention(config, timer=Clock(*times)) == "flash3"
    got = []

    def gather(mine):
        if mine is None:  # what keeps this rank from measuring
            return [None, None]
        got.extend([agreed([mine, other]), agreed([other, mine])])
        return [mine, other]

    assert choose_attention(config, gather, Clock(*times)) == "flash+varlen"
    assert got[0]["rows"]["flash3"].problem == "rank 1: not here"
    assert got[1]["rows"]["flash3"].problem == "not here"
    for case in other:
        assert fastest(got[0][case]) == fastest(got[1][case])


def test_ranks_measure_together_or_none_does(gpu, caplog):
    config = tiny_config(head_dim=8, precision="bf16")
    with caplog.at_level(logging.INFO, "megadyn"):
        backend = choose_attention(config, lambda mine: [mine, "rank 1's GPU is too old"], Clock())
    assert backend == "sdpa" and "rank 1's GPU is too old" in caplog.messages[-1]


@pytest.mark.parametrize("with_segments", [False, True])
def test_flash_attention_is_part_of_a_compiled_graph(packages, with_segments):
    packages["flash"].flash_attn_func = lambda q, k, v, **options: plain(q, k, v)
    packages["flash"].flash_attn_varlen_func = lambda q, k, v, *ends, **options: plain(
        q[None], k[None], v[None]
    )[0]
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8)
    segments = segments_of(torch.zeros(1, 6, dtype=torch.int64), 1, 6) if with_segments else None
    compiled = torch.compile(causal_attention, backend="eager", fullgraph=True)
    assert_close(compiled(q, k, k, "flash", segments), plain(q, k, k))


@pytest.mark.parametrize("name", ["flash3", "cudnn+flash"])
def test_calls_that_no_compiled_graph_holds_are_refused(name):
    config = tiny_config(head_dim=8, precision="bf16", attention=name)
    config.training.compile = True
    with pytest.raises(ConfigError, match="without flash3 and cudnn, with training.compile"):
        engine_settings(config)


@pytest.mark.parametrize(
    ("settings", "backend", "why"),
    [
        ({"attention": "cudnn+flash"}, "cudnn+flash", "as configured"),
        ({"sliding_window": 4}, "flash", "; not measured, with a sliding window"),
        ({"head_dim": 36}, "sdpa", "no flash kernels for model.head_dim = 36"),
        ({"precision": "fp32"}, "sdpa", "no flash kernels for fp32"),
    ],
)
def test_these_measure_nothing(gpu, monkeypatch, caplog, settings, backend, why):
    monkeypatch.setattr(attention, "_check_window", lambda *args: None)
    gpu["flash"].flash_attn_func = lambda q, k, v, **options: plain(q, k, v)
    config = tiny_config(**{"head_dim": 8, "precision": "bf16"} | settings)
    with caplog.at_level(logging.INFO, "megadyn"):
        assert choose_attention(config, timer=Clock()) == backend
    assert why in caplog.messages[-1]


def test_the_same_bits_each_time_need_a_fixed_order(gpu, caplog):
    torch.use_deterministic_algorithms(True)
    gpu["flash"].flash_attn_func = lambda q, k, v, **options: plain(q, k, v)
    try:
        with caplog.at_level(logging.INFO, "megadyn"):
            backend = choose_attention(tiny_config(head_dim=8, precision="bf16"), timer=Clock())
    finally:
        torch.use_deterministic_algorithms(False)
    assert backend == "flash"
    assert "not measured, with training.deterministic" in caplog.messages[-1]


def test_one_that_is_asked_for_and_cannot_run_is_an_error(gpu):
    del gpu["flash3"].flash_attn_func
    with pytest.raises(ConfigError, match="sdpa on this machine: flash3 attention failed at a first call"):
        choose_attention(tiny_config(head_dim=8, precision="bf16", attention="flash3"))
    with pytest.raises(ConfigError, match="one of auto, flash, flash3, cudnn, varlen, sdpa, flash\\+flash3"):
        tiny_config(attention="flash4")


def test_the_shape_is_one_rank_s_part_of_a_micro_batch():
    config = tiny_config(tensor=4, micro_batch=4)
    assert shape_of(config) == Shape(4, 24, 1, 1, 8, chosen=12)
    config.training.sequence_length = 2**14
    assert shape_of(config).rows == 2
    config.training.sequence_length = 2**17
    assert shape_of(config).rows == 1
