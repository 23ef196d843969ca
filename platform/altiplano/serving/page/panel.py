"""What all tabs of the page share: the settings beside them, and how turns are shown.

Knows the framework's components, not what a tab does with them. Costs nothing per answer but the
text it sends to the browser: each update is the difference to the last.
"""

import html
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from altiplano.serving.page.client import Answer, Question, Settings

Message = dict[str, Any]

NO_MODEL = "no model is chosen: where the service asks for an API key, type yours and press Enter"


@dataclass
class Turn:
    """A question and its answer."""

    question: str
    answer: Answer = field(default_factory=Answer)


class Panel:
    """The settings, drawn where this is created (inside `gr.Blocks`)."""

    def __init__(self) -> None:
        self.key = gr.Textbox(
            label="API key",
            type="password",
            placeholder="where the service asks for one",
            html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
            elem_id="key",
        )
        self.system = gr.Textbox(label="System prompt", lines=2, max_lines=8, elem_id="system")
        with gr.Group():
            self.temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature")
            self.top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p")
            self.top_k = gr.Slider(0, 200, 0, step=1, label="Top-k (0 is all)")
            self.repetition = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty")
        with gr.Group(), gr.Row():
            self.longest = gr.Number(
                0,
                label="Most tokens (0: all)",
                precision=0,
                minimum=0,
                min_width=110,
                elem_id="longest",
            )
            self.seed = gr.Number(
                -1, label="Seed (-1: random)", precision=0, min_width=110, elem_id="seed"
            )
        self.beams = gr.Slider(
            0, 8, 0, step=1, label="Beams (0 samples; beam search does not stream)", elem_id="beams"
        )
        self.inputs = [
            self.key,
            self.system,
            self.temperature,
            self.top_p,
            self.top_k,
            self.repetition,
            self.longest,
            self.seed,
            self.beams,
        ]


@dataclass(frozen=True)
class Wishes:
    """The panel's values at one click, in the order of `Panel.inputs`."""

    key: str
    system: str
    temperature: float
    top_p: float
    top_k: float
    repetition: float
    longest: float | None
    seed: float | None
    beams: float

    def settings(self) -> Settings:
        """As the service is asked; what is left alone is left to it."""
        return Settings(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=int(self.top_k) or None,
            repetition_penalty=self.repetition if self.repetition != 1 else None,
            max_tokens=int(self.longest) if self.longest else None,
            seed=None if self.seed is None or self.seed < 0 else int(self.seed),
            beams=int(self.beams),
        )

    def question(self, model: str, turns: list[Turn]) -> Question:
        """The conversation whose last turn is to be answered; turns that failed are left out."""
        messages = [{"role": "system", "content": self.system}] if self.system.strip() else []
        for turn in turns[:-1]:
            if turn.answer.text:
                messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": turn.answer.text})
        messages.append({"role": "user", "content": turns[-1].question})
        return Question(model, self.settings(), messages)


def chat_box(name: str, height: str) -> gr.Chatbot:
    """A box of turns that shows every text as it is: no HTML, no Markdown, no images."""
    return gr.Chatbot(
        elem_id=name,
        height=height,
        show_label=False,
        container=False,
        render_markdown=False,
        latex_delimiters=[],
        # Its copy button would copy the escaped text.
        buttons=[],
        allow_file_downloads=False,
        layout="bubble",
    )


def question_box(name: str) -> gr.Textbox:
    """The box a question is typed into."""
    return gr.Textbox(
        show_label=False,
        placeholder="Ask something",
        lines=1,
        max_lines=8,
        scale=8,
        min_width=200,
        elem_id=name,
    )


def line(name: str, visible: bool = True) -> gr.Textbox:
    """A line of text that is read, not written."""
    return gr.Textbox(
        show_label=False,
        container=False,
        interactive=False,
        visible=visible,
        lines=1,
        max_lines=4,
        elem_id=name,
        elem_classes="line",
    )


def switch(busy: bool, idle: list[gr.Button], running: list[gr.Button]) -> dict[Any, Any]:
    """The update that leaves only those buttons usable that fit: while an answer comes, or not."""
    return {button: gr.update(interactive=not busy) for button in idle} | {
        button: gr.update(interactive=busy) for button in running
    }


def shown(turns: list[Turn]) -> list[Message]:
    """Turns as a chat box takes them, each answer with its note below."""
    messages = []
    for turn in turns:
        messages.append(_message("user", turn.question))
        answer = turn.answer
        text = answer.text or ("" if answer.done else "…")
        if text:
            messages.append(_message("assistant", text))
        if answer.error:
            messages.append(_message("assistant", f"⚠ {answer.error}"))
        elif note := answer.note():
            messages.append(_message("assistant", "", title=note))
    return messages


def _message(role: str, text: str, title: str | None = None) -> Message:
    # Even without Markdown the framework's box reads its text as HTML; and given as a plain string,
    # it would remove the text's indentation.
    content = {"type": "text", "text": html.escape(text, quote=False)}
    message: Message = {"role": role, "content": [content]}
    if title is not None:
        message["metadata"] = {"title": title, "status": "done"}
    return message
