"""A row that kills, in a module that a process imports in no time: without torch, without the rest of the tests."""

import os
import signal


def killed_by_some(rows, index):
    if index % 40 == 39:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows[index]
