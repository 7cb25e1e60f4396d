"""support/cached_reference.py: the same hidden states as the reference's, from a file."""

from __future__ import annotations

import copy
import dataclasses
import re
import shutil

import numpy as np
import pytest
import torch

import train
from model import GPT
from support import cached_reference
from support.cached_reference import CachedReference
from support.device import autocast, my_micro_batches
from support.rows import collate, epoch_order
from support.run import Run
from tests.runs import argv_of, ended, flags_of, id_rows, pairs_of, pretend, read_metrics, tiny_model, write_rows

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_cached_reference_gives_the_references_hidden_states_without_running_it(dtype, tmp_path, monkeypatch):
    pairs, reference = pairs_of(id_rows(8)), tiny_model(tied=True)
    twin = next(pair for pair in pairs if len(pair.rejected) > 1)  # the same ids, cut elsewhere
    pairs.append(twin._replace(chosen=np.r_[twin.chosen, twin.rejected[:1]], rejected=twin.rejected[1:]))
    # Without the check, for its first decisions are about rounding, which the company of other pairs changes.
    flags = flags_of(epsilon_check=0.0, dtype=dtype)
    arguments = pairs, str(tmp_path / "cache"), dtype, flags.micro_tokens
    cached = CachedReference(reference, *arguments)
    (file,) = (tmp_path / "cache").iterdir()
    assert file.stat().st_size == 4 * 16 * sum(len(p.chosen) + len(p.rejected) for p in pairs) + 4
    for group in ([0], [8, 3], [2, 1, 0, 5], list(range(9))[::-1]):  # any order, any company
        batch = collate([pairs[i] for i in group])
        where = (batch.tokens, batch.positions, batch.segments, batch.source, lambda *both: both)
        with torch.no_grad():
            exact = reference(*where)[0]
            with autocast(dtype, batch.tokens.device):
                (found, weight), (wanted, wanted_weight) = cached(*where), reference(*where)
        assert torch.equal(weight, wanted_weight)
        if dtype == "float32":
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        else:  # rounded as in a run afresh, but for the few bits that the company of other pairs changes
            assert (found - wanted).norm() < 0.5 * (found - exact).norm()
    # A policy that moves leaves it as it is; a step runs the policy alone, and a second cache reads the file.
    policy, calls, forward = copy.deepcopy(reference), [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    again = CachedReference(policy, *arguments)
    assert not calls and list((tmp_path / "cache").iterdir()) == [file]
    lines = train.train(policy, again, pairs, flags)
    micros = sum(len(my_micro_batches([pairs[i] for i in epoch_order(9, 0, 0)[k : k + 4]], 40)) for k in (0, 4, 8))
    assert calls == [policy] * micros
    other = copy.deepcopy(reference)
    wanted = train.train(other, reference, pairs, flags)
    for a, b in zip(lines, wanted):
        rounding = 1e-3 if dtype == "float32" else 5e-2
        assert a["loss"] == pytest.approx(b["loss"], abs=rounding) and a["kl"] == pytest.approx(b["kl"], abs=rounding)


def test_a_cache_belongs_to_its_pairs_model_and_dtype(tmp_path, monkeypatch):
    pairs, model = pairs_of(id_rows(4)), tiny_model(num_hidden_layers=3)
    cache = tmp_path / "deep" / "cache"

    def make(model=model, pairs=pairs, dtype="float32", micro_tokens=40):
        before = set(cache.glob("*"))
        CachedReference(model, pairs, str(cache), dtype, micro_tokens)
        return set(cache.glob("*")) - before

    (first,) = make()
    with torch.no_grad():
        (other := copy.deepcopy(model)).model.layers[1].self_attn.o_proj.weight[0, 0] += 1e-3  # one in the middle
    theta = copy.deepcopy(model)
    theta.config = dataclasses.replace(theta.config, rope_theta=77.0)
    longer = next(i for i, pair in enumerate(pairs) if len(pair.rejected) > 1)
    moved = list(pairs)  # the same ids, cut elsewhere
    moved[longer] = pairs[longer]._replace(
        chosen=np.r_[pairs[longer].chosen, pairs[longer].rejected[:1]], rejected=pairs[longer].rejected[1:]
    )
    assert len(make(pairs=moved)) == 1
    for given in ({"pairs": pairs_of(id_rows(4, seed=1))}, {"model": other}, {"model": theta}, {"dtype": "bfloat16"}):
        assert len(make(**given)) == 1, given
    assert not make(micro_tokens=1) and not make(pairs=pairs[::-1])  # as when others of them are held out
    whole = first.read_bytes()
    for damaged in (whole[:-4], whole + b"1234", b""):
        first.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=f"{first.name}: expected {len(whole)} bytes, got {len(damaged)}; delete it"
        ):
            make()
    for at in (0, len(whole) // 2, len(whole) - 1):
        first.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=f"{first.name} is damaged; delete it and run again"):
            make()
    first.unlink()
    hidden_states = cached_reference.hidden_states

    for error in (KeyboardInterrupt, torch.OutOfMemoryError):  # which stays what it is, for `main` to advise on

        def killed(*args, error=error):
            yield from list(hidden_states(*args))[:-1]
            raise error

        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(cached_reference, "hidden_states", killed)
            make()
        assert not first.exists()
    assert make() == {first} and first.read_bytes() == whole


def test_two_runs_with_one_cached_reference_are_equal(folder, tmp_path, monkeypatch, capsys):
    data, cache = write_rows(tmp_path / "rows.jsonl", id_rows(20)), tmp_path / "cache"
    argv = ["--model", folder / "model", "--data", data, "--batch-size", "4", "--lr", "1e-3", "--eval-size", "6"]
    argv = [str(x) for x in [*argv, "--cache-reference", cache]]
    assert train.main([*argv, "--out", str(tmp_path / "a")]) == 0
    assert re.search(r"reference: \d+ hidden states of 16 numbers in .*f32", capsys.readouterr().out)
    assert train.main([*argv, "--out", str(tmp_path / "b")]) == 0
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")
    capsys.readouterr()
    pretend(monkeypatch, rank=0, world=2)
    code, err = ended([*argv, "--out", tmp_path / "c"], capsys)
    assert code == 2 and "--cache-reference needs one process" in err and not (tmp_path / "c").exists()


def test_a_cache_folder_that_cannot_be_used_is_refused(folder, tmp_path, capsys):
    data, out = write_rows(tmp_path / "rows.jsonl", id_rows(20)), tmp_path / "out"
    argv = argv_of(folder, out, "--overwrite", data=str(data))
    for bad, named in ((data, "the folder cannot be made"), (out / "model", "would replace")):
        code, err = ended([*argv, "--cache-reference", bad], capsys)
        assert code == 2 and named in err and str(bad) in err, err


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_with_a_cached_reference_resumes_to_the_bit(dtype, folder, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", id_rows(20))
    argv = ["--model", folder / "model", "--data", data, "--batch-size", "4", "--lr", "1e-2", "--eval-size", "4"]
    argv += ["--dtype", dtype, "--save-every", "2", "--cache-reference", tmp_path / "cache"]
    argv = [str(x) for x in argv]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main([*argv, "--out", str(one)]) == 0
    # The second run goes back to its second step, as a kill would leave it, and makes the reference's file anew, elsewhere.
    real_save, kept = Run.save, []

    def save(self):
        real_save(self)
        if self.done == 2:
            kept.append((two / "checkpoint.pt").read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", save)
        assert train.main([*argv, "--out", str(two)]) == 0
    (two / "checkpoint.pt").write_bytes(kept[0])
    shutil.rmtree(two / "model")  # so that the run is not finished
    code, err = ended([*argv[:-2], "--out", two, "--resume"], capsys)
    assert code == 2 and "cache_reference was True there, is False here" in err
    assert train.main([*argv[:-1], str(tmp_path / "elsewhere"), "--out", str(two), "--resume"]) == 0
    assert read_metrics(one) == read_metrics(two)
    assert (one / "model/model.safetensors").read_bytes() == (two / "model/model.safetensors").read_bytes()
