"""The lists of deliberate errors are in order; `run_mutations.py` tries whether tests notice them."""

from .run_mutations import PACKAGE, all_mutations, problems, sample


def test_every_mutation_has_one_place_and_a_test():
    assert not problems(all_mutations())


def test_every_folder_of_the_package_has_mutations():
    listed = all_mutations()
    assert len(listed) >= 120
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/**/*.py")}
    assert folders <= {mutation.file.partition("/")[0] for mutation in listed}


def test_a_sample_has_some_of_every_folder_and_is_the_same_for_the_same_code():
    listed = all_mutations()
    folders = {mutation.file.partition("/")[0] for mutation in listed}
    chosen = sample(listed, len(folders))
    assert {mutation.file.partition("/")[0] for mutation in chosen} == folders
    assert sample(listed, len(folders)) == chosen
    assert sample(listed, len(listed)) != listed and set(sample(listed, len(listed))) == set(listed)
