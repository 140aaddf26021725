"""Training data: what there is to learn from, and the order in which ranks read it."""

from shardwise.data.corpus import Corpus
from shardwise.data.files import AudioFolder, ImageFolder
from shardwise.data.loader import Loader
from shardwise.data.text import ByteText

__all__ = ["AudioFolder", "ByteText", "Corpus", "ImageFolder", "Loader"]
