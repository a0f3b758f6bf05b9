"""Loading of codecs and classifiers of images."""

from __future__ import annotations

from pathlib import Path

from ppl_diffusion.imaging.classifier import ImageClassifier
from ppl_diffusion.imaging.codec import ImageCodec
from ppl_diffusion.imaging.codec_error import CodecError
from ppl_diffusion.models.cards import codecs, find_folder, list_classifiers


def load_codec(name_or_dir: str | Path) -> ImageCodec:
    """Load a shipped codec by its name, or any codec from its folder.

    :param name_or_dir: a name out of :func:`~ppl_diffusion.models.codecs`, or a folder written by
        :meth:`~ppl_diffusion.imaging.ImageCodec.save`.
    :raises ValueError: if there is no such codec, or its files are damaged.
    :raises FileNotFoundError: if the folder lacks a file.
    """
    return ImageCodec.load(find_folder(name_or_dir, codecs(), "codec"))


def load_codec_error(name_or_dir: str | Path) -> CodecError:
    """Load what a codec leaves out of the images it was not trained on.

    :param name_or_dir: as in :func:`load_codec`.
    :raises ValueError: if there is no such codec.
    :raises FileNotFoundError: if its folder holds no error.
    """
    return CodecError.load(find_folder(name_or_dir, codecs(), "codec"))


def load_classifier(name_or_dir: str | Path) -> ImageClassifier:
    """Load a shipped classifier of images by its name, or any classifier from its folder.

    :param name_or_dir: a name out of :func:`~ppl_diffusion.models.list_classifiers`, or a folder
        written by :meth:`~ppl_diffusion.imaging.ImageClassifier.save`.
    :raises ValueError: if there is no such classifier, or its files are damaged.
    :raises FileNotFoundError: if the folder lacks a file.
    """
    return ImageClassifier.load(find_folder(name_or_dir, list_classifiers(), "classifier"))
