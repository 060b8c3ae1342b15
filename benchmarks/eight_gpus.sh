#!/bin/sh
# The eight-GPU run in one call of at most ten minutes; a line of JSON for each setting. See benchmarks/eight_gpus.py --help.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python}" benchmarks/eight_gpus.py "$@"
