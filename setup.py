"""
Builds `csrc/` into one shared library in `cogview_pipelines/ops`. Metadata is in `pyproject.toml`.

The library has a plain C interface: it needs neither torch nor Python headers, so one wheel serves every version of
both, and nothing here imports torch. The CPU part takes any GCC or Clang and holds code for several instruction
sets. The CUDA part is added where `nvcc` is found, for the architectures that this toolkit knows; no GPU is needed.
Without a compiler the package installs all the same and computes with PyTorch operations.

Environment variables: `CXX`, `NVCC` (compilers), `COGVIEW_CUDA=0` (leave the CUDA part out),
`COGVIEW_CUDA_ARCHITECTURES` (for example `80;90`), `COGVIEW_REQUIRE_KERNELS=1` (fail if the CPU part cannot be
built; wheels are built with it).
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
LIBRARY = "_kernels.so"
CPU_KERNELS = ("local_attention_cpu", "decode_step_cpu", "gelu_cpu", "linear_cpu")
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti"]
CXX_FLAGS += ["-fvisibility=hidden", "-Wall"]
LINK_FLAGS = ["-shared", "-pthread", "-s"]
if sys.platform == "win32":
    # GCC aligns the stack to 16 bytes there and spills vectors of 32 as if it were aligned to 32 (its bug 54412)
    CXX_FLAGS += ["-Wa,-muse-unaligned-vector-move"]
    LINK_FLAGS += ["-static"]  # threads and runtime come along
# Chosen at run time, from the most general to the most particular. GCC 9 and 10 do not know `-march=x86-64-v3`.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86_INSTRUCTION_SETS = {"baseline": [], "avx2": AVX2, "avx512": [*AVX2, *AVX512]}
CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
MOST_SPILLED_BYTES = 256  # per thread, outside of the loops that multiply
# of a forward's loops, with and without bias and order, for the 16 products of head_dim 64 in half precision
MOST_LOOP_INSTRUCTIONS = 210


def run(command: list, quiet: bool = False) -> str:
    """Run a compiler and return what it says; its complaints are part of the error."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    if result.stderr.strip() and not quiet:
        print(result.stderr, file=sys.stderr)
    return result.stdout + result.stderr


def compile_cpu(
    compiler: list[str],
    folder: Path,
    sources: Path = SOURCES,
    kernels: Sequence[str] = CPU_KERNELS,
    flags: Sequence[str] = (),
    instruction_sets: Sequence[str] | None = None,
) -> list[Path]:
    """
    Compile the CPU kernels, once per instruction set, and what chooses among these at run time.

    Args:
        compiler (`list[str]`): GCC or Clang, as the beginning of a command.
        folder (`Path`): Gets the objects.
        sources (`Path`): Where the files of the kernels are.
        kernels (sequence of `str`): Which of them to compile.
        flags (sequence of `str`): More flags, after those of a release.
        instruction_sets (sequence of `str`, *optional*): By default all of this kind of processor.

    Returns:
        `list[Path]`: The objects.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    known = X86_INSTRUCTION_SETS if is_x86 else {"baseline": []}
    sets = {name: known[name] for name in instruction_sets or known}
    shared = [*compiler, *CXX_FLAGS, *flags, f"-DCPU_ISAS={' '.join(f'X({name})' for name in sets)}"]
    jobs = [(kernel, name, [f"-DCPU_ISA={name}", *sets[name]]) for kernel in kernels for name in sets]

    def compile_one(job: tuple[str, str, list[str]]) -> Path:
        source, name, own = job
        target = folder / f"{source}_{name}.o"
        run([*shared, *own, "-c", sources / f"{source}.cpp", "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, [*jobs, ("cpu_dispatch", "baseline", [])]))


def find_nvcc() -> str | None:
    """The CUDA compiler, unless it is missing or not wanted."""
    if os.environ.get("COGVIEW_CUDA", "1") == "0" or not (SOURCES / "local_attention_cuda.cu").exists():
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def compile_cuda(nvcc: str, folder: Path) -> tuple[Path, list[str]]:
    """Compile the CUDA kernels for every architecture that the toolkit knows, and PTX of the newest for later ones."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    wanted = os.environ.get("COGVIEW_CUDA_ARCHITECTURES", ";".join(CUDA_ARCHITECTURES)).split(";")
    known = [name for name in wanted if f"sm_{name}" in listed]
    if not known:
        raise RuntimeError(f"{nvcc} knows none of the architectures {wanted}: {listed}")
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in known]
    # of two, since that of the newest may be newer than the device
    codes += [f"-gencode=arch=compute_{name},code=compute_{name}" for name in {known[-1], *{"90"}.intersection(known)}]
    target = folder / "local_attention_cuda.o"
    flags = ["-std=c++17", "-O3", "--threads", str(os.cpu_count()), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags.append(f'-DLOCAL_ATTENTION_CUDA_ARCHITECTURES="{";".join(known)}"')
    report = run(
        [nvcc, *flags, *codes, "-Xptxas", "-v", "-c", SOURCES / "local_attention_cuda.cu", "-o", target], quiet=True
    )
    (folder / "registers.txt").write_text(report)
    check_registers(report)
    check_loops(nvcc, target)
    return target, known


def check_registers(report: str) -> None:
    """
    Hold the assembler's report of the kernels (`-Xptxas -v`) against the bounds.

    What does not fit into registers is spilled to memory: a change that makes a kernel spill costs much of its speed
    and shows nowhere else.
    """
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    if not kernels:
        raise RuntimeError(f"nvcc gave no report of registers:\n{report}")
    worst = max(kernels, key=lambda kernel: int(kernel[2]))
    print(
        f"{len(kernels)} CUDA kernels: at most {max(int(kernel[3]) for kernel in kernels)} registers a thread and "
        f"{worst[2]} bytes spilled ({worst[0]} for {worst[1]})"
    )
    if int(worst[2]) > MOST_SPILLED_BYTES:
        raise RuntimeError(
            f"{worst[0]} for {worst[1]} spills {worst[2]} bytes (at most {MOST_SPILLED_BYTES} are allowed)"
        )


def multiplying_loops(listing: str) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    """
    The innermost loops with tensor-core products in what `cuobjdump -sass` prints.

    Yields:
        `tuple[str, list[tuple[int, int, int]]]`: Each kernel of each architecture, and of each of its loops the
        instructions, products among them, and accesses to spilled registers.
    """
    for part in listing.split("Function : ")[1:]:
        code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", part)]
        jumps = [(at, re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)) for at, text in code]
        loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
        bodies = {(first, last): [text for at, text in code if first <= at <= last] for first, last in loops}
        bodies = {span: body for span, body in bodies.items() if any("HMMA" in text for text in body)}
        found = []
        for span, body in bodies.items():
            if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in bodies):
                spills = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in body)
                found.append((len(body), sum("HMMA" in text for text in body), spills))
        yield part.split()[0], found


def check_loops(nvcc: str, target: Path) -> None:
    """Hold the loops that do the work against the bounds, where the toolkit has a disassembler."""
    disassembler = shutil.which("cuobjdump", path=str(Path(shutil.which(nvcc) or nvcc).resolve().parent))
    disassembler = disassembler or shutil.which("cuobjdump")
    if disassembler is None:
        print("the loops of the CUDA kernels are not checked: there is no cuobjdump")
        return
    kernels = list(multiplying_loops(run([disassembler, "-sass", target], quiet=True)))
    spilling = {kernel for kernel, loops in kernels for _, _, spills in loops if spills}
    if spilling:
        raise RuntimeError(f"registers are spilled in loops that multiply: {', '.join(sorted(spilling))}")
    forward = [
        (size, kernel)
        for kernel, loops in kernels
        for size, products, _ in loops
        if "forward_kernel" in kernel and products == 16
    ]
    if not forward:
        raise RuntimeError("no loop of the forward kernels with 16 products was found")
    size, kernel = max(forward)
    count = sum(len(loops) for _, loops in kernels)
    print(f"{count} loops without spills; those of the forward have at most {size} instructions for 16 products")
    if size > MOST_LOOP_INSTRUCTIONS:
        raise RuntimeError(
            f"the loop of {kernel} has {size} instructions for 16 products (at most {MOST_LOOP_INSTRUCTIONS})"
        )


class BuildKernels(build_ext):
    """Compiles the library where a compiler is found, and says so where none is."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).parent / LIBRARY
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        found = os.environ.get("CXX") or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), "")
        compiler = shlex.split(found, posix=os.name == "posix")
        try:
            if not compiler:
                raise RuntimeError("no C++ compiler was found (g++, clang++ or the one that `CXX` names)")
            objects = compile_cpu(compiler, folder)
        except RuntimeError as error:
            if os.environ.get("COGVIEW_REQUIRE_KERNELS") == "1":
                raise
            print(
                f"warning: the kernels are not built, PyTorch operations will be used:\n{error}",
                file=sys.stderr,
            )
            return
        nvcc = find_nvcc()
        link = [*compiler, *LINK_FLAGS]
        if nvcc:
            try:
                cuda_object, architectures = compile_cuda(nvcc, folder)
                objects.append(cuda_object)
                # nvcc knows where its runtime library lies, and links the static one.
                link = [nvcc, "-ccbin", compiler[0], "-shared", "-Xcompiler", "-pthread", "-Xlinker", "-s"]
                print(f"CUDA kernels built for {', '.join(architectures)} and PTX")
            except RuntimeError as error:
                if os.environ.get("COGVIEW_REQUIRE_KERNELS") == "1":
                    raise
                print(f"warning: the CUDA part is not built:\n{error}", file=sys.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file, not an overwritten one: a process may have the old library mapped.
        fresh = target.with_suffix(".new")
        run([*link, *objects, "-o", fresh], quiet=True)
        fresh.replace(target)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:  # an editable install, where the build may have been skipped
        for ext in self.extensions:
            if os.path.exists(self.get_ext_fullpath(ext.name)) or os.path.exists(
                os.path.join(self.build_lib, self.get_ext_filename(ext.name))
            ):
                super().copy_extensions_to_source()


class BuildPython(build_py):
    """Adds the training scripts, which `cogview2 finetune` runs; an editable install finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "cogview_pipelines" / "training_scripts"
            target.mkdir(parents=True, exist_ok=True)
            for script in sorted((ROOT / "training_scripts").glob("*.py")):
                self.copy_file(str(script), str(target / script.name))


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and any Python 3: the library is not a Python extension module."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":  # for pip, too; tests import this file to build the kernels in other ways
    setup(
        ext_modules=[Extension("cogview_pipelines.ops._kernels", sources=[], optional=True)],
        cmdclass={"build_ext": BuildKernels, "build_py": BuildPython, "bdist_wheel": PlatformWheel},
        distclass=PlatformDistribution,
    )
