"""Memory and speed of an epoch over a parquet set that is larger than what may be kept in memory.

    python examples/bench/streaming.py [--limit MIB] [--times N ...] [--json]

For each N, a set of noise images (PNG, so that files are as large as pixels) of N times the limit is written, and one
shuffled epoch of batches is made of it in a fresh process. The peak of the resident memory should not grow with N.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDE = 64


def write(folder: Path, images: int, rows: int) -> None:
    """A training set in Hugging Face's layout, with a small test set."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    random = np.random.default_rng(0)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())])
    for part, count in (("train", images), ("test", 64)):
        with pq.ParquetWriter(folder / f"{part}-00000-of-00001.parquet", schema) as writer:
            for start in range(0, count, rows):
                some = []
                for _ in range(min(rows, count - start)):
                    file = io.BytesIO()
                    noise = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                    Image.fromarray(noise).save(file, "PNG", compress_level=1)
                    some.append({"bytes": file.getvalue(), "path": None})
                labels = pa.array([(start + i) % 10 for i in range(len(some))])
                writer.write_table(pa.table([pa.array(some, kind), labels], schema=schema))


def epoch(folder: Path, limit: int) -> dict[str, float]:
    """Load and run through one shuffled epoch in this process: times, and resident MiB before and at the peak."""
    import torch

    from sdbctl import data

    begin = time.perf_counter()
    found = data.load(f"parquet:{folder}", root=folder, memory_limit=limit)
    loading = time.perf_counter() - begin
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    preprocess = data.Preprocess((0.5,) * 3, (0.5,) * 3, found.train.shape)
    begin, seen = time.perf_counter(), 0
    for batch in data.batches(
        found.train,
        preprocess,
        batch_size=64,
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
        augment="none",
        shuffle=True,
    ):
        seen += len(batch.y)
    usage = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "images": seen,
        "loading_seconds": round(loading, 1),
        "images_per_second": round(seen / (time.perf_counter() - begin), 1),
        "loaded_mib": round(before, 1),
        "peak_mib": round(usage[0], 1),
        "peak_worker_mib": round(usage[1], 1),
    }


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="Memory and speed of streamed parquet files.")
    parser.add_argument("--limit", type=int, default=16, help="MiB of pixels that may be kept")
    parser.add_argument("--times", type=int, nargs="+", default=[5, 20], help="sizes of the sets in limits")
    parser.add_argument("--rows", type=int, default=100, help="rows in a row group")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    limit = given.limit * 2**20
    if given.folder:
        print(json.dumps(epoch(given.folder, limit)))
        return
    results = {}
    for times in given.times:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), times * limit // (3 * SIDE**2), given.rows)
            again = [sys.executable, __file__, "--folder", folder, "--limit", str(given.limit)]
            done = subprocess.run(again, check=True, stdout=-1, env={**os.environ, "XDG_CACHE_HOME": folder})
            results[f"{times} x {given.limit} MiB"] = json.loads(done.stdout)
    if given.json:
        print(json.dumps(results, indent=2))
        return
    for name, row in results.items():
        print(f"{name:>14}: " + ", ".join(f"{key} {value:,}" for key, value in row.items()))


if __name__ == "__main__":
    main()
