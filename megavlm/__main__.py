"""``python -m megavlm``: the same as the console script ``megavlm``."""

import sys

from megavlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
