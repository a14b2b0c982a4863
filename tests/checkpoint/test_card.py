"""The model card of an export says what the run was, and Hugging Face's hub can read it."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from megadyn.checkpoint.card import last_records, model_card
from megadyn.config import Config
from megadyn.errors import UserError
from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.readers import Corpus
from tests.helpers.tiny import KINDS, tiny_config

HISTORY = {
    "lm_loss": {
        "iteration": 40,
        "lm_loss": 3.25,
        "routing": {"1": {"routed_fraction": 0.25, "causal_agreement": 0.75}, "3": {"routed_fraction": 0.5}},
    },
    "validation": {"iteration": 30, "validation": {"topk": 3.5, "causal": 3.75}},
}


def card_of(config: Config, history: dict = HISTORY, style: str = "megadyn") -> str:
    return model_card(config, 40, 160, history, style=style, precision="bf16", tokenizer="bytes")


def percentage_of_work(card: str) -> float:
    return float(re.search(r": ([\d.]+)% of the \S+ of the same model without routing", card)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_can_read_it(kind: str) -> None:
    text = card_of(tiny_config(kind))
    metadata = ModelCard(text).data.to_dict()
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"megadyn", "custom_code"} <= set(metadata["tags"])
    assert "license" not in metadata
    assert "# license: add the license" in text
    assert f"{160 * 24:,} tokens (40 steps of 4 sequences of 24)" in text
    assert "| training | " in text
    assert "None" not in text
    assert max(map(len, re.findall(r"^#+ .*$", text, re.M))) < 80


def test_losses_by_routing_only_where_there_are_two() -> None:
    routed, dense, own_choice = (card_of(tiny_config(kind)) for kind in ("mod", "dense", "dtrnet-token"))
    assert "| validation | topk | 3.5000 | 30 |\n| validation | causal | 3.7500 | 30 |" in routed
    assert "agreed on 75.0% of the choices" in routed
    for text in (dense, own_choice):
        assert "| validation |  | 3.7500 | 30 |" in text
        assert "topk" not in text
    assert "At the end of training 37.5% attended" in own_choice
    assert "Unknown:" in card_of(tiny_config("mod"), history={})


def test_each_validation_set_with_a_name_has_its_rows(tmp_path: Path) -> None:
    lines = [
        HISTORY["lm_loss"],
        {"iteration": 20, "validation/code": {"topk": 9.0, "causal": 9.0}},
        {
            "iteration": 30,
            "validation/code": {"topk": 2.5, "causal": 2.75, "bits_per_byte": {"causal": 1.25}},
        },
        {"iteration": 30, "validation/web": {"topk": 3.5, "causal": 3.75}},
        {"iteration": 50, "validation/web": {"topk": 9.0, "causal": 9.0}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = card_of(tiny_config("mod"), last_records(tmp_path / "metrics.jsonl", 40))
    assert "| validation/code | topk | 2.5000 | 30 |" in card
    assert "| validation/code | causal | 2.7500 (1.2500 bits per byte) | 30 |" in card
    assert "| validation/web | causal | 3.7500 | 30 |" in card
    assert "9.0" not in card


def test_a_loss_that_is_no_number_is_no_reason_not_to_export() -> None:
    card = card_of(
        tiny_config("mod"), {"validation": {"iteration": 5, "validation": {"topk": None, "causal": 3.0}}}
    )
    assert "| validation | topk | not finite | 5 |\n| validation | causal | 3.0000 | 5 |" in card


def test_work_follows_what_was_routed() -> None:
    """Of a layer, attention and feed-forward shrink with the share of tokens; of DTRNet's, attention's queries and keys alone."""
    half, few = (percentage_of_work(card_of(with_capacity(share))) for share in (0.5, 0.1))
    assert few < half < 100
    measured = {
        share: percentage_of_work(
            card_of(
                tiny_config("dtrnet-token"),
                {"lm_loss": {"iteration": 1, "lm_loss": 3.0, "routing": {"1": {"routed_fraction": share}}}},
            )
        )
        for share in (0.9, 0.1)
    }
    assert measured[0.1] < measured[0.9]
    assert "depends on the tokens' choices" in card_of(tiny_config("dtrnet-token"), history={})
    assert "without routing" not in card_of(tiny_config("dense"))


def with_capacity(share: float) -> Config:
    config = tiny_config("mod")
    config.model.routing.capacity = share
    return config


def test_a_bar_closes_no_cell() -> None:
    text = model_card(
        tiny_config("dense"), 1, 4, {}, style="megadyn", precision="fp32", tokenizer="differs on '<|x|>\n'"
    )
    assert r"| tokenizer | differs on '<\|x\|> ' |" in text


def test_where_the_weights_came_from() -> None:
    config = tiny_config("mod")
    assert "starting from" not in card_of(config)
    config.checkpoint.init_from = "/somewhere/Qwen2.5-3B"
    assert "starting from the weights of Qwen2.5-3B." in card_of(config)
    config.checkpoint.init_from = "Qwen/Qwen2.5-3B@v1"
    assert "starting from the weights of Qwen/Qwen2.5-3B@v1." in card_of(config)


def test_data_by_name_alone(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "some text"}\n{"text": "more"}\n')
    preprocess(Corpus([tmp_path / "corpus.jsonl"]), "byte", tmp_path / "web", append_eod=True)
    config = tiny_config()
    config.data.train = [
        {"prefix": str(tmp_path / "web"), "weight": 0.75},
        {"prefix": "/nowhere/code", "weight": 0.25},
    ]
    text = card_of(config)
    assert "| web | 0.75 | 2 | 15 |\n| code | 0.25 | ? | ? |" in text
    assert str(tmp_path) not in text
    (tmp_path / "web.json").write_text("{")
    assert "| web | 0.75 | ? | ? |" in card_of(config)  # no reason not to export


def test_qwen2_needs_no_code_of_ours() -> None:
    text = card_of(tiny_config("dense"), style="qwen2")
    assert "custom_code" not in ModelCard(text).data.tags
    assert "trust_remote_code=True" not in text


def test_last_records_end_at_the_checkpoint(tmp_path: Path) -> None:
    lines = [
        {"iteration": 1, "lm_loss": 3.0},
        {"iteration": 1, "validation": {"topk": 2.9}},
        {"iteration": 2, "lm_loss": 2.5},
        {"iteration": 2, "checkpoint": {}},
        {"iteration": 3, "lm_loss": 2.0},
    ]
    path = tmp_path / "metrics.jsonl"
    damaged = [b"\xff\xfe\0\n", b"7\n", b'{"lm_loss": 9.0}\n', b'{"iterat']
    path.write_bytes(b"".join([*(json.dumps(line).encode() + b"\n" for line in lines), *damaged]))
    found = last_records(path, 2)
    assert found == {"lm_loss": lines[2], "validation": lines[1]}
    assert last_records(tmp_path / "none.jsonl", 2) == {}
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        last_records(path, 2)


def test_a_run_in_phases_counts_its_tokens_and_says_whose_data_these_are():
    config = tiny_config("dense")
    text = model_card(
        config,
        40,
        160,
        {},
        style="megadyn",
        precision="bf16",
        tokenizer="bytes",
        consumed_tokens=5000,
        phases=["hold", "mix", "long"],
    )
    assert "on 5,000 tokens (40 steps of 4 sequences of 24 at the end)" in text
    assert "These are the data of the phase `long`. Before it the run had 2: `hold`, `mix`." in text
