"""Deliberate errors in plots."""

from tests.mutations.mutation import Mutation

MUTATIONS = [
    Mutation(
        "plots: of a step that was made again the first line counts",
        "plots/series.py",
        'row for row in rows if isinstance(row.get("step"), int)}',
        'row for row in reversed(rows) if isinstance(row.get("step"), int)}',
        "plots/test_series.py::test_of_a_step_that_was_made_again_the_later_line_counts",
    ),
    Mutation(
        "plots: a line with NaN is passed over as a whole",
        "plots/series.py",
        "allow_nan=True",
        "allow_nan=False",
        "plots/test_series.py::test_cut_lines_are_passed_over_and_what_is_no_number_is_a_gap",
    ),
    Mutation(
        "plots: means stop at a gap",
        "plots/series.py",
        "index + 1] if math.isfinite(y)]",
        "index + 1]]",
        "plots/test_series.py::test_smoothing_takes_means_of_the_last_points_and_passes_over_gaps",
    ),
    Mutation(
        "plots: numbers of candidates are sorted as texts",
        "plots/series.py",
        "key=lambda pair: int(pair[0])",
        "key=lambda pair: pair[0]",
        "plots/test_series.py::test_measures_by_the_number_of_candidates_are_a_curve_for_each_scorer",
    ),
    Mutation(
        "plots: runs of the same folder name have one name",
        "short_names.py",
        "if len(set(names)) == len(set(parts)):",
        "if names:",
        "plots/test_series.py::test_runs_stand_side_by_side_under_the_shortest_names_that_differ",
    ),
    Mutation(
        "plots: every SVG file has other ids",
        "plots/drawing.py",
        '"svg.hashsalt": "cogview_pipelines",',
        "",
        "cli/test_plot.py::test_the_same_numbers_are_the_same_file",
    ),
]
