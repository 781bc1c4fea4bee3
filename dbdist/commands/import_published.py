"""Converts weights of the published ViT code to a model for `dbdist.load(OUT)`.

    dbdist import-published CKPT OUT

CKPT is a .safetensors file or a Lightning .ckpt, of which only plain tensors are read; nothing is
executed.
"""

import sys
from pathlib import Path

from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.data.options import ImageOptions
from dbdist.data.sources import dataset_spec
from dbdist.errors import ConfigError
from dbdist.inference.published import import_published


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist import-published", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    parser = OneLineParser(prog="dbdist import-published", description=__doc__)
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="published weights: a file of safetensors, torch.save or Lightning",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--num_heads", type=int, help="attention heads, where the file does not say"
    )
    parser.add_argument("--num_blocks", type=int, help="blocks B, where the file does not say")
    parser.add_argument(
        "--data", help="dataset whose normalisation the weights expect, e.g. cifar100"
    )
    given = parser.parse_args(argv)

    spec = None
    if given.data is not None:
        known = ("cifar10", "cifar100", "tiny-imagenet")
        if given.data not in known:
            raise ConfigError(f"--data is {given.data}; it must be one of {', '.join(known)}")
        spec = dataset_spec(ImageOptions(name=given.data))
    sizes = {"num_heads": given.num_heads, "num_blocks": given.num_blocks}
    import_published(Path(given.checkpoint), Path(given.out), sizes, spec)
    print(f"{given.out}: dbdist.load({given.out!r}).predict(images)")


if __name__ == "__main__":
    main()
