"""Runs pytest as a Bazel test: JUnit XML, --test_filter as -k, and no run may pass empty."""

import os
import sys

import pytest


class PassedCounter:
    """Counts the tests that ran to their end and passed."""

    passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed


def main() -> int:
    args = ["-p", "no:cacheprovider", "-q", "-rs", *sys.argv[1:]]
    if xml := os.environ.get("XML_OUTPUT_FILE"):
        args.append(f"--junitxml={xml}")
    if test_filter := os.environ.get("TESTBRIDGE_TEST_ONLY"):
        args += ["-k", test_filter]
    if folder := os.environ.get("TEST_TMPDIR"):
        # Where packages keep caches in the user's home, which a sandbox does not let them write to.
        os.environ.setdefault("HF_HOME", os.path.join(folder, "huggingface"))
        os.environ.setdefault("MPLCONFIGDIR", os.path.join(folder, "matplotlib"))
    counter = PassedCounter()
    status = pytest.main(args, plugins=[counter])
    if status == 0 and counter.passed == 0:
        print("pytest_test: no test passed, every one was skipped: this target proves nothing here")
        return 1
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
