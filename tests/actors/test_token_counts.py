"""Counts kept token by token equal counts made at once."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from polymux.actors.token_counts import TokenCounts

IDS = st.lists(st.integers(0, 300), max_size=400)


@given(prompt=IDS, output=IDS)
def test_counts_are_of_the_output_over_every_id_seen(prompt: list[int], output: list[int]) -> None:
    counts = TokenCounts(prompt)
    for token_id in output:
        counts.add(token_id)
    ids, numbers = counts.view()
    assert len(set(ids.tolist())) == len(ids)
    assert dict(zip(ids.tolist(), numbers.tolist(), strict=True)) == {i: Counter(output)[i] for i in {*prompt, *output}}
