import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from helpsteer_assets.modpo.models.tokenization import Sequence
from helpsteer_assets.modpo.scoring.trees import TreeBatch, pack, plan_trees, unpack


def sequence(prompt_ids: list[int], response_ids: list[int]) -> Sequence:
    return Sequence(np.array(prompt_ids, np.int32), np.array(response_ids, np.int32))


# So few tokens and so short that equal prompts, equal responses and shared prefixes come up all the time; so do empty
# prompts and responses.
TOKENS = st.lists(st.integers(0, 2), max_size=4)
SEQUENCES = st.lists(st.builds(sequence, TOKENS, TOKENS), min_size=1, max_size=12)


def distinct_prompts(sequences: list[Sequence]) -> set[tuple[int, ...]]:
    return {tuple(s.prompt_ids) for s in sequences}


def distinct(sequences: list[Sequence]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    return {(tuple(s.prompt_ids), tuple(s.response_ids)) for s in sequences}


def tokens_of(sequences: list[Sequence]) -> int:
    """Tokens of the sequences where each prompt, and each response to it, counts once."""
    return sum(map(len, distinct_prompts(sequences))) + sum(len(response) for _, response in distinct(sequences))


def paths(batch: TreeBatch) -> dict[int, list[int]]:
    """By row the places in the batch of its prompt's tokens and its own, in the order of the sequence."""
    found: dict[int, list[int]] = {}
    place = itertools.count()
    for (prompt, *responses), rows in zip(batch.sizes, batch.order, strict=True):
        of_prompt = list(itertools.islice(place, prompt))
        for row, size in zip(rows, responses, strict=True):
            found[row] = of_prompt + list(itertools.islice(place, size))
    assert next(place) == batch.tokens
    return found


class TestPack:
    @settings(deadline=None)
    @given(SEQUENCES)
    def test_every_sequence_comes_back_and_what_is_equal_is_there_once(self, sequences):
        batch, rows = pack(sequences)
        assert [unpack(batch)[row] for row in rows] == sequences
        assert batch.tokens == tokens_of(sequences)
        assert len(batch.sizes) == len(distinct_prompts(sequences))
        assert batch.responses == len(distinct(sequences)) == len(set(rows))
        assert list(dict.fromkeys(rows)) == list(range(batch.responses))  # in the order in which they were added
        for places in paths(batch).values():
            assert batch.position_ids[0, places].tolist() == list(range(len(places)))

    @settings(deadline=None)
    @given(SEQUENCES)
    def test_each_response_token_is_predicted_from_the_token_before_it_in_its_sequence(self, sequences):
        batch, _ = pack(sequences)
        by_row = paths(batch)
        expected = []
        for row, sequence in enumerate(unpack(batch)):
            start, places = len(sequence.prompt_ids), by_row[row]
            for at in range(max(start, 1), len(places)):  # nothing stands before the first token of an empty prompt
                expected.append((places[at - 1], batch.input_ids[0, places[at]].item(), row))
        found = zip(batch.predictors.tolist(), batch.targets.tolist(), batch.rows.tolist(), strict=True)
        assert sorted(found) == sorted(expected)


CAP = st.integers(1, 20)


class TestPlanTrees:
    @settings(deadline=None)
    @given(SEQUENCES, CAP)
    def test_every_sequence_is_in_one_batch_within_the_cap_and_a_tree_that_fits_is_whole(self, sequences, cap):
        planned = plan_trees(sequences, cap)
        assert sorted(itertools.chain.from_iterable(planned)) == list(range(len(sequences)))
        for batch in planned:
            members = [sequences[index] for index in batch]
            assert tokens_of(members) <= cap or len(distinct(members)) == 1
        for prompt in distinct_prompts(sequences):
            tree = [index for index, each in enumerate(sequences) if tuple(each.prompt_ids) == prompt]
            if tokens_of([sequences[index] for index in tree]) <= cap:
                assert any(set(tree) <= set(batch) for batch in planned)

    def test_the_largest_tree_comes_first_and_equal_ones_keep_their_order(self):
        small, large = [sequence([n], [n]) for n in (1, 2, 3)], sequence([4, 5], [6, 7])
        assert plan_trees([small[0], large, small[1], small[2]], 4) == [[1], [0, 2], [3]]
