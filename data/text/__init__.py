"""Documents to token sequences: where text comes from, how it is cut, what is held out."""

from .corpus import Corpus as Corpus
from .corpus import TokenSequence as TokenSequence
from .corpus import load_corpus as load_corpus
from .corpus import tokenizer_fingerprint as tokenizer_fingerprint
from .dataset import DatasetSettings as DatasetSettings
