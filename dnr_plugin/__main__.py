"""``python -m dnr_plugin`` is the ``dnr`` command."""

import sys

from dnr_plugin.cli.main import main

sys.exit(main())
