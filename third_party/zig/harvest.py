"""Turns an unpacked ziglang wheel into a plain clang + lld + sysroot folder.

zig c++ builds libc++, libc++abi, libunwind, compiler-rt and the glibc stubs on
first use and keeps them in a cache it must be able to write to. Inside a Bazel
sandbox that costs over a minute an action, or a writable shared folder. So it is
run once here, its own verbose output says which headers, macros and libraries it
uses, those are copied, and from then on `zig clang` and `zig ld.lld` (plain clang
and lld, no cache) are called with them.

usage: harvest.py WHEEL_DIR OUT_DIR TARGET
"""

import os
import pathlib
import shlex
import shutil
import stat
import subprocess
import sys

WRAPPER = """#!/bin/bash
# {what}; works from any folder, and wherever the SDK folder is put.
D="${{BASH_SOURCE[0]%/*}}"; D="${{D%/bin}}"
{body}
"""


def run(cmd, env):
    r = subprocess.run(cmd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if r.returncode:
        sys.exit("%s\n%s" % (" ".join(map(str, cmd)), r.stdout))
    return r.stdout


def copy_dir(src, dst):
    shutil.copytree(src, dst, copy_function=shutil.move)


def main():
    wheel, out, target = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve(), sys.argv[3]
    zig = wheel / "ziglang" / "zig"
    work = out / "_work"
    work.mkdir(parents=True)
    # Content-addressed and safe to share: the second output base needs 7 s instead of 75.
    shared = pathlib.Path(os.environ.get("FLASHTRAIN_ZIG_CACHE") or pathlib.Path.home() / ".cache" / "flashtrain-zig").resolve()
    env = dict(os.environ, ZIG_GLOBAL_CACHE_DIR=str(shared), ZIG_LOCAL_CACHE_DIR=str(work / "l"),
               ZIG_VERBOSE_CC="1", ZIG_VERBOSE_LINK="1")
    cc = work / "warm.cc"
    cc.write_text("#include <cmath>\n#include <string>\n#include <thread>\n#include <iostream>\n"
                  "int main(int c, char**v){std::thread t([&]{std::cout<<std::string(v[0]);}); t.join(); try{throw 1;}catch(int){} return (int)std::sin(c);}\n")
    base = [str(zig), "c++", "-target", target, "-std=c++17", "-O3", "-g0"]
    compile_log = run(base + ["-c", str(cc), "-o", str(work / "warm.o")], env)
    link_log = run(base + ["-pie", str(work / "warm.o"), "-o", str(work / "warm")], env)

    line = [l for l in compile_log.splitlines() if " clang " in l and "warm.cc" in l][0]
    tok = shlex.split(line)
    macros = [t for t in tok if t.startswith(("-D_LIB", "-D__GLIBC_MINOR__"))]
    macros = list(dict.fromkeys(macros))
    # dict.fromkeys: 0.15 names a folder twice
    dirs = list(dict.fromkeys(os.path.realpath(tok[i + 1]) for i, t in enumerate(tok) if t == "-isystem"))
    flags = []
    for d in dirs:
        if not os.path.isdir(d):
            continue
        rel = pathlib.Path(d).relative_to(wheel / "ziglang" / "lib")
        copy_dir(d, out / "include" / rel)
        flags.append('-isystem "$D/include/%s"' % rel)

    # nvcc's own front end has no __builtin_common_type and no vector extensions, which libc++ 19
    # and 20 use when the host compiler has them; they keep the plain code beside. 18 needs no edit.
    for name, old in (("__type_traits/common_type.h", "#if __has_builtin(__builtin_common_type)\n"),
                      ("__algorithm/simd_utils.h", "#if _LIBCPP_STD_VER >= 14 && defined(_LIBCPP_CLANG_VER) && !defined(__ALTIVEC__)\n")):
        f = out / "include/libcxx/include" / name
        if f.exists() and old in f.read_text():
            f.write_text(f.read_text().replace(old, old[:-1] + " && !defined(__CUDACC__)\n"))

    line = [l for l in link_log.splitlines() if l.startswith(("ld.lld", "lld"))][-1]
    lib = out / "lib"
    lib.mkdir()
    libs = []
    for t in shlex.split(line):
        t = os.path.realpath(t)
        if t.startswith(str(shared)) and os.path.isfile(t):
            name = os.path.basename(t)
            if not (lib / name).exists():
                shutil.copyfile(t, lib / name)
                if ".so." in name:  # for -lm, -ldl, -lpthread
                    os.symlink(name, lib / (name.split(".so.")[0] + ".so"))
                libs.append(name)
    crt = [n for n in libs if n.endswith(".o")]
    arch = [n for n in libs if not n.endswith(".o") and n != "libld.so.2"]
    if not {"Scrt1.o"} <= set(crt) or "libc++.a" not in arch:
        sys.exit("unexpected link line: " + line)

    shutil.move(str(zig), out / "zig")
    b = out / "bin"
    b.mkdir()
    triple = target.split(".")[0].replace("x86_64-linux", "x86_64-unknown-linux")
    common = '-target %s --no-default-config -nostdinc -D__GLIBC_MINOR__=%s' % (triple, target.rsplit(".", 1)[1])
    cxx_only = [f for f in flags if "libcxx" in f]
    c_flags = [f for f in flags if "libcxx" not in f]
    link = '-fuse-ld=lld --ld-path="$D/bin/ld.lld" -nostdlib -Wno-unused-command-line-argument'
    tools = {
        "clang++": ("clang++ with libc++ and glibc headers",
                    'exec "$D/zig" clang --driver-mode=g++ %s -nostdinc++ %s %s %s "$@"' % (common, " ".join(m for m in macros if "GLIBC" not in m), " ".join(cxx_only + c_flags), link)),
        "clang": ("clang with glibc headers", 'exec "$D/zig" clang %s %s %s "$@"' % (common, " ".join(c_flags), link)),
        "ar": ("llvm-ar", 'exec "$D/zig" ar "$@"'),
        "ld.lld": ("lld with the start files and the default libraries",
                   'S="$D/lib/Scrt1.o"\nfor a in "$@"; do case "$a" in\n  -shared) S= ;;\n  -r|--relocatable|--version|-v) exec "$D/zig" ld.lld "$@" ;;\nesac; done\n'
                   'exec "$D/zig" ld.lld %s $S %s "$@" -L"$D/lib" --as-needed %s %s' % (
                       "", " ".join('"$D/lib/%s"' % n for n in crt if n == "crti.o"),
                       " ".join('"$D/lib/%s"' % n for n in arch),
                       " ".join('"$D/lib/%s"' % n for n in crt if n == "crtn.o"))),
    }
    for name, (what, body) in tools.items():
        (b / name).write_text(WRAPPER.format(what=what, body=body))
        (b / name).chmod((b / name).stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    shutil.rmtree(work)
    shutil.rmtree(wheel)


main()
