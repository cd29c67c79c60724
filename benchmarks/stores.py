"""What it takes to open and read data of full size: rows, seconds and memory, each figure from a process of its own.

    python -m benchmarks.stores [--rows 600000] [--members 500000] [--parquet-rows 1300000] [--folder DIR]

Makes a JSONL of that many rows with a zip of that many members, and a parquet file with the pictures in its rows; then
measures the first opening, which indexes, the second, which does not, random reading, and a shuffled epoch. Pictures
are stand-ins of a few bytes: what is measured is finding them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROUNDS = 3
WORDS = "a the small large red green dog cat table window garden tree holding standing near bright".split()  # noqa: SIM905


def talk(rng: random.Random) -> list[dict[str, str]]:
    caption = " ".join(rng.choices(WORDS, k=30))
    return [{"role": "user", "content": "<image>\nWhat is shown?"}, {"role": "assistant", "content": caption}]


def make_jsonl(folder: Path, rows: int, members: int) -> None:
    rng = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            line = {"conversations": talk(rng), "image": f"GCC_train_{number % members:09d}.jpg"}
            file.write(json.dumps(line) + "\n")
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        for number in range(members):
            archive.writestr(zipfile.ZipInfo(f"images/GCC_train_{number:09d}.jpg"), b"%09d" % number)


def make_parquet(folder: Path, rows: int, group: int = 2000) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(1)
    schema = pa.schema([("conversations", pa.string()), ("image_bytes", pa.binary())])
    with pq.ParquetWriter(folder / "rows.parquet", schema) as writer:
        for begin in range(0, rows, group):
            numbers = range(begin, min(begin + group, rows))
            cells = [[json.dumps(talk(rng)) for _ in numbers], [b"%09d" % number for number in numbers]]
            writer.write_table(pa.table(cells, schema=schema))


# --- what a process measures ------------------------------------------------------------------------------------------


def measure(data: Path, images: Path | None) -> dict[str, float]:
    """Open and read; seconds, rows a second, and megabytes held at the most."""
    started = time.perf_counter()
    from minimind_v.core.data.stores import open_rows

    imported = time.perf_counter()
    rows = open_rows(data, images)
    opened = time.perf_counter()
    found = {"open s": opened - imported, "import s": imported - started}
    if data.suffix == ".parquet":
        import numpy as np

        order = rows.shuffled(np.random.default_rng(0))
        started, reads = time.perf_counter(), _count_reads(rows)
        for index in order:
            rows.row(int(index))
        found["epoch, rows/s"] = len(order) / (time.perf_counter() - started)
        found["reads of each row group"] = reads() / len(rows._text.groups)  # type: ignore[attr-defined]
    else:
        rng = random.Random(0)
        wanted = [rng.randrange(len(rows)) for _ in range(50_000)]
        started = time.perf_counter()
        read = [rows.row(index) for index in wanted]
        found["random, rows/s"] = len(wanted) / (time.perf_counter() - started)
        started = time.perf_counter()
        for index, row in zip(wanted[:10_000], read, strict=False):
            rows.picture(index, 0, row.images[0])
        found["random, pictures/s"] = 10_000 / (time.perf_counter() - started)
    found["memory MB"] = _peak_memory()
    return found


def _count_reads(rows) -> callable:
    count, read = [0], rows._text._read

    def counted(number):
        count[0] += 1
        return read(number)

    rows._text._read = counted
    return lambda: count[0]


def _peak_memory() -> float:
    """Of this process alone: `ru_maxrss` may begin with what its parent held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no /proc/self/status here")


def in_process(data: Path, images: Path | None) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.stores", "--measure", str(data), *([str(images)] if images else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def show(title: str, found: list[dict[str, float]]) -> None:
    figures = [f"{name} {statistics.median(one[name] for one in found):,.3g}" for name in found[0]]
    print(f"{title:<28}" + "   ".join(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--members", type=int, default=500_000)
    parser.add_argument("--parquet-rows", type=int, default=1_300_000)
    parser.add_argument("--folder", type=Path, help="where the data goes and stays")
    parser.add_argument("--measure", nargs="+", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], args.measure[1] if len(args.measure) > 1 else None)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "rows.parquet").exists():
            make_jsonl(folder, args.rows, args.members)
            make_parquet(folder, args.parquet_rows)
        data, images = folder / "rows.jsonl", folder / "pictures.zip"
        for kept in folder.glob(".*.index.npy"):
            kept.unlink()
        show("JSONL + zip, first", [in_process(data, images)])
        show("JSONL + zip, again", [in_process(data, images) for _ in range(ROUNDS)])
        show("parquet", [in_process(folder / "rows.parquet", None) for _ in range(ROUNDS)])


if __name__ == "__main__":
    main()
