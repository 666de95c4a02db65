"""`python -m finetune.page RUN [RUN ...]`."""

import sys

from finetune.page.command import main

sys.exit(main())
