"""The parts of `scripts/bench.py`: running nodes, measuring them, the cases, and the baseline that they are compared with."""
