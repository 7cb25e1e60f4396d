"""model.py: the forward pass and sampling, compared with transformers and with themselves."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, Config, rope, rotate, visible
from support.checkpoint import load_model
from tests.checkpoints import (
    FAMILIES,
    LLAMA3,
    VARIANTS,
    far,
    folder_of,
    oracle,
    rewrite,
    rows,
    small_config,
)

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# ---- the same numbers as transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers_with_every_key_off_its_default(variant):
    wanted, info = oracle(folder_of(variant))
    assert not any(info.values())
    model = load_model(folder_of(variant))
    assert model.lm_head.weight.dtype == torch.float32 and model.training
    assert far(model(rows()), wanted(rows()).logits) < 1e-5


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_logits_equal_transformers_with_padding(variant, left):
    tokens, real = rows(), torch.ones(2, 24, dtype=torch.long)
    real[1, slice(None, 7) if left else slice(-7, None)] = 0
    positions = (real.cumsum(1) - 1).clamp(min=0)
    wanted = oracle(folder_of(variant))[0](tokens, attention_mask=real, position_ids=positions).logits
    found = load_model(folder_of(variant))(tokens, positions, real - 1)
    assert far(found[real == 1], wanted[real == 1]) < 1e-5
    assert found.isfinite().all()


@torch.no_grad()
def test_windows_matter_in_these_tests(tmp_path):
    """Otherwise the tests above would say nothing about them."""
    for variant, without in (("mistral-window", {"sliding_window": None}), ("qwen3-window", {"layer_types": None})):
        copy = shutil.copytree(folder_of(variant), tmp_path / variant)
        plain = load_model(rewrite(copy, **without))
        assert far(load_model(folder_of(variant))(rows()), plain(rows())) > 0.01


def greedy_by_transformers(model, prompt: list[int], n: int) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, max_new_tokens=n, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_generate_equals_transformers_on_prompts_of_different_lengths(family):
    variant = {"llama": "llama-llama3", "mistral": "mistral-window", "qwen2": "qwen2", "qwen3": "qwen3-window"}[family]
    prompts = [rows(shape=(n,), seed=n).tolist() for n in (9, 1, 4, 12)]
    model, wanted = load_model(folder_of(variant)), oracle(folder_of(variant))[0]
    found = model.generate(prompts, 10)
    for prompt, out in zip(prompts, found):
        assert out == greedy_by_transformers(wanted, prompt, 10)
        ids = torch.tensor([prompt])
        for _ in range(10):  # and without a cache
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
        assert out == ids[0, len(prompt) :].tolist()


@pytest.mark.real
@torch.no_grad()
def test_a_real_checkpoint_equals_transformers():
    folder = os.environ.get("EPSDPO_CHECKPOINT")
    if not folder:
        pytest.skip("EPSDPO_CHECKPOINT is not set")
    model, (wanted, _) = load_model(folder), oracle(Path(folder))
    tokens = rows(model.config.vocab_size, (2, 40))
    assert (model(tokens) - wanted(tokens).logits).abs().max() < 1e-4
    prompts = [tokens[0, :7].tolist(), tokens[1, :19].tolist()]
    for prompt, out in zip(prompts, model.generate(prompts, 8)):
        assert out == greedy_by_transformers(wanted, prompt, 8)


# ---- one row per pair ----------------------------------------------------------------------------------------------


def pair_row(prompt: int = 9, chosen: int = 7, rejected: int = 5, pads: int = 3, seed: int = 2):
    """(tokens, positions, segments) of one row, and the two plain sequences it stands for."""
    tokens = rows(shape=(1, prompt + chosen + rejected + pads), seed=seed)
    lengths = [prompt, chosen, rejected, pads]
    segments = torch.tensor([0, 1, 2, -1]).repeat_interleave(torch.tensor(lengths))[None]
    starts = [0, prompt, prompt, 0]
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths)])[None]
    one, two, _ = tokens[:, prompt:].split([chosen, rejected, pads], dim=1)
    return (tokens, positions, segments), [torch.cat((tokens[:, :prompt], y), dim=1) for y in (one, two)]


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_packed_row_is_two_sequences(variant):
    """Logits at every place that predicts, and the gradient of a loss on them, in float64."""
    packed, (one, two) = pair_row()
    model = load_model(folder_of(variant)).double()
    predicts = torch.tensor([8, *range(9, 15), 8, *range(16, 20)])
    weights = torch.linspace(-1, 1, 12 * 61).view(12, 61).double()

    found = model(*packed, predicts, F.linear)
    found_grads = torch.autograd.grad((found.log_softmax(-1) * weights).sum(), list(model.parameters()))
    wanted = torch.cat((model(one)[0, 8:15], model(two)[0, 8:13]))
    wanted_grads = torch.autograd.grad((wanted.log_softmax(-1) * weights).sum(), list(model.parameters()))
    assert found.dtype == torch.float64
    assert far(found, wanted) < 1e-10
    for a, b in zip(found_grads, wanted_grads):
        assert far(a, b) < 1e-10


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_no_bit_crosses_from_one_response_to_the_other_or_out_of_a_pad(variant):
    (tokens, positions, segments), _ = pair_row()
    rest = pair_row(4, 2, 3, 15, seed=3)[0]
    batch = [torch.cat(pair) for pair in zip((tokens, positions, segments), rest)]
    model = load_model(folder_of(variant))
    before = model(*batch)
    for segment in (1, 2, -1):
        changed = batch[0].clone()
        changed[batch[2] == segment] = (changed[batch[2] == segment] + 17) % 61
        after = model(changed, *batch[1:])
        others = batch[2] != segment
        assert torch.equal(before[others], after[others])
        assert torch.equal(before[~others], after[~others]) == (segment == -1)  # pads are not computed at all
    changed = batch[0].clone()
    changed[:, 0] = (changed[:, 0] + 1) % 61  # the prompt reaches everyone but the pads
    moved = (model(changed, *batch[1:]) != before).any(-1)
    assert torch.equal(moved, batch[2] >= 0) or "window" in variant
    assert torch.equal(model(*batch), before)  # twice the same bits


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_visible_is_what_its_docstring_says(data):
    segments = data.draw(st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=1, max_size=9))
    positions = data.draw(st.lists(st.integers(0, 9), min_size=len(segments), max_size=len(segments)))
    window = data.draw(st.none() | st.integers(1, 5))
    found = visible(torch.tensor([positions]), torch.tensor([segments]), window)
    assert found.shape == (1, 1, len(segments), len(segments))
    for query, key in np.ndindex(*found.shape[2:]):
        mine, theirs = segments[query], segments[key]
        wanted = key <= query and mine >= 0 and theirs in (0, mine)
        wanted = wanted or query == key
        wanted = wanted and (window is None or positions[query] - positions[key] < window)
        assert found[0, 0, query, key] == wanted


def test_source_and_head():
    model = load_model(folder_of("llama"))
    tokens, source = rows(), torch.tensor([0, 23, 24, 47, 5, 5])
    hidden = model(tokens, source=source)
    assert hidden.shape == (6, 32)
    logits = model(tokens)
    assert far(F.linear(hidden, model.lm_head.weight), logits.flatten(0, 1)[source]) < 1e-6
    seen = model(tokens, source=source, head=lambda h, w: (h, w))
    assert torch.equal(seen[0], hidden) and seen[1] is model.lm_head.weight
    with pytest.raises(ValueError, match="source"):
        model(tokens, head=F.linear)
    with pytest.raises(ValueError, match="positions"):
        model(tokens, segments=torch.zeros_like(tokens))


def test_gradient_checkpointing_changes_no_gradient():
    packed, _ = pair_row()
    model = load_model(folder_of("qwen3-window"))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        loss = model(*packed).log_softmax(-1).square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# ---- precision -----------------------------------------------------------------------------------------------------


def test_rope_numbers():
    def frequencies(**more):
        config = small_config(num_attention_heads=4, head_dim=8, **more)
        cos, sin = rope(config, torch.tensor([[1]]))
        assert cos.dtype == sin.dtype == torch.float32
        return torch.atan2(sin, cos).flatten().tolist()

    assert frequencies() == pytest.approx([1, 0.1, 0.01, 0.001], rel=1e-6)
    assert frequencies(rope_scaling={"type": "linear", "factor": 2}) == pytest.approx(
        [0.5, 0.05, 0.005, 0.0005], rel=1e-6
    )
    scaled = frequencies(rope_scaling={"rope_type": "llama3"} | LLAMA3)
    assert scaled == pytest.approx([1, 0.0130422562, 0.00125, 0.000125], rel=1e-6)

    cos, sin = rope(small_config(head_dim=4), torch.tensor([[1]]))
    turned = rotate(torch.eye(4).view(1, 4, 1, 4), cos, sin)[0, :, 0]  # dimensions 0 and 2 are a pair, so are 1 and 3
    assert turned[0].tolist() == pytest.approx([0.5403023, 0, 0.8414710, 0], abs=1e-7)
    assert turned[1].tolist() == pytest.approx([0, 0.9999500, 0, 0.0099998], abs=1e-7)
    assert turned[2].tolist() == pytest.approx([-0.8414710, 0, 0.5403023, 0], abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.floats(10, 1e6), st.integers(0, 8000))
def test_angles_against_float64(half, theta, position):
    config = small_config(head_dim=2 * half, rope_theta=theta)
    cos, sin = rope(config, torch.tensor([[position]]))
    angles = position * theta ** (-np.arange(half) / half)
    tolerance = 1e-6 + 3e-7 * position  # an angle of `position` radians in float32
    assert np.allclose(cos.flatten(), np.cos(angles), atol=tolerance)
    assert np.allclose(sin.flatten(), np.sin(angles), atol=tolerance)


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_rounded_models_in_every_family(variant, dtype):
    """Forward and backward run, and stay near the float32 model."""
    packed, _ = pair_row()
    exact = load_model(folder_of(variant))
    wanted = exact(*packed).detach()
    with torch.autocast("cpu", dtype):
        found = exact(*packed)
    found.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in exact.parameters())
    rounded = load_model(folder_of(variant), dtype)(*packed)
    assert found.dtype == torch.float32 and rounded.dtype == dtype
    assert far(found, wanted) < 0.3 and far(rounded.float(), wanted) < 0.3


class _Matmuls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", FAMILIES)
def test_what_backward_computes_again_holds_no_matmul(variant):
    """A layer's seven products each take one matmul forward and two backward; checkpointing does six of them again."""
    (tokens, positions, segments), _ = pair_row()
    model = load_model(folder_of(variant))
    layers = model.config.num_hidden_layers
    source = (segments > 0).flatten().nonzero().squeeze(-1)
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        with _Matmuls() as forward:
            hidden = model(tokens, positions, segments, source)
        with _Matmuls() as backward:
            hidden.square().mean().backward()
        assert (forward.count, backward.count) == (7 * layers, (20 if checkpointing else 14) * layers)


@torch.no_grad()
def test_bfloat16_models_and_autocast_keep_angles_norms_and_logits():
    """Positions 256 … 271 are two values in bfloat16: with such angles the distances between tokens would be lost."""
    exact, positions = load_model(folder_of("llama")), torch.arange(240, 264).expand(2, 24)
    wanted = exact(rows(), positions)
    rounded = load_model(folder_of("llama"), dtype=torch.bfloat16)
    assert rounded(rows()).dtype == torch.bfloat16
    assert far(rounded(rows(), positions).float(), wanted) < 0.3  # and above 1 with angles in bfloat16
    seen = {}
    exact.model.norm.register_forward_hook(lambda module, inputs, output: seen.update(norm=output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = exact(rows(), positions)
        cos, _ = rope(exact.config, positions)
    assert found.dtype == torch.float32 and seen["norm"] == torch.float32 and cos.dtype == torch.float32
    assert far(found, wanted) < 0.3
    hidden = exact(rows(), positions, source=torch.arange(48))
    assert far(F.linear(hidden, exact.lm_head.weight), wanted.flatten(0, 1)) < 1e-6


def test_norm_in_float32_of_small_and_large_numbers():
    from model import RMSNorm

    norm = RMSNorm(8, 1e-12).half()
    big = torch.tensor([300.0, -500, 100, 0, 0, 0, 0, 0]).half()  # their squares overflow float16
    wanted = big.double() / big.double().pow(2).mean().sqrt()
    assert torch.allclose(norm(big).double(), wanted, atol=2e-3)


def test_built_on_the_meta_device_and_loaded_afterwards():
    wanted = load_model(folder_of("llama-llama3"))
    with torch.device("meta"):
        empty = GPT(wanted.config)
    assert not list(empty.buffers())
    empty.to_empty(device="cpu").load_state_dict(wanted.state_dict())
    assert torch.equal(empty(rows()), wanted(rows()))


def test_a_model_by_hand():
    config = small_config(
        vocab_size=6, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_key_value_heads=4
    )
    assert (config.head_dim, config.num_key_value_heads, config.windows) == (16, 4, (None, None))
    torch.manual_seed(0)
    model = GPT(config)
    logits = model(rows(6))
    assert logits.shape == (2, 24, 6)
    assert 0 < (logits.softmax(-1) - 1 / 6).abs().max() < 0.1  # untrained: near uniform
    for name, parameter in GPT(small_config(model_type="qwen2")).named_parameters():
        wanted = (1, 0) if name.endswith("norm.weight") else (0, 0) if name.endswith("bias") else (0, 0.02)
        assert (parameter.mean().item(), parameter.std().item()) == pytest.approx(wanted, abs=3e-3), name
    twin = copy.deepcopy(model)
    assert twin.config == config and torch.equal(twin(rows(6)), logits)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_generate_samples_from_the_softmax():
    torch.manual_seed(0)
    model = GPT(
        small_config(vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    for temperature in (1.0, 0.5):
        drawn = model.generate([[1, 2]] * 4000, 1, temperature, generator=torch.Generator().manual_seed(3))
        counts = np.bincount(np.array(drawn)[:, 0], minlength=5)
        p = (model(torch.tensor([[1, 2]]))[0, -1] / temperature).softmax(-1).detach().numpy()
        assert ((counts - 4000 * p) ** 2 / (4000 * p)).sum() < 25  # chi-squared with 4 degrees: 1 in 20,000


def test_generate_is_a_function_of_its_generator_and_stops_at_eos():
    model = load_model(folder_of("qwen2"))
    prompts = [[3, 4, 5], [6]]
    once = model.generate(prompts, 12, 1.0, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    assert model.generate(prompts, 12, 1.0, generator=torch.Generator().manual_seed(0)) == once
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left alone
    assert model.generate(prompts, 12, 1.0, generator=torch.Generator().manual_seed(1)) != once
    greedy = model.generate(prompts, 12)
    assert [len(out) for out in greedy] == [12, 12]
    end = greedy[0][4]
    for eos in (end, [end], [end, 60]):
        for out, whole in zip(model.generate(prompts, 12, eos=eos), greedy):
            stops = [i for i, token in enumerate(whole) if token in ([eos] if isinstance(eos, int) else eos)]
            assert out == whole[: stops[0] + 1 if stops else 12]
    cold = model.generate(prompts, 12, 1e-39, generator=torch.Generator().manual_seed(0))
    assert cold == greedy  # and no overflow on the way
    for bad in (([], 3), ([[]], 3), ([[1]], 0), ([[1]], 3, -1.0), ([[1]], 3, float("nan"))):
        with pytest.raises(ValueError, match="generate"):
            model.generate(*bad)


def test_the_defaults_of_a_config_are_llamas():
    size = {"vocab_size": 7, "hidden_size": 8, "intermediate_size": 16, "head_dim": 4, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "num_hidden_layers": 1, "max_position_embeddings": 8, "windows": (None,)}
    names = dict(GPT(Config(**size)).named_parameters())  # tied tables are one parameter, with one name
    assert "lm_head.weight" in names
    assert not [name for name in names if "bias" in name or ("self_attn" in name and "norm" in name)]
