"""Checkpoint folders <-> models: config.json and safetensors, read and written.

Everything about families of models, their defaults, spellings and unsupported options is in the tables below. An option
that the model does not have is refused by name and value: a model that silently computes the wrong thing is worse than
an error.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from model import GPT, Config, Linear, RopeScaling
from support.files import check_folder, read_json, replace_file, require, what_is

# ---- config.json -----------------------------------------------------------------------------------------------------

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ABSENT = "not a key of this family"
# fmt: off
KEYS = {  # all keys that change numbers: what is expected, and what an absent key means, as in transformers
    #                           expected           llama    mistral  qwen2    qwen3
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
    "rope_scaling":            ("object or null",  None,    None,    None,    None),
    "hidden_act":              ("silu or swish",   "silu",  "silu",  "silu",  "silu"),
    "tie_word_embeddings":     ("true or false",   False,   False,   False,   False),
    "attention_bias":          ("true or false",   False,   ABSENT,  ABSENT,  False),  # on q, k, v and o
    "mlp_bias":                ("true or false",   False,   ABSENT,  ABSENT,  ABSENT),
    "sliding_window":          ("int > 0 or null", ABSENT,  4096,    4096,    4096),   # keys seen, itself included
    "use_sliding_window":      ("true or false",   ABSENT,  ABSENT,  False,   False),  # Mistral: in all layers, always
    "max_window_layers":       ("int >= 0",        ABSENT,  ABSENT,  28,      28),     # first layer with a window, if
    "layer_types":             ("list or null",    ABSENT,  ABSENT,  None,    None),   # this list does not say it
}
# fmt: on
ROPE = {  # the supported types of RoPE, and the numbers each needs
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
ATTENTION = ("full_attention", "sliding_attention")

# Any other key must be known to change no number, or be off (null, false or empty), or be text. Text is not enough in a
# key whose name suggests that it changes numbers.
CHANGES_NUMBERS = re.compile("act|norm|rope|rotary|quant|clip|scal|bias|expert|moe|mlp|ffn")
OFF = ("None", "False", "[]", "{}")
HARMLESS = re.compile(
    r"""_.*|.*_token_id|.*dropout|.*_pdrop|.*_penalty|.*no_repeat_ngram_size|.*suppress_tokens|return_dict.*|architectures
    |transformers_version|auto_map|dtype|torch_dtype|torchscript|initializer_range|use_cache|id2label|label2id|num_labels
    |task_specific_params|output_hidden_states|output_attentions|output_scores|is_decoder|gradient_checkpointing
    |chunk_size_feed_forward|use_bfloat16|is_llama_config|transformers\.js_config|unsloth_fixed|model_max_length
    |max_sequence_length|max_window_layers|max_length|min_length|do_sample|early_stopping|temperature|top_k|top_p
    |typical_p|num_beams|num_beam_groups|num_return_sequences|bad_words_ids""",
    re.VERBOSE,
)
NEUTRAL = {  # keys that change numbers, but not with these values
    "hidden_activation": (None, "silu"),
    "position_embedding_type": (None, "rope", "rotary"),
    "is_causal": (None, True),
    **dict.fromkeys(["num_experts", "num_local_experts"], (None, 0)),
    **dict.fromkeys(["partial_rotary_factor", "pretraining_tp", "logit_scale", "logits_scaling"], (None, 1)),
    **dict.fromkeys(["embedding_multiplier", "residual_multiplier"], (None, 1)),
}


def _is(expected: str, value: object) -> bool:
    if expected.endswith("null") and value is None:
        return True
    if expected.startswith("int"):
        return type(value) is int and (value > 0 or (value == 0 and "=" in expected)) and value <= 2**28
    if expected.startswith("number"):
        return type(value) in (int, float) and 0 < value < 1e30
    types = {"true or false": bool, "list or null": list, "object or null": dict}
    return type(value) is types[expected] if expected in types else value in expected.split(" or ")


def _changes_nothing(key: str, value: object) -> bool:
    if key in NEUTRAL:
        return value in NEUTRAL[key]
    text = type(value) is str and not CHANGES_NUMBERS.search(key)
    return text or str(value) in OFF or HARMLESS.fullmatch(key) is not None


def read_config(folder: str | os.PathLike) -> Config:
    """The numbers of a folder's config.json.

    ValueError names the file, the key, what was expected and what was found; FileNotFoundError says what the folder is
    instead of a checkpoint.
    """
    path = Path(folder) / "config.json"
    check_folder(path.parent, path.name)
    found = read_json(path)
    try:
        return resolve(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def resolve(found: dict) -> Config:
    """The fields of a config.json as numbers: absent keys mean what they mean in transformers.

    Raises ValueError for a bad value and for a key that is not supported and could change numbers.
    """
    given = dict(found)
    family = given.pop("model_type", None)
    require(family in FAMILIES, f"model_type: expected {', '.join(FAMILIES)}, got {family!r}")
    given |= _one_rope_form(given.pop("rope_scaling", None), given.pop("rope_parameters", None), given)
    always = family == "mistral"  # has its window in all layers, and does not read use_sliding_window
    if not always and given.get("use_sliding_window", family == "llama") is False:
        given = {key: value for key, value in given.items() if key not in ("sliding_window", "max_window_layers")}
    c = dict.fromkeys(KEYS)  # a key that the family does not have stays None
    for key, default in known_keys(family).items():
        c[key], expected = given.pop(key, default), KEYS[key][0]
        require(_is(expected, c[key]), f"{key}: expected {expected}, got {c[key]!r}")

    layers, width, heads = c["num_hidden_layers"], c["hidden_size"], c["num_attention_heads"]
    require(layers <= 1000, f"num_hidden_layers: expected at most 1000, got {layers}")
    divides = width % heads == 0 or family != "llama"
    require(divides, f"num_attention_heads: expected a divisor of hidden_size {width}, got {heads}")
    keys, size = c["num_key_value_heads"] or heads, c["head_dim"] or width // heads
    require(heads % keys == 0, f"num_key_value_heads: expected a divisor of num_attention_heads {heads}, got {keys}")
    origin = "" if c["head_dim"] else f", which is hidden_size {width} // num_attention_heads {heads}"
    require(size > 0 and size % 2 == 0, f"head_dim: expected an even size, as RoPE rotates pairs, got {size}{origin}")
    require(size * heads <= 2**28, f"num_attention_heads {heads} times head_dim {size} is too large (limit 2^28)")

    window = c["sliding_window"] if always or c["use_sliding_window"] else None
    first = 0 if always else c["max_window_layers"]
    kinds = [ATTENTION[window is not None and layer >= first] for layer in range(layers)]
    if given.get("layer_types") == kinds:  # written out, though the family does not read it
        del given["layer_types"]
    kinds = c["layer_types"] if c["layer_types"] is not None else kinds
    fits = len(kinds) == layers and all(kind in ATTENTION[: 1 if window is None else 2] for kind in kinds)
    require(fits, f"layer_types: expected {layers} of {ATTENTION}, the second only if a window is set, got {kinds}")

    for key, value in given.items():
        require(_changes_nothing(key, value), f"{key} is {value!r}, which {family} does not support")
    c |= {"head_dim": size, "num_key_value_heads": keys, "o_bias": bool(c["attention_bias"])}
    c |= {"qkv_bias": c["o_bias"] or family == "qwen2", "qk_norm": family == "qwen3", "mlp_bias": bool(c["mlp_bias"])}
    c["rope_scaling"] = RopeScaling(**c["rope_scaling"]) if c["rope_scaling"] else None
    c["windows"] = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return Config(**{field.name: c[field.name] for field in fields(Config)})


def _one_rope_form(scaling: object, parameters: object, given: dict) -> dict:
    """RoPE in one form, from the old `rope_scaling` (beside `rope_theta`) and the new `rope_parameters` (with it)."""
    for form in (scaling, parameters):
        require(form is None or type(form) is dict, f"RoPE: expected an object, got {form!r}")
    same = scaling == parameters or not (scaling and parameters)
    require(same, f"expected rope_scaling or rope_parameters, got both: {scaling} and {parameters}")
    rope = scaling or parameters or {}
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    known = kind in ROPE and rope.get("type", kind) == kind
    require(known, f"RoPE: expected one type of {', '.join(ROPE)}, got {rope}")
    found = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    for key, value in found.items():
        require(given.get(key, value) == value, f"{key}: expected one value, got {given.get(key)!r} and {value!r}")
    numbers = {key: value for key, value in rope.items() if key not in ("rope_type", "type", *found)}
    fits = numbers.keys() == ROPE[kind] and all(_is("number > 0", number) for number in numbers.values())
    fits = fits and numbers.get("low_freq_factor", 0) < numbers.get("high_freq_factor", 1)
    require(fits, f"RoPE of type {kind}: expected {sorted(ROPE[kind])}, all above 0, low below high, got {rope}")
    return found | {"rope_scaling": {"rope_type": kind, **numbers} if numbers else None}


def known_keys(family: str) -> dict[str, object]:
    """The keys that a family has, with their defaults."""
    column = 1 + FAMILIES.index(family)
    return {key: row[column] for key, row in KEYS.items() if row[column] is not ABSENT}


def config_json(config: Config) -> dict:
    """A config.json that means this model, of the first family that can express it. ValueError if none can."""
    scaling = config.rope_scaling and config.rope_scaling._asdict()
    if scaling:
        scaling = {key: scaling[key] for key in ("rope_type", *sorted(ROPE[scaling["rope_type"]]))}
    window = next((w for w in config.windows if w is not None), None)
    values = vars(config) | {
        "rope_scaling": scaling,
        "attention_bias": config.o_bias,
        "hidden_act": "silu",
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": config.num_hidden_layers,
        "layer_types": [ATTENTION[w is not None] for w in config.windows],
    }
    for family in FAMILIES:
        found = {"architectures": [f"{family.capitalize()}ForCausalLM"], "model_type": family}
        found |= {key: values[key] for key in known_keys(family)}
        with contextlib.suppress(ValueError):  # this family cannot express it
            if resolve(found) == config:
                return found
    raise ValueError(f"expected a model that one of {', '.join(FAMILIES)} can express, got {config}")


# ---- safetensors: 8 bytes of header length, a JSON header, raw little-endian data ------------------------------------

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "U8": torch.uint8}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library


class Entry(NamedTuple):
    """Where a tensor is in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in bytes

    def read(self) -> Tensor:
        """A private, writable copy (an optimizer that updates a read-only map ends the process with SIGSEGV)."""
        size = math.prod(self.shape) * self.dtype.itemsize  # in bytes, because numpy has no bf16
        data = torch.from_numpy(np.fromfile(self.path, np.uint8, size, offset=self.start))
        return (data.view(self.dtype) if size else torch.empty(0, dtype=self.dtype)).reshape(self.shape)


def _unique(pairs: list[tuple]) -> dict:
    keys = [key for key, _ in pairs]
    require(len(keys) == len(set(keys)), f"a name is there twice, which the format forbids, among {keys}")
    return dict(pairs)


def _sizes(found: object) -> bool:
    return type(found) is list and all(type(n) is int and 0 <= n < 2**63 for n in found)


def read_header(path: str | os.PathLike) -> dict[str, Entry]:
    """The tensors of a safetensors file, every number checked. ValueError names the file and the tensor."""
    path, length = Path(path), os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            base = 8 + int.from_bytes(file.read(8), "little")
            fits = 8 <= base <= min(length, 8 + LARGEST_HEADER)
            require(fits, f"expected safetensors, got a header of {base - 8} bytes in a file of {length}: cut short?")
            header = json.loads(file.read(base - 8).decode(), object_pairs_hook=_unique)
        json.dumps(header, ensure_ascii=False).encode()  # lone surrogates are no text
        return _entries(path, header, base, length)
    except (ValueError, RecursionError) as error:
        what = what_is(path)
        raise ValueError(f"{path} is {what}" if what else f"{path}: {error}") from None


def _entries(path: Path, header: object, base: int, length: int) -> dict[str, Entry]:
    """The tensors that a header describes, in a file of `length` bytes whose data start at byte `base`."""
    require(type(header) is dict, f"expected a JSON object as header, got {type(header).__name__}")
    metadata = header.pop("__metadata__", None)
    texts = type(metadata) is dict and all(type(text) is str for text in metadata.values())
    require(metadata is None or texts, f"__metadata__: expected an object of text, got {metadata!r}")
    for name, info in header.items():
        fits = type(info) is dict and _sizes(info.get("shape")) and _sizes(info.get("data_offsets"))
        require(fits, f"tensor {name!r}: expected a shape and data_offsets, both integers from 0, got {info!r}")
        dtype = info.get("dtype")
        require(dtype in list(DTYPES), f"tensor {name!r}: expected a dtype of {', '.join(DTYPES)}, got dtype {dtype!r}")
    entries, end = {}, 0
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, start = DTYPES[info["dtype"]], info["shape"], end
        end += math.prod(shape) * dtype.itemsize
        fits = info["data_offsets"] == [start, end] and all(math.prod(shape[:i]) < 2**64 for i in range(len(shape)))
        require(fits, f"tensor {name!r} of shape {shape}: expected data_offsets {[start, end]}, got {info!r}")
        entries[name] = Entry(path, dtype, tuple(shape), base + start)
    require(base + end == length, f"expected {base + end} bytes for these tensors, got a file of {length}: cut short?")
    return entries


def load_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a file, as private writable copies on the CPU. ValueError says what is wrong with the file."""
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
        check_folder(folder, SINGLE)
        return read_header(folder / SINGLE)
    files = read_json(index).get("weight_map")
    texts = type(files) is dict and all(type(file) is str for file in files.values())
    require(texts, f"{index}: expected a weight_map from names of tensors to names of files")
    for file in files.values():
        parts = PurePosixPath(file).parts
        name = len(file) < 4096 and not set(file) & set("\\:\0")
        inside = parts and name and ".." not in parts and not file.startswith("/")
        require(inside, f"{index}: expected a file of this folder, got {file!r}")
    shards = {}
    for file in sorted(set(files.values())):
        check_folder(folder, file)
        shards[file] = read_header(folder / file)
    absent = [f"{name} in {file}" for name, file in files.items() if name not in shards[file]]
    require(not absent, f"{index} lists tensors that are not there: {', '.join(absent)}")
    return {name: shards[file][name] for name, file in files.items()}


# ---- models ----------------------------------------------------------------------------------------------------------

# Weights of any format and their indices: not copied into a saved folder, whose weights are other ones.
WEIGHT_FILES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")
WEIGHT_FILES += (".ot", ".npz")


def check_model(folder: str | os.PathLike) -> tuple[GPT, dict[str, Entry]]:
    """A folder's model on the meta device (shapes without memory), and where the value of each parameter is.

    Reads config.json and the headers of the weight files, so it takes no time and finds all that can be wrong but the
    numbers themselves. ValueError lists what does not fit, OSError what is missing.
    """
    folder = Path(folder)
    config = read_config(folder)
    entries = {k: entry for k, entry in find_tensors(folder).items() if not k.endswith("rotary_emb.inv_freq")}
    adapter = (folder / "adapter_config.json").exists()  # transformers would add it to the weights
    require(not adapter, f"{folder} also holds a LoRA adapter: merge it (merge_and_unload of peft), or move it away")
    embedding = entries.get(EMBEDDING)
    if config.tie_word_embeddings and embedding:
        entries.setdefault("lm_head.weight", embedding)
    with torch.device("meta"):
        model = GPT(config)
    try:  # torch lists all that is missing, unexpected or of another shape
        model.load_state_dict({name: torch.empty(entry.shape, device="meta") for name, entry in entries.items()})
    except RuntimeError as error:
        first = next((name for name in entries if name.endswith("embed_tokens.weight")), EMBEDDING)
        renamed = f"{first} should be {EMBEDDING} (save the whole AutoModelForCausalLM, without a wrapper around it). "
        hint = renamed if first != EMBEDDING else ""
        raise ValueError(f"{folder}: the weights are not those of its config.json: {hint}{error}") from None
    odd = [f"{name} {entry.dtype}" for name, entry in entries.items() if not entry.dtype.is_floating_point]
    require(not odd, f"{folder}: expected floating-point weights, got {', '.join(odd)}")
    return model, entries


def load_model(
    folder: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prepare: Callable[[GPT], object] = lambda model: None,
    keep_16_bit: bool = False,
) -> GPT:
    """The model of a checkpoint folder (config.json, safetensors in one file or sharded), in `dtype` on `device`.

    prepare: gets the model while it has shapes but no memory. There FSDP can share it out among processes, each of
    which then only ever holds its part and one tensor.
    keep_16_bit: freezes the model (no gradients), and then the matrices of its layers stay in 16 bits where the file
    has them so. They are cast at each use, so the model computes the same bits in half the memory.
    Raises the errors of `check_model`, and ValueError for a tied model with a different head in its file.
    """
    model, entries = check_model(folder)
    head, embedding = entries["lm_head.weight"], entries[EMBEDDING]
    same = not model.config.tie_word_embeddings or head == embedding
    same = same or torch.equal(head.read().double(), embedding.read().double())
    require(same, f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from the embedding")

    model.to(dtype)
    if keep_16_bit:
        model.requires_grad_(False)
        for name, module in model.named_modules():
            stored = entries[f"{name}.weight"].dtype if isinstance(module, Linear) else dtype
            if stored.itemsize == 2 < dtype.itemsize:
                module.weight = nn.Parameter(module.weight.to(stored), requires_grad=False)
    prepare(model)
    model.to_empty(device=device).tie()  # to_empty makes every parameter anew
    for name, parameter in model.named_parameters():
        value = entries[name].read()
        if isinstance(parameter, DTensor):  # this process's part of it
            value = value.to(device, parameter.dtype)
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.data.copy_(value)
    model.folder = str(folder)
    return model


def save_model(
    model: GPT,
    folder: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    source: str | os.PathLike | None = None,
) -> None:
    """Write a folder that transformers loads: model.safetensors in `dtype`, config.json, the source's other files.

    source: the folder whose tokenizer, template, licence and config fields are copied; by default the one that the
    model was loaded from. Float32 is the default because bfloat16 would round small, late updates away.
    Raises ValueError for weights that are not finite in `dtype` and for a source that describes another model, OSError
    if a file cannot be written.
    """
    folder, source = Path(folder), source or model.folder
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
    require(not wrong, f"not saved, because these weights are not finite in {dtype}: {', '.join(wrong)}")
    save_safetensors(tensors, folder / SINGLE, {"format": "pt"})
    replace_file(folder / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
    for stale in [folder / INDEX, *folder.glob("model-*-of-*.safetensors")]:
        stale.unlink(missing_ok=True)
    if source and source.resolve() != folder.resolve():
        for file in [*source.iterdir(), *source.glob("additional_chat_templates/*.jinja")]:
            if file.is_file() and file.name != "config.json" and not file.name.endswith(WEIGHT_FILES):
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                with open(file, "rb") as old:
                    replace_file(copy, lambda new, old=old: shutil.copyfileobj(old, new))
