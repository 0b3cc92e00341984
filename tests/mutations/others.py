"""Deliberate errors in files beside the folders, and measuring speed."""

from tests.mutations.mutation import Mutation

MUTATIONS = [
    Mutation(
        "JSON lines: a byte order mark is part of the first",
        "json_lines.py",
        "line.removeprefix(codecs.BOM_UTF8)",
        "line",
        "test_json_lines.py::test_a_byte_order_mark_is_passed_over",
    ),
    Mutation(
        "JSON lines: other ends of lines stand in texts as they are",
        "json_lines.py",
        ".translate(_ENDS_OF_LINES)",
        "",
        "test_json_lines.py",
    ),
    Mutation(
        "speed: guidance is counted once",
        "speed/generation_speed.py",
        "sequences = batch_size * (2 if guided else 1)",
        "sequences = batch_size",
        "speed/test_speed.py::test_guidance_counts_twice_the_sequences",
    ),
]
