"""The report: it needs no network, is well-formed, and holds the figures."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from test_analysis import ANALYSIS

from flashlite.analyze.analysis import Analysis, Unit, UnitFormat
from flashlite.analyze.plots import greedy_curve
from flashlite.analyze.report import write_report
from flashlite.errors import MissingExtra


def unit(name: str, *offers: tuple[str, int, float]) -> Unit:
    formats = {fmt: UnitFormat(size, kl, None, kl) for fmt, size, kl in offers}
    return Unit(name, None, (name,), 1, formats)


@pytest.fixture
def page(tmp_path: Path) -> str:
    pytest.importorskip("matplotlib")
    path = tmp_path / "analysis.html"
    model = replace(ANALYSIS.model, name="<script>alert(1)</script>")
    write_report(replace(ANALYSIS, model=model), path)
    assert [p.name for p in tmp_path.iterdir()] == ["analysis.html"]
    return path.read_text(encoding="utf-8")


def test_it_asks_the_network_for_nothing(page: str) -> None:
    assert "default-src 'none'" in page
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "@import" not in page


def test_its_plots_are_drawn_in_the_ink_of_the_page(page: str) -> None:
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 5
    for plot in plots:
        ET.fromstring(plot)
        assert "currentColor" in plot
        assert "#010203" not in plot
        assert plot.index("fill: none") < plot.index("axes_1")  # the page shows through


def test_it_holds_the_figures(page: str) -> None:
    for figure in ("layers.0.qkv", "1.20e-02", "2.00e-01*", "-0.500", "1.05 of the sum"):
        assert figure in page


def test_a_minimal_analysis_has_a_report_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    minimal = Analysis(ANALYSIS.model, ANALYSIS.calibration, ANALYSIS.units)
    write_report(minimal, tmp_path / "a.html")
    assert "All units" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_the_curve_takes_the_best_upgrade_first() -> None:
    units = (
        unit("a", ("q4", 10, 1.0), ("q8", 20, 0.0)),
        unit("b", ("q4", 10, 9.0), ("q6", 15, 1.0), ("bad", 18, 2.0), ("q8", 20, 0.5)),
    )
    curve = greedy_curve(replace(ANALYSIS, units=units))
    assert curve == [(20, 10.0), (25, 2.0), (30, 1.5), (40, 0.5)] or curve == [
        (20, 10.0), (25, 2.0), (35, 1.0), (40, 0.5),
    ]  # fmt: skip


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"flashlite\[report\]"):
        write_report(ANALYSIS, tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []
