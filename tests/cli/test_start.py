"""What a command imports: help, the version and usage errors come without torch, a check without what trains or shows."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sftk.cli.check import check
from sftk.cli.export import DTYPES, export
from sftk.models import export as exported
from sftk.models.weights import DTYPES as SAVED

PROGRAM = """
import sys
from sftk.cli import main
try:
    main(prog_name="sftk")
finally:
    print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def _imported(*arguments: str, code: int = 0, first: str = "") -> set[str]:
    command = [sys.executable, "-c", first + PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("--version",), 0),
        (("plan", "--help"), 0),
        (("train",), 2),
        (("run", "recipes/dmd.yaml", "--nnodes", "none"), 2),
        (("check", "train.steps=1"), 2),
        (("sample", "run", "--keep", "1", "--prompt", "x"), 2),
    ],
)
def test_help_and_usage_errors_need_no_torch(arguments, code):
    assert not _imported(*arguments, code=code) & {"torch", "numpy", "tensordict", "rich", "yaml"}


def test_a_check_imports_nothing_that_trains_or_shows():
    by_name = "from sftk.core import Graph, lookup; lookup('dmd_gradient'); Graph.from_spec('specs/scores.yaml')"
    found = _imported("check", "recipes/dmd.yaml", first=by_name)
    assert "torch" in found
    assert not found & {"diffusers", "transformers", "matplotlib", "av", "tensorboard", "torchao", "tensordict"}


def test_what_options_repeat():
    assert set(DTYPES) == set(SAVED)
    (size,) = (option.default for option in export.params if option.name == "shard_size")
    assert size * 1e9 == exported.SHARD_BYTES
    assert "recipes" in {option.name for option in check.params}


def test_the_package_names_what_it_imports_late():
    import sftk

    assert {"Graph", "functional", "objectives", "spec", "transforms"} <= set(dir(sftk))
    assert all(getattr(sftk, name) is not None for name in (*sftk.__all__, "functional", "objectives", "spec"))
    with pytest.raises(AttributeError, match="module 'sftk' has no attribute 'nothing'"):
        _ = sftk.nothing  # pyright: ignore[reportAttributeAccessIssue]
