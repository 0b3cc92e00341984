"""Curves from files of results, as stops and mistakes leave them."""

import json
import math

import pytest

from cogview_pipelines.plots.series import Curve, read_panels, smooth


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def by_name(panels):
    return {panel.name: panel for panel in panels}


def test_every_number_of_a_run_is_a_curve_over_steps(tmp_path):
    write(
        tmp_path / "run" / "metrics.jsonl",
        {"step": 10, "loss": 3.0, "learning_rate": 0.1, "samples_per_second": 5, "note": "text", "flag": True},
        {"step": 20, "loss": 2.0, "learning_rate": 0.2, "samples_per_second": 6},
    )
    panels = by_name(read_panels([tmp_path / "run"]))
    assert list(panels) == ["loss", "learning_rate", "samples_per_second"]
    assert panels["loss"].x_label == "step"
    assert panels["loss"].curves == [Curve("run", [(10.0, 3.0), (20.0, 2.0)])]


def test_cut_lines_are_passed_over_and_what_is_no_number_is_a_gap(tmp_path):
    lines = ['{"step": 1, "loss": 4}', '{"step": 2, "loss": null}', '{"step": 3, "loss": NaN, "image_loss": 1}']
    file = write(tmp_path / "metrics.jsonl", *lines, '{"step": 4, "loss": Infinity}', '{"step": 5, "lo')
    panels = by_name(read_panels([file]))
    (curve,) = panels["loss"].curves
    assert [x for x, _ in curve.points] == [1, 2, 3, 4]
    assert curve.points[0][1] == 4 and not any(math.isfinite(y) for _, y in curve.points[1:])
    assert panels["image_loss"].curves[0].points == [(3.0, 1.0)]  # missing before is no gap


def test_of_a_step_that_was_made_again_the_later_line_counts(tmp_path):
    lines = [{"step": 1, "loss": 4}, {"step": 2, "loss": 9}, {"step": 2, "loss": 3}]
    assert read_panels([write(tmp_path / "metrics.jsonl", *lines)])[0].curves[0].points == [(1.0, 4.0), (2.0, 3.0)]


def test_runs_stand_side_by_side_under_the_shortest_names_that_differ(tmp_path):
    for name in ("a/run", "b/run", "c/other"):
        write(tmp_path / name / "metrics.jsonl", {"step": 1, "loss": 1.0})
    (panel,) = read_panels([tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c" / "other"])
    assert [curve.label for curve in panel.curves] == ["a/run", "b/run", "c/other"]
    assert [curve.label for curve in read_panels([tmp_path / "a" / "run", tmp_path / "c" / "other"])[0].curves] == [
        "run",
        "other",
    ]


def test_fid_is_a_curve_over_the_blur_and_other_figures_have_their_errors(tmp_path):
    figures = {
        "fid_8": {"value": 5.0, "standard_error": None},
        "fid_0": {"value": 9.0, "standard_error": 0.5},
        "inception_score": {"value": 20.0, "deviation_over_splits": 1.5},
        "caption_loss": {"value": 2.5, "standard_error": 0.1},
    }
    write(tmp_path / "mine" / "evaluation.json", {"settings": {}, "figures": figures})
    panels = by_name(read_panels([tmp_path / "mine"]))
    assert panels["FID"].curves[0].points == [(0.0, 9.0), (8.0, 5.0)]
    assert panels["FID"].curves[0].errors[0] == 0.5 and math.isnan(panels["FID"].curves[0].errors[1])
    assert panels["inception_score"].curves[0].errors == [1.5]
    assert panels["caption_loss"].curves == [Curve("mine", [(0.0, 2.5)], [0.1])]


def test_lines_of_a_benchmark_are_bars_or_curves_over_a_field(tmp_path):
    rows = [
        {"case": "a", "batch_size": 4, "speed": 8.0, "stages": {"first": 0.5}},
        {"case": "a", "batch_size": 1, "speed": 3.0},
        {"case": "b", "batch_size": 1, "speed": 2.0},
    ]
    file = write(tmp_path / "bench.jsonl", *rows)
    bars = by_name(read_panels([file]))
    assert [curve.label for curve in bars["speed"].curves] == ["a", "a", "b"]
    assert by_name(read_panels([file, file]))["speed"].curves[2].label == "bench: b"
    assert bars["stages.first"].curves[0].points == [(0.0, 0.5)]
    curves = by_name(read_panels([file], x="batch_size"))
    assert curves["speed"].x_label == "batch_size"
    assert [curve.points for curve in curves["speed"].curves] == [[(1.0, 3.0), (4.0, 8.0)], [(1.0, 2.0)]]


def test_measures_by_the_number_of_candidates_are_a_curve_for_each_scorer(tmp_path):
    curves = {
        "caption_loss": {"10": {"fid_0": {"value": 2.0}}, "2": {"fid_0": {"value": 3.0, "standard_error": 0.1}}},
        "clip": {"2": {"fid_0": {"value": 4.0}}},
    }
    (panel,) = read_panels([write(tmp_path / "out" / "candidates.json", {"curves": curves})])
    assert (panel.name, panel.x_label) == ("fid_0", "candidates")
    assert [curve.label for curve in panel.curves] == ["out: chosen by caption_loss", "out: chosen by clip"]
    assert panel.curves[0].points == [(2.0, 3.0), (10.0, 2.0)]


def test_smoothing_takes_means_of_the_last_points_and_passes_over_gaps():
    points = [(1, 2.0), (2, 4.0), (3, math.nan), (4, 8.0)]
    assert smooth(points, 2) == [(1, 2.0), (2, 3.0), (3, 4.0), (4, 8.0)]
    assert math.isnan(smooth([(1, math.nan)], 3)[0][1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", "", "has no numbers to plot"),
        ("metrics.jsonl", '{"step": 1, "loss": null}', "has no numbers to plot"),
        ("evaluation.json", "{", "is no file of results"),
        ("evaluation.json", "[1, 2]", "is no file of results"),
        ("candidates.json", '{"curves": {"clip": {"many": {}}}}', "is no file of results"),
        ("candidates.json", '{"curves": {"clip": 3}}', "is no file of results"),
        ("notes.txt", "words", "must be a folder"),
    ],
)
def test_files_of_something_else_are_named(tmp_path, name, content, message):
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as raised:
        read_panels([file])
    assert str(file) in str(raised.value)


def test_missing_files_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        read_panels([tmp_path])
    with pytest.raises(ValueError, match="there is no file or folder"):
        read_panels([tmp_path / "none"])
