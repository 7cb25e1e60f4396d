"""The Llama family (Llama 2 and 3.x, SmolLM2, TinyLlama, Mistral, Qwen2/2.5, Qwen3) in one small class, with its files.

The modules carry the names that checkpoints use (`model.layers.0.self_attn.q_proj.weight`) and `Config` those of
config.json, so nothing needs a map. What is not computed here is refused by name: a wrong model that runs is the worst.

    tokens (B, T) → embedding → layers × [norm, attention with RoPE, norm, SwiGLU] → norm → logits, or any `head`

A row may hold a preference pair as [prompt | chosen | rejected]: `segments` says which token is which, and a response
sees the prompt and itself, never the other response (`visible`). The file reads: config → safetensors → model.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

# ---- config.json -----------------------------------------------------------------------------------------------------

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
NO = "not a key of this family"
# fmt: off
KEYS = {  # all that changes numbers: what it must be, and what an absent key means in each family, as in transformers
    #                           must be            llama    mistral  qwen2    qwen3
    "vocab_size":              ("int > 0",         32000,   32000,   151936,  151936),
    "hidden_size":             ("int > 0",         4096,    4096,    4096,    4096),
    "intermediate_size":       ("int > 0",         11008,   14336,   22016,   22016),
    "num_hidden_layers":       ("int > 0",         32,      32,      32,      32),
    "num_attention_heads":     ("int > 0",         32,      32,      32,      32),
    "num_key_value_heads":     ("int > 0 or null", None,    8,       32,      32),     # null: num_attention_heads
    "head_dim":                ("int > 0 or null", None,    None,    None,    128),    # null: hidden_size // heads
    "max_position_embeddings": ("int > 0",         2048,    131072,  32768,   32768),  # for whoever makes the rows
    "rms_norm_eps":            ("number > 0",      1e-6,    1e-6,    1e-6,    1e-6),
    "rope_theta":              ("number > 0",      10000.0, 10000.0, 10000.0, 10000.0),
    "rope_scaling":            ("rope or null",    None,    None,    None,    None),
    "hidden_act":              ("silu or swish",   "silu",  "silu",  "silu",  "silu"),
    "tie_word_embeddings":     ("true or false",   False,   False,   False,   False),
    "attention_bias":          ("true or false",   False,   NO,      NO,      False),  # on q, k, v and o
    "mlp_bias":                ("true or false",   False,   NO,      NO,      NO),
    "sliding_window":          ("int > 0 or null", NO,      4096,    4096,    4096),   # keys seen, itself included
    "use_sliding_window":      ("true or false",   NO,      NO,      False,   False),  # Mistral: in all layers, always
    "max_window_layers":       ("int >= 0",        NO,      NO,      28,      28),     # first layer with a window, if
    "layer_types":             ("list or null",    NO,      NO,      None,    None),   # this list does not say it
}
# fmt: on
ROPE = {"default": set(), "linear": {"factor"}}  # the types of RoPE that are implemented, and their numbers
ROPE["llama3"] = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
ATTENTION = ("full_attention", "sliding_attention")
OFF = ("None", "False", "[]", "{}")
# Keys that cannot change the numbers of a forward pass without dropout, like `_…`, `…_token_id` and `…dropout`:
HARMLESS = """architectures transformers_version auto_map dtype torch_dtype initializer_range use_cache id2label
label2id num_labels task_specific_params return_dict resid_pdrop embd_pdrop is_decoder is_llama_config
transformers.js_config unsloth_fixed model_max_length max_sequence_length max_length min_length do_sample temperature
top_k top_p num_beams num_return_sequences repetition_penalty diversity_penalty length_penalty""".split()
# Any other key must be off (null, false or empty) or text, but for keys that speak of numbers, and these neutral:
TELLING = re.compile("act|norm|rope|rotary|quant|clip|scal|bias|expert|moe|mlp|ffn")
NEUTRAL = {"partial_rotary_factor": (None, 1), "pretraining_tp": (None, 1), "logit_scale": (None, 1)}
NEUTRAL |= {
    "is_causal": (None, True),
    "hidden_activation": (None, "silu"),
    "position_embedding_type": (None, "rope", "rotary"),
}


def _is(kind: str, value: object) -> bool:
    if kind.endswith("null") and value is None:
        return True
    if kind.startswith("int"):
        return type(value) is int and (value > 0 or (value == 0 and "=" in kind)) and value <= 2**28
    if kind.startswith("number"):
        return type(value) in (int, float) and 0 < value < 1e30
    types = {"true or false": bool, "list or null": list, "rope or null": dict}
    return type(value) is types[kind] if kind in types else value in kind.split(" or ")


class Config(SimpleNamespace):
    """What config.json says of the numbers, key by key under its own name, as attributes; `KEYS` lists them.

    `Config(vocab_size=6, hidden_size=64, …)`, or `Config.from_json(path)`. Absent keys mean what they mean in
    transformers. A bad value, and a key that is not read here but could change numbers, is a ValueError. `windows`
    holds for each layer its sliding window, or None where attention is full.
    """

    def __init__(self, /, model_type: str = "llama", **given: object) -> None:
        _require(model_type in FAMILIES, f"model_type is {model_type!r}; it must be one of {', '.join(FAMILIES)}")
        _one_rope_form(given)
        vars(self).update(dict.fromkeys(KEYS), model_type=model_type)  # what the family does not know stays None
        for key, default in self.known_keys(model_type).items():
            value, kind = given.pop(key, default), KEYS[key][0]
            _require(_is(kind, value), f"{key} is {value!r}; it must be {kind}")
            setattr(self, key, value)
        for key, value in given.items():
            text = type(value) is str and not TELLING.search(key)
            off = value in NEUTRAL[key] if key in NEUTRAL else text or str(value) in OFF
            harmless = key in HARMLESS or key.startswith("_") or key.endswith(("_token_id", "dropout"))
            _require(off or harmless, f"{key} is {value!r}: unknown to {model_type}, but it could change numbers")

        layers, width, heads = self.num_hidden_layers, self.hidden_size, self.num_attention_heads
        keys = self.num_key_value_heads = self.num_key_value_heads or heads
        size = self.head_dim = self.head_dim or width // heads
        fits = width % heads == 0 or model_type != "llama"
        _require(layers <= 1000, f"num_hidden_layers is {layers}; it must be at most 1000")
        _require(fits, f"num_attention_heads is {heads}; it must divide hidden_size {width}")
        _require(heads % keys == 0, f"num_key_value_heads is {keys}; it must divide num_attention_heads {heads}")
        _require(size > 0 and size % 2 == 0, f"head_dim is {size}; it must be even, for RoPE turns pairs")
        _require(size * heads <= 2**28, f"num_attention_heads {heads} times head_dim {size} is beyond all reason")

        always = model_type == "mistral"
        window = self.sliding_window if always or self.use_sliding_window else None
        first = 0 if always else self.max_window_layers
        kinds = self.layer_types
        if kinds is None:
            kinds = [ATTENTION[window is not None and layer >= first] for layer in range(layers)]
        fits = len(kinds) == layers and all(kind in ATTENTION[: 1 if window is None else 2] for kind in kinds)
        _require(fits, f"layer_types is {kinds}; needed: {layers} of {ATTENTION}, the second only if a window is set")
        self.windows = [window if kind == "sliding_attention" else None for kind in kinds]

    def __eq__(self, other: object) -> bool:
        """Whether both mean the same numbers, however their files put it."""
        words = {"hidden_act", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
        mine, theirs = ({k: v for k, v in vars(c).items() if k not in words} for c in (self, other))
        return mine == theirs

    @staticmethod
    def known_keys(family: str) -> dict[str, object]:
        """The keys that a family knows, with their defaults."""
        column = 1 + FAMILIES.index(family)
        return {key: row[column] for key, row in KEYS.items() if row[column] is not NO}

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> Config:
        """Read a config.json. ValueError names the file, the key, what was found and what would be right."""
        found = _read_json_object(path)
        try:
            return cls(**{"model_type": None} | found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self) -> dict:
        """The fields of a config.json that transformers reads as this very model."""
        names = {"architectures": [f"{self.model_type.capitalize()}ForCausalLM"], "model_type": self.model_type}
        return names | {key: getattr(self, key) for key in self.known_keys(self.model_type)}


def _require(ok: bool, otherwise: str) -> None:
    if not ok:
        raise ValueError(otherwise if len(otherwise) < 4000 else f"{otherwise[:2000]} … {otherwise[-2000:]}")


def _one_rope_form(given: dict) -> None:
    """Turn `rope_parameters` (new) and `type` (old) into `rope_theta` and `rope_scaling` with `rope_type`, in place."""
    old, new = given.get("rope_scaling") or {}, given.pop("rope_parameters", None) or {}
    one = type(old) is type(new) is dict and (old == new or not (old and new))
    _require(one, f"rope_scaling is {old!r} and rope_parameters {new!r}; one object must say it, or both the same")
    rope = dict(old or new)
    for key in ("rope_theta", "partial_rotary_factor"):
        same = key not in rope or given.setdefault(key, rope[key]) == rope.pop(key)
        _require(same, f"{key} is {given.get(key)!r}, but something else in {old or new}")
    kind = str(rope.pop("rope_type", rope.get("type", "default")))
    one = rope.pop("type", kind) == kind and kind in ROPE
    _require(one, f"{old or new}: RoPE must be of one type, and that one of {list(ROPE)}")
    fits = rope.keys() == ROPE[kind] and all(_is("number > 0", number) for number in rope.values())
    fits = fits and rope.get("low_freq_factor", 0) < rope.get("high_freq_factor", 1)
    _require(fits, f"{old or new}: RoPE of type {kind!r} takes {sorted(ROPE[kind])}, all above 0, low below high")
    given["rope_scaling"] = {"rope_type": kind, **rope} if rope else None


def _read_json_object(path: str | os.PathLike) -> dict:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # lone surrogates are no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8: {error}") from None
    _require(type(found) is dict, f"{path}: must hold a JSON object, holds {type(found).__name__}")
    return found


# ---- safetensors: 8 bytes of header length, a JSON header, raw little-endian data ------------------------------------

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "U8": torch.uint8}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")
WEIGHT_FILES += (".ot", ".npz")


class Entry(NamedTuple):
    """Where a tensor lies in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in bytes

    def read(self) -> Tensor:
        """A private, writable copy (an optimizer that steps on a read-only map ends the process with SIGSEGV)."""
        size = math.prod(self.shape) * self.dtype.itemsize  # bytes, for numpy has no bf16
        data = torch.from_numpy(np.fromfile(self.path, np.uint8, size, offset=self.start))
        return (data.view(self.dtype) if size else torch.empty(0, dtype=self.dtype)).reshape(self.shape)


def read_header(path: str | os.PathLike) -> dict[str, Entry]:
    """The tensors of a safetensors file, every number checked; ValueError names the file and the tensor."""

    def require(ok: bool, otherwise: object) -> None:
        _require(ok, f"{path}: {otherwise}")

    def unique(pairs: list[tuple]) -> dict:
        keys = [key for key, _ in pairs if key in ("dtype", "shape", "data_offsets", "__metadata__")]
        require(len(keys) == len(set(keys)), f"a key twice in {keys}")
        return dict(pairs)

    def sizes(found: object) -> bool:
        return type(found) is list and all(type(n) is int and 0 <= n < 2**63 for n in found)

    path, length = Path(path), os.path.getsize(path)
    with open(path, "rb") as file:
        base = 8 + int.from_bytes(file.read(8), "little")
        require(8 <= base <= min(length, 8 + 100_000_000), f"header of {base - 8} bytes, file of {length}: cut short?")
        try:
            hooks = {
                "parse_constant": lambda nan: require(False, nan),
                "parse_int": lambda n: int(n) if n != "-0" else -1,
            }
            header = json.loads(file.read(base - 8).decode(), object_pairs_hook=unique, **hooks)
            json.dumps(header, ensure_ascii=False).encode()  # lone surrogates are no text
        except (ValueError, RecursionError) as error:
            require(False, f"bad header: {error}")
    require(type(header) is dict, "the header is no JSON object")
    metadata = header.pop("__metadata__", None)
    texts = type(metadata) is dict and all(type(text) is str for text in metadata.values())
    require(metadata is None or texts, f"__metadata__ must map text to text, is {metadata!r}")
    for name, info in header.items():
        fits = type(info) is dict and sizes(info.get("shape")) and sizes(info.get("data_offsets"))
        require(fits, f"tensor {name!r} needs a shape and data_offsets of integers from 0, has {info!r}")
        dtype = info.get("dtype")
        require(dtype in list(DTYPES), f"tensor {name!r} has dtype {dtype!r}; readable are {list(DTYPES)}")
    entries, end = {}, 0
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, start = DTYPES[info["dtype"]], info["shape"], end
        end += math.prod(shape) * dtype.itemsize
        fits = info["data_offsets"] == [start, end] and all(math.prod(shape[:i]) < 2**64 for i in range(len(shape)))
        require(fits, f"tensor {name!r} after {start} bytes of data needs data_offsets [{start}, {end}], has {info!r}")
        entries[name] = Entry(path, dtype, tuple(shape), base + start)
    require(base + end == length, f"the tensors end at byte {base + end}, the file at {length}")
    return entries


def load_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a file, as private writable copies on the CPU. ValueError names what is wrong with the file."""
    return {name: entry.read() for name, entry in read_header(path).items()}


def save_safetensors(tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str]) -> None:
    """Write a safetensors file; `path` is at every moment the old file or the whole new one."""
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # aligns the data

    def write(file: BinaryIO) -> None:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    replace_file(Path(path), write)


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, flush, move over it: `path` is at every moment the old file or the whole new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except torch.OutOfMemoryError:  # what is written may be computed on the way
        raise
    except (OSError, RuntimeError) as error:  # a full disk is the first in Python's files, the second in torch's
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def find_tensors(folder: Path) -> dict[str, Entry]:
    """The tensors of a checkpoint folder: those of its single file, else of its shards, as the index lists them."""
    index = folder / INDEX
    if (folder / SINGLE).exists() or not index.exists():
        return read_header(folder / SINGLE)
    files = _read_json_object(index).get("weight_map")
    texts = type(files) is dict and all(type(file) is str for file in files.values())
    _require(texts, f"{index}: weight_map must map names of tensors to names of files")
    for file in files.values():
        parts = PurePosixPath(file).parts
        name = len(file) < 4096 and not set(file) & set("\\:\0")
        inside = parts and name and ".." not in parts and not file.startswith("/")
        _require(inside, f"{index}: {file!r} is no file of this folder")
    shards = {file: read_header(folder / file) for file in sorted(set(files.values()))}
    absent = [f"{name} in {file}" for name, file in files.items() if name not in shards[file]]
    _require(not absent, f"{index} lists tensors that are not there: {', '.join(absent)}")
    return {name: shards[file][name] for name, file in files.items()}


# ---- the model -------------------------------------------------------------------------------------------------------


def rope(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, T, head_dim / 2) of RoPE's angles, in float32 whatever the model's dtype.

    (In bfloat16 the positions from 256 on coincide.) Computed in each forward: a buffer would be lost on a meta device
    and rounded by a cast of the model.
    """
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequency, scaling = 1.0 / config.rope_theta**steps, config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling["rope_type"] == "llama3":  # slow turns are divided, fast ones kept, those between blended
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = (1 - keep) * frequency / scaling["factor"] + keep * frequency
    angles = positions[:, None, :, None].float() * frequency
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + head_dim/2}) of (B, heads, T, head_dim) by its angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def visible(positions: Tensor, segments: Tensor | None, window: int | None) -> Tensor:
    """Which query sees which key, (B, 1, T, T) bool: backwards only, the prompt and one's own response, in the window.

    segments (B, T): −1 pad, 0 prompt, 1 chosen, 2 rejected. The window counts positions, not places in the row: the
    rejected response lies behind the chosen one. A pad sees itself alone, for a softmax over nothing is NaN.
    """
    places = torch.arange(positions.shape[1], device=positions.device)
    seen = (places[:, None] >= places).expand(len(positions), -1, -1)
    if segments is not None:
        query, key = segments[:, :, None], segments[:, None, :]
        seen = seen & (key >= 0) & ((key == 0) & (query >= 0) | (key == query)) | (places[:, None] == places)
    if window is not None:
        seen = seen & (positions[:, :, None] - positions[:, None, :] < window)
    return seen[:, None]


class Rows(NamedTuple):
    """Where a batch's N tokens stand in its rows: pads are no tokens, and only attention computes with them."""

    shape: tuple[int, int]  # (B, T)
    places: Tensor | None  # (N,) of the tokens in the flattened B·T, None where there are no pads

    def spread(self, x: Tensor) -> Tensor:  # (N, ...) -> (B, T, ...), zero at pads
        if self.places is not None:
            x = x.new_zeros(math.prod(self.shape), *x.shape[1:]).index_put((self.places,), x)
        return x.unflatten(0, self.shape)

    def gather(self, x: Tensor) -> Tensor:  # (B, T, ...) -> (N, ...)
        return x.flatten(0, 1) if self.places is None else x.flatten(0, 1)[self.places]


def again(f: Callable, *inputs: Tensor) -> Tensor:
    """`f(*inputs)`, done again in backward in place of keeping what is inside: for cheap work on large tensors.

    A linear layer at its end is not: torch stops as soon as all that backward needs is there, here the layer's input.
    """
    if not torch.is_grad_enabled():
        return f(*inputs)
    return checkpoint(f, *inputs, use_reentrant=False, preserve_rng_state=False)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # a mean of squares wants float32
        return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head_dim, self.groups = c.head_dim, c.num_attention_heads // c.num_key_value_heads
        bias, queries, keys = c.attention_bias, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, queries, bias=bias or c.model_type == "qwen2")
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=bias or c.model_type == "qwen2")
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=bias or c.model_type == "qwen2")
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=bias)
        if c.model_type == "qwen3":
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps), RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(
        self, x: Tensor, rows: Rows, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: list | None
    ) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = map(rows.spread, (q, k, v))  # (N, heads, head_dim) -> (B, T, heads, head_dim)
        q, k, v = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        if cache is not None:  # [keys, values] of the tokens before these
            k, v = cache[:] = [torch.cat(pair, dim=2) for pair in zip(cache, (k, v))] if cache else [k, v]
        k, v = (y.repeat_interleave(self.groups, dim=1) for y in (k, v))  # (B, heads, T, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return again(lambda y: self.o_proj(rows.gather(y.transpose(1, 2)).flatten(1)), y)  # (N, D)


class MLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return again(lambda gate, up: self.down_proj(F.silu(gate) * up), gate, up)


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.hidden_size, c.rms_norm_eps), Attention(c)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.hidden_size, c.rms_norm_eps), MLP(c)

    def forward(
        self, x: Tensor, rows: Rows, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: list | None
    ) -> Tensor:
        x = x + self.self_attn(again(self.input_layernorm, x), rows, cos, sin, mask, cache)
        return x + self.mlp(again(self.post_attention_layernorm, x))


class GPT(nn.Module):
    """A causal language model of the Llama family. No dropout: one batch twice gives the same bits.

    `gradient_checkpointing = True` recomputes each layer in backward instead of keeping what it computed.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.source: Path | None = None  # the folder it was loaded from
        self.model = nn.Module()  # only lends its name to the checkpoint's prefix
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie()
        for name, parameter in self.named_parameters():
            if not name.endswith("norm.weight"):
                nn.init.normal_(parameter, std=0.0 if name.endswith("bias") else 0.02)

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, positions=None, segments=None, source=None, head=None, cache=None):
        """Logits (B, T, V); with `source` hidden states (M, D); with both, `head(hidden, output matrix (V, D))`.

        tokens, positions, segments: integers (B, T); without the last two each row is one plain sequence. source: (M,)
        indices into the flattened B·T. The head runs in here because FSDP2 holds the whole output matrix, and collects
        its gradient, only here. cache: an empty list per layer at first; positions and segments then also cover the
        tokens in it.
        """
        if (segments is not None and positions is None) or (head is not None and source is None):
            raise ValueError("segments need positions (a rejected response starts again after the prompt), head source")
        T, windows = tokens.shape[1], self.config.windows
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(tokens.shape)
        with torch.autocast(tokens.device.type, enabled=False):
            cos, sin = rope(self.config, positions[:, -T:])
        plain = segments is None and cache is None  # then attention's own causal kernel will do
        masks = {w: None if plain and w is None else visible(positions, segments, w)[:, :, -T:] for w in set(windows)}
        places = None if segments is None else (segments[:, -T:] >= 0).flatten().nonzero().squeeze(-1)
        rows = Rows(tokens.shape, None if places is None or len(places) == tokens.numel() else places)
        x = self.model.embed_tokens(rows.gather(tokens))  # (N, D)
        for i, layer in enumerate(self.model.layers):
            inputs = (x, rows, cos, sin, masks[windows[i]], None if cache is None else cache[i])
            keep = not (self.gradient_checkpointing and torch.is_grad_enabled())
            x = layer(*inputs) if keep else checkpoint(layer, *inputs, use_reentrant=False)
        x = rows.spread(x)  # (B, T, D)
        x = self.model.norm(x if source is None else x.flatten(0, 1)[source])  # (B, T, D) or (M, D)
        if source is not None:
            return x if head is None else head(x, self.lm_head.weight)
        with torch.autocast(tokens.device.type, enabled=False):  # which would round the logits
            return self.lm_head(x.to(self.lm_head.weight.dtype))

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0, eos=(), generator=None
    ) -> list[list[int]]:
        """The new tokens of each prompt, to an `eos`, itself included; greedy at temperature 0, else by `generator`.

        Raises ValueError for no prompts, an empty one, max_new_tokens below 1 and a negative temperature.
        """
        if not prompts or not all(prompts) or max_new_tokens < 1 or not temperature >= 0:
            raise ValueError("generate needs prompts that are not empty, max_new_tokens from 1 and temperature from 0")
        ends, length = {eos} if isinstance(eos, int) else set(eos or ()), max(map(len, prompts))
        pads, device = [length - len(prompt) for prompt in prompts], self.lm_head.weight.device
        tokens = torch.tensor([[0] * n + p for n, p in zip(pads, prompts)], device=device)  # (B, T), pads on the left
        segments = torch.tensor([[-1] * n + [0] * len(p) for n, p in zip(pads, prompts)], device=device)
        new, cache = [[] for _ in prompts], [[] for _ in self.model.layers]
        while True:
            positions = (segments == 0).cumsum(1) - 1
            last = torch.arange(1, len(prompts) + 1, device=device) * tokens.shape[1] - 1
            logits = self(tokens, positions, segments, last, F.linear, cache).float()  # (B, V)
            top, tokens = logits.max(-1, keepdim=True)
            if temperature > 0:
                tokens = torch.multinomial(((logits - top) / temperature).softmax(-1), 1, generator=generator)
            for out, token in zip(new, tokens[:, 0].tolist()):
                out += [token] if not out or out[-1] not in ends else []
            if len(max(new, key=len)) == max_new_tokens or all(out[-1] in ends for out in new):
                return new
            segments = F.pad(segments, (0, 1))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prepare: Callable[[GPT], object] = lambda model: None,
    ) -> GPT:
        """The model of a checkpoint folder (config.json, safetensors in one file or sharded), in `dtype` on `device`.

        `prepare` gets the model while it has shapes but no memory: there FSDP can share it out among processes, each of
        which then only ever holds its part and one tensor. ValueError lists what does not fit, OSError what is missing.
        """
        folder = Path(folder)
        config = Config.from_json(folder / "config.json")
        entries = {k: entry for k, entry in find_tensors(folder).items() if not k.endswith("rotary_emb.inv_freq")}
        with torch.device("meta"):  # names and shapes alone, all checked before a weight is read
            model = cls(config).to(dtype)
        embedding = entries.get("model.embed_tokens.weight")
        tied = config.tie_word_embeddings and embedding
        head = entries.setdefault("lm_head.weight", embedding) if tied else embedding
        try:  # torch lists all that is missing, unexpected or of another shape
            model.load_state_dict({name: torch.empty(entry.shape, device="meta") for name, entry in entries.items()})
        except RuntimeError as error:
            raise ValueError(f"{folder}: the weights are not those of its config.json: {error}") from None
        odd = [f"{name} {entry.dtype}" for name, entry in entries.items() if not entry.dtype.is_floating_point]
        _require(not odd, f"{folder}: weights that are no floating-point numbers: {', '.join(odd)}")
        same = head is embedding or torch.equal(head.read().double(), embedding.read().double())
        _require(same, f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from the embedding")
        prepare(model)
        model.to_empty(device=device)._tie()  # to_empty makes every parameter anew
        for name, parameter in model.named_parameters():
            value = entries[name].read()
            if isinstance(parameter, DTensor):  # this process's part of it
                value = distribute_tensor(value.to(device, dtype), parameter.device_mesh, parameter.placements)
            parameter.data.copy_(value)
        model.source = folder
        return model

    def save_pretrained(
        self, folder: str | os.PathLike, dtype: torch.dtype = torch.float32, source: str | os.PathLike | None = None
    ) -> None:
        """Write a folder that transformers loads: model.safetensors in `dtype`, config.json, the source's other files.

        source: whose tokenizer, template, licence and config fields go along; by default where the model was loaded
        from. Float32 is the default because bfloat16 rounds late, small updates away. Raises ValueError for weights
        that are not finite in `dtype` and a source that describes another model, OSError where nothing can be written.
        """
        folder, source, config = Path(folder), Path(source) if source else self.source, self.config.to_json()
        folder.mkdir(parents=True, exist_ok=True)
        if source and (source / "config.json").exists():
            same = Config.from_json(source / "config.json") == self.config
            _require(same, f"{source / 'config.json'} describes another model than the one to be saved")
            config = _read_json_object(source / "config.json")
        for key in {"dtype", "torch_dtype"} & config.keys() or ["torch_dtype"]:
            config[key] = str(dtype).removeprefix("torch.")
        tensors = {name: parameter.detach().to(dtype) for name, parameter in self.named_parameters()}
        wrong = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        _require(not wrong, f"not saved, for these are not finite in {dtype}: {', '.join(wrong)}")
        save_safetensors(tensors, folder / SINGLE, {"format": "pt"})
        replace_file(folder / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
        for stale in [folder / INDEX, *folder.glob("model-*-of-*.safetensors")]:
            stale.unlink(missing_ok=True)
        copied = source and source.resolve() != folder.resolve()
        for file in [*source.iterdir(), *source.glob("additional_chat_templates/*.jinja")] if copied else ():
            if file.is_file() and file.name != "config.json" and not file.name.endswith(WEIGHT_FILES):
                (folder / file.relative_to(source)).parent.mkdir(exist_ok=True)
                with open(file, "rb") as old:
                    replace_file(folder / file.relative_to(source), lambda new, old=old: shutil.copyfileobj(old, new))
