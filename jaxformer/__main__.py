"""Runs the command line: `python -m jaxformer`."""

import sys

from jaxformer import cli

if __name__ == "__main__":
    sys.exit(cli.main())
