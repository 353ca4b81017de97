"""``python -m wengert script.py [args]`` or ``python -m wengert -m module [args]``: run a program unchanged, but patched."""

from __future__ import annotations

import os
import runpy
import sys

from .patching import patched

USAGE = "usage: python -m wengert script.py [args ...]   or   python -m wengert -m module [args ...]"


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if arguments else 2)
    if arguments[0] == "-m":
        if len(arguments) < 2:
            sys.exit(USAGE)
        sys.argv = arguments[1:]
        with patched():
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    script = arguments[0]
    if not os.path.exists(script):
        sys.exit(f"wengert: no such file: {script}")
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # where Python itself would look first
    with patched():
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
