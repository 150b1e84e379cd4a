"""The parts of `scripts/bench.py`: running nodes, measuring processes, the cases, and the baseline to compare with."""
