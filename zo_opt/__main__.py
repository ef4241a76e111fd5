"""``python -m zo_opt``."""

import sys

from zo_opt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
