"""Plots of what training, evaluation and benchmarks write down."""
