#!/bin/sh
# The last step of a build: checks that the command starts, the versions fit, and a small model is scored and cut.
set -eu
cd "$(dirname "$0")"
minitron doctor
minitron compress llama31_8b_to_4b_width --dry-run > /dev/null
python smoke_test.py
