"""The game whose moves nobody explains, and the model that can play it: rules, texts, and that a run sees the same."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from common.chat import Renderer, load_tokenizer, teacher_sequence
from common.config_file import load_config
from common.data import Message, Row, read_rows
from common.fingerprint import tokenizer_fingerprint
from deploy import hidden_moves_model
from deploy.hidden_moves import (
    DISTANCES,
    RULES,
    STEPS,
    TURNS,
    WORDS,
    HiddenMoves,
    beginning,
    items_of,
    listed,
    moved,
    ways_to,
)
from deploy.hidden_moves_model import IGNORED, a_look_back, a_move, batch_of, loss_of, make_tokenizer
from deploy.hidden_rule import Size, new_model
from deploy.prepare import PrepareError
from learner.games import fault_of
from rollout_workers.environments.base import EpisodeError, Step
from rollout_workers.environments.registry import make_environment
from rollout_workers.episodes import Exchange
from rollout_workers.experience.parse import items_of as items_in
from rollout_workers.experience.templates import load_templates
from rollout_workers.experience.traces import game_trace

ROOT = Path(__file__).resolve().parents[2]
TINY = Size(hidden=32, layers=1, most_steps=2)


def played(game: HiddenMoves, seed: int, rule: int) -> tuple[list[str], Step]:
    """A game by somebody who knows the rule: observations, and the last step."""

    async def play() -> tuple[list[str], Step]:
        seen = [await game.reset(seed)]
        while True:
            way = seen[-1].split("G: ")[1].split()[0]
            step = await game.step(f"so: {next(word for word in WORDS if RULES[rule][word] == way)}")
            if step.done:
                return seen, step
            seen.append(step.observation)

    return asyncio.run(play())


@pytest.mark.parametrize("rule", [0, 9, 23])
def test_who_knows_the_rule_wins_every_game(rule: int) -> None:
    for seed in range(20):
        seen, last = played(HiddenMoves(rule=rule), seed, rule)
        assert (last.reward, last.done) == (1.0, True)
        assert len(seen) in DISTANCES
        assert seen[0].startswith("G: ")
        assert all(line.startswith("P went ") and "\n" not in line for line in [*seen[1:], last.observation])
        assert last.observation.endswith(". G: here")


def test_the_rule_cannot_be_told_from_what_is_seen_first() -> None:
    first = {tuple(asyncio.run(HiddenMoves(rule=rule).reset(seed)) for seed in range(8)) for rule in range(len(RULES))}
    assert len(first) == 1
    assert len({tuple(rule.items()) for rule in RULES}) == 24


def test_told_games_begin_every_observation_with_the_whole_rule() -> None:
    seen, _ = played(HiddenMoves(rule=9, told=True), 3, 9)
    lead = "- up: zon\n- down: dax\n- left: wug\n- right: fep\n\n"
    assert len(seen) > 1
    assert [one.removeprefix(lead) for one in seen] == played(HiddenMoves(rule=9), 3, 9)[0]


def test_past_the_edge_the_game_is_lost_and_other_words_do_nothing() -> None:
    rule = RULES.index(dict(zip(WORDS, ("up", "down", "left", "right"), strict=True)))

    async def play(*words: str) -> list[Step]:
        game = HiddenMoves(rule=rule)
        await game.reset(0)
        game._player, game._goal = (3, 1), (0, 0)
        return [await game.step(word) for word in words]

    assert asyncio.run(play("zon")) == [Step("P went right and fell off", 0.0, True)]
    steps = [Step("P stayed. G: left 3, down 1", 0.0, False), Step("P went up. G: left 3, down 2", 0.0, False)]
    assert asyncio.run(play("right", "left: dax\n")) == steps
    assert asyncio.run(play("")) == steps[:1]
    out_of_turns = asyncio.run(play(*["dax or right"] * TURNS))
    assert [step.done for step in out_of_turns] == [False] * (TURNS - 1) + [True]
    assert out_of_turns[-1] == Step("P stayed. G: left 3, down 1", 0.0, True)
    with pytest.raises(EpisodeError, match="is over"):
        asyncio.run(play("zon", "dax"))


def test_a_rule_that_there_is_not_is_refused_before_anything_is_played() -> None:
    row = Row(id="x", environment="deploy.hidden_moves:HiddenMoves", options={"rule": 24})
    assert fault_of(row) == "rule 24: 0 to 23"
    assert isinstance(make_environment("deploy.hidden_moves:HiddenMoves", {"rule": 23}), HiddenMoves)


def test_the_ways_lead_to_the_goal() -> None:
    chance = random.Random(1)
    for _ in range(200):
        player, goal = beginning(chance)
        for way, steps in ways_to(player, goal).items():
            for _ in range(steps):
                after = moved(player, way)
                assert after is not None
                player = after
        assert player == goal
    assert ways_to((0, 3), (1, 0)) == {"down": 3, "right": 1}
    assert list(ways_to((3, 1), (0, 0))) == ["left", "down"]


# --- texts ----------------------------------------------------------------------------------------------------------


def test_a_look_back_names_what_its_game_shows_and_nothing_else() -> None:
    chance, seen = random.Random(0), set()
    for _ in range(100):
        question, answer = a_look_back(chance)
        items = dict(item.split(": ") for item in items_in(answer))
        moves = [block.splitlines() for block in question.split("\n\n[Move ")[1:]]
        said = [move[1].split(": ")[1] for move in moves]
        went = [move[4].split()[2].strip(".") for move in moves]  # what the lake said in the turn behind it
        assert items == dict(zip(went, said, strict=True))
        assert list(items) == [way for way in STEPS if way in items]
        seen |= set(items)
    assert seen == set(STEPS)


def test_a_move_is_good_under_the_items_that_are_told() -> None:
    chance, told = random.Random(0), 0
    for _ in range(300):
        question, answer = a_move(chance)
        *lines, seen = question.splitlines()
        items = dict(line.removeprefix("- ").split(": ") for line in lines if line)
        way, word = answer.split(": ")
        assert way == seen.split("G: ")[1].split()[0]
        assert items.get(way, word) == word
        assert word not in {said for other, said in items.items() if other != way}
        told += bool(items)
    assert 200 < told < 280


def test_what_a_run_renders_is_what_the_model_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_moves_model, "LEARNED", (0.0, 0.0))
    model = tmp_path / "models/hidden-moves"
    assert hidden_moves_model.prepare_hidden_moves(model, TINY)
    tokenizer = load_tokenizer(str(model))
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(make_tokenizer())
    config = load_config(ROOT / "deploy/configs/experience_small.yaml")
    items = items_of(RULES[9])
    assert config.experience.templates is not None
    templates = load_templates(tmp_path / config.experience.templates)
    context = templates.experience(items)
    renderer = Renderer(tokenizer, context, config.student, config.context.placement)
    prompt = renderer.render(Row(id="x", messages=(Message(role="user", content="P went left. G: up 2, right 1"),)))
    for text, ids in (
        (f"{listed(items)}\n\nP went left. G: up 2, right 1", teacher_sequence(prompt, renderer.contexts)),
        ("P went left. G: up 2, right 1", prompt.student_ids.tolist()),
    ):
        trained, labels = batch_of(tokenizer, [(text, "left: wug")])
        answer = tokenizer("left: wug<end>", add_special_tokens=False)["input_ids"]
        assert trained[0].tolist() == [*ids, *answer]
        assert labels[0].tolist() == [*[IGNORED] * len(ids), *answer]
    assert len(answer) == config.rollout.max_tokens == 2
    assert not renderer.without_shared_prefix
    first = "G: left 3, down 1"
    exchanges = [Exchange(first, "left: wug"), Exchange("P went down. G: left 3", "left: fep")]
    asked = templates.extraction(first, game_trace(exchanges, "P went up and fell off"), game=True)
    assert asked.endswith("\n\n[End]\nP went up and fell off\n\nWhat does each word do?")
    phrases = [6, 1 + 6, 1 + 1, 1 + 2 + 2, 1 + 1, 1 + 2, 1]
    assert len(tokenizer(asked)["input_ids"]) == sum(phrases)  # a token each
    chance = random.Random(0)
    longest = max(len(tokenizer(a_look_back(chance)[1])["input_ids"]) for _ in range(100)) + 1
    assert longest == (config.experience.max_tokens or 0)
    most = listed([*items, *items][: hidden_moves_model.MOST_ITEMS])
    assert len(tokenizer(most)["input_ids"]) == config.experience.max_context_tokens  # no more than it was trained on


def test_the_configuration_is_of_lakes_that_are_apart() -> None:
    config = load_config(ROOT / "deploy/configs/experience_small.yaml")
    assert config.data.valid is not None
    assert config.data.eval is not None
    rows = {name: read_rows(getattr(config.data, name), config.data) for name in ("train", "valid", "eval")}
    seeds = [row.seed for found in rows.values() for row in found]
    assert len(seeds) == len(set(seeds))
    (rule,) = {row.options["rule"] for found in rows.values() for row in found}
    (other,) = {row.options["rule"] for row in read_rows(config.eval.ood["another lake"])}
    assert all(RULES[rule][word] != RULES[other][word] for word in WORDS)


# --- the model ------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_of_both_kinds_of_text() -> None:
    tokenizer, chance = make_tokenizer(), random.Random(5)
    texts = [a_move(chance) for _ in range(16)], [a_look_back(chance) for _ in range(16)]
    batches = [batch_of(tokenizer, one) for one in texts]
    torch.manual_seed(0)
    fresh = new_model(TINY, tokenizer)
    trained, _ = hidden_moves_model.train(Size(hidden=32, layers=1, most_steps=15), 0)
    with torch.no_grad():
        for ids, labels in batches:
            assert loss_of(trained, ids, labels) < loss_of(fresh, ids, labels) - 0.5


def test_knowledge_is_the_share_of_texts_without_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    class Knows(torch.nn.Module):
        """Says, at every position, the token that really comes next."""

        def forward(self, ids: torch.Tensor) -> object:
            following = torch.cat([ids[:, 1:], ids[:, :1]], dim=-1)
            return type("Output", (), {"logits": torch.nn.functional.one_hot(following, 400).float()})

    class Silent(torch.nn.Module):
        """Always the same token."""

        def forward(self, ids: torch.Tensor) -> object:
            return type("Output", (), {"logits": torch.nn.functional.one_hot(ids * 0, 400).float()})

    monkeypatch.setattr(hidden_moves_model, "CHECKED", 8)
    assert hidden_moves_model.knowledge(Knows(), make_tokenizer()) == (1.0, 1.0)
    assert hidden_moves_model.knowledge(Silent(), make_tokenizer()) == (0.0, 0.0)


def test_a_model_that_did_not_learn_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(
        PrepareError, match=r"in \d+% of texts, and looks back at \d+% of games without a fault; 95% and 90% needed"
    ):
        hidden_moves_model.prepare_hidden_moves(tmp_path / "moves", TINY)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_a_folder_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(hidden_moves_model, "LEARNED", (0.0, 0.0))
    assert hidden_moves_model.prepare_hidden_moves(tmp_path / "moves", TINY)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moves")
    assert model.config.vocab_size == len(load_tokenizer(str(tmp_path / "moves")))
    assert not hidden_moves_model.prepare_hidden_moves(tmp_path / "moves", TINY)
