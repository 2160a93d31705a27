# SPDX-License-Identifier: Apache-2.0
"""Networks of diffusers: what they find is what diffusers finds, at every time, and nothing executes on reading."""

import json

import pytest
import torch

from kdlvfm.core import TapError
from kdlvfm.models.weights import WeightsError

pytest.importorskip("diffusers")

from diffusers import DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, UNet2DModel

from kdlvfm.models.diffusers import DiffusersModel, DiT, SavedModel, UNet

SMALL = {UNet: {"widths": (8, 16)}, DiT: {"heads": 2, "head_dim": 8, "depth": 2}}


def make(kind, **changes):
    torch.manual_seed(0)
    return kind(10, **{"size": 8, "channels": 1, "steps": 30, **SMALL[kind], **changes}).eval()


@pytest.fixture(params=[UNet, DiT], ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@torch.no_grad()
def test_noise_is_what_the_network_finds_at_its_time(kind):
    model, states, times = make(kind), torch.randn(3, 1, 8, 8), torch.tensor([0, 29, 7])
    arguments = {"class_labels": torch.zeros(3, dtype=torch.int64)} if kind is DiT else {}
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in arguments.items()}
        expected = model.net(states[i : i + 1], timestep=times[i], **one) if kind is UNet else None
        if kind is DiT:
            expected = model.net(states[i : i + 1], timestep=times[i : i + 1], **one)
        found = model(states, ["noise"], times)["noise"]
        torch.testing.assert_close(found[i : i + 1], expected.sample, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_training_mode_finds_the_same_as_evaluation(kind):
    """Nothing in it is random: diffusers would drop the class of a tenth of the images."""
    model, states, times = make(kind), torch.randn(16, 1, 8, 8), torch.zeros(16, dtype=torch.int64)
    torch.testing.assert_close(model.train()(states, ["noise"], times), model.eval()(states, ["noise"], times))


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
def test_taps_are_of_the_shape_that_they_state(kind, channels):
    model = make(kind, channels=channels, learn_variance=True)
    states, times = torch.randn(2, channels, 8, 8), torch.tensor([3, 4])
    assert model.step_taps == ("noise", "variance")
    found = model(states, (*model.step_taps, "module:proj_out_2" if kind is DiT else "module:conv_in"), times)
    for tap in model.step_taps:
        assert found[tap].shape == (2, model.tap_info(tap).dim, 8, 8)
    assert not torch.equal(found["noise"], found["variance"])
    assert len(found) == 3
    assert "variance" not in make(kind).taps()


@torch.no_grad()
def test_images_without_a_time_are_seen_as_clean_states(kind):
    model, images = make(kind), torch.rand(2, 3, 8, 8)
    expected = model(model.encode(images), ["noise"], torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(model(images, ["noise"]), expected)
    assert model(images, []) == {}


def test_all_of_it_can_learn(kind):
    model = make(kind)
    model(torch.randn(4, 1, 8, 8), ["noise"], torch.arange(4))["noise"].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.card.weights == "random"
    assert set(model.state_dict()) == {f"net.{name}" for name in model.net.state_dict()}


def test_attention_where_it_is_asked_for():
    found = [
        {type(module).__name__ for module in make(UNet, attention=levels).net.modules()} for levels in ([], [1], [0, 1])
    ]
    assert ["Attention" in kinds for kinds in found] == [False, True, True]
    assert ["DownBlock2D" in kinds for kinds in found] == [True, True, False]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make(UNet, size=9), "cannot be halved 1 times"),
        (lambda: make(UNet, widths=(8, 12)), r"\[8, 12\] must be divisible by norm_groups=8"),
        (lambda: make(UNet, attention=[2]), r"attention at \[2\]: resolutions are 0 to 1"),
        (lambda: make(DiT, size=9), "no whole number of patches of 2"),
        (lambda: make(DiT, steps=10, betas="linear"), "use more steps"),
        (lambda: make(UNet, channels=2), "must take 1 or 3"),
        (lambda: make(UNet)(torch.rand(1, 1, 4, 4), ["noise"], torch.zeros(1)), r"takes states \(1, 8, 8\)"),
        (lambda: make(UNet)(torch.rand(1, 3, 8, 8), ["nose"]), "no tap 'nose'. Did you mean noise"),
        (lambda: make(UNet).check_tap("module:conv_inn"), "no sub-module 'conv_inn'"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises((ValueError, TapError), match=message):
        build()


@torch.no_grad()
@pytest.mark.parametrize("kind_of_net", [UNet2DModel, DiTTransformer2DModel])
def test_what_diffusers_saved_is_read(kind_of_net, tmp_path):
    source = make(UNet if kind_of_net is UNet2DModel else DiT)
    source.net.save_pretrained(tmp_path / "unet")
    model = SavedModel(str(tmp_path / "unet"), steps=30, betas="cosine", licence="mit").eval()
    states, times = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    torch.testing.assert_close(model(states, ["noise"], times), source(states, ["noise"], times))
    assert (model.card.weights, model.card.licence, len(model.card.sha256)) == ("file", "mit", 64)


def test_what_is_no_network_of_diffusers_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="is no description of a network"):
        SavedModel(str(tmp_path / "none"))
    folder = tmp_path / "unet"
    make(UNet).net.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "block_out_channels": [8, 8]}))
    with pytest.raises(WeightsError, match=r"does not fit UNet2DModel: of its tensors .* of another shape"):
        SavedModel(str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    with pytest.raises(WeightsError, match="describes 'AutoencoderKL'; UNet2DModel and DiTTransformer2DModel"):
        SavedModel(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="does not exist"):
        SavedModel(str(folder))


@torch.no_grad()
def test_steps_back_are_those_of_diffusers_ddpm():
    """Two implementations of one paper: that of the core takes each state at its own step, this one all at the same."""
    from kdlvfm.core.diffusion import Schedule

    ours = Schedule.named("linear", 50)
    theirs = DDPMScheduler(50, beta_start=1e-4 * 20, beta_end=0.02 * 20, variance_type="fixed_small", clip_sample=True)
    states, noise = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    for t in (49, 20, 1, 0):
        torch.manual_seed(t)
        expected = theirs.step(noise, t, states).prev_sample
        torch.manual_seed(t)
        fresh = torch.randn_like(states)
        found = ours.step_back(states, {"noise": noise}, torch.full((4,), t), fresh)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_pipeline_of_diffusers_takes_the_network_back(tmp_path):
    """What is trained here leaves as diffusers' own network."""
    model = make(UNet)
    pipeline = DDPMPipeline(model.net, DDPMScheduler(30, beta_schedule="squaredcos_cap_v2"))
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(model, DiffusersModel)
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
