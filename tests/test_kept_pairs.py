"""out/pairs.npz: a resumed run trains on the pairs that it began with, whatever has become of data, template and date."""

from __future__ import annotations

import datetime
import json
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from support.checkpoint import save_model
from support.kept_pairs import DATA_FLAGS, load_pairs_file, made_by, pairs_file_size, save_pairs_file
from support.rows import Pair
from tests.runs import VOCAB, argv_of, ended, id_rows, pairs_of, read_metrics, run, snapshot, tiny_model, write_rows

pytestmark = pytest.mark.usefixtures("alone")
MADE = {"data": ["9 bytes with sha256 0123"], "max_length": 2048}


def some_pairs() -> tuple[list[Pair], list[Pair]]:
    pairs = [
        pair._replace(file=f"a folder/β{i % 3}\udce9.jsonl.gz", line=100 - i, cut=(i, 0, 2 * i))
        for i, pair in enumerate(pairs_of(id_rows(9)))
    ]
    return pairs[:6], pairs[6:]


def plain(pairs: list[Pair]) -> list[tuple]:
    """Pairs as values that can be compared, types included."""
    return [tuple((type(x), getattr(x, "dtype", 0), np.array(x).tolist()) for x in pair) for pair in pairs]


# ---- the file --------------------------------------------------------------------------------------------------------


def test_all_of_a_pair_comes_back_in_the_same_order(tmp_path):
    pairs, held = some_pairs()
    for kept, kept_held in ((pairs, held), (pairs, []), (pairs[:1], held), (held[::-1], pairs)):
        save_pairs_file(tmp_path / "pairs.npz", kept, kept_held, MADE)
        again, held_again, made = load_pairs_file(tmp_path / "pairs.npz", VOCAB)
        assert (plain(again), plain(held_again), made) == (plain(kept), plain(kept_held), MADE)


def test_the_size_is_known_before(tmp_path):
    pairs, held = some_pairs()
    save_pairs_file(tmp_path / "pairs.npz", 50 * pairs, held, MADE)
    size = (tmp_path / "pairs.npz").stat().st_size
    assert pairs_file_size([*(50 * pairs), *held]) <= size <= pairs_file_size([*(50 * pairs), *held]) + 5000


def test_a_damaged_file_is_an_error_or_changes_nothing(tmp_path):
    path, dice = tmp_path / "pairs.npz", random.Random(0)
    save_pairs_file(path, *some_pairs(), MADE)
    good, (pairs, held), noticed = path.read_bytes(), some_pairs(), 0
    cases = [good[:cut] for cut in (0, 1, 30, len(good) // 2, len(good) - 22, len(good) - 1)]
    cases += [b"hello\n", bytes(len(good)), good + b"x" * 70000, good[:200] + bytes(300) + good[500:]]
    for _ in range(300):
        data = bytearray(good)
        data[dice.randrange(len(good))] ^= 1 << dice.randrange(8)
        cases.append(bytes(data))
    for i, data in enumerate(cases):
        path.write_bytes(data)
        try:
            again, held_again, made = load_pairs_file(path, VOCAB)
        except ValueError as e:
            noticed += 1
            assert f"{path} is damaged (" in str(e) and "--overwrite and --data" in str(e) and "\n" not in str(e)
        else:  # a byte that says nothing, such as a time
            assert i >= 10 and (plain(again), plain(held_again), made) == (plain(pairs), plain(held), MADE)
    assert noticed > 200


def change(arrays: dict, name: str, new: object) -> dict:
    return arrays | {name: np.array(new)} if new is not None else {k: v for k, v in arrays.items() if k != name}


def test_other_arrays_are_one_clear_error(tmp_path):
    path = tmp_path / "pairs.npz"
    save_pairs_file(path, *some_pairs(), MADE)
    with np.load(path) as file:
        good = dict(file)
    text = json.loads(str(good["text"]))
    shifted = good["lengths"].copy()
    shifted[0] += [0, shifted[0, 2], -shifted[0, 2]]
    for case, arrays in {
        **{f"no {name}": change(good, name, None) for name in good},
        "a line less": change(good, "line", good["line"][:-1]),
        "a cut less": change(good, "cut", good["cut"][:-1]),
        "a place less": change(good, "place", good["place"][:-1]),
        "an id less": change(good, "ids", good["ids"][:-1]),
        "float ids": change(good, "ids", good["ids"].astype(float)),
        "float lengths": change(good, "lengths", good["lengths"] + 0.5),
        "an empty part": change(good, "lengths", shifted),
        "two lengths a pair": change(good, "lengths", good["lengths"][:, :2]),
        "a place out of range": change(good, "place", good["place"] + 9),
        "pickled objects": change(good, "line", good["line"].astype(object)),
        "no pairs": {name: array[:0] if array.ndim else array for name, array in good.items()},
        "none to train on": change(good, "text", json.dumps(text | {"to_train_on": 0})),
        "too many to train on": change(good, "text", json.dumps(text | {"to_train_on": 10})),
        "no JSON": change(good, "text", "{"),
        "a list": change(good, "text", "[1]"),
        "made by a number": change(good, "text", json.dumps(text | {"made_by": 3})),
    }.items():
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=r"pairs.npz is damaged \(.+\); start again with --overwrite and --data"):
            load_pairs_file(path, VOCAB)
            pytest.fail(case)


@pytest.mark.parametrize("wrong", [VOCAB, -1, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_an_error_that_names_both(wrong, tmp_path):
    pairs, held = some_pairs()
    held[-1].rejected[-1] = wrong
    save_pairs_file(tmp_path / "pairs.npz", pairs, held, MADE)
    with pytest.raises(ValueError, match=rf"pairs.npz: expected token ids from 0 to {VOCAB - 1}, got .*{wrong}"):
        load_pairs_file(tmp_path / "pairs.npz", VOCAB)


def test_a_file_is_known_by_its_content(tmp_path):
    def made(data: bytes, name: str = "x") -> dict:
        (tmp_path / name).write_bytes(data)
        return made_by(
            SimpleNamespace(data=(str(tmp_path / name),), eval_size=3, model=""), ("data", "eval_size", "lr")
        )

    assert made(b"abc") == made(b"abc", "y") and made(b"abc")["eval_size"] == 3
    long = bytes(3 << 20)
    found = {str(made(x)) for x in (b"abc", b"abd", b"", long, long[:-1] + b"x", b"x" + long[1:])}
    assert len(found) == 6 and json.loads(json.dumps(made(long))) == made(long)


# ---- runs ------------------------------------------------------------------------------------------------------------


def end_of(out: Path) -> tuple[dict[str, bytes], list[dict]]:
    return snapshot(out / "model"), read_metrics(out)


def stop(argv: list[str], step: int = 3) -> None:
    """Run until step `step` (from 0) and stop there."""
    with pytest.MonkeyPatch.context() as m:
        rate = train.learning_rate
        m.setattr(
            train, "learning_rate", lambda s, *r: (s == step and os.kill(os.getpid(), signal.SIGINT)) or rate(s, *r)
        )
        assert train.main(argv) == 130


DATA = ["--max-length", 14, "--eval-size", 5, "--skip-bad-rows"]


def start_of(folder: Path, out: Path, *more, data: str = "ids.jsonl") -> list[str]:
    """A run of 8 steps that holds out pairs of its data and cuts some."""
    argv = ["--model", folder / "model", "--data", folder / data, "--out", out, "--steps", 8, "--batch-size", 8]
    return [str(x) for x in [*argv, "--lr", 1e-2, "--beta", 0.1, *DATA, *more]]


def without_data(argv: list[str]) -> list[str]:
    at = argv.index("--data")
    argv = argv[:at] + argv[at + 2 :]
    for flag in ("--max-length", "--eval-size"):
        at = argv.index(flag)
        argv = argv[:at] + argv[at + 2 :]
    return [x for x in argv if x != "--skip-bad-rows"]


@pytest.fixture(scope="module")
def whole(folder):
    """An undisturbed run."""
    out = folder / "whole-kept"
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, "matplotlib.figure", None)
        torch.set_num_threads(1)
        assert train.main(start_of(folder, out)) == 0
    return out


@pytest.fixture
def stopped(folder, tmp_path) -> Path:
    stop(start_of(folder, tmp_path / "stopped"))
    return tmp_path / "stopped"


def test_a_resumed_run_needs_no_data(folder, whole, tmp_path, capsys):
    data = shutil.copy(folder / "ids.jsonl", tmp_path / "gone.jsonl")
    argv = start_of(folder, tmp_path / "out", data=str(data))
    stop(argv)
    os.remove(data)
    pairs, held, _ = load_pairs_file(tmp_path / "out" / "pairs.npz", VOCAB)
    assert len(held) == 5 and any(any(pair.cut) for pair in pairs)
    capsys.readouterr()
    assert train.main([*without_data(argv), "--resume"]) == 0
    assert f"pairs: {len(pairs)} to train on and 5 held out" in capsys.readouterr().out
    assert end_of(tmp_path / "out") == end_of(whole)


@pytest.mark.parametrize("remove", [os.remove, lambda path: (os.remove(path), os.mkdir(path))])
def test_data_that_has_moved_is_one_line_that_says_to_leave_it_out(remove, folder, tmp_path, capsys):
    data = shutil.copy(folder / "ids.jsonl", tmp_path / "gone.jsonl")
    argv = start_of(folder, tmp_path / "out", data=str(data))
    stop(argv)
    remove(data)
    capsys.readouterr()
    assert train.main([*argv, "--resume"]) == 2
    assert re.fullmatch(
        r"train.py: error: --resume: .*gone.jsonl.*; leave --data .* out: .*\n", capsys.readouterr().err
    )


def test_a_mistyped_folder_is_not_made(folder, tmp_path, capsys):
    argv = ["--model", str(folder / "model"), "--out", str(tmp_path / "frist"), "--resume"]
    assert train.main(argv) == 2 and not (tmp_path / "frist").exists()
    said = capsys.readouterr()
    assert said.err.endswith("frist does not exist; give --data again\n") and not said.out


def test_a_resumed_run_does_not_read_equal_data_again(folder, whole, stopped, monkeypatch):
    monkeypatch.setattr(train, "read_pairs", None)
    assert train.main([*start_of(folder, stopped), "--resume"]) == 0
    assert end_of(stopped) == end_of(whole)


def test_equal_data_under_another_path_is_fine(folder, whole, stopped, tmp_path):
    shutil.copy(folder / "ids.jsonl", tmp_path / "same.jsonl")
    assert train.main([*start_of(folder, stopped, data=str(tmp_path / "same.jsonl")), "--resume"]) == 0
    assert end_of(stopped) == end_of(whole)


def test_killed_before_its_first_checkpoint_a_run_keeps_its_pairs(folder, whole, stopped):
    (stopped / "checkpoint.pt").unlink()
    kept = (stopped / "pairs.npz").read_bytes()
    assert train.main([*without_data(start_of(folder, stopped)), "--resume"]) == 0
    assert end_of(stopped) == end_of(whole) and (stopped / "pairs.npz").read_bytes() == kept


@pytest.mark.parametrize("saved", [True, False])
def test_a_data_flag_that_differs_is_an_error_with_both_values(saved, folder, stopped, tmp_path, capsys):
    if not saved:
        (stopped / "checkpoint.pt").unlink()
    before = snapshot(stopped)
    other = write_rows(tmp_path / "other.jsonl", id_rows(31, seed=5))
    sizes = {file: os.path.getsize(file) for file in (folder / "ids.jsonl", other)}
    for more, named in (
        (["--max-length", 13], "max_length was 14 there, is 13 here"),
        (["--max-prompt-length", 3], "max_prompt_length was 7 there, is 3 here"),
        (["--eval-size", 4], "eval_size was 5 there, is 4 here"),
        (["--eval-data", folder / "held.jsonl"], "eval_data was [] there, is ["),
        (["--data", other], f"data was ['{sizes[folder / 'ids.jsonl']} bytes"),
        (["--data", other], f"there, is ['{sizes[other]} bytes"),
        (["--data", folder / "ids.jsonl", other], f"is ['{sizes[folder / 'ids.jsonl']} bytes"),
    ):
        argv = [*without_data(start_of(folder, stopped)), *more, "--resume"]
        code, said = ended(argv, capsys)
        assert code == 2 and str(stopped / "pairs.npz") in said and named in said, said
        assert snapshot(stopped) == before
    code, said = ended([*without_data(start_of(folder, stopped)), "--data", "absent.jsonl", "--resume"], capsys)
    assert code == 2 and "absent.jsonl" in said and snapshot(stopped) == before


def test_rows_that_were_not_skipped_are_not_skipped_now(folder, tmp_path, capsys):
    argv = [x for x in start_of(folder, tmp_path / "out") if x != "--skip-bad-rows"]
    stop(argv)
    code, said = ended([*argv, "--resume", "--skip-bad-rows"], capsys)
    assert code == 2 and "skip_bad_rows was False there, is True here" in said


def test_a_run_that_lost_its_pairs_asks_for_the_data_and_keeps_them_again(folder, whole, stopped, capsys):
    kept = stopped / "pairs.npz"
    good = kept.read_bytes()
    kept.unlink()
    before = snapshot(stopped)
    code, said = ended([*without_data(start_of(folder, stopped)), "--resume"], capsys)
    assert code == 2 and str(stopped) in said and "--data" in said and snapshot(stopped) == before
    assert train.main([*start_of(folder, stopped), "--resume"]) == 0
    assert end_of(stopped) == end_of(whole)
    assert plain(load_pairs_file(kept, VOCAB)[0]) == plain(load_pairs_file(whole / "pairs.npz", VOCAB)[0]) and good


def test_a_damaged_file_stops_the_resumed_run_and_touches_nothing(folder, stopped, capsys):
    data = bytearray((stopped / "pairs.npz").read_bytes())
    data[200] ^= 1
    (stopped / "pairs.npz").write_bytes(data)
    before = snapshot(stopped)
    code, said = ended([*start_of(folder, stopped), "--resume"], capsys)
    assert code == 2 and f"{stopped / 'pairs.npz'} is damaged" in said and snapshot(stopped) == before
    assert train.main([*start_of(folder, stopped), "--overwrite"]) == 0


def test_a_model_with_fewer_tokens_is_refused(folder, stopped, tmp_path, capsys):
    save_model(tiny_model(vocab_size=16), tmp_path / "small")
    argv = start_of(folder, stopped, "--resume")
    argv[argv.index("--model") + 1] = str(tmp_path / "small")
    before = snapshot(stopped)
    code, said = ended(argv, capsys)
    assert code == 2 and "pairs.npz: expected token ids from 0 to 15" in said and snapshot(stopped) == before


def test_a_fresh_start_replaces_the_pairs(folder, stopped, tmp_path, quick_toy):
    other = write_rows(tmp_path / "other.jsonl", id_rows(31, seed=5))
    assert train.main([*start_of(folder, stopped, data=str(other)), "--overwrite"]) == 0
    pairs, held, made = load_pairs_file(stopped / "pairs.npz", VOCAB)
    flags = train.parse_flags(train.Flags, "", start_of(folder, stopped, data=str(other)))
    assert {pair.file for pair in [*pairs, *held]} == {str(other)} and made == made_by(flags, DATA_FLAGS)
    assert train.main(["--out", str(stopped), "--overwrite", "--steps", "1", "--batch-size", "32"]) == 0
    assert not (stopped / "pairs.npz").exists()  # the toy has none


def test_killed_while_the_pairs_are_written_leaves_no_half_file(folder, whole, tmp_path):
    before = (
        "import numpy\n"
        "def half(f, **arrays):\n"
        "    f.write(b'PK' + bytes(500)); f.flush(); os.kill(os.getpid(), 9)\n"
        "numpy.savez = half"
    )
    argv = start_of(folder, tmp_path / "out")
    code, log = run(argv, tmp_path, before=before)
    assert code == -signal.SIGKILL, log
    assert not (tmp_path / "out" / "pairs.npz").exists()
    assert train.main([*argv, "--resume"]) == 0
    assert end_of(tmp_path / "out") == end_of(whole)
    assert not list((tmp_path / "out").glob(".*"))


def test_data_is_refused_that_the_run_would_replace(folder, tmp_path, capsys):
    (tmp_path / "pairs.npz").write_bytes(b"mine")
    code, said = ended(argv_of(folder, tmp_path, data=str(tmp_path / "pairs.npz")), capsys)
    assert code == 2 and "which it reads" in said and (tmp_path / "pairs.npz").read_bytes() == b"mine"


# ---- a template that writes the date ---------------------------------------------------------------------------------

TEMPLATE = """{{ strftime_now('%d') }} {% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s>
{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"""


@pytest.fixture
def chat(tmp_path) -> Path:
    """A checkpoint folder with a word-level tokenizer, whose template begins with the day, and rows of messages."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    words = ["<unk>", "</s>", "user", "assistant", *(f"{day:02}" for day in range(1, 32)), *"abcdefghij"]
    save_model(tiny_model(vocab_size=len(words)), tmp_path / "model")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    dice, rows = random.Random(0), []
    while len(rows) < 20:
        said = [" ".join(dice.choices("abcdefghij", k=3)) for _ in range(3)]
        roles = ("user", "assistant", "assistant")
        if said[1] != said[2]:
            messages = ([{"role": role, "content": text}] for role, text in zip(roles, said))
            rows.append(dict(zip(("prompt", "chosen", "rejected"), messages)))
    write_rows(tmp_path / "ids.jsonl", rows)
    return tmp_path


def test_a_resumed_run_keeps_its_date(chat, monkeypatch, capsys):
    def on(day: int) -> None:
        clock = type("Clock", (datetime.datetime,), {"now": classmethod(lambda cls: datetime.datetime(2025, 5, day))})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)

    def days(out: str) -> set[int]:
        pairs, held, _ = load_pairs_file(chat / out / "pairs.npz", 99)
        return {int(pair.prompt[0]) - 3 for pair in [*pairs, *held]}

    on(7)
    argv = [*start_of(chat, chat / "out"), "--samples", "1", "--dtype", "bfloat16"]
    assert train.main([*start_of(chat, chat / "whole"), "--samples", "1", "--dtype", "bfloat16"]) == 0
    stop(argv)
    assert days("out") == days("whole") == {7}
    on(8)
    capsys.readouterr()
    assert train.main([*argv, "--resume"]) == 0
    said = capsys.readouterr().out
    assert end_of(chat / "out") == end_of(chat / "whole")
    assert "\nprompt:  07 user " in said and "\nchosen:  " in said and "\nbefore:  " in said and "\nafter:   " in said
    assert train.main([*argv, "--overwrite"]) == 0
    assert days("out") == {8}
    assert read_metrics(chat / "out") != read_metrics(chat / "whole")  # the date matters


def test_pairs_of_another_tokenizer_are_not_trained_on(folder, tmp_path, capsys):
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(folder / "model", model)
    argv = argv_of(folder, out, "--steps", 2)
    argv[argv.index("--model") + 1] = str(model)
    assert train.main(argv) == 0
    shutil.rmtree(out / "model")  # as if it had been killed before its first checkpoint
    (model / "chat_template.jinja").write_text("another")
    code, said = ended([*argv, "--resume"], capsys)
    assert code == 2 and "tokenizer was [] there" in said


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_pairs_file(tmp_path / "pairs.npz", 9)
