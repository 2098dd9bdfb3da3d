"""`python -m arctic_like` is `arctic-train`."""

import sys

from arctic_like.cli.main import main

sys.exit(main())
