"""Tasks that SmolLM2 does only with worked examples ahead: short lists here, rows and contexts from them.

A row is ``Q: walk``, ``A:``; without the four examples of its context the model answers something else altogether.
No row is in two sets, and no example is a row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

from deploy.tasks.gguf import whole_folder

SPLITS = {"train": 64, "valid": 24, "eval": 64}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


REGULAR_VERBS = _words(
    """
walk talk jump play help clean open wait watch cook push pull call ask answer visit climb listen laugh smile shout
wash kick rain fill fix mix pass miss kiss press touch reach paint bake like love move live hope close use dance
save share hate taste wipe joke smoke vote shave skate change arrive believe decide invite promise practise notice
escape explore prepare receive remove improve imagine try cry carry study hurry marry worry copy reply empty dry fry
tidy apply stop plan drop stay enjoy destroy pray obey delay look work learn turn start end add act pick pack park
mark rest land sail mail need want count point print hunt shop chat clap beg hug rub step trip slip
"""
)
"""Past by the rules of spelling: a last e takes d, a consonant's y becomes ied, `DOUBLED` repeat their last letter."""
DOUBLED = frozenset(_words("stop plan drop shop chat clap beg hug rub step trip slip"))
IRREGULAR_VERBS = dict(
    pair.split("/")
    for pair in _words(
        """
go/went see/saw eat/ate take/took come/came give/gave write/wrote drive/drove sing/sang run/ran sit/sat buy/bought
think/thought bring/brought catch/caught teach/taught sleep/slept keep/kept feel/felt leave/left lose/lost sell/sold
tell/told say/said pay/paid make/made find/found know/knew grow/grew fly/flew throw/threw draw/drew swim/swam
begin/began drink/drank ring/rang break/broke speak/spoke steal/stole wake/woke choose/chose freeze/froze ride/rode
rise/rose hide/hid bite/bit fall/fell hold/held stand/stood win/won meet/met lead/led feed/fed send/sent spend/spent
build/built lend/lent hear/heard fight/fought seek/sought shake/shook
"""
    )
)
WORDS = _words(
    """
apple bridge candle desert engine forest garden hammer island jacket kitchen ladder market needle ocean pencil
quarter river saddle ticket uncle valley window yellow zebra anchor basket cotton dinner eagle flower ginger helmet
insect jungle kettle lemon mirror number orange pepper queen rabbit silver turtle umbrella village winter yard zero
arrow bottle copper dragon evening father guitar hunter idea jewel king leather monkey nature office palace quiet
rocket sailor temple under violin wagon young zone ankle button carpet doctor elbow finger gentle honey inside judge
knife letter motor night olive planet quick ribbon spider tunnel upper velvet water yesterday actor bacon castle
danger early fabric glove harbor iron jelly kind lion meadow noise opera pigeon quilt rubber summer tiger useful
vapor wheat yarn autumn battle cherry daily eleven famous grape happy ice juice kitten lamp mother nurse onion piano
quiz storm tower urban wolf year alarm brother clever fresh golden horse image lunch memory novel paper bucket cloud
rope spoon violet hotel
"""
)
_ONES = _words(
    """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen
"""
)
_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")


def past_of(verb: str) -> str:
    """The past tense of a verb of the lists."""
    if verb in IRREGULAR_VERBS:
        return IRREGULAR_VERBS[verb]
    if verb in DOUBLED:
        return f"{verb}{verb[-1]}ed"
    if verb.endswith("e"):
        return f"{verb}d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ied"
    return f"{verb}ed"


def number_in_words(number: int) -> str:
    """0 to 999, as in British English without its "and": ``two hundred forty-one``."""
    hundreds, rest = divmod(number, 100)
    tens, ones = divmod(rest, 10)
    words = [f"{_ONES[hundreds]} hundred"] if hundreds else []
    if rest < len(_ONES) and (rest or not hundreds):
        words.append(_ONES[rest])
    elif rest:
        words.append(_TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else ""))
    return " ".join(words)


TASKS: Mapping[str, Mapping[str, str]] = {
    "past-tense": {verb: past_of(verb) for verb in (*REGULAR_VERBS, *IRREGULAR_VERBS)},
    "first-letter": {word: word[0].upper() for word in WORDS},
    "number-words": {number_in_words(number): str(number) for number in range(20, 1000)},
}
"""Name -> question -> answer."""
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "past-tense": ("walk", "take", "carry", "stop"),
    "first-letter": ("bridge", "apple", "mirror", "ticket"),
    "number-words": ("forty-two", "eighty", "three hundred six", "seven hundred fifteen"),
}
"""Name -> questions of its context."""
ELSEWHERE = {"past-tense": "first-letter", "first-letter": "number-words", "number-words": "past-tense"}
"""Name -> the task that shows what was forgotten, asked with its own examples in every row."""


def prepare_few_shot(folder: Path, *, seed: int = 0) -> bool:
    """Write ``TASK/context.txt`` and the rows of `SPLITS` and ``other_task.jsonl`` beside it.

    Returns False, having done nothing, where `folder` is there already.
    """
    if folder.exists():
        return False
    with whole_folder(folder) as beside:
        for task in TASKS:
            write_task(beside / task, task, seed)
    return True


def write_task(folder: Path, task: str, seed: int) -> None:
    """The files of one task."""
    folder.mkdir()
    (folder / "context.txt").write_text(context_of(task), encoding="utf-8")
    splits, other = split(task, seed), ELSEWHERE[task]
    for name, questions in splits.items():
        _write(folder / f"{name}.jsonl", [_row(task, question) for question in questions])
    asked = split(other, seed)["eval"]
    _write(folder / "other_task.jsonl", [_row(other, question, lead=context_of(other)) for question in asked])


def context_of(task: str) -> str:
    """The worked examples, one behind the other."""
    return "".join(f"{prompt_of(one)} {TASKS[task][one]}\n" for one in EXAMPLES[task])


def prompt_of(question: str) -> str:
    """What the student sees."""
    return f"Q: {question}\nA:"


def split(task: str, seed: int) -> dict[str, list[str]]:
    """Questions of each of `SPLITS`, none of them in two, none an example."""
    left = [question for question in TASKS[task] if question not in EXAMPLES[task]]
    random.Random(f"{task}/{seed}").shuffle(left)
    found = {}
    for name, count in SPLITS.items():
        found[name], left = left[:count], left[count:]
    return found


def _row(task: str, question: str, *, lead: str = "") -> dict[str, str]:
    return {
        "id": f"{task}-{question.replace(' ', '-')}",
        "prompt": lead + prompt_of(question),
        "answer": TASKS[task][question],
    }


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
