"""Draw the README's and the tutorial's figures (`plot` extra).

`python -m experiments.figures` draws all of them, `python -m experiments.figures toy mask` only these two.
"""

import copy
import multiprocessing
import sys
import time
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from epsdpo import beta_steps, linear_token_stats, perturbed_logits, token_stats
from model import GPT, visible
from support import toy
from support.checkpoint import resolve
from support.device import memory_gb, my_micro_batches
from support.rows import Pair, collate
from train import EpsDPO, Flags, run_batch, train

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"  # told apart by colour-blind readers too
rcParams.update({"svg.hashsalt": "1", "axes.spines.top": 0, "axes.spines.right": 0, "legend.frameon": 0})


@cache
def problem() -> toy.Problem:
    """The problem of `python train.py`."""
    return toy.make_problem(eval_pairs=128)


@cache
def path(epsilon: float) -> tuple[list[dict], list[torch.Tensor]]:
    """Metrics of a toy run of 256 steps, and log π of all responses before it and after every 16 steps."""
    world, reference = problem().world, problem().reference
    logps, count = [problem().ref_logp], iter(range(1, 257))

    class Watched(EpsDPO):
        def after_step(self, sums, policy, reference):
            super().after_step(sums, policy, reference)
            if next(count) % 16 == 0:
                logps.append(world.list_logps(policy))

    method = Watched(beta=0.5, epsilon_check=epsilon or 0.01, epsilon_step=epsilon)
    return train(copy.deepcopy(reference), reference, problem().pairs, Flags(), method), logps


def reward_against_kl(axes: Axes, runs: dict[str, list[torch.Tensor]]) -> dict[str, np.ndarray]:
    """Draw the best reward possible at each KL; returns KL and reward of each run's policies, (2, policies)."""
    ref_logp, reward = problem().ref_logp, problem().world.reward
    kls = np.linspace(0, 1.2, 60) ** 2
    axes.plot(kls, [toy.frontier(ref_logp, reward, k) for k in kls], color=GREY, label="best possible")
    axes.set(xlabel="KL to the reference, nats", ylabel="mean reward")
    return {
        name: np.array([(toy.kl(logp, ref_logp), toy.mean_reward(logp, reward)) for logp in logps]).T
        for name, logps in runs.items()
    }


def frontier(figure: Figure) -> None:
    axes = figure.subplots()
    found = reward_against_kl(axes, {"DPO": path(0.0)[1], "ε-DPO, ε 0.01": path(0.01)[1]})
    for (name, points), color, above in zip(found.items(), (BLUE, ORANGE), (6, -14)):
        axes.plot(*points, ".-", color=color, linewidth=1, label=name)
        for step, y in ((32, above), (96, -14), (256, above)):
            place = {"xytext": (0, y), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{step}", points[:, step // 16], color=color, **place)
    axes.legend(loc="lower right", title="numbers: optimizer steps")


def toy_run(figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    best = toy.optimum(problem().ref_logp, problem().world.reward, 0.5)
    ends = {"reference": problem().ref_logp, "DPO": path(0.0)[1][-1], "ε-DPO": path(0.01)[1][-1], "π* at β 0.5": best}
    points = reward_against_kl(left, {name: [logp] for name, logp in ends.items()})
    for (name, point), color, y in zip(points.items(), ("black", BLUE, ORANGE, GREY), (-3, -12, -12, -12)):
        left.plot(*point, "o", color=color)
        left.annotate(name, point[:, 0], (8, y), color=color, textcoords="offset points")
    left.annotate("best possible at each KL", (0.02, 1.25), color=GREY)
    for name, epsilon, color in (("DPO", 0.0, BLUE), ("ε-DPO, ε 0.01", 0.01, ORANGE)):
        right.plot([line["beta"] for line in path(epsilon)[0]], color=color, label=name)
    right.set(xlabel="optimizer step", ylabel="β", ylim=(0, 0.55))
    right.legend(loc="lower left")


def one_beta(figure: Figure) -> None:
    world, ref_logp = problem().world, problem().ref_logp
    ratio = path(0.0)[1][2] - ref_logp
    x, w, l = toy.sample_pairs(world.list_logps(world.language), world.reward, 800, toy.TOY_SCALE, seed=1)
    jitter = torch.rand(len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2 - 0.25
    true, found = world.reward[x, w] - world.reward[x, l] + jitter, 0.5 * (ratio[x, w] - ratio[x, l])
    axes = figure.subplots()
    axes.scatter(true, found, 5, BLUE, alpha=0.4, linewidths=0)
    axes.axline((0, 0), slope=1, color=ORANGE)
    axes.set(xlabel="true log-odds of a pair (jittered)", ylabel="β · margin after 32 steps")


def perturbed(figure: Figure) -> None:
    x = torch.linspace(0, 2.5, 251)  # λ

    def logp(weights: tuple, word: int) -> torch.Tensor:  # the reference is uniform
        return (x[:, None] * torch.tensor(weights).log()).log_softmax(-1)[:, word]

    s, m, u = logp((4.0, 1, 1), 0), logp((9.0, 4, 1), 1), logp((1.0, 1, 1), 0)
    curves = {"lower: step +1": s - u, "raise: step −1": u - s, "keep: step 0": s + m - 2 * u}
    for axes, (title, z) in zip(figure.subplots(1, 3, sharey=True), curves.items()):
        axes.plot(x, z, color=BLUE)
        for i, label in zip((50, 100, 150), ("β⁺", "β", "β⁻")):
            axes.plot(x[i], z[i], "o", color=ORANGE)
            axes.annotate(label, (x[i], z[i]), (0, 7), textcoords="offset points", ha="center")
        axes.set(title=title, xlabel="λ (smaller β to the right)", ylabel="log-odds z" if title[0] == "l" else None)


def rounding(figure: Figure) -> None:
    distances, shares = np.logspace(-7, 0, 15), []

    def steps(stats) -> torch.Tensor:  # numbers of the tokens of 400 responses -> steps of 200 pairs
        sums = torch.stack(stats[2:4]).double().sum(-1)
        return beta_steps(*(sums[:, :200] - sums[:, 200:]))

    torch.manual_seed(0)
    base = GPT(replace(toy.TOY_MODEL, vocab_size=100)).requires_grad_(False)
    for p in base.parameters():
        p *= 4 if p.ndim == 2 else 1
    (tokens, y), noise = torch.randint(100, (2, 400, 10)), torch.randn(400, 10, 100)
    for distance in map(float, distances):
        f, g, policy = base(tokens) + distance * noise, base(tokens), copy.deepcopy(base)
        for p in policy.parameters():
            p *= 1 + distance * torch.randn_like(p)
        logps = (perturbed_logits(f, g, s).log_softmax(-1) for s in (0.01, 0, -0.01))
        minus, now, plus = (x.gather(-1, y[..., None])[..., 0] for x in logps)
        with torch.autocast("cpu", torch.bfloat16):
            bf16 = policy(tokens), base(tokens)
        exact = [copy.deepcopy(model).double()(tokens) for model in (policy, base)]
        logits = (f, g), (policy(tokens), g), bf16, (f.double(), g.double()), exact
        ours, body, bf16, *truth = (steps(token_stats(*two, y, 0.01)) for two in logits)
        found = (ours, steps((now, now, minus - now, plus - now)), body, bf16)
        shares.append([(x == truth[i // 2]).double().mean() for i, x in enumerate(found)])
    for i, axes in enumerate(figure.subplots(1, 2, sharey=True).repeat(2)):
        label = ("increments", "three log-softmaxes", "float32 body", "bfloat16 body")[i]
        axes.semilogx(distances, [row[i] for row in shares], ".-", color=(BLUE, ORANGE)[i % 2], label=label)
        axes.set(xlabel=("distance of the logits", "relative change of the weights")[i // 2], ylim=(-0.03, 1.03))
        axes.set_title("share of right decisions, " + ("given the logits", "out of a small GPT")[i // 2])
        axes.legend(loc="lower right")


def beta(figure: Figure) -> None:
    axes = figure.subplots()
    for epsilon, color in zip((0.003, 0.01, 0.03), (BLUE, GREEN, ORANGE)):
        lines = path(epsilon)[0]
        n, mean = np.arange(len(lines)), np.mean([line["steps/lower"] - line["steps/raise"] for line in lines])
        axes.plot(n, [line["beta"] for line in lines], color=color, label=f"ε {epsilon}, mean step {mean:.2f}")
        axes.plot(n, 0.5 * np.exp(-epsilon * mean * n), "k:")
    axes.set(xlabel="optimizer step", ylabel="β")
    axes.legend()


def mask(figure: Figure) -> None:
    batch = collate([Pair(*(np.zeros(n, int) for n in sizes)) for sizes in ((3, 4, 3), (3, 5, 4))])
    segments, kinds = batch.segments[0].numpy(), ("prompt", "chosen", "rejected", "pad")
    names = [f"{kinds[s]} {p}" for s, p in zip(segments, batch.positions[0].tolist())]
    colors = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in (BLUE, GREEN, ORANGE, GREY)])
    seen = visible(batch.positions, batch.segments, None)[0, 0].numpy()[..., None]  # (T, T, 1)
    axes, places = figure.subplots(), np.arange(len(names)) + 0.5
    axes.pcolormesh(np.where(seen, colors[segments], 1.0), edgecolors="white", linewidth=1)
    axes.set(aspect="equal", xlabel="is seen (segment, position)", ylabel="sees")
    axes.set(xticks=places, xticklabels=names, yticks=places, yticklabels=names, ylim=(len(names), 0))
    axes.tick_params("x", rotation=90)


def head_memory(tokens: int, vocab: int, full: bool) -> float:
    """Peak MB of head and statistics, forward and backward, without inputs and the gradients (V, D) and (M, D)."""
    ref_hidden, ref_weight, labels = torch.randn(tokens, 64), torch.randn(vocab, 64), torch.zeros(tokens).long()
    hidden, weight = (1.01 * ref_hidden).requires_grad_(), (1.01 * ref_weight).requires_grad_()
    before = memory_gb(torch.device("cpu"))["memory_gb"]
    if full:
        stats = token_stats(hidden @ weight.T, ref_hidden @ ref_weight.T, labels, 0.01)
    else:
        stats = linear_token_stats(hidden, weight, ref_hidden, ref_weight, labels, 0.01)
    stats.logp.sum().backward()
    return 1e3 * (memory_gb(torch.device("cpu"))["memory_gb"] - before) - 2 * 4e-6 * 64 * (tokens + vocab)


def step_seconds(n: int) -> float:
    """Computing time of a step's forward and backward passes on n pairs of 96 tokens, the least of four."""
    torch.set_num_threads(1)
    sizes = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    policy, reference = (GPT(resolve({"model_type": "llama", "num_attention_heads": 4} | sizes)) for _ in range(2))
    generator, flags = np.random.default_rng(0), Flags(micro_tokens=384)
    pairs = [Pair(*generator.integers(4096, size=(3, 32), dtype=np.int32)) for _ in range(n)]
    times = []
    for _ in range(4):
        started = time.process_time()
        run_batch(policy, reference, my_micro_batches(pairs, 384), n, EpsDPO(0.1, 0.01, 0.01), flags)
        times.append(time.process_time() - started)
    return min(times)


def growth(figure: Figure) -> None:
    """Each measurement in a process of its own, so that its peak is its own."""
    counts, tokens, vocabularies = (4, 8, 16, 32, 64), (256, 512, 1024, 2048, 4096), (8192, 16384, 32768, 65536)
    sizes, (left, middle, right) = [(m, 16384) for m in tokens], figure.subplots(1, 3)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        left.plot([96 * n for n in counts], pool.map(step_seconds, counts, 1), "o-", color=BLUE)
        for full, color, label in ((True, GREY, "all logits"), (False, ORANGE, "256 tokens at a time")):
            used = pool.starmap(head_memory, [(*size, full) for size in sizes], 1)
            middle.plot(tokens, used, "o-", color=color, label=label)
        used = pool.starmap(head_memory, [(1024, v, False) for v in vocabularies], 1)
        right.plot(vocabularies, used, "o-", color=ORANGE, label="256 tokens at a time")
        chunk = [1e-6 * 4 * 256 * v for v in vocabularies]
        right.plot(vocabularies, chunk, ":", color=GREY, label="one chunk of logits")
    left.set(xlabel="tokens of a step", ylabel="computing time, s", xlim=0, ylim=0)
    middle.set(xlabel="response tokens (V = 16,384)", ylabel="the head's peak, MB", ylim=0)
    right.set(xlabel="vocabulary (1,024 tokens)", ylabel="the head's peak, MB", xlim=0, ylim=0)
    middle.legend()
    right.legend()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for draw in (toy_run, one_beta, perturbed, rounding, beta, mask, frontier, growth):
        name = draw.__name__.removesuffix("_run")
        if not sys.argv[1:] or name in sys.argv:
            size = {mask: (5.5, 5.5), frontier: (8.8, 4.2)}.get(draw, (8.8, 3.1))  # inches; GitHub's text is 8.8 wide
            figure = Figure(size, layout="constrained", facecolor="white")
            draw(figure)
            figure.savefig(f"figures/{name}.svg", metadata={"Date": None})
