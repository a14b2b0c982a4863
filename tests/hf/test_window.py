"""Sliding windows in an export: with padding, in pieces, after rows were chosen or tokens taken back, and with documents."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from megadyn.hf.cache_megadyn import MegadynCache
from tests.conformance.checks import EOD, Case, logits_of, network_of, tokens_like
from tests.conformance.exported import write_export
from tests.hf.tiny_models import LAYOUTS, random_tokens, tiny_model

WINDOW = {"sliding_window": 5, "sliding_layers": [1, 0, 1, 1]}
KINDS = ("mod", "dtrnet-token", "dtf4")


def windowed(kind: str) -> torch.nn.Module:
    return tiny_model(kind, **WINDOW).double()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_in_pieces_with_padding_it_is_the_whole(kind: str) -> None:
    """Rows of different lengths; a piece of several tokens that is taken back; rows that change places."""
    model, tokens = windowed(kind), random_tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    whole = model(tokens, attention_mask=mask, use_cache=False).logits
    assert_close(whole[1, 6:], model(tokens[1:, 6:], use_cache=False).logits[0])
    assert (whole[0] - tiny_model(kind).double()(tokens, use_cache=False).logits[0]).abs().max() > 1e-3

    out = model(tokens[:, :8], attention_mask=mask[:, :8], use_cache=True)
    cache = out.past_key_values
    model(tokens[:, 3:8], attention_mask=mask[:, :13], past_key_values=cache)
    cache.crop(-5)
    found = [out.logits]
    for start, end in ((8, 12), (12, 13), (13, 20)):
        if start == 12:
            cache.batch_select_indices(torch.tensor([1, 0]))
            tokens, mask = tokens.flip(0), mask.flip(0)
        piece = model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
        found.append(piece if start < 12 else piece.flip(0))
    real = mask.flip(0).bool()
    assert_close(torch.cat(found, dim=1)[real], whole[real])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "mod", "dtrnet-token", "stt", "nested", "subskip"])
def test_a_cache_holds_only_what_later_tokens_see(kind: str) -> None:
    """A long text in pieces with padding and documents, of which one is taken back, and rows that change places: as the whole.
    A window of 16 looks after two more tokens."""
    window, count = 16, 3 if kind == "dense" else len(LAYOUTS[kind][0])
    windows = {"sliding_window": window, "sliding_layers": [1] * (count - 1) + [0]}
    model = tiny_model(kind, document_mask=True, eod_token_id=EOD, **windows).double()
    tokens, mask = random_tokens(2, 120), torch.ones(2, 120, dtype=torch.long)
    tokens[tokens == EOD] = EOD + 1
    tokens[0, (29, 33)] = tokens[1, 60] = EOD
    mask[1, :7] = 0
    whole = model(tokens, attention_mask=mask, use_cache=False).logits
    found, cache, most = [], None, 0
    for start, end in ((0, 40), (40, 47), *((at, at + 1) for at in range(47, 70)), (70, 75), (75, 120)):
        if (
            start == 70
        ):  # guesses, all of them wrong: the same tokens again, but with what the first of them sees
            model(tokens[:, 30:50], attention_mask=mask[:, :90], past_key_values=cache)
            cache.crop(-20)
        out = model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        found.append(out.logits)
        cache = out.past_key_values
        if 50 < start < 70:
            most = max(most, *(max(layer) for layer in held(cache)[:-1]))
    assert_close(torch.cat(found, dim=1)[mask.bool()], whole[mask.bool()])
    assert window // 8 < most <= window + window // 8 + 1
    if kind == "dense":
        assert held(cache)[-1] == [120, 113]


def held(cache: MegadynCache) -> list[list[int]]:
    """Of each layer, the tokens held by its rows; of a layer that takes tokens twice, of the second time."""
    return [(layer.again or layer).counts or [0] for layer in cache.layers]


@torch.no_grad()
def test_beams_and_guesses_change_nothing_in_a_window() -> None:
    model = tiny_model("dtf4", sliding_window=8, sliding_layers=[1, 1, 1, 1])
    prompt = torch.cat([random_tokens(1, 8)] * 3, dim=1)
    for search in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}):
        settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        wanted = model.generate(prompt, **settings, num_beams=search.get("num_beams", 1), use_cache=False)
        assert torch.equal(model.generate(prompt, **settings, **search), wanted)


@pytest.mark.parametrize("kind", ["dense", "mod", "dtrnet", "stt", "nested"])
def test_documents_and_windows_are_those_of_training(kind: str, tmp_path: Path) -> None:
    settings = {"sliding_window": 4, "window_layers": [0, 1, 3]}
    write_export(Case(kind, "window", ()), tmp_path / "hf", **settings)
    network, _ = network_of(Case(kind, "window", ()), eod=EOD, **settings)
    network = network.float()
    tokens, _ = tokens_like(2)
    tokens[0, 9] = tokens[1, 4] = tokens[1, 15] = EOD

    def logits(**changes: object) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf", trust_remote_code=True, **changes
        ).eval()
        with torch.no_grad():
            return model(tokens, use_cache=False).logits

    found = logits(document_mask=True, eod_token_id=EOD)
    assert_close(found, logits_of(network, tokens, "causal"), rtol=0, atol=2e-4)
    assert (found - logits()).abs().max() > 1e-2
