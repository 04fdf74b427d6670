#!/usr/bin/env bash
# Prints a Python that can make the environment: 3.11 or newer, with venv. The caller's own comes first.
for python in python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11; do
	if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
		command -v "$python"
		exit 0
	fi
done
echo 'needs Python 3.11 or newer with venv: apt-get install python3 python3-venv' >&2
exit 1
