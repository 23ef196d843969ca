"""A target, a draft and a draft replica made of arithmetic, for tests of speculation."""

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import zmq
from hypothesis import strategies as st

from altiplano.serving.speculation.protocol import (
    VERSION,
    Ahead,
    AheadGuess,
    Answer,
    Ask,
    Guess,
    Hello,
    Refused,
    Row,
    Welcome,
    decode_from_engine,
    digest,
    encode,
)

VOCAB = 50
LONGEST = 160


def draft_tokens(sequence: Sequence[int], k: int) -> list[int]:
    """What the draft says comes next; each token depends on everything before it."""
    whole = list(sequence)
    for _ in range(k):
        whole.append(digest(whole) % VOCAB)
    return whole[len(sequence) :]


def target_token(sequence: Sequence[int]) -> int:
    """What the target says comes next: the draft is right four times of five."""
    token = draft_tokens(sequence, 1)[0]
    return token if digest(list(sequence)) % 5 else (token + 1) % VOCAB


class ArithmeticDraft:
    """`drafter.Drafter` without a model; holds at most `memory` sequences, each once."""

    max_tokens = LONGEST

    def __init__(self, memory: int = 1000) -> None:
        self.memory = memory
        self.held: dict[int, list[int]] = {}
        self.rows: list[Row] = []
        """Every row ever asked for."""
        self.latest: list[list[int]] = []
        """The sequences of the latest ask; empty where missing."""

    def propose(self, rows: list[Row]) -> list[Guess]:
        self.latest = []
        return [self._propose(row) for row in rows]

    def _propose(self, row: Row) -> Guess:
        self.rows.append(row)
        base = self.held.pop(row.prev, []) if row.base_len else []
        if len(base) != row.base_len:
            self.latest.append([])
            return Guess([], missing=True)
        sequence = base + row.tokens
        self.latest.append(sequence)
        self.held[digest(sequence)] = sequence
        while len(self.held) > self.memory:
            del self.held[next(iter(self.held))]
        return Guess(draft_tokens(sequence, row.k))


class World:
    """vLLM's side of speculation: rows that grow by what a target accepts of the proposals."""

    def __init__(self, target: Callable[[Sequence[int]], int] = target_token) -> None:
        rows = 16
        self._target = target
        self.ids = np.zeros((rows, LONGEST), np.int32)
        self.lengths = np.zeros(rows, np.int32)
        self.sampled: list[list[int]] = []
        self.proposals: list[list[int]] = []
        self.accepted = 0
        """Proposed tokens that were right, in all."""

    @property
    def sequences(self) -> list[list[int]]:
        """All rows."""
        return [self.ids[i, : self.lengths[i]].tolist() for i in range(len(self.sampled))]

    def join(self, prompt: Sequence[int]) -> None:
        """A request arrives; its prompt is computed in the next step."""
        row = len(self.sampled)
        self.ids[row, : len(prompt)] = prompt
        self.lengths[row] = len(prompt)
        self.sampled.append([])
        self.proposals.append([])

    def leave(self, row: int) -> None:
        """A request ends; the last row takes its place."""
        last = len(self.sampled) - 1
        self.swap(row, last)
        self.sampled.pop()
        self.proposals.pop()

    def swap(self, one: int, other: int) -> None:
        """Two rows change places."""
        for array in (self.ids, self.lengths):
            array[[one, other]] = array[[other, one]]
        for items in (self.sampled, self.proposals):
            items[one], items[other] = items[other], items[one]

    def change(self, data: st.DataObject) -> None:
        """Something that happens to the rows between steps, drawn by hypothesis; or nothing."""
        rows = len(self.sampled)
        change = data.draw(st.sampled_from(["join", "twin", "leave", "swap", "none", "none"]))
        if change == "join" and rows < 8:
            self.join(data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=90)))
        elif change == "twin" and 0 < rows < 8:
            self.join(self.sequences[data.draw(st.integers(0, rows - 1))])
        elif change == "leave" and rows:
            self.leave(data.draw(st.integers(0, rows - 1)))
        elif change == "swap" and rows > 1:
            self.swap(0, rows - 1)

    def step(self, waiting: Sequence[int] = ()) -> None:
        """The target verifies the proposals and adds a token; rows of `waiting` make nothing."""
        for row, sequence in enumerate(self.sequences):
            made: list[int] = []
            if row not in waiting and len(sequence) < LONGEST - 1:
                for token in self.proposals[row]:
                    if token != self._target(sequence + made):
                        break
                    made.append(token)
                self.accepted += len(made)
                made.append(self._target(sequence + made))
            self.ids[row, self.lengths[row] : self.lengths[row] + len(made)] = made
            self.lengths[row] += len(made)
            self.sampled[row] = made

    def ask(self, propose: Callable[..., list[list[int]]]) -> list[list[int]]:
        """Let a proposer see the step, as vLLM's runner does."""
        self.proposals = propose(self.sampled, self.lengths, self.ids)
        return self.proposals


class DraftReplica:
    """A draft replica in a thread, which may misbehave."""

    def __init__(self, digest_: str = "same", memory: int = 1000) -> None:
        self.behave = "right"
        """right, wrong, silent, slow, reading (slow if long), garbage, rows, ids, many or stale."""
        self.draft = ArithmeticDraft(memory)
        self.asks = 0
        """Asks received."""
        self._digest = digest_
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> "DraftReplica":
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Close the socket, as a killed process does."""
        self._over = True
        self._thread.join()
        self._context.destroy(0)

    def _run(self) -> None:
        while not self._over:
            if self._socket.poll(5):
                peer, data = self._socket.recv_multipart()
                for reply in self._replies(decode_from_engine(data)):
                    self._socket.send_multipart([peer, reply])

    def _replies(self, message: Hello | Ask) -> list[bytes]:
        if isinstance(message, Hello):
            if message.vocab_digest == self._digest:
                return [encode(Welcome(VERSION, self._digest, VOCAB, LONGEST))]
            return [encode(Refused(f"{message.vocab_digest} is not {self._digest}"))]
        self.asks += 1
        if self.behave == "silent":
            return []
        long = any(len(row.tokens) > 64 for row in message.rows)
        if self.behave == "slow" or (self.behave == "reading" and long):
            time.sleep(0.08)
        guesses = self.draft.propose(message.rows)
        replies = _spoil(self.behave, message.step, guesses)
        if message.overlap and self.behave == "right":
            replies.append(encode(Ahead(message.step, self._ahead(guesses))))
        return replies

    def _ahead(self, guesses: list[Guess]) -> list[AheadGuess]:
        ahead = []
        for sequence, guess in zip(self.draft.latest, guesses, strict=True):
            bonus, *more = draft_tokens(sequence + guess.tokens, len(guess.tokens) + 1)
            ahead.append(AheadGuess(-1, []) if guess.missing else AheadGuess(bonus, more))
        return ahead


def _spoil(behave: str, step: int, guesses: list[Guess]) -> list[bytes]:
    """The answer, right or as `behave` says."""
    if behave == "garbage":
        return [b"\xc1 no message"]
    if behave == "rows":
        guesses = guesses[1:]
    if behave == "ids":
        guesses = [Guess([VOCAB, *guess.tokens[1:]]) for guess in guesses]
    if behave == "many":
        guesses = [Guess(guess.tokens * 5) for guess in guesses]
    if behave == "wrong":
        guesses = [Guess([(token + 2) % VOCAB for token in g.tokens]) for g in guesses]
    return [encode(Answer(step - 1 if behave == "stale" else step, guesses))]
