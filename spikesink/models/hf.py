"""Any transformers model as Subjects: the attention seam through AttentionInterface, streams by hooks.

Nothing of size T x T is made here: masks stay functions until a chunk of rows asks for them, and attention that nobody
edits runs through PyTorch's fused kernels (a model that passes a T x T position bias has made that itself).
"""

import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UserError, extra, no_device
from ..files import file_hash
from ..text.tokenizers import END, Spans
from . import convert, disk_weights
from .blocks import Stack, Taps, stacks_of
from .subject import SEAM, Subject, after_start, device_of, for_heads, rows_at_once

NAME = "spikesink"
OLDEST = (5, 20)  # of transformers: before, T5's attention bypasses the interface
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
REFUSED_KEYS = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal")


@dataclass
class LazyMask:
    """A transformers mask that is still a function of (batch, head, query, key).

    The offsets are those of the first query and key; `padding`: bool (B, keys), False where a key is padding.
    """

    function: Callable[..., Any]
    batch_size: int
    q_offset: int
    kv_offset: int
    kv_length: int
    padding: torch.Tensor | None
    device: torch.device | str

    def rows(self, first: int, R: int, T: int) -> torch.Tensor:
        """Which of the first T keys the queries first ... first + R - 1 see: bool, broadcastable to (B, H, R, T)."""
        batch = torch.arange(self.batch_size, device=self.device)[:, None, None, None]
        query = torch.arange(first, first + R, device=self.device)[:, None] + self.q_offset
        key = torch.arange(T, device=self.device) + self.kv_offset
        seen = self.function(batch, torch.zeros_like(batch), query[None, None], key[None, None, None])
        if self.padding is not None:
            seen = seen & self.padding[:, None, None, :T]
        return seen


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> LazyMask | None:
    """The AttentionMaskInterface entry, of transformers' signature. None where the mask is causal and nothing else."""
    from transformers.masking_utils import causal_mask_function, prepare_padding_mask

    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and bool(padding.all()):
        padding = None
    if padding is None and mask_function is causal_mask_function and q_length == kv_length:
        return None
    return LazyMask(mask_function or causal_mask_function, batch_size, q_offset, kv_offset, kv_length, padding, device)


class HFSeam(nn.Module):
    """The attention seam of one transformers attention module: (q, k, v, bias) -> out, as Subject describes it.

    What else the logits need (mask, scaling, soft-cap, sinks, position bias) is set before each call. `spares_own`: a
    query's own key is not biased, so that a masked first key leaves no empty row; so wherever attention is causal.
    """

    spares_own = True
    heads: int  # of the queries it was last called with, in a trial run
    mask: LazyMask | torch.Tensor | None
    scaling: float | None
    softcap: float | None
    position_bias: torch.Tensor | None
    sinks: torch.Tensor | None
    causal: bool

    def set(
        self,
        module: nn.Module,
        mask: LazyMask | torch.Tensor | None,
        scaling: float | None,
        softcap: float | None = None,
        position_bias: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> None:
        """Takes over what transformers passed to its attention function."""
        self.mask, self.softcap, self.position_bias, self.sinks = mask, softcap, position_bias, sinks
        self.scaling = scaling
        self.causal = mask is None and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)

    @property
    def rows(self) -> str:
        """As of Seam."""
        return "one" if self.sinks is None else "slot"

    def seen(self, first: int, R: int, T: int) -> torch.Tensor:
        """As of Seam. The first sequence's: batches hold sequences of one length, without padding."""
        seen = self._seen(first, R, T, torch.device("cpu" if self.mask is None else self.mask.device))
        return seen[(0,) * (seen.dim() - 2)].expand(R, T)

    def _seen(self, first: int, R: int, T: int, device: torch.device) -> torch.Tensor:
        """bool, broadcastable to (B, H, R, T)."""
        if isinstance(self.mask, LazyMask):
            return self.mask.rows(first, R, T)
        if self.causal:
            return torch.arange(T, device=device) <= torch.arange(first, first + R, device=device)[:, None]
        if self.mask is None:
            return torch.ones(1, 1, dtype=torch.bool, device=device)
        rows = self.mask[..., first : first + R, :T]
        return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2

    def additive(self, first: int, R: int, T: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What the mask and the position bias add to the logits of a chunk of rows."""
        if isinstance(self.mask, torch.Tensor) and self.mask.dtype != torch.bool:
            # additive itself, with the dtype's minimum for what is hidden
            rows = self.mask[..., first : first + R, :T].to(dtype)
            return rows if self.position_bias is None else rows + self.position_bias[:, :, first : first + R, :T]
        start = torch.zeros((), dtype=dtype, device=device)
        if self.position_bias is not None:
            start = self.position_bias[:, :, first : first + R, :T].to(dtype)
        return torch.where(self._seen(first, R, T, device), start, torch.finfo(dtype).min)

    def weights(
        self, q: torch.Tensor, k: torch.Tensor, first: int = 0, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, float]:
        """(weights (B, H, R, T), what a slot adds to the output: nothing), as Subject has it."""
        return self.shares(q, k, first, bias), 0.0

    def shares(
        self, q: torch.Tensor, k: torch.Tensor, first: int = 0, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows of the attention map (B, H, R, T), float32: see Subject. A sink logit's part belongs to no key."""
        R, T = q.size(-2), k.size(-2)
        q = q.float() * (q.size(-1) ** -0.5 if self.scaling is None else self.scaling)
        logits = q @ for_heads(k.float(), q.size(1)).transpose(-2, -1)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits += self.additive(first, R, T, torch.float32, q.device)
        if bias is not None:
            own = torch.arange(first, first + R, device=q.device)[:, None] == torch.arange(T, device=q.device)
            logits = logits + torch.where(own & self.spares_own, 0.0, bias)
        if self.sinks is None:
            return logits.softmax(dim=-1)
        sinks = self.sinks.float().view(1, -1, 1, 1).expand(len(q), -1, R, 1)
        return torch.cat((logits, sinks), dim=-1).softmax(dim=-1)[..., :-1]

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """q (B, H, T, D), k and v (B, heads of keys, T', D) -> (B, H, T, D), some queries at a time unless plain."""
        chunk = rows_at_once(q, k)
        fused = bias is None and self.sinks is None and self.softcap is None
        gqa = q.size(1) != k.size(1)
        if fused and self.position_bias is None and self.mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scaling, enable_gqa=gqa)
        wide = for_heads(v, q.size(1))
        rows = []
        for i, part in enumerate(q.split(chunk, dim=-2)):
            if fused:
                mask = self.additive(i * chunk, part.size(-2), k.size(-2), q.dtype, q.device)
                mask = mask.expand(len(q), -1, part.size(-2), k.size(-2))
                rows.append(F.scaled_dot_product_attention(part, k, v, mask, scale=self.scaling, enable_gqa=gqa))
            else:
                rows.append(self.shares(part, k, i * chunk, bias).to(v.dtype) @ wide)
        return torch.cat(rows, dim=-2)


def seam_of(module: nn.Module) -> HFSeam:
    """The seam of an attention module, made when it is first called. Not a submodule: the model stays as it was."""
    if not hasattr(module, SEAM):
        object.__setattr__(module, SEAM, HFSeam())
    return getattr(module, SEAM)


def attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LazyMask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The AttentionInterface entry: hands the call to the module's seam."""
    sinks = kwargs.get("s_aux", getattr(module, "sinks", None))
    seam = seam_of(module)
    others = {name: kwargs.get(name) for name in ("softcap", "position_bias", "is_causal")}
    seam.set(module, attention_mask, scaling, **others, sinks=sinks)
    return seam(query, key, value).transpose(1, 2).contiguous(), None


def gpt_neo_attention(
    self: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LazyMask | torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """GPTNeoSelfAttention._attn through the seam: no scaling, float32 logits, local layers see `window_size` keys."""
    window = self.config.window_size if self.attention_type == "local" else key.size(-2)
    causal = lambda batch, head, q, k: (k <= q) & (k > q - window)
    padding = attention_mask.padding if isinstance(attention_mask, LazyMask) else None
    mask = LazyMask(causal, len(query), 0, 0, key.size(-2), padding, query.device)
    seam_of(self).set(self, mask, 1.0)
    return seam_of(self)(query.float(), key.float(), value.float()).to(value.dtype), None


def check_folder(path: str | Path) -> None:
    """Refuses a folder whose files name code, an attention implementation, or weights elsewhere. Raises UserError."""
    path = Path(path)
    if (path / "log.jsonl").is_file() and "given" in read_json(path / "config.json"):
        raise UserError(f"{path} is a run of train.py that has no checkpoint yet")
    check_config(path / "config.json")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = read_json(index).get("weight_map", {})
        if not isinstance(files, dict) or any(Path(str(file)).name != file for file in files.values()):
            raise UserError(f"{index} points to weights outside its folder")


def check_config(file: str | Path) -> None:
    """Refuses a config.json that names code or an attention implementation. Raises UserError."""
    config = read_json(file)
    found = [key for key in REFUSED_KEYS if key in config]
    quantised = config.get("quantization_config")
    if quantised is not None and not (isinstance(quantised, dict) and quantised.get("quant_method") == "mxfp4"):
        found.append("quantization_config")
    if found:
        raise UserError(f"{file} sets {found[0]}, which could run foreign code: remove the key if you trust the model")


def read_json(file: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"cannot read {file}: it holds no object")
    return value


def device_named(name: str) -> str:
    """`name`, or for auto the GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def to_device(model: nn.Module, device: str) -> Any:
    """The model on a device, as `device_named` names it. Raises UserError where there is no such device."""
    try:
        return model.to(device_named(device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise no_device(device, error) from None


@functools.cache
def hub_answers(seconds: float = 3.0) -> bool:
    """True if the hub's host takes a connection; True unasked where a proxy stands between."""
    from huggingface_hub.constants import ENDPOINT

    if urllib.request.getproxies().get("https"):
        return True
    address = urllib.parse.urlsplit(ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=seconds).close()
    except OSError:
        return False
    return True


def need_transformers() -> None:
    """Raises UserError where transformers is missing, or older than the oldest that works here."""
    with extra("hf"):
        import transformers
    if tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) < OLDEST:
        raise UserError(
            f"transformers {transformers.__version__} is too old, {'.'.join(map(str, OLDEST))} is needed: "
            "pip install 'spikesink[hf]'"
        )


class Source(NamedTuple):
    """Where a transformers model is. `name`: as findings have it; `where`, `how`: a folder or a name of the hub, and
    the arguments with it (gguf_file, revision), as `from_pretrained` takes them."""

    name: str
    where: str
    how: dict[str, str] = {}  # noqa: RUF012, never written to

    @classmethod
    def of(cls, target: str | Path, revision: str | None = None) -> "Source":
        """A GGUF file, a folder or a name of the hub; a folder's revisions are folders in it. Raises UserError."""
        path = Path(target)
        if path.suffix.lower() == ".gguf":
            if revision is not None or not path.is_file():
                raise UserError(f"{path} has no revisions: it is one file" if path.is_file() else f"no file {path}")
            alone = disk_weights.passing_folder()  # transformers would mix in a tokenizer that lies beside the file
            (Path(alone) / path.name).symlink_to(path.resolve())
            return cls(str(path), alone, {"gguf_file": path.name})
        if revision is None:
            return cls(str(target), str(target))
        if not path.is_dir():
            return cls(f"{target}@{revision}", str(target), {"revision": revision})
        known = revisions_in(path)
        if revision not in known:
            raise UserError(f"{path} holds no revision {revision}; it holds {', '.join(known) or 'none'}")
        return cls(str(path / revision), str(path / revision))

    @property
    def file(self) -> Path | None:
        """The GGUF file, if it is one."""
        return Path(self.name) if "gguf_file" in self.how else None


def revisions_in(folder: str | Path) -> list[str]:
    """The revisions in a folder: its folders that hold a config.json, and no ckpt.pt of train.py, by their step."""
    folders = [config.parent for config in Path(folder).glob("*/config.json")]
    names = [one.name for one in folders if not (one / "ckpt.pt").exists()]
    return sorted(names, key=lambda name: (step_of(name) or 0, name))


def step_of(revision: str | None) -> int | None:
    """The step of training that a revision's name says, as step1000, step-50K-105b and checkpoint-500 do, or None."""
    said = re.search(r"(?:step|checkpoint)[-_]?(\d+)(k?)(?![\w.])", revision or "", re.IGNORECASE)
    return int(said[1]) * (1000 if said[2] else 1) if said else None


def gguf_types(file: Path) -> str:
    """From which types a GGUF file's matrices are read, that of most weights first, in words. Raises UserError."""
    with extra("hf"):
        import gguf
    count: Counter[str] = Counter()
    try:
        for tensor in gguf.GGUFReader(file).tensors:
            count[tensor.tensor_type.name] += int(tensor.n_elements) if len(tensor.shape) > 1 else 0
    except Exception as error:  # a broken file fails in many ways
        raise UserError(f"cannot read {file}: it is no GGUF file, or not all of one ({first_line(error)})") from None
    types = [name for name, n in count.most_common() if n]
    return f"{'converted' if {*types} <= {'F32', 'F16', 'BF16'} else 'dequantised'} from {', '.join(types)}"


def first_line(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model: all of it, but for a multimodal wrapper's."""
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def model_class(config: Any) -> Any:
    """The transformers class that gives a model of this config its language-model head, or has none to give."""
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoModelForTextEncoding,
    )

    name = (config.architectures or [""])[0]
    if name.endswith("EncoderModel"):  # of an encoder-decoder, the encoder alone
        return AutoModelForTextEncoding
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    causal = getattr(config, "is_decoder", False) or name.endswith(("ForCausalLM", "LMHeadModel"))
    kinds: list[Any] = [AutoModelForMaskedLM, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel]
    known = [kind for kind in kinds[causal:] if type(config) in kind._model_mapping]
    return known[0] if known else AutoModelForCausalLM  # which says what is wrong


class Opened(NamedTuple):
    """A model, and what there is to say of its weights, as the findings' model entry has it."""

    model: Any
    about: dict[str, str]


def open_model(name_or_path: str | Path, device: str = "cpu", free: float = math.inf, **kwargs: Any) -> Any:
    """A language model of the hub or of a folder, as `load` has it. Raises UserError where it has no such head."""
    model = load(Source.of(name_or_path), device, free, **kwargs).model
    if model.get_output_embeddings() is None:
        raise UserError(f"{name_or_path} has no language-model head")
    return model


def load(source: Source, device: str = "cpu", free: float = math.inf, **kwargs: Any) -> Opened:
    """A model in float32; `kwargs` go to transformers' `from_pretrained`.

    On the CPU, weights that do not fit into `free` bytes of memory are left on disk, and read whenever they are used.

    Causal, masked (BERT) or encoder-decoder (T5, BART), as its config says; without a head where the files have none.

    Safetensors or GGUF only, no remote code, whatever they say. Raises UserError where it cannot be had whole.
    """
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # no third party converts other formats for us
    need_transformers()
    from transformers import AutoConfig, GgufConfig
    from transformers.utils import cached_file, logging

    name, where, how = source
    device = device_named(device)
    logging.set_verbosity_error()
    quiet = not sys.stderr.isatty()
    if quiet:
        logging.disable_progress_bar()
    local = Path(where).is_dir()
    offline = local or not hub_answers()  # else a missing network costs half a minute of retries
    safe = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32, "local_files_only": offline}
    about = {}
    if source.file:
        about["weights"] = gguf_types(source.file)
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    elif local:
        check_folder(where)
    try:
        if not local:
            check_config(str(cached_file(where, "config.json", local_files_only=offline, **how)))
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, local_files_only=offline, **how)
        kind = model_class(config)
        on_disk = disk_weights.placement(kind, config, free, source.file) if str(device) == "cpu" else {}
        with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
            model, info = kind.from_pretrained(where, **{**kwargs, **safe, **on_disk, **how}, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # a hostile or broken folder fails in many ways
        place = "" if local else "is no file or folder here, and as a model of the hub "
        raise UserError(f"{name} {place}cannot be opened: {first_line(error)}") from None
    model = without_new_head(model, sorted(info["missing_keys"]), name)
    about |= unused_weights(model, sorted(info["unexpected_keys"]), name)
    untie(model)
    for key, words in about.items():
        print(f"{name}: {key} {words}", file=sys.stderr)
    if model.get_output_embeddings() is None:
        print(f"{name}: no language-model head, so it is measured without a loss", file=sys.stderr)
    return Opened(model if on_disk else to_device(model, device), about)


def without_new_head(model: Any, missing: list[str], name: str) -> Any:
    """The model, or what is below its head where weights of the head are `missing`, which would be random.

    Raises UserError where others are.
    """
    if not missing:
        return model
    inside = [key for key in missing if model.base_model is model or key.startswith(f"{model.base_model_prefix}.")]
    if inside:
        raise UserError(f"{name} lacks {len(inside)} weights, the first {inside[0]}: it would be random")
    return model.base_model


def unused_weights(model: Any, unexpected: list[str], name: str) -> dict[str, str]:
    """{"unused": what of the file the model has no place for}, or {}. Raises UserError for weights of blocks."""
    lists = {key.rpartition(".")[2] for key, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    blocks = [key for key in unexpected if any(re.search(rf"(^|\.){re.escape(one)}\.\d+\.", key) for one in lists)]
    if blocks:
        raise UserError(
            f"{name} holds {len(blocks)} weights of blocks that its config has no place for, the first {blocks[0]}: "
            "it would compute something else without them"
        )
    shown = ", ".join(unexpected[:4]) + (f" and {len(unexpected) - 4} more" if len(unexpected) > 4 else "")
    return {"unused": shown} if unexpected else {}


def untie(model: Any) -> None:
    """Makes the config say so where the files have another unembedding than embedding, though it ties them."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and last is not None and first.weight is not last.weight:
        with disk_weights.weights_at_hand(first), disk_weights.weights_at_hand(last):
            model.config.tie_word_embeddings = torch.equal(first.weight, last.weight)
        if not model.config.tie_word_embeddings:
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def found_in(model: nn.Module) -> Any:
    """The transformers model in `model`, perhaps wrapped; None where there is none."""
    if sys.modules.get("transformers") is None:
        return None
    from transformers import PreTrainedModel

    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)


def of_nanogpt(model_args: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Any:
    """The GPT-2 of transformers that computes what a checkpoint of nanoGPT does. Raises ValueError."""
    need_transformers()
    from transformers import GPT2LMHeadModel

    convert.check_nanogpt(model_args)
    config, state = convert.to_gpt2(
        {**convert.BOTH_NEED, **convert.GPT2_NEEDS, **convert.DEFAULTS, **model_args}, weights
    )
    return with_weights(GPT2LMHeadModel, config, state)


def with_weights(kind: type, config: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """A transformers model of this class and config that has these very tensors as its weights."""
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


def subjects_of(model: Any, decode: Callable[[int], str]) -> list[Subject]:
    """The Subjects of a loaded transformers model: one, or an encoder-decoder's decoder, encoder and cross.

    Raises UserError unless trial runs give the logits that the model gave before, with one call of the seam per
    attention module and streams (B, T, C): what cannot be observed is refused, not guessed.
    """
    need_transformers()
    kind = model.config.model_type
    model.eval()
    model.config.return_dict = True
    for config in (model.config, text_config(model.config)):
        config.use_cache = False
    try:
        return _tried_subjects(model, decode)
    except UserError:
        raise
    except Exception as error:  # models fail in their own ways
        raise UserError(f"{kind} cannot be observed: {first_line(error)}") from None


def subject_of(model: Any, decode: Callable[[int], str]) -> Subject:
    """The Subject of a model that is not an encoder-decoder, or the decoder's."""
    return subjects_of(model, decode)[0]


def _caller(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """ids (B, T) -> logits; an encoder-decoder reads the ids, and its decoder is taught to repeat them."""
    if not model.config.is_encoder_decoder:
        return lambda ids: model(ids)[0]
    start = start_token(model.config)
    return lambda ids: model(input_ids=ids, decoder_input_ids=after_start(ids, start))[0]


def start_token(config: Any) -> int:
    """What a decoder's input starts with."""
    tokens = (getattr(config, key, None) for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    return next((token for token in tokens if token is not None), 0)


def trial_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Ids (1, T) to try a model on; a decoder's are fewer, so that cross-attention is told by its shape."""
    ids = torch.arange(3, 19, device=device_of(model))[None] % text_config(model.config).vocab_size
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :11]} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def _tried_subjects(model: Any, decode: Callable[[int], str]) -> list[Subject]:
    kind, both, inputs = model.config.model_type, model.config.is_encoder_decoder, trial_inputs(model)
    run = lambda **changed: model(**{**inputs, **changed})[0]
    take_over(model, run)
    parts: dict[str, dict[str, Any]] = {}
    stacks = stacks_of(model)
    for name, (key, ids), blocks in zip(("encoder", "decoder") if both else ("",), inputs.items(), stacks, strict=True):
        other_end = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % text_config(model.config).vocab_size), dim=1)
        taps, causal = watch(Stack(blocks), run, {key: other_end})
        start = start_token(model.config) if name == "decoder" else None
        parts[name] = {**taps._asdict(), "causal": causal, "start": start}
    if both:  # the keys of cross-attention are the encoder's tokens
        seams = parts["decoder"]["attends"]
        parts = {
            "decoder": {**parts["decoder"], "attends": [tap for tap in seams if tap.kind != "cross"]},
            "encoder": parts["encoder"],
            "cross": {**parts["encoder"], "attends": [tap for tap in seams if tap.kind == "cross"], "causal": False},
        }

    def rebuild(part: str) -> Subject:
        new = type(model)(copy.deepcopy(model.config)).eval().to(device_of(model), model.dtype)
        return next(s for s in subjects_of(new, decode) if s.part == part)

    subjects, stages = [], [block for stack in stacks for block in stack]
    for name, part in parts.items():
        heads = {tap.module.heads for tap in part["attends"]}
        if len(heads) != 1:
            raise UserError(f"{kind} cannot be observed: its layers have different numbers of heads")
        for tap in part["attends"]:
            tap.module.spares_own = part["causal"]
        shift = int(part["causal"] and not both)
        how: dict[str, Any] = {
            "n_register": 0,
            "decode": decode,
            "logits": _caller(model),
            "shift": shift,
            "has_loss": model.get_output_embeddings() is not None,
            "stages": stages,
        }
        subjects.append(
            Subject(model, **part, n_head=heads.pop(), **how, part=name, rebuild=functools.partial(rebuild, name))
        )
    return subjects


def take_over(model: Any, run: Callable[[], torch.Tensor]) -> None:
    """Puts our attention into a model. Raises UserError if its logits, `run()`, change."""
    from transformers import AttentionInterface, AttentionMaskInterface

    before = run()
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, lazy_mask)
    for module in model.modules():
        if type(module).__name__.startswith("GPTNeo") and hasattr(module, "attention_type"):
            object.__setattr__(module, "_attn", gpt_neo_attention.__get__(module))
    model.set_attn_implementation(NAME)
    tolerance = max(1e-3, 16 * torch.finfo(before.dtype).eps)  # 24 layers of bfloat16: sdpa is 6 eps from eager
    if (run() - before).abs().max() > tolerance * before.abs().max().clamp_min(1e-6):
        raise UserError(f"{model.config.model_type} cannot be observed: its logits change under our attention")


def watch(stack: Stack, run: Callable[..., torch.Tensor], other_end: dict[str, torch.Tensor]) -> tuple[Taps, bool]:
    """(Taps of a stack, whether it is causal), from `run` as it is and on inputs whose last token differs."""
    with stack.watched():
        run()
    clean = stack.output
    with stack.watched():
        run(**other_end)
    return stack.taps(), bool((stack.output - clean)[:, :-1].abs().max() <= 1e-5 * clean.abs().max())


PLAIN = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}


class Tokenizer:
    """A transformers tokenizer as the instruments use one.

    `prefix_ids`, `suffix_ids`: the special tokens that it puts before and after a text. `bos_id`: its BOS, or None.
    `separator_id`: what stands between documents: <|endoftext|>, else BOS, else EOS, or None. `special_ids`: {how a
    special token is written: its id}.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.bos_id = tokenizer, getattr(tokenizer, "bos_token_id", None)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special_ids = {str(token): number for number, token in added.items() if getattr(token, "special", False)}
        self.prefix_ids, self.suffix_ids = self._frame()
        eos_id = getattr(tokenizer, "eos_token_id", None)
        self.separator_id = eos_id if self.bos_id is None else self.bos_id  # a chat model's begin and end turns
        if END in getattr(tokenizer, "all_special_tokens", ()):
            self.separator_id = tokenizer.convert_tokens_to_ids(END)

    @classmethod
    def of(cls, source: Source) -> "Tokenizer | None":
        """The tokenizer beside a model, or in its GGUF file; None where there is none. Runs no remote code."""
        from transformers import AutoTokenizer

        folder = Path(source.where)
        local = folder.is_dir()
        if local and not (source.file or any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern))):
            return None  # transformers would make one up
        safe = {"trust_remote_code": False, "local_files_only": local or not hub_answers()}
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.where, **safe, **source.how)
        except Exception:  # a folder without a tokenizer fails in many ways
            return None
        return cls(tokenizer) if tokenizer("a")["input_ids"] else None  # an empty one knows no text either

    def _frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        with_them, (plain,) = self.tokenizer("a")["input_ids"], self.encode(["a"])
        for start in range(len(with_them) - len(plain) + 1):
            if plain and with_them[start : start + len(plain)] == plain:
                return tuple(with_them[:start]), tuple(with_them[start + len(plain) :])
        return (), ()

    def encode(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """A list of strings -> a list of lists of ids, without special tokens: one that is written there is text."""
        return self.tokenizer(texts, **PLAIN)["input_ids"]

    def spans(self, texts: list[str]) -> list[tuple[list[int], Spans]]:
        """See tokenizers.spans_of. Raises UserError for a tokenizer that is none of the fast ones."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise UserError("the model's tokenizer does not tell which characters a token stands for; a fast one does")
        found = self.tokenizer(texts, **PLAIN, return_offsets_mapping=True)
        return [*zip(found["input_ids"], found["offset_mapping"], strict=True)]

    def decode(self, token: int) -> str:
        """One id -> text to show."""
        return self.tokenizer.decode([token])

    def text(self, ids: np.ndarray) -> str:
        """An array of ids -> text, without the spaces that some tokenizers drop before punctuation."""
        return self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


def weights_hash(path: str | Path) -> str | None:
    """SHA-256 of a GGUF file, or over the names and hashes of a folder's safetensors files; None for the hub's."""
    if Path(path).is_file():
        return file_hash(path)
    digest = hashlib.sha256()
    files = sorted(Path(path).glob("*.safetensors"))
    for file in files:
        digest.update(f"{file.name} {file_hash(file)}\n".encode())
    return digest.hexdigest() if files else None


def longest(model: Any) -> float:
    """The longest sequence the model takes, or infinity.

    Less than its config says where positions are counted from behind the padding's, as in RoBERTa's family: of 514 it
    takes 512.
    """
    config = text_config(model.config)
    keys = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    known = [getattr(config, key, None) for key in keys]
    tables = [
        len(module.weight) - module.padding_idx - 1
        for name, module in model.named_modules()
        if "position" in name.split(".")[-1] and isinstance(getattr(module, "padding_idx", None), int)
    ]
    return min((length for length in (*known, *tables) if isinstance(length, int) and length > 0), default=math.inf)
