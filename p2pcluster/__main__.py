"""`python -m p2pcluster`."""

from __future__ import annotations

import sys

from p2pcluster.shadows import put_pythons_first

if __name__ == "__main__":
    try:
        put_pythons_first()
        from p2pcluster.cli import console

        code = console()
    except KeyboardInterrupt:  # while it is still loading
        code = 130
    sys.exit(code)
