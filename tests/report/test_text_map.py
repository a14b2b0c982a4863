"""The decisions on a real text: those that the layers took, causally, token for token."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from megadyn.config import load_config
from megadyn.data.labels import Labels, write_labels
from megadyn.errors import UserError
from megadyn.network import routed_layers, thresholds_of
from megadyn.report.text_map import launch_folder, map_text, pieces, processed_tokens
from megadyn.tokenization.tokenizer import ByteTokenizer, SentencePieceTokenizer
from tests.helpers.networks import end_step, make_network
from tests.helpers.tiny import KINDS, VOCAB, tiny_config
from tests.report.conftest import TEXT

ROUTED = [kind for kind in KINDS if kind != "dense"]


def checkpoint_of(folder: Path) -> Path:
    return folder / "checkpoints" / "iteration-00000006"


@pytest.mark.parametrize("kind", ROUTED)
def test_the_map_is_what_the_layers_did(kind):
    """Against the layers' own count, and against runs on changed ends of the text, which a causal choice cannot see."""
    config = tiny_config(kind)
    network = make_network(config)
    ids = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(3))
    network(ids, ids)
    end_step(network)  # thresholds that part these tokens
    for layer in routed_layers(network):
        layer.monitor.read()
    layers, processed, _ = processed_tokens(network, ids, ids)
    assert layers == [
        i for i, name in enumerate(config.model.layer_types) if name not in ("dense", "dtf_decision")
    ]
    assert processed.shape == (len(layers), 24)
    assert processed.any() and not processed.all()
    records = {layer.index: layer.monitor.read() for layer in routed_layers(network)}
    if kind == "subskip":  # processed by one half or both
        for layer, share in zip(layers, processed.mean(axis=1), strict=True):
            halves = [float(records[layer][name]) for name in ("attention_fraction", "mlp_fraction")]
            assert max(halves) - 1e-6 <= share <= sum(halves) + 1e-6
    else:
        assert processed.mean(axis=1).tolist() == pytest.approx(
            [float(records[layer]["routed_fraction"]) for layer in layers]
        )
    other = ids.clone()
    other[:, 12:] = (other[:, 12:] + 5) % VOCAB
    again = make_network(config)
    for index, threshold in thresholds_of(routed_layers(again)).items():
        threshold.set_state(thresholds_of(routed_layers(network))[index].state(), torch.device("cpu"))
    changed = processed_tokens(again, other, other)[1]
    assert np.array_equal(changed[:, :12], processed[:, :12])
    assert np.array_equal(changed, processed) == kind.startswith("fixed")  # which looks at positions alone


@pytest.mark.parametrize("kind", ["dtf", "mod", "dtrnet-token"])
def test_a_checkpoint_is_run_on_the_first_validation_sample(kind, make_run):
    run = make_run(kind)
    whole, short = map_text(run, checkpoint_of(run), 999), map_text(run, checkpoint_of(run), 10)
    assert len(whole.pieces) == 24  # the run's sequence length
    raw = TEXT.encode()[:24]
    assert "".join(whole.pieces) == raw.decode(errors="replace")
    assert np.array_equal(short.processed, whole.processed[:, :10])
    assert whole.loss != short.loss
    assert 0 < whole.loss < 50


def test_labels_beside_the_dataset_say_what_each_token_predicts(make_run, tmp_path):
    run = make_run("mod")
    assert map_text(run, checkpoint_of(run), 10).following == []
    count = len(TEXT.encode())
    hops = (np.arange(count) % 5).astype(np.uint8)
    digest = hashlib.sha256((tmp_path / "text.bin").read_bytes()).hexdigest()
    write_labels(tmp_path / "text", Labels(("text", "state"), (hops > 0).astype(np.uint8), hops), digest)
    found = map_text(run, checkpoint_of(run), 10).following
    assert found == [("state" if place % 5 else "text", place % 5) for place in range(1, 11)]


def test_pieces_put_together_are_the_text(tmp_path):
    text = TEXT[:60]
    with (tmp_path / "pieces.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT.replace("\0", ""), "a b c"]),
            model_writer=file,
            vocab_size=290,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
    for tokenizer in (ByteTokenizer(), SentencePieceTokenizer(tmp_path / "pieces.model")):
        ids = tokenizer.encode_batch([text])[0].tolist()
        found = pieces(tokenizer, ids)
        assert len(found) == len(ids)
        assert "".join(found) == tokenizer.decode(ids)
        assert "é" in found, "a character of two tokens is one piece"
    half = pieces(ByteTokenizer(), "é".encode()[:1] + b"a" + "é".encode()[:1])  # bytes that are no character
    assert "".join(half) == "\ufffda\ufffd"


def test_relative_paths_count_from_where_the_run_was_started(tmp_path):
    config = tiny_config(output_dir="runs/a")
    assert launch_folder(tmp_path / "runs" / "a", config) == tmp_path
    assert launch_folder(tmp_path / "moved", config) == Path.cwd()
    assert launch_folder(tmp_path / "a", tiny_config(output_dir=str(tmp_path / "a"))) == Path.cwd()


def test_a_run_is_read_from_anywhere(make_run, monkeypatch, tmp_path):
    run = make_run()
    path = checkpoint_of(run) / "config.yaml"
    path.write_text(path.read_text().replace(f"{tmp_path}/", ""))
    assert load_config(path).output_dir == "run"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert len(map_text(run, checkpoint_of(run), 5).pieces) == 5
    assert Path.cwd() == elsewhere


def test_what_is_missing_is_said_in_a_sentence(make_run, tmp_path):
    dense = make_run("dense", "dense")
    with pytest.raises(UserError, match="dense"):
        map_text(dense, checkpoint_of(dense), 9)
    run = make_run("mod")
    path = checkpoint_of(run) / "config.yaml"
    text = path.read_text()
    for before, after, said in (
        ("path: byte", "path: gone", "gone: no such file"),
        (f"validation: {tmp_path}/text", "validation: null", "no validation set"),
        (f"validation: {tmp_path}/text", "validation: gone/text", "paths are relative to"),
    ):
        assert before in text
        path.write_text(text.replace(before, after))
        with pytest.raises(UserError, match=said):
            map_text(run, checkpoint_of(run), 9)
    path.write_text(text)
    weights = next(checkpoint_of(run).glob("weights-*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="expected"):
        map_text(run, checkpoint_of(run), 9)


def test_ids_of_another_tokenizer_are_refused(make_run, monkeypatch):
    run = make_run("mod")
    small = ByteTokenizer()
    small.vocab_size = 100
    monkeypatch.setattr("megadyn.report.text_map.load_tokenizer", lambda path: small)
    with pytest.raises(UserError, match="has only 100 ids"):
        map_text(run, checkpoint_of(run), 9)


def test_other_attention_backends_are_not_asked_for(make_run):
    """A run's flash attention needs a GPU; its map does not."""
    run = make_run("dtf")
    path = checkpoint_of(run) / "config.yaml"
    path.write_text(path.read_text().replace("attention: auto", "attention: flash"))
    assert load_config(path).model.attention == "flash"
    assert len(map_text(run, checkpoint_of(run), 5).pieces) == 5
