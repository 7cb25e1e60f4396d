"""A world small enough to list, where every number about a policy can be computed and none has to be estimated.

The alphabet is a–e. A prompt is one letter; a response is 0 to 5 letters and a stop, which makes 3,906 responses for
each of 5 prompts. After five letters the world stops by itself: that stop is neither sampled nor scored, so the
probabilities of the listed responses sum to exactly 1. The reward can be checked by eye: +1 for each occurrence of the
prompt's letter, −1 for each doubled letter. For prompt a, "abca." earns 2 and "aab." earns 2 − 1 = 1.

A *policy* is any callable from tokens (B, T) int64 to next-token logits (B, T, 6): a model, or the language itself.
What it does in this world is one tensor (5, 3906), the log-probabilities of all responses; nothing else is asked of it.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class World:
    """P = `letters` prompts, each with the same list of N responses of at most `length` letters; token `letters` stops.

    Responses are listed by length, then alphabetically. This is the order of a tree where each node has one child per
    letter: a response shorter than `length` stops at its node, one of full length has arrived at a leaf.
    """

    seed: int = 0
    letters: int = 5
    length: int = 5

    @cached_property
    def responses(self) -> Tensor:  # (N, length) int64, letters first, then stops
        def level(n: int) -> Tensor:  # all texts of n letters are the numbers of n digits
            digits = torch.arange(self.letters**n)[:, None] // self.letters ** torch.arange(n).flip(0) % self.letters
            return F.pad(digits, (0, self.length - n), value=self.letters)

        return torch.cat([level(n) for n in range(self.length + 1)])

    @cached_property
    def sizes(self) -> Tensor:  # (N,) int64: tokens sampled and scored, the stop among them unless the world made it
        return ((self.responses < self.letters).sum(1) + 1).clamp(max=self.length)

    @cached_property
    def reward(self) -> Tensor:  # (P, N) int64
        y = self.responses
        hits = (y == torch.arange(self.letters)[:, None, None]).sum(-1)
        doubled = (y[:, 1:] == y[:, :-1]) & (y[:, 1:] < self.letters)
        return hits - doubled.sum(-1)

    @cached_property
    def chain(self) -> Tensor:  # (P, letters, letters) float64: P(next letter | prompt, letter before it)
        dice = torch.Generator().manual_seed(self.seed)
        spread = 0.7  # uneven, but no letter so rare after another that the pairs would hardly show it
        return (spread * torch.randn(3 * [self.letters], generator=dice, dtype=torch.float64)).softmax(-1)

    def language(self, tokens: Tensor) -> Tensor:
        """The language as a policy: a first-order Markov chain for each prompt, that starts from the prompt's letter.

        Its stop has probability 0.1 at first and 0.1 more after each letter, at most 0.9. Takes `rows` (B, T); returns
        log-probabilities (B, T, letters + 1) float64, which mean nothing at the first token and after a stop.
        """
        stop = 0.1 * torch.arange(tokens.shape[1], dtype=torch.float64).clamp(max=9)  # (T,)
        stop = stop.expand(tokens.shape)[..., None]  # (B, T, 1)
        chain = self.chain[tokens[:, 1:2], tokens.clamp(max=self.letters - 1)]  # (B, T, letters)
        return torch.cat([chain * (1 - stop), stop], -1).log()

    def prompt_ids(self, prompt: int) -> np.ndarray:
        """Token ids of a prompt: a stop (of whatever was before), then its letter.

        Without the stop a model with rotary positions, which sees distances alone, could not tell the row "a" from the
        rows "aa" and "aaa": all it can attend to is the same. After a prompt the next letter would have to be as
        likely as after the prompt and its letter, though one earns a point there and the other none.
        """
        return np.array([self.letters, prompt], np.int32)

    def response_ids(self, response: int) -> np.ndarray:
        """Token ids of a listed response: its letters, and a stop if there are fewer than `length`."""
        return self.responses[response, : self.sizes[response]].numpy().astype(np.int32)

    def text(self, response: int) -> str:
        """A listed response for people: "abca." """
        return "".join((string.ascii_lowercase[: self.letters] + ".")[i] for i in self.response_ids(response))

    def rows(self, prompt: Tensor, response: Tensor) -> Tensor:
        """Prompts and responses, (B,) int64 each, as rows of tokens (B, 1 + length), the last token left out."""
        start = torch.full_like(prompt, self.letters)
        return torch.cat([start[:, None], prompt[:, None], self.responses[response, :-1]], 1)

    @torch.no_grad()
    def list_logps(self, policy: Callable[[Tensor], Tensor], device: torch.device | str = "cpu") -> Tensor:
        """log π(y|x) of every response, (P, N) float64 on the CPU, from one pass over all rows of `length` − 1 letters.

        The rows, (P · letters^(length−1), 1 + length), are on `device`; the logits are normalised in float64.
        """
        longest = torch.nonzero((self.responses < self.letters).sum(1) == self.length - 1)[:, 0]  # stopped just in time
        tokens = self.rows(torch.arange(self.letters).repeat_interleave(len(longest)), longest.repeat(self.letters))
        logps = policy(tokens.to(device))[:, 1:].double().cpu().log_softmax(-1)  # (P · longest, length, V)
        logps = logps.view(self.letters, len(longest), self.length, -1)
        prefix, stopped = logps.new_zeros(self.letters, 1), []  # log P(begins with it), log P(is it), of n letters
        for n in range(self.length):
            node = logps[:, :: self.letters ** (self.length - 1 - n), n]  # (P, letters^n, V): one row for each prefix
            stopped.append(prefix + node[..., -1])
            prefix = (prefix[..., None] + node[..., :-1]).flatten(1)  # (P, letters^(n+1))
        return torch.cat([*stopped, prefix], 1)


def fit_reference(model: torch.nn.Module, world: World, steps: int = 300, seed: int = 0, lr: float = 3e-3) -> float:
    """Train `model` on the language by maximum likelihood; returns KL(language ‖ model) in nats.

    Each step draws 64 texts, but scores all next tokens at each of their prefixes with the language's probabilities,
    which is what sampled tokens would score on average. So the gradient's noise vanishes as the model arrives.
    """
    dice, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    language = world.list_logps(world.language)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        text = torch.multinomial(language.exp().flatten(), 64, replacement=True, generator=dice)
        response = text % language.shape[1]
        tokens = world.rows(text // language.shape[1], response)
        scored = torch.arange(world.length) < world.sizes[response, None]  # (64, length)
        target = world.language(tokens)[:, 1:][scored].exp().float().to(device)  # (M, V)
        loss = F.cross_entropy(model(tokens.to(device))[:, 1:][scored.to(device)].float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(kl(language, world.list_logps(model, device)))


def sample_pairs(logp: Tensor, reward: Tensor, n: int, scale: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """n preferences (prompt, chosen, rejected), each an (n,) int64 tensor of places in the list.

    Prompts are uniform; both responses are drawn from `logp` (P, N), anew while they are equal; the first is chosen
    with probability σ(scale · (r1 − r2)) (Bradley–Terry). ValueError if `logp` leaves nothing to choose between.
    """
    if logp.max() > math.log(0.999):
        raise ValueError(f"one response has probability {logp.max().exp():.6f}: two different ones cannot be drawn")
    dice = torch.Generator().manual_seed(seed)
    prompt = torch.randint(len(logp), (n,), generator=dice)
    pair = torch.zeros(n, 2, dtype=torch.int64)
    while (equal := pair[:, 0] == pair[:, 1]).any():  # both anew: keeping the first would change its distribution
        draws = torch.multinomial(logp.exp(), 2 * n, replacement=True, generator=dice).view(-1, n, 2)
        pair[equal] = draws[prompt, torch.arange(n)][equal]
    r = reward[prompt[:, None], pair].double()  # (n, 2)
    first = torch.rand(n, generator=dice, dtype=torch.float64) < torch.sigmoid(scale * (r[:, 0] - r[:, 1]))
    chosen = torch.where(first, pair[:, 0], pair[:, 1])
    return prompt, chosen, pair.sum(1) - chosen


# ----------------------------------------------------------------------------------------------------------------------
# Exact numbers, means over prompts, from log-probabilities of all responses (P, N) float64 and their rewards (P, N)


def mean_reward(logp: Tensor, reward: Tensor) -> Tensor:
    """E_π[r], a scalar."""
    return (logp.exp() * reward).sum(-1).mean()


def kl(logp: Tensor, other: Tensor) -> Tensor:
    """KL(π ‖ other) in nats, a scalar ≥ 0; what π never says adds nothing."""
    return torch.where(logp == -math.inf, 0.0, logp.exp() * (logp - other)).sum(-1).mean().clamp(min=0.0)


def optimum(ref_logp: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log π*, π* = π_ref · e^{r/β} / Z: what maximises E[r] − β·KL(π ‖ π_ref) (Rafailov et al. 2023, eq. 4).

    Labels of Bradley–Terry scale s are those of the reward s·r: from all pairs, DPO at β learns π* of β/s.
    """
    return (ref_logp + reward.double() / beta).log_softmax(-1)


def frontier(ref_logp: Tensor, reward: Tensor, at_kl: float) -> Tensor:
    """The best E[r] of any policy with KL(π ‖ π_ref) ≤ `at_kl`: that of π*(β′), β′ found by bisection on its log."""
    low, high = math.log(1e-4), math.log(1e7)  # from "only the best responses are left" to "nothing has moved"
    for _ in range(60):
        middle = (low + high) / 2
        if kl(optimum(ref_logp, reward, math.exp(middle)), ref_logp) > at_kl:
            low = middle
        else:
            high = middle
    return mean_reward(optimum(ref_logp, reward, math.exp(high)), reward)


def win_rate(logp: Tensor, ref_logp: Tensor, reward: Tensor) -> Tensor:
    """P(a response of π has more reward than one of π_ref), a tie counting ½; all N² pairs, by levels of reward."""
    level = reward.long() - reward.long().min()
    empty = torch.zeros(len(logp), int(level.max()) + 1, dtype=torch.float64)
    ours, theirs = empty.scatter_add(1, level, logp.exp()), empty.scatter_add(1, level, ref_logp.exp())  # (P, levels)
    return (ours * (theirs.cumsum(1) - theirs / 2)).sum(-1).mean()


class Report(NamedTuple):
    """Everything there is to know about a policy, exact. `share` is nan where π = π_ref and no gain is attainable."""

    reward: float  # E_π[r]
    kl: float  # KL(π ‖ π_ref), nats
    win_rate: float  # over the reference, ties ½
    share: float  # of the gain in reward that the best policy at the same KL has
    objective: float  # J(π) = E_π[r] − β·KL(π ‖ π_ref)
    kl_to_optimum: float  # KL(π ‖ π*); β times it is J(π*) − J(π)


def report(logp: Tensor, ref_logp: Tensor, reward: Tensor, beta: float) -> Report:
    gained, distance = mean_reward(logp, reward), kl(logp, ref_logp)
    start = mean_reward(ref_logp, reward)
    share = (gained - start) / (frontier(ref_logp, reward, distance) - start) if distance > 1e-12 else math.nan
    values = (gained, distance, win_rate(logp, ref_logp, reward), share, gained - beta * distance)
    return Report(*map(float, values), float(kl(logp, optimum(ref_logp, reward, beta))))


def table(reports: dict[str, Report]) -> str:
    """One line for each policy."""
    lines = [("", "E[reward]", "KL to ref", "win rate", "of attainable", "J", "KL to optimum")]
    for name, r in reports.items():
        share = "-" if math.isnan(r.share) else f"{100 * r.share:.1f} %"
        lines.append((name, *(f"{x:.3f}" for x in r[:3]), share, *(f"{x:.3f}" for x in r[4:])))
    return "\n".join(f"{name:<12}" + "".join(f"{x:>15}" for x in numbers) for name, *numbers in lines)
