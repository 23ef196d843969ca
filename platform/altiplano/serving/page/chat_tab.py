"""The page's tab for conversations with one model.

Knows the panel and the service's client. One conversation per browser tab, held in this process
and gone with the tab.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

from altiplano.serving.page.client import Service, watch
from altiplano.serving.page.panel import (
    NO_MODEL,
    Panel,
    Turn,
    Wishes,
    chat_box,
    question_box,
    shown,
    switch,
)

Update = dict[Any, Any]


class ChatTab:
    """The tab, drawn where this is created."""

    def __init__(self, service: Service, panel: Panel) -> None:
        self._service = service
        self._turns = gr.State([])
        self.model = gr.Dropdown([], show_label=False, container=False, elem_id="chat-model")
        self._box = chat_box("chat-box", "56vh")
        with gr.Row(equal_height=True):
            self._question = question_box("chat-question")
            self._send = gr.Button(
                "Send", variant="primary", scale=1, min_width=80, elem_id="chat-send"
            )
        with gr.Row():
            self._stop = gr.Button("Stop", interactive=False, min_width=100, elem_id="chat-stop")
            self._again = gr.Button("Regenerate", min_width=100, elem_id="chat-again")
            self._clear = gr.Button("Clear", min_width=100, elem_id="chat-clear")
        self._wire(panel)

    def _wire(self, panel: Panel) -> None:
        buttons = [self._send, self._again, self._clear, self._stop]
        outputs = [self._turns, self._box, self._question, *buttons]
        wishes = [self.model, *panel.inputs]
        gr.on(
            [self._send.click, self._question.submit],
            self._ask,
            [self._question, self._turns, *wishes],
            outputs,
            show_progress="hidden",
            api_visibility="private",
        )
        self._again.click(
            self._ask_again,
            [self._turns, *wishes],
            outputs,
            show_progress="hidden",
            api_visibility="private",
        )
        self._stop.click(stop, self._turns, None, show_progress="hidden", api_visibility="private")
        self._clear.click(
            lambda: ([], []),
            None,
            [self._turns, self._box],
            show_progress="hidden",
            api_visibility="private",
        )

    async def _ask(
        self, question: str, turns: list[Turn], model: str | None, *wishes: Any
    ) -> AsyncIterator[Update]:
        if not question.strip():
            yield {self._turns: turns}
            return
        emptied = {self._question: ""}
        async for update in self._answer([*turns, Turn(question)], model, Wishes(*wishes)):
            yield emptied | update
            emptied = {}

    async def _ask_again(
        self, turns: list[Turn], model: str | None, *wishes: Any
    ) -> AsyncIterator[Update]:
        if not turns:
            yield {self._turns: turns}
            return
        again = [*turns[:-1], Turn(turns[-1].question)]
        async for update in self._answer(again, model, Wishes(*wishes)):
            yield update

    async def _answer(
        self, turns: list[Turn], model: str | None, wishes: Wishes
    ) -> AsyncIterator[Update]:
        answer = turns[-1].answer
        yield {self._turns: turns, self._box: shown(turns)} | self._busy(True)
        if model is None:
            answer.fail(NO_MODEL)
        else:
            asked = [(wishes.question(model, turns), answer)]
            async with aclosing(watch(self._service, wishes.key, asked)) as progress:
                async for _ in progress:
                    yield {self._box: shown(turns)}
        yield {self._box: shown(turns)} | self._busy(False)

    def _busy(self, busy: bool) -> Update:
        return switch(busy, idle=[self._send, self._again, self._clear], running=[self._stop])


async def stop(turns: list[Turn]) -> None:
    """Abandon the answers that still come."""
    for turn in turns:
        turn.answer.stop()
