# SPDX-License-Identifier: Apache-2.0
"""Boxes in PASCAL VOC's format."""

from __future__ import annotations

import pytest

from kdlvfm.data.base import DataError


def test_objects_difficult_in_voc_count_as_crowds(voc, tmp_path):
    path = tmp_path / "farm" / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("</object>", "<difficult>1</difficult></object>", 1))
    assert voc().samples("train")[0][1].iscrowd.tolist() == [True, False]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("<name>cat</name>", "<name>cta</name>", r"1 objects in 'train' of a class outside the list .*: a.xml \(cta\)"),
        ("<name>cat</name>", "", "a.xml has an object without name"),
        ("<xmin>5</xmin>", "", r"^\S*a.xml has an object without bndbox/xmin: add it\.$"),
        ("<xmin>5</xmin>", "<xmin>five</xmin>", "a.xml has a box, or a `difficult`, of no numbers"),
        ("</annotation>", "", "a.xml is not an XML file"),
        ("<annotation>", '<!DOCTYPE a [<!ENTITY x "y">]><annotation>', "declares a document type"),
    ],
)
def test_a_bad_xml_is_named(voc, tmp_path, before, after, message):
    path = tmp_path / "farm" / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(DataError, match=message):
        voc().check()


def test_files_that_a_list_of_voc_asks_for_must_be_there(voc, tmp_path):
    (tmp_path / "farm" / "Annotations" / "d.xml").unlink()
    (tmp_path / "farm" / "JPEGImages" / "d.png").unlink()
    with pytest.raises(DataError, match=r"val.txt asks for 2 files that are missing: .*d.jpg, .*d.xml"):
        voc().check()
