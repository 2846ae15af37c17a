"""The script, cut into its cells."""

import re
import textwrap

from make_notebook import GUARD, SCRIPT

SOURCE = SCRIPT.read_text(encoding="utf-8")
CELLS = re.split(r"(?m)^(?=# %%)", SOURCE)[1:]                   # each with its first line
PROSE = [cell for cell in CELLS if cell.startswith("# %% [markdown]\n")]
CODE = [cell.removeprefix("# %%\n") for cell in CELLS if cell.startswith("# %%\n")]
DEMONSTRATING = [cell for cell in CODE if cell.startswith(GUARD)]
DEFINING = [cell for cell in CODE if not cell.startswith(GUARD)]


def demonstrations(title):
    """The code of the demonstrating cells below a heading that begins so, such as `4.4 `, unguarded."""
    found, heading = [], ""
    for cell in CELLS:
        if cell in PROSE:
            heading = ["", heading, *re.findall(r"(?m)^###? (.+)$", cell)][-1]
        elif heading.startswith(title) and GUARD in cell:
            found.append(textwrap.dedent(cell.partition(GUARD)[2]))
    assert found, f"no cell demonstrates anything below {title!r}"
    return found
