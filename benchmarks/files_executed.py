"""How many of our Python files one `generate` executes, and which: a measure of what has to be read to follow it.

Example: python benchmarks/files_executed.py models/reference --json files.json

Imports are not counted: each policy is run once before it is watched, so that what is left is calls of functions.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import expertshare
from expertshare import api
from expertshare.measure.report import write_json

PACKAGE = Path(expertshare.__file__).parent
POLICIES = (None, "des-vote:budget=16")
MODEL_DIRECTORY, PROMPT = "models/reference", "What is 7 plus 8?"


def executed(model: str, policy: str | None) -> dict[str, list[str]]:
    """The functions of ours that one `api.generate` calls, by file, loading the model included."""
    found: defaultdict[str, set[str]] = defaultdict(set)

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (path := Path(frame.f_code.co_filename)).is_relative_to(PACKAGE):
            found[str(path.relative_to(PACKAGE))].add(frame.f_code.co_qualname)

    api.generate(model, PROMPT, policy=policy, gen_length=32)
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        api.generate(model, PROMPT, policy=policy, gen_length=32)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return {file: sorted(functions) for file, functions in sorted(found.items())}


def main() -> None:
    """Count, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=MODEL_DIRECTORY)
    parser.add_argument("--json", metavar="FILE", help="write files and functions by policy")
    arguments = parser.parse_args()
    results = {policy or "default": executed(arguments.model, policy) for policy in POLICIES}
    for policy, files in results.items():
        print(f"{policy}: {len(files)} files, {sum(map(len, files.values()))} functions")
        for file, functions in files.items():
            print(f"  {len(functions):3d}  {file}")
    if arguments.json:
        counts = {policy: len(files) for policy, files in results.items()}
        write_json(arguments.json, {"files": counts, "functions": results})


if __name__ == "__main__":
    main()
