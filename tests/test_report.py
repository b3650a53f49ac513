"""The report: built from the logs, no number of a result typed, and the committed file is that build."""
import os
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, 'report'))
import build                                                                        # noqa: E402


def test_no_measured_number_is_typed():
    """Results are decimals, percentages or at least three digits long; the prose of report.typ has none."""
    with open(os.path.join(ROOT, 'report', 'report.typ'), encoding='utf8') as file:
        text = file.read()
    prose = text[text.index('#align(center)'):]
    prose = re.sub(r'Fall 2020|NTU-DLCV-2020|width: \d+%', '', prose)
    assert not re.findall(r'(?<![\w.])\d+\.\d+(?![\w.])|\d+ ?%|\b\d{3,}\b', prose)
    named = set(re.findall(r'(?:vae|gan|digits)\.\w+', prose))
    assert len(named) > 50


def test_every_figure_that_the_report_shows_is_there():
    with open(os.path.join(ROOT, 'report', 'report.typ'), encoding='utf8') as file:
        text = file.read()
    names = re.findall(r'#picture\("([^"]+)"', text)
    names += [base + ending for base in re.findall(r'#pair\("([^"]+)"', text) for ending in ('_digits.png', '_domains.png')]
    assert len(names) > 30
    for name in names:
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
