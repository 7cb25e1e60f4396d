"""tutorial.md: its blocks run as printed, its exercises are checked, its equations and references hold.

    pytest tests/test_tutorial.py                                                all of it
    ANSWERS=my_answers.py pytest -q tests/test_tutorial.py -k exercise_3         your answer in place of the tutorial's
    python -m tests.test_tutorial                                                write what the blocks print into the text

In the text, a ```python block runs, and the ```text block right behind it is what it prints (without one it prints
nothing). ```python real blocks run with EPSDPO_CHECKPOINT, ```python solution blocks are answers to exercises in their
order, ```console blocks are one session of the debugger, in which … stands for anything.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import epsdpo
from epsdpo import beta_steps, epsdpo_loss, next_beta, sum_over_responses, token_stats
from support import toy
from support.rows import Pair, collate

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "tutorial.md"
CHECKPOINT = os.environ.get("EPSDPO_CHECKPOINT")


class Block(NamedTuple):
    kind: str  # the fence's info string: "python", "python real", …
    line: int  # of its first line of code, from 0
    code: str
    output: str  # of the text block right behind it


def blocks(text: str) -> list[Block]:
    found, end = [], None
    for m in re.finditer(r"^```(.*)\n((?:.*\n)*?)```\n", text, re.M):
        if m[1] == "text" and end is not None and not text[end : m.start()].strip():
            found[-1] = found[-1]._replace(output=m[2])
            end = None
            continue
        found.append(Block(m[1], text[: m.start(2)].count("\n"), m[2], ""))
        end = m.end() if m[1] in ("python", "python real") else None
    return found


TEXT = TUTORIAL.read_text("utf-8")
BLOCKS = blocks(TEXT)
SOLUTIONS = [block for block in BLOCKS if block.kind == "python solution"]


def run(block: Block, names: dict) -> str:
    """What a block prints; an error in it shows the tutorial's own line."""
    out = io.StringIO()
    code = compile("\n" * block.line + block.code, str(TUTORIAL), "exec")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        exec(code, names)
    return out.getvalue()


@contextlib.contextmanager
def as_before(folder: Path):
    """Run in `folder`; afterwards threads and random numbers are what they were."""
    threads, state, here = torch.get_num_threads(), torch.get_rng_state(), os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def run_all(kinds: tuple[str, ...], folder: Path):
    """Each block of `kinds`, in order and in one session, with what it printed."""
    names = {"__name__": "tutorial"}
    with as_before(folder):
        for block in BLOCKS:
            if block.kind in kinds:
                yield block, run(block, names)


# ----------------------------------------------------------------------------------------------------------------------
# The blocks


@pytest.mark.parametrize(
    "kinds", [("python",), pytest.param(("python", "python real"), marks=pytest.mark.real, id="with a real checkpoint")]
)
def test_blocks_print_what_stands_behind_them(kinds, tmp_path):
    if len(kinds) > 1 and not CHECKPOINT:
        pytest.skip("EPSDPO_CHECKPOINT is not set")
    ran = 0
    for block, printed in run_all(kinds, tmp_path):
        assert printed == block.output, f"tutorial.md:{block.line}"
        ran += 1
    assert ran == sum(block.kind in kinds for block in BLOCKS) > 15


def test_a_block_that_prints_something_else_fails(tmp_path):
    text = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n\n```python\nx = 1\n```\ntext\n```text\nno output\n```\n"
    first, second, other = blocks(text)
    assert run(first, {}) == "2\n" != first.output == "3\n"
    assert (second.output, other.kind) == ("", "text")  # words between: this is no output


def skeleton(text: str) -> str:
    """What the debugger says, without white space and with one sign for every number."""
    return re.sub(r"-?\d+\.?\d*(?:e[-+]?\d+)?", "#", re.sub(r"\s", "", text))


def test_debugger_session(tmp_path):
    """Every word of the printed session; its numbers may differ between machines."""
    lines = "".join(block.code for block in BLOCKS if block.kind == "console").splitlines()
    start, *lines = lines
    program, *arguments = start.removeprefix("$ python -m pdb ").split()
    commands = [line.removeprefix("(Pdb) ") for line in lines if line.startswith("(Pdb) ")]
    ran = subprocess.run(
        [sys.executable, "-m", "pdb", ROOT / program, *arguments], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        input="\n".join(commands) + "\n", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=600,
    )  # fmt: skip
    answers = ran.stdout.split("(Pdb) ")[1:]  # what stands before is the first stop, at the docstring
    expected = re.split(r"^\(Pdb\) .*\n?", "\n".join(lines) + "\n", flags=re.M)[1:]
    assert len(answers) == len(expected) == len(commands), ran.stdout
    for command, answer, wanted in zip(commands, answers, expected):
        if command == "continue":  # the program's own output is not part of the session
            answer = answer[answer.find("Deleted" if "Deleted" in wanted else "> ") :]
        pattern = ".*".join(re.escape(skeleton(part)) for part in wanted.split("…"))
        assert re.fullmatch(pattern, skeleton(answer)), f"(Pdb) {command}\n{answer}\nexpected\n{wanted}"


# ----------------------------------------------------------------------------------------------------------------------
# The numbers worked out by hand, and the equations that no other test holds

S, M, U = (4.0, 1.0, 1.0), (9.0, 4.0, 1.0), (1.0, 1.0, 1.0)  # weights of three words, where the reference is uniform
SU, SM, UU = ((S, U), (0, 0)), ((S, M), (0, 1)), ((U, U), (0, 0))  # positions of a response, words there


def response(positions, words, epsilon: float, ref=None):
    f = torch.tensor(positions, dtype=torch.float64).log()
    stats = token_stats(f, torch.zeros_like(f) if ref is None else ref, torch.tensor(words), epsilon)
    return sum_over_responses(stats, torch.zeros(len(words), dtype=torch.int64), 1)


@pytest.mark.parametrize(
    "chosen, rejected, plus, now, minus, step",
    [(SU, UU, 3 / 2, 2, 12 / 5, +1), (UU, SU, 2 / 3, 1 / 2, 5 / 12, -1), (SM, UU, 3 / 2, 12 / 7, 8 / 5, 0)],
    ids=["lower", "raise", "keep"],
)
def test_three_pairs_by_hand(chosen, rejected, plus, now, minus, step):
    w, l = response(*chosen, 0.5), response(*rejected, 0.5)
    z = (w.logp - l.logp).item()
    found = [z, z + (w.delta_plus - l.delta_plus).item(), z + (w.delta_minus - l.delta_minus).item()]
    assert found == pytest.approx([math.log(now), math.log(plus), math.log(minus)], abs=1e-12)
    assert epsdpo_loss(w, l, 0.5, 0.5).step.item() == step


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 5), st.floats(1e-3, 0.9))
def test_whole_sequences(seed, beta, epsilon):
    """(7) and (8): the optimum at another β lies on the line, and the check would be the sign of the margin."""
    dice = torch.Generator().manual_seed(seed)
    ref = torch.randn(2, 30, generator=dice, dtype=torch.float64).log_softmax(-1)
    reward = torch.randint(-2, 3, (2, 30), generator=dice)
    now, minus, plus = (toy.optimum(ref, reward, b) for b in (beta, beta / (1 + epsilon), beta / (1 - epsilon)))
    for s, other in ((epsilon, minus), (-epsilon, plus)):
        line = (ref + (1 + s) * (now - ref)).log_softmax(-1)
        torch.testing.assert_close(line, other, rtol=0, atol=1e-9)
        z, z_other, z_ref = (x[:, :, None] - x[:, None, :] for x in (now, other, ref))
        torch.testing.assert_close(z_other - z, s * (z - z_ref), rtol=0, atol=1e-8)


def random_pair(seed: int, spread: float, epsilon: float):
    """Sums of two responses of four tokens, log p − log q everywhere (2, 4, V), p, labels."""
    dice = torch.Generator().manual_seed(seed)
    f_ref = torch.randn(2, 4, 7, generator=dice, dtype=torch.float64)
    f = f_ref + spread * torch.randn(2, 4, 7, generator=dice, dtype=torch.float64)
    label = torch.randint(7, (2, 4), generator=dice)
    stats = token_stats(f, f_ref, label, epsilon)
    owner = torch.arange(2).repeat_interleave(4)
    sums = sum_over_responses(epsdpo.TokenStats(*(x.flatten() for x in stats)), owner, 2)
    return sums, f.log_softmax(-1) - f_ref.log_softmax(-1), f.softmax(-1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 2), st.floats(1e-3, 0.9))
def test_normalisers(seed, spread, epsilon):
    """(10): the sum over tokens is ε · margin less what the normalisers of the positions do not cancel."""
    sums, ratio, p = random_pair(seed, spread, epsilon)
    margin = (sums.logp - sums.ref_logp)[0] - (sums.logp - sums.ref_logp)[1]
    for s, delta in ((epsilon, sums.delta_minus), (-epsilon, sums.delta_plus)):
        log_n = (p * (s * ratio).exp()).sum(-1).log().sum(-1)  # (2,)
        assert (delta[0] - delta[1]).item() == pytest.approx((s * margin - (log_n[0] - log_n[1])).item(), abs=1e-9)


def test_keep_band():
    """(16): of pairs whose margin is moved to near the KL gap, those within the band are kept, and no others."""
    epsilon = 1e-3
    for seed in range(30):
        sums, ratio, p = random_pair(seed, 0.5, epsilon)
        variance = (p * (ratio - (p * ratio).sum(-1, keepdim=True)) ** 2).sum((-1, -2))
        band = epsilon / 2 * (variance[0] - variance[1]).abs()
        margin, gap = (sums.logp - sums.ref_logp).diff().neg(), sums.kl.diff().neg()
        for bands in (-1.8, -1.1, -0.9, 0.2, 0.9, 1.1, 1.8):  # from the KL gap; the law is to leading order
            shift = gap + bands * band - margin
            minus, plus = (
                sums.delta_minus.diff().neg() + epsilon * shift,
                sums.delta_plus.diff().neg() - epsilon * shift,
            )
            assert beta_steps(minus, plus).item() == (0 if abs(bands) < 1 else math.copysign(1, bands))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.integers(0, 100), st.sampled_from([1e-4, 1e-3, 0.01]))
def test_where_beta_goes(n, right, epsilon):
    """(19), to second order in ε."""
    beta = 0.5
    for _ in range(n):
        beta = next_beta(beta, right, 0, 100 - right, epsilon)
    assert math.log(beta / 0.5) == pytest.approx(-epsilon * n * (2 * right / 100 - 1), abs=1.01 * n * epsilon**2)


@pytest.mark.parametrize("seed", range(3))
def test_chosen_and_rejected_fall_together(seed):
    """(20), where a pair may hold the same response twice."""
    dice = torch.Generator().manual_seed(seed)
    ref, policy = (torch.randn(2, 9, generator=dice, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    win = torch.rand(2, 9, 9, generator=dice, dtype=torch.float64)  # P(first is chosen), any at all
    both, ratio = ref.exp()[:, :, None] * ref.exp()[:, None, :], policy - ref
    chosen = (both * (win * ratio[:, :, None] + (1 - win) * ratio[:, None, :])).sum((1, 2)).mean()
    rejected = (both * ((1 - win) * ratio[:, :, None] + win * ratio[:, None, :])).sum((1, 2)).mean()
    assert ((chosen + rejected) / 2).item() == pytest.approx(-toy.kl(ref, policy).item(), abs=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# The exercises: a check says what is wrong, and must find these wrong answers wrong


def check_1(answer):
    assert len(answer) == 3 and all(x in (-1, 0, 1) for x in answer), "three numbers of -1, 0, +1 are asked for"
    pairs = [(((S,), (1,)), ((U,), (0,))), (((S,), (0,)), ((M,), (0,))), (UU, SM)]
    for name, (chosen, rejected), given in zip("abc", pairs, answer):
        step = epsdpo_loss(response(*chosen, 0.5), response(*rejected, 0.5), 0.5, 0.5).step.item()
        assert given == step, f"({name}) is not {given:+d}: write down the ratio under β⁺, β and β⁻"


def check_2(answer):
    right, wrong = answer
    assert right == pytest.approx(next_beta(0.4, 3, 2, 1, 0.25), rel=2e-6), "the mean of β̃ over all six pairs"
    means = next_beta(0.4, 3, 1, 0, 0.25), next_beta(0.4, 0, 1, 1, 0.25)
    assert wrong == pytest.approx(sum(means) / 2, rel=2e-6), "the mean of two means, of four pairs and of two"


def check_3(answer):
    torch.manual_seed(0)
    for distance in (1.0, 1e-2, 1e-4, 1e-6):
        for epsilon in (0.5, 0.01, 0.001):
            f_ref = torch.randn(50)
            f = f_ref + distance * torch.randn(50)
            exact = token_stats(f.double(), f_ref.double(), torch.tensor(7), epsilon)
            for s, expected in ((epsilon, exact.delta_minus), (-epsilon, exact.delta_plus)):
                found = float(answer(f.clone(), f_ref.clone(), 7, s))
                assert found == pytest.approx(expected.item(), rel=1e-3), f"distance {distance}, s {s}"


def check_4(answer):
    policy_w, word_w, policy_l, word_l = answer
    for policy in (policy_w, policy_l):
        assert len(policy) == 3 and min(policy) > 0 and abs(sum(policy) - 1) < 1e-6, f"{policy}: three probabilities"
    chosen, rejected = response([policy_w], [word_w], 0.01), response([policy_l], [word_l], 0.01)
    margin = math.log(policy_w[word_w]) - math.log(policy_l[word_l])
    assert margin > 0, f"the margin is {margin:.4f}"
    step = epsdpo_loss(chosen, rejected, 0.1, 0.01).step.item()
    gap = (chosen.kl - rejected.kl).item()
    assert step == -1, f"the step is {step:+d}: the margin is {margin:.4f}, the KL gap {gap:.4f}"


def check_5(answer):
    beta = 1.0
    for _ in range(2000):
        beta = next_beta(beta, 8, 0, 2, answer)
    assert 0.09 < beta < 0.11, f"β ends at {beta:.3g} of β₀"


def check_6(answer):
    batch = collate([Pair(*(torch.tensor(ids).numpy() for ids in ([3], [8, 2], [8, 6, 2])))])
    for name, values in zip(batch._fields, batch):
        assert name in answer and list(answer[name]) == values.flatten().tolist(), f"{name} is not right"


def check_7(answer):
    step, margin = [1, 0, -1, 1], torch.tensor([2.0, -1.0, -30.0, 0.0], dtype=torch.float64)
    rejected = (-margin).clone().requires_grad_()
    zero = torch.zeros(4, dtype=torch.float64)
    sign = torch.tensor(step, dtype=torch.float64)
    chosen = epsdpo.TokenStats(zero, zero, sign, -sign, zero)
    epsdpo_loss(chosen, epsdpo.TokenStats(rejected, zero, zero, zero, zero), 0.3, 0.1).loss.backward()
    found = answer(0.3, 0.1, step, margin.tolist())
    assert list(map(float, found)) == pytest.approx(rejected.grad.tolist(), rel=1e-6), "at steps +1, 0, -1, +1"


def check_8(answer):
    reference, policy, chosen, rejected = answer
    for p in (reference, policy):
        assert len(p) == 3 and min(p) > 0 and abs(sum(p) - 1) < 1e-6, f"{p}: three probabilities are asked for"
    w, l = (math.log(policy[i] / reference[i]) for i in (chosen, rejected))
    assert chosen != rejected and w - l > 0, f"the margin is {w - l:.4f}"
    assert w < 0 and l < 0, f"the log-ratios are {w:.4f} and {l:.4f}: both must be negative"


def check_9(answer):
    from .conformance.asking import Function
    from .conformance.cases import read
    from .conformance.judging import complaints

    cases = [case for case in read() if case["level"] == "method"]
    for case, found in zip(cases, Function(answer).ask(cases)):
        wrong = complaints(case, found, "arithmetic")
        assert not wrong, f"case {case['id']}: {wrong[0]}; pytest tests/conformance --impl FILE:exercise_9 says more"
        assert found is not None or case["entry"] != "logits", "entry 'logits' must be offered"


WRONG = {
    1: ["(1, 1, 0)", "(-1, 1, 1)", "(-1, -1, 0)"],
    2: ["(0.382222, 0.4)", "(0.4, 0.4)", "(0.4134, 0.4134)"],
    3: ["lambda f, g, y, s: ((f + s * (f - g)).log_softmax(-1) - f.log_softmax(-1))[y].item()", "lambda f, g, y, s: 0"],
    4: ["((.8, .1, .1), 0, (1 / 3, 1 / 3, 1 / 3), 0)", "((.6, .3, .1), 1, (1 / 3, 1 / 3, 1 / 3), 0)"],
    5: ["0.01", "0.00115", "0.0038"],
    6: ['{"tokens": [3, 8, 2, 8, 6, 2], "positions": [0, 1, 2, 3, 4, 5]}', "{}"],
    7: ["lambda b, e, step, m: [0.075] * 4", "lambda b, e, step, m: [b / 4 / (1 + 2.718281828 ** (b * x)) for x in m]"],
    8: [
        "((.4, .3, .3), (.5, .2, .3), 0, 1)",
        "((.4, .3, .3), (.1, .3, .6), 0, 1)",
        "((.4, .3, .3), (.4, .3, .3), 0, 0)",
    ],
    9: ["lambda case: None", "lambda case: {}", "lambda case: wrong(case)"],
}
CHECKS = {n: globals()[f"check_{n}"] for n in WRONG}


@pytest.mark.parametrize("n", CHECKS, ids=lambda n: f"exercise_{n}")
def test_answers(n):
    names: dict = {}
    if answers := os.environ.get("ANSWERS"):
        exec(compile(Path(answers).read_text("utf-8"), answers, "exec"), names)
        if f"exercise_{n}" not in names:
            pytest.skip(f"{answers} has no exercise_{n} yet")
    else:
        for block in SOLUTIONS:  # in one session, as in one file of answers
            run(block, names)
    CHECKS[n](names[f"exercise_{n}"])


@pytest.mark.parametrize("n, answer", [(n, answer) for n, answers in WRONG.items() for answer in answers])
def test_wrong_answers_are_found(n, answer):
    names: dict = {}
    run(SOLUTIONS[-1], names)
    right = names["exercise_9"]

    def wrong(case):  # swaps ε and −ε
        return right(case | {"epsilon_check": -case["epsilon_check"]})

    with pytest.raises(AssertionError):
        CHECKS[n](eval(answer, {"wrong": wrong}))


def test_the_conformance_suite_passes_the_adapter(tmp_path):
    (tmp_path / "my_answers.py").write_text(SOLUTIONS[-1].code, "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance", "--impl"]
    ran = subprocess.run(
        [*command, f"{tmp_path / 'my_answers.py'}:exercise_9"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "passes the level method" in ran.stdout, ran.stdout[-2000:]


# ----------------------------------------------------------------------------------------------------------------------
# What the text points to


def test_every_equation_has_its_function_and_its_test():
    rows = re.findall(r"^\| \((\d+)\) .* \| `(\w+)\.(\w+)` \| `(test_\w+)::(\w+)` \|$", TEXT, re.M)
    tags = re.findall(r"\\tag\{(\d+)\}", TEXT)
    assert [int(row[0]) for row in rows] == list(range(1, 21)) and len(set(tags)) == len(tags) == 19  # (6) is a table
    for _, module, function, file, test in rows:
        assert callable(getattr(__import__(module), function))
        assert re.search(rf"^def {test}\(", (ROOT / f"tests/{file}.py").read_text("utf-8"), re.M), (
            f"{file} has no {test}"
        )


def test_figures_and_links_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    titles = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^## (.*)$", TEXT, re.M)]
    for anchor in re.findall(r"\]\(#([^)]+)\)", TEXT):
        assert anchor in titles, anchor
    for name in re.findall(r"experiments\.figures (\w+)", TEXT):
        assert (ROOT / "figures" / f"{name}.svg").exists()


def test_math_survives_markdown():
    """Markdown eats a backslash before punctuation, a | ends a table's cell, and a line may begin a list or a heading."""
    for formula in re.findall(r"\$\$.*?\$\$", TEXT, re.S):
        assert not re.search(r"^[-+=>#*]|\\[^\w\s]", formula, re.M), formula
    for line, text in enumerate(TEXT.splitlines(), 1):
        for formula in re.findall(r"\$([^$`]+)\$", text):
            assert not re.search(r"\\[^\w\s]", formula), f"tutorial.md:{line}: {formula}"
            assert not (text.startswith("|") and "|" in formula), f"tutorial.md:{line}: {formula}"


def write_outputs(folder: Path) -> None:
    """Put what the blocks print into the tutorial."""
    lines = TEXT.splitlines(keepends=True)
    for block, printed in reversed(list(run_all(("python", "python real") if CHECKPOINT else ("python",), folder))):
        end = block.line + block.code.count("\n") + 1  # behind the closing fence
        rest = re.sub(r"\A\s*```text\n(.*\n)*?```\n", "", "".join(lines[end:]))
        lines[end:] = [(f"\n```text\n{printed}```\n" if printed else "") + rest]
    TUTORIAL.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        write_outputs(Path(scratch))
