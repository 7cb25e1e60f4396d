"""Files and flags damaged in numbers: each must be read rightly, or refused in one clear error.

    python -m tests.fuzz                                   1,667 cases of each of six formats, 10,002 in all
    python -m tests.fuzz --each 100 --seed 1               fewer, and others
    python -m tests.fuzz --case 'config.json: null: 17'    one of them again, as a wrong one is printed

A case damages good input in one named way, at random, and reads it in a process of its own. *Right*: the tensors, rows or
values are those that another reader finds (the safetensors library, json). *Refused*: a ValueError or OSError of bearable
length that names the file or flag. All else is *wrong*: another exception, a dead process, more than LIMIT_SECONDS or
LIMIT_BYTES, a file opened outside the folder. Links are followed, as caches of downloads need. Exit status 1 if any is.

Tokenizer, config and first tensors are those of the folder that EPSDPO_CHECKPOINT names, or else tiny ones made here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import gzip
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

import train
from model import GPT
from support.checkpoint import SINGLE, config_json, load_model, load_safetensors, read_config
from support.data import FIELDS, load_pairs
from support.text import Tokenizer
from tests import damage
from tests.checkpoints import write_config
from tests.runs import write_rows
from tests.test_safetensors import by_library, same

LIMIT_SECONDS, LIMIT_BYTES, LONGEST_ERROR = 30, 150_000_000, 20_000
RIGHT, REFUSED, WRONG = range(3)
OPENED: list[str] = []  # files that Python opened


class Wrong(Exception):
    """Neither read rightly nor refused."""


# ---- the formats: (folder, good input, kind) -> returns if what is read is right, raises if not ----------------------


def safetensors(folder: Path, good: Path, kind: str) -> None:
    """Both read, or both refuse. Exceptions: dtypes that no weight here has, names that are there twice, and −0."""
    path = folder / "some.safetensors"
    wanted = by_library(path)
    try:
        found = load_safetensors(path)
    except ValueError as error:
        if wanted is None or "got dtype" in str(error) or "twice" in str(error):
            raise
        raise Wrong("refused, but the safetensors library reads it") from None
    if wanted is None and b"-0" in path.read_bytes():
        raise ValueError(f"{path}: -0 is a number to Python and none to the library")
    if wanted is None or not same(found, wanted):
        raise Wrong("read, but not as the safetensors library reads it")


def checkpoint(folder: Path, good: Path, kind: str) -> None:
    OPENED.clear()
    try:
        found = {name: p.detach() for name, p in load_model(folder).named_parameters()}
    finally:
        if any("outside" in path for path in OPENED):
            raise Wrong("a file outside the folder was opened")
    single = folder / SINGLE
    shards = [single] if single.exists() else [folder / "a.safetensors", folder / "b.safetensors"]
    if not same(found, {name: t for shard in shards for name, t in (by_library(shard) or {}).items()}):
        raise Wrong("weights that are not those of the files")


def config(folder: Path, good: Path, kind: str) -> None:
    found, given = read_config(folder), json.loads((folder / "config.json").read_text("utf-8"))
    numbers = vars(found) | {"attention_bias": found.o_bias}
    for key in numbers.keys() & given.keys():
        if numbers[key] != given[key] and given[key] is not None and "rope" not in key:
            raise Wrong(f"{key} is {given[key]!r} in the file, {numbers[key]!r} when read")
    if kind in damage.CONTRADICTIONS or read_config(write_config(folder / "again", config_json(found)).parent) != found:
        raise Wrong("accepted, and it contradicts itself or is not what it is after saving")
    layers = min(found.num_hidden_layers, 2)
    with torch.device("meta"):
        GPT(dataclasses.replace(found, num_hidden_layers=layers, windows=found.windows[:layers]))


def tokenizer(folder: Path, good: Path, kind: str) -> None:
    """A row of text and one of messages; what only the template could change must be as ever."""
    read, words = Tokenizer.from_pretrained(folder), {"prompt": "He said", "chosen": " yes", "rejected": " no"}
    whole = all((folder / name).read_bytes() == (good / name).read_bytes() for name in damage.TOKENIZER_FILES[:2])
    wanted = json.loads((good / "ids.json").read_text())[0]
    for row in (words, words | {"prompt": [{"role": "user", "content": "He said"}]}):
        [pair], _ = load_pairs([write_rows(folder / "rows.jsonl", [row])], read, 10**9, 100, progress=False)
        if whole and row is words and [ids.tolist() for ids in pair[:3]] != wanted:
            raise Wrong("other ids, but tokenizer.json is as it was")
    if kind in damage.HOSTILE:
        raise Wrong("a hostile template was rendered")


def json_lines(folder: Path, good: Path, kind: str) -> None:
    """Lines that are whole give what they gave, token ids are those of the file, and no row is lost."""
    path, lines = folder / "rows.jsonl", (good / "rows.jsonl").read_bytes().splitlines()
    known = dict(zip(lines, json.loads((good / "ids.json").read_text())))
    rules = {"tokenizer": Tokenizer.from_pretrained(good), "vocab_size": 10**9, "max_length": 500, "progress": False}
    pairs, report = load_pairs([path], **rules, skip_bad_rows=True)
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    found = {pair.line: [ids.tolist() for ids in pair[:3]] for pair in pairs}
    lines = content.split(b"\n")
    if content.startswith(b"["):
        lines = [json.dumps(row).encode() for row in json.loads(content)]
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(b"\xef\xbb\xbf").strip()
        wanted = known.get(line)
        if wanted is None and number in found:
            row = json.loads(line)
            wanted = [row[name] for name in FIELDS] if type(row["chosen"][0]) is int else found[number]
        if found.get(number) != wanted:
            raise Wrong(f"line {number} gave {found.get(number)}, not {wanted}")
    if report.read != report.kept + sum(report.bad.values()) + sum(report.dropped.values()):
        raise Wrong("rows are lost")
    load_pairs([path], **rules)  # raises if a row was bad


def flags(folder: Path, good: Path, kind: str) -> None:
    """A refusal names the flag, or the word that is too much."""
    (real, flag, given), said = json.loads((folder / "argv.json").read_text()), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = train.parse_flags(train.Flags, "", [*real, flag, *given])
    except (SystemExit, ValueError) as error:
        text, code = f"{said.getvalue()} {error}", getattr(error, "code", 2)
        if code != 2 or not (flag in text or given and given[-1] in text):
            raise Wrong(f"{flag} {given} is refused without its name: {text[-300:]}") from None
        raise ValueError(f"{folder}: {flag}") from None
    value = getattr(found, flag[2:].replace("-", "_"))
    if type(value) in (int, float):
        fits = 0 <= value < math.inf or flag == "--clip"  # an infinite clip is none
        if not fits or value != type(value)(given[-1]):
            raise Wrong(f"{flag} {given} became {value!r}")
    steps = found.steps or found.epochs * math.ceil(1000 / found.batch_size)
    for step in (0, steps - 1):
        train.learning_rate(step, steps, found)


ANY = (*damage.BYTES, *damage.VALUES, *damage.KEYWISE)
FORMATS = {  # what damages it, what reads it, the kinds of damage
    "safetensors": (damage.safetensors, safetensors, (*ANY, *damage.HEADERS)),
    "checkpoint folder": (damage.checkpoint, checkpoint, (*ANY, *damage.SHARDS)),
    "config.json": (damage.config, config, (*ANY, *damage.CONTRADICTIONS)),
    "tokenizer": (damage.tokenizer, tokenizer, (*ANY, *damage.HOSTILE)),
    "JSON lines": (damage.json_lines, json_lines, (*ANY, *damage.LINES, *damage.FILES)),
    "flags": (damage.flags, flags, tuple(damage.FLAG_VALUES)),
}


# ---- one case, all cases ---------------------------------------------------------------------------------------------


class Case(NamedTuple):
    format: str
    kind: str
    number: int
    seed: int

    def wrong(self, what: str) -> int:
        print(f"WRONG --seed {self.seed} --case '{self.format}: {self.kind}: {self.number}': {what}", flush=True)
        return WRONG


def peak() -> int:
    """The most bytes that this process has held; on Linux since this was last asked."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    return most * (1 if sys.platform == "darwin" else 1024)


def try_one(case: Case, good: Path) -> int:
    folder, (write, read, _) = good.parent / str(case.number) / "case", FORMATS[case.format]
    folder.mkdir(parents=True)
    write(folder, good, case.kind, Random(str(case)))
    peak()
    before, result = peak(), RIGHT
    try:
        read(folder, good, case.kind)
    except (ValueError, OSError) as error:
        result, text = REFUSED, str(error)
        if str(folder) not in text or len(text) > LONGEST_ERROR:
            result = case.wrong(f"{type(error).__name__} of {len(text)} characters: {text[:500]}")
    except BaseException as error:
        result = case.wrong(f"{type(error).__name__}: {str(error)[:500]}")
    shutil.rmtree(folder.parent)
    grown = peak() - before
    return result if grown < LIMIT_BYTES else case.wrong(f"took {grown:,} bytes more")


def try_some(cases: list[Case], good: Path) -> list[int]:
    """Results, from a process of its own, which nothing can survive: not even a hang within one operation."""
    here, there = os.pipe()
    if (pid := os.fork()) == 0:
        if sys.platform == "linux":
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**30, mapped + 2**30))
        for case in cases:
            signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)  # of computing, for the machine may be busy,
            signal.alarm(20 * LIMIT_SECONDS)  # and of waiting
            os.write(there, bytes([try_one(case, good)]))
        os._exit(0)
    os.close(there)
    with open(here, "rb") as pipe:
        results = list(pipe.read())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if len(results) == len(cases):
        return results
    results += [cases[len(results)].wrong(f"its process ended with {code}")]
    return results + try_some(cases[len(results) :], good)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--each", type=int, default=1667, help="cases of each format [1667]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", help="one case: 'format: kind: number'")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # whose threads no fork survives
    kinds = {format: kinds for format, (*_, kinds) in FORMATS.items()}
    cases = [Case(f, kinds[f][n % len(kinds[f])], n, asked.seed) for f in FORMATS for n in range(asked.each)]
    cases = [case for case in cases if asked.case in (None, f"{case.format}: {case.kind}: {case.number}")]
    with tempfile.TemporaryDirectory() as place:
        good = Path(place) / "good"
        good.mkdir()
        damage.make_good(good, os.environ.get("EPSDPO_CHECKPOINT", ""))
        load_model(good / "sharded")  # imports much of torch: once here, not in every process
        gc.collect()
        gc.freeze()
        results = [r for i in range(0, len(cases), 50) for r in try_some(cases[i : i + 50], good)]
    counts = Counter((case.format, case.kind, result) for case, result in zip(cases, results))
    print(f"{'format':18}{'damage':33}{'files':>6}{'right':>7}{'refused':>8}{'wrong':>6}")
    for format in FORMATS:
        table = {kind: [counts[format, kind, r] for r in (RIGHT, REFUSED, WRONG)] for kind in kinds[format]}
        table = {kind: row for kind, row in table.items() if any(row)}
        table[f"all {len(table)} kinds"] = [sum(column) for column in zip(*table.values())] or [0, 0, 0]
        for kind, row in table.items():
            print(f"{format:18}{kind:33}{sum(row):6,}{row[0]:7,}{row[1]:8,}{row[2]:6,}")
    print(f"{len(cases):,} cases, seed {asked.seed}: {results.count(WRONG)} wrong")
    return 1 if WRONG in results else 0


if __name__ == "__main__":
    sys.exit(main())
