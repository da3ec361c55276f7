#!/usr/bin/env bash
# compute-sanitizer's memcheck and racecheck over modules of every chain and type; both run, whatever the first finds.
# PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
$python -m benchmarks.sanitize --prepare "$@"
failed=0
for tool in memcheck racecheck; do
    echo "== $tool"
    # Calls of the driver that fail are benchmarks.sanitize's to judge: it asks how much shared memory it may have.
    compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 "$python" -m benchmarks.sanitize "$@" ||
        failed=1
done
exit $failed
