"""`python -m ueo_fast.cli`: the command `ueo-fast` without its script."""

import sys

from ueo_fast.cli import main

if __name__ == "__main__":  # processes that are started for a demonstration import it too
    sys.exit(main())
