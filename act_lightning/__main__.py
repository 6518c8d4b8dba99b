"""Starts the command line: `python -m act_lightning VERB`."""

import sys

from act_lightning.main import main

if __name__ == "__main__":
    sys.exit(main())
