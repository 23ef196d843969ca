"""Does a merged model say what base + live adapters say? Compared on logits.

The probe is a few rows of token ids that a formula gives: every run sees the same, and old and
new ids both appear. Needs no text and no tokenizer. Costs two fp32 loads, one after the other, and
two small forward passes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from altiplano.errors import ModelError
from altiplano.model.load import load_model, num_pieces, read_config

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

PROBE_ROWS = 4
PROBE_LENGTH = 32


def probe(
    merged_dir: Path,
    model_dir: Path,
    adapter_dirs: Sequence[Path],
    vocab_old: int,
    tolerance: float,
) -> dict[str, float]:
    """Compare the merged model's logits with those of the unmerged chain, in fp32.

    Args:
        merged_dir: what the merge wrote.
        model_dir: the base the adapters were trained on.
        adapter_dirs: the adapters, in order.
        vocab_old: pieces of the base vocabulary.
        tolerance: largest allowed `probe_difference`; about 0.01 is what rounding to bfloat16
            makes of a sound merge.

    Returns:
        `probe_difference` (see `relative_difference`), `probe_agreement` (share of positions with
        the same most likely token) and `probe_tokens`.

    Raises:
        ModelError: the difference is larger than `tolerance`, or not a number.
    """
    from altiplano.model.adapt import load_chain_live

    ids = probe_ids(vocab_old, num_pieces(read_config(model_dir)))
    live = _logits(load_chain_live(model_dir, list(adapter_dirs), vocab_old, "float32"), ids)
    merged = _logits(load_model(merged_dir, "float32"), ids)
    difference = relative_difference(merged, live)
    agreement = (merged.argmax(-1) == live.argmax(-1)).float().mean().item()
    if not difference <= tolerance:
        raise ModelError(
            f"{merged_dir} does not compute what {model_dir} with its adapters computes: logits "
            f"differ by {difference:.3g} of their spread, {tolerance:.3g} is allowed; merge into a "
            f"wider type (merge.dtype=float32), or raise merge.probe_tolerance if you accept it"
        )
    return {
        "probe_difference": difference,
        "probe_agreement": agreement,
        "probe_tokens": float(ids.numel()),
    }


def relative_difference(found: "torch.Tensor", expected: "torch.Tensor") -> float:
    """Root mean square difference at the worst position and token, relative to the spread.

    A wrong row of the head shows in one column of the logits and a wrong embedding row at the
    positions after it, so the mean square is taken over columns and over positions apart. The
    largest single difference is not used: rounding alone makes it several times larger.

    Args:
        found, expected: logits [B, T, V].
    """
    squared = (found - expected).square()
    worst = max(squared.mean(dim=(0, 1)).max().item(), squared.mean(dim=2).max().item())
    return worst**0.5 / expected.std().item()


def probe_ids(vocab_old: int, vocab_new: int) -> "torch.Tensor":
    """Token ids [PROBE_ROWS, PROBE_LENGTH], spread over old and new ids in turn.

    Even positions walk the old vocabulary and odd ones the new pieces (the old again where there
    are none), with steps that visit both ends.
    """
    import torch

    count = PROBE_ROWS * PROBE_LENGTH // 2
    old = torch.linspace(0, vocab_old - 1, count).long()
    new = torch.linspace(vocab_old, vocab_new - 1, count).long() if vocab_new > vocab_old else old
    # Rows take every PROBE_ROWS-th id, so that each row spans the whole vocabulary.
    ids = torch.stack([old, new], dim=1).view(-1, PROBE_ROWS, 2)
    return ids.transpose(0, 1).reshape(PROBE_ROWS, PROBE_LENGTH)


def _logits(model: "LlamaForCausalLM", ids: "torch.Tensor") -> "torch.Tensor":
    import torch

    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
