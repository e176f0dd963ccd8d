"""python -m records COMMAND: check, verify, compare, new, ledger, list, report."""

import sys

from records.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
