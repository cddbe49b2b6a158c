"""The packages that `make` installs, each at its version."""

import re

from packaging.utils import canonicalize_name

from mmflow_utils.params import ROOT

LOCK = {
    canonicalize_name(name): pinned
    for name, pinned in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.M)
}
