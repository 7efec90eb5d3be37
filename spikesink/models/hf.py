"""Any transformers model as Subjects: the attention seam through AttentionInterface, streams by hooks.

Nothing of size T x T is made here: masks stay functions until a chunk of rows asks for them, and attention that nobody
edits runs through PyTorch's fused kernels (a model that passes a T x T position bias has made that itself).
"""

import copy
import functools
import hashlib
import json
import math
import os
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UserError, extra, no_device
from ..files import file_hash
from . import convert, disk_weights
from .blocks import Stack, Taps, stacks_of
from .subject import SEAM, Subject, after_start, device_of, for_heads, rows_at_once

NAME = "spikesink"
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


def model_class(config: Any) -> Any:
    """The transformers class that gives a model of this config its language-model head."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    names = config.architectures or [""]
    causal = getattr(config, "is_decoder", False) or names[0].endswith(("ForCausalLM", "LMHeadModel"))
    masked = type(config) in AutoModelForMaskedLM._model_mapping
    return AutoModelForMaskedLM if masked and not causal else AutoModelForCausalLM


def open_model(name_or_path: str | Path, device: str = "cpu", free: float = math.inf, **kwargs: Any) -> Any:
    """A language model of the hub or of a folder, in float32; `kwargs` go to transformers' `from_pretrained`.

    On the CPU, weights that do not fit into `free` bytes of memory are left on disk, and read whenever they are used.

    Causal, masked (BERT) or encoder-decoder (T5, BART), as its config says.

    Safetensors only, no remote code, whatever they say. Raises UserError where it cannot be had whole.
    """
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # no third party converts other formats for us
    with extra("hf"):
        from transformers import AutoConfig
        from transformers.utils import cached_file, logging
    device = device_named(device)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    local = Path(name_or_path).is_dir()
    offline = local or not hub_answers()  # else a missing network costs half a minute of retries
    safe = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32, "local_files_only": offline}
    if local:
        check_folder(name_or_path)
    try:
        if not local:
            check_config(str(cached_file(name_or_path, "config.json", local_files_only=offline)))
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, local_files_only=offline)
        kind = model_class(config)
        placed = disk_weights.placement(kind, config, free) if str(device) == "cpu" else {}
        model, info = kind.from_pretrained(name_or_path, **{**kwargs, **safe, **placed}, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # a hostile or broken folder fails in many ways
        reason = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        where = "" if local else "is no file or folder here, and as a model of the hub "
        raise UserError(f"{name_or_path} {where}cannot be opened: {reason}") from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"{name_or_path} lacks {len(missing)} weights, the first {missing[0]}: it would be random")
    return model if placed else to_device(model, device)


def found_in(model: nn.Module) -> Any:
    """The transformers model in `model`, perhaps wrapped; None where there is none."""
    if sys.modules.get("transformers") is None:
        return None
    from transformers import PreTrainedModel

    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)


def of_nanogpt(model_args: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Any:
    """The GPT-2 of transformers that computes what a checkpoint of nanoGPT does. Raises ValueError."""
    with extra("hf"):
        from transformers import GPT2LMHeadModel
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
    kind = model.config.model_type
    model.eval()
    model.config.use_cache, model.config.return_dict = False, True
    try:
        return _tried_subjects(model, decode)
    except UserError:
        raise
    except Exception as error:  # models fail in their own ways
        reason = (str(error).strip() or "-").splitlines()[0]
        raise UserError(f"{kind} cannot be observed: {type(error).__name__}: {reason}") from None


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
    ids = torch.arange(3, 19, device=device_of(model))[None] % model.config.vocab_size
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :11]} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def _tried_subjects(model: Any, decode: Callable[[int], str]) -> list[Subject]:
    kind, both, inputs = model.config.model_type, model.config.is_encoder_decoder, trial_inputs(model)
    run = lambda **changed: model(**{**inputs, **changed})[0]
    take_over(model, run)
    parts: dict[str, dict[str, Any]] = {}
    stacks = stacks_of(model)
    for name, (key, ids), blocks in zip(("encoder", "decoder") if both else ("",), inputs.items(), stacks, strict=True):
        other_end = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % model.config.vocab_size), dim=1)
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


class Tokenizer:
    """A transformers tokenizer as the instruments use one.

    `prefix_ids`, `suffix_ids`: the special tokens that it puts before and after a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.prefix_ids, self.suffix_ids = self._frame()

    @classmethod
    def of(cls, name_or_path: str | Path) -> "Tokenizer | None":
        """The tokenizer beside a model, or None. Runs no remote code."""
        from transformers import AutoTokenizer

        folder = Path(name_or_path)
        if folder.is_dir() and not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
            return None  # transformers would make one up
        offline = folder.is_dir() or not hub_answers()
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, local_files_only=offline)
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
        """A list of strings -> a list of lists of ids, without special tokens."""
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, token: int) -> str:
        """One id -> text to show."""
        return self.tokenizer.decode([token])


def weights_hash(name_or_path: str | Path) -> str | None:
    """SHA-256 over the names and hashes of a folder's safetensors files; None for a name of the hub."""
    digest = hashlib.sha256()
    files = sorted(Path(name_or_path).glob("*.safetensors"))
    for file in files:
        digest.update(f"{file.name} {file_hash(file)}\n".encode())
    return digest.hexdigest() if files else None


def longest(config: Any) -> float:
    """The longest sequence the model takes, or infinity."""
    keys = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    known = [getattr(config, key, None) for key in keys]
    return min((length for length in known if isinstance(length, int) and length > 0), default=math.inf)
