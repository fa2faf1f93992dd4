"""``python -m jitmoe``: the command line."""

import sys

from jitmoe.cli.app import main

sys.exit(main())
