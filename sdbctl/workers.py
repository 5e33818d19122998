"""Where the students of an evaluation are trained: here, in processes side by side, or on a cluster."""

from __future__ import annotations

import json
import pickle
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdbctl import files
from sdbctl.attacks import ATTACKS
from sdbctl.cells import Bench, Cell, Outcome
from sdbctl.errors import EnvironmentFailure, SdbError
from sdbctl.report import codec
from sdbctl.suites import BY_NAME
from sdbctl.training import Progress


@dataclass(frozen=True)
class _Kept:
    """The file of one student; the row is for who looks into it."""

    row: str
    outcome: Outcome


def run_cells(bench: Bench, cells: Iterable[Cell], folder: Path | None, progress: Progress) -> dict[str, Outcome]:
    """Train the students of ``cells``, each once, and keep each outcome as a file.

    Args:
        bench: What to train with.
        cells: Which students.
        folder: Where outcomes are kept; those that are there already are read, so a killed run resumes.
        progress: Advanced by one per student, and by what it takes.
    """
    done: dict[str, Outcome] = {}
    todo: list[Cell] = []
    there = 0.0
    for cell in {cell.id: cell for cell in cells}.values():
        stored = _stored(bench, cell, folder)
        if stored:
            done[cell.id] = stored
            there += bench.work(cell)
            bench.spent.earlier.setdefault(cell.id, stored.seconds)
            bench.spent.memory = max(bench.spent.memory, stored.memory)
        else:
            todo.append(cell)
    if done:
        progress.note(f"{len(done)} students were trained before")
        progress.advance(len(done), {}, there)

    def finish(cell: Cell, outcome: Outcome) -> None:
        done[cell.id] = outcome
        bench.spent.earlier[cell.id] = 0.0
        bench.spent.memory = max(bench.spent.memory, outcome.memory)
        if folder is not None:
            _keep(bench, cell, outcome, folder)
        progress.advance(1, {"validation": outcome.validation}, bench.work(cell))

    # those who hold weights train more than one network: begun last, they would be waited for
    todo.sort(key=lambda cell: (-bench.work(cell), -ATTACKS[BY_NAME[cell.row].attack].access))
    jobs = min(bench.config.jobs, len(todo))
    if bench.config.cluster and todo:
        assert folder is not None
        _on_cluster(bench, todo, folder, finish)
    elif jobs <= 1:
        # the last of many has the threads of the others, whose number decides how sums are rounded
        with as_worker(bench.config.jobs):
            _finish_all(((cell, partial(bench.run, cell)) for cell in todo), finish, progress.note)
    else:
        with workers(bench) as pool:
            running = {pool.submit(_work, cell): cell for cell in todo}
            _finish_all(((running[future], future.result) for future in as_completed(running)), finish, progress.note)
    return done


def _finish_all(
    trained: Iterable[tuple[Cell, Callable[[], Outcome]]],
    finish: Callable[[Cell, Outcome], None],
    note: Callable[[str], None],
) -> None:
    """Collect outcomes. A student that fails does not cost the others, whose outcomes are kept; then it is an error."""
    failed: Exception | None = None
    for cell, outcome in trained:
        try:
            result = outcome()
        except (BrokenProcessPool, EnvironmentFailure):
            raise
        except Exception as error:
            note(f"{cell.row} failed, the others go on: {error}")
            if isinstance(error, SdbError):
                error.message = f"{cell.row}: {error.message}"
            failed = failed or error
        else:
            finish(cell, result)
    if failed:
        raise failed


_open: ContextVar[tuple[Bench, ProcessPoolExecutor] | None] = ContextVar("_open", default=None)


def threads_of(jobs: int) -> int:
    """Threads of each of some processes side by side."""
    return max(1, torch.get_num_threads() // jobs)


@contextmanager
def as_worker(jobs: int) -> Iterator[None]:
    """Compute with as many threads as each of some processes side by side has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_of(jobs))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def workers(bench: Bench) -> Iterator[ProcessPoolExecutor]:
    """The processes that train students of a bench; those within share them, so that they start once."""
    import multiprocessing

    known = _open.get()
    if known is not None and known[0] is bench:
        yield known[1]
        return
    jobs = bench.config.jobs
    # each starts when there is work for it
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker, (bench, threads_of(jobs)))
    before = _open.set((bench, pool))
    try:
        yield pool
    except BrokenProcessPool:
        raise EnvironmentFailure(
            "a process that trained a student was ended, perhaps for lack of memory", "run it again with fewer --jobs"
        ) from None
    finally:
        _open.reset(before)
        # shutdown forgets them, and the interpreter would wait for those that are busy
        started = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.terminate()


_bench: Bench | None = None


def _start_worker(bench: Bench, threads: int) -> None:
    import signal

    global _bench
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _bench = bench


def _work(cell: Cell) -> Outcome:
    assert _bench is not None
    return _bench.run(cell)


def cluster_library() -> Any:
    """The module submitit.

    Raises:
        EnvironmentFailure: It is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise EnvironmentFailure("--cluster needs submitit", "in its source: pip install '.[cluster]'") from None
    return submitit


def _on_cluster(bench: Bench, todo: Sequence[Cell], folder: Path, finish: Callable[[Cell, Outcome], None]) -> None:
    """Share the students among jobs of a cluster, which leave an outcome file each.

    The jobs read images, networks and the key's pattern from a folder that only its owner can read and that is
    removed at the end.
    """
    submitit = cluster_library()
    with tempfile.TemporaryDirectory(prefix=".cluster-", dir=folder.parent) as private:
        shared = Path(private) / "bench"
        shared.touch(mode=0o600)
        shared.write_bytes(pickle.dumps(bench))
        executor = submitit.AutoExecutor(folder=private, cluster=bench.config.cluster)
        executor.update_parameters(name="sdbctl", timeout_min=24 * 60, cpus_per_task=torch.get_num_threads())
        if bench.engine.device.type == "cuda":
            executor.update_parameters(gpus_per_node=1)
        count = min(max(1, bench.config.jobs), len(todo))
        jobs = [executor.submit(work_through, shared, todo[number::count], folder) for number in range(count)]
        try:
            left = list(todo)
            while left:
                over = all(job.done() for job in jobs)
                for cell in list(left):
                    outcome = _stored(bench, cell, folder)
                    if outcome is not None:
                        left.remove(cell)
                        finish(cell, outcome)
                if left and over:
                    failed = next((error for job in jobs if (error := job.exception()) is not None), None)
                    lines = [
                        line for line in str(failed).splitlines() if re.match(r"[\w.]+(Error|Exception|Input)\b", line)
                    ]
                    reason = lines[-1] if lines else f"{failed or 'no reason was given'}".splitlines()[0]
                    raise SdbError(f"{len(left)} students were not trained: {reason}", "run it again; it resumes")
                time.sleep(0.5 if left else 0)
        finally:
            for job in jobs:
                if not job.done():
                    job.cancel(check=False)


def work_through(shared: Path, cells: Sequence[Cell], folder: Path) -> None:
    """What one cluster job does: train its students, each into a file."""
    bench: Bench = pickle.loads(shared.read_bytes())
    left = ((cell, partial(bench.run, cell)) for cell in cells if _stored(bench, cell, folder) is None)
    _finish_all(left, lambda cell, outcome: _keep(bench, cell, outcome, folder), print)


def _keep(bench: Bench, cell: Cell, outcome: Outcome, folder: Path) -> None:
    files.write(folder / f"{bench.key(cell)}.json", json.dumps(codec.encode(_Kept(cell.row, outcome))))


def _stored(bench: Bench, cell: Cell, folder: Path | None) -> Outcome | None:
    if folder is None:
        return None
    try:
        content = codec.parse((folder / f"{bench.key(cell)}.json").read_bytes())
        return codec.decode(_Kept, content).outcome
    except (OSError, ValueError, RecursionError):
        return None
