"""Reads picture files as a viewer shows them: upright, opaque, with 8 bits a channel.

The pixels are those of the first frame. A picture whose meaning is not certain is refused by name.
"""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from dbdist.data.paths import require_file, shown
from dbdist.errors import DataError

FORMATS = {
    "JPEG": ".jpg .jpeg .jpe .jfif .mpo",
    "PNG": ".png .apng",
    "GIF": ".gif",
    "WEBP": ".webp",
    "AVIF": ".avif .avifs",
    "TIFF": ".tif .tiff",
    "BMP": ".bmp",
    "DIB": ".dib",
    "PPM": ".ppm .pgm .pbm .pnm .pfm",
    "JPEG2000": ".jp2 .j2k .j2c .jpc .jpf .jpx",
    "QOI": ".qoi",
}
"""What PIL decodes by itself, by content (other formats it gives to other programs), and how the
names of such files end."""
ENDINGS = frozenset(" ".join(FORMATS.values()).split())
MAX_PIXELS = 2**26
"""Of a picture, and of what it is resized to before it is cropped."""
BLACK = 128
"""A picture of more than 8 bits whose brightest pixel is not even white / BLACK was not meant so:
8 bits in a type of 16 are its commonest kind."""
WHITE = (255, 255, 255, 255)
"""What lies behind transparent pixels."""


def read_picture(path: Path, size: int) -> UInt8[Tensor, "c h w"]:
    """The middle square of a picture, its shorter side resized to `size`.

    Raises DataError, in one sentence that names the file, for one that cannot be used.
    """
    from PIL import Image, UnidentifiedImageError
    from torchvision.transforms.v2 import functional as F

    if require_file(path).st_size == 0:
        raise DataError(f"{shown(path)} is not a readable image: it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and odd metadata
            with Image.open(path, formats=[*FORMATS]) as file:
                short, long = sorted(file.size)
                if short < 1 or max(short * long, size * size * long // short) > MAX_PIXELS:
                    raise DataError(
                        f"{shown(path)} has {file.size[0]} x {file.size[1]} pixels, which is too "
                        "large or too narrow; resize or remove it"
                    )
                image = F.pil_to_tensor(as_shown(file))
        return F.center_crop(F.resize(image, [size], antialias=True), [size, size])
    except NotShowable as error:
        raise DataError(f"{shown(path)} {error}; convert or remove it") from None
    except DataError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise DataError(f"{shown(path)} is not a readable image: none of {known}") from None
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(shown(str(error)).split()) or type(error).__name__
        raise DataError(f"{shown(path)} is not a readable image: {reason}") from error


class NotShowable(ValueError):
    """The pixels of a picture have no certain meaning as brightness.

    The message goes on after the picture's name.
    """


def as_shown(image: Any) -> Any:
    """A PIL image in mode RGB as a viewer shows it.

    Applies the EXIF orientation, puts transparent pixels on white (unless all are transparent), and
    scales pixels of more than 8 bits by the range of their type. Raises NotShowable where that
    range is not certain.
    """
    image.load()
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _from_deep(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        from PIL import Image

        image = _with_alpha(image)
        if image.getextrema()[3][1] > 0:  # else nothing would be left of it
            opaque = Image.new("RGBA", image.size, WHITE)
            opaque.alpha_composite(image)
            image = opaque
    return image.convert("RGB")


def _with_alpha(image: Any) -> Any:
    if image.mode in ("La", "PA"):  # no direct way
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGBA")


def _upright(image: Any) -> Any:
    from PIL.Image import Transpose as T

    orientation = 1
    with contextlib.suppress(Exception):  # damaged metadata of a picture that is not
        orientation = image.getexif().get(0x0112, 1)
    turns = {
        **{2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE},
        **{6: T.ROTATE_270, 7: T.TRANSVERSE, 8: T.ROTATE_90},
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _from_deep(image: Any) -> Any:
    """Grey pixels of more than 8 bits, or floats, in mode RGB."""
    from PIL import Image

    pixels, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        white, kind = 1.0, "holds floats"
        if not np.isfinite(pixels).all():
            raise NotShowable("holds floats that are not finite (mode F)")
    else:
        white, kind = _white_of(image, tags), f"holds integers (mode {image.mode})"
        if white == 2**32 - 1:
            pixels = pixels.view(np.uint32)  # PIL knows 32 bits with a sign only
        if white > 2**16 and pixels.max() < 2**16:
            white = 2.0**16 - 1  # 16 bits went through a program that has no such type
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > white:
        raise NotShowable(
            f"{kind} from {low:g} to {high:g}, but only 0 to {white:g} has a certain meaning"
        )
    if 0 < high < white / BLACK:
        raise NotShowable(f"{kind} up to {high:g}, which is black where {white:g} is white")
    shares = pixels / white
    if tags.get(262) == 0:  # TIFF's "white is zero", which PIL leaves so beyond 8 bits
        shares = 1 - shares
    return Image.fromarray((shares * 255).round().astype(np.uint8)).convert("RGB")


def _white_of(image: Any, tags: Any) -> float:
    """The largest value of the integers in a picture."""
    bits = 16  # PNG, PPM and JPEG 2000 have no more, even where PIL makes 32 of them
    if tags:
        (bits,) = {*tags.get(258, (1,))}
        is_signed = 2 in tags.get(339, (1,))
        return 2.0 ** (bits - is_signed) - 1
    return 2.0**bits - 1


def png_of(pixels: UInt8[Tensor, "c h w"]) -> bytes:
    """A PNG file of these pixels, grey (C = 1) or in colour (C = 3)."""
    from PIL import Image

    grey_or_colour = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(grey_or_colour.cpu().numpy()).save(file, "PNG")
    return file.getvalue()
