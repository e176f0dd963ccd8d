"""What surrounds a run and never ships: python -m harness COMMAND, and --help behind each

plan [field=value ...]         parameters, bytes, FLOPs and steps of a configuration: no data needed
profiles                       what each profile sets
generate FILE [--text TEXT]    text from a checkpoint or an artifact
chat FILE [--ask TEXT]         a talk with a chat model
load FILE                      an artifact read and checked, without data
export CHECKPOINT              the artifact of a checkpoint
follow RUN [--sample] [--proxy]  samples and proxies of the artifact from a run's checkpoints, while it trains
probe [--seconds S] [field=value ...]  the batch that fits and the compiler's mode that pays, tried on this machine
preflight [--measure S] [--json] [field=value ...]  whatever could fail later, tried now
supervise [options] -- COMMAND   a run that may be left alone: watched, told of, published, ended when it hangs
ablate MANIFEST ... [--dry-run]  variants against a base in stages, with paired seeds: keep, retest or discard
sweep MANIFEST [--search-only]  a space searched by Optuna, then its best against the base as above
certify --script FILE --artifact FILE --data DIR   the probes of legality on the file that ran and what it wrote
"""

import os
import sys
from importlib import import_module

from runtime.fields import nearest

COMMANDS = {  # where each stands: one that only watches needs no tensors, and its memory is the run's
    "plan": "harness.plan",
    "profiles": "harness.plan",
    "preflight": "harness.preflight",
    "probe": "harness.probe",
    "generate": "harness.files",
    "chat": "harness.chat",
    "load": "harness.files",
    "export": "harness.files",
    "follow": "harness.follow",
    "supervise": "harness.supervise",
    "certify": "harness.certify",
    "ablate": "harness.ablate",
    "sweep": "harness.sweep",
}


def main(argv: list[str], env: dict[str, str]) -> int:
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__.strip())
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise ValueError(f"no command {argv[0]!r}: {nearest(argv[0], COMMANDS)}")
        command = getattr(import_module(COMMANDS[argv[0]]), f"{argv[0]}_command")
        return command(argv[1:], env) or 0
    except (ValueError, TimeoutError, MemoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
