"""Preparing data on a Ray cluster: the same bytes however it is split, and counts that add up."""

import errno
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from altiplano.config.data import DataSection, InstructionSource, ReplaySection, TextSource
from altiplano.data.chat import encode as chat
from altiplano.data.flow import batches, tokenize
from altiplano.data.flow.prepare import TEMPLATE_FILE, prepare_chat, prepare_text
from altiplano.data.reading.files import Chunk
from altiplano.data.reading.sources import is_held_out
from altiplano.data.tokens.store import TokenStore
from altiplano.errors import DataError
from altiplano.vocabulary.load import Vocabulary
from tests.helpers.tiny_vocabulary import (
    chinese_lines,
    english_lines,
    write_tiny_tokenizer,
)

Corpus = dict[str, list[str]]
Metrics = dict[str, object]


def same(path: str) -> str:
    return path


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return {
        "en": list(dict.fromkeys(english_lines(150))),
        "zh": list(dict.fromkeys(chinese_lines(150))),
    }


def lines_source(path: Path, lines: list[str], language: str, **settings: object) -> TextSource:
    path.write_text("\n".join(lines), encoding="utf-8")
    return TextSource(path=str(path), language=language, format="lines", **settings)


@pytest.fixture(scope="module")
def text_sources(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[TextSource]:
    directory = tmp_path_factory.mktemp("corpus")
    return [
        lines_source(directory / f"{language}.txt", lines, language, name=language)
        for language, lines in corpus.items()
    ]


def files_of(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_text(
    sources: list[TextSource],
    tokenizer_dir: Path,
    output: Path,
    *,
    replay: ReplaySection | None = None,
    chunk_bytes: int = 1 << 20,
    **settings: object,
) -> Metrics:
    scratch = output.with_name(f"{output.name}-scratch")
    for directory in (output, scratch):
        directory.mkdir(exist_ok=True)
    return prepare_text(
        sources,
        replay,
        same,
        tokenizer_dir,
        section=DataSection(**{"sequence_length": 32, "held_out": 0.1} | settings),
        output=output,
        scratch=scratch,
        chunk_bytes=chunk_bytes,
    )


def run_chat(
    records: list[object],
    tokenizer_dir: Path,
    output: Path,
    *,
    chunk_bytes: int = 1 << 20,
    max_records: int | None = None,
    **settings: object,
) -> Metrics:
    scratch = output.with_name(f"{output.name}-scratch")
    for directory in (output, scratch):
        directory.mkdir(exist_ok=True)
    source = output.with_suffix(".jsonl")
    source.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    given = InstructionSource(path=str(source), language="zh", name="z", max_records=max_records)
    section = DataSection(
        **{"instructions": [given], "sequence_length": 64, "system_prompt": ""} | settings
    )
    return prepare_chat(
        section, same, tokenizer_dir, output=output, scratch=scratch, chunk_bytes=chunk_bytes
    )


def stored_ids(output: Path) -> list[int]:
    """All tokens of a store, in its order, without padding."""
    store = TokenStore.open(output / "train")
    batch = store.batch(np.arange(store.num_blocks))
    ids: list[int] = batch.input_ids[batch.segment_ids > 0].tolist()
    return ids


def require_sums(metrics: Metrics, output: Path) -> None:
    """What goes in comes out: of the whole, of every source and of every language."""
    store = TokenStore.open(output / "train")
    assert metrics["tokens"] == store.num_tokens == len(stored_ids(output))
    assert metrics["targets"] == store.num_targets
    assert metrics["blocks"] == store.num_blocks
    sources, languages = metrics["sources"].values(), metrics["languages"].values()
    for parts in (sources, languages):
        assert sum(part["stored_tokens"] for part in parts) == store.num_tokens
        assert sum(part["documents"] for part in parts) == metrics["documents_kept"]
        for name in ("characters", "bytes"):
            assert sum(part[name] for part in parts) == metrics[name]
    read = metrics["documents_kept"] + metrics["documents_held_out"]
    assert metrics["documents_read"] == read + sum(metrics["documents_dropped"].values())
    for part in sources:
        dropped = sum(part["documents_dropped"].values())
        kept = part["documents_read"] - part["documents_held_out"] - dropped
        assert kept == part["documents"]
    quarantine = Counter(line["reason"] for line in lines_of(output / "quarantine.jsonl"))
    for reason, count in metrics["documents_dropped"].items():
        assert quarantine[reason] == count


def test_text_becomes_blocks_without_loss(
    text_sources: list[TextSource],
    corpus: Corpus,
    tokenizer_dir: Path,
    tmp_path: Path,
    ray_cluster: object,
) -> None:
    metrics = run_text(text_sources, tokenizer_dir, tmp_path / "out", cross_documents=True)
    require_sums(metrics, tmp_path / "out")
    vocabulary = Vocabulary(tokenizer_dir)
    train = {
        language: [line for line in lines if not is_held_out(line, 0.1)]
        for language, lines in corpus.items()
    }
    expected = [
        [vocabulary.bos_id, *vocabulary.encode(line), vocabulary.eos_id]
        for line in train["en"] + train["zh"]
    ]
    assert stored_ids(tmp_path / "out") == [id_ for document in expected for id_ in document]
    assert lines_of(tmp_path / "out" / "quarantine.jsonl") == []
    for language, lines in corpus.items():
        held = lines_of(tmp_path / "out" / f"held_out.{language}.jsonl")
        assert {line["language"] for line in held} == {language}
        texts = [line["text"] for line in held]
        assert texts and sorted(texts + train[language]) == sorted(lines)
        assert metrics["languages"][language]["documents"] == len(train[language])
        assert metrics["languages"][language]["characters"] == sum(map(len, train[language]))

    packed = run_text(text_sources, tokenizer_dir, tmp_path / "packed")
    assert packed["tokens"] == metrics["tokens"]
    assert sorted(stored_ids(tmp_path / "packed")) == sorted(stored_ids(tmp_path / "out"))


def hard_sources(corpus: Corpus, directory: Path) -> tuple[list[TextSource], ReplaySection]:
    """Everything at once: caps, duplicates, broken lines, short lines, weights and replay."""
    directory.mkdir()
    rows = [json.dumps({"text": line}) for line in corpus["zh"][:90]]
    rows[3], rows[20], rows[40:40] = "{", '{"body": 1}', rows[5:15]
    (directory / "zh.jsonl").write_text("\n".join(rows), encoding="utf-8")
    sources = [
        TextSource(
            path=str(directory / "zh.jsonl"), language="zh", name="zh", weight=3, repeat=2.5
        ),
        lines_source(
            directory / "mixed.txt",
            [*corpus["zh"][80:], "短", *corpus["en"][:20]],
            "zh",
            name="mixed",
            max_documents=60,
            weight=1,
        ),
    ]
    old = lines_source(directory / "en.txt", corpus["en"], "en", name="en", max_documents=100)
    return sources, ReplaySection(text=[old], share=0.2)


@contextmanager
def only_cpus(count: int) -> Iterator[None]:
    """Leave this many CPUs of the test cluster free."""
    import ray

    taken = int(ray.cluster_resources()["CPU"]) - count
    if not taken:
        yield
        return
    group = ray.util.placement_group([{"CPU": taken}])
    assert group.wait(timeout_seconds=60)
    try:
        yield
    finally:
        ray.util.remove_placement_group(group)


def test_same_bytes_whatever_the_parallelism(
    corpus: Corpus, tokenizer_dir: Path, tmp_path: Path, ray_cluster: object
) -> None:
    """One chunk per file on one CPU; about forty of a few lines each on two and on four."""
    sources, replay = hard_sources(corpus, tmp_path / "in")
    metrics = []
    for cpus, size in ((1, 1 << 20), (2, 300), (4, 300)):
        with only_cpus(cpus):
            metrics.append(
                run_text(
                    sources,
                    tokenizer_dir,
                    tmp_path / f"cpus-{cpus}",
                    replay=replay,
                    chunk_bytes=size,
                    on_error="skip",
                    clean={"min_characters": 2},
                )
            )
    assert metrics[0] == metrics[1] == metrics[2]
    require_sums(metrics[0], tmp_path / "cpus-4")
    one, two, four = (files_of(tmp_path / f"cpus-{cpus}") for cpus in (1, 2, 4))
    assert set(one) == {
        "held_out.en.jsonl",
        "held_out.zh.jsonl",
        "quarantine.jsonl",
        "train/index.json",
        "train/shard-00000.bin",
    }
    assert one == two == four
    assert len(list((tmp_path / "cpus-4-scratch").glob("part-*.arrow"))) > 30


def test_drops_add_up_and_stand_in_the_quarantine(
    corpus: Corpus, tokenizer_dir: Path, tmp_path: Path, ray_cluster: object
) -> None:
    sources, _ = hard_sources(corpus, tmp_path / "in")
    plain = [source.model_copy(update={"weight": None, "repeat": 1.0}) for source in sources]
    rules = {"clean": {"min_characters": 2}, "held_out": 0.2}
    metrics = run_text(plain, tokenizer_dir, tmp_path / "out", on_error="skip", **rules)
    require_sums(metrics, tmp_path / "out")
    # 10 lines stand twice in zh, and 8 of the 10 of mixed that were in zh are readable there.
    assert metrics["sources"]["zh"]["documents_read"] == 100
    assert metrics["sources"]["zh"]["documents_dropped"]["invalid_json"] == 1
    assert metrics["sources"]["zh"]["documents_dropped"]["no_text"] == 1
    assert metrics["sources"]["zh"]["documents_dropped"]["duplicate"] == 10
    assert metrics["sources"]["mixed"]["documents_dropped"] == {"duplicate": 10}
    assert metrics["sources"]["mixed"]["documents_read"] == 60
    lines = lines_of(tmp_path / "out" / "quarantine.jsonl")
    assert all(set(line) == {"reason", "origin", "detail", "text", "source"} for line in lines)
    assert [line["source"] for line in lines] == ["zh"] * 12 + ["mixed"] * 10
    duplicates = [line for line in lines if line["reason"] == "duplicate"]
    assert duplicates[0]["text"] == corpus["zh"][5] and "zh.jsonl" in duplicates[0]["origin"]
    with pytest.raises(DataError, match=r"zh\.jsonl:4"):
        run_text(plain, tokenizer_dir, tmp_path / "fail", **rules)


def test_duplicates_may_stay(
    corpus: Corpus, tokenizer_dir: Path, tmp_path: Path, ray_cluster: object
) -> None:
    source = lines_source(tmp_path / "a.txt", corpus["zh"][:40] * 2, "zh")
    keep = run_text([source], tokenizer_dir, tmp_path / "keep", clean={"duplicates": "keep"})
    exact = run_text([source], tokenizer_dir, tmp_path / "exact")
    assert keep["documents_dropped"] == {}
    assert exact["documents_dropped"] == {"duplicate": 40}
    assert keep["tokens"] == 2 * exact["tokens"]


def test_near_duplicates_are_left_out(
    tokenizer_dir: Path, tmp_path: Path, ray_cluster: object
) -> None:
    """One text differs in its end only, one not at all, both far from the first in chunks."""
    long = ["".join(chinese_lines(12, seed=seed)) for seed in range(8)]
    source = lines_source(tmp_path / "a.txt", [*long, long[0] + "很多人。", long[3]], "zh")
    short = lines_source(tmp_path / "short.txt", ["短"], "zh")
    near = {"duplicates": "near", "near_threshold": 0.7, "min_characters": 2}
    metrics = run_text(
        [source, short], tokenizer_dir, tmp_path / "out", clean=near, chunk_bytes=700, held_out=0
    )
    require_sums(metrics, tmp_path / "out")
    assert metrics["documents_dropped"] == {"duplicate": 2, "too_short": 1}
    assert metrics["documents_kept"] == 8


def test_a_cap_ends_the_reading_before_later_errors(
    corpus: Corpus, tokenizer_dir: Path, tmp_path: Path, ray_cluster: object
) -> None:
    """The broken line is behind the cap: whatever the chunks are, nobody reads it."""
    rows = [json.dumps({"text": line}) for line in corpus["zh"][:30]] + ["{"]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    capped = TextSource(path=str(tmp_path / "a.jsonl"), language="zh", max_documents=30)
    for size in (200, 1 << 20):
        metrics = run_text([capped], tokenizer_dir, tmp_path / str(size), chunk_bytes=size)
        assert metrics["documents_read"] == 30
    more = capped.model_copy(update={"max_documents": 31})
    with pytest.raises(DataError, match=r"a\.jsonl:31: not JSON"):
        run_text([more], tokenizer_dir, tmp_path / "more")


def test_an_interrupted_run_goes_on(
    corpus: Corpus, tokenizer_dir: Path, tmp_path: Path, ray_cluster: object
) -> None:
    """The second file breaks the first run; what is done by then is not done again."""
    first = lines_source(tmp_path / "a.txt", corpus["zh"], "zh")
    later = TextSource(path=str(tmp_path / "b.jsonl"), language="zh")
    rows = [json.dumps({"text": line}) for line in corpus["en"]]
    (tmp_path / "b.jsonl").write_text("\n".join([*rows[:10], "{" * len(rows[10]), *rows[11:]]))
    with pytest.raises(DataError, match=r"b\.jsonl:11"):
        run_text([first, later], tokenizer_dir, tmp_path / "out", chunk_bytes=500)
    parts = {
        path.name: path.stat().st_mtime_ns
        for path in (tmp_path / "out-scratch").glob("part-*.arrow")
    }
    assert len(parts) >= 15
    assert not (tmp_path / "out" / "train" / "index.json").exists()
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    run_text([first, later], tokenizer_dir, tmp_path / "out", chunk_bytes=500)
    after = {
        path.name: path.stat().st_mtime_ns
        for path in (tmp_path / "out-scratch").glob("part-*.arrow")
    }
    assert len(after) > len(parts)
    assert {name: after[name] for name in parts} == parts
    run_text([first, later], tokenizer_dir, tmp_path / "fresh", chunk_bytes=500)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_weights_and_replay_give_the_shares(
    tokenizer_dir: Path, tmp_path: Path, ray_cluster: object
) -> None:
    zh, modern = chinese_lines(3000), chinese_lines(3000, seed=1)
    en = [f"{line} {number}" for number, line in enumerate(english_lines(600))]
    sources = [
        lines_source(tmp_path / "zh.txt", zh, "zh", name="old", weight=1),
        lines_source(tmp_path / "modern.txt", modern, "zh", name="modern", weight=3, repeat=1.5),
    ]
    replay = ReplaySection(
        text=[lines_source(tmp_path / "en.txt", en, "en", name="en")], share=0.25
    )
    metrics = run_text(sources, tokenizer_dir, tmp_path / "out", replay=replay)
    require_sums(metrics, tmp_path / "out")
    shares = {
        name: part["stored_tokens"] / metrics["tokens"] for name, part in metrics["sources"].items()
    }
    assert shares["en"] == pytest.approx(0.25, abs=0.02)
    assert shares["modern"] == pytest.approx(0.75 * 0.75, abs=0.02)
    modern_part = metrics["sources"]["modern"]
    assert modern_part["copies"] / modern_part["documents"] == pytest.approx(1.5, abs=0.05)
    assert metrics["sources"]["modern"]["tokens"] < modern_part["stored_tokens"]
    scarce = replay.model_copy(update={"share": 0.9})
    with pytest.raises(DataError, match=r"more than max_repeat 4 allows"):
        run_text(sources, tokenizer_dir, tmp_path / "scarce", replay=scarce)


def test_nothing_left_to_train_on(tokenizer_dir: Path, tmp_path: Path, ray_cluster: object) -> None:
    line = next(line for line in chinese_lines() if is_held_out(line, 0.4))
    source = lines_source(tmp_path / "a.txt", [line], "zh")
    with pytest.raises(DataError, match=r"nothing is left to train on: of 1 documents 1 are held"):
        run_text([source], tokenizer_dir, tmp_path / "out", held_out=0.4)
    blank = lines_source(tmp_path / "blank.txt", ["", " "], "zh", name="blank")
    with pytest.raises(DataError, match=r"blank holds no usable text \(0 skipped\)"):
        run_text([source, blank], tokenizer_dir, tmp_path / "blank")


def test_a_full_disk_is_said_as_such(
    text_sources: list[TextSource],
    tokenizer_dir: Path,
    tmp_path: Path,
    ray_cluster: object,
) -> None:
    """Once in the driver, by way of a file whose device is always full, once in a task."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "held_out.en.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        run_text(text_sources, tokenizer_dir, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC

    rules = DataSection(sequence_length=32)
    job = tokenize.Job(
        text_sources[0],
        Chunk(text_sources[0].path, "lines"),
        rules,
        str(tokenizer_dir),
        "",
        str(tmp_path),
    )
    partial = f"{job.part.stem}.cut.{os.uname().nodename}-{os.getpid()}.partial"
    (tmp_path / partial).symlink_to("/dev/full")
    outcome = tokenize.tokenize_text(job)
    assert isinstance(outcome.error, OSError) and outcome.error.errno == errno.ENOSPC
    assert outcome.part is None
    assert not list(tmp_path.glob("part-*"))


def test_documents_get_bos_only_where_there_is_one() -> None:
    ids, lengths = np.arange(10, 15, dtype=np.int32), np.array([2, 0, 3])
    both = batches.with_ends(ids, lengths, bos_id=1, eos_id=2)
    assert both.ids.tolist() == [1, 10, 11, 2, 1, 2, 1, 12, 13, 14, 2]
    assert both.lengths.tolist() == [4, 2, 5]
    without = batches.with_ends(ids, lengths, bos_id=-1, eos_id=2)
    assert without.ids.tolist() == [10, 11, 2, 2, 12, 13, 14, 2]
    assert without.lengths.tolist() == [3, 1, 4]


def chat_records() -> list[dict[str, str]]:
    pairs = zip(chinese_lines(60), chinese_lines(60, seed=1), strict=True)
    return [{"instruction": question, "output": answer} for question, answer in pairs]


def test_records_are_whole_in_the_store(
    tokenizer_dir: Path, tmp_path: Path, ray_cluster: object
) -> None:
    metrics = run_chat(chat_records(), tokenizer_dir, tmp_path / "a")
    require_sums(metrics, tmp_path / "a")
    vocabulary = Vocabulary(tokenizer_dir)
    template = chat.make_template("llama-2", "", vocabulary)
    store = TokenStore.open(tmp_path / "a" / "train")
    batch = store.batch(np.arange(store.num_blocks))
    found = []
    for ids, segments in zip(batch.input_ids, batch.segment_ids, strict=True):
        found += [tuple(ids[segments == number]) for number in range(1, segments.max() + 1)]
    expected = []
    for record in chat_records():
        messages = [
            {"role": "user", "content": record["instruction"]},
            {"role": "assistant", "content": record["output"]},
        ]
        spans = template.spans(messages)
        tokens = chat.encode_spans(spans, template.control_ids, vocabulary)
        expected.append(tuple(tokens.ids))
    assert sorted(found) == sorted(expected)
    assert metrics["documents_kept"] == 60
    assert metrics["fill_rate"] > 0.7
    # Every answer's EOS is learnt: as many EOS labels as records.
    assert (batch.labels == vocabulary.eos_id).sum() == 60
    assert (tmp_path / "a" / TEMPLATE_FILE).read_text(encoding="utf-8") == template.jinja


def test_chat_has_the_same_bytes_whatever_the_parallelism(
    tokenizer_dir: Path, tmp_path: Path, ray_cluster: object
) -> None:
    records = [*chat_records(), {"instruction": "河流"}, *chat_records()[:5]]
    metrics = [
        run_chat(
            records,
            tokenizer_dir,
            tmp_path / name,
            chunk_bytes=size,
            on_error="skip",
            max_records=63,
        )
        for name, size in (("one", 1 << 20), ("many", 500))
    ]
    sources = [each.pop("sources") for each in metrics]
    assert metrics[0] == metrics[1]
    assert metrics[0]["documents_dropped"] == {"no_answer": 1, "duplicate": 3}
    assert metrics[0]["documents_read"] == 64
    assert sources[0]["z"] == sources[1]["z"]
    one, many = files_of(tmp_path / "one"), files_of(tmp_path / "many")
    quarantines = [files.pop("quarantine.jsonl") for files in (one, many)]
    assert one == many
    assert quarantines[0].replace(b"one.jsonl", b"many.jsonl") == quarantines[1]


def test_overlong_records(tokenizer_dir: Path, tmp_path: Path, ray_cluster: object) -> None:
    records = [
        *chat_records(),
        {"instruction": "河流" * 200, "output": "苹果。"},
        {"instruction": "河流", "output": "苹果。" * 200},
    ]
    cut = run_chat(records, tokenizer_dir, tmp_path / "cut")
    require_sums(cut, tmp_path / "cut")
    assert cut["prompts_truncated"] == 1
    assert cut["documents_dropped"] == {"answer_too_long": 1}
    assert cut["documents_kept"] == 61
    dropped = run_chat(records, tokenizer_dir, tmp_path / "drop", overlong="drop")
    assert dropped["documents_dropped"] == {"too_long": 2}
    assert dropped["documents_read"] == 62
    with pytest.raises(DataError, match=r"the record has \d+ tokens, a block has 64: raise"):
        run_chat(records, tokenizer_dir, tmp_path / "fail", overlong="fail")
    with pytest.raises(DataError, match="nothing is left to train on"):
        run_chat(records[-1:], tokenizer_dir, tmp_path / "none")


def test_a_split_record_is_one_document(
    tokenizer_dir: Path, tmp_path: Path, ray_cluster: object
) -> None:
    """Four turns of which one answer fits nowhere: three answers are learnt, one is noted."""
    turns = [("河流", "苹果。" * 5), ("小船", "苹果。" * 200), ("下雪", "很多。" * 5), ("人", "和")]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    metrics = run_chat([{"messages": messages}], tokenizer_dir, tmp_path / "out", overlong="split")
    require_sums(metrics, tmp_path / "out")
    assert (metrics["documents_kept"], metrics["records_split"]) == (1, 1)
    assert metrics["answers_dropped"] == 1
    assert metrics["documents_dropped"] == {}
    (noted,) = lines_of(tmp_path / "out" / "quarantine.jsonl")
    assert noted["reason"] == "answer_too_long"
    vocabulary = Vocabulary(tokenizer_dir)
    store = TokenStore.open(tmp_path / "out" / "train")
    labels = store.batch(np.arange(store.num_blocks)).labels
    assert (labels == vocabulary.eos_id).sum() == 3
