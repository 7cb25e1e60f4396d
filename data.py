"""Preference files -> pairs of token ids -> batches. Knows no model and no algorithm."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np
import torch


class Pair(NamedTuple):
    """One preference: token ids as int32 arrays, and the line it came from."""

    prompt: np.ndarray  # (P,)
    chosen: np.ndarray  # (C,) its end token included
    rejected: np.ndarray  # (R,)
    file: str = ""
    line: int = 0


class Batch(NamedTuple):
    """B pairs as B rows [prompt | chosen | rejected | pad], T the longest; everything int64.

    A response of n tokens is predicted by n hidden states: that of the last prompt token, then those of all its own tokens but the
    last. The M predictions of a batch are listed flat, so the output matrix is applied to them alone."""

    tokens: torch.Tensor  # (B, T)
    positions: torch.Tensor  # (B, T) those of a rejected response restart after the prompt
    segments: torch.Tensor  # (B, T) -1 pad, 0 prompt, 1 chosen, 2 rejected
    source: torch.Tensor  # (M,) which hidden state predicts, as an index into the flattened B*T
    label: torch.Tensor  # (M,) the token it should predict
    owner: torch.Tensor  # (M,) for which response: i is the chosen one of pair i, B + i its rejected one

    def to(self, device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def row_length(pair: Pair) -> int:
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def collate(pairs: Sequence[Pair]) -> Batch:
    """Lay pairs out as one Batch, padded on the right. Pads carry token 0: masks come from `segments`, never from ids."""
    size, width = len(pairs), max(map(row_length, pairs))
    tokens = np.zeros((size, width), np.int64)
    positions = np.zeros((size, width), np.int64)
    segments = np.full((size, width), -1, np.int64)
    source, label, owner = [], [], []
    for i, pair in enumerate(pairs):
        start, prompt = 0, len(pair.prompt)
        for segment, ids in enumerate((pair.prompt, pair.chosen, pair.rejected)):
            row = slice(start, start + len(ids))
            tokens[i, row], segments[i, row] = ids, segment
            positions[i, row] = np.arange(len(ids)) + (prompt if segment else 0)
            if segment:
                before = np.arange(row.start - 1, row.stop - 1)  # each token is predicted by the one before it,
                before[0] = prompt - 1  # the first token of either response by the last of the prompt
                source.append(i * width + before)
                label.append(ids)
                owner.append(np.full(len(ids), i + size * (segment - 1)))
            start = row.stop
    flat = (np.concatenate(part).astype(np.int64) for part in (source, label, owner))
    return Batch(*map(torch.from_numpy, (tokens, positions, segments, *flat)))


def micro_batches(pairs: Sequence[Pair], token_budget: int) -> list[list[int]]:
    """Cut one effective batch into groups of indices with rows x longest row <= token_budget (one longer row stands alone).

    Sorting by length happens inside the effective batch only: sorted over the whole set, every batch would be of one length, and its
    gradient and beta biased by it. Longest first, so that memory peaks, and fails, at once."""
    lengths = [row_length(pair) for pair in pairs]
    groups: list[list[int]] = []
    for i in sorted(range(len(pairs)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= token_budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n pairs in one epoch, (n,) int64: a function of seed and epoch alone, untouched by any other use of randomness."""
    return np.random.default_rng((seed, epoch)).permutation(n)
