"""Token store: it gives back what was written, says what is wrong with it, and comes from S3."""

import fcntl
import hashlib
import json
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.data.tokens.pack import FIRST, TARGET, TOKEN, Blocks, Sequences, pack_text
from altiplano.data.tokens.shards import cache_root
from altiplano.data.tokens.store import IGNORE_INDEX, Batch, StoreWriter, TokenStore
from altiplano.errors import ArtifactError, MismatchError
from tests.helpers.s3 import Bucket

PAD = 3
documents_strategy = st.lists(
    st.lists(st.integers(1, 70_000), min_size=1, max_size=40), max_size=12
)


def write(directory: Path, blocks: list[Blocks], length: int, **given) -> StoreWriter:
    values = {"vocab_size": 100_000, "pad_id": PAD, "tokenizer_fingerprint": "f" * 64}
    writer = StoreWriter(directory, sequence_length=length, **{**values, **given})
    with writer:
        for part in blocks:
            writer.add(part)
    return writer


def packed(documents: list[list[int]], length: int, *, cross: bool = False) -> list[Blocks]:
    ids = np.concatenate([np.empty(0, np.int32), *(np.array(d, np.int32) for d in documents)])
    lengths = np.array([len(document) for document in documents], np.int64)
    return list(pack_text([Sequences(ids, lengths)], length, cross_documents=cross))


def some_blocks(count: int = 10, length: int = 8) -> list[Blocks]:
    """Two documents in each block, and padding in some."""
    rng = np.random.default_rng(1)
    return packed([rng.integers(4, 60, length // 2 - i % 2).tolist() for i in range(2 * count)], 8)


def everything(store: TokenStore) -> Batch:
    return store.batch(np.arange(store.num_blocks))


@settings(max_examples=40)
@given(
    documents=documents_strategy,
    length=st.integers(2, 24),
    blocks_per_shard=st.integers(1, 9),
    cross=st.booleans(),
    seed=st.integers(0, 9),
)
def test_store_gives_back_what_was_packed(
    documents: list[list[int]],
    length: int,
    blocks_per_shard: int,
    cross: bool,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("store")
    blocks = packed(documents, length, cross=cross)
    write(directory, blocks, length, blocks_per_shard=blocks_per_shard, cross_documents=cross)
    store = TokenStore.open(directory)
    tokens = np.concatenate([np.empty((0, length), int), *(part.tokens for part in blocks)])
    flags = np.concatenate([np.empty((0, length), int), *(part.flags for part in blocks)])
    assert (store.num_blocks, store.sequence_length) == tokens.shape
    assert store.num_tokens == (flags & TOKEN != 0).sum() == sum(map(len, documents))
    assert store.num_targets == (flags & TARGET != 0).sum()
    assert store.index.cross_documents is cross
    order = np.random.default_rng(seed).permutation(store.num_blocks)
    batch = store.batch(order)
    is_token = flags[order] & TOKEN != 0
    assert (batch.input_ids == np.where(is_token, tokens[order], PAD)).all()
    assert ((batch.segment_ids > 0) == is_token).all()
    assert (batch.labels != IGNORE_INDEX).sum() == store.num_targets
    for row, column in zip(*np.nonzero(batch.labels != IGNORE_INDEX), strict=True):
        assert batch.labels[row, column] == batch.input_ids[row, column + 1]
        assert batch.segment_ids[row, column] == batch.segment_ids[row, column + 1]
        assert batch.position_ids[row, column] + 1 == batch.position_ids[row, column + 1]
    store.verify()


def test_labels_and_positions_by_hand(tmp_path: Path) -> None:
    tokens = np.array([[1, 7, 2, 1, 9, 8, 2, 0]], np.int32)
    first, plain, target = FIRST | TOKEN, TOKEN, TARGET | TOKEN
    flags = np.array([[first, target, target, first, plain, target, target, 0]], np.uint8)
    write(tmp_path, [Blocks(tokens, flags)], 8)
    batch = TokenStore.open(tmp_path).batch(np.array([0]))
    no = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[1, 7, 2, 1, 9, 8, 2, PAD]]
    assert batch.labels.tolist() == [[7, 2, no, no, 8, 2, no, no]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 2, 0]]
    assert {array.dtype for array in vars(batch).values()} == {np.dtype(np.int64)}


def test_joined_documents_are_one_segment(tmp_path: Path) -> None:
    write(tmp_path, packed([[1, 7, 2], [1, 9, 2]], 4, cross=True), 4, cross_documents=True)
    batch = everything(TokenStore.open(tmp_path))
    no = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[1, 7, 2, 1], [9, 2, PAD, PAD]]
    assert batch.labels.tolist() == [[7, 2, 1, no], [2, no, no, no]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]


@pytest.mark.parametrize(("vocab_size", "bytes_per_token"), [(65_536, 2), (65_537, 4)])
def test_ids_take_as_few_bytes_as_they_can(
    vocab_size: int, bytes_per_token: int, tmp_path: Path
) -> None:
    ids = [1, vocab_size - 1]
    write(tmp_path, packed([ids], 2), 2, vocab_size=vocab_size)
    assert (tmp_path / "shard-00000.bin").stat().st_size == 2 * (bytes_per_token + 1)
    assert everything(TokenStore.open(tmp_path)).input_ids.tolist() == [ids]


def test_the_files_do_not_depend_on_how_blocks_were_added(tmp_path: Path) -> None:
    blocks = some_blocks()
    rows = [
        Blocks(part.tokens[row : row + 1], part.flags[row : row + 1])
        for part in blocks
        for row in range(len(part.tokens))
    ]
    write(tmp_path / "a", blocks, 8, blocks_per_shard=3)
    writer = write(tmp_path / "b", rows, 8, blocks_per_shard=3)
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == ["index.json", *(f"shard-0000{number}.bin" for number in range(3))]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert writer.fill_rate == writer.num_tokens / (writer.num_blocks * 8)


def test_a_store_takes_the_place_of_another(tmp_path: Path) -> None:
    write(tmp_path, some_blocks(), 8, blocks_per_shard=2)
    write(tmp_path, packed([[1, 5, 2]], 4), 4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.json", "shard-00000.bin"]
    assert everything(TokenStore.open(tmp_path)).input_ids.tolist() == [[1, 5, 2, PAD]]


def test_a_missing_or_truncated_shard_is_refused_with_both_sizes(tmp_path: Path) -> None:
    write(tmp_path, some_blocks(), 8, blocks_per_shard=4)
    file = tmp_path / "shard-00001.bin"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=r"shard-00001\.bin has 157 bytes, 160 are expected"):
        TokenStore.open(tmp_path)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"shard-00001\.bin is missing, 160 are expected"):
        TokenStore.open(tmp_path)


def test_verify_names_the_shard_that_was_changed(tmp_path: Path) -> None:
    write(tmp_path, some_blocks(), 8, blocks_per_shard=4)
    file = tmp_path / "shard-00001.bin"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    store = TokenStore.open(tmp_path)
    with pytest.raises(ArtifactError, match=r"shard-00001\.bin does not have the sha256"):
        store.verify()


def test_a_store_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path, some_blocks(), 8)
    TokenStore.open(tmp_path, tokenizer_fingerprint="f" * 64)
    with pytest.raises(MismatchError) as caught:
        TokenStore.open(tmp_path, tokenizer_fingerprint="e" * 64)
    assert all(word in str(caught.value) for word in ("f" * 16, "e" * 16, "prepare the data"))


def test_store_without_a_readable_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no token store \(cannot read .*index\.json: No such"):
        TokenStore.open(tmp_path)
    write(tmp_path, [], 8)
    index = json.loads((tmp_path / "index.json").read_text())
    for damage, message in (
        ("{", "cannot be read"),
        (json.dumps(index | {"format_version": 1}), "format version 1, this Altiplano reads 2"),
        (json.dumps(index | {"extra": 1}), "cannot be read .*extra"),
        ("{}", "cannot be read .*format_version"),
    ):
        (tmp_path / "index.json").write_text(damage)
        with pytest.raises(ArtifactError, match=message):
            TokenStore.open(tmp_path)


def test_writer_that_fails_leaves_no_store(tmp_path: Path) -> None:
    write(tmp_path, some_blocks(), 8)
    writer = StoreWriter(
        tmp_path, sequence_length=8, vocab_size=10, pad_id=PAD, tokenizer_fingerprint="f"
    )
    with pytest.raises(KeyError), writer:
        writer.add(some_blocks()[0])
        raise KeyError("stop")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([TOKEN, TOKEN], "begins a segment"),
        ([FIRST | TOKEN | TARGET, TOKEN], "first is no target"),
        ([FIRST | TOKEN, 0, TOKEN], "padding is at the end"),
    ],
)
def test_blocks_that_make_no_sense_are_our_own_bug(
    flags: list[int], message: str, tmp_path: Path
) -> None:
    block = Blocks(np.zeros((1, len(flags)), np.int32), np.array([flags], np.uint8))
    with pytest.raises(AssertionError, match=message):
        write(tmp_path, [block], len(flags))


def test_the_page_on_the_format_reads_a_store(root: Path, tmp_path: Path) -> None:
    """The lines for strangers in docs/token-store.md give what we read."""
    write(tmp_path, some_blocks(), 8, blocks_per_shard=4, vocab_size=100)
    page = (root / "docs" / "token-store.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict = {"directory": tmp_path}
    exec(snippet, found)
    batch = everything(TokenStore.open(tmp_path))
    assert (found["tokens"] == batch.input_ids).all()
    assert (found["segments"] == batch.segment_ids).all()
    is_target = np.zeros_like(batch.labels, bool)
    is_target[:, 1:] = batch.labels[:, :-1] != IGNORE_INDEX
    assert (found["is_target"] == is_target).all()


# Stores at a URL.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder where shards are kept; empty and of this test alone."""
    monkeypatch.setenv("ALTIPLANO_CACHE", str(tmp_path / "cache"))
    assert cache_root() == tmp_path / "cache" / "shards"
    return cache_root()


@pytest.fixture
def url(tmp_path: Path, cache: Path) -> Iterator[str]:
    """Write a store of several shards to fsspec's memory; yield its address."""
    import fsspec

    write(tmp_path / "local", some_blocks(), 8, blocks_per_shard=3)
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/local/", "/corpus/store/", recursive=True)
    yield "memory://corpus/store"
    memory.rm("/corpus", recursive=True)


def test_a_remote_store_is_the_local_one(url: str, tmp_path: Path, cache: Path) -> None:
    store, local = TokenStore.open(url), TokenStore.open(tmp_path / "local")
    assert not cache.exists(), "opening fetches no shard"
    assert store.batch(np.array([7])).input_ids.tolist() == (
        local.batch(np.array([7])).input_ids.tolist()
    )
    assert [file.name for file in cache.rglob("*.bin")] == ["shard-00002.bin"]
    for name, array in vars(everything(local)).items():
        assert (getattr(everything(store), name) == array).all()
    store.verify()


def test_a_shard_is_fetched_once(url: str) -> None:
    import fsspec

    before, after = TokenStore.open(url), TokenStore.open(url)
    expected = everything(before).input_ids
    fsspec.filesystem("memory").rm("/corpus/store/shard-00001.bin")
    assert (everything(after).input_ids == expected).all()
    with pytest.raises(ArtifactError, match=r"store/shard-00001\.bin is missing"):
        TokenStore.open(url)


def test_a_truncated_copy_is_fetched_again(url: str, cache: Path) -> None:
    expected = everything(TokenStore.open(url)).input_ids
    copy = next(cache.rglob("shard-00001.bin"))
    copy.write_bytes(b"half")
    assert (everything(TokenStore.open(url)).input_ids == expected).all()


def test_a_shard_that_arrives_changed_is_refused(url: str, cache: Path) -> None:
    import fsspec

    store = TokenStore.open(url)
    fsspec.filesystem("memory").pipe("/corpus/store/shard-00000.bin", bytes(120))
    with pytest.raises(ArtifactError, match=r"shard-00000\.bin arrived with sha256"):
        store.batch(np.array([0]))
    assert not [*cache.rglob("*.bin"), *cache.rglob("*.partial")]


def test_many_readers_at_once_fetch_whole_shards(url: str, tmp_path: Path, cache: Path) -> None:
    expected = everything(TokenStore.open(tmp_path / "local")).input_ids
    stores = [TokenStore.open(url) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for batch in pool.map(everything, stores):
            assert (batch.input_ids == expected).all()
    assert not list(cache.rglob("*.partial"))


def test_a_reader_waits_for_one_that_is_fetching(url: str, tmp_path: Path, cache: Path) -> None:
    local = tmp_path / "local"
    store_id = hashlib.sha256((local / "index.json").read_bytes()).hexdigest()
    copy = cache / store_id / "shard-00000.bin"
    copy.parent.mkdir(parents=True)
    store = TokenStore.open(url)
    with ThreadPoolExecutor(1) as pool:
        with copy.with_name(copy.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            reading = pool.submit(store.batch, np.array([0]))
            with pytest.raises(TimeoutError):
                reading.result(timeout=0.3)
            copy.write_bytes((local / copy.name).read_bytes())
        expected = TokenStore.open(local).batch(np.array([0])).input_ids
        assert (reading.result().input_ids == expected).all()


def test_a_url_without_a_store_is_refused(cache: Path) -> None:
    with pytest.raises(ArtifactError, match="memory://nowhere/store holds no token store"):
        TokenStore.open("memory://nowhere/store")


def sum_of_ids(url: str) -> int:
    """What a worker process reads."""
    return int(everything(TokenStore.open(url)).input_ids.sum())


def test_processes_share_a_store_on_s3(
    tmp_path: Path,
    cache: Path,
    s3_bucket: Bucket,
) -> None:
    write(tmp_path / "local", some_blocks(), 8, blocks_per_shard=3)
    for file in (tmp_path / "local").iterdir():
        s3_bucket.put(f"store/{file.name}", file.read_bytes())
    url = f"s3://{s3_bucket.name}/store"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        sums = pool.map(sum_of_ids, [url] * 2, chunksize=1)
    assert sums == [sum_of_ids(str(tmp_path / "local"))] * 2
    assert len(list(cache.rglob("*.bin"))) == 3
