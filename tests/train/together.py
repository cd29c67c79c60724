"""Functions that several processes of a run call together: forks, which meet over gloo as those of `--gpus` do."""

from __future__ import annotations

import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minimind_v.core.train.distributed import World
from tests import fork_server

FOLDER = "TEST_FOLDER"  # the variable that names the folder of their answers


def together(function: Callable[[], None], folder: Path, size: int = 2) -> list[dict[str, Any]]:
    """Call a function of a module in several processes at once; returns what each has put into its answer."""
    port = str(random.Random(f"{os.getpid()} {folder}").randrange(20000, 40000))
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, FOLDER: str(folder)}
    processes = []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        errors = os.open(folder / f"errors{rank}", os.O_RDWR | os.O_CREAT)
        processes.append(fork_server.start([], [errors] * 3, os.environ | shared | own, prepare=function))
        os.close(errors)
    codes = [process.wait(120) for process in processes]
    assert codes == [0] * size, [(folder / f"errors{rank}").read_text() for rank in range(size)]
    return [torch.load(folder / f"answer{rank}", weights_only=False) for rank in range(size)]


@contextmanager
def meeting() -> Iterator[tuple[World, dict[str, Any]]]:
    """In such a function: the world, joined, and the answer. Behind it the process ends."""
    world, answer = World.find(), dict[str, Any]()
    try:
        world.join(torch.device("cpu"))
        yield world, answer
        torch.save(answer, Path(os.environ[FOLDER]) / f"answer{world.rank}")
        world.leave()
        sys.stderr.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
