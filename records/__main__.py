"""python -m records COMMAND

audit         check    anybody's record folder; executes nothing it inspects
verification  verify   scores a record again without network and compares
runs          compare, new, ledger, list, report   our own runs and what is written of them
"""

import sys

from records.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
