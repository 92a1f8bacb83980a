#!/usr/bin/env bash
# install.sh: benchmarks/.venv-trl, TRL over the packages of .venv, so that both sides compute with the same torch,
# transformers and kernels. With the same pins a second call does nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=benchmarks/.venv-trl
pins=benchmarks/trl/requirements.txt
stamp=$venv/.installed-$(cat "$pins" requirements/cpu.txt | sha256sum | cut -c1-16)
[ ! -e "$stamp" ] || exit 0

.venv/bin/python -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$pins"
# A plain path: what .venv adds to its own path, this project among it, stays out.
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
  > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project_packages.pth"
"$venv/bin/python" -W ignore -c 'import trl, transformers, torch, datasets'
touch "$stamp"
