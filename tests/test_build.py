"""What `setup.py` says of the CUDA code that a compiler made: reports and listings as the toolkit prints them."""

import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the repository")


@pytest.fixture(scope="module")
def setup():
    pytest.importorskip("setuptools", minversion="77")
    return runpy.run_path(str(ROOT / "setup.py"))


def listing(*functions):
    """What `cuobjdump -sass` prints of functions: a name and instructions; `@loop` is where `BRA loop` goes."""
    lines = ["Fatbin elf code:", "arch = sm_90", "\tcode for sm_90"]
    for name, instructions in functions:
        lines += [f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"']
        labels, address = {}, 0
        for text in instructions:
            if text.startswith("@") and " " not in text:
                labels[text[1:]] = address
                continue
            label = text.partition("BRA ")[2]
            text = text if label not in labels else text.replace(label, f"{labels[label]:#x}")
            lines += [f"        /*{address:04x}*/    {text} ;   /* 0x000000ff */", "         /* 0x000fe2000f8e00ff */"]
            address += 16
    return "\n".join(lines) + "\n"


def loop(size, products, spills=0, label="loop"):
    """A loop of `size` instructions."""
    body = ["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * products + ["LDL R3, [R1]", "STL [R1], R3"] * (spills // 2)
    return [f"@{label}", *body, *["FADD R0, R0, R1"] * (size - len(body) - 1), f"@P0 BRA {label}"]


def test_the_innermost_loops_with_products_are_found(setup):
    other = ["MOV R1, R2", *loop(20, 0, label="copies")]
    nested = ["@outer", "IADD3 R5, R5, 1, RZ", *loop(40, 16), "@P1 BRA outer", *loop(30, 24, 4, label="more")]
    found = list(setup["multiplying_loops"](listing(("forward_kernel", [*other, *nested, "EXIT"]))))
    assert found == [("forward_kernel", [(40, 16, 0), (30, 24, 4)])]


def test_jumps_forwards_are_no_loops(setup):
    text = listing(("forward_kernel", ["HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA 0x40", "EXIT"]))
    assert list(setup["multiplying_loops"](text)) == [("forward_kernel", [])]


@pytest.fixture
def check(setup, tmp_path, monkeypatch):
    """Hold a listing against the bounds, as a build does."""

    def run(*functions):
        program = tmp_path / "cuobjdump"
        (tmp_path / "listing").write_text(listing(*functions))
        program.write_text(f"#!/bin/sh\ncat {tmp_path / 'listing'}\n")
        program.chmod(0o755)
        setup["check_loops"](str(tmp_path / "nvcc"), tmp_path / "kernels.o")

    if os.name != "posix" or shutil.which("sh") is None:
        pytest.skip("needs a shell")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return run


def test_loops_within_the_bounds_pass(setup, check, capsys):
    most = setup["MOST_LOOP_INSTRUCTIONS"]
    check(("forward_kernel", [*loop(most - 9, 16), *loop(most, 16, label="bias")]), ("grad_key_kernel", loop(300, 32)))
    assert f"{most} instructions" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["another architecture", "keys with bias"])
def test_a_loop_of_the_forward_that_grew_is_refused(setup, check, where):
    most = setup["MOST_LOOP_INSTRUCTIONS"]
    good, bad = loop(most - 9, 16), loop(most + 1, 16, label="other")
    both = [("forward_kernel", good), ("forward_kernel", bad)] if "arch" in where else [("forward_kernel", good + bad)]
    with pytest.raises(RuntimeError, match=f"loop of forward_kernel has {most + 1} instructions"):
        check(*both)


def test_spills_between_products_are_refused(check):
    with pytest.raises(RuntimeError, match="spilled in loops that multiply: grad_key_kernel"):
        check(("forward_kernel", loop(100, 16)), ("grad_key_kernel", loop(200, 32, spills=2)))


def test_a_listing_without_the_loop_is_no_pass(check):
    with pytest.raises(RuntimeError, match="no loop of the forward"):
        check(("grad_key_kernel", loop(200, 32)))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_kernels_that_spill_too_much_are_refused(setup, capsys):
    def report(spilled):
        return (
            "ptxas info    : Compiling entry function 'forward_kernel' for 'sm_90'\n"
            "ptxas info    : Function properties for forward_kernel\n"
            f"    0 bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads\n"
            "ptxas info    : Used 128 registers, used 1 barriers\n"
        )

    most = setup["MOST_SPILLED_BYTES"]
    setup["check_registers"](report(most))
    assert "128 registers" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=f"forward_kernel for sm_90 spills {most + 4} bytes"):
        setup["check_registers"](report(most + 4))
    with pytest.raises(RuntimeError, match="no report"):
        setup["check_registers"]("nvcc: nothing to do")
