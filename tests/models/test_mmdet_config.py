# SPDX-License-Identifier: Apache-2.0
"""Reading mmdet's configurations without running them."""

import pytest

from kdlvfm.models.mmdet_config import ConfigError, bundled_configs, merge, read_model_config

pytest.importorskip("mmdet")

# One of each way of writing: plain, a base and deletions, base of a base, names and list comprehensions.
SAMPLE = (
    "gfl_r50_fpn_1x_coco",
    "gfl_r101-dconv-c3-c5_fpn_ms-2x_coco",
    "faster-rcnn_r50_fpn_1x_coco",
    "cascade-rcnn_r50_fpn_1x_coco",
    "fcos_r50-caffe_fpn_gn-head_1x_coco",
    "dino-5scale_swin-l_8xb2-36e_coco",
    "sparse-rcnn_r50_fpn_1x_coco",
    "yolox_s_8xb8-300e_coco",
    "rtmdet_tiny_8xb32-300e_coco",
)


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return value


def as_mmengine_runs_it(path):
    from mmengine.config import Config

    return plain(Config.fromfile(path)._cfg_dict["model"].to_dict())


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mmengine reads files with ast.Num and the like
def test_bundled_files_read_as_mmengine_runs_them(name):
    assert read_model_config(name) == as_mmengine_runs_it(bundled_configs()[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_detector_of_mmdet_is_read_right_or_refused():
    read, refused = 0, []
    for name, path in bundled_configs().items():
        try:
            model = read_model_config(name)
        except ConfigError:
            refused.append(name)
            continue
        try:
            expected = as_mmengine_runs_it(path)
        except ImportError:  # imports packages that are not installed
            continue
        assert model == expected, name
        read += 1
    assert read > 650
    # Trackers and the like, which change a detector by statements; panoptic segmentation; files without a model.
    assert len(refused) < 60


def test_a_file_of_the_users_own(tmp_path):
    (tmp_path / "base.py").write_text("size = 4\nmodel = dict(type='A', neck=dict(x=1, y=2), head=dict(p=1))\n")
    path = tmp_path / "mine.py"
    path.write_text(
        '"""A docstring."""\n_base_ = "./base.py"\nwidth = 2 * 8 - 1\n'
        "model = dict(neck=dict(x=-width, sizes=[2 * i for i in range(3)]), head=dict(_delete_=True, q={'r': None}),\n"
        "             depth=_base_.size / 2, inherited=_base_.model.neck, **dict(last=(1, 'a')))\n"
    )
    assert read_model_config(path) == {
        "type": "A",
        "neck": {"x": -15, "y": 2, "sizes": [0, 2, 4]},
        "head": {"q": {"r": None}},
        "depth": 2.0,
        "inherited": {"x": 1, "y": 2},
        "last": (1, "a"),
    }


@pytest.mark.parametrize(
    "text",
    [
        "model = dict(type=open('trap', 'w').name)",
        "model = __import__('os').environ",
        "model = dict(type='A')\nmodel.update(type='B')",
        "part = dict(type='A')\npart['type'] = 'B'\nmodel = dict(head=part)",
        "model = dict(type=f'{1}')",
        "model = dict(x=[i for i in range(3) if i])",
        "import os\nmodel = os",
        "model = nothing",
    ],
)
def test_what_would_have_to_be_run_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.py, line \d: .* would have to be run"):
        read_model_config(path)
    assert not (tmp_path / "trap").exists()


def test_statements_about_other_things_do_not_matter(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import os\npipeline = [os.name]\npipeline.append(1)\nmodel = dict(type='A')\n")
    assert read_model_config(path) == {"type": "A"}


@pytest.mark.parametrize("text", ["model = dict(", "model = dict(x={}['a'])", "model = model", "x = 1", "model = 3"])
def test_files_without_a_model_are_refused(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.py"):
        read_model_config(path)


def test_a_wrong_name_gets_near_ones():
    with pytest.raises(ConfigError, match="Did you mean gfl_r50_fpn_1x_coco"):
        read_model_config("gfl_r50_fpn_coco")
    with pytest.raises(ConfigError, match="no/such/file"):
        read_model_config("no/such/file.py")


def test_merge_leaves_both_sides_alone():
    base, changes = {"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": {"_delete_": True, "e": 4}}
    assert merge(base, changes) == {"a": {"b": 1, "c": 3}, "d": {"e": 4}}
    assert base == {"a": {"b": 1, "c": 2}}
    assert changes == {"a": {"c": 3}, "d": {"_delete_": True, "e": 4}}
