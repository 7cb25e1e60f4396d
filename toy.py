"""A world small enough to list, where every number about a policy can be computed and none has to be estimated.

The alphabet is a–e. A prompt is one letter; a response is 0 to 5 letters and a stop, which makes 3,906 responses for each of
5 prompts. After five letters the world stops by itself: that stop is neither sampled nor scored, so the probabilities of the
listed responses sum to exactly 1. The reward can be checked by eye: +1 for each occurrence of the prompt's letter, −1 for each
doubled letter. For prompt a, "abca." earns 2, "aab." earns 2 − 1 = 1.

A *policy* is any callable from tokens (B, T) int64 to next-token logits (B, T, 6): a model, or the language itself. What a policy
does to a world is one tensor of shape (5, 3906), the log-probabilities of all responses; the functions below the class need no more.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from functools import cached_property
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

Policy = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class World:
    """P = `letters` prompts, each with the same list of N responses of at most `length` letters; the stop is token `letters`.

    A response is listed by length, then alphabetically. That is the order of a tree in which every node but the deepest has one
    child per letter: a response shorter than `length` stops at its node, one of full length has arrived at a leaf.
    """

    seed: int = 0
    letters: int = 5
    length: int = 5

    @cached_property
    def responses(self) -> Tensor:  # (N, length) int64, letters first, then stops
        levels = [torch.empty(1, 0, dtype=torch.int64)]  # level n lists the letters^n prefixes of n letters
        for _ in range(self.length):
            letter = torch.arange(self.letters).repeat(len(levels[-1]))[:, None]
            levels.append(torch.cat([levels[-1].repeat_interleave(self.letters, 0), letter], 1))
        pad = torch.nn.functional.pad
        return torch.cat([pad(level, (0, self.length - level.shape[1]), value=self.letters) for level in levels])

    @cached_property
    def sizes(
        self,
    ) -> Tensor:  # (N,) int64: tokens that are sampled and scored, the stop counted unless the world made it
        return ((self.responses < self.letters).sum(1) + 1).clamp(max=self.length)

    @cached_property
    def reward(self) -> Tensor:  # (P, N) int64
        y = self.responses
        hits = (y == torch.arange(self.letters)[:, None, None]).sum(-1)  # (P, N)
        doubled = (y[:, 1:] == y[:, :-1]) & (y[:, 1:] < self.letters)
        return hits - doubled.sum(-1)

    @cached_property
    def _chain(self) -> Tensor:  # (P, letters, letters) float64: P(next letter | prompt, last letter)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.letters, self.letters, self.letters)
        return torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1)

    def language(self, tokens: Tensor) -> Tensor:
        """The language as a policy: per prompt a first-order Markov chain that starts from the prompt's letter.

        The stop has probability 0.1 at first and 0.1 more after each letter. Tokens (B, T) int64, each row a prompt and
        letters; returns log-probabilities (B, T, letters + 1) float64, meaningless behind a stop.
        """
        stop = (
            0.1 * torch.arange(1, tokens.shape[1] + 1, dtype=torch.float64).expand(tokens.shape)[..., None]
        )  # (B, T, 1)
        chain = self._chain[tokens[:, :1], tokens.clamp(max=self.letters - 1)]  # (B, T, letters)
        return torch.cat([chain * (1 - stop), stop], -1).log()

    @torch.no_grad()
    def list_logps(self, policy: Policy, device: torch.device | str = "cpu") -> Tensor:
        """log π(y|x) of every response, (P, N) float64 on the CPU, from one pass over all prefixes of `length` − 1 letters.

        `policy` gets tokens (P · letters^(length−1), length) on `device`; its logits are normalised in float64.
        """
        prefixes = self.responses[(self.responses < self.letters).sum(1) == self.length - 1][:, :-1]
        prompts = torch.arange(self.letters).repeat_interleave(len(prefixes))[:, None]
        tokens = torch.cat([prompts, prefixes.repeat(self.letters, 1)], 1)
        step = (
            policy(tokens.to(device)).double().cpu().log_softmax(-1).view(self.letters, len(prefixes), self.length, -1)
        )
        prefix = torch.zeros(self.letters, 1, dtype=torch.float64)  # log-probabilities of the prefixes of n letters
        stopped = []
        for n in range(self.length):
            node = step[:, :: self.letters ** (self.length - 1 - n), n]  # (P, letters^n, V): one row for each prefix
            stopped.append(prefix + node[..., -1])
            prefix = (prefix[..., None] + node[..., :-1]).flatten(1)  # (P, letters^(n+1))
        return torch.cat([*stopped, prefix], 1)

    def ids(self, response: int) -> np.ndarray:
        """Token ids of a listed response as it is stored: its letters, and the stop if it has fewer than `length`."""
        return self.responses[response, : self.sizes[response]].numpy().astype(np.int32)

    def text(self, response: int) -> str:
        """A listed response for people: "abca." """
        return "".join((string.ascii_lowercase[: self.letters] + ".")[i] for i in self.ids(response))


def fit_reference(model: torch.nn.Module, world: World, steps: int = 400, seed: int = 0, lr: float = 5e-3) -> float:
    """Train `model` on the language by maximum likelihood and return KL(language ‖ model) in nats.

    Each step draws 256 texts, but scores all next tokens at each of their prefixes with the language's own probabilities, the
    expectation of what sampled tokens would score: the gradient's noise then vanishes as the model arrives.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    language = world.list_logps(world.language)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        text = torch.multinomial(language.exp().flatten(), 256, replacement=True, generator=generator)
        prompt, response = text // language.shape[1], text % language.shape[1]
        tokens = torch.cat([prompt[:, None], world.responses[response, :-1]], 1)  # (256, length)
        scored = torch.arange(world.length) < world.sizes[response, None]
        target = world.language(tokens).exp() * scored[..., None]
        logps = model(tokens.to(device)).float().log_softmax(-1)
        loss = -(target.to(device, torch.float32) * logps).sum() / len(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return kl(language, world.list_logps(model, device)).item()


def sample_pairs(logp: Tensor, reward: Tensor, n: int, scale: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """n preferences (prompt, chosen, rejected), each an (n,) int64 tensor of places in the list.

    Prompts are uniform; both responses are drawn from `logp` (P, N), again if they are equal; the first is the chosen one with
    probability σ(scale · (r1 − r2)) (Bradley–Terry). Raises ValueError if `logp` leaves nothing to choose between.
    """
    if logp.max() > math.log(0.999):
        raise ValueError(f"one response has probability {logp.max().exp():.6f}: two different ones cannot be drawn")
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(len(logp), (n,), generator=generator)
    pair = torch.zeros(n, 2, dtype=torch.int64)
    while (equal := pair[:, 0] == pair[:, 1]).any():  # both anew: keeping the first would change its distribution
        draws = torch.multinomial(logp.exp(), 2 * n, replacement=True, generator=generator).view(-1, n, 2)
        pair[equal] = draws[prompt, torch.arange(n)][equal]
    r = reward[prompt[:, None], pair].double()  # (n, 2)
    first = torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(scale * (r[:, 0] - r[:, 1]))
    chosen = torch.where(first, pair[:, 0], pair[:, 1])
    return prompt, chosen, pair.sum(1) - chosen


# ----------------------------------------------------------------------------------------------------------------------
# Exact numbers. logp, ref_logp: (P, N) float64, log-probabilities of all responses; reward: (P, N). All are means over prompts.


def mean_reward(logp: Tensor, reward: Tensor) -> Tensor:
    """E_π[r], a scalar."""
    return (logp.exp() * reward).sum(-1).mean()


def kl(logp: Tensor, other: Tensor) -> Tensor:
    """KL(π ‖ other) in nats, a scalar; what π never says adds nothing."""
    return torch.where(logp > -math.inf, logp.exp() * (logp - other), 0.0).sum(-1).mean()


def optimum(ref_logp: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log π*, π* = π_ref · e^{r/β} / Z: what maximises E[r] − β·KL(π ‖ π_ref) (Rafailov et al. 2023, eq. 4)."""
    return (ref_logp + reward / beta).log_softmax(-1)


def frontier(ref_logp: Tensor, reward: Tensor, at_kl: float) -> Tensor:
    """The best E[r] of any policy with KL(π ‖ π_ref) ≤ `at_kl`: that of π*(β′), with β′ found by bisection on log β′."""
    low, high = math.log(1e-4), math.log(1e7)  # from "only the best responses are left" to "nothing has moved"
    for _ in range(60):
        middle = (low + high) / 2
        if kl(optimum(ref_logp, reward, math.exp(middle)), ref_logp) > at_kl:
            low = middle
        else:
            high = middle
    return mean_reward(optimum(ref_logp, reward, math.exp(high)), reward)


def win_rate(logp: Tensor, ref_logp: Tensor, reward: Tensor) -> Tensor:
    """P(a response of π has more reward than one of π_ref), a tie counted ½; over all N² pairs, by their reward levels."""
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
    head = ("E[reward]", "KL to ref", "win rate", "of attainable", "J", "KL to optimum")
    lines = [" " * 12 + "".join(f"{h:>15}" for h in head)]
    for name, r in reports.items():
        share = "-" if math.isnan(r.share) else f"{100 * r.share:.1f} %"
        numbers = (
            f"{r.reward:.3f}",
            f"{r.kl:.3f}",
            f"{r.win_rate:.3f}",
            share,
            f"{r.objective:.3f}",
            f"{r.kl_to_optimum:.3f}",
        )
        lines.append(f"{name:<12}" + "".join(f"{x:>15}" for x in numbers))
    return "\n".join(lines)
