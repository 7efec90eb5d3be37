"""Where a model meets data: another vocabulary, tokenizer, BOS or window is refused, or said."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

import spikesink
from spikesink import errors
from spikesink.models import checkpoint
from spikesink.models.export import byte_tokenizer, starts_with_bos
from spikesink.text.token_files import NANOGPT_META, other_ids
from studies import jobs

from .conftest import SMALL_RUN, write_toy

logging.disable_progress_bar()
CHARS = "".join(map(chr, range(33, 96)))


@pytest.fixture(autouse=True)
def everything_is_said_again():
    errors.say_once.cache_clear()
    jobs.start_of.cache_clear()
    jobs.data_of.cache_clear()


@pytest.fixture
def changed(tmp_path):
    """changed(vocab_size=70, ...) -> a copy of the toy data whose meta.json says so."""

    def call(**meta):
        write_toy(tmp_path / "data")
        file = tmp_path / "data" / "meta.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | meta))
        return tmp_path / "data"

    return call


@pytest.fixture
def start(cli, trained, tmp_path):
    """start(data, ...) -> (exit code, stderr) of a run from the short run's weights; it had BOS and windows of 16."""

    def call(data, *args, init_from=trained):
        where = [f"--init_from={init_from}", f"--dataset={data}", f"--out_dir={tmp_path / 'out'}", "--overwrite"]
        sizes = ("--n_layer", "--n_head", "--n_embd", "--block_size")
        code, _, err = cli("train.py", *(o for o in SMALL_RUN if not o.startswith(sizes)), *where, *args)
        return code, err

    return call


@pytest.mark.parametrize(
    "meta",
    [{"vocab_size": 62, "bos_id": 61}, {"bos_id": 62}, {"tokenizer": "chars", "chars": CHARS}],
    ids=["vocabulary", "BOS", "tokenizer"],
)
def test_weights_are_not_trained_on_with_other_ids(start, changed, meta):
    """A vocabulary no larger than the weights' was enough."""
    code, err = start(changed(**meta), "--bos")
    assert code == 2 and err.count("\n") == 1 and f"({next(iter(meta))} {next(iter(meta.values()))!r}, not" in err


def test_what_else_a_run_changes_of_the_one_it_starts_from_is_said(start, toy_data, changed, trained):
    assert start(toy_data, "--bos", "--max_iters=1") == (0, "")
    assert start(toy_data, "--max_iters=1") == (0, f"init_from={trained}: bos True -> False\n")
    folder = changed()
    (np.fromfile(folder / "train.bin", "<u2")[::-1]).tofile(folder / "train.bin")
    assert "its tokenizer is not known, its ids are taken to be those of" in start(folder, "--bos", "--max_iters=1")[1]


def folder_of(path, tokenizer):
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=320, max_position_embeddings=16)).save_pretrained(path)
    if tokenizer:
        tokenizer.save_pretrained(path)
    return path


def test_a_folder_goes_on_with_its_own_tokenizers_ids_alone(start, changed, tmp_path):
    reordered = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    words = reordered["model"]["vocab"]
    reordered["model"]["vocab"] = {word: (i + 1) % 256 if i < 256 else i for word, i in words.items()}
    (tmp_path / "other.json").write_text(json.dumps(reordered))
    other = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "other.json"), bos_token="<bos>")
    data = changed(tokenizer="byte", vocab_size=257, bos_id=256)
    for name, tokenizer, words in (
        ("same", starts_with_bos(byte_tokenizer()), "bos True -> False; block"),
        ("other", other, "other tokens than"),
        ("none", None, "its tokenizer is not known"),
    ):
        code, err = start(data, "--max_iters=1", "--block_size=8", init_from=folder_of(tmp_path / name, tokenizer))
        assert words in err and ("block_size 16 -> 8" in err) == (name != "other")
        assert (code, err.count("\n")) == (2 * (name == "other"), 1)


def test_ids_of_another_alphabet_of_the_same_size_are_not_read_as_they_are(changed, trained, tmp_path, cli):
    alphabet = {"tokenizer": "chars", "chars": CHARS}
    content = checkpoint.load(trained)
    path = tmp_path / "chars.pt"
    checkpoint.save(path, dataclasses.replace(content, data={**content.data, **alphabet}))
    how = ("--n_seq=4", "--seq_len=16", "--nulls=0", f"--data={changed(**alphabet | {'chars': CHARS[::-1]})}")
    code, _, err = cli("detect.py", path, *how)
    assert code == 2 and "(chars" in err and "there is no tokenizer to translate" in err
    assert cli("detect.py", path, *how[:3], f"--data={changed(**alphabet)}")[0] == 0


def test_data_that_may_not_be_what_they_seem_are_said(changed, trained, tmp_path, capsys):
    from detect import LAB

    def said(path, **how):
        with spikesink.open(path, lab=LAB, n_seq=4, seq_len=16, **how):
            return capsys.readouterr().err

    assert "neither" in said(trained, data=str(changed()))
    assert said(trained) == ""
    content = checkpoint.load(trained)
    grown = dataclasses.replace(content, data={**content.data, "val_tokens": 1024})
    checkpoint.save(tmp_path / "grown.pt", grown)
    assert "(val_tokens is 2,048, was 1,024): the model may have seen some of this text" in said(tmp_path / "grown.pt")
    np.save(tmp_path / "ids.npy", np.full((4, 16), 7))
    assert "not every sequence starts with <63>" in said(trained, tokens=str(tmp_path / "ids.npy"))
    np.save(tmp_path / "bos.npy", np.full((4, 16), 63))
    assert said(trained, tokens=str(tmp_path / "bos.npy")) == ""


def test_a_study_of_a_checkpoint_takes_the_data_that_it_was_trained_on(trained, tmp_path, cli, toy_data):
    content = checkpoint.load(trained)
    shutil.copytree(toy_data, tmp_path / "data")
    moved = {**content.config, "dataset": str(tmp_path / "data")}
    checkpoint.save(tmp_path / "ckpt.pt", dataclasses.replace(content, config=moved))
    command = ("study.py", "mitigate", f"--init_from={tmp_path / 'ckpt.pt'}", "--arms=none", "--dry", "--n_seq=12")
    assert cli(*command, "--seq_len=16")[0] == 0
    (np.fromfile(tmp_path / "data" / "train.bin", "<u2")[::-1]).tofile(tmp_path / "data" / "train.bin")
    jobs.start_of.cache_clear()
    jobs.data_of.cache_clear()
    code, _, err = cli(*command, "--seq_len=16")
    assert code == 2 and "was trained on other data than what" in err


def test_a_padded_vocabulary_of_gpt2_is_gpt2s():
    assert other_ids({**NANOGPT_META, "vocab_size": 50304}, NANOGPT_META) == ""
    assert other_ids({**NANOGPT_META, "vocab_size": 2048, "bos_id": 2047}, NANOGPT_META) == "vocab_size 2048, not 50257"
    assert other_ids(NANOGPT_META, {}) == ""
