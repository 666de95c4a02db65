"""`python -m benchmarks.peers [MODULE:CLASS]`."""

import sys

from benchmarks.peers.command import main

sys.exit(main())
