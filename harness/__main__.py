"""What surrounds a run and never ships: python -m harness COMMAND, and --help behind each

plan [field=value ...]         parameters, bytes, FLOPs and steps of a configuration: no data needed
profiles                       what each profile sets
generate FILE [--text TEXT]    text from a checkpoint or an artifact
load FILE                      an artifact read and checked, without data
export CHECKPOINT              the artifact of a checkpoint
follow RUN [--sample] [--proxy]  samples and proxies of the artifact from a run's checkpoints, while it trains
"""

import os
import sys

from harness.files import export_command, generate_command, load_command
from harness.follow import follow_command
from harness.plan import plan_command, profiles_command
from runtime.fields import nearest

COMMANDS = {
    "plan": plan_command,
    "profiles": profiles_command,
    "generate": generate_command,
    "load": load_command,
    "export": export_command,
    "follow": follow_command,
}


def main(argv: list[str], env: dict[str, str]) -> int:
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__.strip())
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise ValueError(f"no command {argv[0]!r}: {nearest(argv[0], COMMANDS)}")
        return COMMANDS[argv[0]](argv[1:], env) or 0
    except (ValueError, TimeoutError, MemoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
