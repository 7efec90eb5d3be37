"""Exports a checkpoint as a Hugging Face folder: config.json, model.safetensors and, if there is one, the tokenizer.

We export the arms that GPT-2 or Llama can compute, and refuse others with a reason. Before the folder is put in place,
its logits are compared with those of the model.py that made the checkpoint. If training windows began with BOS, the
tokenizer adds it. The description of the data goes into config.json, so that `detect` reads the same sequences.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, extra
from ..text.token_files import Meta
from ..text.tokenizers import END, GPT2Tokenizer
from . import convert, hf
from .checkpoint import META_KINDS, Checkpoint, is_meta
from .lab import Build, open_lab

DATA = "spikesink_data"  # key in config.json: the checkpoint's description of its data, and "bos"


def trained_on(config: Any, bos_id: int | None) -> Meta:
    """The description of the data in the config of an exported folder. Empty if there is none, or if it has another
    BOS than the tokenizer (`bos_id`; None for no tokenizer)."""
    meta: Any = getattr(config, DATA, None)
    return dict(meta) if is_meta(meta) and (bos_id is None or meta.get("bos_id") == bos_id) else {}


def starts_with_bos(tokenizer: Any) -> Any:
    """Makes the transformers tokenizer put its BOS before every text."""
    from tokenizers import processors

    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
    return tokenizer


def byte_tokenizer() -> Any:
    """A transformers tokenizer of 256 bytes and <bos>, id 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<bos>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>")


def gpt2_tokenizer(bpe: str | Path, size: int) -> Any:
    """GPT-2's tokenizer from a file of BPE ranks, with its first `size` ids; the last id is <|endoftext|>."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    encoding = GPT2Tokenizer(bpe, size).encoding
    converter: Any = TikTokenConverter(pattern=encoding._pat_str, extra_special_tokens=[END])
    converter.load_tiktoken_bpe = lambda file: encoding._mergeable_ranks
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), bos_token=END, eos_token=END)


def same_logits(content: Checkpoint, build: Build, folder: Path) -> None:
    """Raises UserError unless the model in a folder has the same logits as the one that `build` makes."""
    try:
        ours = build(content).eval()
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"cannot export: the model.py cannot build this model: {hf.first_line(error)}") from None
    args = content.model_args
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(args["vocab_size"], (2, min(args["block_size"], 256)), generator=generator)
    with torch.no_grad():
        expected, logits = ours(ids)[0], hf.open_model(folder).eval()(ids).logits
    difference, size = (logits - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= 1e-4 * size:
        raise UserError(
            f"cannot export: the {folder.name} folder would compute something else than the model.py (logits of up to "
            f"{size:.3g} are off by {difference:.3g}), since transformers lacks a change that was made there"
        )


def export(content: Checkpoint, folder: str | Path, bpe: str | Path | None = None, build: Build | None = None) -> str:
    """Writes the folder, whole or not at all. Returns a phrase on its tokenizer.

    `build` makes the model that the folder must equal. By default the model.py of the current clone does; nanoGPT's
    checkpoints are not compared. Raises UserError if neither family can compute the model, or `bpe` does not exist.
    """
    with extra("hf"):
        from transformers.utils import logging

    logging.disable_progress_bar()
    meta, bos = content.meta, bool(content.config.get("bos", False))
    bpe = bpe or meta.get("bpe")
    if bpe and not Path(bpe).is_file():
        raise UserError(f"there is no file of BPE ranks {bpe}")
    if build is None and content.maker == "spikesink":
        build = open_lab(None, folder).build
    try:
        if content.maker == "nanoGPT":
            convert.check_nanogpt(content.model_args)
        config, state = convert.to_hf(content.model_args, content.model)
        config.bos_token_id = config.eos_token_id = meta.get("bos_id")
        description = {key: meta[key] for key in (*META_KINDS, "python", "split") if key in meta and key != "bpe"}
        setattr(config, DATA, {**description, "bos": bos} if description else {})
        model = hf.with_weights(config, state)
    except RuntimeError as error:
        first = next(iter(str(error).splitlines()[1:]), str(error)).strip().rstrip(".")
        raise UserError(f"cannot export: these are not the weights of a {config.model_type}: {first}") from None
    except (ValueError, KeyError) as error:
        raise UserError(f"cannot export: {' '.join(str(error).split())}") from None
    folder, frame = Path(folder), starts_with_bos if bos else lambda tokenizer: tokenizer
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            path = Path(temporary) / folder.name
            model.save_pretrained(path)
            if build:
                same_logits(content, build, path)
            if meta.get("tokenizer") == "byte":
                frame(byte_tokenizer()).save_pretrained(path)
            elif meta.get("tokenizer") == "gpt2" and bpe:
                frame(gpt2_tokenizer(bpe, meta["vocab_size"])).save_pretrained(path)
            path.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    if (folder / "tokenizer.json").exists():
        return "with its tokenizer" + (", which puts BOS before every text, as in training" if bos else "")
    return "no tokenizer" + (" (give --bpe for GPT-2's)" if meta.get("tokenizer") == "gpt2" else "")
