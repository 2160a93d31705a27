# SPDX-License-Identifier: Apache-2.0
"""The aligner puts projector, target and size together; PHI-S is fitted in the first training steps."""

import pytest
import torch

from kdlvfm.core import align
from kdlvfm.core.aligner import Aligner, Targets
from kdlvfm.core.phi_s import PHISTransform


@pytest.mark.parametrize("target", ["raw", "standardize", "layernorm"])
@pytest.mark.parametrize("resize", ["larger", "student", "teacher", [5, 7]])
def test_both_come_out_projected_normalised_and_resized(resize, target):
    aligner = Aligner(3, 5, resize=resize, target=target)
    student, teacher = torch.rand(2, 3, 4, 6), 50 * torch.rand(2, 5, 8, 3)
    expected = align.match_size(aligner.projector(student), align.normalise_target(teacher, target), resize)
    for found, wanted in zip(aligner(student, teacher), expected, strict=True):
        assert torch.equal(found, wanted)


def test_vectors_are_projected_too():
    aligner = Aligner(3, 5, target="raw")
    student, teacher = torch.rand(4, 3), torch.rand(4, 5)
    projected, goal = aligner(student, teacher)
    weight, bias = aligner.projector.weight[:, :, 0, 0], aligner.projector.bias
    torch.testing.assert_close(projected, student @ weight.T + bias)
    assert torch.equal(goal, teacher)


def test_the_teacher_gets_no_gradient_and_half_precision_is_promoted():
    aligner = Aligner(3, 5).bfloat16()
    teacher = torch.rand(2, 5, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    projected, goal = aligner(torch.rand(2, 3, 4, 4, dtype=torch.bfloat16), teacher)
    assert projected.dtype == goal.dtype == torch.float32
    assert not goal.requires_grad


def test_unknown_options_are_refused_when_built():
    with pytest.raises(ValueError, match="resize must be"):
        Aligner(3, 5, resize="smaller")
    with pytest.raises(ValueError, match="target must be"):
        Aligner(3, 5, target="whiten")
    with pytest.raises(ValueError, match="projector must be"):
        Aligner(3, 5, projector="magic")


def batches(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 12, 4, 4, generator=generator) * 3 + 1 for _ in range(count)]


def test_phi_s_is_fitted_to_the_first_steps_and_then_left():
    targets, seen = Targets(12, "phi_s", fit_steps=6), batches(9)
    for batch in seen:
        targets(batch)
    expected = PHISTransform(12)
    for batch in seen[:6]:
        expected.observe(batch)
    expected.refit()
    torch.testing.assert_close(targets(seen[8]), expected(seen[8]))


def test_phi_s_does_not_fit_in_evaluation_and_goes_on_after_a_checkpoint():
    first, seen = Targets(12, "phi_s", fit_steps=6), batches(8)
    for batch in seen[:3]:
        first(batch)
    second = Targets(12, "phi_s", fit_steps=6)
    second.load_state_dict(first.state_dict())
    kept = second.phi_s.weight.clone()
    second.eval()(seen[7])
    assert torch.equal(second.phi_s.weight, kept)
    second.train()
    for batch in seen[3:]:
        assert torch.equal(first(batch), second(batch))
    assert not torch.equal(second.phi_s.weight, kept)
