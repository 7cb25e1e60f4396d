"""One test for each property and level; `judging.report` says what a failure prints."""


def test_property(results, prop, level):
    results.check(prop, level)
