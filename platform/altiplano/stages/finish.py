"""The stages after training: merge and evaluate.

Merging ends with a check that the merged model says what base and adapters say. Evaluation reads
every model of the run, so that the report shows what each stage changed.
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from altiplano.artifact import Artifact, require_same_tokenizer
from altiplano.console import console
from altiplano.stages.stage import Work

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from altiplano.evaluate.report import Results

CHAT_TEMPLATE = "chat_template.jinja"
_MODEL_KINDS = ("model", "adapter")
_PROMPT_TOKENS = 32
_SAMPLES_PER_LANGUAGE = 3


def merge(work: Work) -> None:
    """Adapters into the base, the chat template beside them, and the check."""
    from altiplano.merge.check import check_chain
    from altiplano.merge.merge import merge_checkpoint
    from altiplano.merge.probe import probe
    from altiplano.model.load import weights_fingerprint

    section = work.project.config.merge
    model, adapters = work.inputs["model"], work.roles("adapter-")
    check_chain(model, adapters)
    folders = [adapter.path for adapter in adapters]
    vocab_old = model.manifest.vocab_old or 0
    metrics: dict[str, float] = dict(
        merge_checkpoint(model.path, folders, vocab_old, work.output, section.dtype)
    )
    if "chat" in work.inputs:
        shutil.copy2(work.path("chat") / CHAT_TEMPLATE, work.output / CHAT_TEMPLATE)
    metrics |= probe(work.output, model.path, folders, vocab_old, section.probe_tolerance)
    work.manifest.metrics = metrics
    work.manifest.tokenizer_fingerprint = model.manifest.tokenizer_fingerprint
    work.manifest.vocab_old = model.manifest.vocab_old
    work.manifest.vocab_new = model.manifest.vocab_new
    work.manifest.weights_fingerprint = weights_fingerprint(work.output)


def evaluate(work: Work) -> None:
    """Bits per byte of every stage, compression, answers before and after, draft acceptance."""
    from altiplano.evaluate.report import Results, write_report

    started = time.monotonic()
    results = Results(run=work.project.config.name)
    held_out = _held_out(work.path("data-text")) if "data-text" in work.inputs else {}
    for name, artifact in work.inputs.items():
        results.seconds[name] = artifact.manifest.seconds
    _measure_bits(work, results, held_out)
    _measure_answers(work, results)
    if "draft" in work.inputs:
        _measure_draft(work, results, held_out)
    results.seconds["evaluate"] = round(time.monotonic() - started, 1)
    write_report(results, work.output)
    work.manifest.metrics = {
        f"bits_per_byte_{language}": value
        for language, value in results.bits_per_byte.get("merge", {}).items()
    }


def _held_out(data: Path) -> dict[str, list[str]]:
    """Language -> held-out documents."""
    found = {}
    for file in sorted(data.glob("held_out.*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            found[file.name.split(".")[1]] = [json.loads(line)["text"] for line in lines]
    return found


def _measure_bits(work: Work, results: "Results", held_out: dict[str, list[str]]) -> None:
    from altiplano.evaluate.bits import bits_per_byte
    from altiplano.evaluate.report import Change
    from altiplano.vocabulary.load import Vocabulary

    config = work.project.config
    compression: dict[str, list[float]] = {}
    for name, artifact in _models(work):
        model, vocabulary = _load(work, artifact), Vocabulary(_tokenizer_of(work, artifact))
        for language, texts in held_out.items():
            found = bits_per_byte(
                model,
                vocabulary,
                texts,
                max_bytes=config.evaluate.max_bytes_per_language,
                sequence_length=config.data.sequence_length,
            )
            results.bits_per_byte.setdefault(name, {})[language] = found["bits_per_byte"]
            compression.setdefault(language, []).append(found["tokens_per_character"])
        told = ", ".join(f"{k} {v:.3f}" for k, v in results.bits_per_byte.get(name, {}).items())
        console.log(f"bits per byte, {name}: {told}")
    for language, values in compression.items():
        results.tokens_per_character[language] = Change(values[0], values[-1])


def _measure_answers(work: Work, results: "Results") -> None:
    """Ask base and finished model the same questions with the same template."""
    from altiplano.evaluate.questions import Question, accuracy, ask, read_questions, reply_to
    from altiplano.evaluate.report import Change, Sample

    config = work.project.config
    section = config.evaluate
    template = _template(work)
    before, after = work.inputs["base"], work.inputs["merge"]
    loaded = [(_load(work, artifact), artifact.path) for artifact in (before, after)]
    limit = section.max_tokens_per_answer
    asked: dict[str, list[Question]] = {}
    for source in section.questions:
        path = work.project.resolve(source.path)
        found = read_questions(path, source.language, source.max_questions)
        asked.setdefault(source.language, []).extend(found)
    for language, questions in asked.items():
        said = [ask(model, folder, template, questions, limit) for model, folder in loaded]
        results.questions[language] = len(questions)
        results.accuracy[language] = Change(accuracy(said[0]), accuracy(said[1]))
        pairs = list(zip(*said, strict=True))[:_SAMPLES_PER_LANGUAGE]
        results.samples += [
            Sample(first.question.instruction, first.reply, last.reply) for first, last in pairs
        ]
    if section.prompts:
        replies = [reply_to(m, folder, template, section.prompts, limit) for m, folder in loaded]
        results.samples += [Sample(*said) for said in zip(section.prompts, *replies, strict=True)]


def _measure_draft(work: Work, results: "Results", held_out: dict[str, list[str]]) -> None:
    from altiplano.evaluate.acceptance import draft_acceptance
    from altiplano.model.load import load_model

    section = work.project.config.evaluate
    target, draft = work.inputs["merge"], work.inputs["draft"]
    require_same_tokenizer(
        (f"target {target.path}", target.manifest), (f"draft {draft.path}", draft.manifest)
    )
    model = load_model(target.path)
    results.draft_acceptance = draft_acceptance(
        model,
        load_model(draft.path),
        _draft_prompts(work, held_out),
        k=section.draft_tokens,
        max_new_tokens=section.max_tokens_per_answer,
        eos_id=model.config.eos_token_id,
    )


def _draft_prompts(work: Work, held_out: dict[str, list[str]]) -> list[list[int]]:
    """Chat prompts of the questions; beginnings of held-out documents where there are none."""
    from altiplano.evaluate.questions import encode_chats, read_questions
    from altiplano.vocabulary.load import Vocabulary

    config, folder = work.project.config, work.path("merge")
    asked = list(config.evaluate.prompts)
    for source in config.evaluate.questions:
        path = work.project.resolve(source.path)
        found = read_questions(path, source.language, min(50, source.max_questions))
        asked += [question.instruction for question in found]
    if asked:
        return encode_chats(folder, _template(work), asked)[1]
    vocabulary = Vocabulary(folder)
    texts = [text for documents in held_out.values() for text in documents[:25]]
    start = [vocabulary.bos_id] if vocabulary.bos_id >= 0 else []
    return [[*start, *vocabulary.encode(t)[:_PROMPT_TOKENS]] for t in texts]


def _template(work: Work) -> str:
    """The template of the run's chat data; without any, the one its config names."""
    from altiplano.data.chat.encode import make_template
    from altiplano.vocabulary.load import Vocabulary

    if "data-chat" in work.inputs:
        return (work.path("data-chat") / CHAT_TEMPLATE).read_text(encoding="utf-8")
    section = work.project.config.data
    vocabulary = Vocabulary(work.path("merge"))
    return make_template(section.template, section.system_prompt, vocabulary).jinja


def _models(work: Work) -> Iterator[tuple[str, Artifact]]:
    """Every model and adapter of the run in order, but the draft."""
    for name, artifact in work.inputs.items():
        if artifact.manifest.kind in _MODEL_KINDS and name != "draft":
            yield name, artifact


def _load(work: Work, artifact: Artifact) -> "LlamaForCausalLM":
    """A model, or the chain that ends in an adapter, in fp32."""
    from altiplano.model.fold import AdapterStack, fold_into
    from altiplano.model.load import load_model

    if artifact.manifest.kind == "model":
        return load_model(artifact.path)
    inputs, run = artifact.manifest.inputs, work.project.output
    links = [role for role in inputs if role.startswith("adapter-")]
    earlier = [run / inputs[f"adapter-{index}"].path for index in range(len(links))]
    model = load_model(run / inputs["model"].path)
    fold_into(model, AdapterStack([*earlier, artifact.path], artifact.manifest.vocab_old or 0))
    return model


def _tokenizer_of(work: Work, artifact: Artifact) -> Path:
    """Where the tokenizer of a model or adapter lies."""
    if artifact.manifest.kind == "model":
        return artifact.path
    return work.project.output / artifact.manifest.inputs["model"].path
