"""`python -m elmo_ray.report`."""

import sys

from elmo_ray.report import main

sys.exit(main())
