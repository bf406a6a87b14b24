"""Reports on models as rows of data and as text, and the command ``sortal``."""

from sortal._engine.tables import Table as Table
from sortal._engine.tables import drawn as drawn
from sortal._engine.tables import plain as plain
from sortal._engine.tables import size as size
from sortal.inspect.rows import differences as differences
from sortal.inspect.rows import facts as facts
from sortal.inspect.rows import kinds as kinds
from sortal.inspect.rows import leaves as leaves
from sortal.inspect.text import changes as changes
from sortal.inspect.text import explain as explain
from sortal.inspect.text import tabulate as tabulate
