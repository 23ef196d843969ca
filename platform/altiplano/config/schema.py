"""The whole config as one typed tree: every key of the YAML is declared and documented here.

The text under a field is its documentation. A section knows what may be said, not what a stage
does with it. Unknown keys are errors (`extra="forbid"`); the tree is frozen once loaded.
Costs one import of pydantic.
"""

from pathlib import PurePosixPath
from typing import Literal, Self

from pydantic import Field, model_validator

from altiplano.config.cluster import ClusterSection, TrackSection
from altiplano.config.data import (
    DataSection,
    TextSource,
)
from altiplano.config.serving import ServeSection
from altiplano.config.training import FullTrainSettings, Section, TrainSettings

KeptPieces = Literal["all", "non_ascii", "cjk"]
DroppedPieces = Literal["digits", "latin"]


class WorldSection(Section):
    """The bilingual world the demo generates for itself: facts told in English and Chinese."""

    people: int = Field(40, ge=4)
    """How many people the world holds; facts and questions grow with it."""
    seed: int = 0
    """The same seed gives the same bytes."""


class ScratchTokenizer(Section):
    """SentencePiece model trained for a base model that is made from scratch."""

    vocab_size: int = Field(ge=270)
    """Number of pieces, the 256 byte pieces and 3 control pieces included."""


class Shape(Section):
    """Shape of a Llama made from scratch (names as in transformers' LlamaConfig)."""

    hidden_size: int = 128
    """Width of the residual stream."""
    intermediate_size: int = 352
    """Width of the gated MLP."""
    num_hidden_layers: int = 4
    """Number of blocks."""
    num_attention_heads: int = 4
    """Query heads; hidden_size / heads must be a size vLLM serves (32, 64, 80, 96, 128 ...)."""
    num_key_value_heads: int = 4
    """Key/value heads (fewer than query heads: grouped-query attention)."""
    max_position_embeddings: int = 512
    """Longest context in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding."""


class ScratchSection(Section):
    """A base model trained from nothing; for demos and tests."""

    text: list[TextSource] = Field(min_length=1)
    """What the base model reads."""
    tokenizer: ScratchTokenizer
    """Its own vocabulary."""
    shape: Shape = Shape()
    """Its shape."""
    train: FullTrainSettings
    """How it is trained; all parameters are."""


class PublishedShape(Section):
    """Shape of a base model as published (names as in its config.json)."""

    vocab_size: int = Field(ge=1)
    """Pieces of its vocabulary, which are its rows of embedding and head."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    intermediate_size: int = Field(ge=1)
    """Width of the gated MLP."""
    num_hidden_layers: int = Field(ge=1)
    """Number of blocks."""
    num_attention_heads: int = Field(ge=1)
    """Query heads."""
    num_key_value_heads: int | None = Field(None, ge=1)
    """Key/value heads; as many as query heads by default."""
    head_dim: int | None = Field(None, ge=1)
    """Width of a head; hidden_size / heads by default."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding."""


class BaseModelSection(Section):
    """The model to teach: a directory, a hub id, or one made from scratch. Give exactly one."""

    path: str | None = None
    """Hugging Face directory (safetensors + tokenizer.model), fsspec URL, or hub id."""
    shape: PublishedShape | None = None
    """What the model at `path` should be: `altiplano plan` uses it where the model is not on disk,
    and a model of another shape is refused."""
    scratch: ScratchSection | None = None
    """Train a tiny base model as the first stage."""
    allow_pickle: bool = False
    """Read pytorch_model*.bin; pickle can run code, so it is refused unless asked for."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.scratch is None):
            raise ValueError("give exactly one of `path` and `scratch`")
        if self.shape is not None and self.scratch is not None:
            raise ValueError("`shape` describes the model at `path`: `scratch` has its own")
        return self


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


class TokenizerSection(Section):
    """New pieces for the base's vocabulary: trained on the corpus, or taken from trained models.

    A SentencePiece base gets pieces of a SentencePiece model trained here; a byte-level BPE base
    (Llama-3, Qwen) gets merges learned on top of its own.
    """

    unchanged: bool = False
    """Keep the base's vocabulary as it is: there are no new pieces and no new rows."""
    pieces: int | None = Field(None, ge=1)
    """How many pieces the finished vocabulary has: `altiplano plan` counts with it before the
    vocabulary exists, and making one of another size is an error."""
    vocab_size: int | None = Field(None, ge=16)
    """Pieces to train on the texts of `languages` (before pieces the base has are dropped)."""
    languages: list[str] = ["zh"]
    """Which of the corpus' languages the new pieces are trained on."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece algorithm of the addition; a byte-level base needs `bpe`."""
    character_coverage: float = Field(0.9995, gt=0.9, le=1.0)
    """Share of the characters that must be covered by pieces of their own."""
    normalization: Literal["identity", "nfkc", "nmt_nfkc"] = "identity"
    """What SentencePiece does to the text it learns from. Texts are never normalised when they are
    encoded, so anything but `identity` suits corpora cleaned with `data.clean.unicode: NFKC`."""
    split_digits: bool = True
    """Digits are pieces of their own, as in LLaMA."""
    max_piece_length: int = Field(16, ge=1)
    """Longest new piece in characters."""
    max_lines: int = Field(2_000_000, ge=1)
    """Lines to learn from; of a larger corpus a uniform sample is drawn, by `seed`."""
    words: str | None = None
    """File of domain terms, one per line, each to become one piece."""
    add: list[str] = []
    """Further trained `.model` files to merge, in order."""
    scores: Literal["distinct", "reference"] = "distinct"
    """`distinct`: ids are the same in SentencePiece, Hugging Face and vLLM.
    `reference`: score 0 for every added piece, byte for byte as Chinese-LLaMA-Alpaca."""
    keep: KeptPieces | None = None
    """Which new pieces are kept: `non_ascii` (no visible ASCII character) or `cjk` (nothing but
    Chinese characters and punctuation) leave text without such characters tokenised exactly as
    before; `all` may change it. Default: `non_ascii`; `all` where `scores` is `reference`."""
    drop: list[DroppedPieces] = []
    """New pieces with these characters, full-width forms included, are left out."""
    min_count: int = Field(0, ge=0)
    """Leave out new pieces that occur fewer times than this in the training texts, so that no row
    stays untrained. A rare piece that frequent ones are built from stays, and is counted."""
    pad_piece: str | None = None
    """Append one padding piece, for instance `[PAD]`."""

    @model_validator(mode="after")
    def _something_to_add(self) -> Self:
        problems = []
        adding = [
            name for name in ("vocab_size", "add", "words", "pad_piece") if getattr(self, name)
        ]
        if not adding and not self.unchanged:
            problems.append(
                "give `vocab_size` (train new pieces), `add` (merge trained models), `words` or "
                "`pad_piece`, or keep the base's vocabulary with `unchanged: true`"
            )
        if adding and self.unchanged:
            problems.append(f"`unchanged` adds nothing: drop {_listed(adding)}")
        changed = [
            name
            for name, given in (
                ("keep", self.keep not in (None, "all")),
                ("drop", self.drop),
                ("min_count", self.min_count),
                ("words", self.words),
            )
            if given
        ]
        if self.scores == "reference" and changed:
            problems.append(
                f"`scores: reference` repeats the published merge byte for byte: drop "
                f"{_listed(changed)}, or use `scores: distinct`"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def kept_pieces(self) -> KeptPieces:
        """`keep`, or its default."""
        return self.keep or ("all" if self.scores == "reference" else "non_ascii")


class ExtendSection(Section):
    """New rows of the embedding and the head."""

    init: Literal["subpiece_mean", "mean", "gaussian", "random"] = "subpiece_mean"
    """How a new row starts: mean of the rows the base tokenizer splits the piece into; mean of all
    rows; a draw from the rows' mean and covariance; a draw with the model's initializer_range. The
    first is best where the base has read the language's bytes, as LLaMA has; where it never has
    (its held-out bits per byte are then far above 8), `mean` is."""
    pad_to_multiple: int = Field(1, ge=1)
    """Round the number of rows up to a multiple of this, for faster matrix products. The rows
    beyond the pieces are zero, are never trained or predicted, and the merged model has none."""


class PretrainSection(Section):
    """Continued pre-training, as a chain of stages."""

    stages: list[TrainSettings] = Field(min_length=1)
    """Each stage starts from what the one before it made."""

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, got {names}")
        return self


class MergeSection(Section):
    """Adapters into the base: one model directory."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the merged weights; `auto` keeps the base's. Sums are fp32, rounded once."""
    probe_tolerance: float = Field(2e-2, gt=0)
    """Largest allowed difference of merged and unmerged logits, relative to their spread."""


class DraftSection(Section):
    """A small model with the target's tokenizer, for speculative decoding."""

    layers: int = Field(1, ge=1)
    """How many of the target's first blocks it keeps."""
    loss: Literal["distill", "cross_entropy"] = "distill"
    """Learn the target's distribution or the data's next token."""
    train: FullTrainSettings
    """How it is trained; all its parameters are."""


class QuestionSource(Section):
    """Questions with known answers, asked of the model before and after."""

    path: str
    """JSON lines of {"instruction", "output"}."""
    language: str
    """Language code, for the report."""
    max_questions: int = Field(200, ge=1)
    """Ask at most this many."""


class EvaluateSection(Section):
    """What is measured on held-out data."""

    questions: list[QuestionSource] = []
    """Held-out questions; an answer is right when the expected text is what the model says."""
    max_tokens_per_answer: int = Field(48, ge=1)
    """Greedy tokens per answer."""
    max_bytes_per_language: int = Field(200_000, ge=100)
    """Held-out text scored per language, in UTF-8 bytes."""
    draft_tokens: int = Field(4, ge=1)
    """Tokens the draft proposes at a time when its acceptance is measured."""
    prompts: list[str] = []
    """Further prompts whose answers are shown in the report."""


class ServeOnly(Section):
    """What is needed to serve a directory without its YAML."""

    serve: ServeSection = ServeSection()
    """Serving."""
    cluster: ClusterSection = ClusterSection()
    """Where it runs."""


class Config(Section):
    """One run: from raw text and a base model to a served one."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Name of the run."""
    output: str = "runs/{name}"
    """Directory of the run's artifacts; `{name}` is replaced. Local or on a shared file system."""
    seed: int = 0
    """Seed of everything random; each use has a stream of its own."""
    world: WorldSection | None = None
    """Generate the demo's data into `{output}/world`."""
    base_model: BaseModelSection
    """The model to teach."""
    tokenizer: TokenizerSection
    """The new vocabulary."""
    extend: ExtendSection = ExtendSection()
    """The new rows."""
    data: DataSection = DataSection()
    """Texts and instructions."""
    pretrain: PretrainSection | None = None
    """Continued pre-training."""
    sft: TrainSettings | None = None
    """Instruction tuning."""
    merge: MergeSection = MergeSection()
    """Merging."""
    draft: DraftSection | None = None
    """The draft model."""
    evaluate: EvaluateSection = EvaluateSection()
    """Measuring."""
    serve: ServeSection = ServeSection()
    """Serving."""
    cluster: ClusterSection = ClusterSection()
    """Where it runs."""
    track: TrackSection = TrackSection()
    """Where it is seen."""

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        problems = []
        if self.pretrain and not self.data.text:
            problems.append("`pretrain` needs at least one source in `data.text`")
        if self.sft and not self.data.instructions:
            problems.append("`sft` needs at least one source in `data.instructions`")
        stages = list(self.pretrain.stages) if self.pretrain else []
        stages += [self.sft] if self.sft else []
        if self.tokenizer.unchanged and any(not s.full and s.rows == "new" for s in stages):
            problems.append(
                "`tokenizer.unchanged` leaves no new rows to train: set `rows: none` or `rows: all`"
            )
        if not self.data.text and (measured := self._measured_stages()):
            problems.append(
                f"`evaluate_steps` (in {', '.join(measured)}) measures held-out text: give "
                f"`data.text`"
            )
        if self.tokenizer.vocab_size:
            spoken = {source.language for source in self.data.text}
            missing = [lang for lang in self.tokenizer.languages if lang not in spoken]
            if missing:
                problems.append(
                    f"`tokenizer.languages` {missing} have no text: "
                    f"`data.text` holds {sorted(spoken)}"
                )
        if PurePosixPath(self.output) == PurePosixPath("."):
            problems.append("`output` must be a directory of its own, not the project root")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _measured_stages(self) -> list[str]:
        """Stages on the new vocabulary that measure held-out text while they train."""
        stages = {
            **{f"pretrain {s.name}": s for s in (self.pretrain.stages if self.pretrain else [])},
            **({"sft": self.sft} if self.sft else {}),
            **({"draft": self.draft.train} if self.draft else {}),
        }
        return [name for name, stage in stages.items() if stage.evaluate_steps is not None]
