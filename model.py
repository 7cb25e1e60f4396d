"""The Llama family (Llama 2 and 3.x, SmolLM2, TinyLlama, Mistral, Qwen2/2.5, Qwen3) in one small class.

    tokens (B, T) → embedding → layers × [norm, attention with RoPE, norm, SwiGLU] → norm → logits, or any `head`

The modules have the names that checkpoints use (`model.layers.0.self_attn.q_proj.weight`), so loading needs no map.
A `Config` is plain numbers: the model never asks for a family. `support/checkpoint.py` makes one from a config.json.

A row of tokens can be a preference pair, [prompt | chosen | rejected]. Then `segments` says which token belongs to
which part, and `visible` lets a response see the prompt and itself, never the other response.

Letters in shapes: B rows, T tokens a row, N tokens in all without padding, D hidden_size, V vocab_size.
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
    """How RoPE's frequencies are scaled for longer texts: type "linear" (`factor` alone) or "llama3" (all numbers)."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Config:
    """The numbers of a model, under the names of config.json where it has them."""

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


# ---- positions, and who sees whom ------------------------------------------------------------------------------------


def rope(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE's angles, position · θ^(−2i / head_dim) for i < head_dim / 2.

    positions: integers (B, T). Returns two (B, 1, T, head_dim / 2), float32 whatever the model's dtype (bfloat16 cannot
    tell neighbouring positions apart from 256 on). They are computed in each forward: a buffer would get lost when the
    model is built on the meta device, and rounded when the model is cast.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequency, scaling = 1.0 / config.rope_theta**exponents, config.rope_scaling  # (head_dim / 2,)
    if scaling and scaling.rope_type == "linear":
        frequency = frequency / scaling.factor
    elif scaling:  # llama3: divide low frequencies by the factor, keep high ones, blend those between
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = (1 - keep) * frequency / scaling.factor + keep * frequency
    angles = positions[:, None, :, None].float() * frequency  # (B, 1, T, head_dim / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + head_dim/2}) of x (B, heads, T, head_dim) by its angle. Keeps x's dtype."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def visible(positions: Tensor, segments: Tensor | None, window: int | None) -> Tensor:
    """Which query sees which key: bool (B, 1, T, T).

    A query sees keys at or before its place, in the prompt or in its own response, inside the window. segments (B, T):
    −1 padding, 0 prompt, 1 chosen, 2 rejected; None: one plain sequence. The window counts positions, not places in the
    row, because the rejected response comes after the chosen one but continues the prompt. Padding attends to itself
    only: a softmax over no keys would be NaN.
    """
    places = torch.arange(positions.shape[1], device=positions.device)
    seen = (places[:, None] >= places).expand(len(positions), -1, -1)  # (B, T, T): queries × keys
    if segments is not None:
        query, key = segments[:, :, None], segments[:, None, :]
        prompt_or_own = (key >= 0) & ((key == 0) & (query >= 0) | (key == query))
        seen = seen & prompt_or_own | (places[:, None] == places)
    if window is not None:
        seen = seen & (positions[:, :, None] - positions[:, None, :] < window)
    return seen[:, None]


class Unpadded(NamedTuple):
    """Where the N real tokens of a padded batch are. Only attention computes in rows; all else skips the padding."""

    shape: tuple[int, int]  # (B, T)
    places: Tensor | None  # (N,) indices into the flattened B·T; None if there is no padding

    def pad(self, x: Tensor) -> Tensor:  # (N, ...) -> (B, T, ...), zero at padding
        if self.places is not None:
            x = x.new_zeros(math.prod(self.shape), *x.shape[1:]).index_put((self.places,), x)
        return x.unflatten(0, self.shape)

    def unpad(self, x: Tensor) -> Tensor:  # (B, T, ...) -> (N, ...)
        return x.flatten(0, 1) if self.places is None else x.flatten(0, 1)[self.places]


# ---- layers ----------------------------------------------------------------------------------------------------------


def recompute(f: Callable, *inputs) -> Tensor:
    """Run f(*inputs), and run it again in backward instead of storing its intermediate tensors.

    Worth it for cheap work on large tensors. A linear layer at the end of f is not computed twice: torch stops as soon
    as it has all that backward needs, and of that layer it needs only the input.
    """
    if not torch.is_grad_enabled():
        return f(*inputs)
    return checkpoint(f, *inputs, use_reentrant=False, preserve_rng_state=False)


class RMSNorm(nn.Module):
    """weight · x / √(mean of x² + eps), computed in float32 or wider."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


class Linear(nn.Linear):
    """A linear layer whose weight may be stored in 16 bits, as a frozen reference's is: x decides the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)  # no copy if the dtypes are equal


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head_dim, self.groups = c.head_dim, c.num_attention_heads // c.num_key_value_heads
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.o_proj = Linear(queries, c.hidden_size, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps), RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, unpadded: Unpadded, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: list | None):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = map(unpadded.pad, (q, k, v))  # (N, heads, head_dim) -> (B, T, heads, head_dim)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            if cache:  # the keys and values of earlier tokens
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            cache[:] = [k, v]
        k, v = (y.repeat_interleave(self.groups, dim=1) for y in (k, v))  # as many heads as queries have
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return recompute(lambda y: self.o_proj(unpadded.unpad(y.transpose(1, 2)).flatten(1)), y)  # (N, D)


class MLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)  # (N, intermediate_size)
        return recompute(lambda gate, up: self.down_proj(F.silu(gate) * up), gate, up)  # (N, D)


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.hidden_size, c.rms_norm_eps), Attention(c)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.hidden_size, c.rms_norm_eps), MLP(c)

    def forward(self, x: Tensor, *attention_inputs) -> Tensor:  # (N, D) -> (N, D)
        x = x + self.self_attn(recompute(self.input_layernorm, x), *attention_inputs)
        return x + self.mlp(recompute(self.post_attention_layernorm, x))


# ---- the model -------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """A causal language model of the Llama family, without dropout: the same batch gives the same bits.

    `gradient_checkpointing = True` recomputes each layer in backward instead of storing what it computed.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.folder: str | None = None  # where it was loaded from
        self.model = nn.Module()  # exists only for the prefix "model." of the checkpoint's names
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        for name, parameter in self.named_parameters():
            if not name.endswith("norm.weight"):
                nn.init.normal_(parameter, std=0.0 if name.endswith("bias") else 0.02)

    def tie(self) -> None:
        """Make the embedding and the output matrix one parameter, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, positions=None, segments=None, source=None, head=None, cache=None):
        """Logits (B, T, V); given `source`, hidden states (M, D); given `head` too, head(hidden, output matrix (V, D)).

        tokens, positions, segments: integers (B, T); without the last two each row is one plain sequence.
        source: (M,) indices into the flattened B·T. head: a function; it runs in here because FSDP2 gathers the whole
        output matrix, and collects its gradient, only inside forward.
        cache: an empty list per layer at first; positions and segments then also cover the tokens in it.
        Raises ValueError for segments without positions and for a head without source.
        """
        if segments is not None and positions is None:
            raise ValueError("segments need positions: those of a rejected response restart after the prompt")
        if head is not None and source is None:
            raise ValueError("head needs source: the hidden states to apply it to")
        B, T = tokens.shape
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        with torch.autocast(tokens.device.type, enabled=False):
            cos, sin = rope(self.config, positions[:, -T:])
        causal = segments is None and cache is None  # then layers without a window need no mask, see Attention
        masks = {w: visible(positions, segments, w)[:, :, -T:] for w in set(self.config.windows) if w or not causal}
        places = None if segments is None else (segments[:, -T:] >= 0).flatten().nonzero().squeeze(-1)
        unpadded = Unpadded((B, T), None if places is None or len(places) == B * T else places)

        x = self.model.embed_tokens(unpadded.unpad(tokens))  # (N, D)
        for i, layer in enumerate(self.model.layers):
            inputs = (x, unpadded, cos, sin, masks.get(self.config.windows[i]), None if cache is None else cache[i])
            x = recompute(layer, *inputs) if self.gradient_checkpointing else layer(*inputs)
        x = unpadded.pad(x)  # (B, T, D)
        if source is not None:
            x = self.model.norm(x.flatten(0, 1)[source])  # (M, D)
            return x if head is None else head(x, self.lm_head.weight)
        x = self.model.norm(x)
        with torch.autocast(tokens.device.type, enabled=False):  # it would round the logits
            return self.lm_head(x.to(self.lm_head.weight.dtype))

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0, eos=(), generator=None
    ) -> list[list[int]]:
        """The new tokens of each prompt, up to and including the first of `eos` (an id or several).

        Greedy at temperature 0; above it, drawn from softmax(logits / temperature) with `generator`.
        Raises ValueError for no prompts, an empty prompt, max_new_tokens below 1 and a temperature that is not ≥ 0.
        """
        if not prompts or not all(prompts) or max_new_tokens < 1 or not temperature >= 0:
            raise ValueError("generate: expected prompts of at least one token, max_new_tokens ≥ 1, temperature ≥ 0")
        device, ends = self.lm_head.weight.device, {eos} if isinstance(eos, int) else set(eos or ())
        padding = [max(map(len, prompts)) - len(prompt) for prompt in prompts]  # on the left
        tokens = torch.tensor([[0] * n + p for n, p in zip(padding, prompts)], device=device)  # (B, T)
        segments = torch.tensor([[-1] * n + [0] * len(p) for n, p in zip(padding, prompts)], device=device)
        answers, cache = [[] for _ in prompts], [[] for _ in self.model.layers]
        for _ in range(max_new_tokens):
            positions = (segments == 0).cumsum(1) - 1
            last = torch.arange(1, len(prompts) + 1, device=device) * tokens.shape[1] - 1  # (B,) flat: the newest ones
            logits = self(tokens, positions, segments, last, F.linear, cache).float()  # (B, V)
            best, tokens = logits.max(-1, keepdim=True)  # (B, 1): from now on only the newest token
            if temperature > 0:
                tokens = torch.multinomial(((logits - best) / temperature).softmax(-1), 1, generator=generator)
            for answer, token in zip(answers, tokens[:, 0].tolist()):
                if not answer or answer[-1] not in ends:
                    answer.append(token)
            if all(answer[-1] in ends for answer in answers):
                break
            segments = F.pad(segments, (0, 1))  # a new column of 0: the newest tokens continue their prompts
        return answers
