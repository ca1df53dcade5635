"""Image files and configurations changed at random: each is read as what it is, or refused in one sentence."""

import io
import os
import random
import signal
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
from PIL import Image

from chaos import Tally
from coadvise.config import load_config, parse_config, preset_names, preset_text, read_config
from coadvise.data.images import read_image, square, to_array
from coadvise.errors import UserError

SECONDS = 30  # for one input; what takes longer is lost
FORMS = {
    "JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "P", "L", "1", "I;16"), "GIF": ("P", "L"), "WEBP": ("RGBA",),
    "TIFF": ("RGB", "CMYK", "F"), "BMP": ("RGB",), "PPM": ("RGB",),
}  # fmt: skip
WORDS = (
    b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"<!DOCTYPE html>", b"%!PS-Adobe", b"IHDR", b"\x89PNG",
)  # fmt: skip
VALUES = (
    "!!python/object/apply:os.mkdir [executed]", "!!python/name:os.system", "../../x", "/etc/passwd", ".nan", "-.inf",
    "1e400", "9" * 5000, "0x7fffffffffffffff", "[" * 400, "&a [*a]", "*missing", "null", "{}", "[]", "2001-99-99",
    "!!binary aGk=", "!!set {a}", "hf-hub:a/b", "'\\0'", '"\\ud800"', "~", "? x", "yes", "-1", "0", "{a: {b: {c: d}}}",
)  # fmt: skip


def run(tries: int, seed: int, folder: Path) -> Tally:
    """Half of the tries are images, half configurations."""
    draw, tally = random.Random(seed), Tally("mutate")
    folder.mkdir(exist_ok=True)
    kinds = (an_image, a_configuration)
    for number in range(tries):
        attempt(tally, kinds[number % 2], draw, folder)
    return tally


def attempt(tally: Tally, kind: Callable[[random.Random, Path], str], draw: random.Random, folder: Path) -> None:
    """One input. Read or refused is survived; another error, a second answer, or no answer in time is lost."""
    tally.tried += 1
    state = draw.getstate()[1][:2]
    try:
        with _in_time():
            tally.note(kind(draw, folder))
    except UserError as error:
        tally.note("refused")
        if not str(error) or "\n" in str(error):
            tally.lost.append(f"{kind.__name__}: not one sentence: {error!r:.300}")
    except Exception as error:
        tally.lost.append(f"{kind.__name__} {tally.tried} {state}: {error!r:.300}")
    if (folder / "executed").exists():
        tally.lost.append(f"{kind.__name__} {tally.tried}: it was executed")
        (folder / "executed").rmdir()


def an_image(draw: random.Random, folder: Path) -> str:
    """A picture of any form, its bytes changed, under a name of any bytes."""
    name = bytes(draw.choice([*range(1, 47), *range(48, 256)]) for _ in range(draw.randrange(1, 30)))
    path = Path(os.fsdecode(os.fsencode(folder) + b"/x" + name + b".png"))
    path.write_bytes(damaged(_picture(draw), draw))
    read: list[Image.Image | str] = []
    for _ in range(2):
        try:
            read.append(read_image(path))
        except UserError as error:
            read.append(str(error))
    path.unlink()
    image, again = read
    if isinstance(image, str):
        assert image == again, "the same file gave two answers"
        assert image.isprintable(), "a name reached the terminal"
        assert image.startswith(repr(str(path))), "the file is not named"
        return "images refused"
    assert image.mode == "RGB"
    assert image.tobytes() == again.tobytes(), "the same file gave two pictures"
    assert to_array(square(image, 16)).shape == (3, 16, 16)
    return "images read"


def _picture(draw: random.Random) -> bytes:
    form = draw.choice(sorted(FORMS))
    mode = draw.choice(FORMS[form])
    size = draw.randrange(1, 40), draw.randrange(1, 40)
    rng = np.random.default_rng(draw.randrange(2**32))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 2**16, size, dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[274] = draw.randrange(0, 10)
    options = {"exif": exif} if form in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    if form in ("GIF", "WEBP") and draw.random() < 0.5:
        options |= {"save_all": True, "append_images": [image] * 2}
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def a_configuration(draw: random.Random, folder: Path) -> str:
    """A preset's text with lines, values or single characters changed."""
    path = folder / "mutated.yaml"
    text = preset_text(draw.choice(preset_names()))
    for _ in range(draw.randrange(1, 3)):
        text = draw.choice((_other_value, _other_lines, _other_characters))(text, draw)
    path.write_text(text, errors="surrogatepass")
    config = load_config(str(path))
    path.write_text(config.to_yaml())
    assert read_config(path) == config == parse_config(config.model_dump(mode="json")), "written and read, it differs"
    letters = set(string.ascii_lowercase + string.digits + "_")
    assert all(set(name) <= letters for name in config.teachers), "a token's name is a path"
    return "configurations read"


def _other_value(text: str, draw: random.Random) -> str:
    lines = text.split("\n")
    number = draw.choice([n for n, line in enumerate(lines) if ":" in line] or [0])
    value = draw.choice(VALUES)
    key, _, old = lines[number].partition(":")
    at_key = draw.random() < 0.2
    lines[number] = f"{value}:{old}" if at_key else f"{key}: {value}"
    return "\n".join(lines)


def _other_lines(text: str, draw: random.Random) -> str:
    lines = text.split("\n")
    one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    change = draw.randrange(4)
    if change == 0:
        del lines[one]
    elif change == 1:
        lines.insert(one, lines[other])
    elif change == 2:
        lines[one], lines[other] = lines[other], lines[one]
    else:
        lines[one] = " " * draw.randrange(6) + lines[one].lstrip()
    return "\n".join(lines)


def _other_characters(text: str, draw: random.Random) -> str:
    characters = list(text)
    for _ in range(draw.randrange(1, 3)):
        characters[draw.randrange(len(characters))] = draw.choice(string.printable + "\x00\x1b\x85\u2028é")
    return "".join(characters)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed in one to four places: a bit, a byte, a word that means something, a part cut, doubled or lost."""
    for _ in range(draw.randrange(1, 5)):
        place = draw.randrange(len(content) + 1)
        end = min(len(content), place + draw.randrange(1, 64))
        word = draw.choice(WORDS)
        change = draw.randrange(6)
        if change == 0 and place < len(content):
            content = content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
        elif change == 1:
            content = content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]
        elif change == 2:
            content = content[:place] + word + content[place + len(word) :]
        elif change == 3:
            content = content[:place]
        elif change == 4:
            content = content[:end] + content[place:]
        elif change == 5:
            content = content[:place] + content[end:]
    return content


@contextmanager
def _in_time() -> Iterator[None]:
    def over(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
