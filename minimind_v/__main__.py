"""`mmv`, and `python -m minimind_v`, which is how it starts its own processes."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of the installed `mmv`. Ctrl-C is heeded while the command line itself is still being imported."""
    try:
        _ensure_letters()
        from minimind_v.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


def _ensure_letters() -> None:
    """Start again in Python's UTF-8 mode where the locale has no letters for the names that rows and settings hold.

    Such are ASCII and Latin-1. A locale that has them, as GBK, stays; so does the terminal's encoding.
    """
    try:
        "é小".encode(sys.getfilesystemencoding())
    except UnicodeEncodeError:
        if os.name != "posix" or sys.flags.utf8_mode or not sys.executable:
            return
        terminal = getattr(sys.stdout, "encoding", None) or "ascii"
        if "ascii" not in terminal.lower() and terminal != "646":
            os.environ.setdefault("PYTHONIOENCODING", f"{terminal}:backslashreplace")
        os.environ["PYTHONUTF8"] = "1"  # of the processes that this one will start
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


if __name__ == "__main__":
    main()
