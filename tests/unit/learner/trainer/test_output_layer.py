"""The chunked output layer against the plain one: autograd over a full [tokens, vocabulary] tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.models.logits import LogitTransform
from common.protocol.schema import LOGPROB_FLOOR, PAD_ID
from learner.trainer.losses import topk_divergence
from learner.trainer.output_layer import ChunkView, OutputLayer

T, V, D, K = 23, 101, 12, 7


class Case:
    """A head and the inputs of one micro-batch, from a seed."""

    def __init__(self, *, bias: bool = False, transform: LogitTransform | None = None, chunk: int = 5) -> None:
        torch.manual_seed(0)
        linear = nn.Linear(D, V, bias=bias)
        nn.init.normal_(linear.weight, std=0.5)
        self.layer = OutputLayer(linear, transform or LogitTransform(), chunk)
        self.hidden = torch.randn(T, D).requires_grad_()
        self.ids = torch.stack([torch.randperm(V)[:K] for _ in range(T)])
        self.sampled = torch.randint(0, V, (T,))
        self.sampled[0] = self.ids[0, 3]  # once inside the support, the others mostly outside
        teacher = torch.randn(T, V).mul(2).log_softmax(-1)
        self.teacher = teacher.gather(-1, self.ids)
        self.teacher_tail = teacher.scatter(-1, self.ids, -math.inf).logsumexp(-1)
        self.weights = torch.rand(T)

    def loss(self, chunk: ChunkView) -> Tensor:
        """A loss that uses all three outputs."""
        rows = chunk.rows
        values = topk_divergence(
            chunk.logprobs,
            self.teacher[rows],
            form="tail",
            student_tail=chunk.tail,
            teacher_tail=self.teacher_tail[rows],
        )
        return ((values + 0.3 * chunk.sampled.square()) * self.weights[rows]).sum()

    def plain(self, temperature: float = 1.0) -> Tensor:
        """The same by autograd over the whole tensor, in float64."""
        transform = self.layer.transform
        bias = None if self.layer.bias is None else self.layer.bias.double()
        z = nn.functional.linear(self.hidden.double(), self.layer.weight.double(), bias) * transform.scale
        if transform.softcap is not None:
            z = transform.softcap * torch.tanh(z / transform.softcap)
        logprobs = (z / temperature).log_softmax(-1)
        valid = self.ids != PAD_ID
        safe = torch.where(valid, self.ids, self.ids[:, :1])
        inside = torch.zeros(T, V, dtype=torch.bool).scatter(-1, safe, True)
        return self.loss(
            ChunkView(
                slice(0, T),
                torch.where(valid, logprobs.gather(-1, safe), LOGPROB_FLOOR),
                logprobs.masked_fill(inside, -math.inf).logsumexp(-1),
                logprobs.gather(-1, self.sampled.unsqueeze(-1)).squeeze(-1),
            )
        )

    def run(self, forward: Callable[[], Tensor]) -> list[Tensor]:
        """[value, gradients]."""
        inputs = [self.hidden, self.layer.weight, *([self.layer.bias] if self.layer.bias is not None else [])]
        value = forward()
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    def chunked(self, temperature: float = 1.0) -> Tensor:
        return self.layer(self.hidden, self.ids, self.sampled, temperature=temperature, loss=self.loss)


def assert_equal_gradients(got: list[Tensor], expected: list[Tensor], rtol: float = 1e-5) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert difference < rtol


@pytest.mark.parametrize("chunk", [1, 5, T, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_equals_unchunked(chunk: int, bias: bool) -> None:
    case = Case(bias=bias, chunk=chunk)
    assert_equal_gradients(case.run(case.chunked), case.run(case.plain))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "transform", [LogitTransform(scale=0.25), LogitTransform(softcap=3.0), LogitTransform(2.0, 5.0)]
)
def test_scaled_and_capped_logits(transform: LogitTransform, temperature: float) -> None:
    case = Case(transform=transform)
    got, expected = case.run(lambda: case.chunked(temperature)), case.run(lambda: case.plain(temperature))
    assert_equal_gradients(got, expected)
    bare = Case()
    assert abs(bare.run(bare.chunked)[0] - got[0]) > 1e-2  # the transform does something here


def test_padded_columns_have_no_effect() -> None:
    case = Case()
    case.ids[2:9, 4:] = PAD_ID
    case.teacher[2:9, 4:] = LOGPROB_FLOOR
    assert_equal_gradients(case.run(case.chunked), case.run(case.plain))


def test_the_support_may_be_the_whole_vocabulary() -> None:
    case = Case()
    case.ids = torch.arange(V).repeat(T, 1)
    teacher = torch.randn(T, V).log_softmax(-1)
    case.teacher, case.teacher_tail = teacher, torch.full((T,), LOGPROB_FLOOR)
    got = case.run(case.chunked)
    logprobs = (case.hidden.double() @ case.layer.weight.double().t()).log_softmax(-1)
    sampled = logprobs.gather(-1, case.sampled.unsqueeze(-1)).squeeze(-1)
    full = ((logprobs.exp() * (logprobs - teacher)).sum(-1) + 0.3 * sampled.square()) * case.weights
    expected = [full.sum().detach(), *torch.autograd.grad(full.sum(), [case.hidden, case.layer.weight])]
    assert_equal_gradients(got, expected)


@pytest.mark.parametrize("gap", [10.0, 25.0, 60.0, 500.0])
def test_peaked_distributions_keep_the_tail_exact(gap: float) -> None:
    """All mass but e^-gap on one id: the relative error of the tail is small, gradients stay finite."""
    linear = nn.Linear(1, 4, bias=False)
    linear.weight.data = torch.tensor([[gap], [0.0], [-1.0], [-2.0]])
    layer = OutputLayer(linear, LogitTransform(), 8)
    seen: list[ChunkView] = []

    def loss(chunk: ChunkView) -> Tensor:
        seen.append(chunk)
        return topk_divergence(
            chunk.logprobs,
            torch.tensor([[-0.5]]),
            form="tail",
            student_tail=chunk.tail,
            teacher_tail=torch.tensor([math.log1p(-math.exp(-0.5))]),
        ).sum()

    hidden = torch.ones(1, 1, requires_grad=True)
    layer(hidden, torch.tensor([[0]]), torch.tensor([2]), loss=loss).backward()
    assert hidden.grad is not None
    assert linear.weight.grad is not None
    assert hidden.grad.isfinite().all()
    assert linear.weight.grad.isfinite().all()
    if gap <= 60:
        rest = 1 + math.exp(-1) + math.exp(-2)
        expected = math.log(rest) - gap - math.log1p(rest * math.exp(-gap))
        assert seen[0].tail.item() == pytest.approx(expected, rel=1e-6)


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation creates."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_tokens_times_vocabulary_is_made() -> None:
    case = Case(chunk=2)
    with _Largest() as seen:
        case.run(case.chunked)
    assert seen.elements <= max(V * D, 2 * V, T * D)
    with _Largest() as seen:
        case.run(case.plain)
    assert seen.elements >= T * V  # the measure detects such a tensor


def test_reading_gives_every_logit_once_and_no_gradient() -> None:
    case = Case(transform=LogitTransform(2.0, 5.0))
    got = torch.empty(T, V)
    case.layer(case.hidden, temperature=0.5, read=lambda rows, logits: got[rows].copy_(logits))
    expected = 5.0 * torch.tanh(2.0 * case.hidden @ case.layer.weight.t() / 5.0) / 0.5
    torch.testing.assert_close(got, expected.detach())
    assert not got.requires_grad


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_tied_weight_s_gradient_may_be_added_without_autograd(scale: float) -> None:
    """The sum equals autograd's: gradients of the head and of the embedding, and the gradient before."""
    gradients = []
    for adds in (False, True):
        case = Case()
        case.layer.adds_gradient = adds
        for ids in (torch.arange(T), torch.arange(T).flip(0)):
            hidden = nn.functional.embedding(ids, case.layer.weight)
            loss = case.layer(hidden, case.ids, case.sampled, loss=case.loss)
            (scale * loss).backward()
        gradients.append(case.layer.weight.grad)
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-7)


def test_a_frozen_head_gets_no_gradient_and_hidden_states_still_do() -> None:
    case = Case()
    case.layer.weight.requires_grad_(False)
    case.chunked().backward()
    assert case.layer.weight.grad is None
    reference = Case()
    reference.plain().backward()
    torch.testing.assert_close(case.hidden.grad, reference.hidden.grad, rtol=1e-4, atol=1e-6)


def test_a_second_backward_is_refused() -> None:
    case = Case()
    value = case.chunked()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        value.backward()


def test_bfloat16_weights_sum_their_gradient_in_float32() -> None:
    """With one token a chunk, bf16 sums would lose small addends."""
    case, reference = Case(chunk=1), Case()
    case.layer.to(torch.bfloat16)
    reference.layer.weight.data = case.layer.weight.data.float()
    case.hidden = case.hidden.detach().bfloat16().requires_grad_()
    reference.hidden = case.hidden.detach().float().requires_grad_()
    got, expected = case.run(case.chunked), reference.run(reference.plain)
    assert got[1].dtype == torch.bfloat16
    assert_equal_gradients(got, expected, rtol=1e-2)


def test_a_bfloat16_head_computes_its_loss_from_float32_logits() -> None:
    case = Case(bias=True)
    case.layer.to(torch.bfloat16)
    case.hidden = case.hidden.detach().to(torch.bfloat16).requires_grad_()
    got, expected = case.run(case.chunked), case.run(case.plain)  # `plain` takes the stored values to float64
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert_equal_gradients(got[1:], expected[1:], rtol=2**-8)
