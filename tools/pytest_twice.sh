#!/usr/bin/env bash
# pytest_twice.sh PYTHON ARGS...: pytest, and a second look at a few tests that failed.
#
# Machines that run the tests are shared and slow at times. Up to $AGAIN tests (3; 0: none) that failed are run
# once more, one after the other with nothing beside them. What fails again is a failure. What passes then is named
# as FLAKY at the end of the output: a race in the product or in the test, to be found and mended like any failure.
set -uo pipefail
python=$1; shift
cache=build/pytest # as pyproject.toml has it
rm -rf "$cache"
"$python" -m pytest "$@"
status=$?
failed=$cache/v/cache/lastfailed
# 1: pytest's exit code for tests that failed, and for nothing else.
[ "$status" = 1 ] && [ -s "$failed" ] || exit "$status"
mapfile -t tests < <("$python" -c 'import json, sys; print(*json.load(open(sys.argv[1])), sep="\n")' "$failed")
[ ${#tests[@]} -le "${AGAIN:-3}" ] || exit "$status"

printf '\nonce more, alone: %s\n' "${tests[@]}"
"$python" -m pytest -n 0 "${tests[@]}" || exit
printf '\nFLAKY, failed above and passed alone: %s\n' "${tests[@]}"
