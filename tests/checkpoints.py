"""Tiny random checkpoint folders of every family, as transformers reads them: the oracle of test_model.py."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch

from model import Config
from support.checkpoint import resolve

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]
LEAVE_OUT = "leave this key out"

# Every key of config.json that changes numbers, off its default; one dictionary per folder.
VARIANTS: dict[str, dict] = {
    "llama": {"model_type": "llama"},
    "llama-default-kv": {"model_type": "llama", "num_key_value_heads": LEAVE_OUT},
    "llama-null-kv": {"model_type": "llama", "num_key_value_heads": None},
    "llama-one-kv": {"model_type": "llama", "num_key_value_heads": 1},
    "llama-head-dim": {"model_type": "llama", "head_dim": 16},
    "llama-null-head-dim": {"model_type": "llama", "head_dim": None},
    "llama-attention-bias": {"model_type": "llama", "attention_bias": True},
    "llama-mlp-bias": {"model_type": "llama", "mlp_bias": True},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-eps": {"model_type": "llama", "rms_norm_eps": 0.05},
    "llama-swish": {"model_type": "llama", "hidden_act": "swish"},
    "llama-theta": {"model_type": "llama", "rope_theta": 20.0},
    "llama-theta-new": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 20.0}},
    "llama-theta-both": {
        "model_type": "llama",
        "rope_theta": 20.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20.0},
    },
    "llama-linear-old": {"model_type": "llama", "rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama-linear-new": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0},
    },
    "llama-llama3": {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
    "llama-llama3-old": {"model_type": "llama", "rope_scaling": {"type": "llama3"} | LLAMA3},
    "llama-llama3-new": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0} | LLAMA3,
    },
    "llama-rope-null": {"model_type": "llama", "rope_scaling": None},
    "mistral": {"model_type": "mistral"},
    "mistral-window": {"model_type": "mistral", "sliding_window": 5},
    "mistral-null-window": {"model_type": "mistral", "sliding_window": None},
    "mistral-head-dim": {"model_type": "mistral", "head_dim": 16, "sliding_window": 1},
    "mistral-default-kv": {"model_type": "mistral", "num_attention_heads": 8, "num_key_value_heads": LEAVE_OUT},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-head-dim": {"model_type": "qwen2", "head_dim": 16},
    "qwen2-window-unused": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 5},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen2-window-all": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
    },
    "qwen2-window-default-layers": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5},
    "qwen2-window-null": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": None,
        "max_window_layers": 0,
    },
    "qwen2-layer-types": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ALTERNATE,
    },
    "qwen3": {"model_type": "qwen3"},
    "qwen3-head-dim": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-attention-bias": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "qwen3-window": {
        "model_type": "qwen3",
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ALTERNATE,
    },
    "qwen3-default-kv": {
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "head_dim": 8,
        "num_key_value_heads": LEAVE_OUT,
    },
}
# One folder per family, and one with a window for each family that has windows.
FAMILIES = ["llama-llama3", "mistral-null-window", "mistral-window", "qwen2", "qwen2-window", "qwen3", "qwen3-window"]


def fields(variant: str) -> dict:
    """What stands in the config.json of a variant."""
    return {key: value for key, value in (SMALL | VARIANTS[variant]).items() if value != LEAVE_OUT}


def write_config(folder: Path, content: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


def write_checkpoint(folder: Path, content: dict, seed: int = 0) -> Path:
    """config.json as given and random weights, of a size at which every part of the model shows in its logits."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    write_config(folder, content)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.25 * noise)
    save_file(
        {name: p.detach() for name, p in model.named_parameters()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def oracle(folder: Path, **options):
    """The model of a folder in transformers, with plain (eager) attention, and what it said while loading."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )


MADE = tempfile.TemporaryDirectory()


@functools.cache
def folder_of(variant: str) -> Path:
    """The checkpoint folder of a variant, made once; not to be changed."""
    return write_checkpoint(Path(MADE.name) / variant, fields(variant))


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the scale of what is wanted."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def rows(vocabulary: int = 61, shape: tuple[int, ...] = (2, 24), seed: int = 1) -> torch.Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def rewrite(folder: Path, **changes) -> Path:
    content = json.loads((folder / "config.json").read_text()) | changes
    return write_config(folder, content).parent


def small_config(**more) -> Config:
    return resolve({"model_type": "llama"} | SMALL | more)
