"""Rounded floats as bytes and nibbles: what quantizers write."""

from ._lang import PTX, constexpr_function, jit, round_codes, tl


@jit
def clamped(y, LOW: tl.constexpr, HIGH: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Clamps y where the grid [QMIN, QMAX] is narrower than what saturates anyway, [LOW, HIGH]."""
    if QMIN > LOW:
        y = tl.maximum(y, QMIN * 1.0)
    if QMAX < HIGH:
        y = tl.minimum(y, QMAX * 1.0)
    return y


@jit
def to_bytes(y, QMIN: tl.constexpr, QMAX: tl.constexpr, OFFSET: tl.constexpr):
    """clamp(round(y), QMIN, QMAX) + OFFSET as bytes, signed where QMIN + OFFSET < 0.

    2**-149 is the smallest float32: a multiply-add rounds y * 2**-149 + ADDED * 2**-149 once, to
    the nearest even integer in the bits of a float32. An integer instruction saturates two of
    them, to [0, 255], and packs them; signed bytes go through it with their sign bit flipped, which
    is 128 more. ADDED is even, so that ties stay ties to even.
    """
    if PTX:
        SIGN: tl.constexpr = 128 if QMIN + OFFSET < 0 else 0
        ADDED: tl.constexpr = OFFSET + SIGN
        y = clamped(y, -ADDED, 255 - ADDED, QMIN, QMAX)
        return tl.inline_asm_elementwise(
            _bytes_ptx(ADDED, SIGN), "=r,r,r,r,r", [y],
            dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return (round_codes(y, QMIN * 1.0, QMAX * 1.0) + OFFSET).to(tl.int8)


@jit
def two_nibbles(low, high, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Codes of [-8, 7] or [0, 15] as low | high << 4, by the arithmetic of `to_bytes`."""
    if PTX:
        SIGN: tl.constexpr = 8 if QMIN < 0 else 0
        low = clamped(low, -SIGN, 15 - SIGN, QMIN, QMAX)
        high = clamped(high, -SIGN, 15 - SIGN, QMIN, QMAX)
        return tl.inline_asm_elementwise(
            _nibbles_ptx(SIGN), "=r,r,r,r,r,r,r,r,r", [low, high],
            dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low = round_codes(low, QMIN * 1.0, QMAX * 1.0)
        high = round_codes(high, QMIN * 1.0, QMAX * 1.0)
        return ((low & 15) | (high << 4)).to(tl.int8)


@constexpr_function
def _bytes_ptx(added, sign):
    """Four floats to four bytes of a register, `added` before and `sign` flipped after."""
    lines = ["{ .reg .f32 y; .reg .b32 t, a, b, c, d;"]
    for i, name in enumerate("abcd"):
        lines.append(f"mov.b32 y, ${i + 1}; fma.rn.f32 y, y, 0f00000001, 0f{added:08X};")
        lines.append(f"mov.b32 {name}, y;")
    lines.append("cvt.pack.sat.u8.s32.b32 t, d, c, 0; cvt.pack.sat.u8.s32.b32 t, b, a, t;")
    lines.append(f"xor.b32 $0, t, 0x{sign * 0x01010101:08x}; }}")
    return " ".join(lines)


@constexpr_function
def _nibbles_ptx(sign):
    """Eight floats, the low nibbles first, to four bytes of a register."""
    lines = ["{ .reg .f32 y; .reg .b32 t, a, b, c, d, e, f, g, h; mov.b32 t, 0;"]
    for i, name in enumerate("abcdefgh"):
        lines.append(f"mov.b32 y, ${i + 1}; fma.rn.f32 y, y, 0f00000001, 0f{sign:08X};")
        lines.append(f"mov.b32 {name}, y;")
    for low, high in ("dh", "cg", "bf", "ae"):
        lines.append(f"cvt.pack.sat.u4.s32.b32 t, {high}, {low}, t;")
    lines.append(f"xor.b32 $0, t, 0x{sign * 0x11111111:08x}; }}")
    return " ".join(lines)
