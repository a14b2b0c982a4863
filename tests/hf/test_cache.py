"""The cache: written in place, copied and cropped, and what a decoded token does not do."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch.testing import assert_close

from megadyn.hf.cache_megadyn import MegadynCache
from megadyn.hf.packing_megadyn import pack, whole
from megadyn.hf.room_megadyn import Room, Slots
from tests.hf.test_modeling import TOKENS, padding, qwen2_like
from tests.hf.tiny_models import KINDS, LAYOUTS, MAIN_KINDS, ROUTED, random_tokens, tiny_model

CLOSE = {"atol": 1e-4, "rtol": 0}
MORE = random_tokens(3, 9, seed=11)
EOD = 6


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def looks_of(model, *args, **keywords) -> int:
    """How often a call waits for the device: each of these methods would."""
    count = 0
    methods = ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero")

    def counted(method):
        def call(*args, **keywords):
            nonlocal count
            count += 1
            return method(*args, **keywords)

        return call

    patches = [patch.object(torch.Tensor, name, counted(getattr(torch.Tensor, name))) for name in methods]
    for each in patches:
        each.start()
    try:
        model(*args, **keywords)
    finally:
        for each in patches:
            each.stop()
    return count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 5])
def test_a_routed_layer_waits_for_the_device_once_and_a_dense_one_never(kind, columns):
    model = tiny_model(kind)
    cache = model(TOKENS).past_key_values
    routed = sum(layer_type in ROUTED for layer_type in model.config.routed_layer_types)
    assert looks_of(model, MORE[:, :columns], past_key_values=cache) == routed
    mask = torch.ones(3, cache.columns + columns)
    assert looks_of(model, MORE[:, :columns], mask, past_key_values=cache) == routed + 1


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_keys_are_written_where_they_are(kind):
    model = tiny_model(kind)
    cache, moves = model(TOKENS[:, :4]).past_key_values, 0
    before = [layer.keys.block for layer in cache.layers]
    for column in range(4, 28):
        model(TOKENS[:, column : column + 1], past_key_values=cache)
        after = [layer.keys.block for layer in cache.layers]
        moves += sum(a is not b for a, b in zip(after, before, strict=True))
        before = after
    assert moves <= 6 * len(cache.layers), "a block of 4 holds 28 after it has grown by half five times"
    for layer, held in zip(cache.layers, cache.tokens_per_layer(), strict=True):
        assert max(held) <= layer.keys.block.shape[2] <= max(3, 1.5 * max(held))


@pytest.mark.parametrize("kind", ["dtf4", "mod", "stt"])
def test_only_chosen_rows_run(kind):
    model = tiny_model(kind)
    index = next(i for i, name in enumerate(model.config.routed_layer_types) if name in ROUTED)
    cache, rows = model(TOKENS[:, :12]).past_key_values, []
    model.model.layers[index].self_attn.q_proj.register_forward_hook(
        lambda _, inputs, __: rows.append(len(inputs[0]))
    )
    chosen = []
    for column in range(12, 28):
        out = model(TOKENS[:, column : column + 1], past_key_values=cache, output_routing=True)
        chosen.append(int(out.routing[index].sum()))
    assert rows == [count for count in chosen if count]
    assert {1, 2} & set(chosen), "some but not all rows are to be chosen, or the test shows nothing"


def test_a_mask_is_made_only_where_rows_differ():
    masks = []
    for kind, mask in (("dense", None), ("dense", padding("left")), ("mod", None)):
        model = tiny_model(kind)
        cache = model(TOKENS, mask).past_key_values
        for layer in cache.layers:
            made = layer.mask

            def noted(*args, made=made):
                masks[-1].append(made(*args) is not None)
                return made(*args)

            layer.mask = noted
        masks.append([])
        model(MORE[:, :1], past_key_values=cache)
    dense, padded, routed = masks
    assert dense == [False] * 3
    assert padded == [True] * 3
    assert routed[0] is routed[2] is False, "the dense layers"


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_eager_attention_decodes_the_same(kind):
    model = tiny_model(kind, attn_implementation="eager")
    mask = padding("left")
    cache = model(TOKENS[:, :20], mask[:, :20]).past_key_values
    parts = [
        model(TOKENS[:, i : i + 1], mask[:, : i + 1], past_key_values=cache).logits for i in range(20, 28)
    ]
    assert_close(torch.cat(parts, dim=1), model(TOKENS, mask).logits[:, 20:], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_prefix_goes_on_by_itself(kind):
    model = tiny_model(kind)
    prefix = model(TOKENS).past_key_values
    for tokens in (MORE, (MORE + 1) % 61):
        cache = copy.deepcopy(prefix)
        found = [model(part, past_key_values=cache).logits for part in tokens.split([1, 1, 7], dim=1)]
        together = torch.cat([TOKENS, tokens], dim=1)
        assert_close(torch.cat(found, dim=1), model(together).logits[:, 28:], **CLOSE)


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_a_cache_of_inference_mode_goes_on_outside(kind):
    model = tiny_model(kind)
    with torch.inference_mode():
        cache = model(TOKENS).past_key_values
        model(MORE[:, :1], past_key_values=cache)
    found = [model(MORE[:, i : i + 1], past_key_values=cache).logits for i in range(1, 9)]
    wanted = model(torch.cat([TOKENS, MORE], dim=1)).logits[:, 29:]
    assert_close(torch.cat(found, dim=1), wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["dense", "mod", "dtrnet-token"])
def test_gradients_flow_through_a_cache(kind):
    model, gradients = tiny_model(kind), []
    for steps in ([37], [28, 1, 1, 7]):
        model.zero_grad()
        with torch.enable_grad():
            cache, logits = None, []
            for part in torch.cat([TOKENS, MORE], dim=1).split(steps, dim=1):
                out = model(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                logits.append(out.logits)
            torch.cat(logits, dim=1).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)


# ---- rooms ---------------------------------------------------------------------------------------


def test_a_room_holds_what_rows_wrote_in_any_order():
    room, counts, wanted = Room(2), [0, 0, 0], [[], [], []]
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        columns = 1 + step % 3
        mask = torch.rand(3, columns, generator=generator) < (1.0 if step % 5 == 0 else 0.5)
        new = whole(3, columns, mask.device) if step % 5 == 0 else pack(mask)
        if not any(new.counts):
            continue
        values = torch.rand(len(new.counts), 2, new.valid_BC.shape[1], 4, generator=generator)
        slots = Slots.of(new, counts, mask.device)
        room.write(values, slots)
        for i, row in enumerate(slots.rows):
            counts[row] = slots.after[i]
            wanted[row] += list(values[i, :, : new.counts[i]].unbind(1))
    assert len(set(counts)) == 3
    for row, count in enumerate(counts):
        assert torch.equal(room.block[row, :, :count], torch.stack(wanted[row], dim=1))


# ---- cropping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_cropped_cache_never_saw_what_was_cropped(kind, side):
    model = tiny_model(kind)
    mask = torch.ones_like(TOKENS) if side == "none" else padding(side)
    whole_mask = torch.cat([mask, torch.ones_like(MORE)], dim=1)
    for start, end, columns in ((0, 28, 28), (0, 28, 3), (10, 28, 12), (27, 28, 1)):
        left = 28 - columns
        cache = model(TOKENS[:, :start], mask[:, :start]).past_key_values if start else None
        cache = model(TOKENS[:, start:end], mask[:, :end], past_key_values=cache).past_key_values
        cache.crop(0)
        cache.crop(-columns)
        assert cache.get_seq_length() == left
        then_mask = torch.cat([mask[:, :left], whole_mask[:, 28:]], dim=1)
        other = model(torch.cat([TOKENS[:, :left], MORE], dim=1), then_mask, use_cache=True)
        assert cache.seen == mask[:, :left].sum(1).tolist()
        found = [
            model(MORE[:, :4], then_mask[:, : left + 4], past_key_values=cache).logits,
            model(MORE[:, 4:], then_mask, past_key_values=cache).logits,
        ]
        assert_close(torch.cat(found, dim=1), other.logits[:, left:], **CLOSE)
        assert cache.tokens_per_layer() == other.past_key_values.tokens_per_layer()


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_cropping_goes_back_over_the_end_of_a_document(kind):
    model = tiny_model(kind, document_mask=True, eod_token_id=EOD)
    tokens = TOKENS.clone()
    tokens[:, (9, 22)] = EOD
    for columns in (3, 6, 8, 14):
        cache = model(tokens[:, :12]).past_key_values
        model(tokens[:, 12:], past_key_values=cache)
        cache.crop(-columns)
        left = 28 - columns
        together = torch.cat([tokens[:, :left], MORE], dim=1)
        found = torch.cat([model(MORE[:, i : i + 1], past_key_values=cache).logits for i in range(9)], dim=1)
        assert_close(found, model(together).logits[:, left:], **CLOSE)


def test_a_refused_call_changes_nothing():
    model = tiny_model("mod")
    cache = model(TOKENS).past_key_values
    with pytest.raises(TypeError, match="no_such_keyword"):
        model(MORE[:, :2], past_key_values=cache, no_such_keyword=1)
    cache.crop(-1)
    assert cache.get_seq_length() == TOKENS.shape[1] - 1


def test_cropping_beyond_the_latest_call_is_refused():
    model = tiny_model("mod")
    cache = model(TOKENS).past_key_values
    model(MORE[:, :2], past_key_values=cache)
    for columns in (-3, 1):
        with pytest.raises(ValueError, match=rf"crop\({columns}\): must be from -2 to 0"):
            cache.crop(columns)
    cache.crop(-2)
    with pytest.raises(ValueError, match="must be from -0 to 0"):
        cache.crop(-1)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_prompt_lookup_and_an_assistant_change_nothing(kind):
    model, assistant = tiny_model(kind), tiny_model("dense")
    prompt = torch.cat([TOKENS[:1, :8]] * 3, dim=1)
    greedy = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(prompt, **greedy)
    crops, crop = [], MegadynCache.crop
    with patch.object(MegadynCache, "crop", lambda cache, n: (crops.append(n), crop(cache, n))[1]):
        assert torch.equal(model.generate(prompt, **greedy, prompt_lookup_num_tokens=4), wanted)
    assert any(crops), "some guesses are to be wrong, or the test shows nothing"
    qwen = qwen2_like(assistant)
    assert torch.equal(model.generate(prompt, **greedy, assistant_model=qwen), wanted)
