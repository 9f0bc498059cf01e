"""A stop string is found however the text is cut, and no text that belongs to one is passed on."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax.generation.stop_strings import StopStrings

letters = st.text("ab", max_size=12)
strings = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


def expected(text, stops, include, first):
    """Letter by letter: the text up to the first stop string to end after `first` letters."""
    for end in range(first + 1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(letters, strings, st.lists(st.integers(0, 12)), st.booleans(), st.integers(0, 12))
def test_it_is_found_wherever_the_text_is_cut(text, stops, cuts, include, first):
    cuts = sorted({0, min(first, len(text)), len(text), *(cut for cut in cuts if cut < len(text))})
    search, shown = StopStrings(stops, include), ""
    whole, stop = expected(text, stops, include, min(first, len(text)))
    for start, end in pairwise(cuts):
        shown += search.add(text[start:end], may_end=end > first)
        assert whole.startswith(shown)
        if search.found is None:  # what is held back is no more than may begin a stop string
            held = text[len(shown) : end]
            assert not held or any(stop.startswith(held) and stop != held for stop in stops)
    assert search.found == stop
    assert shown + ("" if stop else search.end()) == whole


@pytest.mark.parametrize("include", [False, True])
def test_nothing_comes_after_it(include):
    search = StopStrings(["\n\n"], include)
    assert [search.add(piece) for piece in ("a\n", "\nb", "c")] == ["a", "\n\n" if include else "", ""]
    assert search.end() == ""
