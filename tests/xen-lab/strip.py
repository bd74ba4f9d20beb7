"""Copies a file of `xl save` without its PAGE_DATA records: SAVED INTO."""

import struct
import sys

PAGE_DATA = 1
with open(sys.argv[1], "rb") as file:
    data = file.read()
(optional,) = struct.unpack_from("<I", data, 44)
# xl's header and configuration, libxl's header and LIBXC_CONTEXT record, libxc's image and domain header.
at = 48 + optional + 16 + 8 + 24 + 16
kept = [data[:at]]
ends = 0
while ends < 2:
    kind, length = struct.unpack_from("<II", data, at)
    end = at + 8 + (length + 7) // 8 * 8
    if kind != PAGE_DATA:
        kept.append(data[at:end])
    # The end of libxc's stream, then that of libxl's.
    ends += kind == 0
    at = end
with open(sys.argv[2], "wb") as file:
    file.write(b"".join(kept))
