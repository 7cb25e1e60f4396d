"""One preference pair is one row of a batch: the prompt once, both responses behind it. Knows no model and no file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

MAX_DETAIL = 2000  # characters of an error


class Pair(NamedTuple):
    """One preference as int32 token ids, responses with their end token, and the place it came from."""

    prompt: np.ndarray  # (P,)
    chosen: np.ndarray  # (C,)
    rejected: np.ndarray  # (R,)
    file: str = ""
    line: int = 0
    cut: tuple[int, ...] = (0, 0, 0)  # tokens that truncation took from prompt, chosen, rejected


class Batch(NamedTuple):
    """B pairs as B rows [prompt | chosen | rejected | pad], T the longest; everything int64.

    A response of n tokens is predicted by n hidden states: the last prompt token's and those of its own tokens but the
    last. The M predictions of a batch are listed flat, so that the output matrix is applied to them alone."""

    tokens: torch.Tensor  # (B, T)
    positions: torch.Tensor  # (B, T) those of a rejected response restart after the prompt
    segments: torch.Tensor  # (B, T) -1 pad, 0 prompt, 1 chosen, 2 rejected
    source: torch.Tensor  # (M,) which hidden state predicts: an index into the flattened B*T
    label: torch.Tensor  # (M,) the token to predict
    owner: torch.Tensor  # (M,) for which of the 2B responses: i is the chosen one of pair i, B + i the rejected

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def row_length(pair: Pair) -> int:
    return sum(map(len, pair[:3]))


def collate(pairs: Sequence[Pair]) -> Batch:
    """Pairs as one Batch. Pads, at the right, carry token 0: masks come from `segments`, never from ids.

    No pairs make an empty batch: a process without work still does its forward pass beside the others."""
    size, width = len(pairs), max(map(row_length, pairs), default=1)
    tokens, positions = np.zeros((2, size, width), np.int64)
    segments = np.full((size, width), -1)
    source = np.arange(-1, size * width - 1).reshape(size, width)  # a token is predicted by the one before it,
    for i, pair in enumerate(pairs):
        p, c, r = map(len, pair[:3])
        tokens[i, : p + c + r] = np.concatenate(pair[:3])
        segments[i, : p + c + r] = np.repeat((0, 1, 2), (p, c, r))
        positions[i, : p + c + r] = np.r_[0 : p + c, p : p + r]
        source[i, p + c] = source[i, p]  # the first of the rejected response by the last of the prompt
    response = segments > 0
    owner = np.arange(size)[:, None] + size * (segments == 2)
    flat = (source[response], tokens[response], owner[response])  # (M,) each
    return Batch(*map(torch.from_numpy, (tokens, positions, segments, *flat)))


def micro_batches(pairs: Sequence[Pair], token_budget: int) -> list[list[int]]:
    """Cut one effective batch into lists of indices with rows x longest row <= token_budget; a longer row stands alone.

    Sorting by length happens inside the effective batch only: over the whole set it would make every batch one length,
    and its gradient and beta biased by it. Longest first, so that memory peaks at once."""
    lengths = [row_length(pair) for pair in pairs]
    groups: list[list[int]] = []
    for i in sorted(range(len(pairs)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= token_budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n pairs in one epoch, (n,) int64: a function of seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def pairs_of_step(pairs: Sequence[Pair], step: int, batch_size: int, seed: int) -> list[Pair]:
    """The effective batch of optimizer step 0, 1, …: the next pairs in the order of its epoch."""
    epoch, place = divmod(step, math.ceil(len(pairs) / batch_size))
    order = epoch_order(len(pairs), seed, epoch)
    return [pairs[i] for i in order[place * batch_size :][:batch_size]]


def locations(pairs: Sequence[Pair]) -> str:
    """Where the pairs are in their files."""
    return "rows " + ", ".join(f"{Path(pair.file).name}:{pair.line}" for pair in pairs[:8]) + " …" * (len(pairs) > 8)


def ids_hash(pairs: Sequence[Pair]) -> str:
    """A hash of all token ids and of where each part of a pair ends."""
    ids = hashlib.sha256()
    for pair in pairs:
        for part in pair[:3]:
            ids.update(len(part).to_bytes(8, "little") + part.astype("<i4").tobytes())
    return ids.hexdigest()


class BadRow(ValueError):
    """A row that cannot be used. `reason` is what it is counted under, `detail` is for whoever mends the file."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail:.{MAX_DETAIL}}")
        self.reason = reason
