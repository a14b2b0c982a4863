"""Several texts in a row: sequences of a padding-free batch, and documents of a model that was trained with a document mask."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from megadyn.config.config_map import document_fields, to_hf_config
from megadyn.hf.configuration_megadyn import MegadynConfig
from megadyn.hf.inputs_megadyn import context_of_call
from megadyn.hf.modeling_megadyn import MegadynForCausalLM
from megadyn.hf.packing_megadyn import pack
from megadyn.network import routed_layers, set_routing_mode, thresholds_of
from megadyn.parallel.params import name_of
from tests.helpers.tiny import KINDS as ENGINE_KINDS
from tests.helpers.tiny import tiny_config as engine_config
from tests.hf.test_modeling import qwen2_like
from tests.hf.tiny_models import KINDS, MAIN_KINDS, REST, ROUTED, WINDOW, random_tokens, tiny_model
from tests.routing.test_documents import EOD, network, packed

LENGTHS = (WINDOW + 6, 1, 9, 2 * WINDOW, 2)
TOKENS = random_tokens(1, sum(LENGTHS), seed=7)
PARTS = list(TOKENS.split(LENGTHS, dim=1))
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
CLOSE = {"atol": 1e-4, "rtol": 0}
MODES = ("causal", "topk")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def samples() -> list[dict[str, list[int]]]:
    return [{"input_ids": part[0].tolist()} for part in PARTS]


def batches() -> dict[str, dict]:
    """The same sequences in each form in which transformers and TRL give them, less the labels."""
    flattened = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
        samples(), return_tensors="pt"
    )
    lengths = {"cu_seq_lens_q": flattened["cu_seq_lens_q"], "cu_seq_lens_k": flattened["cu_seq_lens_k"]}
    packing = [{"input_ids": TOKENS[0].tolist(), "seq_lengths": list(LENGTHS)}]
    found = {
        "positions": DataCollatorWithFlattening()(samples(), return_tensors="pt"),
        "everything": flattened,
        "running lengths": {"input_ids": TOKENS, **lengths},
        "sequence numbers": {"input_ids": TOKENS, "seq_idx": flattened["seq_idx"]},
        "trl padding_free": DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(samples()),
        "trl packing": DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(packing),
        "trl packing, padded": DataCollatorForLanguageModeling(
            pad_token_id=0, return_position_ids=True, pad_to_multiple_of=16
        )(packing),
    }
    return {
        name: {key: value for key, value in batch.items() if key != "labels"} for name, batch in found.items()
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*KINDS, *REST])
def test_sequences_are_as_alone(kind, mode):
    model = tiny_model(kind, routing_mode=mode)
    alone = [model(part, output_routing=True) for part in PARTS]
    logits = torch.cat([output.logits for output in alone], dim=1)
    for name, batch in batches().items():
        if kind not in MAIN_KINDS and name != "everything":
            continue
        together = model(**batch, output_routing=True)
        assert_close(
            together.logits[:, : TOKENS.shape[1]],
            logits,
            **CLOSE,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        for i, processed in enumerate(together.routing):
            assert torch.equal(
                processed[:, : TOKENS.shape[1]], torch.cat([output.routing[i] for output in alone], dim=1)
            ), name
    assert (model(TOKENS).logits - logits).abs().max() > 0.1, "without borders the sequences see each other"


@pytest.mark.parametrize("normalization", ["lns", "hybridnorm"])
@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_sequences_are_as_alone_under_other_norms(kind, normalization):
    model = tiny_model(kind, normalization=normalization, attn_implementation="eager")
    alone = torch.cat([model(part).logits for part in PARTS], dim=1)
    assert_close(model(TOKENS, position_ids=POSITIONS, use_cache=False).logits, alone, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_sequences_in_padded_rows(kind, mode):
    """Two rows of several sequences, one with padding before and one behind; positions of padding mean nothing."""
    model = tiny_model(kind, routing_mode=mode)
    rows = [PARTS[:3], PARTS[2:]]
    width = max(sum(part.shape[1] for part in row) for row in rows) + 3
    tokens, positions, mask = (torch.zeros(2, width, dtype=torch.long) for _ in range(3))
    real = []
    for i, row in enumerate(rows):
        length = sum(part.shape[1] for part in row)
        real.append(slice(width - length, width) if i == 0 else slice(0, length))
        tokens[i, real[i]] = torch.cat(row, dim=1)[0]
        positions[i, real[i]] = torch.cat([torch.arange(part.shape[1]) for part in row])
        mask[i, real[i]] = 1
    together = model(tokens, mask, positions, use_cache=False).logits
    for i, row in enumerate(rows):
        assert_close(together[i, real[i]], torch.cat([model(part).logits[0] for part in row]), **CLOSE)


def test_positions_that_go_on_over_padding_are_one_sequence():
    model = tiny_model("dtf4")
    mask = torch.ones_like(TOKENS)
    mask[:, 5:9] = mask[:, -2:] = 0
    kept = mask[0].bool()
    whole = model(TOKENS[:, kept]).logits
    for positions in (mask.cumsum(1) - 1, torch.arange(TOKENS.shape[1])[None]):
        hidden = torch.zeros(1, TOKENS.shape[1], 32)
        segments = context_of_call(model.config, hidden, pack(mask.bool()), TOKENS, positions, None, None)[
            0
        ].tokens.segment_BC
        assert segments is None
    assert_close(model(TOKENS, mask, mask.cumsum(1) - 1).logits[:, kept], whole, **CLOSE)


def test_dense_is_qwen2():
    model = tiny_model("dense")
    theirs = qwen2_like(model)(TOKENS, position_ids=POSITIONS, use_cache=False).logits
    assert_close(model(TOKENS, position_ids=POSITIONS).logits, theirs, **CLOSE)


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_packed_prefill_goes_on_with_its_last_sequence(kind):
    model = tiny_model(kind)
    *before, last = PARTS[:4]
    tokens = torch.cat(before, dim=1)
    for steps in ([len(last[0])], [1] * len(last[0])):
        cache, parts = model(tokens, position_ids=POSITIONS[:, : tokens.shape[1]]).past_key_values, []
        for i, part in enumerate(last.split(steps, dim=1)):
            start = sum(steps[:i])
            # then they follow by themselves
            positions = torch.arange(start, start + part.shape[1])[None] if i == 0 else None
            parts.append(model(part, position_ids=positions, past_key_values=cache).logits)
        assert_close(torch.cat(parts, dim=1), model(last).logits, **CLOSE)


# ---- documents -----------------------------------------------------------------------------------


def exported(kind: str, norm: str) -> MegadynForCausalLM:
    """The export of the engine's `network(kind, norm, EOD)`, in float64."""
    engine, model = network(kind, norm, EOD), engine_config(kind, normalization=norm).model
    ours = (
        MegadynForCausalLM(MegadynConfig(**to_hf_config(model, "float64"), **document_fields(EOD)))
        .double()
        .eval()
    )
    weights = {name_of(param): param for param in engine.parameters()}
    for index, threshold in thresholds_of(routed_layers(engine)).items():
        weights[f"model.layers.{index}.causal_router.threshold"] = threshold.value.reshape(1)
    ours.load_state_dict(weights)
    return ours


@pytest.mark.parametrize("norm", ["pre", "hybridnorm"])
@pytest.mark.parametrize("kind", ENGINE_KINDS)
def test_documents_are_the_engines(kind, norm):
    """In one row, and in two of several documents, where top-k counts over the row."""
    engine, ours = network(kind, norm, EOD), exported(kind, norm)
    tokens = torch.cat([packed((13, 1, 9, 20, 2)), packed((3, 30, 1, 1, 10), seed=1)])
    for mode in MODES:
        set_routing_mode(routed_layers(engine), mode)
        ours.config.routing_mode = mode
        wanted = engine(tokens)
        assert_close(ours(tokens).logits, wanted, atol=1e-7, rtol=0)
        # as `generate` gives them: they do not start again, and mean one sequence
        positions = torch.arange(45)[None]
        assert_close(ours(tokens, position_ids=positions, use_cache=False).logits, wanted, atol=1e-7, rtol=0)
    ours.config.document_mask = False
    assert (ours(tokens).logits - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [[14, 20, 11], [1] * 45])
@pytest.mark.parametrize("kind", ENGINE_KINDS)
def test_documents_in_a_cache(kind, steps):
    model = exported(kind, "pre")
    tokens = torch.cat([packed((13, 1, 9, 20, 2)), packed((3, 30, 1, 1, 10), seed=1)])
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0  # the second row loses its first document to padding
    whole, cache, parts = model(tokens, mask, use_cache=False).logits, None, []
    for end, step in zip(itertools.accumulate(steps), steps, strict=True):
        output = model(tokens[:, end - step : end], mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert_close(torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()], atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", ["dense", "dtf4", "mod", "dtrnet-token"])
def test_generation_behind_documents(kind):
    model = tiny_model(kind, document_mask=True, eod_token_id=EOD)
    tokens = packed((5, 9, 4))[:, :-1] % 61
    for beams in (1, 3):
        greedy = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        sequences = model.generate(tokens, **greedy)
        assert torch.equal(sequences, model.generate(tokens, **greedy, use_cache=False))
        assert torch.equal(sequences[:, 14:], model.generate(tokens[:, 14:], **greedy)), (
            "earlier documents are not seen"
        )


def test_topk_counts_over_documents_but_within_sequences():
    model = tiny_model("mod", "topk", document_mask=True, eod_token_id=EOD)
    tokens = packed((10, 10, 20)) % 61
    routed = [i for i, kind in enumerate(model.config.routed_layer_types) if kind in ROUTED]
    whole = model(tokens, output_routing=True).routing
    positions = torch.cat([torch.arange(20), torch.arange(20)])[None]
    apart = model(tokens, position_ids=positions, output_routing=True).routing
    for i in routed:
        assert whole[i].sum() == int(0.4 * 40)
        assert (
            apart[i].split((20, 20), dim=1)[0].sum()
            == apart[i].split((20, 20), dim=1)[1].sum()
            == int(0.4 * 20)
        )


# ---- what is refused -----------------------------------------------------------------------------


def running(*lengths: int) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"cu_seq_lens_q": running(3, 4)}, ValueError, "cu_seq_lens_q must rise from 0 to 39"),
        (
            {"cu_seq_lens_q": running(39), "cu_seq_lens_k": running(4, 35)},
            ValueError,
            "cu_seq_lens_k differs from cu_seq_lens_q",
        ),
        (
            {"cu_seq_lens_q": running(30, 9), "max_length_q": 20},
            ValueError,
            "max_length_q = 20: must be at least 30",
        ),
        ({"max_length_q": 39}, ValueError, "need cu_seq_lens_q"),
        (
            {"cu_seq_lens_q": running(30, 9), "seq_idx": torch.zeros(1, 39)},
            ValueError,
            "must describe the same sequences",
        ),
        ({"block_tables": 1}, TypeError, "unexpected keyword argument 'block_tables'"),
        ({"token_type_ids": TOKENS}, TypeError, "unexpected keyword argument 'token_type_ids'"),
        ({"is_causal": False}, ValueError, "is_causal = False: this model supports only True"),
        ({"output_router_logits": True}, ValueError, "output_router_logits = True"),
        ({"cache_position": torch.arange(5, 44)}, ValueError, "cache_position: must start at 0"),
    ],
)
def test_keywords_that_would_be_ignored_are_refused(keywords, error, message):
    model = tiny_model("dtf4")
    for asked in (model, model.model):
        with pytest.raises(error, match=message):
            asked(TOKENS, **keywords)


def test_keywords_that_transformers_passes_are_taken():
    model = tiny_model("dtf4")
    wanted = model(TOKENS, labels=TOKENS)
    output = model(
        TOKENS,
        labels=TOKENS,
        num_items_in_batch=torch.tensor(100),
        cache_position=torch.arange(39),
        is_causal=True,
        output_router_logits=False,
        return_dict=True,
    )
    assert_close(output.loss, wanted.loss * 38 / 100)
    shifted = model(TOKENS, shift_labels=TOKENS.roll(-1, 1).index_fill(1, torch.tensor([38]), -100))
    assert_close(shifted.loss, wanted.loss)
    assert_close(model(TOKENS, return_dict=False)[0], wanted.logits)


def test_running_lengths_are_of_whole_sequences():
    model = tiny_model("dtf4")
    cache = model(TOKENS).past_key_values
    with pytest.raises(ValueError, match="whole sequences"):
        model(TOKENS, past_key_values=cache, cu_seq_lens_q=running(30, 9))
    with pytest.raises(ValueError, match="must not continue in the next row"):
        model(TOKENS.view(3, 13), cu_seq_lens_q=running(20, 19))


def test_documents_need_tokens():
    model = tiny_model("dtf4", document_mask=True, eod_token_id=EOD)
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="needs eod_token_id"):
        tiny_model("dtf4", document_mask=True)
