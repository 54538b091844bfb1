"""How fast bytes arrive over a link: counted where they arrive, in pieces, until there are enough. Pure."""

from msgspec import Struct

MOST_BYTES = 16 << 20
MOST_S = 0.5
# What comes first tells of the connection, not of the link: TCP starts slowly, and shapers let a burst through.
SKIPPED = 0.3


class Arrived(Struct, frozen=True):
    """So many bytes had come, that long after the first piece."""

    after_s: float
    bytes: int


def enough(arrived: list[Arrived]) -> bool:
    return bool(arrived) and (arrived[-1].bytes >= MOST_BYTES or arrived[-1].after_s >= MOST_S)


def bytes_per_s(arrived: list[Arrived]) -> float:
    """0 when fewer than two pieces came: that tells nothing of a link.

    Where only the last one came after the burst, it alone tells; where nothing did, all together say too much, but
    not more than that.
    """
    if len(arrived) < 2:
        return 0.0
    last = arrived[-1]
    begin = next(at for at in arrived if at.after_s >= SKIPPED * last.after_s)
    if begin is last:
        begin = arrived[-2]
    if begin.bytes == last.bytes:
        begin = arrived[0]
    took_s = last.after_s - begin.after_s
    return (last.bytes - begin.bytes) / took_s if took_s > 0 else 0.0
