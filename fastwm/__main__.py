"""``python -m fastwm doctor | bench | demo``."""

from __future__ import annotations

import importlib
import sys

__all__ = ["COMMANDS", "main"]

# Each module has `main(argv) -> exit status`, and is imported when its command is asked for.
COMMANDS = {
    "doctor": ("fastwm.doctor", "versions, devices, and which engines run here or why they do not"),
    "bench": ("fastwm.bench.cli", "throughput against the peers, on the same work in one run"),
    "demo": ("fastwm.demo", "a world model of Pendulum-v1: train, plan in imagination, compare"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit status, or 2 when there is no such command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in COMMANDS:
        return int(importlib.import_module(COMMANDS[name][0]).main(rest))
    help_asked = name in ("-h", "--help")
    out = sys.stdout if help_asked else sys.stderr
    if name and not help_asked:
        print(f"fastwm: no command {name!r}.", file=out)
    print("usage: python -m fastwm COMMAND [ARGUMENTS]   (COMMAND --help says more)\n", file=out)
    for command, (_, what) in COMMANDS.items():
        print(f"  {command:<8}{what}", file=out)
    return 0 if help_asked else 2


if __name__ == "__main__":
    sys.exit(main())
