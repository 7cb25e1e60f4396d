"""Checkpoint folders <-> models: config.json and safetensors, read and written.

Everything about families of models, their defaults, spellings and refusals is in the one table `KEYS`. An option that
the model does not have is refused by name and value: a model that silently computes the wrong thing is worse than an
error.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from model import GPT, Config, RopeScaling
from support.files import read_json, replace_file, require

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


def read_config(folder: str | os.PathLike) -> Config:
    """The numbers of a folder's config.json. ValueError names the file, the key, what was found and what is right."""
    path = Path(folder) / "config.json"
    found = read_json(path)
    try:
        return resolve(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def resolve(found: dict) -> Config:
    """The fields of a config.json as numbers: absent keys mean what they mean in transformers.

    Raises ValueError for a bad value and for a key that is not read here but could change numbers.
    """
    given = dict(found)
    family = given.pop("model_type", None)
    require(family in FAMILIES, f"model_type is {family!r}; it must be one of {', '.join(FAMILIES)}")
    _one_rope_form(given)
    c = dict.fromkeys(KEYS)  # what the family does not know stays None
    for key, default in known_keys(family).items():
        c[key], kind = given.pop(key, default), KEYS[key][0]
        require(_is(kind, c[key]), f"{key} is {c[key]!r}; it must be {kind}")
    for key, value in given.items():
        text = type(value) is str and not TELLING.search(key)
        off = value in NEUTRAL[key] if key in NEUTRAL else text or str(value) in OFF
        harmless = key in HARMLESS or key.startswith("_") or key.endswith(("_token_id", "dropout"))
        require(off or harmless, f"{key} is {value!r}: unknown to {family}, but it could change numbers")

    layers, width, heads = c["num_hidden_layers"], c["hidden_size"], c["num_attention_heads"]
    keys = c["num_key_value_heads"] or heads
    size = c["head_dim"] or width // heads
    fits = width % heads == 0 or family != "llama"
    require(layers <= 1000, f"num_hidden_layers is {layers}; it must be at most 1000")
    require(fits, f"num_attention_heads is {heads}; it must divide hidden_size {width}")
    require(heads % keys == 0, f"num_key_value_heads is {keys}; it must divide num_attention_heads {heads}")
    require(size > 0 and size % 2 == 0, f"head_dim is {size}; it must be even, for RoPE turns pairs")
    require(size * heads <= 2**28, f"num_attention_heads {heads} times head_dim {size} is too large (limit 2^28)")

    always = family == "mistral"
    window = c["sliding_window"] if always or c["use_sliding_window"] else None
    first = 0 if always else c["max_window_layers"]
    kinds = c["layer_types"]
    if kinds is None:
        kinds = [ATTENTION[window is not None and layer >= first] for layer in range(layers)]
    fits = len(kinds) == layers and all(kind in ATTENTION[: 1 if window is None else 2] for kind in kinds)
    require(fits, f"layer_types is {kinds}; needed: {layers} of {ATTENTION}, the second only if a window is set")
    return Config(
        vocab_size=c["vocab_size"],
        hidden_size=width,
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=size,
        max_position_embeddings=c["max_position_embeddings"],
        rms_norm_eps=c["rms_norm_eps"],
        rope_theta=c["rope_theta"],
        rope_scaling=RopeScaling(**c["rope_scaling"]) if c["rope_scaling"] else None,
        tie_word_embeddings=c["tie_word_embeddings"],
        qkv_bias=family == "qwen2" or bool(c["attention_bias"]),
        o_bias=bool(c["attention_bias"]),
        mlp_bias=bool(c["mlp_bias"]),
        qk_norm=family == "qwen3",
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
    )


def known_keys(family: str) -> dict[str, object]:
    """The keys that a family knows, with their defaults."""
    column = 1 + FAMILIES.index(family)
    return {key: row[column] for key, row in KEYS.items() if row[column] is not NO}


def config_json(config: Config) -> dict:
    """A config.json that means this model, of the first family that can say it. ValueError where none can."""
    scaling = config.rope_scaling
    window = next((w for w in config.windows if w is not None), None)
    numbers = vars(config) | {
        "rope_scaling": {k: v for k, v in scaling._asdict().items() if k in ("rope_type", *ROPE[scaling.rope_type])}
        if scaling
        else None,
        "attention_bias": config.o_bias,
        "hidden_act": "silu",
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": config.num_hidden_layers,
        "layer_types": [ATTENTION[w is not None] for w in config.windows],
    }
    for family in FAMILIES:
        found = {"architectures": [f"{family.capitalize()}ForCausalLM"], "model_type": family}
        found |= {key: numbers[key] for key in known_keys(family)}
        if resolve(found) == config:
            return found
    raise ValueError(f"no family of {', '.join(FAMILIES)} has a model like {config}")


def _one_rope_form(given: dict) -> None:
    """Turn `rope_parameters` (new) and `type` (old) into `rope_theta` and `rope_scaling` with `rope_type`, in place."""
    old, new = given.get("rope_scaling") or {}, given.pop("rope_parameters", None) or {}
    one = type(old) is type(new) is dict and (old == new or not (old and new))
    require(one, f"rope_scaling is {old!r} and rope_parameters {new!r}; one object must say it, or both the same")
    rope = dict(old or new)
    for key in ("rope_theta", "partial_rotary_factor"):
        same = key not in rope or given.setdefault(key, rope[key]) == rope.pop(key)
        require(same, f"{key} is {given.get(key)!r}, but something else in {old or new}")
    kind = str(rope.pop("rope_type", rope.get("type", "default")))
    one = rope.pop("type", kind) == kind and kind in ROPE
    require(one, f"{old or new}: RoPE must be of one type, and that one of {list(ROPE)}")
    fits = rope.keys() == ROPE[kind] and all(_is("number > 0", number) for number in rope.values())
    fits = fits and rope.get("low_freq_factor", 0) < rope.get("high_freq_factor", 1)
    require(fits, f"{old or new}: RoPE of type {kind!r} takes {sorted(ROPE[kind])}, all above 0, low below high")
    given["rope_scaling"] = {"rope_type": kind, **rope} if rope else None


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

    def check(ok: bool, otherwise: object) -> None:
        require(ok, f"{path}: {otherwise}")

    def unique(pairs: list[tuple]) -> dict:
        keys = [key for key, _ in pairs if key in ("dtype", "shape", "data_offsets", "__metadata__")]
        check(len(keys) == len(set(keys)), f"a key twice in {keys}")
        return dict(pairs)

    def sizes(found: object) -> bool:
        return type(found) is list and all(type(n) is int and 0 <= n < 2**63 for n in found)

    path, length = Path(path), os.path.getsize(path)
    with open(path, "rb") as file:
        base = 8 + int.from_bytes(file.read(8), "little")
        check(8 <= base <= min(length, 8 + 100_000_000), f"header of {base - 8} bytes, file of {length}: cut short?")
        try:
            hooks = {
                "parse_constant": lambda nan: check(False, nan),
                "parse_int": lambda n: int(n) if n != "-0" else -1,
            }
            header = json.loads(file.read(base - 8).decode(), object_pairs_hook=unique, **hooks)
            json.dumps(header, ensure_ascii=False).encode()  # lone surrogates are no text
        except (ValueError, RecursionError) as error:
            check(False, f"bad header: {error}")
    check(type(header) is dict, "the header is no JSON object")
    metadata = header.pop("__metadata__", None)
    texts = type(metadata) is dict and all(type(text) is str for text in metadata.values())
    check(metadata is None or texts, f"__metadata__ must map text to text, is {metadata!r}")
    for name, info in header.items():
        fits = type(info) is dict and sizes(info.get("shape")) and sizes(info.get("data_offsets"))
        check(fits, f"tensor {name!r} needs a shape and data_offsets of integers from 0, has {info!r}")
        dtype = info.get("dtype")
        check(dtype in list(DTYPES), f"tensor {name!r} has dtype {dtype!r}; readable are {list(DTYPES)}")
    entries, end = {}, 0
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, start = DTYPES[info["dtype"]], info["shape"], end
        end += math.prod(shape) * dtype.itemsize
        fits = info["data_offsets"] == [start, end] and all(math.prod(shape[:i]) < 2**64 for i in range(len(shape)))
        check(fits, f"tensor {name!r} after {start} bytes of data needs data_offsets [{start}, {end}], has {info!r}")
        entries[name] = Entry(path, dtype, tuple(shape), base + start)
    check(base + end == length, f"the tensors end at byte {base + end}, the file at {length}")
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


def find_tensors(folder: Path) -> dict[str, Entry]:
    """The tensors of a checkpoint folder: those of its single file, else of its shards, as the index lists them."""
    index = folder / INDEX
    if (folder / SINGLE).exists() or not index.exists():
        return read_header(folder / SINGLE)
    files = read_json(index).get("weight_map")
    texts = type(files) is dict and all(type(file) is str for file in files.values())
    require(texts, f"{index}: weight_map must map names of tensors to names of files")
    for file in files.values():
        parts = PurePosixPath(file).parts
        name = len(file) < 4096 and not set(file) & set("\\:\0")
        inside = parts and name and ".." not in parts and not file.startswith("/")
        require(inside, f"{index}: {file!r} is no file of this folder")
    shards = {file: read_header(folder / file) for file in sorted(set(files.values()))}
    absent = [f"{name} in {file}" for name, file in files.items() if name not in shards[file]]
    require(not absent, f"{index} lists tensors that are not there: {', '.join(absent)}")
    return {name: shards[file][name] for name, file in files.items()}


# ---- models ----------------------------------------------------------------------------------------------------------


def load_model(
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
    config = read_config(folder)
    entries = {k: entry for k, entry in find_tensors(folder).items() if not k.endswith("rotary_emb.inv_freq")}
    with torch.device("meta"):  # names and shapes alone, all checked before a weight is read
        model = GPT(config).to(dtype)
    embedding = entries.get("model.embed_tokens.weight")
    tied = config.tie_word_embeddings and embedding
    head = entries.setdefault("lm_head.weight", embedding) if tied else embedding
    try:  # torch lists all that is missing, unexpected or of another shape
        model.load_state_dict({name: torch.empty(entry.shape, device="meta") for name, entry in entries.items()})
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights are not those of its config.json: {error}") from None
    odd = [f"{name} {entry.dtype}" for name, entry in entries.items() if not entry.dtype.is_floating_point]
    require(not odd, f"{folder}: weights that are no floating-point numbers: {', '.join(odd)}")
    same = head is embedding or torch.equal(head.read().double(), embedding.read().double())
    require(same, f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from the embedding")
    prepare(model)
    model.to_empty(device=device).tie()  # to_empty makes every parameter anew
    for name, parameter in model.named_parameters():
        value = entries[name].read()
        if isinstance(parameter, DTensor):  # this process's part of it
            value = distribute_tensor(value.to(device, dtype), parameter.device_mesh, parameter.placements)
        parameter.data.copy_(value)
    model.source = str(folder)
    return model


def save_model(
    model: GPT,
    folder: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    source: str | os.PathLike | None = None,
) -> None:
    """Write a folder that transformers loads: model.safetensors in `dtype`, config.json, the source's other files.

    source: whose tokenizer, template, licence and config fields go along; by default where the model was loaded
    from. Float32 is the default because bfloat16 rounds late, small updates away. Raises ValueError for weights
    that are not finite in `dtype` and a source that describes another model, OSError where nothing can be written.
    """
    folder, source = Path(folder), source or model.source
    source = Path(source) if source else None
    folder.mkdir(parents=True, exist_ok=True)
    if source and (source / "config.json").exists():
        same = read_config(source) == model.config
        require(same, f"{source / 'config.json'} describes another model than the one to be saved")
        config = read_json(source / "config.json")
    else:
        config = config_json(model.config)
    for key in {"dtype", "torch_dtype"} & config.keys() or ["torch_dtype"]:
        config[key] = str(dtype).removeprefix("torch.")
    tensors = {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}
    wrong = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    require(not wrong, f"not saved, for these are not finite in {dtype}: {', '.join(wrong)}")
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
