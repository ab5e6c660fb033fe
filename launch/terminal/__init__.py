"""What the user sees while a command works, and when it ends."""

from .closing import Closing as Closing
from .closing import figure as figure
from .closing import table as table
from .progress import Bars as Bars
from .progress import Lines as Lines
from .progress import Unseen as Unseen
from .progress import Watched as Watched
from .progress import duration as duration
from .progress import rate as rate
