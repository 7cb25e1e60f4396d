"""Runs that are stopped, killed or refused: they end, to the bit, where an undisturbed one ends, or touch nothing."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import support.data
import support.run
import train
from model import GPT
from support import kept_pairs, toy
from support.checkpoint import load_model
from support.flags import resume_command
from support.kept_pairs import pairs_file_size
from support.run import fingerprint
from tests.runs import (
    Run,
    argv_of,
    ended,
    id_rows,
    pairs_of,
    read_metrics,
    real,
    run,
    same_bits,
    snapshot,
    steps_of,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("alone")
STEPS = 12  # of the run that argv_of describes: three epochs of 8, 8, 8 and 7 pairs, each in several micro-batches


def end_of(out: Path) -> tuple[dict[str, bytes], list[dict]]:
    """What must be equal to the bit: the final model's folder, and the metrics without times."""
    return snapshot(out / "model"), read_metrics(out)


@pytest.fixture(scope="module")
def undisturbed(folder):
    out = folder / "undisturbed"
    if not out.exists():
        with pytest.MonkeyPatch.context() as m:
            m.setitem(sys.modules, "matplotlib.figure", None)
            torch.set_num_threads(1)
            assert train.main(argv_of(folder, out, "--eval-every", 5)) == 0
    assert [line["step"] for line in steps_of(read_metrics(out))] == list(range(1, STEPS + 1))
    return end_of(out)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def at_step(monkeypatch, step: int, act) -> None:
    """Call `act` in a step, counted from 0: when its learning rate is computed. Stopped there, a run did step + 1."""
    original = train.learning_rate

    def learning_rate(now, *rest):
        if now == step:
            act()
        return original(now, *rest)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


# ---- stopped at every step -------------------------------------------------------------------------------------------


def at_micro_batch(monkeypatch, training: bool, count: int, act) -> None:
    """Call `act` while the micro-batch number `count` (from 1) of the training, or of the evaluations, is scored."""
    original, seen = train.score_pairs, []

    def score_pairs(*args):
        if torch.is_grad_enabled() == training:
            seen.append(args)
            if len(seen) == count:
                act()
        return original(*args)

    monkeypatch.setattr(train, "score_pairs", score_pairs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_every_step_saves_and_says_how_to_continue(number, folder, undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    argv = argv_of(folder, out, "--eval-every", 5)
    for step in range(1, STEPS + 1):  # one run, stopped in each of its steps
        with pytest.MonkeyPatch.context() as m:
            at_micro_batch(m, True, 1, lambda: os.kill(os.getpid(), number))
            code, said = ended([*argv, *(["--resume"] if step > 1 else [])], capsys, lines=3)
        assert [line["step"] for line in steps_of(read_metrics(out))] == list(range(1, step + 1))
        assert code == 130 and f"stopped after step {step}; continue from the checkpoint of step {step}" in said
        bar, _, command = said.splitlines()
        assert f" {step}/12 [" in bar and command.count("--resume") == 1 and str(out) in command
        assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == step
        assert not (out / "model").exists()
    assert train.main([*argv, "--resume"]) == 0
    assert end_of(out) == undisturbed


def test_a_signal_in_the_last_step_waits_for_the_model_if_no_evaluation_is_due(folder, tmp_path, capsys):
    argv = [*argv_of(folder, None), "--eval-size", "0"]
    argv = [a for a in argv if a not in ("--eval-data", str(folder / "held.jsonl"))]
    assert train.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    with pytest.MonkeyPatch.context() as m:
        at_step(m, STEPS - 1, interrupt)
        code, said = ended([*argv, "--out", tmp_path / "out"], capsys)
    assert (code, said) == (130, "train.py: stopped after the last step; the model is written")
    assert end_of(tmp_path / "out") == end_of(tmp_path / "whole")


def test_a_signal_in_every_micro_batch_of_the_evaluations(folder, undisturbed, tmp_path, capsys):
    argv = argv_of(folder, None, "--eval-every", 5)
    micro_batches = len(train.my_micro_batches(pairs_of(id_rows(7, seed=1)), 40))
    assert micro_batches > 2
    for evaluation, step in enumerate((0, 5, 10, 12)):
        for k in range(1, micro_batches + 1):
            out = tmp_path / f"{step}-{k}"
            with pytest.MonkeyPatch.context() as m:
                at_micro_batch(m, False, evaluation * micro_batches + k, interrupt)
                scored = []
                counting = train.score_pairs
                m.setattr(train, "score_pairs", lambda *a, scored=scored, f=counting: scored.append(1) or f(*a))
                code, said = ended([*argv, "--out", out], capsys, lines=2)
            assert code == 130 and "with:" in said
            assert f"stopped after step {step};" in said if step else "stopped before step 1; start again" in said
            lines = read_metrics(out)
            assert [x["step"] for x in steps_of(lines)] == list(range(1, step + 1))
            assert not any(x["step"] == step for x in lines if "eval/loss" in x), "it is dropped"
            assert step or len(scored) == k, "it ended with the micro-batch"
            if k == 2 or step == 5:
                assert train.main([*argv, "--out", str(out), "--resume"]) == 0
                assert end_of(out) == undisturbed


def test_signals_in_made_up_evaluations_lose_nothing(folder, undisturbed, tmp_path):
    out = tmp_path / "out"
    argv = argv_of(folder, out, "--eval-every", 5, "--resume")
    for _ in range(3):  # each time in the same evaluation, before step 1, and then after step 5
        with pytest.MonkeyPatch.context() as m:
            at_micro_batch(m, False, 2, interrupt)
            assert train.main(argv) == 130
    with pytest.MonkeyPatch.context() as m:
        at_step(m, 4, interrupt)
        assert train.main(argv) == 130
    for _ in range(3):
        with pytest.MonkeyPatch.context() as m:
            at_micro_batch(m, False, 1, interrupt)
            assert train.main(argv) == 130
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 5
    assert train.main(argv) == 0
    assert end_of(out) == undisturbed


def test_a_signal_in_the_middle_of_one_long_call_is_answered_at_once(folder, tmp_path):
    """Python runs no handler during one call, such as a backward pass. This one ends when the answer is in the log."""
    log = tmp_path / "log"
    shell = f"kill -TERM $PPID; for i in $(seq 300); do grep -q stopping {log} && exit 7; sleep 0.1; done"
    before = (
        "import ctypes\n"
        "original, calls = train.score_pairs, []\n"
        "def score_pairs(*args):\n"
        "    calls.append(torch.is_grad_enabled())\n"
        f"    if sum(calls) == 1: print('exit', ctypes.CDLL(None).system({shell.encode()!r}) >> 8)\n"
        "    return original(*args)\n"
        "train.score_pairs = score_pairs\n"
    )
    code, said = run(argv_of(folder, tmp_path / "out"), tmp_path, before=before, log=log)
    assert code == 130 and "exit 7\n" in said and "stopped after step 1;" in said
    assert said.count("stopping after this step (press again to stop now)") == 1


class Killed(BaseException):
    """A process that ends here and now."""


def test_killed_in_any_step_and_resumed_from_the_save_before_it(folder, undisturbed, tmp_path):
    def die():
        raise Killed

    out, every = tmp_path / "out", 3
    argv = argv_of(folder, out, "--save-every", every, "--eval-every", 5)
    for step in range(STEPS):  # one run, killed in each of its steps
        with pytest.MonkeyPatch.context() as m, pytest.raises(Killed):
            at_step(m, step, die)
            train.main([*argv, *(["--resume"] if step else [])])
        saved = torch.load(out / "checkpoint.pt", weights_only=True)["step"] if step >= every else 0
        assert saved == step // every * every
        with open(out / "metrics.jsonl", "a") as f:
            f.write('{"step": 7, "lo')  # the last line of a killed process may be torn
    assert train.main([*argv, "--resume"]) == 0
    assert end_of(out) == undisturbed


@pytest.mark.parametrize("more", [[], ["--eval-every", "1"]])
def test_a_finished_run_is_left_alone_by_resume(more, folder, tmp_path, monkeypatch, capsys):
    argv = argv_of(folder, tmp_path / "out", "--save-every", 5, "--steps", 2)
    assert train.main(argv) == 0
    before, times = snapshot(tmp_path / "out"), [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").rglob("*"))]
    capsys.readouterr()
    monkeypatch.setattr(train, "score_pairs", None)
    assert train.main([*argv, "--resume", *more]) == 0
    assert f"the run in {tmp_path / 'out'} is finished" in capsys.readouterr().out
    assert snapshot(tmp_path / "out") == before
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").rglob("*"))] == times


@pytest.mark.parametrize("marked", [False, True])  # by the file that marks a folder as a run's
def test_a_model_that_is_the_input_does_not_look_like_a_finished_run(marked, folder, tmp_path, capsys):
    shutil.copytree(folder / "model", tmp_path / "model")
    if marked:
        (tmp_path / "flags.json").write_text("{}")
    before = snapshot(tmp_path)
    argv = argv_of(folder, tmp_path, model=str(tmp_path / "model"))
    for more in ([], ["--resume"], ["--overwrite"]):
        code, said = ended([*argv, *more], capsys)
        assert code == 2 and "which it reads" in said and snapshot(tmp_path) == before


def test_a_damaged_checkpoint_resumes_once_it_is_whole(folder, own, undisturbed):
    """What the tests of refusals rely on: the copy that they spoil continues to the same end."""
    assert train.main(argv_of(folder, own, "--resume", "--eval-every", 5)) == 0
    assert end_of(own) == undisturbed


def test_what_may_change_on_resume_changes_nothing(folder, undisturbed, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 6, interrupt)
    assert train.main(argv_of(folder, tmp_path / "a", "--eval-every", 5)) == 130
    monkeypatch.undo()
    shutil.move(tmp_path / "a", tmp_path / "b")  # another folder, and copies of data and model
    shutil.copytree(folder / "model", tmp_path / "model copy")
    shutil.copy(folder / "ids.jsonl", tmp_path / "same.jsonl")
    argv = argv_of(
        folder, tmp_path / "b", "--resume", model=str(tmp_path / "model copy"), data=str(tmp_path / "same.jsonl")
    )
    assert train.main([*argv, "--eval-every", "5", "--save-every", "3", "--samples", "0", "--device", "cpu"]) == 0
    assert end_of(tmp_path / "b") == undisturbed


def test_other_micro_batches_on_resume_differ_in_last_bits_only(folder, undisturbed, tmp_path, monkeypatch):
    at_step(monkeypatch, 6, interrupt)
    argv = argv_of(folder, tmp_path / "out", "--eval-every", 5)
    assert train.main(argv) == 130
    monkeypatch.undo()
    assert train.main([*argv, "--resume", "--micro-tokens", "500"]) == 0
    for line, other in zip(read_metrics(tmp_path / "out"), undisturbed[1]):
        assert line == pytest.approx(other, rel=1e-2, abs=1e-3)


def test_the_reference_comes_from_where_it_came_from_at_first(folder, tmp_path, monkeypatch):
    at_step(monkeypatch, 6, interrupt)
    argv = argv_of(folder, tmp_path / "out")
    assert train.main(argv) == 130
    monkeypatch.undo()
    seen, original = {}, train.score_pairs

    def spy(policy, reference, *rest):
        seen.update(policy=policy, reference=reference)
        return original(policy, reference, *rest)

    monkeypatch.setattr(train, "score_pairs", spy)
    assert train.main([*argv, "--resume"]) == 0
    assert same_bits(seen["reference"], load_model(folder / "model"))
    assert not same_bits(seen["policy"], seen["reference"])


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_the_toy_stopped_and_resumed_says_the_same(step, quick_toy, capsys):
    argv = ["--eval-size", "8", "--batch-size", "32", "--epochs", "2", "--micro-tokens", "64"]
    assert train.main([*argv, "--out", "whole"]) == 0
    said = capsys.readouterr().out.split("after ")[-1]
    with pytest.MonkeyPatch.context() as m:
        at_step(m, step, interrupt)
        code, how = ended(argv, capsys)
    assert code == 130 and how.endswith("--resume") and (quick_toy / "checkpoint.pt").exists()
    assert train.main([*argv, "--resume"]) == 0
    assert capsys.readouterr().out.split("after ")[-1].replace("out/toy", "whole") == said
    assert end_of(quick_toy) == end_of(Path("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("step", [pytest.param(0, marks=real)])
def test_a_real_run_stopped_and_resumed(step, tmp_path, monkeypatch, capsys):
    model = os.environ["EPSDPO_CHECKPOINT"]
    rows = id_rows(5, vocab=1000, longest=6)
    argv = ["--model", model, "--data", write_rows(tmp_path / "ids.jsonl", rows), "--batch-size", 2]
    argv = [
        str(a) for a in [*argv, "--micro-tokens", 12, "--eval-size", 1, "--lr", "1e-5", "--steps", 3, "--samples", 0]
    ]
    assert train.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    at_step(monkeypatch, step, interrupt)
    assert train.main([*argv, "--out", str(tmp_path / "out")]) == 130
    monkeypatch.undo()
    assert train.main([*argv, "--out", str(tmp_path / "out"), "--resume"]) == 0
    assert end_of(tmp_path / "out") == end_of(tmp_path / "whole")


@pytest.mark.parametrize("every", [0, 2])
def test_a_second_signal_stops_at_once(every, folder, tmp_path, capsys, monkeypatch):
    at_step(monkeypatch, 3, lambda: [interrupt(), interrupt()])
    code, said = ended(argv_of(folder, tmp_path / "out", "--save-every", every), capsys, lines=2)
    assert code == 130 and len(steps_of(read_metrics(tmp_path / "out"))) == 3
    assert "interrupted in step 4" in said and "--resume" in said.splitlines()[1]
    assert ("continue from the checkpoint of step 2" if every else "no checkpoint was saved (--save-every") in said
    assert (tmp_path / "out" / "checkpoint.pt").exists() == bool(every)


def test_a_second_signal_while_saving_leaves_the_checkpoint_before(folder, undisturbed, tmp_path, capsys):
    argv = argv_of(folder, tmp_path / "out", "--save-every", 2, "--eval-every", 5)
    with pytest.MonkeyPatch.context() as m:
        save = torch.save
        m.setattr(torch, "save", lambda state, f: interrupt() if state["step"] == 5 else save(state, f))
        at_step(m, 4, interrupt)
        code, said = ended(argv, capsys, lines=2)
    assert code == 130 and "continue from the checkpoint of step 4" in said
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 4
    assert train.main([*argv, "--resume"]) == 0
    assert end_of(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["load_pairs", "load_model", "answers", "toy"])
def test_a_signal_before_training_is_one_line(where, number, folder, tmp_path, capsys, monkeypatch, quick_toy):
    def act(*args, **more):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was not noticed")

    owner = {"load_pairs": support.data, "toy": toy}.get(where, train)
    monkeypatch.setattr(owner, "make_problem" if where == "toy" else where, act)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    code, said = ended([] if where == "toy" else argv_of(folder, tmp_path / "out"), capsys)
    assert (code, said) == (130, "train.py: interrupted")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["get_model_state_dict", "GPT", "save_model", "draw"])
def test_a_signal_after_the_last_step_waits_for_the_model(where, number, folder, undisturbed, tmp_path, capsys):
    argv = argv_of(folder, tmp_path / "out", "--eval-every", 5)
    original = getattr(support.run, where)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(support.run, where, lambda *a, **k: [os.kill(os.getpid(), number), original(*a, **k)][1])
        code, said = ended(argv, capsys)
    late = where == "draw"  # then the model is there, and the signal is not waited with
    assert (
        code == 130
        and said == f"train.py: {'interrupted' if late else 'stopped after the last step; the model is written'}"
    )
    assert end_of(tmp_path / "out") == undisturbed


FAILURES = [OSError(28, "No space left on device"), ValueError("not finite"), RuntimeError("full"), MemoryError("all")]


@pytest.mark.parametrize("error", FAILURES)
def test_a_model_that_cannot_be_written_leaves_a_checkpoint(error, folder, undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    argv = argv_of(folder, out, "--eval-every", 5)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(support.run, "save_model", lambda *a, **k: (_ for _ in ()).throw(error))
        code, said = ended(argv, capsys)
    assert code == 2 and f"the model was not written: {error}; continue from the checkpoint of step 12 with" in said
    assert not (out / "model").exists() and not list(out.glob(".*"))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "train_step", None)
        assert train.main([*argv, "--resume"]) == 0
    assert end_of(out) == undisturbed


def test_a_disk_too_full_for_model_and_checkpoint_is_one_line_about_both(folder, tmp_path):
    limit = (folder / "model" / "model.safetensors").stat().st_size - 100
    code, log = run(argv_of(folder, tmp_path / "out"), tmp_path, limit=limit)
    last = log.strip().splitlines()[-1]
    assert code == 2 and re.search("the model was not written: .*; nor was a checkpoint: .*checkpoint.pt", last), log
    assert "no checkpoint was saved (--save-every" in last and "Traceback" not in log


@pytest.mark.parametrize("saves", [[], ["--save-every", "5"]])
def test_a_second_signal_while_the_model_is_written_leaves_a_run_to_resume(
    saves, folder, undisturbed, tmp_path, capsys
):
    out = tmp_path / "out"
    argv = argv_of(folder, out, "--eval-every", 5, *saves)
    with pytest.MonkeyPatch.context() as m:
        save = support.run.save_model
        m.setattr(support.run, "save_model", lambda *a, **k: [save(*a, **k), interrupt(), interrupt()])
        code, said = ended(argv, capsys, lines=2)
    assert code == 130 and "interrupted after step 12" in said and "--resume" in said.splitlines()[1]
    assert ("continue from the checkpoint of step 12" if saves else "no checkpoint was saved") in said
    assert not (out / "model").exists() and not list(out.glob(".*"))
    assert train.main([*argv, "--resume"]) == 0
    assert end_of(out) == undisturbed


# ---- the command that continues --------------------------------------------------------------------------------------


def test_the_printed_command_continues_the_run(folder, undisturbed, tmp_path):
    """In a process of its own, started as a user would, in a folder with a space; what it prints is run as it is."""
    out = tmp_path / "a run's folder"
    script = tmp_path / "stopped.py"
    script.write_text(
        "import os, sys, torch, train\n"
        "torch.set_num_threads(1)\n"
        "original = train.learning_rate\n"
        "def learning_rate(step, *rest):\n"
        "    if step == 3 and '--resume' not in sys.argv: os.kill(os.getpid(), 15)\n"
        "    return original(step, *rest)\n"
        "train.learning_rate = learning_rate\n"
        "sys.modules['matplotlib.figure'] = None\n"
        "sys.exit(train.main())\n"
    )
    root = Path(train.__file__).resolve().parent
    how = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}}
    argv = [*argv_of(folder, out, "--eval-every", 5), "--overwrite"]
    done = subprocess.run([sys.executable, script, *argv], **how)
    assert done.returncode == 130, done.stderr
    command = done.stderr.split("continue from the checkpoint of step 4 with:\n")[1].strip()
    assert command == shlex.join([sys.executable, str(script), *argv[:-1], "--resume"])
    done = subprocess.run(command, shell=True, cwd=tmp_path, **how)
    assert done.returncode == 0, done.stderr
    assert end_of(out) == undisturbed


def test_under_torchrun_the_command_is_that_of_the_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = resume_command(["--out", "a b", "--resume", "--overwrite", "--model", "m"])
    assert found == "with the same torchrun as before and:\ntrain.py --out 'a b' --model m --resume"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert (
        resume_command(["--lr", "1"]) == f"with:\n{shlex.join([sys.executable, 'train.py', '--lr', '1', '--resume'])}"
    )


def test_an_error_after_a_resume_names_the_checkpoint_to_continue_from(folder, own, capsys):
    with pytest.MonkeyPatch.context() as m:
        at_micro_batch(m, True, 1, lambda: (_ for _ in ()).throw(ValueError("a bad row")))
        code, said = ended(argv_of(folder, own, "--resume", "--eval-every", 5), capsys)
    assert code == 2 and "step 8, " in said and "continue from the checkpoint of step 7 with --resume" in said


def test_the_last_step_is_saved_though_it_is_no_multiple(folder, tmp_path):
    assert train.main(argv_of(folder, tmp_path / "out", "--save-every", 5)) == 0
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 12


@pytest.mark.parametrize("left", ["nothing", "no checkpoint", "no checkpoint and no pairs"])
def test_resume_without_a_checkpoint_starts_from_step_0_and_says_so(left, folder, own, undisturbed, tmp_path, capsys):
    out = tmp_path / "new" if left == "nothing" else own
    for name in ("checkpoint.pt", "pairs.npz") if "pairs" in left else ("checkpoint.pt",):
        (out / name).unlink(missing_ok=True)
    assert train.main(argv_of(folder, out, "--resume", "--eval-every", 5)) == 0
    assert f"--resume: {out} has no checkpoint, so the run starts from step 0" in capsys.readouterr().out
    assert end_of(out) == undisturbed


def test_a_kill_while_an_older_run_is_removed_leaves_nothing_that_looks_finished(folder, tmp_path):
    out, remove, removed = tmp_path / "out", support.run.remove, []
    assert train.main(argv_of(folder, out, "--steps", 1)) == 0
    for count in range(1, 6):
        kept = Path(shutil.copytree(out, tmp_path / f"kept{count}"))

        def die(path, count=count):
            removed.append(path)
            if len(removed) == count:
                raise Killed
            remove(path)

        removed.clear()
        with pytest.MonkeyPatch.context() as m, pytest.raises(Killed):
            m.setattr(support.run, "remove", die)
            train.main(argv_of(folder, kept, "--overwrite", "--steps", 2))
        assert (kept / "model").exists() == (count == 1)  # the old run's, which is still all there
        if count == 1:
            assert snapshot(kept).items() >= snapshot(out).items()
    with pytest.MonkeyPatch.context() as m, pytest.raises(Killed):
        m.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(Killed))
        train.main(argv_of(folder, out, "--overwrite", "--steps", 2))
    assert not (out / "model").exists()
    assert train.main(argv_of(folder, out, "--resume", "--steps", 2)) == 0
    assert not list(out.glob(".*"))


def test_signals_are_given_back_after_training(folder, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert train.main(argv_of(folder, tmp_path / "out", "--steps", 1)) == 0
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


# ---- killed ----------------------------------------------------------------------------------------------------------


def kill_at_random(folder: Path, tmp_path: Path, kills: int, epochs: int) -> list[int]:
    """Kill processes at random moments until `kills` have died, resume each, compare each end. Lines at each kill."""
    dice, where, out = random.Random(0), [], tmp_path / "out"
    options = ["--epochs", epochs, "--save-every", 1, "--eval-every", 7]
    code, log = run(argv_of(folder, tmp_path / "whole", *options), tmp_path)
    assert code == 0, log
    argv, wanted, metrics = argv_of(folder, out, *options), end_of(tmp_path / "whole"), out / "metrics.jsonl"

    def size() -> int:
        return metrics.stat().st_size if metrics.exists() else 0

    def more() -> list[str]:
        return ["--resume"] if (out / "flags.json").exists() else []

    while len(where) < kills:
        process = Run([*argv, *more()], tmp_path / "log")
        steps = dice.choice([0, 0, 1, 2, 5, 12])
        if steps:
            enough = size() + 600 * steps  # a line has about 700 bytes
            process.wait_for(lambda enough=enough: size() > enough)
        process.process.join(dice.random() * (0.15 if steps else 1.5))  # in a step, a save, an evaluation, a start
        process.kill()
        if process.process.exitcode == -signal.SIGKILL:
            where.append(len(metrics.read_bytes().splitlines()) if metrics.exists() else -1)
        else:
            assert process.process.exitcode == 0, process.log
            assert end_of(out) == wanted
            shutil.rmtree(out)
    code, log = run([*argv, *more()], tmp_path)
    assert code == 0, log
    assert end_of(out) == wanted
    assert not [name for name in snapshot(out) if name.endswith(".tmp")], "left over from a kill"
    return where


def test_killed_at_5_random_moments(folder, tmp_path):
    assert len(kill_at_random(folder, tmp_path, 5, epochs=5)) == 5


@pytest.mark.slow
def test_killed_at_100_random_moments(folder, tmp_path):
    where = kill_at_random(folder, tmp_path, 100, epochs=10)
    print(f"killed {len(where)} times, with so many lines of metrics: {where}")
    assert len(where) == 100 and len(set(where)) > 10


DURING = {  # the moments of a save that matter; each ends the process as kill -9 does
    "before it": (
        "orig = train.Run.save\n"
        "def save(self):\n"
        "    if self.done == 6: os.kill(os.getpid(), 9)\n"
        "    orig(self)\n"
        "train.Run.save = save"
    ),
    "half written": (
        "orig = torch.save; n = [0]\n"
        "def save(state, f):\n"
        "    if state['step'] == 6:\n"
        "        f.write(b'PK' + bytes(5000)); f.flush(); os.kill(os.getpid(), 9)\n"
        "    orig(state, f)\n"
        "torch.save = save"
    ),
    "written, not yet in place": (
        "orig = os.replace; n = [0]\n"
        "def replace(a, b):\n"
        "    n[0] += str(b).endswith('checkpoint.pt')\n"
        "    if n[0] == 2: os.kill(os.getpid(), 9)\n"
        "    orig(a, b)\n"
        "os.replace = replace"
    ),
    "in place": (
        "orig = os.replace; n = [0]\n"
        "def replace(a, b):\n"
        "    orig(a, b); n[0] += str(b).endswith('checkpoint.pt')\n"
        "    if n[0] == 2: os.kill(os.getpid(), 9)\n"
        "os.replace = replace"
    ),
    "the model half written": (
        "orig = os.replace\n"
        "def replace(a, b):\n"
        "    if str(b).endswith('config.json'): os.kill(os.getpid(), 9)\n"
        "    orig(a, b)\n"
        "os.replace = replace"
    ),
    "the model written, not yet in place": (
        "from pathlib import Path\n"
        "orig = Path.replace\n"
        "def replace(a, b):\n"
        "    if Path(b).name == 'model': os.kill(os.getpid(), 9)\n"
        "    return orig(a, b)\n"
        "Path.replace = replace"
    ),
}


@pytest.mark.parametrize("moment", DURING)
def test_killed_while_saving_leaves_the_old_or_the_new(moment, folder, undisturbed, tmp_path):
    out = tmp_path / "out"
    argv = argv_of(folder, out, "--save-every", 3, "--eval-every", 5)
    code, log = run(argv, tmp_path, before=DURING[moment])
    assert code == -signal.SIGKILL, log
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == (12 if "model" in moment else 6 if moment == "in place" else 3)
    assert not (out / "model").exists()
    assert train.main([*argv, "--resume"]) == 0
    assert end_of(out) == undisturbed
    left = {path.name for path in out.iterdir()}
    assert left == {"checkpoint.pt", "metrics.jsonl", "model", "flags.json", "pairs.npz"}, (
        "a killed save's leftovers are cleared away"
    )


# ---- refused, and nothing touched ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(folder):
    """A run that was stopped after step 7."""
    out = folder / "stopped"
    with pytest.MonkeyPatch.context() as m:
        torch.set_num_threads(1)
        m.setitem(sys.modules, "matplotlib.figure", None)
        at_step(m, 6, interrupt)
        assert train.main(argv_of(folder, out, "--eval-every", 5)) == 130
    return out


@pytest.fixture
def own(stopped, tmp_path):
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(stopped, tmp_path / "own"))


OTHER = {
    "beta": "0.2",
    "epsilon": "0.04",
    "epsilon-check": "0.04",
    "epsilon-step": "0.0",
    "lr": "2e-2",
    "warmup": "0.5",
    "batch-size": "4",
    "epochs": "4",
    "steps": "40",
    "clip": "0.5",
    "weight-decay": "0.1",
    "dtype": "bfloat16",
    "seed": "1",
    "max-length": "9",
}


THERE = {  # of `stopped`
    **{"beta": 0.1, "epsilon": 0.05, "epsilon-check": 0.05, "epsilon-step": 0.05, "lr": 0.01, "warmup": 0.1},
    **{"batch-size": 8, "epochs": 3, "steps": None, "clip": 1.0, "weight-decay": 0.0, "dtype": "float32", "seed": 0},
    "max-length": 2048,
}


@pytest.mark.parametrize("flag", OTHER)
def test_other_flags_are_refused_at_once_and_nothing_is_touched(flag, folder, own, monkeypatch, capsys):
    before = snapshot(own)
    monkeypatch.setattr(train, "load_model", None)
    code, said = ended(argv_of(folder, own, "--resume", "--eval-every", 5, f"--{flag}", OTHER[flag]), capsys)
    assert code == 2 and str(own / "pairs.npz" if flag == "max-length" else own) in said
    name = {"epsilon": "epsilon_check"}.get(flag, flag.replace("-", "_"))
    assert f"{name} was {THERE[flag]} there, is {OTHER[flag].replace('2e-2', '0.02')} here" in said, said
    assert snapshot(own) == before


def test_a_checkpoint_knows_its_flags_without_flags_json(folder, own, capsys):
    (own / "flags.json").unlink()
    before = snapshot(own)
    code, said = ended(argv_of(folder, own, "--resume", "--eval-every", 5, "--lr", "2e-2"), capsys)
    assert code == 2 and str(own / "checkpoint.pt") in said and "lr was 0.01 there, is 0.02 here" in said
    assert snapshot(own) == before


def test_other_data_or_another_model_is_refused_and_nothing_is_touched(folder, own, tmp_path, capsys):
    before, rows = snapshot(own), [json.loads(x) for x in (folder / "ids.jsonl").read_text().splitlines()]
    rows[30]["rejected"][-1] ^= 1
    one_token = write_rows(tmp_path / "one token.jsonl", rows)
    shuffled = write_rows(
        tmp_path / "shuffled.jsonl", [json.loads(x) for x in (folder / "ids.jsonl").read_text().splitlines()][::-1]
    )
    held = write_rows(tmp_path / "held.jsonl", id_rows(7, seed=2))
    rows[30]["rejected"][-1] ^= 1
    row = next(row for row in rows if len(row["chosen"]) > 1)
    row["prompt"].append(row["chosen"].pop(0))
    moved = write_rows(tmp_path / "moved.jsonl", rows)
    for argv, named in (
        (argv_of(folder, own, "--resume", data=str(moved)), "data"),
        (argv_of(folder, own, "--resume", data=str(one_token)), "data"),
        (argv_of(folder, own, "--resume", data=str(shuffled)), "data"),
        (argv_of(folder, own, "--resume", "--eval-data", held), "eval_data"),
        (argv_of(folder, own, "--resume", model="other"), "the model"),
        (argv_of(folder, own, "--resume", model="tied"), "the model"),
    ):
        file = "checkpoint.pt" if "model" in named else "pairs.npz"
        code, said = ended(argv, capsys)
        assert code == 2 and file in said and re.search(rf"{named} was .*sha256 .* there, is .*sha256 .* here", said), (
            said
        )
        assert snapshot(own) == before
        if file == "pairs.npz":  # a run that lost its pairs: the checkpoint knows them too
            (own / "pairs.npz").rename(tmp_path / "pairs.npz")
            code, said = ended(argv, capsys)
            assert (
                code == 2 and "checkpoint.pt" in said and re.search(r"the (training|held-out) pairs was sha256 ", said)
            )
            (tmp_path / "pairs.npz").rename(own / "pairs.npz")
            assert snapshot(own) == before


def test_held_out_pairs_and_others_do_not_change_places(folder, tmp_path, monkeypatch, capsys):
    first, second, third = (write_rows(tmp_path / f"{seed}.jsonl", id_rows(9, seed=seed)) for seed in (1, 2, 3))
    argv = ["--model", folder / "model", "--batch-size", "4", "--steps", "6", "--out", tmp_path / "out"]
    at_step(monkeypatch, 3, interrupt)
    assert ended([*argv, "--data", first, second, "--eval-data", third], capsys)[0] == 130
    monkeypatch.undo()
    before = snapshot(tmp_path / "out")
    code, said = ended([*argv, "--resume", "--data", first, "--eval-data", second, third], capsys)
    assert code == 2 and "eval_data was" in said and snapshot(tmp_path / "out") == before
    (tmp_path / "out" / "pairs.npz").unlink()
    code, said = ended([*argv, "--resume", "--data", first, second, third, "--eval-size", 9], capsys)
    assert code == 2 and "checkpoint.pt" in said and "the held-out pairs was sha256" in said


def test_models_are_told_apart_by_either_end_of_any_shard(folder, tmp_path):
    model = Path(shutil.copytree(folder / "model", tmp_path / "model"))
    who = [fingerprint(train.Flags(model=str(model), data=("x",), out="x"), [], [])["the model"]]
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        content = bytearray(3 << 20)
        for at in (0, -1, 0):
            (model / name).write_bytes(content)
            who.append(fingerprint(train.Flags(model=str(model), data=("x",), out="x"), [], [])["the model"])
            content[at] ^= 1
    assert len(set(who)) == len(who) == 7


def test_the_same_weights_under_another_config_are_another_model(folder, own, tmp_path, capsys):
    twisted = Path(shutil.copytree(folder / "model", tmp_path / "twisted"))
    config = json.loads((twisted / "config.json").read_text())
    (twisted / "config.json").write_text(json.dumps(config | {"rope_theta": 77.0}))
    before = snapshot(own)
    code, said = ended(argv_of(folder, own, "--resume", model=str(twisted)), capsys)
    assert code == 2 and "the model was sha256" in said and snapshot(own) == before


def test_the_toy_does_not_go_on_with_a_real_run(own, quick_toy, capsys):
    before = snapshot(own)
    code, said = ended(["--resume", "--out", own, "--eval-size", "8", "--batch-size", "32"], capsys)
    assert code == 2 and "give --model again" in said and snapshot(own) == before


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/epsdpo-evil",))


def damages(good: bytes) -> dict[str, bytes]:
    dice, found = random.Random(0), {"empty": b"", "text": b"hello\n", "zeros": bytes(len(good))}
    for cut in (1, 2, 22, 100, len(good) // 2, len(good) - 4):
        found[f"short by {cut}"] = good[:-cut]
    for _ in range(2):
        at = dice.randrange(len(good))
        found[f"hole at {at}"] = good[:at] + bytes(dice.randrange(256) for _ in range(3000)) + good[at + 3000 :]
    return found


def test_a_damaged_checkpoint_is_one_clear_error(folder, own, capsys):
    good = (own / "checkpoint.pt").read_bytes()
    for name, data in damages(good).items():
        (own / "checkpoint.pt").write_bytes(data)
        before = snapshot(own)
        code, said = ended(argv_of(folder, own, "--resume"), capsys)
        assert code == 2 and str(own / "checkpoint.pt") in said, (name, said)
        assert snapshot(own) == before, name
    (own / "checkpoint.pt").write_bytes(good)
    assert train.main(argv_of(folder, own, "--resume", "--eval-every", 5)) == 0


def test_a_flipped_byte_anywhere_in_a_checkpoint_is_noticed(folder, own, undisturbed, capsys):
    good, dice = (own / "checkpoint.pt").read_bytes(), random.Random(1)
    for _ in range(8):
        at = dice.randrange(len(good))
        data = bytearray(good)
        data[at] ^= 1 << dice.randrange(8)
        (own / "checkpoint.pt").write_bytes(data)
        code, said = ended(argv_of(folder, own, "--resume", "--eval-every", 5), capsys)
        if code == 0:  # a byte between the parts, which says nothing
            assert end_of(own) == undisturbed, f"bit flipped in byte {at} of {len(good)}"
            shutil.rmtree(own / "model")
        else:
            assert code == 2 and str(own / "checkpoint.pt") in said


def test_a_checkpoint_of_something_else_is_one_clear_error(folder, own, capsys):
    Path("/tmp/epsdpo-evil").unlink(missing_ok=True)
    state = torch.load(own / "checkpoint.pt", weights_only=True)
    for name, other in {
        "a list": [1, 2],
        "a tensor": torch.ones(3),
        "code": {"step": Evil()},
        "no weights": {k: v for k, v in state.items() if k != "weights"},
        "no fingerprint": {k: v for k, v in state.items() if k != "fingerprint"},
        "no method": {k: v for k, v in state.items() if k != "method"},
        "no step": {k: v for k, v in state.items() if k != "step"},
        "metrics that are none": state | {"metrics": "[{]"},
        "weights of another shape": state | {"weights": {k: v[:1] for k, v in state["weights"].items()}},
        "moments of another shape": state | {"moments": {"state": {}, "param_groups": []}},
    }.items():
        torch.save(other, own / "checkpoint.pt")
        before = snapshot(own)
        code, said = ended(argv_of(folder, own, "--resume"), capsys)
        assert code == 2 and str(own / "checkpoint.pt") in said, (name, said)
        assert said.rstrip().endswith("; start again with --overwrite in place of --resume"), (name, said)
        assert snapshot(own) == before, name
    assert not Path("/tmp/epsdpo-evil").exists()


def test_a_checkpoint_holds_tensors_numbers_and_texts_only(stopped):
    def walk(x):
        if isinstance(x, dict):
            for key, value in x.items():
                assert type(key) in (str, int)
                walk(value)
        elif isinstance(x, (list, tuple)):
            for value in x:
                walk(value)
        else:
            assert x is None or type(x) in (int, float, str, bool, torch.Tensor), type(x)
            if type(x) is torch.Tensor:
                assert x.device.type == "cpu"

    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    walk(state)
    assert state["step"] == 7 and {t.dtype for t in state["weights"].values()} == {torch.float32}


# ---- folders that cannot be written, disks that are full -------------------------------------------------------------


def test_a_disk_that_fills_up_is_one_line_and_the_old_checkpoint_stays(folder, stopped, tmp_path):
    size = (stopped / "checkpoint.pt").stat().st_size
    for limit in (5_000, size - 100):
        out = Path(shutil.copytree(stopped, tmp_path / f"own{limit}"))
        before = snapshot(out)
        code, log = run(argv_of(folder, out, "--resume", "--save-every", 1, "--eval-every", 5), tmp_path, limit=limit)
        assert code == 2 and "Traceback" not in log, log
        assert re.search(r"train.py: error: .*(checkpoint\.pt|metrics\.jsonl)", log), log
        assert (out / "checkpoint.pt").read_bytes() == before["checkpoint.pt"]
        assert not list(out.glob(".*")), "half a file was left"
        assert train.main(argv_of(folder, out, "--resume", "--eval-every", 5)) == 0  # and the run can go on


@pytest.fixture
def mounted(tmp_path):
    """A function from options to a folder with a small file system of its own, where that is allowed."""
    made = []

    def mount(options: str) -> Path:
        where = tmp_path / f"disk{len(made)}"
        where.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", where], capture_output=True)
        if done.returncode:
            pytest.skip("no file system can be mounted here")
        made.append(where)
        return where

    yield mount
    for where in made:
        subprocess.run(["umount", where], check=True)


@pytest.mark.parametrize("saves, each", [([], 4), (["--save-every", "2"], 28)])  # bytes of a parameter
def test_what_a_run_needs_of_the_disk_counts_what_it_replaces(saves, each, folder, tmp_path, monkeypatch, capsys):
    out, need = tmp_path / "out", each * sum(p.numel() for p in load_model(folder / "model").parameters())

    need += pairs_file_size(pairs_of([*id_rows(31), *id_rows(7, seed=1)]))

    def usage(path):
        replaced = (out / "checkpoint.pt", out / "pairs.npz", out / "model/model.safetensors")
        used = sum(x.stat().st_size for x in replaced if x.exists())
        return shutil._ntuple_diskusage(0, 0, room - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    room = need - 1
    code, said = ended(argv_of(folder, out, *saves), capsys)
    assert code == 2 and str(out) in said and " GB" in said
    room = need
    with pytest.MonkeyPatch.context() as m:
        at_step(m, 5, interrupt)
        assert train.main(argv_of(folder, out, *saves)) == 130
    for more in ("--resume", "--overwrite"):
        assert train.main(argv_of(folder, out, *saves, more)) == 0


def test_what_is_the_users_own_in_the_folder_stays(folder, tmp_path):
    out, mine = tmp_path / "out", [".mine.tmp", ".cache.tmp/a", "notes/.draft.1.tmp", ".metrics.mine.tmp"]
    for name in mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    (out / ".checkpoint.pt.77.tmp").write_text("torn")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis").write_text("mine")
    assert train.main(argv_of(folder, out, "--steps", 1)) == 0
    assert all((out / name).read_text() == "mine" for name in mine) and not (out / ".checkpoint.pt.77.tmp").exists()
    shutil.rmtree(out / "model")
    (out / "model").symlink_to(elsewhere)
    assert train.main(argv_of(folder, out, "--steps", 1, "--overwrite")) == 0
    assert (elsewhere / "thesis").read_text() == "mine" and (out / "model/model.safetensors").exists()
    assert not (out / "model").is_symlink()


def test_flags_json_is_that_of_the_run_that_lies_there(folder, own, tmp_path):
    def lr() -> float:
        return json.loads((out / "flags.json").read_text())["lr"]

    out = tmp_path / "out"
    assert train.main(argv_of(folder, out, "--steps", 1, "--save-every", 1)) == 0
    shutil.rmtree(out / "model")
    (out / "checkpoint.pt").unlink()  # as if killed before the first
    assert train.main(argv_of(folder, out, "--steps", 1, "--resume", "--lr", 3e-3, "--save-every", 1)) == 0
    assert lr() == 3e-3
    (out / "flags.json").unlink()
    shutil.rmtree(out / "model")
    assert train.main(argv_of(folder, out, "--steps", 1, "--resume", "--lr", 3e-3)) == 0 and lr() == 3e-3


class Words:
    """What `checkpoint_job` asks of a tokenizer, for rows of token ids."""

    bos_length = staticmethod(lambda ids: 0)
    decode = staticmethod(lambda ids: " ".join(map(str, ids)))


def test_a_resumed_run_keeps_its_flags_and_ends_answers_as_the_data_do(folder, own, tmp_path, monkeypatch):
    model, ends = Path(shutil.copytree(folder / "model", tmp_path / "model")), set()
    (model / "tokenizer.json").write_text("{}")
    os.utime(own / "flags.json", (1e9, 1e9))
    monkeypatch.setattr(kept_pairs, "TOKENIZER_FILES", ())  # this one came after the run
    monkeypatch.setattr(train.Tokenizer, "from_pretrained", lambda _: Words())
    generate = GPT.generate
    monkeypatch.setattr(GPT, "generate", lambda *a, eos, **k: ends.add(eos) or generate(*a, eos=eos, **k))
    before = (own / "flags.json").read_bytes()
    argv = argv_of(folder, own, "--resume", "--eval-every", 4, "--samples", 1, model=str(model))
    assert train.main(argv) == 0
    assert (own / "flags.json").stat().st_mtime == 1e9 and (own / "flags.json").read_bytes() == before
    lasts = [json.loads(line)["chosen"][-1] for line in (folder / "ids.jsonl").read_text().splitlines()]
    assert len(ends) == 1 and lasts.count(*ends) == max(map(lasts.count, lasts))


@pytest.mark.parametrize("plot", [True, False])
def test_a_real_run_ends_in_a_table_answers_and_what_was_written(plot, folder, tmp_path, monkeypatch, capsys):
    model = Path(shutil.copytree(folder / "model", tmp_path / "model"))
    (model / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(train.Tokenizer, "from_pretrained", lambda _: Words())
    drawn = []
    if plot:
        monkeypatch.setattr(support.run, "draw", lambda lines, path: drawn.append(path))
    out = tmp_path / "out"
    methods, after_step = [], train.EpsDPO.after_step
    monkeypatch.setattr(train.EpsDPO, "after_step", lambda self, *a: methods.append(self) or after_step(self, *a))
    assert train.main(argv_of(folder, out, "--samples", 2, model=str(model))) == 0
    said, lines = capsys.readouterr().out, read_metrics(out)
    first, last = (x for x in lines if "eval/loss" in x)
    for name, key in (
        *(("accuracy", "rewards/accuracies"), ("reward margin", "rewards/margins"), ("loss", "loss"), ("KL", "kl")),
    ):
        a, b = first[f"eval/{key}"], last[f"eval/{key}"]
        assert re.search(rf"^held-out {name} +{a:.4f} +{b:.4f}$", said, re.M), name
    assert re.search(rf"^β +{0.1:.4f} +{methods[-1].beta:.4f}$", said, re.M)
    assert methods[-1].beta != steps_of(lines)[-1]["beta"]
    rows = [json.loads(line) for line in (folder / "held.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        text = {key: " ".join(map(str, row[key])) for key in ("prompt", "chosen")}
        assert f"\nprompt:  {text['prompt']}\nchosen:  {text['chosen']}\nbefore:  " in said
    before, after = (re.findall(rf"^{when}: +(.*)$", said, re.M) for when in ("before", "after"))
    for found, weights in ((before, model), (after, out / "model")):
        wanted = load_model(weights).generate([row["prompt"] for row in rows[:2]], 64, eos=eos_of(folder))
        assert found == [" ".join(map(str, ids)) for ids in wanted]
    assert before != after
    assert f"wrote {out}: " in said and "model/ (loads in transformers), metrics.jsonl" in said
    assert ("run.svg" in said) == plot and ("pip install -e '.[plot]'" in said) != plot
    assert drawn == [out / "run.svg"] * plot


def eos_of(folder: Path) -> int:
    lasts = [json.loads(line)["chosen"][-1] for line in (folder / "ids.jsonl").read_text().splitlines()]
    return max(dict.fromkeys(lasts), key=lasts.count)


def test_a_disk_too_small_is_refused_before_training_time_is_spent(folder, mounted, capsys):
    disk = mounted("size=60k")  # a checkpoint takes 90
    code, said = ended(argv_of(folder, disk / "out", "--save-every", 3), capsys)
    assert code == 2 and str(disk) in said
    metrics = disk / "out" / "metrics.jsonl"
    assert not metrics.exists() or not steps_of(read_metrics(disk / "out"))


def test_a_folder_that_cannot_be_written_is_refused_before_training_time_is_spent(folder, stopped, mounted, capsys):
    disk = mounted("size=1m")
    shutil.copytree(stopped, disk / "own")
    before = snapshot(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for argv in (
        argv_of(folder, disk / "new"),
        argv_of(folder, disk / "own", "--resume"),
        argv_of(folder, disk / "own", "--overwrite"),
    ):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(train, "score_pairs", None)
            code, said = ended(argv, capsys)
        assert code == 2 and str(disk) in said and snapshot(disk) == before


def test_an_out_that_is_a_file_or_below_one_is_refused(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        for more in ([], ["--resume"], ["--overwrite"]):
            code, said = ended(argv_of(folder, out, *more), capsys)
            assert code == 2 and f"--out {out}: expected a folder that can be written: " in said
            assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "[1]", "3", '{"model": 3}', "\x00", '{"model": ""}'])
def test_a_damaged_flags_json_is_no_traceback(content, folder, own, quick_toy, capsys):
    (own / "flags.json").write_text(content)
    code, said = ended(argv_of(folder, own), capsys)
    assert code == 2 and str(own) in said
    quick_toy.mkdir(parents=True)
    shutil.copytree(own, quick_toy, dirs_exist_ok=True)
    before = snapshot(quick_toy)
    if content != '{"model": ""}':  # that is what a toy's own run says
        code, said = ended(["--eval-size", "8", "--batch-size", "32", "--steps", "1"], capsys)
        assert code == 2 and "out/toy" in said and snapshot(quick_toy) == before


def test_overwrite_deletes_nothing_before_the_new_run_can_begin(folder, own, tmp_path, capsys):
    before = snapshot(own)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    broken = Path(shutil.copytree(folder / "model", tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"short")
    for argv in (
        argv_of(folder, own, "--overwrite", data="absent.jsonl"),
        argv_of(folder, own, "--overwrite", data=str(bad)),
        argv_of(folder, own, "--overwrite", model=str(broken)),
        argv_of(folder, own, "--overwrite", "--eval-data", "absent.jsonl"),
    ):
        code, said = ended(argv, capsys)
        assert code == 2
        assert snapshot(own).items() >= {k: v for k, v in before.items() if k != "flags.json"}.items()
