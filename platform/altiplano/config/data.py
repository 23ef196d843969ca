"""What a run reads and what is done to it before training: sources, cleaning, mixing, templates.

Knows what may be said, not how texts are read.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from altiplano.config.training import Section

TextFormat = Literal["auto", "lines", "paragraphs", "file", "jsonl", "json", "parquet", "dataset"]
RecordFormat = Literal["auto", "jsonl", "json", "parquet", "dataset"]


class TextSource(Section):
    """One corpus of plain text."""

    path: str
    """File, glob, fsspec URL (`s3://`...) or, for `format: dataset`, a Hugging Face dataset: a
    folder or a hub id. Relative paths start at the project root."""
    language: str
    """Language code such as `en` or `zh`; held-out bits per byte are reported per language."""
    name: str | None = None
    """Name in counts and messages; the path by default. No two sources may share one."""
    format: TextFormat = "auto"
    """How documents are told apart: one per line, per blank-line block, per file, or by record.
    `auto` goes by the suffix: .jsonl, .json, .parquet, else paragraphs."""
    text_key: str = "text"
    """For records: dotted path to the text; lists on the way are walked, as in
    `data.paragraphs.context`. For Parquet and datasets: the column."""
    subset: str | None = None
    """For `dataset`: its configuration."""
    split: str = "train"
    """For `dataset`: its split."""
    max_documents: int | None = Field(None, ge=1)
    """Take at most this many documents."""
    repeat: float = Field(1.0, gt=0, le=100)
    """How often each document is trained on: 2 doubles them, 0.5 takes half of them, chosen by a
    hash of their content. With weights: the most often."""
    weight: float | None = Field(None, gt=0)
    """Share of the training tokens, relative to the other sources' weights. Give it to all sources
    or to none; the store then holds as many tokens as the scarcest source allows."""

    @property
    def label(self) -> str:
        """Name in counts and messages."""
        return self.name or self.path


class InstructionSource(Section):
    """One set of instruction records: Alpaca, ShareGPT, `messages` or Vicuna's input/output."""

    path: str
    """File, glob, fsspec URL or dataset, as of a text source."""
    language: str
    """Language code, for the reports."""
    name: str | None = None
    """Name in counts and messages; the path by default."""
    format: RecordFormat = "auto"
    """`auto` goes by the suffix: .jsonl, .parquet, else json (a list of records)."""
    subset: str | None = None
    """For `dataset`: its configuration."""
    split: str = "train"
    """For `dataset`: its split."""
    max_records: int | None = Field(None, ge=1)
    """Take at most this many records."""

    @property
    def label(self) -> str:
        """Name in counts and messages."""
        return self.name or self.path


class CleanSection(Section):
    """What is done to texts and records before they are tokenised. Everything that is left out
    stands in the artifact's `quarantine.jsonl` with its reason."""

    unicode: Literal["keep", "NFC", "NFKC"] = "NFC"
    """Unicode normalisation. NFKC also turns full-width letters and digits into ASCII."""
    strip_control: bool = True
    """Remove control and invisible characters (NUL, zero-width, byte-order marks, direction marks);
    newline and tab stay."""
    chinese: Literal["keep", "simplified", "traditional"] = "keep"
    """Convert between traditional and simplified characters (OpenCC)."""
    min_characters: int = Field(1, ge=1)
    """Leave out shorter texts."""
    max_characters: int | None = Field(None, ge=1)
    """Leave out longer texts."""
    max_repetition: float = Field(1.0, gt=0, le=1)
    """Leave out texts of which a larger share of characters lies in repeated stretches (Gopher's
    repetition rule); 1 keeps all, 0.3 is strict."""
    duplicates: Literal["keep", "exact", "near"] = "exact"
    """Leave out a text that came before: the same content, or nearly (MinHash)."""
    near_threshold: float = Field(0.8, gt=0, lt=1)
    """Jaccard similarity of character 5-grams from which on two texts are near-duplicates."""


class ReplaySection(Section):
    """Texts of the base's own language among the new, so that it is not forgotten."""

    text: list[TextSource] = Field(min_length=1)
    """Corpora in the base's language."""
    share: float = Field(gt=0, lt=1)
    """Share of all training tokens that is replay."""
    max_repeat: float = Field(4.0, gt=0)
    """Most often a replayed document may come; too little text is an error that says so."""


class DataSection(Section):
    """What is read for training, and how it becomes tokens."""

    text: list[TextSource] = []
    """Corpora for the vocabulary and for pre-training."""
    replay: ReplaySection | None = None
    """Old-language texts mixed in by share of tokens; no source of the vocabulary."""
    instructions: list[InstructionSource] = []
    """Records for instruction tuning."""
    clean: CleanSection = CleanSection()
    """Normalising, filtering, removing duplicates."""
    held_out: float = Field(0.02, ge=0, lt=0.5)
    """Share of the documents kept out of training, chosen by a hash of their content."""
    sequence_length: int = Field(512, ge=16)
    """Tokens per block."""
    cross_documents: bool = False
    """Let attention run across the documents of a block, for long-context runs."""
    template: Literal["llama-2", "alpaca", "vicuna", "chatml", "model"] = "llama-2"
    """Chat template of instruction tuning; stored with the model, so serving uses the same.
    `model`: the one the base model brings."""
    system_prompt: str | None = None
    """System message of conversations that bring none: by default the template's usual one
    (`llama-2`: the bilingual one of Chinese-LLaMA-Alpaca-2), empty for none."""
    loss_on: Literal["all_answers", "last_answer"] = "all_answers"
    """Which answers of a conversation are trained on."""
    overlong: Literal["fail", "drop", "truncate_prompt", "split"] = "truncate_prompt"
    """A record longer than a block: stop, leave it out (counted), cut the prompt's middle, or split
    the conversation between turns (then cut). An answer is never cut; one that alone does not fit
    is dropped and counted."""
    on_error: Literal["fail", "skip"] = "fail"
    """A record that cannot be read: stop with its place, or leave it out (in the quarantine)."""

    @property
    def all_text(self) -> list[TextSource]:
        """The corpora and the replayed ones."""
        return [*self.text, *(self.replay.text if self.replay else [])]

    @model_validator(mode="after")
    def _sources_agree(self) -> Self:
        problems = []
        for section, labels in (
            ("text", [source.label for source in self.all_text]),
            ("instructions", [source.label for source in self.instructions]),
        ):
            if twice := sorted({label for label in labels if labels.count(label) > 1}):
                problems.append(
                    f"two sources of `data.{section}` are called {twice[0]}: counts could not be "
                    f"told apart; give them different `name`s"
                )
        weighted = [source.label for source in self.text if source.weight is not None]
        if weighted and len(weighted) < len(self.text):
            problems.append(
                f"`weight` is given to {len(weighted)} of {len(self.text)} sources of `data.text`: "
                f"give it to all or to none"
            )
        if self.replay and not self.text:
            problems.append("`data.replay` mixes into `data.text`, which is empty")
        if problems:
            raise ValueError("; ".join(problems))
        return self
