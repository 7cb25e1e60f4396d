"""Two processes (gloo, FSDP2) against one: gradients first, then whole runs, errors, stops and checkpoints."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from support.checkpoint import load_model, load_safetensors, save_model
from support.rows import collate
from tests.runs import (
    VOCAB,
    argv_of,
    id_rows,
    nudged,
    pairs_of,
    read_metrics,
    run,
    run_many,
    snapshot,
    steps_of,
    tiny_model,
    write_rows,
)

OLD = not hasattr(torch.cpu.Stream, "record_event")
pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.skipif(OLD, reason="this torch's FSDP2 needs GPUs")]
FLOAT64 = (  # both models in double precision, where two orders of adding up cannot change a decision
    "load = train.load_model\ntrain.load_model = lambda folder, **rest: load(folder, dtype=torch.float64, **rest)\n"
)
GRADIENTS = (  # what the optimizer is given at its first step, whole
    "step = torch.optim.AdamW.step\n"
    "def spy(self, *args, **kwargs):\n"
    "    grads = [p.grad for group in self.param_groups for p in group['params']]\n"
    "    grads = [g.full_tensor() if hasattr(g, 'full_tensor') else g for g in grads]\n"
    "    if os.environ.get('RANK', '0') == '0' and not os.path.exists('FILE'): torch.save(grads, 'FILE')\n"
    "    return step(self, *args, **kwargs)\n"
    "torch.optim.AdamW.step = spy\n"
)


def stopped_after(step: int) -> str:
    """Lines that send the process SIGINT in step `step`, so that it stops after it."""
    return (
        "original_rate = train.learning_rate\n"
        "def learning_rate(now, *rest):\n"
        f"    if now == {step - 1}: os.kill(os.getpid(), 2)\n"
        "    return original_rate(now, *rest)\n"
        "train.learning_rate = learning_rate\n"
    )


def two(argv, folder: Path, before: str = "", **options):
    """Two processes with the same injected lines; both must end well."""
    codes, logs = run_many(argv, folder, before={0: before, 1: before}, **options)
    assert codes == [0, 0], "\n".join(logs)
    return logs


def one(argv, folder: Path, before: str = "") -> str:
    code, log = run(argv, folder, before=before)
    assert code == 0, log
    return log


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_safetensors(out / "model" / "model.safetensors")


def furthest(a: Path, b: Path) -> float:
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def assert_same_lines(a: Path, b: Path, tolerance: float) -> None:
    """The same steps, β equal to the bit, all else within `tolerance` of its scale."""
    a, b = read_metrics(a), read_metrics(b)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        if "beta" in x:
            assert x["beta"] == y["beta"]
        for key in x:
            assert x[key] == pytest.approx(y[key], rel=tolerance, abs=tolerance), (x["step"], key)


# ---- before anything else: the gradient ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["model", "tied"])
def test_the_gradient_of_two_processes_is_that_of_one(model, folder, tmp_path):
    found = {}
    for name, start in {"one": one, "two": two}.items():
        argv = argv_of(folder, tmp_path / name, "--steps", 1, "--batch-size", 9, "--clip", 1e9, model=model)
        start(argv, tmp_path, GRADIENTS.replace("FILE", str(tmp_path / f"{name}.pt")))
        found[name] = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    names = [name for name, _ in load_model(folder / model).named_parameters()]
    assert len(found["one"]) == len(found["two"]) == len(names)
    for name, a, b in zip(names, found["two"], found["one"]):
        assert b.abs().max() > 1e-6, name  # nothing was lost in one process either
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(b.abs().max()), msg=name)
    assert ("lm_head.weight" in names) == (model == "model")


def test_a_float16_overflow_in_one_process_is_tried_again_by_both(folder, tmp_path):
    scales = (  # the second process's first gradient overflows
        "train.loss_scales = lambda *_: [2.0 ** (100 if os.environ.get('RANK') == '1' else 10), 2.0**10]\n"
        "count, train.run_batch = train.run_batch, lambda *a: print('once', torch.is_grad_enabled()) or count(*a)\n"
    )
    logs = {}
    for name, start in {"one": one, "two": two}.items():
        argv = argv_of(folder, tmp_path / name, "--steps", 1, "--batch-size", 9, "--clip", 1e9, "--dtype", "float16")
        logs[name] = start(argv, tmp_path, scales + GRADIENTS.replace("FILE", str(tmp_path / f"{name}.pt")))
    assert logs["two"][0].count("once True") == logs["one"].count("once True") + 1 == 2
    found, wanted = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("two", "one"))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-2 * float(b.abs().max()))


# ---- whole runs ------------------------------------------------------------------------------------------------------

RUNS = {  # options, and what is hard about them
    "uneven last batches, several micro-batches": [],
    "a process without a pair in every step": ["--batch-size", 1, "--steps", 6],
    "a process without a pair in some micro-batches": ["--batch-size", 3, "--micro-tokens", 1, "--steps", 8],
    "rows dropped by truncation": ["--max-length", 6, "--max-prompt-length", 5],
}


@pytest.mark.parametrize("what", RUNS)
def test_two_processes_end_where_one_ends_in_float64(what, folder, tmp_path):
    data = write_rows(
        tmp_path / "ids.jsonl",
        id_rows(20) + [{"prompt": [1, 2, 3, 4, 5, 6], "chosen": [7, 8], "rejected": [7, 9]}] + id_rows(5, seed=4),
    )
    for name, start in {"one": one, "two": two}.items():
        length = [] if "--steps" in RUNS[what] else ["--epochs", 1]
        argv = argv_of(folder, tmp_path / name, *length, "--eval-every", 2, *RUNS[what], data=str(data))
        logs = start(argv, tmp_path, FLOAT64)
        if "dropped" in what:
            assert "1 rows dropped" in (logs if name == "one" else logs[0])
    assert_same_lines(tmp_path / "two", tmp_path / "one", 1e-9)
    assert len({line["beta"] for line in steps_of(read_metrics(tmp_path / "one"))}) > 2
    assert furthest(tmp_path / "one", tmp_path / "two") <= 1e-4 * 1e-2  # of the learning rate (files are float32)


def test_two_processes_end_where_one_ends_in_float32(folder, tmp_path):
    one(argv_of(folder, tmp_path / "one", "--eval-every", 4, model="tied"), tmp_path)
    logs = two(argv_of(folder, tmp_path / "two", "--eval-every", 4, model="tied"), tmp_path)
    assert_same_lines(tmp_path / "two", tmp_path / "one", 1e-3)
    assert furthest(tmp_path / "one", tmp_path / "two") <= 0.1 * 1e-2  # a tenth of a learning rate, after twelve steps
    assert [line["step"] for line in steps_of(read_metrics(tmp_path / "two"))] == list(range(1, 13))  # written once
    assert "pairs kept" in logs[0] and "wrote" in logs[0]
    assert "pairs kept" not in logs[1] and "wrote" not in logs[1]
    files = {path.name for path in (tmp_path / "two").iterdir()}
    assert files == {path.name for path in (tmp_path / "one").iterdir()}


def test_decisions_agree_wherever_they_are_clear():
    """What the split of a batch may change: only steps whose |Δ| is within ten times the change of Δ it brings."""
    reference, pairs = tiny_model(), pairs_of(id_rows(64))
    for scale in (1e-6, 1e-4, 1e-2):
        policy = nudged(reference, scale)

        def deltas(groups, policy=policy):
            found = {}
            for group in groups:
                with torch.no_grad():
                    w, l = train.score_pairs(policy, reference, collate(group), 0.05, "float32")
                for i, pair in enumerate(group):
                    found[pair.line] = w.delta_minus[i] - l.delta_minus[i], w.delta_plus[i] - l.delta_plus[i]
            return torch.stack([torch.stack(found[pair.line]) for pair in pairs])  # (64, 2)

        whole, alone = deltas([pairs]), deltas([[pair] for pair in pairs])
        clear = (whole.abs() > 10 * (whole - alone).abs().max()).all(1)
        assert clear.sum() > (8 if scale == 1e-6 else 48)
        assert torch.equal(whole.sign()[clear], alone.sign()[clear])


# ---- stops and errors ------------------------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_both_after_the_same_step(folder, tmp_path):
    out = tmp_path / "out"
    argv = argv_of(folder, out)
    codes, logs = run_many(argv, tmp_path, before={1: stopped_after(5)})
    assert codes == [130, 130], "\n".join(logs)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 5
    assert [line["step"] for line in read_metrics(out) if "loss" in line] == [1, 2, 3, 4, 5]
    assert "stopped after step 5; continue from the checkpoint of step 5" in logs[0]


FAULTS = {  # what goes wrong on process 1 alone, in its fourth step
    "an error": "raise RuntimeError('one process broke')",
    "bad data": "raise ValueError('a row nobody expected')",
    "a kill": "os.kill(os.getpid(), 9)",
    "a NaN": "policy.model.norm.register_forward_hook(lambda m, i, o: o * float('nan'))",
}


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    two(argv_of(folder, out), out.parent)
    return out


def test_a_signal_to_one_process_in_an_evaluation_stops_both(folder, tmp_path):
    argv = argv_of(folder, tmp_path / "out", "--eval-every", 5)
    two(argv_of(folder, tmp_path / "whole", "--eval-every", 5), tmp_path)
    in_evaluation = (  # the second micro-batch of the evaluation after step 5
        "original, n = train.score_pairs, [0]\n"
        "def score_pairs(*args):\n"
        "    steps.update([torch.is_grad_enabled()])\n"
        "    n[0] += not torch.is_grad_enabled() and steps[True] > 0\n"
        "    if n[0] == 2 and not torch.is_grad_enabled(): os.kill(os.getpid(), 15)\n"
        "    return original(*args)\n"
        "train.score_pairs = score_pairs\n"
        "import collections\n"
        "steps = collections.Counter()\n"
    )
    codes, logs = run_many(argv, tmp_path, before={1: in_evaluation})
    assert codes == [130, 130], "\n".join(logs)
    assert (
        "stopped after step 5; continue from the checkpoint of step 5 with the same torchrun as before and:" in logs[0]
    )
    assert logs[0].splitlines()[-1].endswith("--eval-every 5 --resume") and "--resume" not in logs[1]
    assert [line["step"] for line in read_metrics(tmp_path / "out")] == [0, 1, 2, 3, 4, 5]
    two([*argv, "--resume"], tmp_path)
    assert snapshot(tmp_path / "out" / "model") == snapshot(tmp_path / "whole" / "model")
    assert read_metrics(tmp_path / "out") == read_metrics(tmp_path / "whole")


def test_processes_agree_on_what_they_resume(folder, undisturbed, tmp_path):
    """Process 0 decides, even where the others see other files: `exists` says the opposite on process 1."""
    out, without = tmp_path / "out", argv_of(folder, tmp_path / "out", "--resume")
    at = without.index("--data")
    del without[at : at + 2]
    stop, lies = (
        stopped_after(5),
        (
            "from pathlib import Path\n"
            "exists = Path.exists\n"
            f"Path.exists = lambda self, **k: exists(self, **k) != (self.parent == Path({str(out)!r}))\n"
        ),
    )
    before = {1: lies}
    assert run_many(argv_of(folder, out), tmp_path, before={0: stop, 1: stop + lies})[0] == [130, 130]
    (out / "checkpoint.pt").rename(tmp_path / "checkpoint.pt")
    for saved in (False, True):
        if saved:  # the same folder again, with its checkpoint
            shutil.rmtree(out / "model")
            (tmp_path / "checkpoint.pt").rename(out / "checkpoint.pt")
        codes, logs = run_many(without, tmp_path, before=before)
        assert codes == [0, 0], "\n".join(logs)
        assert ("has no checkpoint" in logs[0]) != saved
        assert snapshot(undisturbed / "model") == snapshot(out / "model")
        assert read_metrics(undisturbed) == read_metrics(out)
    before_again = snapshot(out)
    codes, logs = run_many(without, tmp_path, before=before)
    assert codes == [0, 0] and "is finished" in logs[0] and snapshot(out) == before_again


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 15])
def test_torchrun_passes_a_signal_on_and_the_run_can_be_continued(number, folder, undisturbed, tmp_path):
    root, out = Path(train.__file__).resolve().parent, tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
    with open(tmp_path / "log", "w") as log:
        how = {"env": environment, "stdout": log, "stderr": log, "cwd": tmp_path}
        process = subprocess.Popen([*command, root / "train.py", *argv_of(folder, out)], **how)
        while process.poll() is None and not ((out / "metrics.jsonl").exists() and steps_of(read_metrics(out))):
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(120) != 0
        said = (tmp_path / "log").read_text()
        assert "stopping after this step" in said
        arguments = said.split("with the same torchrun as before and:\n")[1].splitlines()[0]
        assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] < 12
        again = subprocess.run(f"{shlex.join(command)} {arguments}", shell=True, **how)
    assert again.returncode == 0, (tmp_path / "log").read_text()
    assert read_metrics(undisturbed) == read_metrics(out)


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[pytest.mark.slow] if f in ("an error", "bad data") else []) for f in FAULTS]
)
def test_a_fault_in_one_process_ends_all_at_once(fault, folder, undisturbed, tmp_path):
    out = tmp_path / "out"
    before = (
        "original, n = train.score_pairs, [0]\n"
        "def score_pairs(policy, *rest):\n"
        "    n[0] += torch.is_grad_enabled()\n"
        f"    if n[0] == 10: {FAULTS[fault]}\n"
        "    return original(policy, *rest)\n"
        "train.score_pairs = score_pairs\n"
    )
    started = time.monotonic()
    codes, logs = run_many(argv_of(folder, out, "--save-every", 1), tmp_path, before={1: before}, timeout=100)
    assert time.monotonic() - started < 100 and 0 not in codes
    if fault in ("bad data", "a NaN"):
        assert codes[1] == 2 and re.search(r"train.py: error: .*step \d.*ids.jsonl:\d", logs[1]), logs[1]
    done = [line["step"] for line in steps_of(read_metrics(out))]
    assert done and torch.load(out / "checkpoint.pt", weights_only=True)["step"] == done[-1] < 12
    two([*argv_of(folder, out, "--save-every", 1), "--resume"], tmp_path)  # and it can go on
    assert snapshot(undisturbed / "model") == snapshot(out / "model") and read_metrics(undisturbed) == read_metrics(out)


def test_a_model_that_cannot_be_written_leaves_a_checkpoint_of_all(folder, undisturbed, tmp_path):
    argv = argv_of(folder, tmp_path / "out")
    before = "import support.run\ndef fail(*a, **k): raise OSError('no room')\nsupport.run.save_model = fail"
    codes, logs = run_many(argv, tmp_path, before={0: before})
    assert codes == [2, 2] and "no room; continue from the checkpoint of step 12 with --resume" in logs[0], logs
    two([*argv, "--resume"], tmp_path)
    assert snapshot(undisturbed / "model") == snapshot(tmp_path / "out" / "model")


def test_weights_that_are_not_finite_in_the_rows_of_one_process_stop_all(folder, tmp_path):
    rows = id_rows(8, vocab=VOCAB - 1)
    rows[2]["chosen"] = [VOCAB - 1, *rows[2]["chosen"]]
    bad = tiny_model()
    with torch.no_grad():
        bad.model.embed_tokens.weight[VOCAB - 1] = 3e38  # finite, but not for long
        bad.lm_head.weight[VOCAB - 1] = 0.0
    save_model(bad, tmp_path / "bad")
    argv = argv_of(folder, tmp_path / "out", model=str(tmp_path / "bad"))
    argv[argv.index("--data") + 1] = str(write_rows(tmp_path / "ids.jsonl", rows))
    codes, logs = run_many(argv, tmp_path)
    assert 0 not in codes and 2 in codes
    assert any(re.search(r"error: .*ids.jsonl:3\b", log) for log in logs), logs


def test_bad_input_is_one_line_and_ends_both(folder, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "flags.json").write_text("{}\n")
    for argv, named in (
        (argv_of(folder, tmp_path / "held"), "--overwrite"),
        (argv_of(folder, tmp_path / "new", data="absent.jsonl"), "absent.jsonl"),
        (argv_of(folder, tmp_path / "new", "--beta", 0), "--beta"),
        (["--steps", "1"], "one process"),
    ):
        codes, logs = run_many(argv, tmp_path)
        assert codes[0] == 2 and codes[1] != 0 and "Traceback" not in logs[0]
        assert re.search(rf"^train.py: error: .*{named}", logs[0], re.M), logs[0]


def test_torchrun_ends_when_one_process_fails(folder, tmp_path):
    root = Path(train.__file__).resolve().parent
    script = tmp_path / "broken.py"
    script.write_text(
        "import os, sys, train\n"
        "if os.environ['RANK'] == '1':\n"
        "    original = train.learning_rate\n"
        "    train.learning_rate = lambda s, *r: 1 / 0 if s == 2 else original(s, *r)\n"
        "sys.exit(train.main())\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    done = subprocess.run(
        [*command, *argv_of(folder, tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr
    assert len(steps_of(read_metrics(tmp_path / "out"))) in (2, 3)  # the other may just have ended its third step


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(folder, tmp_path_factory):
    """Undisturbed runs of one process and of two, and runs of both that were stopped after step 7."""
    root = tmp_path_factory.mktemp("ends")
    stop = FLOAT64 + stopped_after(7)
    one(argv_of(folder, root / "one"), root, FLOAT64)
    two(argv_of(folder, root / "two"), root, FLOAT64)
    assert run(argv_of(folder, root / "one stopped"), root, before=stop)[0] == 130
    assert run_many(argv_of(folder, root / "two stopped"), root, before={0: stop, 1: stop})[0] == [130, 130]
    return root


@pytest.mark.parametrize("stopped, resumed", [("one", "two"), ("two", "one"), ("two", "two")])
def test_a_run_may_be_resumed_by_another_number_of_processes(stopped, resumed, folder, ends, tmp_path):
    out = Path(shutil.copytree(ends / f"{stopped} stopped", tmp_path / "out"))
    {"one": one, "two": two}[resumed](argv_of(folder, out, "--resume"), tmp_path, FLOAT64)
    if stopped == resumed:
        assert snapshot(out / "model") == snapshot(ends / "two" / "model")
        assert read_metrics(out) == read_metrics(ends / "two")
    else:
        assert_same_lines(out, ends / "one", 1e-9)
        assert furthest(out, ends / "one") <= 1e-4 * 1e-2  # of the learning rate


def test_what_two_processes_save_is_what_one_would_save(ends):
    states = [torch.load(ends / f"{n} stopped" / "checkpoint.pt", weights_only=True) for n in ("one", "two")]
    assert states[0]["step"] == states[1]["step"] == 7 and states[0]["fingerprint"] == states[1]["fingerprint"]
    assert states[0]["method"] == states[1]["method"]
    for part in ("weights", "moments"):
        flat = [dict(walk(state[part])) for state in states]
        assert flat[0].keys() == flat[1].keys()
        for key, a in flat[0].items():
            if isinstance(a, torch.Tensor):
                assert a.shape == flat[1][key].shape
                torch.testing.assert_close(a, flat[1][key], rtol=1e-6, atol=1e-9, msg=str(key))


def walk(x, path=()):
    if isinstance(x, dict):
        for key, value in x.items():
            yield from walk(value, (*path, key))
    else:
        yield path, x
