"""Entry point of `python -m launcher`, which is the same as `doccls-launch`."""

import sys

from launcher.cli import main

if __name__ == "__main__":
    sys.exit(main())
