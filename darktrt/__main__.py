"""``python -m darktrt``: the command line."""

import sys

from darktrt.cli import main

sys.exit(main())
