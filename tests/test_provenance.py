"""Which rows of a measured table are to be made, and what it says about where they come from."""
from foem_eval.provenance import missing, of_commits

ROWS = {"old": {"commit": "a"}, "new": {"commit": "b"}, "unknown": {}}


def test_rows_of_other_commits_are_made_anew_unless_they_may_stay():
    names = ["new", "never", "old", "unknown"]
    assert missing(names, ROWS, "b", any_commit=False) == ["never", "old", "unknown"]
    assert missing(names, ROWS, "b", any_commit=True) == ["never"]


def test_a_table_names_every_commit_once():
    assert of_commits({"x": {"commit": "b"}, "y": {"commit": "a"}, "z": {"commit": "b"}}) == "commits a, b"
    assert of_commits({"x": {"commit": "b"}}) == "commit b"
