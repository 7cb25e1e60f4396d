"""support/checkpoint.py: config.json, weights and folders, read and written, compared with transformers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from model import GPT, Config, RopeScaling
from support.checkpoint import (
    INDEX,
    KEYS,
    SINGLE,
    Entry,
    check_model,
    config_json,
    load_model,
    load_safetensors,
    read_config,
    resolve,
    save_model,
    save_safetensors,
)
from tests.checkpoints import (
    ALTERNATE,
    FAMILIES,
    LLAMA3,
    SMALL,
    VARIANTS,
    far,
    folder_of,
    oracle,
    rewrite,
    rows,
    small_config,
    write_checkpoint,
    write_config,
)

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture
def own(tmp_path):
    """A function from the name of a variant to a folder that the test may change."""
    return lambda variant: Path(shutil.copytree(folder_of(variant), tmp_path / variant))


# ---- config.json ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_folders_that_transformers_saved(variant, tmp_path):
    wanted = oracle(folder_of(variant))[0]
    wanted.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).exists()
    model = load_model(tmp_path)
    assert model.config == load_model(folder_of(variant)).config
    assert far(model(rows()), wanted(rows()).logits) < 1e-5


WAYS = {  # in which transformers writes a config.json
    "save_pretrained": lambda config, folder: config.save_pretrained(folder),
    "to_json_file": lambda config, folder: config.to_json_file(folder / "config.json", use_diff=False),
    "to_json_file, differences": lambda config, folder: config.to_json_file(folder / "config.json", use_diff=True),
    "to_dict": lambda config, folder: write_config(folder, config.to_dict()),
    "to_diff_dict": lambda config, folder: write_config(folder, config.to_diff_dict()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_config_json_in_every_way_of_transformers(variant, way, tmp_path):
    """The same numbers, so the same logits as in test_model.py."""
    WAYS[way](transformers.AutoConfig.from_pretrained(folder_of(variant)), tmp_path)
    assert read_config(tmp_path) == read_config(folder_of(variant))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_config_json_with_options_that_change_no_number(family, way, tmp_path):
    """All that transformers' own base class writes, off its defaults, beside the family's."""
    more = {"output_hidden_states": True, "output_attentions": True, "return_dict": False, "num_labels": 3}
    more |= {"chunk_size_feed_forward": 4, "problem_type": "regression", "use_cache": False, "attention_dropout": 0.1}
    more |= {"initializer_range": 0.5, "pad_token_id": 3, "eos_token_id": [4, 5], "architectures": ["X"]}
    config = transformers.AutoConfig.for_model(family, **(SMALL | {"head_dim": 16} | more))
    plain = write_checkpoint(tmp_path / "plain", SMALL | {"model_type": family, "head_dim": 16})
    folder = tmp_path / "written"
    folder.mkdir()
    shutil.copy(plain / SINGLE, folder / SINGLE)
    WAYS[way](config, folder)
    written = json.loads((folder / "config.json").read_text())
    assert set(more) <= written.keys() | {"num_labels"}  # or this test says nothing
    assert far(load_model(folder)(rows()), oracle(plain)[0](rows()).logits) < 1e-5


@pytest.mark.parametrize("window", [5, 0, -1, None, 4.5, "4096", 10**9])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_window_that_is_not_used_may_be_anything(family, window, tmp_path):
    unused = {"use_sliding_window": False, "sliding_window": window, "max_window_layers": window}
    for off in (unused, {"use_sliding_window": False, "sliding_window": window}):
        found = resolve(SMALL | {"model_type": family} | off)
        assert found == resolve(SMALL | {"model_type": family})
    if family != "llama":
        assert resolve(SMALL | {"model_type": family, "sliding_window": window}) == found  # off is their default


def test_rope_given_in_both_forms_alike():
    rope = {"rope_type": "linear", "factor": 2.0}
    assert small_config(rope_scaling=rope, rope_parameters=rope) == small_config(rope_scaling=rope) != small_config()


def test_layer_types_that_only_repeat_what_the_family_does():
    full, sliding = ["full_attention"] * 3, ["sliding_attention"] * 3
    assert small_config(layer_types=full) == small_config()
    for window, right, wrong in ((4, sliding, full), (None, full, sliding)):
        mistral = {"model_type": "mistral", "sliding_window": window}
        assert small_config(**mistral, layer_types=right) == small_config(**mistral)
        with pytest.raises(ValueError, match="layer_types"):
            small_config(**mistral, layer_types=wrong)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_an_absent_key_means_what_it_means_in_transformers(family, tmp_path):
    path = write_config(tmp_path, {"model_type": family})
    found, wanted = read_config(path.parent), transformers.AutoConfig.from_pretrained(tmp_path)
    for key in KEYS:
        if key == "rope_theta":
            assert found.rope_theta == wanted.rope_parameters["rope_theta"]
        elif key not in ("rope_scaling", "head_dim") and hasattr(found, key) and hasattr(wanted, key):
            assert getattr(found, key) == getattr(wanted, key), key
    assert found.o_bias == getattr(wanted, "attention_bias", False)
    assert found.head_dim == getattr(wanted, "head_dim", wanted.hidden_size // wanted.num_attention_heads)
    assert found.windows == (4096 if family == "mistral" else None,) * 32


REFUSED = [
    ("llama", {"model_type": "gpt2"}, "gpt2"),
    ("llama", {"model_type": None}, "model_type"),
    ("llama", {"model_type": ["llama"]}, "model_type"),
    ("llama", {"hidden_act": "gelu"}, "gelu"),
    ("llama", {"hidden_act": None}, "hidden_act"),
    ("llama", {"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation"),
    ("llama", {"position_embedding_type": "alibi"}, "alibi"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    ("llama", {"tie_word_embeddings": None}, "tie_word_embeddings"),
    ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    ("llama", {"attention_bias": 1}, "attention_bias"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"sliding_window": 4}, "sliding_window"),
    ("llama", {"layer_types": ALTERNATE}, "layer_types"),
    ("mistral", {"layer_types": ALTERNATE}, "layer_types"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("mistral", {"sliding_window": -1}, "sliding_window"),
    ("mistral", {"sliding_window": 4.0}, "sliding_window"),
    ("qwen2", {"use_sliding_window": None}, "use_sliding_window"),
    ("qwen2", {"max_window_layers": None, "use_sliding_window": True}, "max_window_layers"),
    ("qwen2", {"max_window_layers": -1, "use_sliding_window": True}, "max_window_layers"),
    ("qwen2", {"layer_types": ALTERNATE}, "layer_types"),
    ("qwen2", {"layer_types": ALTERNATE, "use_sliding_window": True, "sliding_window": None}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("qwen2", {"layer_types": []}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention", "full_attention", "linear_attention"]}, "linear_attention"),
    ("qwen2", {"layer_types": ["full_attention", "full_attention", ["full_attention"]]}, "layer_types"),
    ("qwen3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
    ("llama", {"vocab_size": 0}, "vocab_size"),
    ("llama", {"vocab_size": None}, "vocab_size"),
    ("llama", {"vocab_size": "61"}, "vocab_size"),
    ("llama", {"hidden_size": 32.0}, "hidden_size"),
    ("llama", {"hidden_size": True}, "hidden_size"),
    ("llama", {"hidden_size": 33}, "hidden_size"),
    ("llama", {"hidden_size": 2, "num_attention_heads": 4}, "hidden_size"),
    ("qwen2", {"hidden_size": 2, "num_attention_heads": 4}, "head_dim"),
    ("llama", {"intermediate_size": -40}, "intermediate_size"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads"),
    ("llama", {"num_key_value_heads": 8}, "num_key_value_heads"),
    ("llama", {"head_dim": 7}, "head_dim"),
    ("llama", {"head_dim": 0}, "head_dim"),
    ("llama", {"head_dim": 2**28}, "head_dim"),
    ("llama", {"max_position_embeddings": -1}, "max_position_embeddings"),
    ("llama", {"max_position_embeddings": None}, "max_position_embeddings"),
    ("llama", {"rope_theta": None}, "rope_theta"),
    ("llama", {"rope_theta": 0}, "rope_theta"),
    ("llama", {"rope_theta": 10**400}, "rope_theta"),
    ("llama", {"rope_theta": -10000.0}, "rope_theta"),
    ("llama", {"rope_theta": "10000"}, "rope_theta"),
    ("llama", {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    ("llama", {"rope_parameters": {"rope_type": None, "rope_theta": 1e4}}, "None"),
    ("llama", {"rope_parameters": {"rope_type": ["linear"], "factor": 2.0}}, "linear"),
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}, "type"),
    ("llama", {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 2.0}}, "dynamic"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": True}}, "factor"),
    ("llama", {"rope_scaling": {"factor": 2.0}}, "factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 3.0}}, "attention_factor"),
    ("llama", {"rope_scaling": {"rope_type": "llama3"} | LLAMA3 | {"low_freq_factor": 4.0}}, "low"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ("llama", {"rope_scaling": "linear"}, "linear"),
    ("llama", {"rope_scaling": ["linear", 2.0]}, "linear"),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        "rope_parameters",
    ),
    ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, "full_attention"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp"),
    ("llama", {"is_causal": False}, "is_causal"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ("llama", {"quantization_config": "gptq"}, "quantization_config"),
    ("llama", {"activation_function": "gelu"}, "activation_function"),
    ("qwen2", {"rope_type": "yarn"}, "rope_type"),
    ("llama", {"clip_qkv": "8"}, "clip_qkv"),
    ("llama", {"clip_qkv": 8.0}, "clip_qkv"),
    ("llama", {"logit_scale": 0.5}, "logit_scale"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("llama", {"residual_multiplier": 0.2}, "residual_multiplier"),
    ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ("llama", {"attention_multiplier": 0.01}, "attention_multiplier"),
    ("llama", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar"),
    ("llama", {"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
    ("llama", {"use_qk_norm": True}, "use_qk_norm"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved"),
    ("llama", {"num_experts": 8}, "num_experts"),
    ("llama", {"original_max_position_embeddings": 64}, "original_max_position_embeddings"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder"),
]


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_not_computed_is_refused_by_name(family, changes, named, tmp_path):
    path = write_config(tmp_path, SMALL | {"model_type": family} | changes)
    with pytest.raises(ValueError) as error:
        read_config(path.parent)
    found, _, what = str(error.value).partition(": ")
    assert found == str(path) and named in what
    value = next(iter(changes.values()))
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        assert str(value) in what


# config.json as published with well-known checkpoints, and what must come of them.
PUBLISHED = {
    "Llama-3.2-1B": (
        """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0,
        "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256}""",
        {"num_key_value_heads": 8, "tie_word_embeddings": True, "rope_theta": 500000.0},
    ),
    "SmolLM2-135M-Instruct": (
        """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
        "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3", "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "use_cache": true, "vocab_size": 49152}""",
        {"head_dim": 64, "rope_scaling": None},
    ),
    "Mistral-7B-Instruct-v0.2": (
        """{"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.36.0", "use_cache": true,
        "vocab_size": 32000}""",
        {"windows": (None,) * 32, "o_bias": False},
    ),
    "Mistral-7B-v0.1": (
        """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}""",
        {"windows": (4096,) * 32},
    ),
    "Qwen2.5-0.5B-Instruct": (
        """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
        {"windows": (None,) * 24, "head_dim": 64},
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02,
        "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 21, "model_type": "qwen2",
        "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.44.0", "use_cache": true, "use_mrope": false, "use_sliding_window": false,
        "vocab_size": 151936}""",
        {"windows": (None,) * 28},
    ),
    "Qwen3-0.6B": (
        """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
        {"head_dim": 128, "windows": (None,) * 28},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_accepted(name, tmp_path):
    text, wanted = PUBLISHED[name]
    (tmp_path / "config.json").write_text(text)
    config = read_config(tmp_path)
    assert {key: getattr(config, key) for key in wanted} == wanted


def test_what_changes_no_number_is_accepted(tmp_path):
    plain = read_config(write_config(tmp_path, SMALL | {"model_type": "llama"}).parent)
    harmless = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": 2,
        "attention_dropout": 0.1,
        "resid_pdrop": 0.1,
        "hidden_dropout": 0.1,
        "initializer_range": 0.041666,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.48.0",
        "_name_or_path": "x",
        "_attn_implementation_autoset": True,
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"dtype": "q4"},
        "unsloth_version": "2024.9",
        "attn_implementation": "sdpa",
        "license": "apache-2.0",
        "pretraining_tp": 1,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
        "final_logit_softcapping": None,
        "sliding_window": None,
        "layer_types": None,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
        "rope_theta": 10000,
        "rope_parameters": {"rope_theta": 10000, "rope_type": "default", "partial_rotary_factor": 1.0},
        "temperature": 0.7,
        "max_length": 20,
        "self": "x",
    }
    assert read_config(write_config(tmp_path, SMALL | {"model_type": "llama"} | harmless).parent) == plain


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"llama"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"model_type": "llama",}',
        b'{"vocab_size": 61}',
    ],
)
def test_a_config_that_is_no_json_object(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path)


def test_bad_arguments_by_hand():
    with pytest.raises(ValueError, match="sliding_window"):
        small_config(sliding_window=4)
    with pytest.raises(ValueError, match="hidden"):
        small_config(hidden=4)
    with pytest.raises(ValueError, match="head_dim"):
        small_config(hidden_size=4)


# ---- weights -------------------------------------------------------------------------------------------------------


def change_weights(folder: Path, change) -> Path:
    tensors = load_safetensors(folder / SINGLE)
    change(tensors)
    save_safetensors(tensors, folder / SINGLE, {"format": "pt"})
    return folder


def shard(folder: Path, pieces: int = 3) -> dict:
    """Spread the single file over shards with an index; returns the index's weight_map."""
    tensors = load_safetensors(folder / SINGLE)
    names, weight_map = list(tensors), {}
    for i in range(pieces):
        file = f"model-{i + 1:05}-of-{pieces:05}.safetensors"
        save_safetensors({name: tensors[name] for name in names[i::pieces]}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::pieces], file)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return weight_map


def test_all_that_does_not_fit_is_in_one_error(own):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(40, 32)
        name = "model.layers.2.mlp.down_proj.weight"
        tensors[name] = tensors[name].t().contiguous()  # the right size in a wrong shape

    folder = change_weights(own("llama"), change)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    for named in (
        str(folder),
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.7.mlp.up_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    ):
        assert named in str(error.value)


@pytest.mark.parametrize(
    "old, new",
    [("model.", ""), ("", "module."), ("", "_orig_mod."), ("", "base_model.model."), ("model.", "model.lm.")],
)
def test_weights_saved_with_or_without_a_wrapper_are_named(own, old, new):
    """Of a model without its head (AutoModel), or wrapped by DDP, torch.compile or peft."""

    def rename(tensors):
        for name in list(tensors):
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    folder, name = own("llama-tied"), "model.embed_tokens.weight"
    change_weights(folder, rename)
    given = new + name.removeprefix(old)
    with pytest.raises(ValueError, match=re.escape(f"config.json: {given} should be {name} (save the whole AutoModel")):
        load_model(folder)


def test_weights_with_the_right_names_get_no_hint_about_them(own):
    folder = change_weights(own("llama"), lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert "should be" not in str(error.value)


def test_a_missing_head_is_an_error_when_it_is_not_tied(own):
    folder = change_weights(own("llama"), lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load_model(folder)
    model = load_model(rewrite(folder, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_may_be_in_the_file_if_it_is_equal(own):
    folder = own("llama-tied")
    wanted = load_model(folder)(rows())

    def same(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def different(tensors):
        tensors["lm_head.weight"][3, 4] += 1e-6

    model = load_model(change_weights(folder, same))
    assert torch.equal(model(rows()), wanted) and model.lm_head.weight is model.model.embed_tokens.weight
    change_weights(folder, different)
    for dtype in (torch.float32, torch.bfloat16):  # rounding must not hide it
        with pytest.raises(ValueError, match=r"lm_head\.weight"):
            load_model(folder, dtype)
    change_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    change_weights(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight"):
        load_model(folder)


def test_old_buffers_are_ignored_and_integers_are_no_weights(own):
    folder = own("llama")
    wanted = load_model(folder)(rows())

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.rotary_emb.inv_freq"] = torch.ones(4)

    assert torch.equal(load_model(change_weights(folder, add))(rows()), wanted)
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load_model(folder)
    change_weights(folder, lambda tensors: tensors.update({"model.layers.0.attn.masked_bias": torch.ones(1)}))
    with pytest.raises(ValueError, match="masked_bias"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes_become_float32(dtype, own):
    def cast(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    folder = change_weights(own("qwen3-head-dim"), cast)
    model = load_model(folder)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, load_safetensors(folder / SINGLE)[name].float())


def test_loaded_weights_are_private_and_can_be_trained(own):
    folder = own("llama-tied")
    before = (folder / SINGLE).read_bytes()
    model = load_model(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(rows()).square().mean().backward()
    optimizer.step()
    assert (folder / SINGLE).read_bytes() == before
    assert not torch.equal(model.lm_head.weight, load_model(folder).lm_head.weight)


def test_shards_as_the_index_lists_them(own):
    folder = own("qwen2")
    wanted = load_model(folder)(rows())
    weight_map = shard(folder)
    index = {"weight_map": weight_map}
    # not in the index, so not read: a stray file that is no safetensors, and a second copy of a tensor in a shard
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"no safetensors")
    name, file = next(iter(weight_map.items()))
    other = next(shard for shard in weight_map.values() if shard != file)
    tensors = load_safetensors(folder / other)
    save_safetensors(tensors | {name: torch.zeros(61, 32)}, folder / other, {"format": "pt"})
    assert torch.equal(load_model(folder)(rows()), wanted)

    def broken(change: dict, named: str, kind=ValueError):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | change}))
        with pytest.raises(kind, match=named):
            load_model(folder)

    broken({name: "model-00007-of-00007.safetensors"}, "expected model-00007-of-00007.safetensors in this", OSError)
    broken({"model.norm.weight": file}, r"model\.norm\.weight") if weight_map["model.norm.weight"] != file else None
    broken({"model.more.weight": file}, r"model\.more\.weight")
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / file, outside)
    upwards = ("../outside.safetensors", str(outside), "a/../../outside.safetensors", "..\\outside.safetensors")
    for path in (*upwards, "", "a\0b", "a" * 10**6):
        broken({name: path}, "a file of this folder")
    broken({name: "\ud800"}, "index.json: expected JSON in UTF-8")
    for content in ({}, {"weight_map": None}, {"weight_map": [file]}, {"weight_map": {name: 1}}, []):
        (folder / INDEX).write_text(json.dumps(content))
        with pytest.raises(ValueError, match="index"):
            load_model(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if k != name}}))
    with pytest.raises(ValueError, match=name):  # in a shard, but not in the index
        load_model(folder)
    (folder / INDEX).write_text(json.dumps(index))
    assert torch.equal(load_model(folder)(rows()), wanted)


def test_a_single_file_wins_over_an_index(own):
    folder = own("llama")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "nowhere.safetensors"}}))
    assert torch.equal(load_model(folder)(rows()), load_model(folder_of("llama"))(rows()))


def test_a_folder_without_weights_or_config(tmp_path):
    for read in (load_model, check_model):
        with pytest.raises(OSError, match=r"expected config\.json in this folder, got no files"):
            read(tmp_path)
    write_config(tmp_path, SMALL | {"model_type": "llama"})
    for read in (load_model, check_model):
        with pytest.raises(OSError, match=r"expected model\.safetensors in this folder, got config\.json"):
            read(tmp_path)


def test_an_adapter_beside_the_weights_is_not_passed_over(own):
    """transformers would add it to them."""
    folder = own("llama")
    (folder / "adapter_config.json").write_text("{}")
    for read in (load_model, check_model):
        with pytest.raises(ValueError, match=f"^{re.escape(str(folder))} also holds a LoRA adapter: merge it"):
            read(folder)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 269060552\n"


@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX, "model-00002-of-00003.safetensors"])
def test_a_git_lfs_pointer_is_named_before_any_weight_is_read(name, own):
    folder = own("llama")
    if name not in ("config.json", SINGLE):
        shard(folder)
    (folder / name).write_bytes(LFS)
    with pytest.raises(ValueError) as error:
        check_model(folder)
    assert str(error.value).startswith(f"{folder / name} is a Git LFS pointer") and "git lfs pull" in str(error.value)


def test_check_model_finds_what_load_model_would_without_reading_a_weight(own, monkeypatch):
    folder = own("llama-tied")
    monkeypatch.setattr(Entry, "read", lambda entry: pytest.fail("a weight was read"))
    model, entries = check_model(folder)
    assert {p.device.type for p in model.parameters()} == {"meta"} and model.config == read_config(folder)
    assert entries.keys() == model.state_dict().keys()
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        check_model(folder)
    rewrite(folder := own("qwen2"), vocab_size=62)
    with pytest.raises(ValueError, match="weights are not those"):
        check_model(folder)


# ---- the reference in its file's dtype --------------------------------------------------------------------------


def stored_in(dtype: torch.dtype, variant: str, folder: Path) -> Path:
    """A copy of a variant with its weights in `dtype`."""

    def cast(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    return change_weights(Path(shutil.copytree(folder_of(variant), folder)), cast)


def pair_rows() -> tuple[torch.Tensor, ...]:
    """tokens, positions, segments of two rows [prompt | chosen | rejected | padding]."""
    segments = torch.tensor([[0] * 9 + [1] * 7 + [2] * 5 + [-1] * 3, [0] * 4 + [1] * 12 + [2] * 8])
    places = torch.arange(24).expand(2, 24)
    return rows(), places - (segments == 2) * torch.tensor([[7], [12]]), segments


@pytest.mark.parametrize("variant", [*FAMILIES, "llama-tied", "qwen3-attention-bias", "llama-mlp-bias"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_weights_kept_in_16_bits_give_the_same_bits(variant, stored, tmp_path):
    """Hidden states and logits, without autocast and under both kinds of it, in float32 and in float64."""
    folder = stored_in(stored, variant, tmp_path / "model")
    batch, source = pair_rows(), torch.arange(3, 40, 5)
    for dtype in (torch.float32, torch.float64):
        wide, kept = load_model(folder, dtype), load_model(folder, dtype, keep_16_bit=True)
        for autocast in (None, torch.bfloat16, torch.float16):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                assert torch.equal(kept(*batch, source), wide(*batch, source))
                assert torch.equal(kept(*batch), wide(*batch))
                assert torch.equal(kept(rows()), wide(rows()))
        assert kept(*batch, source).dtype == dtype
        assert kept.generate([[3, 4, 5], [6]], 5) == wide.generate([[3, 4, 5], [6]], 5)
        for name, parameter in kept.named_parameters():
            matrix = "layers" in name and parameter.ndim == 2
            assert parameter.dtype == (stored if matrix else dtype), name
            assert not parameter.requires_grad


def test_only_16_bit_weights_are_kept_and_only_if_they_are_narrower(tmp_path):
    wide = load_model(folder_of("qwen3"), keep_16_bit=True)  # the file is in float32
    assert {p.dtype for p in wide.parameters()} == {torch.float32} and not any(
        p.requires_grad for p in wide.parameters()
    )
    double = stored_in(torch.float64, "qwen3", tmp_path / "double")
    assert {p.dtype for p in load_model(double, keep_16_bit=True).parameters()} == {torch.float32}
    half = stored_in(torch.float16, "qwen3", tmp_path / "half")
    assert {p.dtype for p in load_model(half, torch.bfloat16, keep_16_bit=True).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(half).parameters()} == {torch.float32}
    assert all(p.requires_grad for p in load_model(half).parameters())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["llama-tied", "qwen2", "qwen3-window"])
def test_a_policy_in_float32_equals_its_kept_reference_to_the_bit(variant, autocast, tmp_path):
    """As at step 0 of a run: the policy builds a graph, the reference does not."""
    folder = stored_in(torch.bfloat16, variant, tmp_path / "model")
    policy, reference = load_model(folder), load_model(folder, keep_16_bit=True)
    batch, source = pair_rows(), torch.arange(3, 40, 5)
    for policy.gradient_checkpointing in (False, True):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            hidden = policy(*batch, source)
            with torch.no_grad():
                assert torch.equal(reference(*batch, source), hidden)
        hidden.square().sum().backward()
    assert all(p.grad is None for p in reference.parameters())
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters() if p.grad is not None)


def test_a_kept_model_is_saved_as_its_file_was(tmp_path):
    folder = stored_in(torch.bfloat16, "qwen2", tmp_path / "model")
    save_model(load_model(folder, keep_16_bit=True), tmp_path / "out", torch.bfloat16)
    found, wanted = (load_safetensors(x / SINGLE) for x in (tmp_path / "out", folder))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch's FSDP2 needs GPUs")
@pytest.mark.parametrize("variant", ["llama-tied", "qwen2"])
@torch.no_grad()
def test_fsdp_accepts_a_kept_reference(variant, tmp_path):
    """Matrices in bfloat16 beside norms and biases in float32, in one frozen group; one process will do."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    def shard(model: GPT) -> None:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model, reshard_after_forward=False)

    folder = stored_in(torch.bfloat16, variant, tmp_path / "model")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        sharded = load_model(folder, prepare=shard, keep_16_bit=True)
        dtypes = {p.to_local().dtype for p in sharded.parameters()}
        found = sharded(*pair_rows()), sharded.generate([[3, 4, 5], [6]], 4)
    finally:
        dist.destroy_process_group()
    alone = load_model(folder, keep_16_bit=True)
    assert dtypes == {torch.bfloat16, torch.float32}
    assert torch.equal(found[0], alone(*pair_rows())) and found[1] == alone.generate([[3, 4, 5], [6]], 4)


# ---- saving --------------------------------------------------------------------------------------------------------

TEMPLATES = "additional_chat_templates"
OTHER_FILES = {
    "tokenizer.json": b'{"a": "\xc3\xa9"}\r\n',
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "tokenizer.model": b"\x00\xff",
    "vocab.json": b"{}",
    "merges.txt": b"a b\n",
    "chat_template.jinja": b"{{ messages }}\n",
    "generation_config.json": b"{}",
    "added_tokens.json": b"{}",
    "LICENSE": b"do what you like\n",
    "README.md": b"# x\n",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["llama-tied", "mistral-window", "qwen2", "qwen3-window", "llama-llama3-new"])
@torch.no_grad()
def test_saved_folders_load_in_transformers(variant, dtype, tmp_path):
    model = load_model(folder_of(variant))
    save_model(model, tmp_path / "out", dtype)
    loaded, info = oracle(tmp_path / "out")
    assert not any(info.values()), info
    again = load_model(tmp_path / "out")
    assert again.config == model.config
    assert far(loaded(rows()).logits, again(rows())) < 1e-5
    if dtype == torch.float32:
        assert torch.equal(again(rows()), model(rows()))
    tensors = load_safetensors(tmp_path / "out" / SINGLE)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert ("lm_head.weight" in tensors) == (not model.config.tie_word_embeddings)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == dtype
    assert b'"format": "pt"' in (tmp_path / "out" / SINGLE).read_bytes()[:200]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tie_word_embeddings": True, "rope_theta": 300.0, "attention_bias": True, "mlp_bias": True},
        {"rope_scaling": {"rope_type": "llama3"} | LLAMA3, "head_dim": 16},
        {"model_type": "mistral", "sliding_window": 3},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        {
            "model_type": "qwen3",
            "head_dim": 16,
            "use_sliding_window": True,
            "layer_types": ALTERNATE,
            "sliding_window": 3,
        },
    ],
    ids=str,
)
@torch.no_grad()
def test_a_model_by_hand_is_saved_with_a_config_of_its_own(more, tmp_path):
    torch.manual_seed(0)
    model = GPT(small_config(**more))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path / "not" / "there"
    save_model(model, folder)
    wanted, info = oracle(folder)
    assert not any(info.values()), info
    assert far(model(rows()), wanted(rows()).logits) < 1e-5
    assert sorted(os.listdir(folder)) == ["config.json", SINGLE]
    assert load_model(folder).config == model.config


def test_a_model_that_llama_cannot_express_gets_the_config_of_another_family():
    config = small_config(model_type="mistral", hidden_size=33, head_dim=8, sliding_window=None)  # 4 heads: 33 / 4
    found = config_json(config)
    assert found["model_type"] == "mistral" and resolve(found) == config
    with pytest.raises(ValueError, match="expected a model that one of llama, mistral, qwen2, qwen3 can express"):
        config_json(dataclasses.replace(config, qk_norm=True, qkv_bias=True))  # Qwen2 has these biases, Qwen3 this norm


def test_what_is_copied_kept_and_removed(own, tmp_path):
    source, out = own("llama-tied"), tmp_path / "deep" / "out"
    rewrite(source, attention_dropout=0.1, torch_dtype="bfloat16", dtype="bfloat16", eos_token_id=[2, 3], note="mine")
    (source / TEMPLATES).mkdir()
    (source / TEMPLATES / "rag.jinja").write_text("{{ documents }}")
    (source / TEMPLATES / "notes.txt").write_text("no template")
    for name, content in OTHER_FILES.items():
        (source / name).write_bytes(content)
    for name in (
        "pytorch_model.bin",
        "model.gguf",
        "tf_model.h5",
        "consolidated.00.pth",
        "rust_model.ot",
        "a.onnx_data",
    ):
        (source / name).write_bytes(b"old weights")
    (source / "checkpoint-1").mkdir()
    out.mkdir(parents=True)
    for name in (INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (out / name).write_bytes(b"stale")
    (out / "notes.txt").write_bytes(b"the user's own")

    save_model(load_model(source), out)
    assert sorted(os.listdir(out)) == sorted(["config.json", SINGLE, "notes.txt", TEMPLATES, *OTHER_FILES])
    assert [x.read_text() for x in (out / TEMPLATES).iterdir()] == ["{{ documents }}"]
    assert all((out / name).read_bytes() == content for name, content in OTHER_FILES.items())
    wanted = json.loads((source / "config.json").read_text()) | {"torch_dtype": "float32", "dtype": "float32"}
    assert json.loads((out / "config.json").read_text()) == wanted
    assert os.stat(out / SINGLE).st_mode == os.stat(out / "notes.txt").st_mode  # readable by whom files usually are


def test_source_names_another_folder_and_must_be_of_the_same_model(own, tmp_path):
    one, two = own("llama"), own("qwen2")
    (one / "tokenizer.json").write_bytes(b"{}")
    model = GPT(read_config(one))
    save_model(model, tmp_path / "out", source=one)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(ValueError, match="another model"):
        save_model(model, tmp_path / "bad", source=two)
    assert not (tmp_path / "bad" / SINGLE).exists()


OTHER = {  # every number of a Config, another than that of the folder "qwen3-window"
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "windows": (4, None, None),
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "rope_scaling": RopeScaling("linear", 2.0),
    "tie_word_embeddings": True,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "qk_norm": False,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_a_source_that_differs_in_one_number_is_another_model(field, tmp_path):
    """transformers would read the saved weights with the source's number."""
    folder = folder_of("qwen3-window")
    config = dataclasses.replace(read_config(folder), **{field: OTHER[field]})
    with torch.device("meta"):
        model = GPT(config)
    with pytest.raises(ValueError, match="another model"):
        save_model(model, tmp_path / "out", source=folder)
    assert not list((tmp_path / "out").iterdir())


def test_saving_into_the_source_itself_and_onto_a_symlink(own):
    folder = own("llama")
    blob = folder.parent / "blob"
    (folder / SINGLE).rename(blob)
    (folder / SINGLE).symlink_to(blob)  # as caches of downloads lay their files out
    before = blob.read_bytes()
    model = load_model(folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    save_model(model, folder)
    assert blob.read_bytes() == before and not (folder / SINGLE).is_symlink()
    assert torch.equal(load_model(folder)(rows()), model(rows()))

    shard(folder)
    save_model(model, folder)
    assert sorted(os.listdir(folder)) == ["config.json", SINGLE]
    assert torch.equal(load_model(folder)(rows()), model(rows()))


def test_a_failed_save_leaves_the_old_file(own, monkeypatch):
    folder = own("llama")
    before, model = (folder / SINGLE).read_bytes(), load_model(folder)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(model, folder)
    assert (folder / SINGLE).read_bytes() == before
    assert sorted(os.listdir(folder)) == ["config.json", SINGLE]


def test_weights_that_are_not_finite_are_not_saved(own):
    folder = own("llama")
    before, model = (folder / SINGLE).read_bytes(), load_model(folder)
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        save_model(model, folder, torch.float16)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        save_model(model, folder)
    assert (folder / SINGLE).read_bytes() == before


def test_no_dropout(own, tmp_path):
    folder = rewrite(own("llama"), attention_dropout=0.5, resid_pdrop=0.5, hidden_dropout=0.5)
    model = load_model(folder).train()
    first = model(rows())
    assert torch.equal(first, model(rows()))
    assert far(first, oracle(folder)[0].eval()(rows()).logits) < 1e-5
