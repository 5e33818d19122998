"""Encoded images in parquet files: in order from there, in any order from a flat copy."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdbctl import files
from sdbctl.data.images import Array
from sdbctl.errors import BadInput, EnvironmentFailure


class Rows:
    """The encoded images of parquet files, by row; a row group is read at a time, so best asked for in order.

    Args:
        sources: The files.
        columns: The name of each file's struct column with a field ``bytes``.
    """

    def __init__(self, sources: list[Path], columns: list[str]) -> None:
        import pyarrow.parquet as pq

        self.sources = list(zip(sources, columns, strict=True))
        groups = []
        for file, column in self.sources:
            metadata = pq.read_metadata(file)
            groups += [(file, column, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
        self.groups = [(file, column, group) for file, column, group, _ in groups]
        self.starts = np.cumsum([0, *(rows for *_, rows in groups)])
        self._cached: dict[int, tuple[int, Any]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, position: int) -> bytes | None:
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        # one for each thread, or threads would take turns in reading each other's again
        own, rows = self._cached.get(threading.get_ident(), (-1, None))
        if own != number:
            rows = self._read(number)
            self._cached[threading.get_ident()] = number, rows
        content: bytes | None = rows[position - int(self.starts[number])].as_py()
        return content

    def flat(self, notice: Callable[[str], None]) -> Flat:
        """The same images in a flat file in the user's cache folder, where they are copied once.

        Of a row group, images in random order would each cost the whole.

        Args:
            notice: Is told before much is written.

        Raises:
            BadInput: A file cannot be read.
            EnvironmentFailure: The cache folder cannot be written to, or its disk is too small.
        """
        stats = [(str(file.resolve()), column, file.stat()) for file, column in self.sources]
        size = sum(stat.st_size for *_, stat in stats) / 2**30
        about = json.dumps([(name, column, stat.st_size, stat.st_mtime_ns) for name, column, stat in stats])
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdbctl"
        path = folder / f"{files.sha256(about.encode())[:32]}.images"
        index = path.with_suffix(".npy")
        ends = np.zeros(len(self), dtype=np.int64)

        def copy(part: Path) -> None:
            with part.open("wb") as out:
                for number, start in enumerate(self.starts[:-1]):
                    for row, content in enumerate(self._read(number), start):
                        out.write(content.as_py() or b"")
                        ends[row] = out.tell()

        def save(part: Path) -> None:
            with part.open("wb") as out:
                np.save(out, ends)

        try:
            folder.mkdir(parents=True, exist_ok=True)
            # of several processes one writes; each machine has its own copy
            with files.locked(path.with_suffix(".lock")):
                if not index.exists() or not path.exists():
                    if shutil.disk_usage(folder).free < size * 2**30:
                        raise OSError(f"{size:.1f} GiB of images do not fit")
                    notice(f"copying {size:.1f} GiB of images to {folder}, once, to have them in any order")
                    files.write(path, copy, everywhere=True, private=True)
                    files.write(index, save, everywhere=True, private=True)
            return Flat(path, np.load(index))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EnvironmentFailure(
                f"cannot use {path}: {reason}", "delete it, or set XDG_CACHE_HOME to another disk"
            ) from None

    def _read(self, number: int) -> Any:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        file, column, group = self.groups[number]
        try:
            table = pq.ParquetFile(file).read_row_group(group, columns=[column], use_threads=False)
        except (OSError, ValueError) as error:
            raise BadInput(f"{file} cannot be read: {str(error).splitlines()[0][:100]}") from None
        return pc.struct_field(table.column(0), "bytes")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": {}}


@dataclass(frozen=True)
class Flat:
    """Encoded images one after another in a file, each of which is one read.

    Attributes:
        path: The file.
        ends: Where each image ends, int64 [N].
    """

    path: Path
    ends: Array

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, position: int) -> bytes | None:
        start = int(self.ends[position - 1]) if position else 0
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(int(self.ends[position]) - start) or None
        except OSError as error:
            raise EnvironmentFailure(f"{self.path} cannot be read: {error.strerror}", "run it again") from None
