"""`python -m p2pcluster`."""

from __future__ import annotations

import sys

from p2pcluster.cli import console

if __name__ == "__main__":
    sys.exit(console())
