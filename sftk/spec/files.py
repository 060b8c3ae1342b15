"""Finds specs, recipes and weights: beside the file that names them, in the working directory, in the package."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import sftk
from sftk.errors import Problem, SpecError, did_you_mean
from sftk.models.tensor_files import split_entry


def package_root() -> Path:
    """The folder that holds the packaged `specs/` and `recipes/`: inside a wheel, or the checkout of an editable install.

    Example:
        >>> (package_root() / "specs" / "rollout.yaml").is_file()
        True
    """
    package = Path(sftk.__file__).parent
    bundled = package / "_bundled"
    return bundled if bundled.is_dir() else package.parent


def search_roots(beside: Path | None = None) -> list[Path]:
    """Folders in the order in which names are looked up."""
    return [*([beside.parent] if beside is not None else []), Path.cwd(), package_root(), Path(sftk.__file__).parent]


def find_file(name: str, beside: Path | None = None) -> Path:
    """The file of that name.

    Args:
        name: an absolute path, or one relative to a search root; that of a PyTorch file may end in `:<entry>`.
        beside: the file that names it.

    Raises:
        SpecError: it is in none of the places; the message lists them and the nearest name.

    Example:
        >>> find_file("specs/rollout.yaml").name
        'rollout.yaml'
    """
    path = Path(name).expanduser()
    roots = [Path()] if path.is_absolute() else search_roots(beside)
    for root in roots:
        if split_entry(root / path)[0].exists():
            return root / path
    places = ", ".join(dict.fromkeys(str((root / path).parent if path.is_absolute() else root) for root in roots))
    raise SpecError([Problem(message=f"no such file {name!r}", hint=_near(path, roots) or f"looked in {places}")])


def _near(path: Path, roots: Iterable[Path]) -> str | None:
    """A hint for a misspelt name, or for a packaged one whose folder or suffix was left out."""
    package = package_root()
    packaged = [found for folder in ("recipes", "specs") for found in sorted((package / folder).rglob("*.yaml"))]
    meant = [repr(found.relative_to(package).as_posix()) for found in packaged if _means(path, found.relative_to(package))]
    if meant:
        return f"did you mean {'one of ' * (len(meant) > 1)}{', '.join(meant)}?"
    beside = {str(found.relative_to(root)) for root in roots for found in _siblings(root / path, root)}
    return did_you_mean(str(path), beside, listed=0)


def _means(path: Path, packaged: Path) -> bool:
    """Whether a path is the end of a packaged file's, perhaps without its suffix."""
    parts = (packaged.parts, packaged.with_suffix("").parts)
    return bool(path.parts) and any(known[-len(path.parts) :] == path.parts for known in parts)


def show_path(path: Path) -> str:
    """A path as errors show it: relative to the working directory or the package where that is shorter.

    Example:
        >>> show_path(package_root() / "specs" / "rollout.yaml")
        'specs/rollout.yaml'
    """
    for root in (Path.cwd(), package_root()):
        if path.is_absolute() and path.is_relative_to(root):
            return str(path.relative_to(root))
    return str(path)


def _siblings(path: Path, root: Path) -> Iterable[Path]:
    inside = path.suffix and path.parent.is_dir() and path.is_relative_to(root)
    return (found for found in path.parent.glob(f"*{path.suffix}") if not found.name.startswith(".")) if inside else ()
