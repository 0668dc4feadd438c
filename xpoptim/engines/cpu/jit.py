"""LLVM assembly to callable machine code, through llvmlite. Imported only when a kernel is needed."""

from __future__ import annotations

from functools import cache

import llvmlite.binding as llvm

from ...codegen.llvm.elementwise import with_subnormals
from .threads import compiling


@cache
def _target() -> llvm.Target:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


def _machine() -> llvm.TargetMachine:
    return _target().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )


class Module:
    """Compiled assembly; it stays loaded for as long as this object lives.

    The functions named in ``subnormals`` compute with them, whatever the mode of the thread.
    """

    def __init__(self, assembly: str, *, subnormals: tuple[str, ...] = ()) -> None:
        with compiling:
            machine = _machine()
            text = with_subnormals(assembly, subnormals) if flushes_subnormals() else assembly
            module = llvm.parse_assembly(text)
            module.triple = _target().triple
            module.data_layout = str(machine.target_data)
            module.verify()
            tuning = llvm.create_pipeline_tuning_options(speed_level=3)
            tuning.loop_vectorization = tuning.loop_unrolling = True
            passes = llvm.create_pass_builder(machine, tuning)
            passes.getModulePassManager().run(module, passes)
            self._engine = llvm.create_mcjit_compiler(module, machine)
            self._engine.finalize_object()

    def address(self, name: str) -> int:
        return self._engine.get_function_address(name)


def flushes_subnormals() -> bool:
    """Whether a thread of this CPU has a mode, known to us, in which it flushes subnormals."""
    return llvm.get_default_triple().startswith(("x86_64", "i686"))


def half_precision() -> bool:
    """Whether the CPU converts float16 itself; without that LLVM would call routines that are not there."""
    triple = llvm.get_default_triple()
    if triple.startswith(("x86_64", "i686")):
        return bool(llvm.get_host_cpu_features().get("f16c"))
    return triple.startswith(("aarch64", "arm64"))
