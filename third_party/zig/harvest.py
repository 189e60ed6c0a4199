"""Turns an unpacked ziglang wheel into plain folders of clang, lld, headers and libraries.

`zig c++` builds libc++, libc++abi, libunwind, compiler-rt and the glibc stubs on first use and
keeps them in a cache that it must be able to write to; inside a Bazel sandbox that costs over a
minute for each action, or a writable folder that no rule declares. So it is run once, here: its own
verbose output says which headers, macros and libraries it uses, these are copied, and from then on
`zig clang` and `zig ld.lld` (plain clang and lld, no cache) are called with them.

usage: harvest.py WHEEL_DIR OUT_DIR TARGET     TARGET: such as x86_64-linux-gnu.2.28
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

_PROBE = """
#include <cmath>
#include <iostream>
#include <string>
#include <thread>
int main(int argc, char** argv) {
  std::thread t([&] { std::cout << std::string(argv[0]); });
  t.join();
  try { throw 1; } catch (int) {}
  return static_cast<int>(std::sin(argc));
}
"""

_WRAPPER = """#!/bin/bash
# {what}; works from any folder, and wherever the SDK's folder lies.
D="${{BASH_SOURCE[0]%/*}}"
D="${{D%/bin}}"
{body}
"""

# nvcc's front end has neither __builtin_common_type nor vector extensions, which libc++ 19 and
# later use where the host compiler has them; the plain code beside is kept for it. libc++ 18 needs
# no edit.
_LIBCXX_GUARDS = {
    "__type_traits/common_type.h": "#if __has_builtin(__builtin_common_type)\n",
    "__algorithm/simd_utils.h": (
        "#if _LIBCPP_STD_VER >= 14 && defined(_LIBCPP_CLANG_VER) && !defined(__ALTIVEC__)\n"
    ),
}


def run(command: list[str], env: dict[str, str]) -> list[str]:
    """The lines that the command printed on either stream."""
    result = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode:
        sys.exit(f"{shlex.join(command)}\n{result.stdout}")
    return result.stdout.splitlines()


def probe(
    zig: pathlib.Path, target: str, work: pathlib.Path, cache: pathlib.Path
) -> tuple[list[str], list[str]]:
    """The words of the clang call and of the lld call that zig makes for one small program."""
    env = dict(
        os.environ,
        ZIG_GLOBAL_CACHE_DIR=str(cache),
        ZIG_LOCAL_CACHE_DIR=str(work / "cache"),
        ZIG_VERBOSE_CC="1",
        ZIG_VERBOSE_LINK="1",
    )
    source, obj = work / "probe.cc", work / "probe.o"
    source.write_text(_PROBE)
    base = [str(zig), "c++", "-target", target, "-std=c++17", "-O3", "-g0"]
    compile_log = run([*base, "-c", str(source), "-o", str(obj)], env)
    link_log = run([*base, "-pie", str(obj), "-o", str(work / "probe")], env)
    compile_line = next(line for line in compile_log if " clang " in line and "probe.cc" in line)
    link_line = [line for line in link_log if line.startswith(("ld.lld", "lld"))][-1]
    return shlex.split(compile_line), shlex.split(link_line)


def harvest_headers(words: list[str], zig_lib: pathlib.Path, out: pathlib.Path) -> list[str]:
    """Moves every -isystem folder to out/include and returns the flags that name them there."""
    folders = [os.path.realpath(words[i + 1]) for i, w in enumerate(words) if w == "-isystem"]
    flags = []
    for folder in dict.fromkeys(folders):
        if os.path.isdir(folder):
            relative = pathlib.Path(folder).relative_to(zig_lib)
            shutil.copytree(folder, out / "include" / relative, copy_function=shutil.move)
            flags.append(f'-isystem "$D/include/{relative}"')
    for name, guard in _LIBCXX_GUARDS.items():
        header = out / "include/libcxx/include" / name
        if header.exists():
            header.write_text(
                header.read_text().replace(guard, guard[:-1] + " && !defined(__CUDACC__)\n")
            )
    return flags


def harvest_libraries(words: list[str], cache: pathlib.Path, out: pathlib.Path) -> list[str]:
    """Copies what was linked to out/lib and returns the names in link order."""
    lib = out / "lib"
    lib.mkdir()
    names = []
    for word in map(os.path.realpath, words):
        name = os.path.basename(word)
        if word.startswith(str(cache)) and os.path.isfile(word) and not (lib / name).exists():
            shutil.copyfile(word, lib / name)
            if ".so." in name:  # for -lm, -ldl, -lpthread
                os.symlink(name, lib / (name.split(".so.")[0] + ".so"))
            names.append(name)
    missing = {"Scrt1.o", "libc++.a"} - set(names)
    if missing:
        sys.exit(f"zig linked no {' and no '.join(sorted(missing))}; it linked {shlex.join(words)}")
    return names


def write_wrappers(
    out: pathlib.Path, target: str, macros: list[str], headers: list[str], libraries: list[str]
) -> None:
    """bin/clang++, bin/clang, bin/ar and bin/ld.lld, which hold target, headers and libraries."""
    triple = target.split(".")[0].replace("x86_64-linux", "x86_64-unknown-linux")
    glibc_minor = target.rsplit(".", 1)[1]
    common = f"-target {triple} --no-default-config -nostdinc -D__GLIBC_MINOR__={glibc_minor}"
    cxx_macros = " ".join(m for m in macros if "GLIBC" not in m)
    c_headers = " ".join(h for h in headers if "libcxx" not in h)
    cxx_headers = " ".join(h for h in headers if "libcxx" in h)
    link = '-fuse-ld=lld --ld-path="$D/bin/ld.lld" -nostdlib -Wno-unused-command-line-argument'
    prologue = " ".join(f'"$D/lib/{n}"' for n in libraries if n == "crti.o")
    epilogue = " ".join(f'"$D/lib/{n}"' for n in libraries if n == "crtn.o")
    archives = " ".join(
        f'"$D/lib/{n}"' for n in libraries if not n.endswith(".o") and n != "libld.so.2"
    )
    bodies = {
        "clang++": (
            "clang++ with libc++ and glibc headers",
            f'exec "$D/zig" clang --driver-mode=g++ {common} -nostdinc++ {cxx_macros} '
            f'{cxx_headers} {c_headers} {link} "$@"',
        ),
        "clang": (
            "clang with glibc headers",
            f'exec "$D/zig" clang {common} {c_headers} {link} "$@"',
        ),
        "ar": ("llvm-ar", 'exec "$D/zig" ar "$@"'),
        "ld.lld": (
            "lld with the start files and the default libraries",
            f"""start="$D/lib/Scrt1.o"
for word in "$@"; do
  case "$word" in
    -shared) start= ;;
    -r | --relocatable | --version | -v) exec "$D/zig" ld.lld "$@" ;;
  esac
done
exec "$D/zig" ld.lld $start {prologue} "$@" -L"$D/lib" --as-needed {archives} {epilogue}""",
        ),
    }
    (out / "bin").mkdir()
    for name, (what, body) in bodies.items():
        wrapper = out / "bin" / name
        wrapper.write_text(_WRAPPER.format(what=what, body=body))
        wrapper.chmod(0o755)


def main() -> None:
    wheel, out = (pathlib.Path(p).resolve() for p in sys.argv[1:3])
    target = sys.argv[3]
    zig = wheel / "ziglang" / "zig"
    work = out / "_work"
    work.mkdir(parents=True)
    # Content-addressed, so safe to share: the second workspace of a machine needs 7 s, not 75.
    default_cache = pathlib.Path.home() / ".cache" / "flashtrain" / "zig"
    cache = pathlib.Path(os.environ.get("FLASHTRAIN_ZIG_CACHE") or default_cache).resolve()

    compile_words, link_words = probe(zig, target, work, cache)
    macros = list(dict.fromkeys(w for w in compile_words if w.startswith(("-D_LIB", "-D__GLIBC"))))
    headers = harvest_headers(compile_words, wheel / "ziglang" / "lib", out)
    libraries = harvest_libraries(link_words, cache, out)
    shutil.move(str(zig), out / "zig")
    write_wrappers(out, target, macros, headers, libraries)
    shutil.rmtree(work)
    shutil.rmtree(wheel)


if __name__ == "__main__":
    main()
