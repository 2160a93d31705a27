# SPDX-License-Identifier: Apache-2.0
import pytest
import timm
import torch
from torch import nn

from kdlvfm.reporting.cost import BATCH, count_macs, count_parameters, measure_inference


def test_convolution():
    conv = nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1, bias=False)
    assert count_macs(conv, (16, 12)) == 8 * 6 * 8 * 3 * 3 * 3


def test_linear():
    assert count_macs(nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 7)), (4, 5)) == 3 * 4 * 5 * 7


@pytest.mark.parametrize("fused", [True, False])
def test_vit_counts_its_attention(fused):
    depth, dim, size, patch = 3, 24, 32, 8
    vit = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=size, patch_size=patch, embed_dim=dim, depth=depth,
        num_heads=2, num_classes=0,
    )  # fmt: skip
    for block in vit.blocks:
        block.attn.fused_attn = fused
    patches = (size // patch) ** 2
    tokens = patches + 1
    linear = 4 * dim * dim + 2 * dim * 4 * dim
    expected = patches * dim * 3 * patch**2 + depth * (tokens * linear + 2 * tokens**2 * dim)
    assert count_macs(vit, (size, size)) == expected


def test_multi_head_attention_is_counted_though_torch_has_a_fast_path():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(3, nhead=1, dim_feedforward=12, batch_first=True)

        def forward(self, images):
            return self.layer(images.flatten(2).transpose(1, 2))

    net, tokens = Net().requires_grad_(False), 20
    fast = torch.backends.mha.get_fastpath_enabled()
    assert count_macs(net, (4, 5)) == tokens * (4 * 3 * 3 + 2 * 3 * 12) + 2 * tokens**2 * 3
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_modes_statistics_and_random_state_stay_as_they_were():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval(), nn.Dropout(), nn.BatchNorm2d(4))
    before, state = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state()
    count_macs(net, (4, 4))
    assert [module.training for module in net] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_part_of_a_network_through_forward():
    net = nn.ModuleDict({"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 9, 1)})
    assert count_macs(net, (2, 2), forward=lambda images: net["a"](images)) == 4 * 3 * 4


class Clock(nn.Module):
    """Takes a known time for each image by moving the clock, and remembers the batches."""

    def __init__(self, monkeypatch, seconds, most=BATCH):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.now, self.seconds, self.most, self.batches = 0.0, seconds, most, []
        monkeypatch.setattr("kdlvfm.reporting.cost.time.perf_counter", lambda: self.now)

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batches.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError
        jitter = 1 + (len(self.batches) % 10 == 0)  # every tenth takes twice as long
        self.now += self.seconds * len(images) * jitter
        return images


def test_times_are_of_single_images_and_of_batches(monkeypatch):
    net = Clock(monkeypatch, 0.001)
    found = measure_inference(net, (6, 8), seconds=10.0)
    assert found["latency_p50"] == pytest.approx(0.001)
    assert found["latency_p95"] == pytest.approx(0.002)
    assert found["images_per_second"] == pytest.approx(1000)
    counts = (found["repetitions"], found["batch_size"], found["batches"])
    assert counts == (100, 32, 20)
    assert net.batches == [1] * 103 + [32] * 21
    assert (found["device"], found["precision"], found["input_size"]) == ("cpu", "float32", [6, 8])
    assert found["threads"] == torch.get_num_threads()
    assert net.training


@pytest.mark.parametrize(("seconds", "repetitions", "batch"), [(0.05, 100, 32), (0.5, 8, 4), (4.0, 1, 1), (60.0, 1, 1)])
def test_slow_networks_are_measured_in_bounded_time(seconds, repetitions, batch, monkeypatch):
    net = Clock(monkeypatch, seconds)
    found = measure_inference(net, (2, 2), seconds=10.0)
    assert found["latency_p50"] == pytest.approx(seconds)
    assert (found["latency_p95"] is None) == (found["repetitions"] < 20)
    assert found["images_per_second"] == pytest.approx(1 / seconds)
    assert found["repetitions"] <= repetitions
    assert found["batch_size"] <= batch
    assert net.now <= max(1.5 * 10, 2 * seconds)


def test_a_batch_that_does_not_fit_into_memory_is_halved(monkeypatch):
    net = Clock(monkeypatch, 0.001, most=8)
    found = measure_inference(net, (2, 2))
    assert (found["batch_size"], found["images_per_second"]) == (8, pytest.approx(1000))


def test_what_is_timed_can_be_told_and_the_random_state_stays():
    net, state, sizes = nn.Conv2d(3, 4, 1), torch.get_rng_state(), set()

    def forward(images):
        sizes.add(images.shape[2:])
        return net(images)

    found = measure_inference(net, (4, 6), forward=forward, seconds=1)
    assert sizes == {(4, 6)}
    assert torch.equal(torch.get_rng_state(), state)
    assert found["latency_p50"] > 0


def test_parameters_shared_or_frozen_count_once():
    first = nn.Linear(3, 3, bias=False)
    net = nn.ModuleList([first, first, nn.Linear(3, 2).requires_grad_(False)])
    assert count_parameters(net) == 9 + 8
