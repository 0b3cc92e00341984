"""Deliberate errors in the kernels' reference, and in what decides that they are used."""

from tests.mutations.mutation import Mutation

MUTATIONS = [
    Mutation(
        "processor: all instructions for 16-bit products must be there",
        "ops/processor.py",
        "return any(",
        "return all(",
        "ops/test_processor.py::test_x86_multiplies_what_it_has_instructions_for",
    ),
    Mutation(
        "activation: exact GELU",
        "ops/gelu.py",
        'F.gelu(hidden_states, approximate="tanh")',
        'F.gelu(hidden_states, approximate="none")',
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
    Mutation(
        "three regions: pivots count like window keys",
        "ops/three_region_attention.py",
        "bonus = math.log(max(1, query.shape[2] // max(1, pivots.shape[1])))",
        "bonus = 0.0",
        "parity/cogview/test_sparse_attention.py::test_training_form_and_its_gradients_are_the_originals",
    ),
    Mutation(
        "three regions: the window is a block shorter",
        "ops/three_region_attention.py",
        "firsts = [max(0, start // window_size - num_windows + 1)",
        "firsts = [max(0, start // window_size - num_windows + 2)",
        "ops/test_three_region_attention.py::test_every_backend_is_the_definition",
    ),
    Mutation(
        "three regions: pivots of a longer row are seen by all",
        "ops/three_region_attention.py",
        "        if not equal[index]:",
        "        if False:",
        "ops/test_three_region_attention.py::test_every_backend_is_the_definition",
    ),
    Mutation(
        "three regions: parts are added without their sums",
        "ops/three_region_attention.py",
        "part_output * (part_sum - total).exp()[..., None]",
        "part_output / len(results)",
        "ops/test_three_region_attention.py::test_every_backend_is_the_definition",
    ),
    Mutation(
        "three regions: gradients through pivots forget their bonus",
        "ops/three_region_attention.py",
        "        sums - part.bonus,",
        "        sums,",
        "ops/test_three_region_attention.py::test_gradients_of_every_backend_are_those_of_the_definition",
    ),
    Mutation(
        "pivots: padding is drawn like all else",
        "ops/three_region_attention.py",
        "priority = torch.where(is_real, priority, priority - 2)",
        "pass",
        "ops/test_three_region_attention.py::test_padding_comes_in_last",
    ),
    Mutation(
        "int8: weights that changed are not read again",
        "ops/int8_linear.py",
        "if self._packed is None or self._packed[0] != state:",
        "if self._packed is None:",
        "ops/test_int8_linear.py::test_new_weights_are_read",
    ),
]
