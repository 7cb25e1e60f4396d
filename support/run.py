"""The folder of a run: claimed, continued, logged to, saved, and left with a model that others can load."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from model import GPT
from support.checkpoint import SINGLE, check_model, save_model
from support.device import any_process, from_process_0, rank_and_world
from support.files import replace_file
from support.kept_pairs import DATA_FLAGS, load_pairs_file, made_by, pairs_file_size, save_pairs_file
from support.report import draw, eval_line, progress_bar, say, step_line
from support.rows import Pair, ids_hash
from support.signals import asked_to_stop

GATHERED_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)
# What a new run removes of an old one, in this order: a kill in between must not make the new run look finished.
RESULTS = ("model", "checkpoint.pt", "pairs.npz", "metrics.jsonl", "run.svg")
# Flags that a resumed run may change: they change no number, or only the last bits of one.
FREE_ON_RESUME = ("model", "out", "device", "micro_tokens", "eval_every", "save_every", "samples", "show", "resume")
FREE_ON_RESUME += ("overwrite", "gradient_checkpointing", "given")


# How writing can fail: on a full disk, for weights that are not finite, for lack of memory.
NOT_WRITTEN = (OSError, ValueError, RuntimeError, MemoryError)
# What says nothing about a file's contents.
NOT_DAMAGE = (MemoryError, torch.OutOfMemoryError, FileNotFoundError, PermissionError)


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM has ended the run at a place where it can be continued."""


class Run:
    """The results of one run of `train`. Without a folder it only collects the metrics, in `lines`.

    Use it as a context manager around the training loop: there, Ctrl-C and SIGTERM mean "stop after this step".
    """

    def __init__(self, out: Path | None = None, flags: object = None, command: str = "") -> None:
        """Claim the folder `out` for a run with these `flags`; `command` says how to continue it.

        Raises ValueError if `out` holds another run and the flags say neither --resume nor --overwrite.
        """
        self.out, self.flags, self.command = out, flags, command
        self.lines: list[dict[str, float]] = []
        self.done = self.saved = self.step = 0  # steps finished, steps in the checkpoint, the step at work
        self.asked: Sequence[int] = ()  # the signal that asked this process to stop
        self.stopping = False  # whether any process was asked to stop when the last step ended
        self.file = self.bar = None
        self.made_by: dict | None = None  # what made the kept pairs, if the run continues with them
        self.writes = rank_and_world()[0] == 0  # one process writes; the others may not even see the folder
        model, others = {"model/config.json", f"model/{SINGLE}"}, {"flags.json", "checkpoint.pt", "pairs.npz"}
        found = [name for name in model | others if (out / name).exists()] if out and flags.resume else []
        found = set(from_process_0(found))
        self.resumes, self.has_pairs = "checkpoint.pt" in found, "pairs.npz" in found
        self.finished = model < found  # a model alone may be anyone's
        if out and self.writes:
            self._claim()
        elif out and not self.finished:
            self._need_pairs()
        if self.finished:
            print(f"--resume: the run in {out} is finished; its model is {out / 'model'}")

    def _claim(self) -> None:
        out, flags, before = self.out, self.flags, {}
        for path in filter(None, (flags.model, flags.cache_reference, *flags.data, *flags.eval_data)):
            if any(Path(path).resolve().is_relative_to((out / name).resolve()) for name in RESULTS):
                raise ValueError(f"--out {out}: this run would replace {path}, which it reads; choose another folder")
        with contextlib.suppress(OSError, ValueError, TypeError):
            before = dict(json.loads((out / "flags.json").read_text()))
        model = before.get("model", "DIR" if self.has_pairs else flags.model)  # the toy has no pairs.npz
        if flags.resume and bool(model) != bool(flags.model):
            whose = f"--model {model}; give --model again" if model else "the toy; leave --model out"
            raise ValueError(f"--resume: {out} holds a run of {whose}")
        if before and (self.resumes or self.finished):
            if differ := differences(numbers_of(before), numbers_of(vars(flags))):
                raise ValueError(f"--resume: the run in {out} had other flags: {differ}; --overwrite replaces it")
        if self.finished:
            try:
                check_model(out / "model")
            except (ValueError, OSError) as e:
                again = f"remove {out / 'model'} and resume again" if self.resumes else "use --overwrite to train again"
                raise ValueError(f"--resume: the finished run in {out} has a damaged model: {e}; {again}") from e
            return
        held = [name for name in ("flags.json", *RESULTS) if (out / name).exists()]
        if held and not {"flags.json", "checkpoint.pt", "pairs.npz"} & set(held):
            raise ValueError(
                f"--out {out}: {', '.join(held)} there are no run's (no flags.json); choose another folder"
            )
        toy_again = not flags.out and before.get("model") == ""  # in the toy's own folder: it replaces an earlier toy
        if held and not (flags.resume or flags.overwrite or toy_again):
            raise ValueError(
                f"--out {out} already contains a run ({', '.join(held)}): "
                "use --resume to continue it or --overwrite to replace it"
            )
        self._need_pairs()
        if flags.resume and not self.resumes:
            print(f"--resume: {out} has no checkpoint, so the run starts from step 0")
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out) as probe:  # a folder that cannot be written is an error now, not later
                probe.write(b"x")
        except OSError as e:
            raise ValueError(f"--out {out}: expected a folder that can be written: {e}") from e

    def _need_pairs(self) -> None:
        """ValueError if a run on real data is resumed without pairs: neither kept ones nor --data."""
        if self.flags.resume and self.flags.model and not self.flags.data and not self.has_pairs:
            what = "has no pairs.npz" if self.out.exists() else "does not exist"
            raise ValueError(f"--resume: {self.out} {what}; give --data again")

    def saved_pairs(self, vocab_size: int) -> tuple[list[Pair], list[Pair]] | None:
        """The training and held-out pairs of the run that is resumed, or None if it kept none.

        Raises ValueError for a damaged file, and for data flags that were given and would make other pairs.
        """
        if not self.has_pairs:
            return None
        path = self.out / "pairs.npz"
        pairs, eval_pairs, self.made_by = load_pairs_file(path, vocab_size)
        try:
            now = made_by(self.flags, self.flags.given)
        except OSError as e:
            raise ValueError(f"--resume: {e}; leave --data and --eval-data out: {path} has their pairs") from e
        if differ := differences(self.made_by, now):
            raise ValueError(f"--resume: {path} holds pairs that other data flags made: {differ}")
        print(f"pairs: {len(pairs):,} to train on and {len(eval_pairs):,} held out, as kept in {path}")
        return pairs, eval_pairs

    # ---- start

    def start(self, policy: GPT, optimizer, method, pairs: Sequence[Pair], eval_pairs: Sequence[Pair]) -> None:
        """Put the checkpoint's state into policy, optimizer and method if there is one; then open the log.

        Raises ValueError for a checkpoint of another run and for a disk without room for this one's results.
        """
        self.policy, self.optimizer, self.method = policy, optimizer, method
        self.device = next(policy.parameters()).device
        if not self.out:
            return
        self.fingerprint = fingerprint(self.flags, pairs, eval_pairs)
        if self.writes:
            self._check_room(pairs_file_size([*pairs, *eval_pairs]))
        if self.resumes:
            self.done, self.lines = load_checkpoint(self.out, policy, optimizer, method, self.fingerprint)
            self.saved = self.step = self.done
        if self.writes:
            self._open(pairs, eval_pairs)

    def _check_room(self, pairs_size: int) -> None:
        weights = sum(p.numel() for p in self.policy.parameters())
        need = weights * (4 + 24 * bool(self.flags.save_every)) + pairs_size  # a new checkpoint beside the old one
        replaced = [self.out / name for name in ("checkpoint.pt", "pairs.npz", f"model/{SINGLE}")]
        free = shutil.disk_usage(self.out).free + sum(x.stat().st_size for x in replaced if x.exists())
        if free < need:
            raise ValueError(f"--out {self.out}: {free / 1e9:.3f} GB free, this run needs {need / 1e9:.3f} GB")

    def _open(self, pairs: Sequence[Pair], eval_pairs: Sequence[Pair]) -> None:
        out = self.out
        for name in ("flags.json", *RESULTS):
            for path in out.glob(f".{name}.[0-9]*.tmp"):  # of a save that was killed
                remove(path)
        for name in () if self.resumes else RESULTS:
            if name != "pairs.npz" or not self.made_by:
                remove(out / name)
        if not (self.resumes and (out / "flags.json").exists()):  # first, because it marks a folder as a run's
            text = json.dumps(dataclasses.asdict(self.flags), indent=2, default=sorted)
            replace_file(out / "flags.json", lambda f: f.write(text.encode()))
        if self.flags.model and not self.made_by:
            save_pairs_file(out / "pairs.npz", pairs, eval_pairs, made_by(self.flags, DATA_FLAGS))
        replace_file(out / "metrics.jsonl", lambda f: f.writelines(json.dumps(x).encode() + b"\n" for x in self.lines))
        self.file = open(out / "metrics.jsonl", "a", encoding="utf-8")

    # ---- the loop

    def __enter__(self) -> Run:
        self.signals = contextlib.ExitStack()
        self.asked = self.signals.enter_context(asked_to_stop())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Save the last finished step if the run was stopped, and add to an error how the run can be continued."""
        try:
            if isinstance(error, Stopped) and self.out and self.done > self.saved:
                self.save()
        except (KeyboardInterrupt, ValueError, OSError) as e:
            error = e
        finally:
            self.signals.close()
            if self.file:
                with contextlib.suppress(OSError):  # of a full disk, which log() has reported
                    self.file.close()
        if isinstance(error, Stopped):
            raise self._interrupted(f"stopped after step {self.done}" if self.done else "stopped before step 1")
        if isinstance(error, KeyboardInterrupt):
            raise self._interrupted(f"interrupted {'in' if self.done < self.step else 'after'} step {self.step}")
        if isinstance(error, (ValueError, OSError)):
            kind = ValueError if isinstance(error, ValueError) else OSError
            how = f"; {self._checkpoint('with --resume')}" if self.out else ""
            raise kind(f"step {self.step}, {error}{how}") from error

    def _checkpoint(self, how: str) -> str:
        if self.saved:
            return f"continue from the checkpoint of step {self.saved} {how}"
        return "no checkpoint was saved (--save-every N writes one every N steps)"

    def _interrupted(self, where: str) -> KeyboardInterrupt:
        """What ends the program, with the command that continues the run."""
        if not (self.out and self.writes):
            return KeyboardInterrupt(where)
        how = self.command or "with --resume"
        if self.step:
            where += f"; {self._checkpoint(how)}"
        return KeyboardInterrupt(where if self.saved else f"{where}; start again {how}")

    def progress(self, steps: int) -> Iterator[int]:
        """The steps that are still to do, 0-based, with a bar."""
        with progress_bar(None, "train", "step", initial=self.done, total=steps) as self.bar:
            for step in range(self.done, steps):
                self.step = step + 1
                yield step

    def watch(self, micro_batches: Sequence[list[Pair]]) -> Iterator[list[Pair]]:
        """The micro-batches of an evaluation, with a bar. Raises Stopped between two of them and after the last."""
        for group in progress_bar(micro_batches, "evaluate", "batch", leave=False, delay=2):
            self._stop_here_if_asked()
            yield group
        self._stop_here_if_asked()

    def _stop_here_if_asked(self) -> None:
        if any_process(bool(self.asked), self.device):
            raise Stopped

    def log(self, step: int, line: dict[str, float]) -> None:
        """Add a line to the metrics: of step `step` (from 1), which is then done, or of an evaluation after it."""
        self.lines.append({"step": step} | line)
        if self.file:
            self.file.write(json.dumps(self.lines[-1], allow_nan=False) + "\n")
            self.file.flush()
        if "loss" in line:
            self.done = step
            self.bar.set_postfix_str(step_line(line), refresh=False)
            self.bar.update()
            self._warn(line)
        else:
            say(eval_line(self.lines[-1]))

    def _warn(self, line: dict[str, float]) -> None:
        """Say so if nothing is learned at the first step, and if β leaves [β₀/100, 100·β₀] after this one."""
        first = next(x["beta"] for x in self.lines if "beta" in x)
        if self.done == 1 and line["grad_norm"] == 0:
            say(
                "warning: the first gradient is all zero, so nothing will be learned. Is the policy frozen, does it "
                "share its weights with the reference, are the two answers of every pair equal?"
            )
        if self.done == 1 and line["learning_rate"] < 1e-12:
            say(f"warning: at a learning rate of {line['learning_rate']:.3g} float32 weights hardly move")
        if first / 100 <= line["beta"] <= 100 * first and not first / 100 <= self.method.beta <= 100 * first:
            say(f"warning: β went from {first:g} to {self.method.beta:.3g}; choose a smaller --epsilon")

    def has_evaluated(self, step: int) -> bool:
        return any(line["step"] == step and "eval/loss" in line for line in self.lines)

    def must_save(self, last: bool) -> bool:
        """Whether a checkpoint is due after the step that was logged last. Here all processes agree on stopping."""
        self.stopping = any_process(bool(self.asked), self.device)
        if not self.out:
            return False
        every = self.flags.save_every
        return self.stopping and not last or bool(every) and (last or self.done % every == 0)

    def stop_if_asked(self, last: bool) -> None:
        if self.stopping and not last:
            raise Stopped

    def save(self) -> None:
        """Write all state of the run: weights, moments, β and metrics; the order of pairs follows from the step."""
        weights, moments = get_state_dict(self.policy, self.optimizer, options=GATHERED_ON_CPU)  # all processes gather
        state = {"step": self.done, "method": vars(self.method), "fingerprint": self.fingerprint}
        state |= {"metrics": json.dumps(self.lines), "weights": weights, "moments": moments}
        if self.writes:
            if not all(x.isfinite().all() for x in weights.values()):
                raise ValueError("the weights are no longer finite and were not saved")
            replace_file(self.out / "checkpoint.pt", lambda f: torch.save(state, f))
        self.saved = self.done

    # ---- the end

    def write_model(self) -> None:
        """Write the final model as a folder that transformers loads.

        If that fails, all processes save a checkpoint, because only together they can, and raise OSError.
        """
        if not self.out:
            return
        failure, beside = "", self.out / f".model.{os.getpid()}-new.tmp"  # not the name that `remove` takes
        try:
            weights = get_model_state_dict(self.policy, options=GATHERED_ON_CPU)  # all processes gather
            if self.writes:
                whole = GPT(self.policy.config)
                whole.load_state_dict(weights)
                save_model(whole, beside, source=self.policy.folder)
                remove(self.out / "model")  # an empty folder, or half of a model
                beside.replace(self.out / "model")  # so that `model` is never half a model
        except NOT_WRITTEN as e:
            failure = f"the model was not written: {e}"
        finally:
            remove(beside)
        if failure := from_process_0(failure):
            try:
                if self.saved < self.done:
                    self.save()
            except NOT_WRITTEN as e:
                failure += f"; nor was a checkpoint: {e}"
            raise OSError(failure)

    def finish(self) -> None:
        """Draw a figure if matplotlib is installed, and print what the run has left."""
        if not self.writes:
            return
        try:
            draw(self.lines, self.out / "run.svg")
            figure = "run.svg (a figure)"
        except ModuleNotFoundError:
            figure = "no figure (pip install -e '.[plot]' for one)"
        except Exception as e:  # matplotlib fails in many ways, and the run itself has ended well
            figure = f"no figure ({e!r})"
        print(f"\nwrote {self.out}: model/ (loads in transformers), metrics.jsonl, {figure}")
        if self.asked:
            raise KeyboardInterrupt("stopped after the last step; the model is written")


# ---- files of a run --------------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Remove a file, a link or a folder. A folder is renamed first: it is whole or gone, even after a kill."""
    if path.is_dir() and not path.is_symlink():
        doomed = path if path.name.endswith(".tmp") else path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(path.replace(doomed))
    else:
        path.unlink(missing_ok=True)


def differences(there: dict, here: dict) -> str:
    """The values of `here` that are others in `there`, in words."""
    return "; ".join(
        f"{name} was {there.get(name)} there, is {x} here" for name, x in here.items() if x != there.get(name)
    )


def numbers_of(flags: dict) -> dict[str, str]:
    """The flags that change the numbers of a run, but for those that `pairs.npz` answers for."""
    values = {name: str(x) for name, x in flags.items() if name not in (*FREE_ON_RESUME, *DATA_FLAGS)}
    return values | {"cache_reference": str(bool(flags.get("cache_reference")))}  # where the file is changes no number


def fingerprint(flags: object, pairs: Sequence[Pair], eval_pairs: Sequence[Pair]) -> dict[str, str]:
    """What a checkpoint belongs to: the flags that matter, hashes of all token ids and of the first model's files."""
    files, folder = hashlib.sha256(), Path(flags.model)
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))] if flags.model else ():
        with open(path, "rb") as f:  # size and ends: enough to tell two models apart, whatever their size
            files.update(path.stat().st_size.to_bytes(8, "little") + f.read(1 << 20))
            f.seek(max(0, path.stat().st_size - (1 << 20)))
            files.update(f.read())
    hashes = {"the training pairs": ids_hash(pairs), "the held-out pairs": ids_hash(eval_pairs)}
    hashes["the model"] = files.hexdigest()
    return numbers_of(vars(flags)) | {name: f"sha256 {value[:16]}" for name, value in hashes.items()}


def load_checkpoint(out: Path, policy: GPT, optimizer, method, mine: dict[str, str]) -> tuple[int, list]:
    """Put a checkpoint's state in place; return the steps done and their metrics. ValueError if it is another run's."""
    path = out / "checkpoint.pt"
    try:
        if (broken := zipfile.ZipFile(path).testzip()) is not None:  # torch itself does not look at the checksums
            raise ValueError(f"{broken} in it is damaged")
        state = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt"))
        differ = differences(state["fingerprint"], mine)
        if not differ:
            step, of_method, lines = state["step"], dict(state["method"]), json.loads(state["metrics"])
            weights, moments = state["weights"], state["moments"]
            if len(moments["state"]) != len(list(policy.parameters())):  # torch would pass over that in silence
                raise ValueError("it holds the moments of another model")
            set_state_dict(
                policy, optimizer, model_state_dict=weights, optim_state_dict=moments, options=GATHERED_ON_CPU
            )
    except NOT_DAMAGE:
        raise
    except Exception as e:  # torch.load fails in many ways on what is no checkpoint
        reason = (str(e) or type(e).__name__).splitlines()[0]
        remedy = "start again with --overwrite in place of --resume"
        raise ValueError(f"{path}: not a checkpoint of this program: {reason}; {remedy}") from e
    if differ:
        raise ValueError(f"{path} belongs to another run: {differ}. Resume with the same flags and files")
    vars(method).update(of_method)
    return step, lines
