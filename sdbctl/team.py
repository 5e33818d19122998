"""The processes that train one model together, through Lightning Fabric; usually there is only one."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sdbctl.errors import EnvironmentFailure

if TYPE_CHECKING:
    import torch
    from lightning_fabric import Fabric
    from torch import Tensor

_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed"}
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")
"""Of Fabric's: each process holds the whole network, as the files that are written need it."""
PATIENCE = 30.0
"""Seconds that the first process has to find out by itself that another one has died."""
_DIED = EnvironmentFailure("another training process has ended", "--resume goes on")
_joined: Fabric | None = None
_several = False


def expect(processes: int) -> None:
    """Say how many processes were asked for: of one alone, the environment says nothing about its rank."""
    global _several
    _several = processes > 1


def rank() -> int:
    """Number of this process, from 0; only number 0 writes files and talks.

    Fabric's own launcher, torchrun and Slurm say it in the environment before anything is joined.
    """
    if _joined is not None:
        return int(_joined.global_rank)
    if not _several:
        return 0
    # as Fabric decides: a shell that Slurm gave out, and other job managers, set numbers, too, that are none of ours
    if "TORCHELASTIC_RUN_ID" in os.environ:
        name = "RANK"
    elif "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        name = "SLURM_PROCID"
    else:
        name = "LOCAL_RANK"
    number = os.environ.get(name, "")
    return int(number) if number.isdecimal() else 0


def size() -> int:
    """Number of processes that train together."""
    return _joined.world_size if _joined is not None else 1


def join(device: torch.device, precision: str, devices: int, nodes: int, strategy: str) -> None:
    """Start the other processes, or find those that torchrun or Slurm started, and connect to them.

    Each of them runs the same command from its beginning and joins here.

    Args:
        device: Its type is what every process computes on.
        precision: ``fp32`` or ``bf16``.
        devices: Processes on this machine, one per device.
        nodes: Machines.
        strategy: One of :data:`STRATEGIES`, ``auto`` for DDP.

    Raises:
        EnvironmentFailure: There are fewer GPUs, or the processes cannot connect.
    """
    import torch
    from lightning_fabric import Fabric

    global _joined
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise EnvironmentFailure(f"{devices} GPUs were asked for, there are {torch.cuda.device_count()}")
    _quiet()
    try:
        fabric = Fabric(
            accelerator=device.type,
            precision=_PRECISION[precision],
            devices=devices,
            num_nodes=nodes,
            strategy="ddp" if strategy == "auto" else strategy,
        )
        atexit.register(_leave)
        _watch()
        fabric.launch()
    except ValueError as error:
        raise EnvironmentFailure(f"the processes do not fit: {str(error).splitlines()[0]}") from None
    except RuntimeError as error:
        raise EnvironmentFailure(f"the processes cannot connect: {str(error).splitlines()[0]}") from None
    _joined = fabric


def _watch() -> None:
    """Let the thread that looks after the started processes end this one with a word, and not at once.

    Fabric's kills all when it sees that one has died, before the first process can find out at its next step. A Fabric
    that has no such thread does as it does.
    """
    with contextlib.suppress(ImportError):
        from lightning_fabric.strategies.launchers.subprocess_script import _ChildProcessObserver as Observer

        Observer._terminate_all = lambda self: _end(self._child_processes)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    time.sleep(PATIENCE)
    for child in children:
        child.kill()
    print(f"error: {_DIED}", file=sys.stderr, flush=True)
    os._exit(_DIED.exit_code)


def fabric(device: torch.device, precision: str) -> Fabric:
    """What :func:`join` made, or a Fabric of this process alone."""
    return _joined if _joined is not None else _alone(device, precision)


@functools.cache
def _alone(device: torch.device, precision: str) -> Fabric:
    """A new one looks through all packages for plug-ins, which takes longer than a small student's epoch."""
    from lightning_fabric import Fabric

    _quiet()
    return Fabric(
        accelerator=device.type,
        precision=_PRECISION[precision],
        devices=1 if device.index is None else [device.index],
    )


def agree(number: int, what: str) -> None:
    """Check that all processes found the same.

    Args:
        number: What this one found.
        what: Of which file, for the message.

    Raises:
        EnvironmentFailure: They did not, in all of them.
    """
    if _joined is None or size() == 1:
        return
    if len(set(_joined.all_gather(number).flatten().tolist())) > 1:
        raise EnvironmentFailure(f"{what} is not the same on every machine", "write to a disk that all of them share")


def averaged(values: Tensor) -> Tensor:
    """The mean over all processes of what each has."""
    if size() > 1:
        from torch.distributed import all_reduce

        all_reduce(values)
    return values / size()


def share(*values: Tensor) -> None:
    """Give all processes the first one's, such as BatchNorm's statistics, which each has of its own images."""
    if size() > 1:
        from torch.distributed import broadcast

        for value in values:
            broadcast(value, 0)


@contextmanager
def together() -> Iterator[None]:
    """Turn the failure of another process into one clear line.

    Raises:
        EnvironmentFailure: Another process has ended.
        SystemExit: The same, in all processes but the first, which says it for all.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if size() > 1 and any(word in text for word in ("gloo", "NCCL", "onnection", "peer")):
            if rank() > 0:
                raise SystemExit(EnvironmentFailure.exit_code) from None
            raise _DIED from None
        raise


def _leave() -> None:
    """End the connection's threads while Python still runs: one that outlives it can abort a process that succeeded."""
    from torch.distributed import destroy_process_group, is_initialized

    if is_initialized():
        destroy_process_group()


def _quiet() -> None:
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
