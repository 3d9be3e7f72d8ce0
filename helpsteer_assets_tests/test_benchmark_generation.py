from benchmarks.generation import Case, compare


def test_both_give_the_same_responses() -> None:
    found = compare("tiny", Case((2, 20), 12, True), count=10, rounds=1)
    assert found["identical_responses"] == found["prompts"] == 10
    assert 1 < found["tokens_per_response"] < found["longest_response_of_a_batch"] <= 12
