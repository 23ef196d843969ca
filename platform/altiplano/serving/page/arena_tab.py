"""The page's arena: two models answer the same, the visitor says which one better.

Knows the panel, the service's client and the votes. A bout is a conversation with both models at
once; it ends with its vote, so that each pair of answers is voted on once.
"""

import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from altiplano.serving.page.arena import Vote, Votes, Winner, table
from altiplano.serving.page.chat_tab import stop
from altiplano.serving.page.client import Service, watch
from altiplano.serving.page.panel import (
    Message,
    Panel,
    Turn,
    Wishes,
    chat_box,
    line,
    question_box,
    shown,
    switch,
)

Update = dict[Any, Any]
_BALLOT: tuple[tuple[str, Winner], ...] = (
    ("Left is better", "left"),
    ("Right is better", "right"),
    ("Tie", "tie"),
    ("Both bad", "bad"),
)


@dataclass
class Bout:
    """Two models, and what they were asked so far."""

    models: tuple[str, str]
    blind: bool
    left: list[Turn] = field(default_factory=list)
    right: list[Turn] = field(default_factory=list)
    voted: bool = False

    @property
    def complete(self) -> bool:
        """Whether there are two answers to compare."""
        turns = [*self.left, *self.right]
        return bool(turns) and all(turn.answer.done and not turn.answer.error for turn in turns)

    def name(self, side: int) -> str:
        """What is said of a side's model."""
        hidden = self.blind and not self.voted
        return f"Model {'AB'[side]}" + ("" if hidden else f": {self.models[side]}")


class ArenaTab:
    """The tab, drawn where this is created."""

    def __init__(self, service: Service, panel: Panel, votes: Votes) -> None:
        self._service, self._votes = service, votes
        self._bout = gr.State(None)
        with gr.Row(equal_height=True):
            self.left = gr.Dropdown([], label="Left", min_width=150, elem_id="arena-left")
            self.right = gr.Dropdown([], label="Right", min_width=150, elem_id="arena-right")
            self._blind = gr.Checkbox(
                False, label="Blind: two at random", min_width=150, elem_id="arena-blind"
            )
        with gr.Row():
            self._names, self._boxes = [], []
            for side in ("left", "right"):
                with gr.Column(min_width=260):
                    self._names.append(line(f"arena-name-{side}"))
                    self._boxes.append(chat_box(f"arena-box-{side}", "34vh"))
        with gr.Row(equal_height=True):
            self._question = question_box("arena-question")
            self._send = gr.Button(
                "Send", variant="primary", scale=1, min_width=80, elem_id="arena-send"
            )
        with gr.Row():
            self._ballot = [
                gr.Button(label, interactive=False, min_width=100, elem_id=f"arena-vote-{winner}")
                for label, winner in _BALLOT
            ]
        with gr.Row():
            self._stop = gr.Button("Stop", interactive=False, min_width=80, elem_id="arena-stop")
            self._new = gr.Button("New round", min_width=80, elem_id="arena-new")
        self._note = line("arena-note")
        self.table = gr.Dataframe(
            headers=["Model", "Rating", "± (95 %)", "Votes", "Won"],
            datatype="str",
            interactive=False,
            label="Ratings",
            buttons=[],
            elem_id="arena-table",
        )
        self._wire(panel)

    def _wire(self, panel: Panel) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        view = [self._bout, *self._names, *self._boxes, self._note, *self._buttons()]
        gr.on(
            [self._send.click, self._question.submit],
            self._ask,
            [self._question, self._bout, self.left, self.right, self._blind, *panel.inputs],
            [self._question, *view],
            **quiet,
        )
        self._stop.click(self._stop_both, self._bout, None, **quiet)
        self._new.click(self._forget, None, view, **quiet)
        for button, (_, winner) in zip(self._ballot, _BALLOT, strict=True):
            button.click(self._voter(winner), self._bout, [*view, self.table], **quiet)

    def rows(self) -> list[list[str]]:
        """The table of ratings, as it is shown."""
        return [
            [
                rating.model,
                f"{rating.rating:.0f}",
                f"{rating.margin:.0f}",
                str(rating.votes),
                f"{rating.won:.0%}",
            ]
            for rating in table(self._votes.read())
        ]

    async def _ask(
        self,
        question: str,
        bout: Bout | None,
        left: str | None,
        right: str | None,
        blind: bool,
        *values: Any,
    ) -> AsyncIterator[Update]:
        wishes = Wishes(*values)
        if not question.strip():
            yield {self._bout: bout}
            return
        if bout is None or bout.voted:
            bout = await self._begin(left, right, blind, wishes.key)
        if bout is None:
            yield {self._note: "⚠ the arena needs two different models"}
            return
        bout.left.append(Turn(question))
        bout.right.append(Turn(question))
        asked = [
            (wishes.question(model, turns), turns[-1].answer)
            for model, turns in zip(bout.models, (bout.left, bout.right), strict=True)
        ]
        yield {self._question: "", self._note: ""} | self._view(bout, busy=True)
        async with aclosing(watch(self._service, wishes.key, asked)) as progress:
            async for _ in progress:
                yield self._texts(bout)
        yield self._view(bout, busy=False)

    async def _begin(
        self, left: str | None, right: str | None, blind: bool, key: str
    ) -> Bout | None:
        if blind:
            offered = await self._service.models_or_none(key)
            if len(offered) < 2:
                return None
            left, right = random.sample(offered, 2)
        if left is None or right is None or left == right:
            return None
        return Bout((left, right), blind)

    def _voter(self, winner: Winner) -> Any:
        def vote(bout: Bout | None) -> Update:
            if bout is None or bout.voted or not bout.complete:
                return {self._note: "⚠ there is nothing to vote on"}
            try:
                self._votes.add(Vote(*bout.models, winner=winner, blind=bout.blind))
            except OSError as error:
                return {self._note: f"⚠ the vote could not be written: {error.strerror}"}
            bout.voted = True
            thanks = "the vote counts; the next question starts a new round"
            return {self._note: thanks, self.table: self.rows()} | self._view(bout, busy=False)

        return vote

    async def _stop_both(self, bout: Bout | None) -> None:
        if bout is not None:
            await stop([*bout.left, *bout.right])

    def _forget(self) -> Update:
        empty: dict[Any, Any] = {box: [] for box in self._boxes}
        return (
            {self._bout: None, self._note: ""}
            | dict.fromkeys(self._names, "")
            | empty
            | dict.fromkeys(self._ballot, gr.update(interactive=False))
        )

    def _buttons(self) -> list[gr.Button]:
        return [self._send, self._new, self._stop, *self._ballot]

    def _view(self, bout: Bout, busy: bool) -> Update:
        votable = bout.complete and not bout.voted and not busy
        return (
            {self._bout: bout}
            | {name: bout.name(side) for side, name in enumerate(self._names)}
            | self._texts(bout)
            | switch(busy, idle=[self._send, self._new], running=[self._stop])
            | dict.fromkeys(self._ballot, gr.update(interactive=votable))
        )

    def _texts(self, bout: Bout) -> Update:
        sides: list[list[Message]] = [shown(bout.left), shown(bout.right)]
        return dict(zip(self._boxes, sides, strict=True))
