"""Build the one-file submission: `python build_submission.py --dce --profile skc_competition -o DIR [--prove]`.

bundle -> bake -> fold -> sweep -> minify -> pack -> prove: one module of `packer` each.
Only `python-minifier` is needed beyond the standard library, and only here: the file that comes out does not need it.
"""

import argparse
import sys
from pathlib import Path

from packer.bundle import read_tree
from packer.deliver import commit_of, deliver, is_current
from packer.prove import proof_lines, prove
from packer.report import explain, table
from packer.steps import build
from packer.trees import BuildError


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--dce", action="store_true", help="fold and sweep; without it the whole system is packed")
    parser.add_argument("--prove", action="store_true", help="train source and packed file side by side, compare all")
    parser.add_argument("--trace", action="store_true", help="and tell which lines of the packed file no proof has run")
    parser.add_argument("--explain", metavar="NAME", help="say why a definition stayed or went, and stop")
    parser.add_argument("-o", "--output", default="submission", type=Path)
    return parser.parse_args(argv)


def main(argv):
    args, root = parse_arguments(argv), Path(__file__).resolve().parent
    try:
        files = read_tree(root)
        if args.dce and not args.explain and is_current(args.output, files, args.profile, args.prove, args.trace):
            sys.stdout.write(f"{args.output} is up to date\n")
            return 0
        b = build(files, args.profile, args.dce)
        if args.explain:
            sys.stdout.write(explain(b, args.explain) + "\n")
            return 0
        sys.stdout.write(table(b) + "\n")
        proof = prove(b, root, args.trace) if args.prove else None
        sys.stdout.write(proof_lines(proof) + deliver(b, args.output, proof, commit_of(root)) + "\n")
    except BuildError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
