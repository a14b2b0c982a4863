"""The benchmark of generation: what it builds, how it counts, and what it refuses."""

import json

import pytest
import torch

from megadyn.benchmark import generate
from megadyn.benchmark.generate import Shares, prefill_flops, token_flops
from megadyn.benchmark.served import models_of, served
from megadyn.errors import UserError
from megadyn.evaluation.losses import evaluate
from megadyn.hf.convert import write_code
from megadyn.kinds import BUILT_IN, find_kind
from megadyn.planning.flops import layer_costs

SMALL = [
    f"--{name}={value}"
    for name, value in (
        ("hidden", 64),
        ("layers", 4),
        ("heads", 4),
        ("kv-heads", 2),
        ("ffn", 128),
        ("vocab", 97),
        ("steps", 5),
        ("rounds", 2),
        ("warmup", 1),
    )
]
CPU = torch.device("cpu")
ALL = [find_kind(name).benchmark or name for name in BUILT_IN]


def parsed(*options):
    args = generate.parse_args([*SMALL, *options])
    args.sequence, args.recompute = max(args.context) + args.steps, "none"
    return args


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_kind_is_timed_and_counted(precision, capsys):
    generate.main(
        [
            *SMALL,
            f"--precision={precision}",
            *("--context", "24", "60"),
            *("--batch", "1", "3"),
            "--json",
            *("--models", "qwen2", *ALL),
        ]
    )
    lines = capsys.readouterr().out.strip().splitlines()
    assert sum(line.startswith("| 3 x 60 |") for line in lines) == 1 + len(ALL)
    figures = json.loads(lines[-1])
    assert [(f["batch"], f["context"], f["name"]) for f in figures] == [
        (batch, context, name) for batch in (1, 3) for context in (24, 60) for name in ("qwen2", *ALL)
    ]
    for figure in figures:
        for phase, tokens in ((figure["prefill"], figure["context"]), (figure["decode"], 1)):
            assert phase["seconds"] > 0 and phase["peak_bytes"] is None
            assert phase["tokens_per_second"] == pytest.approx(figure["batch"] * tokens / phase["seconds"])
        first = next(f for f in figures if (f["batch"], f["context"]) == (figure["batch"], figure["context"]))
        share = figure["decode"]["seconds"] / first["decode"]["seconds"]
        assert figure["decode"]["time_share"] == pytest.approx(share)
        if figure["name"] in ("qwen2", "dense"):
            assert figure["kv_bytes"] == 4 * 2 * 2 * 16 * (4 if precision == "fp32" else 2)
            assert figure["prefill"]["flops_share"] == figure["decode"]["flops_share"] == 1
            assert figure["decode"]["saved"] is None
    mod = figures[-len(ALL) - 1 :][1 + ALL.index("mod:0.125")]
    assert mod["shares"]["prefill"][1] == pytest.approx(0.125, abs=0.15)
    assert mod["kv_bytes"] == pytest.approx(
        figures[0]["kv_bytes"] * (2 + 2 * mod["shares"]["prefill"][1]) / 4, rel=0.1
    )
    assert mod["prefill"]["flops_share"] < 0.75


@pytest.mark.parametrize("name", ["dtf:0.5", "mod:0.125", "dtrnet:0.1", "nested"])
def test_layers_keep_the_planned_share(name):
    """In the second half, behind which decoding goes on."""
    torch.manual_seed(0)
    tokens = torch.randint(97, (4, 256))
    one = served(name, parsed("--context", "256"), CPU, torch.float32, tokens)
    with torch.no_grad():
        found = one.model(tokens, output_routing=True)
    for layer, taken in zip(one.config.layer_types, found.routing, strict=True):
        if layer not in ("dense", "dtf_decision"):
            share = taken[:, 128:].float().mean().item()
            assert share == pytest.approx(one.config.routing.share, abs=0.05), layer


def test_weights_are_the_networks_and_thresholds_part_scores():
    args, tokens = parsed("--context", "64"), torch.randint(97, (2, 64))
    one = served("mod:0.25", args, CPU, torch.float32, tokens)
    with torch.no_grad():
        found = one.model(tokens, output_routing=True)
    threshold = one.model.model.layers[1].causal_router.threshold
    assert torch.equal(found.routing[1], found.gates[1] >= threshold)
    assert found.routing[1][:, 32:].sum() == 16
    with pytest.raises(UserError, match="--models moe: must be KIND"):
        served("moe", args, CPU, torch.float32, tokens)


def test_flops_of_all_tokens_are_the_planners_and_add_up_over_a_sequence():
    (dense,) = models_of(parsed("--models", "dense", "--context", "50"), CPU, torch.float32, [50])
    config, all_of_them = dense.config, [1.0] * 4
    assert prefill_flops(config, 50, all_of_them) == layer_costs(config, 50)
    one_by_one = sum(sum(token_flops(config, at, Shares(all_of_them, all_of_them))) for at in range(1, 51))
    # the last token of a call sees itself too, half of which the planner's half of the square leaves out
    assert one_by_one == pytest.approx(sum(layer_costs(config, 50)), rel=0.02)


def test_a_share_not_kept_costs_nothing():
    (mod,) = models_of(parsed("--models", "mod:0.25", "--context", "64"), CPU, torch.float32, [64])
    nothing = token_flops(mod.config, 64, Shares([1.0, 0.25] * 2, [1.0, 0.0] * 2))
    half = token_flops(mod.config, 64, Shares([1.0, 0.25] * 2, [1.0, 0.5] * 2))
    whole = token_flops(mod.config, 64, Shares([1.0, 0.25] * 2, [1.0, 1.0] * 2))
    router = 2 * 64
    assert nothing[1] == router
    assert half[1] - router == pytest.approx((whole[1] - router) / 2)


def test_an_export_is_measured_against_qwen2_of_its_shape(tmp_path, capsys):
    args = parsed("--context", "64", "--batch", "2")
    one = served("dtf:0.5", args, CPU, torch.float32, torch.randint(97, (4, 64)))
    one.model.save_pretrained(tmp_path / "export")
    write_code(tmp_path / "export", find_kind("dtf"))
    generate.main(
        ["--export", str(tmp_path / "export"), *("--context", "32", "--batch", "2", "--steps", "4"), "--json"]
    )
    first, second = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (first["name"], second["name"]) == ("qwen2", "export")
    assert first["kv_bytes"] == 4 * 2 * 2 * 16 * 4 > second["kv_bytes"]
    assert first["loss"] is second["loss"] is None


def test_exports_stand_beside_each_other_with_their_losses(tmp_path, capsys, write_dataset):
    """Two kinds in folders of one name, in one table; with static caches, which keep the same tokens."""
    data = write_dataset([[97]])
    folders, wanted = [], []
    for kind in ("mod", "dtf"):
        folders.append(tmp_path / kind / "hf")
        args = parsed("--context", "32")
        one = served(f"{kind}:0.5", args, CPU, torch.float32, torch.randint(97, (4, 32)))
        one.model.save_pretrained(folders[-1])
        write_code(folders[-1], find_kind(kind))
        wanted.append(evaluate(folders[-1], data.prefix, modes=("causal",), samples=2)["causal"])
    common = ["--export", *map(str, folders), "--data", str(data.prefix), "--samples", "2", "--json"]
    common += ["--context", "24", "--batch", "2", "--steps", "3", "--rounds", "1", "--warmup", "0"]
    generate.main(common)
    lines = capsys.readouterr().out.strip().splitlines()
    assert f" {wanted[0]:.4f} |" in next(line for line in lines if line.startswith("| 2 x 24 | mod/hf |"))
    growing = json.loads(lines[-1])
    assert [figure["name"] for figure in growing] == ["qwen2", "mod/hf", "dtf/hf"]
    assert [figure["loss"] for figure in growing] == [None, *wanted]
    generate.main([*common, "--static"])
    static = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    for ours, theirs in zip(static, growing, strict=True):
        assert (ours["shares"], ours["kv_bytes"]) == (theirs["shares"], theirs["kv_bytes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "moe"], "--models moe: must be KIND"),
        (["--models", "mod:x"], "--models mod:x: 'x' is not a number"),
        (["--export", "nowhere"], "nowhere"),
        (["--export", "nowhere", "nowhere"], "--export: names a folder twice"),
        (["--compile"], "--compile: needs --static"),
        (["--compile", "--static", "--warmup=0"], "--compile: needs --warmup of at least 1"),
        (["--data", "somewhere"], "--data: needs --export"),
    ],
)
def test_what_does_not_exist_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        generate.main([*SMALL, *options])


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match="must be an export of megadyn, but its model_type is 'qwen2'"):
        generate.main(["--export", str(tmp_path)])


def test_processor_time_of_several_threads_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(UserError, match="--cpu-time: needs a CPU and one thread"):
        generate.main([*SMALL, "--cpu-time"])


def test_a_slow_round_does_not_count():
    """Medians of each step over rounds, then their mean; on a clock that is told what to say."""
    run = generate.Run(
        models_of(parsed("--models", "dense", "--context", "8"), CPU, torch.float32, [8])[0],
        torch.zeros(1, 10, dtype=torch.long),
        8,
        lambda work, device: (work(), next(clock))[1],
    )
    clock = iter([5.0, 1.0, 2.0, 7.0, 1.0, 90.0, 6.0, 3.0, 4.0])
    for _ in range(3):
        generate.take_turns([run])
    figure = run.figure()
    assert (figure.prefill.seconds, figure.decode.seconds) == (6.0, (1.0 + 4.0) / 2)
