"""``python -m soul``: the ``soul`` command, in the form that torchrun can start."""

import sys

from soul.cli import main

sys.exit(main())
