"""Who may reach a server, and what its clients may do there."""

from __future__ import annotations

import re
import socket
from ipaddress import ip_address

from darktrt.errors import DarktrtError

MENDED, MENDED_RELEASE = (2, 67), "26.03"
"""The first Triton with what NVIDIA's security bulletins up to number 5828 (May 2026) mend, and NVIDIA's container of it.

Before 2.58, a request with a large shape ends the server. Before 2.59.1, errors name the memory of the Python backend, and
clients may register it as theirs (CVE-2025-23319, 23320, 23334)."""

_HOLES = f"security holes that Triton {MENDED[0]}.{MENDED[1]} (container {MENDED_RELEASE}) mends"

RESERVED_PREFIX = "triton_python_backend_shm_region_"
"""Triton from 2.59.1 on lets no client register shared memory whose name begins with this."""

_NOBODY = "closed:=nobody"
"""A header that opens a closed protocol, and its value. No request can have it: neither HTTP/1 nor HTTP/2 allow a colon at the
end of a name, and Triton's two servers accept none."""


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address.

    Raises:
        DarktrtError: it is no address of a network.
    """
    try:
        found = socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        raise DarktrtError(f"'{address}' is no address to listen at ({error}); 127.0.0.1 is this machine", "address") from error
    return all(ip_address(str(one[4][0]).partition("%")[0]).is_loopback for one in found)


def is_mended(version: str) -> bool:
    """Whether a version of Triton, such as ``2.51.0``, has none of the holes."""
    parts = re.match(r"(\d+)\.(\d+)", version)
    return parts is not None and tuple(map(int, parts.groups())) >= MENDED


def exposure_error(server: str, address: str) -> DarktrtError:
    """The refusal to let other machines reach a server with holes.

    Args:
        server: which one, for the message.
    """
    return DarktrtError(
        f"{server} has {_HOLES}, so it is not started at {address}, where other machines reach it; use that version or a later "
        "one, or 127.0.0.1 behind a proxy",
        "insecure",
    )


def caveat(server: str) -> str:
    """What a server with holes means on this machine."""
    return f"{server} has {_HOLES}: every program that reaches its ports can end it"


def closed_protocols(shared_memory: bool, arguments: tuple[str, ...] = ()) -> list[str]:
    """Options that close to all clients what changes the server for others: its log and traces, and shared memory.

    Args:
        shared_memory: leave it open.
        arguments: the user's options of tritonserver, which may have restrictions of their own instead.
    """
    protocols = ",".join(["trace", "logging", *([] if shared_memory else ["shared-memory"])])
    options = [f"--{name}={protocols}:{_NOBODY}" for name in ("http-restricted-api", "grpc-restricted-protocol")]
    return [option for option in options if not any(one.startswith(option.partition("=")[0]) for one in arguments)]
