"""The Llama family (Llama 2 and 3.x, SmolLM2, TinyLlama, Mistral, Qwen2/2.5, Qwen3) in one small class.

    tokens (B, T) → embedding → layers × [norm, attention with RoPE, norm, SwiGLU] → norm → logits, or any `head`

The modules carry the names that checkpoints use (`model.layers.0.self_attn.q_proj.weight`), so loading needs no map.
A `Config` is plain numbers: the model never asks for a family. `support/checkpoint.py` makes one from a config.json.

A row may hold a preference pair as [prompt | chosen | rejected]: `segments` says which token is which, and a response
sees the prompt and itself, never the other response (`visible`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class RopeScaling(NamedTuple):
    """How RoPE's frequencies are stretched for longer texts: type "linear", or "llama3" with all four numbers."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Config:
    """The numbers of a model, under the names that config.json gives them where it has them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    windows: tuple[int | None, ...]  # per layer: how many keys a query sees, itself included; None: all before it
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def rope(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, T, head_dim / 2) of RoPE's angles, in float32 whatever the model's dtype.

    (In bfloat16 the positions from 256 on coincide.) Computed in each forward: a buffer would be lost on a meta device
    and rounded by a cast of the model.
    """
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequency, scaling = 1.0 / config.rope_theta**steps, config.rope_scaling
    if scaling and scaling.rope_type == "linear":
        frequency = frequency / scaling.factor
    elif scaling:  # llama3: slow turns are divided, fast ones kept, those between blended
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = (1 - keep) * frequency / scaling.factor + keep * frequency
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
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, queries, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=c.o_bias)
        if c.qk_norm:
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
        self.source: str | None = None  # the folder it was loaded from
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
