"""pytest_test: pytest under Bazel, on the CPU or on a GPU."""

load("@rules_python//python:defs.bzl", "py_test")
load(":gpu.bzl", "GPU_TAGS", "REQUIRES_GPU")

_MAIN = Label("//tools/build_defs:pytest_main.py")

def pytest_test(name, srcs, deps = [], gpu = False, args = [], tags = [], env = {}, **kwargs):
    """Runs the tests of srcs with pytest; a run in which no test passed fails.

    Args:
      name: the target.
      srcs: files of tests.
      deps: py_library targets.
      gpu: the tests need a CUDA device. Without one the target is skipped as incompatible; with one, a run that
        skipped every test fails.
      args: further pytest arguments.
      tags: further tags.
      env: further environment variables.
      **kwargs: further attributes of py_test.
    """
    if gpu:
        tags = tags + GPU_TAGS
        env = dict(env, FLASHTRAIN_TEST_DEVICE = "cuda")
        kwargs["target_compatible_with"] = REQUIRES_GPU
    py_test(
        name = name,
        srcs = srcs + [_MAIN],
        main = _MAIN,
        args = ["$(rootpath %s)" % src for src in srcs] + args,
        deps = deps + [Label("@pip//pytest")],
        tags = tags,
        env = env,
        python_version = "PY3",
        **kwargs
    )

def pytest_cpu_and_gpu_tests(names, deps, size = "medium", **kwargs):
    """<name>_test.py of each name, as <name>_test on the CPU and as <name>_gpu_test on CUDA.

    Args:
      names: what the tests are of.
      deps: py_library targets.
      size: as in py_test.
      **kwargs: further arguments of pytest_test.
    """
    for name in names:
        for suffix, gpu in [("_test", False), ("_gpu_test", True)]:
            pytest_test(
                name = name + suffix,
                size = size,
                srcs = [name + "_test.py"],
                deps = deps,
                gpu = gpu,
                **kwargs
            )
