# SPDX-License-Identifier: Apache-2.0
"""Whole processes that are killed, interrupted or two at a time."""

import json
import signal
import socket

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# Dropout, augmentation, a projector, a teacher and a validation on the way: everything that must be resumed.
RANDOM = (
    "teacher=timm",
    "teacher.name=test_vit",
    "teacher.pretrained=false",
    "distiller=fitnet",
    "recipe.steps=40",
    "recipe.val_every=16",
    "recipe.selection=best_val",
    "student.encoder.model_kwargs={num_classes: 0, drop_path_rate: 0.3}",
    "recipe.augmentation={_target_: kdlvfm.data.transforms.Augmentation, scale: [0.5, 2.0], crop: [48, 48], flip: 0.5}",
    "run.checkpoint_every=5",
)


def wait_for(process, start):
    """Read lines until one begins with `start`."""
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(f"the run ended before {start!r}: {process.stderr.read()}")


@pytest.fixture(scope="module")
def whole(shell, small, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = shell("train", *small, *RANDOM, f"out={out}")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def assert_same_run(out, whole):
    assert (out / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    record, expected = (json.loads((folder / "record.json").read_text()) for folder in (out, whole))
    for key in ("status", "metrics", "curve", "selected_step", "config_hash"):
        assert record[key] == expected[key], key
    assert record["cost"]["seconds"] >= record["cost"]["train_seconds"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(workers, shell, small, whole, tmp_path):
    out = tmp_path / "run"
    command = ("train", *small, *RANDOM, f"run.num_workers={workers}", f"out={out}")
    with shell(*command) as process:
        wait_for(process, "step 18/40")
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert json.loads((out / "record.json").read_text())["status"] == "running"
    again = shell(*command)
    printed, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "step 16/40" in printed
    assert "step 14/40" not in printed
    assert_same_run(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_an_interrupted_run_says_so_and_goes_on(number, shell, small, whole, tmp_path):
    out = tmp_path / "run"
    command = ("train", *small, *RANDOM, "run.checkpoint_every=1000", f"out={out}")
    with shell(*command) as process:
        wait_for(process, "step 22/40")
        process.send_signal(number)
        printed, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "the checkpoint is saved" in err
    assert "Interrupted. To go on: kdlvfm train" in printed
    record = json.loads((out / "record.json").read_text())
    assert record["status"] == "interrupted"
    assert record["cost"]["seconds"] > 0
    assert not (out / "student.safetensors").exists()
    again = shell(*command)
    printed, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "step 20/40" not in printed
    assert_same_run(out, whole)


def test_an_interruption_of_the_evaluation_is_one_too(shell, small, tmp_path):
    out = tmp_path / "run"
    with shell("train", *small, *RANDOM, f"out={out}", "data.val=200", "data.test=2000") as process:
        wait_for(process, "step 40/40")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert json.loads((out / "record.json").read_text())["status"] == "interrupted"


PLAIN = """
import atexit, os, torch
from kdlvfm.core import FeatureModel, ModelCard, TapInfo

class Plain(FeatureModel):
    def __init__(self, num_classes, **others):
        super().__init__()
        self.card = ModelCard("plain", "random")
        layers = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, num_classes, 3, padding=1)
        self.net = torch.nn.Sequential(*layers)
        self.classes = num_classes
        rank = os.environ.get("LOCAL_RANK", "0")
        atexit.register(lambda: torch.save(self.net.state_dict(), f"{os.environ['LAST']}-{rank}.pt"))

    def taps(self):
        return {"logits": TapInfo(self.classes, 1)}

    def forward(self, images, taps):
        return {"logits": self.net(images)}
"""


@pytest.mark.ddp
def test_two_processes_learn_what_one_does(shell, small, tmp_path):
    """Without batch normalisation, and with labels everywhere, a batch of four is two batches of two."""
    (tmp_path / "plain.py").write_text(PLAIN)
    common = (
        *small,
        "distiller=none",
        "data.unlabelled=0",
        "data.val=5",
        "recipe.val_every=3",
        "student._target_=plain.Plain",
        "trainer.accelerator=cpu",
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    nodes = [{**meeting, "NODE_RANK": str(node), "LOCAL_RANK": "0"} for node in (0, 1)]
    runs = {
        "one": ((), [{}]),
        "two": (("trainer=ddp", "trainer.devices=2"), [{}]),
        "nodes": (("trainer=ddp", "trainer.num_nodes=2"), nodes),
    }
    for name, (options, places) in runs.items():
        own = {"PYTHONPATH": str(tmp_path), "LAST": str(tmp_path / name)}
        command = ("train", *common, *options, f"out={tmp_path / name}")
        processes = [shell(*command, env={**own, **place}) for place in places]
        printed = ""
        for process in processes:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            printed += out
        assert printed.count("wrote ") == 1
    one, two, nodes = (json.loads((tmp_path / name / "record.json").read_text()) for name in runs)
    weights = [load_file(tmp_path / name / "student.safetensors") for name in runs]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, weights[2][key]) for key, value in weights[1].items())
    ranks = [torch.load(tmp_path / f"two-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(value, ranks[1][key]) for key, value in ranks[0].items())
    for split in ("val", "test"):
        assert two["metrics"][split]["miou"] == pytest.approx(one["metrics"][split]["miou"], abs=1e-3)
    assert [point["step"] for point in two["curve"]] == [3, 6]
    assert nodes["metrics"] == two["metrics"]
    assert one["config_hash"] == two["config_hash"] == nodes["config_hash"]
    assert len(list((tmp_path / "two").rglob("record.json"))) == 1


@pytest.mark.ddp
def test_a_process_that_does_not_lead_leaves_the_folder_to_the_one_that_does(shell, small, tmp_path):
    """On a cluster it may be there first; the one that leads takes what lies in the folder for somebody else's."""
    out = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as meeting:
        meeting.settimeout(200)
        follower = {"LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.getsockname()[1])}
        command = ("train", *small, "distiller=none", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
        process = shell(*command, f"out={out}", env=follower)
        try:
            connection, _ = meeting.accept()  # it waits for the first process here
            connection.close()
            assert not list(out.iterdir())
        finally:
            process.kill()
            process.communicate()
