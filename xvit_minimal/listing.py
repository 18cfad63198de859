"""What folders hold and lists say: files of pictures, names of pictures, names of classes."""

import codecs
import hashlib
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

PASSED_OVER = (  # suffixes of pictures that are not read
    *(".apng", ".avif", ".dcm", ".dng", ".exr", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe"),
    *(".jxl", ".npy", ".psd", ".svg", ".tga"),
)


def is_picture(file):
    """Whether a file has the suffix of a picture that is read, in small or capital letters."""
    return file.suffix.lower() in IMG_EXTENSIONS


def files_below(folder):
    """All files in a folder and its sub-folders but hidden ones, sorted; each folder is read once.

    Raises ValueError for a folder that cannot be opened or a link that leads back to one above it.
    """
    top, found, seen = Path(os.path.realpath(folder)), [], set()

    def refuse(error):
        raise ValueError(f"{error.filename}: cannot be opened ({error.strerror}): allow it")

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if Path(place) != Path(folder) and top.is_relative_to(real):
            raise ValueError(f"{place}: a link back to {real}, above it: remove the link")
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(found)


def digest(files):
    """The sha256, in hex, of the files' content."""
    parts = (hashlib.sha256(file.read_bytes()).digest() for file in files)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def passed_over(files, where):
    """A note, in a tuple, on those of the files that look like pictures and are not counted."""
    suffixes = sorted({file.suffix.lower() for file in files})
    if not files:
        return ()
    return (f"{where}, passed over: {len(files)} ({', '.join(suffixes)})",)


def read_lines(file):
    """The lines of a text file without the blanks around them: UTF-8 or, with its mark, UTF-16.

    Raises ValueError, naming the file, if it is missing or in another encoding.
    """
    if not file.is_file():
        raise ValueError(f"{file}: missing, expected one name a line: add it")
    content = file.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds a zero byte")
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{file}: not text in UTF-8 ({error}): save it as UTF-8") from error
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text)]


def listed_pictures(file):
    """The names of pictures in a list: the first word of each line; numbers may follow it.

    Lines that are empty or begin with # are passed over. Raises ValueError for a name with a blank
    in it, or one that stands there twice.
    """
    lines = [line.split() for line in read_lines(file) if line and not line.startswith("#")]
    for name, *more in lines:
        if not all(word.lstrip("-").isdigit() for word in more):
            raise ValueError(
                f"{file}: got the line {' '.join([name, *more])!r}, expected a name without "
                "blanks: rename the picture"
            )
    names = [name for name, *_ in lines]
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(
                f"{file}: got {name!r} {count} times, expected it once: remove the rest"
            )
    return names


def listed_classes(file):
    """The names of classes, line by line: the n-th line names class n - 1. At most 255.

    Raises ValueError, naming the file, for a blank line between names, a line that begins with #
    (there are no comments), a name that stands there twice, and for less than two or too many
    names.
    """
    lines = read_lines(file)
    while lines and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            raise ValueError(
                f"{file}: line {number} is {line!r}, expected the name of class {number - 1} (no "
                "blank lines, no comments): write one name a line"
            )
    if not 2 <= len(lines) <= 255:
        raise ValueError(
            f"{file}: got {len(lines)} classes, expected 2 to 255 (255 is the value of void): name "
            "the background, too"
        )
    check_names(lines, file)
    return tuple(lines)


def check_names(names, where):
    """Notes, a tuple, on names of classes that differ by case alone.

    Raises ValueError if two look alike: the same but for blanks around them or for how Unicode
    writes their letters; or if one cannot be printed.
    """
    plain = [unicodedata.normalize("NFC", name.strip()) for name in names]
    for name in plain:
        if not name or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"{where}: got the class name {name!a}, expected text: rename it")
    if twice := [name for name, count in Counter(plain).items() if count > 1]:
        raise ValueError(f"{where}: got class {twice[0]!r} twice, expected it once: rename one")
    cases = Counter(name.casefold() for name in plain)
    alike = [name for name in plain if cases[name.casefold()] > 1]
    return (f"{where}: classes {alike} differ by case alone",) if alike else ()
