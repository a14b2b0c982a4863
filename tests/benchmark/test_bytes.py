"""The count of bytes and operations, against numbers counted by hand."""

import json

import pytest
import torch

from megadyn.benchmark import bytes, traffic
from megadyn.benchmark.models import DEFAULT_MODELS, config_of
from megadyn.benchmark.traffic import OneKernelEach, Traffic
from megadyn.config import RopeConfig
from megadyn.errors import UserError
from megadyn.kernels import rule
from megadyn.model.rope import Rotary
from megadyn.planning.flops import training_flops

SIZES = {
    "layers": 4,
    "hidden": 64,
    "heads": 4,
    "kv-heads": 2,
    "ffn": 128,
    "vocab": 997,
    "sequence": 128,
    "batch": 2,
}
SMALL = [f"--{name}={value}" for name, value in SIZES.items()]
N, D, F, Q, K, V, L, HEAD = 256, 64, 128, 64, 32, 997, 4, 16
"""Tokens; widths of the hidden state, the feed-forward, queries and keys; words, layers, size of a head."""


def of(size, dtype=torch.bfloat16, **options):
    return torch.empty(size, dtype=dtype, device="meta", **options)


def counted(work):
    with Traffic(0.25) as found, OneKernelEach(found):
        work()
    return found


x, wide, rows = of((8, 4)), of((8, 4), torch.float32), of((3,), torch.int64)


@pytest.mark.parametrize(
    ("work", "moved"),
    [
        (lambda: x.view(4, 8).T[1:].unsqueeze(0).expand(5, -1, -1).detach(), 0),
        (lambda: torch.empty_like(x), 0),
        (lambda: x.reshape(32), 0),
        (lambda: x.T.reshape(32), 128),  # a copy
        (lambda: torch.zeros(8, 4, device="meta"), 128),
        (lambda: torch.zeros_like(wide), 128),
        (lambda: wide.zero_(), 128),
        (lambda: wide.copy_(x), 64 + 128),
        (lambda: x.float(), 64 + 128),
        (lambda: x + x, 3 * 64),
        (lambda: x.add_(x), 3 * 64),
        (lambda: x * of((4,)), 64 + 8 + 64),
        (lambda: x * of((1, 4)).expand(8, 4), 64 + 8 + 64),  # a broadcast input is read once
        (lambda: wide.sum(dim=1), 128 + 32),
        (lambda: x @ of((4, 2)), 64 + 16 + 32),
        (lambda: torch.mm(x, of((4, 2)), out=of((8, 2))), 64 + 16 + 32),
        (lambda: x.index_select(0, rows), 2 * 24 + 24),  # not all of x
        (lambda: wide.gather(1, of((8, 1), torch.int64)), 2 * 32 + 64),
        (lambda: wide.scatter_add_(1, of((8, 1), torch.int64), of((8, 1), torch.float32)), 2 * 32 + 64 + 32),
        (lambda: x.index_copy_(0, rows, of((3, 4))), 24 + 24 + 24),
        (lambda: torch.nn.functional.rms_norm(x, (4,), of((4,)), 1e-6), 2 * 64 + 8 + 8 * 4),
        (lambda: (x > 0).nonzero(), 64 + 32 + 32 + 2 * 8 * 8),  # a quarter of 32 tokens
    ],
)
def test_what_an_operation_moves(work, moved):
    assert sum(counted(work).bytes.values()) == moved


def test_attention_and_its_backward_are_one_kernel_each():
    q, k = (of((2, heads, 8, 16), requires_grad=True) for heads in (4, 2))
    found = counted(
        lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, k, is_causal=True, enable_gqa=True
        ).backward(torch.empty_like(q))
    )
    size, sums = 2 * 2 * 4 * 8 * 16, 4 * 2 * 4 * 8
    forward, backward = size * 2 + 2 * size // 2 + sums, size * 4 + 4 * size // 2 + sums
    assert found.bytes["attention"] == forward + backward
    assert found.flops["attention"] == 3 * 2 * 2 * 2 * 4 * 8 * 8 * 16 // 2
    assert found.launches == 3  # with the sum of the two gradients of k, which is used twice


def test_a_dense_step_moves_what_was_counted_by_hand():
    found = bytes.count("dense", bytes.parse_args(SMALL))
    b, norm = 2, 4 * N + 2 * D
    # forward and backward; twice that backward, with the sum of the weights' gradient over groups of rows
    sums_of_norm = 4 * D * (N // 16)
    first = (2 * b * N * D + norm) + (3 * b * N * D + norm + 2 * D)
    tables = sum(counted(lambda: Rotary(HEAD, RopeConfig()).angles(128, x)).bytes.values())
    added = (4 * b * N * D + norm) + (4 * b * N * D + norm + sums_of_norm) + (sums_of_norm + 4 * D + 6 * D)
    by_hand = {
        "SwiGLU": (3 + 5) * b * N * F * L,
        # the MLP's sum; gradients of what goes into q, k and v, into gate and up, and into norm and sum
        "sums": (3 + 2 * 3 + 3 + 3) * b * N * D * L,
        "norms": (first + added) * L + first,
        "RoPE": L * (tables + 2 * (2 * b * N * (Q + K) + 2 * 2 * 128 * HEAD // 2 * 4)),
        "attention": L * ((2 * b * N * (Q + K) + 4 * N * 4) + (2 * b * N * (2 * Q + 2 * K) + 4 * N * 4)),
        "routing": 0,
    }
    assert {group: found.bytes[group] for group in by_hand} == by_hand
    # Logits: one pass forward, one that puts their gradient in their place. Hidden states: scaled, and their gradient in float32
    # zeroed, added to, scaled and rounded. All else has one number per token.
    head = 3 * b * N * V + (4 + 4 + 10 + 8 + 6) * N * D
    assert head < found.bytes["loss head"] < head + 200 * N
    products = [(N, D, Q), *2 * [(N, D, K)], (N, Q, D), *3 * [(N, D, F)]]
    assert found.flops["products"] == 6 * (L * sum(n * d * o for n, d, o in products) + N * D * V)
    parameters = 2 * V * D + L * (2 * D * Q + 2 * D * K + 3 * D * F + 2 * D + Q + 2 * K) + D
    assert found.optimizer == 7 * b * parameters
    assert found.elementwise == sum(found.bytes[group] for group in traffic.ELEMENTWISE)


@pytest.mark.parametrize("name", DEFAULT_MODELS)
def test_every_kind_is_counted_with_the_operations_that_are_planned(name):
    args = bytes.parse_args([*SMALL, "--layers=2"])
    found = bytes.count(name, args)
    planned = 2 * training_flops(config_of(name, args).model, 128)
    # two choices of one layer round apart, and a router's backward pass has products of its own
    assert found.operations == pytest.approx(planned, rel=0.03)
    assert (found.bytes["routing"] > 0) == (name != "dense")


def test_kernels_move_less_than_torch_s_operations():
    by_torch, by_triton = (
        bytes.count("dense", bytes.parse_args([*SMALL, f"--kernels={kernels}"]))
        for kernels in ("torch", "triton")
    )
    assert by_triton.elementwise < by_torch.elementwise
    assert by_triton.flops == by_torch.flops
    assert not rule._Process.uses_triton


def test_what_routing_moves_per_number_of_the_hidden_states_stays_below_its_goals():
    """A pair of layers, with so many tokens of such a width that weights and single numbers hardly count."""
    options = ["--layers=2", "--hidden=2048", "--sequence=4096", "--batch=4", "--ffn=64", "--vocab=97"]
    dtf, mod, dtrnet = (
        bytes.count(name, bytes.parse_args(options)).bytes["routing"] / (4 * 4096 * 2048)
        for name in ("dtf:0.25", "mod:0.25", "dtrnet")
    )
    # Both take out and put back; a MoD router's casts and products move 12 bytes.
    assert dtf - (mod - 12) < 30
    assert dtrnet < 48


def test_the_table_and_the_object(capsys):
    bytes.main([*SMALL, "--models", "dense", "mod:0.25", "--json"])
    head, _, *table, last = capsys.readouterr().out.strip().splitlines()
    dense, mod = json.loads(last)
    assert head.startswith("Counted, bf16, kernels: triton; 4 layers, hidden 64")
    assert table[0] == "| | dense | mod:0.25 |"
    assert f"| **elementwise, GB** | **{bytes.shown(dense['elementwise'] / 1e9)}** |" in "\n".join(table)
    assert table[-1] == f"| elementwise, share | 1.000 | {mod['elementwise'] / dense['elementwise']:.3f} |"
    assert mod["flops"]["attention"] < dense["flops"]["attention"]


def test_the_shape_is_the_example_s():
    from megadyn.config import load_config
    from tests.helpers.tiny import ROOT

    model = load_config(ROOT / "examples/dense_3b/config.yaml").model
    assert {
        "hidden": model.hidden_size,
        "layers": model.num_layers,
        "heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "ffn": model.ffn_size,
        "vocab": model.vocab_size,
    } == bytes.SHAPE


@pytest.mark.parametrize("name", ["moe", "qwen2", "mod:x"])
def test_what_has_no_layers_of_ours_is_refused(name):
    with pytest.raises(UserError, match=f"--models {name}: "):
        bytes.main([*SMALL, "--models", name])


def test_a_layer_that_asks_for_values_is_refused(monkeypatch):
    monkeypatch.setattr(bytes.Network, "forward", lambda self, tokens, labels: tokens[0, 0].item())
    with pytest.raises(UserError, match="--models dense: cannot be counted on tensors without values: "):
        bytes.main([*SMALL, "--models", "dense"])


def test_kernels_cannot_be_counted_without_triton(monkeypatch):
    monkeypatch.setattr(rule.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="'triton': must be torch on this machine: Triton is not installed"):
        bytes.main([*SMALL, "--models", "dense"])
