"""Special tokens that a text spells: one rule for what trains, for --text and for --prompt."""

import dataclasses
import types

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from spikesink import errors
from spikesink.edit import probes
from spikesink.errors import UserError
from spikesink.models import hf
from spikesink.text.sequences import Reader, read_text
from spikesink.text.tokenizers import ByteTokenizer, split_documents

from .conftest import ROOT  # noqa: F401, the clone is on the path

PLAIN = "A tag <s>struck out</s>, says the cat.\n"
CHAT = "<s>user\nthe cat</s>model\nthe dog</s>\n"


@pytest.fixture(scope="module")
def llama_like():
    """A byte-level BPE with <s> (id 0) before every text, and </s> (id 1)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat, user model\n"] * 50, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return hf.Tokenizer(
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    )


def reader_of(tokenizer, special=False):
    prefix, suffix = getattr(tokenizer, "prefix_ids", ()), getattr(tokenizer, "suffix_ids", ())
    return Reader(tokenizer, {}, "x", prefix, suffix, 256, 300, special=special)


def test_a_text_is_read_as_training_reads_it(tmp_path):
    """A line <|endoftext|>, blanks around it or not, ends a document, and one without text is none: as in
    data/text/prepare.py."""
    text = "".join(f"Once there was a cat number {i}.\nIt slept.\n<|endoftext|>{' ' * (i % 2)}\n" for i in range(60))
    tokenizer = ByteTokenizer()
    documents = split_documents(text.splitlines(keepends=True))
    train = [i for ids in tokenizer.encode([*documents]) for i in [*map(int, ids), tokenizer.bos_id]]
    assert train.count(tokenizer.bos_id) == 60
    assert reader_of(tokenizer).encoded(f"{text} \n<|endoftext|>\n", "x").tolist() == train
    (tmp_path / "bom.txt").write_text(text, encoding="utf-8-sig")
    assert read_text(tmp_path / "bom.txt") == text  # its mark was once three tokens at the start


def test_what_a_text_spells_is_text_and_is_said(llama_like, capsys):
    errors.say_once.cache_clear()
    ids = reader_of(llama_like).text_sequences(PLAIN * 30, "page.txt", 32)
    assert (ids[:, 0] == 0).all() and (ids[:, 1:] > 1).all()  # BOS where it belongs, control tokens nowhere
    said = "page.txt spells special tokens, <s> 30 times, </s> 30 times: they are read as text; --special reads them"
    assert said in capsys.readouterr().err
    assert "".join(map(llama_like.decode, reader_of(llama_like).prompt(PLAIN)[0, 1:].tolist())) == PLAIN


def test_with_special_they_are_tokens_and_no_bos_is_there_twice(llama_like, capsys):
    ids = reader_of(llama_like, special=True).prompt(CHAT)[0].tolist()
    assert ids == llama_like.tokenizer(CHAT, add_special_tokens=False)["input_ids"]  # what transformers makes of it
    assert ids.count(0) == 1 and ids[0] == 0 and ids.count(1) == 2
    plain = reader_of(llama_like, special=True).prompt("the cat")[0].tolist()
    assert plain == reader_of(llama_like).prompt("the cat")[0].tolist()
    assert not capsys.readouterr().err


def test_a_token_that_the_model_has_no_embedding_for_is_refused(llama_like):
    """Of a prompt and of a probe's sentences too, where it was an IndexError."""
    reader = dataclasses.replace(reader_of(llama_like), vocab_size=20)
    calls = (
        lambda: reader.prompt("the cat"),
        lambda: probes.blimp(types.SimpleNamespace(shift=1), reader, [probes.Pair("the cat", "cat the", "a", "b")], {}),
        lambda: probes.words_of(reader, [probes.Sentence(["the", " cat"], [], [], [])]),
    )
    for call in calls:
        with pytest.raises(UserError, match=r"holds token \d+, outside the vocabulary of 20"):
            call()


def test_offsets_are_of_the_same_tokens(llama_like):
    ((ids, spans),) = llama_like.spans([PLAIN])
    assert ids == [*llama_like.encode([PLAIN])[0]] and spans[-1][1] == len(PLAIN)
