"""Adapters: what may be loaded while serving, from where, under which names."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from altiplano.artifact import Manifest, write_artifact
from altiplano.config.serving import ModelSettings
from altiplano.errors import AltiplanoError
from altiplano.serving.adapters import open_adapter
from altiplano.serving.engine.base import InvalidJob
from altiplano.serving.engine.slots import AdapterSlots
from altiplano.serving.front import admin
from altiplano.serving.front.errors import ApiError
from altiplano.serving.messages import Outcome
from tests.helpers.adapters import HIDDEN, LAYERS, write_adapter

RANK = 8


def write_model(directory: Path, fingerprint: str = "ours", **inputs: Any) -> Path:
    """Write an artifact that is a model as far as an adapter is concerned."""
    manifest = Manifest("model", "merge", {}, inputs, tokenizer_fingerprint=fingerprint)
    with write_artifact(directory, manifest) as partial:
        write_weights(partial)
    return directory


def write_weights(directory: Path) -> Path:
    """Write the matrices that the adapters are for."""
    import torch
    from safetensors.torch import save_file

    weights = {
        f"model.layers.{layer}.self_attn.q_proj.weight": torch.zeros(HIDDEN, HIDDEN)
        for layer in range(LAYERS)
    }
    directory.mkdir(exist_ok=True)
    save_file(weights, directory / "model.safetensors")
    return directory


def write_trained(directory: Path, fingerprint: str = "ours") -> Path:
    """Write an adapter artifact, as the stage `sft` does."""
    manifest = Manifest("adapter", "sft", {}, {}, tokenizer_fingerprint=fingerprint)
    with write_artifact(directory, manifest) as partial:
        write_adapter(partial)
    return directory


def test_a_plain_peft_directory_and_an_artifact_are_taken(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    for place in (write_adapter(tmp_path / "plain"), write_trained(tmp_path / "trained")):
        adapter = open_adapter(str(place), model, RANK)
        assert adapter.directory == place
        assert open_adapter(adapter.address, model, RANK) == adapter


def edit(name: str) -> Callable[[Path], None]:
    """Append to a file of the adapter."""

    def change(place: Path) -> None:
        with open(place / name, "a") as file:
            file.write(" ")

    return change


def only_pickle(place: Path) -> None:
    """Rename the weights as if they were a pickle."""
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")


def with_rows(place: Path) -> None:
    """Add rows of the embedding."""
    (place / "rows.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    "change, word",
    [
        (only_pickle, "only pickle"),
        (with_rows, "merge it"),
        (edit("adapter_model.safetensors"), "was changed"),
        (edit("adapter_config.json"), "was changed"),
    ],
)
def test_an_artifact_that_was_edited_or_cannot_be_exchanged_is_refused(
    tmp_path: Path, change: Callable[[Path], None], word: str
) -> None:
    place = write_trained(tmp_path / "adapter")
    change(place)
    with pytest.raises(AltiplanoError, match=word):
        open_adapter(str(place), write_model(tmp_path / "model"), RANK)


@pytest.mark.parametrize(
    "config, word",
    [
        ({"modules_to_save": ["embed_tokens"]}, "merge it"),
        ({"use_dora": True}, "merge it"),
        ({"bias": "all"}, "merge it"),
        ({"alpha_pattern": {"q_proj": 3}}, "merge it"),
        ({"rank": 16}, "rank 16.*max_adapter_rank is 8"),
        ({"r": 2}, r"shape \[4, 64\], \[2, 64\] fits"),
        ({"width": 96}, r"shape \[4, 96\], \[4, 64\] fits"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_an_adapter_the_engine_would_serve_wrongly_is_refused(
    tmp_path: Path, config: dict[str, Any], word: str
) -> None:
    place = write_adapter(tmp_path / "adapter", **config)
    with pytest.raises(AltiplanoError, match=word):
        open_adapter(str(place), write_weights(tmp_path / "model"), RANK)


def test_an_adapter_of_another_tokenizer_names_both(tmp_path: Path) -> None:
    place = write_trained(tmp_path / "adapter", fingerprint="theirs")
    with pytest.raises(AltiplanoError, match=r"(?s)theirs.*ours"):
        open_adapter(str(place), write_model(tmp_path / "model"), RANK)


def test_an_adapter_that_is_merged_already_is_refused(tmp_path: Path) -> None:
    from altiplano.artifact import open_artifact

    place = write_trained(tmp_path / "adapter")
    model = write_model(tmp_path / "model", sft=open_artifact(place).as_input)
    with pytest.raises(AltiplanoError, match="merged into the model"):
        open_adapter(str(place), model, RANK)


@pytest.mark.parametrize("path", ["adapter", "../adapter", "/tmp/../etc", "", "~/adapter"])
def test_a_path_that_is_not_absolute_and_plain_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(AltiplanoError, match="absolute"):
        open_adapter(path, tmp_path, RANK)


def test_weights_that_changed_since_they_were_loaded_are_refused(tmp_path: Path) -> None:
    model = write_weights(tmp_path / "model")
    address = open_adapter(str(write_adapter(tmp_path / "a", seed=1)), model, RANK).address
    write_adapter(tmp_path / "a", seed=2)
    with pytest.raises(AltiplanoError, match="changed since"):
        open_adapter(address, model, RANK)


def test_a_remote_adapter_is_copied_once_per_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("ALTIPLANO_CACHE", str(tmp_path / "cache"))
    remote, model = fsspec.filesystem("memory"), write_weights(tmp_path / "model")
    directories = set()
    for seed in (1, 1, 2):
        local = write_adapter(tmp_path / str(seed), seed=seed)
        for file in local.iterdir():
            remote.pipe_file(f"/adapters/a/{file.name}", file.read_bytes())
        adapter = open_adapter("memory://adapters/a", model, RANK)
        directories.add(adapter.directory)
        assert adapter.address.startswith("memory://adapters/a#")
        weights = "adapter_model.safetensors"
        assert (adapter.directory / weights).read_bytes() == (local / weights).read_bytes()
    assert 2 <= len(directories) <= 3
    assert sorted(p.parent for p in directories) == [tmp_path / "cache" / "adapters"] * len(
        directories
    )
    with pytest.raises(AltiplanoError, match="cannot read"):
        open_adapter("memory://adapters/none", tmp_path, RANK)


class Slots:
    """Slots for two, and what was put in and taken out."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.slots = AdapterSlots(2, self.put, self.take)

    async def put(self, name: str, number: int, address: str) -> Path:
        """Load; `bad` cannot be."""
        if address == "bad":
            raise InvalidJob("bad")
        self.log.append(f"+{name}")
        return Path(address)

    async def take(self, number: int) -> None:
        """Drop."""
        self.log.append(f"-{number}")

    async def touch(self, name: str, address: str = "place") -> int:
        """Use an adapter and be done with it."""
        async with self.slots.use(name, address) as slot:
            return slot.number


def test_the_least_lately_used_adapter_makes_room() -> None:
    async def play() -> list[str]:
        all_ = Slots()
        for name in ("a", "b", "a", "c", "a"):
            await all_.touch(name)
        return all_.log

    assert asyncio.run(play()) == ["+a#1", "+b#2", "-2", "+c#3"]


def test_an_adapter_in_use_stays_and_one_too_many_is_refused() -> None:
    async def play() -> list[str]:
        all_ = Slots()
        async with all_.slots.use("a", "place"), all_.slots.use("b", "place"):
            with pytest.raises(InvalidJob, match="max_adapters"):
                await all_.touch("c")
            await all_.slots.drop("a")
        await all_.slots.drop("a")
        return all_.log

    assert asyncio.run(play()) == ["+a#1", "+b#2", "-1"]


def test_new_weights_under_an_old_name_are_another_adapter() -> None:
    async def play() -> tuple[int, int, int]:
        all_ = Slots()
        return (
            await all_.touch("a", "place#1"),
            await all_.touch("a", "place#2"),
            await all_.touch("a", "place#1"),
        )

    first, second, third = asyncio.run(play())
    assert first == third != second


def test_an_adapter_that_cannot_be_loaded_takes_no_room_and_one_asked_for_twice_loads_once() -> (
    None
):
    async def play() -> list[str]:
        all_ = Slots()
        for _ in range(3):
            with pytest.raises(InvalidJob, match="bad"):
                await all_.touch("x", "bad")
        await asyncio.gather(*(all_.touch("a") for _ in range(5)), all_.touch("b"))
        return all_.log

    assert sorted(asyncio.run(play())) == ["+a#4", "+b#5"]


class Client:
    """A replica that takes any adapter whose path is not `bad`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []

    async def adapter(self, action: str, name: str, path: str) -> Outcome:
        """As `HandleClient.adapter`."""
        self.asked.append((action, name, path))
        return Outcome("invalid", "it is bad") if path == "/bad" else Outcome("done", f"{path}#12")


class Model:
    """What `admin` needs of a `ServedModel`."""

    def __init__(self, name: str, max_adapters: int) -> None:
        self.name = name
        self.entry = ModelSettings(name=name, path="/", max_adapters=max_adapters)
        self.client = Client()
        self.adapters: dict[str, str] = {}
        self.sleeps = False


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The notice board, in this process."""
    topics: dict[str, dict[str, Any]] = {}

    def post(topic: str, name: str, notice: dict[str, Any]) -> None:
        topics.setdefault(topic, {})[name] = json.loads(json.dumps(notice))

    monkeypatch.setattr(admin.board, "post", post)
    monkeypatch.setattr(admin.board, "read", lambda topic: dict(topics.get(topic, {})))
    monkeypatch.setattr(
        admin.board, "remove", lambda topic, name: topics[topic].pop(name) is not None
    )
    return topics


def load(models: list[Any], name: str, path: str = "/a", model: str | None = None) -> Any:
    """Load an adapter through the first HTTP replica's models."""
    request = admin.LoadRequest(lora_name=name, lora_path=path, model=model)
    return asyncio.run(admin.load_adapter(models, request))


def unload(models: list[Any], name: str) -> Any:
    """Unload one."""
    return asyncio.run(admin.unload_adapter(models, admin.UnloadRequest(lora_name=name)))


def test_an_adapter_loaded_at_one_http_replica_is_known_to_all(notices: dict[str, Any]) -> None:
    here, there = [Model("m", 1), Model("n", 2)], [Model("m", 1), Model("n", 2)]
    assert load(here, "poet", model="n")["parent"] == "n"
    asyncio.run(admin.refresh(there))  # type: ignore[arg-type]
    for models in (here, there):
        assert [each.adapters for each in models] == [{}, {"poet": "/a#12"}]
    assert unload(there, "poet")["deleted"]
    asyncio.run(admin.refresh(here))  # type: ignore[arg-type]
    assert here[1].adapters == {}
    assert here[1].client.asked == [("load", "poet", "/a")]
    assert there[1].client.asked == [("unload", "poet", "/a#12")]


@pytest.mark.parametrize(
    "name, path, model, status, word",
    [
        ("../x", "/a", None, 400, "may have letters"),
        ("x" * 65, "/a", None, 400, "64"),
        ("m", "/a", None, 400, "served already"),
        ("poet", "/a", None, 400, "served already"),
        ("other", "/a", "m", 400, "max_adapters"),
        ("other", "/bad", "n", 400, "it is bad"),
        ("other", "/a", "q", 404, "'q'"),
    ],
)
def test_a_load_that_cannot_be_says_why_and_posts_nothing(
    notices: dict[str, Any], name: str, path: str, model: str | None, status: int, word: str
) -> None:
    models = [Model("m", 1), Model("n", 2)]
    load(models, "poet")
    with pytest.raises(ApiError, match=word) as told:
        load(models, name, path, model)
    assert told.value.status == status
    assert list(notices.get("adapter/m", {})) == ["poet"] and not notices.get("adapter/n")


def test_an_unknown_adapter_cannot_be_unloaded(notices: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="'poet'.*none") as told:
        unload([Model("m", 1)], "poet")
    assert told.value.status == 404
