"""The page's tab for base models: a text, and how the model goes on with it.

Knows the panel and the service's client.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

from altiplano.serving.page.client import Answer, Question, Service, watch
from altiplano.serving.page.panel import NO_MODEL, Panel, Wishes, line, switch

Update = dict[Any, Any]


class CompletionTab:
    """The tab, drawn where this is created."""

    def __init__(self, service: Service, panel: Panel) -> None:
        self._service = service
        self._answer = gr.State(None)
        self.model = gr.Dropdown([], show_label=False, container=False, elem_id="completion-model")
        self._text = gr.Textbox(label="Text", lines=6, max_lines=16, elem_id="completion-text")
        with gr.Row():
            self._go = gr.Button("Complete", variant="primary", elem_id="completion-go")
            self._stop = gr.Button("Stop", interactive=False, elem_id="completion-stop")
            self._keep = gr.Button("Add to the text", elem_id="completion-keep")
        self._result = gr.Textbox(
            label="Completion",
            lines=6,
            max_lines=16,
            interactive=False,
            elem_id="completion-result",
        )
        self._note = line("completion-note")
        self._wire(panel)

    def _wire(self, panel: Panel) -> None:
        self._go.click(
            self._complete,
            [self._text, self.model, *panel.inputs],
            [self._answer, self._result, self._note, self._go, self._keep, self._stop],
            show_progress="hidden",
            api_visibility="private",
        )
        self._stop.click(
            _stop, self._answer, None, show_progress="hidden", api_visibility="private"
        )
        self._keep.click(
            lambda text, result: (text + result, ""),
            [self._text, self._result],
            [self._text, self._result],
            show_progress="hidden",
            api_visibility="private",
        )

    async def _complete(self, text: str, model: str | None, *values: Any) -> AsyncIterator[Update]:
        wishes, answer = Wishes(*values), Answer()
        yield {self._answer: answer, self._result: "", self._note: ""} | self._busy(True)
        if model is None:
            answer.fail(NO_MODEL)
        else:
            asked = [(Question(model, wishes.settings(), prompt=text), answer)]
            async with aclosing(watch(self._service, wishes.key, asked)) as progress:
                async for _ in progress:
                    yield {self._result: answer.text}
        note = f"⚠ {answer.error}" if answer.error else answer.note()
        yield {self._result: answer.text, self._note: note} | self._busy(False)

    def _busy(self, busy: bool) -> Update:
        return switch(busy, idle=[self._go, self._keep], running=[self._stop])


async def _stop(answer: Answer | None) -> None:
    if answer is not None:
        answer.stop()
