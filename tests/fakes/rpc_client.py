"""Plays what `llama-server --rpc HOST:PORT --list-devices` does, for a protocol version of choice: argv[1] is "7.0"."""

import socket
import struct
import sys


def request(link: socket.socket, command: int, payload: bytes) -> bytes:
    link.sendall(struct.pack("<BQ", command, len(payload)) + payload)
    (size,) = struct.unpack("<Q", link.recv(8, socket.MSG_WAITALL))
    return link.recv(size, socket.MSG_WAITALL)


def main() -> int:
    major, minor = (int(part) for part in sys.argv[1].split("."))
    endpoint = sys.argv[sys.argv.index("--rpc") + 1]
    host, port = endpoint.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as link:
        theirs = request(link, 14, bytes(24))[:2]
        if theirs[0] != major or theirs[1] > minor:
            sys.stderr.write(f"RPC server version mismatch: {theirs[0]}.{theirs[1]}.0\n")
            return 134
        assert request(link, 15, b"") == struct.pack("<I", 1)
        free, total = struct.unpack("<QQ", request(link, 11, struct.pack("<I", 0)))
    print(f"Available devices:\n  RPC0: {endpoint} ({total >> 20} MiB, {free >> 20} MiB free)")
    return 0


sys.exit(main())
