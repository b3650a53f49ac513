"""The report: built from the logs, no number of a result typed, and the committed file is that build."""
import os
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, 'report'))
import build                                                                        # noqa: E402


def sources():
    """The text of every part of the report."""
    found = {}
    for name in sorted(os.listdir(os.path.join(ROOT, 'report'))):
        if name.endswith('.typ'):
            with open(os.path.join(ROOT, 'report', name), encoding='utf8') as file:
                found[name] = file.read()
    return found


def test_no_measured_number_is_typed():
    """Results are decimals, percentages or at least three digits long; the prose has none."""
    for name, text in sources().items():
        prose = text[text.index('#align(center)'):] if name == 'report.typ' else text
        prose = re.sub(r'Fall 2020|NTU-DLCV-2020|width: \d+%|size: [\d.]+pt|v\([\d.]+em\)', '', prose)
        assert not re.findall(r'(?<![\w.])\d+\.\d+(?![\w.])|\d+ ?%|\b\d{3,}\b', prose), name


def test_every_figure_that_the_report_shows_is_there():
    for text in sources().values():
        for name in re.findall(r'#(?:picture|printed)\("([^"]+)"', text):
            assert os.path.exists(os.path.join(ROOT, 'figures', name)), name


def test_committed_report_is_what_the_logs_and_figures_give(tmp_path):
    pytest.importorskip('typst')
    found = []
    for name in ('first.pdf', 'second.pdf'):
        build.main(['--out', str(tmp_path / name)])
        found.append((tmp_path / name).read_bytes())
    assert found[0] == found[1]
    with open(os.path.join(ROOT, 'hw3_studentID.pdf'), 'rb') as file:
        assert file.read() == found[0]
    assert len(found[0]) < 3e6
