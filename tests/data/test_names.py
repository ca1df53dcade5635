"""Many names in arrays are the names, in every subset."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from coadvise.data.sources.names import Names

byte_strings = st.lists(st.binary(max_size=9), max_size=20)


@given(byte_strings, st.data())
def test_names_are_those_that_were_given(given_names: list[bytes], data: st.DataObject) -> None:
    names = Names.of(iter(given_names))
    assert [*names] == given_names
    rows = data.draw(st.lists(st.sampled_from(range(len(given_names))), max_size=9) if given_names else st.just([]))
    some = names.take(rows)
    assert [*some] == [*pickle.loads(pickle.dumps(some))] == [given_names[row] for row in rows]
