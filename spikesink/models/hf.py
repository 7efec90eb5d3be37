"""Makes Subjects of any transformers model, with attention seams through AttentionInterface and streams by hooks.

We never make a T x T tensor. Masks stay functions until they are needed for a chunk of rows, and attention that is not
edited uses PyTorch's fused kernels. (A T x T position bias comes from the model itself.)
"""

import contextlib
import copy
import functools
import hashlib
import io
import itertools
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
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError, extra, no_device
from ..files import file_hash
from ..text.tokenizers import END, Spans
from . import convert, disk_weights
from .blocks import Stack, Taps, stacks_of
from .subject import SEAM, Subject, after_start, device_of, for_heads, rows_at_once

NAME = "spikesink"
OLDEST = (5, 20)  # version of transformers; in older ones T5's attention bypasses the interface
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
REFUSED_KEYS = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal")


@dataclass
class LazyMask:
    """A transformers mask that is kept as a function of (batch, head, query, key)."""

    function: Callable[..., Any]
    batch_size: int
    q_offset: int  # position of the first query
    kv_offset: int  # position of the first key
    padding: Tensor | None  # bool (B, keys), False at padding
    device: torch.device | str

    def rows(self, first: int, R: int, T: int) -> Tensor:
        """Which of the first T keys each query first ... first + R - 1 sees: bool, broadcastable to (B, H, R, T)."""
        batch = torch.arange(self.batch_size, device=self.device)[:, None, None, None]
        query = torch.arange(first, first + R, device=self.device)[:, None] + self.q_offset
        key = torch.arange(T, device=self.device) + self.kv_offset
        visible = self.function(batch, torch.zeros_like(batch), query[None, None], key[None, None, None])
        return visible if self.padding is None else visible & self.padding[:, None, None, :T]


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> LazyMask | None:
    """Our AttentionMaskInterface function, with transformers' signature. None where the mask is just causal."""
    from transformers.masking_utils import causal_mask_function, prepare_padding_mask

    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and bool(padding.all()):
        padding = None
    if padding is None and mask_function is causal_mask_function and q_length == kv_length:
        return None
    return LazyMask(mask_function or causal_mask_function, batch_size, q_offset, kv_offset, padding, device)


Mask = LazyMask | Tensor | None


class HFSeam(nn.Module):
    """The attention seam of one transformers attention module: (q, k, v, bias) -> out, as in Subject.

    `set` sets everything else that the logits depend on before each call. `spares_own`, True for causal attention:
    `bias` is not added at a query's own key, so that masking the first key leaves no empty row.
    """

    spares_own = True
    heads: int  # number of query heads in the last trial run

    def set(self, module: nn.Module, mask: Mask, /, scaling: float | None = None, **others: Any) -> None:
        """Stores what transformers passes to its attention function."""
        self.mask, self.scaling = mask, scaling
        self.softcap: float | None = others.get("softcap")
        self.position_bias: Tensor | None = others.get("position_bias")
        self.sinks: Tensor | None = others.get("s_aux", getattr(module, "sinks", None))
        is_causal = others.get("is_causal")
        self.causal = mask is None and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)

    @property
    def rows(self) -> str:
        """See Seam."""
        return "one" if self.sinks is None else "slot"

    def seen(self, first: int, R: int, T: int) -> Tensor:
        """See Seam. The first sequence stands for all, as those of a batch have one length and no padding."""
        visible = self._visible(first, R, T, torch.device("cpu" if self.mask is None else self.mask.device))
        return visible[(0,) * (visible.dim() - 2)].expand(R, T)

    def _visible(self, first: int, R: int, T: int, device: torch.device) -> Tensor:
        """Like `seen`, but broadcastable to (B, H, R, T)."""
        if isinstance(self.mask, LazyMask):
            return self.mask.rows(first, R, T)
        if self.causal:
            return torch.arange(T, device=device) <= torch.arange(first, first + R, device=device)[:, None]
        if self.mask is None:
            return torch.ones(1, 1, dtype=torch.bool, device=device)
        rows = self.mask[..., first : first + R, :T]
        return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2

    def additive(self, first: int, R: int, T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The sum of mask and position bias for a chunk of rows, which is added to the logits."""
        bias = 0 if self.position_bias is None else self.position_bias[:, :, first : first + R, :T]
        if isinstance(self.mask, Tensor) and self.mask.dtype != torch.bool:
            return self.mask[..., first : first + R, :T].to(dtype) + bias  # the dtype's minimum hides a key
        start = torch.as_tensor(bias, dtype=dtype, device=device)
        return torch.where(self._visible(first, R, T, device), start, torch.finfo(dtype).min)

    def weights(self, q: Tensor, k: Tensor, first: int = 0, bias: Tensor | None = None) -> tuple[Tensor, float]:
        """See Seam. A slot adds nothing to the output here."""
        return self.shares(q, k, first, bias), 0.0

    def shares(self, q: Tensor, k: Tensor, first: int = 0, bias: Tensor | None = None) -> Tensor:
        """Rows of the attention map (B, H, R, T), float32. The share of a sink logit belongs to no key."""
        R, T = q.size(-2), k.size(-2)
        q = q.float() * (q.size(-1) ** -0.5 if self.scaling is None else self.scaling)
        logits = q @ for_heads(k.float(), q.size(1)).transpose(-2, -1)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits += self.additive(first, R, T, torch.float32, q.device)
        if bias is not None:
            own_key = torch.arange(first, first + R, device=q.device)[:, None] == torch.arange(T, device=q.device)
            logits = logits + torch.where(own_key & self.spares_own, 0.0, bias)
        if self.sinks is None:
            return logits.softmax(dim=-1)
        sinks = self.sinks.float().view(1, -1, 1, 1).expand(len(q), -1, R, 1)
        return torch.cat((logits, sinks), dim=-1).softmax(dim=-1)[..., :-1]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """q (B, H, T, D), k and v (B, key heads, T', D) -> (B, H, T, D), in chunks unless one fused kernel does."""
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
    """The seam of an attention module, made at its first call. It is no submodule, so the model does not change."""
    if not hasattr(module, SEAM):
        object.__setattr__(module, SEAM, HFSeam())
    return getattr(module, SEAM)


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask, **kwargs: Any
) -> tuple[Tensor, None]:
    """Our AttentionInterface function: it passes the call to the module's seam."""
    seam = seam_of(module)
    seam.set(module, attention_mask, **kwargs)
    return seam(query, key, value).transpose(1, 2).contiguous(), None


def gpt_neo_attention(
    self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask = None
) -> tuple[Tensor, None]:
    """GPTNeoSelfAttention._attn through the seam: without scaling, in float32, with a window in local layers."""
    window = self.config.window_size if self.attention_type == "local" else key.size(-2)
    causal = lambda batch, head, q, k: (k <= q) & (k > q - window)
    padding = attention_mask.padding if isinstance(attention_mask, LazyMask) else None
    mask = LazyMask(causal, len(query), 0, 0, padding, query.device)
    seam_of(self).set(self, mask, 1.0)
    return seam_of(self)(query.float(), key.float(), value.float()).to(value.dtype), None


def check_folder(path: str | Path) -> None:
    """Raises UserError for a folder whose files name code, an attention implementation, or weights outside it."""
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
    """Raises UserError for a config.json that names code or an attention implementation."""
    config = read_json(file)
    unsafe = [key for key in REFUSED_KEYS if key in config]
    quantised = config.get("quantization_config")
    if quantised is not None and not (isinstance(quantised, dict) and quantised.get("quant_method") == "mxfp4"):
        unsafe.append("quantization_config")
    if unsafe:
        raise UserError(f"{file} sets {unsafe[0]}, which could run foreign code: remove the key if you trust the model")


def read_json(file: str | Path) -> dict[str, Any]:
    """Reads a JSON file that has an object at the top. Raises UserError."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"cannot read {file}: it has no JSON object at the top")
    return value


def device_named(name: str) -> str:
    """Returns `name`, or for "auto" the GPU if there is one, else the CPU."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def to_device(model: nn.Module, device: str) -> Any:
    """Moves the model to a device, named as in `device_named`. Raises UserError if there is no such device."""
    try:
        return model.to(device_named(device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise no_device(device, error) from None


@functools.cache
def hub_answers(seconds: float = 3.0) -> bool:
    """True if the hub's host accepts a connection, which is not tried if a proxy is set."""
    from huggingface_hub.constants import ENDPOINT

    if urllib.request.getproxies().get("https"):
        return True
    address = urllib.parse.urlsplit(ENDPOINT)
    with contextlib.suppress(OSError), socket.create_connection((address.hostname, address.port or 443), seconds):
        return True
    return False


def need_transformers() -> None:
    """Raises UserError if transformers is missing or too old."""
    with extra("hf"):
        import transformers
    version, oldest = transformers.__version__, ".".join(map(str, OLDEST))
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        raise UserError(f"transformers {version} is too old, {oldest} is needed: pip install 'spikesink[hf]'")


class Source(NamedTuple):
    """The place of a transformers model. `location` and `arguments` are passed to `from_pretrained`."""

    name: str  # as shown in findings
    location: str  # a folder, or a name on the hub
    arguments: dict[str, str] = {}  # gguf_file, revision  # noqa: RUF012, never written to

    @classmethod
    def locate(cls, target: str | Path, revision: str | None = None) -> "Source":
        """The Source of a GGUF file, a folder (whose revisions are folders in it), or a hub name. Raises UserError."""
        path = Path(target)
        if path.suffix.lower() == ".gguf":
            if revision is not None or not path.is_file():
                raise UserError(f"{path} has no revisions: it is one file" if path.is_file() else f"no file {path}")
            folder = disk_weights.temporary_folder()  # so that transformers reads no tokenizer beside the file
            (Path(folder) / path.name).symlink_to(path.resolve())
            return cls(str(path), folder, {"gguf_file": path.name})
        if revision is None:
            return cls(str(target), str(target))
        if not path.is_dir():
            return cls(f"{target}@{revision}", str(target), {"revision": revision})
        revisions = revisions_in(path)
        if revision not in revisions:
            raise UserError(f"{path} has no revision {revision}; it has {', '.join(revisions) or 'none'}")
        return cls(str(path / revision), str(path / revision))

    @property
    def file(self) -> Path | None:
        """The path of the GGUF file, or None."""
        return Path(self.name) if "gguf_file" in self.arguments else None


def revisions_in(folder: str | Path) -> list[str]:
    """Names of the folders in `folder` that have a config.json but no ckpt.pt of train.py, sorted by their step."""
    folders = [config.parent for config in Path(folder).glob("*/config.json")]
    names = [revision.name for revision in folders if not (revision / "ckpt.pt").exists()]
    return sorted(names, key=lambda name: (step_of(name) or 0, name))


def step_of(revision: str | None) -> int | None:
    """The training step in a revision's name, such as step1000, step-50K-105b or checkpoint-500, or None."""
    match = re.search(r"(?:step|checkpoint)[-_]?(\d+)(k?)(?![\w.])", revision or "", re.IGNORECASE)
    return int(match[1]) * (1000 if match[2] else 1) if match else None


def gguf_types(file: Path) -> str:
    """Says in words which types a GGUF file's matrices have, the most frequent first. Raises UserError."""
    with extra("hf"):
        import gguf
    n_weights: Counter[str] = Counter()
    try:
        for tensor in gguf.GGUFReader(file).tensors:
            n_weights[tensor.tensor_type.name] += int(tensor.n_elements) if len(tensor.shape) > 1 else 0
    except Exception as error:  # a broken file fails in many ways
        raise UserError(f"cannot read {file}: it is not a complete GGUF file ({first_line(error)})") from None
    types = [name for name, n in n_weights.most_common() if n]
    return f"{'converted' if {*types} <= {'F32', 'F16', 'BF16'} else 'dequantised'} from {', '.join(types)}"


def first_line(error: BaseException) -> str:
    """The type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model. Only a multimodal config has other parts."""
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def model_class(config: Any) -> Any:
    """The transformers class for this config, with a language-model head if there is such a class."""
    from transformers.models import auto

    name = (config.architectures or [""])[0]
    if name.endswith("EncoderModel"):  # the encoder of an encoder-decoder
        return auto.AutoModelForTextEncoding
    if config.is_encoder_decoder:
        return auto.AutoModelForSeq2SeqLM
    causal = getattr(config, "is_decoder", False) or name.endswith(("ForCausalLM", "LMHeadModel"))
    kinds: list[Any] = [] if causal else [auto.AutoModelForMaskedLM]
    kinds += [auto.AutoModelForCausalLM, auto.AutoModelForImageTextToText, auto.AutoModel]
    # without a match, the error of AutoModelForCausalLM says what is wrong
    return next((kind for kind in kinds if type(config) in kind._model_mapping), auto.AutoModelForCausalLM)


class Opened(NamedTuple):
    """A model, and remarks on its weights for the model entry of the findings."""

    model: Any
    about: dict[str, str]


def open_model(name_or_path: str | Path, device: str = "cpu", free: float = math.inf, **kwargs: Any) -> Any:
    """Loads a language model from the hub or a folder; see `load`. Raises UserError if it has no head."""
    model = load(Source.locate(name_or_path), device, free, **kwargs).model
    if model.get_output_embeddings() is None:
        raise UserError(f"{name_or_path} has no language-model head")
    return model


def load(source: Source, device: str = "cpu", free: float = math.inf, **kwargs: Any) -> Opened:
    """Loads a model in float32; `kwargs` go to transformers' `from_pretrained`.

    It is causal, masked (BERT) or an encoder-decoder (T5, BART), as its config says, and has a head if the files do.
    On the CPU, weights that do not fit into `free` bytes of memory stay on disk, and are read whenever they are used.
    Only safetensors and GGUF files are read, and remote code is never run. Raises UserError if anything is missing.
    """
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # or the hub converts other formats on request
    need_transformers()
    from transformers import AutoConfig, GgufConfig
    from transformers.utils import cached_file, logging

    name, location, arguments = source
    device = device_named(device)
    logging.set_verbosity_error()
    quiet = not sys.stderr.isatty()
    if quiet:
        logging.disable_progress_bar()
    local = Path(location).is_dir()
    offline = local or not hub_answers()  # as a missing network costs half a minute of retries
    safe = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32, "local_files_only": offline}
    about = {}
    if source.file:
        about["weights"] = gguf_types(source.file)
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    elif local:
        check_folder(location)
    try:
        if not local:
            check_config(str(cached_file(location, "config.json", local_files_only=offline, **arguments)))
        config = AutoConfig.from_pretrained(location, **arguments, trust_remote_code=False, local_files_only=offline)
        kind = model_class(config)
        on_disk = disk_weights.placement(kind, config, free, source.file) if str(device) == "cpu" else {}
        with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
            settings = {**kwargs, **safe, **on_disk, **arguments}
            model, info = kind.from_pretrained(location, **settings, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # a hostile or broken folder fails in many ways
        place = "" if local else "is no file or folder here, and as a model on the hub "
        raise UserError(f"{name} {place}cannot be opened: {first_line(error)}") from None
    model = without_new_head(model, sorted(info["missing_keys"]), name)
    about |= unused_weights(model, sorted(info["unexpected_keys"]), name)
    untie(model)
    for key, words in about.items():
        print(f"{name}: {key} {words}", file=sys.stderr)
    if model.get_output_embeddings() is None:
        print(f"{name}: it has no language-model head, so no loss is measured", file=sys.stderr)
    return Opened(model if on_disk else to_device(model, device), about)


def without_new_head(model: Any, missing: list[str], name: str) -> Any:
    """Returns the model, or the model below its head if weights of the head are `missing`, as they would be random.
    Raises UserError if any other weight is missing."""
    if not missing:
        return model
    inside = [key for key in missing if model.base_model is model or key.startswith(f"{model.base_model_prefix}.")]
    if inside:
        raise UserError(f"{name} lacks {len(inside)} weights, the first {inside[0]}: they would be random")
    return model.base_model


def unused_weights(model: Any, unexpected: list[str], name: str) -> dict[str, str]:
    """{"unused": names of weights that the model has no place for}, or {}. Raises UserError if any is in a block."""
    lists = {key.rpartition(".")[2] for key, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    blocks = [key for key in unexpected if any(re.search(rf"(^|\.){re.escape(stack)}\.\d+\.", key) for stack in lists)]
    if blocks:
        lost = f"{len(blocks)} weights of blocks that its config has no place for, the first {blocks[0]}"
        raise UserError(f"{name} has {lost}: without them it would compute something else")
    shown = ", ".join(unexpected[:4]) + (f" and {len(unexpected) - 4} more" if len(unexpected) > 4 else "")
    return {"unused": shown} if unexpected else {}


def untie(model: Any) -> None:
    """Corrects a config that ties the unembedding to the embedding where the files have two different tensors."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and last is not None and first.weight is not last.weight:
        with disk_weights.weights_at_hand(first), disk_weights.weights_at_hand(last):
            model.config.tie_word_embeddings = torch.equal(first.weight, last.weight)
        if not model.config.tie_word_embeddings:
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def transformers_in(model: nn.Module) -> Any:
    """The transformers model in `model`, which may wrap it; None without one."""
    if sys.modules.get("transformers") is None:
        return None
    from transformers import PreTrainedModel

    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)


def nanogpt_model(model_args: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """The transformers GPT-2 that computes the same as a nanoGPT checkpoint. Raises ValueError."""
    need_transformers()
    convert.check_nanogpt(model_args)
    return with_weights(*convert.to_hf(model_args, weights))


def with_weights(config: Any, state: Mapping[str, Tensor]) -> Any:
    """The transformers model of this config, whose weights are these tensors, not copies."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


def subjects_of(model: Any, decode: Callable[[int], str]) -> list[Subject]:
    """The Subjects of a loaded transformers model: one, or an encoder-decoder's decoder, encoder and cross.

    We refuse what we cannot observe. Raises UserError unless trial runs keep the model's logits, every attention module
    calls its seam once, and the streams are (B, T, C).
    """
    need_transformers()
    model.eval()
    model.config.return_dict = True
    for config in (model.config, text_config(model.config)):
        config.use_cache = False
    try:
        return _try_subjects(model, decode)
    except UserError:
        raise
    except Exception as error:  # models fail in many ways
        raise UserError(f"{model.config.model_type} cannot be observed: {first_line(error)}") from None


def start_token(config: Any) -> int:
    """The id that a decoder's input starts with."""
    tokens = (getattr(config, key, None) for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    return next((token for token in tokens if token is not None), 0)


def trial_inputs(model: Any) -> dict[str, Tensor]:
    """Ids (1, T) for a trial run. The decoder gets fewer, so that cross-attention is known by its shape."""
    ids = torch.arange(3, 19, device=device_of(model))[None] % text_config(model.config).vocab_size
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :11]} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def _try_subjects(model: Any, decode: Callable[[int], str]) -> list[Subject]:
    two_stacks, inputs = model.config.is_encoder_decoder, trial_inputs(model)
    run = lambda **changed: model(**{**inputs, **changed})[0]
    take_over(model, run)
    parts: dict[str, dict[str, Any]] = {}
    stacks = stacks_of(model)
    names = ("encoder", "decoder") if two_stacks else ("",)
    for name, (key, ids), blocks in zip(names, inputs.items(), stacks, strict=True):
        other_end = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % text_config(model.config).vocab_size), dim=1)
        taps, causal = watch(Stack(blocks), run, {key: other_end})
        parts[name] = {**taps._asdict(), "causal": causal}
    logits = lambda ids: model(ids)[0]
    if two_stacks:  # the keys of cross-attention are the encoder's tokens
        start, seams = start_token(model.config), parts["decoder"]["attends"]
        logits = lambda ids: model(input_ids=ids, decoder_input_ids=after_start(ids, start))[0]
        parts = {
            "decoder": {**parts["decoder"], "attends": [tap for tap in seams if tap.kind != "cross"], "start": start},
            "encoder": parts["encoder"],
            "cross": {**parts["encoder"], "attends": [tap for tap in seams if tap.kind == "cross"], "causal": False},
        }

    def rebuild(part: str) -> Subject:
        new = type(model)(copy.deepcopy(model.config)).eval().to(device_of(model), model.dtype)
        return next(s for s in subjects_of(new, decode) if s.part == part)

    has_loss = model.get_output_embeddings() is not None
    shared: dict[str, Any] = {"n_register": 0, "decode": decode, "logits": logits, "has_loss": has_loss}
    shared["stages"] = [*itertools.chain(*stacks)]
    subjects = []
    for name, part in parts.items():
        heads = {tap.module.heads for tap in part["attends"]}
        if len(heads) != 1:
            raise UserError(f"{model.config.model_type} cannot be observed: its layers have different numbers of heads")
        for tap in part["attends"]:
            tap.module.spares_own = part["causal"]
        shift = int(part["causal"] and has_loss and not two_stacks)
        new = functools.partial(rebuild, name)
        subjects.append(Subject(model, **part, **shared, part=name, n_head=heads.pop(), shift=shift, rebuild=new))
    return subjects


def take_over(model: Any, run: Callable[[], Tensor]) -> None:
    """Makes a model use our attention function. Raises UserError if its logits, `run()`, change."""
    from transformers import AttentionInterface, AttentionMaskInterface

    logits = run()
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, lazy_mask)
    for module in model.modules():
        if type(module).__name__.startswith("GPTNeo") and hasattr(module, "attention_type"):
            object.__setattr__(module, "_attn", gpt_neo_attention.__get__(module))
    model.set_attn_implementation(NAME)
    # over 24 layers of bfloat16, sdpa and eager differ by 6 eps
    tolerance = max(1e-3, 16 * torch.finfo(logits.dtype).eps)
    if (run() - logits).abs().max() > tolerance * logits.abs().max().clamp_min(1e-6):
        raise UserError(f"{model.config.model_type} cannot be observed: its logits change under our attention")


def watch(stack: Stack, run: Callable[..., Tensor], other_end: dict[str, Tensor]) -> tuple[Taps, bool]:
    """(Taps of a stack, whether it is causal), from one run as it is and one with another last token."""
    with stack.watched():
        run()
    clean = stack.output
    with stack.watched():
        run(**other_end)
    return stack.taps(), bool((stack.output - clean)[:, :-1].abs().max() <= 1e-5 * clean.abs().max())


PLAIN = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}


class Tokenizer:
    """A transformers tokenizer with the methods of TextTokenizer.

    `prefix_ids`, `suffix_ids`: the special tokens that it puts before and after a text. `bos_id`: its BOS, or None.
    `separator_id`: the id between documents, which is <|endoftext|>, else BOS, else EOS, or None. `special_ids`:
    {text of a special token: its id}.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.bos_id = tokenizer, getattr(tokenizer, "bos_token_id", None)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special_ids = {str(token): number for number, token in added.items() if getattr(token, "special", False)}
        self.prefix_ids, self.suffix_ids = self._frame()
        self.eos_id = getattr(tokenizer, "eos_token_id", None)
        self.separator_id = self.eos_id if self.bos_id is None else self.bos_id  # a chat model's EOS ends turns
        if END in getattr(tokenizer, "all_special_tokens", ()):
            self.separator_id = tokenizer.convert_tokens_to_ids(END)

    @classmethod
    def load(cls, source: Source) -> "Tokenizer | None":
        """Loads the tokenizer beside a model, or in its GGUF file; None without one. Never runs remote code."""
        from transformers import AutoTokenizer

        folder = Path(source.location)
        local = folder.is_dir()
        if local and not (source.file or any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern))):
            return None  # or transformers would invent one
        safe = {"trust_remote_code": False, "local_files_only": local or not hub_answers()}
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.location, **safe, **source.arguments)
        except Exception:  # a folder without a tokenizer fails in many ways
            return None
        return cls(tokenizer) if tokenizer("a")["input_ids"] else None  # an empty tokenizer is no use

    def _frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ids, (plain,) = self.tokenizer("a")["input_ids"], self.encode(["a"])
        for start in range(len(ids) - len(plain) + 1):
            if plain and ids[start : start + len(plain)] == plain:
                return tuple(ids[:start]), tuple(ids[start + len(plain) :])
        return (), ()

    def encode(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """Texts -> a list of ids for each. Special tokens that are spelled in a text are read as plain text."""
        return self.tokenizer(texts, **PLAIN)["input_ids"]

    def spans(self, texts: list[str]) -> list[tuple[list[int], Spans]]:
        """See tokenizers.spans_of. Raises UserError for a slow tokenizer."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise UserError("the model has a slow tokenizer, which does not tell which characters a token stands for")
        encoded = self.tokenizer(texts, **PLAIN, return_offsets_mapping=True)
        return [*zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]

    def decode(self, token: int) -> str:
        """One id -> text to show."""
        return self.tokenizer.decode([token])

    def text(self, ids: np.ndarray) -> str:
        """An array of ids -> text, with its spaces before punctuation, which some tokenizers drop."""
        return self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


def weights_hash(path: str | Path) -> str | None:
    """SHA-256 of a GGUF file, or of the names and hashes of a folder's safetensors files. None for the hub."""
    if Path(path).is_file():
        return file_hash(path)
    files = sorted(Path(path).glob("*.safetensors"))
    lines = "".join(f"{file.name} {file_hash(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest() if files else None


def longest(model: Any) -> float:
    """The longest sequence that the model takes, or infinity. In models like RoBERTa, whose positions start after the
    padding id, it is shorter than the config says: 512, not 514."""
    keys = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    lengths = [getattr(text_config(model.config), key, None) for key in keys]
    for name, module in model.named_modules():
        if "position" in name.split(".")[-1] and isinstance(getattr(module, "padding_idx", None), int):
            lengths.append(len(module.weight) - module.padding_idx - 1)
    return min((length for length in lengths if isinstance(length, int) and length > 0), default=math.inf)
