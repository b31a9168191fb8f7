"""``python -m dnr_plugin`` is the ``dnr`` command."""

import sys

from .cli import main

sys.exit(main())
