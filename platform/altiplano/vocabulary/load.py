"""`Vocabulary`: text to ids and back, the same ids in training as in serving, and its fingerprint.

Reads tokenizer directories and `.model` files; knows nothing of data sets, models or templates.
Cost: opening takes about 0.1 s. SentencePiece encodes 36 MB/s on one thread (4 MB/s when lines
are tens of kilobytes long), the fast form a third of it on two; only artifacts merged with
`reference` scores and foreign directories need the fast form.
"""

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sentencepiece as spm
from tokenizers import Tokenizer

from altiplano.errors import ArtifactError, DataError
from altiplano.vocabulary.convert import FORM_KEY
from altiplano.vocabulary.fastform import (
    CONFIG_FILE,
    FAST_FILE,
    SPECIAL_NAMES,
    is_byte_bpe,
    open_fast,
    read_json,
    read_template,
    token_text,
)
from altiplano.vocabulary.proto import CONTROL, MODEL_FILE, SPACE, UNKNOWN, read_model

Family = Literal["sentencepiece", "bytelevel"]


class Vocabulary:
    """A tokenizer opened for encoding.

    A lone `.model` is encoded by SentencePiece. A directory is encoded by its `tokenizer.json`,
    because that is what will be served, unless its `tokenizer_config.json` says (`altiplano_form`,
    written by `convert.save_tokenizer`) that SentencePiece gives the same ids, faster.
    """

    def __init__(self, source: Path | str) -> None:
        """Open a tokenizer directory or a `.model` file.

        Raises:
            ArtifactError: nothing usable is there; the message names what was looked for.
        """
        self.source = Path(source)
        model_file, fast_file, config = _locate(self.source)
        fast_json = read_json(fast_file) if fast_file is not None else {}
        self.family: Family = "bytelevel" if is_byte_bpe(fast_json) else "sentencepiece"
        """SentencePiece BPE (LLaMA), or BPE over bytes (Llama-3, Qwen)."""
        self._processor: spm.SentencePieceProcessor | None = None
        self._fast: Tokenizer | None = None
        if fast_file is not None and (
            model_file is None or config.get(FORM_KEY) != "sentencepiece"
        ):
            self._fast = open_fast(fast_file)
            self._pieces, special = _fast_table(self._fast, config)
        else:
            assert model_file is not None, "_locate returns at least one file"
            proto = read_model(model_file)
            self._processor = spm.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(proto.SerializeToString())
            self._pieces = [piece.piece for piece in proto.pieces]
            special = _proto_special_ids(proto, config)
        self.unk_id, self.bos_id, self.eos_id, self.pad_id = (
            special[name] for name in SPECIAL_NAMES
        )
        """Special ids; -1 where the vocabulary has none (Qwen has no BOS)."""
        self.control_pieces = _control_pieces(model_file, fast_json)
        """Texts that the Hugging Face form (not `encode`) would turn into special ids."""
        self.words = frozenset(_added(fast_json, special=False))
        """Ordinary added tokens: taken whole out of any text, and spelled as they are."""
        self.chat_template = read_template(self.source, config)
        """Jinja source of the directory's chat template, if any."""
        self.fingerprint = tokenizer_fingerprint(self.source)

    @property
    def form(self) -> str:
        """Which form encodes: "sentencepiece" or "fast"."""
        return "sentencepiece" if self._fast is None else "fast"

    @property
    def size(self) -> int:
        """Number of pieces; ids run from 0 to `size - 1`."""
        return len(self._pieces)

    def piece(self, id_: int) -> str:
        """The piece with this id: its text with `▁` for spaces, or its bytes in byte letters."""
        return self._pieces[id_]

    def ids_of_piece(self, piece: str) -> list[int]:
        """Ids that a piece of another vocabulary of this family is made of.

        Without the `▁` that SentencePiece puts before any text. A byte-level piece may be no whole
        characters.
        """
        if self.family == "bytelevel":
            assert self._fast is not None, "a byte-level vocabulary has the fast form only"
            return [token.id for token in self._fast.model.tokenize(piece)]
        if piece.startswith(SPACE):
            return self.encode(piece[1:].replace(SPACE, " "))
        ids = self.encode(piece.replace(SPACE, " "))
        return ids[1:] if ids and self.piece(ids[0]) == SPACE else ids

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS. Control pieces in the text stay text.

        Raises:
            DataError: the text holds a lone surrogate, which no tokenizer can represent.
        """
        return self.encode_batch([text], num_threads=1)[0]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Ids of each text as `encode` gives them. `num_threads` serves SentencePiece only."""
        for index, text in enumerate(texts):
            _require_encodable(text, index)
        if self._fast is not None:
            encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        assert self._processor is not None, "a Vocabulary has one of its two forms"
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=num_threads)
        return ids

    def encode_flat(
        self, texts: Sequence[str], *, num_threads: int = 1
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Ids of all texts end to end and the number of ids of each; the fast way for corpora."""
        for index, text in enumerate(texts):
            _require_encodable(text, index)
        arrays: list[npt.NDArray[np.int32]]
        if self._fast is not None:
            encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
            arrays = [np.array(encoding.ids, np.int32) for encoding in encodings]
        else:
            assert self._processor is not None, "a Vocabulary has one of its two forms"
            arrays = self._processor.encode(
                list(texts), num_threads=num_threads, return_type="numpy"
            )
        lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
        return np.concatenate(arrays) if arrays else np.empty(0, np.int32), lengths

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ids are left out."""
        if self._fast is not None:
            return self._fast.decode(list(ids), skip_special_tokens=True)
        assert self._processor is not None, "a Vocabulary has one of its two forms"
        text: str = self._processor.decode([int(id_) for id_ in ids])
        return text


def tokenizer_fingerprint(source: Path | str) -> str:
    """sha256 (hex) of what makes a tokenizer: id -> piece, scores, types and special ids.

    It does not depend on files or their order of fields. A directory without `tokenizer.model` is
    hashed from its `tokenizer.json` (tokens by id, merges in order, added tokens, normaliser,
    pre-tokenizer, decoder and what is put around a text), so the fingerprints of the two kinds are
    never equal.

    Raises:
        ArtifactError: nothing usable is there.
    """
    model_file, fast_file, config = _locate(Path(source))
    digest = hashlib.sha256()
    if model_file is not None:
        proto = read_model(model_file)
        special = _proto_special_ids(proto, config)
        for piece in proto.pieces:
            _feed(digest, piece.piece)
            digest.update(struct.pack("<fi", piece.score, piece.type))
    else:
        assert fast_file is not None, "_locate returns at least one file"
        fast = open_fast(fast_file)
        pieces, special = _fast_table(fast, config)
        for text in pieces:
            _feed(digest, text)
        # As `tokenizers` writes it: every field, defaults too. Tokens are hashed by id above.
        content = json.loads(fast.to_str())
        content["model"].pop("vocab")
        _feed(digest, json.dumps(content, sort_keys=True))
    digest.update(struct.pack("<4i", *(special[name] for name in SPECIAL_NAMES)))
    return digest.hexdigest()


def _feed(digest: Any, text: str) -> None:
    """Hash a string with its length, so that neighbours cannot run together."""
    data = text.encode()
    digest.update(struct.pack("<i", len(data)))
    digest.update(data)


def _locate(source: Path) -> tuple[Path | None, Path | None, dict[str, Any]]:
    """The `.model` file, the `tokenizer.json` and the config of a source; at least one file."""
    if source.is_file():
        return source, None, {}
    model_file, fast_file, config_file = (
        source / name if (source / name).is_file() else None
        for name in (MODEL_FILE, FAST_FILE, CONFIG_FILE)
    )
    if model_file is None and fast_file is None:
        state = "does not exist" if not source.exists() else "holds neither"
        raise ArtifactError(
            f"no tokenizer at {source}: it {state}; expected a .model file, or a directory with "
            f"{MODEL_FILE} or {FAST_FILE} (and {CONFIG_FILE}). Run the tokenizer stage first, or "
            "correct the path."
        )
    config = read_json(config_file) if config_file is not None else {}
    return model_file, fast_file, config


def _fast_table(fast: Tokenizer, config: dict[str, Any]) -> tuple[list[str], dict[str, int]]:
    """Tokens by id and the special ids (-1 where there is none) of the fast form."""
    vocabulary = fast.get_vocab(with_added_tokens=True)
    pieces = [""] * (max(vocabulary.values()) + 1)
    for text, id_ in vocabulary.items():
        pieces[id_] = text
    names = {name: token_text(config, name) for name in SPECIAL_NAMES}
    return pieces, {name: vocabulary.get(text or "", -1) for name, text in names.items()}


def _proto_special_ids(proto: Any, config: dict[str, Any]) -> dict[str, int]:
    """The special ids of a model; the padding token may be declared in the config only."""
    spec = proto.trainer_spec
    ids = dict(
        zip(SPECIAL_NAMES, (spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id), strict=True)
    )
    pad = token_text(config, "pad_token")
    if pad is not None:
        ids["pad_token"] = next(
            (id_ for id_, piece in enumerate(proto.pieces) if piece.piece == pad), -1
        )
    return ids


def _control_pieces(model_file: Path | None, fast_json: dict[str, Any]) -> tuple[str, ...]:
    if fast_json:
        return _added(fast_json, special=True)
    assert model_file is not None, "_locate returns at least one file"
    return tuple(
        piece.piece for piece in read_model(model_file).pieces if piece.type in (CONTROL, UNKNOWN)
    )


def _added(fast_json: dict[str, Any], *, special: bool) -> tuple[str, ...]:
    added = fast_json.get("added_tokens", [])
    return tuple(token["content"] for token in added if token["special"] == special)


def _require_encodable(text: str, index: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text {index} holds a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}: it is not valid Unicode, often half an emoji from a cut JSON escape. "
            "Repair or drop that record."
        ) from error
