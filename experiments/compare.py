"""ε-DPO beside its peers on exact toy worlds: `python -m experiments.compare [QUESTION…] [--quick]`

Questions 1, 2, 3, 5, 6 and 7 of experiments/README.md. Finished runs are kept in out/compare, a small JSON file each,
keyed by its settings; tables are printed; figures (`plot` extra) and their numbers go to experiments/results.
"""

import argparse
import contextlib
import copy
import csv
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from epsdpo import beta_steps, epsdpo_loss, perturbed_logits
from experiments import peers
from model import GPT
from support import toy
from support.rows import Pair
from support.toy import TOY_MODEL, TOY_SCALE
from train import EpsDPO, Flags, train

CACHE, RESULTS = Path("out/compare"), Path(__file__).parent / "results"
WORLDS = {  # pairs, share of labels flipped, epochs, pairs in a batch
    "easy": (4096, 0.0, 1, 32),
    "hard": (512, 0.2, 8, 32),  # few pairs, seen often, a fifth of them wrong
    "small batches": (2048, 0.0, 1, 16),
    "too long": (2048, 0.0, 10, 16),
    "quick": (32, 0.2, 2, 16),
}

# ----------------------------------------------------------------------------------------------------------------------
# One run


class Variant(EpsDPO):
    """ε-DPO with another way to choose steps or β, or another method's loss; notes what a step saw in `seen`."""

    def __init__(self, kind: str, epsilon_check: float, epsilon_step: float, betas: list[float], peer=None):
        super().__init__(betas[0], epsilon_check, epsilon_step)
        self.kind, self.betas, self.peer, self.mean = kind, betas, peer, 0.0
        self.of_pair, self.seen = defaultdict(lambda: betas[0]), []

    def loss(self, chosen, rejected, batch):
        margin = torch.sub(*peers.log_ratios(chosen, rejected))
        out, now = epsdpo_loss(chosen, rejected, self.beta, self.epsilon_step), margin.detach()
        check, zero = out.step, torch.zeros_like(now)
        if self.kind in ("sign", "shuffled"):  # sign(margin) for the check; or its own steps, each for another pair
            step = now.sign() if self.kind == "sign" else check[torch.randperm(len(check))].double()
            moved = (x._replace(delta_minus=d, delta_plus=-d) for x, d in ((chosen, step), (rejected, zero)))
            out = epsdpo_loss(*moved, self.beta, self.epsilon_step)
        if self.kind == "carried":  # every pair goes on from its own β, and there is no common one
            names = [row[part >= 0].numpy().tobytes() for row, part in zip(batch.tokens, batch.segments)]
            for name, factor in zip(names, (out.beta / self.beta).tolist()):
                self.of_pair[name] *= factor
            beta = torch.tensor([self.of_pair[name] for name in names], dtype=torch.float64)
            out = out._replace(losses=peers.dpo(margin, beta), beta=beta)
        out = self.peer.loss(chosen, rejected, batch) if self.peer else out
        self.mean = 0.9 * self.mean + 0.1 * self.betas[0] * float(now.mean())
        theirs = peers.dynamic_beta(now, self.mean, self.betas[0], 0.6) - self.betas[0]  # β-DPO's move of each β
        means = torch.stack([x.double().mean() for x in (now, check, out.beta, now > 0)]).tolist()
        line = dict(zip(("margin", "step", "beta", "accuracy"), means))
        line["opposite"] = float(((check * theirs)[check != 0] > 0).double().mean())  # +1 lowers β
        for name, move in (("ours", -check.double()), ("theirs", theirs)):
            line[f"correlation_{name}"] = float(torch.corrcoef(torch.stack([now, move]))[0, 1])
        self.seen.append(line)
        return out

    def after_step(self, sums, policy, reference):
        if self.kind == "path":
            self.beta = self.betas[min(len(self.seen), len(self.betas) - 1)]
        elif self.peer:
            self.peer.after_step(sums, policy, reference)
        elif self.kind != "carried":
            super().after_step(sums, policy, reference)


@cache
def world_of(name: str, seed: int) -> tuple[toy.World, GPT, Tensor, list[Pair]]:
    """World, reference, its log-probabilities and the pairs; the reference is fitted once for each seed."""
    world, file = toy.World(seed), CACHE / f"reference-{seed}{'-quick' * (name == 'quick')}.pt"
    torch.manual_seed(seed)
    reference = GPT(TOY_MODEL)
    if not file.exists():
        toy.fit_reference(reference, world, 30 if name == "quick" else 300, seed)
        torch.save(reference.state_dict(), file.with_suffix(f".{os.getpid()}"))
        os.replace(file.with_suffix(f".{os.getpid()}"), file)
    reference.load_state_dict(torch.load(file, weights_only=True))
    logp, (n, noise, *_) = world.list_logps(reference), WORLDS[name]
    prompt, chosen, rejected = toy.sample_pairs(logp, world.reward, n, TOY_SCALE, seed)
    flip = torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)) < noise
    rows = zip(prompt.tolist(), *(torch.where(flip, *two).tolist() for two in ((rejected, chosen), (chosen, rejected))))
    pairs = [Pair(world.prompt_ids(x), world.response_ids(w), world.response_ids(l), "toy") for x, w, l in rows]
    return world, reference, logp, pairs


def method_of(setting: dict, policy: GPT, reference: GPT):
    kind, beta, epsilon = setting["method"], setting["beta"], setting.get("epsilon", 0.01)
    rest = {name: setting[name] for name in ("alpha", "tau", "m", "share", "instance") if name in setting}
    betas = [beta]
    if kind in ("replay", "decay"):  # of ε-DPO's run with the same settings
        betas = run(setting | {"method": "ε-DPO"})["betas"]
        if kind == "decay":
            betas = [beta * (betas[-1] / beta) ** (i / (len(betas) - 1)) for i in range(len(betas))]
        kind = "path"
    peer = {
        "IPO": lambda: peers.Peer(beta, "ipo"),
        "SimPO": lambda: peers.Peer(beta, "simpo", setting["gamma"]),
        "ORPO": lambda: peers.Peer(beta, "orpo", setting["weight"]),
        "KTO": lambda: peers.KTO(beta, policy=policy, reference=reference),
        "TR-DPO": lambda: peers.TRDPO(beta, **rest),
        "β-DPO": lambda: peers.BetaDPO(beta, **rest),
    }.get(kind, lambda: None)()
    step = 0.0 if kind in ("DPO", "path") else setting.get("epsilon_step", epsilon)
    return Variant(kind, epsilon, step, betas, peer)


def kept(file: Path, make: Callable, *args):
    """What `make(*args)` gives, or gave before: it is kept in `file`, whole or not at all."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(make(*args)))
        os.replace(partial, file)
    return json.loads(file.read_text())


def run(setting: dict) -> dict:
    """What a run gave: the exact report of its policy, its path of β, what it saw. From the cache if it is there."""
    key = json.dumps(setting, sort_keys=True, ensure_ascii=False)
    return kept(CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json", run_anew, setting)["result"]


def run_anew(setting: dict) -> dict:
    if setting["method"] == "table":
        result = of_table(**{name: value for name, value in setting.items() if name not in ("method", "world")})
    else:
        world, reference, ref_logp, pairs = world_of(setting["world"], setting["seed"])
        policy, reference = copy.deepcopy(reference), copy.deepcopy(reference)  # TR-DPO moves its reference
        method = method_of(setting, policy, reference)
        epochs, batch_size = WORLDS[setting["world"]][2:]
        ours = {"epsilon_check": method.epsilon_check, "epsilon_step": method.epsilon_step}
        flags = Flags(seed=setting["seed"], beta=setting["beta"], epochs=epochs, batch_size=batch_size, **ours)
        torch.manual_seed(setting["seed"])
        lines = train(policy, reference, pairs, flags, method)
        report = toy.report(world.list_logps(policy), ref_logp, world.reward, setting["beta"])
        result = report._asdict() | {"betas": [line["beta"] for line in lines], "seen": method.seen}
        result["accuracy"] = lines[-1]["rewards/accuracies"]
    return {"setting": setting, "result": result}


# ----------------------------------------------------------------------------------------------------------------------
# Question 5: a policy that is a table


def next_logps(world: toy.World, logp: Tensor) -> Tensor:
    """The next-token log-probabilities at every prefix, in the form that `list_logps` asks of a policy."""
    mass = [part.exp() for part in logp.split([world.letters**n for n in range(world.length + 1)], -1)]
    below, levels = mass[-1], []  # P(begins with it) of all texts of n letters
    for n in reversed(range(world.length)):
        children = below.view(len(logp), -1, world.letters)
        levels.append(torch.cat([children, mass[n][..., None]], -1))
        below = levels[-1].sum(-1)
    rows = world.letters ** (world.length - 1)
    levels = [x.repeat_interleave(rows // x.shape[1], 1).flatten(0, 1) for x in reversed(levels)]
    return torch.stack([levels[0], *levels], 1).log()


def of_table(seed: int, length: int, epsilon: float, iterations: int, reward: str, scaled: bool) -> dict[str, float]:
    """How often two estimates of a pair's step are that of policies really trained at β/(1+ε), β, β/(1−ε).

    All three start at the reference and take the same number of steps down the loss of all pairs, each pair counting
    as often as the reference draws it; a response's step is divided by its probability and, if `scaled`, by β, as
    Adam's steps are. 0 iterations stand for the optimum. Rewards are the toy's or random ones, standard normal.
    """
    world, beta, dice = toy.World(seed, 3, length), 0.5, torch.Generator().manual_seed(seed)
    ref_logp, r = world.list_logps(world.language), world.reward.double()
    r = torch.randn(r.shape, generator=dice, dtype=torch.float64) if reward == "random" else r
    p, truth = ref_logp.exp(), torch.sigmoid(r[:, :, None] - r[:, None])

    def fit(beta: float) -> Tensor:
        u = torch.zeros_like(p)  # log-ratios, up to a constant
        for _ in range(iterations):
            down = ((truth - torch.sigmoid(beta * (u[:, :, None] - u[:, None]))) * p[:, None]).sum(-1)
            u += down if scaled else beta * down
        return (ref_logp + u).log_softmax(-1) if iterations else toy.optimum(ref_logp, r, beta)

    minus, now, plus = (fit(b) for b in (beta / (1 + epsilon), beta, beta / (1 - epsilon)))
    tables = next_logps(world, now), next_logps(world, ref_logp)
    token = [world.list_logps(lambda _, s=s: perturbed_logits(*tables, s)) - now for s in (epsilon, -epsilon)]

    def step(minus: Tensor, plus: Tensor) -> Tensor:  # of all pairs (P, N, N); rounding is no step
        both = [x[:, :, None] - x[:, None] for x in (minus, plus)]
        return beta_steps(*(torch.where(x.abs() < 1e-11, 0.0, x) for x in both))

    true, by_token, by_margin = step(minus - now, plus - now), step(*token), step(now - ref_logp, ref_logp - now)
    weight = (p[:, :, None] * p[:, None]) * ~torch.eye(p.shape[1], dtype=torch.bool)
    weight /= weight.sum()
    moved = weight * (true != 0) / weight[true != 0].sum()
    shares = {"token right": by_token == true, "margin right": by_margin == true, "token keep": by_token == 0}
    found = {name: float((moved * x).sum()) for name, x in shares.items()} | {"ties": float(weight[true == 0].sum())}
    return found | {"KL to π*": float(toy.kl(now, toy.optimum(ref_logp, r, beta)))}


# ----------------------------------------------------------------------------------------------------------------------
# The questions


DPO_BETAS = (0.1, 0.25, 0.5, 1.0, 2.0)


def questions() -> dict[int, list[dict]]:
    """The settings of each question, without their seeds."""

    def grid(method: str, world: str, **lists) -> list[dict]:
        lists = ({"beta": (0.5,)} if world else {}) | lists
        rows = (dict(zip(lists, row)) for row in itertools.product(*lists.values()))
        return [{"method": method, "world": world} | row for row in rows]

    frontier, parts, opposite = [], [], []
    for world in ("easy", "hard"):
        frontier += grid("DPO", world, beta=DPO_BETAS)
        frontier += grid("ε-DPO", world, beta=(0.25, 0.5, 1.0, 2.0), epsilon=(0.01,))
        frontier += grid("ε-DPO", world, beta=(1.0,), epsilon=(0.03,))
        frontier += grid("TR-DPO", world, beta=(1.0,), alpha=(0.05,), tau=(1,))
        frontier += grid("TR-DPO", world, beta=(1.0,), alpha=(1.0,), tau=(32, 64))
        frontier += grid("β-DPO", world, m=(0.6, 1.0)) + grid("β-DPO", world, beta=(1.0,), m=(0.6,))
        frontier += grid("IPO", world, beta=(0.25, 1.0)) + grid("KTO", world, beta=(0.25, 1.0))
        frontier += grid("SimPO", world, beta=(2.0, 5.0), gamma=(0.5,)) + grid("ORPO", world, weight=(0.5, 4.0))
        opposite += grid("ε-DPO", world, epsilon=(0.01,)) + grid("β-DPO", world, m=(0.6,), instance=(True, False))
    for world, epsilon in (("easy", 0.01), ("easy", 0.05), ("hard", 0.01), ("small batches", 0.03)):
        for method in ("ε-DPO", "sign", "shuffled", "replay", "decay"):
            parts += grid(method, world, epsilon=(epsilon,))
    parts += grid("ε-DPO", "hard", epsilon=(0.1,)) + grid("carried", "hard", epsilon=(0.01, 0.1))
    parts += grid("ε-DPO", "hard", epsilon=(0.01,), epsilon_step=(0.1, 0.3))
    parts += grid("shuffled", "hard", epsilon=(0.01,), epsilon_step=(0.1, 0.3))
    table = grid("table", "", length=(2, 3, 4, 5), epsilon=(0.01,), iterations=(0,), scaled=(True,))
    table += grid("table", "", length=(4,), epsilon=(0.1, 0.3), iterations=(0,), scaled=(True,))
    table += grid("table", "", length=(4,), epsilon=(0.01,), iterations=(3, 10, 30, 100, 1000), scaled=(True, False))
    paths = grid("DPO", "small batches") + grid("DPO", "too long")
    paths += grid("ε-DPO", "small batches", epsilon=(0.01,)) + grid("ε-DPO", "too long", epsilon=(0.01,))
    sizes = grid("ε-DPO", "easy", epsilon=(0.005, 0.01, 0.02), epsilon_step=(0.005, 0.01, 0.02))
    paths += [x for x in (*frontier, *parts, *sizes) if x["method"] == "ε-DPO"]
    table = [x | {"reward": reward} for x in table for reward in ("toy", "random")]
    paths = list({name_of(x, 0): x for x in paths}.values())
    return {1: frontier, 6: parts, 3: sizes, 7: paths, 2: opposite, 5: table}


YARDSTICKS = {"mean reward": "reward", "KL to reference": "kl", "win rate": "win_rate", "share": "share"}
PATH = ["β at the end", "β₀·exp(−ε·n·mean step)", "β₀·exp(−ε·n·(2·accuracy − 1))"]
APART = [f"{name} minus ε-DPO's" for name in list(YARDSTICKS)[:2] + ["share"]]
OPPOSITE = ["ε-DPO's move and margin", "β-DPO's move and margin", "pairs moved apart"]
RIGHT = ["token right", "margin right"]
COLUMNS = {  # of the tables; the names of settings that make panels and lines of the figures; their x and y
    1: ([*YARDSTICKS, "reward minus DPO's at that KL"], ("world",), "method", "KL to reference", "mean reward"),
    2: ([*OPPOSITE, "mean step and mean margin", "β and mean margin"], ("world",), "method", *OPPOSITE[:2]),
    3: ([*YARDSTICKS, PATH[0]], (), "epsilon_step", "epsilon", "mean reward"),
    5: ([*RIGHT, "token keep", "ties", "KL to π*"], ("reward",), "scaled", "KL to π*", RIGHT[0]),
    6: ([*YARDSTICKS, PATH[0], *APART], ("world", "epsilon"), "method", *APART[1::-1]),
    7: ([*YARDSTICKS, "steps", *PATH], ("world",), "method", *PATH[1::-1]),
}


def name_of(setting: dict, seed: int) -> str:
    return json.dumps(setting | {"seed": seed}, sort_keys=True)


def numbers(setting: dict, seed: int, runs: dict[str, dict]) -> dict[str, float]:
    """What a run tells, by the names of `COLUMNS`; differences are to ε-DPO's run of the same world, β₀, ε, seed."""
    result, epsilon = runs[name_of(setting, seed)], setting.get("epsilon", 0.01)
    if setting["method"] == "table":
        return result
    seen = {name: np.array([line[name] for line in result["seen"]]) for name in result["seen"][0]}
    found = {name: result[key] for name, key in YARDSTICKS.items()}
    base = {"method": "ε-DPO", "world": setting["world"], "beta": setting["beta"], "epsilon": epsilon}
    base = runs.get(name_of(base, seed), result)
    found |= {f"{name} minus ε-DPO's": result[key] - base[key] for name, key in YARDSTICKS.items()}
    plain = [runs.get(name_of({"method": "DPO", "world": setting["world"], "beta": beta}, seed)) for beta in DPO_BETAS]
    if all(plain):  # rewards grow about as the root of the KL: between DPO's runs, a line over it
        roots, rewards = zip(*sorted((x["kl"] ** 0.5, x["reward"]) for x in plain))
        here = np.interp(result["kl"] ** 0.5, roots, rewards, np.nan, np.nan)
        found["reward minus DPO's at that KL"] = result["reward"] - here
    names = ("correlation_ours", "correlation_theirs", "opposite")  # each over a batch: means over the steps
    found |= {name: np.nanmean(seen[key]) for name, key in zip(OPPOSITE, names)}
    with np.errstate(invalid="ignore"):  # a β that does not move has no correlation
        found["mean step and mean margin"] = np.corrcoef(seen["step"], seen["margin"])[0, 1]
        found["β and mean margin"] = np.corrcoef(seen["beta"], seen["margin"])[0, 1]
    n, rate = len(result["betas"]), setting.get("epsilon_step", epsilon) * (setting["method"] != "DPO")
    means = seen["step"].mean(), 2 * seen["accuracy"].mean() - 1
    laws = (setting["beta"] * math.exp(-rate * (n - 1) * mean) for mean in means)
    return found | dict(zip(PATH, (result["betas"][-1], *laws))) | {"steps": n}


def row_of(question: int, setting: dict, seeds: range, runs: dict[str, dict]) -> dict:
    """A line of a table: means over the seeds, and their standard errors."""
    each = [numbers(setting, seed, runs) for seed in seeds]
    return means([setting | {name: x.get(name, math.nan) for name in COLUMNS[question][0]} for x in each], setting)


def means(rows: list[dict], same: Collection[str]) -> dict:
    """Rows of several seeds as one: what is the `same` in all stays, a number becomes its mean and standard error."""
    found = {name: rows[0][name] for name in same}
    for name in [name for name in rows[0] if name not in same]:
        values = np.array([row[name] for row in rows], float)
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        found |= {name: float(values.mean()), f"{name}_se": float(error)}
    return found


def show(rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row if not name.endswith("_se")))
    print(" | ".join(names))
    for row in rows:
        texts = (f"{x:.4g}" if isinstance(x := row.get(name, ""), float) else str(x) for name in names)
        print(" | ".join(x + (f" ± {row[f'{n}_se']:.2g}" if f"{n}_se" in row else "") for n, x in zip(names, texts)))


def write(rows: list[dict], file: Path) -> None:
    with open(file, "w", newline="") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def draw(question: int, rows: list[dict], seeds: range, file: Path) -> None:
    """Means and standard errors; with the best reward that any policy can have, where it is drawn against KL."""
    from matplotlib.figure import Figure

    from experiments.figures import BLUE, GREEN, GREY, ORANGE

    _, by, line, x, y = COLUMNS[question]
    if question == 5:  # of its settings those of one length and ε
        one = {name: rows[-1][name] for name in ("length", "epsilon")}
        rows = [row for row in rows if row | one == row]
    panels = list(dict.fromkeys(tuple(row.get(name) for name in by) for row in rows))
    names = list(dict.fromkeys(row.get(line, row.get("epsilon")) for row in rows))
    figure = Figure((4.2 * len(panels), 3.6), layout="constrained", facecolor="white")
    colors = (BLUE, ORANGE, GREEN, "#000000", "#CC79A7", "#56B4E9", "#E69F00", GREY)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name, color, marker in zip(names, colors, "os^Dv<>P"):
            some = [row for row in rows if tuple(row.get(name) for name in by) == panel and row.get(line) == name]
            some = sorted(some, key=lambda row: row[x])
            at, height, wide, tall = ([row.get(n, 0.0) for row in some] for n in (x, y, f"{x}_se", f"{y}_se"))
            label = name if line == "method" else f"{line} {name}"
            style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1, "label": label}
            axes.errorbar(at, height, tall, wide, **style | ({} if question in (3, 5) else {"linestyle": ""}))
        if question == 1:
            kls, worlds = np.linspace(0.01, axes.get_xlim()[1], 30), [world_of(*panel, seed) for seed in seeds]
            best = [np.mean([toy.frontier(w[2], w[0].reward, k) for w in worlds]) for k in kls]
            axes.plot(kls, best, color=GREY, label="best possible")
        if question == 7:
            axes.axline((0.1, 0.1), (0.5, 0.5), color=GREY, label="equal")
            axes.set(xscale="log", yscale="log")
        if question == 2:  # opposite directions are the upper left
            axes.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05))
            axes.axhline(0, color=GREY, linewidth=0.8)
            axes.axvline(0, color=GREY, linewidth=0.8)
        of = "correlation of " * (question == 2)
        axes.set(xlabel=of + x, ylabel=of + y, title=", ".join(map(str, panel)))
    figure.axes[-1].legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})


def quiet() -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__.split("`")[0])
    parser.add_argument("asked", type=int, nargs="*", metavar="QUESTION", help=f"of {sorted(COLUMNS)} [all]")
    parser.add_argument("--quick", action="store_true", help="every method once, a few steps each")
    asked, quick = vars(parser.parse_args(argv)).values()
    if unknown := set(asked) - COLUMNS.keys():
        parser.error(f"no question {sorted(unknown)}: {sorted(COLUMNS)} are there")
    chosen = {number: settings for number, settings in questions().items() if number in (asked or COLUMNS)}
    results, seeds = (CACHE / "quick" if quick else RESULTS), range(2 if quick else 5)
    if quick:
        for number, settings in chosen.items():
            first = {(x["method"], x.get("world")): x for x in reversed(settings)}.values()
            chosen[number] = [x | ({"world": "quick"} if x["world"] else {"iterations": 3}) for x in first]
    results.mkdir(parents=True, exist_ok=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    todo = {name_of(x, seed): x | {"seed": seed} for settings in chosen.values() for x in settings for seed in seeds}
    runs = {}
    with multiprocessing.get_context("spawn").Pool(2, quiet) as pool:
        for name, result in zip(todo, pool.imap(run, todo.values())):
            runs[name] = result
            print(f"\r{len(runs)} of {len(todo)} runs", end="", flush=True)
    for number, settings in sorted(chosen.items()):
        rows = [row_of(number, setting, seeds, runs) for setting in settings]
        print(f"\n\nquestion {number}")
        show(rows)
        write(rows, results / f"question{number}.csv")
        with contextlib.suppress(ImportError):  # without matplotlib there are no figures
            draw(number, rows, seeds, results / f"question{number}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
