"""Samples against generation written out; scores against sums over logits; multiple choice against both."""

import contextlib
import json
import math

import pytest
import torch

import spikesink
from spikesink.edit import choices, interventions
from spikesink.edit.clean_pass import CleanPass
from spikesink.edit.findings import Continuation, Samples
from spikesink.errors import UserError
from spikesink.measure.observe import Ordinary
from spikesink.options import Options, Sampling
from spikesink.show import report
from spikesink.show.ablation_text import samples_in_words
from spikesink.text.sequences import Reader
from spikesink.text.tokenizers import ByteTokenizer, CharTokenizer, NoTokenizer, n_bytes

from .conftest import subject_of, tiny
from .test_api import both_matter

BYTES = {"vocab_size": 257, "block_size": 32}
NONE = {"none": lambda ids, rows: contextlib.nullcontext()}


def reader_of(block_size=32, prefix_ids=(256,), tokenizer=None):
    return Reader(tokenizer or ByteTokenizer(), {}, "", prefix_ids, (), block_size, 257)


# ------------------------------------------------------------------------------------------------------ samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a tiny GPT-2 that reads bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("hf")
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def test_generate_draws_what_the_softmax_says():
    model = tiny(**BYTES)
    ids = written = torch.randint(256, (9, 40))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):  # longer than the window
        p = (model(written[:, -32:])[0][:, -1] / 0.05).softmax(-1)
        written = torch.cat((written, torch.multinomial(p, 1, generator=generator)), 1)
    assert torch.equal(model.generate(ids, 3, 0.05, generator=torch.Generator().manual_seed(1)), written)
    greedy = model(ids[:, -32:])[0][:, -1:].argmax(-1)
    assert torch.equal(model.generate(ids, 1, temperature=0)[:, -1:], greedy)
    assert torch.equal(model.generate(ids, 1, top_k=1)[:, -1:], greedy)
    many = model.generate(ids[:1, :4].expand(20_000, -1), 1, 2.0, 3, torch.Generator().manual_seed(0))[:, -1]
    p = model(ids[:1, :4])[0][0, -1].topk(3)
    rates = torch.stack([(many == i).float().mean() for i in p.indices])
    torch.testing.assert_close(rates, (p.values / 2).softmax(0), atol=0.015, rtol=0)


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 9}, {"seed": 5}])
def test_the_librarys_sample_is_generates(changes):
    """The same tokens, behind BOS, and the clean model's own loss on them."""
    model, options = tiny(**BYTES), Sampling(n_tokens=9, **changes)
    look = spikesink.open(model, tokenizer=ByteTokenizer(), tokens=torch.randint(256, (9, 32)))
    look.loaded.reader = reader_of()
    found = spikesink.sample(look, "naïve", options).clean[0]
    ids = torch.tensor([[256, *"naïve".encode()]])
    generator = torch.Generator().manual_seed(options.seed)
    whole = model.generate(ids, 9, options.temperature, options.top_k, generator)
    assert found.ids == whole[0, 7:].tolist()
    logits = model(whole[:, :-1])[0][0, 6:].double().log_softmax(-1)
    assert found.loss == pytest.approx(-logits.gather(1, whole[0, 7:, None]).mean().item(), rel=1e-5)


def test_what_is_usual_comes_from_the_text_that_is_named(tmp_path):
    (tmp_path / "mine.txt").write_text("A line of text, and another one. " * 200)
    look = spikesink.open(both_matter(), tokenizer=Alphabet(), tokens=torch.randint(62, (9, 32)))
    named = Options(text=tmp_path / "mine.txt", seq_len=32)
    sample = spikesink.sample(look, "abc", Sampling(n_tokens=2), "sink_mask", reference_text=named)
    assert "mine.txt" in sample.reference


def test_a_sample_ends_where_a_text_ends(monkeypatch):
    ids = iter([97, 98, 256, 99])
    monkeypatch.setattr("spikesink.edit.sampling.drawn", lambda *_: next(ids))
    look = spikesink.open(tiny(**BYTES), tokenizer=ByteTokenizer(), tokens=torch.randint(256, (9, 32)))
    pieces = []
    sample = spikesink.sample(look, "è", Sampling(n_tokens=9), on_text=lambda name, number, piece: pieces.append(piece))
    assert (sample.clean[0].ids, sample.clean[0].text, "".join(pieces)) == ([97, 98, 256], "ab", "ab")


def test_an_alphabet_encodes_or_names_what_it_lacks():
    tokenizer = CharTokenizer("\n abc", bos_id=5)
    (ids,) = tokenizer.encode(["cab a\n"])
    assert "".join(map(tokenizer.decode, ids)) == "cab a\n" and ids.tolist() == [4, 2, 3, 1, 2, 0]
    assert tokenizer.spans(["ca"]) == [([4, 2], [(0, 1), (1, 2)])]
    with pytest.raises(UserError, match="alphabet of 5 characters has no 'd'"):
        tokenizer.encode(["abd"])


class Alphabet:
    """64 characters, any other text folded onto them."""

    def encode(self, texts):
        return [[ord(c) % 64 for c in text] for text in texts]

    def decode(self, token):
        return chr(64 + token)


def test_an_edit_is_made_anew_for_every_token():
    model = both_matter()
    subject, options = subject_of(model), Sampling(n_tokens=6, temperature=0.01, seed=2)
    look = spikesink.open(model, tokenizer=Alphabet(), tokens=torch.randint(62, (9, 32)))
    prompt = [3, 63, 5, 9, 11, 4, 8]
    pieces = []
    found = spikesink.sample(
        look, "".join(chr(64 + i) for i in prompt), options, "sink_mask", on_text=lambda *one: pieces.append(one)
    )
    ids, ordinary = torch.tensor([prompt]), Ordinary.from_ids(subject, look.loaded.reader.ordinary(Options(), 24).ids)
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        with interventions.sink_mask(CleanPass.run(subject, ids, ordinary=ordinary)):
            p = (subject.logits(ids)[:, -1] / 0.01).softmax(-1)
        ids = torch.cat((ids, torch.multinomial(p, 1, generator=generator)), 1)
    assert found.edited[0].ids == ids[0, 7:].tolist() != found.clean[0].ids and found.n_edited > 6
    assert "".join(piece for name, _, piece in pieces if name == "sink_mask") == found.edited[0].text
    assert "stdlib of Python" in samples_in_words(found)


def test_text_comes_in_whole_characters(monkeypatch):
    said = [*"aé😀".encode(), 0xF0, 0x9F]
    model = tiny(**BYTES)
    monkeypatch.setattr("spikesink.edit.sampling.drawn", lambda row, *_: said[len(pieces_of) - 1])
    look = spikesink.open(model, tokenizer=ByteTokenizer(), tokens=torch.randint(256, (9, 32)))
    pieces_of, pieces = [], []
    monkeypatch.setattr(
        "spikesink.edit.sampling.window", lambda reader, ids: pieces_of.append(1) or torch.tensor([ids])
    )
    found = spikesink.sample(look, "è", Sampling(n_tokens=9), on_text=lambda name, number, piece: pieces.append(piece))
    assert [piece for piece in pieces if piece] == ["a", "é", "😀", "\ufffd"] and found.clean[0].text == "aé😀\ufffd"


def test_what_broke_counts_what_a_reader_sees():
    clean = [Continuation(ids=[1, 2, 3, 4, 5, 6, 7, 8], text="", loss=2.0)]
    edited = [Continuation(ids=[1, 2, 9, 9, 9, 9, 9, 8], text="", loss=5.0)]
    words = samples_in_words(
        Samples(prompt="", clean=clean, edit="spike_zero", edited=edited, n_edited=3, reference="some")
    )
    assert "first 2 of 8 tokens" in words and "2.00 nats per token on its own text, 5.00" in words
    assert "0% repeat an earlier one in the clean text, 20%" in words
    same = Samples(prompt="", clean=clean, edit="spike_zero", edited=clean, n_edited=3, reference="some")
    assert "first 8 of 8" in samples_in_words(same)


def test_a_long_prompt_loses_its_start_and_this_is_said(capsys):
    look = spikesink.open(tiny(**BYTES), tokenizer=ByteTokenizer(), tokens=torch.randint(256, (9, 32)))
    look.loaded.reader = reader_of()
    options = Sampling(n_tokens=9, temperature=0.05)
    found = spikesink.sample(look, "y" * 9 + "x" * 31, options)
    assert "the first 9 of the prompt are left out" in capsys.readouterr().err
    assert found.clean[0].ids == spikesink.sample(look, "x" * 31, options).clean[0].ids


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a", "--with", "spike_zer"), "spike_zer"),
        (("--prompt", "a", "--temperature=-1"), "at least 0"),
        (("--prompt", "a", "--n_tokens=0"), "at least 1"),
        ((), "--prompt"),
    ],
)
def test_mistakes_of_sample_are_one_line(cli, folder, flags, words):
    code, _, err = cli("sample.py", folder, *flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_the_command_prints_both_and_says_what_broke(cli, folder):
    flags = ("--prompt", "The cat", "--n_tokens=5", "--seed=3")
    code, alone, _ = cli("sample.py", folder, *flags)
    assert code == 0 and alone.startswith("The cat")
    code, both, _ = cli("sample.py", folder, *flags, "--with", "bos_remove")
    assert code == 2 and both == ""
    code, both, _ = cli("sample.py", folder, *flags, "--with", "spike_mean")
    assert code == 0 and alone.strip() in both and "== spike_mean, sample 1 ==\nThe cat" in both
    assert "nothing to edit" in both or "tokens are the same" in both


# ------------------------------------------------------------------------------------------------------- scores


def test_bits_per_byte_are_of_the_bytes_that_were_predicted(tmp_path):
    text = "naïve 日本語 foxes, " * 40
    (tmp_path / "t.txt").write_text(text)
    model = tiny(**BYTES)
    look = spikesink.open(model, tokenizer=ByteTokenizer(), text=tmp_path / "t.txt", n_seq=9, seq_len=16, nulls=0)
    found = spikesink.detect(look)
    # without BOS the first byte of each sequence is not predicted; one token is one byte, of whatever character
    assert look.data.predicted_bytes == 9 * 15
    assert found.data.bits_per_byte == pytest.approx(found.data.loss / math.log(2), rel=1e-6)
    assert f"{found.data.bits_per_byte:.3f} bits per byte" in report.conditions(found)
    ids = torch.tensor([[256, *b"ab", 256, *b"c"]])
    assert reader_of().predicted_bytes(ids, 1) == 3  # BOS has no byte
    assert reader_of().predicted_bytes(ids[:, 1:], 1) == 2
    ablation = spikesink.ablate(look, only=["sink_mask"], probe=False)
    assert ablation.baseline.bits_per_byte == pytest.approx(found.data.bits_per_byte)
    entry = ablation.interventions[0]
    assert entry.bits_per_byte == pytest.approx(entry.loss / math.log(2))


def test_a_tokenizer_that_only_decodes_is_asked_for_text(folder):
    from spikesink.models import hf

    tokenizer = hf.Tokenizer.load(hf.Source.locate(str(folder)))
    (ids,) = tokenizer.encode(["aé日b"])
    assert len(ids) == 7 and n_bytes(tokenizer, ids) == 7 and n_bytes(tokenizer, ids, 2) == 5
    assert tokenizer.text(torch.tensor(ids).numpy()) == "aé日b"


def test_nats_of_different_tokenizers_do_not_stand_side_by_side():
    (a, b), tokens = ([], []), torch.randint(64, (9, 32))
    for tokenizer in (ByteTokenizer(), ByteTokenizer(), NoTokenizer()):
        with spikesink.open(tiny(vocab_size=257), tokenizer=tokenizer, tokens=tokens, nulls=0) as look:
            (b if isinstance(tokenizer, NoTokenizer) else a).append(spikesink.detect(look))
    same, differ = report.comparison_table(["a", "b"], a), report.comparison_table(["a", "b"], [a[0], b[0]])
    rows = lambda table: {row[0]: row[1:] for row in table.rows}
    assert rows(same)["loss, nats per token"][0] == f"{a[0].data.loss:.4f}" and report.nats_note(a) is None
    assert "loss, nats per token" not in rows(differ) and "different tokenizers" in report.nats_note([a[0], b[0]])
    assert rows(differ)["bits per byte"] == [f"{a[0].data.bits_per_byte:.4f}", "–"]
    assert "not at hand" in report.conditions(b[0])


# ---------------------------------------------------------------------------------------------- multiple choice


def write_questions(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def log_p(model, context, ending, block_size=48):
    """sum log p of the bytes of ' ending' after BOS and the last bytes of the context that fit, written out."""
    whole = f"{context} {ending}".encode()[-(block_size - 1) :]
    n, ids = len(f" {ending}".encode()), torch.tensor([[256, *whole]])
    p = model(ids)[0][0].double().log_softmax(-1)
    return sum(p[t - 1, ids[0, t]].item() for t in range(len(ids[0]) - n, len(ids[0])))


def test_choices_are_sums_written_out(tmp_path, monkeypatch):
    model = tiny(vocab_size=257, block_size=48)
    texts = ["sat", "ran off with a fox", "é", "was naïve", "stood"]
    contexts = [f"{'The cat ' * (i % 7)}number {i}" for i in range(40)]
    rows = [{"ctx": c, "endings": texts[i % 3 : i % 3 + 3]} for i, c in enumerate(contexts)]
    best = lambda scores: scores.index(max(scores))
    right, seen = choices._right, []
    monkeypatch.setattr(choices, "_right", lambda asked, scores: seen.append(scores) or right(asked, scores))
    by_rule, sums = [], []  # labels that each rule gets right: (of the sum, per character)
    for row in rows:
        scores = [log_p(model, row["ctx"], e) for e in row["endings"]]
        sums += scores
        by_rule.append((best(scores), best([s / len(e) for s, e in zip(scores, row["endings"], strict=True)])))
    agree = sum(a == b for a, b in by_rule) / 40
    assert agree < 1
    for rule in (0, 1):
        labelled = [{**row, "label": str(labels[rule])} for row, labels in zip(rows, by_rule, strict=True)]
        too_long = {**labelled[0], "endings": ["x", "y" * 60]}
        asked = choices.questions(write_questions(tmp_path / "q.jsonl", *labelled, {**too_long, "label": 0}))
        found = choices.multiple_choice(subject_of(model), reader_of(48), asked, NONE, batch_size=5)
        (clean,) = found.conditions
        accuracies = clean.accuracy, clean.normalised.accuracy
        assert accuracies == pytest.approx(((1, agree), (agree, 1))[rule])
        torch.testing.assert_close(seen[-2], torch.tensor(sums, dtype=torch.float64), atol=1e-4, rtol=1e-5)
    assert (found.questions, found.left_out, found.chance) == (40, 1, pytest.approx(1 / 3))
    longest = lambda row: len(row["ctx"]) + 2 + max(len(e.encode()) for e in row["endings"])
    assert found.cropped == sum(longest(row) > 48 for row in rows) > 0


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "is no question"),
        ("[1]", "is no question"),
        ('{"ctx": "a", "endings": ["b"], "label": 0}', "is no question"),
        ('{"ctx": "", "endings": ["b", "c"], "label": 0}', "is no question"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": ""}', "is no question"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": 2}', "the label 2"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": true}', "is no question"),
    ],
)
def test_a_malformed_question_is_named(tmp_path, line, words):
    (tmp_path / "q.jsonl").write_text('{"query": "a", "endings": ["b", "c"], "label": 0}\n\n' + line + "\n")
    with pytest.raises(UserError, match=words) as error:
        choices.questions(tmp_path / "q.jsonl")
    assert f"{tmp_path / 'q.jsonl'}, line 3" in str(error.value)


def test_ablate_answers_questions_under_interventions(cli, folder, tmp_path):
    rows = [{"context": f"The cat {i}", "endings": ["sat", "ran"], "label": i % 2} for i in range(6)]
    file = write_questions(tmp_path / "q.jsonl", *rows)
    flags = ("--only", "sink_mask", "--no-probes", "--n_seq=4", "--nulls=0")
    code, out, err = cli("ablate.py", folder, *flags, f"--choices={file}")
    assert code == 0, err
    probes = json.loads((folder / "ablate.json").read_text())["probes"]
    assert probes.keys() == {"choices"} and probes["choices"]["questions"] == 6
    assert probes["choices"]["conditions"][0]["name"] == "none"
    assert "Multiple choice: 6 questions" in out and "choices under" in out
    assert "Multiple choice: 6 questions" in (folder / "report.html").read_text()
    file.write_text("{}\n")
    code, _, err = cli("ablate.py", folder, *flags, f"--choices={file}")
    assert code == 2 and "line 1" in err
