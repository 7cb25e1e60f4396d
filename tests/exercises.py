"""Checks answers to the exercises of tutorial.md. A wrong answer gets a hint, never the solution.

python -m tests.exercises my_answers.py          all exercises that the file answers
python -m tests.exercises my_answers.py 3 7      these
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from epsdpo import TokenStats, epsdpo_loss, next_beta, sum_over_responses, token_stats
from model import GPT, Config
from support import toy
from support.rows import Batch, Pair, collate
from train import Flags, score_pairs, train

ROOT = Path(__file__).resolve().parents[1]
S, M, U = (4.0, 1.0, 1.0), (9.0, 4.0, 1.0), (1.0, 1.0, 1.0)  # the policy's weights; the reference is uniform


class Wrong(Exception):
    """The answer is wrong; the message is a hint."""


def require(condition: bool, hint: str) -> None:
    if not condition:
        raise Wrong(hint)


def close(found: float, expected: float, relative: float) -> bool:
    return math.isclose(float(found), expected, rel_tol=relative)


def response(positions, words, epsilon_check: float) -> TokenStats:
    """Sums over a response, from the policy's weights at its positions; (1,) each."""
    f = torch.tensor(positions, dtype=torch.float64).log()
    tokens = token_stats(f, torch.zeros_like(f), torch.tensor(words), epsilon_check)
    return sum_over_responses(tokens, torch.zeros(len(words), dtype=torch.int64), 1)


@cache
def section_8_problem() -> tuple[toy.World, GPT, list[Pair]]:
    """The world, the reference and the pairs of the tutorial's sections 1 and 7."""
    world = toy.World(letters=3, length=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = Config(
            vocab_size=4, hidden_size=32, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, head_dim=8, max_position_embeddings=8, windows=(None,),
        )  # fmt: skip
        reference = GPT(size).double()
    toy.fit_reference(reference, world, steps=100, lr=1e-2)
    drawn = toy.sample_pairs(world.list_logps(world.language), world.reward, n=4096, scale=1.0, seed=2)
    rows = zip(*(column.tolist() for column in drawn))
    pairs = [Pair(world.prompt_ids(x), world.response_ids(w), world.response_ids(l)) for x, w, l in rows]
    return world, reference, pairs


@cache
def section_8_run(epsilon: float, pairs: int = 4096, batch_size: int = 64, epochs: int = 1) -> tuple[list[dict], float]:
    """The metrics of section 8's run with this ε (0 is DPO), and its share of the attainable gain."""
    world, reference, all_pairs = section_8_problem()
    flags = Flags(beta=0.5, epsilon_step=epsilon, lr=2e-3, batch_size=batch_size, epochs=epochs)
    policy = copy.deepcopy(reference)
    metrics = train(policy, reference, all_pairs[:pairs], flags)
    logp, ref_logp = world.list_logps(policy), world.list_logps(reference)
    return metrics, toy.report(logp, ref_logp, world.reward, beta=0.5).share


# ----------------------------------------------------------------------------------------------------------------------
# The checks


def check_1(answer) -> None:
    require(len(answer) == 3 and all(x in (-1, 0, 1) for x in answer), "expected three numbers, each -1, 0 or +1")
    pairs = [
        (((S,), (1,)), ((U,), (0,))),
        (((S,), (0,)), ((M,), (0,))),
        (((U, U), (0, 0)), ((S, M), (0, 1))),
    ]
    for name, (chosen, rejected), given in zip("abc", pairs, answer):
        step = epsdpo_loss(response(*chosen, 0.5), response(*rejected, 0.5), 0.5, 0.5).step.item()
        require(given == step, f"({name}) is wrong: write down the odds under β⁺, β and β⁻")


def check_2(answer) -> None:
    whole, of_means = answer
    require(close(whole, next_beta(0.4, 3, 2, 1, 0.25), 2e-6), "the first number: β̃ of six pairs, and their mean")
    means = next_beta(0.4, 3, 1, 0, 0.25), next_beta(0.4, 0, 1, 1, 0.25)
    require(close(of_means, sum(means) / 2, 2e-6), "the second number: a mean of four β̃, a mean of two, their mean")


def check_3(answer) -> None:
    generator = torch.Generator().manual_seed(0)
    for distance in (1.0, 1e-2, 1e-4, 1e-6):
        for epsilon in (0.5, 0.01, 0.001):
            f_ref = torch.randn(50, generator=generator)
            f = f_ref + distance * torch.randn(50, generator=generator)
            exact = token_stats(f.double(), f_ref.double(), torch.tensor(7), epsilon)
            for s, expected in ((epsilon, exact.delta_minus), (-epsilon, exact.delta_plus)):
                found = answer(f.clone(), f_ref.clone(), 7, s)
                where = f"logits that differ by {distance:g}, s = {s:g}"
                require(
                    close(found, expected.item(), 1e-3), f"wrong at {where}: are you subtracting two large numbers?"
                )


def check_4(answer) -> None:
    policy_w, word_w, policy_l, word_l = answer
    for policy in (policy_w, policy_l):
        ok = len(policy) == 3 and min(policy) > 0 and abs(sum(policy) - 1) < 1e-6
        require(ok, f"expected three probabilities above 0 that sum to 1, got {policy}")
    chosen, rejected = response([policy_w], [word_w], 0.01), response([policy_l], [word_l], 0.01)
    out = epsdpo_loss(chosen, rejected, 0.1, 0.01)
    gap = (chosen.kl - rejected.kl).item()
    found = f"your pair has margin {out.margin.item():.4f}, KL gap {gap:.4f} and step {out.step.item():+d}"
    require(out.margin.item() > 0 and out.step.item() == -1, f"{found}: see equation (14)")


def check_5(answer) -> None:
    batch = collate([Pair(*map(np.array, ([3], [8, 2], [8, 6, 2])))])
    for name, values in zip(batch._fields, batch):
        require(list(answer.get(name, ())) == values.flatten().tolist(), f"{name} is wrong")


def own_loop(policy: GPT, reference: GPT, batches: list[Batch], beta: float, epsilon: float, lr: float) -> list[float]:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    betas = [beta]
    for batch in batches:
        out = epsdpo_loss(*score_pairs(policy, reference, batch, epsilon, "float32"), betas[-1], epsilon)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        betas.append(next_beta(betas[-1], *(int((out.step == s).sum()) for s in (1, 0, -1)), epsilon))
    return betas


def check_6(answer) -> None:
    _, reference, pairs = section_8_problem()
    batches = [collate(pairs[i : i + 16]) for i in range(0, 80, 16)]
    ours, theirs, untouched = (copy.deepcopy(reference) for _ in range(3))
    betas = own_loop(ours, reference, batches, 0.3, 0.1, 5e-3)
    found = answer(theirs, untouched, batches, 0.3, 0.1, 5e-3)
    require(found is not None and len(found) == 6, "five batches were given: expected six numbers, β at first included")
    for i, (given, expected) in enumerate(zip(found, betas)):
        require(close(given, expected, 1e-9), f"β is wrong after step {i}" if i else "the first number must be beta")
    moved = [not torch.equal(a, b) for a, b in zip(untouched.parameters(), reference.parameters())]
    require(not any(moved), "the reference has changed")
    off = max((a - b).abs().max().item() for a, b in zip(theirs.parameters(), ours.parameters()))
    require(off < 1e-6, f"β is right, but the policy is off by {off / 5e-3:.2g} learning rates")


def check_7(answer) -> None:
    require(len(answer) == 3, "expected three numbers")
    for epsilon, given in zip((0.005, 0.02, 0.05), answer):
        found = section_8_run(epsilon)[0][-1]["beta"]
        require(close(given, found, 0.08), f"the prediction for ε = {epsilon} is more than 8 % off")


def check_8(answer) -> None:
    require(0 < answer <= 0.5, "expected an ε above 0 and at most 0.5")
    ours, dpo = (section_8_run(epsilon, pairs=512, batch_size=32, epochs=8) for epsilon in (answer, 0.0))
    beta = ours[0][-1]["beta"]
    found = f"ε-DPO has {ours[1]:.0%} of the attainable gain, DPO {dpo[1]:.0%}, and β ended at {beta:.2g}"
    require(beta < 0.5 / 20 and ours[1] <= dpo[1] - 0.05, f"{found}: what should ε times steps be, and what not?")


CHECKS: dict[int, Callable] = {
    1: check_1, 2: check_2, 3: check_3, 4: check_4, 5: check_5, 6: check_6, 7: check_7, 8: check_8,
}  # fmt: skip


def check_9(file: Path) -> None:
    """The conformance suite, in a process of its own."""
    command = [sys.executable, "-m", "tests.conformance", "--impl", f"{file}:exercise_9"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    require(ran.returncode == 0, f"the conformance suite says\n{ran.stdout}{ran.stderr[-2000:]}")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def verdict(n: int, names: dict, file: Path) -> str:
    if f"exercise_{n}" not in names:
        return "no answer yet"
    try:
        if n == 9:
            check_9(file)
        else:
            CHECKS[n](names[f"exercise_{n}"])
    except Wrong as hint:
        return f"not yet: {hint}"
    except Exception as error:  # anything that the answer itself raises
        return f"not yet: it raised {type(error).__name__}: {error}"
    return "right"


def main(arguments: list[str]) -> int:
    """0 if all answers that were asked for are right."""
    if not arguments or not Path(arguments[0]).is_file():
        print("usage: python -m tests.exercises my_answers.py [number …]", file=sys.stderr)
        return 2
    file = Path(arguments[0]).resolve()
    names: dict = {"__name__": "answers"}
    exec(compile(file.read_text("utf-8"), str(file), "exec"), names)
    asked = [int(n) for n in arguments[1:]] or [n for n in range(1, 10) if f"exercise_{n}" in names]
    verdicts = {n: verdict(n, names, file) for n in asked}
    for n, text in verdicts.items():
        print(f"exercise {n}: {text}")
    return 0 if set(verdicts.values()) <= {"right"} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
