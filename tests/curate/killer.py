"""A row that kills, in a module that a process imports in no time: without torch, without the rest of the tests."""

import os
import signal


def killed_by_some(rows, index):
    if index % 40 == 39:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows[index]


def divided_by(rows, index):
    return 1 // rows[index]


class EndsItsReader:
    """Rows that end the process in which they are unpickled, as one without memory is ended."""

    def __len__(self):
        return 40

    def __reduce__(self):
        return os._exit, (9,)
