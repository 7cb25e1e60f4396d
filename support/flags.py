"""Command-line flags from a dataclass: `flag` gives a field its default, its help and its range, all in one place."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from support.signals import handled_by

LARGEST = 2**63 - 1  # what torch and numpy hold as an integer


@dataclass(frozen=True)
class PerJob:
    """A default that depends on the job: on the toy world, or on real data."""

    toy: object
    real: object

    def __str__(self) -> str:
        return f"{self.real}; for the toy {self.toy}"


@dataclass(frozen=True)
class SameAs:
    """A default that is the value of another flag."""

    name: str

    def __str__(self) -> str:
        return f"that of {option(self.name)}"


def flag(default: object, help: str, range: str = "", needs: str = "", instead_of: str = "") -> dataclasses.Field:
    """A field of a dataclass of flags.

    range: "[0, 0.5]" or "(0, inf)", where a round bracket leaves the bound itself out, or "float32 | bfloat16".
    needs: flags that must be set too if this one is; "model, data or resume" means --model and one of the other two.
    instead_of: a flag that cannot be given beside this one.
    """
    special = isinstance(default, PerJob | SameAs)
    needs = tuple(need.split(" or ") for need in needs.split(", ") if need)
    if instead_of:
        help += f", instead of {option(instead_of)}"
    metadata = {"help": help, "range": range, "needs": needs, "instead_of": instead_of, "default": default}
    return dataclasses.field(default=None if special else default, metadata=metadata)


def fill_in(flags: object, real: bool) -> None:
    """Give each flag that is None its default, then check them all. Raises ValueError for the first that is wrong."""
    fields = [field for field in dataclasses.fields(flags) if field.metadata]
    for field in fields:
        default = field.metadata["default"]
        if getattr(flags, field.name) is None and isinstance(default, PerJob):
            setattr(flags, field.name, default.real if real else default.toy)
        if getattr(flags, field.name) is None and isinstance(default, SameAs):
            setattr(flags, field.name, getattr(flags, default.name))
    for field in fields:
        value, allowed = getattr(flags, field.name), field.metadata["range"]
        if field.name in flags.given and not allowed and "" in (value if isinstance(value, tuple) else [value]):
            raise ValueError(f"{option(field.name)} is empty: expected a value (is a shell variable not set?)")
        if allowed and value is not None and (expected := _expected(value, allowed)):
            raise ValueError(f"{option(field.name)} must be {expected} (got {value})")
    for field in (field for field in fields if field.name in flags.given):
        value, other = getattr(flags, field.name), field.metadata["instead_of"]
        if other in flags.given:
            raise ValueError(f"expected either {option(field.name)} or {option(other)}, got both")
        for names in field.metadata["needs"]:
            if value and not any(getattr(flags, name) for name in names):
                raise ValueError(f"{option(field.name)} also needs {' or '.join(map(option, names))}")


def _expected(value: float | int | str, allowed: str) -> str:
    """What `value` must be, or nothing if it is allowed."""
    if allowed[0] not in "[(":
        return "" if value in allowed.split(" | ") else "one of " + allowed.replace(" |", ",")
    low, high = (float(bound) for bound in allowed[1:-1].split(","))
    above = value >= low if allowed[0] == "[" else value > low
    below = value <= high if allowed[-1] == "]" else value < high
    if isinstance(value, int) and value > LARGEST:
        return f"at most {LARGEST}"
    if above and below:
        return ""
    at_least = f"at least {low:g}" if allowed[0] == "[" else f"above {low:g}"
    if high == math.inf:
        return at_least + (" and finite" if isinstance(value, float) and allowed[-1] == ")" else "")
    if allowed[0] == "[" and allowed[-1] == "]":
        return f"between {low:g} and {high:g}"
    return at_least + (f" and at most {high:g}" if allowed[-1] == "]" else f" and below {high:g}")


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line instead of the whole usage, with the flag that was probably meant."""
        known = [name for action in self._actions for name in action.option_strings]
        wrong = (message.removeprefix("unrecognized arguments: ").split() or [""])[0].split("=")[0]
        near = [name for name in known if name.startswith(wrong)]
        near = near or difflib.get_close_matches(wrong.replace("_", "-"), known, 1)
        meant = wrong.startswith("--") and wrong not in known and near
        hint = f"did you mean {near[0]}?" if meant else "see --help"
        self.exit(2, f"{self.prog}: error: {message} ({hint})\n")


def parse_flags(cls: type, description: str, argv: Sequence[str] | None = None) -> object:
    """The command line as an instance of `cls`: names, types, defaults, help and ranges are those of its fields.

    `cls` also takes `given`, the names of the flags that the command line sets. Ends the program for a bad one.
    """
    parser = _Parser(
        prog="train.py",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(cls):
        if not field.metadata:
            continue
        text, default = field.metadata["help"], field.metadata["default"]
        if default not in (None, "", (), 0, False):
            text += f" (default: {default})"
        if field.type == "bool":
            kind = {"action": "store_true"}
        elif field.type.startswith("tuple"):
            kind = {"type": str, "nargs": "+", "metavar": "FILE", "action": "extend"}
        else:
            name = field.metadata["range"].replace(" ", "") or "NAME"
            kind = {"int": {"type": int, "metavar": "N"}, "float": {"type": float, "metavar": "X"}}.get(
                field.type.split()[0], {"type": str, "metavar": name}
            )
        parser.add_argument(option(field.name), help=text.replace("%", "%%"), **kind)
    values = vars(parser.parse_args(argv))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return cls(**values, given=frozenset(values))


def resume_command(argv: Sequence[str]) -> str:
    """How to continue a run that was started with `argv`: "with" and the command, quoted for a shell."""
    arguments = [sys.argv[0], *(x for x in argv if x not in ("--overwrite", "--resume")), "--resume"]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"with the same torchrun as before and:\n{shlex.join(arguments)}"
    return f"with:\n{shlex.join([sys.executable, *arguments])}"


def one_line_errors(program: Callable[[], object]) -> int:
    """Run `program`; bad input ends in one line on stderr. Returns the exit status: 0, 2 (error), 130 (stopped),
    141 (nobody reads the output)."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None after 2>&-
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without β or ± is no reason to stop
    out_of_memory = "out of memory; try a smaller --micro-tokens or --gradient-checkpointing"
    try:
        with handled_by(signal.default_int_handler):  # SIGTERM too raises KeyboardInterrupt
            program()
            sys.stdout.flush()  # here, where an error is caught
        return 0
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 128 + 13  # as of a program that SIGPIPE ends
    except (ValueError, OSError, ImportError) as e:
        print(f"train.py: error: {e}", file=sys.stderr)
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(e):
            raise
        print(f"train.py: error: {out_of_memory}: {e}", file=sys.stderr)
    except KeyboardInterrupt as e:
        print(f"train.py: {str(e) or 'interrupted'}", file=sys.stderr)
        return 130
    return 2
