"""Files that Rust does not read: Pillow, which knows more formats and has plug-ins, is asked about them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from cnnrs.data.bad_files import accepting_truncated, check_limits, is_the_process
from cnnrs.data.read_options import ReadOptions
from cnnrs.errors import DecodeError
from cnnrs.image import plugins

#: Height, width, channels, bytes.
Pixels = tuple[int, int, int, bytes]


def opinions(failed: Sequence[tuple[str, Exception]], read: ReadOptions, threads: int) -> Iterator[Pixels | Exception]:
    """Per file and what Rust said of it, in order: its pixels in mode RGB, or why there are none.

    Args:
        failed: (path, error).
        read: how files are read.
        threads: that work ahead, each on one image.
    """
    if len(failed) < 2 or threads < 2:
        for path, error in failed:
            yield _opinion(path, error, read)
        return
    with ThreadPoolExecutor(min(threads, len(failed)), "cnnrs-pillow") as pool:
        # No more images in memory than there are threads.
        waiting: deque[Future[Pixels | Exception]] = deque()
        for path, error in failed:
            if len(waiting) == threads:
                yield waiting.popleft().result()
            waiting.append(pool.submit(_opinion, path, error, read))
        while waiting:
            yield waiting.popleft().result()


def _opinion(path: str, error: Exception, read: ReadOptions) -> Pixels | Exception:
    try:
        return _pixels(path, error, read)
    except Exception as final:
        # Frames know those below them, of which one has the error: a cycle that would keep the threads.
        one: BaseException | None = final
        while one is not None:
            one.__traceback__ = None
            one = one.__cause__ or one.__context__
        return final


def _pixels(path: str, error: Exception, read: ReadOptions) -> Pixels:
    if not isinstance(error, DecodeError):
        raise error
    plugins.register()
    check_limits(path, read, error)
    try:
        with accepting_truncated(read.accepts_truncated):
            image = read.reader(path)
        if read.exif:
            from PIL import ImageOps

            image = ImageOps.exif_transpose(image)
    except Exception as pillows:
        if is_the_process(pillows) or isinstance(pillows, DecodeError):
            raise
        raise _both(path, error, pillows, read) from pillows
    return image.height, image.width, 3, image.tobytes()


def _both(path: str, error: DecodeError, pillows: Exception, read: ReadOptions) -> DecodeError:
    """What is said of a file that neither can read."""
    wanted = plugins.wanted(path)
    if wanted is not None:
        text = f"{path} cannot be decoded: it is {wanted.name}, which Pillow cannot read here: {wanted.install}"
    elif error.kind == "unsupported" and not read.is_plain:
        # It was left to Pillow.
        text = f"{path} cannot be decoded: {pillows}"
    else:
        return error
    found = DecodeError(text)
    found.kind = "unsupported" if wanted is not None else "damaged"
    return found
