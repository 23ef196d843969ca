"""How a new row of the embedding or the head starts.

Knows a matrix as something that gives rows when sliced (a tensor, or a file's `stored.Matrix`)
and pieces as lists of old ids. Memory: some groups of `GROUP_BYTES`, for `gaussian` two squares
of the width besides, however many rows there are. Costs one read of the old rows for `mean`, two
for `gaussian`, one per group of new rows (of the parts it needs) for `subpiece_mean`.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

GROUP_BYTES = 8 << 20
"""Size of the groups, in fp32, in which rows are read and made."""


class Rows(Protocol):
    """A [V, H] matrix, in memory or not."""

    @property
    def shape(self) -> Sequence[int]:
        """V and H."""

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Some of its rows, [n, H], in any float type."""


def new_rows(
    old: Rows, subpieces: Sequence[Sequence[int]], init: str, std: float, seed: int
) -> Iterator[torch.Tensor]:
    """Rows for new pieces, group by group.

    Args:
        old: [V_old, H] matrix the rows are added to.
        subpieces: for every new piece, the old ids its text is made of (may be empty).
        init: `subpiece_mean` (mean of those rows; the global mean where there are none), `mean`
            (of all rows), `gaussian` (drawn from the rows' mean and covariance; Hewitt 2021,
            "Initializing new word embeddings for pretrained language models"), or `random`
            (normal with `std`).
        std: standard deviation for `random`.
        seed: of the draws.

    Yields:
        [n, H] in fp32; n adds up to len(subpieces).
    """
    width = old.shape[1]
    generator = torch.Generator().manual_seed(seed)
    step = _rows_per_group(width)
    mean = None
    if init in ("mean", "gaussian") or (init == "subpiece_mean" and not all(subpieces)):
        mean = _mean(old)
    factor = _covariance_factor(old, mean) if init == "gaussian" and mean is not None else None
    for start in range(0, len(subpieces), step):
        group = subpieces[start : start + step]
        if init == "subpiece_mean":
            yield _subpiece_means(old, group, mean)
        elif init == "mean":
            assert mean is not None
            yield mean.repeat(len(group), 1)
        elif init == "gaussian":
            assert mean is not None
            assert factor is not None
            yield mean + torch.randn(len(group), width, generator=generator) @ factor.T
        else:
            assert init == "random", init
            yield torch.randn(len(group), width, generator=generator).mul_(std)


def _rows_per_group(width: int) -> int:
    return max(1, GROUP_BYTES // (4 * width))


def _groups(old: Rows) -> Iterator[torch.Tensor]:
    count, width = old.shape
    step = _rows_per_group(width)
    for start in range(0, count, step):
        yield old[start : start + step].float()


def _mean(old: Rows) -> torch.Tensor:
    """[H] in fp32; sums of groups are added up in fp64."""
    total = sum(rows.sum(dim=0).double() for rows in _groups(old))
    assert isinstance(total, torch.Tensor)
    return (total / old.shape[0]).float()


def _covariance_factor(old: Rows, mean: torch.Tensor) -> torch.Tensor:
    """Lower-triangular [H, H] L in fp32 with L L^T the covariance of the rows."""
    covariance = torch.zeros(old.shape[1], old.shape[1], dtype=torch.float64)
    for rows in _groups(old):
        centred = rows - mean
        covariance += centred.T @ centred
    covariance /= old.shape[0]
    # With fewer rows than columns it is singular: a millionth of the mean variance mends that.
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean() + 1e-30)
    return torch.linalg.cholesky(covariance).float()


def _subpiece_means(
    old: Rows, subpieces: Sequence[Sequence[int]], mean: torch.Tensor | None
) -> torch.Tensor:
    """[len(subpieces), H]: means of old rows, which are read in order, each at most once."""
    num_old, width = old.shape
    counts = torch.tensor([len(ids) for ids in subpieces])
    wanted = torch.tensor([id_ for ids in subpieces for id_ in ids], dtype=torch.long)
    assert not len(wanted) or 0 <= int(wanted.min()) <= int(wanted.max()) < num_old
    wanted, order = wanted.sort(stable=True)
    places = torch.repeat_interleave(torch.arange(len(subpieces)), counts)[order]
    means = torch.zeros(len(subpieces), width)
    step = _rows_per_group(width)
    for start in range(0, num_old, step):
        first, last = torch.searchsorted(wanted, torch.tensor([start, start + step])).tolist()
        if first == last:
            continue
        rows = old[start : start + step].float()
        # A row may be wanted by every piece (a byte's): gathered in parts, so memory stays bounded.
        for begin in range(first, last, step):
            part = slice(begin, min(begin + step, last))
            means.index_add_(0, places[part], rows[wanted[part] - start])
    means /= counts[:, None].clamp(min=1)
    if mean is not None:
        means[counts == 0] = mean
    return means
