"""ε-DPO on a real checkpoint: `python -m experiments.real --model DIR --data FILE.jsonl`

Answers questions 4 and 8 of experiments/README.md. DPO and ε-DPO train on short pairs in float32. After some steps of
ε-DPO, its decisions on seen and unseen pairs are repeated in several formats. Finished parts are saved in out/real.
"""

import argparse
import contextlib
import copy
import math
import multiprocessing
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from epsdpo import TokenStats, beta_steps, linear_token_stats, perturbed_logits, sum_over_responses
from experiments.compare import RESULTS, kept, means, quiet, show, write
from model import GPT
from support.checkpoint import load_model, read_config
from support.data import load_pairs
from support.rows import Batch, Pair, collate, epoch_order, row_length
from support.text import Tokenizer
from train import EpsDPO, Flags, evaluate, learning_rate, train

CACHE = Path("out/real")
LENGTH, UNSEEN, SEEN, BATCH, STEPS = 96, 200, 64, 8, 32  # tokens of the longest row; three numbers of pairs; steps
LOOKS = (1, 8, 32)  # compare decisions after these steps
GROUP = ("step", "pairs", "format", "way", "n")  # columns that identify a row of question 4's table
BETA, EPSILON, LR = 0.1, 0.02, 1e-5
FORMATS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Autocast(TorchFunctionMode):
    """Emulate autocast to a 16-bit dtype for our forward pass, at float32's speed on any CPU.

    Arguments and results of matmuls, attention and activations are rounded. Sums are float32, as in real hardware.
    """

    NAMES = ("linear", "scaled_dot_product_attention", "silu")

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") not in self.NAMES:
            return func(*args, **(kwargs or {}))
        return self.rounded(func(*map(self.rounded, args), **(kwargs or {})))

    def rounded(self, x):
        return x.to(self.dtype).to(x.dtype) if torch.is_tensor(x) and x.is_floating_point() else x


def rounding_as(dtype: torch.dtype) -> contextlib.AbstractContextManager:
    return Autocast(dtype) if dtype.itemsize == 2 else contextlib.nullcontext()


def body(model: GPT, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Hidden states (M, D) of a forward pass in `dtype`, returned as float64 for a float64 model, else as float32."""
    with rounding_as(dtype):
        return model(batch.tokens, batch.positions, batch.segments, batch.source)


def textbook(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> TokenStats:
    """Differences of three log-softmaxes, in the dtype of the logits (M, V)."""
    of = [perturbed_logits(policy_logits, ref_logits, s).log_softmax(-1) for s in (0.0, EPSILON, -EPSILON, -1.0)]
    logp, minus, plus, ref = (x.gather(-1, labels[:, None]).squeeze(-1) for x in of)
    return TokenStats(logp, ref, minus - logp, plus - logp, torch.zeros_like(logp))


@torch.no_grad()
def decisions(policy: GPT, reference: GPT, pairs: list[Pair], known: dict) -> list[dict]:
    """Both changes of each pair's log-odds, in every format and way. `known` caches the reference's hidden states.

    float64 increments are the truth. In 16 bits, increments have a float32 head; textbook rounds the logits as well.
    """
    if not known:
        known["reference"] = copy.deepcopy(reference).double()
    models = {"float64": (copy.deepcopy(policy).double(), known["reference"])}
    found = []
    for i in range(0, len(pairs), 4):
        batch = collate(pairs[i : i + 4])
        size = len(batch.tokens)
        lengths = batch.owner.bincount(minlength=2 * size).tolist()
        for name, dtype in FORMATS.items():
            now, ref = models.get(name, (policy, reference))
            place = (name, id(pairs), i)
            if place not in known:
                known[place] = body(ref, batch, dtype)
            heads = (body(now, batch, dtype), now.lm_head.weight), (known[place], ref.lm_head.weight)
            ways = {"increments": linear_token_stats(*heads[0], *heads[1], batch.label, EPSILON)}
            if name != "float64":
                with rounding_as(dtype):
                    logits = [F.linear(*head) for head in heads]
                ways["textbook"] = textbook(*logits, batch.label)
            for way, stats in ways.items():
                sums = sum_over_responses(stats, batch.owner, 2 * size)
                minus, plus = (x[:size] - x[size:] for x in (sums.delta_minus, sums.delta_plus))
                for j, (a, b) in enumerate(zip(minus.tolist(), plus.tolist())):
                    line = {"format": name, "way": way, "pair": i + j, "minus": a, "plus": b}
                    found.append(line | {"longer": lengths[j] - lengths[size + j]})
    return found


class Watched(EpsDPO):
    """ε-DPO that repeats its decisions on `pairs` (by name) in all formats after the steps in `LOOKS`."""

    def __init__(self, pairs: dict[str, list[Pair]], seed: int) -> None:
        super().__init__(BETA, EPSILON, EPSILON)
        self.pairs, self.seed, self.known, self.steps, self.found = pairs, seed, {}, 0, []

    def after_step(self, sums, policy, reference):
        super().after_step(sums, policy, reference)
        self.steps += 1
        for name, some in self.pairs.items() if self.steps in LOOKS else ():
            file = CACHE / f"{name}-{self.seed}-{self.steps}.json"
            lines = kept(file, decisions, policy, reference, some, self.known)
            self.found += [{"step": self.steps, "pairs": name} | line for line in lines]


def summary(found: list[dict]) -> list[dict]:
    """One row for each step, set of pairs, format and way."""
    groups, rows = defaultdict(list), []
    for line in found:
        groups[tuple(line[key] for key in GROUP[:4])].append(line)
    for (step, pairs, name, way), lines in groups.items():
        truth = groups[step, pairs, "float64", "increments"]
        (minus, plus, longer), (true_minus, true_plus, _) = (
            [torch.tensor([line[key] for line in some], dtype=torch.float64) for key in ("minus", "plus", "longer")]
            for some in (lines, truth)
        )
        right, true = beta_steps(minus, plus), beta_steps(true_minus, true_plus)
        slope = float(minus @ true_minus / (true_minus @ true_minus))  # rounded weights lose part of every update
        error = minus - slope * true_minus
        row = dict(zip(GROUP, (step, pairs, name, way, len(true))))
        row |= {"agree": float((right == true).double().mean()), "lower": int((right > 0).sum())}
        row |= {"keep": int((right == 0).sum()), "raise": int((right < 0).sum())}
        for key, x in (("step and length", right), ("error and length", error), ("Δ and true Δ", minus)):
            other = true_minus if key == "Δ and true Δ" else longer
            row[f"correlation of {key}"] = float(torch.corrcoef(torch.stack([x.double(), other]))[0, 1])
        row |= {"slope": slope, "noise / signal": float(error.norm() / (slope * true_minus).norm())}
        clear = minus.abs() > 2 * error.square().mean().sqrt()  # outside a keep band at twice the noise
        row |= {"clear": float(clear.double().mean())}
        row |= {"agree where clear": float((right == true)[clear].double().mean()) if clear.any() else math.nan}
        rows.append(row)
    return rows


def on_the_grid(model: GPT, learning_rates: list[float]) -> list[dict]:
    """The share of weights whose 16-bit copy can have changed: Adam can move them by more than half the spacing.

    A checkpoint's weights are exact in 16 bits and round back to themselves until they have moved that far.
    """
    sizes, rows = torch.cat([p.detach().flatten().abs() for n, p in model.named_parameters() if "proj" in n]), []
    median, powers = float(sizes.median()), sizes.log2().floor().exp2()
    for step in LOOKS:
        row = {"step": step, "median weight": median, "sum of learning rates": sum(learning_rates[:step])}
        for name in ("float16", "bfloat16"):
            half = torch.finfo(FORMATS[name]).eps / 2 * powers
            row[name] = float((half < row["sum of learning rates"]).double().mean())
        rows.append(row)
    return rows


def draw(rows: list[dict], file: Path) -> None:
    from matplotlib.figure import Figure

    from experiments.figures import BLUE, GREEN, ORANGE

    figure = Figure((8.4, 3.6), layout="constrained", facecolor="white")
    colors = {"float32": BLUE, "float16": GREEN, "bfloat16": ORANGE}
    for axes, pairs in zip(figure.subplots(1, 2, sharey=True), ("unseen", "seen")):
        for name, color in colors.items():
            for way, style in (("increments", "o-"), ("textbook", "s:")):
                some = [r for r in rows if (r["pairs"], r["format"], r["way"]) == (pairs, name, way)]
                x, y, e = ([r[key] for r in some] for key in ("step", "agree", "agree_se"))
                axes.errorbar(x, y, e, fmt=style, color=color, markersize=4, linewidth=1, label=f"{name}, {way}")
        axes.set(xscale="log", xlabel="optimizer steps", title=f"{pairs} pairs", ylim=(0.3, 1.02))
        axes.set_xticks(LOOKS, [str(x) for x in LOOKS])
    figure.axes[0].set_ylabel("share of decisions that agree with float64")
    figure.axes[1].legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})


def run(name: str, seed: int, model: str, pairs: list[Pair], unseen: list[Pair]) -> dict:
    """A run's held-out numbers and decisions."""
    policy, reference = (load_model(model) for _ in range(2))
    flags = Flags(beta=BETA, epsilon=EPSILON, lr=LR, batch_size=BATCH, steps=STEPS, micro_tokens=512, seed=seed)
    # the pairs of the first steps, in `train`'s order
    seen = [pairs[i] for i in epoch_order(len(pairs), seed, 0)[:SEEN]]
    method = Watched({"unseen": unseen, "seen": seen}, seed) if name == "ε-DPO" else EpsDPO(BETA, EPSILON, 0.0)
    lines = train(policy, reference, pairs, flags, method)
    held = evaluate(policy, reference, unseen, method, flags)
    result = {"β": method.beta, "accuracy": held["eval/rewards/accuracies"], "KL": held["eval/kl"]}
    result |= {"log-ratio margin": held["eval/rewards/margins"] / method.beta, "loss": lines[-1]["loss"]}
    return result | {"steps/lower": held["eval/steps/lower"], "found": getattr(method, "found", [])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.real", description=__doc__.split("`")[0])
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="preference files")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    args = parser.parse_args()
    asked = [args.model, args.data, LENGTH, UNSEEN, SEEN, BATCH, STEPS, LOOKS, BETA, EPSILON, LR]
    if (before := kept(CACHE / "settings.json", repr, asked)) != repr(asked):
        parser.error(f"{CACHE} holds runs of {before}; delete it to run {asked}")
    rules = {"vocab_size": read_config(args.model).vocab_size, "skip_bad_rows": True}
    pairs, _ = load_pairs(args.data, Tokenizer.from_pretrained(args.model), max_length=512, **rules)
    pairs = [pair for pair in pairs if row_length(pair) <= LENGTH]
    order = np.random.default_rng(0).permutation(len(pairs))
    unseen, pairs = [pairs[i] for i in order[:UNSEEN]], [pairs[i] for i in order[UNSEEN:]]
    print(f"{len(pairs)} pairs of at most {LENGTH} tokens to train on, {len(unseen)} held out")
    rows, done = [], {}
    with multiprocessing.get_context("spawn").Pool(2, quiet) as pool:
        for name in ("ε-DPO", "DPO"):
            files = [(CACHE / f"{name}-{seed}.json", run, name, seed) for seed in range(args.seeds)]
            done[name] = pool.starmap_async(kept, [(*x, args.model, pairs, unseen) for x in files], chunksize=1)
        done = {name: results.get() for name, results in done.items()}
    for name, results in done.items():
        looks = [summary(result.pop("found")) for result in results]
        rows.append(means([{"method": name} | result for result in results], ["method"]))
        if name == "ε-DPO":
            found = [means(row_of_seeds, GROUP) for row_of_seeds in zip(*looks)]
            write(found, RESULTS / "question4.csv")
            with contextlib.suppress(ImportError):
                draw(found, RESULTS / "question4.svg")
            show(found)
            flags = Flags(lr=LR, steps=STEPS)
            show(on_the_grid(load_model(args.model), [learning_rate(i, STEPS, flags) for i in range(STEPS)]))
    write(rows, RESULTS / "question8.csv")
    show(rows)


if __name__ == "__main__":
    main()
