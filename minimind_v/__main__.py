"""`python -m minimind_v` is `mmv`: how its own processes are started."""

from minimind_v.cli.app import main

main()
