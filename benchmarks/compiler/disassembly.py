"""Reading what the compiler made: instructions of SASS, and the loops that multiply matrices."""

import re
from itertools import chain

MATRIX = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)\s*([^;]*);", re.MULTILINE
)
Instruction = tuple[int, str, str]  # address, operation, operands


def instructions(sass: str) -> list[Instruction]:
    """A disassembly in order, without the padding after the end."""
    return [(int(at, 16), op, rest) for at, op, rest in LINE.findall(sass) if op != "NOP"]


def before_the_end(code: list[Instruction]) -> int:
    """Instructions up to the last EXIT: after it lie subroutines for subnormal divisors."""
    return max((i + 1 for i, (_, op, _) in enumerate(code) if op.startswith("EXIT")), default=0)


def innermost(code: list[Instruction]) -> list[Instruction]:
    """The shortest loop around a matrix instruction, empty if there is none."""
    return min(_matrix_loops(code), key=len, default=[])


def outermost(code: list[Instruction]) -> list[Instruction]:
    """All loops around a matrix instruction that no other contains, one after the other."""
    loops = _matrix_loops(code)
    spans = [(loop[0][0], loop[-1][0]) for loop in loops]
    return list(chain.from_iterable(
        loop for loop, span in zip(loops, spans, strict=True)
        if not any(a <= span[0] and span[1] <= b and (a, b) != span for a, b in spans)
    ))  # fmt: skip


def _matrix_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """What branches back, but for what lies after the last EXIT: waits, moved out of loops."""
    end = max((at for at, op, _ in code if op.startswith("EXIT")), default=0)
    loops = []
    for at, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target[1], 16) < at < end:
            loop = [found for found in code if int(target[1], 16) <= found[0] <= at]
            if any(name.startswith(MATRIX) for _, name, _ in loop):
                loops.append(loop)
    return loops


def tensor_core(ptx: str) -> str:
    """The matrix instructions in the PTX, shortest form."""
    found = set(re.findall(r"(wgmma\.mma_async\S*|tcgen05\.mma\S*|mma\.sync\S*)", ptx))
    return " ".join(sorted(re.sub(r"\.sync\.aligned|\.row\.col|\.cta_group::1", "", f).rstrip(";")
                           for f in found))  # fmt: skip


def register_operands(ptx: str) -> int:
    """How many wgmma in the PTX take their left operand from registers."""
    return len(re.findall(r"wgmma\.mma_async[^;{]*\{[^}]*\}\s*,\s*\{", ptx))
