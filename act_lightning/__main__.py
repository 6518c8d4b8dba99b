"""Starts the command line: `python -m act_lightning VERB`."""

import sys

try:
    from act_lightning.cli import main
except KeyboardInterrupt:  # torch and Lightning take seconds to import
    sys.exit("\ninterrupted before anything was begun")

if __name__ == "__main__":
    sys.exit(main())
