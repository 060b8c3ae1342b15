"""Packs the digits that ship with sftk: `python -m sftk.data.digits_build PATH_TO_CSV_GZ [OUTPUT]`.

The input is the comma-separated file that scikit-learn distributes as `sklearn/datasets/data/digits.csv.gz`: one image a
row, 64 grey values in 0..16 row by row, then the label.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np

from sftk.errors import DataError

ASSET = Path(__file__).parents[1] / "assets" / "digits" / "digits.npz"


def build_digits(source: str | Path, output: str | Path = ASSET) -> Path:
    """Write `images` (uint8 [N, 8, 8], 0..16) and `labels` (uint8 [N]) as a compressed npz; the same input, the same bytes.

    Args:
        source: the gzipped table.
        output: where the archive goes.

    Returns:
        The path that was written.

    Raises:
        DataError: the table cannot be read, or is not 65 columns of whole numbers in their ranges.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = Path(folder, "digits.csv.gz")
        ...     _ = table.write_bytes(gzip.compress(b",".join([b"16"] * 64 + [b"7"])))
        ...     with np.load(build_digits(table, Path(folder, "digits.npz"))) as archive:
        ...         print(archive["images"].shape, archive["labels"])
        (1, 8, 8) [7]
    """
    try:
        with gzip.open(source, "rt", encoding="ascii") as stream:
            table = np.loadtxt(stream, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the digits in {source}: {error}; expected a gzipped table of numbers") from error
    if table.shape[1] != 65:
        raise DataError(f"{source} has {table.shape[1]} columns; expected 65: 64 pixels and the label")
    images, labels = table[:, :64], table[:, 64]
    if (table != table.round()).any() or images.min() < 0 or images.max() > 16 or labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{source} holds values that are not whole pixels in 0..16 and labels in 0..9")
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images=images.astype(np.uint8).reshape(-1, 8, 8), labels=labels.astype(np.uint8))
    return path


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m sftk.data.digits_build PATH_TO_CSV_GZ [OUTPUT]")
    written = build_digits(*sys.argv[1:])
    print(f"{written}: {written.stat().st_size} bytes")
