"""ε-DPO: DPO with a KL penalty β of its own for every preference pair (arXiv 2502.13177), in plain PyTorch.

DPO reads a pair (chosen y_w, rejected y_l) as a coin with P(y_w ≻ y_l) = σ(β·margin), where
margin = [log π_θ(y_w) − log π_ref(y_w)] − [log π_θ(y_l) − log π_ref(y_l)] and β is the KL penalty.
ε-DPO asks, for each pair, what a slightly smaller and a slightly larger β would have done to the log-odds
z = log π(y_w) − log π(y_l), without training again: the policy that β/(1+ε) or β/(1−ε) would have given is estimated at
each position by softmax(f_θ + s·(f_θ − f_ref)) with s = +ε or s = −ε, from logits that DPO has computed anyway.

    z(β⁻) > z(β) > z(β⁺)   a smaller β separates the pair better:  step +1, β̃ = β/(1+ε)
    z(β⁻) < z(β) < z(β⁺)   a larger one does:                      step −1, β̃ = β/(1−ε)
    anything else, ties included:                                  step  0, β̃ = β

    loss = mean of −log σ(β̃·margin), β̃ constant to the gradient;  then β ← mean of β̃ over the whole batch.

The file reads in the order of the data: perturbed logits → numbers per token → sums per response → step per pair →
loss → next β. It knows no model, no file and no training loop.

PORTING NOTES (for a port to another framework or language)
  Port first   `token_stats_by_definition` (the method, ten lines), `beta_steps`, `epsdpo_loss`, `next_beta`.
  Port next    `token_stats`: the same numbers without cancellation. It is what makes steps right near the reference.
  Skip         `linear_token_stats` (memory, not method), the tiles (speed).
  What ports get wrong, and what shows it:
    three log-softmaxes subtracted in float32       steps near the reference are rounding: small logit differences
    logits in bf16 or fp16, or a head under autocast   the same, much earlier; casting up afterwards rescues nothing
    β per micro-batch, or a mean of means           next β of uneven splits differs from next β of the whole
    β̃ with gradient                                 the gradient differs from DPO's at β̃
    ε_c and ε_s mixed up; ε and −ε swapped           steps or β̃ differ once ε_c ≠ ε_s; every step has the other sign
    a token mean for the sum over a response        a pair whose responses differ in length

  Paper's text                          authors' code                            here
  one ε                                 one ε                                    ε_c in the check, ε_s in the step
  β ← mean of β̃                         β / (1 + ε·mean step), the harmonic mean  arithmetic mean, from three counts
  no precision stated                   whatever the logits have (bf16)          increments, float32 logits or better
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1 << 19  # logits handled at a time in the elementwise work on a CPU: a tile and its temporaries stay in cache
FLOAT64_FROM = 4.0  # |u| from which a position is computed in float64, whatever ε: moments and float32 part ways


class TokenStats(NamedTuple):
    """What ε-DPO needs to know of a token or, summed over its tokens, of a response.

    `logp` alone carries gradient. Per token it has the logits' dtype (at least float32); all else is float64.
    """

    logp: Tensor  # log π_θ(y)
    ref_logp: Tensor  # log π_ref(y)
    delta_minus: Tensor  # log π(y) under β⁻ = β/(1+ε_c), minus log π_θ(y)
    delta_plus: Tensor  # log π(y) under β⁺ = β/(1−ε_c), minus log π_θ(y)
    kl: Tensor  # KL(π_θ ‖ π_ref) of the next-token distributions, in nats, ≥ 0


class EpsDPOLoss(NamedTuple):
    """What `epsdpo_loss` returns. All but `loss` are of shape (B,); only `loss` and `losses` carry gradient."""

    loss: Tensor  # scalar float64: the mean of `losses`
    losses: Tensor  # float64: −log σ(β̃·margin)
    beta: Tensor  # float64: β̃
    step: Tensor  # int64: +1 lower β, 0 keep it, −1 raise it
    margin: Tensor  # float64: the log-ratio of chosen minus that of rejected


# ----------------------------------------------------------------------------------------------------------------------
# From logits to numbers per token


def perturbed_logits(policy_logits: Tensor, ref_logits: Tensor, s: float) -> Tensor:
    """f_θ + s·(f_θ − f_ref): logits of the policy that another β would have given (Liu et al. 2024, Prop. 1).

    s = +ε stands for β/(1+ε), s = −ε for β/(1−ε), s = 0 for the policy itself and s = −1 for the reference; any real s
    is allowed. Shapes must be equal; bf16 and fp16 are cast up to float32. Raises ValueError for shapes that differ.
    """
    if policy_logits.shape != ref_logits.shape:
        raise ValueError(f"policy logits {tuple(policy_logits.shape)} and reference logits {tuple(ref_logits.shape)}")
    dtype = _common_dtype(policy_logits, ref_logits)
    policy_logits, ref_logits = policy_logits.to(dtype), ref_logits.to(dtype)
    return policy_logits + s * (policy_logits - ref_logits)


def token_stats_by_definition(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, epsilon_check: float
) -> TokenStats:
    """The method as the paper states it: three log-softmaxes and the reference's, in float64, subtracted.

    For reading and porting. `token_stats` gives the same numbers where these cancel. Arguments and errors are its own.
    """
    _check_logits(policy_logits, ref_logits, labels, epsilon_check)
    if not (policy_logits.isfinite().all() and ref_logits.isfinite().all()):
        raise ValueError("logits are not finite: the policy or the reference has overflowed")
    f, f_ref = policy_logits.double(), ref_logits.double()

    def log_probs(s: float) -> Tensor:  # (..., V)
        return perturbed_logits(f, f_ref, s).log_softmax(-1)

    def of_label(log_probs: Tensor) -> Tensor:  # (..., V) -> (...)
        return log_probs.gather(-1, labels[..., None]).squeeze(-1)

    logp = of_label(log_probs(0.0))
    with torch.no_grad():
        return TokenStats(
            logp=logp,
            ref_logp=of_label(log_probs(-1.0)),
            delta_minus=of_label(log_probs(+epsilon_check)) - logp,
            delta_plus=of_label(log_probs(-epsilon_check)) - logp,
            kl=(log_probs(0.0).exp() * (log_probs(0.0) - log_probs(-1.0))).sum(-1),
        )


def token_stats(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, epsilon_check: float) -> TokenStats:
    """The numbers of every token, from logits (..., V) of both models and labels (...), without cancellation.

    Logits of any floating dtype (bf16 and fp16 are cast up), labels int64 in [0, V), ε_c = `epsilon_check` in [0, 1).
    Raises ValueError for shapes that do not match, a label outside the vocabulary, ε_c outside its range and
    logits that are not finite.
    """
    _check_logits(policy_logits, ref_logits, labels, epsilon_check)
    vocab = policy_logits.shape[-1]
    dtype = _common_dtype(policy_logits, ref_logits)
    f, f_ref = (logits.to(dtype).reshape(-1, vocab) for logits in (policy_logits, ref_logits))  # (M, V)
    stats = _chunk_stats(f.detach(), f_ref.detach(), labels.reshape(-1), epsilon_check)
    _check_finite(stats)
    logp = f.log_softmax(-1).gather(-1, labels.reshape(-1, 1)).squeeze(-1)  # once more, with gradient
    return TokenStats(*(x.reshape(labels.shape) for x in stats._replace(logp=logp)))


def linear_token_stats(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    epsilon_check: float,
    chunk_size: int = 256,
) -> TokenStats:
    """`token_stats` of the logits hidden @ weight.T, without ever holding more than `chunk_size` rows of them.

    Hidden states (M, D) and output matrices (V, D), each model with its own D; labels (M,) int64. The matmuls run in
    float32 or better, outside autocast: logits rounded to bf16 are beyond repair. Gradient reaches `policy_hidden`
    and `policy_weight`. Raises ValueError as `token_stats` does.
    """
    hidden, weights = (policy_hidden, ref_hidden), (policy_weight, ref_weight)
    if not all(x.is_floating_point() for x in (*hidden, *weights)):
        raise ValueError(f"a floating dtype expected, found {', '.join(str(x.dtype) for x in (*hidden, *weights))}")
    expected = all(
        h.ndim == w.ndim == 2
        and h.shape[1] == w.shape[1]
        and len(w) == len(policy_weight)
        and labels.shape == h.shape[:1]
        for h, w in zip(hidden, weights)
    )
    if not expected or chunk_size < 1:
        found = ", ".join(str(tuple(x.shape)) for x in (*hidden, *weights, labels))
        raise ValueError(
            "hidden states (M, D), (M, D'), output matrices (V, D), (V, D'), labels (M,) and chunk_size >= 1 expected, "
            f"found {found} and {chunk_size}"
        )
    _check_labels(labels, len(policy_weight), epsilon_check)
    stats = TokenStats(
        *_LinearTokenStats.apply(
            policy_hidden, policy_weight, ref_hidden.detach(), ref_weight.detach(), labels, epsilon_check, chunk_size
        )
    )
    _check_finite(stats)
    return stats


class _LinearTokenStats(torch.autograd.Function):
    """Recomputes logits in backward, but the last chunk's, and adds into one (V, D) gradient: logits never pile up."""

    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, labels, epsilon_check, chunk_size):
        ctx.save_for_backward(hidden, weight, labels)
        ctx.chunk_size, ctx.dtype = chunk_size, _common_dtype(hidden, weight, ref_hidden, ref_weight)
        w, ref_w = weight.to(ctx.dtype), ref_weight.to(ctx.dtype)
        chunks = []
        with _no_autocast(hidden):
            for h, r, y in zip(*(x.split(chunk_size) for x in (hidden, ref_hidden, labels))):
                ctx.last_logits = h.to(ctx.dtype) @ w.T  # kept: backward needs them first
                chunks.append(_chunk_stats(ctx.last_logits, r.to(ctx.dtype) @ ref_w.T, y, epsilon_check))
        stats = tuple(torch.cat(column) for column in zip(*chunks))
        ctx.mark_non_differentiable(*stats[1:])
        return stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        hidden, weight, labels = ctx.saved_tensors
        w, grad = weight.to(ctx.dtype), grad.to(ctx.dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(w)
        logits, ctx.last_logits = ctx.last_logits, None  # a second backward computes them again
        with _no_autocast(hidden):
            for start in reversed(range(0, len(hidden), ctx.chunk_size)):
                rows = slice(start, start + ctx.chunk_size)
                h, g, y = hidden[rows].to(w.dtype), grad[rows, None], labels[rows, None]
                logits = h @ w.T if logits is None else logits  # (chunk, V)
                # ∂ logp / ∂ logits = onehot(y) − p, times the gradient that arrives at the token's logp
                g_logits = logits.softmax(-1).mul_(-g).scatter_add_(-1, y, g)
                logits = None
                grad_hidden[rows] = g_logits @ w
                grad_weight.addmm_(g_logits.T, h)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _chunk_stats(logits: Tensor, ref_logits: Tensor, labels: Tensor, epsilon: float) -> TokenStats:
    """Numbers of (n,) tokens from their float32 or float64 logits (n, V): tile by tile, without gradient."""
    tile = max(1, TILE // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))
    limit = min(FLOAT64_FROM, 1 / epsilon) if epsilon else FLOAT64_FROM
    tiles = []
    for f, f_ref, y in zip(*(x.split(tile) for x in (logits, ref_logits, labels))):
        stats, size = _tile_stats(f, f_ref, y, epsilon)
        far = ~(size < limit)  # where exp leaves float32's range or precision, the same lines once more in float64
        if f.dtype == torch.float32 and far.any():
            exact, size[far] = _tile_stats(f[far].double(), f_ref[far].double(), y[far], epsilon)
            exact = exact._replace(
                ref_logp=stats.logp[far].double() + (exact.ref_logp - exact.logp), logp=stats.logp[far]
            )
            for column, values in zip(stats, exact):
                column[far] = values
        # A logit that is NaN or infinite makes |u| so; the mark is read once, after all chunks.
        tiles.append(stats._replace(kl=stats.kl.where(size.isfinite(), math.nan)))
    return TokenStats(*(torch.cat(column) for column in zip(*tiles)))


@torch.no_grad()
def _tile_stats(f: Tensor, f_ref: Tensor, labels: Tensor, epsilon: float) -> tuple[TokenStats, Tensor]:
    """The numbers of n tokens, and max|u| of each, from logits (n, V), with no two log-probabilities subtracted.

    With d = f − f_ref, u = d − d_y and p = softmax(f), all at one position,

        log π_s(y) − log π_θ(y)  =  −log E_p[exp(s·u)]  =  −(s·m + K(s)),   K(s) = log E_p[exp(s·c)]
        KL(π_θ ‖ π_ref)          =  K(−1)
        log π_ref(y) − log π_θ(y)                       =  m − K(−1)        (the first line at s = −1)

    with m = E_p[u], c = u − m. One function K serves all, and K(s) = log1p(E_p[h(s·c)]) with h(x) = expm1(x) − x ≥ 0:
    numbers near zero are sums of small terms and lose nothing.
    """
    y = labels[:, None]
    log_p = f.log_softmax(-1)  # (n, V)
    p = log_p.exp()
    d = f - f_ref
    u = d.sub_(d.gather(-1, y))  # (n, V), zero at the label
    low, high = u.amin(-1), u.amax(-1)  # (n,)
    size = torch.maximum(-low, high).double()  # max|u|
    u_mean = (p * u).sum(-1)
    points = (epsilon, -epsilon, -1.0)
    if f.dtype == torch.float32:
        largest = max(torch.maximum(high - u_mean, u_mean - low).tolist(), default=0.0)
        largest = min(largest, 2 * FLOAT64_FROM)  # positions beyond are computed once more, in float64
        sums = _sums_of_moments(p, u.sub_(u_mean[:, None]), largest, points)
        minus, plus, kl = (x.log1p() for x in sums)
        delta_minus, delta_plus = -(epsilon * u_mean.double() + minus), epsilon * u_mean.double() - plus
    else:
        delta_minus, delta_plus = (-_log_mean_exp(p, log_p, s * u, torch.expm1, lambda a: 1.0) for s in points[:2])
        kl = _log_mean_exp(p, log_p, u_mean[:, None] - u, _expm1_minus_x, lambda a: 1 + a)
    logp = log_p.gather(-1, y).squeeze(-1)
    ref_logp = logp.double() + (u_mean.double() - kl)
    return TokenStats(logp, ref_logp, delta_minus, delta_plus, kl), size


def _sums_of_moments(p: Tensor, c: Tensor, largest: float, points: tuple[float, ...]) -> list[Tensor]:
    """E_p[h(s·c)] = Σ_{k≥2} s^k·E_p[c^k] / k! at each point s, (n,) float64, from p and c (n, V) with |c| ≤ `largest`.

    The moments are the same for all points, and no exponential is taken: two passes over the logits for each of as many
    moments as `largest` asks for. What is left out is below 1e-7 of the sum.
    """
    sums, term, k, left_out = [0.0] * len(points), p * c, 1, 1.0
    while left_out > 1e-7:
        k += 1
        moment = term.mul_(c).sum(-1).double() / float(math.factorial(k))
        sums = [total + s**k * moment for total, s in zip(sums, points)]
        left_out = 2 * largest ** (k - 1) / math.factorial(k + 1)
    return sums


def _log_mean_exp(p: Tensor, log_p: Tensor, a: Tensor, excess: Callable, rest: Callable) -> Tensor:
    """log E_p[exp(a)] = log1p(E_p[excess(a)]), float64 (n,): excess(a) = exp(a) − rest(a), where E_p[rest(a)] = 1."""
    # Where exp(a) is large p may have underflowed: there p·exp(a) is exp(log p + a).
    terms = torch.where(a < 1, p * excess(a.clamp(max=1)), (log_p + a).exp() - p * rest(a))
    far = (log_p + a).logsumexp(-1)
    return torch.where(far.abs() < 0.4, terms.sum(-1).log1p(), far)


def _expm1_minus_x(x: Tensor) -> Tensor:
    """expm1(x) − x ≥ 0, by its series to x⁶ near zero, where the difference would cancel."""
    series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    return torch.where(x.abs() < 0.1, series, x.expm1() - x)


# ----------------------------------------------------------------------------------------------------------------------
# From tokens to responses, pairs, the loss and the next β


def sum_over_responses(stats: TokenStats, owner: Tensor, num_responses: int) -> TokenStats:
    """Sum the numbers of M tokens, (M,) each, into those of `num_responses` responses, (num_responses,) float64 each.

    Token i belongs to response owner[i] (int64, from 0); a response that owns no token sums to 0. Of B pairs, response
    i < B is the chosen one of pair i and B + i the rejected one.
    """

    def total(x: Tensor) -> Tensor:  # (M,) -> (num_responses,)
        return torch.zeros(num_responses, dtype=torch.float64, device=x.device).index_add(0, owner, x.double())

    return TokenStats(*(total(x) for x in stats))


def beta_steps(delta_minus: Tensor, delta_plus: Tensor) -> Tensor:
    """Which way each pair's β goes: +1 lower it, −1 raise it, 0 keep it (int64, of the arguments' shape).

    The arguments are differences chosen minus rejected: `delta_minus` = z(β⁻) − z(β), `delta_plus` = z(β⁺) − z(β).
    Raises ValueError for shapes that differ and for values that are not finite.
    """
    if delta_minus.shape != delta_plus.shape:
        raise ValueError(
            f"delta_minus {tuple(delta_minus.shape)} and delta_plus {tuple(delta_plus.shape)} differ in shape"
        )
    if not (delta_minus.isfinite().all() and delta_plus.isfinite().all()):
        raise ValueError("delta_minus and delta_plus must be finite: a NaN would silently keep β")
    lower = (delta_minus > 0) & (delta_plus < 0)
    raise_ = (delta_minus < 0) & (delta_plus > 0)
    return lower.long() - raise_.long()


def epsdpo_loss(chosen: TokenStats, rejected: TokenStats, beta: float, epsilon_step: float) -> EpsDPOLoss:
    """−log σ(β̃·margin) for pairs of responses, from per-response sums of shape (B,).

    β = `beta` > 0, the batch's baseline; ε_s = `epsilon_step` in [0, 0.5]: 0 is plain DPO to the bit. Raises ValueError
    for either outside its range, shapes that are not one (B,), and numbers that are not finite. B = 0 is allowed (a
    process without pairs): its `losses` are empty and their mean is nan.
    """
    _check_beta(beta, epsilon_step)
    shapes = {tuple(x.shape) for stats in (chosen, rejected) for x in stats}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"sums per response of one shape (B,) expected, found shapes {sorted(shapes)}")
    delta_minus = chosen.delta_minus.double() - rejected.delta_minus.double()
    delta_plus = chosen.delta_plus.double() - rejected.delta_plus.double()
    step = beta_steps(delta_minus, delta_plus)
    margin = (chosen.logp.double() - chosen.ref_logp.double()) - (rejected.logp.double() - rejected.ref_logp.double())
    beta_of_step = (beta, beta / (1 + epsilon_step), beta / (1 - epsilon_step))  # indexed by step: 0, +1, −1
    beta_pair = torch.tensor(beta_of_step, dtype=torch.float64, device=margin.device)[step]  # constant to the gradient
    if not margin.isfinite().all():
        raise ValueError("log-probabilities must be finite: the margin of a pair is not")
    losses = -F.logsigmoid(beta_pair * margin)
    return EpsDPOLoss(losses.mean(), losses, beta_pair, step, margin.detach())


def next_beta(beta: float, n_lower: int, n_keep: int, n_raise: int, epsilon_step: float) -> float:
    """β for the next batch: the mean of β̃ over this one, from how many of its pairs took step +1, 0 and −1.

    Counts add up exactly over micro-batches and processes, so every split of a batch gives the same β, and nothing
    drifts: with ε_s = 0, or all pairs kept, the factor is exactly 1. Raises ValueError for bad arguments.
    """
    _check_beta(beta, epsilon_step)
    n = n_lower + n_keep + n_raise
    if min(n_lower, n_keep, n_raise) < 0 or n == 0:
        raise ValueError(f"counts of pairs expected, found {n_lower} lower, {n_keep} keep, {n_raise} raise")
    return beta * ((n_lower / (1 + epsilon_step) + n_keep + n_raise / (1 - epsilon_step)) / n)


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def _common_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of them is, else float32: numbers that are subtracted must not have been rounded apart."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _check_beta(beta: float, epsilon_step: float) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta {beta}: a finite number above 0 expected")
    if not 0 <= epsilon_step <= 0.5:
        raise ValueError(f"epsilon_step {epsilon_step}: a number in [0, 0.5] expected")


def _check_logits(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, epsilon_check: float) -> None:
    shape = tuple(policy_logits.shape)
    shapes = {shape, tuple(ref_logits.shape), (*labels.shape, *shape[-1:])}
    if len(shapes) > 1 or not shape or not shape[-1]:
        found = f"{shape}, {tuple(ref_logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"logits (..., V) of both models and labels (...) expected, found {found}")
    if not (policy_logits.is_floating_point() and ref_logits.is_floating_point()):
        raise ValueError(f"logits of a floating dtype expected, found {policy_logits.dtype} and {ref_logits.dtype}")
    _check_labels(labels, shape[-1], epsilon_check)


def _check_labels(labels: Tensor, vocab: int, epsilon_check: float) -> None:
    if labels.dtype != torch.int64:
        raise ValueError(f"labels of dtype int64 expected, found {labels.dtype}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocab:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())}: outside the vocabulary of {vocab}")
    if not 0 <= epsilon_check < 1:
        raise ValueError(f"epsilon_check {epsilon_check}: a number in [0, 1) expected")


def _check_finite(stats: TokenStats) -> None:
    if not stats.kl.isfinite().all():
        where = stats.kl.isfinite().logical_not().nonzero()[0].item()
        raise ValueError(f"logits of token {where} are not finite: the policy or the reference has overflowed")
