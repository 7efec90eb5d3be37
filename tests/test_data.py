"""The loader's promises, and every prepare.py on local data of the real layout."""

import base64
import contextlib
import importlib.util
import itertools
import json
import lzma
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from data import loader
from data.loader import Tokens
from data.writer import DatasetWriter
from spikesink.errors import UserError
from spikesink.text.tokenizers import ByteTokenizer, GPT2Tokenizer, split_documents, tokenizer_of

from .conftest import ROOT


def prepare_module(name):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """A file of BPE ranks of GPT-2's size: every byte, then pairs of bytes."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes(pair) for pair in itertools.islice(itertools.product(range(32, 256), repeat=2), 50_000)]
    path = tmp_path_factory.mktemp("bpe") / "gpt2.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def dataset(folder, train, val=None, **meta):
    folder.mkdir(exist_ok=True)
    for split, tokens in (("train", train), ("val", train if val is None else val)):
        np.asarray(tokens, dtype="<u2").tofile(folder / f"{split}.bin")
    if meta:
        (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 50257, "bos_id": 9, **meta}))
    return folder


# ------------------------------------------------------------------------------------------------- loader


def test_an_epoch_sees_every_window_once_and_the_next_in_another_order(tmp_path):
    data = Tokens(dataset(tmp_path, np.arange(16 * 8 + 1)), "train", 8, seed=3)
    epochs = [torch.cat([data.batch(step, 4)[0] for step in range(e * 4, e * 4 + 4)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 128, 8))
    assert not torch.equal(*epochs)
    x, y = data.batch(5, 4)
    assert torch.equal(y[:, :-1], x[:, 1:]) and torch.equal(y, x + 1)


def test_a_step_holds_the_same_samples_whatever_the_world_size(tmp_path):
    data = Tokens(dataset(tmp_path, np.arange(64 * 8 + 1)), "train", 8, seed=1)
    one = torch.cat([data.batch(3, 2, micro, 4)[0] for micro in range(4)])
    two = torch.cat([data.batch(3, 2, micro, 2, rank=rank, world=2)[0] for micro in range(2) for rank in range(2)])
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.cat([data.batch(4, 2, micro, 4)[0] for micro in range(4)]))


def test_bos_starts_every_window_and_nothing_is_lost(tmp_path):
    data = Tokens(dataset(tmp_path, np.arange(32), vocab_size=64, bos_id=63), "train", 8, bos=True)
    x, y = data.read(range(4))
    assert x[:, 0].tolist() == [63] * 4
    assert torch.equal(y.flatten(), torch.arange(32)) and torch.equal(x[:, 1:], y[:, :-1])


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: (f / "train.bin").write_bytes(b""), "empty"),
        (lambda f: (f / "train.bin").write_bytes(b"abc"), "3 bytes.*truncated"),
        (lambda f: (f / "train.bin").write_bytes(b"\0" * 100), "100 bytes, not 128 tokens"),
        (lambda f: (f / "train.bin").write_bytes(b"\xff" * 256), "65535.*vocabulary of 300"),
        (lambda f: (f / "train.bin").unlink(), "missing"),
        (lambda f: (f / "meta.json").write_text("{"), "not a dataset description"),
        (lambda f: (f / "meta.json").write_text('{"dtype": "object", "vocab_size": 3}'), "not a dataset description"),
        (lambda f: None, "128 tokens, fewer than one window of 257"),
    ],
)
def test_spoiled_files_are_refused(tmp_path, spoil, words):
    dataset(tmp_path, np.arange(128), train_tokens=128, vocab_size=300)
    spoil(tmp_path)
    with pytest.raises(UserError, match=words):
        Tokens(tmp_path, "train", 256)


IDS = np.minimum(np.random.default_rng(0).zipf(1.2, 20_000), 50256)


@pytest.mark.parametrize(
    "content, meta, words",
    [
        (IDS.astype("<u4").tobytes(), None, r"ids of 4 bytes, not uint16: write it with ids.astype\(np.uint16\)"),
        (IDS.astype("<i8").tobytes(), None, "ids of 8 bytes, not uint16"),
        ((IDS * 5).astype("<u4").tobytes(), None, "ids of 4 bytes, not uint16"),
        (IDS.astype("<i8").tobytes(), {"dtype": "uint32", "vocab_size": 128_000}, "ids of 8 bytes, not uint32"),
        (IDS.astype("<u2").tobytes(), {"dtype": "uint32", "vocab_size": 50257}, "outside the vocabulary.*dtype"),
        ((IDS % 65).astype("u1").tobytes(), None, "single bytes, not uint16"),
        (IDS.astype(">u2").tobytes(), None, "outside the vocabulary"),
        (b"\x93NUMPY\x01\0v\0" + IDS.astype("<u2").tobytes(), None, "header"),
        (np.int32([20240520, 1, 9] + [0] * 253).tobytes() + IDS.astype("<u2").tobytes(), None, "header"),
    ],
)
def test_ids_of_another_width_are_refused_with_what_to_write(tmp_path, content, meta, words):
    """NumPy's default int64, read as uint16, once trained on three zeros in four tokens."""
    (tmp_path / "train.bin").write_bytes(content)
    if meta:
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=words):
        Tokens(tmp_path, "train", 256)


def test_ids_outside_the_vocabulary_are_found_wherever_they_stand(tmp_path):
    ids = np.zeros(2**21, dtype=np.int64)
    ids[2**20 + 2**19 :] = 300
    with pytest.raises(UserError, match="holds token 300, outside the vocabulary of 300"):
        Tokens(dataset(tmp_path, ids, vocab_size=300), "train", 256)


def test_right_widths_are_read(tmp_path):
    """Ids as they are; uniform ones; and every second one a separator, where meta.json counts them."""
    uniform, alternating = np.random.default_rng(0).integers(0, 50257, 20_000), np.arange(2000) % 300
    alternating[1::2] = 1
    for ids, meta in ((IDS, {}), (uniform, {}), (alternating, {"vocab_size": 300, "train_tokens": 2000})):
        assert Tokens(dataset(tmp_path, ids, val=IDS, **meta), "train", 16).tokens[7] == ids[7]


def test_unknown_and_unprepared_datasets_name_what_to_do():
    with pytest.raises(UserError, match="did you mean openwebtext"):
        Tokens("openwebtxt", "train", 8)
    if not (ROOT / "data/wikitext103/train.bin").exists():
        with pytest.raises(UserError, match=r"python data/wikitext103/prepare\.py"):
            Tokens("wikitext103", "train", 8)


def test_a_folder_called_like_a_dataset_does_not_take_its_place(tmp_path, monkeypatch):
    """An empty one hid what is under data/; of two that are prepared, neither is taken unasked."""
    root, here = tmp_path / "data", tmp_path / "here"
    monkeypatch.setattr(loader, "ROOT", root)
    for folder in (root, root / "wiki", here, here / "wiki"):
        folder.mkdir()
    monkeypatch.chdir(here)
    (root / "wiki" / "prepare.py").touch()
    with pytest.raises(UserError, match=r"not prepared; run: python data/wiki/prepare\.py"):
        loader.folder("wiki")
    dataset(root / "wiki", IDS)
    assert loader.folder("wiki").resolve() == root / "wiki"
    dataset(here / "wiki", IDS)
    with pytest.raises(UserError, match=r"wiki is a dataset here and another in .*give \./wiki or"):
        loader.folder("wiki")
    assert loader.folder("./wiki").resolve() == here / "wiki" and loader.folder(str(root / "wiki")) == root / "wiki"


def test_targets_can_be_edited_without_touching_the_inputs(tmp_path):
    data = Tokens(dataset(tmp_path, np.arange(64)), "train", 8)
    x, y = data.batch(0, 1)
    before = x.clone()
    y[:] = -1
    assert torch.equal(x, before)


def test_nanogpt_files_load_as_they_are(tmp_path):
    data = Tokens(dataset(tmp_path, [15496, 995, 50256] * 10), "val", 4)
    assert data.meta["vocab_size"] == 50257 and data.read([0])[0].tolist() == [[15496, 995, 50256, 15496]]


# ----------------------------------------------------------------------------------------------- prepare


def test_text_from_txt_xz_and_jsonl(tmp_path):
    documents = [f"document {i}\nwith ümlauts and <|endoftext|> inside a line" for i in range(7)]
    plain = tmp_path / "a.txt"
    plain.write_text("".join(f"{d}\n<|endoftext|>\n" for d in documents[:3]), encoding="utf-8")
    packed = tmp_path / "b.txt.xz"
    packed.write_bytes(lzma.compress("".join(f"{d}\n<|endoftext|>\n" for d in documents[3:5]).encode()))
    lines = tmp_path / "c.jsonl"
    lines.write_text("".join(json.dumps({"text": d + "\n"}) + "\n" for d in documents[5:]))
    out = tmp_path / "out"
    prepare_module("text").prepare([plain, packed, lines], out, ByteTokenizer(), 3)
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["documents"], meta["vocab_size"], meta["bos_id"]) == (7, 257, 256)
    text = {}
    for split in ("train", "val"):
        ids = np.fromfile(out / f"{split}.bin", dtype="<u2")
        assert len(ids) == meta[f"{split}_tokens"]
        text[split] = [
            bytes(part[part < 256].astype(np.uint8)).decode() for part in np.split(ids, np.flatnonzero(ids == 256) + 1)
        ]
    assert [t.rstrip("\n") for t in text["val"] if t] == [documents[i] for i in (0, 3, 6)]
    assert [t.rstrip("\n") for t in text["train"] if t] == [documents[i] for i in (1, 2, 4, 5)]


@pytest.mark.parametrize("form", ["plain", "bom", "blank lines", "crlf", "without text", "another name"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_text_is_the_same_in_whatever_form_it_comes(tmp_path, kind, form):
    """A byte order mark was once trained on, and documents without text were empty ones."""
    texts = [f"document {i}\nof two lines\n" for i in range(5)]
    key = "content" if form == "another name" else "text"
    empty = [{key: ""}, {key: " \n"}, {key: None}]
    rows = [json.dumps(row) + "\n" for row in [{key: text} for text in texts] + empty * (form == "without text")]
    if kind == ".txt":
        rows = [f"{text}<|endoftext|>\n" for text in texts + ["", "\n"] * (form == "without text")]
    content = ("\n\n" if form == "blank lines" and kind == ".jsonl" else "").join(rows)
    content = content.replace("\n", "\r\n") if form == "crlf" else content
    (tmp_path / f"a{kind}").write_bytes(content.encode("utf-8-sig" if form == "bom" else "utf-8"))
    prepare_module("text").prepare([tmp_path / f"a{kind}"], tmp_path / "out", ByteTokenizer(), 100, key)
    train, val = (np.fromfile(tmp_path / "out" / f"{split}.bin", dtype="<u2") for split in ("train", "val"))
    assert ByteTokenizer().text(np.append(val, train)) == "\n\n".join([*texts, ""])
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["documents"] == 5


@pytest.mark.parametrize("line", ["{]", '{"content": "x"}', '{"text": 3}', "[1]", "7", '"text"'])
def test_a_bad_line_of_json_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n' + line + "\n")
    with pytest.raises(UserError, match=r'a\.jsonl: line 4 is no JSON object with its text in "text".*--column'):
        prepare_module("text").prepare([tmp_path / "a.jsonl"], tmp_path / "out", ByteTokenizer(), 2)


def test_other_signs_of_a_line_end_are_text(tmp_path):
    """Only a newline ends a line of JSON or CoNLL-U: a line separator within made another line, and another number."""
    pair = dict.fromkeys(("UID", "field", "linguistics_term", "sentence_good", "sentence_bad"), "a\u2028b\x85c")
    line = json.dumps(pair, ensure_ascii=False).encode()
    blimp = prepare_module("blimp")
    assert list(blimp.pairs("x", b"\xef\xbb\xbf" + line + b"\r\n" + line)) == [pair] * 2
    with pytest.raises(UserError, match="line 2 of x"):
        list(blimp.pairs("x", line + b"\n{]"))
    prepare_module("ud_ewt").check("x", ("\t".join(["a\u2028b"] * 10) + "\n\n# text\x85 more\n").encode())
    with pytest.raises(UserError, match="line 2 of x"):
        prepare_module("ud_ewt").check("x", b"# \xc2\x85\nno columns")


def test_parquet_of_other_forms(tmp_path, ranks, capsys, monkeypatch):
    """Missing texts are left out; a column that is not there, or a broken shard, is said before hours of work."""
    import pyarrow
    import pyarrow.parquet

    module = prepare_module("openwebtext")
    monkeypatch.setattr(module, "VAL_EVERY", 4)
    texts = [f"document {i}" for i in range(8)]
    write = lambda name, column: pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / name / "b.parquet")
    for name, column in (
        ("plain", {"text": texts}),
        ("null", {"text": [*texts, None, ""]}),
        ("other", {"content": texts, "n": list(range(8))}),
        ("broken", {"text": texts}),
    ):
        shards(tmp_path / name, "a", texts, 1)
        write(name, column)
    prepare = lambda name, **how: module.prepare(
        tmp_path / f"{name}.out", GPT2Tokenizer(ranks), parquet=tmp_path / name, **how
    )
    prepare("plain")
    prepare("null")
    assert bins(tmp_path / "null.out") == bins(tmp_path / "plain.out")
    assert "2 documents without text are left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"b\.parquet has no text in a column 'text'; its columns of text: content"):
        prepare("other")
    (tmp_path / "other" / "a-00000-of-00001.parquet").unlink()
    prepare("other", column="content")
    (tmp_path / "broken" / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"cannot read .*b\.parquet"):
        prepare("broken")
    assert not (tmp_path / "broken.out").exists()


@pytest.mark.parametrize(
    "content, name", [(b"\xfd7zXZ\x00broken", "a.txt.xz"), (b"{]", "a.jsonl"), (b"x", "a.pdf"), (b"\xff\xfe", "a.txt")]
)
def test_unreadable_text_names_the_file(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        prepare_module("text").prepare([tmp_path / name], tmp_path / "out", ByteTokenizer(), 2)
    assert not (tmp_path / "out" / "train.bin").exists()


def test_text_without_separators_can_be_mended_and_run_again(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one long text\n")
    prepare = prepare_module("text").prepare
    with pytest.raises(UserError, match="endoftext"):
        prepare([file], tmp_path / "out", ByteTokenizer(), 2)
    file.write_text("one\n<|endoftext|>\ntwo\n")
    prepare([file], tmp_path / "out", ByteTokenizer(), 2)
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["documents"] == 2


def test_one_long_text_is_cut_at_line_ends_and_nothing_is_lost():
    module = prepare_module("text")
    text = "".join(f"line {i}\n" for i in range(20_000))
    parts = list(module.pieces(["short", text]))
    assert "".join(parts) == "short" + text
    assert len(parts) == 1 + -(-len(text) // module.PIECE)
    assert all(part.endswith("\n") for part in parts[1:])


@pytest.mark.parametrize("name", ["stdlib", "../x", "a/b", ""])
def test_a_dataset_takes_nobodys_place(name):
    with pytest.raises(UserError, match="taken or is no plain name"):
        prepare_module("text").new_folder(name, True)


def test_processes_make_a_dataset_once(tmp_path):
    """Two at a time, on a folder whose prepare.py would be spoiled by a second writer."""
    folder = tmp_path / "backcopy"
    folder.mkdir()
    source = (ROOT / "data/backcopy/prepare.py").read_text()
    source = source.replace("FOLDER.parents[1]", repr(str(ROOT))).replace(" = 200_000, seed", " = 20_000, seed")
    (folder / "prepare.py").write_text(source)
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from data import loader; from pathlib import Path; " + (
        f"loader.make_once(Path({str(folder)!r})); print(len(loader.Tokens({str(folder)!r}, 'train', 64, True).tokens))"
    )
    running = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in running] == ["1280000\n"] * 2


def test_split_documents_keeps_every_character():
    lines = ["a\n", "\n", "<|endoftext|>\n", " <|endoftext|> \t\r\n", "b <|endoftext|>\n", "c"]
    assert list(split_documents(lines)) == ["a\n\n", "b <|endoftext|>\nc"]


def test_gpt2_tokenizer_from_local_ranks(ranks):
    tokenizer = GPT2Tokenizer(ranks)
    (ids,) = tokenizer.encode(["Hello <|endoftext|>"])
    assert b"".join(tokenizer.encoding.decode_single_token_bytes(int(i)) for i in ids) == b"Hello <|endoftext|>"
    assert 50256 not in ids and tokenizer.decode(50256) == "<|endoftext|>" and tokenizer.decode(50300) == "<50300>"
    with pytest.raises(UserError, match="there is no file"):
        GPT2Tokenizer("nowhere.tiktoken")
    with pytest.raises(UserError, match="does not hold GPT-2's BPE ranks"):
        GPT2Tokenizer(__file__)


@pytest.mark.parametrize("size", [257, 1000, 50257])
def test_gpt2s_first_merges_are_a_tokenizer_by_themselves(ranks, size):
    from spikesink.models.export import gpt2_tokenizer

    tokenizer, text = GPT2Tokenizer(ranks, size), '  !! Grüße, 世界!\n !" 12'
    (ids,) = tokenizer.encode([text])
    assert tokenizer.encoding.decode(ids.tolist()) == text and tokenizer.decode(size - 1) == "<|endoftext|>"
    assert ids.max() < tokenizer.bos_id == size - 1
    assert (len(ids) == len(text.encode())) == (size == 257)  # bytes alone merge nothing
    exported = gpt2_tokenizer(ranks, size)
    assert exported(text)["input_ids"] == ids.tolist() and exported.eos_token_id == size - 1
    again = tokenizer_of({"tokenizer": "gpt2", "bpe": str(ranks), "vocab_size": size})
    assert again.encode([text])[0].tolist() == ids.tolist()


def test_a_padded_vocabulary_is_gpt2s_and_a_senseless_one_is_refused(ranks):
    assert tokenizer_of({"tokenizer": "gpt2", "bpe": str(ranks), "vocab_size": 50304}).vocab_size == 50257
    with pytest.raises(UserError, match="257 to 50,257 ids, not 256"):
        GPT2Tokenizer(ranks, 256)


def shards(folder, name, documents, n):
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    for i, part in enumerate(np.array_split(np.array(documents, dtype=object), n)):
        pyarrow.parquet.write_table(pyarrow.table({"text": list(part)}), folder / f"{name}-{i:05}-of-{n:05}.parquet")


def test_openwebtext_from_local_shards_resumes_to_the_same_files(tmp_path, ranks, monkeypatch):
    module = prepare_module("openwebtext")
    monkeypatch.setattr(module, "VAL_EVERY", 10)
    documents = [f"web page number {i}, " * (i % 5 + 1) for i in range(90)]
    shards(tmp_path / "parquet", "train", documents, 3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    module.prepare(whole, GPT2Tokenizer(ranks), parquet=tmp_path / "parquet")
    val = np.fromfile(whole / "val.bin", dtype="<u2")
    assert (val == 50256).sum() == 9
    decoded = GPT2Tokenizer(ranks).encoding.decode(val.tolist()).split("<|endoftext|>")[:-1]
    assert decoded == documents[::10]

    texts = module.parquet_texts

    def fail_in_the_second_shard(shard, column):
        for i, text in enumerate(texts(shard, column)):
            if "00001-of" in shard[0] and i == 20:
                raise KeyboardInterrupt
            yield text

    monkeypatch.setattr(module, "parquet_texts", fail_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        module.prepare(broken, GPT2Tokenizer(ranks), parquet=tmp_path / "parquet")
    assert not (broken / "train.bin").exists()
    read = []
    monkeypatch.setattr(module, "parquet_texts", lambda *shard: read.append(shard) or texts(*shard))
    module.prepare(broken, GPT2Tokenizer(ranks), parquet=tmp_path / "parquet")
    assert len(read) == 2  # the first shard is not read again
    for name in ("train.bin", "val.bin"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_openwebtext_max_docs(tmp_path, ranks):
    shards(tmp_path / "parquet", "train", [f"page {i}" for i in range(30)], 3)
    prepare_module("openwebtext").prepare(
        tmp_path / "o", GPT2Tokenizer(ranks), max_docs=15, parquet=tmp_path / "parquet"
    )
    assert json.loads((tmp_path / "o" / "meta.json").read_text())["documents"] == 15


def test_wikitext_documents_are_articles(tmp_path, ranks):
    lines = [" = One = \n", "", " a b \n", " = = Section = = \n", " c \n", " = Two = \n", " d \n"]
    shards(tmp_path / "parquet", "train", lines * 3, 2)
    shards(tmp_path / "parquet", "validation", lines, 1)
    prepare_module("wikitext103").prepare(tmp_path / "w", GPT2Tokenizer(ranks), tmp_path / "parquet")
    val = GPT2Tokenizer(ranks).encoding.decode(np.fromfile(tmp_path / "w" / "val.bin", dtype="<u2").tolist())
    assert val.split("<|endoftext|>") == [" = One = \n a b \n = = Section = = \n c \n", " = Two = \n d \n", ""]
    assert json.loads((tmp_path / "w" / "meta.json").read_text())["documents"] == 8


def test_without_the_hub_it_is_one_line(tmp_path, ranks):
    with pytest.raises(UserError, match="--parquet"):
        prepare_module("openwebtext").prepare(tmp_path / "o", GPT2Tokenizer(ranks))
    with pytest.raises(UserError, match="--parquet"):
        prepare_module("wikitext103").prepare(tmp_path / "w", GPT2Tokenizer(ranks))


def test_backcopy_copies_after_triggers_and_follows_the_bigrams_elsewhere():
    module = prepare_module("backcopy")
    chars, probabilities = module.bigrams()
    trigger = np.isin(list(chars), list(module.TRIGGERS))
    rows = module.generate(20_000, probabilities, trigger, np.random.default_rng(0))
    after = trigger[rows[:, 1:-1]]
    assert after.sum() > 10_000 and (rows[:, 2:] == rows[:, :-2])[after].all()
    assert not trigger[rows[:, 0]].any()
    common = next(i for i in range(len(chars)) if not trigger[i])
    following = rows[:, 1:][rows[:, :-1] == common]
    measured = np.bincount(following, minlength=len(chars)) / len(following)
    assert np.abs(measured - probabilities[common]).max() < 0.01


def test_stdlib_is_deterministic_and_prose_first():
    from spikesink.text import default_text as module

    first, second = ([*itertools.islice(module.documents(), 90)] for _ in range(2))
    assert first == second and first[0][0] == "assert" and "assert" in first[0][1]
    assert module.docstrings('"""Top."""\ndef f():\n    "Inner."') == "Top.\n\nInner."
    assert module.comments("x = 1  # why\n") == "why"


def test_stdlib_is_split_by_name_so_another_python_trains_on_none_of_the_validation_text(monkeypatch, capsys):
    """By document number, one topic more moved all that follow it."""
    from spikesink.text import default_text as module

    split = lambda: [
        {text for name, text in module.documents() if module.split_of(name) == s} for s in ("train", "val")
    ]
    train, val = split()
    assert 0.02 < len(val) / len(train) < 0.1
    topics = {"a new one": "words", **module.pydoc_data.topics.topics}
    del topics["with"]
    monkeypatch.setattr(module.pydoc_data.topics, "topics", topics)
    other_train, other_val = split()
    assert other_val & train == val & other_train == val & train and len(val & train) < 5  # modules that are alike
    assert [module.split_of(name) for name in ("assert", "else", "json/decoder", "codecs")] == ["train", "val"] * 2

    assert module.titled("x", {"vocab_size": 3}, {"python": "3.9.1"}) == "x" and capsys.readouterr().err == ""
    assert module.titled("stdlib", {"python": "3.9.1", **module.ABOUT}, module.ABOUT).startswith("stdlib of Python 3.")
    assert capsys.readouterr().err == ""
    module.titled("stdlib", module.ABOUT, {"python": "3.9.1"})
    assert "trained on stdlib of Python 3.9.1, split by number" in capsys.readouterr().err


def test_stdlib_of_an_older_split_is_made_again(tmp_path):
    folder = dataset(tmp_path / "stdlib", IDS % 257, vocab_size=257, python="3.11.1")
    (folder / "prepare.py").write_text("def prepare():\n    raise KeyError('made')")
    with pytest.raises(KeyError, match="made"):
        loader.make_once(folder)
    dataset(folder, IDS % 257, vocab_size=257, python="3.11.1", split="by name")
    loader.make_once(folder)


def test_a_split_without_documents_is_refused(tmp_path):
    with DatasetWriter(tmp_path, ByteTokenizer(), val_every=10) as writer:
        writer.add(["only one"])
        with pytest.raises(UserError, match=r"1 document.s., none for the train split.*endoftext"):
            writer.finish()


class KilledError(BaseException):
    """Not an Exception: nothing of ours catches it, as nothing catches a kill."""


def steps(folder, fail_at=None):
    """Prepares two sources; `fail_at`: dies before (None: never) that call of what changes a name on the disk."""
    calls = itertools.count()

    def dying(real):
        def call(*args, **kwargs):
            if next(calls) == fail_at:
                raise KilledError
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", dying(os.replace))
        patch.setattr("pathlib.Path.unlink", dying(Path.unlink))
        with DatasetWriter(folder, ByteTokenizer(), 4, {"files": ["a", "b"]}) as writer:
            for done, name in enumerate(("First", "Second")):
                if done >= writer.source:
                    writer.add([f"{name} file, document {i}." for i in range(8)])
                    writer.mark(done + 1)
            writer.finish()
    return next(calls)


def bins(folder):
    return [(folder / f"{split}.bin").read_bytes() for split in ("train", "val")]


def test_prepare_killed_anywhere_goes_on_to_the_same_files(tmp_path, capsys):
    """Before any rename or removal, over an older dataset too; in between, no old file lies beside a new one."""
    n_calls = steps(tmp_path / "whole")
    whole = bins(tmp_path / "whole")
    for old in (False, True):
        for fail_at in range(n_calls):
            folder = tmp_path / f"{old}{fail_at}"
            if old:
                dataset(folder, *(np.full(len(part) // 2, 7) for part in whole), vocab_size=257)
            with contextlib.suppress(KilledError):
                steps(folder, fail_at)
            left = [file.read_bytes() for file in folder.glob("*.bin")]
            assert len({content in whole for content in left}) < 2
            steps(folder)
            assert bins(folder) == whole and not list(folder.glob("*.part"))
    assert "starting again" not in capsys.readouterr().err


@pytest.mark.parametrize("spoil", [Path.unlink, lambda part: os.truncate(part, 3)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_prepare_starts_again_where_what_it_wrote_is_gone(tmp_path, capsys, spoil, split):
    """What is not there was once filled up with zeros."""
    steps(tmp_path / "whole")
    with pytest.raises(KilledError):
        steps(tmp_path / "broken", 1)  # the second source's mark
    spoil(tmp_path / "broken" / f"{split}.bin.part")
    steps(tmp_path / "broken")
    assert f"lacks what was written to {split}.bin.part; starting again" in capsys.readouterr().err
    assert bins(tmp_path / "broken") == bins(tmp_path / "whole")


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_that_two_bytes_do_not_hold_take_four(tmp_path, size, dtype):
    """A tokenizer that a fork adds may be larger than any of ours: its ids were cut down to two bytes."""
    large = types.SimpleNamespace(name="large", vocab_size=size, bos_id=size - 1, bpe=None)
    large.encode = lambda texts: [np.array([0, size - 2]) for _ in texts]
    with DatasetWriter(tmp_path, large, 2) as writer:
        writer.add(["one", "two"])
        writer.mark(1)
    with DatasetWriter(tmp_path, large, 2) as writer:
        writer.add(["three", "four"])
        writer.finish()
    data = Tokens(str(tmp_path), "train", 5)
    assert data.meta["dtype"] == dtype and data.tokens.tolist() == [0, size - 2, size - 1] * 2


def test_two_preparations_of_a_dataset_do_not_spoil_each_other(tmp_path):
    """The second began the first one's files anew under its hands, and ended well."""
    (tmp_path / "other.txt").write_text("another text\n<|endoftext|>\n" * 9)
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; from pathlib import Path\n"
        "from spikesink.errors import cli; from spikesink.text.tokenizers import ByteTokenizer\n"
        f"prepare = runpy.run_path({str(ROOT / 'data/text/prepare.py')!r})['prepare']\n"
        f"files = [Path({str(tmp_path / 'other.txt')!r})]\n"
        f"cli(lambda: prepare(files, Path({str(tmp_path / 'd')!r}), ByteTokenizer(), 2))"
    )
    with DatasetWriter(tmp_path / "d", ByteTokenizer(), 2) as writer:
        writer.add(["one", "two"])
        writer.mark(1)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "another process prepares" in done.stderr
        writer.add(["three", "four"])
        writer.finish()
    assert [ByteTokenizer().text(np.frombuffer(part, "<u2")) for part in bins(tmp_path / "d")] == [
        "two\n\nfour\n\n",
        "one\n\nthree\n\n",
    ]
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_prepare_does_not_go_on_with_another_tokenizer(tmp_path, capsys, ranks):
    with DatasetWriter(tmp_path, ByteTokenizer(), 2) as writer:
        writer.add(["one", "two"])
        writer.mark(1)
    with DatasetWriter(tmp_path, GPT2Tokenizer(ranks), 2) as writer:
        assert (writer.source, writer.documents) == (0, 0)
    assert "begun with other files or options" in capsys.readouterr().err
