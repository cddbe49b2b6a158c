"""Trace where information flows in vision-language models.

`import mmflow_utils as mm` is cheap: what it offers (`__init__.pyi` lists it) is imported when it is first
used, so a script that only draws figures never loads torch. What only one notebook needs is imported from its
room: `from mmflow_utils.prompts.flows import PARTS_TO_LAST`.

>>> import mmflow_utils as mm
>>> mm.Params().model
'mini'
"""

from importlib.metadata import PackageNotFoundError, version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

try:
    __version__ = version("mmflow-utils")
except PackageNotFoundError:  # a checkout that nobody installed
    __version__ = "0+unknown"
