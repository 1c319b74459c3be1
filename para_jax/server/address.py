"""The address that the server listens at. It is taken before anything is loaded, so that a port in use is known at
once."""

from __future__ import annotations

import ipaddress
import re
import socket


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at this address. Clients that come before the server is there wait.

    It listens at once, because two sockets may have one address until one of them does.

    Args:
        port: 0: a free one.

    Raises ValueError for an address that cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        return socket.create_server(address, family=family)  # pyright: ignore[reportArgumentType]
    except OSError as error:
        advice = "give an address of this machine and a free port"
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}\n{advice}") from None


def url_of(taken: socket.socket) -> str:
    """The URL by which a client on this machine reaches the socket."""
    host, port = taken.getsockname()[:2]
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host = "::1" if taken.family == socket.AF_INET6 else "127.0.0.1"
    return f"http://[{host}]:{port}" if taken.family == socket.AF_INET6 else f"http://{host}:{port}"


def names_this_machine(host: str) -> bool:
    """Whether a Host header has a name that means this machine everywhere: localhost, or a loopback address."""
    name = re.sub(r":\d*$", "", host).strip("[]").rstrip(".").lower()
    try:
        known = name == "localhost" or name.endswith(".localhost")
        return known or ("%" not in name and ipaddress.ip_address(name).is_loopback)  # after a % comes any text
    except ValueError:
        return False


def is_loopback(taken: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return ipaddress.ip_address(taken.getsockname()[0].partition("%")[0]).is_loopback
