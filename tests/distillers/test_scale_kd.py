# SPDX-License-Identifier: Apache-2.0
"""ScaleKD against cosine transforms and loops, and perception against the passes of timm's own ViTs."""

import math

import pytest
import scipy.fft
import timm
import torch
from torch import nn

from kdlvfm.core import Context, TapError, Teacher
from kdlvfm.distillers import ScaleKD, scale_kd_loss
from kdlvfm.distillers.scale_kd import LaterBlocks
from kdlvfm.models.timm import TimmEncoder

VIEWS = ["map", "alternating"]
TINY = {"embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 0}
VITS = {
    "class token": ("vit_tiny_patch16_224", TINY),
    "no prefix": ("vit_tiny_patch16_224", {**TINY, "class_token": False, "global_pool": "avg"}),
    "DINOv3": ("vit_small_patch16_dinov3", TINY),
    "rotations of each block": ("vit_small_patch16_rope_mixed_224", TINY),
}


def maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def without_dc(x):
    """Each channel through a DCT, its first coefficient set to 0, and back."""
    coefficients = scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")
    coefficients[:, :, 0, 0] = 0
    return torch.from_numpy(scipy.fft.idctn(coefficients, axes=(2, 3), norm="ortho"))


def reference(student, teacher, view):
    """One position at a time."""
    if view == "alternating":
        student, teacher = without_dc(student), without_dc(teacher)
    total = 0.0
    for b in range(len(student)):
        for i in range(student.shape[2]):
            for j in range(student.shape[3]):
                s, t = student[b, :, i, j].tolist(), teacher[b, :, i, j].tolist()
                total += sum((x / math.hypot(*s) - y / math.hypot(*t)) ** 2 for x, y in zip(s, t, strict=True))
    return total / len(student)


@pytest.fixture
def make_teacher():
    """A factory of small random ViTs, by what is special about them."""

    def make(kind):
        torch.manual_seed(0)
        name, kwargs = VITS[kind]
        teacher = Teacher(TimmEncoder(name, pretrained=False, model_kwargs=kwargs))
        for parameter in teacher.model.net.get_submodule("blocks").parameters():
            # As they begin, blocks change hardly anything and attend to all tokens alike.
            parameter.data = 0.3 * torch.randn_like(parameter) + (parameter.dim() == 1)
        return teacher

    return make


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(1, 2, 1, 3), (2, 5, 4, 3), (3, 4, 7, 7)])
def test_function_against_transforms_and_loops(shape, view):
    student, teacher = maps(*shape, seed=1) + 2, maps(*shape, seed=2, scale=3) - 1
    assert scale_kd_loss(student, teacher, view).item() == pytest.approx(reference(student, teacher, view), rel=1e-10)


def test_it_is_twice_one_minus_the_cosine_at_each_position():
    student, teacher = maps(2, 5, 4, 3, seed=1), maps(2, 5, 4, 3, seed=2)
    cosine = nn.functional.cosine_similarity(student, teacher, dim=1)
    torch.testing.assert_close(scale_kd_loss(student, teacher), 2 * (1 - cosine).sum() / 2)
    assert scale_kd_loss(-teacher, teacher).item() == pytest.approx(4 * 12)


@pytest.mark.parametrize("view", VIEWS)
def test_properties(view):
    student, teacher = maps(2, 5, 4, 3, seed=1), maps(2, 5, 4, 3, seed=2)
    loss = scale_kd_loss(student, teacher, view)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    shuffled = [x.flatten(2)[..., order].view_as(x) for x in (student, teacher)]
    assert scale_kd_loss(teacher, teacher, view).item() == 0
    assert 0 < loss.item() < 48
    torch.testing.assert_close(scale_kd_loss(7 * student, teacher / 3, view), loss)
    torch.testing.assert_close(scale_kd_loss(*shuffled, view), loss)
    rotation = torch.linalg.qr(maps(5, 5, seed=4)).Q
    rotated = [torch.einsum("oc,bchw->bohw", rotation, x) for x in (student, teacher)]
    torch.testing.assert_close(scale_kd_loss(*rotated, view), loss)


def test_only_the_alternating_view_forgets_what_positions_have_in_common():
    student, teacher = maps(2, 5, 4, 3, seed=1), maps(2, 5, 4, 3, seed=2)
    common = maps(2, 5, 1, 1, seed=3, scale=100)
    torch.testing.assert_close(
        scale_kd_loss(student + common, teacher - common, "alternating"),
        scale_kd_loss(student, teacher, "alternating"),
    )
    assert scale_kd_loss(student + common, teacher + common).item() < 1e-2 * scale_kd_loss(student, teacher).item()


@pytest.mark.parametrize("view", VIEWS)
def test_gradcheck(view):
    student, teacher = maps(2, 3, 2, 2, seed=1).requires_grad_(), maps(2, 3, 2, 2, seed=2)
    assert torch.autograd.gradcheck(lambda x: scale_kd_loss(x, teacher, view), (student,), raise_exception=True)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\) and \(2, 3, 8, 8\) \(teacher\)"):
        scale_kd_loss(maps(2, 3, 4, 4), maps(2, 3, 8, 8))
    with pytest.raises(ValueError, match="view must be 'map' or 'alternating', not 'dct'"):
        scale_kd_loss(maps(2, 3, 4, 4), maps(2, 3, 4, 4), "dct")
    with pytest.raises(ValueError, match="target must be 'raw' or 'standardize', not 'phi_s'"):
        ScaleKD(4, 6, target="phi_s")
    with pytest.raises(ValueError, match="perception needs early_dim"):
        ScaleKD(4, 6, perception=lambda x, _: x)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_half_precision_at_extreme_values(batch, dtype, view):
    for student in (torch.full((batch, 4, 3, 3), 1e4), torch.zeros(batch, 4, 3, 3), 1e4 * maps(batch, 4, 3, 3).float()):
        student = student.to(dtype).requires_grad_()
        loss = scale_kd_loss(student, -student.detach(), view)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("target", ["raw", "standardize"])
def test_class_against_the_function(target):
    scale_kd = ScaleKD(3, 4, map_weight=2.0, alternating_weight=5.0, positions=10, target=target).double()
    student, teacher = maps(2, 3, 2, 3, seed=1), maps(2, 4, 5, 4, seed=2, scale=6) + 1
    terms = scale_kd({"map.-1": student}, {"map.-1": teacher})
    goal = teacher
    if target == "standardize":
        flat = teacher.transpose(0, 1).flatten(1)
        goal = (teacher - flat.mean(1).view(-1, 1, 1)) / flat.std(1, correction=0).view(-1, 1, 1)
    assert list(terms) == ["scale_kd_map", "scale_kd_alternating"]
    for view, weight in (("map", 2.0), ("alternating", 5.0)):
        projected = scale_kd.projectors[view](student, (5, 4)).detach()
        expected = weight * 10 / 20 * reference(projected, goal, view)
        assert terms[f"scale_kd_{view}"].item() == pytest.approx(expected, rel=1e-8)


def test_weights_hold_for_any_size_of_map_unless_told_otherwise():
    student, teacher = {"map.-1": maps(1, 3, 2, 2, seed=1)}, maps(1, 4, 7, 7, seed=2)
    torch.manual_seed(0)
    scaled = ScaleKD(3, 4).double()
    plain = ScaleKD(3, 4, positions=None).double()
    plain.load_state_dict(scaled.state_dict())
    assert scaled(student, {"map.-1": teacher}) == plain(student, {"map.-1": teacher})
    tall = {"map.-1": torch.cat([teacher, teacher], dim=2)}
    for name, term in scaled(student, tall).items():
        torch.testing.assert_close(2 * term, plain(student, tall)[name])


def test_a_view_of_no_weight_is_left_out():
    scale_kd = ScaleKD(3, 4, alternating_weight=0.0)
    assert list(scale_kd({"map.-1": torch.rand(1, 3, 2, 2)}, {"map.-1": torch.rand(1, 4, 2, 2)})) == ["scale_kd_map"]
    assert list(scale_kd.projectors) == ["map"]


def test_a_standardized_teacher_forgets_the_scale_of_each_channel():
    scale_kd = ScaleKD(3, 2).double()
    student, teacher = {"map.-1": maps(2, 3, 4, 4, seed=1)}, maps(2, 2, 4, 4, seed=2)
    outlier = teacher * torch.tensor([1.0, 500.0]).view(2, 1, 1) + 40
    torch.testing.assert_close(scale_kd(student, {"map.-1": outlier}), scale_kd(student, {"map.-1": teacher}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_autocast_at_extreme_values(batch, dtype):
    scale_kd = ScaleKD(3, 8, perception=lambda x, _: 2 * x, early_dim=4)
    student = {
        "map.-1": torch.full((batch, 3, 4, 4), 1e4, dtype=dtype, requires_grad=True),
        "map.-2": torch.zeros(batch, 4, 8, 8, dtype=dtype, requires_grad=True),
    }
    with torch.autocast("cpu", dtype=dtype):
        terms = scale_kd(student, {"map.-1": torch.full((batch, 8, 2, 2), -1e4, dtype=dtype)})
    sum(terms.values()).backward()
    assert len(terms) == 4
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    assert all(x.grad.isfinite().all() for x in (*student.values(), *scale_kd.parameters()))


def test_what_was_perceived_is_compared_in_the_scale_of_the_teacher():
    """Perception that returns what it is to lead to, whatever enters: both views agree with the teacher exactly."""
    teacher = maps(2, 4, 5, 4, seed=2, scale=6) + 1
    seen = []

    def perception(x, features):
        seen.append((x.shape, list(features)))
        return features["map.-1"] + 0 * x

    scale_kd = ScaleKD(3, 4, perception=perception, perception_taps=["module:a"], early_dim=2).double()
    student = {"map.-1": maps(2, 3, 2, 3, seed=1), "map.-2": maps(2, 2, 4, 6, seed=3)}
    terms = scale_kd(student, {"map.-1": teacher, "module:a": teacher})
    assert list(terms)[2:] == ["scale_kd_perceived_map", "scale_kd_perceived_alternating"]
    assert [terms[name].item() for name in list(terms)[2:]] == [0, 0]
    assert seen == [(teacher.shape, ["map.-1", "module:a"])] * 2
    assert scale_kd.student_taps == ("map.-1", "map.-2")
    assert scale_kd.teacher_taps == ("map.-1", "module:a")


def test_perception_is_no_part_of_the_distiller():
    layer = nn.Conv2d(4, 4, 1)
    scale_kd = ScaleKD(3, 4, perception=lambda x, _: layer(x), early_dim=2)
    scale_kd_of_module = ScaleKD(3, 4, perception=layer, early_dim=2)
    assert scale_kd.state_dict().keys() == scale_kd_of_module.state_dict().keys()
    assert len(list(scale_kd.parameters())) == len(list(scale_kd_of_module.parameters()))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", VITS)
def test_later_blocks_are_those_of_the_teacher(make_teacher, kind, count):
    """The teacher's own map, entered where it belongs, comes out as the teacher's last."""
    teacher = make_teacher(kind)
    blocks = LaterBlocks(teacher, count)
    features = teacher(torch.rand(2, 3, 48, 80), (f"map.{3 - count}", "map.-1", *blocks.taps))
    assert bool(blocks.taps) == (kind != "no prefix")
    result = blocks(features[f"map.{3 - count}"], features)
    torch.testing.assert_close(result, features["map.-1"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(result, features[f"map.{3 - count}"], atol=1.0)


def test_a_step_with_perception_reaches_the_student_and_leaves_the_teacher(make_teacher, make_step, student, task):
    teacher = make_teacher("DINOv3")
    context = Context(student, teacher, task, num_classes=5, num_samples=12)
    scale_kd = ScaleKD.from_context(context, perception_blocks=2)
    assert scale_kd.teacher_taps == ("map.-1", "module:blocks.1")
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    step = make_step(teacher=teacher, images=torch.rand(4, 3, 24, 32))
    (update,) = scale_kd.updates(step)
    terms = update.distillation
    assert list(terms) == [f"scale_kd{path}_{view}" for path in ("", "_perceived") for view in VIEWS]
    torch.stack([terms[f"scale_kd_perceived_{view}"] for view in VIEWS]).sum().backward()
    assert all((p.grad != 0).any() for p in student.net["stages"][1].parameters())
    assert all(p.grad is None for p in student.net["stages"][2].parameters())
    assert all((p.grad != 0).any() for p in scale_kd.early_projectors.parameters())
    assert all(p.grad is None for p in (*teacher.model.parameters(), *scale_kd.projectors.parameters()))
    assert all(torch.equal(before[name], value) for name, value in teacher.model.state_dict().items())
    assert not any("blocks" in name for name in scale_kd.state_dict())


def test_perception_in_half_precision(make_teacher):
    teacher = make_teacher("class token").bfloat16()
    blocks = LaterBlocks(teacher, 2)
    scale_kd = ScaleKD(3, 16, perception=blocks, perception_taps=blocks.taps, early_dim=4)
    student = {"map.-1": torch.rand(2, 3, 2, 2), "map.-2": torch.rand(2, 4, 4, 4)}
    terms = scale_kd(student, teacher(torch.rand(2, 3, 32, 32).bfloat16(), scale_kd.teacher_taps))
    sum(terms.values()).backward()
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    assert all(p.grad.isfinite().all() for p in scale_kd.parameters())


def test_what_has_no_such_blocks_is_refused(context, make_teacher, student, task):
    with pytest.raises(ValueError, match=r"perception_blocks=2 needs a teacher that is a plain ViT.*leave perception"):
        ScaleKD.from_context(context, perception_blocks=2)
    vit = Context(student, make_teacher("class token"), task, num_classes=5, num_samples=12)
    for count in (4, -1):
        with pytest.raises(ValueError, match=f"perception_blocks must be from 1 to 3 with .*, not {count}"):
            ScaleKD.from_context(vit, perception_blocks=count)
    with pytest.raises(ValueError, match=r"lead to map\.3: teacher_tap must be it, not map\.2"):
        ScaleKD.from_context(vit, perception_blocks=1, teacher_tap="map.-2")
    swin = Teacher(TimmEncoder("swin_tiny_patch4_window7_224", pretrained=False, model_kwargs={"depths": (1, 1, 1, 1)}))
    with pytest.raises(ValueError, match="needs a teacher that is a plain ViT"):
        LaterBlocks(swin, 1)


def test_from_context_reads_the_dimensions(context):
    scale_kd = ScaleKD.from_context(context)
    assert [p.key.weight.shape for p in scale_kd.projectors.values()] == [(12, 8)] * 2
    scale_kd = ScaleKD.from_context(context, student_tap="map.0", teacher_tap="decoder", map_weight=1.0)
    assert [p.key.weight.shape for p in scale_kd.projectors.values()] == [(24, 4)] * 2
    assert (scale_kd.student_taps, scale_kd.teacher_taps) == (("map.0",), ("decoder",))
    with pytest.raises(TapError, match=r"no tap .map\.3"):
        ScaleKD.from_context(context, student_tap="map.3")


def test_timm_has_the_parts_that_perception_reads():
    """A change of timm shows here first."""
    net = timm.create_model("vit_small_patch16_dinov3", pretrained=False, **TINY)
    assert net.num_prefix_tokens == 5
    assert {"blocks", "rope"} <= dict(net.named_children()).keys()
