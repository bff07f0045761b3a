#!/bin/sh
# Every table and picture in miniature, from scratch: see tools/reproduce.py.
cd "$(dirname "$0")" && exec python -m tools.reproduce "$@"
