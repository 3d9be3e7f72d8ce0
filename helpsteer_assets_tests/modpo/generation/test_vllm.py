"""What can be tried without vLLM: it needs a GPU."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import GenerationSettings
from helpsteer_assets.modpo.generation.decoding import Decoding
from helpsteer_assets.modpo.generation.vllm import VllmEngine, response_ids, sampling_arguments


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_the_package_the_message_names_the_extra(tiny_model_path: Path) -> None:
    with pytest.raises(HelpsteerError, match=r"pip install 'helpsteer_assets\[vllm\]'"):
        VllmEngine(tiny_model_path, precision="bf16", max_length=64, lora_rank=8)


def test_a_rule_that_vllm_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="no_repeat_ngram_size: 3 with `engine: vllm`"):
        GenerationSettings(engine="vllm", no_repeat_ngram_size=3)


def test_only_our_end_of_text_token_ends_a_response_and_every_prompt_has_a_seed_of_its_own() -> None:
    how = Decoding(max_new_tokens=12, end_id=2, do_sample=True, temperature=0.7, seed=2**32 - 1)
    first, second = sampling_arguments(how, 0), sampling_arguments(how, 1)
    assert (first["ignore_eos"], first["stop_token_ids"], first["temperature"]) == (True, [2], 0.7)
    assert first["seed"] != second["seed"]
    assert first == sampling_arguments(how, 0)


def test_a_response_holds_the_token_that_ended_it_however_it_is_reported() -> None:
    assert response_ids((5, 6, 2), "stop", 2) == [5, 6, 2]
    assert response_ids([5, 6], "stop", 2) == [5, 6, 2]
    assert response_ids([], "stop", 2) == [2]
    assert response_ids([5, 6], "length", 2) == [5, 6]
