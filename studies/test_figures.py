"""Figures: what is drawn is what is in their files."""
import json
import shutil
import xml.etree.ElementTree
from pathlib import Path

import pytest

from studies import figures

HERE = Path(__file__).parent.parent / "figures"


def test_a_figure_is_drawn_from_its_curves(tmp_path, capsys):
    panel = {"axes": {"title": "a < b", "x": "step", "y": "fid_lenet, lower is better"},
             "series": {"plain": [[[1, 2], [2, 3]], [[1, 3], [2, 5]]], "split": [[[1, 1], [2, 2]]]},
             "floor": 2.0}
    path = tmp_path / "two.json"
    path.write_text(json.dumps({"panels": [panel, panel | {"series": {"ladder": [[[1, 2]]]}}]}))
    assert figures.main([path]) == 0
    svg = xml.etree.ElementTree.fromstring((tmp_path / "two.svg").read_text())
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"● plain", "■ split", "▲ ladder", "floor 2", "step"} <= set(texts)
    assert texts.count("a < b") == 2
    assert svg.get("viewBox").startswith("0 0 1020 ")
    capsys.readouterr()
    for bad in ("[]", '{"panels": [{}]}', '{"panels": [{"axes": {"z": 1}, "series": {}}]}', "no"):
        path.write_text(bad)
        assert figures.main([path]) == 2
        err = capsys.readouterr().err
        assert "two.json is no figure" in err and err.count("\n") == 1


@pytest.mark.parametrize("file", sorted(HERE.glob("*.json")), ids=lambda file: file.stem)
def test_figures_are_drawn_from_what_is_committed(file, tmp_path):
    shutil.copy(file, tmp_path)
    assert figures.main([tmp_path / file.name]) == 0
    assert (tmp_path / file.name).with_suffix(".svg").read_text() == file.with_suffix(
        ".svg").read_text()
