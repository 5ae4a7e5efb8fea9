"""The former name of scripts.check_packing."""

import sys

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.verify")

from alpaca.common.errors import reported
from scripts.check_packing import main

if __name__ == "__main__":
    with reported("scripts.verify"):
        sys.exit(main())
