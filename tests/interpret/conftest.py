"""Generated kernels in Triton's interpreter: a process of its own, because the switch is read when triton is imported.

    TRITON_INTERPRET=1 pytest tests/interpret

Without the switch nothing here is collected.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]
