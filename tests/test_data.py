"""Pairs, batches, rows and files of data.py: everything that needs no tokenizer."""

import gzip
import io
import json
import math
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import data
from support.data import load_pairs, show_pair
from support.rows import Batch, Pair, collate, epoch_order, locations, micro_batches, row_length

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def pair(prompt, chosen, rejected):
    return Pair(*(np.array(ids, np.int32) for ids in (prompt, chosen, rejected)))


ids_of = st.lists(st.integers(0, 15), min_size=1, max_size=7)
pairs_of = st.lists(st.builds(pair, ids_of, ids_of, ids_of), min_size=1, max_size=6)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, vocab_size=100, max_length=64, tokenizer=None, **options):
    return load_pairs([path], tokenizer, vocab_size, max_length, progress=False, **options)


def as_lists(pair):
    return [ids.tolist() for ids in pair[:3]]


# ------------------------------------------------------------------------------------------------------- batches


def test_one_row_per_pair():
    batch = collate([pair([5, 6], [7, 8], [9])])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2]]
    assert (batch.source.tolist(), batch.label.tolist()) == ([1, 2, 1], [7, 8, 9])
    assert batch.owner.tolist() == [0, 0, 1]


@given(pairs_of)
def test_batch_against_each_response_alone(pairs):
    """For every response: what is seen at each prediction, by source, positions and segments, and the label."""
    batch = collate(pairs)
    size, width = batch.tokens.shape
    assert all(tensor.dtype == torch.int64 for tensor in batch)
    assert width == max(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    assert batch.source.shape == batch.label.shape == batch.owner.shape
    for owner in range(2 * size):
        i, kind = owner % size, 1 + owner // size
        prompt, response = pairs[i].prompt.tolist(), pairs[i][kind].tolist()
        mine = batch.owner == owner
        assert batch.label[mine].tolist() == response
        seen = {}  # position -> token of prompt and this response, as attention will see them
        for place in range(width):
            if batch.segments[i, place] in (0, kind):
                position = int(batch.positions[i, place])
                assert position not in seen
                seen[position] = int(batch.tokens[i, place])
        assert [seen[position] for position in sorted(seen)] == prompt + response
        assert sorted(seen) == list(range(len(prompt + response)))
        for step, source in enumerate(batch.source[mine].tolist()):
            row, place = divmod(source, width)
            assert row == i and batch.segments[row, place] in (0, kind)
            assert batch.positions[row, place] == len(prompt) + step - 1
    used = torch.tensor([row_length(p) for p in pairs])
    assert torch.equal(batch.segments >= 0, torch.arange(width) < used[:, None])  # pads at the right, and nothing else


def test_masks_do_not_come_from_ids():
    """An end token that is also the pad token counts: as a label in the response, as a token in the prompt."""
    batch = collate([pair([5, 2, 6], [7, 2], [0, 0, 2]), pair([2], [2], [0])])
    assert batch.label.tolist() == [7, 2, 0, 0, 2, 2, 0]
    assert (batch.segments == -1).sum() == 8 * 2 - 8 - 3
    assert batch.segments[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_to_moves_every_tensor():
    moved = collate([pair([5, 6], [7, 8], [9])]).to("meta")
    assert isinstance(moved, Batch) and all(tensor.device.type == "meta" for tensor in moved)


@given(pairs_of, st.integers(1, 60))
def test_micro_batches(pairs, budget):
    groups = micro_batches(pairs, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(pairs)))
    lengths = [[row_length(pairs[i]) for i in group] for group in groups]
    assert all(len(group) == 1 or len(group) * max(group) <= budget for group in lengths)
    assert groups == micro_batches(pairs, budget)
    for before, after in zip(
        lengths, lengths[1:]
    ):  # sorted by length, and no group that the next pair would have fitted into
        assert min(before) >= max(after) and (len(before) + 1) * max(before) > budget


def test_micro_batches_cut_by_the_longest_row():
    pairs = [pair([1] * n, [2], [3]) for n in (4, 9, 4, 1)]  # rows of 6, 11, 6, 3 tokens
    assert micro_batches(pairs, 22) == [[1, 0], [2, 3]]
    assert micro_batches(pairs, 21) == [[1], [0, 2, 3]]
    assert micro_batches(pairs, 1) == [[1], [0], [2], [3]]


def test_order_is_a_function_of_seed_and_epoch_alone():
    first = epoch_order(100, 3, 1)
    assert sorted(first) == list(range(100)) and first.dtype == np.int64
    np.random.seed(0), random.seed(0), torch.manual_seed(0)
    np.random.rand(3), torch.rand(3)
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert np.array_equal(epoch_order(100, 3, 1), first)
    assert np.array_equal(state[0], np.random.get_state()[1]) and torch.equal(state[1], torch.get_rng_state())
    others = [epoch_order(100, 3, 2), epoch_order(100, 4, 1), epoch_order(100, 1, 3), epoch_order(100, 0, 4)]
    assert all(not np.array_equal(first, other) for other in others)


# --------------------------------------------------------------------------------------------------------- files

ROW = {"prompt": [1, 2], "chosen": [3, 4], "rejected": [5]}
LINE = json.dumps(ROW).encode()


@pytest.mark.parametrize(
    "content",
    [
        LINE + b"\n" + LINE + b"\n",
        LINE + b"\n" + LINE,  # no last newline
        LINE + b"\r\n" + LINE + b"\r\n",
        b"\xef\xbb\xbf" + LINE + b"\n" + LINE,  # a byte-order mark
        b"\xef\xbb\xbf" + LINE + b"\n\xef\xbb\xbf" + LINE,  # two files with one each, put together
        b"\n  \n" + LINE + b"\n\t\r\n\n" + LINE + b"\n\n",  # blank lines
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda c: gzip.compress(c[:9]) + gzip.compress(c[9:])])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(tmp_path, content, pack, name):
    """Told by content, not by name: browsers unpack a .gz and keep its name."""
    (tmp_path / name).write_bytes(pack(content))
    pairs, report = load(tmp_path / name)
    assert [as_lists(p) for p in pairs] == [[[1, 2], [3, 4], [5]]] * 2
    assert [p.line for p in pairs] == [n for n, line in enumerate(content.split(b"\n"), 1) if b"{" in line]
    assert report.read == report.kept == 2 and {p.file for p in pairs} == {str(tmp_path / name)}


def test_separators_of_other_worlds_do_not_split_lines(tmp_path):
    row = {**ROW, "note": "a\u2028b\u0085c\x0b\x0c\x1c"}
    (tmp_path / "a").write_text(json.dumps(row, ensure_ascii=False).replace("\x0b", "\\u000b").replace("\x0c", "\\f")
                                .replace("\x1c", "\\u001c") + "\n", encoding="utf-8")  # fmt: skip
    assert load(tmp_path / "a")[1].kept == 1


@pytest.mark.parametrize(
    "second, reason",
    [
        (b'{"prompt": [1], "chosen": [3], "rejected": [5', "not JSON"),
        (LINE + LINE, "not JSON"),
        (b"\xff\xfe" + LINE, "utf-8"),
        (b'{"prompt": "\xe9"}', "utf-8"),
        (LINE[:20] + b"\x00" + LINE[20:], "not JSON"),
        (b"\x00\x00\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"[1, 2]", "not an object"),
        (b"null", "not an object"),
        (b'"text"', "not an object"),
        (LINE[:-1] + b', "prompt": [7]}', "twice"),
        (b"{}", "missing field"),
        (b'{"prompt": [1], "chosen": [2]}', "missing field"),
        (b'{"prompt": [1], "chosen": [2], "rejected": null}', "missing field"),
    ],
)
def test_a_line_that_is_no_row(tmp_path, second, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE + b"\n" + second + b"\n" + LINE + b"\n")
    with pytest.raises(ValueError, match=reason) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    pairs, report = load(path, skip_bad_rows=True)
    assert [p.line for p in pairs] == [1, 3] and sum(report.bad.values()) == 1 and report.read == 3


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \r\n", gzip.compress(b""), b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="a: the file is empty"):
        load(tmp_path / "a", skip_bad_rows=True)


def test_a_damaged_gzip_is_an_error_with_its_line_even_when_bad_rows_are_skipped(tmp_path):
    lines = [json.dumps({**ROW, "note": random.Random(n).random()}).encode() + b"\n" for n in range(500)]
    packed = gzip.compress(b"".join(lines))
    for name, content in {
        "short": packed[: len(packed) // 2],
        "flipped": packed[:1000] + bytes([packed[1000] ^ 255]) + packed[1001:],
        "behind": packed + b"no member",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}:\d+: damaged gzip"):
            load(tmp_path / name, skip_bad_rows=True)


def test_a_huge_line_is_refused_unread(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(LINE + b"\n" + b" " * (data.MAX_LINE + 1) + LINE, 1))
    with pytest.raises(ValueError, match=r"a.gz:2: more than \d+ bytes"):
        load(tmp_path / "a.gz", skip_bad_rows=True)


def test_missing_file_and_several_files(tmp_path):
    with pytest.raises(OSError, match="nowhere: no such file; .*load_dataset.'NAME', split='train'.*to_json"):
        load(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(OSError, match="link is a broken link, to gone"):
        load(tmp_path / "link")
    with pytest.raises(OSError, match="is a folder; name the files in it that are meant .link."):
        load(tmp_path)
    with pytest.raises(OSError, match="/dev/null is a pipe or a device; write it to a file first"):
        load("/dev/null")
    one, two = write(tmp_path / "one", [ROW]), write(tmp_path / "two", [{**ROW, "rejected": [6]}, ROW])
    pairs, report = load_pairs([one, str(two)], None, 100, 64, progress=False)
    assert [(p.file, p.line) for p in pairs] == [(str(one), 1), (str(two), 1), (str(two), 2)] and report.read == 3
    assert pairs[1].file is pairs[2].file  # a reference, not a copy for each row


# ----------------------------------------------------------------------------------------------------------- ids


def test_ids_are_taken_verbatim(tmp_path):
    pairs, report = load(
        write(tmp_path / "a", [{**ROW, "score_chosen": float("nan"), "prompt_id": None, "input": "x"}])
    )
    assert as_lists(pairs[0]) == [[1, 2], [3, 4], [5]] and all(ids.dtype == np.int32 for ids in pairs[0][:3])
    assert (report.prompt_tokens, report.response_tokens, report.special) == (2, 3, 0)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("wrong", [16, -1, 3.0, True, False, None, "3", [3], 2**31, 2**70])
def test_an_id_outside_the_vocabulary(tmp_path, field, wrong):
    rows = [ROW, {**ROW, field: [1, wrong, 2]}]
    with pytest.raises(ValueError) as caught:
        load(write(tmp_path / "a", rows), vocab_size=16)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'a'}:2: ") and repr(wrong) in text and "0 to 15" in text and field in text
    pairs, report = load(tmp_path / "a", vocab_size=16, skip_bad_rows=True)
    assert len(pairs) == 1 and report.bad == {"not in the vocabulary": 1}


def test_the_last_id_of_the_vocabulary_is_fine(tmp_path):
    assert as_lists(load(write(tmp_path / "a", [{**ROW, "prompt": [0, 15]}]), vocab_size=16)[0][0])[0] == [0, 15]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"prompt": []}, "mixed forms"),
        ({"chosen": []}, "unknown form|blank"),
        ({"prompt": None}, "mixed forms"),
        ({"prompt": "text"}, "mixed forms"),
        ({"chosen": "text"}, "mixed forms"),
        ({"chosen": [5]}, "equal answers"),
        ({"chosen": 3}, "unknown form"),
        ({"chosen": {"role": "assistant"}}, "not a message"),
        ({"chosen": [3, {"role": "assistant", "content": "x"}]}, "not a message"),
    ],
)
def test_rows_of_ids_that_cannot_be_used(tmp_path, change, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        load(write(tmp_path / "a", [{**ROW, **change}]))
    assert str(caught.value).startswith(f"{tmp_path / 'a'}:1: ")


def test_rows_of_text_need_a_tokenizer(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(ValueError, match="a:1: .*tokenizer"):
        load(write(tmp_path / "a", rows), skip_bad_rows=True)


# ---------------------------------------------------------------------------------------------------- truncation


@pytest.mark.parametrize("longer, prompt, response", [(3, 5, 3), (30, 4, 4)])
def test_truncation_in_numbers(tmp_path, longer, prompt, response):
    row = {"prompt": list(range(10)), "chosen": list(range(20, 20 + longer)), "rejected": [11, 12]}
    [p], report = load(write(tmp_path / "a", [row]), max_length=8, max_prompt_length=4)
    assert p.prompt.tolist() == list(range(10))[-prompt:] and p.chosen.tolist() == row["chosen"][:response]
    assert p.rejected.tolist() == [11, 12] and report.truncated == 1 and p.cut == (10 - prompt, longer - response, 0)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(2, 40), st.data())
def test_truncation_rule(p, c, r, limit, draw):
    most = draw.draw(st.integers(1, limit - 1))
    bos = draw.draw(st.integers(0, min(p, 3)))
    ids = [list(range(p)), list(range(100, 100 + c)), list(range(200, 200 + r))]
    prompt, chosen, rejected = data.truncate(ids, limit, most, bos)
    bos = min(bos, len(prompt))
    assert prompt == ids[0][:bos] + ids[0][p - len(prompt) + bos :]  # cut on its left, after the beginning
    assert chosen == ids[1][: len(chosen)] and rejected == ids[2][: len(rejected)]  # cut on their right
    longer = max(len(chosen), len(rejected))
    if p + max(c, r) <= limit:
        assert [prompt, chosen, rejected] == ids
    else:
        assert len(prompt) + longer == limit  # no more is cut than must be
    for before, after in ((c, len(chosen)), (r, len(rejected))):
        assert after == min(before, limit - len(prompt))  # one limit for both responses
        if after < before:
            assert len(prompt) <= most  # a response loses tokens only when the prompt has none to spare
    assert len(prompt) >= min(p, most)


def test_equal_after_truncation_is_dropped_and_counted(tmp_path):
    rows = [{"prompt": [1] * 4, "chosen": [3] * 9 + [4], "rejected": [3] * 9 + [5]}, ROW]
    pairs, report = load(write(tmp_path / "a", rows), max_length=8)
    assert len(pairs) == 1 and report.dropped == {"equal after truncation": 1} and not report.bad
    assert "1 rows dropped: equal after truncation" in str(report)


def test_max_prompt_length_is_half_by_default(tmp_path):
    row = {"prompt": list(range(20)), "chosen": [30] * 20, "rejected": [31] * 20}
    [p], _ = load(write(tmp_path / "a", [row]), max_length=9)
    assert (len(p.prompt), len(p.chosen)) == (4, 5)


@pytest.mark.parametrize("length, prompt", [(8, 8), (8, 9), (8, 0), (8, -1), (1, None), (0, None), (-4, None)])
def test_lengths_are_checked_before_anything_is_read(tmp_path, length, prompt):
    with pytest.raises(ValueError, match="max_prompt_length"):
        load(tmp_path / "nowhere", max_length=length, max_prompt_length=prompt)


def test_longer_than_the_model_has_positions(tmp_path):
    rows = [ROW, {"prompt": [1] * 5}]
    for longer in ("chosen", "rejected"):
        rows[1] |= {"chosen": [3] * 3, "rejected": [5] * 3, longer: [5] * 6}
        write(tmp_path / "a", rows)
        with pytest.raises(ValueError, match="a:2: .*11 tokens.*max_position_embeddings of 10"):
            load(tmp_path / "a", max_position_embeddings=10, skip_bad_rows=True)
    assert load(tmp_path / "a", max_position_embeddings=11)[1].kept == 2
    assert load(tmp_path / "a", max_position_embeddings=10, max_length=10)[1].kept == 2  # after truncation it fits
    flags = SimpleNamespace(max_length=99, max_prompt_length=9, skip_bad_rows=True, show=2, data=(str(tmp_path / "a"),))
    flags.eval_data, flags.eval_size = (), 0
    for read in (data.read_pairs, data.print_pairs):
        with pytest.raises(ValueError, match="a:2: .*11 tokens.*max_position_embeddings of 10"):
            read(flags, None, SimpleNamespace(vocab_size=30, max_position_embeddings=10))


# -------------------------------------------------------------------------------------------------------- report


def test_report_counts(tmp_path):
    rows = [ROW, {**ROW, "chosen": [5]}, {"prompt": [1] * 20, "chosen": [2] * 3, "rejected": [3] * 9}, {"chosen": [3]}]
    _, report = load(write(tmp_path / "a", rows), max_length=10, skip_bad_rows=True)
    assert (report.read, report.kept, report.truncated) == (4, 2, 1)
    assert (report.prompt_tokens, report.response_tokens) == (2 + 5, 3 + 3 + 5)
    assert report.bad == {"equal answers": 1, "missing field": 1}
    text = str(report)
    assert "4 rows read, 2 pairs kept, 1 of them truncated" in text and "1 bad rows skipped: equal answers" in text


@pytest.mark.parametrize(
    "texts, written, missing",
    [
        (["no", "no way"], "no way, no", []),  # the longest first, or the short one takes the beginning of the long one
        (["no", "no"], "no way", [1]),
        (['say "hi"\n'], 'call("say \\"hi\\"\\n")', []),  # written as JSON
        (["a b", "c"], "c a  b", []),
    ],
)
def test_texts_that_a_template_left_out(texts, written, missing):
    said = [(f"text {i}", text) for i, text in enumerate(texts)]
    assert data.left_out(said, written) == {f"text {i}" for i in missing}


def test_labels_are_not_said():
    call = {"id": "c1", "type": "function", "function": {"name": "add"}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3", "tool_call_id": "c1"}]
    assert list(data.said_in("", messages)) == [("tool_calls of assistant", "add"), ("content of tool", "3")]


def test_show_pair_without_a_tokenizer(tmp_path):
    row = {"prompt": list(range(10)), "chosen": list(range(20, 50)), "rejected": [11, 12]}
    [p], _ = load(write(tmp_path / "a", [row]), max_length=8, max_prompt_length=4)
    text = show_pair(p, None)
    assert f"{tmp_path / 'a'}:1" in text and "⟦6 tokens cut⟧6 7 8 9⟦seam⟧" in text
    text = text.replace("⟧ ", "⟧")  # the response is what follows the prompt in the whole text, space included
    assert "⟦chosen, 4 tokens⟧20 21 22 23⟦26 tokens cut⟧" in text and "11 12⟦end⟧" in text


def test_memory_is_that_of_the_ids(tmp_path):
    pairs, _ = load(write(tmp_path / "a", [{**ROW, "extra": "x" * 10_000}] * 50))
    assert sum(ids.nbytes for p in pairs for ids in p[:3]) == 50 * 5 * 4
    assert all(ids.base is None for p in pairs for ids in p[:3])  # no view that keeps something larger alive
    assert os.path.getsize(tmp_path / "a") > 500_000


# ------------------------------------------------------------------------------------- files that are something else


@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer.*git lfs pull"),
        (b"PAR1\x15\x04", "a table; make JSON lines"),
        (b"PK\x03\x04\x14\x00", "a zip archive"),
        (b"\x28\xb5\x2f\xfd\x00", "a zstd file"),
        (b"prompt,chosen,rejected\nHi,yes,no\n", "a table; make JSON lines"),
        (json.dumps(ROW).encode("utf-16"), "text in UTF-16"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"pairs.jsonl".ljust(257, b"\0") + b"ustar\0", "a tar archive.*tar -xf"),
        (b"\x93NUMPY\x01\0v\0{'descr': '<i4'}\n", "a binary file; expected JSON lines"),
        (b"SQLite format 3\0\x10\0\x01\x01", "a binary file"),
        (b"\x89PNG\r\n\x1a\n", "a binary file"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a binary file"),
        (gzip.compress(gzip.compress(LINE, mtime=0), mtime=0), "a gzip file.*gunzip"),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_that_is_something_else(tmp_path, content, words, pack):
    (tmp_path / "a").write_bytes(pack(content))
    unpacked = ", unpacked," * (pack(content)[:2] == data.GZIP)
    with pytest.raises(ValueError, match=f"a: this is{unpacked} {words}"):
        load(tmp_path / "a", skip_bad_rows=True)
    with pytest.raises(ValueError, match=f"a: this is{unpacked} {words}"):
        list(data.show_pairs([tmp_path / "a"], 1, None, 100, 64))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\n  "])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path, indent, mark, pack):
    """As most copied demo files of DPO have it. Numbers are those of its rows."""
    rows = [ROW, {**ROW, "rejected": [6]}, 3, None, {"chosen": [1]}, ROW]
    (tmp_path / "a.json").write_bytes(pack(mark + json.dumps(rows, indent=indent).encode()))
    with pytest.raises(ValueError, match="a.json: row 3: not an object: got 3"):
        load(tmp_path / "a.json")
    pairs, report = load(tmp_path / "a.json", skip_bad_rows=True)
    assert [pair.line for pair in pairs] == [1, 2, 6] and as_lists(pairs[1])[2] == [6] and report.read == 6
    assert report.bad == {"not an object": 2, "missing field": 1}


@pytest.mark.parametrize(
    "text, words",
    [
        ("[]", "the file is empty"),
        ("[{}", "not JSON"),
        ("[{}] {}", "not JSON"),
        ('[{"a": 1, "a": 2}]', "a key occurs twice"),
    ],
)
def test_a_json_array_that_cannot_be_read(tmp_path, text, words):
    (tmp_path / "a").write_text(text)
    with pytest.raises(ValueError, match=f"a: .*{words}"):
        load(tmp_path / "a", skip_bad_rows=True)


def test_a_json_array_takes_memory_for_what_it_holds(tmp_path, monkeypatch):
    class Stream(io.BytesIO):
        reserved = 0

        def read(self, size=-1):  # a file sets aside that many bytes before it reads
            self.reserved = max(self.reserved, size if size >= 0 else math.inf)
            return super().read(size)

    stream = Stream(b"[" + LINE + b"]")
    assert data.rows_of_array(stream) == [ROW] and stream.reserved <= 1 << 24
    monkeypatch.setattr(data, "MAX_ARRAY", 100)
    (tmp_path / "a").write_bytes(b"[" + b",\n".join([LINE] * 99) + b"]")
    with pytest.raises(ValueError, match="a: a JSON array of more than 100 bytes; write one object per line instead"):
        load(tmp_path / "a")


def test_a_row_of_null_is_a_bad_row(tmp_path):
    (tmp_path / "a").write_bytes(b"\n" + LINE + b"\nnull\n\n" + LINE)
    pairs, report = load(tmp_path / "a", skip_bad_rows=True)
    assert [p.line for p in pairs] == [2, 5] and report.read == 3 and report.bad == {"not an object": 1}


def test_locations_name_at_most_eight_rows():
    pairs = [Pair(*[np.array([1], np.int32)] * 3, "some/where/a.jsonl", i) for i in range(1, 10)]
    eight = "rows " + ", ".join(f"a.jsonl:{i}" for i in range(1, 9))
    assert locations(pairs[:8]) == eight and locations(pairs) == f"{eight} …"


# ---------------------------------------------------------------------------------------------------------- held out


@given(st.integers(0, 40), st.integers(0, 40))
def test_held_out_pairs(n, size):
    pairs = [pair([i], [1], [2]) for i in range(n)]
    train, held = data.hold_out(pairs, size)
    number = [int(p.prompt[0]) for p in train], [int(p.prompt[0]) for p in held]
    assert sorted(sum(number, [])) == list(range(n)) and len(held) == min(size, n // 3)
    assert all(numbers == sorted(numbers) for numbers in number)
    assert number[1] == sorted(np.random.default_rng(0).permutation(n).tolist()[: len(held)])  # as in earlier versions


@pytest.mark.parametrize("own_file", [False, True])
def test_no_held_out_pair_is_trained_on(tmp_path, own_file, capsys):
    rows = [json.dumps({"prompt": [1], "chosen": [2, i], "rejected": [3]}) for i in range(30)]
    (tmp_path / "a").write_text("\n".join(rows))
    (tmp_path / "b").write_text("\n".join(rows[:5]))
    flags = SimpleNamespace(max_length=9, max_prompt_length=4, skip_bad_rows=False, data=(str(tmp_path / "a"),))
    flags.eval_data, flags.eval_size = (str(tmp_path / "b"),) if own_file else (), 7
    pairs, held = data.read_pairs(flags, None, SimpleNamespace(vocab_size=30, max_position_embeddings=9))
    lines = [p.line for p in pairs], [p.line for p in held]
    if own_file:
        assert lines == (list(range(1, 31)), list(range(1, 6))) and {p.file for p in held} == {str(tmp_path / "b")}
    else:
        assert len(held) == 7 and sorted(lines[0] + lines[1]) == list(range(1, 31))
    said = capsys.readouterr().out
    assert ("5 pairs kept" if own_file else "held out: 7 of them, 23 to train on") in said
    assert ("warning: 5 of the held-out pairs are also trained on" in said) == own_file == ("warning" in said)


@pytest.mark.parametrize(
    "data_file, eval_file", [("gone", ""), ("gone", "good"), ("good", "gone"), ("gone", "also gone")]
)
def test_files_without_a_usable_pair_are_an_error(data_file, eval_file, tmp_path):
    """Every row may be dropped, here because both responses begin with the same tokens."""
    gone = {"prompt": [1], "chosen": [2] * 9, "rejected": [2] * 8}
    for name, rows in (("good", [ROW] * 4), ("gone", [gone] * 3), ("also gone", [gone])):
        write(tmp_path / name, rows)
    flags = SimpleNamespace(max_length=6, max_prompt_length=2, skip_bad_rows=False, eval_size=2)
    flags.data, flags.eval_data = ((str(tmp_path / name),) if name else () for name in (data_file, eval_file))
    with pytest.raises(ValueError, match="--data or --eval-data: no usable pair is left"):
        data.read_pairs(flags, None, SimpleNamespace(vocab_size=30, max_position_embeddings=None))


def test_print_pairs_shows_held_out_files_too(tmp_path, capsys):
    class Tokenizer:  # whose ids are characters that a terminal would obey
        decode = staticmethod(lambda ids: "".join(chr(i % 32) for i in ids))
        control, bos_length = re.compile("x"), staticmethod(lambda ids: 0)

    for name, n in (("a", 3), ("b", 2)):
        write(tmp_path / name, [ROW] * n)
    flags = SimpleNamespace(max_length=9, max_prompt_length=4, show=2, data=(str(tmp_path / "a"),))
    for held in ("b", "none", "a", ""):
        flags.eval_data = (str(tmp_path / held),) if held else ()
        if held in ("none", "a"):
            with pytest.raises((ValueError, OSError), match="no such file" if held == "none" else "given twice"):
                data.print_pairs(flags, None, SimpleNamespace(vocab_size=30, max_position_embeddings=9))
            continue
        capsys.readouterr()
        data.print_pairs(flags, Tokenizer(), SimpleNamespace(vocab_size=30, max_position_embeddings=9))
        said = capsys.readouterr().out
        assert re.findall(r"/(\w+:\d)\n", said) == ["a:1", "a:2"] + ["b:1", "b:2"] * (held == "b")
        assert "\\x01" in said and not re.search(r"[\x00-\x08\x0b-\x1f]", said)


def test_a_file_that_is_given_twice_is_refused(tmp_path):
    for name in "ab":
        write(tmp_path / name, [ROW])
    (tmp_path / "link").symlink_to(tmp_path / "a")
    a, b, link, other = (str(tmp_path / name) for name in ("a", "b", "link", "x/../a"))
    for train, held in (([a, b, a], []), ([b, a], [a]), ([a], [b, link]), ([a], [other]), ([b], [a, a])):
        flags = SimpleNamespace(data=tuple(train), eval_data=tuple(held))
        with pytest.raises(ValueError, match=f"--data, --eval-data: {a} is given twice"):
            data.read_pairs(flags, None, None)
