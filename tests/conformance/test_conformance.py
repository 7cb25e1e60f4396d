"""One test for each property and level; `failures.Reporter` says what a failure prints."""


def test_property(tested, prop, level):
    tested.check(prop, level)


def test_run(tested):
    """What is wrong with no single case: the exit status, lines too many, a list of expected failures out of date."""
    tested.check_run()
