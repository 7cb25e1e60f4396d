"""A world small enough to list: every number about a policy is computed, none is estimated.

A prompt is one of the letters a–e. A response is 0 to 5 letters and a stop: 3,906 responses, the same for each prompt.
After five letters the world stops by itself; this stop is neither sampled nor scored, so the probabilities of the list
sum to exactly 1. The reward can be checked by eye: +1 for each occurrence of the prompt's letter, −1 for each doubled
letter. For prompt a, "abca." earns 2 and "aab." earns 2 − 1 = 1.

A *policy* is any callable from tokens (B, T) int64 to next-token logits (B, T, 6): a model, or the language itself.
All that the reports need from a policy is one tensor (5, 3906), the log-probabilities of all responses.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, Config
from support.rows import Pair

TOY_PAIRS = 16384  # pairs to train on
TOY_SCALE = 1.0  # a response with one more point of reward is preferred with probability σ(TOY_SCALE)
TOY_MODEL = Config(
    vocab_size=6, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, head_dim=16, max_position_embeddings=8, windows=(None, None),
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """P = `letters` prompts, each with the same list of N responses of at most `length` letters; token `letters` stops.

    Responses are listed by length, then alphabetically. This is the order of a tree where each node has one child per
    letter: a response shorter than `length` stops at its node, a response of full length ends at a leaf.
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
    def sizes(self) -> Tensor:  # (N,) int64: how many tokens are sampled and scored: the letters and, if any, the stop
        return ((self.responses < self.letters).sum(1) + 1).clamp(max=self.length)

    @cached_property
    def reward(self) -> Tensor:  # (P, N) int64
        y = self.responses
        hits = (y == torch.arange(self.letters)[:, None, None]).sum(-1)
        doubled = (y[:, 1:] == y[:, :-1]) & (y[:, 1:] < self.letters)
        return hits - doubled.sum(-1)

    @cached_property
    def chain(self) -> Tensor:  # (P, letters, letters) float64: P(next letter | prompt, previous letter)
        generator = torch.Generator().manual_seed(self.seed)
        spread = 0.7  # uneven, but every letter follows every other often enough to occur in the pairs
        return (spread * torch.randn(3 * [self.letters], generator=generator, dtype=torch.float64)).softmax(-1)

    def language(self, tokens: Tensor) -> Tensor:
        """The language as a policy: for each prompt a first-order Markov chain that starts from the prompt's letter.

        A stop has probability 0.1 at first and 0.1 more after each letter, at most 0.9. tokens: as from `tokens_of`.
        Returns log-probabilities (B, T, letters + 1) float64, without meaning at the first token and after a stop.
        """
        stop = 0.1 * torch.arange(tokens.shape[1], dtype=torch.float64).clamp(max=9)  # (T,)
        stop = stop.expand(tokens.shape)[..., None]  # (B, T, 1)
        chain = self.chain[tokens[:, 1:2], tokens.clamp(max=self.letters - 1)]  # (B, T, letters)
        return torch.cat([chain * (1 - stop), stop], -1).log()

    def prompt_ids(self, prompt: int) -> np.ndarray:
        """Token ids of a prompt: a stop, then its letter.

        A model with rotary positions sees distances only: without the stop, "a", "aa" and "aaa" are the same to it.
        """
        return np.array([self.letters, prompt], np.int32)

    def response_ids(self, response: int) -> np.ndarray:
        """Token ids of a listed response: its letters, and a stop if there are fewer than `length`."""
        return self.responses[response, : self.sizes[response]].numpy().astype(np.int32)

    def text(self, response: int) -> str:
        """A listed response as text: "abca." """
        return "".join((string.ascii_lowercase[: self.letters] + ".")[i] for i in self.response_ids(response))

    def tokens_of(self, prompt: Tensor, response: Tensor) -> Tensor:
        """Tokens (B, 1 + length) of prompts and responses, (B,) int64 each, without the last token."""
        start = torch.full_like(prompt, self.letters)
        return torch.cat([start[:, None], prompt[:, None], self.responses[response, :-1]], 1)

    @torch.no_grad()
    def list_logps(self, policy: Callable[[Tensor], Tensor], device: torch.device | str = "cpu") -> Tensor:
        """log π(y|x) of every response, (P, N) float64 on the CPU, from one call of `policy` on tokens on `device`."""
        longest = torch.nonzero((self.responses < self.letters).sum(1) == self.length - 1)[:, 0]
        prompt = torch.arange(self.letters).repeat_interleave(len(longest))
        tokens = self.tokens_of(prompt, longest.repeat(self.letters))
        logps = policy(tokens.to(device))[:, 1:].double().cpu().log_softmax(-1)  # (P · longest, length, V)
        logps = logps.view(self.letters, len(longest), self.length, -1)
        prefix, stopped = logps.new_zeros(self.letters, 1), []  # log P(begins with these n letters), log P(is them)
        for n in range(self.length):
            node = logps[:, :: self.letters ** (self.length - 1 - n), n]  # (P, letters^n, V): one row for each prefix
            stopped.append(prefix + node[..., -1])
            prefix = (prefix[..., None] + node[..., :-1]).flatten(1)  # (P, letters^(n+1))
        return torch.cat([*stopped, prefix], 1)


def fit_reference(model: torch.nn.Module, world: World, steps: int = 300, seed: int = 0, lr: float = 3e-3) -> float:
    """Train `model` on the language by maximum likelihood; returns KL(language ‖ model) in nats.

    Each step draws 64 texts. The target at each prefix is the language's whole distribution of the next token, so the
    noise of the gradient vanishes as the model gets close.
    """
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    language = world.list_logps(world.language)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        text = torch.multinomial(language.exp().flatten(), 64, replacement=True, generator=generator)
        response = text % language.shape[1]
        tokens = world.tokens_of(text // language.shape[1], response)
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

    Prompts are uniform. Both responses are drawn from `logp` (P, N), and drawn again while they are equal; the first is
    chosen with probability σ(scale · (r1 − r2)) (Bradley–Terry). ValueError if one response has almost all probability.
    """
    if logp.max() > math.log(0.999):
        raise ValueError(f"expected two different responses, but one has probability {logp.max().exp():.6f}")
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(len(logp), (n,), generator=generator)
    pair = torch.zeros(n, 2, dtype=torch.int64)
    while (equal := pair[:, 0] == pair[:, 1]).any():  # draw both again: keeping the first would change its distribution
        draws = torch.multinomial(logp.exp(), 2 * n, replacement=True, generator=generator).view(-1, n, 2)
        pair[equal] = draws[prompt, torch.arange(n)][equal]
    r = reward[prompt[:, None], pair].double()  # (n, 2)
    first = torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(scale * (r[:, 0] - r[:, 1]))
    chosen = torch.where(first, pair[:, 0], pair[:, 1])
    return prompt, chosen, pair.sum(1) - chosen


class Problem(NamedTuple):
    """What a toy run starts from."""

    world: World
    reference: GPT
    distance: float  # KL(language ‖ reference), nats
    ref_logp: Tensor  # (P, N) float64, the reference's log-probabilities of all responses
    pairs: list[Pair]
    eval_pairs: list[Pair]


def make_problem(
    seed: int = 0, pairs: int = TOY_PAIRS, eval_pairs: int = 128, scale: float = TOY_SCALE,
    device: torch.device | str = "cpu", world: World | None = None,
) -> Problem:  # fmt: skip
    """The world of `seed` (or `world`), a GPT fitted to its language as the reference, and labelled pairs.

    Pairs are drawn from the language itself, in float64, and not from the reference: a network's float32 probabilities
    differ between CPUs in their last bits, and so would the pairs. The global random state is not changed.
    """
    world = world or World(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reference = GPT(replace(TOY_MODEL, vocab_size=world.letters + 1)).to(device)
    distance = fit_reference(reference, world, seed=seed)
    columns = sample_pairs(world.list_logps(world.language), world.reward, pairs + eval_pairs, scale, seed)
    rows = enumerate(zip(*(column.tolist() for column in columns)), 1)
    drawn = [Pair(world.prompt_ids(x), world.response_ids(w), world.response_ids(l), "toy", i) for i, (x, w, l) in rows]
    return Problem(world, reference, distance, world.list_logps(reference, device), drawn[:pairs], drawn[pairs:])


# ----------------------------------------------------------------------------------------------------------------------
# Exact numbers, means over prompts, from log-probabilities of all responses (P, N) float64 and their rewards (P, N)


def mean_reward(logp: Tensor, reward: Tensor) -> Tensor:
    """E_π[r], a scalar."""
    return (logp.exp() * reward).sum(-1).mean()


def kl(logp: Tensor, other: Tensor) -> Tensor:
    """KL(π ‖ other) in nats, a scalar ≥ 0. Responses with probability 0 under π add nothing."""
    return torch.where(logp == -math.inf, 0.0, logp.exp() * (logp - other)).sum(-1).mean().clamp(min=0.0)


def optimum(ref_logp: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log π*, π* = π_ref · e^{r/β} / Z: the maximum of E[r] − β·KL(π ‖ π_ref) (Rafailov et al. 2023, eq. 4).

    Labels of Bradley–Terry scale s are those of the reward s·r: from all pairs, DPO at β learns π* of β/s.
    """
    return (ref_logp + reward.double() / beta).log_softmax(-1)


def frontier(ref_logp: Tensor, reward: Tensor, at_kl: float) -> Tensor:
    """The largest E[r] of any policy with KL(π ‖ π_ref) ≤ `at_kl`: that of π*(β′), β′ found by bisection on log β′."""
    low, high = math.log(1e-4), math.log(1e7)  # from "only the best responses are left" to "nothing has moved"
    for _ in range(60):
        middle = (low + high) / 2
        too_far = kl(optimum(ref_logp, reward, math.exp(middle)), ref_logp) > at_kl
        low, high = (middle, high) if too_far else (low, middle)
    return mean_reward(optimum(ref_logp, reward, math.exp(high)), reward)


def win_rate(logp: Tensor, ref_logp: Tensor, reward: Tensor) -> Tensor:
    """P(a response of π has more reward than one of π_ref), a tie counting ½; all N² pairs, by levels of reward."""
    level = reward.long() - reward.long().min()
    empty = torch.zeros(len(logp), int(level.max()) + 1, dtype=torch.float64)
    ours, theirs = empty.scatter_add(1, level, logp.exp()), empty.scatter_add(1, level, ref_logp.exp())  # (P, levels)
    return (ours * (theirs.cumsum(1) - theirs / 2)).sum(-1).mean()


class Exact(NamedTuple):
    """Exact numbers of a policy. `share` is nan where π = π_ref, because no gain is possible there."""

    reward: float  # E_π[r]
    kl: float  # KL(π ‖ π_ref), nats
    win_rate: float  # against the reference, ties ½
    share: float  # gain in reward over the reference, as a share of the largest possible gain at the same KL
    objective: float  # J(π) = E_π[r] − β·KL(π ‖ π_ref)
    kl_to_optimum: float  # KL(π ‖ π*); J(π*) − J(π) is β times this


def report(logp: Tensor, ref_logp: Tensor, reward: Tensor, beta: float) -> Exact:
    """All numbers of the policy with log-probabilities `logp` (P, N); `beta` is that of J and π*."""
    gained, distance = mean_reward(logp, reward), kl(logp, ref_logp)
    start = mean_reward(ref_logp, reward)
    share = (gained - start) / (frontier(ref_logp, reward, distance) - start) if distance > 1e-12 else math.nan
    values = (gained, distance, win_rate(logp, ref_logp, reward), share, gained - beta * distance)
    return Exact(*map(float, values), float(kl(logp, optimum(ref_logp, reward, beta))))


def table(reports: dict[str, Exact]) -> str:
    """One line for each policy."""
    lines = [("", "E[reward]", "KL to ref", "win rate", "of attainable", "J", "KL to optimum")]
    for name, r in reports.items():
        share = "-" if math.isnan(r.share) else f"{100 * r.share:.1f} %"
        lines.append((name, *(f"{x:.3f}" for x in r[:3]), share, *(f"{x:.3f}" for x in r[4:])))
    return "\n".join(f"{name:<12}" + "".join(f"{x:>15}" for x in numbers) for name, *numbers in lines)


def draw_responses(logp: Tensor, n: int, seed: int) -> Tensor:
    """n responses to each prompt, (P, n) int64: the largest log π + Gumbel noise, so that last bits hardly matter."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(logp), n, logp.shape[1], generator=generator, dtype=torch.float64)
    return (logp[:, None] - (-uniform.log()).log()).argmax(-1)


def print_report(problem: Problem, logps: dict[str, Tensor], betas: Sequence[float], told: int) -> None:
    """Print what training did: a table of exact numbers, sampled responses, and the first policy's numbers in words.

    logps: log π of all responses (P, N), by name. betas: β of each step and after the last. told: how many preferences
    training has seen.
    """
    world, reward, first = problem.world, problem.world.reward, next(iter(logps))
    logps = {"reference": problem.ref_logp} | logps | {"optimum π*": optimum(problem.ref_logp, reward, betas[0])}
    reports = {name: report(logp, problem.ref_logp, reward, betas[0]) for name, logp in logps.items()}
    print(f"\nafter {len(betas) - 1} steps; exact sums over all responses; J and π* are those of β = {betas[0]}")
    print(table(reports))
    drawn = {name: draw_responses(logps[name], 4, world.seed).tolist() for name in ("reference", first)}
    print("\nresponses drawn      " + "".join(f"{name:30}" for name in drawn))
    for prompt, letter in enumerate(string.ascii_lowercase[: world.letters]):
        texts = (" ".join(map(world.text, responses[prompt])) for responses in drawn.values())
        print(f"  to {letter}:              " + "".join(f"{text:30}" for text in texts))
    share = "nothing" if math.isnan(reports[first].share) else f"{reports[first].share:.0%}"
    print(
        f"\nβ went from {betas[0]:.3f} to {betas[-1]:.3f}. In words: the policy was told {told:,} times which of two "
        f"responses is preferred. It now beats the reference in {reports[first].win_rate:.0%} of comparisons, and has "
        f"{share} of the gain in reward that is possible at its distance from the reference."
    )
