"""The stages before training: world, base, tokenizer, extend, data.

Each opens its inputs, calls the room that does the work and fills the manifest. Knows which
fingerprints belong together; not how pieces, rows or tokens are made.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from altiplano.artifact import require_same_tokenizer
from altiplano.config.data import ReplaySection, TextSource
from altiplano.config.schema import ScratchSection
from altiplano.errors import ConfigError, ModelError
from altiplano.stages.stage import Work
from altiplano.train.schedule import stream_seed

if TYPE_CHECKING:
    from altiplano.vocabulary.load import Vocabulary

_UNFINISHED = ".preparing"
"""Folder of finished parts of unfinished data stages, below the run's output."""


def make_world(work: Work) -> None:
    """Generate the demo's bilingual world."""
    from altiplano.world import write_world

    section = work.project.config.world
    assert section is not None
    work.manifest.metrics = write_world(work.output, people=section.people, seed=section.seed)


def import_base(work: Work) -> None:
    """Bring the base model in, checked, with its tokenizer in the one form used everywhere."""
    from safetensors import SafetensorError

    from altiplano.model.counts import require_shape
    from altiplano.model.load import import_model, read_config, weights_fingerprint

    section = work.project.config.base_model
    assert section.path is not None
    source = _find_model(work.project.resolve(section.path), section.path)
    if section.shape is not None:
        require_shape(section.shape.model_dump(), read_config(source), str(source))
    import_model(source, work.output, allow_pickle=section.allow_pickle)
    _import_tokenizer(source, work.output)
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


def _import_tokenizer(source: Path, output: Path) -> None:
    """A base's tokenizer, of either family, with its chat template."""
    from altiplano.vocabulary.bytelevel.extend import adopt_bytelevel, is_bytelevel
    from altiplano.vocabulary.convert import save_tokenizer
    from altiplano.vocabulary.load import Vocabulary
    from altiplano.vocabulary.proto import read_model

    if is_bytelevel(source):
        adopt_bytelevel(source, output)
        return
    read_model(source)  # refuses a broken tokenizer.model by its path
    model = (source / "tokenizer.model").read_bytes()
    save_tokenizer(model, output, chat_template=Vocabulary(source).chat_template)


def train_base_tokenizer(work: Work) -> None:
    """Train the vocabulary of a base model made from scratch."""
    from altiplano.vocabulary.convert import save_tokenizer
    from altiplano.vocabulary.train import train_sentencepiece

    scratch = _scratch(work)
    model = work.output / "trained.model"
    texts = _texts(work, scratch.text, _languages(scratch.text))
    train_sentencepiece(
        texts, vocab_size=scratch.tokenizer.vocab_size, output=model, purpose="base"
    )
    save_tokenizer(model.read_bytes(), work.output)
    model.unlink()
    size = _describe_tokenizer(work)
    work.manifest.vocab_old = size
    work.manifest.metrics = {"pieces": size}


def grow_tokenizer(work: Work) -> None:
    """Give the base's vocabulary its new pieces, if any, and count what that did."""
    from altiplano.model.load import copy_tokenizer

    section, base = work.project.config.tokenizer, work.inputs["base"]
    if section.unchanged:
        copy_tokenizer(base.path, work.output)
        work.manifest.metrics = {"pieces": base.manifest.vocab_new}
    else:
        _add_pieces(work)
    size = _describe_tokenizer(work)
    work.manifest.vocab_old = base.manifest.vocab_new
    if section.pieces is not None and section.pieces != size:
        raise ConfigError(
            f"the vocabulary has {size} pieces, `tokenizer.pieces` says {section.pieces}: correct "
            f"it, or the pieces that `tokenizer` adds to the base's {base.manifest.vocab_new}"
        )
    if not section.unchanged:
        _compare_vocabularies(work)


def _add_pieces(work: Work) -> None:
    from altiplano.stages.grow import Growth, grow_bytelevel, grow_sentencepiece
    from altiplano.vocabulary.load import Vocabulary

    config, base = work.project.config, work.inputs["base"]
    grow = grow_bytelevel if Vocabulary(base.path).family == "bytelevel" else grow_sentencepiece
    growth = Growth(
        base=base.path,
        output=work.output,
        section=config.tokenizer,
        texts=lambda: _texts(work, config.data.text, config.tokenizer.languages),
        resolve=work.project.resolve,
        seed=stream_seed(config.seed, "tokenizer"),
    )
    work.manifest.metrics = grow(growth)


def _compare_vocabularies(work: Work) -> None:
    """Measure what the new pieces did to the new language's texts and to the others'."""
    from altiplano.stages.grow import say_gain, say_unchanged
    from altiplano.vocabulary.characters import piece_wanted

    section, data = work.project.config.tokenizer, work.project.config.data
    base = work.inputs["base"].path
    others = [source for source in data.all_text if source.language not in section.languages]
    own_texts = _texts(work, data.text, section.languages)
    other_texts = _texts(work, others, _languages(others))
    work.manifest.metrics |= say_gain(base, work.output, own_texts)
    work.manifest.metrics |= say_unchanged(
        base,
        work.output,
        other_texts,
        lambda char: piece_wanted(char, section.kept_pieces, section.drop),
    )


def _texts(work: Work, sources: Sequence[TextSource], languages: Sequence[str]) -> Iterator[str]:
    """Cleaned training texts of some languages."""
    from altiplano.data.reading.sources import training_texts

    data = work.project.config.data
    return training_texts(
        sources,
        work.project.resolve,
        languages=languages,
        held_out=data.held_out,
        on_error=data.on_error,
        clean=data.clean,
    )


def extend_model(work: Work) -> None:
    """Give the base model a row for every new piece."""
    from altiplano.model.extend import extend_checkpoint
    from altiplano.model.load import copy_tokenizer, weights_fingerprint
    from altiplano.vocabulary.load import Vocabulary
    from altiplano.vocabulary.subpieces import old_subpieces

    base, tokenizer = work.inputs["base"], work.inputs["tokenizer"]
    old, new = Vocabulary(base.path), Vocabulary(tokenizer.path)
    section = work.project.config.extend
    work.manifest.metrics = dict(
        extend_checkpoint(
            base.path,
            work.output,
            old_subpieces(old, new),
            vocab_old=old.size,
            init=section.init,
            special_ids=_special_ids(new),
            seed=stream_seed(work.project.config.seed, "extend"),
            pad_to_multiple=section.pad_to_multiple,
        )
    )
    copy_tokenizer(tokenizer.path, work.output)
    _describe_tokenizer(work)
    work.manifest.vocab_old = old.size
    work.manifest.weights_fingerprint = weights_fingerprint(work.output)


def prepare_base_text(work: Work) -> None:
    """Tokens for a base model made from scratch."""
    _prepare_text(work, _scratch(work).text, None)


def prepare_text(work: Work) -> None:
    """Tokens for continued pre-training, and the held-out documents."""
    data = work.project.config.data
    _prepare_text(work, data.text, data.replay)


def _prepare_text(work: Work, sources: Sequence[TextSource], replay: ReplaySection | None) -> None:
    from altiplano.data.flow import prepare

    work.manifest.metrics = prepare.prepare_text(
        sources,
        replay,
        work.project.resolve,
        work.path("tokenizer"),
        section=work.project.config.data,
        output=work.output,
        scratch=_scratch_dir(work),
    )
    _same_tokenizer_as(work, "tokenizer")


def prepare_chat(work: Work) -> None:
    """Tokens for instruction tuning, and the chat template."""
    from altiplano.data.flow import prepare

    work.manifest.metrics = prepare.prepare_chat(
        work.project.config.data,
        work.project.resolve,
        work.path("tokenizer"),
        output=work.output,
        scratch=_scratch_dir(work),
    )
    _same_tokenizer_as(work, "tokenizer")


def _scratch_dir(work: Work) -> Path:
    """Where finished parts lie until the artifact is in place: an interrupted stage goes on there.

    Parts of the same stage with other settings or inputs are of no use any more.
    """
    parts = work.project.output / _UNFINISHED
    mine = parts / f"{work.stage.name}-{work.run_key[:12]}"
    for other in parts.glob(f"{work.stage.name}-*"):
        if other != mine:
            shutil.rmtree(other, ignore_errors=True)
    mine.mkdir(parents=True, exist_ok=True)
    work.spent.append(mine)
    return mine


def init_scratch(work: Work, target: Path) -> None:
    """Write a randomly initialised Llama of the scratch shape, with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from altiplano.model.load import copy_tokenizer, save_model
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


def _languages(sources: Sequence[TextSource]) -> list[str]:
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

    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
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
