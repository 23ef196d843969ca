"""Checkpoints at an fsspec URL keep the promises of those in a directory (4 s)."""

import logging
import re
from pathlib import Path

import pytest

from altiplano.errors import TrainingError
from altiplano.train.checkpoint import OPTIMIZER_FILE, STATE_FILE, WEIGHTS_FILE, write_state
from tests.helpers.s3 import Bucket
from tests.test_checkpoints import Run, assert_equal, folder, make_state


@pytest.fixture
def address(s3_bucket: Bucket) -> str:
    return f"s3://{s3_bucket.name}/runs/one"


def keys(bucket: Bucket) -> list[str]:
    return [o["Key"] for o in bucket.client.list_objects_v2(Bucket=bucket.name).get("Contents", [])]


def test_a_bucket_holds_checkpoints_as_a_directory_does(s3_bucket: Bucket, address: str) -> None:
    assert Run(address).newest() is None
    Run(address, keep_last=1).save(1, best=True).save(2, 3)
    assert_equal(Run(address).newest(), make_state(3))
    assert_equal(Run(address).checkpoints.best_or_last(True), make_state(1))
    assert {key.split("/")[2] for key in keys(s3_bucket)} == {folder(1), folder(3)}
    with pytest.raises(TrainingError, match="of run 012345678"):
        Run(address, run_key="another").newest()

    s3_bucket.put(f"runs/one/{folder(3)}/{WEIGHTS_FILE}", b"changed")
    run = Run(address)
    assert_equal(run.newest(), make_state(1))
    assert "step 3 is broken" in run.said[0] and "has 7 bytes" in run.said[0]
    run.checkpoints.clear()
    assert keys(s3_bucket) == []


def test_an_upload_killed_before_any_object_is_no_checkpoint_and_is_cleared_away(
    s3_bucket: Bucket, address: str, tmp_path: Path
) -> None:
    Run(address).save(1)
    write_state(tmp_path, make_state(2))
    uploaded = (WEIGHTS_FILE, OPTIMIZER_FILE)
    for count in range(1, len(uploaded) + 1):
        for name in uploaded[:count]:
            s3_bucket.put(f"runs/one/{folder(2)}/{name}", (tmp_path / name).read_bytes())
        run = Run(address)
        assert_equal(run.newest(), make_state(1))
        assert run.said == [] and all(folder(2) not in key for key in keys(s3_bucket))


def test_state_json_is_uploaded_last_and_deleted_first(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        Run(address, keep_last=1).save(1, 2)
    requests = re.findall(rf"(PUT|DELETE) \S+/{folder(1)}/(\S+) HTTP", caplog.text)
    assert [name for verb, name in requests if verb == "PUT"] == [
        WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE,
    ]  # fmt: skip
    deleted = [name for verb, name in requests if verb == "DELETE"]
    assert len(deleted) == 3 and deleted[0] == STATE_FILE


def test_an_unknown_protocol_is_refused_with_the_address(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be kept at nowhere://x"):
        Run("nowhere://x")
