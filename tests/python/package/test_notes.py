"""Warnings that come once per process."""

import warnings

from cnnrs._util.notes import forget_notes, note_once


def test_a_note_comes_once_per_key_until_all_are_forgotten() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forget_notes()
        for key in ("a", "a", "b", ("a", 1), "a"):
            note_once(key, f"about {key}")
        forget_notes()
        note_once("a", "again")
    assert [str(one.message) for one in caught] == ["about a", "about b", "about ('a', 1)", "again"]
    assert {one.filename for one in caught} == {__file__}
