"""`python -m stepdistill` is the command `stepdistill`."""

import sys

from .cli import main

sys.exit(main())
