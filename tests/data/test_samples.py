from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megadyn.data.batches import batches, sample_ids
from megadyn.data.samples import SampleSet, sample_places, sequences_of, split_documents
from megadyn.errors import UserError


def random_documents(rng: np.random.Generator, count: int) -> list[list[int]]:
    """Lengths of sequences per document: none, empty, short and long ones."""
    return [[int(rng.choice([0, 0, 1, 2, 5, 17])) for _ in range(rng.integers(0, 4))] for _ in range(count)]


def naive_epoch(dataset, documents, order, length):
    """The samples of one epoch in stream order, one token at a time; `order` permutes the split's sequences."""
    sequences = [i for k in documents for i in range(dataset.document_index[k], dataset.document_index[k + 1])]
    stream = [token for place in order(np.array(sequences)) for token in dataset[place].tolist()]
    return [stream[first:first + length + 1] for first in range(0, len(stream) - length, length)]


@pytest.mark.parametrize("case", range(40))
def test_samples_equal_a_naive_loop(case, write_dataset):
    rng = np.random.default_rng(case)
    dataset = write_dataset([*random_documents(rng, 20), [3]])
    documents = np.sort(rng.choice(dataset.num_documents, int(rng.integers(5, 21)), replace=False))
    tokens = sum(len(dataset.document(k)) for k in documents)
    length = int(rng.integers(1, max(2, min(30, tokens))))
    samples = SampleSet(dataset, sequence_length=length, seed=case, documents=documents)
    for epoch in range(3):
        def order(sequences, epoch=epoch):
            return np.random.default_rng([case, 1, epoch]).permutation(sequences)
        want = naive_epoch(dataset, documents, order, length)
        assert len(samples) == len(want) == (tokens - 1) // length
        shuffled = np.random.default_rng([case, 2, epoch]).permutation(len(want))
        got = [samples[epoch * len(samples) + s].tolist() for s in range(len(samples))]
        assert got == [want[k] for k in shuffled]

    unshuffled = SampleSet(dataset, sequence_length=length, seed=case, documents=documents, shuffle=False)
    assert [sample.tolist() for sample in unshuffled] == naive_epoch(dataset, documents, lambda s: s, length)


@pytest.mark.parametrize("case", range(50))
def test_places_equal_a_naive_walk(case):
    rng = np.random.default_rng(case)
    sizes = rng.choice([0, 0, 1, 2, 3, 8, 40], rng.integers(1, 30)).astype(np.int32)
    sizes[rng.integers(len(sizes))] = 9
    length = int(rng.integers(1, 9))
    where = [(i, offset) for i, size in enumerate(sizes) for offset in range(size)]     # of each stream position
    samples = (len(where) - 1) // length
    assert sample_places(sizes, length).tolist() == [list(where[k * length]) for k in range(samples + 1)]


def test_sample_order_is_part_of_the_contract(write_dataset):
    """A change here makes every resumed run see other samples: raise `LAYOUT` if it is meant."""
    samples = SampleSet(write_dataset([[4], [6], [3, 5], [7]]), sequence_length=4, seed=1234)
    assert [samples[s].tolist() for s in (0, 1, 2, len(samples), 10 * len(samples))] == [
        [20, 21, 22, 23, 24], [24, 10, 11, 12, 13], [0, 1, 2, 3, 4],
        [1, 2, 3, 4, 5], [18, 19, 20, 21, 22]]


def test_uint16_tokens_come_out_whole(write_dataset):
    samples = SampleSet(write_dataset([[65536]], dtype="<u2"), sequence_length=65535, seed=0)
    assert samples[0].dtype == np.int64
    assert samples[0].tolist() == list(range(65536))


def test_one_pass_ends_and_the_shuffled_stream_does_not(write_dataset):
    dataset = write_dataset([[10], [11]])
    one_pass = SampleSet(dataset, sequence_length=5, seed=0, shuffle=False)
    endless = SampleSet(dataset, sequence_length=5, seed=0)
    assert len(list(one_pass)) == len(list(endless)) == 4
    assert endless[10**9].shape == (6,)
    with pytest.raises(IndexError):
        one_pass[4]
    with pytest.raises(IndexError):
        endless[-1]


def test_seed_and_epoch_change_the_order(write_dataset):
    dataset = write_dataset([[5]] * 30)
    a, b = (SampleSet(dataset, sequence_length=5, seed=seed) for seed in (1, 2))
    n = len(a)
    orders = [np.concatenate([samples[first + s] for s in range(n)]).tolist() for samples, first in [(a, 0), (a, n), (b, 0)]]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_too_few_tokens_for_one_sample(write_dataset):
    dataset = write_dataset([[3], [], [2]])
    assert len(SampleSet(dataset, sequence_length=4, seed=0)) == 1
    with pytest.raises(UserError, match=r"the 5 tokens of 3 documents are too few .* sequence length 5, which takes 6"):
        SampleSet(dataset, sequence_length=5, seed=0)
    with pytest.raises(UserError, match="the 0 tokens of 1 documents"):
        SampleSet(dataset, sequence_length=1, seed=0, documents=np.array([1]))


def test_sequences_of_documents(write_dataset):
    dataset = write_dataset([[1], [], [2, 0, 3], [4], []])
    assert sequences_of(dataset, np.array([2, 1, 0, 4])).tolist() == [1, 2, 3, 0]
    assert sequences_of(dataset, np.array([], np.int64)).tolist() == []


@pytest.mark.parametrize(("count", "fraction", "held_out"),
                         [(2, 0.01, 1), (2, 0.99, 1), (100, 0.1, 10), (100, 0.001, 1), (7, 0, 0)])
def test_split_by_document(write_dataset, count, fraction, held_out):
    dataset = write_dataset([[1]] * count)
    train, validation = split_documents(dataset, fraction, seed=3)
    assert len(validation) == held_out
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(count))
    assert train.tolist() == sorted(train.tolist())
    again = split_documents(dataset, fraction, seed=3)
    assert np.array_equal(train, again[0])
    assert np.array_equal(validation, again[1])


def test_split_depends_on_the_seed_and_needs_two_documents(write_dataset):
    dataset = write_dataset([[1]] * 100)
    assert len({tuple(split_documents(dataset, 0.1, seed)[1].tolist()) for seed in range(5)}) == 5
    with pytest.raises(UserError, match="has 1 document, which cannot be split"):
        split_documents(write_dataset([[5]], name="one"), 0.1, seed=0)


class TestCache:
    @pytest.fixture
    def make(self, write_dataset, tmp_path):
        dataset = write_dataset([[5], [7], [9, 4]])

        def make(dataset=dataset, **changes):
            settings = {"sequence_length": 4, "seed": 1, "cache_dir": tmp_path / "cache"} | changes
            return SampleSet(dataset, **settings)

        return make

    def test_is_read_and_not_built_again(self, make, tmp_path, monkeypatch):
        first = make()[3].tolist()
        assert all(np.load(path).dtype == np.int64 for path in (tmp_path / "cache").iterdir())
        monkeypatch.setattr(SampleSet, "_build", None)
        assert make()[3].tolist() == first

    def test_default_folder_is_beside_the_dataset(self, make, tmp_path):
        make(cache_dir=None)[0]
        assert len(list((tmp_path / "dataset.cache").glob("*.npy"))) == 3

    def test_anything_that_changes_the_samples_changes_the_key(self, make, write_dataset, tmp_path):
        variants = [make(), make(seed=2), make(sequence_length=5), make(shuffle=False), make(documents=np.array([0, 2])),
                    make(documents=np.array([1, 2])), make(dataset=write_dataset([[5], [7], [4, 9]], name="other"))]
        for samples in variants:
            samples[0]
        assert len(list((tmp_path / "cache").iterdir())) == 3 * len(variants)

    @pytest.mark.parametrize("field", ["sequences", "places", "order"])
    @pytest.mark.parametrize("damage", [lambda raw: raw[:-8], lambda raw: raw + b"\0", lambda raw: b"", lambda raw: raw[:20],
                                        lambda raw: b"\0" * len(raw), lambda raw: raw.replace(b"<i8", b"<f8"),
                                        lambda raw: raw.replace(b"(", b"((")])
    def test_damaged_file_is_rebuilt(self, make, tmp_path, damage, field):
        want = [sample.tolist() for sample in make()]
        (path,) = (tmp_path / "cache").glob(f"*{field}.npy")
        sound = path.read_bytes()
        path.write_bytes(damage(sound))
        assert [sample.tolist() for sample in make()] == want
        assert path.read_bytes() == sound
        assert len(list((tmp_path / "cache").iterdir())) == 3

    def test_many_may_build_at_once(self, make, tmp_path):
        want = make(cache_dir=tmp_path / "alone")[2].tolist()
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda _: make()[2].tolist(), range(16)))
        assert got == [want] * 16
        assert len(list((tmp_path / "cache").iterdir())) == 3

    def test_no_part_of_a_file_appears_under_its_name(self, make, tmp_path, monkeypatch):
        def replace(self, target):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.replace", replace)
        with pytest.raises(UserError, match=r"cache: No space left on device"):
            make()[0]
        assert list((tmp_path / "cache").iterdir()) == []

    def test_folder_that_cannot_be_made_is_named(self, make, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"file/cache: Not a directory"):
            make(cache_dir=tmp_path / "file" / "cache")[0]


def test_ranks_share_a_step_without_overlap():
    for dp_size in (1, 2, 3, 6):
        shares = [sample_ids(12, 6, rank, dp_size) for rank in range(dp_size)]
        assert [s for share in shares for s in share] == list(range(12, 18))
    with pytest.raises(ValueError, match="6 cannot be shared by 4"):
        sample_ids(0, 6, 0, 4)


def test_ten_steps_hold_the_same_samples_for_every_topology(write_dataset):
    samples = SampleSet(write_dataset([[7], [30], [11, 2], [9]]), sequence_length=4, seed=5)     # 14 an epoch, 12 a step

    def steps(dp_size, micro_batch):
        return [np.concatenate([tokens for rank in range(dp_size)
                                for tokens, _ in batches(samples, 12 * step, global_batch=12, micro_batch=micro_batch,
                                                         dp_rank=rank, dp_size=dp_size)]).tolist() for step in range(10)]

    whole = steps(1, 12)
    assert whole == [[samples[12 * step + i][:-1].tolist() for i in range(12)] for step in range(10)]
    for dp_size, micro_batch in [(1, 1), (1, 4), (2, 3), (2, 6), (3, 2), (4, 1), (12, 1)]:
        assert steps(dp_size, micro_batch) == whole


def test_labels_are_the_next_tokens(write_dataset):
    samples = SampleSet(write_dataset([[50]]), sequence_length=6, seed=0)
    (tokens, labels), _ = batches(samples, 0, global_batch=4, micro_batch=2)
    assert tokens.shape == labels.shape == (2, 6)
    assert tokens.dtype == labels.dtype == np.int64
    assert np.array_equal(labels, tokens + 1)       # the dataset counts up
    with pytest.raises(ValueError, match="micro-batches of 3"):
        list(batches(samples, 0, global_batch=4, micro_batch=3))
