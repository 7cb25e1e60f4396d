"""The numbers of the log: sums over pairs first, which add up over micro-batches and processes; then their means."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from torch import Tensor

from support.rows import Batch, Pair, row_length

SQUARES = "margin_squares"  # for the standard error of the margin; not a number of the log


def totals(out, chosen, rejected, batch: Batch, beta: float) -> dict[str, Tensor]:
    """Sums over the B pairs of a micro-batch.

    out: the EpsDPOLoss of the pairs. chosen, rejected: their TokenStats, (B,). beta: β of the step, not β̃ of a pair.
    """
    pairs = len(out.step)
    lengths = batch.owner.bincount(minlength=2 * pairs)  # (2B,)
    return {
        "loss": out.losses.detach().sum(),
        "rewards/chosen": (beta * (chosen.logp - chosen.ref_logp)).detach().sum(),
        "rewards/rejected": (beta * (rejected.logp - rejected.ref_logp)).detach().sum(),
        "rewards/margins": (beta * out.margin).sum(),
        "rewards/accuracies": (out.margin > 0).sum(),  # a tie is wrong
        "logps/chosen": chosen.logp.detach().sum(),
        "logps/rejected": rejected.logp.detach().sum(),
        "kl": (chosen.kl + rejected.kl).sum() / 2,  # mean over the 2B responses of their summed per-token KL
        "lengths/chosen": lengths[:pairs].sum(),
        "lengths/rejected": lengths[pairs:].sum(),
        "steps/lower": (out.step > 0).sum(),
        "steps/keep": (out.step == 0).sum(),
        "steps/raise": (out.step < 0).sum(),
        SQUARES: ((beta * out.margin) ** 2).sum(),
    }


def means(sums: dict[str, float], n: int) -> dict[str, float]:
    """The sums over n pairs as means."""
    return {name: value / n for name, value in sums.items() if name != SQUARES}


def standard_errors(sums: dict[str, float], n: int) -> dict[str, float]:
    """Of the means of accuracy and margin over n pairs."""
    accuracy, margin = sums["rewards/accuracies"] / n, sums["rewards/margins"] / n
    variance = max(sums[SQUARES] / n - margin**2, 0.0)
    return {
        "rewards/accuracies_se": math.sqrt(accuracy * (1 - accuracy) / n),
        "rewards/margins_se": math.sqrt(variance / n),
    }


def speed(batch: Sequence[Pair], started: float) -> dict[str, float]:
    """Tokens of the pairs, and seconds since `started`, a time of time.perf_counter."""
    tokens, seconds = sum(map(row_length, batch)), time.perf_counter() - started
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
