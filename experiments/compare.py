"""Compare ε-DPO with other methods on exact toy worlds: `python -m experiments.compare [QUESTION…] [--quick]`

Answers questions 1, 2, 3, 5, 6 and 7 of experiments/README.md. Each finished run is saved in out/compare as a small
JSON file named by its settings. Tables are printed; their numbers and figures (`plot` extra) go to experiments/results.
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
from train import EpsDPO, Flags, train

CACHE, RESULTS = Path("out/compare"), Path(__file__).parent / "results"
WORLDS = {  # pairs, share of labels flipped, epochs, batch size
    "easy": (4096, 0.0, 1, 32),
    "hard": (512, 0.2, 8, 32),
    "small batches": (2048, 0.0, 1, 16),
    "too long": (2048, 0.0, 10, 16),
    "quick": (32, 0.2, 2, 16),
}

# ----------------------------------------------------------------------------------------------------------------------
# One run


class Variant(EpsDPO):
    """ε-DPO with steps or β chosen in another way, or the loss of `peer`. `seen` records what each step looked like."""

    def __init__(self, kind: str, epsilon_check: float, epsilon_step: float, betas: list[float], peer=None):
        super().__init__(betas[0], epsilon_check, epsilon_step)
        self.kind, self.betas, self.peer = kind, betas, peer
        self.mean = 0.0  # β-DPO's running mean of reward margins
        self.of_pair = defaultdict(lambda: betas[0])  # kind "carried": a β for each pair
        self.seen = []

    def loss(self, chosen, rejected, batch):
        margin = torch.sub(*peers.log_ratios(chosen, rejected))
        out, now = epsdpo_loss(chosen, rejected, self.beta, self.epsilon_step), margin.detach()
        own = out.step
        if self.kind in ("sign", "shuffled"):  # the margin's sign as the step, or each step given to another pair
            step = now.sign() if self.kind == "sign" else own[torch.randperm(len(own))].double()
            chosen_then = chosen._replace(delta_minus=step, delta_plus=-step)
            rejected_then = rejected._replace(delta_minus=0 * step, delta_plus=0 * step)
            out = epsdpo_loss(chosen_then, rejected_then, self.beta, self.epsilon_step)
        if self.kind == "carried":  # each pair continues from its own β; there is no common one
            names = [row[part >= 0].numpy().tobytes() for row, part in zip(batch.tokens, batch.segments)]
            for name, factor in zip(names, (out.beta / self.beta).tolist()):
                self.of_pair[name] *= factor
            beta = torch.tensor([self.of_pair[name] for name in names], dtype=torch.float64)
            out = out._replace(losses=peers.dpo(margin, beta), beta=beta)
        if self.peer:
            out = self.peer.loss(chosen, rejected, batch)
        self.note(now, own, out.beta)
        return out

    def note(self, margin: Tensor, own: Tensor, beta: Tensor) -> None:
        """Record a batch: means, and how ε-DPO's own steps and β-DPO's moves of β relate to the margins."""
        self.mean = 0.9 * self.mean + 0.1 * self.betas[0] * float(margin.mean())
        theirs = peers.dynamic_beta(margin, self.mean, self.betas[0], 0.6) - self.betas[0]
        means = torch.stack([x.double().mean() for x in (margin, own, beta, margin > 0)]).tolist()
        line = dict(zip(("margin", "step", "beta", "accuracy"), means))
        line["opposite"] = float(((own * theirs)[own != 0] > 0).double().mean())  # step +1 lowers β
        for name, move in (("ours", -own.double()), ("theirs", theirs)):
            line[f"correlation_{name}"] = float(torch.corrcoef(torch.stack([margin, move]))[0, 1])
        self.seen.append(line)

    def after_step(self, sums, policy, reference):
        if self.kind == "path":
            self.beta = self.betas[min(len(self.seen), len(self.betas) - 1)]
        elif self.peer:
            self.peer.after_step(sums, policy, reference)
        elif self.kind != "carried":
            super().after_step(sums, policy, reference)


@cache
def problem_of(seed: int) -> toy.Problem:
    return toy.make_problem(seed, pairs=4096, eval_pairs=0)


def pairs_of(world: str, seed: int) -> list[Pair]:
    """The first pairs of the seed's problem. In a share of them, drawn at random, the wrong response is chosen."""
    n, share, *_ = WORLDS[world]
    flipped = np.random.default_rng(seed).random(n) < share
    pairs = zip(problem_of(seed).pairs, flipped)
    return [pair._replace(chosen=pair.rejected, rejected=pair.chosen) if wrong else pair for pair, wrong in pairs]


def method_of(setting: dict, policy: GPT, reference: GPT):
    kind, beta, epsilon = setting["method"], setting["beta"], setting.get("epsilon", 0.01)
    rest = {name: setting[name] for name in ("alpha", "tau", "m", "share", "instance") if name in setting}
    betas = [beta]
    if kind in ("replay", "decay"):  # the path of β of ε-DPO's run with the same settings, or its exponential
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
    """Return `make(*args)`, or what an earlier call saved in `file`. The file is written completely or not at all."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(make(*args)))
        os.replace(partial, file)
    return json.loads(file.read_text())


def run(setting: dict) -> dict:
    """A run's exact report, its path of β and what its steps looked like; from the cache if it was run before."""
    key = json.dumps(setting, sort_keys=True, ensure_ascii=False)
    return kept(CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json", run_anew, setting)["result"]


def run_anew(setting: dict) -> dict:
    if setting["method"] == "table":
        result = of_table(**{name: value for name, value in setting.items() if name not in ("method", "world")})
    else:
        problem, pairs = problem_of(setting["seed"]), pairs_of(setting["world"], setting["seed"])
        policy, reference = (copy.deepcopy(problem.reference) for _ in range(2))  # TR-DPO moves its reference
        method = method_of(setting, policy, reference)
        epochs, batch_size = WORLDS[setting["world"]][2:]
        ours = {"epsilon_check": method.epsilon_check, "epsilon_step": method.epsilon_step}
        flags = Flags(seed=setting["seed"], beta=setting["beta"], epochs=epochs, batch_size=batch_size, **ours)
        torch.manual_seed(setting["seed"])
        lines = train(policy, reference, pairs, flags, method)
        world = problem.world
        report = toy.report(world.list_logps(policy), problem.ref_logp, world.reward, setting["beta"])
        result = report._asdict() | {"betas": [line["beta"] for line in lines], "seen": method.seen}
        result["accuracy"] = lines[-1]["rewards/accuracies"]
    return {"setting": setting, "result": result}


# ----------------------------------------------------------------------------------------------------------------------
# Question 5: a policy given as a table of probabilities


def next_logps(world: toy.World, logp: Tensor) -> Tensor:
    """Next-token log-probabilities at every prefix, in the form that `list_logps` expects from a policy."""
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
    """How often two estimates of a pair's step agree with policies really trained at β/(1+ε), β and β/(1−ε).

    All three policies start at the reference and take `iterations` steps of gradient descent on the loss of all pairs;
    each pair counts as often as the reference draws it. A response's gradient is divided by its probability and, if
    `scaled`, by β (as Adam does). 0 iterations mean the optimum. reward: "toy", or "random" for standard normal ones.
    """
    world, beta, generator = toy.World(seed, 3, length), 0.5, torch.Generator().manual_seed(seed)
    ref_logp, r = world.list_logps(world.language), world.reward.double()
    r = torch.randn(r.shape, generator=generator, dtype=torch.float64) if reward == "random" else r
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

    def step(minus: Tensor, plus: Tensor) -> Tensor:  # of all pairs (P, N, N); rounding errors do not count
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
    """The settings of each question, without seeds."""

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
ABOVE = "reward minus DPO's at that KL"  # needs the DPO runs of question 1, if only some questions are asked
OPPOSITE = ["ε-DPO's move and margin", "β-DPO's move and margin", "pairs moved apart"]
RIGHT = ["token right", "margin right"]
COLUMNS = {  # columns of the table; settings that make panels, setting that makes lines, x and y of the figure
    1: ([*YARDSTICKS, ABOVE], ("world",), "method", "KL to reference", "mean reward"),
    2: ([*OPPOSITE, "mean step and mean margin", "β and mean margin"], ("world",), "method", *OPPOSITE[:2]),
    3: ([*YARDSTICKS, PATH[0], ABOVE], (), "epsilon_step", "epsilon", "mean reward"),
    5: ([*RIGHT, "token keep", "ties", "KL to π*"], ("reward",), "scaled", "KL to π*", RIGHT[0]),
    6: ([*YARDSTICKS, PATH[0], *APART, ABOVE], ("world", "epsilon"), "method", *APART[1::-1]),
    7: ([*YARDSTICKS, "steps", *PATH], ("world",), "method", *PATH[1::-1]),
}


def name_of(setting: dict, seed: int) -> str:
    return json.dumps(setting | {"seed": seed}, sort_keys=True)


def numbers(setting: dict, seed: int, runs: dict[str, dict]) -> dict[str, float]:
    """A run's numbers, named as in `COLUMNS`. Differences are to ε-DPO's run with the same world, β₀, ε and seed."""
    result, epsilon = runs[name_of(setting, seed)], setting.get("epsilon", 0.01)
    if setting["method"] == "table":
        return result
    seen = {name: np.array([line[name] for line in result["seen"]]) for name in result["seen"][0]}
    found = {name: result[key] for name, key in YARDSTICKS.items()}
    base = {"method": "ε-DPO", "world": setting["world"], "beta": setting["beta"], "epsilon": epsilon}
    base = runs.get(name_of(base, seed), result)
    found |= {f"{name} minus ε-DPO's": result[key] - base[key] for name, key in YARDSTICKS.items()}
    plain = [runs.get(name_of({"method": "DPO", "world": setting["world"], "beta": beta}, seed)) for beta in DPO_BETAS]
    if all(plain):  # reward grows about as the root of KL, so interpolate DPO's runs linearly in that root
        roots, rewards = zip(*sorted((x["kl"] ** 0.5, x["reward"]) for x in plain))
        here = np.interp(result["kl"] ** 0.5, roots, rewards, np.nan, np.nan)
        found[ABOVE] = result["reward"] - here
    names = ("correlation_ours", "correlation_theirs", "opposite")  # computed per batch; here the mean over steps
    found |= {name: np.nanmean(seen[key]) for name, key in zip(OPPOSITE, names)}
    with np.errstate(invalid="ignore"):  # a constant β has no correlation
        found["mean step and mean margin"] = np.corrcoef(seen["step"], seen["margin"])[0, 1]
        found["β and mean margin"] = np.corrcoef(seen["beta"], seen["margin"])[0, 1]
    n, rate = len(result["betas"]), setting.get("epsilon_step", epsilon) * (setting["method"] != "DPO")
    means = seen["step"].mean(), 2 * seen["accuracy"].mean() - 1
    laws = (setting["beta"] * math.exp(-rate * (n - 1) * mean) for mean in means)
    return found | dict(zip(PATH, (result["betas"][-1], *laws))) | {"steps": n}


def means(rows: list[dict], same: Collection[str]) -> dict:
    """Merge rows of several seeds: columns in `same` are copied, numbers become mean and standard error."""
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
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def draw(question: int, rows: list[dict], seeds: range, file: Path) -> None:
    """Draw means with standard errors. Question 1 also shows the best possible reward at each KL."""
    from matplotlib.figure import Figure

    from experiments.figures import BLUE, GREEN, GREY, ORANGE

    _, by, line, x, y = COLUMNS[question]
    if question == 5:  # only the settings with the last row's length and ε
        one = {name: rows[-1][name] for name in ("length", "epsilon")}
        rows = [row for row in rows if row | one == row]
    panels = list(dict.fromkeys(tuple(row.get(name) for name in by) for row in rows))
    names = list(dict.fromkeys(row.get(line, row.get("epsilon")) for row in rows))
    figure = Figure((max(8.4, 3.6 * len(panels)), 4.2), layout="constrained", facecolor="white")
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
            kls, problems = np.linspace(0.01, axes.get_xlim()[1], 30), [problem_of(seed) for seed in seeds]
            best = [np.mean([toy.frontier(p.ref_logp, p.world.reward, k) for p in problems]) for k in kls]
            axes.plot(kls, best, color=GREY, label="best possible")
        if question == 7:
            axes.axline((0.1, 0.1), (0.5, 0.5), color=GREY, label="equal")
            axes.set(xscale="log", yscale="log")
        if question == 2:  # the upper left means opposite directions
            axes.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05))
            axes.grid(color=GREY, linewidth=0.3)
        of = "correlation of " * (question == 2)
        axes.set(xlabel=of + x, ylabel=of + y, title=", ".join(map(str, panel)))
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(file, metadata={"Date": None})


def quiet() -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__.split("`")[0])
    parser.add_argument("asked", type=int, nargs="*", metavar="QUESTION", help=f"any of {sorted(COLUMNS)} [all]")
    parser.add_argument("--quick", action="store_true", help="run every method for a few steps only")
    asked, quick = vars(parser.parse_args(argv)).values()
    if unknown := set(asked) - COLUMNS.keys():
        parser.error(f"expected questions from {sorted(COLUMNS)}, got {sorted(unknown)}")
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
        rows = []
        for setting in settings:
            each = [numbers(setting, seed, runs) for seed in seeds]
            columns = [{name: found.get(name, math.nan) for name in COLUMNS[number][0]} for found in each]
            rows.append(means([setting | x for x in columns], setting))
        print(f"\n\nquestion {number}")
        show(rows)
        write(rows, results / f"question{number}.csv")
        with contextlib.suppress(ImportError):  # without matplotlib there are no figures
            draw(number, rows, seeds, results / f"question{number}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
