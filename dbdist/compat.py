"""The documented name of `dbdist.inference.published`."""

from dbdist.inference.published import PublishedConfig, PublishedViT, load_published_vit

__all__ = ["PublishedConfig", "PublishedViT", "load_published_vit"]
