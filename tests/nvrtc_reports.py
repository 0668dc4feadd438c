"""What NVRTC tells of a text beside the machine code: PTX to read, and what each kernel takes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from xpoptim.engines.cuda import nvrtc


@dataclass(frozen=True)
class Resources:
    """Registers a thread, bytes of stack, and bytes spilled to memory for want of registers."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def spills(self) -> bool:
        """Whether a thread keeps anything in memory.

        What is spilled around the subroutines for division and square root counts as stack alone.
        """
        return self.stack + self.spill_stores + self.spill_loads > 0


def ptx(source: str, arch: str, options: Sequence[str] = ()) -> str:
    """The text as PTX for ``arch`` (``"compute_90"``), to read its operations and accesses in."""
    return _compiled(source, (f"-arch={arch}", *options), "getPTX")[0].decode()


def resources(source: str, arch: str, options: Sequence[str] = ()) -> dict[str, Resources]:
    """What each kernel of the text takes on ``arch`` (``"sm_90"``), as ptxas reports it."""
    _, log = _compiled(source, (f"-arch={arch}", *options, "--ptxas-options=-v"), "getCUBIN")
    patterns = (
        r"Used (\d+) registers",
        r"(\d+) bytes stack frame",
        r"(\d+) bytes spill stores",
        r"(\d+) bytes spill loads",
    )
    report = {}
    for kernel, body in re.findall(r"Compiling entry function '(\S+)'(.*?Used \d+ registers)", log, re.DOTALL):
        numbers = (re.search(pattern, body) for pattern in patterns)
        report[kernel] = Resources(*(int(number[1]) if number else 0 for number in numbers))
    return report


def _compiled(source: str, options: Sequence[str], product: str) -> tuple[bytes, str]:
    """With the engine's own flags; a text that is refused raises with NVRTC's log."""
    compiler = nvrtc._nvrtc()
    program = compiler.createProgram(str(source), "kernel.cu", (), ())
    try:
        compiler.compileProgram(program, (*nvrtc.FLAGS, *options))
        return getattr(compiler, product)(program), compiler.getProgramLog(program)
    except compiler.NVRTCError as error:
        raise nvrtc.CompileError(compiler.getProgramLog(program)) from error
    finally:
        compiler.destroyProgram(program)
