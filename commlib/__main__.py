"""python -m commlib is the commlib command."""

import sys

from commlib.commands import main

if __name__ == "__main__":
    sys.exit(main())
