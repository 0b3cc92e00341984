"""Deliberate errors in the kernels' reference."""

from tests.mutations.mutation import Mutation

MUTATIONS = [
    Mutation(
        "activation: exact GELU",
        "ops/gelu.py",
        'approximate="tanh"',
        'approximate="none"',
        "parity/cogview2/test_text_to_image.py",
    ),
    Mutation(
        "window: centred one row too far down",
        "ops/local_attention.py",
        "center_row = query_row // (query_grid[0] // key_grid[0])",
        "center_row = 1 + query_row // (query_grid[0] // key_grid[0])",
        "parity/cogview2/test_local_attention.py",
    ),
    Mutation(
        "window: one column short",
        "ops/local_attention.py",
        "(key_column - center_column).abs() <= kernel_size[1] // 2",
        "(key_column - center_column).abs() < kernel_size[1] // 2",
        "parity/cogview2/test_local_attention.py",
    ),
    Mutation(
        "window: keys outside the grid count as zeros",
        "ops/local_attention.py",
        "return inside & near",
        "return near",
        "parity/cogview2/test_local_attention.py",
    ),
]
