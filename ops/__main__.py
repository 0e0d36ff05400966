"""``python -m ops``: the command ``jitops`` where its script is not on PATH."""

from __future__ import annotations

import sys

from ops._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
