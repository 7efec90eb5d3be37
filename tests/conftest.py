"""Shared by the tests: tiny models and data, and the scripts run in this process as a user would run them."""

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(2)

from model import GPT, GPTConfig  # noqa: E402
from spikesink import errors  # noqa: E402
from spikesink.models.subject import Subject  # noqa: E402

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 64}


def tiny(seed=0, **changes):
    """A tiny GPT with weights large enough that every part matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # rezero's scalar too
    return model.eval()


def subject_of(model):
    return Subject.of_gpt(model, lambda token: f"<{token}>")


@pytest.fixture
def ids():
    return torch.randint(64, (6, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli("train.py", "nano", "--seed=1") -> (exit code, stdout, stderr)."""

    def call(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        code = 0
        try:
            errors.cli(importlib.import_module(script.removesuffix(".py")).main)
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def same(a, b):
    """Bitwise equality of nested dataclasses, dicts, lists and tensors."""
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and same(vars(a), vars(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def write_toy(folder):
    """A small dataset folder: 64 tokens of vocabulary, with patterns that can be learned."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, n in (("train", 4096), ("val", 2048)):
        (np.arange(n) * 7 % 60 + rng.integers(0, 3, n)).astype("<u2").tofile(folder / f"{split}.bin")
    meta = {"dtype": "uint16", "vocab_size": 64, "tokenizer": None, "bos_id": 63}
    (folder / "meta.json").write_text(json.dumps({**meta, "train_tokens": 4096, "val_tokens": 2048}))


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """The folder of `write_toy`."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    return folder


SMALL_RUN = [
    *("--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=4"),
    *("--gradient_accumulation_steps=2", "--max_iters=8", "--eval_interval=4", "--eval_iters=2", "--save_interval=4"),
    *("--warmup_iters=2", "--learning_rate=1e-2", "--compile=False", "--dtype=float32", "--device=cpu"),
]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, toy_data):
    """The checkpoint of a short run with BOS."""
    out = tmp_path_factory.mktemp("trained")
    old, sys.argv = sys.argv, ["train.py", *SMALL_RUN, "--bos", f"--dataset={toy_data}", f"--out_dir={out}"]
    try:
        errors.cli(importlib.import_module("train").main)
    finally:
        sys.argv = old
    return out / "ckpt.pt"
