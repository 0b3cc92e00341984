"""Measure a pipeline on this machine, and what the machine could do: for `cogview2 bench` and `benchmarks/`."""
