"""``darktrt plugins``: the library of CUDA plugins for full TensorRT."""

from __future__ import annotations

import argparse

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "plugins",
        "compile the library of CUDA plugins for full TensorRT; needs the CUDA toolkit, make and a C++ compiler",
        "darktrt plugins",
        'darktrt plugins --tensorrt 8.6.0 --sm "75 86 90"',
        "darktrt plugins --nvcc /opt/cuda-12.2/bin/nvcc --include /opt/TensorRT-10.3.0/include",
        "darktrt plugins -o libdarktrt_plugins.so",
    )
    version = (
        "version of TensorRT (default: that of --include, else of the installed one, else of the system's headers, else 10.16)"
    )
    parser.add_argument("--tensorrt", metavar="VERSION", help=version)
    sms = "compute capabilities, times ten (default: those of this machine's GPUs, else the usual ones)"
    parser.add_argument("--sm", type=_sms, default=(), metavar='"NN ..."', help=sms)
    nvcc = "CUDA compiler (default: the one on the PATH, else /usr/local/cuda/bin/nvcc)"
    parser.add_argument("--nvcc", metavar="PATH", help=nvcc)
    include = "folder of NvInfer.h (default: TENSORRT_INCLUDE, else a folder of the system, else a download from NVIDIA)"
    parser.add_argument("--include", metavar="FOLDER", help=include)
    output = "file to write (default: one in the cache, ~/.cache/darktrt/plugins, where every command looks for it)"
    parser.add_argument("-o", "--output", metavar="FILE", help=output)
    parser.set_defaults(run=_plugins)


def _sms(text: str) -> tuple[int, ...]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"'{text}' are no compute capabilities, times ten; write, for example, \"86 90\"")
    return tuple(sorted(map(int, words)))


def _plugins(args: argparse.Namespace) -> None:
    from darktrt.plugins.build import compile_plugins

    print(compile_plugins(args.tensorrt, args.sm, args.nvcc, args.include, args.output))
