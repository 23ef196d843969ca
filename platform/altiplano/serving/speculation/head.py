"""The likeliest token of a large vocabulary, without computing every score exactly.

In a small model the head is most of the work: it reads one row per piece for each token. On a CPU
that multiplies bytes fast, all scores are first computed from 8-bit weights and states, and only
the best few again exactly. The winner is the exact one unless rounding throws it out of the best
few, which takes an error dozens of times the usual one; and a guess may be wrong. Whether it pays
is measured once, at load. Knows nothing of the model before it. It costs a quarter more memory for
the head and a few of its products at load.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_BEST_FEW = 8
_TRIALS = 3


class Head:
    """A matrix of one row per piece."""

    def __init__(self, weight: Tensor, *, device: torch.device, dtype: torch.dtype) -> None:
        """Lay the matrix out.

        Args:
            weight: [vocab, hidden], float32.
        """
        self._weight = weight.to(device=device, dtype=dtype)
        self._bytes: Tensor | None = None
        if device.type != "cpu":
            return
        # One scale per column, moved into the states: columns that are large for all pieces are
        # what makes 8 bits too few.
        self._scale = weight.abs().amax(0).clamp_(min=1e-12) / 127
        self._bytes = (weight / self._scale).round_().to(torch.int8)
        by_column = self._weight.t().contiguous().t() if dtype == torch.float32 else self._weight
        state = torch.ones(1, weight.shape[1], dtype=dtype)
        exactly = _seconds(lambda: functional.linear(state, by_column).argmax(dim=-1))
        if _seconds(lambda: self.best(state)) > exactly:
            # Products of one float32 row are several times faster with columns in one piece.
            self._weight, self._bytes = by_column, None

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Exact scores [B, vocab] of states [B, hidden]."""
        return functional.linear(states, self._weight)

    @torch.inference_mode()
    def best(self, states: Tensor) -> Tensor:
        """Ids [B] of the likeliest pieces."""
        if self._bytes is None:
            return self.logits(states).argmax(dim=-1)
        scaled = states * self._scale
        scaled *= 127 / scaled.abs().amax(dim=1, keepdim=True).clamp_(min=1e-12)
        # torch.matmul knows no int8; this is the product torch's own quantised layers call.
        rough = torch._int_mm(scaled.round_().to(torch.int8), self._bytes.t())
        few = rough.topk(min(_BEST_FEW, rough.shape[1]), dim=1, sorted=False).indices
        exact = torch.bmm(self._weight[few], states.unsqueeze(2)).squeeze(2)
        return few.gather(1, exact.argmax(dim=1, keepdim=True)).squeeze(1)


def _seconds(run: Callable[[], object]) -> float:
    """Shortest time of a few runs; the first warms up."""
    run()
    times = []
    for _ in range(_TRIALS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
