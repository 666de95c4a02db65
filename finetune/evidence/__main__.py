"""Entry of `python -m finetune.evidence`."""

import sys

from finetune.evidence.page import main

if __name__ == "__main__":
    sys.exit(main())
