"""Checkpoints: atomic, verified, and never a way to run code."""

import collections
import os
import pickle
import zipfile

import pytest
import torch

from spikesink import checkpoint
from spikesink.errors import UserError

CONTENT = {
    "model_args": {},
    "model": {"w": torch.randn(50, 3), "b": torch.zeros(2, dtype=torch.bfloat16)},
    "step": 3,
    "note": ["ü", None, 0.1],
}


def test_round_trip_and_hash(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, CONTENT)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"]["w"], CONTENT["model"]["w"]) and loaded["note"] == CONTENT["note"]
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    changed = {**CONTENT, "step": 4}
    assert checkpoint.content_hash(CONTENT) != checkpoint.content_hash(changed)


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, stage):
    path = tmp_path / "c.pt"
    checkpoint.save(path, CONTENT)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, stage, fail)
    with pytest.raises(OSError):
        checkpoint.save(path, {"model": {}, "step": 9})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_changed_weights_are_noticed_even_in_a_sound_archive(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, CONTENT)
    whole = torch.load(path, weights_only=True)
    whole["content"]["model"]["w"][7, 1] += 1e-3
    torch.save(whole, path)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("where", [0.0, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path, where):
    path = tmp_path / "c.pt"
    checkpoint.save(path, CONTENT)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * where)])
    with pytest.raises(UserError, match=r"c\.pt"):
        checkpoint.load(path)


def test_every_flipped_byte_of_the_weights_is_noticed(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, CONTENT)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = path.read_bytes()
    start = data.index(CONTENT["model"]["w"].numpy().tobytes())
    for offset in range(0, largest.file_size, 37):
        spoiled = bytearray(data)
        spoiled[start + offset] ^= 0x10
        path.write_bytes(spoiled)
        with pytest.raises(UserError):
            checkpoint.load(path)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    "writer", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))], ids=["torch", "pickle"]
)
@pytest.mark.parametrize(
    "wrap", [lambda evil: evil, lambda evil: {"model": evil, "model_args": {}}], ids=["bare", "inside"]
)
def test_a_malicious_pickle_does_not_run(tmp_path, writer, wrap):
    path, marker = tmp_path / "c.pt", tmp_path / "executed"
    writer(wrap(Evil(marker)), path)
    with pytest.raises(UserError, match=r"c\.pt"):
        checkpoint.load(path)
    assert not marker.exists()


GOOD = {"model_args": {"n_layer": 1}, "model": {"w": torch.ones(2)}, "config": {}, "data": {}, "step": 1}


@pytest.mark.parametrize(
    "spoil",
    [
        {"model": 5},
        {"model": {1: torch.ones(2)}},
        {"model": {"w": "text"}},
        {"model": {"w": torch.eye(2).to_sparse()}},
        {"model_args": None},
        {"config": []},
        {"config": {"dataset": 5}},
        {"data": [1]},
        {"data": {"tokenizer": ["x"], "vocab_size": 3}},
        {"data": {"tokenizer": "chars"}},
        {"step": torch.ones(1)},
    ],
    ids=str,
)
def test_entries_of_the_wrong_kind_are_refused(tmp_path, spoil):
    checkpoint.save(tmp_path / "good.pt", GOOD)
    checkpoint.load(tmp_path / "good.pt")
    checkpoint.save(tmp_path / "bad.pt", {**GOOD, **spoil})
    with pytest.raises(UserError, match=r"bad\.pt is no checkpoint"):
        checkpoint.load(tmp_path / "bad.pt")


def test_other_files_are_refused_in_one_sentence(tmp_path):
    torch.save(collections.OrderedDict(a=torch.ones(2)), tmp_path / "other.pt")
    with pytest.raises(UserError, match="neither"):
        checkpoint.load(tmp_path / "other.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path / "missing.pt")
