"""``python -m palette`` is the ``palette`` command."""

from __future__ import annotations

import sys

from palette.cli import main

sys.exit(main())
