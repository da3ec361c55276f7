#!/usr/bin/env bash
# compute-sanitizer's memcheck and racecheck over modules of every chain and type. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
$python -m benchmarks.sanitize --prepare "$@"
for tool in memcheck racecheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.sanitize "$@"
done
