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
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

from model import GPT, GPTConfig  # noqa: E402
from spikesink import errors  # noqa: E402
from spikesink.models.subject import Subject  # noqa: E402

# Each takes 20 seconds or more, all its cases together: `bash run.sh slow` runs them, `bash run.sh test` the rest.
SLOW = [
    "test_the_tutorial_does_what_it_says",
    "test_the_tour_runs_and_its_stored_outputs_say_the_same",
    "test_every_step_is_rehearsed",
    "test_fault",
    "test_no_verdict_on_a_planted_cause_is_wrong",
    "test_pages_open_without_complaint_and_fit",
    "test_weights_left_on_disk_give_the_same_findings",
    "test_a_model_in_memory_is_given_back_as_it_was",
    "test_detect_and_ablate_a_hugging_face_folder",
    "test_ablate_takes_encoders_encoder_decoders_and_padding",
    "test_the_hash_of_the_code_is_of_the_folders_that_numbers_depend_on",
    "test_the_table_holds_what_is_promised",
    "test_killed_at_a_random_moment_it_goes_on_to_the_same_table",
    "test_coverage_and_size",
    "test_divergence_is_a_result_and_what_is_done_is_not_done_again",
    "test_end_to_end",
    "test_what_is_trained_is_not_trained_again_and_the_rest_goes_on",
    "test_compiles_without_breaks",
    "test_any_config_trains_and_reloads_or_is_refused_by_name",
    "test_a_row_is_what_detect_measures",
    "test_compiled_training_is_bitwise_the_same",
    "test_a_compiled_run_resumes_bitwise",
    "test_replay_names_the_window_that_spoils_a_batch",
    "test_training_is_measured_in_turn_and_reported",
    "test_stdlib_is_split_by_name_so_another_python_trains_on_none_of_the_validation_text",
    "test_torchrun_restarts_a_run_whose_rank_was_killed",
]


def pytest_collection_modifyitems(items):
    found = {item.originalname for item in items}
    for item in items:
        if item.originalname in SLOW:
            item.add_marker(pytest.mark.slow)
    missing = [name for name in SLOW if name not in found]
    assert not missing or len(found) < 500, f"SLOW names no test: {missing}"


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
    return Subject.from_gpt(model, lambda token: f"<{token}>")


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
