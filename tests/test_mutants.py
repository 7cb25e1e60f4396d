"""tests/mutants.py: that its mutants can be made. That they die is for `python -m tests.mutants` to say."""

from tests.mutants import MUTANTS, ROOT, TESTS


def test_every_mutant_changes_one_place_of_its_file():
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in TESTS}
    assert len(set(MUTANTS)) == len(MUTANTS) >= 50
    for m in MUTANTS:
        assert texts[m.file].count(m.old) == 1 and m.old != m.new, m
