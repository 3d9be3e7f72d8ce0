"""Rows shaped like HelpSteer's, made from a small world of household tasks.

A prompt asks how to do one of ten tasks with one of 32 objects. An answer is a row of whole sentences: a lead (vague
or precise), up to four details in a fixed order, and perhaps words that help nobody (openers, fillers, closers).

The designed conflict: helpfulness counts useful facts, and every fact costs words, so that the most helpful answers
are long ones and a short one leaves things out. Padding costs words and helps no one, so that verbosity is not
helpfulness. The first facts are worth more than the last ones, and details are worth more the harder the task is, so
that each price of a word has its own best lengths.

Two properties are there for MODPO's sake. An answer is a prefix of its longer sister, so that a pair of them differs
in nothing but the decision to go on. Ratings carry an annotator's noise, so that pairs of the same kind of answer
appear in both directions; without it the finite optimum that a small weight needs does not exist.

A quarter and more of the (task, object) combinations never occurs in training rows, whatever the seed: validation
prompts come from these alone. Each object occurs in seven training tasks, so what a held-out prompt needs can be
learnt from the others.
"""

import random
from dataclasses import dataclass
from typing import Any

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
HIGHEST_RATING = 4

Row = dict[str, str | int]


@dataclass(frozen=True)
class Object:
    """Facts about one household object that answers use."""

    tool: str
    place: str
    part: str


@dataclass(frozen=True)
class Task:
    """The useful sentences of one task; `{object}`, `{tool}`, `{place}` and `{part}` are filled in.

    Every precise lead is "<Verb> the ...", with a verb of its own, and its vague lead is "<Verb> it.". Where leads had
    first words in common or were built differently, training that made the vague ones rare spoilt the precise leads of
    other tasks. For the same reason no padding begins like a useful sentence.
    `difficulty` (0 to 2) says how much of the help lies in the details, and is the task's share of the complexity.
    """

    vague: str
    lead: str
    details: tuple[str, str, str, str]
    difficulty: int


OBJECTS: dict[str, Object] = {
    "bicycle": Object("a soft brush", "garage", "frame"),
    "kettle": Object("a damp sponge", "kitchen", "lid"),
    "guitar": Object("a dry cloth", "bedroom", "strap"),
    "mirror": Object("a paper tissue", "hall", "frame"),
    "laptop": Object("a dry cloth", "study", "lid"),
    "teapot": Object("a damp sponge", "kitchen", "handle"),
    "chair": Object("a damp sponge", "garden", "frame"),
    "umbrella": Object("a dry cloth", "hall", "handle"),
    "backpack": Object("a soft brush", "attic", "strap"),
    "lamp": Object("a dry cloth", "study", "cord"),
    "camera": Object("a paper tissue", "study", "strap"),
    "toaster": Object("a soft brush", "kitchen", "cord"),
    "fridge": Object("a damp sponge", "kitchen", "cover"),
    "helmet": Object("a damp sponge", "garage", "strap"),
    "clock": Object("a paper tissue", "hall", "cover"),
    "table": Object("a damp sponge", "garden", "edge"),
    "suitcase": Object("a small vacuum", "attic", "handle"),
    "tent": Object("a soft brush", "garden", "cover"),
    "drum": Object("a dry cloth", "cellar", "edge"),
    "radio": Object("a paper tissue", "bedroom", "cord"),
    "scooter": Object("a soft brush", "garage", "handle"),
    "basket": Object("a small vacuum", "attic", "lid"),
    "vase": Object("a damp sponge", "hall", "base"),
    "printer": Object("a small vacuum", "study", "cover"),
    "desk": Object("a dry cloth", "bedroom", "edge"),
    "ladder": Object("a soft brush", "cellar", "base"),
    "telescope": Object("a paper tissue", "attic", "base"),
    "fan": Object("a small vacuum", "bedroom", "base"),
    "heater": Object("a small vacuum", "cellar", "cord"),
    "wagon": Object("a soft brush", "garden", "frame"),
    "piano": Object("a dry cloth", "hall", "lid"),
    "sofa": Object("a small vacuum", "cellar", "edge"),
}

TASKS: dict[str, Task] = {
    "clean": Task(
        "Wipe it.",
        "Wipe the {object} with {tool}.",
        (
            "Begin at the {part} and work down slowly.",
            "Use warm water and a little soap.",
            "Leave it in the {place} over night to dry.",
            "Never scrub it with anything rough or sharp.",
        ),
        0,
    ),
    "store": Task(
        "Stow it.",
        "Stow the {object} in the {place}.",
        (
            "Remove the dust with {tool} before that.",
            "Fold some paper around the {part}.",
            "Leave a little space for the air.",
            "Avoid damp corners and the bright sun.",
        ),
        0,
    ),
    "repair": Task(
        "Tighten it.",
        "Tighten the {part} of the {object}.",
        (
            "Clear away the dirt with {tool} first.",
            "Replace every screw that looks old or worn.",
            "Work in the {place} and take your time.",
            "Stop at once if it feels too hot.",
        ),
        2,
    ),
    "check": Task(
        "Inspect it.",
        "Inspect the {part} of the {object}.",
        (
            "Remove the dust with {tool} to see more.",
            "Search for small cracks and loose screws.",
            "Take it to the {place} for better light.",
            "Write down what has changed since last time.",
        ),
        1,
    ),
    "move": Task(
        "Carry it.",
        "Carry the {object} to the {place}.",
        (
            "Hold the {part} so that nothing can swing.",
            "Clear the way before you start to walk.",
            "Clean it with {tool} when you arrive.",
            "Bend your knees and never your back.",
        ),
        0,
    ),
    "sell": Task(
        "Photograph it.",
        "Photograph the {object} in the {place}.",
        (
            "Polish it with {tool} before you start.",
            "Show the {part} in a second picture.",
            "Ask a fair price and stay friendly.",
            "Mention every scratch to avoid trouble later.",
        ),
        1,
    ),
    "paint": Task(
        "Paint it.",
        "Paint the {object} with two thin coats.",
        (
            "Take off the dust with {tool} first.",
            "Put tape over the {part} to keep it clean.",
            "Open a window while you paint in the {place}.",
            "Wait a whole day before you touch it.",
        ),
        2,
    ),
    "pack": Task(
        "Wrap it.",
        "Wrap the {object} in thick paper.",
        (
            "Clean it with {tool} before you pack.",
            "Roll a soft blanket around the {part}.",
            "Fill every gap in the box with foam.",
            "Leave the box in the {place} until you go.",
        ),
        1,
    ),
    "protect": Task(
        "Cover it.",
        "Cover the {object} with a sheet in the {place}.",
        (
            "Treat it with {tool} every single month.",
            "Add some tape where the {part} is weak.",
            "Keep small children and pets away.",
            "Buy insurance if it was expensive.",
        ),
        1,
    ),
    "test": Task(
        "Try it.",
        "Try the {object} in the {place} first.",
        (
            "Press the {part} gently and listen well.",
            "Rub it with {tool} to find hidden damage.",
            "Repeat every step two more times.",
            "Switch off the power if you smell smoke.",
        ),
        2,
    ),
}

PHRASINGS = (
    "How do I {task} my {object}?",
    "What is the best way to {task} my {object}?",
    "Please tell me how to {task} the {object}.",
    "I want to {task} my {object}. What should I do?",
)

OPENERS = ("Thank you for this great question.", "I am very happy to help you today.")
FILLERS = (
    "There are many things to think about here.",
    "A lot of people wonder about this every day.",
    "Of course, every home is a little different.",
    "As always, it is good to stay calm.",
)
CLOSERS = ("I hope that this long answer helps you.", "Please tell me if I should say it again.")
EVASIONS = (
    "I am not sure, so please ask somebody who knows more.",
    "Sorry, that depends on far too many things to say.",
)
PADDING = frozenset(OPENERS + FILLERS + CLOSERS)

LEAD_VALUES = (2.4, 1.6, 0.8)
"""The precise lead's share of helpfulness, by the task's difficulty; a vague lead is worth half of it."""

COMPLETE_VALUE = 4.0
"""The helpfulness of a lead with all four details."""

DETAIL_SHARES = (0.34, 0.28, 0.22, 0.16)
"""How what the lead leaves out is spread over the details."""

EVASION_VALUE = 0.4
PADDING_COST = 0.2

FEWEST_WORDS, MOST_WORDS = 2, 50
"""Answers of at most so many words are rated 0 in verbosity, and of at least so many 4; linear between the two."""

NOISE = {"helpfulness": 0.9, "correctness": 0.3, "coherence": 0.3, "complexity": 0.3, "verbosity": 0.5}
"""Standard deviations of the annotator's noise, before rounding."""

RESPONSES_PER_PROMPT = 4

KIND_WEIGHTS = {
    "vague": 4,
    "lead": 5,
    "one detail": 4,
    "two details": 8,
    "three details": 1.5,
    "four details": 1.5,
    "padded": 4,
    "waffle": 2,
    "evasive": 1,
}
"""How often each kind of answer is drawn; the four answers to a prompt are of four kinds."""

PADDED_DETAILS = (0, 0, 1, 1, 2, 3, 4)
"""A padded answer has one of these numbers of details, each as likely as it stands here."""

_DETAILS_OF_KIND = {"lead": 0, "one detail": 1, "two details": 2, "three details": 3, "four details": 4}


@dataclass(frozen=True)
class Contents:
    """The contents of an answer that its ratings depend on. The last three never occur in generated answers."""

    words: int
    difficulty: int
    vague: bool = False
    lead: bool = False
    details: int = 0
    padding: int = 0
    evasive: bool = False
    foreign: int = 0
    damaged: int = 0
    repeated: int = 0


def clip_rating(value: float) -> float:
    """`value` moved into HelpSteer's range, 0 to 4."""
    return min(float(HIGHEST_RATING), max(0.0, value))


def verbosity_of(words: int) -> float:
    """The verbosity of an answer of so many words, 0 to 4."""
    return clip_rating(HIGHEST_RATING * (words - FEWEST_WORDS) / (MOST_WORDS - FEWEST_WORDS))


def rate_contents(contents: Contents) -> dict[str, float]:
    """The five ratings, 0 to 4, that an annotator without noise would give."""
    if contents.words == 0:
        return dict.fromkeys(ATTRIBUTES, 0.0)
    faults = contents.foreign + contents.damaged
    whole_lead = LEAD_VALUES[contents.difficulty]
    useful = whole_lead if contents.lead else whole_lead / 2 if contents.vague else 0.0
    useful += (COMPLETE_VALUE - whole_lead) * sum(DETAIL_SHARES[: contents.details])
    if not useful and contents.evasive:
        useful = EVASION_VALUE
    if contents.lead or contents.details:
        correct = 4.0
    elif contents.vague:
        correct = 3.0
    else:
        correct = 1.0 if contents.evasive else 0.0
    ratings = {
        "helpfulness": useful - PADDING_COST * contents.padding - 0.4 * faults - 0.2 * contents.repeated,
        "correctness": correct - 1.5 * contents.foreign - 0.75 * contents.damaged,
        "coherence": HIGHEST_RATING - 0.25 * contents.padding - 1.0 * contents.repeated - 1.5 * faults,
        "complexity": 0.5 * contents.difficulty + 0.75 * contents.details,
        "verbosity": verbosity_of(contents.words),
    }
    return {name: clip_rating(value) for name, value in ratings.items()}


def useful_sentences(task: str, object_name: str) -> tuple[str, str, tuple[str, ...]]:
    """The vague lead, the precise lead and the details, in order, for one task and object."""
    facts = OBJECTS[object_name]
    fields = {"object": object_name, "tool": facts.tool, "place": facts.place, "part": facts.part}
    template = TASKS[task]
    details = tuple(detail.format(**fields) for detail in template.details)
    return template.vague, template.lead.format(**fields), details


def prompt_of(task: str, object_name: str, phrasing: int) -> str:
    """The question about one task and object in one of the phrasings."""
    return PHRASINGS[phrasing].format(task=task, object=object_name)


def is_held_out(task: str, object_name: str) -> bool:
    """Whether training rows leave this combination out: three tasks of every object, three objects of ten per task."""
    return (3 * list(TASKS).index(task) + list(OBJECTS).index(object_name)) % len(TASKS) < 3


def build_rows(train_prompts: int = 800, validation_prompts: int = 120, seed: int = 0) -> dict[str, list[Row]]:
    """Four rated answers to each of so many distinct prompts, in the splits `train` and `validation`.

    Determined by the arguments alone. A larger size only adds rows at the end, and the answers to a prompt depend on
    the prompt and the seed. Validation prompts are spread over as many held-out combinations as possible.
    """
    rows = {}
    for split, size in (("train", train_prompts), ("validation", validation_prompts)):
        prompts = _prompts(held_out=split == "validation", seed=seed)
        if not 0 <= size <= len(prompts):
            raise ValueError(f"{split}_prompts must be between 0 and {len(prompts)}, not {size}")
        rows[split] = [row for prompt in prompts[:size] for row in _rated_answers(*prompt, seed=seed)]
    return rows


def _prompts(*, held_out: bool, seed: int) -> list[tuple[str, str, int]]:
    """All (task, object, phrasing) of one split, shuffled so that each run of combinations precedes its repetition."""
    rng = random.Random(f"prompts/{held_out}/{seed}")
    combinations = [(task, name) for task in TASKS for name in OBJECTS if is_held_out(task, name) == held_out]
    rng.shuffle(combinations)
    phrasings = {combination: rng.sample(range(len(PHRASINGS)), len(PHRASINGS)) for combination in combinations}
    return [
        (*combination, phrasings[combination][turn]) for turn in range(len(PHRASINGS)) for combination in combinations
    ]


def _rated_answers(task: str, object_name: str, phrasing: int, seed: int) -> list[Row]:
    """The rows of one prompt: distinct answers of distinct kinds, each with the ratings of its own annotator."""
    prompt = prompt_of(task, object_name, phrasing)
    rng = random.Random(f"answers/{prompt}/{seed}")
    rows: list[Row] = []
    for kind in _draw_kinds(rng):
        sentences, contents = _compose(kind, task, object_name, rng)
        row: Row = {"prompt": prompt, "response": " ".join(sentences)}
        for name, value in rate_contents(contents).items():
            row[name] = round(clip_rating(value + rng.gauss(0.0, NOISE[name])))
        rows.append(row)
    return rows


def _draw_kinds(rng: random.Random) -> list[str]:
    """Four different kinds of answer, drawn one after the other by their weights."""
    weights = dict(KIND_WEIGHTS)
    kinds: list[str] = []
    while len(kinds) < RESPONSES_PER_PROMPT:
        kinds += rng.choices(list(weights), list(weights.values()))
        del weights[kinds[-1]]
    return kinds


def _compose(kind: str, task: str, object_name: str, rng: random.Random) -> tuple[list[str], Contents]:
    """The sentences of one answer of this kind, and what they hold."""
    vague, lead, details = useful_sentences(task, object_name)
    told: dict[str, Any]
    if kind in _DETAILS_OF_KIND:
        count = _DETAILS_OF_KIND[kind]
        sentences = [lead, *details[:count]]
        told = {"lead": True, "details": count}
    elif kind == "vague":
        sentences, told = [vague], {"vague": True}
    elif kind == "evasive":
        sentences, told = [rng.choice(EVASIONS)], {"evasive": True}
    elif kind == "padded":
        count = rng.choice(PADDED_DETAILS)
        padding = [*rng.sample(FILLERS, rng.choice((1, 2))), rng.choice(CLOSERS)]
        sentences = [lead, *details[:count], *padding]
        told = {"lead": True, "details": count, "padding": len(padding)}
    else:
        sentences = [rng.choice(OPENERS), *rng.sample(FILLERS, rng.choice((1, 2, 3))), rng.choice(CLOSERS)]
        told = {"padding": len(sentences)}
    words = sum(len(sentence.split()) for sentence in sentences)
    return sentences, Contents(words=words, difficulty=TASKS[task].difficulty, **told)
