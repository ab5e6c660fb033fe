"""How a store lies on disk: places and locks, number formats, the Zarr layout, the order of rows."""

from .codecs import CODECS as CODECS
from .codecs import DTYPES as DTYPES
from .codecs import FLOAT16_MAX as FLOAT16_MAX
from .codecs import Int8Rows as Int8Rows
from .codecs import channel_scale as channel_scale
from .codecs import quantise as quantise
from .layout import BLOCK_ROWS as BLOCK_ROWS
from .layout import COLUMNS as COLUMNS
from .layout import CRC_BYTES as CRC_BYTES
from .layout import FORMAT as FORMAT
from .layout import VERSION as VERSION
from .layout import ArraySpec as ArraySpec
from .layout import StoreLayout as StoreLayout
from .lock import StoreLock as StoreLock
from .place import Place as Place
from .place import Read as Read
from .place import read_fully as read_fully
from .place import read_json as read_json
from .place import room as room
from .place import write_json as write_json
from .shuffle import Blocks as Blocks
from .shuffle import Order as Order
from .shuffle import Span as Span
from .shuffle import hashed as hashed
from .shuffle import permutation as permutation
