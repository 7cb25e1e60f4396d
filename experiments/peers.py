"""The methods that ε-DPO is compared with: their losses, and what they change after a step.

The functions take float64 tensors (B,): log-ratios log π_θ − log π_ref of chosen (w) and rejected (l) responses, or
their difference, the margin. `train.train` accepts an object of the classes as its method.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from epsdpo import EpsDPOLoss, TokenStats
from model import GPT
from support.rows import Batch, Pair, collate
from train import score_pairs


def dpo(margin: Tensor, beta: float | Tensor) -> Tensor:
    """Rafailov et al. 2023, arXiv 2305.18290, eq. 7."""
    return -F.logsigmoid(beta * margin)


def ipo(margin: Tensor, beta: float) -> Tensor:
    """Azar et al. 2023, arXiv 2310.12036, eq. 17 (β is its τ); log-ratios are sums over tokens, as in the paper."""
    return (margin - 1 / (2 * beta)) ** 2


def simpo(mean_w: Tensor, mean_l: Tensor, beta: float, gamma: float) -> Tensor:
    """Meng et al. 2024, arXiv 2405.14734, eq. 6: log-probabilities per token, no reference."""
    return -F.logsigmoid(beta * (mean_w - mean_l) - gamma)


def orpo(mean_w: Tensor, mean_l: Tensor, weight: float) -> Tensor:
    """Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7: likelihood of the chosen response, odds ratio times λ."""
    odds_w, odds_l = (mean - (-mean.expm1()).log() for mean in (mean_w, mean_l))  # logarithms
    return -mean_w - weight * F.logsigmoid(odds_w - odds_l)


def kto(ratio_w: Tensor, ratio_l: Tensor, kl: Tensor, beta: float) -> Tensor:
    """Ethayarajh et al. 2024, arXiv 2402.01306, λ_D = λ_U = 1: mean of the losses of both responses."""
    return (2 - torch.sigmoid(beta * (ratio_w - kl)) - torch.sigmoid(beta * (kl - ratio_l))) / 2


def dynamic_beta(margin: Tensor, running_mean: float, beta: float, m: float) -> Tensor:
    """β₀·(1 + m·(β₀·margin − running mean)): Wu et al. 2024, arXiv 2407.08639, of a pair or a batch's mean margin."""
    return (beta * (1 + m * (beta * margin - running_mean))).clamp(min=1e-3)


def keep_typical(reward_margin: Tensor, mean: float, std: float, share: float) -> Tensor:
    """β-DPO's filter: indices of a `share` of the pairs, drawn with normal weights around the running mean."""
    weight = torch.exp(-(((reward_margin - mean) / max(std, 1e-12)) ** 2) / 2).clamp(min=1e-30)
    return weight.multinomial(max(1, round(share * len(weight))))


def log_ratios(chosen: TokenStats, rejected: TokenStats) -> tuple[Tensor, Tensor]:
    return tuple(x.logp.double() - x.ref_logp.double() for x in (chosen, rejected))


def result(losses: Tensor, margin: Tensor, beta: float | Tensor) -> EpsDPOLoss:
    """The form that `train` expects; no pair takes a step."""
    none = torch.zeros_like(margin, dtype=torch.int64)
    return EpsDPOLoss(losses.mean(), losses, beta + 0.0 * margin.detach(), none, margin.detach())


@dataclass
class Peer:
    """A method without state: `kind` is dpo, ipo, simpo or orpo; `extra` is SimPO's γ or ORPO's λ."""

    beta: float
    kind: str = "dpo"
    extra: float = 0.0
    epsilon_check = 0.0  # no check; not a field, so not a state

    def loss(self, chosen: TokenStats, rejected: TokenStats, batch: Batch) -> EpsDPOLoss:
        margin, size = torch.sub(*log_ratios(chosen, rejected)), len(chosen.logp)
        lengths = batch.owner.bincount(minlength=2 * size)  # tokens of the 2B responses
        means = chosen.logp / lengths[:size], rejected.logp / lengths[size:]
        if self.kind in ("dpo", "ipo"):
            return result({"dpo": dpo, "ipo": ipo}[self.kind](margin, self.beta), margin, self.beta)
        losses = simpo(*means, self.beta, self.extra) if self.kind == "simpo" else orpo(*means, self.extra)
        return result(losses, margin, self.beta)

    def after_step(self, sums: dict[str, float], policy: GPT, reference: GPT) -> None:
        pass


@dataclass
class TRDPO(Peer):
    """Gorbatovski et al. 2024, arXiv 2404.09656: every τ steps reference ← α·policy + (1 − α)·reference, in place."""

    alpha: float = 1.0
    tau: int = 1
    steps: int = 0

    @torch.no_grad()
    def after_step(self, sums: dict[str, float], policy: GPT, reference: GPT) -> None:
        self.steps += 1
        if self.steps % self.tau == 0:
            for ours, now in zip(reference.parameters(), policy.parameters()):
                ours.lerp_(now, self.alpha)


@dataclass
class BetaDPO(Peer):
    """β-DPO: one β for a batch, from the mean margin of the pairs that its filter keeps; or one for each pair.

    `beta` stays β₀. A batch must fit into one micro-batch. Running means are updated before they are used.
    """

    m: float = 0.6
    share: float = 0.8
    instance: bool = False
    mean: float = 0.0
    std: float = 0.0

    def loss(self, chosen: TokenStats, rejected: TokenStats, batch: Batch) -> EpsDPOLoss:
        margin = torch.sub(*log_ratios(chosen, rejected))
        seen = self.beta * margin.detach()
        if torch.is_grad_enabled():  # an evaluation changes nothing
            self.mean = 0.9 * self.mean + 0.1 * float(seen.mean())
            self.std = 0.9 * self.std + 0.1 * float(seen.std(correction=0))
        if self.instance:
            beta = dynamic_beta(margin.detach(), self.mean, self.beta, self.m)
            return result(dpo(margin, beta), margin, beta)
        kept = keep_typical(seen, self.mean, self.std, self.share)
        weight = torch.zeros_like(seen).index_fill(0, kept, len(seen) / len(kept))  # mean over kept pairs
        beta = dynamic_beta(margin.detach()[kept].mean(), self.mean, self.beta, self.m)
        return result(dpo(margin, beta) * weight, margin, beta)


@dataclass
class KTO(Peer):
    """KTO estimates its KL from responses to another pair's prompt: one more forward pass of both models."""

    policy: GPT | None = None
    reference: GPT | None = None

    def loss(self, chosen: TokenStats, rejected: TokenStats, batch: Batch) -> EpsDPOLoss:
        with torch.no_grad():
            other = score_pairs(self.policy, self.reference, mismatched(batch), 0.0, "float32")
            kl = torch.cat(log_ratios(*other)).mean().clamp(min=0)
        ratio_w, ratio_l = log_ratios(chosen, rejected)
        return result(kto(ratio_w, ratio_l, kl, self.beta), ratio_w - ratio_l, self.beta)


def mismatched(batch: Batch) -> Batch:
    """A batch in which each prompt has the responses of the next pair (the last prompt those of the first pair)."""
    rows = zip(batch.tokens.cpu().numpy(), batch.segments.cpu().numpy())
    parts = [[tokens[segments == part] for part in (0, 1, 2)] for tokens, segments in rows]
    moved = [Pair(mine[0], *other[1:]) for mine, other in zip(parts, parts[1:] + parts[:1])]
    return collate(moved).to(batch.tokens.device)
