"""python -m commlib.launch is commrun."""

import sys

from commlib.launch import main

if __name__ == "__main__":
    sys.exit(main())
