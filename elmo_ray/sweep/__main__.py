"""`python -m elmo_ray.sweep`."""

import sys

from elmo_ray.sweep import main

sys.exit(main())
