"""``python -m jitmoe``: the command line."""

import sys

from jitmoe.cli import main

sys.exit(main())
