import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megadyn.data.batches import micro_batch_ids, read_batch, sample_ids
from megadyn.data.indexed import IndexedDataset
from megadyn.data.indexed_writer import IndexedWriter
from megadyn.data.samples import SampleSet, sample_places, sequences_of, split_documents
from megadyn.errors import UserError


def random_documents(rng: np.random.Generator, count: int) -> list[list[int]]:
    """Lengths of sequences per document: none, empty, short and long ones."""
    return [[int(rng.choice([0, 0, 1, 2, 5, 17])) for _ in range(rng.integers(0, 4))] for _ in range(count)]


def mask(dataset, documents) -> np.ndarray:
    """The documents as `SampleSet` takes them."""
    return np.isin(np.arange(dataset.num_documents), documents)


def naive_epoch(dataset, documents, order, length):
    """The samples of one epoch in stream order, one token at a time; `order` permutes the split's sequences."""
    sequences = [
        i for k in documents for i in range(dataset.document_index[k], dataset.document_index[k + 1])
    ]
    stream = [token for place in order(np.array(sequences)) for token in dataset[place].tolist()]
    return [stream[first : first + length + 1] for first in range(0, len(stream) - length, length)]


@pytest.mark.parametrize("case", range(40))
def test_samples_equal_a_naive_loop(case, write_dataset):
    rng = np.random.default_rng(case)
    dataset = write_dataset([*random_documents(rng, 20), [3]])
    documents = np.sort(rng.choice(dataset.num_documents, int(rng.integers(5, 21)), replace=False))
    tokens = sum(len(dataset.document(k)) for k in documents)
    length = int(rng.integers(1, max(2, min(30, tokens))))
    samples = SampleSet(dataset, sequence_length=length, seed=case, documents=mask(dataset, documents))
    for epoch in range(3):

        def order(sequences, epoch=epoch):
            return np.random.default_rng([case, 1, epoch]).permutation(sequences)

        want = naive_epoch(dataset, documents, order, length)
        assert len(samples) == len(want) == (tokens - 1) // length
        shuffled = np.random.default_rng([case, 2, epoch]).permutation(len(want))
        got = [samples[epoch * len(samples) + s].tolist() for s in range(len(samples))]
        assert got == [want[k] for k in shuffled]

    unshuffled = SampleSet(
        dataset, sequence_length=length, seed=case, documents=mask(dataset, documents), shuffle=False
    )
    assert [sample.tolist() for sample in unshuffled] == naive_epoch(dataset, documents, lambda s: s, length)

    for place in rng.integers(0, 2 * len(samples), 5).tolist():  # a file is the sequences, one after another
        assert np.array_equal(dataset.tokens[samples.places(place)], samples[place])

    ids = rng.integers(0, 3 * len(samples), 20)  # of several epochs, some twice, in any order
    for dataset_read in (dataset, IndexedDataset(dataset.prefix, mmap=False)):
        again = SampleSet(dataset_read, sequence_length=length, seed=case, documents=mask(dataset, documents))
        assert np.array_equal(again.take(ids), np.stack([samples[int(s)] for s in ids]))
    assert samples.take([]).shape == (0, length + 1)


def naive_places(sizes: list[int], length: int) -> list[list[int]]:
    """Rows of a sample index by its definition: along the stream, note sequence and offset at every `length`-th token."""
    rows, position = [], 0
    tokens = sum(sizes)
    for sequence, size in enumerate(sizes):
        for offset in range(size):
            if position % length == 0 and position // length <= (tokens - 1) // length:
                rows.append([sequence, offset])
            position += 1
    return rows


def test_places_equal_a_naive_walk():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        sizes = rng.choice([0, 0, 1, 2, 3, 8, 40], rng.integers(1, 30))
        sizes[rng.integers(len(sizes))] = 9
        length = int(rng.choice([1, 2, 3, 8, 9, 30]))
        assert sample_places(sizes.astype(np.int32), length).tolist() == naive_places(sizes.tolist(), length)


def test_sample_order_is_part_of_the_contract(write_dataset):
    """A change here makes every resumed run see other samples: raise `LAYOUT` if it is meant."""
    samples = SampleSet(write_dataset([[4], [6], [3, 5], [7]]), sequence_length=4, seed=1234)
    assert [samples[s].tolist() for s in (0, 1, 2, len(samples), 10 * len(samples))] == [
        [20, 21, 22, 23, 24],
        [24, 10, 11, 12, 13],
        [0, 1, 2, 3, 4],
        [1, 2, 3, 4, 5],
        [18, 19, 20, 21, 22],
    ]


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
        one_pass.take([0, 4])
    with pytest.raises(IndexError):
        endless[-1]


@pytest.mark.parametrize("mmap", [True, False])
def test_samples_beyond_2_31_tokens_and_2_32_bytes(tmp_path, mmap):
    """A sparse dataset of 2^32 tokens and some, whose last token stands behind the 8 GiB."""
    lengths = [2**31 - 1] * 2 + [7]
    with IndexedWriter(tmp_path / "x", "<u2") as writer:
        writer._bin.truncate(2 * sum(lengths))
        writer._bin.seek(2 * (sum(lengths) - 7))
        writer._write(np.arange(1, 8, dtype="<u2").view(np.uint8).data)
        writer._add_counts(np.array(lengths), np.array([1, 1, 1]))
        writer.finish()
    length = 1717300  # divides all but one of the tokens
    samples = SampleSet(
        IndexedDataset(tmp_path / "x", mmap=mmap), sequence_length=length, seed=0, shuffle=False
    )
    assert len(samples) == 2501
    assert samples[0].sum() == samples[1251].sum() == 0  # the second crosses 2^31
    assert samples[2500][:-7].sum() == 0
    assert samples[2500][-7:].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_seed_and_epoch_change_the_order(write_dataset):
    dataset = write_dataset([[5]] * 30)
    a, b = (SampleSet(dataset, sequence_length=5, seed=seed) for seed in (1, 2))
    n = len(a)
    orders = [
        np.concatenate([samples[first + s] for s in range(n)]).tolist()
        for samples, first in [(a, 0), (a, n), (b, 0)]
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_too_few_tokens_for_one_sample(write_dataset):
    dataset = write_dataset([[3], [], [2]])
    assert len(SampleSet(dataset, sequence_length=4, seed=0)) == 1
    with pytest.raises(
        UserError, match=r"the 5 tokens of 3 documents are too few .* sequence length 5, which needs 6"
    ):
        SampleSet(dataset, sequence_length=5, seed=0)
    with pytest.raises(UserError, match="the 0 tokens of 1 documents"):
        SampleSet(dataset, sequence_length=1, seed=0, documents=mask(dataset, [1]))


def test_sequences_of_documents(write_dataset):
    dataset = write_dataset([[1], [], [2, 0, 3], [4], []])
    assert sequences_of(dataset, mask(dataset, [1, 2, 4])).tolist() == [False, True, True, True, False]
    assert not sequences_of(dataset, mask(dataset, [])).any()


@pytest.mark.parametrize(
    ("count", "validation", "test", "held_out"),
    [
        (2, 0.01, 0, (1, 0)),
        (2, 0.99, 0, (1, 0)),
        (100, 0.1, 0, (10, 0)),
        (100, 0.001, 0, (1, 0)),
        (7, 0, 0, (0, 0)),
        (100, 0.1, 0.25, (10, 25)),
        (3, 0.01, 0.01, (1, 1)),
        (3, 0.5, 0.4, (1, 1)),
        (10, 0.5, 0.49, (5, 4)),
        (2, 0, 0.01, (0, 1)),
        (1, 0, 0, (0, 0)),
    ],
)
def test_split_by_document(write_dataset, count, validation, test, held_out):
    dataset = write_dataset([[1]] * count)
    split = split_documents(dataset, validation, test, seed=3)
    assert (split.validation.sum(), split.test.sum()) == held_out
    assert np.array_equal(np.stack(split).sum(axis=0), np.ones(count))  # each document is for one thing
    assert np.array_equal(np.stack(split), np.stack(split_documents(dataset, validation, test, seed=3)))


def test_the_split_is_part_of_the_contract(write_dataset):
    """A change here trains on what earlier checkpoints were validated on."""
    split = split_documents(write_dataset([[1]] * 20), 0.2, 0.1, seed=1234)
    order = np.random.default_rng([1234, 0]).permutation(20)
    assert np.flatnonzero(split.validation).tolist() == sorted(order[:4])
    assert np.flatnonzero(split.test).tolist() == sorted(order[4:6])


def test_split_depends_on_the_seed_and_needs_a_document_for_each_part(write_dataset):
    dataset = write_dataset([[1]] * 100)
    assert len({split_documents(dataset, 0.1, 0, seed).validation.tobytes() for seed in range(5)}) == 5
    with pytest.raises(UserError, match="has 1 document, too few for a split into 2"):
        split_documents(write_dataset([[5]], name="one"), 0.1, 0, seed=0)
    with pytest.raises(UserError, match="has 2 documents, too few for a split into 3"):
        split_documents(write_dataset([[5]] * 2, name="two"), 0.1, 0.1, seed=0)


def build_in_a_process(prefix: Path, cache: Path, barrier) -> None:
    samples = SampleSet(IndexedDataset(prefix), sequence_length=4, seed=1, cache_dir=cache)
    for epoch in range(20):
        barrier.wait(30)
        samples[epoch * len(samples)]


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
        monkeypatch.setattr(SampleSet, "_build", None)
        assert make()[3].tolist() == first

    def test_default_folder_is_beside_the_dataset(self, make, tmp_path):
        make(cache_dir=None)[0]
        assert len(list((tmp_path / "dataset.cache").iterdir())) == 1

    def test_anything_that_changes_the_samples_changes_the_key(self, make, write_dataset, tmp_path):
        other, moved = (
            write_dataset([[5], [7], [4, 9]], name="other"),
            write_dataset([[5], [7, 9], [4]], name="moved"),
        )
        variants = [
            make(),
            make(seed=2),
            make(sequence_length=5),
            make(documents=np.array([True, False, True])),
            make(documents=np.array([False, True, True])),
            make(dataset=other),
            make(dataset=moved, documents=np.array([True, False, True])),
        ]
        for samples in variants:
            samples[0]
        assert (
            len({samples.key for samples in variants})
            == len(list((tmp_path / "cache").iterdir()))
            == len(variants)
        )
        # the same samples
        assert make(dataset=moved).key == make(documents=np.ones(3, bool)).key == make().key
        assert make(shuffle=False).key != make().key

    def test_one_pass_in_file_order_needs_none(self, make, tmp_path):
        list(make(shuffle=False))
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize(
        "damage",
        [
            lambda raw: raw[:-4],
            lambda raw: raw + b"\0",
            lambda raw: b"",
            lambda raw: raw[:20],
            lambda raw: b"\0" * len(raw),
            lambda raw: raw[:40] + b"\7" + raw[41:],
            lambda raw: b"\7" + raw[1:],
            lambda raw: raw[:-1] + b"\7",
        ],
    )
    def test_damaged_file_is_rebuilt(self, make, tmp_path, damage, caplog, monkeypatch):
        monkeypatch.setattr("megadyn.data.samples.log.propagate", True)
        want = [sample.tolist() for sample in make()]
        (path,) = (tmp_path / "cache").iterdir()
        sound = path.read_bytes()
        path.write_bytes(damage(sound))
        assert [sample.tolist() for sample in make()] == want
        assert path.read_bytes() == sound
        assert f"{path} is damaged and will be rebuilt" in caplog.text

    def test_any_flipped_bit_is_noticed(self, make, tmp_path):
        want = [sample.tolist() for sample in make()]
        (path,) = (tmp_path / "cache").iterdir()
        sound = path.read_bytes()
        for bit in range(0, 8 * len(sound), 7):
            damaged = bytearray(sound)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert [sample.tolist() for sample in make()] == want

    def test_threads_may_build_at_once(self, make, tmp_path):
        want = make(cache_dir=tmp_path / "alone")[2].tolist()
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda _: make()[2].tolist(), range(16)))
        assert got == [want] * 16
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_processes_may_build_at_once(self, make, write_dataset, tmp_path):
        """Each of 20 epochs by 4 processes at the same moment, as the ranks of a run do."""
        dataset = write_dataset([[5], [7], [9, 4]])
        fork = multiprocessing.get_context("fork")
        barrier = fork.Barrier(4)
        ranks = [
            fork.Process(target=build_in_a_process, args=(dataset.prefix, tmp_path / "cache", barrier))
            for _ in range(4)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [0] * 4
        assert len(list((tmp_path / "cache").iterdir())) == 20  # and nothing temporary
        shared, alone = make(), make(cache_dir=tmp_path / "alone")
        assert np.array_equal(shared.take(range(20 * len(shared))), alone.take(range(20 * len(alone))))

    def test_no_part_of_a_file_appears_under_its_name(self, make, tmp_path, monkeypatch):
        def replace(self, target):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.replace", replace)
        with pytest.raises(
            UserError, match=r"cache: No space left on device; .*data\.cache names another folder"
        ):
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
    # 14 an epoch, 12 a step
    samples = SampleSet(write_dataset([[7], [30], [11, 2], [9]]), sequence_length=4, seed=5)

    def steps(dp_size, micro_batch):
        ranks = [
            [
                read_batch(samples, ids)[0]
                for ids in micro_batch_ids(
                    0, 120, global_batch=12, micro_batch=micro_batch, dp_rank=rank, dp_size=dp_size
                )
            ]
            for rank in range(dp_size)
        ]
        each = len(ranks[0]) // 10
        return [
            np.concatenate(
                [batch for rank in ranks for batch in rank[each * step : each * (step + 1)]]
            ).tolist()
            for step in range(10)
        ]

    whole = steps(1, 12)
    assert whole == [[samples[12 * step + i][:-1].tolist() for i in range(12)] for step in range(10)]
    for dp_size, micro_batch in [(1, 1), (1, 4), (2, 3), (2, 6), (3, 2), (4, 1), (12, 1)]:
        assert steps(dp_size, micro_batch) == whole


def test_labels_are_the_next_tokens(write_dataset):
    samples = SampleSet(write_dataset([[50]]), sequence_length=6, seed=0)
    (tokens, labels), _ = (
        read_batch(samples, ids) for ids in micro_batch_ids(0, 4, global_batch=4, micro_batch=2)
    )
    assert tokens.shape == labels.shape == (2, 6)
    assert tokens.dtype == labels.dtype == np.int64
    assert np.array_equal(labels, tokens + 1)  # the dataset counts up
    with pytest.raises(ValueError, match="micro-batches of 3"):
        list(micro_batch_ids(0, 4, global_batch=4, micro_batch=3))
