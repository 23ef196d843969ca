"""The stages before training: world, base, tokenizer, extend, data.

Each opens its inputs, calls the room that does the work and fills the manifest. Knows which
fingerprints belong together; not how pieces, rows or tokens are made.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from altiplano.artifact import require_same_tokenizer
from altiplano.config.schema import ScratchSection, TextSource
from altiplano.errors import ModelError
from altiplano.stages.stage import Work

if TYPE_CHECKING:
    from altiplano.vocabulary.load import Vocabulary


def make_world(work: Work) -> None:
    """Generate the demo's bilingual world."""
    from altiplano.world import write_world

    section = work.project.config.world
    assert section is not None
    work.manifest.metrics = write_world(work.output, people=section.people, seed=section.seed)


def import_base(work: Work) -> None:
    """Bring the base model in, checked, with its tokenizer in the one form used everywhere."""
    from safetensors import SafetensorError

    from altiplano.model.load import import_model, weights_fingerprint
    from altiplano.vocabulary.convert import save_tokenizer
    from altiplano.vocabulary.proto import read_model

    section = work.project.config.base_model
    assert section.path is not None
    source = _find_model(work.project.resolve(section.path), section.path)
    import_model(source, work.output, allow_pickle=section.allow_pickle)
    read_model(source)  # refuses a broken tokenizer.model by its path
    save_tokenizer((source / "tokenizer.model").read_bytes(), work.output)
    size = _describe_tokenizer(work)
    work.manifest.vocab_old = size
    try:
        work.manifest.weights_fingerprint = weights_fingerprint(work.output)
    except SafetensorError as error:
        raise ModelError(
            f"the weights of {source} (*.safetensors) cannot be read: {error}; they were cut short "
            f"or are something else: fetch them again"
        ) from None
    work.manifest.metrics = {"source": section.path, "pieces": size}


def train_base_tokenizer(work: Work) -> None:
    """Train the vocabulary of a base model made from scratch."""
    from altiplano.data.sources import training_texts
    from altiplano.vocabulary.convert import save_tokenizer
    from altiplano.vocabulary.train import train_sentencepiece

    config, scratch = work.project.config, _scratch(work)
    model = work.output / "trained.model"
    texts = training_texts(
        scratch.text,
        work.project.resolve,
        languages=_languages(scratch.text),
        held_out=config.data.held_out,
        on_error=config.data.on_error,
    )
    train_sentencepiece(
        texts, vocab_size=scratch.tokenizer.vocab_size, output=model, purpose="base"
    )
    save_tokenizer(model.read_bytes(), work.output)
    model.unlink()
    size = _describe_tokenizer(work)
    work.manifest.vocab_old = size
    work.manifest.metrics = {"pieces": size}


def train_tokenizer(work: Work) -> None:
    """Train the new pieces and merge them into the base's vocabulary."""
    from altiplano.data.sources import training_texts
    from altiplano.vocabulary.convert import save_tokenizer
    from altiplano.vocabulary.merge import merge_sentencepiece
    from altiplano.vocabulary.train import train_sentencepiece

    config = work.project.config
    section = config.tokenizer
    additions = [Path(work.project.resolve(path)) for path in section.add]
    if section.vocab_size is not None:
        added = work.output / "added.model"
        texts = training_texts(
            config.data.text,
            work.project.resolve,
            languages=section.languages,
            held_out=config.data.held_out,
            on_error=config.data.on_error,
        )
        train_sentencepiece(
            texts,
            vocab_size=section.vocab_size,
            output=added,
            model_type=section.model_type,
            character_coverage=section.character_coverage,
        )
        additions.insert(0, added)
    base = work.inputs["base"]
    merged = merge_sentencepiece(
        base.path / "tokenizer.model",
        additions,
        scores=section.scores,
        pad_piece=section.pad_piece,
        skip_ascii=section.skip_ascii and section.scores == "distinct",
    )
    save_tokenizer(merged.proto, work.output, pad_piece=section.pad_piece)
    _describe_tokenizer(work)
    work.manifest.vocab_old = base.manifest.vocab_new
    work.manifest.metrics = {
        "pieces_old": merged.old_size,
        "pieces_added": merged.added,
        "pieces_new": merged.new_size,
        "overlap": merged.overlap,
        "unreachable_left_out": merged.unreachable,
        "scores": section.scores,
    }


def extend_model(work: Work) -> None:
    """Give the base model a row for every new piece."""
    from altiplano.model.extend import extend_checkpoint
    from altiplano.model.load import copy_tokenizer, weights_fingerprint
    from altiplano.train.schedule import stream_seed
    from altiplano.vocabulary.load import Vocabulary

    base, tokenizer = work.inputs["base"], work.inputs["tokenizer"]
    old, new = Vocabulary(base.path), Vocabulary(tokenizer.path)
    work.manifest.metrics = dict(
        extend_checkpoint(
            base.path,
            work.output,
            [old_pieces_of(new.piece(i), old) for i in range(old.size, new.size)],
            vocab_old=old.size,
            init=work.project.config.extend.init,
            special_ids=_special_ids(new),
            seed=stream_seed(work.project.config.seed, "extend"),
        )
    )
    copy_tokenizer(tokenizer.path, work.output)
    _describe_tokenizer(work)
    work.manifest.vocab_old = old.size
    work.manifest.weights_fingerprint = weights_fingerprint(work.output)


def old_pieces_of(piece: str, old: "Vocabulary") -> list[int]:
    """Ids the old vocabulary gives a new piece's text, without the `▁` it puts before any text."""
    if piece.startswith("▁"):
        return old.encode(piece[1:].replace("▁", " "))
    ids = old.encode(piece.replace("▁", " "))
    return ids[1:] if ids and old.piece(ids[0]) == "▁" else ids


def prepare_base_text(work: Work) -> None:
    """Tokens for a base model made from scratch."""
    _prepare_text(work, _scratch(work).text)


def prepare_text(work: Work) -> None:
    """Tokens for continued pre-training, and the held-out documents."""
    _prepare_text(work, work.project.config.data.text)


def _prepare_text(work: Work, sources: list[TextSource]) -> None:
    from altiplano.data import prepare

    section = work.project.config.data
    work.manifest.metrics = prepare.prepare_text(
        sources,
        work.project.resolve,
        work.path("tokenizer"),
        sequence_length=section.sequence_length,
        held_out=section.held_out,
        on_error=section.on_error,
        output=work.output,
    )
    _same_tokenizer_as(work, "tokenizer")


def prepare_chat(work: Work) -> None:
    """Tokens for instruction tuning, and the chat template."""
    from altiplano.data import prepare

    section = work.project.config.data
    work.manifest.metrics = prepare.prepare_chat(
        section.instructions,
        work.project.resolve,
        work.path("tokenizer"),
        template=section.template,
        system_prompt=section.system_prompt,
        sequence_length=section.sequence_length,
        overlong=section.overlong,
        on_error=section.on_error,
        output=work.output,
    )
    _same_tokenizer_as(work, "tokenizer")


def init_scratch(work: Work, target: Path) -> None:
    """Write a randomly initialised Llama of the scratch shape, with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from altiplano.model.load import copy_tokenizer, save_model
    from altiplano.train.schedule import stream_seed
    from altiplano.vocabulary.load import Vocabulary

    require_same_tokenizer(
        ("tokenizer", work.inputs["tokenizer"].manifest),
        ("tokens", work.inputs["tokens"].manifest),
    )
    vocabulary = Vocabulary(work.path("tokenizer"))
    shape = _scratch(work).shape.model_dump()
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        **_special_ids(vocabulary),
        rope_parameters={"rope_type": "default", "rope_theta": shape.pop("rope_theta")},
        **shape,
    )
    torch.manual_seed(stream_seed(work.project.config.seed, "base"))
    target.mkdir(parents=True, exist_ok=True)
    save_model(LlamaForCausalLM(config), target)
    copy_tokenizer(work.path("tokenizer"), target)


def _scratch(work: Work) -> ScratchSection:
    scratch = work.project.config.base_model.scratch
    assert scratch is not None
    return scratch


def _special_ids(vocabulary: "Vocabulary") -> dict[str, int | None]:
    """Ids for config.json; None where the vocabulary has no such piece."""
    ids = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": vocabulary.pad_id,
    }
    return {name: value if value >= 0 else None for name, value in ids.items()}


def _languages(sources: list[TextSource]) -> list[str]:
    return sorted({source.language for source in sources})


def _describe_tokenizer(work: Work) -> int:
    """Fill the manifest's tokenizer part; returns the number of pieces."""
    from altiplano.vocabulary.load import Vocabulary, tokenizer_fingerprint

    size = Vocabulary(work.output).size
    work.manifest.tokenizer_fingerprint = tokenizer_fingerprint(work.output)
    work.manifest.vocab_new = size
    return size


def _same_tokenizer_as(work: Work, role: str) -> None:
    source = work.inputs[role].manifest
    work.manifest.tokenizer_fingerprint = source.tokenizer_fingerprint
    work.manifest.vocab_old, work.manifest.vocab_new = source.vocab_old, source.vocab_new


def _find_model(resolved: str, written: str) -> Path:
    """A local directory for a path, URL or hub id."""
    from altiplano.storage import is_remote

    if is_remote(resolved):
        return _download(resolved)
    if Path(resolved).is_dir():
        return Path(resolved)
    if written.count("/") == 1 and not written.startswith((".", "/", "~")):
        return _from_hub(written)
    raise ModelError(f"base_model.path {resolved} does not exist: give a directory or a hub id")


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer.model"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"base_model.path {repository} is neither a directory nor a hub model that can be "
            f"fetched: {str(error).splitlines()[0]}"
        ) from None


def _download(url: str) -> Path:
    import tempfile

    import fsspec

    filesystem, inner = fsspec.core.url_to_fs(url)
    target = Path(tempfile.mkdtemp(prefix="altiplano-base-"))
    try:
        filesystem.get(inner.rstrip("/") + "/", str(target) + "/", recursive=True)
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise ModelError(f"cannot fetch base_model.path {url}: {error}") from None
    return target
