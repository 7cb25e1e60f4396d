"""README.md and tutorial.md: blocks run as printed, exercises are checked, equations, links and example rows hold.

    pytest tests/test_tutorial.py            all of it
    python -m tests.test_tutorial            writes what the blocks print into tutorial.md
    python -m tests.test_tutorial pdb        writes what the debugger answers into tutorial.md

In the text, a ```python block runs, and the ```text block right after it is what it prints (without one it prints
nothing). ```python real blocks need EPSDPO_CHECKPOINT. ```console blocks are one session of the debugger, in which …
stands for anything.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
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
from support.data import load_pairs
from support.text import Tokenizer

from . import exercises, solutions

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "tutorial.md"
README = (ROOT / "README.md").read_text("utf-8")
CHECKPOINT = os.environ.get("EPSDPO_CHECKPOINT")


class Block(NamedTuple):
    kind: str  # the fence's info string: "python", "python real", …
    line: int  # of its first line of code, from 0
    code: str
    output: str  # of the text block right after it


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
def test_blocks_print_the_boxes_below_them(kinds, tmp_path):
    if len(kinds) > 1 and not CHECKPOINT:
        pytest.skip("EPSDPO_CHECKPOINT is not set")
    ran = 0
    for block, printed in run_all(kinds, tmp_path):
        assert printed == block.output, f"tutorial.md:{block.line}"
        ran += 1
    assert ran == sum(block.kind in kinds for block in BLOCKS) >= 15


def test_block_that_prints_something_else_fails():
    text = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n\n```python\nx = 1\n```\ntext\n```text\nno output\n```\n"
    first, second, other = blocks(text)
    assert run(first, {}) == "2\n" != first.output == "3\n"
    assert (second.output, other.kind) == ("", "text")  # words between: this is no output


def session() -> tuple[str, list[str], list[str]]:
    """The tutorial's session with the debugger: how it starts, its commands, the answers."""
    lines = "".join(block.code for block in BLOCKS if block.kind == "console").splitlines()
    commands = [line.removeprefix("(Pdb) ") for line in lines[1:] if line.startswith("(Pdb) ")]
    answers = re.split(r"^\(Pdb\) .*\n?", "\n".join(lines[1:]) + "\n", flags=re.M)[1:]
    return lines[0], commands, answers


def debugger_answers(start: str, commands: list[str], folder: Path) -> list[str]:
    """What pdb says to each command, without what the program itself prints."""
    program, *arguments = start.removeprefix("$ python -m pdb ").split()
    ran = subprocess.run(
        [sys.executable, "-m", "pdb", ROOT / program, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        input="\n".join(commands) + "\n", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=600,
    )  # fmt: skip
    answers = ran.stdout.split("(Pdb) ")[1:]  # before the first: the first stop, at the docstring
    assert len(answers) == len(commands), ran.stdout
    for i, command in enumerate(commands):
        if ";;" in command:  # several at once: only the last answer is shown
            answers[i] = answers[i][answers[i].rindex("\n> ") + 1 :]
        if command in ("continue", "c"):
            stop = re.search(r"^(Deleted breakpoint|> )", answers[i], re.M)
            answers[i] = answers[i][stop.start() :] if stop else answers[i]
    return answers


def skeleton(text: str) -> str:
    """What the debugger says, without white space and with one sign for every number."""
    return re.sub(r"-?\d+\.?\d*(?:e[-+]?\d+)?", "#", re.sub(r"\s", "", text))


def test_debugger_session(tmp_path):
    """Every word of the printed session; its numbers may differ between machines."""
    start, commands, expected = session()
    for command, answer, wanted in zip(commands, debugger_answers(start, commands, tmp_path), expected):
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
    """(11) and (12): the optimum at another β lies on the line, and the check would be the sign of the margin."""
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(2, 30, generator=generator, dtype=torch.float64).log_softmax(-1)
    reward = torch.randint(-2, 3, (2, 30), generator=generator)
    now, minus, plus = (toy.optimum(ref, reward, b) for b in (beta, beta / (1 + epsilon), beta / (1 - epsilon)))
    for s, other in ((epsilon, minus), (-epsilon, plus)):
        line = (ref + (1 + s) * (now - ref)).log_softmax(-1)
        torch.testing.assert_close(line, other, rtol=0, atol=1e-9)
        z, z_other, z_ref = (x[:, :, None] - x[:, None, :] for x in (now, other, ref))
        torch.testing.assert_close(z_other - z, s * (z - z_ref), rtol=0, atol=1e-8)


def random_pair(seed: int, spread: float, epsilon: float):
    """Sums of two responses of four tokens, log p − log q everywhere (2, 4, V), p, labels."""
    generator = torch.Generator().manual_seed(seed)
    f_ref = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    f = f_ref + spread * torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    label = torch.randint(7, (2, 4), generator=generator)
    stats = token_stats(f, f_ref, label, epsilon)
    owner = torch.arange(2).repeat_interleave(4)
    sums = sum_over_responses(epsdpo.TokenStats(*(x.flatten() for x in stats)), owner, 2)
    return sums, f.log_softmax(-1) - f_ref.log_softmax(-1), f.softmax(-1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 2), st.floats(1e-3, 0.9))
def test_normalisers(seed, spread, epsilon):
    """(13): the sum over tokens is ε · margin less what the normalisers of the positions do not cancel."""
    sums, ratio, p = random_pair(seed, spread, epsilon)
    margin = (sums.logp - sums.ref_logp)[0] - (sums.logp - sums.ref_logp)[1]
    for s, delta in ((epsilon, sums.delta_minus), (-epsilon, sums.delta_plus)):
        log_n = (p * (s * ratio).exp()).sum(-1).log().sum(-1)  # (2,)
        assert (delta[0] - delta[1]).item() == pytest.approx((s * margin - (log_n[0] - log_n[1])).item(), abs=1e-9)


def test_keep_band():
    """(15): of pairs whose margin is moved to near the KL gap, those within the band are kept, and no others."""
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
    """(10), to second order in ε."""
    beta = 0.5
    for _ in range(n):
        beta = next_beta(beta, right, 0, 100 - right, epsilon)
    assert math.log(beta / 0.5) == pytest.approx(-epsilon * n * (2 * right / 100 - 1), abs=1.01 * n * epsilon**2)


@pytest.mark.parametrize("seed", range(3))
def test_chosen_and_rejected_fall_together(seed):
    """(19), where a pair may hold the same response twice."""
    generator = torch.Generator().manual_seed(seed)
    ref, policy = (torch.randn(2, 9, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    win = torch.rand(2, 9, 9, generator=generator, dtype=torch.float64)  # P(first is chosen), any at all
    both, ratio = ref.exp()[:, :, None] * ref.exp()[:, None, :], policy - ref
    chosen = (both * (win * ratio[:, :, None] + (1 - win) * ratio[:, None, :])).sum((1, 2)).mean()
    rejected = (both * ((1 - win) * ratio[:, :, None] + win * ratio[:, None, :])).sum((1, 2)).mean()
    assert ((chosen + rejected) / 2).item() == pytest.approx(-toy.kl(ref, policy).item(), abs=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# The exercises: solutions pass, wrong answers do not, and the hints do not tell

CASE_9 = "from tests.solutions import exercise_9 as right\n\ndef exercise_9(case): "
WRONG = {
    1: ["(1, 1, 0)", "(-1, 1, 1)", "(-1, -1, 0)", "(-1, 1)"],
    2: ["(0.382222, 0.4)", "(0.4, 0.4)", "(0.4134, 0.4134)"],
    3: ["lambda f, g, y, s: ((f + s * (f - g)).log_softmax(-1) - f.log_softmax(-1))[y].item()", "lambda *_: 0"],
    4: ["((.8, .1, .1), 0, (1/3, 1/3, 1/3), 0)", "((.6, .3, .1), 1, (1/3, 1/3, 1/3), 0)", "((1, 0, 0), 0, (1, 0, 0), 0)"],
    5: ['{"tokens": [3, 8, 2, 8, 6, 2], "positions": [0, 1, 2, 3, 4, 5]}', "{}"],
    6: [
        "lambda policy, reference, batches, beta, *_: [beta]",
        "lambda policy, reference, batches, beta, *_: [beta] * 6",
        "lambda policy, reference, *rest: own_loop(reference, policy, *rest)",
        "lambda policy, reference, *rest: own_loop(__import__('copy').deepcopy(policy), reference, *rest)",
        "lambda *given: own_loop(*given[:5], 2 * given[5])",
    ],
    7: ["(0.45, 0.35, 0.3)", "(0.5, 0.5, 0.5)"],
    8: ["0.01", "0.6"],
    9: ["return None", "return {}", 'return right(case | {"epsilon_check": -case["epsilon_check"]})'],
}  # fmt: skip


def check(n: int, answer: str, folder: Path, capsys) -> tuple[int, str]:
    """Exit code and output of the checker for a file with this answer."""
    text = CASE_9 + answer if n == 9 else f"from tests.exercises import own_loop\nexercise_{n} = {answer}"
    (folder / "my_answers.py").write_text(text, "utf-8")
    code = exercises.main([str(folder / "my_answers.py"), str(n)])
    return code, "".join(capsys.readouterr())


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("n", range(1, 10))
def test_solutions_are_right(n, one_thread):
    assert exercises.verdict(n, vars(solutions), Path(solutions.__file__)) == "right"


def test_predictions_of_exercise_7_are_made_by_the_code_beside_them(one_thread):
    assert solutions.predictions() == pytest.approx(solutions.exercise_7, rel=5e-3)


def numbers_in(value) -> list[float]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else [value]
    if values is not value and len(values) == 1 and not isinstance(value, (dict, tuple, list)):
        return [float(value)] if isinstance(value, (int, float)) else []
    return [number for part in values for number in numbers_in(part)]


@pytest.mark.parametrize("n, answer", [(n, answer) for n, answers in WRONG.items() for answer in answers])
def test_wrong_answers_get_a_hint_and_not_the_solution(n, answer, tmp_path, capsys, one_thread):
    code, said = check(n, answer, tmp_path, capsys)
    assert code == 1 and f"exercise {n}: not yet: " in said
    told = [float(x) for x in re.findall(r"\d+\.\d{3,}", said)]
    secret = [x for x in numbers_in(getattr(solutions, f"exercise_{n}")) if abs(x * 100) % 1]
    assert not [x for x in told for y in secret if x == pytest.approx(abs(y), rel=1e-3) and str(x) not in answer], said
    assert "Traceback" not in said or n == 9


def test_checker_says_what_is_missing(tmp_path, capsys):
    (tmp_path / "my_answers.py").write_text("exercise_1 = (-1, 1, 0)\nexercise_5 = 3\n")
    assert exercises.main([str(tmp_path / "my_answers.py")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "exercise 1: right" and said[1].startswith("exercise 5: not yet: it raised") and len(said) == 2
    assert exercises.main([str(tmp_path / "my_answers.py"), "2"]) == 1 and "no answer yet" in capsys.readouterr().out
    assert exercises.main([]) == exercises.main(["nowhere.py"]) == 2


# ----------------------------------------------------------------------------------------------------------------------
# What the texts point to

TESTS = {  # equation: a test that holds it
    1: "test_toy::test_bradley_terry",
    2: "test_toy::test_the_optimum_of_any_beta_lies_on_the_frontier",
    3: "test_toy::test_regret_is_beta_times_the_kl_to_the_optimum",
    4: "test_epsdpo::test_loss_is_the_mean_negative_log_sigmoid",
    5: "test_epsdpo::test_beta_is_the_harmonic_mean_of_its_two_neighbours",
    6: "test_epsdpo::test_the_step_follows_the_order_of_the_three_log_odds",
    7: "test_epsdpo::test_perturbed_logits_are_affine_in_s",
    8: "test_epsdpo::test_gradient_is_dpos_at_beta_tilde_in_closed_form",
    9: "test_epsdpo::test_next_beta_is_the_arithmetic_mean_of_beta_tilde",
    10: "test_tutorial::test_where_beta_goes",
    11: "test_tutorial::test_whole_sequences",
    12: "test_tutorial::test_whole_sequences",
    13: "test_tutorial::test_normalisers",
    14: "test_epsdpo::test_first_order_law",
    15: "test_tutorial::test_keep_band",
    16: "test_epsdpo::test_token_stats_equal_exact_arithmetic",
    17: "test_epsdpo::test_kl_is_never_negative",
    18: "test_epsdpo::test_the_readable_definition_says_the_same",
    19: "test_tutorial::test_chosen_and_rejected_fall_together",
}


def test_every_equation_has_its_function_and_its_test():
    table = TEXT[TEXT.index("## Equations") :]
    rows = re.findall(r"^\| (\(\d+\).*) \| `(\w+)\.(\w+)` \|$", table, re.M)
    listed = {int(n) for equations, *_ in rows for n in re.findall(r"\((\d+)\)", equations)}
    tags = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", TEXT)]
    assert listed == set(TESTS) and tags == [n for n in TESTS if n != 6]  # (6) is a table; the rest are in order
    for _, module, function in rows:
        assert callable(getattr(importlib.import_module({"toy": "support.toy"}.get(module, module)), function))
    for name in TESTS.values():
        file, test = name.split("::")
        assert re.search(rf"^def {test}\(", (ROOT / f"tests/{file}.py").read_text("utf-8"), re.M), name


def test_equations_are_numbered_before_they_are_used():
    for n in TESTS:
        first = min(m.start() for m in re.finditer(rf"\({n}\)|tag\{{{n}\}}", TEXT))
        assert n == 6 or TEXT[first:].startswith("tag") or n in (16, 19), f"({n}) is used before it is there"


@pytest.mark.parametrize("text", [README, TEXT], ids=["README", "tutorial"])
def test_links_and_figures_are_there(text):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target
    titles = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^##+ (.*)$", text, re.M)]
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in titles, anchor
    for name in re.findall(r"experiments\.figures (\w+)", text):
        assert (ROOT / "figures" / f"{name}.svg").exists()


@pytest.mark.parametrize("text", [README, TEXT], ids=["README", "tutorial"])
def test_formulas_survive_markdown(text):
    """Markdown eats a backslash before punctuation, a | ends a table's cell, and a line may begin a list or a heading."""
    for formula in re.findall(r"\$\$.*?\$\$", text, re.S):
        assert not re.search(r"^[-+=>#*]|\\[^\w\s]", formula, re.M), formula
    for line, written in enumerate(text.splitlines(), 1):
        for formula in re.findall(r"\$([^$`]+)\$", written):
            assert not re.search(r"\\[^\w\s]", formula), f"line {line}: {formula}"
            assert not (written.startswith("|") and "|" in formula), f"line {line}: {formula}"


@pytest.mark.parametrize("text, longest", [(README, 150), (TEXT, 1000)], ids=["README", "tutorial"])
def test_texts_fit_their_page(text, longest):
    """Lines of code fit the width of GitHub's page, and symbols with an index are formulas or code."""
    assert text.count("\n") <= longest
    for block in re.findall(r"^```.*\n((?:.*\n)*?)```$", text, re.M):
        assert max(map(len, block.splitlines()), default=0) <= 88, max(block.splitlines(), key=len)
    prose = re.sub(r"^```.*\n(?:.*\n)*?```$|\$\$[^$]*\$\$|\$[^$\n]*\$|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.M)
    assert not re.search(r"\b\w_\w|β[⁻⁺]|Δ", prose), re.search(r".*(?:\b\w_\w|β[⁻⁺]|Δ).*", prose)


# ----------------------------------------------------------------------------------------------------------------------
# The README's example rows

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory) -> Tokenizer:
    """A token for each byte, the two of ChatML, and a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return Tokenizer.from_pretrained(folder)


ROWS = [json.loads(row) for row in re.findall(r'`(\{"(?:prompt|chosen)".*?\})`', README)]


def test_readme_rows_load(tmp_path, byte_tokenizer):
    assert len(ROWS) >= 5
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    pairs, _ = load_pairs([file], byte_tokenizer, 258, max_length=512, progress=False)
    assert len(pairs) == len(ROWS)
    for row, pair in zip(ROWS, pairs):
        for name, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            given = row[name]
            if not isinstance(given, str) and isinstance(given[0], int):
                assert ids.tolist() == given
                continue
            answer = given.split("Assistant:")[-1] if isinstance(given, str) else given[-1]["content"]
            assert byte_tokenizer.decode(ids) == answer + "<|im_end|>"


def write_outputs(folder: Path) -> None:
    """Put what the blocks print into the tutorial."""
    lines = TEXT.splitlines(keepends=True)
    for block, printed in reversed(list(run_all(("python", "python real") if CHECKPOINT else ("python",), folder))):
        end = block.line + block.code.count("\n") + 1  # after the closing fence
        rest = re.sub(r"\A\s*```text\n(.*\n)*?```\n", "", "".join(lines[end:]))
        lines[end:] = [(f"```text\n{printed}```\n" if printed else "") + rest]
    TUTORIAL.write_text("".join(lines), "utf-8")


def located(stop: re.Match) -> str:
    """Where the debugger stopped, in one line: the function, and … for the path and for what it returns."""
    return f"> …{stop[1]}{'…' if stop[2] else ''} -> "


def write_session(folder: Path) -> None:
    """Put the debugger's answers into the tutorial; … for paths and numbers of lines."""
    start, commands, _ = session()
    found = debugger_answers(start, commands, folder)
    assert not (wrong := [answer for answer in found if "***" in answer or "SystemExit" in answer]), wrong
    answers = iter(found)
    lines, inside = [], False
    for line in TEXT.splitlines(keepends=True):
        inside = (inside or line == "```console\n") and line != "```\n"
        if not inside or line.startswith(("```", "$ ")):
            lines.append(line)
        elif line.startswith("(Pdb) "):
            answer = re.sub(r"> \S*\(\d+\)(\w+\(\))(?:(->).*)?\n-> ", located, next(answers))
            answer = re.sub(r"\S*/(\w+\.py):\d+", r"…\1:…", answer).replace("--Return--\n", "--Return-- ")
            shortened = (part if len(part) <= 88 else f"{part[:87]}…" for part in answer.splitlines() if part)
            lines += [line, *(f"{part}\n" for part in shortened)]
    TUTORIAL.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        (write_session if sys.argv[1:] == ["pdb"] else write_outputs)(Path(scratch))
