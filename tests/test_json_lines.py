import json

import pytest

from cogview_pipelines.json_lines import dump_line, parse_object, read_lines, read_whole_rows, write_lines

CHARACTERS = "".join(map(chr, [9, 0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x85, 0x2028, 0x2029, 0x1F405, 0xDCFF]))


def test_rows_come_back_as_they_were_whatever_characters_they_hold(tmp_path):
    rows = [{"id": "a", "text": f"one{character}two"} for character in CHARACTERS]
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as file:
        write_lines(file, rows)
    assert [parse_object(line) for _, line in read_lines(tmp_path / "a.jsonl")] == rows
    # other programs split at more characters: none of those is in the file
    assert len((tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()) == len(rows)


def test_letters_stay_letters():
    assert dump_line({"a": "虎 ñ"}) == '{"a": "虎 ñ"}\n'


@pytest.mark.parametrize("character", CHARACTERS[3:-1])
def test_only_a_line_feed_ends_a_line(tmp_path, character):
    row = {"id": f"a{character}b"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n\n{}", encoding="utf-8", newline="")
    lines = list(read_lines(tmp_path / "a.jsonl"))
    assert [number for number, _ in lines] == [1, 3]
    if character >= " ":  # JSON has controls as escapes only
        assert parse_object(lines[0][1]) == row


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n', encoding="utf-8-sig")
    assert list(read_lines(tmp_path / "a.jsonl")) == [(1, '{"a": 1}')]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_other_kinds_of_unicode_are_named(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_text('{"a": "虎"}\n', encoding=encoding)
    with pytest.raises(ValueError, match=r"a\.jsonl: it is UTF-16 or UTF-32 text\. Save the file as UTF-8"):
        list(read_lines(tmp_path / "a.jsonl"))


def test_the_line_that_is_no_unicode_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"a": 1}\n{"a": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2 is not UTF-8"):
        list(read_lines(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"b\.jsonl: No such file"):
        list(read_lines(tmp_path / "b.jsonl"))


def test_of_a_file_that_was_damaged_the_whole_lines_are_read(tmp_path):
    lines = [b'{"a": "one\xe2\x80\xa8two"}', b"[1]", b'{"a": NaN}', b'\xff{"a": 3}', b"", b'{"a": 4}', b'{"a": 5']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert list(read_whole_rows(tmp_path / "a.jsonl")) == [{"a": "one\u2028two"}, {"a": 4}]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "is not JSON .*: '{'"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ("[1]", "must be a JSON object"),
        ('{"a": ' + "[" * 100_000, "is nested too deeply|is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_what_is_no_object_is_told_in_few_words(line, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_object(line)
    assert len(str(caught.value)) < 300
