"""Run the keeper as ``python -m rlgov.hardware.keeper``."""

from __future__ import annotations

from rlgov.hardware.keeper.main import main

if __name__ == "__main__":
    main()
