"""`python -m p2pcluster`."""

from __future__ import annotations

import sys

from p2pcluster.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
