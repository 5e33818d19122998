"""Atomic writes: a file is either complete under its name or not there at all."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sdbctl import team
from sdbctl.errors import BadInput, EnvironmentFailure, UsageError


def claim(path: Path, *, force: bool) -> Path:
    """Check that ``path`` can be written, before hours are spent on what goes into it.

    Args:
        path: The file to be written later.
        force: Whether an existing file may be replaced.

    Returns:
        ``path``, for chaining.

    Raises:
        UsageError: The file exists and ``force`` is off, or ``path`` is a folder.
        EnvironmentFailure: Its folder does not exist or cannot be written to.
    """
    if path.is_dir():
        raise UsageError(f"output {path} is a folder", "name a file")
    if path.exists() and not force:
        raise UsageError(f"output {path} already exists", "use --force to replace it")
    folder = path.parent
    if not folder.is_dir():
        raise EnvironmentFailure(f"output folder {folder} does not exist", "create it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write to folder {folder}: {error.strerror}", "choose another output"
        ) from None
    return path


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold ``path`` for this run, so that no other one writes it or what belongs to it.

    Of several processes that train together the first one holds it.

    Args:
        path: The file to be written later.

    Raises:
        UsageError: Another run holds it, or it is a folder.
        EnvironmentFailure: Its folder does not exist or cannot be written to.
    """
    claim(path, force=True)
    if team.rank() > 0:
        yield
        return
    with locked(path.with_name(f".{path.stem}.lock"), 0) as free:
        if not free:
            raise UsageError(f"another run is writing {path}", "wait for its end, or give another --output")
        yield


@contextmanager
def locked(marker: Path, seconds: float = -1) -> Iterator[bool]:
    """Hold a lock file that is there as long as it is held; some disks of clusters know no locks, and hold nobody up.

    Args:
        marker: The file.
        seconds: How long to wait for others, below zero for ever.

    Yields:
        Whether no other process is known to hold it.
    """
    from filelock import FileLock, Timeout

    lock, free = FileLock(marker, mode=0o600), True
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        free = False
    except (OSError, NotImplementedError):
        pass
    try:
        yield free
    finally:
        if lock.is_locked:
            marker.unlink(missing_ok=True)
            lock.release()


def write(
    path: Path,
    content: bytes | str | Callable[[Path], None],
    *,
    force: bool = True,
    everywhere: bool = False,
    private: bool = False,
) -> Path:
    """Write a file atomically: temporary file in the same folder, fsync, rename.

    Of several processes that train together usually only the first writes.

    Args:
        path: The file to write.
        content: Its bytes or text, or a function that writes them to the path it is given.
        force: Whether an existing file may be replaced.
        everywhere: Whether every process writes, and not only the first.
        private: Whether only its owner may read it.

    Returns:
        ``path``.

    Raises:
        UsageError: The file exists and ``force`` is off.
        EnvironmentFailure: The disk is full or the folder cannot be written to.
    """
    if team.rank() > 0 and not everywhere:
        return path
    claim(path, force=force)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o600 if private else 0o666 & ~mask)
        part.replace(path)
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write {path}: {error.strerror or error}", "free some space or choose another output"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return path


def read(path: Path, what: str) -> bytes:
    """Read a whole file.

    Args:
        path: The file.
        what: What it should be, for the message ("checkpoint", "key", …).

    Returns:
        Its bytes, at least one.

    Raises:
        BadInput: It is missing, no regular file, unreadable or empty.
    """
    try:
        # a pipe or a device may never end
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise BadInput(f"{what} {path} is a device or a pipe", "name a file")
        content = path.read_bytes()
    except IsADirectoryError:
        raise BadInput(f"{what} {path} is a folder", "name a file") from None
    except FileNotFoundError:
        raise BadInput(f"{what} {path} does not exist", "check the path") from None
    except OSError as error:
        raise BadInput(f"cannot read {what} {path}: {error.strerror}") from None
    if not content:
        raise BadInput(f"{what} {path} is empty", "the file was probably cut off; get it again")
    return content


def text(path: Path, what: str) -> str:
    """Read a whole text file; where it is none, nothing of it is shown, since a key may have been named by mistake.

    Raises:
        BadInput: As for :func:`read`, or it is not UTF-8.
    """
    try:
        return read(path, what).decode()
    except UnicodeDecodeError:
        raise BadInput(f"{what} {path} is not text", "check the path") from None


def sha256(content: bytes) -> str:
    """The SHA-256 of ``content`` in lower-case hex."""
    return hashlib.sha256(content).hexdigest()
