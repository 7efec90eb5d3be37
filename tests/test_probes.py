"""Minimal pairs and probes against sums written out, planted encodings, and a treebank made here."""

import contextlib
import importlib.util
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from spikesink.edit import probes
from spikesink.edit.findings import WordCounts
from spikesink.errors import UserError
from spikesink.hooks import on_streams
from spikesink.models import hf
from spikesink.text import tokenizers
from spikesink.text.sequences import Reader
from spikesink.text.tokenizers import ByteTokenizer

from .conftest import ROOT, subject_of, tiny

BYTES = {"vocab_size": 257, "block_size": 64}
READER = Reader(ByteTokenizer(), {}, "", (256,), (), 64, 257)
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


@pytest.mark.parametrize("separator", [None, 256, 300])
def test_the_first_token_is_scored_where_something_can_stand_before_it(separator):
    """Under every condition; a separator outside the model's vocabulary is none."""
    model = tiny(**BYTES)
    tokenizer = ByteTokenizer()
    tokenizer.bos_id = separator
    reader = Reader(tokenizer, {}, "", (), (), 64, 257)
    seen = []

    @contextlib.contextmanager
    def again(ids, rows):
        seen.append(ids)
        yield

    starts = [("A", "I"), ("M", "Y"), ("F", "N"), ("x", "y"), ("T", "B")]  # of sentences that differ in nothing else
    pairs = [pair(f"{a} cat", f"{b} cat", field=f"{i}") for i, (a, b) in enumerate(starts)]
    found = probes.blimp(subject_of(model), reader, pairs, {**NONE, "again": again})
    assert all((ids[:, 0] == 256).all() for ids in seen) == (separator == 256)
    assert ("put before every sentence" if separator == 256 else "without the first") in found.normalisation
    whole = [log_probability(model, p.good) > log_probability(model, p.bad) for p in pairs]
    for condition in found.conditions:
        right = [condition.by_field[p.field].accuracy for p in pairs]
        assert (right == whole) == (separator == 256)
    if separator == 256:
        assert "<bos>" in probes.blimp(subject_of(model), READER, pairs, NONE).normalisation


def test_what_separates_documents_is_put_before_a_sentence_and_not_a_chats_turn():
    def separator(**special):
        made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["a", *special.values()])}, "a"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = hf.Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special))
        id_ = tokenizer.separator_id
        return Reader(tokenizer, {}, "", (), (), 64, 64).opened()[0].prefix_ids, id_ and tokenizer.decode(id_)

    assert separator(bos_token="<|im_start|>", unk_token="<|endoftext|>") == ((2,), "<|endoftext|>")
    assert separator(bos_token="<s>", eos_token="</s>") == ((1,), "<s>")
    assert separator(eos_token="</s>") == ((1,), "</s>")
    assert separator(pad_token="<pad>") == ((), None)


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


WORDS = ["We", " ca", "n't", ",", " he", " said", ",", " go", " to", " the", " café", "(", "café", ")", ":", " it"]


def llama2():
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made, [f"<0x{i:02X}>" for i in range(256)]


def metaspace(scheme, *before):
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.Metaspace(prepend_scheme=scheme)])
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return made, ["é"]


def byte_level(trim):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    return made, pre_tokenizers.ByteLevel.alphabet()


STYLES = {
    "llama-2": llama2,
    "t5": lambda: metaspace("always"),
    "first": lambda: metaspace("first"),
    "xlm-r": lambda: metaspace("always", pre_tokenizers.WhitespaceSplit()),
    "gpt-2": lambda: byte_level(False),
    "roberta": lambda: byte_level(True),
}


def fast(style):
    made, known = STYLES[style]()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], initial_alphabet=[], show_progress=False)
    if style == "llama-2":
        trainer.special_tokens = ["<unk>", *known]
    else:
        trainer.initial_alphabet = known
    made.train_from_iterator(WORDS, trainer)  # so that it has no tokens of two words
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.mark.parametrize("style", STYLES)
def test_sentences_are_encoded_whole_and_no_word_gets_anothers_tokens(style):
    """The very tokens that the model gets of the sentence; what a word's tokens say is the word, space aside."""
    tokenizer = fast(style)
    reader = Reader(hf.Tokenizer(tokenizer), {}, "", (), (), 64, 700)
    found = probes.words_of(reader, [probes.Sentence(WORDS, [], [], [])])
    ids, of = found.ids[0].tolist(), found.numbers[0].tolist()
    assert ids == tokenizer("".join(WORDS), add_special_tokens=False)["input_ids"]
    assert of == sorted(of) and found.index.tolist() == [*range(len(WORDS))]
    for i, word in enumerate(WORDS):
        assert tokenizer.decode([t for t, n in zip(ids, of, strict=True) if n == i]).strip() == word.strip()


def test_a_token_is_of_the_word_that_has_most_of_it():
    words = ["can", "not", " I", " go", "nna", "."]
    of = lambda *spans: probes.token_words(words, list(spans))
    assert of((0, 6), (0, 4), (2, 6), (6, 8), (6, 7), (7, 8)) == [0, 0, 1, 2, 2, 2]
    assert of((8, 14), (7, 11), (8, 9), (9, 9), (14, 15), (15, 15)) == [4, 3, 3, 3, 5, -1]  # 2 of "go", 3 of "nna"


def test_spans_from_bytes_are_those_of_transformers():
    """Of characters that are split into tokens, too, and of tokens that begin with a space."""
    tokenizer = fast("gpt-2")
    text = "I can't 北京, he said: naïve 👍🏽 go"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert max(map(len, text.encode().split())) > 4 and sum(map(len, tokens)) == len(text.encode())
    ids = np.arange(len(tokens))
    assert tokenizers.spans_of_bytes(text, ids, lambda i: len(tokens[i])) == ([*ids], encoded["offset_mapping"])
    ((ids, spans),) = ByteTokenizer().spans([text])
    assert [text[a:b] for a, b in spans] == [c for c in text for _ in c.encode()] and len(ids) == len(spans)


def test_only_whole_words_are_kept_and_a_tokenizer_that_tells_nothing_is_refused():
    sentence = probes.Sentence(["ab", " cd", "ef", " gh"], [], [], [])
    for room, words, length in ((4, 1, 2), (5, 2, 5), (6, 2, 5), (7, 3, 7), (10, 4, 10), (float("inf"), 4, 10)):
        reader = Reader(ByteTokenizer(), {}, "", (256,), (256,), room + 2, 257)
        found = probes.words_of(reader, [sentence])
        assert (len(found.index), found.ids.size(1)) == (words, length + 2)
        assert found.numbers[0, [0, -1]].tolist() == [-1, -1]
    with pytest.raises(UserError, match="no word of the treebank fits"):
        probes.words_of(Reader(ByteTokenizer(), {}, "", (256,), (), 2, 257), [sentence])
    silent = fast("t5")
    silent.__class__ = type("Slow", (type(silent),), {"is_fast": False})
    with pytest.raises(UserError, match="which characters"):
        probes.words_of(Reader(hf.Tokenizer(silent), {}, "", (), (), 64, 700), [sentence])
    with pytest.raises(UserError, match="has no tokenizer here"):
        probes.words_of(Reader(tokenizers.NoTokenizer(), {}, "", (), (), 64, 700), [sentence])


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
