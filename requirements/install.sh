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

digest() { { sha256sum 2> /dev/null || shasum -a 256; } | cut -c1-16; }
stamp_of() { echo "$venv/.installed-$(basename "$1" .txt)-$(cat "$1" pyproject.toml | digest)"; }

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

if [ ! -x "$venv/bin/pip" ] || [ -e "$unfinished" ]; then
  python=$(requirements/python.sh "$(dirname "$venv")/.uv")
  "$python" -m venv --clear "$venv"
fi
touch "$unfinished"

started=$SECONDS
for lock in "${missing[@]}"; do
  echo "setup: installing $(grep -c == "$lock") packages of $lock into $venv (a few minutes)"
  requirements/packages.sh "$venv" "$lock"
done
"$venv/bin/python" -m pip install --quiet --quiet --no-deps --no-build-isolation --editable .
# Shows at once whether the set loads, and compiles what every process will load.
heavy=deepspeed,ray,torch,transformers
"$venv/bin/python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("vllm"))' && heavy=$heavy,vllm
"$venv/bin/python" -W ignore -c "import $heavy" > "$venv/import.log" 2>&1 || {
  echo "setup: the installed packages do not load; see $venv/import.log" >&2
  exit 1
}
for lock in "${missing[@]}"; do
  rm -f "$venv/.installed-$(basename "$lock" .txt)-"*
  touch "$(stamp_of "$lock")"
done
rm -f "$unfinished"
echo "setup: done in $((SECONDS - started)) s"
