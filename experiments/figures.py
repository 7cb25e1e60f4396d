"""The tutorial's figures: `python -m experiments.figures` writes all into figures/, `… mask beta` these two.

Needs the `plot` extra. Seconds each; `one_beta`, `beta` and `frontier` train on the toy, minutes together.
"""

from __future__ import annotations

import copy
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

import toy
from data import Pair, collate
from epsdpo import TokenStats, beta_steps, perturbed_logits, sum_over_responses, token_stats, token_stats_by_definition
from model import GPT, Config, visible
from train import TOY_MODEL, TOY_PAIRS, TOY_SCALE, EpsDPO, Flags, compare, train

FOLDER = Path(__file__).resolve().parents[1] / "figures"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"  # told apart by colour-blind readers too
STYLE = {"svg.hashsalt": "epsdpo", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"legend.frameon": False}


@cache
def toy_world() -> tuple[toy.World, GPT, torch.Tensor, list[Pair]]:
    """The world of `python train.py`: the reference, its log-probabilities, its pairs."""
    world = toy.World()
    torch.manual_seed(0)
    reference = GPT(Config(**TOY_MODEL))
    toy.fit_reference(reference, world)
    ref_logp = world.list_logps(reference)
    sample = toy.sample_pairs(ref_logp, world.reward, TOY_PAIRS, TOY_SCALE, 0)
    rows = zip(*(column.tolist() for column in sample))
    return (
        world,
        reference,
        ref_logp,
        [Pair(world.prompt_ids(x), world.response_ids(w), world.response_ids(l)) for x, w, l in rows],
    )


def path(epsilon: float, steps: int, every: int) -> tuple[list[dict], list[torch.Tensor]]:
    """Metrics of a toy run, and log π of all responses before it and after each `every` steps."""
    world, reference, ref_logp, pairs = toy_world()
    logps, count = [ref_logp], iter(range(1, steps + 1))

    class Watched(EpsDPO):
        def after_step(self, sums, policy, reference):
            super().after_step(sums, policy, reference)
            if next(count) % every == 0:
                logps.append(world.list_logps(policy))

    flags = Flags(epsilon=epsilon, steps=steps)
    return train(copy.deepcopy(reference), reference, pairs, flags, Watched(flags.beta, 0.01, epsilon)), logps


def one_beta(figure: Figure) -> None:
    world, _, ref_logp, _ = toy_world()
    ratio = path(0.0, steps=32, every=32)[1][-1] - ref_logp
    x, w, l = toy.sample_pairs(ref_logp, world.reward, 1500, TOY_SCALE, seed=1)
    true = (world.reward[x, w] - world.reward[x, l]) + torch.rand(len(x), dtype=torch.float64) / 2 - 0.25
    axes = figure.subplots()
    axes.scatter(true, 0.5 * (ratio[x, w] - ratio[x, l]), 3, BLUE, alpha=0.4, linewidths=0)
    axes.axline((0, 0), slope=1, color=ORANGE, label="the right temperature for every pair")
    axes.set(xlabel="true log-odds of a pair (jittered)", ylabel="β · margin after 32 steps")
    axes.legend()


def perturbed(figure: Figure) -> None:
    s, m, u = (np.log(weights) for weights in ((4.0, 1, 1), (9.0, 4, 1), (1.0, 1, 1)))

    def logp(position, word: int, at):  # of a word at λ; the reference is uniform
        return at * position[word] - np.log(np.exp(np.multiply.outer(at, position)).sum(-1))

    def z(name: str, at):
        moved = logp(s, 0, at) + (logp(m, 1, at) if name == "keep" else logp(u, 0, at)) - 2 * logp(u, 0, at)
        return -moved if name == "raise" else moved

    x, checked = np.linspace(0, 2.5, 200), np.array((0.5, 1, 1.5))
    for axes, name, step in zip(figure.subplots(1, 3, sharey=True), ("lower", "raise", "keep"), ("+1", "−1", "0")):
        axes.plot(x, z(name, x), color=BLUE)
        axes.plot(checked, z(name, checked), "o", color=ORANGE)
        for at, label in zip(checked, ("β⁺", "β", "β⁻")):
            axes.annotate(label, (at, z(name, at)), (0, 7), textcoords="offset points", ha="center")
        axes.set(title=f"{name}: step {step}", xlabel="λ", xticks=(0, 1, 2))
    figure.axes[0].set_ylabel("log-odds z")


def rounding(figure: Figure) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    size, eps, distances, shares = 200, 0.01, np.logspace(-7, 0, 15), ([], [], [], [])
    owner = torch.arange(2 * size).repeat_interleave(10)

    def steps(stats: TokenStats) -> torch.Tensor:
        sums = sum_over_responses(stats, owner, 2 * size)
        return beta_steps(*(x[:size] - x[size:] for x in (sums.delta_minus, sums.delta_plus)))

    torch.manual_seed(0)
    g, noise = 2 * torch.randn(len(owner), 200), torch.randn(len(owner), 200)
    y = torch.distributions.Categorical(logits=g).sample()
    config = Config(vocab_size=100, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    base = GPT(config).requires_grad_(False)
    for p in base.parameters():
        p *= 4 if p.ndim == 2 else 1
    batch = collate([Pair(*(torch.randint(100, (n,)).numpy() for n in (4, 12, 12))) for _ in range(size)])
    for distance in map(float, distances):
        f = g + distance * noise
        minus, now, plus = (
            perturbed_logits(f, g, s).log_softmax(-1).gather(-1, y[:, None])[:, 0] for s in (eps, 0, -eps)
        )
        three = TokenStats(now, now, minus - now, plus - now, now)
        found = [steps(stats) for stats in (token_stats(f, g, y, eps), three)]
        truth = [steps(token_stats_by_definition(f.double(), g.double(), y, eps))] * 2
        policy = copy.deepcopy(base)
        for p in policy.parameters():
            p *= 1 + distance / 3 * torch.randn_like(p)
        exact = [copy.deepcopy(model).double() for model in (policy, base)]
        for models, dtype in (([policy, base], "float32"), ([policy, base], "bfloat16"), (exact, "float32")):
            w, l = compare(*models, batch, eps, dtype)
            found.append(beta_steps(w.delta_minus - l.delta_minus, w.delta_plus - l.delta_plus))
        for values, a, b in zip(shares, found, truth + [found.pop()] * 2):
            values.append((a == b).double().mean())
    names = ("increments, float32", "three log-softmaxes, float32", "float32 body", "bfloat16 body")
    for values, name, color, axes in zip(shares, names, (BLUE, ORANGE, BLUE, GREEN), (left, left, right, right)):
        axes.semilogx(distances / (1 if axes is left else 3), values, ".-", color=color, label=name)
        axes.legend(loc="lower right")
    left.set(xlabel="distance of the logits", title="given the logits", ylabel="share of right decisions")
    right.set(xlabel="relative change of the weights", title="out of a small GPT, by increments", ylim=(-0.03, 1.03))


def beta(figure: Figure) -> None:
    axes = figure.subplots()
    for epsilon, color in zip((0.003, 0.01, 0.03), (BLUE, GREEN, ORANGE)):
        lines = path(epsilon, steps=256, every=1000)[0]
        n = np.arange(len(lines))
        mean = np.mean([line["steps/lower"] - line["steps/raise"] for line in lines])
        axes.semilogy(n, [line["beta"] for line in lines], color=color, label=f"ε {epsilon}, mean step {mean:.2f}")
        axes.semilogy(
            n, 0.5 * np.exp(-epsilon * mean * n), ":", color="black", label="law" if color == ORANGE else None
        )
    axes.set(xlabel="optimizer step", ylabel="β")
    axes.legend()


def mask(figure: Figure) -> None:
    batch = collate([Pair(*(np.zeros(n, int) for n in sizes)) for sizes in ((3, 4, 3), (3, 5, 4))])
    segments = batch.segments[0].numpy()
    names = [f"{('prompt', 'chosen', 'rejected', 'pad')[s]} {p}" for s, p in zip(segments, batch.positions[0].tolist())]
    colors = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (BLUE, GREEN, ORANGE, GREY)])
    seen = visible(batch.positions, batch.segments, None)[0, 0].numpy()[..., None]  # (T, T, 1)
    axes = figure.subplots()
    axes.imshow(np.where(seen, colors[segments][None], 255))
    axes.hlines(np.arange(len(names)) + 0.5, -0.5, len(names) - 0.5, "white")
    axes.vlines(np.arange(len(names)) + 0.5, -0.5, len(names) - 0.5, "white")
    axes.set(xlabel="is seen (segment, position)", ylabel="sees")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)


def frontier(figure: Figure) -> None:
    world, _, ref_logp, _ = toy_world()
    axes, kls = figure.subplots(), np.linspace(0, 1.6, 50)
    axes.plot(kls, [toy.frontier(ref_logp, world.reward, k) for k in kls], color=GREY, label="frontier of the optimum")
    for name, epsilon, color in (("DPO", 0.0, BLUE), ("ε-DPO, ε 0.01", 0.01, ORANGE)):
        logps = path(epsilon, steps=256, every=16)[1]
        points = zip(*((toy.kl(logp, ref_logp), toy.mean_reward(logp, world.reward)) for logp in logps))
        axes.plot(*points, ".-", color=color, label=name)
    axes.set(xlabel="KL to the reference, nats", ylabel="mean reward")
    axes.legend(loc="lower right")


FIGURES = {
    one_beta: (5, 3.5),
    perturbed: (8, 2.6),
    rounding: (8, 3.2),
    beta: (5, 3.2),
    mask: (4.5, 4.5),
    frontier: (5, 3.5),
}


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for draw, size in FIGURES.items():
        if not names or draw.__name__ in names:
            with rc_context(STYLE):
                figure = Figure(size, layout="constrained", facecolor="white")
                draw(figure)
                figure.savefig(FOLDER / f"{draw.__name__}.svg", metadata={"Date": None})
            print(f"figures/{draw.__name__}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
