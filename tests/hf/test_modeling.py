"""The stand-alone model: against Qwen2, against itself with a cache, padded, alone, and without megadyn installed."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Qwen2Config, Qwen2ForCausalLM

from megadyn.hf.cache_megadyn import MegadynCache
from megadyn.hf.modeling_megadyn import MegadynForCausalLM
from megadyn.hf.packing_megadyn import best_of_each_row, pack
from tests.hf.tiny_models import (
    DTF,
    KINDS,
    LAYOUTS,
    MAIN_KINDS,
    MOD,
    NORMALIZATIONS,
    ROUTED,
    VOCABULARY,
    WINDOW,
    random_tokens,
    tiny_config,
    tiny_model,
)

TOKENS = random_tokens(3, 4 * WINDOW, seed=7)
LENGTHS = (4 * WINDOW, 4 * WINDOW - 9, 2)  # real tokens of each row when padded
CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def padding(side: str) -> torch.Tensor:
    """Attention mask of TOKENS with LENGTHS real tokens a row."""
    column, length = torch.arange(TOKENS.shape[1]), torch.tensor(LENGTHS)[:, None]
    return (column < length if side == "right" else column >= TOKENS.shape[1] - length).long()


# ---- dense ---------------------------------------------------------------------------------------


def qwen2_like(model: MegadynForCausalLM) -> Qwen2ForCausalLM:
    """A Qwen2 with the weights of a dense model; q, k and v biases that the model lacks are zero."""
    config = model.config
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
        "max_position_embeddings",
    )
    other = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(config, name) for name in names})).eval()
    weights = model.state_dict()
    for name, tensor in other.state_dict().items():
        if not config.attention_bias and name.endswith("bias"):
            weights[name] = torch.zeros_like(tensor)
    other.load_state_dict(weights)
    return other


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": False},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_dense_equals_qwen2(changes):
    model = tiny_model("dense", **changes)
    other = qwen2_like(model)
    assert_close(model(TOKENS).logits, other(TOKENS).logits, **CLOSE)
    mask = padding("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ours, theirs = model(TOKENS, mask).logits, other(TOKENS, mask, positions).logits
    assert_close(ours[mask.bool()], theirs[mask.bool()], **CLOSE)


def test_hidden_states_are_qwen2s():
    model = tiny_model("dense")
    for ours, theirs in zip(
        model(TOKENS, output_hidden_states=True).hidden_states,
        qwen2_like(model)(TOKENS, output_hidden_states=True).hidden_states,
        strict=True,
    ):
        assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("mode", ["causal", "topk"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kind", ["dtf4", "mod", "mod-identity", "dtrnet-token", "dtrnet-expert"])
def test_all_tokens_with_unit_gate_is_dense(kind, normalization, mode):
    layer_types, routing = LAYOUTS[kind]
    routed = tiny_model(kind, mode, normalization=normalization, routing=routing | {"capacity": 1.0})
    dense = tiny_model("dense", num_hidden_layers=len(layer_types), normalization=normalization)
    assert not dense.load_state_dict(routed.state_dict(), strict=False).missing_keys
    for layer, layer_type in zip(routed.model.layers, layer_types, strict=True):
        if layer_type == "dtf_decision":
            layer.router.forward = lambda static, change, average: torch.full_like(static, 99.0)
        elif layer_type == "mod":
            layer.router.forward = lambda h: torch.full_like(
                h[..., :1], 1.0 if kind == "mod-identity" else 99.0
            )
        elif layer_type == "dtrnet":
            layer.router.fc2.bias.copy_(torch.tensor([999.0, -999.0]))
        if hasattr(layer, "causal_router") and kind != "dtrnet-token":
            layer.causal_router.threshold.fill_(1.0)
    assert_close(routed(TOKENS).logits, dense(TOKENS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["dtf4", "mod", "dtrnet-token"])
def test_columns_that_each_part_of_a_routed_layer_computes(kind):
    model = tiny_model(kind)
    layer, columns = model.model.layers[3], {}
    for part in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
    ):
        layer.get_submodule(part).register_forward_hook(
            lambda _, inputs, __, part=part: columns.update({part: inputs[0].shape[1]})
        )
    chosen = int(model(TOKENS, output_routing=True).routing[3].sum(1).max())
    assert 2 < chosen < TOKENS.shape[1]
    rest = TOKENS.shape[1] if kind == "dtrnet-token" else chosen
    assert columns == {
        "self_attn.q_proj": chosen,
        "self_attn.k_proj": chosen,
        "self_attn.v_proj": rest,
        "self_attn.o_proj": rest,
        "mlp.up_proj": rest,
    }


# ---- cache ---------------------------------------------------------------------------------------


STEPS = {"prefill": [12] + [1] * 16, "single": [1] * 28, "chunks": [5, 1, 9, 13]}


@pytest.mark.parametrize(
    ("kind", "normalization", "side", "steps"),
    [
        *(
            (kind, "pre", side, steps)
            for kind in MAIN_KINDS
            for side in ("none", "left", "right")
            for steps in STEPS
        ),
        *((kind, "pre", "left", "chunks") for kind in KINDS if kind not in MAIN_KINDS),
        *(
            (kind, normalization, "left", "chunks")
            for kind in MAIN_KINDS
            for normalization in ("lns", "hybridnorm")
        ),
    ],
)
def test_cached_decoding_equals_one_forward(kind, normalization, side, steps):
    model = tiny_model(kind, normalization=normalization)
    mask = torch.ones_like(TOKENS) if side == "none" else padding(side)
    whole = model(TOKENS, mask, use_cache=False).logits
    cache, parts, end = None, [], 0
    for step in STEPS[steps]:
        start, end = end, end + step
        output = model(TOKENS[:, start:end], mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert_close(torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_tokens_leave_nothing_in_the_cache(kind):
    model = tiny_model(kind)
    mask = padding("left")
    output = model(TOKENS, mask, output_routing=True)
    cache = output.past_key_values
    layers = zip(
        model.config.routed_layer_types, cache.layers, output.routing, cache.tokens_per_layer(), strict=True
    )
    for layer_type, layer, processed, held in layers:
        assert held == processed.sum(1).tolist()
        assert layer.keys.block.shape[2] == layer.values.block.shape[2] == max(held)
        if layer_type in ROUTED:
            assert 0.1 < sum(held) / sum(LENGTHS) < 0.9
        else:
            assert held == list(LENGTHS)
    assert cache.get_seq_length() == TOKENS.shape[1]


@pytest.mark.parametrize("kind", ["dtf4", "mod", "dtrnet-expert"])
def test_nothing_routed_in_a_call(kind):
    model = tiny_model(kind)
    i = next(i for i, layer_type in enumerate(model.config.routed_layer_types) if layer_type in ROUTED)
    threshold = model.model.layers[i].causal_router.threshold
    usual = threshold.clone()
    threshold.fill_(1e9)
    cache = model(TOKENS[:, :3], use_cache=True).past_key_values
    assert cache.tokens_per_layer()[i] == [0, 0, 0]
    threshold.copy_(usual)
    assert model(TOKENS[:, 3:], past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_generate(kind):
    model = tiny_model(kind)
    mask = padding("left")
    greedy = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(TOKENS, **greedy, return_dict_in_generate=True)
    assert torch.equal(with_cache.sequences, model.generate(TOKENS, **greedy, use_cache=False))
    assert isinstance(with_cache.past_key_values, MegadynCache)
    beams = [
        model.generate(TOKENS, **greedy, num_beams=3, use_cache=use_cache) for use_cache in (True, False)
    ]
    assert torch.equal(*beams)
    sampling = greedy | {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "num_return_sequences": 2}
    torch.manual_seed(0)
    sampled = model.generate(TOKENS, **sampling)
    torch.manual_seed(0)
    assert torch.equal(sampled, model.generate(TOKENS, **sampling, use_cache=False))
    assert sampled.shape == (6, TOKENS.shape[1] + 10)


def test_generate_goes_on_from_a_cache():
    model = tiny_model("dtf4")
    first = model.generate(TOKENS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    then = model.generate(
        first.sequences, max_new_tokens=4, do_sample=False, past_key_values=first.past_key_values
    )
    assert torch.equal(then, model.generate(TOKENS, max_new_tokens=8, do_sample=False))


def test_refused_caches():
    model = tiny_model("dtf4")
    cache = model(TOKENS).past_key_values
    with pytest.raises(ValueError, match="holds 3 sequences, but the input has 2"):
        model(TOKENS[:2], past_key_values=cache)
    with pytest.raises(ValueError, match=r"crop\(-29\): must be from -28 to 0, because a routed model"):
        cache.crop(-29)
    with pytest.raises(ValueError, match="a routed model uses its own cache"):
        model.generate(TOKENS, max_new_tokens=2, cache_implementation="quantized")


@pytest.mark.parametrize("columns", [1, 3, 27, 29])
def test_a_mask_of_another_width_is_refused(columns):
    """The columns of a wider one are not padding to be cut: they could belong to any token."""
    model = tiny_model("dtf4")
    cache = model(TOKENS[:, :26]).past_key_values
    with pytest.raises(ValueError, match=rf"\[3, {columns}\]: must be \[3, 2\] or, with .* \[3, 28\]"):
        model(TOKENS[:, 26:], attention_mask=torch.ones(3, columns), past_key_values=cache)


# ---- who sees whom -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_causal_mode_does_not_see_the_future(kind):
    model = tiny_model(kind)
    before = model(TOKENS).logits
    for t in (1, WINDOW, 20):
        changed = TOKENS.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCABULARY
        after = model(changed).logits
        assert_close(after[:, :t], before[:, :t], atol=1e-5, rtol=0)
        assert not torch.allclose(after[:, t], before[:, t], atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "normalization"), [*((kind, "pre") for kind in KINDS), ("dtrnet-token", "hybridnorm")]
)
@pytest.mark.parametrize("mode", ["causal", "topk"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_as_alone(side, mode, kind, normalization):
    model = tiny_model(kind, routing_mode=mode, normalization=normalization)
    mask = padding(side).bool()
    together = model(TOKENS, mask, output_routing=True)
    for row in range(len(TOKENS)):
        alone = model(TOKENS[row : row + 1, mask[row]], output_routing=True)
        assert_close(together.logits[row, mask[row]], alone.logits[0], **CLOSE)
        for ours, theirs in zip(together.routing, alone.routing, strict=True):
            assert torch.equal(ours[row, mask[row]], theirs[0])
            assert not ours[row, ~mask[row]].any()


# ---- top-k ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dtf4", "mod", "dtrnet-expert"])
def test_topk_takes_exactly_k_of_each_row(kind):
    model = tiny_model(kind, routing_mode="topk")
    output = model(TOKENS, padding("left"), output_routing=True)
    for i, layer_type in enumerate(model.config.routed_layer_types):
        if layer_type not in ROUTED:
            continue
        assert output.routing[i].sum(1).tolist() == [int(0.4 * 28), int(0.4 * 19), 1]
        for row, processed in enumerate(output.routing[i]):
            real = padding("left")[row].bool()
            assert output.gates[i][row, processed].min() >= output.gates[i][row, real & ~processed].max()
    assert output.past_key_values is None


@pytest.mark.parametrize("kind", ["dense", "dtrnet-token"])
def test_kinds_without_topk_have_one_mode(kind):
    causal, topk = tiny_model(kind), tiny_model(kind, routing_mode="topk")
    assert torch.equal(causal(TOKENS).logits, topk(TOKENS).logits)
    assert topk(TOKENS).past_key_values is not None


def test_rules_choose_as_they_say():
    logit = tiny_model("mod-bce")(TOKENS, output_routing=True)
    assert torch.equal(logit.routing[1], logit.gates[1] > 0)
    choice = tiny_model("dtrnet-token")(TOKENS, output_routing=True)
    assert torch.equal(choice.routing[3], choice.gates[3] > 0.5)
    predicted = tiny_model("mod-predictor")
    predictor = predicted.model.layers[1].causal_router
    h = predicted(TOKENS, output_hidden_states=True).hidden_states[1]
    logit = torch.nn.functional.silu(h @ predictor.fc1.weight.T) @ predictor.fc2.weight[0]
    assert torch.equal(predicted(TOKENS, output_routing=True).routing[1], logit.sigmoid() >= 0.5)


def test_topk_ties_go_to_the_first():
    score = torch.tensor([[1.0, 2, 1, 1, 2, 1, 9], [5.0, 5, 5, 5, 5, 5, 5]])
    tokens = pack(torch.tensor([[True] * 6 + [False], [True] * 7]))
    chosen = best_of_each_row(score, tokens, capacity=0.5)
    assert chosen.tolist() == [[True, True, False, False, True, False, False], [True] * 3 + [False] * 4]


def test_topk_refuses_a_cache():
    model = tiny_model("dtf4", routing_mode="topk")
    for refused in (
        lambda: model(TOKENS, use_cache=True),
        lambda: model(TOKENS, past_key_values=MegadynCache(4)),
        lambda: model.generate(TOKENS, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="'topk' looks at the whole sequence.*use_cache=False"):
            refused()
    assert (
        model.generate(TOKENS, max_new_tokens=2, do_sample=False, use_cache=False).shape[1]
        == TOKENS.shape[1] + 2
    )


def test_unknown_mode_set_later_is_refused():
    model = tiny_model("dtf4")
    model.config.routing_mode = "top-k"
    with pytest.raises(ValueError, match="config.routing_mode = 'top-k': must be one of causal, topk"):
        model(TOKENS)


# ---- training ------------------------------------------------------------------------------------


# its new name is not in all of 5.x
@pytest.mark.filterwarnings("ignore:.*checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("dtf4", "causal"),
        ("dtf4", "topk"),
        ("mod", "causal"),
        ("mod-predictor", "causal"),
        ("dtrnet-token", "causal"),
        ("dtrnet-expert", "topk"),
    ],
)
def test_gradient_checkpointing_changes_nothing_and_never_chooses_again(kind, mode, reentrant):
    gradients, choices = [], []
    for checkpointing in (False, True):
        model = tiny_model(kind, routing_mode=mode).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        layer = next(layer for layer in model.model.layers if hasattr(layer, "choose"))
        choose = layer.choose
        layer.choose = lambda *args, choose=choose: choices.append(1) or choose(*args)
        with torch.enable_grad():
            model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(choices) == 2
    assert all(gradient is not None for gradient in gradients[0].values())
    assert_close(gradients[1], gradients[0])


def test_loss_shifts_labels_once():
    model = tiny_model("dtf4")
    labels = TOKENS.clone()
    labels[0, :5] = -100
    output = model(TOKENS, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(output.loss, expected)


# ---- precision and files -------------------------------------------------------------------------


ROUTER_TENSORS = {
    "dtf4": ("0.router.beta_ce", "1.causal_router.threshold"),
    "dtf-predictor": ("1.router.beta_ce", "2.causal_router.fc1.weight", "2.causal_router.fc2.weight"),
    "mod": ("1.router.weight", "1.causal_router.threshold"),
    "dtrnet-token": ("1.router.fc1.weight", "1.router.fc1.bias", "1.router.fc2.weight", "1.router.fc2.bias"),
}


@pytest.mark.parametrize("kind", ROUTER_TENSORS)
def test_router_stays_float32(tmp_path, kind):
    model = tiny_model(kind)
    before = {name: tensor.clone() for name, tensor in model.model.layers.state_dict().items()}
    model.save_pretrained(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(
            gate is None or gate.dtype == torch.float32 for gate in model(TOKENS, output_routing=True).gates
        )
    for low in (MegadynForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), model.bfloat16()):
        assert low.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        after = low.model.layers.state_dict()
        for name in ROUTER_TENSORS[kind]:
            assert torch.equal(after[name], before[name])
        gates = low(TOKENS, output_routing=True).gates
        assert {gate.dtype for gate in gates if gate is not None} == {torch.float32}


def test_weight_names_are_qwen2s_and_the_contracts():
    names = set(tiny_model("dtf5").state_dict())
    assert names >= set(qwen2_like(tiny_model("dense", num_hidden_layers=5)).state_dict())
    extra = names - set(tiny_model("dense", num_hidden_layers=5).state_dict())
    decision = [
        f"model.layers.{i}.{name}"
        for i in (0, 2)
        for name in (
            "prior.norm.weight",
            "prior.gate_proj.weight",
            "prior.up_proj.weight",
            "prior.down_proj.weight",
            "router.beta_ce",
            "router.beta_cu",
            "router.ce_log_offset",
            "router.cu_multiplier",
        )
    ]
    assert extra == {
        *decision,
        "model.layers.1.causal_router.threshold",
        "model.layers.3.causal_router.threshold",
    }


@pytest.mark.parametrize(
    ("kind", "layer", "expected"),
    [
        ("dtf-predictor", 2, {"causal_router.fc1.weight": (16, 32), "causal_router.fc2.weight": (1, 16)}),
        ("mod", 1, {"router.weight": (1, 32), "causal_router.threshold": (1,)}),
        (
            "mod-predictor",
            1,
            {
                "router.weight": (1, 32),
                "causal_router.fc1.weight": (16, 32),
                "causal_router.fc2.weight": (1, 16),
            },
        ),
        ("mod-bce", 1, {"router.weight": (1, 32)}),
        (
            "dtrnet-token",
            1,
            {
                "router.fc1.weight": (16, 32),
                "router.fc1.bias": (16,),
                "router.fc2.weight": (2, 16),
                "router.fc2.bias": (2,),
            },
        ),
        (
            "dtrnet-expert",
            0,
            {
                "router.fc1.weight": (16, 32),
                "router.fc1.bias": (16,),
                "router.fc2.weight": (2, 16),
                "router.fc2.bias": (2,),
                "causal_router.threshold": (1,),
            },
        ),
    ],
)
def test_weights_of_a_routed_layer(kind, layer, expected):
    got = tiny_model(kind).model.layers[layer].state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in got.items() if "router" in name} == expected


def test_weights_of_hybridnorm():
    def shapes(normalization):
        layer = tiny_model("dtrnet-token", normalization=normalization).model.layers[1]
        return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}

    pre, hybrid = shapes("pre"), shapes("hybridnorm")
    assert shapes("lns") == pre
    assert pre.keys() - hybrid.keys() == {"input_layernorm.weight"}
    assert {name: hybrid[name] for name in hybrid.keys() - pre.keys()} == {
        f"self_attn.{which}_norm.weight": (8,) for which in "qkv"
    }


# ---- configuration -------------------------------------------------------------------------------


TOKEN, EXPERT = LAYOUTS["dtrnet-token"][1], LAYOUTS["dtrnet-expert"][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing": DTF | {"kind": "moe"}}, "routing.kind = 'moe': must be one of dense, dtf, mod, dtrnet"),
        (
            {"routing": DTF | {"causal": "bce"}},
            "routing.causal .* = 'bce': must be one of threshold, predictor",
        ),
        ({"routing": DTF | {"capacity": 0}}, "routing.capacity = 0: must be a number in"),
        ({"routing": DTF | {"ma_window": 0}}, "routing.ma_window = 0"),
        ({"routing": DTF | {"relative_gate": 1}}, "routing.relative_gate = 1: must be true or false"),
        ({"routing": MOD | {"capacity": "0.5"}}, "routing.capacity = '0.5': must be a number in"),
        ({"routing": {"kind": "mod"}}, "routing.capacity is missing"),
        ({"routing": MOD | {"gate": "score"}}, "routing.gate .* = 'score': must be one of sigmoid, identity"),
        (
            {"routing": MOD | {"router_type": "surprise"}},
            "routing.router_type .* = 'surprise': must be one of linear",
        ),
        ({"routing": MOD | {"causal": "token_choice"}}, "must be one of threshold, predictor, bce"),
        (
            {"routing": MOD},
            "routed_layer_types.0. with routing.kind = mod = 'dtf_decision': must be one of dense, mod",
        ),
        ({"routing": EXPERT | {"capacity": 2}}, "routing.capacity = 2: must be a number in"),
        (
            {"routing": EXPERT | {"causal": "predictor"}},
            "routing.causal .* = 'predictor': must be one of threshold",
        ),
        (
            {"routing": {"kind": "dtrnet", "router_type": "expert_choice"}},
            "routing.capacity is missing.*expert_choice",
        ),
        (
            {"routing": TOKEN | {"causal": "threshold"}},
            "routing.causal .* = 'threshold': must be one of token_choice",
        ),
        (
            {"routing": TOKEN | {"router_type": "linear"}},
            "'linear': must be one of token_choice, expert_choice",
        ),
        ({"routing": TOKEN, "routed_layer_types": ["mod"] * 4}, "'mod': must be one of dense, dtrnet"),
        ({"routing": {"kind": "dtf", "capacity": 0.5}}, "routing.ma_window is missing"),
        ({"routing": {"kind": "dense"}}, "routed_layer_types.0. with routing.kind = dense = 'dtf_decision'"),
        (
            {"routed_layer_types": ["dense"] * 3},
            "routed_layer_types has 3 entries, but num_hidden_layers = 4",
        ),
        (
            {"routed_layer_types": ["dtf_decision", "dense", "dense", "dense"]},
            "routed_layer_types.1. = 'dense'",
        ),
        ({"routed_layer_types": ["dense", "dense", "dense", "dtf_decision"]}, "ends in a dtf_decision"),
        ({"routed_layer_types": ["mod"] * 4}, "'mod': must be one of"),
        ({"normalization": "post"}, "normalization = 'post': must be one of pre, lns, hybridnorm"),
        ({"routing_mode": "greedy"}, "routing_mode = 'greedy'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type = 'longrope'"),
        ({"num_key_value_heads": 3}, "must divide"),
    ],
)
def test_configurations_that_cannot_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("dtf4", **changes)


def test_defaults_of_routing():
    for kind, expected in (
        ("mod", {"gate": "sigmoid", "router_type": "linear", "causal": "threshold"}),
        ("dtrnet-token", {"router_type": "token_choice", "causal": "token_choice", "layout": "bilayer"}),
        ("dtrnet-expert", {"causal": "threshold"}),
    ):
        assert tiny_config(kind).routing.items() >= expected.items()
