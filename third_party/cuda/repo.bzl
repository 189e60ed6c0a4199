"""@cuda_sdk (nvcc, nvvm, crt, cccl, cudart) and @cublas (headers) out of NVIDIA's wheels; @local_gpu: is there a GPU?"""

load("//third_party/pip:pip.bzl", "find_python", "pip_install")
load(":gpu.bzl", "has_gpu")

def _use_local_toolkit(rctx):
    """Links the machine's own toolkit into place, laid out as the wheels are."""
    home = rctx.os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if not rctx.path(home + "/bin/nvcc").exists:
        fail("--config=local_cuda: no nvcc at %s/bin/nvcc; set CUDA_HOME to a CUDA 13 toolkit, or leave the flag out to use NVIDIA's wheels" % home)
    for folder in ["include", "bin", "nvvm"]:
        rctx.symlink(home + "/" + folder, "nvidia/cu13/" + folder)
    rctx.symlink(home + "/lib64", "nvidia/cu13/lib")
    rctx.symlink(home + "/include", "include")
    rctx.file("nvcc", "#!/bin/bash\nexec %s/bin/nvcc \"$@\"\n" % home)

def _cuda_sdk_impl(rctx):
    rctx.symlink(rctx.attr._build, "BUILD.bazel")
    if rctx.os.environ.get("FLASHTRAIN_LOCAL_CUDA") == "1":
        _use_local_toolkit(rctx)
        return
    python = find_python(rctx)
    pip_install(rctx, python, rctx.path(rctx.attr._requirements), ".")
    result = rctx.execute([python, rctx.path(rctx.attr._libcxx_edits), "nvidia/cu13/include/crt"])
    if result.return_code != 0:
        fail(result.stdout + result.stderr)

    # Second names, because no action may have both a folder and a file inside it as inputs.
    rctx.symlink("nvidia/cu13/include", "include")
    rctx.file("nvcc", "#!/bin/bash\nexec \"${0%/*}/nvidia/cu13/bin/nvcc\" \"$@\"\n")

cuda_sdk_repository = repository_rule(
    implementation = _cuda_sdk_impl,
    attrs = {
        "_build": attr.label(default = "//third_party/cuda:cuda.BUILD"),
        "_libcxx_edits": attr.label(default = "//third_party/cuda:libcxx_edits.py"),
        "_requirements": attr.label(default = "//third_party/cuda:requirements.txt"),
    },
    environ = ["CUDA_HOME", "FLASHTRAIN_LOCAL_CUDA"],
)

def _cublas_impl(rctx):
    rctx.symlink(rctx.attr._build, "BUILD.bazel")
    if rctx.os.environ.get("FLASHTRAIN_LOCAL_CUDA") == "1":
        _use_local_toolkit(rctx)
        return
    python = find_python(rctx)
    pip_install(rctx, python, rctx.path(rctx.attr._requirements), ".")

    # The library is opened at run time (the one that torch has loaded); 0.7 MB of headers stay of 420 MB.
    rctx.delete("nvidia/cu13/lib")
    rctx.symlink("nvidia/cu13/include", "include")

cublas_repository = repository_rule(
    implementation = _cublas_impl,
    attrs = {
        "_build": attr.label(default = "//third_party/cuda:cublas.BUILD"),
        "_requirements": attr.label(default = "//third_party/cuda:cublas_requirements.txt"),
    },
    environ = ["CUDA_HOME", "FLASHTRAIN_LOCAL_CUDA"],
)

def _local_gpu_impl(rctx):
    value = rctx.os.environ.get("FLASHTRAIN_GPU", "") or str(int(has_gpu(rctx)))
    if value not in ["0", "1"]:
        fail("FLASHTRAIN_GPU=%s: supported are 1 (build and run the GPU tests), 0, or nothing to look at the machine" % value)
    rctx.file("BUILD.bazel", "")
    rctx.file("defs.bzl", "\"\"\"Written by local_gpu_repository.\"\"\"\n\nHAS_GPU = %s\n" % (value == "1"))

local_gpu_repository = repository_rule(
    implementation = _local_gpu_impl,
    environ = ["FLASHTRAIN_GPU"],
    local = True,
    doc = """@local_gpu//:defs.bzl with HAS_GPU, read again whenever the Bazel server starts.

--repo_env=FLASHTRAIN_GPU=1 builds the GPU tests on a machine without a GPU, to run them on another.""",
)
