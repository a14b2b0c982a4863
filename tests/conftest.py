"""No test reaches the network, or leaves modules in the user's home."""

import os
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="megadyn-tests-")}    # read on import
