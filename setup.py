"""The compiled part of the package, beside what pyproject.toml states.

It is a library that ctypes loads, not an extension module: it has no code of Python's, so that one wheel fits every Python of a
machine type. pyproject.toml can state neither its file's name nor the tag of such a wheel.
"""

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = "darktrt/plugins/csrc"
LIBRARY = Extension(
    "darktrt.vision.libdarktrt_fit",
    sources=[f"{CSRC}/fit_host.cpp"],
    depends=[f"{CSRC}/{header}" for header in ("fit.h", "half.h", "hd.h", "kernels.h")],
    # -ffp-contract=off: see fit.h. Without exceptions and with --as-needed it needs no C++ library where it runs.
    extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-g0"],
    extra_link_args=["-Wl,--as-needed"],
    optional=True,  # without a compiler the package is whole too: NumPy does the same, slower
)


class LibraryBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[LIBRARY], cmdclass={"build_ext": LibraryBuild, "bdist_wheel": AnyPythonWheel})
