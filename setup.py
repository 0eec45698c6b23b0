"""The compiled parts: plain C interfaces that are loaded with ctypes.

Nothing of torch or of Python's headers is needed to build them. Without a compiler they are left out and
the install succeeds: torch and numpy do their work, slowly.
"""

from pathlib import Path

from setuptools import Extension, setup


def library(name: str, source: str, *arguments: str) -> Extension:
    """A library from one file, and the headers beside it."""
    return Extension(
        name,
        [source],
        depends=[str(header) for header in sorted(Path(source).parent.glob("*.h"))],
        language="c++",
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", *arguments],
        py_limited_api=True,
        optional=True,
    )


setup(
    # They use nothing of a Python version.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    ext_modules=[
        library("deltamux.compression.image._unpack", "compression/image/unpack.cpp"),
        library(
            "deltamux.compression.rounding._feedback",
            "compression/rounding/feedback.cpp",
            "-Wno-psabi",
        ),
        # A product and a sum become one operation only where the source says so.
        library("deltamux.serve.worker._product", "serve/worker/product.cpp", "-ffp-contract=off"),
    ],
)
