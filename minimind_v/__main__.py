"""`mmv`, and `python -m minimind_v`, which is how it starts its own processes."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the installed `mmv`. Ctrl-C is heeded while the command line itself is still being imported."""
    try:
        from minimind_v.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
