"""The task ``few-shot``: three tasks that SmolLM2 solves only after worked examples, made from the word lists here.

A prompt is ``Q: walk``, ``A:``; without the context's four examples the model answers something else. No row is in two
sets, and no example of ``context.txt`` is a row.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.tasks.folders import whole_folder, write_lines

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
"""Verbs with a regular past tense: a final e takes d, y after a consonant becomes ied, `DOUBLED` repeat a letter."""
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
    """Return the past tense of a verb of the lists."""
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
    """Return 0 to 999 in words, without "and": ``two hundred forty-one``."""
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
"""Task -> question -> answer."""
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "past-tense": ("walk", "take", "carry", "stop"),
    "first-letter": ("bridge", "apple", "mirror", "ticket"),
    "number-words": ("forty-two", "eighty", "three hundred six", "seven hundred fifteen"),
}
"""Task -> questions in the context."""
ELSEWHERE = {"past-tense": "first-letter", "first-letter": "number-words", "number-words": "past-tense"}
"""Task -> the task that measures forgetting; its rows hold its own examples."""


def prepare_few_shot(folder: Path, *, seed: int = 0) -> bool:
    """Write ``context.txt``, the rows of `SPLITS` and ``other_task.jsonl`` of each task to ``TASK/``, and the same
    rows, with a different `context` in each, to ``TASK/with_examples/``.

    Returns False without changes if `folder` exists.
    """
    if folder.exists():
        return False
    with whole_folder(folder) as partial:
        for task in TASKS:
            write_task(partial / task, task, seed)
    return True


def write_task(folder: Path, task: str, seed: int) -> None:
    """Write the files of one task."""
    (folder / "with_examples").mkdir(parents=True)
    (folder / "context.txt").write_text(context_of(task), encoding="utf-8")
    splits, other = split(task, seed), ELSEWHERE[task]
    for name, questions in splits.items():
        write_lines(folder / f"{name}.jsonl", (_row(task, question) for question in questions))
        with_examples = (
            {**_row(task, question), "context": examples_for(task, question, splits["train"], seed)}
            for question in questions
        )
        write_lines(folder / "with_examples" / f"{name}.jsonl", with_examples)
    other_rows = (_row(other, question, lead=context_of(other)) for question in split(other, seed)["eval"])
    write_lines(folder / "other_task.jsonl", other_rows)


def context_of(task: str) -> str:
    """Return the worked examples of all rows, one after another."""
    return _worked(task, EXAMPLES[task])


def examples_for(task: str, question: str, known: Sequence[str], seed: int) -> str:
    """Return four worked examples for one row: questions of `known`, drawn for this row, without its own."""
    others = [one for one in known if one != question]
    return _worked(task, random.Random(f"{task}/{question}/{seed}").sample(others, 4))


def _worked(task: str, questions: Iterable[str]) -> str:
    return "".join(f"{prompt_of(one)} {TASKS[task][one]}\n" for one in questions)


async def right_answer_after_a_mistake(row: Mapping[str, Any], prompt: str, response: str) -> str | None:
    """Show the teacher the row's question with its right answer after a wrong one; leave right answers out.

    A function for ``context.from_rollout``. The pair is repeated: so small a model copies it with probability 0.26 if
    it sees it once, 0.56 twice, 0.78 four times (mean over the rows of ``data.valid``).
    """
    return None if response.strip() == row["answer"] else f"{prompt} {row['answer']}\n" * 4


def prompt_of(question: str) -> str:
    """Return the prompt of a question."""
    return f"Q: {question}\nA:"


def split(task: str, seed: int) -> dict[str, list[str]]:
    """Return the questions of each of `SPLITS`: disjoint, and without the examples."""
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
