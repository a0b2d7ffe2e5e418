"""Checked first of all: what fastwm runs on is there, and new enough.

These packages are not among the dependencies that pip installs by itself: which build of torch to
take (gigabytes of CUDA, or not) is the user's choice.
"""

from __future__ import annotations

from importlib import metadata

__all__ = ["REQUIRED", "check"]

# torch: the stable ABI that the C++ library is built on. The others: the API that fastwm is held to.
REQUIRED = {"torch": (2, 10), "tensordict": (0, 14), "torchrl": (0, 14)}


def check() -> None:
    """Raise ImportError, naming all that is missing or too old and how to get it."""
    wrong = []
    for name, least in REQUIRED.items():
        wanted = ".".join(map(str, least))
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} {wanted} or later, which is not installed")
            continue
        major, minor, *_ = (*version.split("."), "0")
        if major.isdigit() and minor.isdigit() and (int(major), int(minor)) < least:
            wrong.append(f"{name} {wanted} or later, and finds {version}")
    if wrong:
        raise ImportError(
            f"fastwm needs {'; '.join(wrong)}. Install the build of torch that fits this machine, "
            "then `pip install torchrl` (or take what pip offers: `pip install 'fastwm[torch]'`)."
        )


check()
