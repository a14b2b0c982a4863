"""A run that was killed or failed goes on from what is finished, and no other run's work is taken for its own."""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from megadyn.errors import UserError
from megadyn.prepare.merge import merge_datasets
from megadyn.prepare.parts import Parts
from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.readers import Corpus
from megadyn.tokenization.tokenizer import ByteTokenizer, Encoded, load_tokenizer
from tests.helpers.corpora import contents, corpus_file, random_texts

byte = partial(load_tokenizer, "byte")

Fails = Callable[[int], None]


@pytest.fixture
def fails_later(monkeypatch: pytest.MonkeyPatch) -> Fails:
    """fails_later(n): the byte tokenizer encodes n more batches, then is interrupted."""
    encode = ByteTokenizer.encode

    def fail(left: int) -> None:
        def encode_or_fail(self: ByteTokenizer, texts: Sequence[bytes], eod: int | None) -> Encoded:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return encode(self, texts, eod)

        monkeypatch.setattr(ByteTokenizer, "encode", encode_or_fail)

    return fail


def units_of(path: Path) -> int:
    units = len(Corpus([path]).units())
    assert units > 10
    return units


@pytest.mark.parametrize("seed", [None, 1])
def test_an_interrupted_run_keeps_its_finished_parts(tmp_path, small_units, fails_later, seed):
    """In files of their own until they are joined, which for a shuffled dataset is at the end."""
    path = corpus_file(tmp_path / "a.jsonl", random_texts(60))
    preprocess(Corpus([path]), "byte", tmp_path / "whole", shuffle_seed=seed)
    for left in (7, 2, 0, units_of(path) - 9):  # the last run fails if any part is encoded again
        fails_later(left)
        if left < 8:
            with pytest.raises(KeyboardInterrupt):
                preprocess(Corpus([path]), "byte", tmp_path / "x", shuffle_seed=seed)
            assert not [*tmp_path.glob("x.[bij]*"), *tmp_path.glob(".x*")]
        else:
            preprocess(Corpus([path]), "byte", tmp_path / "x", shuffle_seed=seed)
        finished = {path.stem for path in tmp_path.glob("x.parts/*.json")}
        files = {path.stem for path in tmp_path.glob("x.parts/*.bin")}
        assert files == (finished if seed else {"joined"} if finished else set())
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")
    assert not (tmp_path / "x.parts").exists()


def test_a_damaged_part_is_encoded_again(tmp_path, small_units, fails_later):
    path = corpus_file(tmp_path / "a.jsonl", random_texts(60))
    preprocess(Corpus([path]), "byte", tmp_path / "whole", shuffle_seed=1)
    fails_later(7)
    with pytest.raises(KeyboardInterrupt):
        preprocess(Corpus([path]), "byte", tmp_path / "x", shuffle_seed=1)
    parts = sorted(tmp_path.glob("x.parts/*.bin"))
    parts[3].write_bytes(parts[3].read_bytes()[:-1] + b"?")
    fails_later(units_of(path) - 7 + 1)  # fails if any of the other six is encoded again
    preprocess(Corpus([path]), "byte", tmp_path / "x", shuffle_seed=1)
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")


@pytest.mark.parametrize("how", ["changed", "cut", "lengths", "list", "no list", "all of it"])
def test_damage_to_what_is_joined_is_found(tmp_path, small_units, fails_later, how):
    """What is sound before it is kept."""
    path = corpus_file(tmp_path / "a.jsonl", random_texts(60))
    preprocess(Corpus([path]), "byte", tmp_path / "whole")
    fails_later(7)
    with pytest.raises(KeyboardInterrupt):
        preprocess(Corpus([path]), "byte", tmp_path / "x")
    folder = tmp_path / "x.parts"
    raw, names = (folder / "joined.bin").read_bytes(), (folder / "joined.txt").read_text().split()
    assert len(names) == 7
    sound = 6
    match how:
        case "changed":
            (folder / "joined.bin").write_bytes(raw[:-1] + b"?")
        case "cut":
            (folder / "joined.bin").write_bytes(raw[:-1])
        case "lengths":
            (folder / f"{names[6]}.len").unlink()
        case "list":
            (folder / "joined.txt").write_bytes("\n".join(names).encode()[:-1] + b"\xb8\n")
        case "no list":
            (folder / "joined.txt").unlink()
            sound = 0
        case "all of it":
            (folder / "joined.bin").unlink()
            sound = 0
    fails_later(units_of(path) - sound)
    if how == "changed":
        with pytest.raises(
            UserError, match=r"joined\.bin: damaged; the same command continues from its intact part"
        ):
            preprocess(Corpus([path]), "byte", tmp_path / "x")
        assert (folder / "joined.txt").read_text().split() == names[:6]
    preprocess(Corpus([path]), "byte", tmp_path / "x")
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("named", [1, 2])
def test_a_run_killed_while_its_files_get_their_names_goes_on(
    tmp_path, small_units, fails_later, monkeypatch, seed, named
):
    path = corpus_file(tmp_path / "a.jsonl", random_texts(60))
    preprocess(Corpus([path]), "byte", tmp_path / "whole", shuffle_seed=seed)
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        done = real(self, target)
        if target.suffix == (".bin", ".json")[named - 1] and target.parent == tmp_path:
            os._exit(9)
        return done

    if os.fork() == 0:
        try:
            monkeypatch.setattr(Path, "replace", replace)
            preprocess(Corpus([path]), "byte", tmp_path / "x", shuffle_seed=seed)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
    assert len(list(tmp_path.glob("x.[bij]*"))) == named
    fails_later(0)
    preprocess(Corpus([path]), "byte", tmp_path / "x", shuffle_seed=seed)  # and nothing is encoded again
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")
    assert not (tmp_path / "x.parts").exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_given_twice_is_read_twice(tmp_path, small_units, fails_later, workers):
    """Its parts are alike, but each is joined once; also by a run that finds some joined already."""
    path = corpus_file(tmp_path / "a.jsonl", random_texts(60))
    preprocess(Corpus([path]), "byte", tmp_path / "once")
    twice = Corpus([path, path])
    if workers == 1:
        fails_later(units_of(path) - 3)
        with pytest.raises(KeyboardInterrupt):
            preprocess(twice, "byte", tmp_path / "x")
        fails_later(1000)
    preprocess(twice, "byte", tmp_path / "x", workers=workers)
    merge_datasets([tmp_path / "once"] * 2, tmp_path / "want")
    assert contents(tmp_path / "x", ("bin", "idx")) == contents(tmp_path / "want", ("bin", "idx"))


@pytest.mark.parametrize("limit", [None, 40])
def test_what_is_joined_is_taken_up_as_far_as_the_input_is_the_same(
    tmp_path, small_units, fails_later, limit
):
    first, second = (corpus_file(tmp_path / f"{name}.jsonl", random_texts(30)) for name in "ab")
    before = [Corpus([first, second]), Corpus([second, first])][limit is not None]
    fails_later(12)
    with pytest.raises(KeyboardInterrupt):
        preprocess(before, "byte", tmp_path / "x")
    fails_later(1000)
    preprocess(Corpus([first]), "byte", tmp_path / "x", max_documents=limit)
    preprocess(Corpus([first]), "byte", tmp_path / "whole", max_documents=limit)
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["input", "tokenizer", "eod", "text_key"])
def test_parts_of_another_input_or_option_are_not_used(tmp_path, small_units, change, tokenizer_folder):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text, "other": text.upper()}) for text in random_texts(60)]
    path.write_text("\n".join([*lines, "broken"]))
    with pytest.raises(UserError):
        preprocess(Corpus([path]), "byte", tmp_path / "x")
    assert len(list((tmp_path / "x.parts").glob("*.json"))) > 5
    if change == "input":
        path.write_text(path.read_text().replace("self", "flesh"[1:]))  # of the same size
    for name in "xy":
        preprocess(
            Corpus([path], text_key="other" if change == "text_key" else "text", on_error="skip"),
            tokenizer_folder if change == "tokenizer" else "byte",
            tmp_path / name,
            append_eod=change == "eod",
        )
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


def test_a_second_run_on_one_prefix_is_refused(tmp_path):
    path = corpus_file(tmp_path / "a.jsonl", ["text"])
    with (
        Parts(tmp_path / "x").locked(),
        pytest.raises(UserError, match=r"x\.parts: another run is writing this dataset"),
    ):
        preprocess(Corpus([path]), "byte", tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    preprocess(Corpus([path]), "byte", tmp_path / "x")


def test_output_of_an_earlier_run_is_no_input(tmp_path, small_units):
    path = corpus_file(tmp_path / "a.jsonl", random_texts(30))
    (tmp_path / "b.jsonl").write_text("broken")
    with pytest.raises(UserError, match="invalid JSON"):
        preprocess(Corpus([tmp_path]), "byte", tmp_path / "x")
    (tmp_path / "b.jsonl").unlink()
    record = preprocess(Corpus([tmp_path]), "byte", tmp_path / "x")
    again = preprocess(Corpus([tmp_path]), "byte", tmp_path / "x", overwrite=True)
    assert record == again
    assert record.documents == 30
    assert path.exists()
