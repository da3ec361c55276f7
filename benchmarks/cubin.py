"""Reads what a cubin says of its kernel: registers and stack frame, from the ELF sections `.nv.info.*`."""

from __future__ import annotations

import struct
from dataclasses import dataclass

FRAME_SIZE, REGISTERS = 0x11, 0x2F  # attribute codes; each value is a symbol index and a number
SIZED = 4  # a record whose payload's length stands in its header


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers a thread, and bytes of stack frame a thread (spilled registers live there)."""

    registers: int
    frame_bytes: int


def resources(cubin: bytes) -> Resources:
    """The largest figures over all functions in `cubin`. ValueError if it is none or does not tell."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * entry) for i in range(count)]
    found: dict[int, list[int]] = {FRAME_SIZE: [], REGISTERS: []}
    for section in sections:
        begin = sections[names_index][4] + section[0]
        if not cubin[begin : cubin.index(0, begin)].startswith(b".nv.info"):
            continue
        position, end = section[4], section[4] + section[5]
        while position < end:
            form, attribute, size = struct.unpack_from("<BBH", cubin, position)
            position += 4
            if form == SIZED:
                if attribute in found:
                    found[attribute].append(struct.unpack_from("<II", cubin, position)[1])
                position += size
    if not found[REGISTERS] or not found[FRAME_SIZE]:
        raise ValueError("no register counts or stack frames in this cubin")
    return Resources(max(found[REGISTERS]), max(found[FRAME_SIZE]))
