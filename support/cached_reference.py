"""The reference as a file of its hidden states, computed once for these pairs and every later run on them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import GPT
from support.device import autocast
from support.files import replace_file
from support.report import progress_bar
from support.rows import Pair, collate, ids_hash, row_length


class CachedReference(torch.nn.Module):
    """Called like the reference model, it reads the hidden states at response tokens, float32 (M, D), from a file.

    Log-probabilities would not do: the check mixes the logits of both models. Hidden states do: D numbers a token.
    `policy` must still be the reference. The file is named by a hash of all weights, token ids and the dtype, and kept.
    Raises ValueError for a damaged file and for a folder that cannot be made.
    """

    def __init__(self, policy: GPT, pairs: Sequence[Pair], folder: str, dtype: str, micro_tokens: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(policy.lm_head.weight.detach().clone(), requires_grad=False)  # (V, D)
        pairs = sorted(pairs, key=lambda pair: (pair.file, pair.line))  # one file, however many are held out
        name = hashlib.sha256(f"{policy.config} {ids_hash(pairs)} {dtype}".encode())
        for p in policy.parameters():
            name.update(p.detach().float().cpu().numpy())
        file = Path(folder) / f"reference-{name.hexdigest()[:16]}.f32"
        counts = [len(pair.chosen) + len(pair.rejected) for pair in pairs]
        shape = sum(counts), policy.config.hidden_size
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"--cache-reference {folder}: the folder cannot be made: {e}") from e
        if not file.exists():
            replace_file(file, lambda f: f.writelines(hidden_states(policy, pairs, dtype, micro_tokens)))
        size = 4 * shape[0] * shape[1] + 4
        if (found := file.stat().st_size) != size:
            raise ValueError(f"{file}: expected {size} bytes, got {found}; delete it and run again")
        print(
            f"reference: {shape[0]:,} hidden states of {shape[1]} numbers in {file}, {found / 1e9:.2f} GB; the first "
            "decisions may differ from 0, because other batches round differently"
        )
        self.states = np.memmap(file, np.float32, "r", shape=shape)
        if np.memmap(file, "<u4", "r")[-1] != zlib.crc32(self.states):
            raise ValueError(f"{file} is damaged; delete it and run again")
        keys = (pair_key(np.concatenate(pair[:3]), len(pair.prompt), len(pair.chosen)) for pair in pairs)
        starts = np.cumsum([0, *counts])
        self.places = {key: slice(a, b) for key, a, b in zip(keys, starts, starts[1:])}

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor, source: Tensor, head: Callable) -> object:
        rows = zip(tokens.cpu().numpy(), segments.cpu().numpy())
        keys = (pair_key(ids[part >= 0], int((part == 0).sum()), int((part == 1).sum())) for ids, part in rows)
        states = np.concatenate([self.states[self.places[key]] for key in keys])  # (M, D)
        return head(torch.from_numpy(states).to(tokens.device), self.weight)


def pair_key(ids: np.ndarray, prompt: int, chosen: int) -> tuple[bytes, int, int]:
    """What a pair is found by: its ids, and how many of them are the prompt's and the chosen response's."""
    return ids.astype("<i4").tobytes(), prompt, chosen


@torch.no_grad()
def hidden_states(policy: GPT, pairs: Sequence[Pair], dtype: str, micro_tokens: int) -> Iterator[bytes]:
    """The hidden states of all response tokens, in the order of the pairs, a batch at a time; then their CRC-32."""
    device, crc = next(policy.parameters()).device, 0
    at_most = max(1, micro_tokens // max(map(row_length, pairs)))
    for i in progress_bar(range(0, len(pairs), at_most), "reference", "batch"):
        batch = collate(pairs[i : i + at_most]).to(device)
        with autocast(dtype, device):
            states = policy(batch.tokens, batch.positions, batch.segments, batch.source)  # (M, D)
        part = states.float().cpu().numpy().tobytes()
        crc = zlib.crc32(part, crc)
        yield part
    yield crc.to_bytes(4, "little")
