"""ε-DPO: DPO in which every preference pair gets its own KL penalty β (arXiv 2502.13177), in plain PyTorch.

DPO treats a pair (chosen y_w, rejected y_l) as a coin with P(y_w ≻ y_l) = σ(β·margin), where β is the KL penalty and
margin = [log π_θ(y_w) − log π_ref(y_w)] − [log π_θ(y_l) − log π_ref(y_l)].

For each pair, ε-DPO asks whether a slightly smaller or larger β would separate this pair better, that is, raise the
log-odds z = log π(y_w) − log π(y_l). Asking needs no training: from the logits f that DPO computes anyway,
softmax(f_θ + s·(f_θ − f_ref)) at each position estimates the policy of β⁻ = β/(1+ε) (s = +ε) or β⁺ = β/(1−ε) (s = −ε).

    z(β⁻) > z(β) > z(β⁺)   a smaller β separates the pair better:  step +1, β̃ = β/(1+ε)
    z(β⁻) < z(β) < z(β⁺)   a larger β does:                        step −1, β̃ = β/(1−ε)
    anything else, ties included:                                  step  0, β̃ = β

    loss = mean of −log σ(β̃·margin), with β̃ constant to the gradient;  then β ← mean of β̃ over the whole batch.

The file follows the data: perturbed logits → numbers per token → sums per response → step per pair → loss → next β.

PORTING NOTES (for a port to another framework or language)
  Port first   `token_stats_by_definition` (the method, ten lines), `beta_steps`, `epsdpo_loss`, `next_beta`.
  Port next    `token_stats`: the same numbers without cancellation. It makes float32 steps right near the reference.
  Skip         `linear_token_stats` (it saves memory), the tiles (they save time).
  What ports get wrong                            what shows it
    three log-softmaxes subtracted in float32       wrong steps where logits differ little
    logits in bf16 or fp16, or a head under autocast   the same, much earlier; casting up afterwards does not help
    β per micro-batch, or a mean of means           the next β depends on how the batch was cut
    β̃ with gradient                                 the gradient differs from DPO's at β̃
    ε_c and ε_s mixed up; ε and −ε swapped           steps or β̃ differ once ε_c ≠ ε_s; every step has the other sign
    a token mean instead of the response's sum      wrong for pairs whose responses differ in length

  Paper's text                          authors' code                            here
  one ε                                 one ε                                    ε_c in the check, ε_s in the step
  β ← mean of β̃                         β / (1 + ε·mean step), the harmonic mean  arithmetic mean, from three counts
  no precision stated                   whatever the logits have (bf16)          increments, float32 logits or better
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1 << 19  # logits handled at a time on a CPU, so that a tile and its temporaries stay in the cache
FLOAT64_FROM = 4.0  # tokens whose logit differences spread this wide are computed in float64


class TokenStats(NamedTuple):
    """The numbers that ε-DPO needs for each token or, summed over tokens, for each response.

    Only `logp` carries gradient. Per token it has the logits' dtype (at least float32); the others are float64.
    """

    logp: Tensor  # log π_θ(y)
    ref_logp: Tensor  # log π_ref(y)
    delta_minus: Tensor  # log π(y) under β⁻ = β/(1+ε_c), minus log π_θ(y)
    delta_plus: Tensor  # log π(y) under β⁺ = β/(1−ε_c), minus log π_θ(y)
    kl: Tensor  # KL(π_θ ‖ π_ref) of the next-token distributions, in nats, ≥ 0


class EpsDPOLoss(NamedTuple):
    """The result of `epsdpo_loss`. All but `loss` have shape (B,). Only `loss` and `losses` carry gradient."""

    loss: Tensor  # scalar float64: the mean of `losses`
    losses: Tensor  # float64: −log σ(β̃·margin)
    beta: Tensor  # float64: β̃
    step: Tensor  # int64: +1 lowers β, 0 keeps it, −1 raises it
    margin: Tensor  # float64: the log-ratio of chosen minus that of rejected


# ---- from logits to numbers per token --------------------------------------------------------------------------------


def perturbed_logits(policy_logits: Tensor, ref_logits: Tensor, s: float) -> Tensor:
    """f_θ + s·(f_θ − f_ref): logits of the policy that another β would have given (Liu et al. 2024, Prop. 1).

    The optimal policy of β is π_ref·exp(r/β) up to a constant, so f_θ − f_ref is r/β, and (1+s) times it is r over
    β/(1+s): s = ±ε gives the policy of β/(1±ε), s = 0 the current policy and s = −1 the reference. Any real s is
    allowed. bf16 and fp16 logits are cast up to float32. Raises ValueError if the two shapes differ.
    """
    _check_shapes(policy_logits.shape == ref_logits.shape, "logits of one shape", policy_logits, ref_logits)
    dtype = _common_dtype(policy_logits, ref_logits)
    policy_logits, ref_logits = policy_logits.to(dtype), ref_logits.to(dtype)
    return policy_logits + s * (policy_logits - ref_logits)


def token_stats_by_definition(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, epsilon_check: float
) -> TokenStats:
    """The method as the paper states it: differences of log-softmaxes of mixed logits, in float64.

    Read and port this one. `token_stats` stays exact where these differences cancel. Same arguments and errors.
    """
    _check_logits(policy_logits, ref_logits, labels, epsilon_check)
    f, f_ref = policy_logits.double(), ref_logits.double()

    def logp_at(s: float) -> Tensor:  # (..., V) -> (...)
        return perturbed_logits(f, f_ref, s).log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)

    logp = logp_at(0.0)
    with torch.no_grad():
        delta_minus, delta_plus = logp_at(+epsilon_check) - logp, logp_at(-epsilon_check) - logp
        log_p, log_p_ref = f.log_softmax(-1), f_ref.log_softmax(-1)  # (..., V)
        kl = (log_p.exp() * (log_p - log_p_ref)).sum(-1)
        stats = TokenStats(logp, logp_at(-1.0), delta_minus, delta_plus, kl)
    _check_finite(stats)
    return stats


def token_stats(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, epsilon_check: float) -> TokenStats:
    """The numbers of every token, (...) each, from both models' logits (..., V) and labels (...), without cancellation.

    Logits of any floating dtype (bf16 and fp16 are cast up), labels int64 in [0, V), ε_c = `epsilon_check` in [0, 1).
    Raises ValueError if shapes or dtypes do not fit, a label or ε_c is out of range, or a logit is not finite.
    """
    _check_logits(policy_logits, ref_logits, labels, epsilon_check)
    dtype = _common_dtype(policy_logits, ref_logits)
    f, f_ref = (x.to(dtype).reshape(-1, x.shape[-1]) for x in (policy_logits, ref_logits))  # (M, V)
    stats = _chunk_stats(f.detach(), f_ref.detach(), labels.reshape(-1), epsilon_check)
    _check_finite(stats)
    logp = f.log_softmax(-1).gather(-1, labels.reshape(-1, 1)).squeeze(-1)
    logp = stats.logp + (logp - logp.detach())  # the exact value from above, with autograd's gradient
    return TokenStats(*(x.reshape(labels.shape) for x in stats._replace(logp=logp)))


def linear_token_stats(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    epsilon_check: float,
    chunk_size: int = 256,
    weight_grad: Tensor | None = None,
) -> TokenStats:
    """`token_stats` of the logits hidden @ weight.T, computing the logits of at most `chunk_size` tokens at a time.

    Hidden states (M, D) and output matrices (V, D), each model with its own D; labels (M,), int64. The matmuls run in
    float32 or better, outside autocast: logits rounded to bf16 cannot be repaired. Gradient reaches `policy_hidden`
    and `policy_weight`. Raises ValueError in the same cases as `token_stats`.
    weight_grad: `policy_weight.grad`, for backward to add to in place. It is used if it has the logits' dtype.
    """
    tensors = (policy_hidden, policy_weight, ref_hidden.detach(), ref_weight.detach(), labels)
    _check_linear(*tensors, epsilon_check, chunk_size)
    stats = TokenStats(*_LinearTokenStats.apply(*tensors, epsilon_check, chunk_size, weight_grad))
    _check_finite(stats)
    return stats


class _LinearTokenStats(torch.autograd.Function):
    """Computes logits in chunks, and all but the last chunk's again in backward, into one (V, D) gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, labels, epsilon_check, chunk_size, weight_grad):
        ctx.save_for_backward(hidden, weight, labels)
        ctx.chunk_size, ctx.weight_grad = chunk_size, weight_grad
        ctx.dtype = _common_dtype(hidden, weight, ref_hidden, ref_weight)
        w, ref_w = weight.to(ctx.dtype), ref_weight.to(ctx.dtype)
        chunks = []
        with torch.autocast(hidden.device.type, enabled=False):
            for h, r, y in zip(*(x.split(chunk_size) for x in (hidden, ref_hidden, labels))):
                ctx.last_logits = h.to(ctx.dtype) @ w.T  # (chunk, V), kept because backward needs the last ones first
                chunks.append(_chunk_stats(ctx.last_logits, r.to(ctx.dtype) @ ref_w.T, y, epsilon_check))
        stats = tuple(torch.cat(column) for column in zip(*chunks))
        ctx.mark_non_differentiable(*stats[1:])
        return stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        hidden, weight, labels = ctx.saved_tensors
        w, grad = weight.to(ctx.dtype), grad.to(ctx.dtype)
        in_place = ctx.weight_grad is not None and ctx.weight_grad.dtype == ctx.dtype
        grad_hidden, grad_weight = torch.empty_like(hidden), ctx.weight_grad if in_place else torch.zeros_like(w)
        logits, ctx.last_logits = ctx.last_logits, None  # a second backward computes them again
        with torch.autocast(hidden.device.type, enabled=False):
            for start in reversed(range(0, len(hidden), ctx.chunk_size)):
                chunk = slice(start, start + ctx.chunk_size)
                h, g, y = hidden[chunk].to(w.dtype), grad[chunk, None], labels[chunk, None]
                logits = h @ w.T if logits is None else logits  # (chunk, V)
                # ∂ logp / ∂ logits = onehot(y) − p, times the gradient that arrives at the token's logp
                g_logits = logits.softmax(-1).mul_(-g).scatter_add_(-1, y, g)
                logits = None
                grad_hidden[chunk] = g_logits @ w
                grad_weight.addmm_(g_logits.T, h)
        return grad_hidden, None if in_place else grad_weight.to(weight.dtype), *[None] * 6


@torch.no_grad()
def _chunk_stats(logits: Tensor, ref_logits: Tensor, labels: Tensor, epsilon: float) -> TokenStats:
    """The numbers of n tokens, (n,) each, from float32 or float64 logits (n, V), tile by tile and without gradient."""
    tile = max(1, TILE // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))
    tiles = []
    for f, f_ref, y in zip(*(x.split(tile) for x in (logits, ref_logits, labels))):
        logp, increments, far = _increments(f, f_ref, y, epsilon)
        if f.dtype == torch.float32 and far.any():
            increments[:, far] = _increments(f[far].double(), f_ref[far].double(), y[far], epsilon)[1]
        delta_minus, delta_plus, delta_ref, kl = increments
        tiles.append(TokenStats(logp, logp.double() + delta_ref, delta_minus, delta_plus, kl))
    return TokenStats(*(torch.cat(column) for column in zip(*tiles)))


def _increments(f: Tensor, f_ref: Tensor, labels: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """For n tokens with logits (n, V): logp (n,), increments (4, n), and a mask (n,) of tokens that need float64.

    The increments are log π_s(y) − log π_θ(y) at s = ε, −ε and −1 (the reference), and the KL. They are float64, and
    no two log-probabilities are subtracted. With d = f − f_ref, u = d − d_y and p = softmax(f), all at one position,

        log π_s(y) − log π_θ(y)  =  −log E_p[exp(s·u)]  =  −(s·m + K(s)),   K(s) = log E_p[exp(s·c)]
        KL(π_θ ‖ π_ref)          =  K(−1)

    with m = E_p[u] and c = u − m. K(s) = log1p(E_p[h(s·c)]) with h(x) = expm1(x) − x ≥ 0: numbers near zero are sums
    of small terms and lose nothing. If a logit is not finite, m is not, and then c and the KL are NaN.
    """
    y = labels[:, None]  # (n, 1)
    p = f.softmax(-1)  # (n, V)
    p /= p.sum(-1, keepdim=True)  # again: for a large V the sum inside softmax is off by 1e-6, this one by 1e-7
    top, p_top = f.amax(-1, keepdim=True), p.amax(-1, keepdim=True)  # (n, 1): p_top = 1 / Σ exp(f − top)
    logp = f.gather(-1, y) - top + p_top.log()
    d = f - f_ref
    u = d.sub_(d.gather(-1, y))  # zero at the label; d, u and c share one buffer
    low, high = u.amin(-1), u.amax(-1)  # (n,)
    m = (p * u).sum(-1)
    c = u.sub_(m[:, None])
    size = torch.maximum(-low, high).double()  # max|u|
    far = ~((size < FLOAT64_FROM) & (epsilon * size < 1))  # these need float64; NaN is one of them
    points = (epsilon, -epsilon, -1.0)
    if f.dtype == torch.float32:
        reach = torch.maximum(high - m, m - low).double().where(~far, 0.0)  # max|c|
        K = _log_mean_exp_by_moments(p, c, reach, points)
    else:
        log_p = f - top + p_top.log()
        K = [_log_mean_exp(p, log_p, s * c) for s in points]
    deltas = [-(s * m.double() + k) for s, k in zip(points, K)]
    return logp.squeeze(-1), torch.stack([*deltas, K[-1]]), far


def _log_mean_exp_by_moments(p: Tensor, c: Tensor, reach: Tensor, points: tuple[float, ...]) -> list[Tensor]:
    """K(s) at each point s, (n,) float64, where |c| ≤ `reach` (n,): E_p[h(s·c)] = Σ_{k≥2} s^k·E_p[c^k] / k!.

    All points share the moments, which cost two passes over the logits each and no exponential. A token takes as many
    as it needs, whatever its neighbours need: what is left out is below 1e-7 of the first term.
    """

    def matters(reach: Tensor | float, k: int) -> Tensor | bool:  # term k ≤ 2·reach^(k−2) / k! · term 2
        return 2 * reach ** (k - 2) / float(math.factorial(k)) > 1e-7

    sums, term, k = [0.0] * len(points), p * c, 2
    largest = max(reach.tolist(), default=0.0)
    while matters(largest, k):
        moment = term.mul_(c).sum(-1).double() / float(math.factorial(k))
        moment = moment.where(matters(reach, k), 0.0)
        sums = [total + s**k * moment for total, s in zip(sums, points)]
        k += 1
    return [total.log1p() for total in sums]


def _log_mean_exp(p: Tensor, log_p: Tensor, x: Tensor) -> Tensor:
    """log E_p[exp(x)], (n,), for float64 x (n, V) with E_p[x] = 0. Near zero h is its Taylor series."""
    tilted = log_p + x
    large = tilted.logsumexp(-1)
    series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8 * (1 + x / 9)))))))
    h = torch.where(x.abs() < 0.1, p * series, tilted.exp() - p * (1 + x))  # p·h(x), which cancels near zero
    return torch.where(large.abs() < 0.4, h.sum(-1).log1p(), large)


# ---- from tokens to responses, pairs, the loss and the next β --------------------------------------------------------


def sum_over_responses(stats: TokenStats, owner: Tensor, num_responses: int) -> TokenStats:
    """Sum the numbers of M tokens, (M,) each, into those of `num_responses` responses, (num_responses,) float64 each.

    Token i belongs to response owner[i] (int64, from 0). A response without tokens sums to 0. With B pairs, response
    i < B is the chosen one of pair i and response B + i is its rejected one.
    """
    zeros = torch.zeros(num_responses, dtype=torch.float64, device=owner.device)
    return TokenStats(*(zeros.index_add(0, owner, x.double()) for x in stats))


def beta_steps(delta_minus: Tensor, delta_plus: Tensor) -> Tensor:
    """The direction of each pair's β: +1 lowers it, −1 raises it, 0 keeps it (int64, of the arguments' shape).

    The arguments are differences chosen minus rejected: `delta_minus` = z(β⁻) − z(β), `delta_plus` = z(β⁺) − z(β).
    Raises ValueError if the shapes differ or a value is not finite.
    """
    _check_shapes(delta_minus.shape == delta_plus.shape, "deltas of one shape", delta_minus, delta_plus)
    if not (delta_minus.isfinite().all() and delta_plus.isfinite().all()):
        raise ValueError("delta_minus and delta_plus must be finite: a NaN would silently keep β")
    lower = (delta_minus > 0) & (delta_plus < 0)
    raise_ = (delta_minus < 0) & (delta_plus > 0)
    return lower.long() - raise_.long()


def epsdpo_loss(chosen: TokenStats, rejected: TokenStats, beta: float, epsilon_step: float) -> EpsDPOLoss:
    """−log σ(β̃·margin) for pairs of responses, from per-response sums of shape (B,). Gradient goes to `logp` alone.

    `beta` > 0 is the batch's β; ε_s = `epsilon_step` is in [0, 0.5], and 0 is plain DPO to the bit. B = 0 (a process
    without pairs) gives a NaN loss. Raises ValueError if a number is out of range or not finite, or shapes differ.
    """
    _check_beta(beta, epsilon_step)
    fit = chosen.logp.ndim == 1 and all(x.shape == chosen.logp.shape for x in (*chosen, *rejected))
    _check_shapes(fit, "sums per response of one shape (B,)", *chosen, *rejected)
    delta_minus = chosen.delta_minus.double() - rejected.delta_minus.double()
    delta_plus = chosen.delta_plus.double() - rejected.delta_plus.double()
    step = beta_steps(delta_minus, delta_plus)
    log_ratios = [x.logp.double() - x.ref_logp.detach().double() for x in (chosen, rejected)]  # log π_θ(y)/π_ref(y)
    margin = log_ratios[0] - log_ratios[1]
    if not margin.isfinite().all():
        raise ValueError("log-probabilities must be finite, but the margin of a pair is not")
    beta_of_step = (beta, beta / (1 + epsilon_step), beta / (1 - epsilon_step))  # indexed by step: 0, +1, −1
    beta_pair = torch.tensor(beta_of_step, dtype=torch.float64, device=margin.device)[step]  # constant to the gradient
    losses = -F.logsigmoid(beta_pair * margin)
    return EpsDPOLoss(losses.mean(), losses, beta_pair, step, margin.detach())


def next_beta(beta: float, n_lower: int, n_keep: int, n_raise: int, epsilon_step: float) -> float:
    """β for the next batch: the mean of β̃ over this one, from the counts of its pairs with step +1, 0 and −1.

    Counts add up exactly over micro-batches and processes, so every split of a batch gives the same β. With ε_s = 0,
    or if all pairs keep their β, the factor is exactly 1. Raises ValueError if an argument is out of range.
    """
    _check_beta(beta, epsilon_step)
    n = n_lower + n_keep + n_raise
    if not (min(n_lower, n_keep, n_raise) >= 0 and 0 < n < math.inf):
        raise ValueError(f"expected counts of pairs, found {n_lower} lower, {n_keep} keep, {n_raise} raise")
    return beta * ((n_lower / (1 + epsilon_step) + n_keep + n_raise / (1 - epsilon_step)) / n)


# ---- precision and checks --------------------------------------------------------------------------------------------


def _common_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of them is, else float32: two tensors must not be rounded differently before a subtraction."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _check_beta(beta: float, epsilon_step: float) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be finite and above 0 (got {beta})")
    if not 0 <= epsilon_step <= 0.5:
        raise ValueError(f"epsilon_step must be between 0 and 0.5 (got {epsilon_step})")


def _check_shapes(fit: bool, expected: str, *tensors: Tensor) -> None:
    if not fit:
        raise ValueError(f"expected {expected}, found {', '.join(str(tuple(x.shape)) for x in tensors)}")


def _check_logits(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, epsilon_check: float) -> None:
    vocab = policy_logits.shape[-1] if policy_logits.ndim else 0
    fit = vocab > 0 and policy_logits.shape == ref_logits.shape == (*labels.shape, vocab)
    _check_shapes(fit, "logits (..., V) of both models and labels (...)", policy_logits, ref_logits, labels)
    _check_values((policy_logits, ref_logits), labels, vocab, epsilon_check)


def _check_linear(hidden, weight, ref_hidden, ref_weight, labels, epsilon_check: float, chunk_size: int) -> None:
    inputs = (hidden, weight, ref_hidden, ref_weight)
    fit = all(x.ndim == 2 for x in inputs) and len(weight) == len(ref_weight)
    for h, w in ((hidden, weight), (ref_hidden, ref_weight)):
        fit = fit and h.shape == (*labels.shape, w.shape[1])
    _check_shapes(fit, "(M, D), (V, D), the reference's (M, D'), (V, D') and labels (M,)", *inputs, labels)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 (got {chunk_size})")
    _check_values(inputs, labels, len(weight), epsilon_check)


def _check_values(inputs: tuple[Tensor, ...], labels: Tensor, vocab: int, epsilon_check: float) -> None:
    if not all(x.is_floating_point() for x in inputs):
        raise ValueError(f"expected a floating dtype, found {', '.join(str(x.dtype) for x in inputs)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"expected int64 labels, found {labels.dtype}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocab:
        raise ValueError(f"expected labels from 0 to {vocab - 1}, found {int(labels.min())} to {int(labels.max())}")
    if not 0 <= epsilon_check < 1:
        raise ValueError(f"epsilon_check must be at least 0 and below 1 (got {epsilon_check})")


def _check_finite(stats: TokenStats) -> None:
    if not stats.kl.isfinite().all():
        token = stats.kl.isfinite().logical_not().flatten().nonzero()[0].item()
        raise ValueError(f"logits of token {token} are not finite: the policy or the reference has overflowed")
