"""`python -m ueo_fast.cli`: the command `ueo-fast` without its script."""

import sys

from ueo_fast.cli import main

sys.exit(main())
