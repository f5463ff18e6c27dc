#!/bin/sh
# Make .venv and install the requirements file named in $1, unless that has been done for its present content.
# The other scripts run it.
set -eu
. "$(dirname "$0")/usage.sh"
cd "$(dirname "$0")/.."
requirements=${1:-requirements.txt}
[ -f "$requirements" ] || { echo "error: $requirements: no such requirements file" >&2; exit 2; }
if [ ! -x .venv/bin/python ]; then
    found=
    for candidate in python3.13 python3.12 python3.11 python3; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    if [ -z "$found" ]; then
        echo "Python 3.11 to 3.13 is needed; none of python3.13, python3.12, python3.11, python3 is one" >&2
        exit 2
    fi
    echo "making .venv with $($found --version)" >&2
    "$found" -m venv .venv
fi
stamp=.venv/installed-$(cat requirements*.txt | cksum | cut -d' ' -f1)-$(basename "$requirements")
if [ ! -e "$stamp" ]; then
    echo "installing $requirements into .venv (torch and its companions: a few minutes the first time)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    touch "$stamp"
fi
