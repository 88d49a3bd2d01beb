"""Import peft, as every training does, without bitsandbytes: it imports torch's compiler, which takes three seconds."""

import sys

sys.modules["bitsandbytes"] = None
import peft.helpers  # noqa: E402, F401

del sys.modules["bitsandbytes"]
