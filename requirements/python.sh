#!/usr/bin/env bash
# python.sh FOLDER: prints the path of a CPython 3.11 to 3.13 that can make environments. PYTHON names one; else the
# first that fits on PATH; else one that uv knows or fetches. uv itself is installed into FOLDER by pip.
set -euo pipefail
tools=$1
here=$(cd "$(dirname "$0")" && pwd)
say() { echo "setup: $*" >&2; }

# A name on PATH may be a shim that leads nowhere; Debian's python3 may lack ensurepip; no wheels fit a free-threaded one.
fits() {
  "$1" -c '
import sys, sysconfig, venv, ensurepip
if sys.implementation.name != "cpython" or not (3, 11) <= sys.version_info[:2] <= (3, 13): sys.exit(1)
if sysconfig.get_config_var("Py_GIL_DISABLED"): sys.exit(1)
print(sys.executable)' 2> /dev/null
}

case "$(uname -s)-$(uname -m)" in
  Linux-x86_64 | Linux-aarch64 | Darwin-arm64) ;;
  *)
    say "no packages are locked for $(uname -s) on $(uname -m); there are for Linux (x86-64, aarch64) and macOS (arm64)"
    exit 2
    ;;
esac
if [ -n "${PYTHON:-}" ]; then
  fits "$PYTHON" && exit 0
  say "PYTHON=$PYTHON is no CPython 3.11 to 3.13 that can make environments; name another, or none and let make find one"
  exit 2
fi
for name in python3.11 python3.12 python3.13 python3 python; do
  fits "$name" && exit 0
done

say "no Python 3.11 to 3.13 on PATH; asking uv for one"
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  uv=$tools/bin/uv
  for name in python3 python; do
    [ ! -x "$uv" ] || break
    "$name" -m pip install --quiet --target "$tools" --no-deps --require-hashes -r "$here/uv.txt" >&2 || true
  done
fi
export UV_PYTHON_INSTALL_DIR="$tools/python"
ask() { "$uv" python find --no-project --no-python-downloads '>=3.11,<3.14' 2> /dev/null; }
if [ -x "$uv" ]; then
  found=$(ask) || { "$uv" python install --no-bin 3.12 >&2 && found=$(ask); } || found=
  [ -z "$found" ] || { fits "$found" && exit 0; }
fi
say "uv could not be had or found no Python. Install Python 3.11, 3.12 or 3.13 (with its venv module), or uv, or name a"
say "Python: make PYTHON=/path/to/python3.12 ..."
exit 2
