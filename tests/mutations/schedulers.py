"""Deliberate errors in the schedules of passes."""

from tests.mutations.mutation import Mutation

MUTATIONS = [
    Mutation(
        "schedule: one cell of the grid differs",
        "schedulers/scheduling_lopar.py",
        "(2, 3, 4, 5, -1, 1),",
        "(2, 3, 4, 5, -1, 2),",
        "parity/cogview2/test_super_resolution.py",
    ),
    Mutation(
        "schedule: the unused first top-k is used",
        "schedulers/scheduling_lopar.py",
        "RELEASED_TOP_K = (40, 40, 40, 20, 20, 10)",
        "RELEASED_TOP_K = (60, 40, 40, 40, 20, 20)",
        "parity/cogview2/test_super_resolution.py",
    ),
    Mutation(
        "schedule: cells of a pass are visible in it",
        "schedulers/scheduling_lopar.py",
        "return self.step_map(height, width) >= timestep",
        "return self.step_map(height, width) > timestep",
        "parity/cogview2/test_super_resolution.py",
    ),
    Mutation(
        "schedule: joined steps take the last top-k",
        "schedulers/scheduling_lopar.py",
        "top_k[group - 1] = max(top_k[group - 1], self._top_k(entry))",
        "top_k[group - 1] = self._top_k(entry)",
        "schedulers/test_scheduling_lopar.py::test_joined_steps_take_the_largest_top_k_and_keep_the_temperatures",
    ),
    Mutation(
        "schedule: a step takes the top-k before its own",
        "schedulers/scheduling_lopar.py",
        "else top_k[timestep - 1]",
        "else top_k[timestep - 2]",
        "parity/cogview2/test_sampling.py::test_iterative_super_resolution_samples_as_the_original_in_every_pass",
    ),
    Mutation(
        "schedule: a step changes its argument",
        "schedulers/scheduling_lopar.py",
        "sample = sample.clone()",
        "pass",
        "schedulers/test_scheduling_lopar.py::test_step_draws_the_given_cells_and_leaves_the_rest_and_the_arguments",
    ),
]
