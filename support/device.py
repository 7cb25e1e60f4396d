"""Where the numbers are computed: the device, its precision, and the processes that share the work."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from model import GPT
from support.rows import Pair, micro_batches, row_length


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """16-bit matmuls for dtype "float16" or "bfloat16"; nothing for "float32"."""
    low = torch.float16 if dtype == "float16" else torch.bfloat16
    return torch.autocast(device.type, low, enabled=dtype != "float32")


def loss_scales(dtype: str, ideal: float) -> list[float]:
    """Factors for the loss, tried in turn until no gradient overflows. In all formats but float16 it is 1.

    float16 loses gradients below 6e-8 and overflows above 65504. The gradient of a log-probability is about β/2 over
    the number of pairs. With the inverse of β over the pairs as `ideal`, a power of two near it makes that about ½.
    """
    start = round(math.log2(min(max(ideal, 2.0**-99), 2.0**99)))  # within float32's range
    return [2.0 ** (start - 4 * i) for i in range(6)] if dtype == "float16" else [1.0]


def clip_gradient(model: GPT, largest: float, scale: float) -> float:
    """Divide the gradient by the loss `scale`, clip its norm to `largest` and return the norm before clipping."""
    for p in model.parameters() if scale != 1 else ():
        p.grad /= scale
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # a DTensor under FSDP2


@contextlib.contextmanager
def gradient_in_place(embedding: nn.Embedding, wanted: bool) -> Iterator[None]:
    """If wanted, add the embedding's gradient to `weight.grad` directly, in the backward pass of what is computed here.

    Autograd would first make another (V, D) tensor. Only `backward()` finds this gradient: `torch.autograd.grad` does
    not, and `zero_grad` between forward and backward loses it.
    """

    def look_up(module: nn.Embedding, inputs: tuple[Tensor], x: Tensor) -> Tensor:
        weight, (tokens,) = module.weight, inputs
        if not x.requires_grad:
            return x
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        used, places = tokens.unique(return_inverse=True)
        rows = weight.detach()[used].requires_grad_()  # (U, D): no row twice, so no two threads add to one

        def add(grad: Tensor) -> None:
            weight.grad.index_add_(0, used, grad)

        rows.register_hook(add)
        return F.embedding(places, rows)

    handle = embedding.register_forward_hook(look_up) if wanted else None
    try:
        yield
    finally:
        if handle:
            handle.remove()


def memory_gb(device: torch.device) -> dict[str, float]:
    """The peak so far, as a field of the log: the device's on a GPU, else the process's. Windows cannot tell."""
    if device.type == "cuda":
        return {"memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}
    try:
        import resource
    except ImportError:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux units of 1024 bytes
    return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def keep_freed_memory() -> None:
    """On a CPU, keep the memory that a step frees for the next one, in large pages: new memory costs 10 % of a step.

    These are hints to torch and to glibc's malloc. Nothing happens where they are not understood.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, because a mapping goes back when it is freed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


# ---- processes -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def start(name: str) -> Iterator[torch.device]:
    """The device called `name` ("auto": a GPU if there is one); under torchrun, among the other processes.

    Raises ValueError for a device that is not available or lacks float64.
    """
    keep_freed_memory()
    device = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        why = "; mps has no float64, which the sums need" if name.startswith("mps") else ""
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N (got {name}){why}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from e
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise ValueError(
                f"FSDP2 of torch {torch.__version__} needs GPUs; use one process, or a newer torch for several on a CPU"
            )
        if ":" in device:
            raise ValueError(f"--device {name}: with several processes each takes its own GPU; use --device cuda")
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        if rank_and_world()[0] != 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
    try:
        yield torch.device(device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shard(model: GPT) -> GPT:
    """Spread a model over all processes with FSDP2, one group a layer.

    The root group holds what the head needs. It stays whole after a forward, because the reference's output matrix is
    used in the policy's head.
    """
    if rank_and_world()[1] > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model, reshard_after_forward=False)
    return model


def check_apart(policy: GPT, reference: torch.nn.Module) -> None:
    """Raises ValueError for a reference that shares storage with the policy and would move with it."""
    addresses = [{p.data_ptr() for p in model.parameters()} for model in (policy, reference)]
    if rank_and_world()[1] == 1 and addresses[0] & addresses[1]:  # FSDP2 gives each model shards of its own
        raise ValueError("the reference shares storage with the policy and would move with it; give it a copy")


def my_micro_batches(pairs: Sequence[Pair], micro_tokens: int) -> list[list[Pair]]:
    """This process's micro-batches of an effective batch. All processes get equally many; some may be empty."""
    rank, world = rank_and_world()
    by_length = sorted(pairs, key=row_length)
    shares = [by_length[r::world] for r in range(world)]
    plans = [micro_batches(share, micro_tokens) for share in shares]
    mine = [[shares[rank][i] for i in group] for group in plans[rank]]
    return mine + [[]] * (max(map(len, plans)) - len(mine))


def sum_over_processes(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Sums over micro-batches and processes, in float64, which keeps counts exact."""
    total = torch.stack([torch.stack([x.double() for x in part.values()]) for part in parts]).sum(0)
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(parts[0], total.tolist()))


def any_process(asked: bool, device: torch.device) -> bool:
    """Whether any process was asked."""
    if not dist.is_initialized():
        return asked
    flag = torch.tensor(float(asked), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def from_process_0(value: object) -> object:
    """What process 0 gives, on all processes: whether a file exists, for one, may differ between machines."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
