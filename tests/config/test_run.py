"""The configuration: what is left out is filled in, what cannot be is refused by name and with a remedy."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megadyn.config import (
    Config,
    ModelConfig,
    batch_plan,
    engine_settings,
    load_config,
    save_config,
)
from megadyn.config.run import DECIDED_HERE
from megadyn.errors import ConfigError, UserError
from megadyn.kinds import expand_layout, make_kind
from tests.helpers.tiny import ROOT

RUN = """
data: {train: corpus}
tokenizer: {path: byte}
training: {iterations: 10}
output_dir: out
"""


def load(tmp_path: Path, *overrides: str, text: str = RUN) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def refusal(tmp_path: Path, *overrides: str, text: str = RUN) -> str:
    """The one sentence a user sees."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, *overrides, text=text)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- keys of earlier versions --------------------------------------------------------------------


def test_the_older_offset_is_read_as_its_logarithm_and_later_files_still_count(tmp_path):
    older = RUN + "model: {routing: {kind: dtf, ce_offset_init: 1.5}}\n"
    assert load(tmp_path, text=older).model.routing.ce_log_offset_init == math.log(1.5)
    assert load(
        tmp_path, "model.routing.ce_offset_init=2", text=older
    ).model.routing.ce_log_offset_init == math.log(2)
    assert (
        load(tmp_path, "model.routing.ce_log_offset_init=-1", text=older).model.routing.ce_log_offset_init
        == -1
    )
    assert (
        load(tmp_path, "model.routing.kind=dtf", "model.routing.ce_offset_init=1.025").model
        == load(tmp_path, "model.routing.kind=dtf").model
    )
    (tmp_path / "saved.yaml").write_text("")
    save_config(load(tmp_path, text=older), tmp_path / "saved.yaml")
    assert "ce_offset_init" not in (tmp_path / "saved.yaml").read_text()
    # Allowed by earlier versions, which took log(offset + 1e-10).
    zero = load(tmp_path, "model.routing.kind=dtf", "model.routing.ce_offset_init=0").model.routing
    assert zero.ce_log_offset_init == math.log(1e-10)


def test_both_spellings_of_the_offset_are_refused(tmp_path):
    message = refusal(tmp_path, "model.routing.ce_offset_init=1", "model.routing.ce_log_offset_init=0")
    assert message == (
        "model.routing.ce_offset_init in the command line: this is the older spelling of "
        "model.routing.ce_log_offset_init, which is also given; keep one of them"
    )


@pytest.mark.parametrize("value", ["-0.1", ".inf", ".nan", "much", "true", "[1]"])
def test_an_older_offset_without_a_logarithm_is_refused(tmp_path, value):
    assert "model.routing.ce_offset_init" in refusal(tmp_path, f"model.routing.ce_offset_init={value}")


# ---- keys and types ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "named", "suggested"),
    [
        ("precison=fp32", "precison", "precision"),
        ("model.hiden_size=8", "model.hiden_size", "hidden_size"),
        ("model.routing.capasity=0.5", "model.routing.capasity", "capacity"),
        ("model.routing.kind=mod model.routing.gat=sigmoid", "model.routing.gat", "gate"),
        ("data.trian=x", "data.trian", "train"),
        ("tokenizer.pth=x", "tokenizer.pth", "path"),
        ("parallel.tensors=2", "parallel.tensors", "tensor"),
        ("optimizer.learning_rat=1", "optimizer.learning_rat", "learning_rate"),
        ("optimizer.multipliers.prio=1", "optimizer.multipliers.prio", "prior"),
        ("training.iteration=1", "training.iteration", "iterations"),
        ("checkpoint.kep=1", "checkpoint.kep", "keep"),
        ("logging.intervall=1", "logging.intervall", "interval"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_one(tmp_path, override, named, suggested):
    message = refusal(tmp_path, *override.split())
    assert message.startswith(f"{named}:")
    assert f"did you mean '{suggested}'?" in message


def test_a_key_like_no_other_is_refused_without_a_suggestion(tmp_path):
    message = refusal(tmp_path, "model.xyzzy=1")
    assert message == "model.xyzzy: section 'model' has no such key"


def test_an_unknown_key_in_the_file_is_refused_too(tmp_path):
    assert "model.hiden_size" in refusal(tmp_path, text=RUN + "model: {hiden_size: 3}\n")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.hidden_size=wide", "model.hidden_size"),
        ("model.hidden_size=1.5", "model.hidden_size"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate"),
        ("model.qkv_bias=perhaps", "model.qkv_bias"),
        ("training.sequence_length=[1,2]", "training.sequence_length"),
        ("model.hidden_size=null", "model.hidden_size"),
        ("optimizer.multipliers=3", "optimizer.multipliers"),
        ("model.routing=dtf", "model.routing"),
        ("model=null", "model"),
        ("precision.kind=fp32", "precision"),
        ("model=[]", "model"),
        ("model={{", "the command line"),
        ("model.hidden_size=${nothing}", "model.hidden_size"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tmp_path, override, named):
    assert refusal(tmp_path, override).startswith(f"{named}: ")


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        ("data: {train: corpus}", "data.train"),
        ("tokenizer: {path: byte}", "tokenizer.path"),
        ("output_dir: out", "output_dir"),
    ],
)
def test_a_mandatory_key_that_is_missing_is_named(tmp_path, left_out, named):
    message = refusal(tmp_path, text=RUN.replace(left_out, ""))
    assert message.startswith(f"{named} is missing in {tmp_path}")
    assert ": give " in message


# ---- the file and the command line ---------------------------------------------------------------


@pytest.mark.parametrize("text", ["model: [1, 2", "a: b: c", "model:\n\t- 1", "model: {a: 1}}"])
def test_a_file_that_is_no_yaml_is_refused_by_name(tmp_path, text):
    message = refusal(tmp_path, text=text)
    assert str(tmp_path / "run.yaml") in message
    assert "not valid YAML" in message


def test_a_file_that_holds_a_list_is_refused_by_name(tmp_path):
    assert str(tmp_path / "run.yaml") in refusal(tmp_path, text="- one\n- two\n")


def test_a_file_that_holds_words_is_refused(tmp_path):
    assert refusal(tmp_path, text="just words\n").startswith("just words: ")


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}", "null"])
def test_an_empty_file_is_called_empty(tmp_path, text):
    assert refusal(tmp_path, text=text) == f"{tmp_path / 'run.yaml'}: is empty"


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_folder_instead_of_a_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        load_config(tmp_path)


def test_an_override_without_equals_sign_is_refused(tmp_path):
    assert (
        refusal(tmp_path, "model.hidden_size")
        == "'model.hidden_size' on the command line: must be of the form key=value"
    )


def test_overrides_stand_above_the_file_and_the_last_one_wins(tmp_path):
    config = load(
        tmp_path,
        "training.seed=1",
        "training.seed=2",
        text=RUN.replace("iterations: 10", "iterations: 10, seed: 5"),
    )
    assert config.training.seed == 2


# ---- values --------------------------------------------------------------------------------------

IMPOSSIBLE = [
    # (overrides, the key at fault, what the message says it must be)
    ("precision=fp8", "precision", "one of fp32, bf16, fp16"),
    ("precision=bf61", "precision", "did you mean 'bf16'?"),
    (
        "precision=fp16 training.norm_spike_factor=3",
        "training.norm_spike_factor",
        "0 with precision = fp16",
    ),
    ("model.routing.kind=dft", "model.routing.kind", "did you mean 'dtf'?"),
    ("model.routing.kind=mod model.routing.capacity=0", "model.routing.capacity", "in (0, 1]"),
    ("model.routing.kind=mod model.routing.capacity=1.01", "model.routing.capacity", "in (0, 1]"),
    ("model.routing.kind=mod model.routing.capacity=.nan", "model.routing.capacity", "in (0, 1]"),
    *(
        (
            f"model.routing.kind={kind} model.routing.causal={rule}",
            f"model.routing.causal with model.routing.kind = {kind}",
            f"one of {', '.join(allowed)}",
        )
        for kind, rule, allowed in (
            ("dtf", "bce", ["threshold", "predictor"]),
            ("mod", "guess", ["threshold", "predictor", "bce"]),
            ("dtrnet", "predictor", ["threshold"]),
            ("dtrnet", "bce", ["threshold"]),
        )
    ),
    (
        "model.routing.kind=mod model.routing.causal=predicter",
        "model.routing.causal with model.routing.kind = mod",
        "did you mean 'predictor'?",
    ),
    (
        "model.routing.kind=mod model.routing.gate=sigmod",
        "model.routing.gate",
        "one of sigmoid, identity (did you mean 'sigmoid'?)",
    ),
    (
        "model.routing.kind=dtrnet model.routing.router_type=token",
        "model.routing.router_type",
        "one of token_choice, expert_choice",
    ),
    *(
        (
            f"model.routing.kind={kind} model.routing.layout={layout}",
            "model.routing.layout",
            "for model.num_layers = 8 layers",
        )
        for kind, layout in (
            ("mod", "TD"),
            ("dtrnet", "T2D5"),
            ("dtrnet", "T2D7"),
            ("dtrnet", "tdtdtdtd"),
            ("mod", "xTDTDTDTD"),
            ("mod", "TDTDTDTDx"),
            ("dtrnet", "T2,D6"),
            ("dtrnet", "4T4D"),
            ("dtrnet", "T-1D9"),
            ("mod", "zeroattn"),
        )
    ),
    *(
        (
            f"model.routing.kind={kind} model.routing.layout={layout}",
            "model.routing.layout",
            "one with a routed layer (D) among 8",
        )
        for kind, layout in (("mod", "T8"), ("dtrnet", "TTTTTTTT"), ("dtrnet", "T8D0"))
    ),
    (
        "model.routing.kind=dtrnet model.num_layers=1",
        "model.routing.layout",
        "one with a routed layer (D) among 1",
    ),
    (
        "model.routing.kind=dtrnet model.num_layers=2 model.routing.layout=four_attn",
        "model.routing.layout",
        "one with a routed layer (D) among 2",
    ),
    *(
        (f"model.routing.kind={kind} model.routing.{name}=-1", f"model.routing.{name}", "at least 0")
        for kind, name in (
            ("dtf", "predictor_loss_weight"),
            ("mod", "predictor_loss_weight"),
            ("dtrnet", "predictor_loss_weight"),
            ("mod", "bce_loss_weight"),
            ("mod", "z_loss_weight"),
            ("dtrnet", "aux_loss_lambda"),
            ("dtrnet", "aux_loss_warmup"),
            ("dtrnet", "entropy_bonus"),
            ("dtf", "prior_loss_weight"),
        )
    ),
    (
        "model.routing.kind=mod model.routing.z_loss_weight=.inf",
        "model.routing.z_loss_weight",
        "a finite number of at least 0",
    ),
    *(
        (f"model.routing.kind=dtrnet model.routing.{name}={value}", f"model.routing.{name}", "in [0, 1]")
        for name in ("safe_min_attn_ratio", "jitter")
        for value in ("-0.1", "1.1", ".nan")
    ),
    ("model.normalization=hybrid", "model.normalization", "did you mean 'hybridnorm'?"),
    (
        "model.routing.kind=dtf model.routing.threshold_momentum=1",
        "model.routing.threshold_momentum",
        "in [0, 1)",
    ),
    (
        "model.routing.kind=dtrnet model.routing.threshold_momentum=-0.1",
        "model.routing.threshold_momentum",
        "in [0, 1)",
    ),
    ("model.routing.kind=dtf model.routing.ma_window=0", "model.routing.ma_window", "at least 1"),
    (
        "model.routing.kind=dtf model.routing.ma_window=1 model.routing.relative_gate=true",
        "model.routing.ma_window",
        "at least 2 with model.routing.relative_gate",
    ),
    ("model.routing.kind=dtf model.routing.prior_factor=0", "model.routing.prior_factor", "in (0, 4]"),
    (
        "model.routing.kind=dtf model.routing.prior_loss_weight=.nan",
        "model.routing.prior_loss_weight",
        "at least 0",
    ),
    (
        "model.routing.kind=dtf model.routing.ce_offset_init=-1",
        "model.routing.ce_offset_init",
        "at least 0",
    ),  # its logarithm is taken
    (
        "model.routing.kind=dtf model.routing.ce_log_offset_init=.nan",
        "model.routing.ce_log_offset_init",
        "a finite number",
    ),
    *(
        (f"model.{name}=0", f"model.{name}", "at least 1")
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_size",
            "vocab_size",
            "max_position",
        )
    ),
    ("model.num_kv_heads=3", "model.num_kv_heads", "a divisor of model.num_heads = 8"),
    (
        "model.hidden_size=500",
        "model.hidden_size",
        "a multiple of model.num_heads = 8 (or give model.head_dim)",
    ),
    ("model.head_dim=15", "model.head_dim", "even"),
    ("model.normalization=post", "model.normalization", "one of pre"),
    ("model.attention=flsh", "model.attention", "did you mean 'flash'?"),
    ("model.attention=flash/sdpa", "model.attention", "no layer of this model chooses tokens"),
    (
        "model.routing.kind=mod model.attention=flash/",
        "model.attention",
        "WHOLE/CHOSEN, each one of",
    ),
    ("model.norm_eps=0", "model.norm_eps", "in (0, 1]"),
    ("model.rope_theta=1", "model.rope.theta", "in (1, inf]"),
    ("model.init_std=-1", "model.init_std", "at least 0"),
    (
        "model.routing.kind=dtf model.num_layers=1",
        "model.num_layers",
        "at least 2 with model.routing.kind = dtf",
    ),
    ("data.validation_fraction=1", "data.validation_fraction", "in [0, 1)"),
    ("data.validation_fraction=-0.5", "data.validation_fraction", "in [0, 1)"),
    ("parallel.tensor=0", "parallel.tensor", "at least 1"),
    ("parallel.pipeline=0", "parallel.pipeline", "at least 1"),
    ("parallel.sequence=true", "parallel.sequence", "false"),
    *(
        (f"optimizer.multipliers.{name}=-1", f"optimizer.multipliers.{name}", "at least 0")
        for name in ("base", "router", "prior")
    ),
    ("optimizer.schedule=cosin", "optimizer.schedule", "did you mean 'cosine'?"),
    *(
        (f"optimizer.{name}=-1", f"optimizer.{name}", "at least 0")
        for name in (
            "learning_rate",
            "min_learning_rate",
            "warmup_iterations",
            "decay_iterations",
            "weight_decay",
            "clip_grad",
        )
    ),
    ("optimizer.learning_rate=.nan", "optimizer.learning_rate", "at least 0"),
    ("optimizer.beta1=1", "optimizer.beta1", "in [0, 1)"),
    ("optimizer.beta2=-0.1", "optimizer.beta2", "in [0, 1)"),
    ("optimizer.eps=0", "optimizer.eps", "in (0, 1]"),
    (
        "optimizer.min_learning_rate=1",
        "optimizer.min_learning_rate",
        "at most optimizer.learning_rate = 0.0003",
    ),
    *(
        (f"training.{name}=0", f"training.{name}", "at least 1")
        for name in (
            "iterations",
            "tokens",
            "global_batch_size",
            "micro_batch_size",
            "sequence_length",
            "eval_samples",
        )
    ),
    ("training.recompute=selectiv", "training.recompute", "did you mean 'selective'?"),
    ("training.kernels=tritn", "training.kernels", "did you mean 'triton'?"),
    ("training.eval_interval=-1", "training.eval_interval", "at least 0"),
    ("training.seed=-1", "training.seed", "at least 0"),
    (
        "training.tokens=100",
        "training.iterations",
        "one of the five and not training.iterations with training.tokens",
    ),
    (
        "training.iterations=null",
        "training.iterations",
        "training.tokens, training.samples, training.epochs or training.flops, one of the five",
    ),
    (
        "training.iterations=null training.samples=3 training.epochs=1",
        "training.iterations",
        "and not training.samples with training.epochs",
    ),
    *(
        (f"training.iterations=null training.{key}={value}", f"training.{key}", "a finite number above 0")
        for key in ("epochs", "flops")
        for value in ("0", "-1", ".inf", ".nan")
    ),
    ("training.iterations=null training.samples=0", "training.samples", "at least 1"),
    (
        "training.micro_batch_size=5",
        "training.global_batch_size",
        "a multiple of training.micro_batch_size = 5",
    ),
    (
        "training.sequence_length=64 model.max_position=32",
        "training.sequence_length",
        "at most model.max_position = 32",
    ),
    ("checkpoint.interval=-1", "checkpoint.interval", "at least 0"),
    ("checkpoint.keep=-1", "checkpoint.keep", "at least 0"),
    ("checkpoint.keep_every=-1", "checkpoint.keep_every", "at least 0"),
    ("checkpoint.average.last=1", "checkpoint.average.last", "at least 2"),
    ("checkpoint.average.ema=1", "checkpoint.average.ema", "between 0 and 1"),
    ("checkpoint.average.last=2 checkpoint.average.ema=0.5", "checkpoint.average.ema", "left out where"),
    ("checkpoint.average.ema=0.9", "checkpoint.interval", "above 0 with checkpoint.average"),
    (
        "checkpoint.interval=5 checkpoint.average.last=3",
        "checkpoint.keep",
        "0 or at least checkpoint.average.last = 3",
    ),
    ("logging.slow_rank_factor=1", "logging.slow_rank_factor", "above 1, or 0"),
    ("logging.slow_rank_factor=-1", "logging.slow_rank_factor", "at least 0"),
    ("checkpoint.keep_best=code", "checkpoint.keep_best", "one of validation"),
    ("checkpoint.keep_best=validatoin", "checkpoint.keep_best", "did you mean 'validation'?"),
    ("checkpoint.keep_best=validation", "checkpoint.interval", "a multiple of training.eval_interval = "),
    (
        "checkpoint.keep_best=validation checkpoint.interval=6 training.eval_interval=4",
        "checkpoint.interval",
        "a multiple of training.eval_interval = 4",
    ),
    ("checkpoint.on_error=go", "checkpoint.on_error", "one of stop, continue"),
    ("training.on_bad_step=skipp", "training.on_bad_step", "did you mean 'skip'?"),
    ("training.on_bad_step=rollback", "training.on_bad_step", "stop or skip with checkpoint.interval = 0"),
    ("training.spike_factor=-1", "training.spike_factor", "at least 0"),
    ("training.spike_factor=.nan", "training.spike_factor", "at least 0"),
    ("training.spike_factor=1", "training.spike_factor", "above 1, or 0"),
    ("training.norm_spike_factor=1", "training.norm_spike_factor", "above 1, or 0"),
    ("training.spike_window=0", "training.spike_window", "at least 1"),
    ("training.max_bad_steps=-1", "training.max_bad_steps", "at least 0"),
    ("training.timeout_s=0.5", "training.timeout_s", "at least 1"),
    ("training.timeout_s=.inf", "training.timeout_s", "a finite number"),
    ("training.grace_s=0", "training.grace_s", "at least 1"),
    ("logging.interval=0", "logging.interval", "at least 1"),
    ("logging.wandb=on", "logging.wandb", "one of none, online, offline"),
    ("logging.live=sometimes", "logging.live", "one of auto, always, never"),
    ("logging.peak_tflops=0", "logging.peak_tflops", "a finite number above 0"),
    ("logging.profile_steps=[3,2]", "logging.profile_steps", "[first, last], with 1 <= first <= last"),
    (
        "logging.memory_snapshot_steps=[3,2]",
        "logging.memory_snapshot_steps",
        "[first, last], with 1 <= first <= last",
    ),
    ("logging.profile_steps=[0,2]", "logging.profile_steps", "[first, last], with 1 <= first <= last"),
    ("logging.profile_steps=[1]", "logging.profile_steps", "[first, last], with 1 <= first <= last"),
    ("logging.profile_ranks=[]", "logging.profile_ranks", "at least one rank, each once"),
    ("logging.profile_ranks=[1,1]", "logging.profile_ranks", "at least one rank, each once"),
    ("parallel.tensor=3", "parallel.tensor", "a divisor of model.num_heads = 8"),
    (
        "model.num_heads=12 model.num_kv_heads=6 model.head_dim=8 parallel.tensor=4",
        "parallel.tensor",
        "a divisor or a multiple of model.num_kv_heads = 6",
    ),
    ("model.ffn_size=99 parallel.tensor=2", "parallel.tensor", "a divisor of model.ffn_size = 99"),
    ("parallel.pipeline=9", "parallel.pipeline", "at most model.num_layers = 8"),
    ("parallel.sequence=true", "parallel.sequence", "false while parallel.tensor = 1"),
    (
        "parallel.tensor=2 parallel.sequence=true training.sequence_length=255",
        "training.sequence_length",
        "a multiple of parallel.tensor = 2 with parallel.sequence",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "key", "want"), IMPOSSIBLE, ids=[overrides for overrides, *_ in IMPOSSIBLE]
)
def test_an_impossible_value_is_refused_by_key_with_what_it_must_be(tmp_path, overrides, key, want):
    message = refusal(tmp_path, *overrides.split())
    assert message.startswith(f"{key} = ")
    assert want in message.partition(": must be ")[2]


def test_values_at_the_edge_of_what_is_allowed_pass(tmp_path):
    load(
        tmp_path,
        "model.routing.kind=dtf",
        "model.routing.capacity=1",
        "model.routing.threshold_momentum=0",
        "model.routing.ma_window=1",
        "model.routing.prior_loss_weight=0",
        "data.validation_fraction=0",
        "optimizer.clip_grad=0",
        "optimizer.beta1=0",
        "optimizer.min_learning_rate=3e-4",
        "training.micro_batch_size=32",
        "parallel.pipeline=8",
        "parallel.tensor=8",
        "model.num_kv_heads=2",
        "model.max_position=1024",
    )
    load(
        tmp_path,
        "model.routing.kind=dtrnet",
        "model.routing.safe_min_attn_ratio=0",
        "model.routing.jitter=1",
        "model.routing.layout=T7D",
        "model.routing.aux_loss_lambda=0",
        "model.routing.aux_loss_warmup=0",
    )
    load(
        tmp_path,
        "model.routing.kind=dtrnet",
        "model.routing.safe_min_attn_ratio=1",
        "model.routing.jitter=0",
        "model.routing.layout=zero_attn",
    )


# ---- what is left out ----------------------------------------------------------------------------


def test_sizes_left_out_follow_from_the_others(tmp_path):
    config = load(tmp_path, "model.hidden_size=200", "model.num_heads=10", "training.sequence_length=77")
    model = config.model
    assert (model.num_kv_heads, model.head_dim, model.max_position) == (10, 20, 77)
    assert model.ffn_size == 576  # 200 * 8 / 3 = 533.3, up to a multiple of 64


def test_sizes_that_are_given_stay(tmp_path):
    model = load(
        tmp_path, "model.num_kv_heads=4", "model.head_dim=24", "model.ffn_size=99", "model.max_position=4096"
    ).model
    assert (model.num_kv_heads, model.head_dim, model.ffn_size, model.max_position) == (4, 24, 99, 4096)


@pytest.mark.parametrize(("tokens", "iterations"), [(1, 1), (64, 1), (65, 2), (640, 10)])
def test_a_length_in_tokens_or_samples_becomes_whole_steps(tmp_path, tokens, iterations):
    training = load(
        tmp_path,
        "training.iterations=null",
        f"training.tokens={tokens}",
        "training.global_batch_size=4",
        "training.sequence_length=16",
    ).training
    assert (training.iterations, training.tokens) == (iterations, None)
    training = load(
        tmp_path, "training.iterations=null", f"training.samples={tokens}", "training.global_batch_size=64"
    ).training
    assert (training.iterations, training.samples) == (iterations, None)


@pytest.mark.parametrize(("epochs", "iterations"), [(1, 25), (0.5, 12), (2, 50), (0.04, 1), (3.999, 99)])
def test_epochs_become_whole_steps_that_repeat_nothing(tmp_path, epochs, iterations):
    training = load(
        tmp_path, "training.iterations=null", f"training.epochs={epochs}", "training.global_batch_size=4"
    ).training
    assert training.iterations is None
    training.settle(epoch_samples=100)
    assert (training.iterations, training.epochs) == (iterations, None)


@pytest.mark.parametrize("word", ["3e9", "3B", "3000M", "3000000000"])
def test_a_length_may_be_written_short(tmp_path, word):
    short = "training.global_batch_size=1000", "training.sequence_length=1000"
    assert (
        load(tmp_path, "training.iterations=null", f"training.tokens={word}", *short).training.iterations
        == 3000
    )
    text = RUN.replace("iterations: 10", f"samples: {word}")
    assert load(tmp_path, *short, text=text).training.iterations == 3_000_000
    text = RUN.replace(
        "train: corpus", f"train: [{{prefix: a, tokens: {word}}}, {{prefix: b, tokens: 1.5T}}]"
    )
    assert [source.share for source in load(tmp_path, text=text).data.sources("train")] == [3e9, 1.5e12]
    refused = refusal(tmp_path, "training.iterations=null", "training.tokens=3X")
    assert refused.startswith("training.tokens = '3X': must be a whole number")


def test_a_length_is_saved_as_it_was_given(tmp_path):
    """With another batch size it still means the same."""
    save_config(
        load(tmp_path, "training.iterations=null", "training.samples=96", "training.global_batch_size=8"),
        tmp_path / "resolved.yaml",
    )
    again = load_config(tmp_path / "resolved.yaml", ["training.global_batch_size=16"])
    assert again.training.iterations == 6


def test_too_small_an_epoch_for_a_step_is_refused(tmp_path):
    training = load(
        tmp_path, "training.iterations=null", "training.epochs=1", "training.global_batch_size=4"
    ).training
    with pytest.raises(
        ConfigError,
        match=r"^training\.epochs = 1\.0: must be more: an epoch has 3 samples, and a step takes "
        r"training\.global_batch_size = 4$",
    ):
        training.settle(epoch_samples=3)


@pytest.mark.parametrize(
    ("hidden", "factor", "width"),
    [
        (512, 0.0625, 32),
        (16, 0.0625, 2),
        (8, 0.0625, 2),
        (48, 0.0625, 4),
        (33, 0.0625, 4),
        (100, 0.05, 6),
        (10, 4.0, 40),
    ],
)
def test_the_priors_width_is_rounded_up_to_even_and_at_least_two(hidden, factor, width):
    model = ModelConfig(hidden_size=hidden, routing=make_kind("dtf", prior_factor=factor))
    assert model.routing.prior_size(model) == width


@pytest.mark.parametrize(("kind", "capacity"), [("dtf", 0.5), ("mod", 0.125), ("dtrnet", 0.1)])
def test_each_kind_has_its_own_capacity_unless_one_is_given(tmp_path, kind, capacity):
    assert load(tmp_path, f"model.routing.kind={kind}").model.routing.capacity == capacity
    assert (
        load(tmp_path, f"model.routing.kind={kind}", "model.routing.capacity=0.3").model.routing.capacity
        == 0.3
    )


@pytest.mark.parametrize(
    ("kind", "extra", "threshold", "token_choice"),
    [
        ("dense", "", False, False),
        ("dtf", "", True, False),
        ("dtf", "causal=predictor", False, False),
        ("mod", "", True, False),
        ("mod", "causal=predictor", False, False),
        ("mod", "causal=bce", False, False),
        ("dtrnet", "", False, True),
        ("dtrnet", "router_type=expert_choice", True, False),
    ],
)
def test_a_threshold_is_kept_where_top_k_needs_one(tmp_path, kind, extra, threshold, token_choice):
    overrides = [f"model.routing.kind={kind}", *(f"model.routing.{word}" for word in extra.split())]
    routing = load(tmp_path, *overrides).model.routing
    assert (routing.uses_threshold, routing.varies) == (threshold, token_choice)


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "layers", "letters"),
    [
        ("bilayer", 1, "T"),
        ("bilayer", 4, "TDTD"),
        ("bilayer", 5, "TDTDT"),
        ("zero_attn", 3, "DDD"),
        ("four_attn", 8, "TTDTTDDD"),
        ("four_attn", 12, "TTDDDTTDDDDD"),
        ("four_attn", 9, "TTDTTDDDD"),
        ("four_attn", 5, "TTTDD"),
        ("TDTD", 4, "TDTD"),
        ("T2D14", 16, "TT" + "D" * 14),
        ("D3", 3, "DDD"),
        ("T1D1", 2, "TD"),
        ("TD10T", 12, "T" + "D" * 10 + "T"),
        ("TD0T", 2, "TT"),
        ("T2T2D", 5, "TTTTD"),
        ("D", 1, "D"),
    ],
)
def test_a_layout_becomes_a_letter_a_layer(layout, layers, letters):
    assert expand_layout(layout, layers) == letters


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ("TDTD", 5),
        ("T2D14", 15),
        ("T2D14", 17),
        ("", 4),
        ("T2 D2", 4),
        ("td", 2),
        ("TXD", 2),
        ("2T2D", 4),
        ("T2D2.", 4),
        ("four-attn", 8),
        ("bilayer2", 4),
        ("TD\n", 2),
        ("(TD)2", 4),
        ("T²D2", 4),
    ],
)
def test_a_layout_that_describes_other_layers_is_refused_with_what_it_may_be(layout, layers):
    with pytest.raises(ConfigError) as caught:
        expand_layout(layout, layers)
    assert str(caught.value) == (
        f"model.routing.layout = {layout!r}: must be bilayer, zero_attn, four_attn, or letters T and D "
        f"with counts, such as T2D14, for model.num_layers = {layers} layers"
    )


@pytest.mark.parametrize(
    ("kind", "layout", "letters"),
    [
        ("mod", None, "TDTDTD"),
        ("dtrnet", None, "TDTDTD"),
        ("mod", "zero_attn", "DDDDDD"),
        ("dtrnet", "four_attn", "TTTTDD"),
        ("dtrnet", "T2D4", "TTDDDD"),
        ("mod", "D2T4", "DDTTTT"),
    ],
)
def test_layers_are_routed_as_laid_out(kind, layout, letters):
    types = ModelConfig(num_layers=6, routing=make_kind(kind, layout=layout)).layer_types
    assert types == [{"T": "dense", "D": kind}[letter] for letter in letters]


@pytest.mark.parametrize(
    ("kind", "layers", "types"),
    [
        ("dense", 3, ["dense"] * 3),
        ("dtf", 2, ["dtf_decision", "dtf_dynamic"]),
        ("dtf", 4, ["dtf_decision", "dtf_dynamic"] * 2),
        ("dtf", 5, ["dtf_decision", "dtf_dynamic"] * 2 + ["dense"]),
    ],
)
def test_odd_layers_decide_even_ones_skip_and_a_last_odd_one_is_dense(kind, layers, types):
    assert ModelConfig(num_layers=layers, routing=make_kind(kind)).layer_types == types


def test_the_resolved_config_reads_back_equal(tmp_path):
    config = load(
        tmp_path,
        "model.routing.kind=dtf",
        "model.num_layers=5",
        "training.iterations=null",
        "training.tokens=100000",
        "optimizer.learning_rate=1.2345678901234567e-4",
        "data.validation=other",
        "model.vocab_size=1000",
    )
    save_config(config, tmp_path / "resolved.yaml")
    again = load_config(tmp_path / "resolved.yaml")
    assert again == config
    save_config(again, tmp_path / "twice.yaml")
    assert (tmp_path / "twice.yaml").read_text() == (tmp_path / "resolved.yaml").read_text()


# ---- processes and batches -----------------------------------------------------------------------


def test_samples_are_spread_over_ranks_and_micro_batches(tmp_path):
    config = load(
        tmp_path,
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "training.global_batch_size=48",
        "training.micro_batch_size=4",
    )
    plan = batch_plan(config, 12)
    assert (plan.data_parallel, plan.micro_batches, plan.micro_batch, plan.global_batch) == (3, 4, 4, 48)


def test_a_number_of_processes_that_does_not_divide_is_refused(tmp_path):
    config = load(tmp_path, "parallel.tensor=2", "parallel.pipeline=2")
    with pytest.raises(
        ConfigError, match=r"^number of processes = 6: must be a multiple of .* = 2 \* 2 = 4$"
    ):
        batch_plan(config, 6)


def test_a_global_batch_that_does_not_divide_is_refused(tmp_path):
    config = load(tmp_path, "training.global_batch_size=8", "training.micro_batch_size=2")
    with pytest.raises(
        ConfigError, match=r"^training\.global_batch_size = 8: must be a multiple of .* = 2 \* 3 = 6$"
    ):
        batch_plan(config, 3)


# ---- DeepSpeed's settings ------------------------------------------------------------------------


def with_settings(tmp_path: Path, settings: Any, *overrides: str) -> Config:
    """A run whose deepspeed_config holds `settings`: text, or an object to be written as JSON."""
    path = tmp_path / "engine.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return load(tmp_path, f"deepspeed_config={path}", *overrides)


def test_engine_settings_are_what_the_file_holds(tmp_path):
    settings = {"zero_optimization": {"stage": 3, "overlap_comm": True}, "wall_clock_breakdown": True}
    assert engine_settings(with_settings(tmp_path, settings)) == settings


def test_a_missing_engine_file_is_refused_by_name(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"^deepspeed_config = 'no/such\.json': must be one of zero0, zero1, zero2, zero3, zero3_offload, "
        r"or a readable file \(No such file or directory\)$",
    ):
        engine_settings(load(tmp_path, "deepspeed_config=no/such.json"))


def test_round_robin_gradients_are_refused_because_checkpoints_would_mix_tensors_up(tmp_path):
    settings = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    with pytest.raises(ConfigError, match="round_robin_gradients = True: must be false or left out"):
        engine_settings(with_settings(tmp_path, settings))
    settings["zero_optimization"]["round_robin_gradients"] = False
    assert engine_settings(with_settings(tmp_path, settings)) == settings


def test_engine_settings_that_come_with_megadyn_go_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = sorted((ROOT / "ds_configs").glob("*.json"))
    assert len(shipped) == 5
    for path in shipped:
        config = load(tmp_path, f"deepspeed_config={path.stem}")
        assert config.deepspeed_config == path.stem
        assert engine_settings(
            load(tmp_path, f"deepspeed_config={path.stem}", "precision=fp32")
        ) == json.loads(path.read_text())
    assert engine_settings(load(tmp_path)) == json.loads((ROOT / "ds_configs/zero1.json").read_text())


def test_a_path_to_engine_settings_that_come_with_megadyn_is_refused_with_their_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"; zero3 without folder and suffix is the one that comes with megadyn\)$"
    ):
        engine_settings(load(tmp_path, "deepspeed_config=ds_configs/zero3.json"))


def test_engine_settings_are_found_beside_the_file_that_names_them_and_first_where_they_always_were(
    tmp_path, monkeypatch
):
    elsewhere, beside = tmp_path / "elsewhere", tmp_path / "project/base"
    for folder in (elsewhere, beside):
        folder.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    (beside / "own.json").write_text('{"zero_optimization": {"stage": 2}}')
    (beside / "base.yaml").write_text("deepspeed_config: own.json\n")
    config = load(tmp_path / "project", text=RUN + "extends: base/base.yaml\n")
    assert config.deepspeed_config == str(beside / "own.json")
    assert engine_settings(config)["zero_optimization"]["stage"] == 2
    with pytest.raises(
        ConfigError, match=r"'own\.json'"
    ):  # on the command line only the working directory counts
        engine_settings(load(tmp_path / "project", "deepspeed_config=own.json"))
    (elsewhere / "own.json").write_text('{"zero_optimization": {"stage": 3}}')
    config = load(tmp_path / "project", text=RUN + "extends: base/base.yaml\n")
    assert config.deepspeed_config == "own.json"
    assert engine_settings(config)["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("text", ["", "{", '{"a": 1,}', "zero_optimization: 1"])
def test_an_engine_file_that_is_no_json_is_refused_by_name(tmp_path, text):
    with pytest.raises(UserError, match=r"engine\.json: not valid JSON"):
        engine_settings(with_settings(tmp_path, text))


def test_an_engine_file_that_holds_no_object_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"engine\.json: must hold one JSON object"):
        engine_settings(with_settings(tmp_path, [1]))


@pytest.mark.parametrize("key", sorted(DECIDED_HERE))
def test_a_number_decided_elsewhere_may_not_stand_in_the_engine_file(tmp_path, key):
    with pytest.raises(ConfigError) as caught:
        engine_settings(with_settings(tmp_path, {key: 1, "zero_optimization": {"stage": 1}}))
    assert f"engine.json: {key} = 1: must be left out; it follows from {DECIDED_HERE[key]}" in str(
        caught.value
    )


@pytest.mark.parametrize("stage", [4, -1, "1"])
def test_a_zero_stage_that_does_not_exist_is_refused(tmp_path, stage):
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage = .*: must be 0, 1, 2 or 3"):
        engine_settings(with_settings(tmp_path, {"zero_optimization": {"stage": stage}}))


@pytest.mark.parametrize("zero", [None, 1, [1]])
def test_a_zero_section_that_is_no_section_is_refused(tmp_path, zero):
    with pytest.raises(UserError, match=r"engine\.json: zero_optimization"):
        engine_settings(with_settings(tmp_path, {"zero_optimization": zero}))


@pytest.mark.parametrize("stage", [2, 3])
def test_pipeline_stages_refuse_a_zero_stage_that_cuts_gradients(tmp_path, stage):
    with pytest.raises(
        ConfigError,
        match=rf"stage = {stage}: must be 0 or 1 with parallel\.pipeline > 1 .*deepspeed_config=zero1",
    ):
        engine_settings(
            with_settings(tmp_path, {"zero_optimization": {"stage": stage}}, "parallel.pipeline=2")
        )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("settings", [{}, {"zero_optimization": {"stage": 0}}])
def test_half_precision_refuses_zero_0_which_has_no_master_weights(tmp_path, precision, settings):
    with pytest.raises(
        ConfigError,
        match=rf"stage = 0: must be at least 1 with precision = {precision} .*deepspeed_config=zero1",
    ):
        engine_settings(with_settings(tmp_path, settings, f"precision={precision}"))


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        (0, ["precision=fp32"]),
        (0, ["precision=fp32", "parallel.pipeline=2"]),
        (1, ["parallel.pipeline=2"]),
        (2, []),
        (3, []),
    ],
)
def test_combinations_that_work_pass(tmp_path, stage, overrides):
    assert engine_settings(with_settings(tmp_path, {"zero_optimization": {"stage": stage}}, *overrides))
