"""A disk that cannot be read: `read` and `mmap` of real system calls fail as the kernel makes them fail.

A library in front of libc, for the decoder's process alone, gives EIO where a file under a folder named `sick` is
read, and SIGBUS where a page of one that is mapped is touched.
"""

import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deltamux.compression.names import MANIFEST_FILE, WEIGHTS_FILE
from deltamux.serve.worker.capacity import Capacity
from deltamux.serve.worker.decoder import Task
from deltamux.serve.worker.loader import Loader

CAPACITY = Capacity(2**22, 64, frozenset({"model.norm.weight"}))
SICK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

static int sick(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, "/" FOLDER "/") != NULL && strstr(path, FILE_NAME) != NULL;
}
#ifdef READS
ssize_t read(int file, void *to, size_t size) {
    static ssize_t (*real)(int, void *, size_t);
    if (!real) real = (ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    if (sick(file)) { errno = EIO; return -1; }
    return real(file, to, size);
}
#else
static void *(*real_map)(void *, size_t, int, int, int, off_t);
static void *mapped(void *at, size_t size, int protection, int flags, int file, off_t offset) {
    if (!real_map) real_map = (void *(*)(void *, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, "mmap");
    /* Memory of no length: its pages cannot be had, which the kernel tells as it tells a failing disk. */
    if (file >= 0 && sick(file)) file = memfd_create("gone", 0), offset = 0;
    return real_map(at, size, protection, flags, file, offset);
}
void *mmap(void *at, size_t size, int protection, int flags, int file, off_t offset) {
    return mapped(at, size, protection, flags, file, offset);
}
void *mmap64(void *at, size_t size, int protection, int flags, int file, off_t offset) {
    return mapped(at, size, protection, flags, file, offset);
}
#endif
"""


@pytest.fixture
def failing_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_pair: Callable[..., tuple[Path, Path]]
) -> Iterator[Callable[[str, str], Loader]]:
    """A loader whose decoder cannot read (`READS`) or map (`MAPS`) files of a name in folders called sick."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    loaders: list[Loader] = []

    def start(way: str, name: str) -> Loader:
        source, library = tmp_path / "sick.c", tmp_path / "sick.so"
        source.write_text(SICK)
        define = [f"-D{way}", '-DFOLDER="sick"', f'-DFILE_NAME="{name}"']
        build = [compiler, "-shared", "-fPIC", "-O1", *define, str(source), "-o", str(library)]
        subprocess.run([*build, "-ldl"], check=True, capture_output=True)
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nLD_PRELOAD={library} exec {sys.executable} "$@"\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(python))
        task = Task(str(make_pair()[0]), None, CAPACITY, 64, image_cache=0)
        loaders.append(Loader(task, pin=False))
        return loaders[-1]

    yield start
    for loader in loaders:
        loader.stop()


@pytest.mark.parametrize("name", [WEIGHTS_FILE, MANIFEST_FILE])
def test_an_expert_on_a_failing_disk_is_refused_by_name_and_the_others_are_read(
    failing_disk: Callable[[str, str], Loader],
    make_artifact: Callable[..., Path],
    tmp_path: Path,
    name: str,
) -> None:
    assert (make_artifact() / name).is_file()
    shutil.copytree(make_artifact(), tmp_path / "sick" / "expert")
    loader = failing_disk("READS", name)
    for ask in (loader.image, loader.check):
        with pytest.raises(ValueError, match=r"(?i)^[^\n]*/sick/expert[^\n]*input/output error"):
            ask(str(tmp_path / "sick" / "expert"))
    assert loader.image(str(make_artifact())).numel() > 0


def test_a_page_that_cannot_be_had_ends_the_decoder_and_not_the_engine(
    failing_disk: Callable[[str, str], Loader], make_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(make_artifact(), tmp_path / "sick" / "expert")
    loader = failing_disk("MAPS", WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"^[^\n]*/sick/expert' could not be read[^\n]*$"):
        loader.image(str(tmp_path / "sick" / "expert"))
    assert loader.image(str(make_artifact())).numel() > 0
