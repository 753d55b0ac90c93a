"""Stop strings against a reader that looks letter by letter, with the text cut anywhere."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymux.actors.stop_strings import StopMatcher
from polymux.transport.errors import InvalidRequest

TEXT = st.text(alphabet="ab\n", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


def _letter_by_letter(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that ends first, the longest of those that end together; and that stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def _parts(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=10), include_stop=st.booleans())
def test_the_text_ends_where_a_letter_by_letter_reader_would_stop(text: str, stops: list[str], cuts: list[int], include_stop: bool) -> None:
    matcher = StopMatcher(stops, include_stop=include_stop)
    shown = "".join(matcher.push(part) for part in _parts(text, cuts)) + matcher.flush()
    expected, stop = _letter_by_letter(text, stops)
    assert matcher.matched == stop
    assert shown == expected + (stop or "" if include_stop else "")


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=10))
def test_only_what_could_still_become_a_stop_string_is_held_back(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    seen = shown = ""
    for part in _parts(text, cuts):
        seen += part
        shown += matcher.push(part)
        if matcher.matched:
            break
        beginnings = [stop[:size] for stop in stops for size in range(1, len(stop)) if seen.endswith(stop[:size])]
        assert seen == shown + max(beginnings, key=len, default="")


def test_nothing_follows_a_stop_string() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("one EN") == "one "
    assert matcher.push("D two END") == ""
    assert matcher.push("three") == ""
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        StopMatcher(["a", ""])
    assert caught.value.param == "stop"
