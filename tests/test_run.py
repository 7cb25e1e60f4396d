"""support/run.py: whose folder it is, and what is never replaced."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from support.checkpoint import load_model, save_model
from support.run import Run
from tests.runs import (
    argv_of,
    ended,
    flags_of,
    id_rows,
    pairs_of,
    pretend,
    read_metrics,
    same_bits,
    snapshot,
    steps_of,
    two_models,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("alone")


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main(argv_of(folder, out, "--save-every", 5)) == 0
    before = snapshot(out)
    for kept in ("metrics.jsonl", "checkpoint.pt", "model"):
        for other in {"metrics.jsonl", "checkpoint.pt", "model"} - {kept}:
            assert (out / other).exists()
        code, said = ended(argv_of(folder, out), capsys)
        assert code == 2 and "--resume" in said and "--overwrite" in said and str(out) in said
        assert snapshot(out) == before
    assert train.main(argv_of(folder, out, "--overwrite", "--steps", 2)) == 0
    assert [line["step"] for line in steps_of(read_metrics(out))] == [1, 2]
    assert not (out / "checkpoint.pt").exists()


def test_a_run_does_not_replace_what_it_reads(folder, tmp_path, capsys):
    out = tmp_path / "run"
    save_model(load_model(folder / "model"), out / "model")
    data = str(folder / "ids.jsonl")
    inside = write_rows(out / "model" / "ids.jsonl", id_rows(9))
    for model, files in (
        (out / "model", [data]),
        (folder / "model", [inside]),
        (folder / "model", [data, "--eval-data", inside]),
    ):
        code, said = ended(["--model", model, "--out", out, "--overwrite", "--data", *files], capsys)
        assert code == 2 and "choose another folder" in said and (out / "model" / "config.json").exists()
        assert inside.exists()


def test_the_toy_replaces_its_own_run_and_nothing_else(quick_toy, folder, capsys):
    few = ["--eval-size", "8", "--batch-size", "32"]
    assert train.main([*few, "--steps", "3", "--save-every", "1"]) == 0
    assert train.main([*few, "--steps", "2"]) == 0
    assert [line["step"] for line in steps_of(read_metrics(quick_toy))] == [1, 2]
    assert not (quick_toy / "checkpoint.pt").exists()
    code, said = ended([*few, "--out", quick_toy], capsys)  # an --out that was given is another matter
    assert code == 2 and "--overwrite" in said
    assert train.main(argv_of(folder, quick_toy, "--overwrite", "--steps", 1)) == 0
    before = snapshot(quick_toy)
    code, said = ended(few, capsys)  # a run on real data lies there now
    assert code == 2 and snapshot(quick_toy) == before


def test_the_toy_does_not_delete_what_is_not_a_run_of_its_own(quick_toy, capsys):
    (quick_toy / "model").mkdir(parents=True)
    (quick_toy / "model" / "thesis.txt").write_text("years of work")
    code, said = ended(["--eval-size", "8", "--batch-size", "32", "--steps", "1"], capsys)
    assert (quick_toy / "model" / "thesis.txt").read_text() == "years of work"
    assert code == 2 and "choose another folder" in said


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_folder_of_results_without_flags_json_is_no_run(flag, folder, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "thesis.txt").write_text("years of work")
    code, said = ended(argv_of(folder, out, "--steps", 1, flag), capsys)
    assert code == 2 and "model" in said and "choose another folder" in said
    assert snapshot(out) == {"model/thesis.txt": b"years of work"}


def test_a_finished_run_is_not_taken_for_one_with_other_flags(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main(argv_of(folder, out, "--steps", 1)) == 0
    before = snapshot(out)
    assert ended(argv_of(folder, out, "--steps", 1, "--resume", "--eval-every", 1), capsys)[0] == 0
    code, said = ended([*argv_of(folder, out, "--steps", 1, "--resume"), "--seed", "3"], capsys)
    assert code == 2 and "seed was 0 there, is 3 here" in said and "--overwrite" in said
    assert snapshot(out) == before


@pytest.mark.parametrize("lost", [[], ["checkpoint.pt"], ["checkpoint.pt", "flags.json"]])
def test_a_real_run_is_not_continued_as_a_toy(lost, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert train.main(argv_of(folder, out, "--steps", 1, "--save-every", 1)) == 0
    shutil.rmtree(out / "model")  # as if it had been stopped
    for name in lost:
        (out / name).unlink()
    before = snapshot(out)
    monkeypatch.setattr(train.toy, "make_problem", None)  # said at once, not after the toy's set-up
    code, said = ended(["--out", out, "--resume"], capsys)
    model = "DIR" if "flags.json" in lost else folder / "model"
    assert code == 2 and f"--resume: {out} holds a run of --model {model}; give --model again" in said
    assert snapshot(out) == before


def test_a_toy_is_not_continued_as_a_real_run(quick_toy, folder, capsys):
    assert train.main(["--eval-size", "8", "--batch-size", "32", "--steps", "1", "--save-every", "1"]) == 0
    shutil.rmtree(quick_toy / "model")
    for _ in range(2):  # with its checkpoint and without it
        before = snapshot(quick_toy)
        code, said = ended(argv_of(folder, Path("out/toy"), "--resume"), capsys)
        assert code == 2 and "--resume: out/toy holds a run of the toy; leave --model out" in said
        assert snapshot(quick_toy) == before
        (quick_toy / "checkpoint.pt").unlink(missing_ok=True)


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "all", "model"])
def test_a_run_without_a_whole_model_is_not_finished(gone, folder, tmp_path, capsys):
    out = tmp_path / "out"
    argv = argv_of(folder, out, "--steps", 2, "--save-every", 1)
    assert train.main(argv) == 0
    before = snapshot(out)
    shutil.rmtree(out / "model") if gone == "model" else None
    for path in (out / "model").glob("*" if gone == "all" else gone):
        path.unlink()
    assert train.main([*argv, "--resume"]) == 0
    assert "finished" not in capsys.readouterr().out and snapshot(out) == before


@pytest.mark.parametrize("name, keep", [("model.safetensors", 9000), ("model.safetensors", -1), ("config.json", 20)])
@pytest.mark.parametrize("saves", [0, 1])
def test_a_finished_run_with_a_damaged_model_is_no_success(name, keep, saves, folder, tmp_path, capsys):
    """A copy that was cut, or a full disk: the message says how to get the model again, and that works."""
    out = tmp_path / "out"
    argv = argv_of(folder, out, "--steps", 2, "--save-every", saves)
    assert train.main(argv) == 0
    whole = snapshot(out)
    path = out / "model" / name
    if keep > 0:
        path.write_bytes(path.read_bytes()[:keep])
    else:  # a folder in its place
        path.unlink()
        path.mkdir()
    cut = snapshot(out)
    code, said = ended([*argv, "--resume"], capsys)
    assert code == 2 and f"the finished run in {out} has a damaged model: {out / 'model'}" in said
    assert snapshot(out) == cut
    if saves:
        assert f"remove {out / 'model'} and resume again" in said
        shutil.rmtree(out / "model")
    else:
        assert "use --overwrite to train again" in said
    assert train.main([*argv, "--resume" if saves else "--overwrite"]) == 0
    assert (snapshot(out) == whole) if saves else (snapshot(out)["model/config.json"] == whole["model/config.json"])


def test_a_finished_run_without_flags_json_is_left_alone_by_resume(folder, tmp_path, capsys):
    for saves in ([], ["--save-every", 1]):
        out = tmp_path / f"out{len(saves)}"
        argv = argv_of(folder, out, "--steps", 2, *saves)
        assert train.main(argv) == 0
        (out / "flags.json").unlink()
        before = snapshot(out)
        assert train.main([*argv, "--resume"]) == 0
        assert f"the run in {out} is finished" in capsys.readouterr().out and snapshot(out) == before


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path, capsys):
    out = tmp_path / "out"
    code, said = ended(argv_of(folder, out, "--save-every", 1, "--lr", "1e300"), capsys)
    assert (
        code == 2
        and "no longer finite" in said
        and "no checkpoint was saved" in said
        and not (out / "checkpoint.pt").exists()
    )


def test_a_process_that_does_not_write_needs_no_folder(tmp_path, monkeypatch):
    """On a second node --out may not be there."""
    pretend(monkeypatch, rank=1, world=2)
    flags = flags_of(steps=1, save_every=1)
    lines = train.train(*two_models(), pairs_of(id_rows(4)), flags, run=Run(tmp_path / "elsewhere", flags))
    assert [line["tokens"] for line in lines] and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="frist does not exist; give --data again"):
        Run(tmp_path / "frist", flags_of(model="m", resume=True))


@pytest.mark.parametrize(
    "save_every, steps, expected", [(5, 12, [5, 10, 12]), (4, 12, [4, 8, 12]), (99, 3, [3]), (0, 3, [])]
)
def test_the_last_step_is_saved_whatever_save_every_is(save_every, steps, expected, tmp_path, monkeypatch):
    saved, save = [], Run.save

    def note(self):
        save(self)
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        saved.append((self.done, state["step"], len(json.loads(state["metrics"]))))

    monkeypatch.setattr(Run, "save", note)
    flags = flags_of(steps=steps, save_every=save_every)
    policy, reference = two_models()
    train.train(policy, reference, pairs_of(id_rows(8)), flags, run=Run(tmp_path, flags))
    assert saved == [(step, step, step) for step in expected]
    if expected:  # the state is that of the end
        assert same_bits(
            dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["weights"]), policy.state_dict()
        )


@pytest.mark.parametrize("lr, warned", [(1e-46, True), (9e-13, True), (1e-11, False), (7e-7, False)])
def test_a_learning_rate_that_moves_no_weight_is_a_warning(lr, warned, capsys):
    (policy, reference), pairs = two_models(), pairs_of(id_rows(8))
    train.train(policy, reference, pairs, flags_of(lr=lr, warmup=0.0, batch_size=4, steps=2))
    printed = "".join(capsys.readouterr())
    assert printed.count("float32 weights hardly move") == warned
    assert f"{lr:.3g}" in printed or not warned


@pytest.mark.parametrize(
    "method, betas, warnings", [(0.5, [0.005, 0.004], 1), (0.5, [50.0, 51.0, 52.0], 1), (2.0, [0.02, 200.0], 0)]
)
def test_beta_far_from_its_start_is_one_warning(method, betas, warnings, capsys):
    run = Run()
    run.method, before = SimpleNamespace(), method
    with run:
        for step in run.progress(len(betas)):
            run.method.beta = betas[step]
            line = {"loss": 0.7, "beta": before, "rewards/accuracies": 0.5, "tokens_per_second": 1.0}
            line |= {"grad_norm": 1.0, "learning_rate": 1e-3}
            run.log(step + 1, line)
            before = betas[step]
    assert capsys.readouterr().out.count("choose a smaller --epsilon") == warnings


@pytest.mark.parametrize(
    "error", [AttributeError("no\nway"), IsADirectoryError(21, "Is a directory"), ImportError("ABI")]
)
def test_a_figure_that_cannot_be_drawn_is_one_line_and_the_run_ends_well(error, folder, tmp_path, monkeypatch, capsys):
    def figure(**options):
        raise error

    monkeypatch.setitem(sys.modules, "matplotlib.figure", SimpleNamespace(Figure=figure))
    assert train.main(argv_of(folder, tmp_path / "out", "--steps", 2)) == 0
    said = capsys.readouterr().out
    assert f"metrics.jsonl, no figure ({error!r})\n" in said and "\nheld-out accuracy " in said
