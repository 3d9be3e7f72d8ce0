from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from helpsteer_assets.modpo.scoring.batching import plan_batches

LENGTHS = st.lists(st.integers(1, 60), max_size=60)
CAP = st.integers(1, 200)


@given(lengths=LENGTHS, cap=CAP)
def test_every_item_is_in_one_batch_and_batches_are_as_full_as_the_cap_allows(lengths, cap):
    batches = plan_batches(lengths, cap)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= cap
    for batch, after in pairwise(batches):
        assert (len(batch) + 1) * lengths[batch[0]] > cap
        assert min(lengths[index] for index in batch) >= max(lengths[index] for index in after)
