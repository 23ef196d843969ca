"""The loss head: exact loss and gradients for every kind of head, and no matrix it can avoid."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from altiplano.model.loss import summed_cross_entropy, summed_distillation
from altiplano.model.rows import PaddedHead, SplitEmbedding, SplitHead, SplitRows, head_terms

WIDTH, OLD, NEW, PADDING = 16, 50, 23, 7
PIECES = OLD + NEW
BATCH, LENGTH = 2, 11


def matrix(rows: int = PIECES, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.4


def linear(*, trained: bool, bias: bool = False) -> nn.Linear:
    head = nn.Linear(WIDTH, PIECES, bias=bias)
    head.weight = nn.Parameter(matrix(), requires_grad=trained)
    return head


def padded(*, trained: bool) -> PaddedHead:
    weight = nn.Parameter(matrix(PIECES + PADDING), requires_grad=trained)
    return PaddedHead(weight, PIECES)


def split(padding: int = 0) -> SplitHead:
    return SplitHead(SplitRows(matrix(PIECES + padding), OLD, PIECES))


def lora(*, trained: bool = False, dropout: float = 0.0, dora: bool = False) -> nn.Module:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, use_dora=dora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = Linear(linear(trained=False), "default", config, r=3, lora_alpha=5)
    head.base_layer.weight.requires_grad_(trained)
    nn.init.normal_(head.lora_B["default"].weight, std=0.3)
    return head


HEADS: dict[str, Callable[[], nn.Module]] = {
    "frozen": lambda: linear(trained=False),
    "trained": lambda: linear(trained=True),
    "padded frozen": lambda: padded(trained=False),
    "padded trained": lambda: padded(trained=True),
    "new rows": split,
    "new rows, padded": lambda: split(PADDING),
    "bias": lambda: linear(trained=True, bias=True),
    "lora": lora,
    "lora and rows": lambda: lora(trained=True),
    "dora": lambda: lora(dora=True),
}
FALL_BACK = {"bias", "dora"}


def states(seed: int = 1, width: int = WIDTH) -> torch.Tensor:
    return matrix(BATCH * LENGTH, width, seed).view(BATCH, LENGTH, width) * 3


def labels(wanted: torch.Tensor | None = None) -> torch.Tensor:
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) * 17 % PIECES
    return ids if wanted is None else ids.where(wanted, -100)


def some() -> torch.Tensor:
    return torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 3 != 1


def plain(hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """The whole logits at once; every parameter has a gradient path."""
    logits = head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def gradients(head: nn.Module, hidden: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    assert hidden.grad is not None
    yield "hidden", hidden.grad
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            yield name, parameter.grad


def assert_same(
    head: nn.Module,
    ours: Callable[[torch.Tensor], torch.Tensor],
    theirs: Callable[[torch.Tensor], torch.Tensor],
    tolerance: float = 1e-6,
) -> None:
    """Loss and every gradient agree, relative to each tensor's largest value."""
    results = []
    for loss_of in (theirs, ours):
        head.zero_grad()
        hidden = states().requires_grad_()
        loss = loss_of(hidden)
        assert loss.dtype == torch.float32
        (loss / 7).backward()
        found = {name: grad.clone() for name, grad in gradients(head, hidden)}
        results.append({"loss": loss.detach(), **found})
    expected, found = results
    assert expected.keys() == found.keys()
    for name, wanted in expected.items():
        scale = max(1.0, float(wanted.abs().max()))
        assert float((found[name] - wanted).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("chunk", [1, 4, 15, 1000])
@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradients_are_those_of_the_whole_matrix(kind: str, chunk: int) -> None:
    head, targets = HEADS[kind](), labels(some())
    assert (head_terms(head, states().flatten(0, 1)) is None) == (kind in FALL_BACK)
    assert_same(
        head,
        lambda hidden: summed_cross_entropy(hidden, targets, head, chunk),
        lambda hidden: plain(hidden, targets, head),
    )


@settings(max_examples=40)
@given(
    st.lists(st.booleans(), min_size=BATCH * LENGTH, max_size=BATCH * LENGTH),
    st.integers(1, 30),
    st.sampled_from(["padded trained", "new rows", "lora and rows", "dora"]),
)
def test_any_mask_and_chunk_is_exact(mask: list[bool], chunk: int, kind: str) -> None:
    head, targets = HEADS[kind](), labels(torch.tensor(mask).view(BATCH, LENGTH))
    assert_same(
        head,
        lambda hidden: summed_cross_entropy(hidden, targets, head, chunk),
        lambda hidden: plain(hidden, targets, head),
    )


@pytest.mark.parametrize("kind", HEADS)
def test_without_targets_the_loss_is_zero_and_so_is_every_gradient(kind: str) -> None:
    head, hidden = HEADS[kind](), states().requires_grad_()
    targets = torch.full((BATCH, LENGTH), -100)
    for loss in (
        summed_cross_entropy(hidden, targets, head),
        summed_distillation(hidden, targets, head, states(2), linear(trained=False)),
    ):
        assert loss.item() == 0
        loss.backward()
    assert all(not grad.any() for _, grad in gradients(head, hidden))


@pytest.mark.parametrize("kind", HEADS)
def test_distillation_is_that_of_the_whole_matrix(kind: str) -> None:
    head, targets = HEADS[kind](), labels(some())
    teacher = PaddedHead(nn.Parameter(matrix(PIECES + 3, 8, seed=5)), PIECES)
    taught = states(6, 8)

    def whole(hidden: torch.Tensor) -> torch.Tensor:
        wanted = targets != -100
        target = teacher(taught[wanted]).detach().softmax(-1)
        return -(target * head(hidden[wanted]).log_softmax(-1)).sum()

    assert_same(
        head,
        lambda hidden: summed_distillation(hidden, targets, head, taught, teacher, 4),
        whole,
    )
    assert teacher.weight.grad is None


@pytest.mark.parametrize("trained", [False, True])
def test_padding_rows_have_no_share_and_no_gradient(trained: bool) -> None:
    head, targets = padded(trained=trained), labels()
    before = summed_cross_entropy(states(), targets, head, 4)
    with torch.no_grad():
        head.weight[PIECES:] *= 100
    after = summed_cross_entropy(states(), targets, head, 4)
    assert torch.equal(after, before)
    if trained:
        after.backward()
        assert not head.weight.grad[PIECES:].any()
        assert head.weight.grad[:PIECES].any(dim=1).all()


def test_lora_with_dropout_drops_as_the_layer_does() -> None:
    head, targets = lora(trained=True, dropout=0.4).train(), labels()

    def seeded(loss: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(hidden: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(9)
            return loss(hidden)

        return run

    # The layer sees the same [n, H] in both, so it draws the same mask.
    assert_same(
        head,
        seeded(lambda hidden: summed_cross_entropy(hidden, targets, head, 5)),
        seeded(lambda hidden: plain(hidden.flatten(0, 1)[None], targets.flatten()[None], head)),
    )


@pytest.mark.parametrize("change", ["merged", "disabled"])
def test_a_lora_that_is_merged_or_off_is_called_instead(change: str) -> None:
    head, targets = lora(), labels()
    expected = plain(states(), targets, head if change == "merged" else head.base_layer)
    if change == "merged":
        head.merge()
    else:
        head.enable_adapters(False)
    found = summed_cross_entropy(states(), targets, head, 5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_matrix_shared_with_the_embedding_gets_both_gradients(tied: bool) -> None:
    ids, targets = labels().roll(1), labels()

    def grads(loss_of: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        rows = SplitRows(matrix(), OLD, PIECES)
        head_rows = rows if tied else SplitRows(matrix(), OLD, PIECES)
        loss_of(SplitEmbedding(rows)(ids), targets, SplitHead(head_rows)).backward()
        return [rows.new.grad, head_rows.new.grad]

    for found, expected in zip(grads(summed_cross_entropy), grads(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_split_embedding_is_the_look_up_in_the_whole_matrix() -> None:
    whole = nn.Parameter(matrix())
    rows = SplitRows(whole, OLD, PIECES)
    ids = torch.tensor([[0, OLD - 1, OLD, PIECES - 1, OLD, 3], [1, 1, 2, 2, OLD + 5, 0]])
    found, expected = SplitEmbedding(rows)(ids), F.embedding(ids, whole)
    assert torch.equal(found, expected)
    (found * expected.detach()).sum().backward()
    (expected * expected.detach()).sum().backward()
    assert torch.equal(rows.new.grad, whole.grad[OLD:])


def test_split_embedding_has_no_shapes_that_depend_on_ids() -> None:
    graph = torch.compile(
        SplitEmbedding(SplitRows(matrix(), OLD, PIECES)), backend="eager", fullgraph=True
    )
    assert graph(labels()).shape == (BATCH, LENGTH, WIDTH)


@pytest.mark.parametrize("kind", ["frozen", "padded trained", "new rows", "lora and rows"])
def test_autocast_is_as_exact_as_a_plain_autocast_head(kind: str) -> None:
    head, targets = HEADS[kind](), labels(some())

    def mixed(loss_of: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(hidden: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss_of(hidden.bfloat16(), targets, head)

        return run

    assert_same(head, mixed(summed_cross_entropy), lambda h: plain(h, targets, head), 2e-2)


def test_bfloat16_keeps_the_gradient_of_a_label_that_is_almost_certain() -> None:
    head = linear(trained=False)
    hidden = (head.weight.detach()[3] * 4).bfloat16().view(1, 1, -1).requires_grad_()
    head.bfloat16()
    target = torch.tensor([[3]])
    probability = head(hidden.detach())[0, 0].float().softmax(-1)[3]
    assert 0 < 1 - probability < 2**-9
    summed_cross_entropy(hidden, target, head).backward()
    exact = hidden.detach().float().requires_grad_()
    plain(exact, target, head.float()).backward()
    torch.testing.assert_close(hidden.grad.float(), exact.grad, rtol=0.05, atol=1e-6)


def test_an_impossible_label_costs_a_finite_loss() -> None:
    head = linear(trained=False)
    hidden = head.weight.detach()[3].view(1, 1, -1) * 200
    found = summed_cross_entropy(hidden, torch.tensor([[4]]), head)
    assert found > 100
    torch.testing.assert_close(found, plain(hidden, torch.tensor([[4]]), head))


class Made(TorchDispatchMode):
    """Records the storage sizes of all floating tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in {"mm", "addmm", "addmm_"}
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for out in result if isinstance(result, tuple | list) else [result]:
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
                self.bytes.append(out.untyped_storage().nbytes())
        return result


def test_no_matrix_of_all_rows_and_no_logits_beyond_a_chunk_are_made() -> None:
    old, new, width, count, chunk = 4000, 90, 64, 96, 8
    head = SplitHead(SplitRows(matrix(old + new, width).bfloat16(), old, old + new))
    hidden = matrix(count, width)[None].bfloat16().requires_grad_()
    with Made() as made:
        with torch.autocast("cpu", torch.bfloat16):
            loss = summed_cross_entropy(hidden, torch.arange(count)[None] * 41, head, chunk)
        loss.backward()
    largest = max(made.bytes)
    # One chunk's logits: in bf16 kept, in fp32 while they are probabilities.
    assert largest <= (old + new + 64) * chunk * 4 < min(old * width * 2, count * old * 2)


@pytest.mark.parametrize(("kind", "products"), [("frozen", 2), ("trained", 3), ("new rows", 5)])
def test_no_product_is_done_twice_and_none_without_a_gradient(kind: str, products: int) -> None:
    head, hidden = HEADS[kind](), states().requires_grad_()
    with Made() as learning:
        summed_cross_entropy(hidden, labels(), head).backward()
    with Made() as measuring, torch.no_grad():
        summed_cross_entropy(hidden, labels(), head)
    assert learning.products == products
    assert measuring.products == (2 if kind == "new rows" else 1)
