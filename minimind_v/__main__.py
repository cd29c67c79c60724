"""The entry point of `mmv` and of `python -m minimind_v`, which starts the processes of a run."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the installed `mmv`. Ctrl-C also ends it cleanly while the command line is still being imported."""
    try:
        _ensure_letters()
        from minimind_v.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


def _ensure_letters() -> None:
    """Restart in Python's UTF-8 mode if the locale (ASCII, Latin-1) cannot encode the names in rows and settings.

    Another locale, such as GBK, is kept, and so is the encoding of the terminal.
    """
    try:
        "é小".encode(sys.getfilesystemencoding())
    except UnicodeEncodeError:
        if os.name != "posix" or sys.flags.utf8_mode or not sys.executable:
            return
        terminal = getattr(sys.stdout, "encoding", None) or "ascii"
        if "ascii" not in terminal.lower() and terminal != "646":
            os.environ.setdefault("PYTHONIOENCODING", f"{terminal}:backslashreplace")
        os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


if __name__ == "__main__":
    main()
