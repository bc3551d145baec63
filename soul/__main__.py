"""``python -m soul``: the command, as torchrun starts it."""

import sys

from soul.cli import main

sys.exit(main())
