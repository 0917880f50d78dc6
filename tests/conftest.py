"""What every test shares; that it lies here makes `models` and the other modules beside it importable."""

import os

# Tests probe anew, and leave the cache of whoever runs them alone; programs that they start inherit this.
os.environ["DOWSER_CACHE"] = "off"
