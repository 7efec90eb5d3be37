"""Minimal pairs and probes against sums written out, planted encodings, and a treebank made here."""

import contextlib
import importlib.util
import io
import json
import tarfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spikesink.edit import probes
from spikesink.edit.findings import WordCounts
from spikesink.errors import UserError
from spikesink.hooks import on_streams
from spikesink.text.tokenizers import ByteTokenizer

from .conftest import ROOT, subject_of, tiny

BYTES = {"vocab_size": 257, "block_size": 64}
READER = SimpleNamespace(tokenizer=ByteTokenizer(), prefix_ids=(256,), suffix_ids=(), block_size=64)
NONE = {"none": lambda ids, rows: contextlib.nullcontext()}


def pair(good, bad, phenomenon="agreement", field="syntax"):
    return probes.Pair(good, bad, phenomenon, field)


def log_probability(model, text):
    """sum_t log p(byte t | BOS, the bytes before), written out."""
    ids = [256, *text.encode()]
    logits = model(torch.tensor([ids]))[0][0].double()
    return sum((logits[t, ids[t + 1]] - logits[t].logsumexp(0)).item() for t in range(len(ids) - 1))


def test_blimp_scores_are_sums_of_log_probabilities():
    model = tiny(**BYTES)
    pairs = [pair("The cats sleep.", "The cats sleeps."), pair("a", "bb", field="semantics"), pair("An ox", "A ox")]
    is_right = lambda p: log_probability(model, p.good) > log_probability(model, p.bad)
    pairs = [p if is_right(p) else pair(p.bad, p.good, field=p.field) for p in pairs]
    pairs += [pair(p.bad, p.good, field=p.field) for p in pairs[:1]]  # the mirror of a right pair is wrong
    found = probes.blimp(subject_of(model), READER, [*pairs, pair("x" * 64, "y")], NONE)
    right = [is_right(p) for p in pairs]
    assert right == [True, True, True, False]
    condition = found.conditions[0]
    assert condition.accuracy == 0.75 and (found.pairs, found.left_out) == (4, 1)
    for field in ("syntax", "semantics"):
        expected = [r for r, p in zip(right, pairs, strict=True) if p.field == field]
        assert condition.by_field[field].accuracy == sum(expected) / len(expected)


def test_blimp_under_a_condition_is_paired_with_the_clean_model():
    model = tiny(**BYTES)
    good = [f"{a} {b}" for a in ("one", "two", "three", "four") for b in ("sun", "moon", "star", "sky")]
    pairs = [pair(text, text[::-1]) for text in good]
    seen = []

    @contextlib.contextmanager
    def reversed_head(ids, rows):  # the log-probabilities of another model
        seen.append((rows.tolist(), ids.shape))
        weight = model.lm_head.weight
        old = weight.detach().clone()
        weight.data.copy_(-old)
        yield
        weight.data.copy_(old)

    clean, other = probes.blimp(subject_of(model), READER, pairs, {**NONE, "other": reversed_head}, 5).conditions
    assert other.change == pytest.approx(other.accuracy - clean.accuracy)
    assert other.change != 0 and other.change_ci95[0] <= other.change <= other.change_ci95[1]
    assert sorted(n for rows, _ in seen for n in rows) == list(range(32))
    assert clean.change_ci95 == [0, 0]


def test_a_model_that_does_not_predict_the_next_token_is_refused():
    subject = subject_of(tiny(**BYTES))
    object.__setattr__(subject, "shift", 0)
    with pytest.raises(UserError, match="next token"):
        probes.blimp(subject, READER, [pair("a", "b")], NONE)


@pytest.mark.parametrize("registers", [0, 2])
def test_a_words_state_is_the_mean_over_its_own_bytes(registers):
    subject = subject_of(tiny(**BYTES, n_register=registers))
    read = [probes.Sentence(["Größe", " ist", " alles", "."], ["X"] * 4, [1, -1, 1, 1], ["x"] * 4)]
    read += [probes.Sentence(["w" * 60, " word", " cut"], ["X"] * 3, [1, -1, 1], ["x"] * 3)]
    words = probes.words_of(READER, read)
    found = probes.states(subject, words, NONE)["none"]
    streams = []
    with on_streams(subject.streams, [streams.append] * len(subject.streams)):
        subject.losses(torch.tensor([[256, *"Größe ist alles.".encode()]]))
    spans = [(0, 7), (7, 11), (11, 17), (17, 18)]  # bytes: ö and ß have two
    for tap, x in zip(found, streams, strict=True):
        expected = torch.stack([x[0, registers + 1 + a : registers + 1 + b].mean(0) for a, b in spans])
        torch.testing.assert_close(tap[:4], expected, atol=1e-5, rtol=1e-4)
    assert words.index.tolist() == [0, 1, 2, 3, 0]  # " word" no longer fits


def treebank(n, seed=0, chain=False):
    """Sentences of five words from sixty types; the first letter of a word is its tag, and its relation to its head:
    the word before it in a `chain`, else any."""
    rng = np.random.default_rng(seed)
    types = [tag + "".join(rng.choice(list("klmnopqr"), 4)) for tag in "abc" for _ in range(20)]
    made = []
    for _ in range(n):
        words = [types[i] for i in rng.integers(0, 60, 5)]
        tags = [word[0] for word in words]
        heads = [-1, *(i - 1 if chain else (i + int(rng.integers(1, 5))) % 5 for i in range(1, 5))]
        made.append(probes.Sentence([f" {word}" for word in words], tags, heads, tags))
    return made


@pytest.fixture
def telling():
    """A byte model whose embedding says nothing of letters, and whose block 0 writes a word's first letter, from each
    of its bytes, into three channels: a tag can be read off the stream after it, and nowhere before."""
    model = tiny(**BYTES)
    subject = subject_of(model)
    state = {}

    def embed(x):
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(int(state["ids"].sum())))

    def tell(x):
        x = x.clone()
        for row, ids in zip(x, state["ids"].tolist(), strict=True):
            letter = 0
            for t, byte in enumerate(ids):
                letter = byte - ord("a") if chr(byte) in "abc" else letter
                row[t, letter] += 10
        return x

    @contextlib.contextmanager
    def condition(ids, rows):
        state["ids"] = ids
        with on_streams([subject.streams[0], subject.streams[2]], [embed, tell]):
            yield

    return subject, condition


def test_probes_find_a_tag_where_it_is_written_and_nowhere_before(telling):
    subject, condition = telling

    @contextlib.contextmanager
    def silenced(ids, rows):
        with condition(ids, rows), on_streams(subject.streams, [torch.zeros_like] * 5):
            yield

    found = probes.linear(subject, READER, treebank(200), treebank(80, 1), {"told": condition, "zero": silenced})
    told, zero = (condition.tasks for condition in found.conditions)
    for task in ("pos", "label"):
        before, after = told[task][0], told[task][4]
        assert before.accuracy < 0.5 and abs(before.selectivity) < 0.12
        assert after.accuracy > 0.99
        assert after.selectivity == pytest.approx(after.accuracy - after.control_accuracy)
        assert after.selectivity > 0.3 and after.selectivity_ci95[0] > 0.25
        assert zero[task][4].accuracy == pytest.approx(found.majority[task])
        assert zero[task][4].change == pytest.approx(zero[task][4].selectivity - after.selectivity)
        assert zero[task][4].change_ci95[1] < 0
    assert found.words == WordCounts(train=1000, test=400)
    assert all(abs(tap.accuracy - 0.5) < 0.1 for tap in told["edge"])  # here heads are drawn at random


def test_control_labels_are_a_function_of_the_type_and_look_like_the_tags():
    labels = probes.Labels(["a"] * 60 + ["b"] * 30 + ["c"] * 10)
    types = [f"type {i}" for i in range(2000)]
    drawn = labels.control(types)
    assert (labels.control(types[::-1])[::-1] == drawn).all()
    assert np.bincount(drawn) / 2000 == pytest.approx([0.6, 0.3, 0.1], abs=0.04)
    assert labels.classes(["c", "new", "a"]).tolist() == [2, -1, 0]


def test_edges_are_true_heads_beside_other_words_at_their_distance():
    read = treebank(50, chain=True)
    words = probes.words_of(READER, read)
    train = words.sentence < 30
    edge = probes.tasks_of(read, words, train)["edge"]
    same = words.sentence[edge.first] == words.sentence[edge.second]
    assert same.all()
    offset = edge.second - edge.first
    assert (offset[edge.label == 1] == -1).all()  # here a head is always the word before
    assert not (edge.label == 0).any()  # so no other word is at a head's distance


def test_sentences_of_conllu_with_contractions_and_elided_words(tmp_path):
    rows = [
        "# text = I don't, he said",
        "1\tI\tI\tPRON\t_\t_\t2\tnsubj:pass\t_\t_",
        "2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No",
        "2\tdo\tdo\tAUX\t_\t_\t0\troot\t_\t_",
        "3\tn't\tnot\tPART\t_\t_\t2\tadvmod\t_\t_",
        "3.1\tgo\tgo\tVERB\t_\t_\t_\t_\t_\t_",
        "4\t,\t,\tPUNCT\t_\t_\t2\tpunct\t_\t_",
        "5\the\the\tPRON\t_\t_\t2\tdep\t_\t_",
    ]
    (tmp_path / "a.conllu").write_text("\n".join(rows) + "\n\n")
    (sentence,) = probes.sentences(tmp_path / "a.conllu", 5)
    assert sentence.words == ["I", " do", "n't", ",", " he"]
    assert sentence.heads == [1, -1, 1, 1, 1]
    assert sentence.relations[0] == "nsubj"


# ------------------------------------------------------------------------------------------------- prepare


def prepare_of(dataset):
    spec = importlib.util.spec_from_file_location(f"prepare_{dataset}", ROOT / "data" / dataset / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.prepare


ROW = {"UID": "u", "field": "syntax/semantics", "linguistics_term": "npi", "sentence_good": "a", "sentence_bad": "b"}
CONLLU = b"1\tI\tI\tPRON\t_\t_\t0\troot\t_\t_\n\n"


def archives(folder, files):
    """The same files as a folder, a zip and a tar.xz, in paths that must not be followed."""
    (folder / "plain/deep").mkdir(parents=True)
    with zipfile.ZipFile(folder / "a.zip", "w") as packed, tarfile.open(folder / "a.tar.xz", "w:xz") as tar:
        for name, content in files.items():
            (folder / "plain/deep" / name).write_bytes(content)
            packed.writestr(f"../../evil/{name}", content)
            info = tarfile.TarInfo(f"/tmp/../evil/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return [folder / "plain", folder / "a.zip", folder / "a.tar.xz"]


def test_blimp_is_prepared_from_any_archive(tmp_path):
    line = json.dumps({**ROW, "more": 1}).encode()
    for archive in archives(tmp_path, {"p.jsonl": line + b"\n" + line, "q.jsonl": line, "._q.jsonl": b"junk"}):
        assert prepare_of("blimp")(tmp_path, archive) == (1, 3)
        assert [json.loads(x) for x in (tmp_path / "blimp.jsonl").read_text().splitlines()] == [ROW] * 3
    assert {p.name for p in tmp_path.iterdir()} == {"plain", "a.zip", "a.tar.xz", "blimp.jsonl"}
    assert probes.minimal_pairs(tmp_path / "blimp.jsonl", 2)[0].field == "syntax_semantics"


def test_sampled_pairs_are_the_same_every_time(tmp_path):
    rows = [{**ROW, "UID": f"u{i % 3}", "sentence_good": str(i)} for i in range(90)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = (probes.minimal_pairs(tmp_path / "b.jsonl", 7) for _ in range(2))
    assert one == two and len(set(one)) == 21


def test_the_treebank_is_prepared_as_it_is(tmp_path):
    files = {f"en_ewt-ud-{split}.conllu": CONLLU for split in ("train", "dev", "test")}
    for archive in archives(tmp_path, files):
        prepare_of("ud_ewt")(tmp_path, archive)
        assert (tmp_path / "train.conllu").read_bytes() == CONLLU


@pytest.mark.parametrize(
    "dataset, name, content, words",
    [
        ("blimp", "p.jsonl", b'{"UID": 3}', "line 1 of p.jsonl"),
        ("blimp", "p.txt", b"", "holds no"),
        ("ud_ewt", "en_ewt-ud-train.conllu", CONLLU, "holds no en_ewt-ud-dev"),
        ("ud_ewt", "a.zip", b"PK\x03\x04 broken", "archive|holds no"),
    ],
)
def test_broken_releases_are_one_line(tmp_path, dataset, name, content, words):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    source = tmp_path / "in" / name if name.endswith(".zip") else tmp_path / "in"
    with pytest.raises(UserError, match=words):
        prepare_of(dataset)(tmp_path, source)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    with pytest.raises(UserError, match="no archive"):
        prepare_of(dataset)(tmp_path, tmp_path / "nothing.zip")


def test_the_edge_tasks_other_word_is_of_the_same_sentence_and_not_the_head():
    read = treebank(40)
    words = probes.words_of(READER, read)
    task = probes.tasks_of(read, words, np.ones(len(words.index), dtype=bool))["edge"]
    assert np.array_equal(words.sentence[task.first], words.sentence[task.second])
    head = np.array([read[n].heads[i] for n, i in zip(words.sentence, words.index, strict=True)])
    assert np.array_equal(words.index[task.second] == head[task.first], task.label == 1)
    assert (task.first != task.second).all() and task.label.mean() == 0.5
