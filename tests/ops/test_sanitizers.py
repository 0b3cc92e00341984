"""
Memory errors, undefined behaviour and races of the CPU kernels, which the sanitizers of the compiler look for.

`sanitized_calls.cpp` makes random and extreme calls of all that `csrc/` has for CPUs, and checks what sanitizers
cannot see: gaps inside of tensors, and that results do not depend on the number of threads. `COGVIEW_FUZZ=20` makes
twenty times as many. Deliberate errors show that real ones would be noticed.
"""

import os
import runpy
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..fuzz.utils import FACTOR

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
CALLS = Path(__file__).with_name("sanitized_calls.cpp")
OPTIMIZATION = ["-O0", "-g1"]  # the last of several levels counts; others take minutes to compile
SANITIZERS = {
    "memory": ["-fsanitize=address"],
    "behaviour": ["-fsanitize=undefined", "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
}
# Vectors of all sizes for what is read and written (None: all that there are); the rest is the same with each.
INSTRUCTION_SETS = {"memory": None, "behaviour": ["baseline"], "threads": ["baseline"]}
NUM_CASES = {"local_attention": 120, "decode_step": 120, "gelu": 60, "linear": 90}


@dataclass(frozen=True)
class Mistake:
    """A deliberate error, in a file of `csrc/`, and what the report of the sanitizer must say."""

    what: str
    sanitizer: str
    kernel: str  # whose calls meet it, and what is compiled anew
    file: str
    old: str
    new: str
    report: str


MISTAKES = [
    Mistake(
        "the end of the numbers is read in whole vectors",
        "memory",
        "gelu",
        "gelu_cpu.cpp",
        "for (; i + W <= to; i += W) write(results + i, gelu(",
        "for (; i < to; i += W) write(results + i, gelu(",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    Mistake(
        "the end of the gradients is read in whole vectors",
        "memory",
        "gelu",
        "gelu_cpu.cpp",
        "for (; i + W <= to; i += W) write(results + i, read(gradients",
        "for (; i < to; i += W) write(results + i, read(gradients",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    Mistake(
        "vectors are taken to be aligned",
        "behaviour",
        "gelu",
        "cpu_vectors.h",
        "UnalignedFloats __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)))",
        "UnalignedFloats __attribute__((vector_size(VECTOR_BYTES), may_alias))",
        "misaligned address",
    ),
    Mistake(
        "a key that is not there yet is read",
        "memory",
        "decode_step",
        "decode_step_cpu.cpp",
        "s.bias + (int64_t)m * s.capacity, (int)(length + i + 1),",
        "s.bias + (int64_t)m * s.capacity, (int)(length + i + (length + s.news < s.capacity ? s.news - i + 1 : 1)),",
        "the logits are not finite",
    ),
    Mistake(
        "two threads take the same numbers",
        "threads",
        "gelu",
        "gelu_cpu.cpp",
        "(from = __atomic_fetch_add(&call.next, PIECE, __ATOMIC_RELAXED))",
        "(from = call.next, call.next += PIECE, from)",
        "ThreadSanitizer: data race",
    ),
    Mistake(
        "a phase does not wait for what others wrote",
        "threads",
        "decode_step",
        "decode_step_cpu.cpp",
        "__atomic_fetch_add(&count->done, 1, __ATOMIC_RELEASE)",
        "__atomic_fetch_add(&count->done, 1, __ATOMIC_RELAXED)",
        "ThreadSanitizer: data race",
    ),
]


class Compiler:
    """
    Makes programs of `sanitized_calls.cpp` and the kernels with a sanitizer.

    Args:
        sanitizer (`str`): A key of `SANITIZERS`.
        folder (`Path`): Gets what is made.
    """

    def __init__(self, sanitizer: str, folder: Path):
        self.command = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "")
        if not self.command or not SOURCES.is_dir():
            pytest.skip("needs a C++ compiler and the sources of the kernels")
        self.flags, self.folder = [*OPTIMIZATION, *SANITIZERS[sanitizer]], folder
        empty = folder / "empty.cpp"
        empty.write_text("int main() { return 0; }\n")
        made = self._make([empty], "empty")
        if made.returncode:
            pytest.skip(f"this compiler has no {' '.join(SANITIZERS[sanitizer])}: {made.stderr[:500]}")
        # where addresses of memory are too random for the sanitizer, they can be made the same in every run
        self.prefix = next((prefix for prefix in ([], ["setarch", "-R"]) if self._runs(prefix)), None)
        if self.prefix is None:
            pytest.skip("programs with this sanitizer do not run here")
        setup = runpy.run_path(str(ROOT / "setup.py"))
        self.compile_cpu = setup["compile_cpu"]
        language = [flag for flag in setup["CXX_FLAGS"] if flag.startswith("-std=")]
        self.calls = folder / "sanitized_calls.o"
        compiled = self._make([*language, f"-I{SOURCES}", "-c", CALLS], self.calls.name)
        assert compiled.returncode == 0, compiled.stderr
        self.objects = self._kernels(folder, SOURCES, instruction_sets=INSTRUCTION_SETS[sanitizer])

    def _runs(self, prefix: list[str]) -> bool:
        try:
            return run([*prefix, self.folder / "empty"]).returncode == 0
        except OSError:
            return False

    def _make(self, arguments: list, name: str) -> subprocess.CompletedProcess:
        return run([*self.command, *self.flags, *arguments, "-pthread", "-o", self.folder / name])

    def _kernels(self, folder: Path, sources: Path, **options) -> dict[str, Path]:
        objects = self.compile_cpu(self.command, folder, sources, flags=self.flags, **options)
        return {path.name: path for path in objects}

    def program(self, mistake: Mistake | None = None) -> list:
        """The command of the program, with the kernels as they are or with a mistake in one of them."""
        objects, name = self.objects, "sanitized_calls"
        if mistake is not None:
            name = mistake.what.replace(" ", "_")
            sources, made = self.folder / f"{name}_sources", self.folder / f"{name}_objects"
            shutil.copytree(SOURCES, sources)
            made.mkdir()
            text = (sources / mistake.file).read_text()
            assert text.count(mistake.old) == 1, f"{mistake.old} stands {text.count(mistake.old)} times in the file"
            (sources / mistake.file).write_text(text.replace(mistake.old, mistake.new))
            only = {"kernels": [f"{mistake.kernel}_cpu"], "instruction_sets": ["baseline"]}
            others = {name: path for name, path in self.objects.items() if name.endswith("_baseline.o")}
            objects = {**others, **self._kernels(made, sources, **only)}
        linked = self._make([self.calls, *objects.values()], name)
        assert linked.returncode == 0, linked.stderr
        return [*self.prefix, self.folder / name]


def run(command: list) -> subprocess.CompletedProcess:
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)


pytestmark = pytest.mark.timeout(1200)  # the first test of a sanitizer compiles, which takes half a minute alone


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    """Function from a sanitizer to its compiler, which is made once."""
    made: dict[str, Compiler] = {}

    def of(sanitizer: str) -> Compiler:
        if sanitizer not in made:
            made[sanitizer] = Compiler(sanitizer, tmp_path_factory.mktemp(sanitizer))
        return made[sanitizer]

    return of


@pytest.mark.parametrize("kernel", NUM_CASES)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_random_and_extreme_calls_are_clean(sanitizer, kernel, compilers):
    count = max(1, round(NUM_CASES[kernel] * FACTOR))
    done = run([*compilers(sanitizer).program(), kernel, 0, count])
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stdout == f"{kernel}: {count} cases\n"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what.replace(" ", "-"))
def test_a_mistake_is_noticed(mistake, compilers):
    done = run([*compilers(mistake.sanitizer).program(mistake), mistake.kernel, 0, NUM_CASES[mistake.kernel]])
    assert done.returncode != 0
    assert mistake.report in done.stderr, done.stderr[-8000:]
