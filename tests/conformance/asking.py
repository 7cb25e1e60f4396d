"""Loads an implementation and asks it: a Python function, or a program that reads and writes JSON lines."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import numpy as np

CLONE = Path(__file__).resolve().parents[2]
ANSWERS = ("expected", "tolerance", "flags")  # what an implementation is not told


class Failed(str):
    """What went wrong in place of an answer."""


class UsageError(Exception):
    """An option is wrong, or the implementation cannot be loaded; the text says what to do."""


def to_arrays(case: dict, baseline: str) -> dict:
    """A case as Python functions get it: NumPy arrays, logits float32, no expected answer."""
    given = {k: v for k, v in case.items() if k not in ANSWERS} | {"baseline": baseline}
    return as_arrays(given, packed=case["entry"] == "packed")


def as_arrays(given: dict, packed: bool = False) -> dict:
    given = dict(given)
    for name in ("policy_logits", "ref_logits"):
        if name in given:
            rows = given[name]
            given[name] = np.array(rows, np.float32) if packed else [np.array(x, np.float32) for x in rows]
            as_doubles = np.array(rows) if packed else [np.array(x, np.float64) for x in rows]
            given.setdefault("as_written", {})[name] = as_doubles
    if "labels" in given:
        given["labels"] = [np.array(y, np.int64) for y in given["labels"]]
    for name in ("tokens", "positions", "segments", "source", "label", "owner"):
        if name in given:
            given[name] = np.array(given[name], np.int64)
    for name in ("logp", "ref_logp", "delta_minus", "delta_plus"):
        if name in given:
            given[name] = np.array(given[name], np.float64)
    if "optimizer_steps" in given:
        given["optimizer_steps"] = [as_arrays(part) for part in given["optimizer_steps"]]
    return given


# ----------------------------------------------------------------------------------------------------------------------
# A Python function


def users_modules_first() -> None:
    """Put the folders of PYTHONPATH and the current folder before this clone, whose `model.py` or `train.py` may have
    the names of the user's own modules, and forget those of the clone that were imported already."""
    named = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    theirs = [p for p in (*named, os.getcwd()) if Path(p).resolve() != CLONE]
    rest = [p for p in sys.path if p not in theirs and Path(p or os.getcwd()).resolve() != CLONE]
    sys.path[:] = [*theirs, *rest, str(CLONE)]
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) and Path(module.__file__).resolve().parent == CLONE:
            del sys.modules[name]


def load(spec: str):
    """The function that "package.module:function" or "file.py:function" names; UsageError if there is none."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"--impl {spec}: expected package.module:function or file.py:function")
    try:
        module = load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except UsageError:
        raise
    except ModuleNotFoundError as error:
        if error.name and f"{place}.".startswith(f"{error.name}."):
            raise UsageError(
                f"--impl {spec}: found no module {error.name!r}; add its folder to PYTHONPATH, or name a file.py"
            ) from None
        raise UsageError(f"--impl {spec}: importing it {what_was_raised(error)}") from error
    except Exception as error:
        raise UsageError(f"--impl {spec}: importing it {what_was_raised(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise UsageError(f"--impl {spec}: {place} has no function {name!r}; it has {', '.join(there) or 'none'}")
    return function


def load_file(path: Path):
    """Import a file as a script's own folder would: its siblings can be imported, its dataclasses work."""
    if not path.is_file():
        raise UsageError(f"--impl: no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path or Path(folder) == CLONE:
        sys.path.insert(0, folder)
    name = path.stem if path.stem not in sys.modules else f"impl_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses, pickle and the file's siblings look it up there
    found.loader.exec_module(module)
    return module


def what_was_raised(error: BaseException) -> str:
    """ "raised KeyError at adapter.py:12: 'x'", the place being the innermost one outside installed packages."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    own = [f for f in frames if "site-packages" not in f.filename and "<frozen" not in f.filename]
    own = [f for f in own if not f.filename.startswith(os.path.dirname(os.__file__))] or frames
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"raised {type(error).__name__}{place}: {error}"


class Function:
    """A Python function, named as `load` takes it, or the function itself."""

    def __init__(self, spec, name: str = "", baseline: str = "arithmetic", timeout: float = 60):
        self.name, self.baseline, self.timeout = name or str(spec), baseline, timeout
        self.function = spec if callable(spec) else load(spec)
        self.at_once = 1  # how many cases are best asked together
        self.stalled = False

    problem = ""  # what was wrong with the last run as a whole

    def ask(self, cases: list[dict]) -> list:
        """An answer, None (declined) or `Failed` for each case."""
        answers: list = []

        def work() -> None:
            for case in cases:
                if self.stalled:
                    return
                try:
                    answers.append(self.function(to_arrays(case, self.baseline)))
                except BaseException as error:  # SystemExit too: it must not end the suite
                    answers.append(Failed(what_was_raised(error)))

        thread = threading.Thread(target=work, daemon=True)
        if not self.stalled:
            thread.start()
            thread.join(self.timeout)
        self.stalled = self.stalled or thread.is_alive()
        found = answers[: len(cases)]
        late = Failed(f"no answer: the function had not returned after {self.timeout:g} s in all (--timeout)")
        return found + [late] * (len(cases) - len(found))


# ----------------------------------------------------------------------------------------------------------------------
# A program


class Command:
    """A program: cases as JSON lines on its standard input, one answer line for each on its standard output."""

    at_once = 16  # starting a program costs more than asking it

    def __init__(self, command: str, name: str = "", baseline: str = "arithmetic", timeout: float = 60):
        self.command, self.name, self.baseline, self.timeout = command, name or command, baseline, timeout

    def ask(self, cases: list[dict]) -> list:
        """As `Function.ask`; `problem` is then what was wrong with the run as a whole ("": nothing)."""
        self.problem = ""
        told = [{k: v for k, v in c.items() if k not in ANSWERS} | {"baseline": self.baseline} for c in cases]
        text = "".join(json.dumps(c) + "\n" for c in told)
        try:
            run = subprocess.run(
                shlex.split(self.command), input=text, capture_output=True,
                encoding="utf-8", errors="replace", timeout=self.timeout,
            )  # fmt: skip
            out, err, status = run.stdout, run.stderr, run.returncode
            problem = f"the program ended with exit status {status}" if status else "the program ended"
        except subprocess.TimeoutExpired as late:
            out, err = ((x or b"").decode("utf-8", "replace") for x in (late.stdout, late.stderr))
            status, problem = 1, f"the program had not ended after {self.timeout:g} s (--timeout)"
        except (OSError, ValueError) as error:
            return [Failed(f"the program could not be started: {error}")] * len(cases)
        last = (err.strip().splitlines() or ["nothing on standard error"])[-1][:200]
        lines = out.removesuffix("\n").split("\n") if out else []  # JSON's texts may hold other ends of lines
        answers = [parsed(case, line) for case, line in zip(cases, lines)]
        wrong = next((i for i, a in enumerate(answers) if isinstance(a, Failed)), len(answers))
        if wrong < len(cases):  # what follows a wrong line may belong to another case
            failed = answers[wrong] if wrong < len(answers) else f"no answer: {problem} ({last})"
            failed = Failed(f"{failed} [after {wrong} of {len(cases)} answers]")
            return answers[:wrong] + [failed] * (len(cases) - wrong)
        if extra := lines[len(cases) :]:
            self.problem = f"{len(extra)} line(s) more than cases on standard output, the first: {extra[0][:100]!r}"
        elif status:
            self.problem = f"{problem} after its last answer ({last})"
        return answers[: len(cases)]


def parsed(case: dict, line: str):
    """The answer in a line, None if it declines the case, `Failed` if the line is no answer to the case."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or answer.get("id") != case["id"]:
        return Failed(f'expected a line {{"id": "{case["id"]}", ...}}, got {line[:200]!r}')
    return None if answer.get("skip") else answer
