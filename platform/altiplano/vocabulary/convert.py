"""Writes a SentencePiece BPE model as a Hugging Face tokenizer with the same ids.

The `tokenizer.json` is built here, not by transformers: its own conversion differs from
SentencePiece on runs of spaces. Knows files and pieces, not models or chat formats (a chat
template is a string to it). Cost: about 1 s for 50,000 pieces.

What the fast form cannot do: pieces with equal scores (the `reference` merge) are resolved
left-most by SentencePiece but by rank in a merge list. `tokenizer_config.json` therefore says, in
`altiplano_form`, which form an artifact is to be encoded with; see `load.Vocabulary`.

Streaming (vLLM steps a `tokenizers` DecodeStream through the ids): the chunks of any encoded text
join to the text, and none shows half a character. Ids that no text encodes to can hold a broken
run of bytes; the whole run then decodes to U+FFFD, and vLLM starts a new stream after it.
"""

import json
from pathlib import Path
from typing import Any

from altiplano.errors import MismatchError
from altiplano.vocabulary.fastform import CONFIG_FILE, FAST_FILE, added_token
from altiplano.vocabulary.proto import (
    BPE,
    BYTE,
    CONTROL,
    MODEL_FILE,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    ModelProto,
    read_model,
    tied_pieces,
    write_atomically,
)

FORM_KEY = "altiplano_form"
"""Key of `tokenizer_config.json`: "sentencepiece" when both forms agree, else "fast"."""


def save_tokenizer(
    model: bytes,
    directory: Path,
    *,
    pad_piece: str | None = None,
    chat_template: str | None = None,
    model_max_length: int = 1_000_000_000,
) -> None:
    """Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json` into `directory`.

    transformers 5 (so vLLM too) loads the `tokenizer.json` as it stands, also beside a Llama
    `config.json`. Encoding adds BOS and no EOS, as LLaMA does. Text between special tokens is
    encoded just as SentencePiece encodes it on its own, with its leading `▁`.

    A difference that remains: SentencePiece never turns text into control ids, while the Hugging
    Face form recognises control pieces such as `</s>` inside any text, because chat templates need
    that. Whoever puts user text into a prompt must remove `Vocabulary.control_pieces` from it.

    Args:
        model: a serialized SentencePiece BPE model.
        directory: made when missing; other files in it are left alone.
        pad_piece: a piece of the model to declare as the padding token; default: the model's own.
        chat_template: Jinja source stored as `chat_template` in the config.
        model_max_length: tokens, for users of the Hugging Face form.

    Raises:
        MismatchError: the model cannot be written as a merge list, or lacks `pad_piece`.
    """
    proto = read_model(model)
    special = special_pieces(proto, pad_piece)
    fast = json.dumps(fast_tokenizer(proto, set(special.values())), ensure_ascii=False)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": "bos_token" in special,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "padding_side": "right",
        FORM_KEY: "fast" if tied_pieces(proto) else "sentencepiece",
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    write_atomically(directory / MODEL_FILE, model)
    write_atomically(directory / FAST_FILE, fast.encode())
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    write_atomically(directory / CONFIG_FILE, text.encode())


def special_pieces(proto: ModelProto, pad_piece: str | None = None) -> dict[str, str]:
    """The model's special pieces under transformers' names (`bos_token`, ...).

    Raises:
        MismatchError: `pad_piece` is not a piece of the model.
    """
    spec = proto.trainer_spec
    ids = {
        "unk_token": spec.unk_id,
        "bos_token": spec.bos_id,
        "eos_token": spec.eos_id,
        "pad_token": spec.pad_id,
    }
    special = {name: proto.pieces[id_].piece for name, id_ in ids.items() if id_ >= 0}
    if pad_piece is not None:
        if all(piece.piece != pad_piece for piece in proto.pieces):
            raise MismatchError(
                f"the padding piece {pad_piece!r} is not among the {len(proto.pieces)} pieces of "
                "the model. Merge it in (--pad-piece) or name one that is."
            )
        special["pad_token"] = pad_piece
    return special


def fast_tokenizer(proto: ModelProto, special: set[str]) -> dict[str, Any]:
    """The content of `tokenizer.json`: every piece in id order, and the merges that build them.

    Args:
        proto: the model.
        special: texts to treat as special tokens, besides the model's control pieces.

    Raises:
        MismatchError: the model uses a feature that this form cannot repeat.
    """
    _require_convertible(proto)
    byte_fallback = any(piece.type == BYTE for piece in proto.pieces)
    unknown = next((piece.piece for piece in proto.pieces if piece.type == UNKNOWN), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(id_, piece.piece, special=True)
            for id_, piece in enumerate(proto.pieces)
            if piece.type in (CONTROL, UNKNOWN) or piece.piece in special
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto.normalizer_spec)},
        "pre_tokenizer": None,
        "post_processor": _bos_template(proto),
        "decoder": {"type": "Sequence", "decoders": _decoders(proto.normalizer_spec)},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: id_ for id_, piece in enumerate(proto.pieces)},
            "merges": bpe_merges(proto),
        },
    }


def bpe_merges(proto: ModelProto) -> list[list[str]]:
    """Every split of every NORMAL piece into two NORMAL pieces or characters, in merge order.

    SentencePiece merges the neighbouring pair whose *joined* piece scores highest, whatever its
    parts; so each piece contributes all its splits, ordered by (score falling, id).
    """
    ranked = [
        (-piece.score, id_, piece.piece)
        for id_, piece in enumerate(proto.pieces)
        if piece.type == NORMAL
    ]
    known = {text for _, _, text in ranked}
    return [
        [text[:cut], text[cut:]]
        for _, _, text in sorted(ranked)
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in known and text[cut:] in known
    ]


def _require_convertible(proto: ModelProto) -> None:
    normalizer = proto.normalizer_spec
    user_defined = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    reasons = {
        f"its type is {proto.trainer_spec.model_type}, not BPE ({BPE})": (
            proto.trainer_spec.model_type != BPE
        ),
        f"its normaliser is {normalizer.name!r}, not 'identity'": bool(
            normalizer.precompiled_charsmap
        ),
        "it does not write spaces as '▁'": not normalizer.escape_whitespaces,
        "it puts spaces after words": proto.trainer_spec.treat_whitespace_as_suffix,
        f"it has user-defined pieces ({', '.join(user_defined[:3])}, ...)": bool(user_defined),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise MismatchError(
            f"the SentencePiece model cannot be written as a fast tokenizer with equal ids: "
            f"{'; '.join(found)}. Use a LLaMA-style BPE model (or train one: purpose 'base')."
        )


def _normalizers(spec: Any) -> list[dict[str, Any]]:
    r"""SentencePiece's treatment of spaces; `\A` and `\z` because `^` and `$` match at lines."""

    def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": pattern, "content": content}

    steps: list[dict[str, Any]] = []
    if spec.remove_extra_whitespaces:
        steps.append(replace({"Regex": r"\A +"}, ""))
        steps.append(replace({"Regex": rf"[ {SPACE}]+\z"}, ""))
        steps.append(replace({"Regex": " {2,}"}, " "))
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append(replace({"String": " "}, SPACE))
    return steps


def _decoders(spec: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _bos_template(proto: ModelProto) -> dict[str, Any] | None:
    """Put BOS before every text, when the model has one."""
    bos_id = proto.trainer_spec.bos_id
    if bos_id < 0:
        return None
    bos = proto.pieces[bos_id].piece

    def token(id_: str, sequence: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": id_, "type_id": sequence}}

    def text(id_: str, sequence: int) -> dict[str, Any]:
        return {"Sequence": {"id": id_, "type_id": sequence}}

    return {
        "type": "TemplateProcessing",
        "single": [token(bos, 0), text("A", 0)],
        "pair": [token(bos, 0), text("A", 0), token(bos, 1), text("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
