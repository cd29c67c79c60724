"""What it takes to open and read data of full size: rows, seconds and memory, each figure from a process of its own.

    python -m benchmarks.stores [--rows 600000] [--members 500000] [--parquet-rows 1300000] [--folder DIR]
    python -m benchmarks.stores --loader

Makes a JSONL of that many rows with a zip of that many members, and a parquet file with the pictures in its rows; then
measures the first opening, which indexes, the second, which does not, random reading, and a shuffled epoch. Pictures
are stand-ins of a few bytes: what is measured is finding them.

The loader is measured by the time that its process has a core: rows a second for one core, whoever else is busy, from
the file to the batch. Text alone the first time, which tokenises and keeps, and again; then, with kept tokens, rows
with a JPEG of some sizes, and with CLIP's features of the picture remembered as bf16.
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

from benchmarks.pictures import as_jpeg, photograph

ROUNDS = 3
TOKENIZER = Path(__file__).parents[1] / "minimind_v" / "core" / "demo" / "assets"
SHAPES = ((128, 128), (224, 224), (448, 336))  # of the loader's JPEGs; the published ones are 128²
SIZE, PATCHES = 224, 196  # what CLIP's ViT-B/16 is shown and gives
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


def make_loader_rows(folder: Path, count: int) -> None:
    """Rows of one picture each, `text.jsonl` of none, and a zip of JPEGs for each shape."""
    rng = random.Random(2)
    talks = [talk(rng) for _ in range(count)]
    for name in ("text", "pictures"):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number, (question, answer) in enumerate(talks):
                if name == "text":
                    question = question | {"content": "What is shown?"}
                image = {"image": f"{number}.jpg"} if name == "pictures" else {}
                file.write(json.dumps({"conversations": [question, answer]} | image) + "\n")
    for width, height in SHAPES:
        files = [as_jpeg(photograph(width, height, seed)) for seed in range(8)]
        with zipfile.ZipFile(folder / f"{width}x{height}.zip", "w") as archive:
            for number in range(count):
                archive.writestr(f"{number}.jpg", files[number % len(files)] + b"%d" % number)  # no two are the same


# --- what a process measures ------------------------------------------------------------------------------------------


def measure(data: Path, images: Path | None) -> dict[str, float]:
    """Open and read; seconds, rows a second, and megabytes held at the most."""
    started = time.perf_counter()
    from minimind_v.core.rows.stores import open_rows

    imported = time.perf_counter()
    rows = open_rows(data, images)
    opened = time.perf_counter()
    result = {"open s": opened - imported, "import s": imported - started}
    if data.suffix == ".parquet":
        import numpy as np

        order = rows.shuffled(np.random.default_rng(0))
        started, reads = time.perf_counter(), _count_reads(rows)
        for index in order:
            rows.row(int(index))
        result["epoch, rows/s"] = len(order) / (time.perf_counter() - started)
        result["reads of each row group"] = reads() / len(rows._text.groups)  # type: ignore[attr-defined]
    else:
        rng = random.Random(0)
        indices = [rng.randrange(len(rows)) for _ in range(50_000)]
        started = time.perf_counter()
        read = [rows.row(index) for index in indices]
        result["random, rows/s"] = len(indices) / (time.perf_counter() - started)
        started = time.perf_counter()
        for index, row in zip(indices[:10_000], read, strict=False):
            rows.picture(index, 0, row.images[0])
        result["random, pictures/s"] = 10_000 / (time.perf_counter() - started)
    result["memory MB"] = _peak_memory()
    return result


def measure_loader(folder: Path) -> dict[str, float]:
    """Rows for a second of one core."""
    import torch

    from minimind_v.core.data.dataset import RowDataset
    from minimind_v.core.data.feature_layout import Form
    from minimind_v.core.data.feature_store import FeatureStore, digest
    from minimind_v.core.data.loader import BatchPlan, load_batches
    from minimind_v.core.data.prompt import PromptEncoder
    from minimind_v.core.data.token_store import keep_tokens
    from minimind_v.core.data.tokenizer import Tokenizer
    from minimind_v.core.rows.stores import open_rows

    torch.set_num_threads(1)
    encoder = PromptEncoder(Tokenizer.load(TOKENIZER), PATCHES)

    def rate(name: str, images: Path | None, features: FeatureStore | None = None) -> float:
        dataset = RowDataset(open_rows(folder / f"{name}.jsonl", images), encoder, SIZE, 640)
        dataset.remembered = features
        plan = BatchPlan(dataset, 16, 0, seed=0, tokens=keep_tokens(dataset, name, folder, print))
        started = time.process_time()
        rows = sum(len(batch) for batch in load_batches(plan, 0))
        assert rows == len(dataset)
        return rows / (time.process_time() - started)

    rates = {"text, first": rate("text", None), "text": rate("text", None), "pictures, first": 0.0}
    first, *others = [folder / f"{width}x{height}.zip" for width, height in SHAPES]
    rates["pictures, first"] = rate("pictures", first)
    rates |= {path.stem: rate("pictures", path) for path in (first, *others)}
    store = FeatureStore(folder / "features" / "made", Form("bfloat16", PATCHES, 768), 2**40)
    rows = open_rows(folder / "pictures.jsonl", first)
    for number in range(len(rows)):
        store.write([digest(rows.picture(number, 0, f"{number}.jpg"))], torch.randn(1, PATCHES, 768))
    return rates | {"features": rate("pictures", first, store)}


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
    return _run(command)


def _run(command: list[str]) -> dict[str, float]:
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def show(title: str, results: list[dict[str, float]]) -> None:
    figures = [f"{name} {statistics.median(result[name] for result in results):,.3g}" for name in results[0]]
    print(f"{title:<28}" + "   ".join(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--members", type=int, default=500_000)
    parser.add_argument("--parquet-rows", type=int, default=1_300_000)
    parser.add_argument("--folder", type=Path, help="where the data goes and stays")
    parser.add_argument("--measure", nargs="+", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--loader", action="store_true", help="only the loader")
    parser.add_argument("--loader-rows", type=int, default=1024, help="rows that the loader reads [1024]")
    parser.add_argument("--measure-loader", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_loader:
        print(json.dumps(measure_loader(args.measure_loader)))
        return
    if args.measure:
        print(json.dumps(measure(args.measure[0], args.measure[1] if len(args.measure) > 1 else None)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        loader = folder / "loader"
        loader.mkdir(exist_ok=True)
        make_loader_rows(loader, args.loader_rows)
        for kept in loader.glob(".*tokens*"):
            kept.unlink()
        command = [sys.executable, "-m", "benchmarks.stores", "--measure-loader", str(loader)]
        show("loader, rows/s a core", [_run(command)])
        if args.loader:
            return
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
