# SPDX-License-Identifier: Apache-2.0
"""Fetching CamVid, from a stand-in repository on this machine."""

from __future__ import annotations

import subprocess

import pytest

from kdlvfm.data.download import DownloadError, download_camvid, folder_sha256


def git(folder, *arguments):
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def source(tmp_path):
    """Arguments of a repository with a CamVid folder, which its newest commit no longer has."""
    folder = tmp_path / "source"
    (folder / "CamVid" / "train").mkdir(parents=True)
    (folder / "CamVid" / "train" / "a.png").write_bytes(bytes(range(256)))
    (folder / "CamVid" / "train.txt").write_bytes(b"one\r\ntwo\n")
    (folder / "Models").mkdir()
    (folder / "Models" / "large.bin").write_bytes(b"x" * 1000)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "data")
    revision = git(folder, "rev-parse", "HEAD")
    sha256 = folder_sha256(folder / "CamVid")
    git(folder, "rm", "--quiet", "-r", "CamVid")
    git(folder, "commit", "--quiet", "-m", "gone")
    return {"repository": folder.as_uri(), "revision": revision, "sha256": sha256}


def test_the_folder_arrives_whole_and_alone(tmp_path, source):
    target = tmp_path / "data" / "camvid"
    assert download_camvid(target, **source) == target
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*")) == [
        "train",
        "train.txt",
        "train/a.png",
    ]
    assert (target / "train" / "a.png").read_bytes() == bytes(range(256))
    assert (target / "train.txt").read_bytes() == b"one\r\ntwo\n"
    assert [path.name for path in target.parent.iterdir()] == ["camvid"]


def test_a_second_download_changes_nothing_and_needs_no_repository(tmp_path, source):
    target = download_camvid(tmp_path / "camvid", **source)
    before = target.stat().st_mtime_ns
    download_camvid(target, **{**source, "repository": "file:///nowhere"})
    assert target.stat().st_mtime_ns == before


def test_an_empty_folder_may_be_filled(tmp_path, source):
    (tmp_path / "camvid").mkdir()
    download_camvid(tmp_path / "camvid", **source)
    assert folder_sha256(tmp_path / "camvid") == source["sha256"]


def test_another_folder_is_never_overwritten(tmp_path, source):
    (tmp_path / "camvid").mkdir()
    (tmp_path / "camvid" / "mine.txt").write_text("mine")
    with pytest.raises(DownloadError, match="exists and is not the CamVid"):
        download_camvid(tmp_path / "camvid", **source)
    assert [path.name for path in (tmp_path / "camvid").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "has checksum .* and not 0000"),
        ({"repository": "file:///nowhere/at/all"}, "git fetch failed .*check the network and the address"),
        ({"revision": "0" * 40}, "git fetch failed"),
    ],
)
def test_what_goes_wrong_is_named_and_nothing_is_kept(tmp_path, source, change, message):
    with pytest.raises(DownloadError, match=message):
        download_camvid(tmp_path / "data" / "camvid", **{**source, **change})
    assert list((tmp_path / "data").iterdir()) == []


def test_missing_git_is_named(tmp_path, source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DownloadError, match="git program is needed"):
        download_camvid(tmp_path / "camvid", **source)
