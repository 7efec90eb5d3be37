"""Checkpoints: atomic, verified, and never a way to run code."""

import collections
import dataclasses
import os
import pickle
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spikesink
from data.loader import Tokens
from spikesink import files
from spikesink.errors import UserError
from spikesink.models import checkpoint, convert
from spikesink.models.checkpoint import Checkpoint
from spikesink.text.token_files import meta_of
from trainer import checkpoints

from .conftest import same, tiny

CONTENT = Checkpoint(
    model_args={},
    model={"w": torch.randn(50, 3), "b": torch.zeros(2, dtype=torch.bfloat16)},
    step=3,
    extra={"note": ["ü", None, 0.1]},
)


def test_round_trip_and_hash(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, CONTENT)
    loaded = checkpoint.load(path)
    assert same(loaded, CONTENT)
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    changed = dataclasses.replace(CONTENT, step=4)
    assert files.content_hash(CONTENT.content()) != files.content_hash(changed.content())
    assert torch.load(path, weights_only=True)["sha256"] == files.content_hash(CONTENT.content())


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, stage):
    path = tmp_path / "c.pt"
    checkpoint.save(path, CONTENT)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, stage, fail)
    with pytest.raises(OSError):
        checkpoint.save(path, Checkpoint({}, {}, step=9))
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
    data, weight = path.read_bytes(), CONTENT.model["w"].numpy().tobytes()
    start = data.index(weight)
    for offset in range(0, len(weight), 37):
        spoiled = bytearray(data)
        spoiled[start + offset] ^= 0x10
        path.write_bytes(spoiled)
        with pytest.raises(UserError):
            checkpoint.load(path)


GOOD = Checkpoint(model_args={"n_layer": 1}, model={"w": torch.ones(2)}, step=1)


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
    checkpoint.save(tmp_path / "bad.pt", dataclasses.replace(GOOD, **spoil))
    with pytest.raises(UserError, match=r"bad\.pt is not a checkpoint"):
        checkpoint.load(tmp_path / "bad.pt")


def test_other_files_are_refused_in_one_sentence(tmp_path):
    torch.save(collections.OrderedDict(a=torch.ones(2)), tmp_path / "other.pt")
    with pytest.raises(UserError, match="neither"):
        checkpoint.load(tmp_path / "other.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path / "missing.pt")


def test_a_checkpoint_of_another_contract_is_refused_with_both_named(trained, tmp_path, cli):
    path = tmp_path / "other.pt"
    checkpoint.save(path, dataclasses.replace(checkpoint.load(trained), contract="spikesink-model-0"))
    for command in (["detect.py", path], ["train.py", f"--init_from={path}", f"--out_dir={tmp_path / 'o'}"]):
        code, _, err = cli(*command)
        assert code == 2 and err.count("\n") == 1
        assert "'spikesink-model-0'" in err and "'spikesink-model-1'" in err
    checkpoint.save(path, dataclasses.replace(checkpoint.load(trained), contract=None))  # as older versions wrote them
    assert cli("detect.py", path, "--seq_len=16", "--nulls=0")[0] == 0


def test_a_number_of_numpy_is_named_with_what_to_do(tmp_path):
    torch.save({"model": {}, "model_args": {}, "best_val_loss": np.float64(3.0)}, tmp_path / "n.pt")
    with pytest.raises(UserError, match=r"the first is numpy\._?core\.multiarray\.scalar; save it again with float"):
        checkpoint.load(tmp_path / "n.pt")


def test_nanogpts_own_file(tmp_path):
    torch.save({"model_args": {}, "model": {"_orig_mod.w": torch.ones(2)}, "iter_num": 7, "best": 1}, tmp_path / "n.pt")
    found = checkpoint.load(tmp_path / "n.pt")
    assert (found.maker, found.step, found.contract, found.optimizer) == ("nanoGPT", 7, None, None)
    assert list(found.model) == ["w"] and found.extra == {"iter_num": 7}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_nanogpts_characters_are_those_of_its_folder(tmp_path, prefix):
    """Its meta.pkl has the letters; GPT-2's were shown, 50,304 embeddings trained, and a prefix refused."""
    chars = "\n abcdefgh"
    args = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": len(chars), "bias": False}
    weights = {convert.rename(k, convert.GPT2_NAMES): v for k, v in tiny(**args).state_dict().items()}
    torch.save({"model": {prefix + k: v for k, v in weights.items()}, "model_args": args}, tmp_path / "ckpt.pt")
    ids = np.random.default_rng(0).integers(0, len(chars), 5000).astype("<u2")
    for split in ("train", "val"):
        ids.tofile(tmp_path / f"{split}.bin")
    with pytest.raises(UserError, match="up to 9, which are not GPT-2's: put nanoGPT's meta"):
        Tokens(tmp_path, "train", 16)
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with spikesink.open(tmp_path / "ckpt.pt", data=str(tmp_path), n_seq=4, seq_len=16) as look:
        assert [look.subjects[0].decode(int(i)) for i in look.ids[0]] == [chars[i] for i in ids[:16]]
        assert look.loss() < 10
    assert Tokens(tmp_path, "train", 16).meta["vocab_size"] == len(chars)


# ------------------------------------------------------------------------------------------------- those of a run


def content(step):
    return dataclasses.replace(GOOD, step=step, model={"w": torch.full((50,), float(step))})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_rotation_keeps_the_last_the_best_and_every_nth(tmp_path):
    kept = checkpoints.Checkpoints(tmp_path, keep_last=2, keep_every=40)
    for step in range(10, 100, 10):
        kept.save(content(step), best=step == 30)
    steps = [30, 40, 80, 90]
    assert names(tmp_path) == ["best.pt", *(f"ckpt-{step:08d}.pt" for step in steps), "ckpt.pt"]
    assert checkpoint.load(tmp_path / "ckpt.pt").step == 90
    assert checkpoint.load(tmp_path / "best.pt").step == 30


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_leaves_what_there_was(tmp_path, monkeypatch, asynchronous):
    kept = checkpoints.Checkpoints(tmp_path, keep_last=1, asynchronous=asynchronous)
    kept.save(content(1))
    kept.wait()

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            kept.save(content(2))
            kept.wait()
    assert names(tmp_path) == ["ckpt-00000001.pt", "ckpt.pt"]
    kept.save(content(3))
    kept.wait()
    assert kept.newest()[0].step == 3


def test_async_saves_keep_their_order_and_the_state_they_were_given(tmp_path, monkeypatch):
    """The first write is slow; the second waits for it, and the weights change meanwhile."""
    write, order, main = checkpoint.save, [], threading.current_thread()

    def slow(path, whole):
        assert threading.current_thread() is not main
        time.sleep(0.3 if not order else 0)
        write(path, whole)
        order.append(whole.step)

    monkeypatch.setattr(checkpoints, "save", slow)
    kept, weights = checkpoints.Checkpoints(tmp_path, asynchronous=True), content(1)
    kept.save(weights)
    weights.model["w"].zero_()  # training goes on
    kept.save(content(2))
    kept.wait()
    assert order == [1, 2]
    assert checkpoint.load(tmp_path / "ckpt-00000001.pt").model["w"].eq(1).all()
    assert checkpoint.load(tmp_path / "ckpt.pt").step == 2


def test_rotation_never_deletes_the_only_good_one(tmp_path):
    """The newest two are damaged and known to be: they do not count as kept, and the good one stays."""
    kept = checkpoints.Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        kept.save(content(step))
    for step in (2, 3):
        os.truncate(tmp_path / f"ckpt-{step:08d}.pt", 100)
    again = checkpoints.Checkpoints(tmp_path, keep_last=1)
    assert again.newest()[0].step == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError):
            again.save(content(4))
    assert again.newest()[0].step == 1


# --------------------------------------------------------------------------------------------------- hostile files


def hostile(marker):
    """Pickles that would create `marker`, by several ways of calling something."""
    touch = f"touch {marker}".encode()
    source = f"open({str(marker)!r}, 'w').close()"
    reduced = lambda function, *args: type("Evil", (), {"__reduce__": lambda self: (function, args)})()
    code = f"c__builtin__\nexec\n(V{source}\ntR.".encode()  # protocol 0, written by hand
    return {
        "os.system": pickle.dumps(reduced(os.system, f"touch {marker}")),
        "exec": pickle.dumps(reduced(exec, source)),
        "eval": pickle.dumps(reduced(eval, f"open({str(marker)!r}, 'w')")),
        "open": pickle.dumps(reduced(open, str(marker), "w")),
        "by hand": code,
        "torch function": pickle.dumps(reduced(torch.save, 1, str(marker))),
        "numpy": pickle.dumps(reduced(__import__("numpy").save, str(marker), [1])),
        "nested pickle": pickle.dumps(reduced(pickle.loads, pickle.dumps(reduced(exec, source)))),
        "getattr": b"\x80\x02cbuiltins\ngetattr\nc__builtin__\n__import__\nX\x02\x00\x00\x00os\x85R"
        b"X\x06\x00\x00\x00system\x86RX" + len(touch).to_bytes(4, "little") + touch + b"\x85R.",
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that the pickles leave open
@pytest.mark.parametrize("kind", hostile("x"))
@pytest.mark.parametrize("packing", ["pickle", "zip", "legacy"])
def test_nothing_in_a_hostile_file_is_executed(tmp_path, kind, packing):
    """In all three ways a torch file can hold a pickle; and each would have worked on pickle.load itself."""
    path, marker = tmp_path / "evil.pt", tmp_path / "executed"
    data = hostile(marker)[kind]
    if packing == "pickle":
        path.write_bytes(data)
    elif packing == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (("data.pkl", data), ("version", b"3\n"), ("byteorder", b"little")):
                archive.writestr(f"archive/{name}", content)
    else:
        head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001})]
        path.write_bytes(b"".join(head) + data)
    with pytest.raises(UserError, match=r"evil\.pt"):
        checkpoint.load(path)
    assert not marker.exists() and not marker.with_suffix(".npy").exists()
    pickle.loads(data)  # the file is truly hostile
    assert marker.exists() or marker.with_suffix(".npy").exists()


def odd_meta():
    """Pickles that are no list of characters."""
    whole = pickle.dumps({"vocab_size": 1, "itos": {0: "a"}})
    return {
        "numpy scalar": pickle.dumps({"vocab_size": np.int64(2), "itos": {0: "a", 1: "b"}}),
        "truncated": whole[:-3],
        "words": pickle.dumps({"vocab_size": 1, "itos": {0: "word"}}),
        "holes": pickle.dumps({"vocab_size": 2, "itos": {0: "a", 5: "b"}}),
        "a list": pickle.dumps([1]),
        "empty": b"",
    }


@pytest.mark.parametrize("kind", [*hostile("x"), *odd_meta()])
def test_a_meta_pkl_of_anything_else_is_one_line_and_never_executed(tmp_path, kind):
    marker = tmp_path / "executed"
    (tmp_path / "meta.pkl").write_bytes((hostile(marker) | odd_meta())[kind])
    with pytest.raises(UserError, match=r"meta\.pkl is not a meta\.pkl of nanoGPT.*put a meta\.json beside it"):
        meta_of(tmp_path)
    assert not marker.exists() and not marker.with_suffix(".npy").exists()


def content_or_refusal(path):
    """What `load` returns, or its words if it refuses."""
    try:
        return checkpoint.load(path)
    except UserError as error:
        return str(error)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_spoiled_checkpoint_is_read_as_it_was_or_refused(tmp_path, data):
    """Bytes flipped, cut out, put in, in any places: the content as it was, or a UserError; nothing else."""
    path = tmp_path / "c.pt"
    if not path.exists():
        checkpoint.save(path, GOOD)
    spoiled = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(spoiled) - 1)))
        spoiled[at : at + data.draw(st.integers(0, 50))] = data.draw(st.binary(max_size=20))
    bad = tmp_path / "bad.pt"
    bad.write_bytes(spoiled)
    found = content_or_refusal(bad)
    assert "bad.pt" in found if isinstance(found, str) else same(found, GOOD)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(key=st.sampled_from([field.name for field in dataclasses.fields(GOOD) if field.name != "extra"]), value=plain)
def test_a_checkpoint_with_odd_entries_is_read_or_refused(tmp_path, key, value):
    """Sound archives with right hashes, as an attacker can write them."""
    checkpoint.save(tmp_path / "odd.pt", dataclasses.replace(GOOD, **{key: value}))
    found = content_or_refusal(tmp_path / "odd.pt")
    assert "odd.pt" in found if isinstance(found, str) else isinstance(found.model, dict)
