"""The page's tab for conversations with one model.

Knows the panel and the service's client. One conversation per browser tab, held in this process
and gone with the tab.
"""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from altiplano.serving.page.client import Service, watch
from altiplano.serving.page.panel import Panel, Turn, Wishes, chat_box, shown

Update = dict[Any, Any]


class ChatTab:
    """The tab, drawn where this is created."""

    def __init__(self, service: Service, panel: Panel) -> None:
        self._service = service
        self.turns = gr.State([])
        self.model = gr.Dropdown([], label="Model", elem_id="chat-model")
        self.box = chat_box("chat-box", "56vh")
        with gr.Row(equal_height=True):
            self.question = gr.Textbox(
                show_label=False,
                placeholder="Ask something. Enter sends, Shift+Enter makes a new line.",
                lines=1,
                max_lines=8,
                scale=8,
                min_width=200,
                autofocus=True,
                elem_id="chat-question",
            )
            self.send = gr.Button("Send", variant="primary", min_width=80, elem_id="chat-send")
        with gr.Row():
            self.stop = gr.Button("Stop", interactive=False, min_width=80, elem_id="chat-stop")
            self.again = gr.Button("Regenerate", min_width=80, elem_id="chat-again")
            self.clear = gr.Button("Clear", min_width=80, elem_id="chat-clear")
        self._wire(panel)

    def _wire(self, panel: Panel) -> None:
        outputs = [self.turns, self.box, self.question, *self._buttons()]
        gr.on(
            [self.send.click, self.question.submit],
            self._ask,
            [self.question, self.turns, self.model, *panel.inputs],
            outputs,
            show_progress="hidden",
        )
        self.again.click(
            self._ask_again,
            [self.turns, self.model, *panel.inputs],
            outputs,
            show_progress="hidden",
        )
        self.stop.click(_stop, self.turns, None, show_progress="hidden")
        self.clear.click(lambda: ([], []), None, [self.turns, self.box], show_progress="hidden")

    def _buttons(self) -> list[gr.Button]:
        return [self.send, self.again, self.clear, self.stop]

    async def _ask(
        self, question: str, turns: list[Turn], model: str | None, *wishes: Any
    ) -> AsyncIterator[Update]:
        if question.strip():
            turns = [*turns, Turn(question)]
            async for update in self._answer(turns, model, Wishes(*wishes)):
                yield update | {self.question: ""} if update[self.turns] else update
        else:
            yield {self.turns: turns}

    async def _ask_again(
        self, turns: list[Turn], model: str | None, *wishes: Any
    ) -> AsyncIterator[Update]:
        if turns:
            turns = [*turns[:-1], Turn(turns[-1].question)]
            async for update in self._answer(turns, model, Wishes(*wishes)):
                yield update
        else:
            yield {self.turns: turns}
