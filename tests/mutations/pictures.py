"""Deliberate errors in the reading and writing of pictures."""

from tests.mutations.mutation import Mutation

MUTATIONS = [
    Mutation(
        "orientation: turned the other way",
        "pictures/files.py",
        "6: Image.Transpose.ROTATE_270",
        "6: Image.Transpose.ROTATE_90",
        "pictures/test_files.py::test_each_orientation_is_undone_as_pil_does",
    ),
    Mutation(
        "size: a picture of just the limit is refused",
        "pictures/files.py",
        "if width * height > most_pixels:",
        "if width * height >= most_pixels:",
        "pictures/test_files.py::test_one_pixel_over_the_limit_is_too_many",
    ),
    Mutation(
        "masks: transparency marks what stays",
        "pictures/files.py",
        "opacity.point(lambda value: 255 - value)",
        "opacity",
        "pictures/test_files.py::test_a_mask_is_what_is_bright_or_what_is_transparent",
    ),
    Mutation(
        "colours: a profile is passed over",
        "pictures/colours.py",
        "image = transform.apply(image)",
        "image = image.copy()",
        "pictures/test_files.py::test_pictures_of_other_primaries_become_srgb",
    ),
    Mutation(
        "colours: 16 bits become too bright",
        "pictures/colours.py",
        "value * (1 / 256)",
        "value * (1 / 250)",
        "pictures/test_files.py::test_sixteen_bits_are_scaled",
    ),
    Mutation(
        "colours: transparent is black",
        "pictures/colours.py",
        'Image.new("RGBA", image.size, "white")',
        'Image.new("RGBA", image.size, "black")',
        "pictures/test_files.py::test_on_white_shows_what_is_seen_on_a_page",
    ),
    Mutation(
        "PNG: a failed save leaves an unfinished file",
        "pictures/png.py",
        "unfinished.unlink(missing_ok=True)",
        "pass",
        "pictures/test_png.py::test_a_failure_leaves_the_old_file_and_nothing_else",
    ),
    Mutation(
        "PNG: metadata without a look at their checksum",
        "pictures/png.py",
        'if zlib.crc32(kind + data) != int.from_bytes(whole[-4:], "big"):',
        "if not whole:",
        "pictures/test_png.py::test_a_changed_byte_of_the_metadata_is_noticed",
    ),
    Mutation(
        "PNG: unfinished files of others stay for ever",
        "pictures/png.py",
        "(match[1] in own or path.stat().st_mtime < time.time() - _ABANDONED)",
        "match[1] in own",
        "pictures/test_png.py::test_after_a_day_nobody_is_writing",
    ),
    Mutation(
        "sizes: the left upper part instead of the middle",
        "pictures/sizes.py",
        "top, left = round((height - size) / 2), round((width - size) / 2)",
        "top, left = 0, 0",
        "pictures/test_sizes.py::test_pictures_are_resized_and_cut_in_the_middle",
    ),
    Mutation(
        "sizes: what agrees is corrected once",
        "pictures/sizes.py",
        "num_passes: int = 4",
        "num_passes: int = 1",
        "pictures/test_sizes.py::test_each_pass_leaves_less_than_half_of_the_difference_and_by_default_three_percent",
    ),
]
