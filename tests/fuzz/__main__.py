"""`python -m tests.fuzz`: changed files of every format, for some minutes. Exit code 1 where one did harm.

python -m tests.fuzz --minutes 10 --seed 7        what `make fuzz` does, with another seed
python -m tests.fuzz --only jpeg png --cases 1000
python -m tests.fuzz --again out/fuzz/jpeg/7-12-hang    reads a case that was kept
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: forked workers have no threads of others

from tests.fuzz import readers, run


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Changed files of every format.")
    parser.add_argument("--minutes", type=float, default=10, help="for all formats together")
    parser.add_argument("--cases", type=int, default=10**9, help="at most, of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="FORMAT", choices=readers.FORMATS, help=", ".join(readers.FORMATS))
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="folder for cases that did harm")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--again", type=Path, metavar="DIR", help="read a case that was kept")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    if options.again:
        verdict = run.read_again(readers.FORMATS, options.again)
        print(f"{verdict.kind}: {verdict.where} {verdict.text}")
        return int(verdict.kind not in (run.DATA, run.ERROR))
    formats = {name: readers.FORMATS[name] for name in options.only or readers.FORMATS}
    loop = run.Loop(formats, options.seed, options.keep)
    try:
        share = options.minutes * 60 * options.jobs / len(formats)
        loop.run(share, options.cases, options.jobs, lambda line: print(line, file=sys.stderr))
    except KeyboardInterrupt:
        pass
    finally:
        loop.close()
    print(json.dumps(run.as_json(loop.report)) if options.json else run.table(loop.report))
    return int(bool(loop.report.faults))


if __name__ == "__main__":
    sys.exit(main())
