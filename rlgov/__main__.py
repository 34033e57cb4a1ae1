"""Run the command line as ``python -m rlgov``."""

from __future__ import annotations

from rlgov.cli import main

if __name__ == "__main__":
    main()
