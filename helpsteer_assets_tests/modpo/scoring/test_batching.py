from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_assets.modpo.models.tokenization import Sequence
from helpsteer_assets.modpo.scoring.batching import collate, plan_batches

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


def test_longest_come_first_and_equal_lengths_keep_their_order():
    assert plan_batches([3, 9, 3, 9], 18) == [[1, 3], [0, 2]]


def test_collate_marks_tokens_by_position_so_that_pad_may_be_the_end_of_text_token():
    sequences = [Sequence(np.array(p, np.int32), np.array(r, np.int32)) for p, r in (([5, 6], [7, 2]), ([5], [2]))]
    batch = collate(sequences, pad_id=2)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2], [5, 2, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.response_mask.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
