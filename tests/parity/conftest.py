"""Runs each file of the parity folder through the test that is named after its family."""

import pytest
from parity_cases import FAMILIES, FOLDER, Case, case_names, family_of

WORST: dict[str, tuple[float, str, str]] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        family = metafunc.function.__name__.removeprefix("test_")
        assert family in FAMILIES, f"{metafunc.function.__name__} is named after no family of files"
        metafunc.parametrize("case", [name for name in case_names() if family_of(name) == family], indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    result = yield
    found = pyfuncitem.funcargs.get("case")
    if isinstance(found, Case):
        found.assert_complete()
        worst = max((error, found.name, key) for key, error in found.errors.items())
        WORST[str(found.family)] = max(worst, WORST.get(str(found.family), worst))
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WORST:
        terminalreporter.section(f"parity with {FOLDER.name}: worst relative error")
    for family, (error, name, key) in WORST.items():
        terminalreporter.write_line(f"{family:20} {error:.1e}  {name}: {key}")
