#!/usr/bin/env bash
# Builds and runs a workspace that depends on this repository by label, as a consumer's does: with its own WORKSPACE,
# .bazelrc, cc/ and python/, and a Bazel server and output folder of its own.
#
# usage: run.sh [OUTPUT_BASE]    default: beside the output base of the Bazel that runs this as a test
set -euo pipefail

# Behind the links of a runfiles tree: the consumer refers to the repository by a relative path.
here="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
root="$(cd "$here/../.." && pwd)"
outer="${PWD%%/execroot/*}"
output_base="${1:-${outer}_consumer}"
[[ $# == 1 || "$outer" != "$PWD" ]] || { echo "usage: run.sh OUTPUT_BASE" >&2; exit 1; }

# Inside a test Bazel takes these for its own.
unset TEST_TMPDIR TEST_SRCDIR RUNFILES_DIR RUNFILES_MANIFEST_FILE JAVA_RUNFILES PYTHON_RUNFILES
# Bazelisk looks for a version beside the WORKSPACE, which a consumer has and this one shares.
USE_BAZEL_VERSION="${USE_BAZEL_VERSION:-$(<"$root/.bazelversion")}"
export USE_BAZEL_VERSION

# The repositories that take minutes to make are those of the outer Bazel, where it has them; the rest is fetched.
shared=()
for repository in pip zig_sdk; do
  made="$outer/external/$repository"
  [[ ! -e "$made/BUILD.bazel" ]] || shared+=("--override_repository=$repository=$made")
done

cd "$here"
run_bazel() {
  local command="$1"
  shift
  "$root/tools/bazel" --output_base="$output_base" --max_idle_secs=15 "$command" \
    --color=no --curses=no --noshow_progress "${shared[@]}" --symlink_prefix=/ "$@"
}

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

echo "== C++ and CUDA alone: Python packages would be an error"
empty="$output_base/no_python_packages"
mkdir -p "$empty"
touch "$empty/WORKSPACE"
run_bazel test --override_repository=pip="$empty" --test_output=errors //cc/...
numbers="$(run_bazel run --override_repository=pip="$empty" //cc:normalize -- 1 2 3 4 | tail -n 4 | tr '\n' ' ')"
[[ "$numbers" == "-1.3416 -0.4472 0.4472 1.3416 " ]] || fail "//cc:normalize printed $numbers"

echo "== Everything"
run_bazel test --test_output=errors //...
