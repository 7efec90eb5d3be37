"""A checkpoint as a Hugging Face folder: config.json, model.safetensors and, where it has one, the tokenizer.

For the arms that GPT-2 or Llama compute; others are refused with the reason. Logits are the same.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from ..errors import UserError, extra
from . import convert, hf
from .checkpoint import Checkpoint


def byte_tokenizer() -> Any:
    """A transformers tokenizer of 256 bytes and <bos>, id 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(bytes_to_characters())}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<bos>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>")


def bytes_to_characters() -> list[str]:
    """The character that byte-level BPE shows for each of the 256 bytes (Radford et al. 2019)."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    hidden = iter(range(256, 512))
    return [chr(b) if b in shown else chr(next(hidden)) for b in range(256)]


def gpt2_tokenizer(bpe: str | Path, size: int, folder: Path) -> Any:
    """GPT-2's tokenizer from a file of BPE ranks: its first `size` ids, the last being <|endoftext|>."""
    with extra("bpe"):
        from tiktoken.load import load_tiktoken_bpe
    from transformers import GPT2Tokenizer

    ranks = {token: rank for token, rank in load_tiktoken_bpe(str(bpe)).items() if rank < size - 1}
    show = bytes_to_characters()
    text = lambda token: "".join(show[b] for b in token)
    vocabulary = {**{text(token): rank for token, rank in ranks.items()}, "<|endoftext|>": len(ranks)}
    merges = [
        " ".join(map(text, halves(token, ranks)))
        for token in sorted(ranks, key=lambda token: ranks[token])
        if len(token) > 1
    ]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    return GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


def halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that BPE joined last to make `token`: it merges pairs of lower rank until two are left."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        _, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def export(content: Checkpoint, folder: str | Path, bpe: str | Path | None = None) -> str:
    """Writes the folder, whole or not at all. Returns what became of the tokenizer, in words.

    Raises UserError for an arm that neither family computes, or a file of ranks that is not there.
    """
    with extra("hf"):
        from transformers import GPT2LMHeadModel, LlamaForCausalLM
        from transformers.utils import logging

    logging.disable_progress_bar()
    meta = content.meta
    bpe = bpe or meta.get("bpe")
    if bpe and not Path(bpe).is_file():
        raise UserError(f"there is no file of BPE ranks {bpe}")
    try:
        config, state = convert.to_hf(content.model_args, content.model)
    except ValueError as error:
        raise UserError(f"cannot export: {error}") from None
    config.bos_token_id = config.eos_token_id = meta.get("bos_id")
    kind = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}[config.model_type]
    model = hf.with_weights(kind, config, state)
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            model.save_pretrained(made)
            if meta.get("tokenizer") == "byte":
                byte_tokenizer().save_pretrained(made)
            elif meta.get("tokenizer") == "gpt2" and bpe:
                gpt2_tokenizer(bpe, meta["vocab_size"], made).save_pretrained(made)
            made.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    if (folder / "tokenizer.json").exists():
        return "with its tokenizer"
    return "no tokenizer" + (" (give --bpe for GPT-2's)" if meta.get("tokenizer") == "gpt2" else "")
