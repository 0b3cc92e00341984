import os
import unicodedata

import pytest

from cogview_pipelines.cli.names import check_id, clashes, problem_of_name, same_file_key, slug

MARKED = [
    "बाघ-चित्र",
    "เสือ-ฟ้า",
    unicodedata.normalize("NFD", "café"),
    "क्\u200dष",
    "نمی\u200cخواهم",
    "tiger_1.v2",
    "虎" * 84,
]


@pytest.mark.parametrize("id", MARKED)
def test_ids_of_every_language_keep_their_marks(id):
    assert check_id(id) == id


@pytest.mark.parametrize(
    "id", ["", ".a", "-a", "\u0301a", "a/b", "a\\b", "a b", "a\n", "a:b", "\u202ea", "a\0", "😀", "x" * 101, True, 1.5]
)
def test_other_ids_are_refused(id):
    with pytest.raises(ValueError, match="`id` must be up to 100 letters"):
        check_id(id)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("A tiger, on a blue background!", "A-tiger-on-a-blue-background"),
        ("बाघ का चित्र", "बाघ-का-चित्र"),
        ("เสือ บน ฟ้า", "เสือ-บน-ฟ้า"),
        (unicodedata.normalize("NFD", "un café"), unicodedata.normalize("NFD", "un-café")),
        ("\u0301\u0301 a", "a"),
        ("😀 ?!", "picture"),
    ],
)
def test_the_name_of_a_prompt_keeps_letters_with_their_marks(prompt, expected):
    assert slug(prompt) == expected


@pytest.mark.parametrize("letter", ["虎", "चि", "e\u0301", "𠀀", "เสื"])
def test_a_long_prompt_becomes_a_name_that_fits_cut_between_letters(letter):
    name = slug(letter * 100)
    assert 100 <= len(os.fsencode(name)) <= 150 or len(name) >= 58
    assert name == letter * (len(name) // len(letter)) or not unicodedata.category(name[-1]).startswith("M")
    rest = (letter * 100)[len(name) :]
    assert not unicodedata.category(rest[0]).startswith("M")


@pytest.mark.parametrize(
    "name, fits", [("虎" * 84 + ".png", False), ("虎" * 83 + ".png", True), ("x" * 252 + ".png", False)]
)
def test_the_length_of_a_name_is_counted_in_bytes(tmp_path, name, fits):
    problem = problem_of_name(tmp_path / name)
    assert (problem is None) == fits
    if not fits:
        assert "has 256 bytes, but may have 255" in problem
        with pytest.raises(OSError):
            (tmp_path / name).write_bytes(b"")
    else:
        (tmp_path / name).write_bytes(b"")


def test_a_folder_in_the_place_of_a_file_is_noticed(tmp_path):
    (tmp_path / "a.png").mkdir()
    assert "is a folder" in problem_of_name(tmp_path / "a.png")


def test_names_that_are_one_file_somewhere_clash():
    assert same_file_key("A TIGER.png") == same_file_key("a tiger.png")
    assert same_file_key(unicodedata.normalize("NFD", "É.png")) == same_file_key("é.png")
    names = [("line 1", "Tiger", ["Tiger.png"]), ("line 2", "cat", ["cat.png"]), ("line 3", "tIGER", ["tIGER.png"])]
    assert clashes(names, are_files=True) == ["line 3: `id` 'tIGER' would write tIGER.png again, after line 1."]
    assert clashes(names, are_files=False) == []
