"""Before numpy is imported: workers side by side are quicker with one thread each than with all of them."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
