#!/usr/bin/env bash
# packages.sh VENV LOCK: installs the packages of a lock, each checked against its hash, into an environment.
# Where pip's own indexes have no CPU build of torch (as on the open internet), it is taken from CPU_WHEELS.
set -euo pipefail
venv=$1
lock=$2
fallback=${CPU_WHEELS:-https://download.pytorch.org/whl/cpu}
# --no-deps: the lock is the whole set. --no-build-isolation: what is published as source only is built with packages of
# the lock, not with whatever is newest.
pip=("$venv/bin/python" -m pip install --quiet --quiet --no-deps --no-compile --progress-bar off --require-hashes
  --no-build-isolation)

# Writes the lines of one package, with its hashes, to a file; fails where the lock has none.
pick() {
  awk -v name="^$1==" '/^[A-Za-z]/ { on = ($0 ~ name) } on' "$lock" > "$venv/$1.lock"
  [ -s "$venv/$1.lock" ]
}

! pick setuptools || "${pip[@]}" -r "$venv/setuptools.lock"
if pick torch && grep -q '+cpu' "$venv/torch.lock" && ! "${pip[@]}" -r "$venv/torch.lock" 2> "$venv/torch.log"; then
  echo "setup: pip's own indexes have no $(grep -o 'torch==[^ ]*+cpu' "$venv/torch.lock"); taking it from $fallback"
  "${pip[@]}" --extra-index-url "$fallback" -r "$venv/torch.lock" || {
    echo "setup: no such torch there either; name an index of CPU builds: make CPU_WHEELS=URL ..." >&2
    exit 2
  }
fi
"${pip[@]}" -r "$lock"
