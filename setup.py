"""The compiled modules. Everything else about the package is in pyproject.toml.

Environment switches, each read once here:

``ZMQCORE_ASAN=1``    instrument with the address and undefined-behaviour sanitizers (``make asan``)
``ZMQCORE_TRACE=1``   Cython line tracing, for coverage; never in a release
``ZMQCORE_WERROR=1``  a compiler warning fails the build

The switches do not mark what they built: give each a tree of its own (``make asan`` does), or ``make clean``
between.
"""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup

ASAN, TRACE, WERROR = (os.environ.get(f"ZMQCORE_{name}") == "1" for name in ("ASAN", "TRACE", "WERROR"))

MODULES = [
    *("_libzmq", "_frame", "_socket"),
    *("_encoder", "_decoder", "_body"),
    *("_outbox", "_led_socket", "_deadlines", "_pending", "_retention", "_window", "_channel", "_loop"),
    *("_table", "_lifecycle", "_pool"),
    *("_inbox", "_duplicates", "_request", "_port"),
]

# Windows is not supported. There only the Python files are installed: importing them says so, and what is missing.
SUPPORTED = sys.platform != "win32"

# No warning is suppressed: the C that Cython 3.1 and later write is clean under -Wextra.
compile_args, link_args = ["-O0" if TRACE else "-O2", "-Wall", "-Wextra"], []
if WERROR:
    compile_args.append("-Werror")
if ASAN:
    sanitizers = "-fsanitize=address,undefined"
    compile_args += [sanitizers, "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
    link_args.append(sanitizers)

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"zmqcore.{name}",
                [f"zmqcore/{name}.pyx"],
                extra_compile_args=compile_args,
                extra_link_args=link_args,
                # dlopen and dlsym lived in a library of their own before glibc 2.34.
                libraries=["dl"] if sys.platform.startswith("linux") else [],
                define_macros=[("CYTHON_TRACE_NOGIL", "1")] if TRACE else [],
            )
            for name in (MODULES if SUPPORTED else [])
        ],
        # Cython.Coverage looks for the C file beside its source; otherwise the tree stays clean.
        build_dir=None if TRACE else "build/cython",
        # Doctests are not how these modules are tested, so they need no __test__.
        compiler_directives={"autotestdict": False, "linetrace": TRACE},
        force=TRACE,
    ),
)
