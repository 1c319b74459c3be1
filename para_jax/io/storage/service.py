"""The connection to Google Cloud Storage, by gcsfs (`pip install 'para_jax[gcs]'`), and its errors in one line."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

#: Seconds without a byte of an answer until a request fails. gcsfs then tries it a few more times.
SILENCE_SECONDS = 60


def file_system() -> Any:
    """This process's gcsfs file system. Its connections do not survive a fork."""
    return file_system_of(os.getpid())


@functools.cache
def file_system_of(process: int) -> Any:
    import fsspec.config
    from aiohttp import ClientTimeout
    from gcsfs.core import GCSFileSystem

    if logging.getLogger("gcsfs").level == logging.NOTSET:
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it also logs the traceback of each error that it raises
    # orbax creates its own file system, which must see what this one writes
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    # not `total`: gcsfs does not repeat a request that took too long in all, and a large object may take longer
    silence = ClientTimeout(sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
    return GCSFileSystem(use_listings_cache=False, requests_timeout=silence, skip_instance_cache=True)


def one_line_errors(method: Callable) -> Callable:
    """Decorates a method of a path, to turn its errors into OSErrors with one line that names the path."""

    @functools.wraps(method)
    def calling(self, *arguments, **settings):
        try:
            return method(self, *arguments, **settings)
        except FileNotFoundError:
            raise FileNotFoundError(2, "no such object", str(self)) from None
        except ImportError:
            raise ValueError(f"{self}: gs:// needs gcsfs; run `pip install 'para_jax[gcs]'`") from None
        except (ValueError, OSError) as error:
            if str(self) in str(error):
                raise
            raise OSError(5, reason(error), str(self)) from None
        except Exception as error:  # of aiohttp, google.auth and gcsfs
            raise OSError(5, reason(error), str(self)) from None

    return calling


def reason(error: Exception) -> str:
    """The last line of an error's text, with advice if access was denied."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
    line = line if line.isprintable() else repr(line)
    if getattr(error, "code", None) in (401, 403) or "Forbidden" in str(error):
        return (
            f"no access ({line}); run `gcloud auth application-default login`, or give access to the host's service "
            "account"
        )
    return line
