"""python -m eval certify MODULE:CALLABLE --vocab N --tokens FILE.npy [--json]; python -m eval bench

`certify` judges an evaluator, a callable from a list of token ids to the nats of each token after the first. Prints the
verdict of every probe (eval/legality.py); exits 0 if legal, 1 if not, 2 if it cannot be judged. `bench` says what
scoring costs beside the model.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np

from eval.bench import bench
from eval.legality import Probes


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("bench")
    certify = commands.add_parser("certify")
    certify.add_argument("evaluator", metavar="MODULE:CALLABLE")
    certify.add_argument("--vocab", type=int, required=True, help="token ids are below this")
    certify.add_argument("--tokens", type=Path, required=True, help="a .npy of a few hundred token ids to probe on")
    certify.add_argument("--bos", type=int, default=1, help="the token that starts a document")
    certify.add_argument("--positions", type=int, default=6, help="positions probed of each kind")
    certify.add_argument("--json", action="store_true", help="print the certificate as JSON")
    a = parser.parse_args(arguments)
    if a.command == "bench":
        print(bench())
        return 0
    try:
        certificate = Probes(find(a.evaluator), a.vocab, read(a.tokens), a.bos, a.positions).certificate()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(certificate) if a.json else table(certificate))
    return 0 if certificate["legal"] else 1


def find(name: str) -> object:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, "")  # the evaluator lives where the command is run
    try:
        evaluator = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: no such evaluator ({error}); write MODULE:CALLABLE") from error
    if not callable(evaluator):
        raise ValueError(f"{name} is a {type(evaluator).__name__}, not a callable")
    return evaluator


def read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path}: no such file of tokens")
    tokens = np.load(path)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}, not one row of token ids")
    return tokens


def table(certificate: dict) -> str:
    probes = {name: verdict for name, verdict in certificate.items() if name != "legal"}
    lines = [f"{name} {v['status']:4} {json.dumps(v['evidence'])}" for name, v in probes.items()]
    return "\n".join([*lines, "legal" if certificate["legal"] else "ILLEGAL"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
