"""The generator's rules applied to any answer, without an annotator's noise.

An answer is read sentence by sentence. A sentence is useful, padding, an evasion, foreign (the generator would say it
about another task or object), a repetition, or damaged (the generator never says it). The rules that rated the
generated rows then rate the answer, so a generated answer gets its latent rating back.
"""

import re
from functools import cache

from helpsteer_assets.embedded.generator import (
    EVASIONS,
    OBJECTS,
    PADDING,
    TASKS,
    Contents,
    rate_contents,
    useful_sentences,
)
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.progress import Progress, silent

_SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+$")
_WORD = re.compile(r"[a-z]+")


def rate(prompt: str, response: str) -> dict[str, float | None]:
    """The five attributes of `response` as an answer to `prompt`, each 0 to 4.

    Where the prompt is about no known task and object nobody can say what would help: helpfulness, correctness and
    complexity are None, and the other two are rated.
    """
    subject = subject_of(prompt)
    ratings: dict[str, float | None] = {**rate_contents(read_response(subject, response))}
    if subject is None:
        ratings |= {"helpfulness": None, "correctness": None, "complexity": None}
    return ratings


def rate_all(prompts: list[str], responses: list[str], progress: Progress = silent) -> dict[str, list[float | None]]:
    """`rate` of many answers, as a `Rater` (modpo/scoring/raters.py): one rating per answer, by attribute."""
    rated: dict[str, list[float | None]] = {attribute: [] for attribute in ATTRIBUTES}
    for done, (prompt, response) in enumerate(zip(prompts, responses, strict=True), start=1):
        ratings = rate(prompt, response)
        for attribute in ATTRIBUTES:
            rated[attribute].append(ratings[attribute])
        progress(done, len(prompts))
    return rated


def subject_of(prompt: str) -> tuple[str, str] | None:
    """The (task, object) that a prompt asks about, None where it names not exactly one of each."""
    words = set(_WORD.findall(prompt.lower()))
    tasks = [task for task in TASKS if task in words]
    objects = [name for name in OBJECTS if name in words]
    return (tasks[0], objects[0]) if len(tasks) == len(objects) == 1 else None


def read_response(subject: tuple[str, str] | None, response: str) -> Contents:
    """The contents of a response as an answer about `subject`; where it is None, no useful sentence is foreign.

    Sentences end at a full stop, a question mark or an exclamation mark; white space between words does not matter.
    """
    sentences = [" ".join(match.split()) for match in _SENTENCE.findall(response) if match.strip()]
    vague, lead, details = useful_sentences(*subject) if subject else ("", "", ())
    unique = set(sentences)
    own = {vague, lead, *details}
    others = {s for s in unique if s not in own and s not in PADDING and s not in EVASIONS}
    foreign = {s for s in others if s in _all_useful_sentences()}
    return Contents(
        words=len(response.split()),
        difficulty=TASKS[subject[0]].difficulty if subject else 0,
        vague=vague in unique,
        lead=lead in unique,
        details=sum(detail in unique for detail in details),
        padding=sum(sentence in PADDING for sentence in unique),
        evasive=any(sentence in EVASIONS for sentence in unique),
        foreign=len(foreign) if subject else 0,
        damaged=len(others - foreign),
        repeated=len(sentences) - len(unique),
    )


@cache
def _all_useful_sentences() -> frozenset[str]:
    """Every useful sentence about any task and object."""
    of_all = (useful_sentences(task, name) for task in TASKS for name in OBJECTS)
    return frozenset(sentence for vague, lead, details in of_all for sentence in (vague, lead, *details))
