"""Figures of a study: mean and spread over seeds, at every depth."""

from __future__ import annotations

import pytest

from sftk.runtime.rundir import RunDir
from sftk.runtime.study_summary import aggregate, headline, run_figures


def test_mean_and_sample_deviation_of_nested_figures():
    rows = [{"frechet": v, "late": {"frechet": 2 * v}, "drift": [0, v]} for v in (1.0, 2.0, 6.0)]
    mean, spread = aggregate(rows)
    assert mean == {"frechet": 3.0, "late": {"frechet": 6.0}, "drift": [0.0, 3.0]}
    assert spread["frechet"] == pytest.approx(7**0.5)
    assert spread["late"]["frechet"] == pytest.approx(2 * 7**0.5)
    assert spread["drift"] == [0.0, pytest.approx(7**0.5)]


def test_one_seed_has_no_spread_and_missing_values_are_left_out():
    assert aggregate([{"frechet": 2.0}]) == ({"frechet": 2.0}, {"frechet": None})
    mean, spread = aggregate([{"frechet": 2.0}, {"frechet": None}, {"other": None}])
    assert (mean, spread) == ({"frechet": 2.0, "other": None}, {"frechet": None, "other": None})
    assert aggregate([]) == ({}, {})


def test_figures_are_those_of_what_was_trained():
    seconds = {"train init": 2.0, "train dmd": 3.5, "evaluate": 9.0}
    summary = {"seconds": seconds, "teacher": {"frechet": 3.0}, "student_after": {"frechet": 5.0}}
    assert run_figures(summary) == {"frechet": 5.0, "train_seconds": 5.5}
    del summary["student_after"]
    assert run_figures(summary) == {"frechet": 3.0, "train_seconds": 5.5}
    assert run_figures({}) == {}


def test_headline(tmp_path):
    run = RunDir(tmp_path)
    run.write("summary.json", {"seconds": {"train a": 1.0}, "student_after": {"digit_accuracy": 0.5, "frechet": 12.345}})
    assert headline(run) == "; digit accuracy 0.5, frechet 12.3, train seconds 1"
