#!/usr/bin/env bash
# install.sh FOLDER LOCK...: a virtual environment in FOLDER with the packages of the lock files and this project.
# A stamp, written last, names what is installed: with the same locks a second call does nothing. After an interrupted
# call the folder is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
shift
# Empty, the variable does not count: byte code is written once here, not at the start of every process.
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=
pip=(install --quiet --quiet --no-deps --no-compile --progress-bar off)
fallback=${CPU_WHEELS:-https://download.pytorch.org/whl/cpu}

stamp_of() { echo "$venv/.installed-$(basename "$1" .txt)-$(cat "$1" pyproject.toml | sha256sum | cut -c1-16)"; }

# Two calls at once: the second waits for the first.
if command -v flock > /dev/null; then
  exec 9< requirements
  flock 9
fi
unfinished=$venv/.unfinished
[ ! -e "$unfinished" ] || rm -f "$venv"/.installed-*
missing=()
for lock in "$@"; do
  [ -e "$(stamp_of "$lock")" ] || missing+=("$lock")
done
[ ${#missing[@]} -gt 0 ] || exit 0

python=${PYTHON:-python3.11}
if ! command -v "$python" > /dev/null; then
  echo "setup: $python is not on PATH; install Python 3.11 or name one: make PYTHON=/path/to/python3.11 ..." >&2
  exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
  echo "setup: $python is not Python 3.11, which the lock files are for; name one: make PYTHON=/path/to/python3.11" >&2
  exit 2
fi
if [ ! -x "$venv/bin/pip" ] || [ -e "$unfinished" ]; then
  "$python" -m venv --clear "$venv"
fi
touch "$unfinished"

started=$SECONDS
for lock in "${missing[@]}"; do
  echo "setup: installing $(grep -c == "$lock") packages of $lock into $venv (a few minutes)"
  torch=$(grep -E '^torch==.*\+cpu' "$lock" || true)
  if [ -n "$torch" ] && ! "$venv/bin/python" -m pip "${pip[@]}" "$torch" 2> /dev/null; then
    echo "setup: pip's own indexes have no $torch; taking it from $fallback"
    "$venv/bin/python" -m pip "${pip[@]}" --extra-index-url "$fallback" "$torch" || {
      echo "setup: no $torch there either; name an index of CPU builds: make CPU_WHEELS=URL ..." >&2
      exit 2
    }
  fi
  "$venv/bin/python" -m pip "${pip[@]}" -r "$lock"
done
"$venv/bin/python" -m pip "${pip[@]}" --no-build-isolation --editable .
# Shows at once whether the set loads, and compiles what every process will load.
if grep -q '^vllm' "${missing[@]}"; then
  "$venv/bin/python" -W ignore -c 'import deepspeed, ray, torch, transformers, vllm' > "$venv/import.log" 2>&1 || {
    echo "setup: the installed packages do not load; see $venv/import.log" >&2
    exit 1
  }
fi
for lock in "${missing[@]}"; do
  rm -f "$venv/.installed-$(basename "$lock" .txt)-"*
  touch "$(stamp_of "$lock")"
done
rm -f "$unfinished"
echo "setup: done in $((SECONDS - started)) s"
