"""One GPU benchmark, in this process. Prints its figures, and writes them where it is told.

PYTHONPATH=.namespace:bench python -m gpu.one attention --budget-s 30
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from gpu.harness import FAILED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--budget-s", type=float, default=60.0)
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    figures = importlib.import_module(f"gpu.{args.name}").measure(args.budget_s)
    text = json.dumps({name: float(figure) for name, figure in figures.items()}, indent=1)
    if args.result:
        whole = args.result.with_suffix(".part")  # or nothing, if this is killed
        whole.write_text(text)
        whole.rename(args.result)
    print(text)
    for part in FAILED:
        print(f"failed: {part}", file=sys.stderr)
    return int(bool(FAILED))


if __name__ == "__main__":
    sys.exit(main())
