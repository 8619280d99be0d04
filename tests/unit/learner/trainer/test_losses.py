"""Every form and direction against the full-vocabulary divergence, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.protocol.schema import LOGPROB_FLOOR
from learner.trainer.losses import limit_per_token, policy_gradient, topk_divergence

FORMS = ("tail", "raw", "renorm", "generalized", "exact")
DIRECTIONS = ("reverse", "forward", "jsd")
T, V = 5, 40


def logits(seed: int, scale: float = 2.0, tokens: int = T, vocabulary: int = V) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * scale


def oracle(p: Tensor, q: Tensor, direction: str, beta: float = 0.5) -> Tensor:
    """The full divergence of distributions ``[T, V]``, term by term."""
    if direction == "forward":
        p, q = q, p
    if direction != "jsd":
        return (p * (p / q).log()).sum(-1)
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)


def top_ids(student: Tensor, k: int) -> Tensor:
    return student.topk(k, dim=-1).indices


def gather(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs at ids, log of the rest's mass), in float64 and by masking, not by subtraction."""
    logprobs = z.log_softmax(-1)
    rest = logprobs.scatter(-1, ids, -math.inf).logsumexp(-1)
    return logprobs.gather(-1, ids), rest


def value_on(z: Tensor, teacher: Tensor, k: int, form: str, direction: str, beta: float = 0.5) -> Tensor:
    ids = top_ids(z.detach(), k)
    student, student_tail = gather(z, ids)
    scores, teacher_tail = gather(teacher, ids)
    return topk_divergence(
        student,
        scores,
        form=form,
        direction=direction,
        beta=beta,
        student_tail=student_tail,
        teacher_tail=teacher_tail,
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_the_whole_vocabulary_gives_the_full_divergence(form: str, direction: str) -> None:
    student, teacher = logits(0), logits(1)
    expected = oracle(student.softmax(-1), teacher.softmax(-1), direction, 0.3)
    got = value_on(student, teacher, V, form, direction, 0.3)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tail_rises_to_the_full_divergence_from_below_as_k_grows(direction: str) -> None:
    student, teacher = logits(0), logits(1)
    full = oracle(student.softmax(-1), teacher.softmax(-1), direction)
    values = torch.stack([value_on(student, teacher, k, "tail", direction).double() for k in (1, 4, 16, 32, V)])
    assert (values >= -1e-6).all()
    assert (values.diff(dim=0) >= -1e-6).all()
    assert (values <= full + 1e-5).all()
    assert (values[0] < 0.9 * full).any()


def test_forward_and_reverse_are_not_swapped() -> None:
    """p certain, q spread: KL(p‖q) is small change, KL(q‖p) is large."""
    p, q = torch.tensor([[0.98, 0.01, 0.01]]).log(), torch.tensor([[0.4, 0.3, 0.3]]).log()
    reverse = topk_divergence(p, q, form="exact", direction="reverse").item()
    forward = topk_divergence(p, q, form="exact", direction="forward").item()
    assert reverse == pytest.approx(0.98 * math.log(0.98 / 0.4) + 0.02 * math.log(0.01 / 0.3), rel=1e-5)
    assert forward == pytest.approx(0.4 * math.log(0.4 / 0.98) + 0.6 * math.log(0.3 / 0.01), rel=1e-5)


def test_beta_is_the_weight_of_the_teacher() -> None:
    p, q = torch.tensor([[0.7, 0.3]]).log(), torch.tensor([[0.2, 0.8]]).log()
    values = {beta: topk_divergence(p, q, form="exact", direction="jsd", beta=beta).item() for beta in (1e-4, 0.9)}
    # JSD / β tends to KL(teacher‖student) as the teacher's weight vanishes.
    assert values[1e-4] / 1e-4 == pytest.approx(0.2 * math.log(0.2 / 0.7) + 0.8 * math.log(0.8 / 0.3), rel=1e-2)
    m = [0.9 * 0.2 + 0.1 * 0.7, 0.9 * 0.8 + 0.1 * 0.3]
    by_hand = 0.9 * sum(x * math.log(x / y) for x, y in zip((0.2, 0.8), m, strict=True))
    by_hand += 0.1 * sum(x * math.log(x / y) for x, y in zip((0.7, 0.3), m, strict=True))
    assert values[0.9] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_agrees_with_finite_differences(form: str, direction: str) -> None:
    """Through the student's logits and its softmax, in float32: central differences of a float64 twin."""
    k = V if form == "exact" else 6
    student, teacher = logits(2, 1.0, tokens=2), logits(3, 1.0, tokens=2)
    ids = top_ids(student, k)
    scores, teacher_tail = gather(teacher, ids)

    def total(z: Tensor) -> Tensor:
        values, tail = gather(z, ids)
        return reference_value(values, tail, scores, teacher_tail, form, direction).sum()

    z = student.clone().requires_grad_()
    values, tail = gather(z, ids)
    topk_divergence(
        values,
        scores,
        form=form,
        direction=direction,
        student_tail=tail,
        teacher_tail=teacher_tail,
    ).sum().backward()
    assert z.grad is not None
    step = 1e-5
    numeric = torch.zeros_like(student)
    for row in range(student.shape[0]):
        for column in range(V):
            moved = torch.zeros_like(student)
            moved[row, column] = step
            numeric[row, column] = (total(student + moved) - total(student - moved)) / (2 * step)
    torch.testing.assert_close(z.grad, numeric, rtol=2e-4, atol=2e-6)


def reference_value(lp: Tensor, lt: Tensor, lq: Tensor, lqt: Tensor, form: str, direction: str) -> Tensor:
    """METHOD's table in float64, from probabilities."""
    p, q = lp.exp(), lq.exp()
    if form == "tail":
        p, q = torch.cat([p, lt.exp().unsqueeze(-1)], -1), torch.cat([q, lqt.exp().unsqueeze(-1)], -1)
    if form == "renorm":
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    value = oracle(p, q, direction)
    if form == "generalized" and direction != "jsd":
        value = value + (1 if direction == "reverse" else -1) * (q - p).sum(-1)
    return value


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_at_equality_is_zero_except_for_raw(form: str, direction: str) -> None:
    z = logits(4).requires_grad_()
    value_on(z, z.detach(), V if form == "exact" else 8, form, direction).sum().backward()
    assert z.grad is not None
    largest = z.grad.abs().max().item()
    if form == "raw" and direction != "jsd":  # in `jsd` the offending terms cancel
        assert largest > 1e-2
    else:
        assert largest < 1e-7


def test_raw_pushes_mass_off_the_support_at_equality() -> None:
    z = logits(4).requires_grad_()
    value_on(z, z.detach(), 8, "raw", "reverse").sum().backward()
    ids = top_ids(z.detach(), 8)
    assert z.grad is not None
    assert (z.grad.gather(-1, ids) > 0).all()  # descent lowers every logit of the support


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_generalized_is_never_negative(direction: str) -> None:
    for seed in range(10):
        assert (value_on(logits(seed), logits(seed + 100), 4, "generalized", direction) >= -1e-6).all()


def test_renorm_with_one_id_gives_no_signal() -> None:
    z = logits(5).requires_grad_()
    value = value_on(z, logits(6), 1, "renorm", "reverse")
    value.sum().backward()
    assert z.grad is not None
    assert value.abs().max().item() == 0
    assert z.grad.abs().max().item() == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mass", [1e-2, 1e-4, 1e-7, 1e-12])
def test_small_tails_keep_their_value_and_gradient(mass: float, direction: str) -> None:
    """The tail is all that differs: its term must come out to a relative 1e-3, not drown in 1 - Σ."""
    student = torch.tensor([[math.log(0.6) + math.log1p(-mass), math.log(0.4) + math.log1p(-mass)]]).double()
    other = torch.tensor([[math.log(0.6) + math.log1p(-3 * mass), math.log(0.4) + math.log1p(-3 * mass)]]).double()
    tail = torch.tensor([math.log(mass)], dtype=torch.float64).requires_grad_()
    teacher_tail = torch.tensor([math.log(3 * mass)], dtype=torch.float64)
    got = topk_divergence(
        student,
        other,
        form="tail",
        direction=direction,
        student_tail=tail,
        teacher_tail=teacher_tail,
    )
    (grad,) = torch.autograd.grad(got.sum(), tail)
    p, q = mass, 3 * mass
    m = (p + q) / 2
    expected = {
        "reverse": p * (math.log(p / q) + 1),
        "forward": -q,
        "jsd": 0.5 * p * math.log(p / m),
    }[direction]
    assert grad.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("mass", [1e-1, 1e-3, 1e-5])
def test_tails_left_out_are_computed_from_the_values(mass: float) -> None:
    student = torch.tensor([[0.7, 0.3]]).double().mul(1 - mass).log()
    teacher = torch.tensor([[0.5, 0.5]]).double().mul(1 - 2 * mass).log()
    given_tails = topk_divergence(
        student,
        teacher,
        form="tail",
        student_tail=torch.tensor([math.log(mass)]),
        teacher_tail=torch.tensor([math.log(2 * mass)]),
    )
    torch.testing.assert_close(
        topk_divergence(student.float(), teacher.float(), form="tail"), given_tails, atol=1e-6, rtol=1e-4
    )


def test_no_tail_left_is_no_trouble() -> None:
    """Both sides put everything on the support; rounding may even make it a little more than everything."""
    student = torch.tensor([[0.5, 0.5], [0.5000001, 0.5]]).log().requires_grad_()
    teacher = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    value = topk_divergence(student, teacher, form="tail")
    value.sum().backward()
    assert value[0].item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75), rel=1e-3)
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert value.isfinite().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("empty", [-math.inf, LOGPROB_FLOOR])
def test_padding_changes_nothing(form: str, direction: str, empty: float) -> None:
    """Columns without mass on either side: same value, same gradient, no NaN, whatever the direction."""
    ids = top_ids(logits(7), 6)
    student, student_tail = (x.float() for x in gather(logits(7), ids))
    teacher, teacher_tail = (x.float() for x in gather(logits(8), ids))
    blank = torch.full((T, 3), empty)
    results = []
    for pad in (False, True):
        values = student.clone().requires_grad_()
        got = topk_divergence(
            torch.cat([values, blank], -1) if pad else values,
            torch.cat([teacher, blank], -1) if pad else teacher,
            form=form,
            direction=direction,
            student_tail=student_tail,
            teacher_tail=teacher_tail,
        )
        got.sum().backward()
        results.append((got.detach(), values.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_infinities_on_one_side_stay_finite(form: str, direction: str) -> None:
    student = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log().requires_grad_()
    teacher = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]).log()
    value = topk_divergence(student, teacher, form=form, direction=direction)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    if direction == "reverse" and form != "renorm":
        assert value[0].item() == pytest.approx(0.5 * -LOGPROB_FLOOR, rel=1e-2)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    value_on(student, teacher, 4, "tail", "reverse").sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_nan_is_not_hidden() -> None:
    student = torch.tensor([[math.nan, -1.0]])
    assert topk_divergence(student, torch.tensor([[-1.0, -1.0]]), form="tail").isnan().all()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.1, 12.0),
    k=st.integers(1, V),
    direction=st.sampled_from(DIRECTIONS),
)
def test_tail_lies_between_zero_and_the_full_divergence(seed: int, scale: float, k: int, direction: str) -> None:
    student, teacher = logits(seed, scale), logits(seed + 1, scale)
    full = oracle(student.softmax(-1), teacher.softmax(-1), direction)
    value = value_on(student, teacher, k, "tail", direction).double()
    assert (value >= -1e-5).all()
    assert (value <= full * (1 + 1e-4) + 1e-5).all()


def test_policy_gradient_is_the_gradient_of_reverse_kl_on_average() -> None:
    """Summed over all tokens with their probabilities, the estimator is the exact gradient."""
    z, teacher = logits(9, tokens=1).requires_grad_(), logits(10, tokens=1)
    logprobs = z.log_softmax(-1)[0]
    target = teacher.log_softmax(-1)[0]
    behaviour = logprobs.detach()
    expected_loss = (behaviour.exp() * policy_gradient(logprobs, target, behaviour)).sum()
    (estimate,) = torch.autograd.grad(expected_loss, z, retain_graph=True)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - target)).sum(), z)
    torch.testing.assert_close(estimate, exact, rtol=1e-4, atol=1e-6)


def test_policy_gradient_ratio_corrects_for_the_behaviour_and_is_cut() -> None:
    student, teacher, behaviour = torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([-2.0])
    assert policy_gradient(student, teacher, behaviour).item() == pytest.approx(2 * math.e, rel=1e-6)
    assert policy_gradient(student, teacher, behaviour, ratio_clip=1.5).item() == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_an_entry_over_its_limit_keeps_the_limit_and_has_no_gradient(direction: str) -> None:
    """Against the full vocabulary in float64, entry by entry; the gradient is that of the entries below the limit."""
    z, teacher, clip = logits(3).requires_grad_(), logits(4), 0.05
    log_p, log_q = z.log_softmax(-1), teacher.log_softmax(-1)
    first, second = (log_p, log_q) if direction == "reverse" else (log_q, log_p)
    entries = first.exp() * (first - second)
    above = entries > clip
    assert 0 < int(above.sum()) < above.numel() / 2
    expected = entries[~above].sum() + clip * int(above.sum())
    found = topk_divergence(log_p, log_q, form="exact", direction=direction, clip_per_entry=clip).sum()  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found, z, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0], rtol=1e-5, atol=1e-6)


def test_the_tail_is_an_entry_too() -> None:
    student, teacher = torch.tensor([[0.2, 0.7]]).log(), torch.tensor([[0.89, 0.01]]).log()
    clipped = topk_divergence(student[:, :1], teacher[:, :1], form="tail", clip_per_entry=0.5)
    terms = [0.2 * math.log(0.2 / 0.89), min(0.5, 0.8 * math.log(0.8 / 0.11))]
    assert clipped.item() == pytest.approx(sum(terms), rel=1e-5)


def test_a_token_over_the_limit_has_no_gradient() -> None:
    values = torch.tensor([0.5, 3.0], requires_grad=True)
    limited = limit_per_token(values, 1.0)
    limited.sum().backward()
    assert limited.tolist() == [0.5, 1.0]
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_logprobs": torch.zeros(T, 3)}, "at the same ids"),
        ({"student_tail": torch.zeros(T + 1)}, "student_tail is"),
        ({"form": "tails"}, "unknown form"),
        ({"direction": "backward"}, "unknown direction"),
        ({"beta": 1.0}, "beta"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    usual = {"student_logprobs": torch.zeros(T, 2), "teacher_logprobs": torch.zeros(T, 2), "form": "tail"}
    with pytest.raises(ValueError, match=message):
        topk_divergence(**{**usual, **arguments})
