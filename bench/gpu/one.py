"""One GPU benchmark, in this process. Prints its figures, and writes them where it is told.

PYTHONPATH=.namespace:bench python -m gpu.one attention --budget-s 30
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--budget-s", type=float, default=60.0)
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    figures = importlib.import_module(f"gpu.{args.name}").measure(args.budget_s)
    text = json.dumps({name: float(figure) for name, figure in figures.items()}, indent=1)
    if args.result:
        args.result.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
