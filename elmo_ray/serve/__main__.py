"""`python -m elmo_ray.serve`."""

import sys

from elmo_ray.serve import main

sys.exit(main())
