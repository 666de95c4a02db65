"""`python -m finetune.sweep FILE.toml`."""

import sys

from finetune.sweep.command import main

sys.exit(main())
