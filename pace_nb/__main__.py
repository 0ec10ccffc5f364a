"""`python -m pace_nb` is `pace-nb`."""

from __future__ import annotations

import sys

from pace_nb.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
